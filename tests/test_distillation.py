"""Distillation: the original's numbers, what a teacher changes and what it does not, and runs that have one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import close, draws_of
from test_multitask import FOLDER, TASKS, data_dir, flags, losses_of, state_of, whole  # noqa: F401

import tdmpc2_jax_mt as mt
from files import pretrained

SCRIPT = mt


@pytest.fixture(scope="module")
def student(golden):
    """Recording, arguments, tasks, model and agent of the student; the arguments name its recorded teacher."""
    recording = golden("distill_update.npz")
    sizes = {"horizon": len(recording["in_action"]), "batch_size": recording["in_obs"].shape[1], "dropout": 0.0}
    args = mt.Args(**sizes, checkpoint=str(golden("distill_student.pt")), teacher=str(golden("distill_teacher.pt")))
    args, model, agent = mt.load_agent(dataclasses.replace(args, distill_coef=float(recording["coef"])))
    return recording, args, mt.make_tasks(args, agent.tasks), model, agent


def batch_of(recording):
    arrays = [jnp.asarray(recording[f"in_{name}"]) for name in ("obs", "action", "reward", "task")]
    return mt.Batch(arrays[0], arrays[1], arrays[2][..., 0], arrays[3].astype(jnp.int32))


def noise_of(recording, i):
    next_action, target_heads, pi_action, pi_heads = draws_of(recording, f"update{i}")
    return mt.UpdateNoise(next_action, target_heads[:2], pi_action, pi_heads[:2], None, None)


@pytest.mark.golden
def test_a_teacher_of_other_sizes_predicts_what_is_recorded(student):
    recording, args, _, model, agent = student
    teacher, batch = mt.make_teacher(args, agent.tasks), batch_of(recording)
    its_model = teacher.func.args[1]
    (params,) = teacher.args
    emb = mt.embed(params["task_emb"], batch.task)
    assert (np.linalg.norm(params["task_emb"], axis=1) > 1).any(), "rows that are scaled back when they are read"
    z = its_model.encoder.apply(params["encoder"], batch.obs[0], emb)
    close(z, recording["teacher_encode_obs0"], 1e-4)
    logits = its_model.reward.apply(params["reward"], z, emb, batch.action[0])
    close(logits, recording["teacher_reward_logits"], 1e-4)
    rewards = teacher(batch.obs[0], batch.action[0], batch.task)
    close(rewards, recording["teacher_reward"], 1e-4)
    mine = mt.predict_reward(args, model, agent.params, batch.obs[0], batch.action[0], batch.task)
    close(mine, recording["student_reward"], 1e-4)
    close(((mine - rewards) ** 2).mean(), recording["distillation_loss"], 1e-4)


@pytest.mark.golden
def test_the_gradient_of_the_distance_reaches_encoder_reward_head_and_embedding_as_recorded(student):
    recording, args, _, model, agent = student
    batch, params = batch_of(recording), {k: v for k, v in agent.params.items() if k != "pi"}
    rewards = mt.make_teacher(args, agent.tasks)(batch.obs[0], batch.action[0], batch.task)
    params["task_emb"] = mt.renormalise(params["task_emb"], batch.task)
    still = jnp.zeros((args.horizon, args.batch_size, model.dynamics.out)), batch.reward
    only = dataclasses.replace(args, consistency_coef=0.0, reward_coef=0.0, value_coef=0.0)

    def distance(params):
        return mt.model_loss(only, model, params, batch, *still, noise_of(recording, 0), rewards)[0]

    grads = jax.jit(jax.grad(distance))(params)
    recorded = {k.removeprefix("distillation_grad_"): v for k, v in recording.items() if "distillation_grad_" in k}
    close(grads.pop("task_emb"), recorded.pop("_task_emb.weight"), 1e-4)
    for name, prefix in (("encoder", "_encoder.state"), ("reward", "_reward")):
        expected = pretrained._mlp(recorded, prefix)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), grads.pop(name), expected)
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads)), "dynamics and Qs have none"


@pytest.mark.golden
def test_three_updates_with_a_teacher_equal_the_recording(student):
    recording, args, tasks, model, agent = student
    teacher, update = mt.make_teacher(args, agent.tasks), jax.jit(mt.update, static_argnums=(0, 1))
    before = jax.tree.map(np.copy, teacher.args)
    state = mt.init_state(args, agent.params, agent.target_q, 1.0, jax.random.key(0))
    for i in range(3):
        state, info = update(args, model, tasks, state, batch_of(recording), noise_of(recording, i), teacher)
        for key, value in recording.items():
            if key.startswith(f"update{i}_info_") and (measure := key.removeprefix(f"update{i}_info_")) in info:
                close(info[measure], value, 1e-4)
        assert {"distillation_loss", "total_loss", "grad_norm", "pi_loss"} <= info.keys()
        close(state.q_scale, recording[f"update{i}_scale"], 1e-4)
    tensors = {k.removeprefix("update2_after_"): v for k, v in recording.items() if k.startswith("update2_after_")}
    after, after_target = pretrained.from_torch(tensors)[:2]
    after["task_emb"] = tensors["_task_emb.weight"]
    for mine, original in ((state.params, after), (state.target_q, after_target)):
        jax.tree.map(lambda a, b: close(a, b, 1e-4), mine, original)
    jax.tree.map(np.testing.assert_array_equal, teacher.args, before)


@pytest.mark.golden
def test_a_teacher_without_weight_leaves_the_program_as_it_is_and_so_every_bit(student):
    recording, args, tasks, model, agent = student
    teacher, args = mt.make_teacher(args, agent.tasks), dataclasses.replace(args, distill_coef=0.0)
    state = mt.init_state(args, agent.params, agent.target_q, 1.0, jax.random.key(0))
    inputs = tasks, state, batch_of(recording), noise_of(recording, 0)
    program, beside = (
        jax.jit(partial(mt.update, args, model, teacher=its)).lower(*inputs).as_text() for its in (None, teacher)
    )
    assert beside == program


@pytest.mark.golden
def test_a_teacher_is_kept_in_the_type_of_the_matrix_products_and_predicts_the_same(student):
    _, args, _, _, agent = student
    half = mt.make_teacher(dataclasses.replace(args, compute_dtype="bfloat16"), agent.tasks)
    params = mt.make_teacher(args, agent.tasks).args[0]
    assert {str(x.dtype) for x in jax.tree.leaves(half.args) if x.ndim == 2} == {"bfloat16", "float32"}
    assert half.args[0]["task_emb"].dtype == np.float32 and half.args[0].keys() == {"encoder", "reward", "task_emb"}
    recording = student[0]
    batch = batch_of(recording)
    ask = batch.obs[0], batch.action[0], batch.task
    np.testing.assert_array_equal(half(*ask), half.func(params, *ask), "as if cast at every product")
