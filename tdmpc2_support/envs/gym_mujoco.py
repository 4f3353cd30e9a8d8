"""Gymnasium's MuJoCo tasks as Newt has them: an episode never ends before its time."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.tasks import TaskSpec, import_simulator

IDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mujoco-ant": ("Ant-v5", {"include_cfrc_ext_in_observation": False}),
    "mujoco-halfcheetah": ("HalfCheetah-v5", {}),
    "mujoco-hopper": ("Hopper-v5", {}),
    "mujoco-inverted-pendulum": ("InvertedPendulum-v5", {}),
    "mujoco-reacher": ("Reacher-v5", {}),
    "mujoco-walker": ("Walker2d-v5", {}),
}


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """A task whose model is drawn by the camera that follows it."""
    import_simulator(spec.domain)
    name, options = IDS[spec.name]
    env = gym.make(name, max_episode_steps=-1, disable_env_checker=True, **options).unwrapped
    return Simulator(Endless(env, spec.name), env.dt, lambda: (env.model, env.data))


class Endless(gym.Wrapper):
    """The same without ends. A hopper or walker that has fallen gets -1 for every step, and never less than 0 before;
    a pendulum that has fallen gets nothing. The reacher's observation has the height of the target's distance, too."""

    def __init__(self, env: gym.Env, name: str):
        super().__init__(env)
        self._falls = name in ("mujoco-hopper", "mujoco-walker")
        self._reacher = name == "mujoco-reacher"
        self._fallen = False
        if self._reacher:
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)

    def _observed(self, obs: np.ndarray) -> np.ndarray:
        if not self._reacher:
            return obs
        data = self.env.data
        return np.append(obs, data.body("fingertip").xpos[2] - data.body("target").xpos[2])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self._fallen = False
        obs, info = self.env.reset(seed=seed)
        return self._observed(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, _, _ = self.env.step(action)
        if self._falls:
            reward = -1.0 if terminated else max(0.0, float(reward))
        elif terminated:
            self._fallen = True
        if self._fallen and not self._falls:
            reward = 0.0
        return self._observed(obs), float(reward), False, False, {}
