"""Environments in JAX: step by step inside a compiled program, or from outside as any other environment.

`--task module:function` calls function() for an environment. It may be any object with

    reset(key) -> state             the first state of an episode: another one for every key
    step(state, action) -> state    one simulator step; action [A]
    action_size                     A
    episode_length                  simulator steps after which an episode is cut off

both pure functions that JAX can trace, of one environment: many are made by `vmap`. A state is a pytree (a
`flax.struct.dataclass`, a `NamedTuple`) with

    obs                             [O], numbers
    reward                          [] of this step
    done                            [] the environment's own end: not that of a time limit, which is counted here
    info                            a dict; perhaps with "success"

and whatever else the environment must remember, its random key among it; `reset` and `step` return the same shapes and
types. It may have

    action_repeat = 1               simulator steps of a decision
    action_low, action_high = -1, 1 bounds of an action, numbers or [A]
    can_terminate = True            whether `done` is ever true
    dt                              seconds of a simulator step
    select(condition, new, old)     a state by a scalar condition, if `jnp.where` of all its arrays will not do

MuJoCo Playground's environments are such objects (playground.py), and gymnax's are made such (gymnax_ids.py).
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.guard import Actions
from tdmpc2_support.envs.tasks import TaskSpec, jax_domain, task_spec
from tdmpc2_support.errors import UserError


class Episode(NamedTuple):
    """An environment within an episode, or at its end. With a leading axis [n]: n of them."""

    state: Any  # the environment's own
    obs: jax.Array  # [O]
    reward: jax.Array  # [] of the last decision
    terminated: jax.Array  # [] the environment has ended it
    truncated: jax.Array  # [] the time limit has
    success: jax.Array  # []
    decisions: jax.Array  # [] made in this episode
    total: jax.Array  # [] its rewards so far


class JaxEnv:
    """What all environments in JAX share: repeat, bounds of actions, time limit, new episodes. Compared by identity, so
    that it can be a static argument of a jitted function.

    Args:
        task: name of the task.
        domain: of the task.
        simulator: the environment, see above.

    Raises:
        UserError: it is not what is asked for above.
    """

    def __init__(self, task: str, domain: str, simulator: Any):
        missing = [name for name in ("reset", "step", "action_size", "episode_length") if not hasattr(simulator, name)]
        if missing:
            raise UserError(f"task {task!r} is no environment in JAX: it lacks {', '.join(missing)}")
        self.simulator = simulator
        self.action_size = int(simulator.action_size)
        bounds = [getattr(simulator, name, default) for name, default in (("action_low", -1), ("action_high", 1))]
        low, high = (np.broadcast_to(np.asarray(bound, np.float32), (self.action_size,)) for bound in bounds)
        self.own_action_space = gym.spaces.Box(low, high, dtype=np.float32)
        Actions(task, self.own_action_space)  # refuses bounds that are not finite
        repeat = int(getattr(simulator, "action_repeat", 1))
        steps = int(simulator.episode_length)
        can_terminate = bool(getattr(simulator, "can_terminate", True))
        self.spec = TaskSpec(task, domain, repeat, -(-steps // repeat), can_terminate, False, steps)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (self._check_states(),), np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, low.shape, np.float32)
        self.first = jax.jit(self.first_state)
        self.next = jax.jit(self.next_state)

    def _check_states(self) -> int:
        """The observations' size, by shapes alone: nothing is computed."""
        task = self.spec.name
        first = jax.eval_shape(self.first_state, jax.random.key(0))
        if missing := [name for name in ("obs", "reward", "done", "info") if not hasattr(first, name)]:
            raise UserError(f"states of task {task!r} lack {', '.join(missing)}")
        obs = observation_of(first)
        if len(obs.shape) != 1 or obs.dtype == jnp.uint8:
            kind = "image" if len(obs.shape) == 3 or obs.dtype == jnp.uint8 else f"{obs.shape}"
            raise UserError(f"task {task!r} has {kind} observations; only a flat vector of numbers is supported")
        second = jax.eval_shape(self.next_state, first, jnp.zeros(self.action_size))
        shapes = [jax.tree_util.tree_leaves_with_path(state) for state in (first, second)]
        one, other = ({jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in leaves} for leaves in shapes)
        for name in [*one, *other]:
            if one.get(name) != other.get(name):
                raise UserError(f"reset and step of task {task!r} return states of different shapes or types: {name}")
        return obs.shape[0]

    def first_state(self, key: jax.Array) -> Any:
        """The environment's own state at the start of an episode."""
        return jax.tree.map(strongly_typed, self.simulator.reset(key))

    def next_state(self, state: Any, action: jax.Array) -> Any:
        """Its state after one simulator step; action [A] in the environment's own bounds."""
        copied = jax.tree.map(lambda x: x, state)  # some change dicts of the state that they are given
        return jax.tree.map(strongly_typed, self.simulator.step(copied, action))

    def select(self, condition: jax.Array, new: Any, old: Any) -> Any:
        """One of two states, by a scalar condition."""
        if hasattr(self.simulator, "select"):
            return self.simulator.select(condition, new, old)
        return jax.tree.map(functools.partial(jnp.where, condition), new, old)

    # ------------------------------------------------------------------------------------------------------- Episodes
    def begin(self, key: jax.Array) -> Episode:
        """The start of an episode of one environment."""
        state = self.first_state(key)
        no = jnp.zeros((), bool)
        zero = jnp.zeros(())
        return Episode(state, self._observe(state), zero, no, no, zero, jnp.zeros((), jnp.int32), zero)

    def decide(self, episode: Episode, action: jax.Array) -> Episode:
        """The episode of one environment after a decision: action [A] in [-1, 1], repeated until its end at most."""
        low, high = self.own_action_space.low, self.own_action_space.high
        action = (low + high) / 2 + (high - low) / 2 * action  # exact where bounds are symmetric powers of two

        def step(before: tuple, _: None) -> tuple[tuple, None]:
            state, reward, over = before
            new = self.next_state(state, action)
            if self.spec.can_terminate and self.spec.action_repeat > 1:
                new = self.select(over, state, new)
                reward = reward + jnp.where(over, 0.0, new.reward)
            else:
                reward = reward + new.reward
            return (new, reward, over | (new.done > 0)), None

        before = (episode.state, jnp.zeros(()), jnp.zeros((), bool))
        (state, reward, terminated), _ = jax.lax.scan(step, before, length=self.spec.action_repeat)
        decisions = episode.decisions + 1
        truncated = ~terminated & (decisions >= self.spec.episode_length)
        success = jnp.asarray(state.info.get("success", 0.0), jnp.float32)
        total = episode.total + reward
        return Episode(state, self._observe(state), reward, terminated, truncated, success, decisions, total)

    def begin_all(self, key: jax.Array, n: int) -> Episode:
        """Starts of an episode in n environments, each from a state of its own."""
        return jax.vmap(self.begin)(jax.random.split(key, n))

    def decide_or_begin(
        self, episodes: Episode, action: jax.Array, key: jax.Array, some_over: jax.Array | None = None
    ) -> Episode:
        """n environments after a step of all: a decision, or the start of a new episode, which ignores the action,
        where the last one is over; action [n, A]. First states are drawn only if `some_over`: one of these episodes is
        over, or one of those beside them under a `vmap`."""
        over = episodes.terminated | episodes.truncated  # [n]
        moved = jax.vmap(self.decide)(episodes, action)

        def with_new() -> Episode:
            return jax.vmap(self._select)(over, self.begin_all(key, len(over)), moved)

        return jax.lax.cond(over.any() if some_over is None else some_over, with_new, lambda: moved)

    def decide_or_stay(self, episodes: Episode, action: jax.Array) -> Episode:
        """n environments after a decision of those whose episode is not over; action [n, A]."""
        over = episodes.terminated | episodes.truncated  # [n]
        return jax.vmap(self._select)(over, episodes, jax.vmap(self.decide)(episodes, action))

    def _select(self, condition: jax.Array, new: Episode, old: Episode) -> Episode:
        state = self.select(condition, new.state, old.state)
        rest = jax.tree.map(functools.partial(jnp.where, condition), new[1:], old[1:])
        return Episode(state, *rest)

    def _observe(self, state: Any) -> jax.Array:
        return observation_of(state).astype(jnp.float32)


