"""Any registered Gymnasium id whose actions are a Box."""

from typing import Any

import numpy as np

from tdmpc2_support.envs import rendering
from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.guard import as_numbers
from tdmpc2_support.envs.tasks import TaskSpec, gym_spec, open_gym


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """The environment as it is registered."""
    options: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
    if render_mode and str(gym_spec(spec.name).entry_point).startswith("gymnasium.envs.mujoco"):
        rendering.choose_gl()
        options.update(width=rendering.FRAME, height=rendering.FRAME)
    env = open_gym(spec.name, **options)
    fps = as_numbers((getattr(env, "metadata", None) or {}).get("render_fps"))
    seconds = None
    if fps is not None and fps.size == 1 and 0 < fps.item() < np.inf:
        seconds = 1 / fps.item()
    return Simulator(env, seconds, seeds=2**31)  # many pass theirs on to what takes 32 bits with a sign
