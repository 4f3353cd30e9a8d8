"""Environments and files: what every script here shares.

    env = make_env("walker-walk", seed=1)                # one gymnasium.Env
    envs = make_envs("walker-walk", num_envs=4, seed=1)  # one gymnasium.vector.VectorEnv
    weights = load_pt("walker.pt")["model"]              # a PyTorch file, read without PyTorch
    episodes = load_dataset("mt30", "data/mt30")         # an offline dataset, read where it lies
    python envs.py                                       # the table of tasks

Every environment looks the same from outside: observation `Box` float32 flat (with obs="rgb" uint8 [64, 64, 3],
with obs="rgb+state" a dict of both), action `Box(-1, 1)` float32, action repeat inside, `truncated` at the time limit,
`terminated` only where the task really ends, `info["success"]` (float) on every step. Importing this module loads no
simulator.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from tdmpc2_support.cli import lasting_output
from tdmpc2_support.data.datasets import Chunk, Dataset, EpisodeWriter, load_dataset
from tdmpc2_support.data.pt import load_pt, save_tensordict
from tdmpc2_support.envs import vector
from tdmpc2_support.envs.adapter import Task
from tdmpc2_support.envs.rendering import FRAME, PIXELS
from tdmpc2_support.envs.soup import SOUP
from tdmpc2_support.envs.tasks import DOMAINS, TASK_SETS, TASKS, TaskSpec, discount_of, set_sizes, set_tasks, task_spec
from tdmpc2_support.envs.vector import default_workers
from tdmpc2_support.errors import UserError

__all__ = [
    "DOMAINS", "FRAME", "PIXELS", "SOUP", "TASKS", "TASK_SETS", "Chunk", "Dataset", "EpisodeWriter", "TaskSpec",
    "UserError", "check_rendering", "check_simulators", "default_workers", "discount_of", "load_dataset", "load_pt",
    "make_env", "make_envs", "online_tasks", "save_tensordict", "set_sizes", "set_tasks", "task_sizes", "task_spec",
    "why_missing",
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# One environment
# ----------------------------------------------------------------------------------------------------------------------


def make_env(
    task: str,
    seed: int = 0,
    obs: str = "state",
    render_mode: str | None = None,
    shadows: bool = True,
    action_repeat: int | None = None,
    pixels: int = PIXELS,
) -> gym.Env:
    """Makes one environment.

    The first reset is seeded with `seed`; later ones continue its random stream unless they are given a seed. NumPy's
    global generator is neither used nor changed.

    Args:
        task: see `task_spec`.
        seed: seed of the first reset.
        obs: "state" → float32 [size]; "rgb" → uint8 [64, 64, 3], one frame (DMControl and Meta-World, and Gymnasium
            ids whose own observation is a frame of any size); "rgb+state" → a dict of both (of Gymnasium ids, those
            whose own observation is a dict with one frame); "rgb+state:velocity,height" → only these parts of the
            state: keys of DMControl's or Gymnasium's dict; hand, gripper, objects, before, goal of Meta-World's.
        render_mode: None, or "rgb_array": `render()` gives uint8 [384, 384, 3] where the simulator lets us choose.
        shadows: in such a frame, draw shadows and reflections, as dm_control and MuJoCo do by default.
        action_repeat: simulator steps per decision, if others than the table's are wanted (see `task_spec`).
        pixels: height and width of the frames in observations.

    Returns:
        The environment; `env.unwrapped` reaches the simulator (`.physics` and `.dm_env` with DMControl).

    Raises:
        UserError: unknown task, missing package, a task that is not a vector of numbers in and out, or that lacks what
            obs asks for.
    """
    spec = task_spec(task, action_repeat)
    if obs not in ("state", "rgb", "rgb+state") and not obs.startswith("rgb+state:"):
        raise UserError(f"obs must be 'rgb+state', 'state' or 'rgb', not {obs!r}")
    if obs != "state" and spec.domain in DOMAINS and not DOMAINS[spec.domain].rgb:
        domains = " and ".join(domain for domain, settings in DOMAINS.items() if settings.rgb)
        raise UserError(f"pixels as observations exist for {domains}, not for {spec.name!r} ({spec.domain})")
    if render_mode not in (None, "rgb_array"):
        raise UserError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
    module = DOMAINS[spec.domain].module if spec.domain in DOMAINS else "gym_ids"
    simulator = importlib.import_module(f"tdmpc2_support.envs.{module}").make(spec, render_mode)
    try:
        return Task(simulator, spec, seed, obs, render_mode, shadows, pixels)
    except UserError:
        simulator.env.close()
        raise


def check_rendering(task: str, obs: str = "state", render_mode: str | None = "rgb_array", pixels: int = PIXELS) -> None:
    """Draws one frame of the task, or with pictures in obs and no render_mode an observation, to learn before a long
    run whether that works.

    Raises:
        UserError: no frame can be drawn; names what to install.
    """
    try:
        env = make_env(task, obs=obs, render_mode=render_mode, pixels=pixels)
        try:
            frame = env.reset()[0]
            frame = frame["rgb"] if isinstance(frame, dict) else frame
            frame = env.render() if render_mode else frame
        finally:
            env.close()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"task {task!r} cannot be drawn here: {str(error) or type(error).__name__}") from error
    if frame is None or frame.ndim != 3:
        raise UserError(f"task {task!r} has no pictures")


def check_simulators(tasks: Sequence[str]) -> None:
    """Makes and closes an environment of the first task of every domain, to learn before a long run whether that works.

    Raises:
        UserError: as `make_env`.
    """
    first_of = {task_spec(task).domain: task for task in reversed(tasks)}
    for task in first_of.values():
        make_env(task).close()


@functools.cache
def task_sizes(task: str) -> tuple[int, int]:
    """Sizes of a task's observations and actions: those of the table, or of an environment that is made to look."""
    name = task_spec(task).name
    if name in TASKS and TASKS[name].obs_size is not None:
        return TASKS[name].obs_size, TASKS[name].action_size
    env = make_env(task)
    try:
        return env.observation_space.shape[0], env.action_space.shape[0]
    finally:
        env.close()


