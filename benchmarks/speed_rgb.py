"""Speed of tdmpc2_jax_rgb.py: pictures, the encoder, updates, plans, and what the replay takes.

    python benchmarks/speed_rgb.py --json speed_rgb.json
    python benchmarks/speed_rgb.py --model-size 5 --compute-dtype bfloat16                                    # on a GPU

`pictures`: decisions a second of one environment without an agent, seen as states, as pictures, and as pictures without
shadows and reflections, and the share of values that those change. `encoder`: B stacks encoded, and gradients of it, as
the script does it on this backend, beside XLA's convolutions in either layout, all stacks at once or eight at a time as
the script does on a CPU; GFLOP are those of the convolutions. `update` and `plan`: `train(num_updates=1)` and `act`, as
the training loop calls them; the `unit` is a 2048^3 float32 product of the same round; `draw`: a batch, still of single
pictures, from a replay of 10,000 decisions. `replay`: bytes of an entry, microseconds to write one.
"""

import dataclasses
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs as environments
import tdmpc2_jax_rgb as rgb
from benchmarks.speed import UNIT, interleave, square_product
from tdmpc2_support.run.schedule import random_streams

LAYERS = ((7, 29), (5, 13), (3, 6), (3, 4))  # size of the kernel, height of what comes out


@dataclasses.dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = ("walker-walk", "reacher-easy", "finger-spin", "mw-reach")
    """tasks whose pictures are timed"""
    model_size: tuple[Literal[1, 5, 19, 48, 317], ...] = (1, 5)
    """millions of parameters, one or several"""
    batch_size: int = 256
    """windows of an update"""
    num_samples: int = 512
    """action sequences per iteration of the planner"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the inputs of matrix products and convolutions"""
    repeats: int = 7
    """rounds, as many as fit into a minute and three at least"""
    json: str | None = None
    """write the figures to this file"""


def gflop(channels: int, forward: int, backward: int) -> float:
    """Of the convolutions in encoding so many stacks and, for so many of them, the gradients (of the pictures none)."""
    sizes = [9, channels, channels, channels]
    layers = [2 * k * k * c * channels * o * o / 1e9 for (k, o), c in zip(LAYERS, sizes, strict=True)]
    return sum(layers) * (forward + 2 * backward) - layers[0] * backward


def measure_pictures(task: str, seconds: float = 2.0) -> dict:
    """Decisions a second with each kind of observation, and the share of values that shadows and reflections change."""
    row, seen = {"task": task}, {}
    for name, options in (
        ("state", {}),
        ("pictures", {"obs": "rgb"}),
        ("no shadows", {"obs": "rgb", "shadows": False}),
    ):
        env = environments.make_env(task, seed=0, **options)
        seen[name], _ = env.reset()
        rng, steps = np.random.default_rng(0), 0
        for _ in range(3):
            env.step(env.action_space.low)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            *_, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            steps += 1
            if truncated:
                env.reset()
        row[name] = steps / (time.perf_counter() - start)
        env.close()
    row["changed"] = float((seen["pictures"] != seen["no shadows"]).mean())
    return row


def encoders(agent: rgb.Agent, params) -> dict:
    """Functions that encode a batch of random stacks in each way, and that compute gradients of it."""
    rng = np.random.default_rng(0)
    stacks = jnp.asarray(rng.integers(0, 256, (agent.batch_size, 64, 64, 9), dtype=np.uint8))
    shift = jnp.asarray(rng.integers(0, 7, (agent.batch_size, 2)))

    def channels_last(x, kernel, stride):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)

    def channels_first(x, kernel, stride):
        x, kernel, layout = jnp.moveaxis(x, -1, 1), jnp.transpose(kernel, (3, 2, 0, 1)), ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)
        return jnp.moveaxis(y, 1, -1)

    ways = {"ours": rgb.encode}
    for name, convolve in (("NHWC", channels_last), ("NCHW", channels_first)):
        ways |= {name: partial(encode_with, convolve, 0), f"{name} by 8": partial(encode_with, convolve, 8)}
    functions = {}
    for name, encode in ways.items():

        def forward(p, encode=encode):
            return encode(agent, p, stacks, shift)

        functions[f"{name} forward"] = partial(jax.jit(forward), params["encoder"])
        loss = jax.grad(lambda p, forward=forward: (forward(p) ** 2).sum())
        functions[f"{name} gradient"] = partial(jax.jit(loss), params["encoder"])
    return functions


def encode_with(convolve, at_once: int, agent: rgb.Agent, params, stacks, shift):
    """rgb.encode with another convolution, so many stacks at once, or all of them."""

    def one(stack_and_shift):
        return rgb.networks(agent).encoder.apply(params, rgb.shift_stack(*stack_and_shift)[None])[0]

    ours, rgb.convolve = rgb.convolve, convolve
    try:
        flat = stacks, shift
        return jax.lax.map(one, flat, batch_size=at_once) if at_once else jax.vmap(one)(flat)
    finally:
        rgb.convolve = ours


