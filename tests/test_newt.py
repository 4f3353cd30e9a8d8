"""Newt: what is stored of episodes of different lengths, runs as a user sees them, demonstrations, embeddings, devices.
The tasks are three that count their steps, with episodes of 12, 6 and 4 decisions."""

import contextlib
import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_devices
from helpers import ROOT, likelihoods, meta_of, read_scalars, terminations, two_processes, wait_for, write_episodes

import envs
import newt_jax as newt
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support import devices
from tdmpc2_support.agents.fold import fold_task
from tdmpc2_support.agents.pretrained import LoadedAgent, load_newt
from tdmpc2_support.data.demonstrations import Episode, in_columns, read_demonstrations
from tdmpc2_support.data.embeddings import SHIPPED, read_embeddings
from tdmpc2_support.data.pt import save_tensordict
from tdmpc2_support.envs.vector import shared_out
from tdmpc2_support.run.checkpoints import complete_checkpoints

SCRIPT = newt
LENGTHS = (12, 6, 4)
NAMES = tuple(f"strange_envs:Counting{length}-v0" for length in LENGTHS)
FOLDER = "+".join(NAMES)
TASKS = ("--tasks", ",".join(NAMES))
RUN = (*TASKS, "--total-timesteps", 120, "--eval-freq", 60, "--checkpoint-freq", 60, "--utd", 0.2, "--seed-steps", 60)
PRETRAINED = (*RUN, "--pretrain-updates", 20, "--exp-name", "demos")


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Five episodes of the first task and three of the last, as mmbench has them, with returns that differ."""
    folder = tmp_path_factory.mktemp("demos")
    for task, number in ((0, 5), (2, 3)):
        rows = LENGTHS[task] + 1
        obs = np.zeros((number, rows, 128), np.float32)
        obs[..., 0], obs[..., 1], obs[..., 2] = task, 100 + np.arange(number)[:, None], np.arange(rows)
        action = np.zeros((number, rows, 16), np.float32)
        action[..., 0] = 0.5
        reward = np.tile(np.arange(number, dtype=np.float32)[:, None], (1, rows))
        action[:, 0], reward[:, 0] = np.nan, np.nan
        episode = np.repeat(np.arange(number), rows)
        tensors = {"obs": obs.reshape(-1, 128), "action": action.reshape(-1, 16), "reward": reward.reshape(-1)}
        if task == 2:  # of these the first one was ended by the environment
            tensors["terminated"] = (np.arange(number * rows) == rows - 1).astype(np.uint8)
        save_tensordict(folder / f"{NAMES[task]}.pt", tensors | {"episode": episode})
    return folder


def test_the_sizes_of_the_models_are_those_of_the_paper():
    for size, one, soup in (
        ("S", 1_291_316, 2_143_284),
        ("B", 5_033_342, 7_261_566),
        ("L", 15_638_142, 20_356_734),
        ("XL", 70_056_904, 81_591_240),
    ):
        for task_dim, expected in ((0, one), (512, soup)):
            agent = newt.with_model_size(
                newt.Agent(model_size=size, obs_dim=128, action_dim=16, task_dim=task_dim), True
            )
            params = jax.eval_shape(lambda agent=agent: newt.init_params(agent, jax.random.key(0)))
            params.pop("task_emb")
            assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_plans_begin_with_the_policy_up_to_a_step_and_less_and_less_after_it():
    agent = newt.Agent(constraint_start=100, constraint_end=1000)
    shares = [newt.prior_share(agent, step) for step in (0, 99, 100, 550, 1000, 1100, 5000, None)]
    np.testing.assert_allclose(shares, [1, 1, 1, 0.55, 0.1, 0, 0, 0])
    assert newt.prior_share(dataclasses.replace(agent, constrained=False), 0) == 0


def test_the_soup_is_the_papers_as_far_as_it_can_be_made_here():
    assert len(set(envs.SOUP)) == 200 and envs.SOUP[1] == "walker-walk" and envs.SOUP[-1] == "atari-yars-revenge"
    names = envs.online_tasks("soup")
    assert [name for name in envs.SOUP if name in names] == list(names), "in its order"
    domains = [envs.TASKS[name].domain for name in names]
    assert (domains.count("DMControl"), domains.count("Meta-World"), domains.count("MuJoCo")) == (32, 49, 6)
    assert "not in the packages" in envs.why_missing("spinner-spin") and not envs.why_missing("walker-walk")
    assert envs.task_spec("walker-walk-backward").name == "walker-walk-backwards"
    assert envs.discount_of("atari-pong") == 0.99 and envs.discount_of("walker-walk") is None


# ------------------------------------------------------------------------------------------------------------- Replay
@pytest.fixture(scope="module")
def stored(demos, tmp_path_factory):
    """Folders of two runs, without and with demonstrations, and the replays that they have saved last."""
    replays = {}
    runs = tmp_path_factory.mktemp("runs")
    save = newt.Checkpoints.save

    def keep(self, step, *args, replay, **items):
        replays[self.folder] = jax.device_get(replay)
        save(self, step, *args, replay=replay, **items)

    from conftest import SMALL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newt.Checkpoints, "save", keep)
        for flags in (RUN, (*PRETRAINED, "--demos", demos)):
            newt.main([*SMALL["newt_jax.py"], *map(str, flags), "--runs-dir", str(runs)])
    return [(folder, replays[folder]) for folder in (runs / FOLDER / name / "1" for name in ("newt_jax", "demos"))]


def columns(replay):
    """What lies in each environment's column: (task, episode, place) of its entries, the oldest first."""
    rows = int(replay.rows)
    assert rows <= len(replay.first)
    return [replay.obs[:rows, i, :3].astype(int).tolist() for i in range(replay.obs.shape[1])]


