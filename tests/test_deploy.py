"""Agents made small by a command: what it prints and writes, that the scripts take the files, and what it refuses."""

import contextlib
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT
from many_tasks import TWO_TASKS, write_agent, write_random_episodes

import deploy
import envs as environments
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support import cli
from tdmpc2_support.agents.export import onnx_session
from tdmpc2_support.agents.onnx_graph import Graph
from tdmpc2_support.agents.pretrained import LoadedAgent, load_any, load_multitask
from tdmpc2_support.agents.quantized import read_safetensors
from tdmpc2_support.run import checkpoints
from tdmpc2_support.run.folder import recorded_settings

MT = "tdmpc2_jax_mt"
FALLS = "strange_envs:Falling-v0"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Folder of a run of tdmpc2_jax_mt.py."""
    folder = tmp_path_factory.mktemp("many")
    write_agent(folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder of a run of tdmpc2_jax.py whose episodes can end early: random parameters, bins of its own."""
    folder = tmp_path_factory.mktemp("one")
    agent = td.Agent(enc_dim=24, mlp_dim=32, latent_dim=24, num_enc_layers=2, num_q=3, vmin=-8.0, num_bins=51)
    args = td.Args(task=FALLS, agent=agent)
    agent = dataclasses.replace(agent, obs_dim=2, action_dim=1, can_terminate=True)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(td.init_params, agent), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32), shapes)
    state = {"params": params, "target_q": params["q"], "q_scale": jnp.float32(2.5)}
    meta = {"script": "tdmpc2_jax", "args": cli.settings(args)}
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        checkpoints.write_checkpoint(manager, 5, meta, state={"train": state})
    return folder


@pytest.fixture
def quantize(tmp_path, capsys):
    """quantize(checkpoint, variant, ...) -> path of the file, and the table that was printed, row by row."""

    def call(checkpoint, variant, *flags, name="out.safetensors"):
        path = tmp_path / name
        command = ["--checkpoint", checkpoint, "--quantize", variant, "--output", path, *flags]
        deploy.main([*map(str, command)])
        head, columns, *rows = capsys.readouterr().out.splitlines()
        names = columns.replace(" %", "").replace("of float32", "share").split()
        return path, head, {row.split()[0]: dict(zip(names, row.split(), strict=False)) for row in rows}

    return call


@pytest.fixture
def refused(tmp_path):
    """refused(checkpoint, ...) -> the sentence by which that is refused; nothing is written."""

    def call(checkpoint, *flags, variant="float16"):
        path = tmp_path / "refused.safetensors"
        with pytest.raises(SystemExit) as stop:
            deploy.main([*map(str, ["--checkpoint", checkpoint, "--quantize", variant, "--output", path, *flags])])
        sentence = str(stop.value.code)
        assert sentence.startswith("error: ") and "\n" not in sentence and not path.exists(), sentence
        return sentence

    return call


def test_states_are_taken_from_whole_windows_of_environments_that_run():
    obs = np.array([[[env, step] for env in (0, 1)] for step in range(5)])
    action = np.array([[[10 * env + step] for env in (0, 1)] for step in range(5)])
    active = np.array([[True, step < 2] for step in range(5)])
    windows = deploy.whole_windows(obs, action, active, 5, horizon=2)
    assert windows.obs.tolist() == [[0, 0], [1, 0], [0, 1], [0, 2], [0, 3]]
    assert windows.task.tolist() == [0, 1, 0, 0, 0]
    assert windows.action[..., 0].tolist() == [[0, 10, 1, 2, 3], [1, 11, 2, 3, 4]]
    assert len(deploy.whole_windows(obs, action, active, 100, horizon=2).obs) == 5, "none twice"
    assert len(deploy.whole_windows(obs, action, active, 3, horizon=2).obs) == 3
    assert len(deploy.whole_windows(obs, action, active, 3, horizon=6).obs) == 0
    assert len(deploy.whole_windows(obs, action, active, 3, horizon=8).obs) == 0


@pytest.mark.slow
def test_the_table_says_what_each_component_of_an_agent_of_many_tasks_costs(many, quantize):
    _, head, table = quantize(many, "mixed")
    assert "on 400 states that its policy visits" in head
    assert [*table] == [*load_multitask(str(many), (), MT).params, "all"]
    assert table["encoder"]["share"] == "50%" and float(table["encoder"]["z"]) < 0.2
    assert float(table["pi"]["Q"]) == 0 < float(table["q"]["Q"]) < 10, "each component changes its own outputs"
    assert float(table["dynamics"]["z"]) == 0 < float(table["dynamics"]["z3"]) < 10


