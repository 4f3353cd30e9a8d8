"""TD-MPC, the first version: the original's numbers, its replay and what the recordings do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import tdmpc_jax as td
from files import pretrained

H = 3  # of the replay tests


def close(actual, expected, tolerance):
    """Largest difference relative to the largest value of the recording, as one number per array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    actual = actual.reshape(expected.shape)
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-8)


def draws_of(recording, prefix):
    """The draws under this prefix in the order in which they were made."""
    return [recording[k] for k in sorted(recording) if k.startswith(prefix + "_draw")]


# ------------------------------------------------------------------------------------------------------ Recordings
@pytest.fixture(scope="module")
def agent(golden):
    """Recording of updates, args, model, params, slow networks of the recorded agent."""
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
    args = td.Args(**settings)
    model = td.make_model(args, recording["in_obs"].shape[-1], recording["in_action"].shape[-1])
    return recording, args, model, *pretrained.read_tdmpc(path)


@pytest.mark.golden
def test_networks_equal_the_recording(agent):
    recording, args, model, params, target = agent
    obs, action = recording["in_obs"][0], recording["in_action"][0]
    z = model.encoder.apply(params["encoder"], obs)
    close(z, recording["encode_obs0"], 1e-5)
    close(model.encoder.apply(target["encoder"], obs), recording["encode_target_obs0"], 1e-5)
    close(model.dynamics.apply(params["dynamics"], z, action), recording["next"], 1e-5)
    close(model.reward.apply(params["reward"], z, action), recording["reward"], 1e-5)
    close(td.q_values(model, params["q"], z, action), recording["q"], 1e-5)
    close(td.q_values(model, target["q"], z, action), recording["q_target"], 1e-5)
    pi = td.policy(args, model, params["pi"], z, draws_of(recording, "pi")[0])
    close(pi.mean, recording["pi_mean"], 1e-5)
    close(pi.action, recording["pi_action"], 1e-5)


def check_update(agent, state, recording, name, inputs, weight, tolerance=1e-5):
    """Makes the recorded update `name` on the batch `inputs`; losses, norms, targets and priorities must be equal."""
    _, args, model, _, _ = agent
    obs, action, reward = (jnp.asarray(recording[f"{inputs}in_{k}"]) for k in ("obs", "action", "reward"))
    batch = td.Batch(obs, action, reward[..., 0], jnp.zeros(action.shape[:2]), jnp.asarray(weight))
    draws = jnp.stack(draws_of(recording, name))
    noise = td.UpdateNoise(draws[: args.horizon], draws[args.horizon :])
    close(td.td_target(args, model, state, batch, noise), recording[f"{name}_td_target"], tolerance)
    state, priority, info = jax.jit(td.update, static_argnums=(0, 1))(args, model, state, batch, noise)
    close(priority, recording[f"{name}_priorities"] + 1e-6, tolerance)
    recorded = {k.removeprefix(f"{name}_info_"): v for k, v in recording.items() if k.startswith(f"{name}_info_")}
    assert recorded.keys() == info.keys()
    for key, value in recorded.items():
        close(info[key], value, tolerance)
    return state


def check_parameters(agent, state, recording, name):
    """Parameters and their CHANGE since the start, which is a hundred times smaller, equal those after `name`."""
    _, _, _, params, target = agent
    prefixes = f"{name}_after_model.", f"{name}_after_target."
    for prefix, before, mine in zip(prefixes, (params, target), (state.params, state.target), strict=True):
        tensors = {n.removeprefix(prefix): v for n, v in recording.items() if n.startswith(prefix)}
        original = {k: v for k, v in pretrained.tdmpc_from_torch(tensors).items() if k in mine}
        jax.tree.map(lambda a, b: close(a, b, 1e-4), mine, original)
        jax.tree.map(lambda o, a, b: close(a - o, b - o, 1e-2), before, mine, original)


@pytest.mark.golden
def test_three_updates_equal_the_recording(agent):
    recording, args, _, params, target = agent
    state = td.init_state(args, params, target, jax.random.key(0))
    for i in range(3):
        tolerance = 3e-5 if i else 1e-5  # a second and third time from parameters that rounding has moved
        state = check_update(agent, state, recording, f"update{i}", "", recording["in_weights"][i], tolerance)
    check_parameters(agent, state, recording, "update2")


