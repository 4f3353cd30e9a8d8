"""The original's numbers: same inputs, same recorded random draws, same outputs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import LAYOUTS, agent_of, changes_are_close, close, draws_of, shapes_of

import envs
import tdmpc2_jax as td
from tdmpc2_support.agents.fold import fold_task
from tdmpc2_support.agents.pretrained import check_shapes, from_torch

pytestmark = pytest.mark.golden
MODELS = ["single", "wide", "episodic", "two_q"]
MODELS_UPDATED = ["single", "episodic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wide", "two_q"))]


@pytest.fixture(scope="module")
def recorded(golden):
    """recorded(name, layout) -> recording of updates, recording of plans, agent, params, target_q."""

    def load(name, layout=""):
        tensors = envs.load_pt(golden(f"{name}{layout}.pt"))["model"]
        recording = golden(f"{name}_update.npz")
        plan = golden(f"{name}_plan.npz") if name != "two_q" else None
        agent = agent_of(tensors, recording, plan)
        params, target_q = from_torch(tensors)[:2]
        check_shapes(params, shapes_of(td, agent), name, "the model")
        return recording, plan, agent, params, target_q

    return load


def test_discrete_regression_equals_the_recording(golden):
    recording, agent = golden("maths.npz"), td.Agent()
    x, logits = jnp.asarray(recording["x"])[..., 0], jnp.asarray(recording["logits"])
    np.testing.assert_allclose(td.symlog(x), recording["symlog"][:, 0], rtol=1e-4)
    in_bins = jnp.clip(x, agent.vmin, agent.vmax)  # the recording feeds symexp what fits the bins
    np.testing.assert_allclose(td.symexp(in_bins), recording["symexp"][:, 0], rtol=1e-4)
    np.testing.assert_allclose(td.two_hot(agent, x), recording["two_hot"], atol=1e-4)
    np.testing.assert_allclose(td.two_hot_inv(agent, logits), recording["two_hot_inv"][:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(td.soft_ce(agent, logits, x), recording["soft_ce"][:, 0], rtol=1e-4)


@partial(jax.jit, static_argnums=0)
def answers(agent, params, target_q, obs, action, draw):
    """What all networks answer, by the names of the recordings."""
    model = td.networks(agent)
    z = model.encoder.apply(params["encoder"], obs)
    pi = td.policy(agent, params["pi"], z, draw)
    found = {
        "encode_obs0": z,
        "next": model.dynamics.apply(params["dynamics"], z, action),
        "reward_logits": model.reward.apply(params["reward"], z, action),
        "q_logits_all": td.q_logits(agent, params["q"], z, action),
        "q_target_logits_all": td.q_logits(agent, target_q, z, action),
        **{f"pi_{field}": value for field, value in pi._asdict().items()},
    }
    if model.termination:
        found["termination"] = jax.nn.sigmoid(model.termination.apply(params["termination"], z))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_networks_equal_the_recording_in_both_layouts(recorded, name, layout):
    recording, _, agent, params, target_q = recorded(name, layout)
    inputs = recording["in_obs"][0], recording["in_action"][0], draws_of(recording, "pi")[0]
    found = answers(agent, params, target_q, *inputs)
    assert ("termination" in found) == ("termination" in recording)
    for name, value in found.items():
        close(value, recording[name], 1e-4)


@pytest.mark.parametrize("name", MODELS_UPDATED)
def test_three_updates_equal_the_recording(recorded, name):
    recording, _, agent, params, target_q = recorded(name)
    batch = td.Batch(*(recording[f"in_{k}"] for k in td.Batch._fields))
    batch = batch._replace(reward=batch.reward[..., 0], terminated=batch.terminated[..., 0])
    state = jax.jit(td.init_state, static_argnums=0)(agent, params, target_q, 1.0, jax.random.key(0))
    update = jax.jit(td.update, static_argnums=0)
    for i in range(3):
        next_action, target_heads, pi_action, pi_heads = draws_of(recording, f"update{i}")
        noise = td.UpdateNoise(next_action, target_heads[:2], pi_action, pi_heads[:2], None, None)
        state, info = update(agent, state, batch, noise)
        for key, value in recording.items():
            if key.startswith(f"update{i}_info_") and (measure := key.removeprefix(f"update{i}_info_")) in info:
                close(info[measure], value, 1e-4)
        assert {"consistency_loss", "value_loss", "pi_loss", "grad_norm", "pi_grad_norm"} <= info.keys()
        close(state.q_scale, recording[f"update{i}_scale"], 1e-4)
    tensors = {k.removeprefix("update2_after_"): v for k, v in recording.items() if k.startswith("update2_after_")}
    after, after_target = from_torch(tensors)[:2]
    for mine, original in ((state.params, after), (state.target_q, after_target)):
        jax.tree.map(lambda a, b: close(a, b, 1e-4), mine, original)
    changes_are_close(state.target_q, after_target, target_q)


def replay_plans(agent, params, recording, mode):
    """Repeats the recorded calls of the planner; dimensions of actions that the task does not have are cut off."""
    iterations, H, A = int(recording["iterations"]), agent.horizon, agent.action_dim
    plan = jax.jit(td.plan, static_argnames=("agent", "explore"))
    mean, first = jnp.zeros((1, H, A)), np.array([True])
    for i in range(3):
        draws = draws_of(recording, f"{mode}{i}")
        loop = draws[H : H + 3 * iterations]
        noise = td.PlanNoise(
            pi=np.stack(draws[:H])[None, ..., :A],
            sample=np.stack(loop[0::3])[None, ..., :A],
            terminal=np.stack(loop[1::3])[None, ..., :A],
            gumbel=draws[H + 3 * iterations][None],
            exploration=draws[-1][None, :A] if mode == "explore" else np.zeros((1, A), np.float32),
        )
        obs = recording["in_obs"][i][None, : agent.obs_dim]
        heads = np.stack(loop[2::3])[:, :2]
        action, mean = plan(agent, params, obs, mean, first, noise, heads, explore=mode == "explore")
        close(action[0], recording[f"{mode}{i}_action"][:A], 1e-3)
        close(mean[0], recording[f"{mode}{i}_mean"][:, :A], 1e-3)
        first = np.array([False])


@pytest.mark.parametrize("mode", ["explore", "eval"])
@pytest.mark.parametrize("name", [m for m in MODELS if m != "two_q"])
def test_three_plans_equal_the_recording(recorded, name, mode):
    _, plans, agent, params, _ = recorded(name)
    replay_plans(agent, params, plans, mode)


def numpy_mlp(tensors, prefix, x, simnorm):
    """The original's MLP on one input, from its tensors (one head of the Qs if they are stacked)."""
    i = 0
    while f"{prefix}.{i}.weight" in tensors:
        x = x @ tensors[f"{prefix}.{i}.weight"].T + tensors[f"{prefix}.{i}.bias"]
        if f"{prefix}.{i}.ln.weight" in tensors:
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
            x = x * tensors[f"{prefix}.{i}.ln.weight"] + tensors[f"{prefix}.{i}.ln.bias"]
            last = f"{prefix}.{i + 1}.weight" not in tensors
            x = x if last and simnorm else x * np.tanh(np.logaddexp(0, x))
        i += 1
    if not simnorm:
        return x
    groups = np.exp(x.reshape(-1, 8) - x.max())
    return (groups / groups.sum(-1, keepdims=True)).ravel()


