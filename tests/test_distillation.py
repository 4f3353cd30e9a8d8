"""Distillation: the original's numbers, what a teacher changes and what it does not, and runs that have one."""

import dataclasses
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, with_devices
from helpers import ROOT, meta_of, read_scalars, wait_for
from many_tasks import TWO_TASKS, state_of, write_agent, write_random_episodes
from recordings import changes_are_close, close, draws_of

import envs
import tdmpc2_jax_mt as mt
from tdmpc2_support.agents import pretrained
from tdmpc2_support.run import checkpoints
from tdmpc2_support.run.folder import recorded_settings

SCRIPT = mt


@pytest.fixture(scope="module")
def student(golden):
    """Recording, agent, tasks, parameters and arguments of the student; these name its recorded teacher."""
    recording = golden("distill_update.npz")
    sizes = {"horizon": len(recording["in_action"]), "batch_size": recording["in_obs"].shape[1], "dropout": 0.0}
    agent = mt.Agent(**sizes, distill_coef=float(recording["coef"]))
    paths = {"checkpoint": str(golden("distill_student.pt")), "teacher": str(golden("distill_teacher.pt"))}
    agent, loaded = mt.load_agent(mt.Args(agent=agent, **paths))
    return recording, agent, mt.make_tasks(agent, loaded.tasks), loaded, mt.Args(agent=agent, **paths)


def batch_of(recording):
    obs, action, reward, task = (recording[f"in_{name}"] for name in ("obs", "action", "reward", "task"))
    return mt.Batch(obs, action, reward[..., 0], task.astype(np.int32))


def noise_of(recording, i):
    next_action, target_heads, pi_action, pi_heads = draws_of(recording, f"update{i}")
    return mt.UpdateNoise(next_action, target_heads[:2], pi_action, pi_heads[:2], None, None)


@pytest.mark.golden
def test_a_teacher_of_other_sizes_predicts_what_is_recorded(student):
    recording, agent, _, loaded, args = student
    teacher, batch = mt.make_teacher(args, loaded.tasks), batch_of(recording)
    model = mt.networks(teacher.func.args[0])
    (params,) = teacher.args
    emb = mt.embed(params["task_emb"], batch.task)

    @jax.jit
    def answers(params, obs, action):
        z = model.encoder.apply(params["encoder"], obs, emb)
        return z, model.reward.apply(params["reward"], z, emb, action)

    assert (np.linalg.norm(params["task_emb"], axis=1) > 1).any(), "rows that are scaled back when they are read"
    ask = batch.obs[0], batch.action[0]
    z, logits = answers(params, *ask)
    close(z, recording["teacher_encode_obs0"], 1e-4)
    close(logits, recording["teacher_reward_logits"], 1e-4)
    rewards = jax.jit(lambda teacher, *ask: teacher(*ask))(teacher, *ask, batch.task)
    close(rewards, recording["teacher_reward"], 1e-4)
    mine = jax.jit(mt.predict_reward, static_argnums=0)(agent, loaded.params, *ask, batch.task)
    close(mine, recording["student_reward"], 1e-4)
    close(((mine - rewards) ** 2).mean(), recording["distillation_loss"], 1e-4)


@pytest.mark.golden
@pytest.mark.slow
def test_the_gradient_of_the_distance_reaches_encoder_reward_head_and_embedding_as_recorded(student):
    recording, agent, _, loaded, args = student
    batch, params = batch_of(recording), {k: v for k, v in loaded.params.items() if k != "pi"}
    rewards = mt.make_teacher(args, loaded.tasks)(batch.obs[0], batch.action[0], batch.task)
    params["task_emb"] = mt.renormalise(params["task_emb"], batch.task)
    still = jnp.zeros((agent.horizon, agent.batch_size, agent.latent_dim)), batch.reward
    only = dataclasses.replace(agent, consistency_coef=0.0, reward_coef=0.0, value_coef=0.0)

    def distance(params):
        return mt.model_loss(only, params, batch, *still, noise_of(recording, 0), rewards)[0]

    grads = jax.jit(jax.grad(distance))(params)
    recorded = {k.removeprefix("distillation_grad_"): v for k, v in recording.items() if "distillation_grad_" in k}
    close(grads.pop("task_emb"), recorded.pop("_task_emb.weight"), 1e-4)
    for name, prefix in (("encoder", "_encoder.state"), ("reward", "_reward")):
        expected = pretrained._mlp(recorded, prefix)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), grads.pop(name), expected)
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads)), "dynamics and Qs have none"


@pytest.mark.golden
@pytest.mark.slow
def test_three_updates_with_a_teacher_equal_the_recording(student):
    recording, agent, tasks, loaded, args = student
    teacher, update = mt.make_teacher(args, loaded.tasks), jax.jit(mt.update, static_argnums=0)
    before = jax.tree.map(np.copy, teacher.args)
    state = mt.init_state(agent, loaded.params, loaded.target_q, 1.0, jax.random.key(0))
    for i in range(3):
        state, info = update(agent, tasks, state, batch_of(recording), noise_of(recording, i), teacher)
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
    changes_are_close(state.target_q, after_target, loaded.target_q)
    jax.tree.map(np.testing.assert_array_equal, teacher.args, before)