@pytest.mark.golden
def test_an_update_with_windows_beyond_the_bounds_equals_the_recording(agent):
    recording, args, _, params, target = agent
    state = td.init_state(args, params, target, jax.random.key(0))
    state = check_update(agent, state, recording, "bounded", "bounded_", recording["bounded_in_weights"])
    check_parameters(agent, state, recording, "bounded")


@pytest.mark.golden
@pytest.mark.parametrize("mode", ["explore", "eval"])
@pytest.mark.parametrize("point, decisions", [("early", 7000), ("late", 30000)])
def test_three_plans_equal_the_recording_at_both_points_of_the_schedules(agent, golden, point, decisions, mode):
    _, args, model, params, _ = agent
    recording, A = golden("tdmpc1_plan.npz"), model.action_dim
    limits = td.schedule(args, decisions, np.array([decisions]))
    horizon = int(limits.horizon[0])
    plan = jax.jit(td.plan, static_argnums=(0, 1, 8))
    mean, first = jnp.zeros((1, args.horizon, A)), np.array([True])
    for i in range(3):
        draws = draws_of(recording, f"{point}_{mode}{i}")
        h, loop = horizon, draws[horizon : horizon + 2 * args.iterations]
        assert len(recording[f"{point}_{mode}{i}_mean"]) == horizon

        def filled(x):  # whatever lies beyond the horizon must not matter
            return np.concatenate([x, np.full((args.horizon - len(x), *x.shape[1:]), 1e3, np.float32)])  # noqa: B023

        noise = td.PlanNoise(
            pi=filled(np.stack(draws[:h]))[None],
            sample=np.stack([filled(x) for x in loop[0::2]])[None],
            terminal=np.stack(loop[1::2])[None],
            gumbel=draws[h + 2 * args.iterations][None],
            exploration=draws[-1][None] if mode == "explore" else np.zeros((1, A), np.float32),
        )
        obs = recording["in_obs"][i][None]
        action, mean = plan(args, model, params, obs, mean, first, limits, noise, mode == "explore")
        close(action[0], np.clip(recording[f"{point}_{mode}{i}_action"], -1, 1), 1e-3)
        close(mean[0, :h], recording[f"{point}_{mode}{i}_mean"], 1e-3)
        first = np.array([False])


def test_the_schedules_are_the_originals():
    began = np.array([0, 6249, 6250, 12499, 12500, 18749, 18750, 24999, 25000, 10**9])
    assert td.schedule(td.Args(), 10**9, began).horizon.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    floors = [td.schedule(td.Args(), decisions, began).min_std for decisions in (0, 12500, 25000, 10**9)]
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
    replay = td.init_replay(4 * (L + 1), 1, 2, 1)
    for e in range(6):
        obs, action, reward = (recording[f"episode{e}_{k}"] for k in ("obs", "action", "reward"))
        for t in range(L + 1):
            brought = (action[t - 1][None], reward[t - 1][None]) if t else (np.full((1, 1), np.nan), np.full(1, np.nan))
            replay = td.add(replay, H, obs[t][None], *brought, np.zeros(1, bool), np.array([t == 0]))
        last = (e % 4) * (L + 1) + L - H
        assert leaves(replay)[last] > 0
        replay = replay._replace(tree=td.set_priorities(replay.tree, jnp.array([last]), jnp.zeros(1)))

        filled = recording[f"after{e}_filled"].item()
        mine = leaves(replay).reshape(4, L + 1)[:, :L].ravel()[:filled]  # the slots of the recording
        close(mine ** (1 / alpha), recording[f"after{e}_priorities"][:filled], 1e-5)
        close(mine / mine.sum(), recording[f"after{e}_probabilities"], 1e-5)

        slots = recording[f"after{e}_idxs"]
        drawn = jnp.asarray(slots // L * (L + 1) + slots % L)
        batch = td.windows(replay, drawn, H, beta)
        close(batch.weight, recording[f"after{e}_weights"], 1e-5)
        np.testing.assert_array_equal(batch.obs, recording[f"after{e}_obs"])
        np.testing.assert_array_equal(batch.action, recording[f"after{e}_action"])
        np.testing.assert_array_equal(batch.reward[..., None], recording[f"after{e}_reward"])
        priority = jnp.asarray(recording[f"after{e}_new_priorities"]) + 1e-6
        replay = replay._replace(tree=td.set_priorities(replay.tree, drawn, priority**alpha))
