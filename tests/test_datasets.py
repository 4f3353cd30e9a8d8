"""Offline datasets: windows come from the right places of the files, and files that do not fit are named."""

import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from torch_files import pickled, tensor, write_pt

import envs
import tdmpc2_jax_mt as mt
from tdmpc2_support.data import datasets, device_data
from tdmpc2_support.data.device_data import to_devices

ENTRIES, H = 9, 3
STORAGES = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage"}
TASKS = ("walker-walk", "cheetah-run", "cartpole-swingup")  # the largest: 24 observations, 6 actions


def episodes(count, tasks=TASKS, first=0, number_type="f4"):
    """Episodes that tell where they are: obs [episode, entry, 0…], action [entry, 0…], reward entry + episode / 10."""
    sizes = [max(envs.TASKS[task][i] for task in tasks) for i in (1, 2)]
    episode, entry = np.meshgrid(first + np.arange(count), np.arange(ENTRIES), indexing="ij")
    arrays = {"obs": np.zeros((count, ENTRIES, sizes[0])), "action": np.zeros((count, ENTRIES, sizes[1]))}
    arrays["obs"][..., 0], arrays["obs"][..., 1], arrays["action"][..., 0] = episode, entry, entry
    arrays["action"][:, 0] = np.nan
    arrays["reward"] = np.where(entry == 0, np.nan, entry + episode / 10)
    arrays = {name: array.astype(number_type) for name, array in arrays.items()}
    return arrays | {"task": (episode % len(tasks)).astype("i8")}


def write_chunk(path, arrays):
    tensors, storages = {}, {}
    for key, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        tensors[name] = tensor(STORAGES[array.dtype.str[1:]], str(key), array.size, 0, array.shape, strides)
        storages[str(key)] = array.tobytes()
    return write_pt(path, pickled(tensors), storages)


@pytest.fixture
def folder(tmp_path):
    """Three files of 5, 1 and 20 episodes, of which the last is of half precision."""
    for i, (first, count) in enumerate([(0, 5), (5, 1), (6, 20)]):
        write_chunk(tmp_path / f"chunk_{i}.pt", episodes(count, first=first, number_type="f2" if i == 2 else "f4"))
    return tmp_path


@pytest.mark.parametrize("storage", ["disk", "host"])
def test_every_window_is_as_likely_and_comes_from_one_episode(folder, storage):
    data = envs.load_dataset(TASKS, folder)
    data = data.to_host() if storage == "host" else data
    assert (data.num_episodes, data.num_entries, data.tasks) == (26, 26 * ENTRIES, TASKS)
    batch = data.sample(np.random.default_rng(0), 26 * 6 * 100, H)
    assert {name: (value.shape[0], value.dtype) for name, value in batch.items() if name != "task"} == {
        "obs": (H + 1, np.float32), "action": (H, np.float32), "reward": (H, np.float32)
    }  # fmt: skip
    episode, entry = batch["obs"][..., 0], batch["obs"][..., 1]
    assert (episode == episode[0]).all() and (np.diff(entry, axis=0) == 1).all()
    np.testing.assert_array_equal(batch["action"][..., 0], entry[1:])
    np.testing.assert_allclose(batch["reward"], entry[1:] + episode[1:] / 10, rtol=1e-3)  # half precision
    np.testing.assert_array_equal(batch["task"], episode[0] % 3)
    counts = np.zeros((26, ENTRIES - H))
    np.add.at(counts, (episode[0].astype(int), entry[0].astype(int)), 1)
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert counts.min() > 0 and chi_square < 155 + 4 * np.sqrt(2 * 155)


def test_the_tiers_draw_the_same_and_only_one_holds_the_numbers(folder):
    disk = envs.load_dataset(TASKS, folder)
    host = disk.to_host()
    first, second = (data.sample(np.random.default_rng(3), 64, H) for data in (disk, host))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert disk.nbytes == host.nbytes > 0
    assert not any(array.flags.owndata for chunk in disk.chunks for array in chunk[1:-1])
    assert all(array.flags.owndata for chunk in host.chunks for array in chunk[1:-1])