@pytest.mark.golden
def test_a_teacher_without_weight_leaves_the_program_as_it_is_and_so_every_bit(student):
    recording, agent, tasks, loaded, args = student
    agent = dataclasses.replace(agent, distill_coef=0.0)
    state = mt.init_state(agent, loaded.params, loaded.target_q, 1.0, jax.random.key(0))
    inputs = tasks, state, batch_of(recording), noise_of(recording, 0)
    programs = [
        jax.jit(partial(mt.update, agent, teacher=teacher)).lower(*inputs).as_text()
        for teacher in (None, mt.make_teacher(args, loaded.tasks))
    ]
    assert programs[0] == programs[1]


@pytest.mark.golden
def test_a_teacher_is_kept_in_the_type_of_the_matrix_products_and_predicts_the_same(student):
    recording, agent, _, loaded, args = student
    halved = dataclasses.replace(args, agent=dataclasses.replace(agent, compute_dtype="bfloat16"))
    half = mt.make_teacher(halved, loaded.tasks)
    params = mt.make_teacher(args, loaded.tasks).args[0]
    assert {str(x.dtype) for x in jax.tree.leaves(half.args) if x.ndim == 2} == {"bfloat16", "float32"}
    assert half.args[0]["task_emb"].dtype == np.float32 and half.args[0].keys() == {"encoder", "reward", "task_emb"}
    batch = batch_of(recording)
    ask = batch.obs[0], batch.action[0], batch.task
    np.testing.assert_array_equal(half(*ask), half.func(params, *ask), "as if cast at every product")


