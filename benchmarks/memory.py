"""Memory of the replay: pushes decisions through `tdmpc2_jax.add` long after the buffer is full; watches the process.

    python benchmarks/memory.py
    python benchmarks/memory.py --task dog-run --decisions 1000000 --buffer-size 100000

Every decision is a real one of the task, at random actions; every hundredth is followed by a batch from the buffer.
Prints the resident memory (and on an accelerator the device's) at regular intervals; exits with 1 if the resident
memory grows by 2% or more once the buffer is full.
"""

import dataclasses
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs as environments
import tdmpc2_jax


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"
    """task that the decisions are taken from"""
    decisions: int = 200_000
    """decisions to push"""
    buffer_size: int = 50_000
    """decisions that the replay holds"""
    report_freq: int = 20_000
    """decisions between two readings"""
    batch_size: int = 256
    """windows of a batch"""
    horizon: int = 3
    """steps of a window"""
    growth: float = 0.02
    """growth behind the full buffer that counts as not flat, as a share"""
    json: str | None = None
    """write the readings to this file"""


def readings(args: Args) -> list[dict[str, Any]]:
    """Decisions pushed, MB resident and MB on the device, at every report; printed as they come."""
    draw = jax.jit(tdmpc2_jax.sample, static_argnums=0)
    rng, process, device, rows = np.random.default_rng(0), psutil.Process(), jax.devices()[0], []
    print(f"{'decisions':>10} {'resident MB':>12} {'device MB':>10} {'seconds':>8}")
    with closing(environments.make_envs(args.task, 1, seed=0)) as envs:
        shape = envs.action_space.shape
        obs, _ = envs.reset(seed=0)
        sizes = {"obs_dim": obs.shape[1], "action_dim": shape[1]}
        agent = tdmpc2_jax.Agent(batch_size=args.batch_size, horizon=args.horizon, **sizes)
        replay = tdmpc2_jax.init_replay(agent, args.buffer_size, 1)
        action, reward, terminated = np.zeros(shape, np.float32), np.zeros(1, np.float32), np.zeros(1, bool)
        first, done, start = np.ones(1, bool), np.zeros(1, bool), time.time()
        for pushed in range(1, args.decisions + 1):
            step = tdmpc2_jax.Step(obs, action, reward, terminated, first)
            replay = tdmpc2_jax.add(agent, replay, step)
            if pushed % 100 == 0:
                jax.block_until_ready(draw(agent, replay, jax.random.key(pushed)))
            if pushed % args.report_freq == 0:
                in_use = (device.memory_stats() or {}).get("bytes_in_use")
                rows.append(
                    {
                        "decisions": pushed,
                        "rss_mb": process.memory_info().rss / 2**20,
                        "device_mb": in_use and in_use / 2**20,
                        "seconds": time.time() - start,
                    }
                )
                on_device = "-" if in_use is None else f"{in_use / 2**20:.1f}"
                print(
                    f"{pushed:>10} {rows[-1]['rss_mb']:>12.1f} {on_device:>10} {rows[-1]['seconds']:>8.1f}", flush=True
                )
            action = rng.uniform(-1, 1, shape).astype(np.float32)
            obs, reward, terminated, truncated, _ = envs.step(action)
            first, done, reward = done, terminated | truncated, reward.astype(np.float32)
    return rows


def growth_when_full(rows: list[dict[str, Any]], buffer_size: int) -> float:
    """Share by which the resident memory grew, at most, from the first reading with a full buffer."""
    full = [row["rss_mb"] for row in rows if row["decisions"] >= buffer_size]
    if len(full) < 2:
        sys.exit("error: --decisions must leave two reports behind the full buffer")
    return max(full) / full[0] - 1


def main(args: Args) -> None:
    rows = readings(args)
    growth = growth_when_full(rows, args.buffer_size)
    flat = growth < args.growth
    print(f"{args.task}, buffer of {args.buffer_size}: ", end="")
    print(f"{'flat' if flat else 'NOT flat'}, {growth:+.2%} at most since the buffer was full")
    if args.json:
        results = dataclasses.asdict(args) | {"growth_when_full": growth, "flat": flat, "rows": rows}
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
