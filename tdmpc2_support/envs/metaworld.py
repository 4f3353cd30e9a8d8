"""Meta-World 3, as TD-MPC2 uses it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.rendering import turn_upright
from tdmpc2_support.envs.tasks import TaskSpec, import_simulator

# Of its 39 numbers: position of the hand, opening of the gripper, positions and orientations of two objects, all of
# these one simulator step before, and the goal's position.
PARTS = {"hand": 3, "gripper": 1, "objects": 14, "before": 18, "goal": 3}


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """A Meta-World task with its goal in the observation, seen by camera corner2, moved as in TD-MPC2."""
    import_simulator(spec.domain)
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    simulator = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{spec.name.removeprefix('mw-')}-v3-goal-observable"](seed=0)
    model, camera = simulator.model, simulator.model.camera("corner2").id
    model.cam_pos[camera] = 0.75, 0.075, 0.7
    turn_upright(model, simulator.data, camera)
    return Simulator(MetaWorld(simulator), simulator.dt, lambda: (model, simulator.data), camera, parts=PARTS)


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
