"""Learning curves: runs a suite of tasks and seeds, collects every eval.csv and draws them together.

    python benchmarks/learning.py cpu                             # what is new begins, what was killed goes on
    python benchmarks/learning.py cpu --jobs 0                    # only collects and draws
    python benchmarks/learning.py gpu --reference scores.csv      # the paper's settings, published curves beside ours
    python benchmarks/learning.py gpu --slurm gpu.sh --sbatch gpus=1 time=12:00:00 && sbatch gpu.sh

A run is a process of its script with --resume, so that the same command goes on after Ctrl-C, a SIGTERM or a reboot
(after a kill -9 end the runs, too: they do not notice it); its output is in FOLDER/TASK/EXP_NAME/SEED.log. On a CPU
every run has a core of its own and computes with one thread. On an accelerator one run has all of it, or --jobs share
it, best under NVIDIA's MPS. Curves (step,reward,success,seed; one seed below the other) are collected every minute
into benchmarks/results/curves; seeds that stand there already and have no folder here stay, so that the curves of
several machines add up.

--slurm starts nothing: it writes a job array for a cluster, one run an element, which goes on by itself after its time
was over or it was preempted; --jobs 0 collects its curves, at any time. See docs/cluster.md.
"""

import csv
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

HERE = Path(__file__).resolve().parent


class Row(NamedTuple):
    """A curve of a suite: one task, several seeds."""

    task: str
    seeds: tuple[int, ...] = (1,)
    flags: str = ""  # besides the suite's
    script: str = "tdmpc2_jax"
    label: str = ""  # the curve is called TASK.csv, or TASK__LABEL.csv


