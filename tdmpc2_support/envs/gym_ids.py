"""Any registered Gymnasium id whose actions are a Box."""

import contextlib
import sys
from typing import Any

import numpy as np

from tdmpc2_support.envs import rendering
from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.guard import as_numbers
from tdmpc2_support.envs.tasks import TaskSpec, gym_spec, open_gym
from tdmpc2_support.errors import UserError


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """The environment as it is registered."""
    options: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
    of_gymnasium = str(gym_spec(spec.name).entry_point).startswith("gymnasium.envs.mujoco")
    if render_mode and of_gymnasium:
        rendering.choose_gl()
        options.update(width=rendering.FRAME, height=rendering.FRAME)
    env = open_gym(spec.name, **options)
    if render_mode and not of_gymnasium and "mujoco" in sys.modules:  # somebody's own may draw by MuJoCo, too
        with contextlib.suppress(UserError):
            rendering.choose_gl()
    seconds = positive(getattr(env.unwrapped, "dt", None))
    if seconds is None:
        fps = positive((getattr(env, "metadata", None) or {}).get("render_fps"))
        seconds = fps and 1 / fps
    return Simulator(env, seconds, seeds=2**31)  # many pass theirs on to what takes 32 bits with a sign


def positive(value: Any) -> float | None:
    """A positive number of somebody's environment, or None where it is something else."""
    number = as_numbers(value)
    return number.item() if number is not None and number.size == 1 and 0 < number.item() < np.inf else None