@pytest.mark.slow
def test_episodes_of_different_lengths_are_stored_as_they_were(stored, golden):
    _, replay = stored[0]
    recorded = golden("newt_buffer.npz")
    for task, (column, length) in enumerate(zip(columns(replay), LENGTHS, strict=True)):
        assert {entry[0] for entry in column} == {task}
        places = [entry[2] for entry in column]
        resets = np.flatnonzero(replay.first[: len(column), task])
        assert resets[0] == 0 and [places[i] for i in resets] == [0] * len(resets)
        for start, stop in zip(resets, [*resets[1:], len(column)], strict=True):
            assert places[start:stop] == list(range(stop - start)) and stop - start <= length + 1
            assert len({entry[1] for entry in column[start:stop]}) == 1
        whole = np.diff(resets)
        assert (whole == length + 1).sum() >= len(whole) - 1, "but for those that an evaluation has left"
    first = [
        recorded[name] for name in sorted(recorded) if name.startswith("trainer_episode") and name.endswith("_obs")
    ]
    assert any((np.diff(obs[:, 2]) != 1).any() for obs in first), "the original's trainer stores something else"


@pytest.mark.slow
def test_demonstrations_are_in_the_columns_of_their_tasks_before_what_the_environments_do(stored):
    _, replay = stored[1]
    demonstrated = [[entry for entry in column if entry[1] >= 100] for column in columns(replay)]
    assert [len(entries) for entries in demonstrated] == [5 * 13, 0, 3 * 5]
    for task, entries in enumerate(demonstrated):
        length = LENGTHS[task] + 1
        assert entries == [[task, 100 + i // length, i % length] for i in range(len(entries))]
    assert all(column[-1][1] < 100 for column in columns(replay))


@pytest.mark.parametrize("how", ["episodes", pytest.param("windows", marks=pytest.mark.slow)])
def test_windows_are_drawn_as_sample_says_and_half_of_a_batch_is_from_the_demonstrations(how):
    agent = newt.Agent(obs_dim=3, action_dim=1, horizon=2, batch_size=40_000, sample=how)
    replay, valid = write_episodes(td, agent, 0, capacity=40, num_envs=2, steps=60)
    tasks = newt.Tasks(jnp.ones((2, 1)), jnp.ones(2), jnp.zeros(2), jnp.arange(2))
    batch = jax.jit(newt.sample, static_argnums=0)(agent, tasks, replay, None, jax.random.key(0))
    np.testing.assert_array_equal(batch.task, batch.obs[0, :, 0])
    ends = terminations(replay, batch.obs[1:])
    assert ends.any()
    np.testing.assert_array_equal(batch.terminated, ends)
    found, counts = np.unique(np.asarray(batch.obs[0]), axis=0, return_counts=True)
    assert [tuple(window) for window in found.tolist()] == sorted(valid)
    expected = likelihoods(agent, valid)
    np.testing.assert_allclose(counts / agent.batch_size, expected, atol=5 * np.sqrt(expected.max() / agent.batch_size))

    demos = replay._replace(obs=replay.obs + 1000)
    batch = jax.jit(newt.sample, static_argnums=0)(agent, tasks, replay, demos, jax.random.key(0))
    half = agent.batch_size // 2
    assert (batch.obs[:, :half] >= 1000).all() and (batch.obs[:, half:] < 1000).all()


# --------------------------------------------------------------------------------------------------------------- Runs
@pytest.mark.slow
def test_a_run_leaves_a_row_a_task_and_goes_on_with_resume(stored, demos, here, tmp_path, capsys):
    folder, replay = stored[1]
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    steps = [int(row["step"]) for row in rows[::3]]
    assert steps[0] == 20 and steps[-1] >= 140, "after the pretraining, and at the end"
    assert [row["task"] for row in rows[:3]] == list(NAMES)
    assert {row["success"] for row in rows[1::3]} == {"0.5"}, "the last step's"
    meta = meta_of(folder, "newt_jax")
    assert meta_of(stored[0][0], "newt_jax")["args"]["warmup_updates"] == 5000, "as it was given, though not used"
    count = meta["count"]
    assert count["pretrained"] == 20 and 120 <= count["decisions"] < 123
    assert (count["decisions"] - 63) * 0.2 - 1 < count["updates"] <= (count["decisions"] - 60) * 0.2
    assert read_scalars(folder, "losses/pi_prior_loss") and read_scalars(folder, f"charts/episodic_return/{NAMES[2]}")

    runs = str(folder.parent.parent.parent)
    moved = shutil.copytree(demos, tmp_path / "moved")
    more = (*PRETRAINED[:2], "--runs-dir", runs, "--exp-name", "demos", "--resume", "--total-timesteps", 180)
    more = (*more, "--demos", moved)
    status, out, err = here(*more, small=False, name="newt_jax.py")
    assert status == 0, err
    assert "from step 14" in out
    again = meta_of(folder, "newt_jax")["count"]
    assert again["pretrained"] == 20 and 180 <= again["decisions"] < 183 and again["updates"] > count["updates"]
    assert [row["step"] for row in csv.DictReader((folder / "eval.csv").open())][: len(rows)] == [
        r["step"] for r in rows
    ]


@pytest.mark.slow
def test_a_run_begins_with_the_agent_of_another_without_pretraining(stored, demos, here, tmp_path):
    folder, _ = stored[1]
    flags = (*TASKS, "--checkpoint", folder, "--demos", demos, "--exp-name", "tuned", "--seed-steps", 60)
    status, _, err = here(*flags, "--total-timesteps", 60, "--utd", 0.2, name="newt_jax.py")
    assert status == 0, err
    tuned = tmp_path / "runs" / FOLDER / "tuned" / "1"
    assert (meta_of(tuned, "newt_jax")["count"]["pretrained"], meta_of(tuned, "newt_jax")["count"]["updates"]) == (0, 0)
    given, now = (load_newt(str(path), "newt_jax").params for path in (folder, tuned))
    jax.tree.map(np.testing.assert_array_equal, now, given)


@pytest.mark.slow
def test_an_evaluation_counts_every_finished_episode_and_writes_them(stored, here, tmp_path):
    folder, _ = stored[0]
    how = ("--evaluate", "--checkpoint", folder, *TASKS, "--eval-episodes", 2, "--json", "result.json", "--no-mpc")
    status, out, err = here(*how, small=False, name="newt_jax.py")
    assert status == 0, err
    results = json.loads((tmp_path / "result.json").read_text())["tasks"]
    assert [len(results[name]["returns"]) for name in NAMES] == [2, 3, 5], "of 12, 6 and 4 decisions, and a reset each"
    assert "2 to 5 episodes each" in out
    for name, length in zip(NAMES, LENGTHS, strict=True):
        returns = np.array(results[name]["returns"])
        assert ((returns > -length) & (returns <= length)).all(), "of one episode each"


@pytest.mark.slow
def test_a_task_of_a_run_folded_into_the_biases_acts_as_before(stored):
    folder, _ = stored[0]
    loaded = load_newt(str(folder), "newt_jax")
    task = 1
    emb = loaded.task_emb[task]
    many = newt.Agent(**{k: v for k, v in loaded.args.items() if k in vars(newt.Agent())})
    many = dataclasses.replace(many, obs_dim=128, action_dim=16, task_dim=len(emb), num_tasks=3)
    names = ("obs_dim", "action_dim", "mlp_dim", "enc_dim", "latent_dim", "num_enc_layers", "num_q")
    one = td.Agent(**{name: getattr(many, name) for name in names} | {"obs_dim": 3, "action_dim": 2})
    params = fold_task(loaded.params, np.asarray(emb), 3, 2, loaded.learned_emb)
    obs = jax.random.normal(jax.random.key(0), (5, 3))
    row = mt.embed(loaded.task_emb, task) if loaded.learned_emb else emb
    z = newt.networks(many).encoder.apply(loaded.params["encoder"], jnp.pad(obs, ((0, 0), (0, 125))), row)
    z_one = td.networks(one).encoder.apply(params["encoder"], obs)
    np.testing.assert_allclose(z_one, z, atol=1e-5)
    mean = newt.networks(many).pi.apply(loaded.params["pi"], z, row)
    np.testing.assert_allclose(td.networks(one).pi.apply(params["pi"], z), mean[:, [0, 1, 16, 17]], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretraining", "online"])
def test_a_run_killed_again_and_again_in_each_stage_goes_on(start, demos, tmp_path, stage):
    lengths = {"pretraining": (5000, 60), "online": (20, 3000)}[stage]
    flags = (*TASKS, "--demos", demos, "--pretrain-updates", lengths[0], "--total-timesteps", lengths[1], "--utd", 0.2)
    flags = (*flags, "--seed-steps", 60, "--eval-freq", 10_000, "--checkpoint-freq", 30, "--resume")
    folder = tmp_path / "runs" / FOLDER / "newt_jax" / "1"
    last = -1
    for _ in range(10):
        child = start(*flags, name="newt_jax.py")
        wait_for(lambda last=last: any(int(path.name) > last for path in complete_checkpoints(folder)), child)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        last = max(int(path.name) for path in complete_checkpoints(folder))
    child = start(*flags, name="newt_jax.py")
    assert child.wait(timeout=300) == 0, child.communicate()
    rows = [int(row["step"]) for row in csv.DictReader((folder / "eval.csv").open())]
    assert rows == sorted(rows) and rows[-1] >= sum(lengths)


def test_what_cannot_work_is_refused_in_one_sentence(refused, demos, tmp_path, monkeypatch):
    small = ("--buffer-size", 3000)
    assert "unknown task 'walker-wlak'" in refused("--tasks", "walker-wlak,cheetah-run")
    assert "stands twice" in refused("--tasks", "walker-walk,dm_control/walker-walk-v0")
    assert "no embedding of cheetah-jump" in refused(
        "--tasks", "cheetah-jump,walker-walk", "--embeddings", "language", *small
    )
    assert "there is no such file" in refused(*TASKS, "--embeddings", "none.json", *small)
    assert "holds no demonstrations" in refused(*TASKS, "--demos", tmp_path, *small)
    assert "dog-run has 223 observations and 38 actions" in refused("--tasks", "dog-run,walker-walk", *small)
    with monkeypatch.context() as patched:
        patched.setattr(devices, "available_bytes", lambda device=None: 10**10)
        assert "--buffer-size" in refused(*TASKS, "--buffer-size", 2**31 - 1)
    assert "before --horizon 5" in refused(*TASKS, "--horizon", 5, *small)
    assert "evaluate needs --checkpoint" in refused("--evaluate")
    damaged = tmp_path / f"{NAMES[0]}.pt"
    damaged.write_bytes((demos / damaged.name).read_bytes()[:-2000])
    assert str(damaged) in refused(*TASKS, "--demos", tmp_path, *small)
    rows = {"obs": np.full((3, 128), 1e5, np.float32), "action": np.zeros((3, 16), np.float32)}
    rows |= {"reward": np.zeros(3, np.float32), "episode": np.zeros(3, np.int64)}
    save_tensordict(damaged, rows)
    large = refused(*TASKS, "--demos", tmp_path, "--obs-dtype", "float16", "--buffer-size", 20_000)
    assert "--obs-dtype float16" in large and "1e+05" in large
    save_tensordict(damaged, rows | {"episode": np.zeros(0, np.int64)})
    assert "episode has shape (0,)" in refused(*TASKS, "--demos", tmp_path, *small)
    assert "--num-pi-trajs 2 or more" in refused(*TASKS, "--num-pi-trajs", 1)
    assert "is a single-task agent" in refused(*TASKS, "--checkpoint", ROOT / "tests" / "golden" / "single.pt", *small)


# ------------------------------------------------------------------------------------- Demonstrations and embeddings
def test_of_each_task_the_demonstrations_with_the_highest_returns_are_taken_in_their_order(demos, capsys):
    episodes = read_demonstrations(NAMES, demos, best=2)
    assert [(episode.task, episode.obs[0, 1]) for episode in episodes] == [(0, 103), (0, 104), (2, 101), (2, 102)]
    assert all(episode.reward[0] == 0 and not episode.action[0].any() for episode in episodes)
    assert f"no demonstrations of {NAMES[1]}" in capsys.readouterr().err
    ends = [episode.terminated.nonzero()[0].tolist() for episode in read_demonstrations(NAMES, demos)]
    assert ends == [[], [], [], [], [], [LENGTHS[2]], [], []], "only where the file says it"


def test_episodes_are_spread_over_the_columns_of_their_task_and_end_together():
    def episode(task, number, rows):
        ends = np.arange(rows) == rows - 1
        return Episode(task, np.full((rows, 2), number), np.full((rows, 1), number), np.full(rows, number), ends)

    steps = in_columns([episode(0, 1, 4), episode(1, 2, 3), episode(0, 3, 2), episode(0, 4, 1)], 2, 4, 3, 2, multiple=5)
    assert steps["obs"].shape == (5, 4, 3) and steps["first"].shape == (5, 4)
    np.testing.assert_array_equal(steps["reward"].T, [[0, 1, 1, 1, 1], [0, 0, 3, 3, 4], [0, 0, 2, 2, 2], [0] * 5])
    np.testing.assert_array_equal(steps["first"][:, 1], [True, True, True, False, True])
    np.testing.assert_array_equal(steps["terminated"][:, 1], [False, False, False, True, True])
    assert not steps["obs"][..., 2].any()


def test_episodes_that_save_episodes_has_written_are_demonstrations(tmp_path):
    writer = envs.EpisodeWriter(tmp_path, "pendulum-spin", 2)
    for step in range(501):
        writer.add(np.full((2, 3), step), np.zeros((2, 1)), np.array([1.0, 2.0]), np.full(2, step == 0))
    writer.flush()
    episodes = read_demonstrations(("pendulum-spin", "cup-spin"), tmp_path, best=1)
    assert len(episodes) == 1 and episodes[0].obs.shape == (501, 3) and episodes[0].reward.sum() == 1000


def test_embeddings_are_read_from_files_by_either_name_or_are_one_hot_learned_or_none(tmp_path, capsys):
    rows = {"walker-walk-backward": {"text_embedding": [1.0, 2.0], "text": "x"}, "cup-catch": {"e": [1.0, 2.0], "n": 3}}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(rows))
    names = ("walker-walk-backwards", "cup-catch")
    np.testing.assert_array_equal(read_embeddings(names, str(path)), [[1, 2], [1, 2]])
    assert "walker-walk-backwards = cup-catch" in capsys.readouterr().err, "an agent cannot tell them apart"
    np.testing.assert_array_equal(read_embeddings(names, "one-hot"), np.eye(2))
    assert read_embeddings(names, "learned") is None and read_embeddings(names, None) is None
    assert read_embeddings(names[:1], None).shape == (1, 0)
    for content in (b"", np.random.default_rng(0).bytes(100), SHIPPED.read_bytes()[:2000]):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(envs.UserError, match="damaged.npz holds no embeddings"):
            read_embeddings(names, str(tmp_path / "damaged.npz"))
    (tmp_path / "nested.json").write_text("[" * 10**5)
    with pytest.raises(envs.UserError, match="nested.json holds no embeddings"):
        read_embeddings(names, str(tmp_path / "nested.json"))
    shipped = read_embeddings(("walker-walk", "mw-reach"), None)
    assert shipped.shape == (2, 512) and (np.linalg.norm(shipped, axis=1) > 14).all()


# -------------------------------------------------------------------------------------------------------- Terminations
def test_an_agent_that_knows_terminations_goes_on_with_tasks_that_have_none():
    agent = newt.Agent("S", pad_obs=0, pad_action=0)
    both = newt.for_tasks(agent, ("Hopper-v5", "strange_envs:Counting12-v0"), 0, False, warm_up=False)
    shapes = jax.eval_shape(partial(newt.init_params, both), jax.random.key(0), jnp.zeros((2, 0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    loaded = LoadedAgent(
        params, params["q"], task_emb=jnp.zeros((2, 0)), tasks=("Hopper-v5", NAMES[0]), learned_emb=False
    )
    agent = dataclasses.replace(agent, pad_obs=both.obs_dim, pad_action=both.action_dim)
    for tasks, episodic in (((NAMES[0],), True), (("Hopper-v5",), False), (("Hopper-v5",), True)):
        args = newt.Args(agent=dataclasses.replace(agent, episodic=episodic), checkpoint="x")
        _, _, fitted = newt.fit_loaded(args, tasks, loaded)
        assert ("termination" in fitted.params) == (tasks == ("Hopper-v5",) and episodic)


def test_no_value_lies_behind_a_termination():
    sizes = {"enc_dim": 8, "mlp_dim": 8, "latent_dim": 8, "num_enc_layers": 2, "num_q": 2, "task_dim": 2}
    agent = newt.Agent(**sizes, obs_dim=3, action_dim=2, num_tasks=2, can_terminate=True)
    params = newt.init_params(agent, jax.random.key(0), jnp.eye(2))
    target_q = jax.tree.map(jnp.copy, params["q"])
    target_q["params"]["linear_2"]["bias"] += jnp.arange(101) / 50
    tasks = newt.Tasks(jnp.ones((2, 2)), jnp.full(2, 0.9), jnp.ones(2), jnp.arange(2))
    H, B = agent.horizon, 8
    reward, terminated = jnp.arange(1.0 * H * B).reshape(H, B), jnp.zeros((H, B)).at[1, ::2].set(1.0)
    ids = jnp.arange(B) % 2
    batch = newt.Batch(jnp.ones((H + 1, B, 3)), jnp.ones((H, B, 2)), reward, terminated, ids)
    state = newt.init_state(agent, params, target_q, 1.0, jax.random.key(0))
    noise = mt.update_noise(dataclasses.replace(agent, batch_size=B), jax.random.key(1))
    task = newt.task_input(agent, tasks, params["task_emb"], ids)
    target = jax.jit(newt.td_target, static_argnums=0)(agent, state, jnp.ones((H, B, 8)) / 8, batch, task, noise)
    np.testing.assert_array_equal(target == reward, terminated == 1)


@pytest.mark.slow
def test_terminations_are_learned_and_planned_with_in_tasks_that_have_them_only():
    sizes = {
        "enc_dim": 8,
        "mlp_dim": 8,
        "latent_dim": 8,
        "num_enc_layers": 2,
        "num_q": 2,
        "batch_size": 4,
        "task_dim": 2,
    }
    agent = newt.Agent(**sizes, obs_dim=3, action_dim=2, num_tasks=2, can_terminate=True)
    params = newt.init_params(agent, jax.random.key(0), jnp.eye(2))
    params["termination"]["params"]["linear_2"]["bias"] += 9.0  # it expects an end everywhere
    params["reward"]["params"]["linear_2"]["bias"] += jnp.arange(101) / 50
    tasks = newt.Tasks(jnp.ones((2, 2)), jnp.full(2, 0.9), jnp.array([1.0, 0.0]), jnp.arange(2))

    def value(task, agent):
        inputs = newt.task_input(agent, tasks, params["task_emb"], jnp.array(task))
        actions, eps = jnp.zeros((3, 5, 2)), jnp.zeros((5, 2))
        estimate = jax.jit(newt.estimate_value, static_argnums=0)
        return estimate(agent, params, jnp.ones((1, 8)) / 8, actions, inputs, jnp.array([0, 1]), eps)

    without = dataclasses.replace(agent, episodic=False)
    assert (np.abs(value(0, agent)) < np.abs(value(0, without))).all()
    np.testing.assert_allclose(value(1, agent), value(1, without), rtol=1e-5)

    H, B = agent.horizon, agent.batch_size
    batch = newt.Batch(
        jnp.ones((H + 1, B, 3)), jnp.ones((H, B, 2)), jnp.ones((H, B)), jnp.zeros((H, B)), jnp.ones(B, int)
    )
    state = newt.init_state(agent, params, params["q"], 1.0, jax.random.key(0))
    noise = mt.update_noise(agent, jax.random.key(1))
    update = jax.jit(newt.update, static_argnums=(0, 5))
    info = update(agent, tasks, state, batch, noise, False)[1]
    assert info["termination_loss"] == 0
    info = update(agent, tasks, state, batch._replace(task=jnp.zeros(B, int)), noise, False)[1]
    assert info["termination_loss"] > 5


# ------------------------------------------------------------------------------------------------------------- Devices
DEVICES = """
import dataclasses
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh
import newt_jax as newt, tdmpc2_jax as td
from tdmpc2_support import devices
from tdmpc2_support.run.schedule import random_streams
sizes = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=3, task_dim=4, batch_size=16)
agent = newt.Agent(**sizes, obs_dim=6, action_dim=3, num_tasks=8, warmup_updates=0)
rng = np.random.default_rng(0)
R, n = 500, 8
first = rng.random((R, n)) < 0.1
numbers = [rng.normal(size=(R, n, *shape)).astype(np.float32) for shape in ((6,), (3,), ())]
steps = td.Step(*numbers, np.zeros((R, n), bool), first)
tasks = newt.Tasks(jnp.ones((8, 3)), jnp.full(8, 0.95), jnp.zeros(8), jnp.arange(8))
table = rng.normal(size=(8, 4)).astype(np.float32)

def losses(number):
    mesh = Mesh(np.array(jax.devices()[:number]), "devices")
    everywhere = devices.replicated(mesh)
    replay = newt.fill(newt.Args(), agent, mesh, 600, n, steps)
    assert number == 1 or not replay.obs.sharding.is_fully_replicated
    state = jax.device_put(newt.fresh_state(agent, random_streams(1), table)["train"], everywhere)
    here = jax.device_put(tasks, everywhere)
    rows = []
    for pretraining in (True, False):
        for _ in range(5):
            state, info = newt.train(agent, mesh, here, state, replay, replay, 1, pretraining)
            rows.append([float(info[name]) for name in ("total_loss", "value_loss", "pi_prior_loss", "grad_norm")])
    return np.array(rows)

def plans(number):
    mesh = Mesh(np.array(jax.devices()[:number]), "devices")
    params = newt.fresh_state(planner, random_streams(1), table)["train"].params
    inputs = tasks, params, steps.obs[0], np.zeros((n, 3, 3), np.float32), first[0], 0.5, jax.random.key(1)
    inputs = jax.device_put(inputs, devices.replicated(mesh))
    program = newt.act.lower(planner, mesh, *inputs, by="plan", explore=True).compile()
    return program(*inputs)[:2], program.cost_analysis()["flops"]

np.testing.assert_allclose(losses(8), losses(1), rtol=1e-4, atol=1e-6)
planner = dataclasses.replace(agent, num_samples=64, num_elites=8, iterations=2)
(one, work), (eight, share) = plans(1), plans(8)
jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), eight, one)
assert share < work / 6, (share, work)
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_learn_what_one_learns_in_both_stages_and_share_its_plans():
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=with_devices(8), cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr


@pytest.mark.slow
def test_two_processes_share_the_environments_and_learn_what_one_does_until_a_signal_comes_to_either(
    start, here, demos, tmp_path
):
    flags = (*TASKS, "--num-envs", 2, "--demos", demos, "--pretrain-updates", 20, "--seed-steps", 60, "--utd", 0.2)
    flags = (*flags, "--eval-freq", 60, "--log-freq", 10)
    status, out, err = here(*flags, "--total-timesteps", 240, "--exp-name", "one", name="newt_jax.py")
    assert status == 0, err
    forever = ("--total-timesteps", 1_000_000, "--exp-name", "two")
    children = [start(*flags, *forever, *process, name="newt_jax.py") for process in two_processes()]
    one, two = (tmp_path / "runs" / FOLDER / name / "1" for name in ("one", "two"))
    curve = two / "eval.csv"
    wait_for(lambda: curve.exists() and len(curve.read_text().splitlines()) > 12, children[0], seconds=900)
    children[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [128 + signal.SIGTERM] * 2, outputs
    assert "on 2 x cpu" in outputs[0][0] and "normalized score" in outputs[0][0]
    assert "normalized score" not in outputs[1][0], "process 0 prints"
    count = meta_of(two, "newt_jax")["count"]
    assert f"at step {count['pretrained'] + count['decisions']}; --resume continues" in outputs[0][1]
    assert [row["task"] for row in csv.DictReader(curve.open())][:6] == [*NAMES, *NAMES], "each row once"
    for tag in ("losses/consistency_loss", "losses/reward_loss", "losses/pi_prior_loss"):
        values, expected = (dict(read_scalars(run, tag)) for run in (two, one))
        for step in [*expected][:9]:  # the last of them is online
            np.testing.assert_allclose(values[step], expected[step], rtol=1e-3, err_msg=f"{tag} {step}")
    status, out, err = here(*flags, *forever[2:], "--total-timesteps", 1, "--resume", name="newt_jax.py")
    assert status == 0 and "on cpu;" in out, err


def test_rows_that_processes_gather_keep_their_types():
    rows = np.arange(3)
    values = {"a": rows / 3, "b": np.float32([[1, 2], [3, 4], [5, 6]]), "c": rows > 1}
    gathered = devices.gather_rows(values)
    for name, value in values.items():
        assert gathered[name].dtype == value.dtype
        np.testing.assert_array_equal(gathered[name], value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shares_of_environments_are_together_what_all_of_them_are(num_workers):
    def begun(share):
        """First observations of all episodes that begin, with the seed of the environments and with another."""
        tasks = ("strange_envs:Point-v0", NAMES[0])
        make = envs.make_envs(tasks, 3, 7, sizes=(4, 1), share=share, num_workers=num_workers)
        with contextlib.closing(make) as some:
            return np.stack([some.reset()[0], some.reset(seed=3)[0]])

    whole = begun((0, 1))
    assert len(np.unique(whole[:, :3, 0])) == 6
    for k in range(2):
        np.testing.assert_array_equal(begun((k, 2)), whole[:, k::2])


def test_environments_are_shared_out_among_workers_by_what_they_cost():
    assert shared_out([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert shared_out([1, 9, 1, 1, 6, 2], 2) == [[1, 2], [0, 3, 4, 5]]
