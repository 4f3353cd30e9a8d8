"""A fork in practice: the diffs of examples/ apply to the script, and what they change is trained, saved and used."""

import contextlib
import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL
from helpers import ROOT, read_scalars

from tdmpc2_support.run.schedule import random_streams


def script_of(path):
    """Name of the script that a diff changes."""
    return path.read_text().splitlines()[1].removeprefix("--- a/")


DIFFS = sorted((ROOT / "examples").glob("*.diff"))
OF_STATES = [path for path in DIFFS if script_of(path) == "tdmpc2_jax.py"]


def apply(folder, *paths):
    """A copy of the script with these diffs."""
    shutil.copy(ROOT / script_of(paths[0]), folder)
    for path in paths:
        subprocess.run(["git", "apply", path], cwd=folder, check=True)
    return folder / script_of(paths[0])


@pytest.mark.parametrize("path", DIFFS, ids=lambda path: path.stem)
def test_a_change_is_short_and_applies_alone(path, tmp_path):
    assert len(path.read_text().splitlines()) < 25
    compile(apply(tmp_path, path).read_text(), path.stem, "exec")


@pytest.fixture
def fork_with(tmp_path, monkeypatch):
    """fork_with(*diffs) -> the changed script as a module; the current folder is its own."""

    def load(*paths):
        spec = importlib.util.spec_from_file_location("fork", apply(tmp_path, *paths))
        fork = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "fork", fork)
        spec.loader.exec_module(fork)
        monkeypatch.chdir(tmp_path)
        return fork

    return load


@pytest.mark.slow
def test_a_fork_with_all_of_them_trains_evaluates_and_resumes(fork_with, tmp_path, capsys):
    fork = fork_with(*OF_STATES)
    flags = [*SMALL["tdmpc2_jax.py"], *"--task QuietPendulum-v0 --eval-freq 150 --no-compile-cache".split()]
    fork.main([*flags, "--total-timesteps", "150", "--smooth-coef", "0.5"])
    folder = tmp_path / "runs" / "QuietPendulum-v0" / "tdmpc2_jax" / "1"
    assert json.loads((folder / "args.json").read_text())["smooth_coef"] == 0.5
    smooth = [value for _, value in read_scalars(folder, "losses/smooth_loss")]
    assert smooth and min(smooth) > 0
    fork.main([*flags, "--total-timesteps", "200", "--resume"])
    assert [row["step"] for row in csv.DictReader((folder / "eval.csv").open())] == ["0", "150", "200"]
    capsys.readouterr()
    fork.main(["--evaluate", "--checkpoint", str(folder), "--eval-episodes", "2"])
    assert "QuietPendulum-v0: return" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_that_stays_as_it_is_sees_pictures_of_another_size(fork_with):
    fork, task = fork_with(ROOT / "examples" / "own_encoder.diff"), "strange_envs:LargePixels-v0"
    agent = fork.Agent(mlp_dim=16, latent_dim=16, num_q=2, batch_size=8, mpc=False)
    with contextlib.closing(fork.environments.make_envs(task, 2, obs="rgb")) as envs:
        agent = fork.for_task(agent, task, envs)
        obs, _ = envs.reset(seed=1)
        seen = fork.stack_pictures(None, obs, np.ones(2, bool))
        start = fork.fresh_state(agent, random_streams(1))
        params, mean = start["train"].params, jnp.zeros((2, agent.horizon, 1))
        action, *_ = fork.act(agent, params, seen, mean, np.ones(2, bool), start["act_key"], explore=True)
        envs.step(np.asarray(action))

    @jax.jit
    @jax.grad
    def slope(encoder_params):
        return fork.encode(agent, encoder_params, seen, jnp.full((2, 2), fork.SHIFT)).var()

    slopes = slope(params["encoder"])["params"]
    assert not np.any(slopes["Conv_0"]["kernel"]) and np.any(slopes["Dense_0"]["kernel"])
    replay = jax.eval_shape(lambda: fork.init_replay(agent, 50, 2))
    state, info = jax.eval_shape(partial(fork.train, agent, num_updates=2), start["train"], replay)
    assert state.params["encoder"]["params"]["Conv_0"]["kernel"].shape == (16, 16, 9, 64) and "total_loss" in info
