"""What a script's updates and plans cost on this machine, part by part, and what bounds them.

    python benchmarks/speed.py tdmpc2_jax                                                  # the 5M model on walker-walk
    python benchmarks/speed.py tdmpc2_jax --task dog-run --model-size 5 48 --num-envs 1 8 32 --compute-dtype bfloat16
    python benchmarks/speed.py tdmpc2_jax tdmpc2_jax_rgb tdmpc_jax --parts calls loop --together       # on a GPU: minutes

| part | of | what is measured |
|---|---|---|
| calls | all but _device | an update and a plan, as the training loop calls them; a `step` is what both cost for all environments |
| loop | tdmpc2_jax, _device | decisions a second with environments really stepped, in the order of the training loop; the one in JAX with everything in one program, for one run and for --num-seeds side by side, on pendulums that cost nothing |
| encoder | _rgb | stacks encoded as the script does it, and by XLA's convolutions in either layout, all at once or eight at a time |
| pictures | _rgb | decisions a second seen as states, as pictures, and without shadows and reflections; values that these change |
| replay | _rgb, tdmpc_jax | a step written, a batch drawn; of the first version's tree for --entries, `flat` by a running sum over all instead |
| horizons | tdmpc_jax | plans for --horizons by its one program, and `apart` by programs that are compiled for one horizon |
| tiers | _mt | batches and updates a second from disk (cold: the system was told to forget the files), memory and device |
| planning | _mt | one call for environments of all 30 tasks beside one call for each |
| teacher | _mt | an update with and without a teacher of --teacher-size million random parameters |
| plans | _diffusion | the ways to plan, for one environment |

What the columns mean stands in timing.py. Neither milliseconds nor units compare between machines: interleaved.py
compares programs on one. Every row is measured in a process of its own without a compile cache, so that memory and
compile times are its own. With --together all of them compile side by side and are timed one at a time.
"""  # noqa: E501

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # rows share the device

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import envs as environments
from benchmarks.programs import ACTION, OBS, PROGRAMS, Program, filled_replay, filled_tree
from benchmarks.timing import Call, count_products, measure, per_second, table, total_gflop
from tdmpc2_support.devices import committed, global_arrays, replicated
from tdmpc2_support.run.schedule import random_streams

DEVICE = "tdmpc2_jax_device"
NAMES = (*PROGRAMS, DEVICE)
HIDDEN = (
    "script",
    "unit_ms",
    "peak_gflops_per_s",
    "rounds",
    "parameters",
    "peak_device_mb",
    "device",
)  # of the table, not of the file
MT30 = environments.TASK_SETS["mt30"]


@dataclasses.dataclass(frozen=True)
class Args:
    scripts: tyro.conf.Positional[tuple[Literal[NAMES], ...]]
    parts: tuple[str, ...] = ()  # only these of the table above
    model_size: tuple[Literal[1, 5, 19, 48, 317], ...] = (5,)  # millions of parameters, one or several
    num_envs: tuple[int, ...] = (1,)  # environments planned for at once, one or several numbers
    compute_dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)  # of matrix products, one or both
    fields: tuple[str, ...] = ()  # further settings of the agent NAME=VALUE, as batch_size=128
    task: str = "walker-walk"  # of tdmpc2_jax: task whose sizes are measured, and that the loop steps
    repeats: int = 20  # rounds of measurement, at most
    limit_s: float = 60  # seconds after which no further round begins, but for the first three
    seconds: float = 5  # for each rate: of the loop, of pictures, of tiers
    cpu_time: bool = False  # what the process computes instead of the clock's time: on a shared machine, one thread
    shares: bool = True  # also time the products and the draws of every call alone
    together: bool = False  # compile all rows side by side
    turns: int = 1  # how often all of it is measured
    tasks: tuple[str, ...] = ("walker-walk", "reacher-easy", "finger-spin", "mw-reach")  # pictures: of which
    horizons: tuple[int, ...] = (1, 2, 3, 4, 5)  # horizons
    entries: tuple[int, ...] = (10_000, 100_000, 1_000_000)  # replay: sizes of the first version's
    num_seeds: int = 3  # loop: runs side by side
    dataset_gb: float = 4.0  # tiers: size of the synthetic dataset
    data_dir: str | None = None  # tiers: where it is written and removed again, the disk under test
    storage_dtype: Literal["files", "float16"] = "files"  # tiers: of the numbers in device memory
    readers: int = 4  # tiers: threads that read ahead
    teacher_size: Literal[1, 5, 19, 48, 317] = 317  # teacher: millions of parameters
    json: str | None = None  # write the figures to this file


