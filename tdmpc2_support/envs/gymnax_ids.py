"""gymnax's environments with continuous actions."""

import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdmpc2_support.envs.tasks import import_simulator
from tdmpc2_support.errors import UserError


def load(task: str) -> "Gymnax":
    """The environment of a task `gymnax/ID`.

    Raises:
        UserError: there is no such task, its actions are not a flat vector of numbers, or the package is missing.
    """
    import_simulator("gymnax")
    import gymnax

    env_id = task.partition("/")[2]
    if env_id not in gymnax.registered_envs:
        near = difflib.get_close_matches(env_id, gymnax.registered_envs, n=3)
        hint = f"did you mean {' or '.join(repr(f'gymnax/{other}') for other in near)}?" if near else ""
        raise UserError(f"unknown task {task!r}; {hint or 'gymnax.registered_envs lists its environments'}")
    env, params = gymnax.make(env_id)
    space = env.action_space(params)
    if not isinstance(space, gymnax.environments.spaces.Box) or len(space.shape) != 1:
        kind = type(space).__name__
        raise UserError(f"task {task!r} has {kind} actions; only a flat Box of continuous actions is supported")
    return Gymnax(env, params, space)


class GymnaxState(NamedTuple):
    """A state as `jax_env` wants it."""

    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    info: dict[str, Any]
    inner: Any  # gymnax's own
    key: jax.Array  # of what the environment draws


class Gymnax:
    """An environment of gymnax as `jax_env` wants it. Its own steps reset by themselves: the functions below them are
    used, whose `done` is not that of the time limit."""

    def __init__(self, env: Any, params: Any, space: Any):
        self.env = env
        self.params = params
        self.action_size = space.shape[0]
        self.action_low = space.low
        self.action_high = space.high
        self.episode_length = params.max_steps_in_episode
        self.can_terminate = env.name != "Pendulum-v1"
        self.dt = getattr(params, "dt", None)

    def reset(self, key: jax.Array) -> GymnaxState:
        key, reset_key = jax.random.split(key)
        obs, inner = self.env.reset_env(reset_key, self.params)
        return GymnaxState(obs, jnp.zeros(()), jnp.zeros((), bool), {}, inner, key)

    def step(self, state: GymnaxState, action: jax.Array) -> GymnaxState:
        key, step_key = jax.random.split(state.key)
        obs, inner, reward, done, _ = self.env.step_env(step_key, state.inner, action, self.params)
        return GymnaxState(obs, jnp.asarray(reward, jnp.float32), done, {}, inner, key)
