"""How fast do exported agents decide on one core, how large are they, and do they return what they return in JAX?

    taskset -c 0 python benchmarks/robot.py --files files --json robot.json   # walker-walk's sizes, fresh weights
    python benchmarks/robot.py --files files --checkpoints RUN RUN            # returns of JAX and of ONNX, 5 episodes

Times are of single decisions, the noise drawn before, of functions that take turns in random order: median and 99th
percentile in milliseconds, by the clock. `int8` is onnxruntime's own dynamic quantisation of the same graph. Start and
memory are those of a fresh process that imports NumPy and onnxruntime and makes one decision.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import deploy
import envs as environments
import tdmpc2_jax as td
from tdmpc2_support.agents.export import onnx_session, write_onnx

OBS, ACTIONS = 24, 6  # walker-walk's
SIZES = [(1, 512, 6), (1, 512, 3), (1, 128, 6), (1, 128, 3), (1, 64, 6), (1, 64, 3)]
SIZES += [(5, 512, 6), (5, 512, 3), (5, 128, 6), (5, 128, 3), (5, 64, 6), (5, 64, 3)]
START = """
import sys, time
start = time.perf_counter()
import numpy as np
import onnxruntime
imported = time.perf_counter() - start
types = {"tensor(float)": "f4", "tensor(int32)": "i4", "tensor(bool)": "?"}
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {x.name: np.zeros(x.shape, types[x.type]) for x in session.get_inputs()})
decided = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if "VmHWM" in line)  # getrusage counts the parent's
print(imported, decided, int(peak.split()[1]) / 1e3)
"""


@dataclasses.dataclass(frozen=True)
class Args:
    files: str  # folder of the exported files: those that are there are not made anew
    json: str | None = None  # write the figures to this file
    checkpoints: tuple[str, ...] = ()  # compare returns of these runs instead
    episodes: int = 5  # of each
    source_task: tuple[str, ...] = ()  # of each, if they are multi-task agents
    what: Literal["policy", "planner"] = "planner"  # that acts in them
    num_samples: int | None = None  # of that planner, if not the run's
    num_elites: int | None = None  # its elites, if not the run's
    iterations: int | None = None  # its iterations, if not the run's
    rounds: int = 100  # decisions of each function
    seconds: float = 15.0  # fewer rounds where they would take longer


def agent_of(model_size: int, num_samples: int, iterations: int) -> td.Agent:
    elites = max(8, num_samples // 8)
    agent = td.Agent(model_size=model_size, num_samples=num_samples, num_elites=elites, iterations=iterations)
    return dataclasses.replace(td.with_model_size(agent), obs_dim=OBS, action_dim=ACTIONS)


def exported(args: Args, agent: td.Agent, what: str) -> tuple[Path, deploy.Function, dict]:
    """The file of a fresh agent's function, the function and the parameters."""
    params = td.init_params(agent, jax.random.key(0))
    function = deploy.policy_function(agent) if what == "policy" else deploy.planner_function(agent)
    sizes = f"-{agent.num_samples}-{agent.iterations}" if what == "planner" else ""
    path = Path(args.files, f"{what}-{agent.model_size}M{sizes}.onnx")
    if not path.exists():
        write_onnx(path, function, params, {}, {"task": "walker-walk"})
    return path, function, params


def quantized(path: Path) -> Path:
    """onnxruntime's own int8 form of a file."""
    from onnxruntime.quantization import quantize_dynamic

    small = path.with_suffix(".int8.onnx")
    if not small.exists():
        quantize_dynamic(path, small)
    return small


def given(agent: td.Agent, what: str, i: int) -> dict[str, np.ndarray]:
    """Inputs of call i."""
    obs = np.random.default_rng(i).normal(size=OBS).astype(np.float32)
    if what == "policy":
        return {"obs": obs}
    mean = np.zeros((agent.horizon, ACTIONS), np.float32)
    inputs = deploy.planner_inputs(agent, obs, mean, i == 0, jax.random.key(i))
    return {name: np.asarray(x) for name, x in inputs.items()}


def timed(args: Args, calls: dict, inputs: list) -> dict[str, list[float]]:
    """Milliseconds of each call on each of the inputs, in random order."""
    rng = np.random.default_rng(0)
    found = {name: [] for name in calls}
    for call in calls.values():
        call(inputs[0])
    end = time.perf_counter() + args.seconds
    for x in inputs:
        for name in rng.permutation([*calls]):
            start = time.perf_counter()
            calls[name](x)
            found[name].append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    return found


