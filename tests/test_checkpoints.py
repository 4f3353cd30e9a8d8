"""Checkpoints: damage is noticed or harmless, the one before is used, a full disk loses nothing."""

import logging
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import meta_of

from tdmpc2_support.errors import UserError
from tdmpc2_support.run.checkpoints import Checkpoints, complete_checkpoints, quiet, read_checkpoint, read_meta
from tdmpc2_support.run.folder import RunFolder


def items_of(step):
    keys = jax.random.split(jax.random.key(step), 4)
    state = {"weights": jax.random.normal(keys[0], (300, 40)), "key": keys[1], "count": jnp.int32(step)}
    replay = {"obs": jax.random.normal(keys[2], (500, 3)), "first": jnp.arange(500) % 7 == 0}
    return {"state": state, "replay": replay | {"pictures": jax.random.bits(keys[3], (50, 64), "uint8")}}


COUNT = {"decisions": 7}


def checkpoints_of(path):
    """The checkpoints of a run of no script, in this folder."""
    return Checkpoints(RunFolder(path, {"seed": 1}), "tdmpc2_jax")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run's folder with checkpoints of steps 200 and 300; that of 100 is gone, as the newest two are kept."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    folder.mkdir()
    with checkpoints_of(folder) as checkpoints:
        for step in (100, 200, 300):
            checkpoints.save(step, COUNT, **items_of(step))
    assert [path.name for path in complete_checkpoints(folder)] == ["300", "200"]
    return folder


def restored_step(folder):
    """The step from which a run goes on, if every number is what was written then."""
    meta, items = checkpoints_of(folder).restore(**items_of(0))
    assert meta["count"] == COUNT
    step = int(items["state"]["count"])
    for mine, written in zip(jax.tree.leaves(items), jax.tree.leaves(items_of(step)), strict=True):
        assert (mine == written).all()
    return step


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_are_noticed_or_harmless_and_the_run_goes_on_from_the_checkpoint_before(
    kept, tmp_path, seed, capsys
):
    rng = np.random.default_rng(seed)
    for i in range(5):
        folder = tmp_path / str(i)
        shutil.copytree(kept, folder)
        files = [path for path in (folder / "checkpoints" / "300").rglob("*") if path.is_file() and path.stat().st_size]
        sizes = np.array([path.stat().st_size for path in files], float)
        path = files[rng.choice(len(files), p=sizes / sizes.sum())] if i % 2 else files[rng.integers(len(files))]
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        if restored_step(folder) == 200:
            err = capsys.readouterr().err
            assert "300 is damaged" in err and "goes on from" in err and "200" in err
            assert list(folder.glob("damaged-300-*")) and [p.name for p in complete_checkpoints(folder)] == ["200"]


def test_deleted_files_are_noticed_or_harmless(kept, tmp_path):
    steps = set()
    files = sorted(p.relative_to(kept) for p in (kept / "checkpoints" / "300").rglob("*") if p.is_file())
    for i, path in enumerate(files):
        shutil.copytree(kept, tmp_path / str(i))
        (tmp_path / str(i) / path).unlink()
        steps.add(restored_step(tmp_path / str(i)))
    assert 200 in steps


def test_a_run_all_of_whose_checkpoints_are_damaged_says_so_of_each(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    for path in complete_checkpoints(tmp_path / "run"):
        (path / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match="300 is damaged .*200 is damaged"):
        checkpoints_of(tmp_path / "run").restore(**items_of(0))


def test_what_a_save_that_was_cut_off_has_left_goes_with_the_next_one(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "250.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with checkpoints_of(tmp_path / "run") as checkpoints:
        checkpoints.save(400, COUNT, **items_of(400))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"300", "400"}


def test_a_checkpoint_without_checksums_is_read_as_it_is(kept):
    checkpoint = complete_checkpoints(kept)[0]
    meta = read_meta(checkpoint, "tdmpc2_jax")
    items = read_checkpoint(checkpoint, {k: v for k, v in meta.items() if "checksum" not in k}, **items_of(0))
    assert int(items["state"]["count"]) == 300


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk can be mounted by root only")
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (tmp_path / "run").mkdir()
        with checkpoints_of(tmp_path / "run") as checkpoints:
            checkpoints.save(100, COUNT, state={"x": jnp.ones(10)})
            noise = jax.random.normal(jax.random.key(0), (2_000_000,))
            with pytest.raises(UserError, match="no space is left for a checkpoint at step 200: .*100 is kept"):
                checkpoints.save(200, COUNT, state={"x": noise})
        assert meta_of(tmp_path / "run")["args"]["seed"] == 1
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["100"]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_arrays_without_numbers_come_back_as_they_were(tmp_path):
    """The embeddings of an agent of one task."""
    item = jax.device_put({"empty": jnp.zeros((1, 0)), "full": jnp.arange(3.0)}, jax.devices()[0])
    with RunFolder(tmp_path / "run", {}) as folder, Checkpoints(folder, "newt_jax") as checkpoints:
        checkpoints.save(5, COUNT, state=item)
        back = checkpoints.restore(state=item)[1]["state"]
    assert back["empty"].shape == (1, 0)
    np.testing.assert_array_equal(back["full"], item["full"])


def test_the_log_of_orbax_is_as_it_was_after_we_used_it():
    log = logging.getLogger("absl")
    before = log.level
    with pytest.raises(UserError), quiet():
        assert log.level == logging.CRITICAL
        raise UserError("damaged")
    assert log.level == before != logging.CRITICAL