@dataclasses.dataclass
class Setting:
    """What is measured in one process."""

    args: Args
    script: str
    model_size: int
    num_envs: int
    compute_dtype: str

    @property
    def own(self) -> dict[str, Any]:
        """Settings of the agent from --fields."""
        return {name: json.loads(value) for name, _, value in (text.partition("=") for text in self.args.fields)}

    @property
    def fields(self) -> dict[str, Any]:
        """All settings of the agent."""
        return {"model_size": self.model_size, "compute_dtype": self.compute_dtype} | self.own

    @functools.cached_property
    def module(self):
        return importlib.import_module(self.script)

    def program(self, call: str, n: int = 1, **fields) -> Program:
        return PROGRAMS[self.script](self.module, call, n, 10_000, **self.fields | fields | self.own)

    def measure(self, calls: dict[str, Call], turn, **options) -> list[dict[str, Any]]:
        args = self.args
        clock = time.process_time if args.cpu_time else time.perf_counter
        common = {"clock": clock, "shares": args.shares, "dtype": self.compute_dtype, "turn": turn}
        return measure(calls, args.repeats, args.limit_s, **common | options)


# -------------------------------------------------------------------------------------------------------- Every script
def call_of(program: Program, draws: Callable[[], Any] | None = None, countable: bool = True) -> Call:
    """A plan, or updates one after the other: what an update consumes is replaced by what it returns in its place."""
    inputs = list(committed(jax.jit(program.inputs)()))
    traced = program.trace(*inputs) if countable else None
    start = program.state_at

    def update():
        *new, info = program(*inputs)
        inputs[start : start + len(new)] = new
        return info

    return Call(partial(program, *inputs) if start is None else update, traced, draws)


def calls(setting: Setting, turn) -> list[dict[str, Any]]:
    """An update, a plan for all environments, and a step of all of them with one update each."""
    n = setting.num_envs
    of_task = {}
    if setting.script == "tdmpc2_jax":
        with contextlib.closing(environments.make_envs(setting.args.task, 1)) as envs:
            of_task = {"obs_dim": envs.single_observation_space.shape[0]}
            of_task["action_dim"] = envs.single_action_space.shape[0]
        of_task["can_terminate"] = environments.task_spec(setting.args.task).can_terminate
    update, plan = setting.program("update", n, **of_task), setting.program("plan", n, **of_task)
    state = jax.eval_shape(update.inputs)[update.state_at]
    parameters = sum(x.size for x in jax.tree.leaves(getattr(state, "params", state)))
    timed = {
        "update": call_of(update, draws_of(setting, "update_noise", update)),
        # the first version's plan is a loop whose length only the device knows: `horizons` counts its products
        "plan": call_of(plan, draws_of(setting, "plan_noise", plan, n=n), setting.script != "tdmpc_jax"),
    }
    rows = setting.measure(timed, turn, in_a_row="update")
    step = {"call": "step"} | {k: n * rows[0][k] + rows[1][k] for k in ("ms", "units", "gflop") if k in rows[1]}
    if "gflop" in step:
        step["gflops_per_s"] = step["gflop"] / step["ms"] * 1e3
        step["of_peak"] = step["gflops_per_s"] / rows[0]["peak_gflops_per_s"]
    step["decisions_per_s"] = 1e3 * n / step["ms"]
    return [row | {"parameters": parameters} for row in (*rows, step)]


def draws_of(setting: Setting, name: str, program: Program, **options) -> Callable[[], Any] | None:
    """A function that makes a program's random numbers, where its script has one."""
    noise = getattr(setting.module, name, None)
    return noise and partial(jax.jit(partial(noise, program.agent, **options)), jax.random.key(1))


