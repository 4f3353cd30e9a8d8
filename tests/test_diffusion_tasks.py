"""Latent diffusion MPC on several tasks: the parts of a multi-task agent, mixed windows, masks, runs of all tasks."""

import csv
import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from diffusion_helpers import SMALL, TINY, F, Z, one, static, write_episodes
from helpers import jitter

import envs
import tdmpc2_jax as td
import tdmpc2_jax_diffusion as diffusion
import tdmpc2_jax_mt as mt
from tdmpc2_support.agents.worlds import join, load_world, of_task
from tdmpc2_support.cli import settings
from tdmpc2_support.data.recorded import of_one, windows_at
from tdmpc2_support.envs.tasks import TASKS
from tdmpc2_support.run.checkpoints import write_checkpoint

SCRIPT = diffusion
NAMES = ("cartpole-swingup", "cup-catch", "pendulum-spin")  # of 5, 8 and 3 observations, 1, 2 and 1 actions
OBS, A, E = 8, 2, 6
SIZES = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": Z, "num_enc_layers": 2, "num_q": 2}
AGENT = dataclasses.replace(SMALL, task_dim=E, scales="1", obs_dim=OBS, action_dim=A, discount=0.99)


def smooth_episodes(folder, name, episodes=4, length=30):
    """Writes episodes of smooth numbers; filler is NaN."""
    rng, row = np.random.default_rng(len(name)), TASKS[name]
    action = rng.uniform(-1, 1, (episodes, length, row.action_size)).astype(np.float32)
    obs = np.cumsum(rng.normal(size=(episodes, length, row.obs_size)), axis=1).astype(np.float32) / 5
    reward = rng.random((episodes, length)).astype(np.float32)
    action[:, 0], reward[:, 0] = np.nan, np.nan
    write_episodes(folder, name, obs, action, reward)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of the multi-task script with episodes of all its tasks beside it, its agent and parameters."""
    folder = tmp_path_factory.mktemp("tasks")
    planner = {"num_samples": 32, "num_elites": 8, "num_pi_trajs": 4}
    args = mt.Args(tasks=",".join(NAMES), agent=mt.Agent(task_dim=E, **planner, **SIZES))
    agent = mt.for_tasks(args.agent, NAMES)
    params = jitter(jax.jit(partial(mt.init_params, agent))(jax.random.key(0)), 0.3)
    params["task_emb"] = 2.0 * params["task_emb"]  # some rows are longer than networks read them
    state = mt.init_state(agent, params, jitter(params["q"], 0.1, 1), 1.0, jax.random.key(1))
    meta = {"script": "tdmpc2_jax_mt", "args": settings(args), "tasks": NAMES, "count": {}}
    with ocp.CheckpointManager(folder / "world" / "checkpoints") as manager:
        write_checkpoint(manager, 1, meta, state=state)
    for name in NAMES:
        smooth_episodes(folder / "data", name)
    return folder, agent, params


def load(folder, tasks=NAMES):
    """The agent, and the world model of these tasks, with discounts 0.9, 0.91, ..."""
    obs_dim, action_dim = envs.set_sizes(tasks)
    agent = dataclasses.replace(AGENT, obs_dim=obs_dim, action_dim=action_dim)
    discounts = [0.9 + 0.01 * i for i in range(len(tasks))]
    init = partial(td.init_params, agent)
    return agent, load_world(str(folder / "world"), tasks, discounts, init, E, *td.SCRIPTS)


@pytest.fixture(scope="module")
def made(run):
    """The world model of all tasks, a learning state whose networks answer anything but zero, and the episodes."""
    _, world = load(run[0])
    args = diffusion.Args(tasks=",".join(NAMES), data_dir=str(run[0] / "data"))
    data = diffusion.encoded(args, AGENT, world)
    each = []
    for i in range(3):
        windows = windows_at(data, of_one(data, data.starts, i, 50), F)
        each.append(diffusion.statistics(AGENT, of_task(world, i), windows))
    state = diffusion.init_diffusion(AGENT, jax.tree.map(lambda *x: jnp.stack(x), *each), jax.random.key(0))
    return world, state._replace(params=jitter(state.params, 0.1), ema=jitter(state.ema, 0.1, 2)), data


# ---------------------------------------------------------------------------------------------------------- The parts
SOME = pytest.param(("pendulum-spin", "cartpole-swingup"), id="some")


@pytest.mark.parametrize("tasks", [pytest.param(NAMES, id="all", marks=pytest.mark.slow), SOME])
def test_a_part_answers_what_the_multi_task_networks_do_when_told_the_task(run, tasks):
    folder, multitask_agent, params = run
    agent, world = load(folder, tasks)
    theirs, ours = mt.networks(multitask_agent), td.networks(agent)

    @jax.jit
    def answers_of_all(obs, emb, action):
        z = theirs.encoder.apply(params["encoder"], obs, emb)
        nets = {net: getattr(theirs, net).apply(params[net], z, emb, action) for net in ("dynamics", "reward")}
        return z, nets | {"q": mt.q_logits(multitask_agent, params["q"], z, emb, action)}

    @jax.jit
    def answers_of_one(part, obs, z, action):
        nets = {net: getattr(ours, net).apply(part.params[net], z, action) for net in ("dynamics", "reward")}
        nets["q"] = td.q_logits(agent, part.params["q"], z, action)
        return ours.encoder.apply(part.params["encoder"], obs), nets

    rng, close = np.random.default_rng(0), partial(np.testing.assert_allclose, atol=1e-5)
    for i, name in enumerate(tasks):
        part, row = of_task(world, i), TASKS[name]
        emb = mt.embed(params["task_emb"], NAMES.index(name))
        obs, action = np.zeros((7, OBS), np.float32), np.zeros((7, A), np.float32)
        obs[:, : row.obs_size] = rng.normal(size=(7, row.obs_size))
        action[:, : row.action_size] = rng.uniform(-1, 1, (7, row.action_size))
        own_obs, own_action = obs[:, : agent.obs_dim], action[:, : agent.action_dim]
        z, answers = answers_of_all(obs, emb, action)
        own_z, own_answers = answers_of_one(part, own_obs, z, own_action)
        close(own_z, z)
        jax.tree.map(close, own_answers, answers)
        close(part.emb, emb)
        assert part.mask.tolist() == [1.0] * row.action_size + [0.0] * (agent.action_dim - row.action_size)
        assert float(part.discount) == pytest.approx(0.9 + 0.01 * i)
    shared = world.params["dynamics"]["params"]
    assert shared["linear_0"]["kernel"].ndim == 2 and shared["linear_0"]["bias"].shape == (len(tasks), 16)


@pytest.mark.slow
def test_mppi_is_that_of_the_multi_task_script(run, made):
    _, multitask_agent, params = run
    tasks, rng = mt.make_tasks(multitask_agent, NAMES), np.random.default_rng(0)
    agent = dataclasses.replace(AGENT, iterations=multitask_agent.iterations)
    n, H, samples, policies = 1, agent.horizon, agent.num_samples, agent.num_pi_trajs
    shapes = [(n, H, policies, A), (n, 6, H, samples - policies, A), (n, 6, samples, A), (n, agent.num_elites), (n, A)]
    draws = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    heads, start = jnp.tile(jnp.array([0, 1]), (6, 1)), (jnp.zeros((n, H, A)), jnp.ones(n, bool))
    plan_there = jax.jit(partial(mt.plan, multitask_agent, explore=False))
    plan_here = jax.jit(partial(td.plan, agent, explore=False))
    assert (tasks.discount == np.float32(agent.discount)).all()
    for i, name in enumerate(NAMES):
        obs = jnp.zeros((n, OBS)).at[:, : TASKS[name].obs_size].set(rng.normal(size=(n, TASKS[name].obs_size)))
        task = mt.task_input(tasks, mt.embed(params["task_emb"], jnp.array([i])), jnp.array([i]))
        there = plan_there(params, obs, task, *start, mt.PlanNoise(*draws), heads)
        params_here = diffusion.planner_of(made[1], made[0], i).world.params
        here = plan_here(params_here, obs, *start, td.PlanNoise(*draws), heads)
        real = TASKS[name].action_size
        np.testing.assert_allclose(here[0][:, :real], there[0][:, :real], atol=1e-3)
        np.testing.assert_allclose(here[1][..., :real], there[1][..., :real], atol=1e-3)


@pytest.mark.slow
def test_plans_have_zeros_for_actions_that_the_task_lacks_and_depend_on_the_task(made):
    world, state, _ = made
    obs, best, first, key = jnp.ones((1, OBS)), jnp.zeros((1, F, A)), jnp.ones(1, bool), jax.random.key(0)
    for name in ("ssr_mppi", "pi"):
        agent = dataclasses.replace(AGENT, planner=name)
        planners = [diffusion.planner_of(state, world, i) for i in range(3)]
        actions = [np.asarray(diffusion.act(agent, p, obs, best, first, key, explore=False)[0]) for p in planners]
        assert (actions[0][:, 1:] == 0).all() and (actions[2][:, 1:] == 0).all() and (actions[1] != 0).all(), name
        assert not np.allclose(actions[0][:, 0], actions[2][:, 0]), name


# ------------------------------------------------------------------------------------------------------------ Windows
def test_windows_are_of_the_tasks_that_they_say_and_some_of_each_are_held_out(run, made):
    world, _, data = made
    assert np.bincount(data.task).tolist() == [120] * 3
    for starts, number in ((data.starts, 3), (data.held_out, 1)):
        assert np.bincount(np.asarray(data.task[starts])).tolist() == [number * (30 - F)] * 3
    for i, name in enumerate(NAMES):
        windows = windows_at(data, of_one(data, data.starts, i, 1000), F)
        assert len(windows.task) == 3 * (30 - F) and (windows.task == i).all()
        size = TASKS[name].action_size
        assert (windows.action[..., size:] == 0).all() and (windows.action[..., :size] != 0).all()
        raw = envs.load_dataset((name,), run[0] / "data").chunks[0].obs[0, 0]
        obs = np.pad(raw, (0, OBS - len(raw)))
        z = td.networks(AGENT).encoder.apply(of_task(world, i).params["encoder"], obs)
        np.testing.assert_allclose(windows.z[0, 0], z, atol=1e-5)


losses_of = static(diffusion.diffusion_losses)


@pytest.mark.slow
def test_losses_of_mixed_windows_are_those_of_each_task_by_itself(made):
    world, state, data = made
    windows = windows_at(data, jnp.concatenate([of_one(data, data.starts, i, 4) for i in range(3)]), F)

    def per_window(windows, keys):
        """Of every window by itself."""

        def alone(window, key):
            stats, part = diffusion.part_of(state.stats, world, window.task)
            keys = jax.random.split(key)
            return {
                "dynamics": diffusion.dynamics_loss(AGENT, state.params, stats, part, window, keys[0]),
                "proposal": diffusion.proposal_loss(AGENT, state.params, stats, part, window, keys[1]),
                "objective": diffusion.objective_loss(AGENT, state.params, stats, part, window),
            }

        return [jax.jit(alone)(one(windows, i), keys[i]) for i in range(len(keys))]

    key = jax.random.key(0)
    mixed = losses_of(AGENT, state.params, state.stats, world, windows, key)
    alone = per_window(windows, jax.random.split(key, 12))
    for name, loss in mixed.items():
        assert float(loss) == pytest.approx(np.mean([float(x[name]) for x in alone]), rel=1e-4), name
    last = jax.tree.map(lambda x: x[2:], state.stats)  # of a set of one task
    again = join([of_task(world, 2)])
    rows = one(windows, slice(8, 12))._replace(task=jnp.zeros(4, int))
    of_last = losses_of(AGENT, state.params, last, again, rows, key)
    objective = np.mean([float(x["objective"]) for x in alone[8:]])
    assert float(of_last["objective"]) == pytest.approx(objective, rel=1e-4) != float(mixed["objective"])


def test_all_networks_are_told_the_task(made):
    world, state, data = made
    windows, key = windows_at(data, data.starts[:12], F), jax.random.key(0)
    other = world._replace(params=world.params | {"task_emb": world.params["task_emb"] + 1.0})
    losses = [losses_of(AGENT, state.params, state.stats, w, windows, key) for w in (world, other)]
    for name, loss in losses[0].items():
        assert abs(float(loss) - float(losses[1][name])) > 1e-4, f"{name}, by the embedding alone"


# --------------------------------------------------------------------------------------------------------------- Runs
@pytest.fixture(scope="module")
def files(run):
    return ["--world-model", str(run[0] / "world"), "--data-dir", str(run[0] / "data"), "--tasks", ",".join(NAMES)]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """Folder of a run of all tasks."""
    runs = tmp_path_factory.mktemp("finished")
    flags = "--num-updates 40 --checkpoint-freq 20 --eval-freq 40 --log-freq 20 --planner pi".split()
    diffusion.main([*files, *TINY, *flags, "--runs-dir", str(runs)])
    return runs / "+".join(NAMES) / "tdmpc2_jax_diffusion" / "1"


@pytest.mark.slow
def test_a_run_evaluates_every_task_and_goes_on_as_it_was(finished, files, capsys):
    rows = list(csv.DictReader((finished / "eval.csv").open()))
    assert [(row["step"], row["task"]) for row in rows] == [("40", name) for name in NAMES]
    args = json.loads((finished / "args.json").read_text())
    assert (args["task_dim"], args["latent_dim"]) == (E, Z), "those of the world model's run"
    diffusion.main([*files, "--no-compile-cache", "--runs-dir", str(finished.parents[2]), "--resume"])
    assert "all 40 updates have been made" in capsys.readouterr().out


@pytest.mark.slow
def test_of_a_run_of_many_tasks_the_part_of_one_is_taken_and_evaluated_without_its_data(files, tmp_path, capsys):
    flags = "--num-updates 20 --checkpoint-freq 20 --eval-freq 20 --planner pi".split()
    task = ["--task", NAMES[1]]
    diffusion.main([*files[:4], *task, *TINY, *flags, "--runs-dir", str(tmp_path)])
    folder = tmp_path / NAMES[1] / "tdmpc2_jax_diffusion" / "1"
    assert json.loads((folder / "args.json").read_text())["task_dim"] == 0, "an agent of one task"
    alone = ["--planner", "pi", "--eval-episodes", "1", "--data-dir", "None", "--no-compile-cache"]
    diffusion.main(["--evaluate", "--checkpoint", str(folder), *alone, "--json", str(tmp_path / "x.json")])
    assert len(json.loads((tmp_path / "x.json").read_text())["table"]) == 1


@pytest.mark.slow
def test_every_task_has_a_table_of_its_own(finished, tmp_path, capsys, monkeypatch):
    planned = []
    plan = diffusion.plan_by_diffusion
    monkeypatch.setattr(diffusion, "plan_by_diffusion", lambda *x, **how: planned.append(1) or plan(*x, **how))
    flags = (
        "--planner ssr,pi --scorer random --top 7 --eval-episodes 1 --no-compile-cache".split()
    )  # no other test's agent
    diffusion.main(["--evaluate", "--checkpoint", str(finished), *flags, "--json", str(tmp_path / "x.json")])
    assert len(planned) == 1, "one program for all tasks"
    out, results = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert [part["task"] for part in results["tasks"]] == [*NAMES]
    for part in results["tasks"]:
        assert [(row["planner"], len(row["returns"])) for row in part["table"]] == [("ssr", 1), ("pi", 1)]
        assert f"\n{part['task']}\n" in out and f"{part['table'][1]['returns'][0]:.1f}" in out
        assert {*part["held_out"]["nmse"]["1"]} == {"copy", "p_d", "p_d shuffled", "d", "d shuffled"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "cartpole-swingup,pendulum-swingup"], ["trained on pendulum-swingup", "cartpole-swingup, cup"]),
        (["--tasks", "cartpole-swingup,nonsense"], ["nonsense"]),
        (["--task-dim", 9], ["does not fit", f"--task-dim {E}"]),
        (["--mlp-dim", 24], ["does not fit", "--mlp-dim 16"]),
        (["--future", 40], ["4 episode(s) of at most 30 entries"]),
        (["--task", "walker-walk"], ["no use of --task"]),
        (["--mode", "joint"], ["--mode joint", "--tasks"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_what_does_not_fit_is_refused_in_one_sentence(refused, files, flags, words):
    sentence = refused(*files, "--eval-episodes", 1, *flags)
    assert all(word in sentence for word in words), sentence


@pytest.mark.slow
def test_tasks_without_episodes_and_worlds_of_one_task_are_refused(refused, files, golden, tmp_path):
    data, tasks = files[2:4], files[4:]
    assert "--task-dim" in refused("--world-model", golden("multitask.pt"), *data, *tasks)
    assert "single-task" in refused("--world-model", golden("single.pt"), "--task-dim", E, *data, *tasks)
    smooth_episodes(tmp_path, NAMES[0])
    assert "cup-catch" in refused(*files, "--data-dir", tmp_path)


@pytest.mark.slow
def test_an_evaluation_is_of_the_tasks_of_its_run(refused, finished):
    evaluate = ["--evaluate", "--checkpoint", finished]
    assert "no use of --task" in refused(*evaluate, "--task", "pendulum-spin")
    assert ",".join(NAMES) in refused(*evaluate, "--tasks", "cup-catch")