def observation_of(state: Any) -> jax.Array:
    """[O] of a state; where it has several (for a policy, for a critic with more knowledge), that of the policy."""
    return state.obs["state"] if isinstance(state.obs, Mapping) and "state" in state.obs else state.obs


def strongly_typed(x: Any) -> jax.Array:
    """The same as an array whose type does not give way to others: loops want it the same in every round."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(x, x.dtype)


# ------------------------------------------------------------------------------------------------ Tasks by their names
_physics: dict[str, str] = {}  # with which each task was opened last


def open_jax(task: str, physics: str | None = None) -> JaxEnv:
    """The environment in JAX of a task, one and the same at every call: playground/NAME, gymnax/ID or module:function.

    Args:
        task: its name.
        physics: of MuJoCo Playground: "jax", "warp" (needs an NVIDIA GPU), or "auto": warp where there is one. By
            default that with which the task was opened before, or auto.

    Raises:
        UserError: there is none of that name, its package is missing, or it is not what `JaxEnv` needs.
    """
    physics = physics or _physics.get(task, "auto")
    if physics == "auto":
        physics = "warp" if jax.default_backend() == "gpu" else "jax"
    _physics[task] = physics
    return _open(task, physics if jax_domain(task) == "Playground" else "jax")


@functools.cache
def _open(task: str, physics: str) -> JaxEnv:
    domain = jax_domain(task)
    if domain == "Playground":
        from tdmpc2_support.envs import playground

        simulator = playground.load(task, physics)
    elif domain == "gymnax":
        from tdmpc2_support.envs import gymnax_ids

        simulator = gymnax_ids.load(task)
    elif domain == "JAX":
        module, _, name = task.rpartition(":")
        simulator = getattr(importlib.import_module(module), name)()
    else:
        task_spec(task)  # names a worse fault first, if there is one
        raise UserError(f"task {task!r} is not in JAX: playground/NAME, gymnax/ID and module:function are")
    return JaxEnv(task, domain, simulator)


def spec(task: str) -> TaskSpec:
    """The facts of a task; unlike those of others it is loaded for them. They are the same with any physics."""
    return _open(task, "jax").spec


# --------------------------------------------------------------------------------------------------------- From outside
def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """The environment for `envs.make_env`."""
    env = JaxGym(open_jax(spec.name))
    simulator = env.jax_env.simulator
    return Simulator(env, getattr(simulator, "dt", None), env.scene if hasattr(simulator, "scene") else None)


class JaxGym(gym.Env):
    """An environment in JAX, stepped from outside: a dispatch each step."""

    def __init__(self, jax_env: JaxEnv):
        self.jax_env = jax_env
        self.action_space = jax_env.own_action_space
        self.observation_space = jax_env.single_observation_space
        self.state: Any = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.jax_env.first(jax.random.key(self.np_random.integers(2**31)))
        return np.asarray(observation_of(self.state), np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state = self.jax_env.next(self.state, np.asarray(action, np.float32))
        info = {name: float(value) for name, value in self.state.info.items() if name == "success"}
        obs = np.asarray(observation_of(self.state), np.float32)
        return obs, float(self.state.reward), bool(self.state.done > 0), False, info

    def scene(self) -> tuple[Any, Any]:
        """MjModel and MjData to draw, where the simulator has them."""
        return self.jax_env.simulator.scene(self.state)
