"""What each simulator's module returns, and the wrapper that makes the same kind of environment of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs import rendering
from tdmpc2_support.envs.guard import Actions, Guard, Observations, close_quietly, picture, refusal
from tdmpc2_support.envs.tasks import TaskSpec
from tdmpc2_support.errors import UserError


class Simulator(NamedTuple):
    """An environment as its simulator has it, and what `Task` must know of it."""

    env: gym.Env
    seconds: float | None = None  # simulated time per simulator step; None: not known
    scene: Callable[[], tuple[Any, Any]] | None = None  # MjModel and MjData to draw; None: `env.render()` draws
    camera: int = 0  # which of the model's cameras
    repeats: bool = False  # `env.step(action, n)` holds an action for n simulator steps, faster than n calls of it
    seeds: int = 2**32  # `env.reset` takes seeds below this


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
        self._film_shape: tuple[int, ...] = ()  # of the first picture: all of a film have it
        self._guard = Guard(spec.name, simulator.env)
        self._to_own_action = Actions(spec.name, getattr(simulator.env, "action_space", None))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self._to_own_action.size,), np.float32)
        self._to_vector: Observations | None = None
        space = getattr(simulator.env, "observation_space", None)
        if self._pixels:
            self.observation_space = self._frame_space(space)
            seen = f"pictures of {rendering.PIXELS} x {rendering.PIXELS}"
        else:
            self._to_vector = Observations(spec.name, space)
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self._to_vector.size,), np.float32)
            seen = self._to_vector.words
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 25,
            "observations": seen,
            "actions": self._to_own_action.words,
        }
        if simulator.seconds:
            self.metadata["render_fps"] = max(1, round(1 / (simulator.seconds * spec.action_repeat)))
        if simulator.scene and (self._pixels or render_mode):
            rendering.choose_gl()

    def _frame_space(self, space: gym.Space) -> gym.spaces.Box:
        frame = gym.spaces.Box(0, 255, (rendering.PIXELS, rendering.PIXELS, 3), np.uint8)
        if not self._simulator.scene and space != frame:
            size = f"{rendering.PIXELS} x {rendering.PIXELS}"
            name = self._spec.name
            raise UserError(f"task {name!r} has no pictures of {size} as observations, uint8 {list(frame.shape)}")
        return frame

    @property
    def render_mode(self) -> str | None:
        return self._render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode → obs, info."""
        if seed is None:
            seed = self._first_seed
        self._first_seed = None
        self._steps_left = self._spec.simulator_steps
        if seed is not None:
            seed = int(seed) % self._simulator.seeds
        obs, info = self._guard.reset(seed, options)
        return self._observation("reset", obs), {**info, "success": 0.0}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One decision, action in [-1, 1] held for the repeat → obs, summed reward, terminated, truncated, info."""
        # The last decision of an episode that the repeat does not divide gets what is left.
        repeat = max(1, min(self._spec.action_repeat, self._steps_left))
        self._steps_left -= repeat
        guard = self._guard
        own_action = self._to_own_action(action)
        try:
            if self._simulator.repeats:
                obs, total, terminated, truncated, info = guard.step(self.env.step(own_action, repeat))
            else:
                total = 0.0
                for _ in range(repeat):
                    obs, reward, terminated, truncated, info = guard.step(self.env.step(own_action))
                    total += reward
                    if terminated or truncated:
                        break
            vector = self._observation("step", obs)
            success = guard.success(info) if info else 0.0
        except (NotImplementedError, TypeError) as error:
            guard.check_call("step", error)
            raise
        except UserError:
            self._check_action(action)  # a worse fault, if it is one
            raise
        truncated = not terminated and (truncated or self._steps_left <= 0)
        return vector, float(total), terminated, truncated, {**info, "success": success}

    def _check_action(self, action: np.ndarray) -> None:
        if not np.isfinite(action).all():
            reason = "its networks have diverged, or an observation is too large for them"
            raise UserError(f"task {self._spec.name!r}: the agent's action is not finite: {reason}")

    def _observation(self, method: str, obs: Any) -> np.ndarray:
        if self._to_vector:
            return self._to_vector(method, obs)
        if self._simulator.scene:
            return self._draw(rendering.PIXELS)
        return self._picture(method, obs, self.observation_space.shape)

    def _picture(self, method: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        frame = picture(self._spec.name, method, value)
        if frame.shape != shape:
            raise refusal(self._spec.name, method, f"a picture of shape {frame.shape}", f"shape {shape}")
        return frame

    def render(self) -> np.ndarray | None:
        """The current picture, uint8 [height, width, 3], or None without a render_mode."""
        if not self.render_mode:
            return None
        if self._simulator.scene:
            return self._draw(rendering.FRAME)
        frame = picture(self._spec.name, "render", self.env.render())
        self._film_shape = self._film_shape or frame.shape
        return self._picture("render", frame, self._film_shape)

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
        close_quietly(self._spec.name, super().close)
