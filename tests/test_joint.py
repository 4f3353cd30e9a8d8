"""Latent diffusion MPC: learning by heart, and joint mode, together with the world model from the same replay."""

import csv
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL as FIRST_SMALL
from conftest import meta_of
from test_diffusion import MODEL, OBS, SMALL, A, F, Z, compile_in_less_time, made, make_windows, static  # noqa: F401
from test_runs import wait_for

import tdmpc2_jax as first_script
import tdmpc2_jax_diffusion as td
import world_model
from tdmpc2_support.agents.pretrained import load_agent, read_original
from tdmpc2_support.data.recorded import agreement
from tdmpc2_support.run.checkpoints import complete_checkpoints, read_checkpoint, read_meta

SCRIPT = td
TINY = """--width 16 --heads 2 --dynamics-blocks 1 --proposal-blocks 1 --objective-blocks 1 --future 4 --num-proposals 2
--num-policy 1 --diffusion-batch-size 8""".split()
FIRST = ["--task", "strange_envs:Point-v0", *FIRST_SMALL["tdmpc2_jax.py"], "--checkpoint-freq", "100"]
FIRST += ["--eval-freq", "1000", "--no-compile-cache"]
JOINT = [*FIRST, *TINY, *"--mode joint --planner-start 220 --total-timesteps 300".split()]
NAME = "strange_envs:Point-v0/tdmpc2_jax_diffusion/1"
changed = lambda **fields: dataclasses.replace(SMALL, mode="joint", **fields)  # noqa: E731


# -------------------------------------------------------------------------------------------------------------- Windows
def replays_of(args, steps, seed=0):
    """Replays after so many steps of two environments whose episodes end at random; entries name themselves."""
    rng, n = np.random.default_rng(seed), 2
    model = MODEL._replace(obs_dim=3, action_dim=1)
    replays = world_model.init_replays(dataclasses.replace(args, buffer_size=60, num_envs=n), model)
    first, episode, place = np.ones(n, bool), np.zeros(n), np.zeros(n)
    for _ in range(steps):
        obs = np.stack([np.arange(n), episode, place], -1).astype(np.float32)
        done = ~first & (rng.random(n) < 0.1)
        replays = world_model.add_to_both(
            args, replays, td.window_steps(args), obs, obs[:, 2:] / 100, place, done, first
        )
        episode, place, first = episode + done, np.where(done, 0, place + 1), done
    return replays


def test_windows_of_the_three_networks_lie_in_one_episode_and_those_of_the_world_model_are_as_many_as_ever():
    args = changed(scales="1", future=5)
    replays = replays_of(args, 100)
    batch = world_model.sample_long(replays, jax.random.key(0), 2000, 5)
    obs = np.asarray(batch.obs)
    assert obs.shape == (6, 2000, 3) and (np.diff(obs, axis=0) == [0, 0, 1]).all()
    np.testing.assert_allclose(batch.action[..., 0] * 100, obs[1:, :, 2], atol=1e-5)
    np.testing.assert_array_equal(batch.reward, obs[1:, :, 2])
    assert not batch.terminated[:-1].any() and batch.terminated.any(), "an end is the last entry, and there are some"
    flat = np.asarray(replays.short.obs).swapaxes(0, 1)  # the ring begins at row 100 % 30 = 10
    episodes = np.roll(flat, -10, axis=1).reshape(2, 30, 3)
    whole = sum(np.array_equal(np.diff(e[i : i + 6], axis=0), [[0, 0, 1]] * 5) for e in episodes for i in range(25))
    assert int(replays.long.size) == whole == len({*map(tuple, obs[0])})
    alone = first_script.init_replay(30, 2, 3, 1)
    for name in ("size", "rows", "head"):
        assert getattr(replays.short, name).shape == getattr(alone, name).shape
    short = sum(np.array_equal(np.diff(e[i : i + 4], axis=0), [[0, 0, 1]] * 3) for e in episodes for i in range(27))
    assert int(replays.short.size) == short > whole


