"""What each simulator's module returns, and the wrapper that makes the same kind of environment of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs import rendering
from tdmpc2_support.envs.guard import (
    Actions,
    Guard,
    Observations,
    close_quietly,
    columns_of,
    entry,
    is_image,
    parts_of,
    picture,
    refusal,
    words_of,
)
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
    parts: Mapping[str, int] | None = None  # names and sizes of what a flat observation is made of, in order


class Task(gym.Wrapper):
    """What all simulators share: repeat, format of action and observation, time limit, success, first seed, pictures.

    Raises:
        UserError: the observations are not what `obs` asks for, or the actions have no bounds.
    """

    def __init__(
        self,
        simulator: Simulator,
        spec: TaskSpec,
        seed: int,
        obs: str,
        render_mode: str | None,
        shadows: bool,
        pixels: int = rendering.PIXELS,
    ):
        super().__init__(simulator.env)
        self._size = pixels
        self._simulator = simulator
        self._spec = spec
        self._first_seed = seed
        self._steps_left = 0
        self._obs, given, keys = obs.partition(":")
        self._pixels = self._obs != "state"
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
            self._picture_at, self._frame = self._find_picture(space)
            self.observation_space = self._frame
            seen = f"pictures of {' x '.join(map(str, self._frame.shape[:2]))}"
        if self._obs != "rgb":
            self._to_vector = Observations(spec.name, space, beside_pictures=self._pixels)
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self._to_vector.size,), np.float32)
        if self._obs == "state":
            seen = self._to_vector.words
        elif self._to_vector:
            parts = simulator.parts or self._to_vector.sizes
            self._columns = columns_of(parts, keys.split(",") if given else None, spec.name)
            state = gym.spaces.Box(-np.inf, np.inf, self._columns.shape, np.float32)
            self.observation_space = gym.spaces.Dict({"rgb": self._frame, "state": state})
            seen += f" and {len(self._columns)} numbers"
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

    def _find_picture(self, space: gym.Space) -> tuple[tuple, gym.spaces.Box]:
        """Where in an observation the only picture is, if it is not drawn here, and the space of pictures."""
        if self._simulator.scene:
            return (), gym.spaces.Box(0, 255, (self._size, self._size, 3), np.uint8)
        name = self._spec.name
        size = f"{self._size} x {self._size}"
        found = [(path, part) for path, part in parts_of(space) if is_image(part)]
        if len(found) > 1:
            places = ", ".join(words_of(path) for path, _ in found)
            raise UserError(f"task {name!r} has several pictures in an observation: {places}; one is seen at most")
        if not found or found[0][1].dtype != np.uint8 or found[0][1].shape[2:] != (3,):
            raise UserError(f"task {name!r} has no pictures of {size} as observations, uint8 [height, width, 3]")
        return found[0]

    def interface(self) -> dict[str, Any]:
        """What connects an agent of states to this task elsewhere: names and sizes of an observation's parts, in order;
        the task's own bounds of each action, which -1 and 1 stand for; and the seconds between two decisions, as far as
        the simulator tells."""
        seconds = self._simulator.seconds
        return {
            "observation": dict(self._simulator.parts or self._to_vector.sizes),
            "action_low": self._to_own_action.lowest.tolist(),
            "action_high": self._to_own_action.highest.tolist(),
            "control_period": seconds and seconds * self._spec.action_repeat,
        }

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

    def _observation(self, method: str, obs: Any) -> Any:
        state = self._to_vector(method, obs) if self._to_vector else None
        if not self._pixels:
            return state
        if self._simulator.scene:
            frame = self._draw(self._size)
        else:
            shown = entry(self._spec.name, method, self._picture_at, obs)
            frame = self._picture(method, shown, self._frame.shape)
        return frame if state is None else {"rgb": frame, "state": state[self._columns]}

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
            effects = self._shadows or size != self._size
            self._cameras[size] = rendering.Camera(model, size, self._simulator.camera, effects)
        return self._cameras[size].frame(data)

    def close(self) -> None:
        """Frees the simulator and the GL contexts."""
        for camera in self._cameras.values():
            camera.close()
        self._cameras.clear()
        close_quietly(self._spec.name, super().close)