SMALL = "--model-size 1 --batch-size 128 --num-samples 128 --num-elites 32 --eval-episodes 5 --eval-freq 10000"
TERMINATING = "--num-envs 4 --utd 0.25"  # an update for each decision of all four together
SUITES = {
    # A 1M model, half of the paper's batch, a quarter of its samples and half of its elites
    "cpu": (
        f"{SMALL} --total-timesteps 100000 --checkpoint-freq 5000",
        [
            *(Row(task, (1, 2, 3), label="batch_128") for task in ("cartpole-swingup", "walker-walk", "finger-spin")),
            Row("Hopper-v5", (1, 2), TERMINATING, label="batch_128"),
            Row("Walker2d-v5", (1,), TERMINATING, label="batch_128"),
            *(Row(task, label="batch_128") for task in ("mw-window-close", "pendulum-swingup")),
            Row("reacher-easy", (1, 2), label="batch_128"),
            Row("cheetah-run", label="batch_128"),
        ],
    ),
    "gpu": (
        "--total-timesteps 1000000 --eval-freq 50000",
        [
            Row(task, (1, 2, 3), label="5M")
            for task in ("walker-walk", "cheetah-run", "dog-run", "humanoid-walk", "mw-door-open")
        ]
        + [Row("walker-walk", (1, 2, 3), "", "tdmpc2_jax_rgb", "pixels_5M")],
    ),
    "smoke": (  # minutes: shows that the machinery works, not what agents learn
        f"{SMALL} --total-timesteps 3000 --eval-freq 1000 --eval-episodes 1 --enc-dim 32 --mlp-dim 32 --latent-dim 32 "
        "--seed-steps 500 --iterations 2 --checkpoint-freq 1000",
        [Row("pendulum-swingup", (1, 2))],
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    suite: tyro.conf.Positional[Literal[tuple(SUITES)]]
    tasks: tuple[str, ...] = ()  # only these of the suite's
    folder: Path = Path("runs")  # folder of the runs
    jobs: int | None = None  # runs at a time (0: none); default: one per core, or one on an accelerator
    curves: Path = HERE / "results" / "curves"  # folder of the collected curves
    picture: Path = HERE / "results" / "curves.png"  # where they are drawn
    reference: Path | None = None  # table of published curves, drawn beside ours
    slurm: Path | None = None  # write a job array to this file, and do nothing else; of it --jobs run at a time
    sbatch: tuple[str, ...] = ()  # further options of that array, as gpus=1 time=12:00:00


def name_of(row: Row) -> str:
    """Name of a row's experiment: runs of other settings are others."""
    return f"{row.script}__{row.label}" if row.label else row.script


def folder_of(args: Args, row: Row, seed: int) -> Path:
    return args.folder / row.task / name_of(row) / str(seed)


def command_of(args: Args, row: Row, seed: int, flags: str) -> list[str]:
    """Starts or resumes one run."""
    command = [sys.executable, str(HERE.parent / f"{row.script}.py"), "--task", row.task, "--seed", str(seed)]
    command += ["--exp-name", name_of(row), "--runs-dir", str(args.folder), "--resume"]
    return [*command, *flags.split(), *row.flags.split()]


def log_of(args: Args, row: Row, seed: int) -> Path:
    """File for the output of a run, whose folder is made here."""
    log = folder_of(args, row, seed).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


ONE_CORE = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # it may have to share


def start(args: Args, row: Row, seed: int, flags: str, core: int | None) -> subprocess.Popen:
    """Starts or resumes one run, on one core or on the accelerator that JAX finds."""
    command = command_of(args, row, seed, flags)
    env = dict(os.environ)
    if core is not None:
        env |= ONE_CORE
        command = ["taskset", "-c", str(core), *command]
    else:
        env |= SHARED_GPU
    print("begins:", " ".join(command), flush=True)
    with log_of(args, row, seed).open("ab") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


ARRAY = """\
#!/bin/bash
# {title}: {number} runs, written by benchmarks/learning.py
#SBATCH --job-name={title}
#SBATCH --array=0-{last}{at_once}
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output={folder}/{title}-%a.out
{options}
runs=(
{runs}
)
if [ -n "$SLURM_JOB_GPUS" ]; then
  export {gpu}
elif [ "${{SLURM_CPUS_PER_TASK:-1}}" = 1 ]; then
  export {cpu}
fi
eval "srun --ntasks=1 ${{runs[$SLURM_ARRAY_TASK_ID]}}"
status=$?
if [ $status = 138 ]; then # 128 + USR1: its time was nearly over, and it has written a checkpoint
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


def write_array(args: Args, flags: str, rows: list[Row]) -> None:
    """Writes a job array for SLURM, one run an element: what is killed is started again and goes on."""
    args = dataclasses.replace(args, folder=args.folder.absolute())
    runs = []
    for row in rows:
        for seed in row.seeds:
            words = shlex.join(command_of(args, row, seed, flags))
            runs.append(shlex.quote(f"{words} >> {shlex.quote(str(log_of(args, row, seed)))} 2>&1"))
    text = ARRAY.format(
        title=args.suite,
        number=len(runs),
        last=len(runs) - 1,
        at_once=f"%{args.jobs}" if args.jobs else "",
        folder=args.folder,
        options="".join(f"#SBATCH --{option}\n" for option in args.sbatch),
        runs="\n".join(runs),
        cpu=" ".join(f"{name}={value}" for name, value in ONE_CORE.items()),
        gpu=" ".join(f"{name}={value}" for name, value in SHARED_GPU.items()),
    )
    args.slurm.write_text(text)
    print(f"{args.slurm} has {len(runs)} runs: sbatch {args.slurm}")


def curve_of(args: Args, row: Row) -> Path:
    return args.curves / (row.task + (f"__{row.label}" if row.label else "") + ".csv")


def collect(args: Args, rows: list[Row]) -> None:
    """Writes the curve of every row that has runs here: their eval.csv files, seed by seed. Seeds that the curve has
    already and that have no run here stay."""
    for row in rows:
        found = {}
        for seed in row.seeds:
            path = folder_of(args, row, seed) / "eval.csv"
            if path.exists() and (lines := read_rows(path)):
                found[str(seed)] = lines
        if not found:
            continue
        path = curve_of(args, row)
        seeds = defaultdict(list)
        for line in read_rows(path) if path.exists() else []:
            seeds[line[-1]].append(line)
        seeds |= found
        lines = [line for seed in sorted(seeds, key=int) for line in seeds[seed]]
        args.curves.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".tmp").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["step", "reward", "success", "seed"], *lines])
        path.with_suffix(".tmp").replace(path)


def read_rows(path: Path) -> list[list[str]]:
    """Rows of a curve, without its head."""
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def work(args: Args, flags: str, rows: list[Row], cores: list[int | None]) -> list[str]:
    """Runs everything, as many at a time as there are cores (None: a share of the accelerator), and collects. Returns a
    sentence for each that failed."""
    todo, running, failed = [(row, seed) for row in rows for seed in row.seeds], {}, []
    collected = 0.0
    try:
        while todo or running:
            for place in [place for place in range(len(cores)) if place not in running][: len(todo)]:
                row, seed = todo.pop(0)
                running[place] = row, seed, start(args, row, seed, flags, cores[place])
            time.sleep(1)
            for place, (row, seed, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    log = log_of(args, row, seed)
                    if process.returncode:
                        failed.append(f"{row.task}, seed {seed}: exit status {process.returncode}, see {log}")
            if time.monotonic() - collected > 60:
                collected = time.monotonic()
                collect(args, rows)
    finally:  # Ctrl-C: every run writes a checkpoint, as on SIGTERM
        for *_, process in running.values():
            process.send_signal(signal.SIGTERM)
        for *_, process in running.values():
            process.wait()
    return failed


def main(args: Args) -> None:
    flags, rows = SUITES[args.suite]
    if unknown := set(args.tasks) - {row.task for row in rows}:
        names = ", ".join(row.task for row in rows)
        sys.exit(f"error: suite {args.suite} has no {', '.join(sorted(unknown))}: it has {names}")
    rows = [row for row in rows if not args.tasks or row.task in args.tasks]
    if args.slurm:
        write_array(args, flags, rows)
        return
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]  # apart: it would take a GPU's memory
    on_cpu = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip() == "cpu"
    cores = sorted(os.sched_getaffinity(0)) if on_cpu else [None] * (1 if args.jobs is None else args.jobs)
    failed = []
    try:
        jobs = len(cores) if args.jobs is None else args.jobs
        if jobs > len(cores):
            sys.exit(f"error: --jobs {jobs} runs at a time need as many cores, and there are {len(cores)}")
        failed = work(args, flags, rows, cores[:jobs]) if jobs else []
    except KeyboardInterrupt:
        failed = ["stopped: the same command goes on"]
    for sentence in failed:
        print(sentence, file=sys.stderr, flush=True)  # before drawing, which may fail, too
    collect(args, rows)
    if any(args.curves.glob("*.csv")):
        command = [sys.executable, str(HERE / "plot_curves.py"), "--curves", str(args.curves)]
        command += ["--output", str(args.picture)] + (["--reference", str(args.reference)] if args.reference else [])
        subprocess.run(command, check=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are ended, too
    main(tyro.cli(Args, description=__doc__))