# ---------------------------------------------------------------------------------------------------------- The loop
def loop(setting: Setting, turn) -> list[dict[str, Any]]:
    """The training loop, with nothing logged."""
    args, n = setting.args, setting.num_envs
    import tdmpc2_jax as td

    agent = td.Agent(**setting.fields)
    rows = []
    if setting.script == DEVICE:
        rows += [compiled(td, agent, n, seeds, args.seconds, turn) for seeds in {1, args.num_seeds}]
    task = "Pendulum-v1" if setting.script == DEVICE else args.task
    with contextlib.closing(environments.make_envs(task, n, seed=0)) as envs:
        rows.insert(0, step_by_step(td, td.for_task(agent, task, envs), envs, args.seconds, turn))
    return rows


def rate(advance: Callable[[], Any], decisions: int, seconds: float, turn) -> dict[str, float]:
    """Decisions a second, and the milliseconds that this process computes for one; `advance` makes `decisions`."""
    with turn:
        cpu, start, calls = time.process_time(), time.perf_counter(), 0
        while calls < 2 or time.perf_counter() - start < seconds:
            advance()
            calls += 1
        cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return {"decisions_per_s": calls * decisions / wall, "cpu_ms": 1e3 * cpu / (calls * decisions)}


def step_by_step(td, agent, envs, seconds: float, turn) -> dict[str, Any]:
    """The loop of tdmpc2_jax.py with one update per decision."""
    n = envs.num_envs
    learner = committed(td.fresh_state(agent, random_streams(0)))
    state, key = learner["train"], learner["act_key"]
    replay = committed(filled_replay(td, agent, 10_000, n))
    mean = committed(jnp.zeros((n, agent.horizon, agent.action_dim)))
    obs, _ = envs.reset(seed=0)
    done = np.zeros(n, bool)
    entry = td.Step(obs, np.zeros((n, agent.action_dim), np.float32), np.zeros(n, np.float32), done, ~done)

    def advance():
        nonlocal state, key, replay, mean, entry, done
        for _ in range(10):
            replay, action, mean, key = td.add_and_act(agent, state.params, replay, entry, mean, key, random=False)
            state, _ = td.train(agent, state, replay, num_updates=n)
            obs, reward, terminated, truncated, _ = envs.step(np.asarray(action))
            entry = td.Step(obs, action, reward.astype(np.float32), terminated, first=done)
            done = terminated | truncated
        jax.block_until_ready(state)

    advance()
    return {"call": "loop step by step", "runs": 1} | rate(advance, 10 * n, seconds, turn)


def compiled(td, agent, n: int, seeds: int, seconds: float, turn) -> dict[str, Any]:
    """The loop of tdmpc2_jax_device.py: everything in one program, for runs side by side."""
    import tdmpc2_jax_device as script

    env = script.open_jax("gymnax/Pendulum-v1")
    agent = td.for_task(agent, env.spec.name, env)
    runs = [script.fresh_run(agent, env, 2000, n, script.random_streams(seed)) for seed in range(seeds)]
    runs = script.committed(script.side_by_side(runs))
    schedule = script.Schedule(0, 10 * n, Fraction(1))

    def advance():
        nonlocal runs
        runs, record = script.advance(agent, env, schedule, runs, 10, 0)
        jax.block_until_ready(record)

    advance()
    advance()
    return {"call": "loop compiled", "runs": seeds} | rate(advance, 10 * n * seeds, seconds, turn)


# ------------------------------------------------------------------------------------------------------------- Pixels
def pictures(setting: Setting, turn) -> list[dict[str, Any]]:
    """Decisions a second with each kind of observation, and the share of values that shadows and reflections change."""
    ways = {"state": {}, "pictures": {"obs": "rgb"}, "no shadows": {"obs": "rgb", "shadows": False}}
    rows = []
    for task in setting.args.tasks:
        row, seen = {"call": task}, {}
        for name, options in ways.items():
            with contextlib.closing(environments.make_env(task, seed=0, **options)) as env:
                seen[name], _ = env.reset()
                rng = np.random.default_rng(0)

                def step(env=env, rng=rng):
                    *_, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
                    if truncated:
                        env.reset()

                row[name] = rate(step, 1, setting.args.seconds, turn)["decisions_per_s"]
        rows.append(row | {"changed": float((seen["pictures"] != seen["no shadows"]).mean())})
    return rows