def filled_replay(agent: rgb.Agent, steps: int = 10_000) -> rgb.Replay:
    """A replay of random pictures."""
    rng = np.random.default_rng(0)
    replay = rgb.init_replay(agent, steps, 1)
    for i in range(steps):
        obs = rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
        replay = rgb.add(agent, replay, step_of(agent, obs, first=i == 0))
    return replay


def step_of(agent: rgb.Agent, obs: np.ndarray, first: bool) -> rgb.Step:
    """An entry of one environment with this picture [1, 64, 64, 3]."""
    action = np.zeros((1, agent.action_dim), np.float32)
    return rgb.Step(obs, action, np.zeros(1, np.float32), terminated=np.zeros(1, bool), first=np.array([first]))


def measure_model(args: Args, size: int) -> dict:
    """Milliseconds, units and rates of encoder, update and plan of a model size."""
    options = {"batch_size": args.batch_size, "num_samples": args.num_samples, "compute_dtype": args.compute_dtype}
    agent = rgb.with_model_size(rgb.Agent(model_size=size, action_dim=6, **options))
    fresh = rgb.fresh_state(agent, random_streams(0))
    learner, params = [jax.tree.map(jnp.copy, fresh["train"])], fresh["train"].params
    replay, key, first = filled_replay(agent), jax.random.key(0), np.zeros(1, bool)
    obs, mean = np.zeros((1, 64, 64, 9), np.uint8), jnp.zeros((1, agent.horizon, 6))

    def update():
        learner[0], info = rgb.train(agent, learner[0], replay, num_updates=1)
        return info

    draw = jax.jit(rgb.sample, static_argnums=0)
    functions = {"unit": square_product(UNIT, "float32"), **encoders(agent, params), "update": update}
    functions["plan"] = lambda: rgb.act(agent, params, obs, mean, first, key, explore=True)
    functions["draw"] = lambda: draw(agent, replay, key)
    times = interleave(functions, args.repeats)
    peak = 2 * UNIT**3 / 1e6 / np.median(times["unit"])  # GFLOP/s
    channels, B = rgb.networks(agent).encoder.channels, args.batch_size
    row = {"model_size": size, "channels": channels, "unit_ms": np.median(times["unit"]), "peak_gflop_per_s": peak}
    for name, ms in times.items():
        row[name] = {"ms": np.median(ms), "units": np.median(ms / times["unit"])}
        if name.endswith(("forward", "gradient")):
            work = gflop(channels, B, B * name.endswith("gradient"))
            row[name] |= {"gflop": work, "of_peak": work / np.median(ms) * 1e3 / peak}
    row["encoder_gflop_of_update"] = gflop(channels, (agent.horizon + 1) * B, B)
    return row


def measure_replay() -> dict:
    """Bytes of an entry in a replay of a million, and microseconds to write one."""
    agent = rgb.Agent(action_dim=6)
    shapes = jax.eval_shape(lambda: rgb.init_replay(agent, 1_000_000, 1))
    replay = filled_replay(agent)
    step = step_of(agent, np.zeros((1, 64, 64, 3), np.uint8), first=False)
    start = time.perf_counter()
    for _ in range(500):
        replay = rgb.add(agent, replay, step)
    jax.block_until_ready(replay)
    microseconds = (time.perf_counter() - start) / 500 * 1e6
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / 1_000_000
    return {"bytes_per_entry": size, "write_us": microseconds}


def main(args: Args) -> None:
    results = {"arguments": dataclasses.asdict(args), "jax_version": jax.__version__}
    results |= {"device": jax.devices()[0].device_kind, "cpu_cores": len(os.sched_getaffinity(0))}
    results["pictures"] = []
    print(f"{'decisions/s':<16}{'states':>10}{'pictures':>10}{'no shadows':>12}{'changed':>9}")
    for task in args.tasks:
        row = measure_pictures(task)
        results["pictures"].append(row)
        rates = f"{row['state']:>10.0f}{row['pictures']:>10.0f}{row['no shadows']:>12.0f}"
        print(f"{task:<16}{rates}{row['changed']:>9.1%}", flush=True)
    results["replay"] = measure_replay()
    print("replay: {bytes_per_entry:.0f} bytes an entry, {write_us:.0f} µs to write one".format(**results["replay"]))
    results["models"] = []
    for size in args.model_size:
        row = measure_model(args, size)
        results["models"].append(row)
        print(f"{size}M, {row['channels']} channels, peak {row['peak_gflop_per_s']:.0f} GFLOP/s")
        for name, figures in row.items():
            if isinstance(figures, dict):
                share = (
                    f"{figures['gflop']:>9.1f} GFLOP{figures['of_peak']:>7.0%} of peak" if "gflop" in figures else ""
                )
                print(f"  {name:<20}{figures['ms']:>9.1f} ms{figures['units']:>8.2f} units{share}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