def test_batches_drawn_ahead_are_those_of_their_numbers(folder):
    data = envs.load_dataset(TASKS, folder)
    batches, later = data.batches(7, 16, H), data.batches(7, 16, H, first=5, readers=1)
    drawn = [next(batches) for _ in range(8)]
    for i in (5, 6, 7):
        np.testing.assert_array_equal(drawn[i]["obs"], next(later)["obs"])
    assert not np.array_equal(drawn[0]["obs"], drawn[1]["obs"])
    np.testing.assert_array_equal(drawn[2]["obs"], data.sample(np.random.default_rng((7, 2)), 16, H)["obs"])
    batches.close()
    later.close()


@pytest.mark.golden
def test_the_recorded_files_open_as_the_set_that_they_are_of(golden, tmp_path):
    (tmp_path / "chunk_0.pt").write_bytes(golden("chunk_0.2.1_float16.pt").read_bytes())
    with pytest.warns(UserWarning, match="1 of the 4 files of mt30"):
        data = envs.load_dataset("mt30", tmp_path)
    batch = data.sample(np.random.default_rng(0), 500, H)
    expected = golden("chunk_0.2.1_float16.npz")["obs"]
    entries = expected.shape[1]
    assert (data.num_episodes, data.num_entries) == (len(expected), len(expected) * entries)
    assert set(batch["obs"][0, :, 0].tolist()) == set(expected[:, : entries - H, 0].ravel().tolist())


