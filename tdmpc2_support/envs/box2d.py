"""Gymnasium's lunar lander as Newt has it: an episode never ends before its time."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.tasks import TaskSpec, import_simulator


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """The lander with two continuous engines."""
    import_simulator(spec.domain)
    options = {"continuous": True, "render_mode": render_mode, "disable_env_checker": True}
    env = gym.make("LunarLander-v3", max_episode_steps=-1, **options).unwrapped
    return Simulator(Endless(env), 1 / 50)


class Endless(gym.Wrapper):
    """Once it has landed or crashed, it stays as it is. Rewards are cut to -5 to 10 and divided by 20."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self._last: np.ndarray | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self._last = None
        return self.env.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._last is not None:
            return self._last, 0.0, False, False, {}
        obs, reward, terminated, _, _ = self.env.step(action)
        if terminated:
            self._last = obs
        return obs, float(np.clip(reward, -5.0, 10.0)) / 20, False, False, {}
