"""Speed of tdmpc2_jax.py: how long an update and a plan take, how much they compute, and what the rest is bound by.

    python benchmarks/speed.py                                             # the 5M model on walker-walk's sizes
    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py --task dog-run --model-size 5 48 --num-envs 1 8 32 --compute-dtype float32 bfloat16

An update is `tdmpc2_jax.train(num_updates=1)`, a plan is `tdmpc2_jax.act`, both as the training loop calls them. They
are timed in turn with a 2048^3 float32 product, the `unit`, which tells how fast the machine was at the time. Neither
milliseconds nor units compare between machines (interleaved.py compares programs on one). All figures are medians of
`--repeats` rounds (fewer where they would take more than a minute), units and shares medians of each round's ratio.

GFLOP are those of the matrix products in the traced program. `products` is the share of the time that the same
products take alone, on the same shapes, back to back; `draws` that of the random numbers alone; `rest` is what is left:
elementwise work, memory traffic, dispatch. `peak` is the rate of a large product in the type of --compute-dtype
(the unit on a CPU, 8192^3 elsewhere). `step` is what one step of all environments costs at one update per decision;
`in the loop` are decisions per second with the task's environments really stepped, in the order of the training loop.
What tdmpc2_jax_mt.py costs is measured by speed_multitask.py.
"""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import envs as environments
import tdmpc2_jax as td
from tdmpc2_support.cli import settings
from tdmpc2_support.run.schedule import random_streams

UNIT = 2048  # side of the float32 product in which times are quoted


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"
    """task whose sizes are measured, and whose environments the loop steps"""
    model_size: tuple[Literal[1, 5, 19, 48, 317], ...] = (5,)
    """millions of parameters, one or several"""
    num_envs: tuple[int, ...] = (1,)
    """environments planned for at once, one or several numbers"""
    compute_dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """type of the inputs of matrix products, one or both"""
    obs_dim: int | None = None
    """observation size, if not the task's (there is no loop then)"""
    action_dim: int | None = None
    """action size, if not the task's (there is no loop then)"""
    horizon: int = 3
    """steps of a plan and of a training window"""
    batch_size: int = 256
    """windows per update"""
    num_samples: int = 512
    """action sequences per iteration of the planner"""
    repeats: int = 20
    """rounds of measurement, at most"""
    json: str | None = None
    """write the figures to this file"""


