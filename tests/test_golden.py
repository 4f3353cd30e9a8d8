"""The original's numbers: same inputs, same recorded random draws, same outputs."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
import tdmpc2_jax_rgb as rgb
from tdmpc2_support.agents.pretrained import check_shapes, fold_task, from_torch

pytestmark = pytest.mark.golden
MODELS = ["single", "wide", "episodic", "two_q"]
LAYOUTS = ["", "_released_layout"]


def close(actual, expected, tolerance):
    """Largest difference relative to the largest value of the recording, as one number per array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    actual = actual.reshape(expected.shape)
    scale = max(np.abs(expected).max(), 1e-8)
    assert np.abs(actual - expected).max() <= tolerance * scale


def args_of(tensors, recording, plan=None):
    """Hyperparameters of a recorded model, read off its tensors and draws."""
    dims = {
        "enc_dim": len(tensors["_encoder.state.0.bias"]),
        "mlp_dim": len(tensors["_dynamics.0.bias"]),
        "latent_dim": len(tensors["_dynamics.2.bias"]),
        "num_enc_layers": max(2, len([k for k in tensors if k.startswith("_encoder.state") and k.endswith("ln.bias")])),
        "num_q": len(recording["q_logits_all"]),
        "batch_size": recording["in_obs"].shape[1],
        "horizon": len(recording["in_action"]),
        "num_bins": recording["reward_logits"].shape[-1],
        "dropout": 0.0,
    }
    if plan is not None:
        iterations, action_dim = int(plan["iterations"]), recording["in_action"].shape[-1]
        gumbel = next(v for k, v in plan.items() if k.startswith("explore0") and k.endswith("gumbel"))
        samples = next(v for k, v in plan.items() if k.startswith("explore0") and v.ndim == 3)
        dims |= {
            "iterations": iterations - 2 * (action_dim >= 20),
            "num_elites": len(gumbel),
            "num_pi_trajs": len(plan["explore0_draw000_normal"]),
            "num_samples": samples.shape[1] + len(plan["explore0_draw000_normal"]),
        }
    return td.Args(**dims)


@pytest.fixture(scope="module")
def agent(golden):
    """agent(name, layout) -> recording of updates, recording of plans, args, model, params, target_q."""

    def load(name, layout=""):
        tensors = envs.load_pt(golden(f"{name}{layout}.pt"))["model"]
        recording = golden(f"{name}_update.npz")
        plan = golden(f"{name}_plan.npz") if name != "two_q" else None
        args = args_of(tensors, recording, plan)
        model = td.make_model(
            args, recording["in_obs"].shape[-1], recording["in_action"].shape[-1], "termination" in recording
        )
        params, target_q = from_torch(tensors)[:2]
        check_shapes(params, shapes_of(td, args, model), name, "the model")
        return recording, plan, args, model, params, target_q

    return load


@cache
def shapes_of(script, args, model):
    """Shapes of the parameters of a script's networks."""
    return jax.eval_shape(lambda: script.init_params(args, model, jax.random.key(0)))


def draws_of(recording, prefix):
    """The draws under this prefix in the order in which they were made."""
    return [recording[k] for k in sorted(recording) if k.startswith(prefix + "_draw")]


