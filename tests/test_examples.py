"""A fork in practice: the diffs of examples/ apply to the script, and what they change is trained, saved and used."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from conftest import SMALL
from helpers import ROOT, read_scalars

DIFFS = sorted((ROOT / "examples").glob("*.diff"))


def apply(folder, *paths):
    """A copy of the script with these diffs."""
    shutil.copy(ROOT / "tdmpc2_jax.py", folder)
    for path in paths:
        subprocess.run(["git", "apply", path], cwd=folder, check=True)
    return folder / "tdmpc2_jax.py"


@pytest.mark.parametrize("path", DIFFS, ids=lambda path: path.stem)
def test_a_change_is_short_and_applies_alone(path, tmp_path):
    assert len(path.read_text().splitlines()) < 25
    compile(apply(tmp_path, path).read_text(), path.stem, "exec")


def test_a_fork_with_all_of_them_trains_evaluates_and_resumes(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fork", apply(tmp_path, *DIFFS))
    fork = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fork", fork)
    spec.loader.exec_module(fork)
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL["tdmpc2_jax.py"], *"--task QuietPendulum-v0 --eval-freq 150 --no-compile-cache".split()]
    fork.main([*flags, "--total-timesteps", "150", "--smooth-coef", "0.5"])
    folder = tmp_path / "runs" / "QuietPendulum-v0" / "tdmpc2_jax" / "1"
    assert json.loads((folder / "args.json").read_text())["smooth_coef"] == 0.5
    smooth = [value for _, value in read_scalars(folder, "losses/smooth_loss")]
    assert smooth and min(smooth) > 0
    fork.main([*flags, "--total-timesteps", "200", "--resume"])
    assert [row["step"] for row in csv.DictReader((folder / "eval.csv").open())] == ["0", "150", "200"]
    capsys.readouterr()
    fork.main(["--evaluate", "--checkpoint", str(folder), "--eval-episodes", "2"])
    assert "QuietPendulum-v0: return" in capsys.readouterr().out
