"""Decisions per second with everything in one compiled program, against the first script's loop around Gymnasium.

    uv pip install -e '.[gymnax]'
    python benchmarks/device.py --num-envs 1 16 --num-seeds 3 --json device.json

The task is the pendulum, gymnax's there and Gymnasium's here: it costs next to nothing, so that what differs is the way
from one decision to the next. Each case runs in a process of its own, `--turns` times in turn, after its programs are
compiled. On a machine that others use, too, times are of no use: `cpu` is what the process has computed.
"""

import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Args:
    num_envs: tuple[int, ...] = (1, 16)  # environments of a run, one or several numbers
    num_seeds: int = 3  # also so many runs side by side in one program
    rounds: int = 50  # decisions of each environment that are measured
    turns: int = 3  # how often each case is measured
    fields: tuple[str, ...] = ("model_size=1", "batch_size=64", "num_samples=128")  # settings of the agent NAME=VALUE
    json: str | None = None  # write the figures to this file
    case: str | None = None  # measure this one here: of the processes that the program starts


def compiled(td: Any, agent: Any, n: int, seeds: int, rounds: int) -> tuple[float, float]:
    """CPU and wall seconds of so many rounds in one program."""
    import jax

    import tdmpc2_jax_device as script

    env = script.open_jax("gymnax/Pendulum-v1")
    agent = td.for_task(agent, env.spec.name, env)
    runs = [script.fresh_run(agent, env, 2000, n, script.random_streams(seed)) for seed in range(seeds)]
    runs = script.committed(script.side_by_side(runs))
    schedule = script.Schedule(0, 10 * n, Fraction(1))

    def advance(number: int) -> None:
        nonlocal runs
        runs, record = script.advance(agent, env, schedule, runs, number, 0)
        jax.block_until_ready(record)

    advance(12)
    return timed(lambda: advance(rounds))


def step_by_step(td: Any, agent: Any, n: int, rounds: int) -> tuple[float, float]:
    """CPU and wall seconds of so many rounds of the loop in tdmpc2_jax.py, with nothing logged."""
    import jax
    import numpy as np

    with contextlib.closing(td.environments.make_envs("Pendulum-v1", n)) as envs:
        agent = td.for_task(agent, "Pendulum-v1", envs)
        learner = td.committed(td.fresh_state(agent, td.random_streams(0)))
        state, key = learner["train"], learner["act_key"]
        replay = td.committed(td.init_replay(agent, 2000, n))
        mean = td.committed(np.zeros((n, agent.horizon, agent.action_dim), np.float32))
        obs, _ = envs.reset()
        done = np.zeros(n, bool)
        entry = td.Step(obs, np.zeros((n, agent.action_dim), np.float32), np.zeros(n, np.float32), done, ~done)

        def advance(number: int, learn: bool = True) -> None:
            nonlocal state, key, replay, mean, entry, done
            for _ in range(number):
                replay, action, mean, key = td.add_and_act(agent, state.params, replay, entry, mean, key, False)
                if learn:
                    state, _ = td.train(agent, state, replay, num_updates=n)
                on_device = action
                obs, reward, terminated, truncated, _ = envs.step(np.asarray(action))
                entry = td.Step(obs, on_device, reward.astype(np.float32), terminated, first=done)
                done = terminated | truncated
            jax.block_until_ready(state)

        advance(10, learn=False)
        advance(2)
        return timed(lambda: advance(rounds))


def timed(function: Any) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(args: Args) -> dict[str, float]:
    """The case of this process."""
    sys.path.insert(0, str(ROOT))
    import tdmpc2_jax as td

    td.keep_freed_memory()
    n, seeds = map(int, args.case.split(","))
    fields = {name: json.loads(value) for name, _, value in (field.partition("=") for field in args.fields)}
    agent = td.Agent(**fields)
    if seeds:
        cpu, wall = compiled(td, agent, n, seeds, args.rounds)
    else:
        cpu, wall = step_by_step(td, agent, n, args.rounds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"cpu": cpu, "wall": wall, "decisions": args.rounds * n * max(seeds, 1), "peak_mb": memory}


def main(args: Args) -> None:
    if args.case:
        print(json.dumps(measure(args)))
        return
    cases = [(n, seeds) for n in args.num_envs for seeds in (0, 1)] + [(args.num_envs[0], args.num_seeds)]
    results = {case: [] for case in cases}
    for _ in range(args.turns):
        for n, seeds in cases:
            command = [sys.executable, __file__, "--case", f"{n},{seeds}", "--rounds", str(args.rounds)]
            command += ["--fields", *args.fields]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[n, seeds].append(json.loads(done.stdout.splitlines()[-1]))
            print((n, seeds), results[n, seeds][-1], file=sys.stderr, flush=True)
    print("| environments | runs | loop | CPU ms a decision | decisions/s | peak MB |\n|---|---|---|---|---|---|")
    rows = []
    for (n, seeds), turns in results.items():
        medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        row = {"num_envs": n, "runs": max(seeds, 1), "loop": "compiled" if seeds else "step by step"}
        row |= {"cpu_ms": 1e3 * medians["cpu"] / medians["decisions"]}
        row |= {"per_second": medians["decisions"] / medians["wall"], "peak_mb": medians["peak_mb"]}
        rows.append(row)
        print("| " + " | ".join(f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps({"fields": args.fields, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