# ------------------------------------------------------------------------------------------------- What is computed
class Product(NamedTuple):
    """A matrix product of the traced program."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    lhs_dtype: str
    rhs_dtype: str
    out_dtype: str
    dimension_numbers: tuple  # as of jax.lax.dot_general: ((contracted of lhs, of rhs), (batch of lhs, of rhs))


def count_products(jaxpr) -> Counter[Product]:
    """Every matrix product in a jaxpr with the number of times that it is executed: a scan's body counts once per
    iteration (the cost analysis of XLA counts it once)."""
    products = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (a, b), out = (v.aval for v in eqn.invars), eqn.outvars[0].aval
            dtypes = a.dtype.name, b.dtype.name, out.dtype.name
            products[Product(a.shape, b.shape, *dtypes, eqn.params["dimension_numbers"])] += 1
            continue
        values = itertools.chain(*(v if isinstance(v, (tuple, list)) else (v,) for v in eqn.params.values()))
        for inner in (getattr(v, "jaxpr", v) for v in values):
            counted = count_products(inner) if hasattr(inner, "eqns") else Counter()
            if counted and eqn.primitive.name in ("while", "cond"):
                raise ValueError(f"cannot tell how often the products in a {eqn.primitive.name} are executed")
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            products.update({product: n * times for product, n in counted.items()})
    return products


def flop(product: Product) -> int:
    """Floating-point operations of one product: a multiplication and an addition per pair."""
    (contracted, _), (batch, _) = product.dimension_numbers
    shared = math.prod(product.lhs[i] for i in (*contracted, *batch))
    return 2 * math.prod(product.lhs) * math.prod(product.rhs) // shared


def total_gflop(products: Counter[Product]) -> float:
    return sum(flop(product) * n for product, n in products.items()) / 1e9


def products_alone(products: Counter[Product]) -> Callable[[], Any]:
    """A function that executes these products back to back, on random operands, and nothing else."""

    rng = np.random.default_rng(0)

    def operand(shape: tuple[int, ...], dtype: str) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))

    def repeat(product: Product, times: int, lhs, rhs):
        def once(_, carry):
            lhs, rhs, _ = carry
            out = jax.lax.dot_general(lhs, rhs, product.dimension_numbers, preferred_element_type=product.out_dtype)
            # one element of the next operand comes from this product: else XLA would compute the product only once
            return lhs.at[(0,) * lhs.ndim].set(out[(0,) * out.ndim].astype(lhs.dtype)), rhs, out

        out = jax.eval_shape(lambda: once(0, (lhs, rhs, None))[2])
        return jax.lax.fori_loop(0, times, once, (lhs, rhs, jnp.zeros(out.shape, out.dtype)))[2]

    @jax.jit
    def execute(inputs):
        return [repeat(p, n, *pair) for (p, n), pair in zip(products.items(), inputs, strict=True)]

    inputs = [(operand(p.lhs, p.lhs_dtype), operand(p.rhs, p.rhs_dtype)) for p in products]
    return lambda: execute(inputs)


# ------------------------------------------------------------------------------------------------------ Measurement
def interleave(
    functions: dict[str, Callable[[], Any]], repeats: int, limit_s: float = 60, clock: Callable = time.perf_counter
) -> dict[str, np.ndarray]:
    """Milliseconds [rounds] by `clock` of each function, called in turn, after a warm-up round. There are `repeats`
    rounds, on a slow machine as many as fit into limit_s, but three at least."""
    times, begin = {name: [] for name in functions}, time.perf_counter()
    for i in range(repeats + 1):
        if i > 3 and time.perf_counter() - begin > limit_s:
            break
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            times[name].append((clock() - start) * 1e3)
    return {name: np.array(ms[1:]) for name, ms in times.items()}


def filled_replay(agent: td.Agent, n: int, steps: int = 100) -> td.Replay:
    """A replay of n environments with `steps` random entries each."""
    rng = np.random.default_rng(0)
    replay = td.init_replay(agent, 10_000, n)
    for i in range(steps):
        obs = rng.standard_normal((n, agent.obs_dim)).astype(np.float32)
        action = rng.uniform(-1, 1, (n, agent.action_dim)).astype(np.float32)
        step = td.Step(obs, action, rng.random(n, np.float32), terminated=np.zeros(n, bool), first=np.full(n, i == 0))
        replay = td.add(agent, replay, step)
    return replay


def loop_decisions_per_s(agent: td.Agent, n: int, state, envs, seconds: float):
    """Acts, learns (one update per decision) and steps the environments, in the order of the training loop. Returns
    decisions per second and the learning state."""
    key, replay = jax.random.key(0), filled_replay(agent, n)
    obs, _ = envs.reset(seed=0)
    prev_mean, done = jnp.zeros((n, agent.horizon, agent.action_dim)), np.zeros(n, bool)
    step = td.Step(obs, np.zeros((n, agent.action_dim), np.float32), np.zeros(n, np.float32), done, ~done)
    warmup, steps, start = 3, 0, math.inf
    while steps < warmup + 5 or time.perf_counter() - start < seconds:
        if steps == warmup:
            jax.block_until_ready(state)
            start = time.perf_counter()
        replay, action, prev_mean, key = td.add_and_act(agent, state.params, replay, step, prev_mean, key, random=False)
        state, _ = td.train(agent, state, replay, num_updates=n)
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(action))
        step = td.Step(obs, action, reward.astype(np.float32), terminated, first=done)
        done = terminated | truncated
        steps += 1
    jax.block_until_ready((state, replay))
    return n * (steps - warmup) / (time.perf_counter() - start), state


def first_call_s(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def memory_mb() -> dict[str, float | None]:
    """Highest use so far of this process's memory, and of the accelerator's if there is one."""
    device = jax.devices()[0].memory_stats() or {}
    return {
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_device_mb": device["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in device else None,
    }


def measure(
    args: td.Args, obs_dim: int | None, action_dim: int | None, repeats: int, loop_s: float = 5
) -> dict[str, Any]:
    """All figures of one configuration; sizes that are None are the task's. The loop is run for loop_s seconds."""
    n, key = args.num_envs, jax.random.key(1)
    with closing(environments.make_envs(args.task, n, seed=0)) as envs:
        agent = td.for_task(args.agent, args.task, envs)
        sizes = {"obs_dim": obs_dim or agent.obs_dim, "action_dim": action_dim or agent.action_dim}
        agent = dataclasses.replace(agent, **sizes)
        state, replay = td.fresh_state(agent, random_streams(0))["train"], filled_replay(agent, n)
        obs = np.random.default_rng(1).standard_normal((n, agent.obs_dim)).astype(np.float32)
        prev_mean, first = jnp.zeros((n, agent.horizon, agent.action_dim)), np.zeros(n, bool)

        def update():
            nonlocal state  # the one passed in is consumed
            state, info = td.train(agent, state, replay, num_updates=1)
            return state, info

        def plan():
            return td.act(agent, state.params, obs, prev_mean, first, key, explore=True)

        first_call = {"update": first_call_s(update), "plan": first_call_s(plan)}
        loop = None
        if obs_dim is None and action_dim is None:
            loop, state = loop_decisions_per_s(agent, n, state, envs, loop_s)
        memory = memory_mb()  # before the products below take theirs

    traced_update = td.train.trace(agent, state, replay, num_updates=1)
    traced_plan = td.act.trace(agent, state.params, obs, prev_mean, first, key, explore=True)
    products = {"update": count_products(traced_update.jaxpr), "plan": count_products(traced_plan.jaxpr)}
    update_noise = jax.jit(partial(td.update_noise, agent))
    plan_noise = jax.jit(partial(td.plan_noise, agent, n=n))
    timed = {
        "unit": square_product(UNIT, "float32"),
        "update": update,
        "plan": plan,
        "update_products": products_alone(products["update"]),
        "plan_products": products_alone(products["plan"]),
        "update_draws": lambda: update_noise(key),
        "plan_draws": lambda: plan_noise(key),
    }
    peak_side = UNIT if jax.default_backend() == "cpu" else 8192
    if (peak_side, agent.compute_dtype) != (UNIT, "float32"):
        timed["peak"] = square_product(peak_side, agent.compute_dtype)
    times = interleave(timed, repeats)
    gflop = {name: total_gflop(counted) for name, counted in products.items()}
    peak = 2 * peak_side**3 / 1e6 / float(np.median(times.get("peak", times["unit"])))
    names = ("model_size", "num_envs", "compute_dtype", "horizon", "batch_size", "num_samples")
    return {
        **{name: settings(args)[name] for name in names},
        **sizes,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        **figures(n, times, gflop, first_call, peak),
        "loop_decisions_per_s": loop, **memory, "rounds": len(times["unit"]),
        "device": jax.devices()[0].device_kind, "cpu_cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        "jax_version": jax.__version__,
    }  # fmt: skip