LAYERS = ((7, 29), (5, 13), (3, 6), (3, 4))  # of the encoder: size of the kernel, height of what comes out


def encoder_gflop(channels: int, forward: int, backward: int) -> float:
    """Of the convolutions in encoding so many stacks and, for so many of them, the gradients (of the pictures none)."""
    sizes = [9, channels, channels, channels]
    layers = [2 * k * k * c * channels * o * o / 1e9 for (k, o), c in zip(LAYERS, sizes, strict=True)]
    return sum(layers) * (forward + 2 * backward) - layers[0] * backward


def channels_last(x, kernel, stride):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)


def channels_first(x, kernel, stride):
    x, kernel, layout = jnp.moveaxis(x, -1, 1), jnp.transpose(kernel, (3, 2, 0, 1)), ("NCHW", "OIHW", "NCHW")
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)
    return jnp.moveaxis(y, 1, -1)


def encoder(setting: Setting, turn) -> list[dict[str, Any]]:
    """A batch of stacks encoded in each way, and gradients of it."""
    rgb = setting.module
    agent = setting.program("update").agent
    B, channels = agent.batch_size, rgb.networks(agent).encoder.channels
    params = rgb.fresh_state(agent, random_streams(0))["train"].params["encoder"]
    stacks = jax.random.bits(jax.random.key(0), (B, 64, 64, 9), "uint8")
    shift = rgb.draw_shifts(jax.random.key(1), B)

    def encode(p, convolve, at_once):
        def one(stack_and_shift):
            return rgb.networks(agent).encoder.apply(p, rgb.shift_stack(*stack_and_shift)[None])[0]

        with mock.patch.object(rgb, "convolve", convolve):
            flat = stacks, shift
            return jax.lax.map(one, flat, batch_size=at_once) if at_once else jax.vmap(one)(flat)

    ways = {"ours": lambda p: rgb.encode(agent, p, stacks, shift)}
    for name, convolve in (("NHWC", channels_last), ("NCHW", channels_first)):
        ways[name] = partial(encode, convolve=convolve, at_once=0)
        ways[f"{name} by 8"] = partial(encode, convolve=convolve, at_once=8)
    timed = {}
    for name, way in ways.items():
        gradient = jax.grad(lambda p, way=way: (way(p) ** 2).sum())
        for kind, function in (("forward", way), ("gradient", gradient)):
            gflop = encoder_gflop(channels, B, B * (kind == "gradient"))
            timed[f"{name} {kind}"] = Call(partial(jax.jit(function), params), gflop=gflop, beside=f"ours {kind}")
    return setting.measure(timed, turn)


# ------------------------------------------------------------------------------------------------------------- Replays
def replay(setting: Setting, turn) -> list[dict[str, Any]]:
    """Steps written and batches drawn, of the first version in replays of several sizes."""
    td = setting.module
    agent = setting.program("update").agent
    rows = []
    for entries in setting.args.entries if setting.script == "tdmpc_jax" else (10_000,):
        key = jax.random.key(0)
        if setting.script == "tdmpc_jax":
            full = jax.jit(partial(filled_tree, td, agent, entries))()
            timed = tree_calls(td, full, entries, key)
            obs = np.zeros((1, OBS), np.float32)
        else:
            full = jax.jit(partial(filled_replay, td, agent, entries, 1, entries))()
            draw = jax.jit(td.sample, static_argnums=0)
            timed = {"draw": Call(partial(draw, agent, jax.tree.map(jnp.copy, full), key))}
            obs = np.zeros((1, 64, 64, 3), np.uint8)
        no = np.zeros(1, bool)
        step = td.Step(obs, np.zeros((1, ACTION), np.float32), np.ones(1, np.float32), no, no)
        size = sum(x.nbytes for x in jax.tree.leaves(full))

        def add(held=[full], step=step):  # noqa: B006
            held[0] = td.add(agent, held[0], step)
            return held[0]

        options = {"repeats": 50 * setting.args.repeats, "limit_s": setting.args.limit_s / 4, "shares": False}
        found = dataclasses.replace(setting, args=dataclasses.replace(setting.args, **options))
        for row in found.measure(timed | {"add": Call(add)}, turn):
            rows.append({"entries": entries, "bytes_per_entry": size / entries} | row)
    return rows


