"""Environments and files: what every script here shares.

    env = make_env("walker-walk", seed=1)                # one gymnasium.Env
    envs = make_envs("walker-walk", num_envs=4, seed=1)  # one gymnasium.vector.VectorEnv
    weights = load_pt("walker.pt")["model"]              # a PyTorch file, read without PyTorch
    episodes = load_dataset("mt30", "data/mt30")         # an offline dataset, read where it lies
    python envs.py                                       # the table of tasks

Every environment looks the same from outside: observation `Box` float32 flat (or uint8 [64, 64, 3] with obs="rgb"),
action `Box(-1, 1)` float32, action repeat inside, `truncated` at the time limit, `terminated` only where the task
really ends, `info["success"]` (float) on every step. Importing this module loads no simulator.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import difflib
import functools
import importlib.util
import itertools
import mmap
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import weakref
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper


class UserError(Exception):
    """A mistake of the user; its text is the one sentence to print."""


class TaskSpec(NamedTuple):
    """What a script must know of a task before it makes the environment."""

    name: str  # canonical short name, or the Gymnasium id
    domain: str
    action_repeat: int  # simulator steps per decision
    episode_length: int  # decisions
    can_terminate: bool  # False: episodes end by the time limit only
    success: bool  # True: the success rate is the figure of merit, not the return


# ----------------------------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------------------------


class Domain(NamedTuple):
    """A family of tasks: common settings, and rows (prefix, tasks, observation size, action size, CPU µs/decision)."""

    rows: tuple[tuple[str, str, int | None, int, int], ...]
    action_repeat: int
    episode_length: int
    success: bool
    rgb: bool  # obs="rgb" is supported
    module: str  # what to import
    install: str  # how to get it


_METAWORLD_TASKS = (
    "assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall coffee-button "
    "coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open "
    "faucet-close hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull peg-insert-side "
    "peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back "
    "plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer stick-push stick-pull "
    "sweep-into sweep window-open window-close bin-picking box-close door-lock door-unlock hand-insert"
)

DOMAINS = {
    "DMControl": Domain(
        rows=(
            ("acrobot", "swingup", 6, 1, 70),
            ("cartpole", "balance balance-sparse swingup swingup-sparse", 5, 1, 30),
            ("cheetah", "run run-backwards run-front run-back jump", 17, 6, 40),
            ("cup", "catch spin", 8, 2, 100),
            ("dog", "run stand trot walk", 223, 38, 1400),
            ("finger", "spin", 9, 2, 50),
            ("finger", "turn-easy turn-hard", 12, 2, 95),
            ("fish", "swim", 24, 5, 160),
            ("hopper", "stand hop hop-backwards", 15, 4, 110),
            ("humanoid", "stand walk run", 67, 21, 450),
            ("pendulum", "swingup spin", 3, 1, 25),
            ("quadruped", "walk run", 78, 12, 260),
            ("reacher", "easy hard", 6, 2, 90),
            ("reacher", "three-easy three-hard", 8, 3, 30),
            ("walker", "stand walk run walk-backwards run-backwards", 24, 6, 165),
        ),
        action_repeat=2, episode_length=500, success=False, rgb=True,
        module="dm_control.suite", install="pip install -e .",
    ),
    "Meta-World": Domain(
        rows=(("mw", _METAWORLD_TASKS, 39, 4, 600),),
        action_repeat=2, episode_length=100, success=True, rgb=True,
        module="metaworld", install="pip install -e .",
    ),
    "MyoSuite": Domain(
        rows=(
            ("myo", "reach reach-hard", 115, 39, 1400),
            ("myo", "pose pose-hard", 108, 39, 1400),
            ("myo", "obj-hold obj-hold-hard", 91, 39, 1400),
            ("myo", "key-turn key-turn-hard", 93, 39, 1400),
            ("myo", "pen-twirl pen-twirl-hard", 83, 39, 1400),
        ),
        action_repeat=1, episode_length=100, success=True, rgb=False,
        module="myosuite", install="pip install -e '.[myosuite]'",
    ),
    "ManiSkill": Domain(
        rows=(
            ("lift", "cube", 36, 4, 9000),
            ("pick", "cube", 42, 4, 9000),
            ("stack", "cube", 48, 4, 9000),
            ("pick", "ycb", None, 7, 9000),  # None: its files must be downloaded before it can tell
            ("turn", "faucet", None, 7, 9000),
        ),
        action_repeat=2, episode_length=100, success=True, rgb=False,
        module="mani_skill.envs", install="pip install -e '.[maniskill]'",
    ),
}  # fmt: skip


class Row(NamedTuple):
    """A task of the printed table."""

    domain: str
    obs_size: int | None
    action_size: int
    microseconds: int  # of CPU per decision, for `default_workers`


# By canonical name, in the order of the printed table.
TASKS: dict[str, Row] = {
    f"{prefix}-{task}": Row(domain, *sizes_and_time)
    for domain, settings in DOMAINS.items()
    for prefix, tasks, *sizes_and_time in settings.rows
    for task in tasks.split()
}

# What tasks are called by their own package, where `make_env` needs it; these ids can be used as names, too.
_PACKAGE_IDS = {
    "lift-cube": "LiftCube-v1",
    "pick-cube": "PickCube-v1",
    "stack-cube": "StackCube-v1",
    "pick-ycb": "PickSingleYCB-v1",
    "turn-faucet": "TurnFaucet-v1",
}
_PACKAGE_IDS |= {
    f"myo-{task}{hard}": f"myoHand{task.title().replace('-', '')}{kind}-v0"
    for task in "reach pose obj-hold key-turn pen-twirl".split()
    for hard, kind in (("", "Fixed"), ("-hard", "Random"))
}

# The multi-task sets; a task's place in its set is its id in multi-task models and datasets.
_MT30 = tuple(
    (
        "walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup "
        "cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cup-catch finger-spin "
        "finger-turn-easy finger-turn-hard fish-swim hopper-stand hopper-hop walker-walk-backwards "
        "walker-run-backwards cheetah-run-backwards cheetah-run-front cheetah-run-back cheetah-jump "
        "hopper-hop-backwards reacher-three-easy reacher-three-hard cup-spin pendulum-spin"
    ).split()
)
TASK_SETS = {"mt30": _MT30, "mt80": _MT30 + tuple(f"mw-{task}" for task in _METAWORLD_TASKS.split())}

# Gymnasium tasks that only their time limit ends. Gymnasium does not register this fact, so it is a list of names (any
# version); a task missing here is taken as one that may terminate, which costs a termination head and is never wrong.
_NEVER_TERMINATE = {"HalfCheetah", "HumanoidStandup", "Pendulum", "Pusher", "Reacher", "Swimmer"}


def task_spec(task: str) -> TaskSpec:
    """The facts of a task, without loading its simulator.

    Args:
        task: a name of the table (`walker-walk`; dashes or underscores), its package's id (`myoHandReachFixed-v0`,
            `dm_control/walker-walk-v0`), or any Gymnasium id with a time
            limit (`HalfCheetah-v5`, `module:Id-v0`, other `dm_control/…` ids).

    Raises:
        UserError: there is no such task, or it has no time limit.
    """
    name = _canonical(task)
    if name in TASKS:
        domain = TASKS[name].domain
        settings = DOMAINS[domain]
        return TaskSpec(name, domain, settings.action_repeat, settings.episode_length, False, settings.success)
    task = _suite_id(name) or task
    spec = _gym_spec(task)
    if task.startswith("dm_control/"):  # suite ids are domain-task; of these only lqr ends early
        can_terminate = "-" not in spec.name or spec.name.startswith("lqr-")
        return TaskSpec(task, "DMControl", 2, 500, can_terminate, False)
    if spec.max_episode_steps is None:
        _open_gymnasium(task).close()  # names a worse fault first, if there is one
        raise UserError(f"task {task!r} has no time limit: register it with max_episode_steps=…")
    healthy_only = spec.kwargs.get("terminate_when_unhealthy", True)
    can_terminate = healthy_only and spec.name not in _NEVER_TERMINATE
    return TaskSpec(task, "Gymnasium", 1, spec.max_episode_steps, can_terminate, False)


def _canonical(task: str) -> str:
    """`dm_control/ball_in_cup-catch-v0`, `cup_catch` → `cup-catch`; other ids come out as no name of the table."""
    package_id = task.rpartition(":")[2]
    for name, known in _PACKAGE_IDS.items():
        if package_id == known:
            return name
    name = re.sub("^ball-in-cup-", "cup-", _canonical_suite(task))
    if task.startswith("dm_control/"):
        return name if name in TASKS and TASKS[name].domain == "DMControl" else task
    return re.sub(r"^(.*)-v3$", r"mw-\1", name)


def _suite_id(name: str) -> str | None:
    """`quadruped-run` → `dm_control/quadruped-run-v0`: a task of dm_control's suite that is not in the table."""
    if not re.fullmatch("[a-z-]+-[a-z-]+", name) or name.startswith("mw-"):
        return None
    _import("DMControl")
    import shimmy  # noqa: F401  registers the dm_control/ ids

    return next((i for i in gym.registry if i.startswith("dm_control/") and _canonical_suite(i) == name), None)


