"""Latent diffusion MPC: learning by heart, and joint mode, together with the world model from the same replay."""

import csv
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL as FIRST_SMALL
from diffusion_helpers import OBS, SMALL, TINY, A, F, Z, make_planner, make_windows, static
from helpers import meta_of

import tdmpc2_jax as td
import tdmpc2_jax_diffusion as diffusion
from tdmpc2_support.agents.fold import fold_agent
from tdmpc2_support.agents.pretrained import load_agent, read_original
from tdmpc2_support.cli import with_settings
from tdmpc2_support.data.recorded import Recorded, agreement, windows_at
from tdmpc2_support.run.checkpoints import complete_checkpoints, read_checkpoint, read_meta
from tdmpc2_support.run.schedule import random_streams

SCRIPT = diffusion
FIRST = ["--task", "strange_envs:Point-v0", *FIRST_SMALL["tdmpc2_jax.py"], "--checkpoint-freq", "115"]
FIRST += ["--eval-freq", "1000", "--no-compile-cache"]
JOINT = [*FIRST, *TINY, *"--mode joint --planner-start 230 --total-timesteps 300".split()]
NAME = "strange_envs:Point-v0/tdmpc2_jax_diffusion/1"


def changed(scales="1", **fields):
    return dataclasses.replace(SMALL, mode="joint", scales=scales, **fields)


# -------------------------------------------------------------------------------------------------------------- Windows
def replays_of(agent, steps):
    """Replays after so many steps of two environments whose episodes end at random; entries name themselves."""
    rng, n = np.random.default_rng(0), 2
    replays = jax.jit(diffusion.init_replays, static_argnums=(0, 1, 2))(agent, 30, n)
    first, episode, place = np.ones(n, bool), np.zeros(n), np.zeros(n)
    for _ in range(steps):
        obs = np.stack([np.arange(n), episode, place], -1).astype(np.float32)
        done = ~first & (rng.random(n) < 0.1)
        entry = td.Step(obs, obs[:, 2:] / 100, place.astype(np.float32), done, first)
        replays = diffusion.add_to_both(agent, replays, entry)
        episode, place, first = episode + done, np.where(done, 0, place + 1), done
    return replays


@pytest.mark.parametrize("sample", ["windows", "episodes"])
def test_windows_of_the_three_networks_lie_in_one_episode_and_all_of_them_are_drawn(sample):
    agent = changed(future=5, sample=sample, obs_dim=3, action_dim=1, diffusion_batch_size=2000)
    replays = replays_of(agent, 100)
    encoder = {"encoder": jax.jit(td.networks(agent).encoder.init)(jax.random.key(0), jnp.zeros(3))}
    world = diffusion.World(encoder, {}, jnp.ones(1), jnp.float32(0.9))
    windows = jax.device_get(static(diffusion.sample_windows)(agent, world, replays, jax.random.key(0)))
    places = (windows.action[..., 0] * 100).round()  # of the entries behind the first
    assert windows.z.shape == (2000, 6, Z) and windows.action.shape == (2000, 5, 1)
    np.testing.assert_array_equal(np.diff(places), 1)
    np.testing.assert_allclose(windows.reward, places, atol=1e-4)
    assert not windows.terminated[:, :-1].any() and windows.terminated.any(), "an end is the last entry, and some are"

    flat = np.asarray(replays.short.obs).swapaxes(0, 1)  # the ring begins at row 100 % 30 = 10
    episodes = np.roll(flat, -10, axis=1)
    whole = lambda steps: [  # noqa: E731
        tuple(e[i]) for e in episodes for i in range(30 - steps)
        if np.array_equal(np.diff(e[i : i + steps + 1], axis=0), [[0, 0, 1]] * steps)
    ]  # fmt: skip
    z = {np.asarray(row, np.float32).tobytes() for row in windows.z[:, 0]}
    encode = jax.jit(lambda obs: td.networks(agent).encoder.apply(encoder["encoder"], obs))
    expected = np.asarray(encode(np.array(whole(5))))
    distance = np.abs(expected[:, None] - windows.z[None, :, 0]).max(-1)  # [windows that there are, drawn]
    assert (distance.min(0) < 1e-6).all() and (distance.min(1) < 1e-6).all() and len(z) >= 10
    if sample == "windows":
        assert int(replays.long.size) == len(whole(5)) < int(replays.short.size) == len(whole(3))


@pytest.mark.slow
def test_statistics_are_means_over_the_windows_of_all_updates_and_move_slowly_later():
    world, state = make_planner()[0].world, make_planner()[1]
    windows = make_windows(64, seed=1)  # of as many as the statistics are of that are there
    new = diffusion.statistics(SMALL, world, windows)
    moved = static(diffusion.moved_statistics)
    for updates, rate in ((0, 1), (1, 1 / 2), (5000, 0.001)):
        found = moved(SMALL, state._replace(updates=jnp.int32(updates)), world, windows)
        expected = jax.tree.map(lambda x, y, rate=rate: x + rate * (y - x), state.stats, new)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)