@partial(jax.jit, static_argnums=0)  # once for all tasks of equal sizes: thirty times what Flax does cost more
def single_task_outputs(agent, params, target_q, obs, action, z):
    """What all networks of the first script's agent compute for one observation, action and latent state."""
    model = td.networks(agent)
    pi = td.policy(agent, params["pi"], z, jnp.zeros_like(action))
    q, q_target = td.q_logits(agent, params["q"], z, action), td.q_logits(agent, target_q, z, action)
    dynamics, reward = (getattr(model, name).apply(params[name], z, action) for name in ("dynamics", "reward"))
    return model.encoder.apply(params["encoder"], obs), dynamics, reward, pi, q, q_target


@pytest.mark.slow
def test_a_folded_agent_computes_what_the_multi_task_agent_does_for_all_tasks(golden):
    tensors = envs.load_pt(golden("multitask.pt"))["model"]
    tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items() if np.ndim(v)}
    params, target_q = from_torch(envs.load_pt(golden("multitask.pt"))["model"])[:2]
    rng = np.random.default_rng(0)
    for task_id, task in enumerate(envs.TASK_SETS["mt30"]):
        _, obs_dim, action_dim, _ = envs.TASKS[task]
        obs, action = np.zeros(24), np.zeros(6)
        obs[:obs_dim], action[:action_dim] = rng.normal(size=obs_dim), rng.uniform(-1, 1, action_dim)
        emb = tensors["_task_emb.weight"][task_id]
        emb = emb / max(1.0, np.linalg.norm(emb))
        z = numpy_mlp(tensors, "_encoder.state", np.concatenate([obs, emb]), True)
        zea = np.concatenate([z, emb, action])
        heads = [
            {k: v[head] if k.startswith(("_Qs", "_target_Qs")) else v for k, v in tensors.items()} for head in range(5)
        ]

        sizes = {"enc_dim": 16, "mlp_dim": 24, "latent_dim": 24, "num_enc_layers": 2, "num_q": 5}
        agent = td.Agent(**sizes, obs_dim=obs_dim, action_dim=action_dim)
        both = params | {"q_target": target_q}
        folded = fold_task(both, tensors["_task_emb.weight"][task_id], obs_dim, action_dim)
        folded_target = folded.pop("q_target")
        check_shapes(folded, shapes_of(td, agent), task, "the model")
        obs, action = obs[:obs_dim], action[:action_dim]
        found = single_task_outputs(agent, folded, folded_target, obs, action, z)
        encoded, dynamics, reward, pi, q, q_target = found
        close(encoded, z, 1e-4)
        close(dynamics, numpy_mlp(tensors, "_dynamics", zea, True), 1e-4)
        close(reward, numpy_mlp(tensors, "_reward", zea, False), 1e-4)
        mean, raw_std = np.split(numpy_mlp(tensors, "_pi", np.concatenate([z, emb]), False), 2)
        close(pi.action, np.tanh(mean[:action_dim]), 1e-4)
        close(pi.log_std, -10 + 6 * (np.tanh(raw_std[:action_dim]) + 1), 1e-4)
        for prefix, logits in (("_Qs.params", q), ("_target_Qs_params", q_target)):
            close(logits, [numpy_mlp(head, prefix, zea, False) for head in heads], 1e-4)


@pytest.mark.parametrize("mode", ["explore", "eval"])
def test_plans_of_a_folded_agent_equal_the_multi_task_recording(golden, mode):
    tensors = envs.load_pt(golden("multitask.pt"))["model"]
    recording, updates = golden("multitask_plan.npz"), golden("multitask_update.npz")
    task_id = int(recording["in_task"])
    _, obs_dim, action_dim, _ = envs.TASKS[envs.TASK_SETS["mt30"][task_id]]
    agent = dataclasses.replace(
        agent_of(tensors, updates, recording),
        obs_dim=obs_dim,
        action_dim=action_dim,
        discount=float(updates["discount"][task_id]),
    )
    params = from_torch(tensors).params
    params = fold_task(params, tensors["_task_emb.weight"][task_id], obs_dim, action_dim)
    replay_plans(agent, params, recording, mode)