def _canonical_suite(task: str) -> str:
    """`dm_control/point_mass-easy-v0` → `point-mass-easy`."""
    return re.sub(r"^dm_control/(.*)-v0$|^dm_control/(.*)$", r"\1\2", task).replace("_", "-").lower()


def _gym_spec(task: str) -> Any:
    """The Gymnasium registry's entry of an id; UserError where there is none."""
    if task.startswith("dm_control/"):
        _import("DMControl")
        import shimmy  # noqa: F401  registers the dm_control/ ids
    module, _, env_id = task.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gym.spec(env_id)
    except (ImportError, TypeError, ValueError) as error:  # the latter two: no name of a module
        raise UserError(f"task {task!r} cannot be imported: {error}") from error
    except gym.error.Error:
        names = [*TASKS, *gym.registry]
        near = difflib.get_close_matches(task, names, n=3) or difflib.get_close_matches(_canonical(task), names, n=3)
        hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
        raise UserError(f"unknown task {task!r}; {hint}python envs.py lists all tasks") from None


# ----------------------------------------------------------------------------------------------------------------------
# One environment
# ----------------------------------------------------------------------------------------------------------------------

FRAME = 384  # height and width of render()
PIXELS = 64  # height and width of an rgb observation


def make_env(
    task: str, seed: int = 0, obs: str = "state", render_mode: str | None = None, shadows: bool = True
) -> gym.Env:
    """Makes one environment.

    The first reset is seeded with `seed`; later ones continue its random stream unless they are given a seed. NumPy's
    global generator is neither used nor changed.

    Args:
        task: see `task_spec`.
        seed: seed of the first reset.
        obs: "state" → float32 [size]; "rgb" → uint8 [64, 64, 3], one frame (DMControl and Meta-World, and Gymnasium
            ids whose own observation is such a frame).
        render_mode: None, or "rgb_array": `render()` gives uint8 [384, 384, 3] where the simulator lets us choose.
        shadows: with obs="rgb", draw shadows and reflections, as dm_control and MuJoCo do by default.

    Returns:
        The environment; `env.unwrapped` reaches the simulator (`.physics` and `.dm_env` with DMControl).

    Raises:
        UserError: unknown task, missing package, or a task that is not a vector of numbers in and out.
    """
    spec = task_spec(task)
    if obs not in ("state", "rgb"):
        raise UserError(f"obs must be 'state' or 'rgb', not {obs!r}")
    if obs == "rgb" and spec.domain in DOMAINS and not DOMAINS[spec.domain].rgb:
        domains = " and ".join(domain for domain, settings in DOMAINS.items() if settings.rgb)
        raise UserError(f"pixels as observations exist for {domains}, not for {spec.name!r} ({spec.domain})")
    if render_mode not in (None, "rgb_array"):
        raise UserError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
    make = {
        "DMControl": _make_dmcontrol,
        "Meta-World": _make_metaworld,
        "MyoSuite": _make_myosuite,
        "ManiSkill": _make_maniskill,
        "Gymnasium": _make_gymnasium,
    }[spec.domain]
    parts = make(spec, render_mode)
    space, frame = parts.env.observation_space, gym.spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
    if parts.scene is None and (space != frame if obs == "rgb" else _is_image(space) or len(space.shape) != 1):
        parts.env.close()
        if obs == "rgb":
            raise UserError(
                f"task {task!r} gives no pictures of {PIXELS} x {PIXELS} as observations, uint8 [64, 64, 3]"
            )
        kind = "image" if _is_image(space) else f"{space.shape}"
        raise UserError(f"task {task!r} has {kind} observations; only a flat Box of numbers is supported")
    return Task(parts, spec, seed, obs, render_mode, shadows)


class Parts(NamedTuple):
    """What a domain gives to `Task`."""

    env: gym.Env
    repeat: int  # how often `Task` steps it per decision: 1 where the environment repeats by itself
    seconds: float | None = None  # simulated time per decision; None: the environment's own render_fps is right
    scene: Callable[[], tuple[Any, Any]] | None = None  # MjModel and MjData to draw; None: `env.render()` draws
    camera: int = 0  # which of the model's cameras


class Task(gym.Wrapper):
    """What all domains share: repeat, format of action and observation, time limit, success, first seed, pictures."""

    def __init__(self, parts: Parts, spec: TaskSpec, seed: int, obs: str, render_mode: str | None, shadows: bool):
        super().__init__(parts.env)
        self._parts, self._limit, self._first_seed, self._decision = parts, spec.episode_length, seed, 0
        self._pixels, self._render_mode, self._cameras, self._shadows = obs == "rgb", render_mode, {}, shadows
        low, high = _check_action_space(parts.env.action_space, spec.name)
        self._low, self._half_range = low, (high - low) / 2
        self.action_space = gym.spaces.Box(-1.0, 1.0, low.shape, np.float32)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, parts.env.observation_space.shape, np.float32)
        if self._pixels:
            self.observation_space = gym.spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
        if parts.seconds:
            self.metadata = {"render_modes": ["rgb_array"], "render_fps": max(1, round(1 / parts.seconds))}
        if parts.scene and (self._pixels or render_mode):
            _choose_gl()

    @property
    def render_mode(self) -> str | None:
        return self._render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode → obs, info."""
        if seed is None:
            seed = self._first_seed
        self._first_seed, self._decision = None, 0
        obs, info = self.env.reset(seed=None if seed is None else int(seed), options=options)
        return self._observation(obs), {**info, "success": 0.0}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One decision, action in [-1, 1] held for the repeat → obs, summed reward, terminated, truncated, info."""
        action = self._low + (np.asarray(action, np.float64) + 1.0) * self._half_range
        action = action.astype(self.env.action_space.dtype, copy=False)
        total = 0.0
        for _ in range(self._parts.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        self._decision += 1
        truncated = not terminated and (truncated or self._decision >= self._limit)
        info = {**info, "success": float(info.get("success", 0.0))}
        return self._observation(obs), total, bool(terminated), bool(truncated), info

    def _observation(self, obs: Any) -> np.ndarray:
        if self._pixels and self._parts.scene:
            return self._draw(PIXELS)
        return np.asarray(obs, self.observation_space.dtype)

    def render(self) -> np.ndarray | None:
        """The current picture, uint8 [height, width, 3], or None without a render_mode."""
        if not self.render_mode:
            return None
        return self._draw(FRAME) if self._parts.scene else self.env.render()

    def _draw(self, size: int) -> np.ndarray:
        model, data = self._parts.scene()
        if size in self._cameras and self._cameras[size].model is not model:  # some resets build a new model
            self._cameras.pop(size).close()
        if size not in self._cameras:
            effects = self._shadows or size != PIXELS
            self._cameras[size] = MujocoCamera(model, size, self._parts.camera, effects)
        return self._cameras[size].frame(data)

    def close(self) -> None:
        """Frees the simulator and the GL contexts."""
        for camera in self._cameras.values():
            camera.close()
        self._cameras.clear()
        super().close()


def _import(domain: str) -> None:
    """Imports a domain's simulator such that it touches no GL library, unless the user's MUJOCO_GL wants one.

    dm_control and others bind their renderer when they are imported, and fail there when that one does not work. We
    draw with MuJoCo's own functions instead (`MujocoCamera`), so they can always be told to do without.
    """
    settings, gl = DOMAINS[domain], os.environ.get("MUJOCO_GL")
    try:
        with _environ(MUJOCO_GL=gl or "disable"):
            importlib.import_module(settings.module)
    except (ImportError, RuntimeError) as error:
        under = f" with MUJOCO_GL={gl}" if gl else ""
        raise UserError(f"{domain} cannot be imported{under} ({error}); to install it: {settings.install}") from error


@contextlib.contextmanager
def _environ(**values: str):
    """Sets environment variables for the length of a with block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_image(space: gym.Space) -> bool:
    return isinstance(space, gym.spaces.Box) and (len(space.shape) > 1 or space.dtype == np.uint8)


def _check_action_space(space: gym.Space, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The bounds (low, high), each float64 [size], of a usable action space."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise UserError(f"task {name!r} has actions {space}; only a flat Box of continuous actions is supported")
    if not np.all(np.isfinite(space.low) & np.isfinite(space.high)):
        raise UserError(f"task {name!r} has actions without finite bounds, which cannot be scaled to [-1, 1]")
    return space.low.astype(np.float64), space.high.astype(np.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Gymnasium
# ----------------------------------------------------------------------------------------------------------------------


def _make_gymnasium(spec: TaskSpec, render_mode: str | None) -> Parts:
    """Any registered id whose actions are a Box and whose observations are a flat Box."""
    options = {"render_mode": render_mode} if render_mode else {}
    if render_mode and str(_gym_spec(spec.name).entry_point).startswith("gymnasium.envs.mujoco"):
        _choose_gl()
        options.update(width=FRAME, height=FRAME)
    return Parts(_open_gymnasium(spec.name, **options), spec.action_repeat)


def _open_gymnasium(task: str, **options: Any) -> gym.Env:
    """gym.make, with one sentence for what may be wrong with the task's package or its spaces."""
    try:
        env = gym.make(task, disable_env_checker=True, **options)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"task {task!r} cannot be made: {error}") from error
    _check_action_space(env.action_space, task)
    space = env.observation_space
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"task {task!r} has {type(space).__name__} observations; only a Box of numbers is supported")
    return env