# ---------------------------------------------------------------------------------------------------------------- Runs
FOLDER = "cartpole-balance+pendulum-swingup/tdmpc2_jax_mt/1"
LENGTHS = "--num-updates 40 --checkpoint-freq 20 --eval-freq 1000 --log-freq 1 --no-mpc".split()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_random_episodes(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    write_agent(folder)
    return folder


@pytest.fixture
def flags(data_dir, teacher):
    return ("--tasks", ",".join(TWO_TASKS), "--data-dir", data_dir, "--teacher", teacher, *LENGTHS)


@pytest.fixture(scope="module")
def whole(data_dir, teacher, tmp_path_factory):
    """Folder of a run with a teacher that nothing has interrupted, and what it printed."""
    runs = tmp_path_factory.mktemp("whole")
    command = [sys.executable, ROOT / "tdmpc2_jax_mt.py", *SMALL["tdmpc2_jax_mt.py"], "--runs-dir", runs, *LENGTHS]
    command += ["--tasks", ",".join(TWO_TASKS), "--data-dir", data_dir, "--teacher", teacher]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return runs / FOLDER, done.stdout


@pytest.mark.slow
def test_a_run_of_ours_teaches_with_its_own_bins(teacher):
    ask = np.ones((2, 5), np.float32), np.ones((2, 1), np.float32), np.arange(2)
    rewards = mt.make_teacher(mt.Args(teacher=str(teacher)), TWO_TASKS)(*ask)
    agent, loaded = mt.load_agent(mt.Args(checkpoint=str(teacher), agent=mt.Agent(vmin=-8.0, num_bins=51)))
    np.testing.assert_allclose(rewards, mt.predict_reward(agent, loaded.params, *ask), rtol=1e-6)
    student = mt.predict_reward(dataclasses.replace(agent, vmin=-10.0), loaded.params, *ask)
    assert (np.abs(student - rewards) > 1e-3).all(), "not those of the student"


@pytest.mark.slow
def test_a_run_with_a_teacher_says_what_it_takes_and_logs_the_distance(whole):
    folder, out = whole
    assert "teacher 0.00 GB" in out.splitlines()[0]
    distance = [value for _, value in read_scalars(folder, "losses/distillation_loss")]
    assert len(distance) == 40 and min(distance) > 0
    parts = ("total", "consistency", "reward", "value", "distillation")
    values = {part: read_scalars(folder, f"losses/{part}_loss")[-1][1] for part in parts}
    total = 20 * values["consistency"] + 0.1 * (values["reward"] + values["value"]) + 0.45 * values["distillation"]
    assert values["total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_a_run_with_a_teacher_that_was_killed_ends_bit_for_bit_where_it_would_have(
    start, script, flags, whole, tmp_path
):
    folder = tmp_path / "runs" / FOLDER
    child = start(*flags, "--storage", "disk", name="tdmpc2_jax_mt.py")
    wait_for(lambda: checkpoints.complete_checkpoints(folder), child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert meta_of(folder, "tdmpc2_jax_mt")["count"]["updates"] in (20, 40)
    status, _, err = script(*flags, "--storage", "host", "--resume", name="tdmpc2_jax_mt.py")
    assert status == 0, err
    for mine, uninterrupted in zip(state_of(folder), state_of(whole[0]), strict=True):
        np.testing.assert_array_equal(mine, uninterrupted)


@pytest.mark.slow
def test_a_run_goes_on_with_the_teacher_that_it_had_only(refused, flags, whole, teacher, monkeypatch):
    monkeypatch.setattr(mt.cli, "set_folder", lambda args: whole[0])
    flags = [*map(str, flags), *SMALL["tdmpc2_jax_mt.py"], "--num-updates", "60", "--resume"]
    make_teacher = mt.make_teacher
    with monkeypatch.context() as patch:
        taught = make_teacher(mt.Args(teacher=str(teacher)), TWO_TASKS)
        learned_on = jax.tree.map(lambda x: x + np.float32(1e-3), taught)
        patch.setattr(mt, "make_teacher", lambda *args: learned_on)
        with pytest.raises(SystemExit, match="is another agent than the one that has taught this run"):
            mt.main(flags)
    without = [word for word in flags if word not in ("--teacher", str(teacher))]
    args = mt.cli.parse(mt.Args, without, "", lambda args: recorded_settings(args, mt.cli.set_folder, mt.SCRIPTS, ()))
    assert args.teacher == str(teacher)


DEVICES = """
import jax, numpy as np
from jax.sharding import Mesh
import envs, tdmpc2_jax_mt as mt
from tdmpc2_support.data.device_data import Source
from tdmpc2_support.devices import global_arrays, replicated
from tdmpc2_support.run.schedule import random_streams
tasks = {tasks!r}
agent = mt.for_tasks(mt.Agent(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=2, task_dim=8, batch_size=16), tasks)
data = envs.load_dataset(tasks, {data_dir!r})

def losses(devices, shard):
    mesh = Mesh(np.array(jax.devices()[:devices]), "devices")
    constants = global_arrays(mt.make_tasks(agent, tasks), replicated(mesh))
    source = Source(data, "device", "files", mesh, agent.batch_size, agent.horizon)
    args = mt.Args(agent=agent, shard_params=shard, teacher={teacher!r})
    program, shapes = mt.compile_train(args, agent, mesh, constants, source.shapes(), mt.make_teacher(args, tasks))
    places = jax.tree.map(lambda x: x.sharding, shapes)
    state = jax.jit(lambda: mt.fresh_state(agent, random_streams(1)), out_shardings=places)()
    source.load()
    rows = []
    for batch, _ in zip(source.batches(seed=1, first=0, readers=4), range(10)):
        state, info = program(state, batch)
        rows.append([float(info[name]) for name in ("total_loss", "distillation_loss", "pi_loss", "grad_norm")])
    return np.array(rows)

np.testing.assert_allclose(losses(8, "yes"), losses(1, "no"), rtol=1e-4, atol=1e-6)
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_with_a_teacher_spread_over_them_learn_what_one_learns(data_dir, teacher):
    code = DEVICES.format(tasks=TWO_TASKS, data_dir=str(data_dir), teacher=str(teacher))
    done = subprocess.run([sys.executable, "-c", code], env=with_devices(8), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr


@pytest.mark.golden
def test_teachers_that_do_not_fit_are_refused_in_one_sentence(refused, golden, flags, teacher, data_dir, monkeypatch):
    def taught_by(path, *more):
        return refused(*flags, "--teacher", path, *more)

    assert "multitask.pt knows other tasks than --tasks names, or in another order" in taught_by(golden("multitask.pt"))
    assert "knows other tasks" in taught_by(teacher, "--tasks", "pendulum-swingup,cartpole-balance")
    assert "single.pt is a single-task agent" in taught_by(golden("single.pt"))
    assert "nowhere.pt does not exist" in taught_by("nowhere.pt")
    assert "nowhere does not exist" in taught_by("nowhere")
    without = ("--tasks", ",".join(TWO_TASKS), "--data-dir", data_dir)
    assert "--distill-coef goes with --teacher" in refused(*without, "--distill-coef", 0.4)
    assert "--distill-coef must be a number that is not negative" in refused(*flags, "--distill-coef", -1)
    tensors = pretrained.read_tensors(golden("multitask.pt"))
    tensors["_task_emb.weight"] = tensors["_task_emb.weight"][:2]
    monkeypatch.setattr(pretrained, "read_tensors", lambda path, in_place=False: tensors)
    sizes = "it knows 24 observations and 6 actions, they have 5 and 1"
    assert f"two.pt does not fit these tasks: {sizes}" in taught_by("two.pt")


@pytest.mark.golden
@pytest.mark.parametrize("layout", ["", "_released_layout"])
def test_of_an_original_teacher_only_what_predicts_rewards_is_read(golden, layout):
    path = str(golden(f"multitask{layout}.pt"))
    agent = pretrained.load_teacher(path, envs.TASK_SETS["mt30"])
    assert agent.params.keys() == {"encoder", "reward", "task_emb"} and not agent.target_q
    all_of_it = pretrained.load_multitask(path, ()).params
    jax.tree.map(np.testing.assert_array_equal, agent.params, {name: all_of_it[name] for name in agent.params})
    assert agent.args["num_bins"] == 101 and agent.args["mlp_dim"] == 24
