"""Speed of tdmpc2_jax.py in several checkouts of this repository, as ratios that hold.

    git worktree add ../before COMMIT
    python benchmarks/interleaved.py ../before . --model-size 1 5 --json ratios.json

One process per checkout, all alive at once, takes turns call by call, so that whatever slows the machine slows all of
them: one program's milliseconds drift by half within minutes, and they and their ratios to anything timed apart are of
no use. Ratios are the first checkout's time divided by another's in the same round (larger is faster), as median and
range over the rounds.

`update` is `train(num_updates=1)`, `plan` is `act`, both as the training loop calls them; `decision` is one round of
the loop: act, learn, step the task's environment, write, in the order of the checkout's own loop, all complete.
`faults` are minor page faults per call. `--cpu-time` is for a machine that others use, too: each process computes with
one thread, and what that has computed is measured instead of the clock's time.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

DISCOUNT = 0.99
CALLS = ("update", "plan", "decision")
# What keep_freed_memory of tdmpc2_support/devices.py tells the allocator, here also for checkouts that do not have it
KEEP_FREED_MEMORY = ":".join(
    f"glibc.malloc.{option}" for option in ("arena_max=1", "trim_threshold=1073741824", "mmap_threshold=1073741824")
)


@dataclasses.dataclass(frozen=True)
class Args:
    checkouts: tyro.conf.Positional[tuple[Path, ...]]  # folders with a tdmpc2_jax.py, compared with the first of them
    task: str = "walker-walk"  # task whose sizes are measured, and whose environment is stepped
    model_size: tuple[Literal[1, 5, 19, 48, 317], ...] = (1, 5)  # millions of parameters, one or several
    compute_dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)  # of matrix products, one or both
    calls: tuple[Literal[CALLS], ...] = CALLS  # what is timed
    rounds: int = 30  # rounds of measurement
    cpu_time: bool = False  # measure what one thread computes, not the clock's time
    json: str | None = None  # write the figures to this file


# ----------------------------------------------------------------------------------------------- One checkout's side
def calls_of(task: str, model_size: int, compute_dtype: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, on the tdmpc2_jax.py that the interpreter finds first. Each waits for its results."""
    import envs as environments
    import tdmpc2_jax as td

    if not hasattr(td, "Agent"):
        return calls_of_earlier(task, model_size, compute_dtype)
    from tdmpc2_support.run.schedule import random_streams

    envs = environments.make_envs(task, 1, seed=0)
    agent = td.for_task(td.Agent(model_size=model_size, compute_dtype=compute_dtype), task, envs)
    state = td.fresh_state(agent, random_streams(1))["train"]
    key, (obs, _) = jax.random.key(2), envs.reset(seed=0)
    replay = td.init_replay(agent, 10_000, 1)
    prev_mean = jnp.zeros((1, agent.horizon, agent.action_dim))
    no, filler = np.zeros(1, bool), np.zeros(1, np.float32)
    for _ in range(100):
        action = np.random.default_rng(0).uniform(-1, 1, (1, agent.action_dim)).astype(np.float32)
        replay = td.add(agent, replay, td.Step(obs, action, filler, no, no))

    def update():
        nonlocal state  # the one passed in is consumed
        state, info = td.train(agent, state, replay, num_updates=1)
        jax.block_until_ready((state, info))

    def plan():
        nonlocal prev_mean, key
        action, prev_mean, key = td.act(agent, state.params, obs, prev_mean, no, key, explore=True)
        return np.asarray(action)

    step = td.Step(obs, np.zeros((1, agent.action_dim), np.float32), filler, no, no)

    def decision():
        nonlocal state, replay, step, prev_mean, key
        replay, action, prev_mean, key = td.add_and_act(agent, state.params, replay, step, prev_mean, key, random=False)
        state, _ = td.train(agent, state, replay, num_updates=1)
        now, reward, terminated, _, _ = envs.step(np.asarray(action))
        step = td.Step(now, action, reward.astype(np.float32), terminated, no)
        jax.block_until_ready((state, replay))

    return {"update": update, "plan": plan, "decision": decision}