def test_statistics_are_means_over_the_windows_of_all_updates_and_move_slowly_later(made):  # noqa: F811
    (planner, state), args = made, changed(scales="1", future=F, anchor="current")
    world = planner.world._replace(mask=jnp.ones(A))
    replays = world_model.init_replays(dataclasses.replace(args, buffer_size=200), MODEL)
    rng = np.random.default_rng(0)
    for i in range(30):
        obs, action = rng.normal(size=(1, 5)).astype(np.float32), rng.uniform(-1, 1, (1, A)).astype(np.float32)
        no = np.zeros(1, bool)
        replays = world_model.add_to_both(args, replays, F, obs, action, np.ones(1, np.float32), no, no | (i == 0))
    state = static(td.fresh)(args, MODEL)["state"]
    seen, updates = [], []
    for start in (0, 1, 5000):
        key = state.key
        window_key = jax.random.split(key, 3)[1]
        seen.append(td.statistics(args, MODEL, world, td.sample_windows(args, MODEL, world, replays, window_key)))
        before = jax.tree.map(np.array, state.stats)
        state = state._replace(updates=jnp.int32(start))
        state, _ = td.train(args, MODEL, state, world, replays, num_updates=1)
        updates.append((before, jax.tree.map(np.array, state.stats)))
    for (before, after), new, rate in zip(updates, seen, (1, 1 / 2, 0.001), strict=True):
        expected = jax.tree.map(lambda x, y, rate=rate: x + rate * (y - x), before, new)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), after, expected)


# ------------------------------------------------------------------------------------------------------------ By heart
def test_networks_learn_sixteen_windows_by_heart_and_the_world_model_stays(made):  # noqa: F811
    planner, _ = made
    args = dataclasses.replace(SMALL, width=32, diffusion_lr=5e-3, num_updates=600, scales="1")
    windows = make_windows(16, steps=F)
    rows = jnp.arange(16) * (F + 1)
    filler = lambda x: jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2)).reshape(-1, *x.shape[2:])  # noqa: E731
    reward = filler(windows.reward)
    data = td.Recorded(
        windows.z.reshape(-1, Z), filler(windows.action), reward, jnp.zeros(len(reward), int), rows, rows
    )
    np.testing.assert_array_equal(td.windows_at(data, rows, F).action, windows.action)
    before = jax.tree.map(np.array, planner.world)
    stats = td.statistics(args, MODEL, planner.world, windows)
    state = td.init_diffusion(args, MODEL, stats, jax.random.key(0))
    state, info = td.train(args, MODEL, state, planner.world, data, num_updates=600)
    jax.tree.map(np.testing.assert_array_equal, before, planner.world)
    assert int(state.updates) == 600 and all(np.isfinite(x) for x in info.values())
    planner = td.planner_of(state, planner.world)

    def samples(window, key):
        alone = dataclasses.replace(args, num_proposals=1, num_policy=0, warm_start=False)
        keys = jax.random.split(key)
        action = td.propose(alone, MODEL, planner, window.z[0], None, None, keys[0])[0]
        return action, td.rollout(args, MODEL, planner, window.z[0], window.action[None], keys[1])[0, 0]

    action, zs = jax.jit(jax.vmap(samples))(windows, jax.random.split(jax.random.key(1), 16))
    assert float(((action - windows.action) ** 2).mean() / windows.action.var()) < 0.05
    error = (td.normalise(stats, zs) - td.normalise(stats, windows.z))[:, 1:] / stats.sigma[0]
    assert float((error**2).mean()) < 0.05
    truth = jax.vmap(lambda w: td.advantage(args, MODEL, planner.world, w))(windows)
    guess = td.score_by_objective(args, MODEL, planner, windows.z, windows.action)
    assert agreement(np.asarray(guess), np.asarray(truth))["r2"] > 0.95


