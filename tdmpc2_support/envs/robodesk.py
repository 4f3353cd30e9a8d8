"""RoboDesk as Newt has it: a robot arm at a desk, seen by its numbers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.tasks import TaskSpec, import_simulator

KEYS = ("qpos_robot", "qvel_robot", "qpos_objects", "qvel_objects", "end_effector")


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """A task with its dense reward, and success where the package sees it."""
    import_simulator(spec.domain)
    import robodesk

    task = spec.name.removeprefix("rd-").replace("-", "_")
    desk = robodesk.RoboDesk(task=task, reward="dense", episode_length=0)
    picture = np.zeros((64, 64, 3), np.uint8)
    desk.render = lambda *args, **kwargs: picture  # it draws at every step otherwise
    env = Desk(desk, task)
    return Simulator(env, 0.02, lambda: (desk.physics.model.ptr, desk.physics.data.ptr), repeats=True)


class Desk(gym.Env):
    """The same as a Gymnasium environment, with a random stream of its own: the package's is NumPy's global one."""

    def __init__(self, desk: Any, task: str):
        self.desk = desk
        self.success = desk.reward_functions[task]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (73,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (5,), np.float64)
        self._stream = np.random.RandomState(0)

    def _observed(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([obs[key] for key in KEYS])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self._stream = np.random.RandomState(seed)
        others = np.random.get_state()
        np.random.set_state(self._stream.get_state())
        try:
            obs = self.desk.reset()
            self._stream.set_state(np.random.get_state())
        finally:
            np.random.set_state(others)
        return self._observed(obs), {}

    def step(self, action: np.ndarray, repeat: int = 1) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Holds the action for so many of its steps."""
        self.desk.action_repeat = repeat
        obs, reward, _, _ = self.desk.step(action)
        return self._observed(obs), float(reward), False, False, {"success": float(np.max(self.success("success")))}