@pytest.mark.slow
def test_states_of_recorded_episodes_are_used_where_a_folder_is_named(many, quantize, refused, tmp_path):
    write_random_episodes(tmp_path / "data")
    mixed, _, _ = quantize(many, "mixed", name="mixed.safetensors")
    small, head, _ = quantize(many, "int8", "--data-dir", tmp_path / "data", name="int8.safetensors")
    assert f"on 400 states of {tmp_path / 'data'}" in head
    assert mixed.stat().st_size > small.stat().st_size
    assert "nowhere" in refused(many, "--data-dir", tmp_path / "nowhere")


@pytest.mark.slow
def test_a_file_of_many_tasks_is_taken_by_the_scripts_as_the_run_was_started(many, quantize):
    path, _, _ = quantize(many, "int8")
    command = ["--evaluate", "--checkpoint", str(path)]
    args = mt.cli.parse(mt.Args, command, "", lambda args: recorded_settings(args, cli.set_folder, mt.SCRIPTS, ()))
    assert (args.agent.vmin, args.agent.num_bins, args.data_dir, args.teacher) == (-8, 51, None, None)
    mt.check_args(args)
    assert mt.load_agent(args)[1].tasks == TWO_TASKS
    command += ["--source-task", TWO_TASKS[0]]
    args = td.cli.parse(td.Args, command, "", lambda args: recorded_settings(args, cli.run_folder, td.SCRIPTS))
    assert (args.task, args.agent.vmin, args.agent.num_bins) == (TWO_TASKS[0], -8, 51), "of one task, too"
    record = json.loads(read_safetensors(path).record["args"])
    assert not {"data_dir", "teacher", "exp_name", "runs_dir"} & record.keys(), "no path"


@pytest.mark.slow
def test_a_file_of_one_task_is_evaluated_as_the_run_is(one, quantize, tmp_path):
    path, head, table = quantize(one, "float16")
    assert "states that its policy visits" in head
    assert {"termination", "dynamics", "encoder", "pi", "q", "reward", "all"} == {*table}
    assert float(table["reward"]["end"]) == 0 < float(table["termination"]["end"]) < 10
    assert float(table["q"]["action"]) == 0 and float(table["all"]["z"]) < 1
    returns = []
    for checkpoint in (one, path):
        result = tmp_path / "result.json"
        td.main(
            [*map(str, ["--evaluate", "--checkpoint", checkpoint, "--json", result, "--no-mpc", "--eval-episodes", 3])]
        )
        returns.append(json.loads(result.read_text()))
    assert returns[0]["task"] == returns[1]["task"] == FALLS
    np.testing.assert_allclose(returns[1]["returns"], returns[0]["returns"], rtol=1e-2)


@pytest.mark.slow
def test_target_values_are_in_the_file_if_they_are_wanted(one, many, quantize):
    for checkpoint in (one, many):
        bare, _, _ = quantize(checkpoint, "float16", name=f"bare-{checkpoint.name}")
        whole, _, _ = quantize(checkpoint, "float16", "--keep-target-q", name=f"whole-{checkpoint.name}")
        components = [{name.partition(".")[0] for name in read_safetensors(path).tensors} for path in (bare, whole)]
        assert components[1] - components[0] == {"target_q"}
        before = load_any(str(checkpoint), (), *deploy.SCRIPTS)
        after = load_any(str(whole), (), *deploy.SCRIPTS)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), after.target_q, before.target_q)
        assert after.q_scale == before.q_scale and np.shape(after.q_scale) == ()


def test_options_without_an_effect_are_refused(refused):
    assert "--what goes with --export" in refused("nowhere", "--what", "planner")
    for flags in (("--keep-target-q",), ("--data-dir", "data")):
        assert f"{flags[0]} goes with --quantize alone" in refused("nowhere", "--export", "onnx", *flags)


