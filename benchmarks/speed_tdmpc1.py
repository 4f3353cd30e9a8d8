"""Speed of tdmpc_jax.py: an update and a plan at the original's sizes, what the schedule of the horizon costs, and what
drawing by priorities costs in replays of different sizes.

    python benchmarks/speed_tdmpc1.py
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/speed_tdmpc1.py --cpu-time --json FILE

An update is `tdmpc_jax.train(num_updates=1)` with a replay of a million entries, a plan is `tdmpc_jax.act`, as the
training loop calls them: 512 windows of 5 steps, 512 + 25 sequences, walker-walk's sizes. Times are medians of rounds
in which all programs take turns with a 2048^3 float32 product, the unit; units are medians of each round's ratio. GFLOP
are those of the matrix products.

`apart` are plans of programs that are compiled for one horizon, whose steps are written out; the script's one program
serves all horizons by a loop whose length only the device knows. Of the replay: `add` writes a step, `draw` draws a
batch's entries from the tree of sums, `set` writes a batch's priorities to it; `flat` draws by a running sum over all
entries instead.
"""

import dataclasses
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import tdmpc_jax as td  # noqa: E402
from benchmarks.speed import UNIT, count_products, interleave, square_product, total_gflop  # noqa: E402
from tdmpc2_support.run.schedule import random_streams  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Args:
    entries: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """sizes of replays"""
    horizons: tuple[int, ...] = (1, 2, 3, 4, 5)
    """planning horizons that are compared with programs of their own"""
    obs_dim: int = 24
    """observation size"""
    action_dim: int = 6
    """action size"""
    repeats: int = 20
    """rounds of measurement, at most"""
    limit_s: float = 60
    """seconds after which a comparison makes no further round"""
    cpu_time: bool = False
    """measure the time that the process computes instead of the clock's: on a shared machine, with one thread"""
    json: str | None = None
    """write the figures to this file"""


def clock(args: Args):
    return time.process_time if args.cpu_time else time.perf_counter


def filled_replay(agent: td.Agent, entries: int) -> td.Replay:
    """A replay of random entries, of which all are starts with priorities between 1e-3 and 10."""
    rng, empty = np.random.default_rng(0), td.init_replay(agent, entries, 1)
    obs = rng.standard_normal((entries, 1, agent.obs_dim), np.float32)
    action = rng.uniform(-1, 1, (entries, 1, agent.action_dim)).astype(np.float32)
    below, tree = 10 ** (0.6 * rng.uniform(-3, 1, entries)), []
    for level in empty.tree:
        values = np.zeros(level.shape)
        values.flat[: len(below)] = below
        tree.append(jnp.asarray(values, jnp.float32))
        below = values.sum(1)
    reward = jnp.asarray(rng.random((entries, 1), np.float32))
    filled = {"obs": jnp.asarray(obs), "action": jnp.asarray(action), "reward": reward}
    return empty._replace(**filled, tree=tuple(tree), size=jnp.int32(entries), rows=jnp.int32(entries))


def apart(horizon: int):
    """`estimate_value` of a program that knows its horizon; a drop-in."""

    def estimate_value(agent, params, z, actions, unused_horizon, eps):
        model = td.networks(agent)
        value = 0.0
        for t in range(horizon):
            value = value + agent.discount**t * model.reward.apply(params["reward"], z, actions[t])[..., 0]
            z = model.dynamics.apply(params["dynamics"], z, actions[t])
        action = td.policy(agent, params["pi"], z, eps).action
        q = td.q_values(agent, params["q"], z, action).min(0)
        return jnp.nan_to_num(value + agent.discount**horizon * q, nan=0.0)

    return estimate_value


def plans_of(agent: td.Agent, params, horizon: int):
    """Functions that plan once, by the script's program and by one of this horizon, and the latter's products."""
    obs, first = np.ones((1, agent.obs_dim), np.float32), np.zeros(1, bool)
    mean, key = jnp.zeros((1, agent.horizon, agent.action_dim)), jax.random.key(1)
    inputs = params, obs, mean, first, td.Schedule(np.array([horizon], np.int32), np.float32(agent.min_std)), key
    own = jax.jit(partial(td.act.__wrapped__, agent, explore=True))
    with mock.patch.object(td, "estimate_value", apart(horizon)):
        traced = own.trace(*inputs)
        compiled = traced.lower().compile()
    return partial(td.act, agent, *inputs, explore=True), partial(compiled, *inputs), count_products(traced.jaxpr)


