"""Speed of all scripts on an accelerator in a few minutes: programs are compiled side by side, and timed one at a time.

    python benchmarks/accelerator.py --json benchmarks/results/accelerator.json
    python benchmarks/accelerator.py --only "pixels 5M"

`update` and `plan` are waited for one by one, in turns; of updates `in a row` only the last is waited for.
`steps_per_s` are simulator steps with the task's environments really stepped, in the order of the training loop, at one
update per decision. Every row is a process of its own, which takes of the device's memory what it needs.
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import envs as environments
from benchmarks import speed
from benchmarks.distillation import Args as DistillationArgs
from benchmarks.distillation import cost
from tdmpc2_support.data.recorded import Recorded
from tdmpc2_support.run.schedule import random_streams

TASK = "walker-walk"
OBS, ACTION = 24, 6  # its sizes


@dataclasses.dataclass(frozen=True)
class Args:
    seconds: float = 6.0
    """time given to each loop"""
    repeats: int = 20
    """rounds of updates and plans that take turns"""
    only: tuple[str, ...] = ()
    """only these rows"""
    json: str | None = None
    """write the figures to this file"""


def measure(turn, args: Args, update: Callable, **plans: Callable) -> dict[str, float]:
    """Milliseconds of functions that are compiled here and then timed with the device to themselves."""
    functions = {"update": update, **plans}
    start = time.perf_counter()
    jax.block_until_ready([function() for function in functions.values()])
    row = {"first_calls_s": time.perf_counter() - start}
    with turn:
        row |= {f"{name}_ms": float(np.median(ms)) for name, ms in speed.interleave(functions, args.repeats).items()}
        start = time.perf_counter()
        jax.block_until_ready([update() for _ in range(50)])
        return row | {"in_a_row_ms": (time.perf_counter() - start) / 50 * 1e3}


def online(turn, args: Args, num_envs: int, compute_dtype: str = "float32") -> dict[str, float]:
    """tdmpc2_jax.py, 5M, by the two programs that the training loop calls: as many updates as there are environments,
    and a plan for all of them behind the writing of their step. Each further program would compile for a minute."""
    script, key, n = speed.td, jax.random.key(1), num_envs
    agent = script.Agent(compute_dtype=compute_dtype)
    with closing(environments.make_envs(TASK, n, seed=0)) as envs:
        agent = script.for_task(agent, TASK, envs)
        state, replay = script.fresh_state(agent, random_streams(0))["train"], speed.filled_replay(agent, n)
        mean, no = jnp.zeros((n, agent.horizon, ACTION)), np.zeros(n, bool)
        step = script.Step(np.ones((n, OBS), np.float32), mean[:, 0], np.zeros(n, np.float32), no, no)

        def update():
            nonlocal state  # what is passed in is consumed
            state, info = script.train(agent, state, replay, num_updates=n)
            return info

        def plan():
            nonlocal replay, mean
            replay, action, mean, _ = script.add_and_act(agent, state.params, replay, step, mean, key, random=False)
            return action

        _, state = speed.loop_decisions_per_s(agent, n, state, envs, 0)  # compiles
        row = measure(turn, args, update, plan=plan)
        with turn:
            rate, _ = speed.loop_decisions_per_s(agent, n, state, envs, args.seconds)
    return row | {"steps_per_s": rate * environments.task_spec(TASK).action_repeat}


def pixels(turn, args: Args) -> dict[str, float]:
    """tdmpc2_jax_rgb.py, 5M."""
    from benchmarks.speed_rgb import filled_replay, rgb

    agent = rgb.with_model_size(rgb.Agent(action_dim=ACTION))
    replay, key = filled_replay(agent, 500), jax.random.key(0)
    state = rgb.fresh_state(agent, random_streams(0))["train"]
    obs, mean, first = np.zeros((1, 64, 64, 9), np.uint8), jnp.zeros((1, agent.horizon, ACTION)), np.zeros(1, bool)

    def update():
        nonlocal state
        state, info = rgb.train(agent, state, replay, num_updates=1)
        return info

    def plan():
        return rgb.act(agent, state.params, obs, mean, first, key, explore=True)

    return measure(turn, args, update, plan=plan)


def first_version(turn, args: Args) -> dict[str, float]:
    """tdmpc_jax.py, at the end of its schedules."""
    from benchmarks.speed_tdmpc1 import filled_replay, td

    agent = td.with_task_defaults(td.Args()).agent
    agent = dataclasses.replace(agent, obs_dim=OBS, action_dim=ACTION)
    state = jax.tree.map(jnp.copy, td.fresh_state(agent, random_streams(0))["train"])
    replay = filled_replay(agent, 100_000)
    params, obs, key = jax.tree.map(jnp.copy, state.params), np.ones((1, OBS), np.float32), jax.random.key(0)
    limits = td.Schedule(np.array([agent.horizon], np.int32), np.float32(agent.min_std))
    mean, first = jnp.zeros((1, agent.horizon, ACTION)), np.zeros(1, bool)

    def update():
        nonlocal state, replay  # those passed in are consumed
        state, replay, info = td.train(agent, state, replay, num_updates=1)
        return info

    plan = partial(td.act, agent, params, obs, mean, first, limits, key, explore=True)
    return measure(turn, args, update, plan=plan)


def distilled(turn, args: Args, compute_dtype: str = "float32") -> dict[str, float]:
    """tdmpc2_jax_mt.py, 1M with mt30's sizes, with and without a teacher of 317M."""
    settings = DistillationArgs(".", rounds=args.repeats, compute_dtype=compute_dtype)
    found = cost(settings, partial(in_turn, turn))["updates"]
    return {"update_ms": found["with"]["ms"], "without_teacher_ms": found["without"]["ms"]}


