"""TD-MPC, the first version: the original's numbers, its replay and what the recordings do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import meta_of, read_scalars, write_episodes
from recordings import close, draws_of
from scipy.stats import chisquare

import envs
import tdmpc_jax as td
from benchmarks.speed import apart
from tdmpc2_support.agents import pretrained
from tdmpc2_support.run.schedule import random_streams


def close_number(actual, expected, tolerance):
    """Absolute below 1, relative above: what is a small difference of large terms is as exact as these are."""
    assert abs(float(actual) - float(expected)) <= tolerance * max(1.0, abs(float(expected)))


H = 3  # steps of a window in the tests of the replay


# ------------------------------------------------------------------------------------------------------ Recordings
@pytest.fixture(scope="module")
def recorded(golden):
    """Recording of updates, agent, params, slow networks."""
    path, recording, plans = golden("tdmpc1.pt"), golden("tdmpc1_update.npz"), golden("tdmpc1_plan.npz")
    file = envs.load_pt(path)
    names = "discount min_std horizon rho consistency_coef reward_coef value_coef lr grad_clip_norm tau"
    settings = {name: recording[f"cfg_{name}"].item() for name in names.split()}
    names = "iterations num_samples num_elites min_std temperature momentum discount"
    settings |= {name: plans[f"cfg_{name}"].item() for name in names.split()}
    settings |= {"num_pi_trajs": int(settings["num_samples"] * plans["cfg_mixture_coef"])}
    settings |= {"target_update_freq": recording["cfg_update_freq"].item(), "batch_size": 8}
    sizes = {"enc_dim": "_encoder.0", "latent_dim": "_encoder.2", "mlp_dim": "_dynamics.0"}
    settings |= {name: len(file["model"][f"{layer}.bias"]) for name, layer in sizes.items()}
    settings |= {"obs_dim": recording["in_obs"].shape[-1], "action_dim": recording["in_action"].shape[-1]}
    return recording, td.Agent(**settings), *pretrained.read_tdmpc(path)


@pytest.mark.golden
def test_networks_equal_the_recording(recorded):
    recording, agent, params, target = recorded
    model = td.networks(agent)

    @jax.jit
    def answers(params, target, obs, action, draw):
        z = model.encoder.apply(params["encoder"], obs)
        pi = td.policy(agent, params["pi"], z, draw)
        return {
            "encode_obs0": z,
            "encode_target_obs0": model.encoder.apply(target["encoder"], obs),
            "next": model.dynamics.apply(params["dynamics"], z, action),
            "reward": model.reward.apply(params["reward"], z, action),
            "q": td.q_values(agent, params["q"], z, action),
            "q_target": td.q_values(agent, target["q"], z, action),
            "pi_mean": pi.mean,
            "pi_action": pi.action,
        }

    inputs = recording["in_obs"][0], recording["in_action"][0], draws_of(recording, "pi")[0]
    for name, value in answers(params, target, *inputs).items():
        close(value, recording[name], 1e-5)


init_state = jax.jit(td.init_state, static_argnums=0)


def check_update(recorded, state, recording, name, inputs, weight, tolerance=1e-5):
    """Makes the recorded update `name` on the batch `inputs`; losses, norms, targets and priorities must be equal."""
    _, agent, _, _ = recorded
    obs, action, reward = (recording[f"{inputs}in_{k}"] for k in ("obs", "action", "reward"))
    batch = td.Batch(obs, action, reward[..., 0], np.zeros(action.shape[:2], np.float32), weight)
    draws = np.stack(draws_of(recording, name))
    noise = td.UpdateNoise(draws[: agent.horizon], draws[agent.horizon :])
    target = jax.jit(td.td_target, static_argnums=0)(agent, state, batch, noise)
    close(target, recording[f"{name}_td_target"], tolerance)
    state, priority, info = jax.jit(td.update, static_argnums=0)(agent, state, batch, noise)
    close(priority, recording[f"{name}_priorities"] + 1e-6, tolerance)
    recorded = {k.removeprefix(f"{name}_info_"): v for k, v in recording.items() if k.startswith(f"{name}_info_")}
    assert recorded.keys() == info.keys()
    for key, value in recorded.items():
        close_number(info[key], value, tolerance)
    return state


def check_parameters(recorded, state, recording, name):
    """Parameters and their CHANGE since the start, which is a hundred times smaller, equal those after `name`."""
    _, _, params, target = recorded
    prefixes = f"{name}_after_model.", f"{name}_after_target."
    for prefix, before, mine in zip(prefixes, (params, target), (state.params, state.target), strict=True):
        tensors = {n.removeprefix(prefix): v for n, v in recording.items() if n.startswith(prefix)}
        original = {k: v for k, v in pretrained.tdmpc_from_torch(tensors).items() if k in mine}
        jax.tree.map(lambda a, b: close(a, b, 1e-4), mine, original)
        before, mine, original = jax.device_get((before, mine, original))
        jax.tree.map(lambda o, a, b: close(a - o, b - o, 1e-2), before, mine, original)


@pytest.mark.golden
@pytest.mark.parametrize("bits, tolerance", [(32, 1e-5), (64, 1e-6)])
def test_three_updates_equal_the_recording(recorded, bits, tolerance):
    recording, agent, *networks = recorded
    with jax.enable_x64(bits == 64):  # with twice the digits what is left of the differences is those of the recording
        params, target = jax.tree.map(lambda x: np.asarray(x, f"float{bits}"), networks)
        state = init_state(agent, params, target, jax.random.key(0))
        for i in range(3):
            state = check_update(recorded, state, recording, f"update{i}", "", recording["in_weights"][i], tolerance)
        check_parameters(recorded, state, recording, "update2")


@pytest.mark.golden
def test_an_update_with_windows_beyond_the_bounds_equals_the_recording(recorded):
    recording, agent, params, target = recorded
    state = init_state(agent, params, target, jax.random.key(0))
    state = check_update(recorded, state, recording, "bounded", "bounded_", recording["bounded_in_weights"])
    check_parameters(recorded, state, recording, "bounded")


@pytest.mark.golden
@pytest.mark.parametrize("mode", ["explore", "eval"])
@pytest.mark.parametrize("point, decisions", [("early", 7000), ("late", 30000)])
def test_three_plans_equal_the_recording_at_both_points_of_the_schedules(recorded, golden, point, decisions, mode):
    _, agent, params, _ = recorded
    recording, A = golden("tdmpc1_plan.npz"), agent.action_dim
    limits = td.schedule(agent, decisions, np.array([True]), np.int32(0))
    horizon = int(limits.horizon[0])
    plan = jax.jit(td.plan, static_argnums=(0, 7))
    mean, first = jnp.zeros((1, agent.horizon, A)), np.array([True])
    for i in range(3):
        draws = draws_of(recording, f"{point}_{mode}{i}")
        h, loop = horizon, draws[horizon : horizon + 2 * agent.iterations]
        assert len(recording[f"{point}_{mode}{i}_mean"]) == horizon

        def filled(x):  # whatever lies beyond the horizon must not matter
            return np.concatenate([x, np.full((agent.horizon - len(x), *x.shape[1:]), 1e3, np.float32)])  # noqa: B023

        noise = td.PlanNoise(
            pi=filled(np.stack(draws[:h]))[None],
            sample=np.stack([filled(x) for x in loop[0::2]])[None],
            terminal=np.stack(loop[1::2])[None],
            gumbel=draws[h + 2 * agent.iterations][None],
            exploration=draws[-1][None] if mode == "explore" else np.zeros((1, A), np.float32),
        )
        obs = recording["in_obs"][i][None]
        action, mean = plan(agent, params, obs, mean, first, limits, noise, mode == "explore")
        close(action[0], np.clip(recording[f"{point}_{mode}{i}_action"], -1, 1), 1e-3)
        close(mean[0, :h], recording[f"{point}_{mode}{i}_mean"], 1e-3)
        first = np.array([False])


def test_the_schedules_are_the_originals():
    first, going_on = np.array([True, False]), np.array([9, 3], np.int32)
    for decisions, horizon in [
        (0, 1),
        (6249, 1),
        (6250, 2),
        (12499, 2),
        (12500, 3),
        (18749, 3),
        (18750, 4),
        (24999, 4),
    ]:
        assert td.schedule(td.Agent(), decisions, first, going_on).horizon.tolist() == [horizon, 3]
    assert td.schedule(td.Agent(), 10**9, first, going_on).horizon.tolist() == [5, 3]
    floors = [td.schedule(td.Agent(), decisions, first, going_on).min_std for decisions in (0, 12500, 25000, 10**9)]
    np.testing.assert_allclose(floors, [0.5, 0.275, 0.05, 0.05])


# ---------------------------------------------------------------------------------------------------------- Replay
def leaves(replay):
    """Value of every entry in the tree [C, n]."""
    return np.asarray(replay.tree[0]).ravel()[: replay.first.size].reshape(replay.first.shape)


def check_tree(tree):
    """Every value above the entries is the sum of those below it."""
    for below, level in zip(tree, tree[1:], strict=False):
        expected = np.zeros(level.size)
        expected[: len(below)] = np.asarray(below, np.float64).sum(1)
        np.testing.assert_allclose(np.asarray(level).ravel(), expected, rtol=1e-5)


@pytest.mark.golden
def test_priorities_weights_and_windows_equal_those_of_the_originals_replay(golden):
    """Six episodes in a ring of four. Ours keeps the resets, too, and one more start per episode: it is taken out."""
    recording = golden("tdmpc1_replay.npz")
    H, L = recording["cfg_horizon"].item(), recording["cfg_episode_length"].item()
    alpha, beta = recording["cfg_per_alpha"].item(), recording["cfg_per_beta"].item()
    agent = td.Agent(horizon=H, per_alpha=alpha, per_beta=beta, obs_dim=2, action_dim=1)
    replay = td.init_replay(agent, 4 * (L + 1), 1)
    for e in range(6):
        obs, action, reward = (recording[f"episode{e}_{k}"] for k in ("obs", "action", "reward"))
        for t in range(L + 1):
            brought = (action[t - 1][None], reward[t - 1][None]) if t else (np.full((1, 1), np.nan), np.full(1, np.nan))
            step = td.Step(obs[t][None], *brought, np.zeros(1, bool), np.array([t == 0]))
            replay = td.add(agent, replay, step)
        last = (e % 4) * (L + 1) + L - H
        assert leaves(replay)[last] > 0
        replay = replay._replace(tree=td.set_priorities(replay.tree, jnp.array([last]), jnp.zeros(1)))

        filled = recording[f"after{e}_filled"].item()
        mine = leaves(replay).reshape(4, L + 1)[:, :L].ravel()[:filled]  # the slots of the recording
        close(mine ** (1 / alpha), recording[f"after{e}_priorities"][:filled], 1e-5)
        close(mine / mine.sum(), recording[f"after{e}_probabilities"], 1e-5)

        slots = recording[f"after{e}_idxs"]
        drawn = jnp.asarray(slots // L * (L + 1) + slots % L)
        batch = td.windows(agent, replay, drawn)
        close(batch.weight, recording[f"after{e}_weights"], 1e-5)
        np.testing.assert_array_equal(batch.obs, recording[f"after{e}_obs"])
        np.testing.assert_array_equal(batch.action, recording[f"after{e}_action"])
        np.testing.assert_array_equal(batch.reward[..., None], recording[f"after{e}_reward"])
        priority = jnp.asarray(recording[f"after{e}_new_priorities"]) + 1e-6
        replay = replay._replace(tree=td.set_priorities(replay.tree, drawn, priority**alpha))


@pytest.mark.parametrize("seed, capacity, num_envs, fanout", [(0, 30, 1, 4), (1, 25, 3, 4), (2, 60, 5, 128)])
def test_windows_are_drawn_by_their_priorities_through_wraps_and_resets(monkeypatch, seed, capacity, num_envs, fanout):
    monkeypatch.setattr(td, "FANOUT", fanout)  # trees of 2 to 4 levels
    agent = td.Agent(horizon=H, per_beta=0.4, obs_dim=1, action_dim=1)
    rng, replay = np.random.default_rng(seed), td.init_replay(agent, capacity, num_envs)
    expected, resets, first = (
        np.zeros((capacity, num_envs)),
        np.ones((capacity, num_envs), bool),
        np.ones(num_envs, bool),
    )
    set_priorities = jax.jit(td.set_priorities)
    for step in range(3 * capacity):
        zeros = np.zeros((num_envs, 1), np.float32)
        replay = td.add(agent, replay, td.Step(zeros, zeros, zeros[:, 0], np.zeros(num_envs, bool), first))
        largest, row = expected.max() if expected.any() else 1.0, step % capacity
        expected[row], resets[row] = 0.0, first
        if step >= H:
            complete = ~resets[(step - np.arange(H)) % capacity].any(0)
            expected[(step - H) % capacity] = np.where(complete, largest, 0.0)
        starts = np.flatnonzero(expected)
        if len(starts) and step % 5 == 0:
            changed = rng.choice(starts, 4)
            values = (10 ** rng.uniform(-3, 2, 4)) ** 0.6
            replay = replay._replace(tree=set_priorities(replay.tree, changed, np.float32(values)))
            expected.flat[changed] = 0.0
            np.maximum.at(expected.reshape(-1), changed, np.float32(values))
        first = ~first & (rng.random(num_envs) < 0.1)
    np.testing.assert_array_equal(leaves(replay), np.float32(expected))
    assert int(replay.size) == len(starts)
    check_tree(replay.tree)
    drawn = np.asarray(jax.jit(td.draw, static_argnums=2)(replay.tree, jax.random.key(seed), 200_000))
    counts, share = np.bincount(drawn, minlength=expected.size), expected.ravel() / expected.sum()
    assert counts[share == 0].sum() == 0
    assert chisquare(counts[share > 0], share[share > 0] * counts.sum()).pvalue > 1e-3

    batch = td.windows(agent, replay, jnp.asarray(drawn[:50]))
    values = expected.ravel()[drawn[:50]]
    np.testing.assert_allclose(batch.weight, (values.min() / values) ** 0.4, rtol=1e-5)
    assert batch.weight.max() == 1


@pytest.mark.slow
def test_a_million_entries_are_told_apart():
    """Priorities of 1e-6 to 1e4; neighbours of all places are drawn as often as they should be."""
    values = (10 ** np.random.default_rng(0).uniform(-6, 4, 10**6)) ** 0.6
    tree = [np.zeros_like(level) for level in td.init_replay(td.Agent(obs_dim=1, action_dim=1), 10**6, 1).tree]
    below = values
    for level in tree:
        level.flat[: len(below)] = below
        below = level.astype(np.float64).sum(1)
    drawn = np.asarray(jax.jit(td.draw, static_argnums=2)(tuple(map(jnp.asarray, tree)), jax.random.key(0), 500_000))
    share = values / values.sum()
    for group in (np.arange(10**6) // 5000, np.arange(10**6) % 128, np.argsort(np.argsort(values)) // 20_000):
        counts, shares = np.bincount(group[drawn], minlength=group.max() + 1), np.bincount(group, share)
        enough = shares * len(drawn) >= 5
        pair = [np.append(x[enough], x[~enough].sum() + 1e-9) for x in (counts, shares * len(drawn))]
        assert chisquare(pair[0], pair[1] * pair[0].sum() / pair[1].sum()).pvalue > 1e-3


# ----------------------------------------------------------------------------------------- What recordings do not show
SMALL = {"enc_dim": 8, "mlp_dim": 16, "latent_dim": 8, "batch_size": 8, "lr": 1e-3, "iterations": 2}
SMALL |= {"num_samples": 32, "num_elites": 8, "num_pi_trajs": 4}


def test_an_update_changes_the_priorities_of_its_own_windows_only(monkeypatch):
    def update(agent, state, batch, noise):
        return state, jnp.arange(1.0, agent.batch_size + 1), {"smallest": batch.weight.min()}

    monkeypatch.setattr(td, "update", update)
    agent = td.Agent(**SMALL, horizon=H, obs_dim=3, action_dim=1)
    replay, _ = write_episodes(td, agent, seed=3, capacity=60, num_envs=2, steps=100)
    state, before = td.TrainState({}, {}, (), (), jax.random.key(0), 0), leaves(replay).ravel()
    drawn = np.asarray(td.draw(replay.tree, jax.random.split(state.key, 3)[1], agent.batch_size))
    train = jax.jit(td.train.__wrapped__, static_argnums=(0, 3))  # not kept with this update
    _, replay, info = train(agent, state, replay, 1)
    expected = before.copy()
    expected[drawn] = 0.0
    np.maximum.at(expected, drawn, np.arange(1.0, 9.0) ** 0.6)
    np.testing.assert_allclose(leaves(replay).ravel(), expected, rtol=1e-5)
    assert len(set(drawn.tolist())) > 1 and info["smallest"] == 1
    check_tree(replay.tree)


def test_no_value_lies_behind_a_termination():
    agent = td.Agent(**SMALL, horizon=H, obs_dim=3, action_dim=1)
    state = td.fresh_state(agent, random_streams(0))["train"]
    state = state._replace(target=jax.tree.map(lambda x: x + 0.1, state.target))
    reward, terminated = jnp.arange(24.0).reshape(H, 8), jnp.zeros((H, 8)).at[1, ::2].set(1.0)
    batch = td.Batch(jnp.ones((H + 1, 8, 3)), jnp.ones((H, 8, 1)), reward, terminated, jnp.ones(8))
    noise = td.update_noise(agent, jax.random.key(0))
    target = jax.jit(td.td_target, static_argnums=0)(agent, state, batch, noise)
    np.testing.assert_array_equal(target == reward, terminated == 1)


@pytest.fixture(scope="module")
def small():
    """A small agent of 3 observations and 2 actions, and parameters that make a difference."""
    agent = td.Agent(**SMALL, obs_dim=3, action_dim=2)
    params = jax.jit(td.init_params, static_argnums=0)(agent, jax.random.key(0))
    return agent, jax.tree.map(lambda x: x + 0.1, params)


@pytest.mark.slow
def test_environments_that_are_planned_for_together_get_what_each_gets_alone_whatever_its_horizon(small):
    agent, params = small
    noise, obs = td.plan_noise(agent, jax.random.key(1), 3), jax.random.normal(jax.random.key(2), (3, 3))
    mean, first = 0.3 * jnp.ones((3, agent.horizon, 2)), np.array([False, True, False])
    limits, plan = td.Schedule(np.array([1, 3, 5], np.int32), 0.1), jax.jit(td.plan, static_argnums=(0, 7))
    together = plan(agent, params, obs, mean, first, limits, noise, True)
    for i in range(3):
        one = jax.tree.map(lambda x: x[i : i + 1], (obs, mean, first, limits.horizon, noise))  # noqa: B023
        alone = plan(agent, params, *one[:3], td.Schedule(one[3], 0.1), one[4], True)
        np.testing.assert_allclose(together[0][i], alone[0][0], atol=1e-4)  # as in the second version's test
        h = limits.horizon[i]
        np.testing.assert_allclose(together[1][i, :h], alone[1][0, :h], atol=1e-4)


def test_the_loop_over_the_horizon_computes_what_is_written_out_step_by_step(small):
    agent, params = small
    actions = jax.random.normal(jax.random.key(1), (agent.horizon, 9, 2))
    eps = jax.random.normal(jax.random.key(2), (9, 2))
    loop = jax.jit(td.estimate_value, static_argnums=0)
    for horizon in (1, 3):
        inputs = params, jnp.ones((1, 8)), actions, jnp.int32(horizon), eps
        written_out = jax.jit(apart(td, horizon), static_argnums=0)(agent, *inputs)
        np.testing.assert_allclose(loop(agent, *inputs), written_out, rtol=1e-5)


@pytest.mark.parametrize(
    "task, repeat, latent_dim, iterations, batch_size, lr, millions",
    [
        ("cartpole-swingup", 8, 50, 6, 512, 1e-3, 0.5),
        ("walker-walk", 2, 50, 6, 512, 1e-3, 0.5),
        ("dm_control/cheetah-run-v0", 4, 50, 6, 512, 1e-3, 0.5),
        ("humanoid-walk", 2, 100, 12, 512, 1e-3, 3),
        ("dog-run", 2, 100, 8, 2048, 3e-4, 5),
        ("mw-reach", 2, 50, 6, 512, 1e-3, 0.5),
        ("InvertedPendulum-v5", 1, 50, 6, 512, 1e-3, 0.5),
    ],
)
def test_a_task_has_the_originals_settings(task, repeat, latent_dim, iterations, batch_size, lr, millions):
    args = td.with_task_defaults(td.Args(task=task))
    agent = args.agent
    assert (agent.action_repeat, agent.latent_dim, agent.iterations) == (repeat, latent_dim, iterations)
    assert (agent.batch_size, agent.lr, args.total_timesteps) == (batch_size, lr, millions * 10**6)
    agent = td.Agent(action_repeat=3, latent_dim=7, iterations=1, batch_size=2, lr=1.0)
    given = td.Args(task=task, agent=agent, total_timesteps=9)
    assert td.with_task_defaults(given) == given


@pytest.mark.slow
def test_steps_are_those_of_the_simulator_whatever_the_repeat(here, tmp_path):
    flags = "--task cartpole-swingup --total-timesteps 2000 --eval-freq 1000 --save-episodes data".split()
    status, out, err = here(*flags, name="tdmpc_jax.py")
    assert status == 0, err
    folder = tmp_path / "runs" / "cartpole-swingup" / "tdmpc_jax" / "1"
    assert meta_of(folder, "tdmpc_jax")["count"]["decisions"] == 2000 // 8
    assert [step for step, _ in read_scalars(folder, "charts/episodic_return")] == [1000, 2000]
    assert [step for step, _ in read_scalars(folder, "eval/episodic_return")] == [0, 1000, 2000]
    written = envs.load_pt(tmp_path / "data" / "cartpole-swingup" / "chunk_0.pt")
    assert written["obs"].shape == (2, 126, 5)


# ------------------------------------------------------------------------------------------------ Original checkpoints
@pytest.mark.golden
@pytest.mark.slow
def test_an_agent_of_the_original_is_evaluated_and_trained_on(here, golden, tmp_path):
    """It has the sizes of cheetah-run."""
    sizes = "--enc-dim 16 --mlp-dim 24 --latent-dim 10 --iterations 1 --num-samples 32 --num-elites 4".split()
    flags = ["--task", "cheetah-run", "--checkpoint", golden("tdmpc1.pt"), "--eval-episodes", 1, *sizes]
    status, out, err = here(*flags, "--evaluate", name="tdmpc_jax.py", small=False)
    assert status == 0 and "cheetah-run: return" in out, err
    flags += ["--total-timesteps", 600, "--seed-steps", 100, "--batch-size", 8, "--buffer-size", 200]
    status, out, err = here(*flags, "--eval-freq", 10_000, name="tdmpc_jax.py", small=False)
    assert status == 0, err
    folder = tmp_path / "runs" / "cheetah-run" / "tdmpc_jax" / "1"
    count = meta_of(folder, "tdmpc_jax")["count"]
    assert count["updates"] == 149
    assert count["loaded"] == td.Agent().schedule_steps, "its planner goes on where the schedules end"
    status, out, err = here("--evaluate", "--checkpoint", folder, name="tdmpc_jax.py", small=False)
    assert status == 0 and "cheetah-run: return" in out, err