# --------------------------------------------------------------------------------------------------------- Exploration
def test_exploring_plays_one_of_the_best_the_likelier_the_better(made, monkeypatch):  # noqa: F811
    monkeypatch.setattr(td, "score", lambda args, model, planner, zs, actions, key: -((actions - 0.3) ** 2).sum((1, 2)))
    planner, keys = made[0], jax.random.split(jax.random.key(0), 40)

    def places(args, explore=True):
        """Of the plans of all keys: their places among the candidates, and the noise of the actions."""

        def one(key):
            plan = (args, MODEL, planner, OBS[0], jnp.zeros((F, A)), jnp.array(True), key)
            action, best, _ = td.plan_by_diffusion(*plan, explore=explore)
            z = MODEL.encoder.apply(planner.world.params["encoder"], OBS[0])
            first = jax.random.split(key, 6 if explore else 4)[0]
            scores = td.score(None, None, None, None, td.propose(args, MODEL, planner, z, plan[4], plan[5], first), key)
            return (scores > -((best - 0.3) ** 2).sum() + 1e-6).sum(), jnp.abs(action - jnp.clip(best[0], -1, 1)).max()

        return map(np.asarray, jax.jit(jax.vmap(one))(keys))

    place, noise = places(changed(min_std=0.0, explore_temperature=1e-4))
    assert (place == 0).all() and (noise < 1e-6).all()
    place, noise = places(changed(min_std=0.05, explore_temperature=1.0))
    counts = np.bincount(place, minlength=4)
    assert counts[0] > counts[2] > 0 and counts[3:].sum() == 0, "top is 3"
    assert 0.01 < np.median(noise) < 0.15


# ----------------------------------------------------------------------------------------------------------------- Runs
def agent_of(checkpoint, script, args, item):
    """The learning state of the first script's part in a checkpoint, and its replay."""
    model = first_script.make_model(args, 2, 1, episodic=True)
    if item == "state":
        like = {"state": jax.eval_shape(lambda: first_script.fresh_state(args, model))}
        like["replay"] = jax.eval_shape(lambda: first_script.init_replay(3000, 1, 2, 1))
    else:
        joint = td.make_model(args, 2, 1, episodic=True)
        like = {"learner": jax.eval_shape(lambda: td.fresh(args, joint))}
        like["replay"] = jax.eval_shape(lambda: world_model.init_replays(args, joint))
    return read_checkpoint(checkpoint, read_meta(checkpoint, script), **like)


def same(one, other):
    """Asserts that two pytrees hold the same numbers, in the same order."""
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(*map(jax.random.key_data if is_key else np.asarray, (x, y)))