@pytest.mark.parametrize(("export", "kind"), [("onnx", "float32"), ("stablehlo", "bfloat16")])
def test_onnx_has_no_products_in_bfloat16(export, kind):
    loaded = LoadedAgent({}, {})
    trained = deploy.Trained("tdmpc2_jax", td.Agent(compute_dtype="bfloat16"), loaded, ("cartpole-balance",))
    assert deploy.one_task(deploy.Args("", "", export=export), trained)[0].compute_dtype == kind


@pytest.mark.golden
def test_an_original_agent_needs_the_name_of_its_task_if_it_does_not_say_it(golden, quantize, refused):
    assert "does not say its task: name it with --tasks" in refused(golden("single.pt"))
    sizes = "does not fit walker-walk: it knows 17 observations and 6 actions, there are 24 and 6"
    assert sizes in refused(golden("single.pt"), "--tasks", "walker-walk")
    path, _, table = quantize(golden("single.pt"), "int8", "--tasks", "cheetah-run")
    assert table["all"]["share"] != "100%" and len(table) == 6
    command = ["--evaluate", "--checkpoint", str(path)]
    args = td.cli.parse(td.Args, command, "", lambda args: recorded_settings(args, cli.run_folder, td.SCRIPTS))
    assert (args.task, args.agent.enc_dim, args.agent.mlp_dim) == ("cheetah-run", 16, 24)


@pytest.mark.golden
@pytest.mark.slow
def test_what_cannot_be_quantised_is_refused_in_one_sentence(golden, many, one, quantize, refused, tmp_path):
    small, _, _ = quantize(many, "int8", name="small")
    half, _, _ = quantize(one, "float16", name="half")
    assert "the agent of --checkpoint is float16 already" in refused(half)
    assert "the agent of --checkpoint is int8 already" in refused(small)
    assert "the agent of --checkpoint is int8 already" in refused(small, variant="mixed")
    assert "nowhere.pt does not exist" in refused("nowhere.pt")
    assert "nowhere does not exist" in refused("nowhere")
    assert "holds no TD-MPC2 agent that sees states: it is one of pixels" in refused(golden("rgb.pt"))
    assert "exists: choose another --output" in refused(many, "--output", small)
    assert ".pt is the ending of PyTorch's files" in refused(many, "--output", "a.pt")
    assert "--output must be a file in a folder that exists and can be written" in refused(many, "--output", "no/a")
    assert "knows other tasks than --tasks names" in refused(many, "--tasks", "pendulum-swingup,cartpole-balance")
    assert "knows other tasks than --tasks names" in refused(one, "--tasks", "walker-walk")
    shutil.copy(small, tmp_path / "cut")
    with open(tmp_path / "cut", "r+b") as cut:
        cut.truncate(1000)
    assert "cut is damaged or no quantised agent" in refused(tmp_path / "cut")


# ------------------------------------------------------------------------------------------------------------- Export
PLANNER = ("--what", "planner", "--num-samples", 64, "--num-elites", 16, "--iterations", 3)