# ------------------------------------------------------------------------------------------------------------ By heart
@pytest.mark.slow
def test_networks_learn_sixteen_windows_by_heart_and_the_world_model_stays():
    world = make_planner()[0].world
    agent = dataclasses.replace(SMALL, scales="1", width=32, diffusion_lr=5e-3, num_updates=600)
    windows = make_windows(16, steps=F)
    rows = jnp.arange(16) * (F + 1)
    filler = lambda x: jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2)).reshape(-1, *x.shape[2:])  # noqa: E731
    action, reward = filler(windows.action), filler(windows.reward)
    data = Recorded(windows.z.reshape(-1, Z), action, reward, jnp.zeros(len(reward), int), rows, rows)
    np.testing.assert_array_equal(windows_at(data, rows, F).action, windows.action)
    before = jax.tree.map(np.array, world)
    stats = diffusion.statistics(agent, world, windows)
    state = diffusion.init_diffusion(agent, stats, jax.random.key(0))
    state, info = diffusion.train(agent, state, world, data, num_updates=600)
    jax.tree.map(np.testing.assert_array_equal, before, world)
    assert int(state.updates) == 600 and all(np.isfinite(x) for x in info.values())
    planner = diffusion.planner_of(state, world)

    @jax.jit
    @jax.vmap
    def answers(window, key):
        keys = jax.random.split(key)
        action = diffusion.propose(agent, planner, window.z[0], 1, keys[0])[0]
        zs = diffusion.rollout(agent, planner, window.z[0], window.action[None], keys[1])[0]
        guess = diffusion.score_by_objective(agent, planner, window.z[None], window.action[None])[0]
        return action, zs, guess, diffusion.advantage(agent, world, window)

    action, zs, guess, truth = answers(windows, jax.random.split(jax.random.key(1), 16))
    assert float(((action - windows.action) ** 2).mean() / windows.action.var()) < 0.05
    error = (diffusion.normalise(stats, zs) - diffusion.normalise(stats, windows.z))[:, 1:] / stats.sigma[0]
    assert float((error**2).mean()) < 0.05
    assert agreement(np.asarray(guess), np.asarray(truth))["r2"] > 0.95


# --------------------------------------------------------------------------------------------------------- Exploration
@pytest.mark.slow
def test_exploring_plays_one_of_the_best_the_likelier_the_better(monkeypatch):
    truth = lambda actions: -((actions - 0.3) ** 2).sum((1, 2))  # noqa: E731
    monkeypatch.setattr(diffusion, "score", lambda agent, planner, zs, actions, key: truth(actions))
    planner, keys = make_planner()[0], jax.random.split(jax.random.key(0), 40)
    obs = jnp.asarray(np.random.default_rng(0).normal(size=OBS), jnp.float32)
    begin = jnp.zeros((F, A)), jnp.array(True)

    def places(agent):
        """Of the plans of all keys: their places among the candidates, and the noise of the actions."""

        def one(key):
            action, best, _ = diffusion.plan_by_diffusion(agent, planner, obs, *begin, key, explore=True)
            z = td.networks(agent).encoder.apply(planner.world.params["encoder"], obs)
            candidates = diffusion.candidates_at(agent, planner, z, *begin, jax.random.split(key, 6)[0])
            place = (truth(candidates) > truth(best[None]) + 1e-6).sum()
            return place, jnp.abs(action - jnp.clip(best[0], -1, 1)).max()

        return map(np.asarray, jax.jit(jax.vmap(one))(keys))

    place, noise = places(changed(SMALL.scales, min_std=0.0, explore_temperature=1e-4))
    assert (place == 0).all() and (noise < 1e-6).all()
    place, noise = places(changed(SMALL.scales, min_std=0.05, explore_temperature=1.0))
    counts = np.bincount(place, minlength=4)
    assert counts[0] > counts[2] > 0 and counts[3:].sum() == 0, "top is 3"
    assert 0.01 < np.median(noise) < 0.15


# ----------------------------------------------------------------------------------------------------------------- Runs
def read(checkpoint, Args, script):
    """The items of a checkpoint of a run on the task of these tests."""
    meta = read_meta(checkpoint, script)
    agent = with_settings(Args(), meta["args"]).agent
    agent = dataclasses.replace(td.with_model_size(agent), obs_dim=2, action_dim=1, can_terminate=True)
    if script == "tdmpc2_jax":
        state = lambda: {"state": td.fresh_state(agent, random_streams(0)), "replay": td.init_replay(agent, 3000, 1)}  # noqa: E731
    else:
        learner = diffusion.fresh_learner
        state = lambda: {"learner": learner(agent, 0), "replay": diffusion.init_replays(agent, 3000, 1)}  # noqa: E731
    return read_checkpoint(checkpoint, meta, **jax.eval_shape(state))