def square_product(side: int, dtype: str) -> Callable[[], jax.Array]:
    matrix, square = jax.random.normal(jax.random.key(0), (side, side), dtype), jax.jit(lambda a: a @ a)
    return lambda: square(matrix)


def figures(num_envs: int, times, gflop, first_call, peak: float) -> dict[str, float]:
    """The figures that follow from the times (milliseconds per round): medians, and medians of a round's ratios."""

    def median(values) -> float:
        return float(np.median(values))

    row = {"unit_ms": median(times["unit"]), "peak_gflops_per_s": peak}
    for part in ("update", "plan"):
        ms = median(times[part])
        shares = {k: median(times[f"{part}_{k}"] / times[part]) for k in ("products", "draws")}
        row |= {
            f"{part}_ms": ms,
            f"{part}_units": median(times[part] / times["unit"]),
            f"{part}_gflop": gflop[part],
            f"{part}_gflops_per_s": gflop[part] / ms * 1e3,
            f"{part}_share_of_peak": gflop[part] / ms * 1e3 / peak,
            f"{part}_products_ms": median(times[f"{part}_products"]),
            f"{part}_draws_ms": median(times[f"{part}_draws"]),
            f"{part}_products_share": shares["products"],
            f"{part}_draws_share": shares["draws"],
            f"{part}_rest_share": 1 - sum(shares.values()),
            f"{part}_compile_s": max(0.0, first_call[part] - ms / 1e3),
        }
    step = {k: num_envs * row[f"update_{k}"] + row[f"plan_{k}"] for k in ("ms", "gflop", "products_ms", "draws_ms")}
    return row | {
        "step_ms": step["ms"],
        "step_gflop": step["gflop"],
        "step_gflops_per_s": step["gflop"] / step["ms"] * 1e3,
        "share_of_peak": step["gflop"] / step["ms"] * 1e3 / peak,
        "products_share": step["products_ms"] / step["ms"],
        "draws_share": step["draws_ms"] / step["ms"],
        "compile_s": row["update_compile_s"] + row["plan_compile_s"],
        "decisions_per_s": 1e3 * num_envs / step["ms"],
    }


