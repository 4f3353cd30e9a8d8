"""Latent diffusion MPC on several tasks: the parts of a multi-task agent, mixed windows, masks, runs of all tasks."""

import contextlib
import csv
import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_diffusion import TINY, changed, compile_in_less_time, jitter, static  # noqa: F401

import envs
import tdmpc2_jax_diffusion as td
import tdmpc2_jax_mt as mt
import world_model
from tdmpc2_support.data.recorded import measures
from tdmpc2_support.envs.tasks import TASKS
from tdmpc2_support.run.checkpoints import write_checkpoint
from tdmpc2_support.run.reports import Evaluation, record_each

SCRIPT = td
TASK_NAMES = ("cartpole-swingup", "cup-catch", "pendulum-spin")  # of 5, 8 and 3 observations, 1, 2 and 1 actions
OBS, A, F, Z, E = 8, 2, 4, 16, 6
SIZES = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": Z, "num_enc_layers": 2, "num_q": 2}
ARGS = changed(tasks=",".join(TASK_NAMES), task_dim=E, scales="1")
MODEL = td.make_model(ARGS, OBS, A, episodic=False)


def write_episodes(folder, name, episodes=4, length=30):
    """Smooth numbers; filler is NaN."""
    rng, row = np.random.default_rng(len(name)), TASKS[name]
    action = rng.uniform(-1, 1, (episodes, length, row.action_size)).astype(np.float32)
    obs = np.cumsum(rng.normal(size=(episodes, length, row.obs_size)), axis=1).astype(np.float32) / 5
    reward = rng.random((episodes, length)).astype(np.float32)
    action[:, 0], reward[:, 0] = np.nan, np.nan
    (folder / name).mkdir(parents=True)
    tensors = {"obs": obs, "action": action, "reward": reward, "task": np.zeros((episodes, length), np.int64)}
    envs.save_tensordict(folder / name / "chunk_0.pt", tensors)


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """Folder of a run of the multi-task script with episodes of all its tasks beside it, its arguments, its agent."""
    folder = tmp_path_factory.mktemp("tasks")
    args = mt.Args(tasks=",".join(TASK_NAMES), task_dim=E, num_samples=32, num_elites=8, num_pi_trajs=4, **SIZES)
    model = mt.make_model(args, TASK_NAMES)
    params = jitter(jax.jit(partial(mt.init_params, args, model))(jax.random.key(0)), 0.3)
    params["task_emb"] = 2.0 * params["task_emb"]  # some rows are longer than networks read them
    target_q = jitter(params["q"], 0.1, 1)
    state = mt.init_state(args, params, target_q, 1.0, jax.random.key(1))
    meta = {"script": "tdmpc2_jax_mt", "args": dataclasses.asdict(args), "tasks": TASK_NAMES, "count": {}}
    with ocp.CheckpointManager(folder / "world" / "checkpoints") as manager:
        write_checkpoint(manager, 1, meta, state=state)
    for name in TASK_NAMES:
        write_episodes(folder / "data", name)
    return folder, args, model, params


def load(folder, tasks=TASK_NAMES):
    args = dataclasses.replace(ARGS, world_model=str(folder / "world"), tasks=",".join(tasks))
    model = td.make_model(args, *envs.set_sizes(tasks), episodic=False)
    return model, world_model.load_world(args, model, tasks, [jnp.float32(0.9 + 0.01 * i) for i in range(len(tasks))])


@pytest.fixture(scope="module")
def made(agent):
    """The world model of all tasks, and a learning state whose networks answer anything but zero."""
    _, world = load(agent[0])
    data = td.encoded(dataclasses.replace(ARGS, data_dir=str(agent[0] / "data")), MODEL, world)
    each = []
    for i in range(3):
        windows = td.windows_at(data, td.of_one(data, data.starts, i, 50), F)
        each.append(td.statistics(ARGS, MODEL, world_model.of_task(world, i), windows))
    state = static(td.init_diffusion)(ARGS, MODEL, jax.tree.map(lambda *x: jnp.stack(x), *each), jax.random.key(0))
    return world, state._replace(params=jitter(state.params, 0.1), ema=jitter(state.ema, 0.1, 2)), data