def measure_agent(args: Args) -> dict[str, float]:
    """An update and plans at the original's sizes."""
    agent = td.with_task_defaults(td.Args()).agent
    agent = dataclasses.replace(agent, obs_dim=args.obs_dim, action_dim=args.action_dim)
    state = td.fresh_state(agent, random_streams(0))["train"]
    replay = filled_replay(agent, args.entries[-1])
    update_products = count_products(td.train.trace(agent, state, replay, num_updates=1).jaxpr)
    params = jax.tree.map(jnp.copy, state.params)  # the update consumes its own
    plans = {h: plans_of(agent, params, h) for h in args.horizons}

    def update():
        nonlocal state, replay  # those passed in are consumed
        state, replay, info = td.train(agent, state, replay, num_updates=1)
        return info

    timed = {"unit": square_product(UNIT, "float32"), "update": update}
    for h, (loop, own, _) in plans.items():
        timed |= {f"plan_{h}": loop, f"plan_{h}_apart": own}
    times = interleave(timed, args.repeats, args.limit_s, clock(args))
    unit = times["unit"]
    gflop = {"update": total_gflop(update_products)}
    gflop |= {f"plan_{h}": total_gflop(products) for h, (*_, products) in plans.items()}
    rows = {"unit_ms": float(np.median(unit)), "rounds": len(unit)}
    for name in gflop:
        share = gflop[name] / times[name] / (2 * UNIT**3 / 1e9 / unit)
        rows[name] = {"ms": np.median(times[name]), "units": np.median(times[name] / unit)}
        rows[name] |= {"gflop": gflop[name], "share_of_peak": np.median(share)}
        if name != "update":
            rows[name]["apart_ms"] = np.median(times[f"{name}_apart"])
            rows[name]["loop_over_apart"] = np.median(times[name] / times[f"{name}_apart"])
        rows[name] = {key: float(value) for key, value in rows[name].items()}
    return rows


def measure_replay(args: Args, entries: int) -> dict[str, float]:
    """Milliseconds of what the replay does, with so many entries."""
    agent = td.Agent(obs_dim=args.obs_dim, action_dim=args.action_dim)
    replay = filled_replay(agent, entries)
    batch, key = 512, jax.random.key(0)
    draw, flat_draw = jax.jit(td.draw, static_argnums=2), jax.jit(draw_flat, static_argnums=2)
    set_priorities = jax.jit(td.set_priorities, donate_argnums=0)
    values = replay.tree[0].ravel()[:entries]
    drawn, priority = draw(replay.tree, key, batch), jnp.ones(batch)
    tree = jax.tree.map(jnp.copy, replay.tree)
    zeros = np.zeros((1, args.obs_dim), np.float32), np.zeros((1, args.action_dim), np.float32)

    def write():
        nonlocal tree
        tree = set_priorities(tree, drawn, priority)
        return tree

    def add():
        nonlocal replay
        no = np.zeros(1, bool)
        replay = td.add(agent, replay, td.Step(*zeros, np.ones(1, np.float32), no, no))
        return replay

    inputs = jax.tree.map(jnp.copy, replay.tree)
    timed = {"draw": partial(draw, inputs, key, batch), "flat": partial(flat_draw, values, key, batch)}
    times = interleave(timed | {"set": write, "add": add}, 50 * args.repeats, args.limit_s / 4, clock(args))
    return {name: float(np.median(ms)) for name, ms in times.items()}


def draw_flat(values: jax.Array, key: jax.Array, batch_size: int) -> jax.Array:
    """The plain way: entries by a running sum over all."""
    sums = jnp.cumsum(values)
    return jnp.searchsorted(sums, jax.random.uniform(key, batch_size) * sums[-1], side="right")


def main(args: Args) -> None:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    rows = {"agent": measure_agent(args), "replay": {str(n): measure_replay(args, n) for n in args.entries}}
    device = {"device": jax.devices()[0].device_kind, "cpu_cores": os.cpu_count(), "jax_version": jax.__version__}
    rows |= device | {"load_average": os.getloadavg()[0], "cpu_time": args.cpu_time}
    kind = "of computing" if args.cpu_time else "by the clock"
    print(f"milliseconds {kind}; unit {rows['agent']['unit_ms']:.2f}, {rows['agent']['rounds']} rounds; {device}")
    print("| | ms | units | GFLOP | of peak | apart, ms | loop / apart |\n|---|---|---|---|---|---|---|")
    for name, row in rows["agent"].items():
        if isinstance(row, dict):
            line = (
                f"| {name} | {row['ms']:.1f} | {row['units']:.2f} | {row['gflop']:.1f} | {row['share_of_peak']:.0%} | "
            )
            apart_ms = f"{row['apart_ms']:.1f} | {row['loop_over_apart']:.2f} |" if "apart_ms" in row else "| |"
            print(line + apart_ms)
    print("\n| entries | draw, ms | flat, ms | set, ms | add, ms |\n|---|---|---|---|---|")
    for entries, row in rows["replay"].items():
        print(
            f"| {int(entries):,} | " + " | ".join(f"{row[name]:.3f}" for name in ("draw", "flat", "set", "add")) + " |"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