@pytest.fixture
def exported(tmp_path, capsys):
    """exported(checkpoint, ...) -> an onnxruntime session of the ONNX file of an agent, and what was printed."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")

    def call(checkpoint, *flags, name="robot.onnx"):
        path = tmp_path / name
        deploy.main([*map(str, ["--checkpoint", checkpoint, "--export", "onnx", "--output", path, *flags])])
        return onnx_session(path if path.exists() else tmp_path / "robot-policy.onnx"), capsys.readouterr().out

    return call


def test_an_exported_planner_plans_as_jax_does(one, exported):
    session, printed = exported(one, *PLANNER)
    assert float(re.search(r"at most (\S+)\)", printed)[1]) < 1e-5
    args = deploy.Args(str(one), "", num_samples=64, num_elites=16, iterations=3)
    agent, params, _ = deploy.one_task(args, deploy.load(args))
    assert agent.can_terminate and agent.discount == td.discount_of(agent, 40)
    plan = jax.jit(partial(td.plan, agent, explore=False))
    plan_noise = jax.jit(partial(td.plan_noise, agent, n=1))
    rng = np.random.default_rng(0)
    mean = np.zeros((1, agent.horizon, 1), np.float32)
    moved = []
    apart = []
    for i in range(100):
        obs = rng.normal(size=(1, 2)).astype(np.float32)
        noise, heads = plan_noise(jax.random.key(i))
        first = np.array([i % 10 == 0])
        action, new_mean = jax.device_get(plan(params, obs, mean, first, noise, heads))
        draws = {f"normal_{name}": getattr(noise, name) for name in ("pi", "sample", "terminal")}
        inputs = {"obs": obs, "previous_mean": mean, "first": first, **draws, "gumbel": noise.gumbel}
        inputs = {name: np.array(np.asarray(value)[0]) for name, value in inputs.items()} | {"heads": np.asarray(heads)}
        found = session.run(["action", "mean"], inputs)
        np.testing.assert_allclose(found[0], action[0], atol=1e-5)
        apart.append(np.abs(found[1] - new_mean[0]).max())
        moved.append(float(action[0, 0]))
        mean = new_mean
    assert np.sort(apart)[-2] < 1e-5 and max(apart) < 1e-4, "in one plan rounding may choose another last elite"
    assert np.std(moved) > 0.1, "it would be as easy to agree on one action"


def test_an_exported_policy_is_that_of_its_task_and_says_what_it_is_about(many, exported):
    session, _ = exported(many, "--source-task", TWO_TASKS[0])
    about = session.get_modelmeta().custom_metadata_map
    assert (about["task"], about["function"], about["numbers"]) == (TWO_TASKS[0], "policy", "float32")
    assert json.loads(about["observation"]) == {"position": 3, "velocity": 2}
    assert (json.loads(about["action_low"]), json.loads(about["action_high"])) == ([-1], [1])
    assert json.loads(about["control_period"]) == pytest.approx(0.02), "two simulator steps"
    trained = deploy.load(deploy.Args(str(many), ""))
    obs = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    windows = deploy.Windows(obs, np.zeros((1, 100, 1), np.float32), np.zeros(100, int))
    expected = jax.jit(lambda params: deploy.outputs(trained, params, windows))(trained.loaded.params)["action"]
    found = [session.run(None, {"obs": row})[0] for row in obs]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_the_numbers_of_an_exported_file_can_be_small(one, exported, tmp_path):
    session, printed = exported(one, *PLANNER, "--what", "both", "--quantize", "int8")
    assert printed.count("of JAX's") == 2 and max(map(float, re.findall(r"at most (\S+)\)", printed))) < 1e-5
    exported(one, name="whole.onnx")
    assert (tmp_path / "robot-policy.onnx").stat().st_size < 0.75 * (tmp_path / "whole.onnx").stat().st_size
    assert session.get_modelmeta().custom_metadata_map["numbers"] == "int8"


def test_a_stablehlo_file_runs_where_there_is_jax_alone(one, tmp_path, capsys):
    path = tmp_path / "robot.stablehlo"
    deploy.main([*map(str, ["--checkpoint", one, "--export", "stablehlo", "--output", path])])
    assert float(re.search(r"at most (\S+)\)", capsys.readouterr().out)[1]) < 1e-6
    assert json.loads((tmp_path / "robot.stablehlo.json").read_text())["task"] == FALLS
    code = (
        "import sys; sys.modules |= dict.fromkeys(['flax', 'optax', 'orbax', 'gymnasium', 'tdmpc2_support'])\n"
        "import jax, numpy; from pathlib import Path\n"
        f"policy = jax.export.deserialize(bytearray(Path({str(path)!r}).read_bytes()))\n"
        "print(policy.call(numpy.ones(2, 'float32'))[0].shape)"
    )
    code = code.replace("import jax, numpy", "import jax.export, numpy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["(1,)"], done.stderr


def test_the_control_loop_of_the_examples_keeps_the_mean_and_counts_what_is_late(one, exported):
    spec = importlib.util.spec_from_file_location("robot", ROOT / "examples" / "robot.py")
    robot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(robot)
    assert len((ROOT / "examples" / "robot.py").read_text().splitlines()) <= 60
    means = []

    class Watched:
        """A session that notes the means that it is given."""

        def __init__(self, session):
            self.get_inputs, self.get_modelmeta, self.call = session.get_inputs, session.get_modelmeta, session.run

        def run(self, outputs, inputs):
            found = self.call(outputs, inputs)
            means.append((inputs.get("previous_mean"), inputs.get("first"), *found[1:]))
            return found

    with contextlib.closing(environments.make_env(FALLS)) as env:
        total, decisions, late = robot.control(Watched(exported(one, *PLANNER)[0]), env, seconds=1e-6)
    assert 0 < total <= decisions == late == len(means)
    assert means[0][1] and not means[0][0].any() and not any(first for _, first, _ in means[1:])
    for (_, _, mean), (given, _, _) in zip(means, means[1:], strict=False):
        np.testing.assert_array_equal(given, mean)
    with contextlib.closing(environments.make_env(FALLS)) as env:
        _, decisions, late = robot.control(exported(one, name="policy.onnx")[0], env, seconds=0.02)
    assert decisions > late, "a policy is in time"


def test_what_jax_computes_stays_what_it_is_as_a_graph():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")

    def function(x, rows, pick):  # [2, 5, 3], [2], []
        y = x[:, rows] * jnp.einsum("bij,bkj->bik", x, x)[:, :2, :3]
        kept = jnp.cumprod(jnp.pad(x > 0, ((0, 0), (1, 0), (0, 0)), constant_values=True), axis=1)
        table = jnp.zeros((4, 3)).at[1].set(x[0, 0])
        last, _ = jax.lax.scan(lambda sum, row: (sum + row[None] @ table.T, row), jnp.ones((1, 4)), x[0])
        one = jax.lax.dynamic_index_in_dim(x[1], pick, keepdims=False)
        best = x[0][jnp.argmax(x[0].sum(-1))]
        best = jnp.concatenate([best, x[:, :0].reshape(0)])  # of no samples, too
        return y, kept.astype(jnp.float32), last, one, best, jnp.expm1(x * 1e-4), jax.nn.softmax(x, axis=1)

    rng = np.random.default_rng(0)
    given = {"x": rng.normal(size=(2, 5, 3)).astype(np.float32), "rows": np.array([4, 1], np.int32)}
    given["pick"] = np.array(3, np.int32)
    closed = jax.make_jaxpr(function)(*given.values())
    graph = Graph()
    values = graph.function(closed, [graph.input(name, x.shape, x.dtype) for name, x in given.items()])
    outputs = {f"out{i}": (x, aval.shape) for i, (x, aval) in enumerate(zip(values, closed.out_avals, strict=True))}
    content = graph.model(outputs, {}, "test").SerializeToString()
    found = onnxruntime.InferenceSession(content).run([*outputs], given)
    for x, y in zip(found, function(*given.values()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    with pytest.raises(cli.UserError, match="the primitive 'sort' of JAX is not known"):
        graph.function(jax.make_jaxpr(jnp.sort)(given["rows"]), values[:1])


@pytest.fixture
def not_exported(tmp_path):
    """not_exported(checkpoint, ...) -> the sentence by which that is refused; nothing is written."""

    def call(checkpoint, *flags):
        before = sorted(tmp_path.iterdir())
        command = ["--checkpoint", checkpoint, "--export", "onnx", "--output", tmp_path / "a.onnx", *flags]
        with pytest.raises(SystemExit) as stop:
            deploy.main([*map(str, command)])
        sentence = str(stop.value.code)
        assert sentence.startswith("error: ") and "\n" not in sentence and sorted(tmp_path.iterdir()) == before
        return sentence

    return call


def test_what_cannot_be_exported_is_refused_in_one_sentence(golden, many, one, not_exported, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    assert "is a multi-task agent: name its task with --source-task" in not_exported(many)
    assert "was not trained on walker-walk: it knows" in not_exported(many, "--source-task", "walker-walk")
    assert "is a single-task agent: leave out --source-task" in not_exported(one, "--source-task", "walker-walk")
    assert "--num-elites must be at most --num-samples" in not_exported(one, "--what", "both", "--num-samples", 32)
    assert "go with --what planner" in not_exported(one, "--num-samples", 32)
    assert "holds no TD-MPC2 agent that sees states: it is one of pixels" in not_exported(golden("rgb.pt"))
    for script in ("tdmpc2_jax_rgb", "tdmpc2_jax_diffusion"):
        with ocp.CheckpointManager(tmp_path / script / "checkpoints") as manager:
            checkpoints.write_checkpoint(manager, 5, {"script": script}, state={"x": jnp.zeros(2)})
        assert f"is a checkpoint of {script}.py" in not_exported(tmp_path / script, "--what", "planner")
    (tmp_path / "a-planner.onnx").touch()
    assert "a-planner.onnx exists: choose another --output" in not_exported(one, "--what", "both")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--export onnx needs onnx and onnxruntime: pip install -e '.[deploy]'" in not_exported(one)