def args_of(folder):
    return td.with_preset(td.Args(**meta_of(folder, "tdmpc2_jax_diffusion")["args"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a joint run that was not interrupted."""
    runs = tmp_path_factory.mktemp("joint")
    td.main([*JOINT, "--runs-dir", str(runs)])
    return runs / NAME


def test_until_the_planner_starts_a_joint_run_is_a_run_of_the_first_script_bit_for_bit(finished, tmp_path):
    first_script.main([*FIRST, "--total-timesteps", "200", "--runs-dir", str(tmp_path)])
    newest, before = complete_checkpoints(finished)
    assert (newest.name, before.name) == ("300", "200")
    args = args_of(finished)
    joint = agent_of(before, "tdmpc2_jax_diffusion", args, "learner")
    its = first_script.Args(**meta_of(tmp_path / "strange_envs:Point-v0/tdmpc2_jax/1")["args"])
    alone = complete_checkpoints(tmp_path / "strange_envs:Point-v0/tdmpc2_jax/1")[0]
    alone = agent_of(alone, "tdmpc2_jax", its, "state")
    theirs, ours = alone["state"], {name: joint["learner"][name] for name in ("train", "act_key")}
    same(ours, theirs)
    same([*joint["replay"].short], [*alone["replay"]])


def test_a_joint_run_learns_all_networks_and_is_evaluated_without_episodes(finished, capsys):
    found = agent_of(complete_checkpoints(finished)[0], "tdmpc2_jax_diffusion", args_of(finished), "learner")
    learner, count = found["learner"], meta_of(finished, "tdmpc2_jax_diffusion")["count"]
    assert (count["decisions"], count["updates"], int(learner["state"].updates)) == (300, 299, 299 // 4)
    start = td.fresh(args_of(finished), td.make_model(args_of(finished), 2, 1, episodic=True))["state"]
    for name, net in learner["state"].params.items():
        moved = [np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (net, start.params[name])), strict=True)]
        assert np.isfinite(moved).all() and max(moved) > 1e-3, name
    assert float(learner["state"].stats.std.min()) >= 0.01 and float(learner["state"].stats.adv_std) != 1
    td.main(["--evaluate", "--checkpoint", str(finished), "--planner", "pi", "--no-compile-cache"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["planner", "pi"]


def test_a_killed_joint_run_goes_on_with_its_replay_and_all_that_it_has_learned(start, tmp_path):
    cheap = [*JOINT, "--planner", "pi", "--planner-start", 0]  # compiled in less time
    child, folder = start(*cheap, small=False, name="tdmpc2_jax_diffusion.py"), tmp_path / "runs" / NAME
    wait_for(lambda: complete_checkpoints(folder), child)
    child.kill()
    child.wait()
    checkpoint = complete_checkpoints(folder)[0]
    before, args = read_meta(checkpoint, "tdmpc2_jax_diffusion")["count"], args_of(folder)
    kept = agent_of(checkpoint, "tdmpc2_jax_diffusion", args, "learner")
    assert 100 <= before["decisions"] < 300
    again = ["--mode", "joint", "--task", "strange_envs:Point-v0", "--runs-dir", str(tmp_path / "runs"), "--resume"]
    td.main([*again, "--no-compile-cache"])
    found = agent_of(complete_checkpoints(folder)[0], "tdmpc2_jax_diffusion", args, "learner")
    after = meta_of(folder, "tdmpc2_jax_diffusion")["count"]
    assert (after["decisions"], after["updates"], int(found["learner"]["state"].updates)) == (300, 299, 299 // 4)
    rows = int(kept["replay"].short.rows)
    for one, other in zip(kept["replay"], found["replay"], strict=True):
        np.testing.assert_array_equal(one.reward[:rows], other.reward[:rows])
        assert int(other.rows) > rows
    steps = [int(row["step"]) for row in csv.DictReader((folder / "eval.csv").open())]
    assert steps == [0, 300]


def test_equal_seeds_give_equal_networks_bit_for_bit(finished, tmp_path):
    before = shutil.move(finished, tmp_path / "before")
    td.main([*JOINT, "--runs-dir", str(finished.parents[2])])  # in the same folder: all has been compiled
    one, other = (
        agent_of(complete_checkpoints(folder)[0], "tdmpc2_jax_diffusion", args_of(folder), "learner")
        for folder in (before, finished)
    )
    same(one, other)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--world-model", "nowhere"], ["nowhere", "does not exist"]),
        (["--data-dir", "nowhere"], ["--mode joint", "--data-dir"]),
        (["--num-updates", 10], ["--mode joint", "--num-updates"]),
        (["--mode", "offline"], ["--mode offline", "--batch-size", "--planner-start"]),
        (["--no-mpc"], ["--mode joint", "--no-mpc"]),
        (["--task", "Hopper-v5", "--scales", "1,4"], ["--scales 1", "terminate"]),
        (["--future", 50], ["no episode", "50 steps"]),
        (["--seed-steps", 4], ["--seed-steps"]),
        (["--checkpoint", "nowhere"], ["--checkpoint", "--evaluate"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_what_says_nothing_to_a_mode_is_refused_in_one_sentence(refused, flags, words):
    sentence = refused(*JOINT, *flags)
    assert all(word in sentence for word in words), sentence


def test_of_a_multi_task_world_model_the_part_of_the_task_is_taken(golden):
    path, task = str(golden("multitask.pt")), "cartpole-swingup"
    sizes = read_original(path)
    assert sizes.task_emb is not None
    folded = load_agent_of(path, task)
    jax.tree.map(np.testing.assert_array_equal, folded.params, load_agent_of(path, None, task=task).params)


def load_agent_of(path, source_task, **options):
    """The agent for a task of 5 observations and 1 action, whatever its sizes."""
    from tdmpc2_support.agents.fold import fold_agent

    like = fold_agent(read_original(path), source_task or options["task"], 5, 1, path).params
    return load_agent(path, source_task, lambda key: like, "tdmpc2_jax", **options)