def online_tasks(tasks: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of a set, or in a text with commas between them, each as `task_spec` has it; "soup" stands for those
    of SOUP, or of the ones that are `known`, that can be made here: which others there are is said.

    Raises:
        UserError: there is no such task, or a name stands twice.
    """
    if tasks != "soup":
        names = TASK_SETS.get(tasks) or tuple(task_spec(task).name for task in tasks.split(","))
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"task {name!r} stands twice in --tasks")
        return names
    reasons: dict[str, list[str]] = {}
    for name in known or SOUP:
        reasons.setdefault(why_missing(name), []).append(name)
    names = tuple(reasons.pop("", ()))
    _say_left_out(len(names), tuple((why, *left_out) for why, left_out in reasons.items()))
    if not names:
        raise UserError("none of these tasks can be made here")
    return names


def why_missing(task: str) -> str:
    """Why a task of the table or of SOUP cannot be made here; an empty text if it can."""
    if task not in TASKS:
        return "not in the packages that this project uses" if task in SOUP else ""
    settings = DOMAINS[TASKS[task].domain]
    if not importlib.util.find_spec(settings.package.split(".")[0]):
        return settings.install
    return ""


@functools.cache
def _say_left_out(number: int, left_out: tuple[tuple[str, ...], ...]) -> None:
    """Prints, once, which tasks are left out and why."""
    for why, *names in left_out:
        print(f"{len(names)} task(s) beside these {number} are left out ({why}): {', '.join(names)}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Many environments
# ----------------------------------------------------------------------------------------------------------------------


def make_envs(
    task: str | Sequence[str],
    num_envs: int,
    seed: int | Sequence[int] = 0,
    obs: str = "state",
    render_mode: str | None = None,
    num_workers: int | None = None,
    sizes: tuple[int, int] | None = None,
    shadows: bool = True,
    action_repeat: int | None = None,
    first: int = 0,
    pixels: int = PIXELS,
    share: tuple[int, int] = (0, 1),
) -> gym.vector.VectorEnv:
    """Makes `num_envs` environments that step together; environment i is `make_env(task, env_seeds(seed, …)[i])`.

    With several tasks, they are `num_envs` of the first task, then as many of the next, and so on; observations are
    padded with zeros to the largest of them, and of an action each takes the entries that it needs.

    The step after an episode's end returns the next episode's first observation and ignores the action (NEXT_STEP).
    `reset(seed=s)` seeds anew, again by `env_seeds`. `step(actions, active=…)` leaves some environments as they are.
    `infos["success"]` is float64 [num_envs]. What an environment returns depends on its seed and actions only, not on
    the number of workers.

    Args:
        task, obs, shadows, action_repeat, pixels: as in `make_env`; task may also be several names (with obs="state"
            only), of the table unless there are `sizes`.
        num_envs: number of environments (of each task), at least 1.
        seed: a number from 0 on, or several, such as (seed, 1): different ones give independent random streams.
        render_mode: "rgb_array": `envs.render()[i]` is a frame of environment i if it is the first of its task; the
            others draw nothing.
        num_workers: worker processes to spread the environments over; 0 steps them in this process. Default: what
            should be fastest for this task and number of cores (`default_workers`).
        sizes: of observation and action, if larger ones than those of the largest of several tasks are wanted.
        first: environment i is number first + i of those with this seed, until `reset` is given another one.
        share: (k, P): of all these environments only k, k + P, k + 2P, ..., each as it is among all.

    Raises:
        UserError: as `make_env`, or num_envs < 1.
    """
    if num_envs < 1:
        raise UserError(f"the number of environments must be at least 1, not {num_envs}")
    if isinstance(task, str) or sizes:
        names = [task_spec(name).name for name in ([task] if isinstance(task, str) else task)]
    else:
        names = list(set_tasks(task))
    modes = [render_mode] + [None] * (num_envs - 1)
    sizes = None if isinstance(task, str) else sizes or set_sizes(names)
    one_each = [(name, mode) for name in names for mode in modes]
    seeds = vector.env_seeds(seed, first + len(one_each))[first:]
    makers = [
        functools.partial(_make_one, sizes, name, env_seed, obs, mode, shadows, action_repeat, pixels)
        for (name, mode), env_seed in zip(one_each, seeds, strict=True)
    ]
    tasks = [name for name, _ in one_each]
    k, parts = share
    makers = makers[k::parts]
    tasks = tasks[k::parts]
    if num_workers is None:
        num_workers = default_workers(tasks, 1, obs=obs)
    if num_workers == 0:
        return vector.TaskVectorEnv(tasks, makers, render_mode, share)
    return vector.WorkerVectorEnv(tasks, makers, render_mode, share, num_workers=min(num_workers, len(makers)))


def _make_one(sizes: tuple[int, int] | None, *arguments: Any) -> gym.Env:
    env = make_env(*arguments)
    return vector.Padded(env, *sizes) if sizes else env


# ----------------------------------------------------------------------------------------------------------------------
# The table of tasks
# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Prints every task of the table; loads no simulator."""
    lines = [f"{'domain':<12}{'task':<34}{'obs':>5}{'action':>8}{'episode':>9}  installed"]
    for name, (domain, obs_size, action_size, _) in TASKS.items():
        settings = DOMAINS[domain]
        installed = "yes" if importlib.util.find_spec(settings.package.split(".")[0]) else settings.install
        obs_text = "?" if obs_size is None else obs_size
        numbers = f"{obs_text:>5}{action_size:>8}{task_spec(name).episode_length:>9}"
        lines.append(f"{domain:<12}{name:<34}{numbers}  {installed}")
    others = "Any Gymnasium id with Box actions works too (HalfCheetah-v5)."
    lines.append(f"{len(TASKS)} tasks; episode = decisions. {others}")
    with lasting_output():  # a pipe that is closed early, as by `head`
        print("\n".join(lines))


if __name__ == "__main__":
    main()