def tree_calls(td, full, entries: int, key) -> dict[str, Call]:
    """What the first version does with its tree of priorities for 512 windows; `flat` by a running sum over all."""

    def draw_flat(values, key, batch_size):
        sums = jnp.cumsum(values)
        return jnp.searchsorted(sums, jax.random.uniform(key, batch_size) * sums[-1], side="right")

    tree = jax.tree.map(jnp.copy, full.tree)
    draw, draw_flat = jax.jit(td.draw, static_argnums=2), jax.jit(draw_flat, static_argnums=2)
    set_priorities = jax.jit(td.set_priorities, donate_argnums=0)
    drawn = draw(tree, key, 512)
    held = [jax.tree.map(jnp.copy, tree)]

    def write():
        held[0] = set_priorities(held[0], drawn, jnp.ones(512))
        return held[0]

    values = tree[0].ravel()[:entries]
    return {
        "draw": Call(partial(draw, tree, key, 512)),
        "flat": Call(partial(draw_flat, values, key, 512)),
        "set": Call(write),
    }


# ---------------------------------------------------------------------------------------------------- The first version
def apart(td, horizon: int):
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


def horizons(setting: Setting, turn) -> list[dict[str, Any]]:
    """Plans by the script's program, whose loop is as long as the device says, and by one that is written out."""
    td = setting.module
    timed = {}
    for h in setting.args.horizons:
        program = setting.program("plan")
        inputs = list(committed(jax.jit(program.inputs)()))
        inputs[4] = inputs[4]._replace(horizon=jnp.full(1, h, jnp.int32))
        own = jax.jit(partial(td.act.__wrapped__, program.agent, explore=True))
        with mock.patch.object(td, "estimate_value", apart(td, h)):
            traced = own.trace(*inputs)
            written_out = traced.lower().compile()
        timed[f"plan {h} apart"] = Call(partial(written_out, *inputs), traced)
        gflop = total_gflop(count_products(traced.jaxpr))
        timed[f"plan {h}"] = Call(partial(program, *inputs), gflop=gflop, beside=f"plan {h} apart")
    return setting.measure(timed, turn)


