"""Agent and Args: what defines an agent is saved, compared and static wherever its field stands; the rest is not."""

import importlib.util
import json
import sys

import jax
import pytest
from helpers import ROOT

import tdmpc2_jax as td
from tdmpc2_support.cli import check_bounds, settings, with_settings
from tdmpc2_support.errors import UserError
from tdmpc2_support.run.schedule import random_streams

TINY = (
    "--task strange_envs:Point-v0 --enc-dim 16 --mlp-dim 16 --latent-dim 16 --num-q 2 --num-samples 32 --num-elites 8 "
    "--num-pi-trajs 4 --iterations 2 --eval-episodes 2 --seed-steps 50 --buffer-size 3000 --total-timesteps 60 "
    "--eval-freq 60 --no-compile-cache"
).split()


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A copy of the script with two more hyperparameters, as the first and the last field of Agent, that the update
    multiplies its learning rate by; it prints what it is traced with."""
    text = (ROOT / "tdmpc2_jax.py").read_text()
    for name, place in (
        ("first", "    # World model\n"),
        ("last", "    # What the task decides, see `for_task`: no flags\n"),
    ):
        assert text.count(place) == 1
        text = text.replace(place, f"    {name}_trap: Positive = 1.0  # scales the learning rate\n{place}")
    text = text.replace("optax.scale(-agent.lr)", "optax.scale(-agent.lr * agent.first_trap * agent.last_trap)")
    line = "    n = len(obs)\n    H = agent.horizon\n    A = agent.action_dim\n"
    assert text.count(line) == 1
    text = text.replace(line, f'{line}    print("plans with", agent.first_trap, agent.last_trap)\n')
    path = tmp_path / "fork.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("fork", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fork", module)
    spec.loader.exec_module(module)
    return module


def test_a_field_that_is_added_to_the_agent_anywhere_is_evaluated_and_compared(fork, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--seed-steps", "60"]  # as long as the run: nothing needs to be learned here
    fork.main([*flags, "--first-trap", "7", "--last-trap", "5"])
    assert "plans with 7.0 5.0" in capsys.readouterr().out
    folder = tmp_path / "runs" / "strange_envs:Point-v0" / "tdmpc2_jax" / "1"
    recorded = json.loads((folder / "args.json").read_text())
    assert (recorded["first_trap"], recorded["last_trap"]) == (7, 5)
    fork.main(["--evaluate", "--checkpoint", str(folder), "--eval-episodes", "3"])
    plans = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plans with")]
    assert set(plans) == {"plans with 7.0 5.0"}
    for flag, value in (("--first-trap", "7"), ("--last-trap", "5")):
        with pytest.raises(SystemExit) as stop:
            fork.main([*flags, "--resume", flag, "2"])
        assert f"--resume continues a run as it was started: {flag} {value}" in stop.value.code
    fork.main([*flags, "--resume"])


@pytest.mark.slow
def test_runs_that_differ_in_name_seed_and_folder_share_every_program(tmp_path, monkeypatch):
    traced = {"update": 0, "plan": 0, "init_params": 0}

    def counted(name):
        function = getattr(td, name)

        def trace(*args, **kwargs):
            traced[name] += 1
            return function(*args, **kwargs)

        return trace

    for name in traced:
        monkeypatch.setattr(td, name, counted(name))
    flags = [*TINY, "--batch-size", "17"]  # no other test has this agent
    td.main([*flags, "--runs-dir", str(tmp_path / "a")])
    once = dict(traced)
    assert once["update"] == 1 and once["plan"] >= 1
    td.main([*flags, "--runs-dir", str(tmp_path / "b"), "--exp-name", "other", "--seed", "5", "--log-freq", "7"])
    assert traced["update"] == 1 and traced["plan"] == once["plan"]


def test_settings_are_flat_and_come_back_as_they_were():
    args = td.Args(task="dog-run", agent=td.Agent(lr=1e-4, horizon=5, obs_dim=3), num_envs=2)
    record = settings(args)
    assert record["lr"] == 1e-4 and record["num_envs"] == 2 and "agent" not in record
    assert "obs_dim" not in record, "the task decides it"
    assert json.loads(json.dumps(record)) == record
    again = with_settings(td.Args(), record | {"of_another_version": 1})
    assert again == td.dataclasses.replace(args, agent=td.dataclasses.replace(args.agent, obs_dim=0))


def test_an_agent_is_hashable_and_equal_to_its_like():
    assert hash(td.Agent(lr=1.0)) == hash(td.Agent(lr=1.0)) and td.Agent(lr=1.0) != td.Agent()


def test_bounds_hold_for_both_dataclasses():
    check_bounds(td.Args())
    for bad in (td.Args(agent=td.Agent(lr=-1.0)), td.Args(num_envs=0)):
        with pytest.raises(UserError, match="must be"):
            check_bounds(bad)


def test_streams_of_different_seeds_and_uses_are_different():
    keys = [tuple(jax.random.key_data(key).tolist()) for seed in (1, 2) for key in random_streams(seed)]
    assert len(set(keys)) == len(keys)
