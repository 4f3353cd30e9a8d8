"""Speed of tdmpc2_jax_mt.py: updates, the tiers that batches come from, and planning for many tasks at once.

    python benchmarks/speed_multitask.py --json speed_multitask.json
    python benchmarks/speed_multitask.py --model-size 5 48 317 --dataset-gb 21 --storage-dtype float16      # on a GPU

`updates`: one update on a batch that lies in device memory, for every model size, beside a 2048^3 float32 product of
the same round (the `unit`); its GFLOP are those of the matrix products in the traced program, and `10M` is how long the
paper's ten million updates would take. `tiers`: batches a second that a synthetic dataset of mt30's sizes gives from
the disk (cold: after the system was told to forget the files, where it lets us), from the machine's memory and from
device memory, alone; and updates a second of the first model size when they are fed by it, with the growth of this
process's anonymous memory since the dataset was opened. `planning`: one call for environments of all 30 tasks beside
one call for each.
"""

import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs as environments
import tdmpc2_jax_mt as mt
from benchmarks.speed import UNIT, count_products, interleave, square_product, total_gflop
from tdmpc2_support.data.device_data import Source, batch_shapes
from tdmpc2_support.devices import global_arrays, replicated
from tdmpc2_support.run.schedule import random_streams

TASKS = environments.TASK_SETS["mt30"]


@dataclasses.dataclass(frozen=True)
class Args:
    model_size: tuple[Literal[1, 5, 19, 48, 317], ...] = (1, 5, 19)
    """millions of parameters, one or several; tiers and planning are measured with the first"""
    batch_size: int = 1024
    """windows of an update"""
    dataset_gb: float = 4.0
    """size of the synthetic dataset; 0 leaves the tiers out"""
    data_dir: str | None = None
    """where it is written and removed again; the disk under test"""
    storage_dtype: Literal["files", "float16"] = "files"
    """type of the numbers in device memory"""
    readers: int = 4
    """threads that read ahead"""
    seconds: float = 10.0
    """time given to each tier's measurement"""
    plan: bool = True
    """measure planning, too"""
    repeats: int = 7
    """rounds, as many as fit into a minute and three at least"""
    json: str | None = None
    """write the results to this file"""