def test_a_full_set_of_files_gives_no_warning(tmp_path):
    for i in range(4):
        write_chunk(tmp_path / f"chunk_{i}.pt", episodes(2, envs.TASK_SETS["mt30"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.load_dataset("mt30", tmp_path)


def changed(**arrays):
    return lambda good: good | {name: change(good[name]) for name, change in arrays.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda good: {"obs": good["obs"]}, "chunk_1.pt is no dataset: it must hold obs, action, reward, task"),
        (changed(obs=lambda x: x[..., :17].copy()), "chunk_1.pt: obs has size 17, these tasks need 24"),
        (changed(action=lambda x: x[..., :1].copy()), "chunk_1.pt: action has size 1, these tasks need 6"),
        (changed(reward=lambda x: x[:, 1:].copy()), "chunk_1.pt: reward has shape (4, 8), which does not fit"),
        (changed(task=lambda x: x.astype("f4")), "chunk_1.pt: task is of type float32"),
        (lambda good: {k: v[:0].copy() for k, v in good.items()}, "chunk_1.pt holds no episodes"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, sentence):
    write_chunk(tmp_path / "chunk_0.pt", episodes(4))
    write_chunk(tmp_path / "chunk_1.pt", change(episodes(4)))
    with pytest.raises(envs.UserError, match=re.escape(sentence)) as error:
        envs.load_dataset(TASKS, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("obs", np.nan, "chunk_1.pt: obs of episode 2 is not finite"),
        ("action", np.inf, "chunk_1.pt: action of episode 2 is not finite"),
        ("reward", np.nan, "chunk_1.pt: reward of episode 2 is not finite"),
        ("task", 3, "chunk_1.pt: episode 2 is of task 3, but the set has 3 tasks"),
        ("task", -1, "chunk_1.pt: episode 2 is of task -1, but the set has 3 tasks"),
    ],
)
def test_numbers_that_do_not_belong_there_are_named_when_they_are_drawn(tmp_path, name, value, sentence):
    write_chunk(tmp_path / "chunk_0.pt", episodes(4))
    arrays = episodes(4)
    arrays[name][2, 1:] = value
    arrays[name][2, 0] = value if name == "task" else arrays[name][2, 0]
    write_chunk(tmp_path / "chunk_1.pt", arrays)
    data = envs.load_dataset(TASKS, tmp_path)
    for read in (lambda: next(data.batches(0, 1000, H)), data.to_host, lambda: data.read(0, data.num_entries)):
        with pytest.raises(envs.UserError, match=re.escape(sentence)):
            read()


def test_folders_and_arguments_that_cannot_work_are_one_sentence(folder):
    (folder / "chunk_1.pt").rename(folder / "chunk_1.bak")
    for arguments, sentence in [
        ((TASKS, folder), "chunk_1.pt is missing, though there is chunk_2.pt"),
        ((TASKS, folder / "nowhere"), "nowhere holds neither chunk_0.pt, chunk_1.pt, … nor a folder walker-walk"),
        (("mt31", folder), "unknown task set 'mt31'; there are mt30 and mt80"),
        ((("walker-wolk",), folder), "did you mean 'walker-walk'"),
        ((("pick-ycb",), folder), "task 'pick-ycb' cannot be in a set"),
        ((("Pendulum-v1",), folder), "task 'Pendulum-v1' cannot be in a set"),
        ((("cup-spin", "cup_spin"), folder), "task 'cup-spin' stands twice"),
    ]:
        with pytest.raises(envs.UserError, match=sentence):
            envs.load_dataset(*arguments)
    (folder / "chunk_1.pt").write_bytes((folder / "chunk_0.pt").read_bytes()[:2000])
    with pytest.raises(envs.UserError, match="chunk_1.pt is damaged"):
        envs.load_dataset(TASKS, folder)
    (folder / "chunk_1.bak").rename(folder / "chunk_1.pt")
    with pytest.raises(envs.UserError, match="episodes of 9 entries have no windows of 10"):
        envs.load_dataset(TASKS, folder).sample(np.random.default_rng(0), 2, ENTRIES)


def test_a_dataset_on_disk_takes_no_memory_of_the_process(tmp_path):
    arrays = episodes(40_000)  # 49 MB
    write_chunk(tmp_path / "chunk_0.pt", arrays)
    code = f"""
import envs
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
data = envs.load_dataset({TASKS!r}, {str(tmp_path)!r})
batches = data.batches(0, 256, 3)
next(batches)
before = anonymous()
for _ in range(300):
    next(batches)
print(data.nbytes, anonymous() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(envs.__file__).parent)
    assert run.returncode == 0, run.stderr
    size, grown = map(int, run.stdout.split())
    assert size > 45e6 and grown < 5e6


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder of episodes of two tasks of other sizes and lengths, and the entries that went in, per task [n, ...]."""
    folder, entries = tmp_path_factory.mktemp("collected"), {}
    for task, steps in (("cartpole-balance", 1150), ("mw-reach", 250)):
        writer, rng = envs.EpisodeWriter(folder, task, 2), np.random.default_rng(0)
        vector = envs.make_envs(task, 2, 0, num_workers=0)
        obs, _ = vector.reset(seed=0)
        action, first, done = np.zeros((2, *vector.single_action_space.shape), np.float32), np.ones(2, bool), None
        reward, log = np.zeros(2), []
        for step in range(steps):
            writer.add(obs, action, reward, first)
            log.append((obs, np.where(first[:, None], 0, action), np.where(first, 0, reward)))
            if step == 600:
                writer.flush()
            action = rng.uniform(-1, 1, action.shape).astype(np.float32)
            done = np.zeros(2, bool) if done is None else done
            obs, reward, terminated, truncated, _ = vector.step(action)
            first, done = done, terminated | truncated
        writer.flush()
        writer.flush()  # nothing new: no file
        vector.close()
        entries[task] = [np.stack(values) for values in zip(*log, strict=True)]
    return folder, entries


def test_saved_episodes_are_read_back_entry_by_entry(collected):
    folder, entries = collected
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["cartpole-balance/chunk_0.pt", "cartpole-balance/chunk_1.pt", "mw-reach/chunk_0.pt"]
    for task, length in (("cartpole-balance", 501), ("mw-reach", 101)):
        data = envs.load_dataset([task], folder)
        episodes = 4  # two of each environment; what was begun after them is left out
        assert (data.num_episodes, data.num_entries) == (episodes, episodes * length)
        read = data.read(0, data.num_entries)
        for name, written in zip(("obs", "action", "reward"), entries[task], strict=True):
            in_files = [written[k * length : (k + 1) * length, env] for k in range(2) for env in range(2)]
            np.testing.assert_array_equal(read[name], np.concatenate(in_files).astype(np.float32))
        raw = envs.load_pt(folder / task / "chunk_0.pt")
        assert np.isnan(raw["action"][:, 0]).all() and np.isnan(raw["reward"][:, 0]).all(), "filler, as in the original"


def test_episodes_of_several_folders_are_one_set_padded_and_drawn_evenly(collected):
    folder, _ = collected
    data = envs.load_dataset(["mw-reach", "cartpole-balance"], folder)
    assert (data.obs_size, data.action_size, data.num_episodes) == (39, 4, 8)
    batch = data.sample(np.random.default_rng(0), 4000, H)
    assert (batch["obs"].shape, batch["action"].shape) == ((H + 1, 4000, 39), (H, 4000, 4))
    cartpole = batch["task"] == 1
    assert abs(cartpole.mean() - 498 / (498 + 98)) < 0.03, "each window is as likely, whatever the task"
    assert (batch["obs"][:, cartpole, 5:] == 0).all() and (batch["action"][:, cartpole, 1:] == 0).all()
    assert batch["obs"][:, ~cartpole, 36:].any() and batch["action"][:, ~cartpole, 3].all(), "the larger task is whole"
    with pytest.raises(envs.UserError, match="nor a folder walker-walk of such files"):
        envs.load_dataset(["mw-reach", "walker-walk"], folder)


@pytest.mark.parametrize("dtype", ["files", "float16"])
def test_a_set_in_device_memory_gives_the_windows_of_the_files_all_as_likely(folder, dtype):
    import jax

    data = envs.load_dataset(TASKS, folder)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "devices")
    agent = mt.Agent(batch_size=26 * 6 * 100, horizon=H)
    on_device = to_devices(data, dtype, mesh, agent.horizon)
    assert on_device.obs.dtype == (np.float16 if dtype == "float16" else np.float32)
    batch = jax.jit(mt.sample, static_argnums=0)(agent, on_device, jax.random.key(0))
    episode, entry = np.asarray(batch.obs[..., 0]), np.asarray(batch.obs[..., 1])
    assert (episode == episode[0]).all() and (np.diff(entry, axis=0) == 1).all()
    np.testing.assert_array_equal(batch.action[..., 0], entry[1:])
    np.testing.assert_allclose(batch.reward, entry[1:] + episode[1:] / 10, rtol=1e-3)  # half precision
    np.testing.assert_array_equal(batch.task, episode[0] % 3)
    counts = np.zeros((26, ENTRIES - H))
    np.add.at(counts, (episode[0].astype(int), entry[0].astype(int)), 1)
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert counts.min() > 0 and chi_square < 155 + 4 * np.sqrt(2 * 155)


def test_a_file_whose_numbers_have_changed_is_named(folder):
    envs.load_dataset(TASKS, folder).check_files()
    path = folder / "chunk_1.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(envs.UserError, match="chunk_1.pt is damaged"):
        envs.load_dataset(TASKS, folder).check_files()


def test_numbers_too_large_for_half_precision_are_refused(tmp_path):
    import jax

    arrays = episodes(4)
    arrays["obs"][1, 2, 0] = 1e5
    write_chunk(tmp_path / "chunk_0.pt", arrays)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "devices")
    with pytest.raises(envs.UserError, match="numbers beyond 65504, the largest of float16"):
        to_devices(envs.load_dataset(TASKS, tmp_path), "float16", mesh, 3)