# ---------------------------------------------------------------------------------------------------------- The parts
@pytest.mark.parametrize("tasks", [TASK_NAMES, ("pendulum-spin", "cartpole-swingup")], ids=["all", "some"])
def test_a_part_answers_what_the_multi_task_networks_do_when_told_the_task(agent, tasks):
    folder, args, theirs, params = agent
    model, world = load(folder, tasks)
    rng, close = np.random.default_rng(0), partial(np.testing.assert_allclose, atol=1e-5)
    for i, name in enumerate(tasks):
        its, row = world_model.of_task(world, i), TASKS[name]
        emb = mt.embed(params["task_emb"], TASK_NAMES.index(name))
        obs = np.zeros((7, OBS), np.float32)
        obs[:, : row.obs_size] = rng.normal(size=(7, row.obs_size))
        a = np.zeros((7, A), np.float32)
        a[:, : row.action_size] = rng.uniform(-1, 1, (7, row.action_size))
        own_obs, own_a = obs[:, : model.obs_dim], a[:, : model.action_dim]
        z = theirs.encoder.apply(params["encoder"], obs, emb)
        close(model.encoder.apply(its.params["encoder"], own_obs), z)
        for part in ("dynamics", "reward"):
            answer = getattr(theirs, part).apply(params[part], z, emb, a)
            close(getattr(model, part).apply(its.params[part], z, own_a), answer)
        close(world_model.q_logits(model, its.params["q"], z, own_a), mt.q_logits(theirs, params["q"], z, emb, a))
        close(its.emb, emb)
        assert its.mask.tolist() == [1.0] * row.action_size + [0.0] * (model.action_dim - row.action_size)
        assert float(its.discount) == pytest.approx(0.9 + 0.01 * i)
    shared = world.params["dynamics"]["params"]
    assert shared["linear_0"]["kernel"].ndim == 2 and shared["linear_0"]["bias"].shape == (len(tasks), 16)


def test_mppi_is_that_of_the_multi_task_script(agent, made):
    _, args, theirs, params = agent
    tasks, rng = mt.make_tasks(args, TASK_NAMES), np.random.default_rng(0)
    n, H, samples, policies = 1, args.horizon, args.num_samples, args.num_pi_trajs
    shapes = [(n, H, policies, A), (n, 6, H, samples - policies, A), (n, 6, samples, A), (n, args.num_elites), (n, A)]
    draws = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    heads, first = jnp.tile(jnp.array([0, 1]), (6, 1)), jnp.ones(n, bool)
    its_args = dataclasses.replace(ARGS, iterations=args.iterations)
    plan_there = jax.jit(mt.plan, static_argnames=("args", "model", "explore"))
    plan_here = jax.jit(world_model.plan, static_argnames=("args", "model", "explore"))
    for i, name in enumerate(TASK_NAMES):
        obs = jnp.zeros((n, OBS)).at[:, : TASKS[name].obs_size].set(rng.normal(size=(n, TASKS[name].obs_size)))
        task = mt.task_input(tasks, mt.embed(params["task_emb"], jnp.array([i])), jnp.array([i]))
        noise, start = (mt.PlanNoise(*draws), world_model.PlanNoise(*draws)), (jnp.zeros((n, H, A)), first)
        there = plan_there(args, theirs, params, obs, task, *start, noise[0], heads, explore=False)
        params_here, discount = td.planner_of(made[1], made[0], i).world.params, tasks.discount[i]
        here = plan_here(its_args, MODEL, params_here, obs, *start, discount, noise[1], heads, explore=False)
        real = TASKS[name].action_size
        np.testing.assert_allclose(here[0][:, :real], there[0][:, :real], atol=1e-3)
        np.testing.assert_allclose(here[1][..., :real], there[1][..., :real], atol=1e-3)


def test_plans_have_zeros_for_actions_that_the_task_lacks_and_depend_on_the_task(made):
    world, state, _ = made
    obs, best, first = jnp.ones((1, OBS)), jnp.zeros((1, F, A)), jnp.ones(1, bool)
    for planner in ("ssr_mppi", "pi"):
        args = changed(tasks=ARGS.tasks, task_dim=E, scales="1", planner=planner)
        actions = [
            np.asarray(td.act_by(args, MODEL, td.planner_of(state, world, i), obs, best, first, jax.random.key(0))[0])
            for i in range(3)
        ]
        assert (actions[0][:, 1:] == 0).all() and (actions[2][:, 1:] == 0).all() and (actions[1] != 0).all(), planner
        assert not np.allclose(actions[0][:, 0], actions[2][:, 0]), planner


