"""Functions timed in turn with a large matrix product, and how much they compute: what speed.py is made of.

A call's figures are milliseconds, medians over rounds in which everything takes turns; `units`: the same in those of a
2048^3 float32 product of that round; GFLOP of the matrix products in its traced program and their share of the `peak`,
the rate of a large product (the unit on a CPU, 8192^3 elsewhere); `products` and `draws`: the shares of its time that
the same products, and its random numbers, take alone; `rest`: what is left, which is elementwise work, memory traffic
and dispatch; `compile_s`: what its first call takes longer.
"""

import contextlib
import itertools
import math
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

UNIT = 2048  # side of the float32 product in which times are quoted


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
def square_product(side: int, dtype: str) -> Callable[[], jax.Array]:
    matrix, square = jax.random.normal(jax.random.key(0), (side, side), dtype), jax.jit(lambda a: a @ a)
    return lambda: square(matrix)


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


class Call(NamedTuple):
    """What is timed."""

    function: Callable[[], Any]
    traced: Any = None  # its program, whose products are counted
    draws: Callable[[], Any] | None = None  # makes its random numbers and nothing else
    gflop: float | None = None  # where the program does not tell
    beside: str = ""  # name of the call that it is compared with


def measure(
    calls: dict[str, Call],
    repeats: int,
    limit_s=60.0,
    clock=time.perf_counter,
    shares=True,
    dtype="float32",
    turn=None,
    in_a_row: str = "",
) -> list[dict[str, Any]]:
    """A row of figures for each call. `turn` (a lock) is held while time is measured, not while
    programs are compiled.

    Args:
        shares: also time the products and the draws alone.
        dtype: of the large product whose rate is the peak.
        in_a_row: name of a call that is also made 50 times of which only the last is waited for.
    """
    first = {name: first_call_s(call.function) for name, call in calls.items()}
    memory = memory_mb()  # before the products below take theirs
    products = {name: count_products(call.traced.jaxpr) for name, call in calls.items() if call.traced is not None}
    timed = {"unit": square_product(UNIT, "float32")} | {name: call.function for name, call in calls.items()}
    if shares:
        timed |= {f"{name}, products": products_alone(counted) for name, counted in products.items()}
        timed |= {f"{name}, draws": call.draws for name, call in calls.items() if call.draws}
    side = UNIT if jax.default_backend() == "cpu" else 8192
    if (side, dtype) != (UNIT, "float32"):
        timed["peak"] = square_product(side, dtype)
    jax.block_until_ready([function() for function in timed.values()])
    with turn or contextlib.nullcontext():
        times = interleave(timed, repeats, limit_s, clock)
        if in_a_row:
            start = clock()
            jax.block_until_ready([calls[in_a_row].function() for _ in range(50)])
            row_ms = (clock() - start) / 50 * 1e3
    peak = 2 * side**3 / 1e6 / median(times.get("peak", times["unit"]))  # GFLOP/s
    rows = []
    for name, call in calls.items():
        ms = times[name]
        row = {"call": name, "ms": median(ms), "units": median(ms / times["unit"])}
        gflop = total_gflop(products[name]) if name in products else call.gflop
        if gflop is not None:
            rate = gflop / row["ms"] * 1e3
            row |= {"gflop": gflop, "gflops_per_s": rate, "of_peak": rate / peak}
        for part in ("products", "draws"):
            if f"{name}, {part}" in times:
                row[part] = median(times[f"{name}, {part}"] / ms)
        if "products" in row:
            row["rest"] = 1 - row["products"] - row.get("draws", 0.0)
        if call.beside:
            row["times_as_long"] = median(ms / times[call.beside])
        if name == in_a_row:
            row["in_a_row_ms"] = row_ms
        row["compile_s"] = max(0.0, first[name] - row["ms"] / 1e3)
        rows.append(row | {"unit_ms": median(times["unit"]), "peak_gflops_per_s": peak, "rounds": len(ms)} | memory)
    return rows


def median(values) -> float:
    return float(np.median(values))


def per_second(step: Callable[[], Any], seconds: float) -> float:
    """Calls a second, after two that are not counted; at most eight are not waited for."""
    results = [step() for _ in range(2)]
    jax.block_until_ready(results)
    start = time.perf_counter()
    for done in itertools.count(1):
        results = [*results[-7:], step()]
        jax.block_until_ready(results[0])
        if time.perf_counter() - start > seconds:
            jax.block_until_ready(results)
            return done / (time.perf_counter() - start)


def table(rows: list[dict[str, Any]], hidden: tuple[str, ...] = ()) -> str:
    """Rows of figures in Markdown, a column for each name that any of them has."""
    names = [name for name in dict.fromkeys(itertools.chain(*rows)) if name not in hidden]
    lines = [names] + [[as_text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    text = ["| " + " | ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *text[1:]])


def as_text(value: Any) -> str:
    """A figure with three digits or more, nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
