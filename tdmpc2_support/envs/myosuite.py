"""MyoSuite 3, as TD-MPC2 uses it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.rendering import turn_upright
from tdmpc2_support.envs.tasks import PACKAGE_IDS, TaskSpec, import_simulator


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """A task of the hand; -hard draws goal or object anew at every reset."""
    import_simulator(spec.domain)
    simulator = gym.make(PACKAGE_IDS[spec.name], disable_env_checker=True).unwrapped  # without its own time limit
    camera = simulator.model.camera("hand_side_inter").id
    simulator.reset(seed=0)
    turn_upright(simulator.model, simulator.data, camera)  # it is fixed to the arm, which some tasks' resets turn over
    return Simulator(MyoSuite(simulator), simulator.dt, lambda: (simulator.model, simulator.data), camera)


class MyoSuite(gym.Wrapper):
    """Episodes go on when the object is dropped or the hand strays, as in TD-MPC2."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return self.env.reset(seed=seed)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, _, _, info = self.env.step(action)
        return obs, reward, False, False, {"success": float(info["solved"])}