def write_dataset(folder: Path, gigabytes: float) -> None:
    """Random episodes of mt30 in files of at most 1 GB."""
    obs_size, action_size = environments.set_sizes(TASKS)
    episodes, rng = int(gigabytes * 1e9 / (501 * (4 * (obs_size + action_size + 1) + 8))), np.random.default_rng(0)
    for i, count in enumerate(np.diff(np.r_[0 : episodes : int(np.ceil(gigabytes)) * 1j + 1j].astype(int))):
        arrays = {
            "obs": rng.standard_normal((count, 501, obs_size), np.float32),
            "action": rng.uniform(-1, 1, (count, 501, action_size)).astype(np.float32),
            "reward": rng.uniform(0, 2, (count, 501)).astype(np.float32),
            "task": np.repeat(np.arange(count)[:, None] % len(TASKS), 501, 1),
        }
        environments.save_tensordict(folder / f"chunk_{i}.pt", arrays)


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def forget_files() -> bool:
    """Tells the system to drop what it has cached of files; False where it does not let us."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def mesh_of_all() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()), "devices")


class Learner:
    """A model with its compiled update."""

    def __init__(self, agent: mt.Agent, source: Source | None = None):
        self.agent = agent
        self.mesh = mesh_of_all()
        self.tasks = global_arrays(mt.make_tasks(agent, TASKS), replicated(self.mesh))
        shapes = source.shapes() if source else self.batch_shapes()
        self.program, places = mt.compile_train(mt.Args(agent=agent), agent, self.mesh, self.tasks, shapes)
        places = jax.tree.map(lambda x: x.sharding, places)
        self.state = jax.jit(lambda: mt.fresh_state(agent, random_streams(1)), out_shardings=places)()

    def update(self, batch) -> dict[str, jax.Array]:
        self.state, info = self.program(self.state, batch)
        return info

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        agent = self.agent
        return batch_shapes(agent.obs_dim, agent.action_dim, agent.batch_size, agent.horizon, self.mesh)

    def gflop(self) -> float:
        traced = jax.make_jaxpr(partial(mt.train, self.agent, self.mesh))(self.tasks, self.state, self.batch_shapes())
        return total_gflop(count_products(traced.jaxpr))


def random_batch(learner: Learner) -> dict[str, jax.Array]:
    agent, rng = learner.agent, np.random.default_rng(0)
    H, B = agent.horizon, agent.batch_size
    arrays = {
        "obs": rng.standard_normal((H + 1, B, agent.obs_dim), np.float32),
        "action": rng.uniform(-1, 1, (H, B, agent.action_dim)).astype(np.float32),
        "reward": rng.uniform(0, 2, (H, B)).astype(np.float32),
        "task": rng.integers(len(TASKS), size=B).astype(np.int32),
    }
    return jax.tree.map(global_arrays, arrays, mt.batch_shardings(learner.mesh))


def measure_updates(args: Args) -> list[dict[str, Any]]:
    """One row for each model size."""
    rows, unit = [], square_product(UNIT, "float32")
    print(f"{'size':>5}{'update ms':>11}{'units':>8}{'a second':>10}{'GFLOP':>9}{'of peak':>9}{'10M':>11}", flush=True)
    for size in args.model_size:
        learner = Learner(mt.for_tasks(mt.Agent(model_size=size, batch_size=args.batch_size), TASKS))
        batch = random_batch(learner)
        times = interleave({"unit": unit, "update": partial(learner.update, batch)}, args.repeats)
        ms, units = np.median(times["update"]), np.median(times["update"] / times["unit"])
        gflop, peak = learner.gflop(), 2 * UNIT**3 / 1e6 / np.median(times["unit"])
        row = {"model_size": size, "update_ms": ms, "units": units, "updates_per_s": 1e3 / ms, "gflop": gflop}
        row |= {
            "share_of_peak": gflop / ms * 1e3 / peak,
            "days_for_10M": ms * 1e4 / 86400,
            "rounds": len(times["unit"]),
        }
        rows.append(row)
        print(f"{size:>5}{ms:>11.1f}{units:>8.2f}{1e3 / ms:>10.2f}{gflop:>9.1f}{row['share_of_peak']:>9.0%}", end="")
        print(f"{row['days_for_10M']:>6.1f} days", flush=True)
    return rows


def per_second(step, seconds: float) -> float:
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


def measure_tier(args: Args, disk: environments.Dataset, tier: str) -> dict[str, float]:
    """Batches a second, updates a second that are fed by them, and the memory that this took."""
    agent = mt.for_tasks(mt.Agent(model_size=args.model_size[0], batch_size=args.batch_size), TASKS)
    source = Source(disk, tier, args.storage_dtype, mesh_of_all(), agent.batch_size, agent.horizon)
    learner = Learner(agent, source)
    source.load()
    batches = source.batches(seed=1, first=0, readers=args.readers)
    if tier == "device":
        draw, keys = jax.jit(mt.sample, static_argnums=0), map(jax.random.key, itertools.count())
        alone = per_second(lambda: draw(agent, next(batches), next(keys)), args.seconds)
    else:
        alone = per_second(lambda: next(batches), args.seconds)
    fed = per_second(lambda: learner.update(next(batches))["total_loss"], args.seconds)
    batches.close()
    return {"batches_per_s": alone, "updates_per_s": fed, "anonymous_mb": anonymous_mb()}


def measure_tiers(args: Args) -> list[dict[str, Any]]:
    """One row for each tier."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.data_dir) as folder:
        write_dataset(Path(folder), args.dataset_gb)
        start_mb = anonymous_mb()
        disk = environments.load_dataset("mt30", folder)
        for tier in ("disk, cold", "disk", "host", "device"):
            if tier == "disk, cold" and not forget_files():
                continue
            row = {"tier": tier} | measure_tier(args, disk, tier.split(",")[0])
            rows.append(row | {"grown_mb": row["anonymous_mb"] - start_mb})
            print(f"{tier:<12}{row['batches_per_s']:>12.1f}{row['updates_per_s']:>12.2f}", end="")
            print(f"{row['anonymous_mb']:>14.0f}", flush=True)
    return rows


def measure_planning(args: Args) -> dict[str, float]:
    """One call for 30 environments beside 30 calls for one."""
    agent = mt.for_tasks(mt.Agent(model_size=args.model_size[0]), TASKS)
    tasks = mt.make_tasks(agent, TASKS)
    params = jax.jit(partial(mt.init_params, agent))(jax.random.key(0))
    obs = np.random.default_rng(0).standard_normal((len(TASKS), agent.obs_dim)).astype(np.float32)

    def plan(rows: np.ndarray):
        prev_mean = jnp.zeros((len(rows), agent.horizon, agent.action_dim))
        first, key = np.zeros(len(rows), bool), jax.random.key(1)
        action, _, _ = mt.act(agent, tasks, params, obs[rows], rows, prev_mean, first, key, explore=False)
        return np.asarray(action)  # an environment waits for it

    everything = np.arange(len(TASKS))
    one_by_one = lambda: [plan(everything[i : i + 1]) for i in everything]  # noqa: E731
    calls = {"batched": lambda: plan(everything), "one by one": one_by_one}
    times = interleave(calls, args.repeats)
    ratio = float(np.median(times["one by one"] / times["batched"]))
    row = {f"{name.replace(' ', '_')}_ms": float(np.median(ms)) for name, ms in times.items()} | {"ratio": ratio}
    print(f"30 tasks: batched {row['batched_ms']:.0f} ms, one by one {row['one_by_one_ms']:.0f} ms: {ratio:.2f} times")
    return row


def main(args: Args) -> None:
    results: dict[str, Any] = {"arguments": dataclasses.asdict(args), "jax_version": jax.__version__}
    device = jax.devices()[0].device_kind
    results |= {"device": device, "devices": len(jax.devices()), "cpu_cores": os.cpu_count()}
    if args.dataset_gb:  # first: memory of later measurements is not given back
        print(f"{'tier':<12}{'batches/s':>12}{'updates/s':>12}{'anonymous MB':>14}", flush=True)
        results["tiers"] = measure_tiers(args)
    results["updates"] = measure_updates(args)
    if args.plan:
        results["planning"] = measure_planning(args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