# ------------------------------------------------------------------------------------------------------------ Windows
def test_windows_are_of_the_tasks_that_they_say_and_some_of_each_are_held_out(agent, made):
    world, _, data = made
    assert np.bincount(data.task).tolist() == [120] * 3
    for starts, number in ((data.starts, 3), (data.held_out, 1)):
        assert np.bincount(np.asarray(data.task[starts])).tolist() == [number * (30 - F)] * 3
    windows = td.windows_at(data, data.starts, F)
    for i, name in enumerate(TASK_NAMES):
        its = td.windows_at(data, td.of_one(data, data.starts, i, 1000), F)
        assert len(its.task) == 3 * (30 - F) and (its.task == i).all()
        size = TASKS[name].action_size
        assert (its.action[..., size:] == 0).all() and (its.action[..., :size] != 0).all()
        raw = envs.load_dataset((name,), agent[0] / "data").chunks[0].obs[0, 0]
        obs = np.pad(raw, (0, OBS - len(raw)))
        z = MODEL.encoder.apply(world_model.of_task(world, i).params["encoder"], obs)
        np.testing.assert_allclose(its.z[0, 0], z, atol=1e-5)
    assert len(windows.z) == 9 * (30 - F)


def test_losses_of_mixed_windows_are_those_of_each_task_by_itself(made):
    world, state, data = made
    windows = td.windows_at(data, jnp.concatenate([td.of_one(data, data.starts, i, 4) for i in range(3)]), F)
    noise = td.diffusion_noise(ARGS, MODEL, jax.random.key(0), 12)
    losses = static(td.diffusion_losses)
    mixed = losses(ARGS, MODEL, state.params, state.stats, world, windows, noise)
    alone = []
    for i in range(3):
        stats, its = jax.tree.map(lambda x, i=i: x[i], state.stats), world_model.of_task(world, i)
        rows = jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], (windows._replace(task=jnp.zeros(12, int)), noise))
        again = world_model.join([its])  # a world model of one task, as one of several
        alone.append(losses(ARGS, MODEL, state.params, jax.tree.map(lambda x: x[None], stats), again, *rows))
        assert not np.allclose(float(alone[-1]["dynamics"]), float(mixed["dynamics"]))
    for name, loss in mixed.items():
        assert float(loss) == pytest.approx(np.mean([float(one[name]) for one in alone]), rel=1e-4), name


def test_all_networks_are_told_the_task(made):
    world, state, data = made
    windows = td.windows_at(data, data.starts[:12], F)
    noise = td.diffusion_noise(ARGS, MODEL, jax.random.key(0), 12)
    emb = world.params["task_emb"]
    losses = [
        static(td.diffusion_losses)(ARGS, MODEL, state.params, state.stats, its, windows, noise)
        for its in (world, world._replace(params=world.params | {"task_emb": emb + 1.0}))
    ]
    for name, loss in losses[0].items():
        assert abs(float(loss) - float(losses[1][name])) > 1e-4, f"{name}, by the embedding alone"


def test_what_is_said_of_a_tasks_actions_is_of_those_that_it_has():
    actions = np.random.default_rng(0).normal(size=(50, F, 2))
    padded = np.concatenate([actions, np.zeros((50, F, 3))], axis=-1)
    of = {"futures": {}, "advantages": {"true": np.zeros(50)}, "actions": {"recorded": actions}}
    assert measures(of | {"actions": {"recorded": padded}}, 2) == measures(of)
    assert measures(of | {"actions": {"recorded": padded}}) != measures(of)


# --------------------------------------------------------------------------------------------------------------- Runs
FLAGS = [*TINY, *"--num-updates 40 --checkpoint-freq 20 --eval-freq 40 --planner pi".split()]


@pytest.fixture(scope="module")
def finished(agent, tmp_path_factory):
    """Folder of a run of all tasks."""
    runs = tmp_path_factory.mktemp("finished")
    files = ["--world-model", str(agent[0] / "world"), "--data-dir", str(agent[0] / "data")]
    td.main([*files, "--tasks", ",".join(TASK_NAMES), *FLAGS, "--runs-dir", str(runs)])
    return runs / "+".join(TASK_NAMES) / "tdmpc2_jax_diffusion" / "1"


