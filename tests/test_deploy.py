"""Agents made small by a command: what it prints and writes, that the scripts take the files, and what it refuses."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from many_tasks import TWO_TASKS, write_agent, write_random_episodes

import deploy
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support import cli
from tdmpc2_support.agents.pretrained import load_any, load_multitask
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


def test_the_table_says_what_each_component_of_an_agent_of_many_tasks_costs(many, quantize):
    _, head, table = quantize(many, "mixed")
    assert "on 400 states that its policy visits" in head
    assert [*table] == [*load_multitask(str(many), (), MT).params, "all"]
    assert table["encoder"]["share"] == "50%" and float(table["encoder"]["z"]) < 0.2
    assert float(table["pi"]["Q"]) == 0 < float(table["q"]["Q"]) < 10, "each component changes its own outputs"
    assert float(table["dynamics"]["z"]) == 0 < float(table["dynamics"]["z3"]) < 10


def test_states_of_recorded_episodes_are_used_where_a_folder_is_named(many, quantize, refused, tmp_path):
    write_random_episodes(tmp_path / "data")
    mixed, _, _ = quantize(many, "mixed", name="mixed.safetensors")
    small, head, _ = quantize(many, "int8", "--data-dir", tmp_path / "data", name="int8.safetensors")
    assert f"on 400 states of {tmp_path / 'data'}" in head
    assert mixed.stat().st_size > small.stat().st_size
    assert "nowhere" in refused(many, "--data-dir", tmp_path / "nowhere")


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


def test_target_values_are_in_the_file_if_they_are_wanted(one, many, quantize):
    for checkpoint in (one, many):
        bare, _, _ = quantize(checkpoint, "float16", name=f"bare-{checkpoint.name}")
        whole, _, _ = quantize(checkpoint, "float16", "--keep-target-q", name=f"whole-{checkpoint.name}")
        components = [{name.partition(".")[0] for name in read_safetensors(path).tensors} for path in (bare, whole)]
        assert components[1] - components[0] == {"target_q"}
        before = load_any(str(checkpoint), (), *deploy.SCRIPTS)
        after = load_any(str(whole), (), *deploy.SCRIPTS)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), after.target_q, before.target_q)
        assert after.q_scale == before.q_scale


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