def in_turn(turn, functions: dict[str, Callable], repeats: int) -> dict[str, np.ndarray]:
    """`speed.interleave` with the device to itself."""
    jax.block_until_ready([function() for function in functions.values()])
    with turn:
        return speed.interleave(functions, repeats)


LARGER = {  # than by default, as in one of the results
    **{"width": 128, "dynamics_blocks": 3, "proposal_blocks": 3, "objective_blocks": 3, "future": 16},
    **{"num_proposals": 64, "num_policy": 24, "dynamics_steps": 4, "proposal_steps": 16, "diffusion_batch_size": 256},
}


def diffusion(turn, args: Args, **sizes) -> dict[str, float]:
    """tdmpc2_jax_diffusion.py, plans from a 1M world model."""
    import tdmpc2_jax as td
    import tdmpc2_jax_diffusion as script

    agent = td.with_model_size(script.Agent(model_size=1, obs_dim=OBS, action_dim=ACTION, **sizes))
    learner = script.fresh_learner(agent, 0)
    state = learner["state"]
    world = script.world_of(agent, learner["train"])
    rng, entries, key = np.random.default_rng(0), 5000, jax.random.key(0)
    z = jax.nn.softmax(rng.standard_normal((entries, agent.latent_dim)))
    action = rng.uniform(-1, 1, (entries, ACTION)).astype(np.float32)
    starts = np.arange(entries - agent.future)
    reward, task = np.ones(entries, np.float32), np.zeros(entries, np.int32)
    data = jax.tree.map(jnp.asarray, Recorded(z, action, reward, task, starts, starts))
    planner = jax.tree.map(jnp.copy, script.planner_of(state, world))
    obs, best, first = jnp.ones((1, OBS)), jnp.zeros((1, agent.future, ACTION)), jnp.zeros(1, bool)

    def update():
        nonlocal state
        state, info = script.train(agent, state, world, data, num_updates=1)
        return info

    def plan(**fields):
        row = dataclasses.replace(agent, **fields)
        return partial(script.act, row, planner, obs, best, first, key, explore=False)

    plans = {"plan": plan(), "plan_mppi": plan(planner="mppi"), "plan_onestep": plan(rollouts="onestep")}
    return measure(turn, args, update, **plans)


ROWS = {
    "online 5M, 1 environment": partial(online, num_envs=1),
    "online 5M, 8 environments": partial(online, num_envs=8),
    "online 5M, 32 environments": partial(online, num_envs=32),
    "online 5M, 1 environment, bfloat16": partial(online, num_envs=1, compute_dtype="bfloat16"),
    "pixels 5M": pixels,
    "TD-MPC": first_version,
    "1M with a teacher of 317M": distilled,
    "1M with a teacher of 317M, bfloat16": partial(distilled, compute_dtype="bfloat16"),
    "diffusion": diffusion,
    "diffusion, larger": partial(diffusion, **LARGER),
}


def row(name: str, turn, args: Args) -> dict:
    return ROWS[name](turn, args) | {"device": jax.devices()[0].device_kind, "jax_version": jax.__version__}


def main(args: Args) -> None:
    names, rows = args.only or tuple(ROWS), {}
    with (
        multiprocessing.Manager() as manager,
        ProcessPoolExecutor(len(names), multiprocessing.get_context("spawn")) as ex,
    ):
        turn = manager.Lock()
        for name, found in [(name, ex.submit(row, name, turn, args)) for name in names]:
            try:
                rows[name] = found.result()
            except Exception as error:  # the others' figures should not be lost
                rows[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            words = [f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[name].items()]
            print(f"{name}: {', '.join(words)}", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