def test_a_set_is_read_into_the_machines_memory_by_what_that_has_free_whatever_the_device_has(folder, monkeypatch):
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.devices()), "devices")
    data = envs.load_dataset(TASKS, folder)
    monkeypatch.setattr(device_data, "least_available_bytes", lambda: 1)
    for free, expected in ((10 * data.nbytes, "host"), (data.nbytes, "disk")):
        monkeypatch.setattr(device_data, "available_bytes", lambda free=free: free)
        assert device_data.choose_storage("auto", data, "float32", mesh) == expected


def test_writers_of_one_folder_take_turns_and_a_task_that_is_in_no_set_is_refused(tmp_path):
    for _ in range(2):
        writer = envs.EpisodeWriter(tmp_path, "mw-reach", 1)
        for step in range(101):
            writer.add(np.full((1, 39), step), np.zeros((1, 4)), np.ones(1), np.array([step == 0]))
        writer.flush()
    assert sorted(path.name for path in (tmp_path / "mw-reach").iterdir()) == ["chunk_0.pt", "chunk_1.pt"]
    assert envs.load_dataset(["mw-reach"], tmp_path).num_episodes == 2
    with pytest.raises(envs.UserError, match="of 100 decisions, these have 50, another action repeat"):
        envs.EpisodeWriter(tmp_path, "mw-reach", 1, action_repeat=4)
    with pytest.raises(envs.UserError, match="task 'Hopper-v5' cannot be in a set"):
        envs.EpisodeWriter(tmp_path, "Hopper-v5", 1)
    (tmp_path / "walker-walk").mkdir()
    write_chunk(tmp_path / "walker-walk" / "chunk_0.pt", {"something": np.zeros(3, np.float32)})
    with pytest.raises(envs.UserError, match="chunk_0.pt holds no episodes: choose another"):
        envs.EpisodeWriter(tmp_path, "walker-walk", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(envs.UserError, match="episodes cannot be written to"):
        envs.EpisodeWriter(tmp_path / "file", "mw-reach", 1)


def test_a_writer_that_could_not_write_tries_again_when_the_next_episode_has_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "_BYTES_AT_ONCE", 1)
    writer = envs.EpisodeWriter(tmp_path, "mw-reach", 1)
    shutil.rmtree(tmp_path / "mw-reach")
    for step in range(3 * 101 - 1):
        writer.add(np.zeros((1, 39)), np.zeros((1, 4)), np.ones(1), np.array([step % 101 == 0]))
    assert capsys.readouterr().err.count("cannot be written to") == 2
    (tmp_path / "mw-reach").mkdir()
    writer.flush()
    assert envs.load_dataset(["mw-reach"], tmp_path).num_episodes == 2, "none is lost"