# ----------------------------------------------------------------------------------------------------------- Many tasks
def write_dataset(folder: Path, gigabytes: float) -> None:
    """Random episodes of mt30 in files of at most 1 GB."""
    obs_size, action_size = environments.set_sizes(MT30)
    episodes, rng = int(gigabytes * 1e9 / (501 * (4 * (obs_size + action_size + 1) + 8))), np.random.default_rng(0)
    for i, count in enumerate(np.diff(np.r_[0 : episodes : int(np.ceil(gigabytes)) * 1j + 1j].astype(int))):
        arrays = {
            "obs": rng.standard_normal((count, 501, obs_size), np.float32),
            "action": rng.uniform(-1, 1, (count, 501, action_size)).astype(np.float32),
            "reward": rng.uniform(0, 2, (count, 501)).astype(np.float32),
            "task": np.repeat(np.arange(count)[:, None] % len(MT30), 501, 1),
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


def tiers(setting: Setting, turn) -> list[dict[str, Any]]:
    """What each tier gives alone, updates that are fed by it, and this process's memory that no file stands behind."""
    rows = []
    with turn, tempfile.TemporaryDirectory(dir=setting.args.data_dir) as folder:
        write_dataset(Path(folder), setting.args.dataset_gb)
        start_mb = anonymous_mb()
        disk = environments.load_dataset("mt30", folder)
        for tier in ("disk, cold", "disk", "host", "device"):
            if tier == "disk, cold" and not forget_files():
                continue
            alone, fed = rates_of_tier(setting, disk, tier.split(",")[0])
            memory = {"anonymous_mb": anonymous_mb(), "grown_mb": anonymous_mb() - start_mb}
            rows.append({"call": tier, "batches_per_s": alone, "updates_per_s": fed} | memory)
    return rows


def rates_of_tier(setting: Setting, disk, tier: str) -> tuple[float, float]:
    """Batches a second, and updates a second that are fed by them."""
    from tdmpc2_support.data.device_data import Source

    mt, args = setting.module, setting.args
    agent = mt.for_tasks(mt.Agent(**setting.fields), MT30)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "devices")
    source = Source(disk, tier, args.storage_dtype, mesh, agent.batch_size, agent.horizon)
    update = fed_update(mt, agent, mesh, source.shapes())
    source.load()
    batches = source.batches(seed=1, first=0, readers=args.readers)
    if tier == "device":
        draw, keys = jax.jit(mt.sample, static_argnums=0), map(jax.random.key, itertools.count())
        alone = per_second(lambda: draw(agent, next(batches), next(keys)), args.seconds)
    else:
        alone = per_second(lambda: next(batches), args.seconds)
    fed = per_second(lambda: update(next(batches)), args.seconds)
    batches.close()
    return alone, fed


def fed_update(mt, agent, mesh, shapes, teacher=None) -> Callable[[Any], Any]:
    """One update after the other on what it is given, compiled and placed as the script does it."""
    constants = global_arrays(mt.make_tasks(agent, MT30), replicated(mesh))
    program, places = mt.compile_train(mt.Args(agent=agent), agent, mesh, constants, shapes, teacher)
    places = jax.tree.map(lambda x: x.sharding, places)
    state = jax.jit(lambda: mt.fresh_state(agent, random_streams(1)), out_shardings=places)()

    def update(batch):
        nonlocal state
        state, info = program(state, batch)
        return info["total_loss"]

    return update


def planning(setting: Setting, turn) -> list[dict[str, Any]]:
    """One call for 30 environments beside 30 calls for one."""
    batched, single = setting.program("plan", len(MT30)), setting.program("plan")
    inputs, one = (committed(jax.jit(program.inputs)()) for program in (batched, single))
    timed = {"batched": Call(lambda: batched(*inputs)[0])}
    timed["one by one"] = Call(lambda: [np.asarray(single(*one)[0]) for _ in MT30], beside="batched")
    return setting.measure(timed, turn, shares=False)


def teacher(setting: Setting, turn) -> list[dict[str, Any]]:
    """An update with and without a teacher of random parameters, which is as the script keeps it."""
    from tdmpc2_support.data.device_data import batch_shapes

    mt = setting.module
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "devices")
    student = mt.for_tasks(mt.Agent(**setting.fields), MT30)
    dtype = student.compute_dtype
    large = mt.for_tasks(mt.Agent(model_size=setting.args.teacher_size, compute_dtype=dtype), MT30)
    shapes = jax.eval_shape(lambda: mt.init_params(large, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = {name: shapes[name] for name in ("encoder", "reward", "task_emb")}
    params = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), params)
    kernels = jax.tree.map(lambda x: np.asarray(x, dtype if x.ndim == 2 else x.dtype), params)
    kernels["task_emb"] = params["task_emb"]
    asked = jax.tree_util.Partial(partial(mt.predict_reward, large), kernels)
    constants = global_arrays(mt.make_tasks(student, MT30), replicated(mesh))
    shapes = batch_shapes(student.obs_dim, student.action_dim, student.batch_size, student.horizon, mesh)
    batch = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), shapes)
    state = jax.eval_shape(lambda: mt.fresh_state(student, random_streams(1)))
    timed = {}
    for name, chosen in (("update without", None), ("update with", asked)):
        traced = jax.jit(partial(mt.train, student, mesh)).trace(constants, state, batch, chosen)
        update = partial(fed_update(mt, student, mesh, shapes, chosen), batch)
        timed[name] = Call(update, traced, beside="update without")
    numbers = sum(x.size for x in jax.tree.leaves(params))
    return [row | {"teacher_numbers": numbers} for row in setting.measure(timed, turn, shares=False)]