def test_discrete_regression_equals_the_recording(golden):
    recording, args = golden("maths.npz"), td.Args()
    x, logits = jnp.asarray(recording["x"])[..., 0], jnp.asarray(recording["logits"])
    np.testing.assert_allclose(td.symlog(x), recording["symlog"][:, 0], rtol=1e-4)
    in_bins = jnp.clip(x, args.vmin, args.vmax)  # the recording feeds symexp what fits the bins
    np.testing.assert_allclose(td.symexp(in_bins), recording["symexp"][:, 0], rtol=1e-4)
    np.testing.assert_allclose(td.two_hot(args, x), recording["two_hot"], atol=1e-4)
    np.testing.assert_allclose(td.two_hot_inv(args, logits), recording["two_hot_inv"][:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(td.soft_ce(args, logits, x), recording["soft_ce"][:, 0], rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_networks_equal_the_recording_in_both_layouts(agent, name, layout):
    recording, _, args, model, params, target_q = agent(name, layout)
    obs, action = recording["in_obs"][0], recording["in_action"][0]
    z = model.encoder.apply(params["encoder"], obs)
    close(z, recording["encode_obs0"], 1e-4)
    close(model.dynamics.apply(params["dynamics"], z, action), recording["next"], 1e-4)
    close(model.reward.apply(params["reward"], z, action), recording["reward_logits"], 1e-4)
    close(td.q_logits(model, params["q"], z, action), recording["q_logits_all"], 1e-4)
    close(td.q_logits(model, target_q, z, action), recording["q_target_logits_all"], 1e-4)
    if model.termination:
        logit = model.termination.apply(params["termination"], z)
        close(jax.nn.sigmoid(logit), recording["termination"], 1e-4)
    pi = td.policy(args, model, params["pi"], z, draws_of(recording, "pi")[0])
    for field in pi._fields:
        close(getattr(pi, field), recording[f"pi_{field}"], 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_three_updates_equal_the_recording(agent, name):
    recording, _, args, model, params, target_q = agent(name)
    batch = td.Batch(*(jnp.asarray(recording[f"in_{k}"]) for k in td.Batch._fields))
    batch = batch._replace(reward=batch.reward[..., 0], terminated=batch.terminated[..., 0])
    state = td.init_state(args, params, target_q, 1.0, jax.random.key(0))
    update = jax.jit(td.update, static_argnums=(0, 1))
    for i in range(3):
        next_action, target_heads, pi_action, pi_heads = draws_of(recording, f"update{i}")
        noise = td.UpdateNoise(next_action, target_heads[:2], pi_action, pi_heads[:2], None, None)
        state, info = update(args, model, state, batch, float(recording["discount"]), noise)
        for key, value in recording.items():
            if key.startswith(f"update{i}_info_") and (measure := key.removeprefix(f"update{i}_info_")) in info:
                close(info[measure], value, 1e-4)
        assert {"consistency_loss", "value_loss", "pi_loss", "grad_norm", "pi_grad_norm"} <= info.keys()
        close(state.q_scale, recording[f"update{i}_scale"], 1e-4)
    tensors = {k.removeprefix("update2_after_"): v for k, v in recording.items() if k.startswith("update2_after_")}
    after, after_target = from_torch(tensors)[:2]
    for mine, original in ((state.params, after), (state.target_q, after_target)):
        jax.tree.map(lambda a, b: close(a, b, 1e-4), mine, original)


def replay_plans(args, model, params, recording, discount, mode):
    """Repeats the recorded calls of the planner; dimensions of actions that the task does not have are cut off."""
    iterations, H, A = int(recording["iterations"]), args.horizon, model.action_dim
    plan = jax.jit(td.plan, static_argnums=(0, 1, 9))
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
        obs = recording["in_obs"][i][None, : model.obs_dim]
        heads = np.stack(loop[2::3])[:, :2]
        action, mean = plan(args, model, params, obs, mean, first, discount, noise, heads, mode == "explore")
        close(action[0], recording[f"{mode}{i}_action"][:A], 1e-3)
        close(mean[0], recording[f"{mode}{i}_mean"][:, :A], 1e-3)
        first = np.array([False])


@pytest.mark.parametrize("mode", ["explore", "eval"])
@pytest.mark.parametrize("name", [m for m in MODELS if m != "two_q"])
def test_three_plans_equal_the_recording(agent, name, mode):
    updates, plans, args, model, params, _ = agent(name)
    replay_plans(args, model, params, plans, float(updates["discount"]), mode)


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


@partial(jax.jit, static_argnums=(0, 1))  # once for all tasks of equal sizes: thirty times what Flax does cost more
def single_task_outputs(args, model, params, target_q, obs, action, z):
    """What all networks of the first script's agent compute for one observation, action and latent state."""
    pi = td.policy(args, model, params["pi"], z, jnp.zeros_like(action))
    q, q_target = td.q_logits(model, params["q"], z, action), td.q_logits(model, target_q, z, action)
    dynamics, reward = (getattr(model, name).apply(params[name], z, action) for name in ("dynamics", "reward"))
    return model.encoder.apply(params["encoder"], obs), dynamics, reward, pi, q, q_target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folded_agent_computes_what_the_multi_task_agent_does_for_all_tasks(golden, layout):
    tensors = envs.load_pt(golden("multitask.pt"))["model"]
    tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items() if np.ndim(v)}
    params, target_q = from_torch(envs.load_pt(golden(f"multitask{layout}.pt"))["model"])[:2]
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

        args = td.Args(enc_dim=16, mlp_dim=24, latent_dim=24, num_enc_layers=2, num_q=5)
        model = td.make_model(args, obs_dim, action_dim, False)
        both = params | {"q_target": target_q}
        folded = fold_task(both, tensors["_task_emb.weight"][task_id], obs_dim, action_dim)
        folded_target = folded.pop("q_target")
        check_shapes(folded, shapes_of(td, args, model), task, "the model")
        obs, action = obs[:obs_dim], action[:action_dim]
        found = single_task_outputs(args, model, folded, folded_target, obs, action, z)
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
    args = args_of(tensors, updates, recording)
    model = td.make_model(args, obs_dim, action_dim, False)
    params = from_torch(tensors).params
    params = fold_task(params, tensors["_task_emb.weight"][task_id], obs_dim, action_dim)
    replay_plans(args, model, params, recording, float(updates["discount"][task_id]), mode)


@pytest.fixture(scope="module", params=LAYOUTS)
def multitask(request, golden):
    """Recording of updates, args, tasks, model, params, target_q of the multi-task agent in one of the layouts."""
    recording, plan = golden("multitask_update.npz"), golden("multitask_plan.npz")
    sizes = args_of(envs.load_pt(golden("multitask.pt"))["model"], recording, plan)
    shared = {field.name for field in mt.dataclasses.fields(mt.Args)} & vars(sizes).keys() - {"exp_name", "checkpoint"}
    args = mt.Args(**{name: getattr(sizes, name) for name in shared - set(mt.SIZE_FIELDS)})
    args = mt.dataclasses.replace(args, checkpoint=str(golden(f"multitask{request.param}.pt")))
    args, model, agent = mt.load_agent(args)
    assert agent.tasks == envs.TASK_SETS["mt30"]
    return recording, args, mt.make_tasks(args, agent.tasks), model, agent.params, agent.target_q


def test_multi_task_networks_equal_the_recording(multitask, golden):
    recording, args, tasks, model, params, target_q = multitask
    np.testing.assert_allclose(tasks.discount, recording["discount"])
    np.testing.assert_array_equal(tasks.mask, envs.load_pt(golden("multitask.pt"))["model"]["_action_masks"])
    obs, action, ids = recording["in_obs"][0], recording["in_action"][0], recording["in_task"]
    task = mt.task_input(tasks, mt.embed(params["task_emb"], ids), ids)
    z = model.encoder.apply(params["encoder"], obs, task.emb)
    close(z, recording["encode_obs0"], 1e-4)
    close(model.dynamics.apply(params["dynamics"], z, task.emb, action), recording["next"], 1e-4)
    close(model.reward.apply(params["reward"], z, task.emb, action), recording["reward_logits"], 1e-4)
    close(mt.q_logits(model, params["q"], z, task.emb, action), recording["q_logits_all"], 1e-4)
    close(mt.q_logits(model, target_q, z, task.emb, action), recording["q_target_logits_all"], 1e-4)
    pi = mt.policy(args, model, params["pi"], z, task, draws_of(recording, "pi")[0])
    for field in pi._fields:
        close(getattr(pi, field), recording[f"pi_{field}"], 1e-4)


def test_three_multi_task_updates_equal_the_recording(multitask):
    recording, args, tasks, model, params, target_q = multitask
    obs, action, reward = (jnp.asarray(recording[f"in_{k}"]) for k in ("obs", "action", "reward"))
    batch = mt.Batch(obs, action, reward[..., 0], jnp.asarray(recording["in_task"], jnp.int32))
    state = mt.init_state(args, params, target_q, 1.0, jax.random.key(0))
    update = jax.jit(mt.update, static_argnums=(0, 1))
    for i in range(3):
        next_action, target_heads, pi_action, pi_heads = draws_of(recording, f"update{i}")
        noise = mt.UpdateNoise(next_action, target_heads[:2], pi_action, pi_heads[:2], None, None)
        state, info = update(args, model, tasks, state, batch, noise)
        for key, value in recording.items():
            if key.startswith(f"update{i}_info_") and (measure := key.removeprefix(f"update{i}_info_")) in info:
                close(info[measure], value, 1e-4)
        assert {"consistency_loss", "value_loss", "pi_loss", "grad_norm", "pi_grad_norm"} <= info.keys()
        close(state.q_scale, recording[f"update{i}_scale"], 1e-4)
    tensors = {k.removeprefix("update2_after_"): v for k, v in recording.items() if k.startswith("update2_after_")}
    after, after_target = from_torch(tensors)[:2]
    after["task_emb"] = tensors["_task_emb.weight"]
    for mine, original in ((state.params, after), (state.target_q, after_target)):
        jax.tree.map(lambda a, b: close(a, b, 1e-4), mine, original)


@pytest.mark.parametrize("mode", ["explore", "eval"])
def test_three_multi_task_plans_equal_the_recording(multitask, golden, mode):
    _, args, tasks, model, params, _ = multitask
    recording, H, A = golden("multitask_plan.npz"), args.horizon, model.action_dim
    iterations, ids = int(recording["iterations"]), recording["in_task"][None]
    task = mt.task_input(tasks, mt.embed(params["task_emb"], ids), ids)
    plan = jax.jit(mt.plan, static_argnums=(0, 1, 9))
    mean, first = jnp.zeros((1, H, A)), np.array([True])
    for i in range(3):
        draws = draws_of(recording, f"{mode}{i}")
        loop = draws[H : H + 3 * iterations]
        noise = mt.PlanNoise(
            pi=np.stack(draws[:H])[None],
            sample=np.stack(loop[0::3])[None],
            terminal=np.stack(loop[1::3])[None],
            gumbel=draws[H + 3 * iterations][None],
            exploration=draws[-1][None] if mode == "explore" else np.zeros((1, A), np.float32),
        )
        obs = recording["in_obs"][i][None]
        heads = np.stack(loop[2::3])[:, :2]
        action, mean = plan(args, model, params, obs, task, mean, first, noise, heads, mode == "explore")
        close(action[0], recording[f"{mode}{i}_action"], 1e-3)
        close(mean[0], recording[f"{mode}{i}_mean"], 1e-3)
        first = np.array([False])


def test_embeddings_longer_than_one_are_scaled_back_when_they_are_read_and_only_then(multitask):
    """What the recording cannot show: its embeddings are short. torch.nn.Embedding with max_norm 1 does this."""
    recording, args, tasks, model, params, target_q = multitask
    table = params["task_emb"] * 20  # lengths 3.6 to 6.6
    ids = recording["in_task"]
    np.testing.assert_allclose(np.linalg.norm(mt.embed(table, ids), axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(mt.embed(params["task_emb"], ids), params["task_emb"][ids])
    batch = mt.Batch(*(jnp.asarray(recording[f"in_{k}"]) for k in ("obs", "action")), None, jnp.asarray(ids))
    batch = batch._replace(reward=jnp.asarray(recording["in_reward"])[..., 0])
    state = mt.init_state(args, params | {"task_emb": table}, target_q, 1.0, jax.random.key(0))
    noise = mt.update_noise(args, model, jax.random.key(1))
    after = jax.jit(mt.update, static_argnums=(0, 1))(args, model, tasks, state, batch, noise)[0].params["task_emb"]
    lengths, read = np.linalg.norm(after, axis=1), np.isin(np.arange(30), ids)
    assert (lengths[read] <= 1 + 1e-6).all() and (lengths[read] > 0.9).all()
    np.testing.assert_array_equal(after[~read], table[~read])  # no gradient, no scaling: not read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_shifted_and_encoded_as_recorded(golden, layout):
    tensors, recording = envs.load_pt(golden(f"rgb{layout}.pt"))["model"], golden("rgb_encoder.npz")
    params = from_torch(tensors, "rgb").params
    args = rgb.Args(latent_dim=len(tensors["_dynamics.2.bias"]), mlp_dim=len(tensors["_dynamics.0.bias"]))
    model = rgb.make_model(args, action_dim=len(tensors["_pi.2.bias"]) // 2, episodic=False)
    stacks = jnp.asarray(recording["in_obs"].transpose(0, 2, 3, 1))  # [2, 64, 64, 9]
    for i in range(5):
        shift = jnp.broadcast_to(jnp.asarray(recording[f"shift{i}"]), (2, 2))
        shifted = np.asarray(jax.vmap(rgb.random_shift)(stacks, shift)).transpose(0, 3, 1, 2)
        expected = recording[f"shifted{i}"]
        np.testing.assert_array_equal(shifted, np.rint(expected))  # interpolation left up to 0.002 in the recording
        assert np.abs(shifted - expected).max() < 2e-3
        close(rgb.encode(model, params["encoder"], stacks, shift), recording[f"encode{i}"], 1e-4)
    # on a CPU, eight and more pictures go another way
    many, shifts = jnp.tile(stacks, (4, 1, 1, 1)), jnp.tile(shift, (4, 1))
    close(rgb.encode(model, params["encoder"], many, shifts), np.tile(recording["encode4"], (4, 1)), 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rest_of_a_recorded_pixel_agent_has_the_shapes_of_ours(golden, layout):
    tensors = envs.load_pt(golden(f"rgb{layout}.pt"))["model"]
    params, target_q = from_torch(tensors, "rgb")[:2]
    sizes = {"latent_dim": len(tensors["_dynamics.2.bias"]), "mlp_dim": len(tensors["_dynamics.0.bias"])}
    args = rgb.Args(**sizes, num_q=len(params["q"]["params"]["linear_0"]["bias"]))
    model = rgb.make_model(args, len(tensors["_pi.2.bias"]) // 2, episodic=False)
    check_shapes(params, shapes_of(rgb, args, model), "rgb.pt", "the model")
    assert jax.tree.map(jnp.shape, target_q) == jax.tree.map(jnp.shape, params["q"])