# ----------------------------------------------------------------------------------------------------------------------
# DMControl
# ----------------------------------------------------------------------------------------------------------------------


def _make_dmcontrol(spec: TaskSpec, render_mode: str | None) -> Parts:
    """A task of the table from dm_control's suite or our own ones; another `dm_control/…` id by way of shimmy."""
    _import("DMControl")
    if spec.name in TASKS:
        import dmcontrol_tasks

        env, repeat = DMControl(dmcontrol_tasks.load(spec.name), spec.action_repeat), 1
        seconds = env.dm_env.control_timestep() * spec.action_repeat
    else:
        try:
            env, repeat = ShimmyDMControl(gym.make(spec.name, disable_env_checker=True), spec), spec.action_repeat
        except RuntimeError as error:  # dm_control draws a first observation where that is an image
            raise UserError(f"task {spec.name!r} cannot be made (are its observations images?): {error}") from error
        seconds = env.unwrapped.dt * spec.action_repeat
    camera = 2 if spec.name.startswith("quadruped") else 0  # quadruped's camera 0 does not follow it

    def scene() -> tuple[Any, Any]:
        physics = env.unwrapped.physics
        return physics.model.ptr, physics.data.ptr

    return Parts(env, repeat, seconds, scene, camera)


class DMControl(gym.Env):
    """A suite task of dm_control as a Gymnasium environment, with the repeat inside.

    The observation is the values of dm_control's observation dict, flattened in its order. The repeat is here and not
    in `Task` because only the last simulator step needs an observation, and the simulator is stepped directly: what
    dm_env.step does around it takes longer than the physics of a small model.
    """

    def __init__(self, dm_env: Any, repeat: int):
        import mujoco

        self.dm_env, self._repeat, self._mujoco = dm_env, repeat, mujoco
        self._model, self._data = self.physics.model.ptr, self.physics.data.ptr
        self._substeps = round(dm_env.control_timestep() / self.physics.timestep())
        self._two_halves = self._model.opt.integrator != mujoco.mjtIntegrator.mjINT_RK4
        self._warnings, self._old_warnings = self.physics.data.warning.number, 0
        action = dm_env.action_spec()
        low, high = (np.broadcast_to(bound, action.shape) for bound in (action.minimum, action.maximum))
        self.action_space = gym.spaces.Box(low, high, dtype=np.float64)
        size = sum(int(np.prod(part.shape)) for part in dm_env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    @property
    def physics(self) -> Any:
        """dm_control's Physics: `.model`, `.data`, `.named`."""
        return self.dm_env.physics

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.dm_env.task.random.seed(seed)
        self.dm_env.reset()
        self._old_warnings = self._warnings.sum()
        return _flatten(self.dm_env.task.get_observation(self.physics)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        task, physics, total = self.dm_env.task, self.physics, 0.0
        self._data.ctrl[:] = action
        for _ in range(self._repeat):
            self._step_physics()
            total += task.get_reward(physics)
        if self._warnings.sum() != self._old_warnings:
            raise RuntimeError("MuJoCo warns that the simulation has become unstable")
        return _flatten(task.get_observation(physics)), total, False, False, {}  # no task of the table terminates

    def _step_physics(self) -> None:
        """One control step, as dm_control's: what depends on position and velocity is up to date after it."""
        mujoco, model, data = self._mujoco, self._model, self._data
        if self._two_halves:  # the first half of this step was the last one's end
            mujoco.mj_step2(model, data)
            if self._substeps > 1:
                mujoco.mj_step(model, data, self._substeps - 1)
        else:
            mujoco.mj_step(model, data, self._substeps)
        mujoco.mj_step1(model, data)

    def close(self) -> None:
        self.dm_env.close()


class ShimmyDMControl(gym.ObservationWrapper):
    """Another dm_control environment, which shimmy brings with a dict of observations: flattened in its order."""

    def __init__(self, env: gym.Env, spec: TaskSpec):
        super().__init__(env)
        parts = env.observation_space.spaces.values()
        if any(_is_image(part) and part.shape[-1] in (1, 3) and len(part.shape) == 3 for part in parts):
            raise UserError(f"task {spec.name!r} has image observations; only numbers are supported")
        size = sum(int(np.prod(part.shape)) for part in parts)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def observation(self, observation: dict[str, Any]) -> np.ndarray:
        return _flatten(observation)


def _flatten(observation: dict[str, Any]) -> np.ndarray:
    return np.concatenate([*observation.values()], axis=None, dtype=np.float32, casting="unsafe")


# ----------------------------------------------------------------------------------------------------------------------
# Meta-World
# ----------------------------------------------------------------------------------------------------------------------


def _make_metaworld(spec: TaskSpec, render_mode: str | None) -> Parts:
    """A Meta-World task with its goal in the observation, seen by camera corner2, moved as in TD-MPC2."""
    _import(spec.domain)
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    simulator = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{spec.name.removeprefix('mw-')}-v3-goal-observable"](seed=0)
    model, camera = simulator.model, simulator.model.camera("corner2").id
    model.cam_pos[camera] = 0.75, 0.075, 0.7
    _turn_upright(model, simulator.data, camera)
    seconds = simulator.dt * spec.action_repeat
    return Parts(MetaWorld(simulator), spec.action_repeat, seconds, lambda: (model, simulator.data), camera)


class MetaWorld(gym.Wrapper):
    """Goals drawn anew at every reset, from a stream of our own; the first action, as in TD-MPC2's, is zero."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        env.seeded_rand_vec, env._freeze_rand_vec = True, False  # else one goal forever, or NumPy's global generator

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.env.seed(int(seed))  # its reset ignores a seed
        self.env.reset()
        obs, _, _, _, info = self.env.step(np.zeros(4))
        return obs, info


# ----------------------------------------------------------------------------------------------------------------------
# MyoSuite
# ----------------------------------------------------------------------------------------------------------------------


def _make_myosuite(spec: TaskSpec, render_mode: str | None) -> Parts:
    """A task of the hand; -hard draws goal or object anew at every reset."""
    _import(spec.domain)
    simulator = gym.make(_PACKAGE_IDS[spec.name], disable_env_checker=True).unwrapped  # without its own time limit
    camera = simulator.model.camera("hand_side_inter").id
    simulator.reset(seed=0)
    _turn_upright(simulator.model, simulator.data, camera)  # it is fixed to the arm, which some tasks' resets turn over
    return Parts(MyoSuite(simulator), 1, simulator.dt, lambda: (simulator.model, simulator.data), camera)


class MyoSuite(gym.Wrapper):
    """Episodes go on when the object is dropped or the hand strays, as in TD-MPC2."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return self.env.reset(seed=seed)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, _, _, info = self.env.step(action)
        return obs, reward, False, False, {"success": float(info["solved"])}


# ----------------------------------------------------------------------------------------------------------------------
# ManiSkill
# ----------------------------------------------------------------------------------------------------------------------

_MANISKILL_ASSETS = {"pick-ycb": "ycb", "turn-faucet": "partnet_mobility_faucet"}


def _make_maniskill(spec: TaskSpec, render_mode: str | None) -> Parts:
    """A ManiSkill 3 task on its CPU simulator; drawn by the GPU if PyTorch sees one."""
    _import(spec.domain)
    import torch
    from mani_skill.utils import assets
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    import maniskill_tasks  # noqa: F401  registers LiftCube-v1

    torch.set_num_threads(1)  # its tensors have one row, and the cores are XLA's
    sources = assets.expand_data_group_into_individual_data_source_ids(_PACKAGE_IDS[spec.name])
    if not all(map(assets.is_data_source_downloaded, sources)):  # else it would ask on the terminal, and wait
        download = f"python -m mani_skill.utils.download_asset -y {_MANISKILL_ASSETS[spec.name]}"
        raise UserError(f"task {spec.name!r} needs files that are not here; download them with {download}")
    try:
        simulator = gym.make(
            _PACKAGE_IDS[spec.name],
            obs_mode="state",
            control_mode="pd_ee_delta_pos" if spec.name.endswith("-cube") else "pd_ee_delta_pose",
            sim_backend="physx_cpu",
            render_backend="gpu" if torch.cuda.is_available() else "cpu",
            render_mode=render_mode,
            human_render_camera_configs={"width": FRAME, "height": FRAME},
        ).unwrapped  # without its own time limit
    except RuntimeError as error:
        hint = "apt-get install -y libvulkan1 mesa-vulkan-drivers; without a GPU, Mesa must be 25 or newer"
        raise UserError(f"task {spec.name!r} needs Vulkan, also without pictures ({error}): {hint}") from error
    seconds = spec.action_repeat / simulator.control_freq
    return Parts(ManiSkill(CPUGymWrapper(simulator, ignore_terminations=True)), spec.action_repeat, seconds)


class ManiSkill(gym.Wrapper):
    """Every reset with a seed, of a stream of our own: its others draw from PyTorch's global generator."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self._seeds = np.random.default_rng(seed)
        return self.env.reset(seed=int(self._seeds.integers(2**31)), options=options)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------

GL_PACKAGES = "libegl1 libosmesa6 libgl1 libgl1-mesa-dri"


def check_rendering(task: str, obs: str = "state", render_mode: str | None = "rgb_array") -> None:
    """Draws one frame of the task, or with obs="rgb" and no render_mode an observation, to learn before a long run
    whether that works.

    Raises:
        UserError: no frame can be drawn; names what to install.
    """
    try:
        env = make_env(task, obs=obs, render_mode=render_mode)
        try:
            frame = env.reset()[0]
            frame = env.render() if render_mode else frame
        finally:
            env.close()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"task {task!r} cannot be drawn here: {error}") from error
    if frame is None or frame.ndim != 3:
        raise UserError(f"task {task!r} gives no pictures")


def _choose_gl() -> None:
    """Sets MUJOCO_GL to a way of drawing that works here: the user's choice, else EGL (GPU or Mesa), else OSMesa (CPU).

    Whether one works is not known before a context is made (the library may be there without a device), and PyOpenGL
    cannot change over in a process that has loaded the wrong one: so each is tried in a process of its own, once.

    Raises:
        UserError: none works.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen in _working_gl:
        return
    if chosen in ("disable", "disabled", "off", "false", "0"):
        raise UserError(f"MUJOCO_GL={chosen} forbids pictures: unset it, or set it to egl or osmesa")
    for name in [chosen] if chosen else ["egl", "osmesa", "glfw"]:
        probe = f"from mujoco.{name} import GLContext; GLContext({PIXELS}, {PIXELS}).make_current()"
        environment = {**os.environ, "MUJOCO_GL": "disable"}
        run = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, check=False)
        if run.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            _working_gl.add(name)
            return
    tried = f"MUJOCO_GL={chosen}" if chosen else "neither EGL nor OSMesa"
    raise UserError(f"pictures need OpenGL, and {tried} does not work here: apt-get install -y {GL_PACKAGES}")


_working_gl: set[str] = set()
_worker: int | None = None  # this process's number among the workers of a WorkerVectorEnv


def _choose_egl_device(environment: MutableMapping[str, str], worker: int | None, gpus: list[int]) -> bool:
    """On a machine with several GPUs, lets worker processes draw on them in turn, where MuJoCo would take the first for
    all; with CUDA_VISIBLE_DEVICES (numbers in PCI order) on those only. The user's MUJOCO_EGL_DEVICE_ID counts more. To
    be called before this process's first context is made; returns whether a choice was made."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    mine = [gpus[int(i)] for i in visible.split(",") if i.strip().isdecimal() and int(i) < len(gpus)]
    unrestricted = not visible and worker is not None  # the main process draws where MuJoCo likes
    if "MUJOCO_EGL_DEVICE_ID" in environment or len(gpus) < 2 or not (mine or unrestricted):
        return False
    environment["MUJOCO_EGL_DEVICE_ID"] = str((mine or gpus)[(worker or 0) % len(mine or gpus)])
    return True


@functools.cache
def _egl_gpus() -> list[int]:
    """EGL's numbers of the NVIDIA GPUs; other devices of its list may be one of these again, or draw on the CPU."""
    from mujoco.egl import egl_ext

    kind = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32)
    extensions = kind(egl_ext.eglGetProcAddress("eglQueryDeviceStringEXT"))
    devices = enumerate(egl_ext.eglQueryDevicesEXT())
    return [i for i, device in devices if b"EGL_NV_device_cuda" in (extensions(device, egl_ext.EGL_EXTENSIONS) or b"")]