def calls_of_earlier(task: str, model_size: int, compute_dtype: str) -> dict[str, Callable[[], Any]]:
    """`calls_of` for a checkout from before `Agent` was a dataclass of its own."""
    import envs as environments
    import tdmpc2_jax as td

    args = td.Args(task=task, model_size=model_size, compute_dtype=compute_dtype)
    envs = environments.make_envs(task, 1, seed=0)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    model = td.make_model(args, obs_dim, action_dim, environments.task_spec(task).can_terminate)
    state = jax.jit(td.fresh_state, static_argnums=(0, 1))(args, model)["train"]
    key, (obs, _) = jax.random.key(2), envs.reset(seed=0)
    replay, prev_mean = td.init_replay(10_000, 1, obs_dim, action_dim), jnp.zeros((1, args.horizon, action_dim))
    no, filler = np.zeros(1, bool), np.zeros(1, np.float32)
    for _ in range(100):
        action = np.random.default_rng(0).uniform(-1, 1, (1, action_dim)).astype(np.float32)
        replay = td.add(replay, args.horizon, obs, action, filler, no, no)

    def update():
        nonlocal state  # the one passed in is consumed
        state, info = td.train(args, model, state, replay, DISCOUNT, num_updates=1)
        jax.block_until_ready((state, info))

    def plan():
        nonlocal prev_mean, key
        action, prev_mean, key = td.act(args, model, state.params, obs, prev_mean, no, DISCOUNT, key, explore=True)
        return np.asarray(action)

    entry = obs, np.zeros((1, action_dim), np.float32), filler, no, no

    def decision():  # in the order of each checkout's own loop
        nonlocal state, replay, entry, prev_mean, key
        if hasattr(td, "add_and_act"):
            replay, action, prev_mean, key = td.add_and_act(
                args, model, state.params, replay, entry, prev_mean, DISCOUNT, key, random=False
            )
            state, _ = td.train(args, model, state, replay, DISCOUNT, num_updates=1)
            sent = np.asarray(action)
        else:
            sent = action = plan()
            state, _ = td.train(args, model, state, replay, DISCOUNT, num_updates=1)
        now, reward, terminated, _, _ = envs.step(sent)
        entry = now, action, reward.astype(np.float32), terminated, no
        if not hasattr(td, "add_and_act"):
            replay = td.add(replay, args.horizon, *entry)
        jax.block_until_ready((state, replay))

    return {"update": update, "plan": plan, "decision": decision}


def serve(connection, checkout: str, clock: Callable[[], float], *config) -> None:
    """Answers each name of a call with its milliseconds and its minor page faults, until the other side closes."""
    sys.path.insert(0, checkout)
    import tdmpc2_jax

    if Path(tdmpc2_jax.__file__).parent != Path(checkout):
        raise RuntimeError(f"{checkout} was asked for, {tdmpc2_jax.__file__} was imported")
    calls = calls_of(*config)
    connection.send(None)
    while name := connection.recv():
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, clock()
        calls[name]()
        ms = (clock() - start) * 1e3
        connection.send((ms, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))


# ---------------------------------------------------------------------------------------------------------- Measurement
def measure(checkouts: tuple[Path, ...], names: tuple[str, ...], rounds: int, *config) -> dict[str, np.ndarray]:
    """[rounds, checkouts, (ms, faults)] of each call, the checkouts taking turns; three rounds warm up. config is the
    clock, and what `calls_of` takes."""
    spawn = multiprocessing.get_context("spawn")
    ends, processes = [], []
    try:
        for checkout in checkouts:
            os.environ["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY  # for all alike
            mine, theirs = spawn.Pipe()
            processes.append(spawn.Process(target=serve, args=(theirs, str(checkout.resolve()), *config), daemon=True))
            processes[-1].start()
            theirs.close()  # so that a process that dies ends the waiting
            ends.append(mine)
            mine.recv()
        times = {name: [] for name in names}
        for i in range(rounds + 3):
            for name in names:
                row = []
                for end in ends if i % 2 else reversed(ends):  # nobody always runs after the same other
                    end.send(name)
                    row.append(end.recv())
                times[name].append(row if i % 2 else row[::-1])
        for end in ends:
            end.send(None)
        return {name: np.array(rows[3:]) for name, rows in times.items()}
    finally:
        for process in processes:
            process.join(1)
            process.kill()


def spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def rows_of(checkouts: tuple[Path, ...], times: dict[str, np.ndarray], model_size: int, dtype: str):
    """A row of figures per call and checkout."""
    for name, (ms, faults) in ((name, np.moveaxis(rounds, -1, 0)) for name, rounds in times.items()):
        for i, checkout in enumerate(checkouts):
            yield {
                "model_size": model_size, "compute_dtype": dtype, "call": name, "checkout": str(checkout),
                "ms": spread(ms[:, i]), "faults": spread(faults[:, i]), "times_as_fast": spread(ms[:, 0] / ms[:, i]),
            }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | type | call | checkout | ms | faults | times as fast |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**r["times_as_fast"])
        cells = [f"{r['model_size']}M", r["compute_dtype"], r["call"], r["checkout"]]
        cells += ["{median:.1f} ({min:.1f}-{max:.1f})".format(**r["ms"]), f"{r['faults']['median']:,.0f}", ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Args) -> None:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    clock = time.perf_counter
    if args.cpu_time:
        clock = time.process_time
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    rows = []
    for size in args.model_size:
        for dtype in args.compute_dtype:
            times = measure(args.checkouts, args.calls, args.rounds, clock, args.task, size, dtype)
            rows += rows_of(args.checkouts, times, size, dtype)
    print(table(rows))
    if args.json:
        machine = {"cpu_cores": os.cpu_count(), "load_average": os.getloadavg()[0], "jax_version": jax.__version__}
        Path(args.json).write_text(json.dumps(machine | {"rounds": args.rounds, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