# ------------------------------------------------------------------------------------------------------------ Diffusion
PLANS = {
    "ssr, model on d": {"rollouts": "onestep"},
    "ssr, model on p_d, 1 step": {"dynamics_steps": 1},
    "ssr, model on p_d, 2 steps": {"dynamics_steps": 2},
    "ssr, model on p_d, 10 steps": {"dynamics_steps": 10},
    "ssr, J on p_d": {"scorer": "J"},
    "ssr_mppi, model on p_d": {"planner": "ssr_mppi"},
    "mppi": {"planner": "mppi"},
}


def plans(setting: Setting, turn) -> list[dict[str, Any]]:
    """Ways to plan for one environment."""
    timed = {name: call_of(setting.program("plan", **fields)) for name, fields in PLANS.items()}
    return setting.measure(timed, turn)


# ---------------------------------------------------------------------------------------------------------------- Table
PARTS = {
    "tdmpc2_jax": (calls, loop),
    "tdmpc2_jax_rgb": (pictures, replay, encoder, calls),
    "tdmpc2_jax_mt": (tiers, calls, planning, teacher),  # tiers first: memory of later measurements is not given back
    "tdmpc_jax": (calls, horizons, replay),
    "tdmpc2_jax_diffusion": (calls, plans),
    "newt_jax": (calls,),
    DEVICE: (loop,),
}
ONE_SETTING = (pictures, replay, tiers, planning, teacher, horizons, plans, encoder)  # whatever --num-envs says


def settings_of(args: Args) -> list[tuple[Callable, Setting]]:
    """What is to be measured, a process each."""
    asked = set(args.parts)
    there = {part.__name__ for script in args.scripts for part in PARTS[script]}
    if unknown := asked - there:
        sys.exit(
            f"error: {', '.join(sorted(unknown))}: parts of {', '.join(args.scripts)} are {', '.join(sorted(there))}"
        )
    rows = []
    for script in args.scripts:
        sizes = args.model_size[:1] if script == "tdmpc_jax" else args.model_size  # it has one
        for part in PARTS[script]:
            if asked and part.__name__ not in asked:
                continue
            envs = args.num_envs[:1] if part in ONE_SETTING else args.num_envs
            for size, n, dtype in itertools.product(sizes, envs, args.compute_dtype):
                if part in (pictures, tiers) and (size, dtype) != (sizes[0], args.compute_dtype[0]):
                    continue
                rows.append((part, Setting(args, script, size, n, dtype)))
    return rows


def in_a_process(part: Callable, setting: Setting, turn) -> list[dict[str, Any]]:
    head = {name: getattr(setting, name) for name in ("script", "model_size", "num_envs", "compute_dtype")}
    return [head | row | {"device": jax.devices()[0].device_kind} for row in part(setting, turn)]


def main(args: Args) -> None:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if args.cpu_time:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    asked = settings_of(args) * args.turns
    workers = len(asked) if args.together else 1
    context = multiprocessing.get_context("spawn")
    results: dict[str, Any] = {"arguments": dataclasses.asdict(args), "cpu_cores": os.cpu_count()}
    results |= {"load_average": os.getloadavg()[0], "jax_version": jax.__version__, "rows": []}
    with context.Manager() as manager, ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as processes:
        turn = manager.Lock()
        futures = [processes.submit(in_a_process, part, setting, turn) for part, setting in asked]
        for (part, setting), future in zip(asked, futures, strict=True):
            try:
                rows = future.result()
            except Exception as error:  # the others' figures should not be lost
                rows = [{"script": setting.script, "error": f"{type(error).__name__}: {error}"[:300]}]
            results["rows"] += [{"part": part.__name__} | row for row in rows]
            print(f"\n{setting.script}, {part.__name__}\n\n{table(rows, HIDDEN)}", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    if any("error" in row for row in results["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
