"""Speed of the environments alone: where worker processes pay, and what stepping costs beside the simulator.

    python benchmarks/environments.py                                # six tasks of different weight
    python benchmarks/environments.py --tasks dog-run --num-envs 32 --workers 0 8 16 --json envs.json
    python benchmarks/environments.py --tasks --stock --against ../old   # beside another version of this project

A decision is one `step` of one environment with its action repeat, random actions, resets where they fall. All numbers
of workers step the same number of environments, in turn within every round; figures are medians of the rounds.
`parent` is the CPU time of the process that holds the agent per decision: all of it with 0 workers, only messages and
copies with more. The second table compares with dm_control as it comes: `suite.load`, two `step`s per decision and the
observation flattened, in one process, CPU time. The last one is about `make_envs` as it comes, in a fresh process every
time: seconds to import, make and reset, ms for a step of all environments, MB of this process and its workers (shared
pages counted once: PSS); with --against of the two versions in turn.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs

ROUND = 0.5  # seconds per measurement


@dataclasses.dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = (
        "cartpole-swingup", "walker-walk", "humanoid-walk", "dog-run", "mw-reach", "myo-key-turn"
    )  # fmt: skip
    """tasks to step; those whose simulator is not installed are left out"""
    num_envs: int = 8
    """environments stepped side by side"""
    workers: tuple[int, ...] = (0, 2, 4)
    """numbers of worker processes; 0 is in this process"""
    stock: tuple[str, ...] = ("cartpole-swingup", "walker-walk", "walker-run", "dog-run")
    """tasks to compare with dm_control as it comes"""
    started: tuple[str, ...] = ("cartpole-swingup", "walker-walk", "dog-run")
    """tasks whose start and memory are measured"""
    started_envs: tuple[int, ...] = (1, 4, 16)
    """numbers of environments for these"""
    against: str | None = None
    """folder of another version of this project, to start its environments, too"""
    rounds: int = 5
    """rounds of measurement"""
    json: str | None = None
    """write the figures to this file"""


def rate(step: Callable[[np.ndarray], None], actions: np.ndarray, per_step: int = 1) -> tuple[float, float]:
    """Decisions per second, and this process's CPU µs per decision, of a function stepped for ROUND seconds."""
    steps, start, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < ROUND:
        for action in actions[:10]:
            step(action)
        steps += 10
        actions = np.roll(actions, -10, axis=0)
    decisions = steps * per_step
    return decisions / elapsed, (time.process_time() - cpu) / decisions * 1e6


def measure_workers(task: str, args: Args) -> dict[int, tuple[float, float]]:
    """Number of workers → (decisions/s, parent's µs per decision)."""
    vectors = {w: envs.make_envs(task, args.num_envs, num_workers=w) for w in args.workers}
    try:
        shape = next(iter(vectors.values())).action_space.shape
        actions = np.random.default_rng(0).uniform(-1, 1, (200, *shape)).astype(np.float32)
        for vector in vectors.values():
            vector.reset()
        rounds = [
            {w: rate(vector.step, actions, args.num_envs) for w, vector in vectors.items()} for _ in range(args.rounds)
        ]
    finally:
        for vector in vectors.values():
            vector.close()
    return {w: tuple(statistics.median(r[w][i] for r in rounds) for i in (0, 1)) for w in args.workers}


def stock_step(task: str) -> Callable[[np.ndarray], None]:
    """One decision of dm_control's own environment."""
    from dm_control import suite

    domain, name = task.split("-", 1)
    env = suite.load({"cup": "ball_in_cup"}.get(domain, domain), name.replace("-", "_"))
    env.reset()

    def step(action: np.ndarray) -> None:
        reward = 0.0
        for _ in range(2):
            result = env.step(action)
            reward += result.reward or 0.0
        np.concatenate([np.ravel(value) for value in result.observation.values()]).astype(np.float32)

    return step


def our_step(task: str) -> Callable[[np.ndarray], None]:
    env = envs.make_env(task)
    env.reset()

    def step(action: np.ndarray) -> None:
        if env.step(action)[3]:
            env.reset()

    return step


def measure_stock(task: str, rounds: int) -> tuple[float, float]:
    """CPU µs per decision: ours, dm_control's."""
    ours, theirs = our_step(task), stock_step(task)
    actions = np.random.default_rng(0).uniform(-1, 1, (200, envs.TASKS[task].action_size)).astype(np.float32)
    times = [(rate(ours, actions)[1], rate(theirs, actions)[1]) for _ in range(rounds)]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


STARTED = """
import json, sys, time
begin = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import envs
vector = envs.make_envs(sys.argv[2], int(sys.argv[3]), seed=int(sys.argv[4]))
vector.reset()
start = time.perf_counter() - begin
import numpy, psutil
action, steps, begin = numpy.zeros(vector.action_space.shape, numpy.float32), 0, time.perf_counter()
while (elapsed := time.perf_counter() - begin) < float(sys.argv[5]):
    vector.step(action)
    steps += 1
process = psutil.Process()
everyone = [process, *process.children(recursive=True)]
print(json.dumps([start, elapsed / steps * 1e3, sum(one.memory_full_info().pss for one in everyone) / 1e6]))
vector.close()
"""


def measure_start(task: str, num_envs: int, args: Args) -> list[tuple[float, float, float]]:
    """(seconds to start, ms a step, MB) of this version and of --against."""
    folders = [Path(envs.__file__).parent, *([args.against] if args.against else [])]
    rounds = []
    for seed in range(args.rounds):  # what a step costs depends on the states, and seeds mean others in other versions
        commands = ([sys.executable, "-c", STARTED, *map(str, (one, task, num_envs, seed, ROUND))] for one in folders)
        runs = [subprocess.run(command, stdout=subprocess.PIPE, check=True) for command in commands]
        rounds.append([json.loads(run.stdout) for run in runs])
    return [tuple(map(statistics.median, zip(*one, strict=True))) for one in zip(*rounds, strict=True)]


def main(args: Args) -> None:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{args.num_envs} environments, {cores} cores, load average {load:.1f}\n")
    print("| task | " + " | ".join(f"{w} workers, decisions/s | parent µs" for w in args.workers) + " | default |")
    print("|---" * (2 * len(args.workers) + 2) + "|")
    results = {"num_envs": args.num_envs, "cores": cores, "load_average": load, "workers": {}, "stock": {}, "start": {}}
    for task in args.tasks:
        try:
            figures = results["workers"][task] = measure_workers(task, args)
        except envs.UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        cells = " | ".join(f"{decisions:,.0f} | {parent:.1f}" for decisions, parent in figures.values())
        print(f"| {task} | {cells} | {envs.default_workers(task, args.num_envs)} |", flush=True)
    print("\n| task | µs per decision | dm_control as it comes | ratio |\n|---|---|---|---|")
    for task in args.stock:
        ours, theirs = results["stock"][task] = measure_stock(task, args.rounds)
        print(f"| {task} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.2f} |", flush=True)
    print("\n| task | environments | start s, step ms, MB |" + " against |" * bool(args.against))
    print("|---|---|---|" + "---|" * bool(args.against))
    for task, num_envs in itertools.product(args.started, args.started_envs):
        figures = results["start"][f"{task} x {num_envs}"] = measure_start(task, num_envs, args)
        cells = " | ".join("{:.2f}, {:.2f}, {:.0f}".format(*one) for one in figures)
        print(f"| {task} | {num_envs} | {cells} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
