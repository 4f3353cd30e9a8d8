"""The DeepMind Control Suite, with the tasks that TD-MPC2 adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.guard import is_image
from tdmpc2_support.envs.tasks import TASKS, TaskSpec, import_simulator
from tdmpc2_support.errors import UserError


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """A task of the table from dm_control's suite or our own ones; another `dm_control/…` id by way of shimmy."""
    import_simulator(spec.domain)
    if spec.name in TASKS:
        from tdmpc2_support.envs import dmcontrol_tasks

        env = DMControl(dmcontrol_tasks.load(spec.name))
        seconds = env.dm_env.control_timestep()
    else:
        try:
            env = ShimmyDMControl(gym.make(spec.name, disable_env_checker=True), spec)
        except RuntimeError as error:  # dm_control draws a first observation where that is an image
            raise UserError(f"task {spec.name!r} cannot be made (are its observations images?): {error}") from error
        seconds = env.unwrapped.dt
    camera = 2 if spec.name.startswith("quadruped") else 0  # quadruped's camera 0 does not follow it

    def scene() -> tuple[Any, Any]:
        physics = env.unwrapped.physics
        return physics.model.ptr, physics.data.ptr

    return Simulator(env, seconds, scene, camera, repeats=spec.name in TASKS, parts=env.parts)


class DMControl(gym.Env):
    """A suite task of dm_control as a Gymnasium environment, which repeats an action by itself.

    The observation is the values of dm_control's observation dict, flattened in its order. The repeat is here and not
    in `Task` because only the last simulator step needs an observation, and the simulator is stepped directly: what
    dm_env.step does around it takes longer than the physics of a small model.
    """

    def __init__(self, dm_env: Any):
        import mujoco

        self.dm_env, self._mujoco = dm_env, mujoco
        self._model, self._data = self.physics.model.ptr, self.physics.data.ptr
        self._substeps = round(dm_env.control_timestep() / self.physics.timestep())
        self._two_halves = self._model.opt.integrator != mujoco.mjtIntegrator.mjINT_RK4
        self._warnings, self._old_warnings = self.physics.data.warning.number, 0
        action = dm_env.action_spec()
        low, high = (np.broadcast_to(bound, action.shape) for bound in (action.minimum, action.maximum))
        self.action_space = gym.spaces.Box(low, high, dtype=np.float64)
        self.parts = sizes(dm_env.observation_spec())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (sum(self.parts.values()),), np.float32)

    @property
    def physics(self) -> Any:
        """dm_control's Physics: `.model`, `.data`, `.named`."""
        return self.dm_env.physics

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.dm_env.task.random.seed(seed)
        self.dm_env.reset()
        self._old_warnings = self._warnings.sum()
        return flatten(self.dm_env.task.get_observation(self.physics)), {}

    def step(self, action: np.ndarray, repeat: int = 1) -> tuple[np.ndarray, float, bool, bool, dict]:
        task, physics, total = self.dm_env.task, self.physics, 0.0
        self._data.ctrl[:] = action
        for _ in range(repeat):
            self._step_physics()
            total += task.get_reward(physics)
        if self._warnings.sum() != self._old_warnings:
            raise RuntimeError("MuJoCo warns that the simulation has become unstable")
        return flatten(task.get_observation(physics)), total, False, False, {}  # no task of the table terminates

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
        parts = env.observation_space.spaces
        if any(map(is_image, parts.values())):
            raise UserError(f"task {spec.name!r} has image observations; only numbers are supported")
        self.parts = sizes(parts)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (sum(self.parts.values()),), np.float32)

    def observation(self, observation: dict[str, Any]) -> np.ndarray:
        return flatten(observation)


def sizes(parts: Mapping[str, Any]) -> dict[str, int]:
    """How many numbers of a flat observation each part is."""
    return {name: int(np.prod(part.shape)) for name, part in parts.items()}


def flatten(observation: dict[str, Any]) -> np.ndarray:
    return np.concatenate([*observation.values()], axis=None, dtype=np.float32, casting="unsafe")
