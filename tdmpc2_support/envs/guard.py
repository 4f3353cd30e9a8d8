"""The border: what somebody's environment has, takes and returns is looked at here, once, on its way in.

What can be meant in one way only is taken as that: an array of one number, a column for a vector, four values of a step
as Gym's, a picture with transparency. All else ends the run with one sentence: task, method, what came, what is
expected. What is as it should be passes in less than a microsecond.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.utils.step_api_compatibility import convert_to_terminated_truncated_step_api

from tdmpc2_support.errors import UserError, one_line

UNBOUNDED = 1e30  # of actions: larger bounds are written by those who mean that there are none
LARGEST_REWARD = 22_025.0  # symexp(10), the last of the bins in which rewards and values are predicted by default
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
LARGEST_SQUARE = float(np.finfo(np.float32).max) ** 2


# --------------------------------------------------------------------------------------------------------- Observations
def is_image(space: gym.Space) -> bool:
    """Whether observations are pictures: bytes of at least 16 x 16, or floats of that size with one, three or four
    channels."""
    if not isinstance(space, spaces.Box):
        return False
    long_sides = sum(size >= 16 for size in space.shape)
    if space.dtype == np.uint8:
        return long_sides >= 2
    return len(space.shape) == 3 and long_sides == 2 and not {1, 3, 4}.isdisjoint((space.shape[0], space.shape[-1]))


def parts_of(space: gym.Space, path: tuple = ()) -> Iterator[tuple[tuple, gym.Space]]:
    """The spaces that a space is made of with their places in it, in the order in which Gymnasium flattens them."""
    inner: Any = ()
    if isinstance(space, spaces.Dict):
        inner = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        inner = enumerate(space.spaces)
    else:
        yield path, space
    for key, part in inner:
        yield from parts_of(part, (*path, key))


def words_of(path: tuple) -> str:
    return "".join(f"[{key!r}]" for key in path)


class Observations:
    """Observations of any space as float32 vectors, in the order of Gymnasium's `flatten_space`.

    Args:
        task: for sentences.
        space: as the environment has it.
        beside_pictures: leave pictures out of the vectors.

    Attributes:
        size: of the vectors.
        sizes: those of the parts by their names.
        words: what was made of the space, as "5 observations (achieved_goal 1, observation 4)".

    Raises:
        UserError: there are pictures among them, or they have no fixed size.
    """

    def __init__(self, task: str, space: Any, beside_pictures: bool = False):
        check_is_space(task, "observation_space", space)
        self.task = task
        self.parts = [(path, part) for path, part in parts_of(space) if not (beside_pictures and is_image(part))]
        if beside_pictures and not self.parts:
            raise UserError(f"task {task!r} has no state vector beside its pictures")
        self.plain = isinstance(space, spaces.Box)
        self.shape = space.shape
        sizes = []
        for path, part in self.parts:
            if is_image(part):
                where = f" among its observations: {words_of(path)}" if path else " as observations"
                raise UserError(f"task {task!r} has pictures{where}, which tdmpc2_jax.py does not learn from")
            try:
                sizes.append(spaces.flatdim(part))
            except (NotImplementedError, TypeError, ValueError):
                which = f"{type(part).__name__}{' in ' + words_of(path) if path else ''}"
                sentence = f"task {task!r} has {which} observations, which are no numbers of a fixed size"
                raise UserError(sentence) from None
        self.size = sum(sizes)
        self._finite = np.empty(self.size, bool)
        self._as_it_is = space.shape if self.plain and len(space.shape) == 1 else None
        if not self.size:
            raise UserError(f"task {task!r} has no observations: {one_line(space)}")
        self.words = f"{self.size} observations"
        named = [".".join(map(str, path)) or type(part).__name__ for path, part in self.parts]
        self.sizes = dict(zip(named, sizes, strict=True))
        if not self.plain:
            each = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
            self.words += f" ({one_line(each)})"
        elif len(self.shape) != 1:
            self.words += f" ({self.shape} flattened)"

    def __call__(self, method: str, value: Any) -> np.ndarray:
        """What `method` has returned as a vector, float32 [size]."""
        if type(value) is np.ndarray and value.dtype is FLOAT32 and value.shape == self._as_it_is:
            vector = value
        elif self.plain:
            vector = self._numbers(method, (), self.shape, value)
        else:
            vector = np.concatenate([self._part(method, path, part, value) for path, part in self.parts])
        if vector.dtype is FLOAT64 and vector.dot(vector) < LARGEST_SQUARE:  # so all are numbers of 32 bits, too
            return vector.astype(np.float32)
        numbers = vector
        if vector is not value:
            with np.errstate(over="ignore"):  # takes four times as long as the conversion
                numbers = vector.astype(np.float32)
        if np.isfinite(numbers, self._finite).tobytes().find(0) >= 0:  # a third of the time of all()
            entry = int(self._finite.argmin())
            raise self._refuse(method, (), f"whose entry {entry} is {vector[entry]}", "finite numbers (of 32 bits)")
        return numbers

    def _refuse(self, method: str, path: tuple, came: str, expected: str) -> UserError:
        return refusal(self.task, method, f"an observation{words_of(path)} {came}", expected)

    def _numbers(self, method: str, path: tuple, shape: tuple[int, ...], value: Any) -> np.ndarray:
        """Numbers of a Box or a MultiBinary as a vector; ones more or less around the shape mean nothing."""
        array = as_numbers(value)
        if array is None:
            raise self._refuse(method, path, f"of type {type(value).__name__}", f"numbers of shape {shape}")
        if array.shape != shape and [n for n in array.shape if n != 1] != [n for n in shape if n != 1]:
            raise self._refuse(method, path, f"of shape {array.shape}", f"shape {shape}, as its space says")
        return array.reshape(-1)

    def _part(self, method: str, path: tuple, space: gym.Space, value: Any) -> np.ndarray:
        value = entry(self.task, method, path, value)
        if isinstance(space, spaces.Box | spaces.MultiBinary):
            return self._numbers(method, path, space.shape, value)
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            kinds = np.reshape(getattr(space, "nvec", getattr(space, "n", 0)), -1)
            numbers = self._numbers(method, path, space.shape, value) - np.reshape(space.start, -1)
            if not ((numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < kinds)).all():
                raise self._refuse(method, path, f"of {one_line(value, 40)}", f"one of {one_line(space, 80)}")
            one_hot = np.zeros(kinds.sum(), np.float32)
            one_hot[(np.cumsum(kinds) - kinds + numbers).astype(int)] = 1
            return one_hot
        try:
            return np.asarray(flatten(space, value), np.float32)
        except Exception:
            expected = one_line(space, 80)
            raise self._refuse(method, path, f"of {one_line(value, 40)}", f"one of {expected}") from None


def entry(task: str, method: str, path: tuple, value: Any) -> Any:
    """What is at this place of an observation."""
    for depth, key in enumerate(path):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            came = f"an observation{words_of(path[:depth])} of type {type(value).__name__} without {key!r}"
            raise refusal(task, method, came, f"{words_of(path)}, as its space says") from None
    return value


def columns_of(parts: Mapping[str, int], keys: Sequence[str] | None, task: str) -> np.ndarray:
    """Where in a task's state vector the parts of these names are, in its order; all of it without names.

    Raises:
        UserError: a name is none of a part; the sentence lists those that exist.
    """
    missing = [key for key in keys or () if key not in parts]
    if missing:
        raise UserError(f"the state of task {task!r} has no {missing[0]!r}; it has {', '.join(parts)}")
    names = np.repeat([*parts], [*parts.values()])
    return np.flatnonzero(np.isin(names, [*parts] if keys is None else keys))


def as_numbers(value: Any) -> np.ndarray | None:
    """Anything that NumPy makes real numbers of; None for what it does not."""
    try:
        array = np.asarray(value)
        if array.dtype == object and value is not None:
            array = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # the latter: a PyTorch tensor with gradients, or of a GPU
        return None
    return array if array.dtype.kind in "biuf" else None


# -------------------------------------------------------------------------------------------------------------- Actions
class Actions:
    """Actions in [-1, 1] as those of an environment.

    Args:
        task: for sentences.
        space: as the environment has it: a Box of any shape.

    Attributes:
        size: of the vectors in [-1, 1].
        words: what was made of the space, as "4 actions ((2, 2) flattened)".

    Raises:
        UserError: it is no Box, or has no bounds.
    """

    def __init__(self, task: str, space: Any):
        check_is_space(task, "action_space", space)
        if not isinstance(space, spaces.Box):
            raise UserError(
                f"task {task!r} has actions {one_line(space)}; only a Box of continuous actions is supported"
            )
        low = space.low.reshape(-1).astype(np.float64)
        high = space.high.reshape(-1).astype(np.float64)
        self.task = task
        self.shape = space.shape
        self.dtype = space.dtype
        self.size = low.size
        self.whole = space.dtype.kind in "iub"
        unbounded = UNBOUNDED
        if not self.whole:
            unbounded = min(unbounded, float(np.finfo(space.dtype).max))
        elif space.dtype.itemsize >= 4:
            unbounded = float(np.iinfo(space.dtype).max)
        if not self.size:
            raise UserError(f"task {task!r} has no actions: {one_line(space)}")
        if not (np.abs([low, high]) < unbounded).all():
            raise UserError(f"task {task!r} has actions without finite bounds, which cannot be scaled to [-1, 1]")
        if (low > high).any():
            raise UserError(f"task {task!r} has actions whose lower bound is above the upper one: {one_line(space)}")
        self.lowest = low
        self.highest = high
        if self.whole:  # each number has an equal share of [-1, 1]
            low = low - 0.5
            high = high + 0.5
        self.low = low
        self.half_range = (high - low) / 2
        self.as_they_are = not self.whole and bool((low == -1.0).all() and (high == 1.0).all())
        beyond = low + 2.0 * self.half_range > high
        self.half_range[beyond] = np.nextafter(self.half_range[beyond], 0)  # rounded up, it would leave the bounds
        self.words = f"{self.size} actions"
        if len(self.shape) != 1:
            self.words += f" ({self.shape} flattened)"
        if self.whole:
            self.words += " (rounded to whole numbers)"

    def __call__(self, action: np.ndarray) -> np.ndarray:
        if self.as_they_are:
            action = np.array(action, self.dtype)
            return action if len(self.shape) == 1 else action.reshape(self.shape)
        action = self.low + (np.asarray(action, np.float64) + 1.0) * self.half_range
        if self.whole:
            action = np.clip(np.floor(action + 0.5), self.lowest, self.highest)
        if len(self.shape) != 1:
            action = action.reshape(self.shape)
        return action.astype(self.dtype, copy=False)


# ------------------------------------------------------------------------------------------------------- Reset and step
class Guard:
    """What `reset` and `step` of an environment have returned, as Gymnasium says that they do.

    Args:
        task: for sentences.
        env: whose `reset` is called.
    """

    def __init__(self, task: str, env: gym.Env):
        self.task = task
        self.env = env
        self._reset_takes = {"seed", "options"}
        with contextlib.suppress(TypeError, ValueError):  # not of Python
            parameters = inspect.signature(env.reset).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                self._reset_takes &= {parameter.name for parameter in parameters}

    def reset(self, seed: int | None, options: dict | None) -> tuple[Any, dict]:
        """The environment's reset with what it takes of these: the first observation as it came, and the info."""
        given = {"seed": seed, "options": options}
        if seed is not None and "seed" not in self._reset_takes:
            self._seed_otherwise(seed)
        try:
            result = self.env.reset(**{name: given[name] for name in self._reset_takes})
        except (NotImplementedError, TypeError) as error:
            self.check_call("reset", error)
            raise
        if type(result) is not tuple or isinstance(self.env.observation_space, spaces.Tuple) and len(result) != 2:
            return result, {}  # Gym's: the observation alone
        if len(result) != 2:
            expected = "two, observation and info"
            raise refusal(self.task, "reset", f"{len(result)} values", expected)
        obs, info = result
        if isinstance(self.env.observation_space, spaces.Tuple) and not (info is None or isinstance(info, Mapping)):
            return result, {}
        return obs, self.info("reset", info)

    def check_call(self, method: str, error: Exception) -> None:
        """Raises a UserError if what a call has raised says that it cannot be called so, or not at all."""
        if isinstance(error, NotImplementedError):
            raise UserError(f"task {self.task!r} does not implement {method}") from error
        if f"{method}()" in str(error) and "argument" in str(error):
            how = f"{method} cannot be called as Gymnasium calls it"
            raise UserError(f"task {self.task!r}: {how}: {one_line(error)}") from error

    def _seed_otherwise(self, seed: int) -> None:
        base = self.env.unwrapped
        if callable(getattr(base, "seed", None)):  # Gym's
            base.seed(seed)
        else:
            base.np_random = np.random.default_rng(seed)
            say(f"task {self.task!r}: reset takes no seed; --seed decides its start states only if it uses np_random")

    def step(self, result: Any) -> tuple[Any, float, bool, bool, dict]:
        """What a step has returned: the observation as it came, the rest of the right types, and info["success"] a
        float if there is one."""
        try:
            obs, reward, terminated, truncated, info = result
        except (TypeError, ValueError):
            obs, reward, terminated, truncated, info = self._old_step(result)
        if not isinstance(reward, float):
            reward = self.number("a reward", reward)
        if not -LARGEST_REWARD <= reward <= LARGEST_REWARD:
            self._check_reward(reward)
        if type(terminated) is not bool:
            terminated = self._flag("terminated", terminated)
        if type(truncated) is not bool:
            truncated = self._flag("truncated", truncated)
        if type(info) is not dict:
            info = self.info("step", info)
        return obs, reward, terminated, truncated, info

    def _old_step(self, result: Any) -> tuple:
        """The four values of Gym, or five without the info."""
        count = len(result) if isinstance(result, tuple | list) else None
        if count == 4 and (result[3] is None or isinstance(result[3], Mapping)):
            return convert_to_terminated_truncated_step_api((*result[:3], dict(result[3] or {})))
        if count == 4 and isinstance(result[3], bool | np.bool_):
            return *result, {}
        came = f"{count} values" if count else f"{type(result).__name__}"
        raise refusal(self.task, "step", came, "five: observation, reward, terminated, truncated, info")

    def number(self, name: str, value: Any) -> float:
        """A number of any type."""
        array = as_numbers(value)
        if array is None or array.size != 1:
            came = f"{name} of type {type(value).__name__}" if array is None else f"{name} of shape {array.shape}"
            came += f" ({one_line(value, 40)})"
            raise refusal(self.task, "step", came, "one number")
        return float(array.reshape(-1)[0])

    def _flag(self, name: str, value: Any) -> bool:
        number = self.number(f"a value for {name}", value)
        if number not in (0.0, 1.0):
            raise refusal(self.task, "step", f"{name} = {number}", "True or False")
        return bool(number)

    def info(self, method: str, info: Any) -> dict:
        """The info as a dict."""
        if info is None:
            return {}
        if not isinstance(info, Mapping):
            raise refusal(self.task, method, f"an info of type {type(info).__name__}", "a dict")
        return dict(info)

    def success(self, info: dict) -> float:
        """Whether the task is solved, by either of the names in use; 0.0 where nothing is said."""
        for name in ("success", "is_success"):
            if name in info:
                value = self.number(f"info[{name!r}]", info[name])
                if not math.isfinite(value):
                    raise refusal(self.task, "step", f"info[{name!r}] = {value}", "a number from 0 to 1")
                return value
        return 0.0

    def _check_reward(self, reward: float) -> None:
        if not abs(reward) < float(np.finfo(np.float32).max):
            raise refusal(self.task, "step", f"a reward of {reward}", "a finite number (of 32 bits)")
        say(
            f"task {self.task!r} has rewards beyond ±{LARGEST_REWARD:,.0f}, which the model cannot tell apart (nor "
            "values): scale them, or widen --vmin and --vmax, the logarithms of these bounds"
        )