def test_a_run_evaluates_every_task_and_goes_on_as_it_was(finished, agent, capsys):
    rows = list(csv.DictReader((finished / "eval.csv").open()))
    assert [(row["step"], row["task"]) for row in rows] == [("40", name) for name in TASK_NAMES]
    args = json.loads((finished / "args.json").read_text())
    assert (args["task_dim"], args["latent_dim"]) == (E, Z), "those of the world model's run"
    files = ["--world-model", str(agent[0] / "world"), "--data-dir", str(agent[0] / "data")]
    tasks = ["--tasks", args["tasks"], "--no-compile-cache"]
    td.main([*files, *tasks, "--runs-dir", str(finished.parents[2]), "--resume"])
    assert "all 40 updates have been made" in capsys.readouterr().out


def test_every_task_has_a_table_of_its_own(finished, tmp_path, capsys):
    flags = "--planner ssr,pi --scorer random --eval-episodes 1 --no-compile-cache".split()
    programs = td.act_by._cache_size()
    td.main(["--evaluate", "--checkpoint", str(finished), *flags, "--json", str(tmp_path / "x.json")])
    assert td.act_by._cache_size() == programs + 2, "one program a row, for all tasks"
    out, results = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert [part["task"] for part in results["tasks"]] == [*TASK_NAMES]
    for part in results["tasks"]:
        assert [(row["planner"], len(row["returns"])) for row in part["table"]] == [("ssr", 1), ("pi", 1)]
        assert f"\n{part['task']}\n" in out and f"{part['table'][1]['returns'][0]:.1f}" in out
        assert {*part["held_out"]["nmse"]["1"]} == {"copy", "p_d", "p_d shuffled", "d", "d shuffled"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--tasks", "cartpole-swingup,pendulum-swingup"],
            ["not trained on pendulum-swingup", "cartpole-swingup, cup-catch"],
        ),
        (["--tasks", "cartpole-swingup,nonsense"], ["nonsense"]),
        (["--task-dim", 9], ["does not fit", f"--task-dim {E}"]),
        (["--mlp-dim", 24], ["does not fit", "--mlp-dim 16"]),
        (["--future", 40], ["4 episode(s) of at most 30 entries"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_what_does_not_fit_is_refused_in_one_sentence(refused, agent, flags, words):
    files = ["--world-model", agent[0] / "world", "--data-dir", agent[0] / "data", "--tasks", ",".join(TASK_NAMES)]
    sentence = refused(*files, *flags)
    assert all(word in sentence for word in words), sentence


def test_tasks_without_episodes_and_worlds_of_one_task_are_refused(refused, agent, finished, golden, tmp_path):
    files = ["--world-model", agent[0] / "world", "--tasks", ",".join(TASK_NAMES)]
    data = ["--data-dir", agent[0] / "data"]
    assert "--task-dim" in refused("--world-model", golden("multitask.pt"), *data, "--tasks", ",".join(TASK_NAMES))
    single = ["--world-model", golden("single.pt"), "--task-dim", E]
    assert "single-task" in refused(*single, *data, "--tasks", ",".join(TASK_NAMES))
    assert "no use of --task" in refused(*files, *data, "--task", "walker-walk")
    assert "no use of --task" in refused("--evaluate", "--checkpoint", finished, "--task", "pendulum-spin")
    write_episodes(tmp_path, TASK_NAMES[0])
    assert "cup-catch" in refused(*files, "--data-dir", tmp_path)
    assert "--mode joint" in refused("--mode", "joint", "--tasks", ",".join(TASK_NAMES))
    assert ",".join(TASK_NAMES) in refused("--evaluate", "--checkpoint", finished, "--tasks", "cup-catch")


def test_in_a_film_of_several_tasks_what_has_ended_stands_still():
    seen = {}
    film = lambda number: [np.full((4, 4, 3), i, np.uint8) for i in range(number)]  # noqa: E731
    results = [Evaluation(np.ones(2), np.ones(2), film(number), 25) for number in (3, 5)]
    run = SimpleNamespace(
        columns=("step", "task"), args={"seed": 1}, seconds=lambda: 0.0, aside=lambda *x: contextlib.nullcontext()
    )
    run.record = lambda step, line, rows, scalars, frames, fps: seen.update(frames=frames, rows=rows)
    record_each(run, 7, TASK_NAMES[:2], [lambda r=r, **how: r for r in results])
    assert [frame.shape for frame in seen["frames"]] == [(4, 8, 3)] * 5
    assert [frame[0, 0, 0] for frame in seen["frames"]] == [0, 1, 2, 2, 2] and len(seen["rows"]) == 2
    seen.clear()
    record_each(run, 7, TASK_NAMES[:2], [lambda **how: results[0], lambda **how: None])
    assert not seen, "a signal came before the second had ended"