def test_a_dataset_may_have_more_files_than_a_process_may_have_open(tmp_path):
    arrays = {"obs": np.zeros((1, 101, 39), np.float32), "action": np.zeros((1, 101, 4), np.float32)}
    arrays |= {"reward": np.zeros((1, 101), np.float32), "task": np.zeros((1, 101), np.int64)}
    (tmp_path / "mw-reach").mkdir()
    for i in range(30):
        envs.save_tensordict(tmp_path / "mw-reach" / f"chunk_{i}.pt", arrays)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 10, limit[1]))
    try:
        assert envs.load_dataset(["mw-reach"], tmp_path).num_episodes == 30
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_episodes_of_pictures_are_written_and_read_as_they_are_and_not_taken_for_states(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (101, 2, 64, 64, 3), np.uint8)
    writer = envs.EpisodeWriter(tmp_path, "mw-reach", 2, obs="rgb")
    for step, obs in enumerate(pictures):
        writer.add(obs, np.full((2, 4), step), np.full(2, step), np.full(2, step == 0))
    writer.flush()
    data = envs.load_dataset(["mw-reach"], tmp_path, obs="rgb")
    data.check_files()
    assert (data.num_episodes, data.obs_shape, data.obs_type) == (2, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(data.read(95, 107)["obs"], pictures.swapaxes(0, 1).reshape(-1, 64, 64, 3)[95:107])
    batch = data.sample(rng, 50, H)
    assert batch["obs"].shape == (H + 1, 50, 64, 64, 3) and batch["obs"].dtype == np.uint8
    step = batch["reward"][0].astype(int)
    match = (batch["obs"][1][:, None] == pictures[step]).all((2, 3, 4))  # of one of the two environments
    assert match.any(1).all()
    with pytest.raises(envs.UserError, match="holds episodes of pictures, states are needed"):
        envs.load_dataset(["mw-reach"], tmp_path)
    with pytest.raises(envs.UserError, match="holds episodes of pictures, these are of states"):
        envs.EpisodeWriter(tmp_path, "mw-reach", 1)
