"""What each simulator's module returns, and the wrapper that makes the same kind of environment of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs import rendering
from tdmpc2_support.envs.tasks import TaskSpec, check_action_space, is_image
from tdmpc2_support.errors import UserError


class Simulator(NamedTuple):
    """An environment as its simulator has it, and what `Task` must know of it."""

    env: gym.Env
    seconds: float | None = None  # simulated time per simulator step; None: not known
    scene: Callable[[], tuple[Any, Any]] | None = None  # MjModel and MjData to draw; None: `env.render()` draws
    camera: int = 0  # which of the model's cameras
    repeats: bool = False  # `env.step(action, n)` holds an action for n simulator steps, faster than n calls of it


class Task(gym.Wrapper):
    """What all simulators share: repeat, format of action and observation, time limit, success, first seed, pictures.

    Raises:
        UserError: the observations are not what `obs` asks for, or the actions have no bounds.
    """

    def __init__(
        self, simulator: Simulator, spec: TaskSpec, seed: int, obs: str, render_mode: str | None, shadows: bool
    ):
        super().__init__(simulator.env)
        self._simulator = simulator
        self._spec = spec
        self._first_seed = seed
        self._steps_left = 0
        self._pixels = obs == "rgb"
        self._render_mode = render_mode
        self._shadows = shadows
        self._cameras: dict[int, rendering.Camera] = {}  # by the size of their pictures
        low, high = check_action_space(simulator.env.action_space, spec.name)
        self._low = low
        self._half_range = (high - low) / 2
        self.action_space = gym.spaces.Box(-1.0, 1.0, low.shape, np.float32)
        self.observation_space = self._check_observations()
        if simulator.seconds:
            fps = max(1, round(1 / (simulator.seconds * spec.action_repeat)))
            self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        if simulator.scene and (self._pixels or render_mode):
            rendering.choose_gl()

    def _check_observations(self) -> gym.spaces.Box:
        space = self.env.observation_space
        name = self._spec.name
        frame = gym.spaces.Box(0, 255, (rendering.PIXELS, rendering.PIXELS, 3), np.uint8)
        if self._pixels:
            if not self._simulator.scene and space != frame:
                size = f"{rendering.PIXELS} x {rendering.PIXELS}"
                raise UserError(f"task {name!r} has no pictures of {size} as observations, uint8 {list(frame.shape)}")
            return frame
        if not self._simulator.scene and (is_image(space) or len(space.shape) != 1):
            kind = "image" if is_image(space) else f"{space.shape}"
            raise UserError(f"task {name!r} has {kind} observations; only a flat Box of numbers is supported")
        return gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)

    @property
    def render_mode(self) -> str | None:
        return self._render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode → obs, info."""
        if seed is None:
            seed = self._first_seed
        self._first_seed = None
        self._steps_left = self._spec.simulator_steps
        obs, info = self.env.reset(seed=None if seed is None else int(seed), options=options)
        return self._observation(obs), {**info, "success": 0.0}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One decision, action in [-1, 1] held for the repeat → obs, summed reward, terminated, truncated, info."""
        action = self._low + (np.asarray(action, np.float64) + 1.0) * self._half_range
        action = action.astype(self.env.action_space.dtype, copy=False)
        # The last decision of an episode that the repeat does not divide gets what is left.
        repeat = max(1, min(self._spec.action_repeat, self._steps_left))
        self._steps_left -= repeat
        if self._simulator.repeats:
            obs, total, terminated, truncated, info = self.env.step(action, repeat)
            total = float(total)
        else:
            total = 0.0
            for _ in range(repeat):
                obs, reward, terminated, truncated, info = self.env.step(action)
                total += float(reward)
                if terminated or truncated:
                    break
        truncated = not terminated and (truncated or self._steps_left <= 0)
        info = {**info, "success": float(info.get("success", 0.0))}
        return self._observation(obs), total, bool(terminated), bool(truncated), info

    def _observation(self, obs: Any) -> np.ndarray:
        if self._pixels and self._simulator.scene:
            return self._draw(rendering.PIXELS)
        return np.asarray(obs, self.observation_space.dtype)

    def render(self) -> np.ndarray | None:
        """The current picture, uint8 [height, width, 3], or None without a render_mode."""
        if not self.render_mode:
            return None
        return self._draw(rendering.FRAME) if self._simulator.scene else self.env.render()

    def _draw(self, size: int) -> np.ndarray:
        model, data = self._simulator.scene()
        if size in self._cameras and self._cameras[size].model is not model:  # some resets build a new model
            self._cameras.pop(size).close()
        if size not in self._cameras:
            effects = self._shadows or size != rendering.PIXELS
            self._cameras[size] = rendering.Camera(model, size, self._simulator.camera, effects)
        return self._cameras[size].frame(data)

    def close(self) -> None:
        """Frees the simulator and the GL contexts."""
        for camera in self._cameras.values():
            camera.close()
        self._cameras.clear()
        super().close()