def read_joint(checkpoint):
    return read(checkpoint, diffusion.Args, "tdmpc2_jax_diffusion")


def same(one, other):
    """Asserts that two pytrees hold the same numbers, in the same order."""
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(*map(jax.random.key_data if is_key else np.asarray, (x, y)))


def curve(folder):
    return [(row["step"], row["reward"]) for row in csv.DictReader((folder / "eval.csv").open())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a joint run that was not interrupted."""
    runs = tmp_path_factory.mktemp("joint")
    diffusion.main([*JOINT, "--runs-dir", str(runs)])
    return runs / NAME


@pytest.mark.slow
def test_until_the_planner_starts_a_joint_run_is_a_run_of_the_first_script_bit_for_bit(finished, tmp_path):
    td.main([*FIRST, "--eval-episodes", "1", "--total-timesteps", "230", "--runs-dir", str(tmp_path)])
    newest, before = complete_checkpoints(finished)
    assert (newest.name, before.name) == ("300", "230")
    joint = read_joint(before)
    folder = tmp_path / "strange_envs:Point-v0/tdmpc2_jax/1"
    alone = read(complete_checkpoints(folder)[0], td.Args, "tdmpc2_jax")
    same({name: joint["learner"][name] for name in ("train", "act_key")}, alone["state"])
    same([*joint["replay"].short], [*alone["replay"]])
    assert curve(finished)[0] == curve(folder)[0]


@pytest.mark.slow
def test_a_joint_run_learns_all_networks_and_is_evaluated_without_episodes(finished, capsys):
    learner = read_joint(complete_checkpoints(finished)[0])["learner"]
    count = meta_of(finished, "tdmpc2_jax_diffusion")["count"]
    assert (count["decisions"], count["updates"], int(learner["state"].updates)) == (300, 299, 299 // 4)
    for name, net in learner["state"].params.items():
        slow = learner["state"].ema[name]
        moved = [np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (net, slow)), strict=True)]
        assert np.isfinite(moved).all() and max(moved) > 1e-4, name
    assert float(learner["state"].stats.std.min()) >= 0.01 and float(learner["state"].stats.adv_std) != 1
    diffusion.main(["--evaluate", "--checkpoint", str(finished), "--planner", "pi", "--no-compile-cache"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["planner", "pi"]


@pytest.mark.slow
def test_a_joint_run_goes_on_with_its_replay_and_all_that_it_has_learned(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / NAME)
    shutil.rmtree(complete_checkpoints(folder)[0])
    kept = read_joint(complete_checkpoints(folder)[0])
    again = ["--mode", "joint", "--task", "strange_envs:Point-v0", "--runs-dir", str(tmp_path), "--resume"]
    diffusion.main([*again, "--no-compile-cache"])
    found = read_joint(complete_checkpoints(folder)[0])
    count = meta_of(folder, "tdmpc2_jax_diffusion")["count"]
    assert (count["decisions"], count["updates"], int(found["learner"]["state"].updates)) == (300, 299, 299 // 4)
    rows = int(kept["replay"].short.rows)
    for one, other in zip(kept["replay"], found["replay"], strict=True):
        np.testing.assert_array_equal(one.reward[:rows], other.reward[:rows])
        assert int(other.rows) > rows
    assert [step for step, _ in curve(folder)] == ["0", "300"]


@pytest.mark.slow
def test_equal_seeds_give_equal_networks_bit_for_bit(finished, tmp_path):
    diffusion.main([*JOINT, "--runs-dir", str(tmp_path)])
    same(*(read_joint(complete_checkpoints(folder)[0]) for folder in (finished, tmp_path / NAME)))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--world-model", "nowhere"], ["nowhere", "does not exist"]),
        (["--data-dir", "nowhere"], ["--mode joint", "--data-dir"]),
        (["--num-updates", 10], ["--mode joint", "--num-updates"]),
        (["--mode", "offline"], ["--mode offline", "--batch-size", "--planner-start"]),
        (["--task", "Hopper-v5", "--scales", "1,4"], ["--scales 1", "terminate"]),
        (["--future", 50], ["no episode", "50 steps"]),
        (["--seed-steps", 4], ["--seed-steps"]),
        (["--checkpoint", "nowhere"], ["--checkpoint", "--evaluate"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_what_has_no_meaning_in_a_mode_is_refused_in_one_sentence(refused, flags, words):
    sentence = refused(*JOINT, *flags)
    assert all(word in sentence for word in words), sentence


def test_of_a_multi_task_world_model_the_part_of_the_task_is_taken(golden):
    path, task = str(golden("multitask.pt")), "cartpole-swingup"
    original = read_original(path)
    assert original.task_emb is not None
    like = fold_agent(original, task, 5, 1, path).params
    named, implied = (
        load_agent(path, source_task, lambda key: like, "tdmpc2_jax", task=task) for source_task in (task, None)
    )
    jax.tree.map(np.testing.assert_array_equal, named.params, implied.params)
