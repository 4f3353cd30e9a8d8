"""Run folders that an earlier version of every script wrote (golden/old_runs.sh) resume and are evaluated."""

import csv
import json
import tarfile

import pytest

RUNS = {  # the task of each, how far it goes on, and the step of the checkpoint that it goes on from
    "tdmpc2_jax.py": ("strange_envs:Point-v0", "--total-timesteps 220", 200),
    "tdmpc_jax.py": ("strange_envs:Point-v0", "--total-timesteps 220", 200),
    "tdmpc2_jax_rgb.py": ("strange_envs:Pixels-v0", "--total-timesteps 220", 200),
    "tdmpc2_jax_mt.py": ("cartpole-balance+pendulum-spin", "--num-updates 33", 30),
    "tdmpc2_jax_diffusion.py": ("cartpole-balance", "--num-updates 40", 20),
}


@pytest.fixture
def old_runs(tmp_path, golden):
    """Unpacks the old folders where `here` works: runs/, data/, int8.safetensors."""
    with tarfile.open(golden("old_runs.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_an_earlier_version_is_evaluated_and_goes_on(here, old_runs, name):
    task, length, begin = RUNS[name]
    folder = old_runs / "runs" / task / name.removesuffix(".py") / "1"
    flags = ("--evaluate", "--checkpoint", folder, "--json", "result.json")
    status, _, err = here(*flags, small=False, name=name)
    assert status == 0, err
    assert json.loads((old_runs / "result.json").read_text())

    before = [row for row in csv.DictReader((folder / "eval.csv").open()) if int(row["step"]) <= begin]
    which = ("--tasks", task.replace("+", ",")) if "+" in task else ("--task", task)
    status, _, err = here(*which, *length.split(), "--resume", small=False, name=name)
    assert status == 0, err
    after = list(csv.DictReader((folder / "eval.csv").open()))
    assert after[: len(before)] == before and after[-1]["step"] == length.split()[1]


def test_a_quantised_file_of_an_earlier_version_is_evaluated(here, old_runs):
    flags = ("--no-mpc", "--eval-episodes", 1, "--tasks", "cartpole-balance", "--json", "result.json")
    status, out, err = here(
        "--evaluate", "--checkpoint", "int8.safetensors", *flags, small=False, name="tdmpc2_jax_mt.py"
    )
    assert status == 0, err
    assert json.loads((old_runs / "result.json").read_text())["tasks"].keys() == {"cartpole-balance"}
