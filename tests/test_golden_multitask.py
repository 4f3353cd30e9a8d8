"""The original's numbers, many tasks: same inputs, same recorded random draws, same outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import LAYOUTS, agent_of, changes_are_close, close, draws_of

import envs
import tdmpc2_jax_mt as mt
from tdmpc2_support.agents.pretrained import from_torch

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def multitask(golden):
    """Recording of updates, agent, tasks, params, target_q of the multi-task agent."""
    recording, plan = golden("multitask_update.npz"), golden("multitask_plan.npz")
    recorded = vars(agent_of(envs.load_pt(golden("multitask.pt"))["model"], recording, plan))
    read_off = {*mt.SIZE_FIELDS, "model_size", "obs_dim", "action_dim", "num_tasks"}
    shared = {field.name for field in dataclasses.fields(mt.Agent)} & recorded.keys() - read_off
    agent = mt.Agent(**{name: recorded[name] for name in shared})
    agent, loaded = mt.load_agent(mt.Args(agent=agent, checkpoint=str(golden("multitask.pt"))))
    assert loaded.tasks == envs.TASK_SETS["mt30"]
    return recording, agent, mt.make_tasks(agent, loaded.tasks), loaded.params, loaded.target_q


def test_both_layouts_are_read_as_the_same_agent(golden):
    params, target_q = zip(
        *(from_torch(envs.load_pt(golden(f"multitask{x}.pt"))["model"])[:2] for x in LAYOUTS), strict=True
    )
    jax.tree.map(np.testing.assert_array_equal, *params)
    jax.tree.map(np.testing.assert_array_equal, *target_q)


def test_multi_task_networks_equal_the_recording(multitask, golden):
    recording, agent, tasks, params, target_q = multitask
    model = mt.networks(agent)
    np.testing.assert_allclose(tasks.discount, recording["discount"])
    np.testing.assert_array_equal(tasks.mask, envs.load_pt(golden("multitask.pt"))["model"]["_action_masks"])
    obs, action, ids = recording["in_obs"][0], recording["in_action"][0], recording["in_task"]
    task = mt.task_input(tasks, mt.embed(params["task_emb"], ids), ids)
    z = model.encoder.apply(params["encoder"], obs, task.emb)
    close(z, recording["encode_obs0"], 1e-4)
    close(model.dynamics.apply(params["dynamics"], z, task.emb, action), recording["next"], 1e-4)
    close(model.reward.apply(params["reward"], z, task.emb, action), recording["reward_logits"], 1e-4)
    close(mt.q_logits(agent, params["q"], z, task.emb, action), recording["q_logits_all"], 1e-4)
    close(mt.q_logits(agent, target_q, z, task.emb, action), recording["q_target_logits_all"], 1e-4)
    pi = mt.policy(agent, params["pi"], z, task, draws_of(recording, "pi")[0])
    for field in pi._fields:
        close(getattr(pi, field), recording[f"pi_{field}"], 1e-4)


def test_three_multi_task_updates_equal_the_recording(multitask):
    recording, agent, tasks, params, target_q = multitask
    obs, action, reward = (jnp.asarray(recording[f"in_{k}"]) for k in ("obs", "action", "reward"))
    batch = mt.Batch(obs, action, reward[..., 0], jnp.asarray(recording["in_task"], jnp.int32))
    state = mt.init_state(agent, params, target_q, 1.0, jax.random.key(0))
    update = jax.jit(mt.update, static_argnums=0)
    for i in range(3):
        next_action, target_heads, pi_action, pi_heads = draws_of(recording, f"update{i}")
        noise = mt.UpdateNoise(next_action, target_heads[:2], pi_action, pi_heads[:2], None, None)
        state, info = update(agent, tasks, state, batch, noise)
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
    changes_are_close(state.target_q, after_target, target_q)


@pytest.mark.parametrize("mode", ["explore", "eval"])
def test_three_multi_task_plans_equal_the_recording(multitask, golden, mode):
    _, agent, tasks, params, _ = multitask
    recording, H, A = golden("multitask_plan.npz"), agent.horizon, agent.action_dim
    iterations, ids = int(recording["iterations"]), recording["in_task"][None]
    task = mt.task_input(tasks, mt.embed(params["task_emb"], ids), ids)
    plan = jax.jit(mt.plan, static_argnums=(0, 8))
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
        action, mean = plan(agent, params, obs, task, mean, first, noise, heads, mode == "explore")
        close(action[0], recording[f"{mode}{i}_action"], 1e-3)
        close(mean[0], recording[f"{mode}{i}_mean"], 1e-3)
        first = np.array([False])


def test_embeddings_longer_than_one_are_scaled_back_when_they_are_read_and_only_then(multitask):
    """What the recording cannot show: its embeddings are short. torch.nn.Embedding with max_norm 1 does this."""
    recording, agent, tasks, params, target_q = multitask
    table = params["task_emb"] * 20  # lengths 3.6 to 6.6
    ids = recording["in_task"]
    np.testing.assert_allclose(np.linalg.norm(mt.embed(table, ids), axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(mt.embed(params["task_emb"], ids), params["task_emb"][ids])
    batch = mt.Batch(*(jnp.asarray(recording[f"in_{k}"]) for k in ("obs", "action")), None, jnp.asarray(ids))
    batch = batch._replace(reward=jnp.asarray(recording["in_reward"])[..., 0])
    state = mt.init_state(agent, params | {"task_emb": table}, target_q, 1.0, jax.random.key(0))
    noise = mt.update_noise(agent, jax.random.key(1))
    after = jax.jit(mt.update, static_argnums=0)(agent, tasks, state, batch, noise)[0].params["task_emb"]
    lengths, read = np.linalg.norm(after, axis=1), np.isin(np.arange(30), ids)
    assert (lengths[read] <= 1 + 1e-6).all() and (lengths[read] > 0.9).all()
    np.testing.assert_array_equal(after[~read], table[~read])  # no gradient, no scaling: not read