def _gl_context(gl: Any, size: int) -> Any:
    """A GL context; with EGL on this process's GPU, or where that cannot be opened (EGL lists those of others, too), on
    the first that can."""
    chosen = os.environ["MUJOCO_GL"] == "egl" and _choose_egl_device(os.environ, _worker, _egl_gpus())
    try:
        return gl.GLContext(size, size)
    except (ImportError, RuntimeError):
        if not chosen:
            raise
    del os.environ["MUJOCO_EGL_DEVICE_ID"]
    gl.EGL_DISPLAY = None  # not the one that could not be opened
    return gl.GLContext(size, size)


def _turn_upright(model: Any, data: Any, camera: int) -> None:
    """Turns a camera that hangs upside down in this state by 180° about its line of sight."""
    import mujoco

    mujoco.mj_forward(model, data)
    if data.cam_xmat[camera, 7] < -0.5:  # z of the picture's upward direction
        mujoco.mju_mulQuat(model.cam_quat[camera], model.cam_quat[camera].copy(), [0.0, 0.0, 0.0, 1.0])


class MujocoCamera:
    """Draws square RGB frames of a MuJoCo model.

    dm_control's and MuJoCo's own renderers are bound to a GL library when they are imported; this one when it is made.

    Args:
        model: the MjModel to draw.
        size: height and width in pixels.
        camera_id: a camera of the model; the free camera if it has none.
        effects: draw shadows and reflections.
    """

    def __init__(self, model: Any, size: int, camera_id: int, effects: bool = True):
        self._gl_context = None
        import mujoco

        _choose_gl()
        self._mujoco, self.model = mujoco, model
        self._gl = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}")
        self._size, self._camera_id, self._effects = size, camera_id, effects

    def _open(self) -> None:
        mujoco, model = self._mujoco, self.model
        self._gl_context = _gl_context(self._gl, self._size)
        _close_cameras_at_exit()
        self._gl_context.make_current()
        # The offscreen buffer has the model's size, and copying one of 640 × 480 costs more than a small picture.
        settings = model.vis.global_
        before = settings.offwidth, settings.offheight
        settings.offwidth = settings.offheight = self._size
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        settings.offwidth, settings.offheight = before
        _open_cameras.add(self)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, 10_000)
        for effect in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[effect] &= self._effects
        self._viewport = mujoco.MjrRect(0, 0, self._size, self._size)
        self._option = mujoco.MjvOption()
        self._option.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = False  # sensor beams are no part of the scene
        self._camera = mujoco.MjvCamera()
        if model.ncam:
            self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._camera_id
        else:
            mujoco.mjv_defaultFreeCamera(model, self._camera)

    def frame(self, data: Any) -> np.ndarray:
        """The picture of a state (MjData): uint8 [size, size, 3], right way up."""
        if self._gl_context is None:
            self._open()
        mujoco = self._mujoco
        self._gl_context.make_current()  # another camera of this process may have been used in between
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self._option, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        picture = np.empty((self._size, self._size, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self._viewport, self._context)
        return picture[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Frees the GL context; a later frame opens a new one."""
        gl_context, self._gl_context = self._gl_context, None
        if gl_context is not None:
            gl_context.make_current()
            self._context.free()
            gl_context.free()

    def __del__(self):
        self.close()  # in its own GL context; else MuJoCo would free its numbers in whichever is current


_open_cameras: weakref.WeakSet[MujocoCamera] = weakref.WeakSet()


@functools.cache
def _close_cameras_at_exit() -> None:
    """To be called when a GL context was made: MuJoCo's own exit handler ends EGL, and the last ones run first."""

    def close() -> None:
        for camera in list(_open_cameras):
            with contextlib.suppress(Exception):  # another library's handler may have ended EGL already
                camera.close()

    atexit.register(close)


# ----------------------------------------------------------------------------------------------------------------------
# Many environments
# ----------------------------------------------------------------------------------------------------------------------


def make_envs(
    task: str | Sequence[str],
    num_envs: int,
    seed: int = 0,
    obs: str = "state",
    render_mode: str | None = None,
    num_workers: int | None = None,
    sizes: tuple[int, int] | None = None,
    shadows: bool = True,
) -> gym.vector.VectorEnv:
    """Makes `num_envs` environments that step together; environment i is `make_env(task, seed + i)`.

    With several tasks, they are `num_envs` of the first task, then as many of the next, and so on; observations are
    padded with zeros to the largest of them, and of an action each takes the entries that it needs.

    The step after an episode's end returns the next episode's first observation and ignores the action (NEXT_STEP).
    `reset(seed=s)` gives environment i the seed s + i. `infos["success"]` is float64 [num_envs]. What an environment
    returns depends on its seed and actions only, not on the number of workers.

    Args:
        task, seed, obs, shadows: as in `make_env`; task may also be several names of the table (with obs="state" only).
        num_envs: number of environments (of each task), at least 1.
        render_mode: "rgb_array": `envs.render()[i]` is a frame of environment i if it is the first of its task; the
            others draw nothing.
        num_workers: worker processes to spread the environments over; 0 steps them in this process. Default: what
            should be fastest for this task and number of cores (`default_workers`).
        sizes: of observation and action, if larger ones than those of the largest of several tasks are wanted.

    Raises:
        UserError: as `make_env`, or num_envs < 1.
    """
    if num_envs < 1:
        raise UserError(f"the number of environments must be at least 1, not {num_envs}")
    names, modes = [task_spec(task).name] if isinstance(task, str) else list(set_tasks(task)), [render_mode]
    modes += [None] * (num_envs - 1)
    sizes = None if isinstance(task, str) else sizes or set_sizes(names)
    one_each = [(name, mode) for name in names for mode in modes]
    makers = [
        functools.partial(_make_one, name, seed + i, obs, mode, shadows, sizes)
        for i, (name, mode) in enumerate(one_each)
    ]
    if num_workers is None:
        num_workers = default_workers(names, num_envs, obs=obs)
    if num_workers == 0:
        makers = [lambda make=make: SuccessOnly(make()) for make in makers]
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    return WorkerVectorEnv(names, makers, min(num_workers, len(makers)), render_mode)


def _make_one(
    name: str, seed: int, obs: str, render_mode: str | None, shadows: bool, sizes: tuple[int, int] | None
) -> gym.Env:
    env = make_env(name, seed, obs, render_mode, shadows)
    return Padded(env, *sizes) if sizes else env


class Padded(gym.Wrapper):
    """Observations with zeros behind them, and actions of which the first entries count: one shape for many tasks."""

    def __init__(self, env: gym.Env, obs_size: int, action_size: int):
        super().__init__(env)
        self._own, self._padding = env.action_space.shape[0], (0, obs_size - env.observation_space.shape[0])
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (action_size,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return np.pad(obs, self._padding), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, *rest = self.env.step(action[: self._own])
        return np.pad(obs, self._padding), *rest


def default_workers(tasks: str | Sequence[str], num_envs: int, cores: int | None = None, obs: str = "state") -> int:
    """The number of worker processes that should step num_envs environments of each task fastest; 0: this process does.

    n environments of t µs take n·t in this process. w workers take 1.3·⌈n/w⌉·t (their caches cool while they wait)
    and 50 + 30·w for the messages, as measured by benchmarks/environments.py. So 8 cartpoles (30 µs) stay here and two
    dogs (1.4 ms) get a worker each. Other Gymnasium tasks are taken for 100 µs, and drawing an observation for 2 ms (on
    a GPU less, in software 3 to 16).
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tasks = [tasks] if isinstance(tasks, str) else tasks
    each = np.mean([TASKS[task].microseconds if task in TASKS else 100 for task in tasks]) + 2000 * (obs == "rgb")
    num_envs *= len(tasks)
    workers = range(2, min(num_envs, cores) + 1)
    times = {0: num_envs * each} | {w: 1.3 * -(-num_envs // w) * each + 50 + 30 * w for w in workers}
    return min(times, key=times.get)


class SuccessOnly(gym.Wrapper):
    """Leaves of info what workers send: infos of all simulators cannot be joined, and joining them takes long."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return obs, {"success": info["success"]}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        *rest, info = self.env.step(action)
        return *rest, {"success": info["success"]}


class WorkerVectorEnv(gym.vector.VectorEnv):
    """Environments in worker processes, several to a worker, with everything but commands in shared memory.

    A worker is a fresh Python that imports this module and the simulator, nothing else. Gymnasium's AsyncVectorEnv
    either forks a process that has JAX's threads (deadlock), or imports the user's script, and with it JAX, in every
    worker (start 7 s instead of 1.7 s with four of them), and waits forever for one whose exception cannot be pickled.
    Our workers end when their pipe is closed, so none outlives its parent by more than the step under way.
    """

    def __init__(self, tasks: list[str], makers: list[Any], num_workers: int, render_mode: str | None):
        self._task = tasks[0] if len(tasks) == 1 else f"{tasks[0]}, … {tasks[-1]}"
        self.num_envs, self.render_mode = len(makers), render_mode
        self.processes: list[subprocess.Popen] = []
        self._pipes: list[Connection] = []
        self._rows_of = [np.arange(i, self.num_envs, num_workers) for i in range(num_workers)]  # every task to many
        registered = gym.registry.get(tasks[0])  # a task that the user's script registered is unknown to a fresh Python
        with tempfile.TemporaryFile() as shared:  # nameless: the kernel frees it with the last process, come what may
            try:
                for i, rows in enumerate(self._rows_of):
                    job = registered, slice(i, self.num_envs, num_workers), [makers[row] for row in rows]
                    self._start(shared.fileno(), job)
                (self.single_observation_space, self.single_action_space, self.metadata), *_ = (
                    self._receive(worker) for worker in range(num_workers)
                )
                record = _record(self.single_observation_space, self.single_action_space)
                os.ftruncate(shared.fileno(), record.itemsize * self.num_envs)
                self._records = np.frombuffer(mmap.mmap(shared.fileno(), 0), record)
                self._command_all("share", [None] * num_workers)
            except BaseException:
                self.close()
                raise
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**self.metadata, "autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def _start(self, shared: int, job: tuple) -> None:
        ours, theirs = Pipe()
        # Ctrl-C and a batch system's SIGTERM reach the whole process group; it is the parent that decides on the end.
        code = "import signal as s; s.signal(s.SIGINT, s.SIG_IGN); s.signal(s.SIGTERM, s.SIG_IGN); import sys; "
        code += "sys.path.insert(0, sys.argv[1]); import envs; envs._work(int(sys.argv[2]), int(sys.argv[3]))"
        here = os.path.dirname(os.path.abspath(__file__))
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}  # cores are XLA's
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", code, here, str(theirs.fileno()), str(shared)],
                env={**os.environ, **one_thread},
                pass_fds=(theirs.fileno(), shared),
                stdin=subprocess.DEVNULL,
            )
        self.processes.append(process)
        self._pipes.append(ours)
        self._send(len(self._pipes) - 1, sys.path)
        self._send(len(self._pipes) - 1, CloudpickleWrapper(job))  # by value what the user's script defines

    def _send(self, worker: int, message: Any) -> None:
        try:
            self._pipes[worker].send_bytes(pickle.dumps(message))  # Connection.send's pickler takes 5 µs longer
        except OSError:
            pass  # it has ended: _receive tells why

    def _receive(self, worker: int) -> Any:
        """A worker's answer; raises what went wrong if it failed or died."""
        try:
            answer, value = self._pipes[worker].recv()
        except (EOFError, OSError):
            code = self.processes[worker].wait()
            reason = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            answer, value = "failed", f"environment worker {worker} (process {self.processes[worker].pid}) {reason}"
        if answer == "done":
            return value
        raise UserError(value) if answer == "user error" else RuntimeError(f"task {self._task!r}: {value}")

    def _command_all(self, command: str, arguments: list[Any]) -> list[Any]:
        if self.closed:
            raise RuntimeError(f"task {self._task!r}: these environments are closed")
        try:
            for worker, argument in enumerate(arguments):
                self._send(worker, (command, argument))
            return [self._receive(worker) for worker in range(len(arguments))]
        except BaseException:  # a KeyboardInterrupt, too: unread answers would be taken for those of later commands
            self.close()
            raise

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None):
        """Starts an episode in every environment → obs [num_envs, …], infos."""
        if seed is None or isinstance(seed, int | np.integer):
            seed = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        self._command_all("reset", [([seed[i] for i in rows], options) for rows in self._rows_of])
        return self._records["obs"].copy(), self._infos()

    def step(self, actions: np.ndarray):
        """One decision in every environment, actions [num_envs, size] → obs, rewards, terminated, truncated, infos."""
        self._records["action"] = np.reshape(actions, self.action_space.shape)
        self._command_all("step", [None] * len(self._pipes))
        rec = self._records
        return rec["obs"].copy(), rec["reward"].copy(), rec["terminated"].copy(), rec["truncated"].copy(), self._infos()

    def _infos(self) -> dict[str, np.ndarray]:
        return {"success": self._records["success"].copy(), "_success": np.ones(self.num_envs, bool)}

    def render(self) -> tuple[np.ndarray | None, ...] | None:
        """A frame or None for every environment."""
        if self.render_mode is None:
            return None
        frames = self._command_all("render", [None] * len(self._pipes))
        return tuple(frames[i % len(frames)][i // len(frames)] for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the workers within 5 s, also those that hang or have failed."""
        deadline = time.monotonic() + 5
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _record(obs_space: gym.spaces.Box, action_space: gym.spaces.Box) -> np.dtype:
    """What parent and worker share of one environment."""
    fields = [("obs", obs_space.dtype, obs_space.shape), ("action", action_space.dtype, action_space.shape)]
    fields += [("reward", "f8"), ("terminated", "?"), ("truncated", "?"), ("success", "f8")]
    return np.dtype(fields, align=True)


def _work(pipe_fd: int, shared_fd: int) -> None:
    """A worker process: makes its environments, then obeys until the pipe is closed."""
    global _worker
    pipe = Connection(pipe_fd)
    envs: list[gym.Env] = []
    try:
        sys.path[:] = pipe.recv()
        registered, rows, makers = pipe.recv().fn
        _worker = rows.start
        if registered:
            gym.registry[registered.id] = registered
        envs += [make() for make in makers]
        pipe.send(("done", (envs[0].observation_space, envs[0].action_space, envs[0].metadata)))
        record = _record(envs[0].observation_space, envs[0].action_space)
        while True:
            command, argument = pipe.recv()
            value = None
            if command == "share":  # the parent has given the shared file its size
                records = np.frombuffer(mmap.mmap(shared_fd, 0), record)[rows]
            elif command == "reset":
                for record, env, seed in zip(records, envs, argument[0], strict=True):
                    _record_reset(record, env.reset(seed=seed, options=argument[1]))
            elif command == "step":
                for record, env in zip(records, envs, strict=True):
                    _record_step(record, env)
            elif command == "render":
                value = [env.render() for env in envs]
            pipe.send_bytes(pickle.dumps(("done", value)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has closed the pipe, or is no more
    except UserError as error:
        _report(pipe, "user error", str(error))
    except BaseException:
        _report(pipe, "failed", f"an environment of worker process {os.getpid()} raised\n{traceback.format_exc()}")
    finally:
        for env in envs:
            env.close()


def _report(pipe: Connection, kind: str, text: str) -> None:
    with contextlib.suppress(OSError):  # the parent may be gone
        pipe.send((kind, text))


def _record_reset(record: np.void, result: tuple[np.ndarray, dict]) -> None:
    record["obs"], info = result
    record["reward"], record["terminated"], record["truncated"], record["success"] = 0.0, False, False, info["success"]


def _record_step(record: np.void, env: gym.Env) -> None:
    if record["terminated"] or record["truncated"]:  # NEXT_STEP autoreset
        _record_reset(record, env.reset())
    else:
        record["obs"], record["reward"], record["terminated"], record["truncated"], info = env.step(record["action"])
        record["success"] = info["success"]


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch files without PyTorch
# ----------------------------------------------------------------------------------------------------------------------

_STORAGE_DTYPES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "QInt8Storage": "int8", "QUInt8Storage": "uint8",
}  # fmt: skip


def load_pt(path: str | os.PathLike, in_place: bool = False) -> Any:
    """Reads a file written by torch.save (the zip format, PyTorch 1.6 or later) without PyTorch.

    Only tensors and plain containers are read; a pickle that names anything else is refused before anything is run.

    Args:
        path: the file.
        in_place: leave the numbers in the file and map them into memory, read-only: costs no memory of the process, and
            checks no checksum. The file must not change while the arrays are in use.

    Returns:
        What was saved, with numpy arrays for tensors: `load_pt(path)["model"]["_encoder.state.0.weight"]`, and dicts
        for TensorDicts. float16 stays float16; bfloat16 becomes float32, and per-tensor quantised tensors their
        float32 values.

    Raises:
        UserError: the file is missing, damaged, no PyTorch file, or holds something else than tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is a zip file, but not one that PyTorch wrote")
            with archive.open(pickles[0]) as file:
                return _TensorUnpickler(file, archive, pickles[0].removesuffix("data.pkl"), in_place).load()
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a PyTorch file") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is damaged or no PyTorch file ({error})") from None
    except Exception as error:  # a pickle can go wrong in as many ways as there are bytes
        raise UserError(f"{path} cannot be read as a PyTorch file ({type(error).__name__}: {error})") from None


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers; everything else is refused by name."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str, in_place: bool):
        super().__init__(file, encoding="utf-8")
        self._archive, self._prefix, self._map = archive, prefix, None
        if in_place:
            self._map = mmap.mmap(archive.fp.fileno(), 0, access=mmap.ACCESS_READ)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch", "per_tensor_affine"): "per_tensor_affine",
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor if self._map is None else _view_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch._utils", "_rebuild_qtensor"): _rebuild_quantised,
            ("tensordict.tensordict", "TensorDict"): _TensorDict,  # up to version 0.2
            ("tensordict._td", "TensorDict"): _TensorDict,  # from version 0.3 on
            ("tensordict._reductions", "_make_td"): _make_tensordict,
            ("tensordict.utils", "_StringOnlyDict"): dict,
            ("__builtin__", "set"): set,
            ("builtins", "set"): set,
        }
        if (module, name) not in allowed:
            raise UserError(f"refused, since it would run {module}.{name}; only tensors and plain containers are read")
        return allowed[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """A storage, ("storage", dtype, key, device, number of elements) → its numbers [n]."""
        _, dtype, key, _, _ = pid
        if self._map is not None and dtype != "bfloat16":
            return self._storage_in_place(f"{self._prefix}data/{key}", np.dtype(dtype).newbyteorder("<"))
        data = self._archive.read(f"{self._prefix}data/{key}")  # checks the CRC, so damaged numbers do not pass
        if dtype == "bfloat16":  # the upper half of a float32
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))

    def _storage_in_place(self, name: str, dtype: np.dtype) -> np.ndarray:
        member = self._archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError("its numbers are compressed, which PyTorch never does")
        header = self._map[member.header_offset : member.header_offset + 30]  # the local one: its lengths may differ
        name_length, extra_length = struct.unpack("<26x2H", header)
        start = member.header_offset + 30 + name_length + extra_length
        return np.frombuffer(self._map, dtype, member.file_size // dtype.itemsize, start)


class _TensorDict(dict):
    """tensordict.TensorDict: a dict of tensors, pickled as the state of an object."""

    def __setstate__(self, state: dict) -> None:
        self.update(state["_tensordict"])


def _make_tensordict(cls: type, state: dict) -> _TensorDict:
    tensors = cls()
    tensors.__setstate__(state)
    return tensors


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    return np.array(_view_tensor(storage, offset, size, stride), order="C")  # writable, and the storage is freed


def _view_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise UserError("damaged, a tensor reaches beyond its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


def _rebuild_quantised(storage: np.ndarray, offset: int, size: tuple, stride: tuple, quantiser: tuple, *_: Any):
    scheme, scale, zero_point = quantiser
    if scheme != "per_tensor_affine":
        raise UserError("per-channel quantised tensors are not supported")
    tensor = _rebuild_tensor(storage, offset, size, stride)
    return (tensor.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


# ----------------------------------------------------------------------------------------------------------------------
# Offline datasets
# ----------------------------------------------------------------------------------------------------------------------

_CHUNKS = {"mt30": 4, "mt80": 20}  # files of the published datasets


def set_tasks(task_set: str | Sequence[str]) -> tuple[str, ...]:
    """Canonical names of a multi-task set's tasks, in the order of their ids: "mt30", "mt80", or a list of names.

    Raises:
        UserError: there is no such set or task, a name stands twice, or the table does not give the task's sizes.
    """
    if isinstance(task_set, str) and task_set not in TASK_SETS:
        raise UserError(f"unknown task set {task_set!r}; there are {' and '.join(TASK_SETS)}, and lists of tasks")
    tasks = TASK_SETS[task_set] if isinstance(task_set, str) else tuple(task_spec(task).name for task in task_set)
    for task in tasks:
        if task not in TASKS or TASKS[task].obs_size is None:
            raise UserError(f"task {task!r} cannot be in a set: only tasks of the table whose sizes it gives can")
        if tasks.count(task) > 1:
            raise UserError(f"task {task!r} stands twice in the set")
    return tasks


def set_sizes(tasks: Sequence[str]) -> tuple[int, int]:
    """Sizes of the largest observation and of the largest action of these tasks: those of all others are padded."""
    return max(TASKS[task].obs_size for task in tasks), max(TASKS[task].action_size for task in tasks)


def load_dataset(task_set: str | Sequence[str], data_dir: str | os.PathLike) -> Dataset:
    """Opens the episodes of a set of tasks where they lie: nothing is copied into memory, see `Dataset.to_host`.

    `data_dir` holds the original's files `chunk_0.pt`, `chunk_1.pt`, … as they are, or a folder of such files for every
    task, as `EpisodeWriter` leaves it. A file is a TensorDict [episodes, entries] of obs [·, ·, O], action [·, ·, A],
    reward and task, the task's place in the set: a set's files need all its names, in its order. O and A are the sizes
    of the set's largest tasks, smaller ones are padded with zeros; a file in a task's own folder is a set of this one
    task. Entry 0 of an episode is its reset, with filler for action and reward; entry i has the action that led to it
    and the reward it brought.

    Args:
        task_set: "mt30", "mt80", or names of tasks.
        data_dir: folder of the files, or of the tasks' folders.

    Raises:
        UserError: names the file that is missing, cannot be read, or does not fit the set.
    """
    tasks, folder = set_tasks(task_set), pathlib.Path(data_dir)
    if any(folder.glob("chunk_*.pt")):
        chunks = _open_chunks(folder, tasks, np.arange(len(tasks)))
        expected = _CHUNKS.get(task_set) if isinstance(task_set, str) else None
        if expected and len(chunks) < expected:
            warnings.warn(f"{folder} holds {len(chunks)} of the {expected} files of {task_set}", stacklevel=2)
        return Dataset(tasks, chunks)
    missing = [task for task in tasks if not (folder / task).is_dir()]
    if missing:
        raise UserError(f"{folder} holds neither chunk_0.pt, chunk_1.pt, … nor a folder {missing[0]} of such files")
    return Dataset(
        tasks, [c for i, task in enumerate(tasks) for c in _open_chunks(folder / task, (task,), np.array([i]))]
    )


class Chunk(NamedTuple):
    """One file of a dataset."""

    path: pathlib.Path
    obs: np.ndarray  # [episodes, entries, O]
    action: np.ndarray  # [episodes, entries, A]
    reward: np.ndarray  # [episodes, entries]
    task: np.ndarray  # [episodes, entries], place in `ids`
    ids: np.ndarray  # the set's ids of the tasks that the file is about


def _open_chunks(folder: pathlib.Path, tasks: tuple[str, ...], ids: np.ndarray) -> list[Chunk]:
    found = {int(path.stem[6:]): path for path in folder.glob("chunk_*.pt") if path.stem[6:].isdecimal()}
    missing = [folder / f"chunk_{i}.pt" for i in range(max(found, default=0) + 1) if i not in found]
    if missing:
        there = f", though there is {found[max(found)].name}" if found else ""
        raise UserError(f"{missing[0]} is missing{there}")
    return [_check_chunk(path, load_pt(path, in_place=True), tasks, ids) for _, path in sorted(found.items())]


def _check_chunk(path: pathlib.Path, tensors: Any, tasks: tuple[str, ...], ids: np.ndarray) -> Chunk:
    names = Chunk._fields[1:-1]
    if not isinstance(tensors, dict) or not set(names) <= set(tensors):
        raise UserError(f"{path} is no dataset: it must hold {', '.join(names)}")
    chunk = Chunk(path, *(tensors[name] for name in names), ids)
    for name, ndim in (("obs", 3), ("action", 3), ("reward", 2), ("task", 2)):
        array = getattr(chunk, name)
        if not isinstance(array, np.ndarray) or array.ndim != ndim or array.shape[:2] != chunk.obs.shape[:2]:
            raise UserError(f"{path}: {name} has shape {np.shape(array)}, which does not fit obs {chunk.obs.shape}")
        if array.dtype.kind not in ("iu" if name == "task" else "f"):
            raise UserError(f"{path}: {name} is of type {array.dtype}")
    for name, size in zip(("obs", "action"), set_sizes(tasks), strict=True):
        if getattr(chunk, name).shape[2] != size:
            raise UserError(f"{path}: {name} has size {getattr(chunk, name).shape[2]}, these tasks need {size}")
    if 0 in chunk.obs.shape:
        raise UserError(f"{path} holds no episodes")
    return chunk


class Dataset:
    """Episodes of several tasks, from `load_dataset`.

    Attributes:
        tasks: names, in the order of their ids.
        chunks: the files; episodes of one file have the same number of entries.
        obs_size, action_size: of the set; smaller observations and actions are padded with zeros.
        num_episodes, num_entries: of all files together.
        nbytes: of all arrays.
    """

    def __init__(self, tasks: tuple[str, ...], chunks: list[Chunk]):
        self.tasks, self.chunks = tasks, chunks
        self.obs_size, self.action_size = set_sizes(tasks)
        self.num_episodes = sum(len(chunk.obs) for chunk in chunks)
        self.num_entries = sum(chunk.task.size for chunk in chunks)
        self.nbytes = sum(array.nbytes for chunk in chunks for array in chunk[1:-1])

    def to_host(self) -> Dataset:
        """The same episodes held in memory; UserError if a number among them is not finite or a task not of the set."""
        chunks = []
        for chunk in self.chunks:
            for i in range(0, len(chunk.obs), 1000):
                self._read(chunk, np.arange(i, min(i + 1000, len(chunk.obs)))[:, None], np.arange(chunk.obs.shape[1]))
            chunks.append(Chunk(chunk.path, *map(np.array, chunk[1:-1]), chunk.ids))
        return Dataset(self.tasks, chunks)

    def check_files(self) -> None:
        """Reads all files and compares their checksums; UserError if one is damaged."""
        for chunk in self.chunks:
            with zipfile.ZipFile(chunk.path) as archive:
                if bad := archive.testzip():
                    raise UserError(f"{chunk.path} is damaged (checksum of {bad})")

    def window_table(self, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the windows of horizon + 1 entries within one episode are, as int64 arrays over the F files: the
        windows up to and with each file [F], the file's first entry in the whole [F], and its entries an episode [F].
        """
        episodes, entries = np.array([chunk.obs.shape[:2] for chunk in self.chunks]).T
        windows = np.cumsum(episodes * np.maximum(entries - horizon, 0))
        if windows[-1] == 0:
            raise UserError(f"episodes of {entries.max()} entries have no windows of {horizon + 1}")
        return windows, np.cumsum(episodes * entries) - episodes * entries, entries

    def sample(
        self, rng: np.random.Generator, batch_size: int, horizon: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """Draws windows of horizon + 1 entries within one episode, each start equally likely.

        Args:
            rng: gives as many numbers whatever `rows` is.
            batch_size: number B of windows drawn.
            horizon: H.
            rows: the part of the batch to read and return: what one of several hosts needs.

        Returns:
            float32 obs [H+1, B, O], action [H, B, A], reward [H, B]; int32 task [B].

        Raises:
            UserError: what was drawn holds NaN, or a task that is not of the set; names the file and the episode.
        """
        ends, _, entries = self.window_table(horizon)
        window = rng.integers(ends[-1], size=batch_size)[rows]
        which = np.searchsorted(ends, window, side="right")
        batch = {
            "obs": np.zeros((len(window), horizon + 1, self.obs_size), np.float32),
            "action": np.zeros((len(window), horizon, self.action_size), np.float32),
            "reward": np.empty((len(window), horizon), np.float32),
            "task": np.empty(len(window), np.int32),
        }
        for i in np.unique(which):
            mine = which == i
            starts = entries[i] - horizon  # in one episode
            episode, start = np.divmod(window[mine] - (ends[i - 1] if i else 0), starts)
            read = self._read(self.chunks[i], episode[:, None], start[:, None] + np.arange(horizon + 1))
            batch["obs"][mine, :, : read["obs"].shape[2]] = read["obs"]
            batch["action"][mine, :, : read["action"].shape[2]] = read["action"][:, 1:]
            batch["reward"][mine], batch["task"][mine] = read["reward"][:, 1:], read["task"][:, 0]
        return {name: values if name == "task" else values.swapaxes(0, 1) for name, values in batch.items()}

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Entries start … stop of the whole, all episodes of all files in a row, to hold them elsewhere.

        Returns:
            obs [n, O], action [n, A], reward [n] in the type of the files, with zeros for filler; int16 task [n].

        Raises:
            UserError: as `sample`.
        """
        parts, first = [], 0
        for chunk in self.chunks:
            inside = slice(max(start - first, 0), max(min(stop - first, chunk.task.size), 0))
            episode, entry = np.divmod(np.arange(inside.start, inside.stop), chunk.obs.shape[1])
            first += chunk.task.size
            if not len(episode):
                continue
            read = self._read(chunk, episode[:, None], entry[:, None])
            widths = {"obs": self.obs_size, "action": self.action_size}
            for name, width in widths.items():
                read[name] = np.pad(read[name], [(0, 0), (0, 0), (0, width - read[name].shape[2])])
            read["action"][entry == 0], read["reward"][entry == 0] = 0, 0
            parts.append({name: values[:, 0] for name, values in read.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _read(self, chunk: Chunk, episode: np.ndarray, entry: np.ndarray) -> dict[str, np.ndarray]:
        """Entries [E, n] of episodes [E, 1], checked; filler stands only at the windows' first entries."""
        read = {name: getattr(chunk, name)[episode, entry] for name in ("obs", "action", "reward")}
        behind_reset = np.broadcast_to(entry > 0, read["reward"].shape)
        for name, values in read.items():
            finite = np.isfinite(values) if name == "reward" else np.isfinite(values).all(-1)
            finite |= ~behind_reset & (name != "obs")
            if not finite.all():
                where = episode[~finite.all(1)][0, 0]
                raise UserError(f"{chunk.path}: {name} of episode {where} is not finite")
        task = chunk.task[episode, entry]
        outside = (task < 0) | (task >= len(chunk.ids))
        if outside.any():
            where = f"episode {episode[outside.any(1)][0, 0]} is of task {task[outside][0]}"
            raise UserError(f"{chunk.path}: {where}, but the set has {len(chunk.ids)} task{'s' * (len(chunk.ids) > 1)}")
        return read | {"task": chunk.ids[task].astype(np.int16)}

    def batches(
        self,
        seed: int,
        batch_size: int,
        horizon: int,
        first: int = 0,
        readers: int = 4,
        rows: slice = slice(None),
    ):
        """Endless batches of `sample`, drawn ahead by threads; batch i depends on the seed and i only.

        Args:
            first: number of the first batch: a resumed run goes on where it was.
            readers: threads; each holds two batches ready. Reading lets other threads run.
            rows: as in `sample`.
        """

        def draw(i: int) -> dict[str, np.ndarray]:
            return self.sample(np.random.default_rng((seed, i)), batch_size, horizon, rows)

        pool = ThreadPoolExecutor(readers)
        try:
            ahead = deque(pool.submit(draw, i) for i in range(first, first + 2 * readers))
            for i in itertools.count(first + 2 * readers):
                yield ahead.popleft().result()
                ahead.append(pool.submit(draw, i))
        finally:
            pool.shutdown(cancel_futures=True)


class EpisodeWriter:
    """Writes a task's episodes to DATA_DIR/TASK/chunk_0.pt, chunk_1.pt, …, as `load_dataset` reads them.

    PyTorch with tensordict reads the files, too. They are complete or absent at any moment, and several runs may write
    to one folder: each takes the next free number.
    """

    def __init__(self, data_dir: str | os.PathLike, task: str, num_envs: int):
        spec = task_spec(task)
        set_tasks([task])
        self._folder = pathlib.Path(data_dir, spec.name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"episodes cannot be written to {self._folder}: {error.strerror}") from None
        row, length = TASKS[spec.name], spec.episode_length + 1
        self._open = {  # the episodes under way
            "obs": np.zeros((num_envs, length, row.obs_size), np.float32),
            "action": np.zeros((num_envs, length, row.action_size), np.float32),
            "reward": np.zeros((num_envs, length), np.float32),
        }
        self._entry, self._finished = np.full(num_envs, -1), []

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, first: np.ndarray) -> None:
        """Takes one step of all environments; where `first`, it is a reset, whose action and reward are filler."""
        envs, self._entry = np.arange(len(first)), np.where(first, 0, self._entry + 1)
        self._open["obs"][envs, self._entry] = obs
        self._open["action"][envs, self._entry] = np.where(first[:, None], np.nan, action)
        self._open["reward"][envs, self._entry] = np.where(first, np.nan, reward)
        for i in np.flatnonzero(self._entry + 1 == self._open["reward"].shape[1]):
            self._finished.append({name: values[i].copy() for name, values in self._open.items()})

    def flush(self) -> None:
        """Writes the episodes that have ended since the last call, if there are any, to a file of their own."""
        if not self._finished:
            return
        tensors = {name: np.stack([episode[name] for episode in self._finished]) for name in self._open}
        temporary = self._folder / f".writing-{os.getpid()}"
        save_tensordict(temporary, tensors | {"task": np.zeros(tensors["reward"].shape, np.int64)})
        for i in itertools.count():
            path = self._folder / f"chunk_{i}.pt"
            try:
                os.link(temporary, path)
                break
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                if not path.exists():
                    temporary.rename(path)
                    break
        temporary.unlink(missing_ok=True)
        self._finished = []


def save_tensordict(path: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """Writes arrays that share their first two axes as torch.save would write them in a TensorDict, without PyTorch.

    The pickle names the class as tensordict 0.1 and 0.2 do, where later versions find it, too.
    """
    kinds = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage"}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    def tensor(key: int, array: np.ndarray) -> bytes:
        kind, strides = kinds[array.dtype.str[1:]], [stride // array.itemsize for stride in array.strides]
        storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(str(key)) + text("cpu")
        storage += numbers([array.size])[1:-1] + b"tQ"
        arguments = storage + numbers([0])[1:-1] + numbers(array.shape) + numbers(strides)
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89ccollections\nOrderedDict\n)RtR"

    members = b"".join(text(name) + tensor(key, array) for key, (name, array) in enumerate(arrays.items()))
    state = text("_tensordict") + b"}(" + members + b"u" + text("_batch_size")
    state += b"ctorch\nSize\n" + numbers(next(iter(arrays.values())).shape[:2]) + b"\x85R"
    state += b"".join(text(name) + b"\x89" for name in ("_is_shared", "_is_memmap", "_is_locked"))
    state += text("_device") + b"N" + text("_names") + b"N"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ctensordict.tensordict\nTensorDict\n)\x81}(" + state + b"ub.")
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            info = zipfile.ZipInfo(f"archive/data/{key}")
            padding = -(archive.fp.tell() + 30 + len(info.filename) + 4) % 64  # aligned when they are mapped
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            archive.writestr(info, array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        archive.writestr("archive/version", "3\n")


# ----------------------------------------------------------------------------------------------------------------------
# The table of tasks
# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Prints every task of the table; loads no simulator."""
    print(f"{'domain':<12}{'task':<34}{'obs':>5}{'action':>8}{'episode':>9}  installed")
    for name, (domain, obs_size, action_size, _) in TASKS.items():
        settings = DOMAINS[domain]
        installed = "yes" if importlib.util.find_spec(settings.module.split(".")[0]) else settings.install
        obs_text = "?" if obs_size is None else obs_size
        print(f"{domain:<12}{name:<34}{obs_text:>5}{action_size:>8}{settings.episode_length:>9}  {installed}")
    print(f"{len(TASKS)} tasks; episode = decisions. Any Gymnasium id with Box actions works too (HalfCheetah-v5).")


if __name__ == "__main__":
    main()
