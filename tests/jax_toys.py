"""Environments in JAX for tests, named jax_toys:NAME on the command line."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class State(NamedTuple):
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    info: dict[str, Any]
    steps: jax.Array


class Point:
    """A point on a line: two numbers seen, one pushed; the reward is high near 0. Misbehaves as told. What is seen are
    multiples of 1/1024, so that programs whose actions differ by rounding have the same episodes."""

    action_size = 1
    action_low = -2.0
    action_high = 2.0
    episode_length = 40
    dt = 0.1

    def __init__(self, spread=1.0, can_terminate=False, action_repeat=1, bad_above=9.0, rows=2, number=jnp.float32):
        self.spread = spread
        self.can_terminate = can_terminate
        self.action_repeat = action_repeat
        self.bad_above = bad_above
        self.rows = rows
        self.number = number

    def reset(self, key):
        obs = jnp.array([0.5, 0.0]) + self.spread * jax.random.uniform(key, (2,), minval=-1.0)
        obs = jnp.round(1024 * obs) / 1024
        return State(self.seen(obs), 0.0, False, {"success": 0.0}, 0)

    def step(self, state, action):
        speed = 0.8 * state.obs[1] + 0.05 * action[0]
        obs = jnp.round(1024 * jnp.stack([state.obs[0] + 0.2 * speed, speed])) / 1024
        reward = jnp.where(obs[0] > self.bad_above, jnp.nan, 1 - jnp.abs(obs[0]))
        done = self.can_terminate & (jnp.abs(obs[0]) > 1)
        success = (reward > 0.5).astype(self.number)
        return State(self.seen(obs), reward, done, {"success": success}, state.steps + 1)

    def seen(self, obs):
        return obs if self.rows == 2 else jnp.zeros((self.rows, self.rows, 3), jnp.uint8)


def point():
    return Point()


def fixed():
    """Every episode starts in the same state."""
    return Point(spread=0.0, can_terminate=True)


def falling():
    return Point(can_terminate=True)


def repeated():
    return Point(can_terminate=True, action_repeat=4)


def bad():
    """Terminates, and some of the first states are of those whose rewards are not numbers."""
    return Point(can_terminate=True, bad_above=1.4)


def pictures():
    return Point(rows=64)


def changing():
    """Its states change their types."""
    return Point(number=jnp.int32)


def nothing():
    """No environment."""
    return object()
