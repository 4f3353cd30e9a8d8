"""Job arrays and processes joined on a real SLURM of one node: pytest -m slurm, as root, behind

    apt-get install slurm-wlm munge

Some minutes on two cores, most of them waiting until a time limit is near."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import slurm_cluster
from conftest import SMALL
from helpers import ROOT, read_curve, read_scalars
from many_tasks import TWO_TASKS, write_random_episodes

from benchmarks import learning

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not shutil.which("slurmctld") or os.getuid() != 0, reason="no SLURM here, or not root"),
]
ROW = learning.Row("pendulum-swingup", (1, 2, 3, 4))
STEPS = list(range(0, 12_001, 2000))
FLAGS = " ".join(SMALL["tdmpc2_jax.py"]) + " --total-timesteps 12000 --eval-freq 2000 --checkpoint-freq 1000"
FLAGS += " --eval-episodes 1 --buffer-size 20000"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Folder of a SLURM of one node with two cores that lasts as long as the tests here."""
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.one_node(folder):
        yield folder


def jobs() -> list[tuple[str, str]]:
    """Element and state of every job that has not ended."""
    return [tuple(line.split()) for line in slurm_cluster.ask("squeue", "-h", "-r", "-o", "%K %T").splitlines()]


def process_of(element: int, folder: Path) -> int:
    """Id of the process that runs this element of the array. srun, which has the same words, is another program."""
    words = ["--seed", str(ROW.seeds[element]), "--exp-name", "tdmpc2_jax", "--runs-dir", str(folder)]
    found = subprocess.run(["pgrep", "-f", f"^{sys.executable} .*{' '.join(words)}"], capture_output=True, text=True)
    return int(found.stdout)


def test_an_array_has_four_whole_curves_after_a_requeue_and_a_time_limit(cluster, tmp_path):
    args = learning.Args("smoke", folder=tmp_path / "runs", curves=tmp_path / "curves", slurm=tmp_path / "array.sh")
    learning.write_array(args, FLAGS, [ROW])
    folders = [learning.folder_of(args, ROW, seed) for seed in ROW.seeds]
    job = slurm_cluster.ask("sbatch", "--parsable", "--hold", str(args.slurm)).strip()
    slurm_cluster.ask("scontrol", "update", f"JobId={job}_1", "TimeLimit=4")  # minutes: two until the signal
    slurm_cluster.ask("scontrol", "release", job)

    def requeue() -> None:
        assert ("0", "RUNNING") in jobs()
        slurm_cluster.ask("scontrol", "requeue", f"{job}_0")

    def stop() -> None:  # or it would be over before its time is; SLURM lets it go on when it sends the signal
        os.kill(process_of(1, args.folder), signal.SIGSTOP)

    to_do = {0: requeue, 1: stop}

    def done() -> bool:
        for element in [*to_do]:
            if (folders[element] / "eval.csv").exists() and len(read_curve(folders[element])[0]) > 2:
                to_do.pop(element)()
        return not to_do

    slurm_cluster.wait_for(done, cluster, 600)
    slurm_cluster.wait_for(lambda: not jobs(), cluster, 1200)

    learning.collect(args, [ROW])
    rows = learning.read_rows(args.curves / "pendulum-swingup.csv")
    for seed in ROW.seeds:
        assert [int(row[0]) for row in rows if row[-1] == str(seed)] == STEPS, "whole, nothing twice"
    logs = [folder.with_suffix(".log").read_text() for folder in folders]
    for element, log in enumerate(logs):
        print(f"element {element}:\n{log}")
    restarts = [
        int(re.search(r"Restarts=(\d+)", slurm_cluster.ask("scontrol", "show", "job", f"{job}_{element}"))[1])
        for element in range(4)
    ]
    assert restarts[0] == 1 and restarts[1] >= 1 and restarts[2:] == [0, 0]
    assert "SIGTERM" in logs[0] and "SIGUSR1" in logs[1]
    assert all("--resume continues the run" not in log for log in logs[2:])


def test_two_processes_under_srun_learn_what_one_learns(cluster, tmp_path):
    write_random_episodes(tmp_path / "data")
    flags = [*SMALL["tdmpc2_jax_mt.py"], "--tasks", ",".join(TWO_TASKS), "--data-dir", str(tmp_path / "data")]
    flags += "--no-mpc --num-updates 40 --eval-freq 40 --checkpoint-freq 40 --log-freq 1".split()
    command = [sys.executable, str(ROOT / "tdmpc2_jax_mt.py"), *flags]
    two = ["srun", "--ntasks=2", *command, "--distributed", "--runs-dir", str(tmp_path / "two")]
    for words in ([*command, "--runs-dir", str(tmp_path / "one")], two):
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        print(done.stdout, done.stderr)
        assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stdout
    folders = [tmp_path / name / "+".join(TWO_TASKS) / "tdmpc2_jax_mt" / "1" for name in ("one", "two")]
    for tag in ("losses/total_loss", "losses/pi_loss", "losses/grad_norm"):
        one, both = (np.array([value for _, value in read_scalars(folder, tag)]) for folder in folders)
        np.testing.assert_allclose(both, one, rtol=1e-3, atol=1e-6, err_msg=tag)
    curves = [learning.read_rows(folder / "eval.csv") for folder in folders]
    print(curves)
    for one, both in zip(*curves, strict=True):
        assert one[0] == both[0] == "40"
