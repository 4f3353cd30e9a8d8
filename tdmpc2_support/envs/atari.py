"""Atari games of ale-py as Newt has them: the console's memory is seen, three numbers are the joystick."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.tasks import TaskSpec, import_simulator

GAMES = {"beamrider": "BeamRider", "upndown": "UpNDown"}  # that do not follow from the tasks' names


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """A game by the name of its task: atari-ms-pacman is MsPacman."""
    import_simulator(spec.domain)
    import ale_py

    gym.register_envs(ale_py)
    short = spec.name.removeprefix("atari-")
    game = GAMES.get(short, "".join(word.title() for word in short.split("-")))
    options = {"obs_type": "ram", "continuous": True, "frameskip": 1, "full_action_space": True}
    env = gym.make(f"ALE/{game}-v5", render_mode=render_mode, disable_env_checker=True, **options)
    return Simulator(Endless(env.unwrapped), 1 / 60, seeds=2**31)


class Endless(gym.Wrapper):
    """A game that is over begins anew within the episode. The memory's bytes are shares of 255; the joystick is pushed
    so far in a direction, both from -1 to 1, and so is its button."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (128,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return _shares(self.env.reset(seed=seed)[0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        if terminated or truncated:
            obs, _ = self.env.reset()
        return _shares(obs), float(reward), False, False, {}


def _shares(memory: np.ndarray) -> np.ndarray:
    return memory.astype(np.float32) / np.float32(255)