# ----------------------------------------------------------------------------------------------------------- Report
def table(rows: list[dict[str, Any]]) -> str:
    """The figures as one Markdown table, three lines per configuration: update, plan, step of all environments."""
    head = ["model", "envs", "type", "", "ms", "units", "GFLOP", "GFLOP/s", "of peak", "products", "draws", "rest"]
    head += ["compile s", "decisions/s", "in the loop", "peak RSS MB"]
    lines = [head]
    for r in rows:
        for part in ("update", "plan"):
            lines.append(
                [f"{r['model_size']}M", str(r["num_envs"]), r["compute_dtype"], part]
                + [f"{r[f'{part}_{k}']:.{d}f}" for k, d in (("ms", 1), ("units", 2), ("gflop", 1), ("gflops_per_s", 0))]
                + [f"{r[f'{part}_{k}']:.0%}" for k in ("share_of_peak", "products_share", "draws_share", "rest_share")]
                + [f"{r[f'{part}_compile_s']:.1f}", "", "", ""]
            )
        loop = r["loop_decisions_per_s"]
        shares = r["share_of_peak"], r["products_share"], r["draws_share"], 1 - r["products_share"] - r["draws_share"]
        lines.append(
            ["", "", "", "step", f"{r['step_ms']:.1f}", f"{r['step_ms'] / r['unit_ms']:.2f}", f"{r['step_gflop']:.1f}"]
            + [f"{r['step_gflops_per_s']:.0f}", *(f"{share:.0%}" for share in shares), f"{r['compile_s']:.1f}"]
            + [f"{r['decisions_per_s']:.2f}", "" if loop is None else f"{loop:.2f}", f"{r['peak_rss_mb']:.0f}"]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * (w + 1) + ":" for w in widths]
    text = ["|" + "|".join(f" {c:>{w}} " for c, w in zip(line, widths, strict=True)) + "|" for line in lines]
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]])


def as_json(rows: list[dict[str, Any]]) -> str:
    """All rows under `rows`; the figures of a single configuration stand at the top too."""
    return json.dumps((rows[0] if len(rows) == 1 else {}) | {"rows": rows}, indent=2) + "\n"


def main(args: Args) -> None:
    sizes = {name: getattr(args, name) for name in ("horizon", "batch_size", "num_samples")}
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    rows = []
    for size, n, dtype in itertools.product(args.model_size, args.num_envs, args.compute_dtype):
        print(f"measuring {size}M, {n} environment(s), {dtype}", file=sys.stderr, flush=True)
        agent = td.Agent(model_size=size, compute_dtype=dtype, **sizes)
        config = td.Args(task=args.task, agent=agent, num_envs=n)
        # a process each and no cache, so that compile times and peak memory are the configuration's own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(measure, config, args.obs_dim, args.action_dim, args.repeats).result())
    first = rows[0]
    print(f"{first['obs_dim']} observations, {first['action_dim']} actions, ", end="")
    print(f"horizon {args.horizon}, batch {args.batch_size}, {args.num_samples} samples; ", end="")
    print(f"JAX {first['jax_version']}, {first['device']}, {first['cpu_cores']} cores, ", end="")
    print(f"load average {first['load_average']:.1f}")
    print(f"unit (2048^3 float32 product) {first['unit_ms']:.2f} ms; ", end="")
    print(f"peak in {first['compute_dtype']} {first['peak_gflops_per_s']:.0f} GFLOP/s\n")
    print(table(rows))
    if args.json:
        Path(args.json).write_text(as_json(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
