"""Any registered Gymnasium id whose actions are a Box and whose observations are a flat Box."""

from typing import Any

from tdmpc2_support.envs import rendering
from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.tasks import TaskSpec, gym_spec, open_gym


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """The environment as it is registered, time limit included."""
    options: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
    if render_mode and str(gym_spec(spec.name).entry_point).startswith("gymnasium.envs.mujoco"):
        rendering.choose_gl()
        options.update(width=rendering.FRAME, height=rendering.FRAME)
    env = open_gym(spec.name, **options)
    fps = env.metadata.get("render_fps")
    return Simulator(env, fps and 1 / fps)