def check_is_space(task: str, name: str, space: Any) -> None:
    if not isinstance(space, gym.Space):
        came = "no" if space is None else f"a {type(space).__module__}.{type(space).__name__} as"
        raise UserError(f"task {task!r} has {came} {name}; expected one of gymnasium.spaces")


def refusal(task: str, method: str, came: str, expected: str) -> UserError:
    """The sentence that a task's method returned what is none of what can be taken."""
    return UserError(f"task {task!r}: {method} returned {came}; expected {expected}")


@functools.cache
def say(sentence: str) -> None:
    """Prints a sentence to the user, once."""
    with contextlib.suppress(OSError):  # of a worker, whose terminal may be gone
        print(sentence, file=sys.stderr, flush=True)


def close_quietly(task: str, close: Callable[[], None]) -> None:
    """Closes an environment; what it raises then comes too late to matter."""
    try:
        close()
    except Exception as error:
        say(f"task {task!r}: close raised {type(error).__name__}: {one_line(error)}; nothing is lost")


# ------------------------------------------------------------------------------------------------------------- Pictures
def picture(task: str, method: str, value: Any) -> np.ndarray:
    """A picture as uint8 [height, width, 3]: one without colours, with transparency, with its channels first, or alone
    in a list, too."""
    if isinstance(value, list | tuple) and len(value) == 1 and np.ndim(value[0]) >= 2:
        value = value[0]
    array = as_numbers(value)
    expected = "a picture: uint8 of shape (height, width, 3)"
    if array is None:
        raise refusal(task, method, f"a picture of type {type(value).__name__}", expected)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iu" or array.size and not 0 <= array.min() <= array.max() <= 255:
            raise refusal(task, method, f"a picture of {array.dtype}", expected)
        array = array.astype(np.uint8)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] > 4:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise refusal(task, method, f"a picture of shape {array.shape}", expected)
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    return array[..., :3]