def row(args: Args, agent: td.Agent, what: str) -> dict:
    """All figures of one function."""
    path, function, params = exported(args, agent, what)
    jitted = jax.jit(function.call)
    device_params = jax.device_put(params)
    sessions = {"onnx": onnx_session(path), "int8": onnx_session(quantized(path))}
    calls = {name: partial(session.run, None) for name, session in sessions.items()}
    calls["jax"] = lambda x: jax.block_until_ready(jitted(device_params, *x.values()))
    inputs = [given(agent, what, i) for i in range(args.rounds)]
    result = {"function": what, "model_size": agent.model_size}
    if what == "planner":
        result |= {"num_samples": agent.num_samples, "iterations": agent.iterations}
    for name, times in timed(args, calls, inputs).items():
        result[f"{name}_ms"] = float(np.median(times))
        result[f"{name}_p99_ms"] = float(np.percentile(times, 99))
        result["decisions"] = len(times)
    for name, file in (("onnx", path), ("int8", quantized(path))):
        result[f"{name}_MB"] = file.stat().st_size / 1e6
    done = subprocess.run([sys.executable, "-c", START, path], capture_output=True, text=True, check=True)
    figures = zip(("import_s", "first_decision_s", "memory_MB"), map(float, done.stdout.split()), strict=True)
    return result | dict(figures)


def compare_returns(args: Args, checkpoint: str, source_task: str | None) -> dict:
    """Returns of the same episodes with the same noise, in JAX and in ONNX, and how far actions differ on the
    observations of the former."""
    sizes = {name: getattr(args, name) for name in ("num_samples", "num_elites", "iterations")}
    asked = deploy.Args(checkpoint, "", source_task=source_task, **sizes)
    agent, params, task = deploy.one_task(asked, deploy.load(asked))
    function = deploy.policy_function(agent) if args.what == "policy" else deploy.planner_function(agent)
    path = Path(args.files, f"{task}-{args.what}-{agent.num_samples}-{agent.iterations}.onnx")
    path.unlink(missing_ok=True)  # of another agent, perhaps
    write_onnx(path, function, params, {}, {"task": task})
    jitted = jax.jit(function.call)
    session = onnx_session(path)
    by_jax = lambda inputs: jitted(params, *inputs.values())  # noqa: E731
    by_onnx = lambda inputs: session.run(None, {k: np.asarray(x) for k, x in inputs.items()})  # noqa: E731
    returns = {"jax": [], "onnx": []}
    differ = []
    for name, call in (("jax", by_jax), ("onnx", by_onnx)):
        for episode in range(args.episodes):
            with closing(environments.make_env(task)) as env:
                obs, _ = env.reset(seed=episode)
                mean = np.zeros((agent.horizon, agent.action_dim), np.float32)
                rewards = []
                ended = False
                while not ended:
                    inputs = {"obs": obs}
                    if args.what == "planner":
                        key = jax.random.key(1000 * episode + len(rewards))
                        inputs = deploy.planner_inputs(agent, obs, mean, not rewards, key)
                    action, *means = call(inputs)
                    mean = means[0] if means else mean
                    if name == "jax":
                        differ.append(float(np.abs(by_onnx(inputs)[0] - action).max()))
                    obs, reward, terminated, truncated, _ = env.step(np.asarray(action))
                    rewards.append(reward)
                    ended = terminated or truncated
            returns[name].append(sum(rewards))
    worst = {"decisions": len(differ), "largest": max(differ), "above_1e-5": sum(x > 1e-5 for x in differ)}
    worst["median"] = float(np.median(differ))
    planner = {"num_samples": agent.num_samples, "iterations": agent.iterations} if args.what == "planner" else {}
    return {"task": task, "function": args.what, **planner, "returns": returns, "actions": worst}


def main(args: Args) -> None:
    Path(args.files).mkdir(exist_ok=True)
    rows = []
    if args.checkpoints:
        source_tasks = args.source_task or [None] * len(args.checkpoints)
        for checkpoint, source_task in zip(args.checkpoints, source_tasks, strict=True):
            rows.append(compare_returns(args, checkpoint, source_task))
            print(json.dumps(rows[-1]))
    else:
        agents = [agent_of(*sizes) for sizes in SIZES]
        functions = [(agents[0], "policy"), (agents[6], "policy"), *((agent, "planner") for agent in agents)]
        for agent, what in functions:
            rows.append(row(args, agent, what))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        about = {"cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
        Path(args.json).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
