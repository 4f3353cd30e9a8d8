"""The programs that the scripts' training loops call: one table for what is timed, counted and compiled elsewhere.

Every builder takes the module of its script, so that it serves other checkouts, too, and makes `update` (train, for one
update) or `plan` (act, for n environments) at walker-walk's sizes; the multi-task script has the tasks of mt30.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

OBS, ACTION = 24, 6  # walker-walk's sizes


class Program(NamedTuple):
    """A jitted function, and how its arguments are made: on a device, or as shapes alone."""

    jitted: Any
    static: tuple
    inputs: Callable[[], tuple]
    options: dict[str, Any]
    agent: Any
    state_at: int | None = None  # where the learning state stands among the inputs of an update, which consumes it

    def __call__(self, *inputs):
        return self.jitted(*self.static, *inputs, **self.options)

    def trace(self, *inputs):
        return self.jitted.trace(*self.static, *inputs, **self.options)


def filled_replay(td, agent, capacity: int, n: int, steps: int = 100):
    """A replay of n environments with so many random steps of each."""

    def write(replay, key):
        if agent.obs_dim:
            obs = jax.random.normal(key, (n, agent.obs_dim))
        else:
            obs = jax.random.bits(key, (n, 64, 64, 3), "uint8")
        action = jax.random.uniform(key, (n, agent.action_dim), minval=-1)
        no = jnp.zeros(n, bool)
        step = td.Step(obs, action, jax.random.uniform(key, (n,)), terminated=no, first=no)
        return td.add(agent, replay, step), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(write, td.init_replay(agent, capacity, n), keys)[0]


def of_online_script(td, agent, call: str, replay, obs, limits=()) -> Program:
    """`train` or `act` of a script that learns from a replay."""
    n = len(obs)

    def inputs():
        state = td.fresh_state(agent, td.random_streams(0))["train"]
        if call == "update":
            return state, replay()
        mean = jnp.zeros((n, agent.horizon, agent.action_dim))
        return state.params, obs, mean, jnp.zeros(n, bool), *limits, jax.random.key(0)

    if call == "update":
        return Program(td.train, (agent,), inputs, {"num_updates": 1}, agent, state_at=0)
    return Program(td.act, (agent,), inputs, {"explore": True}, agent)


def online(td, call: str, n: int, capacity: int, obs_dim: int = OBS, action_dim: int = ACTION, **fields) -> Program:
    agent = td.with_model_size(td.Agent(obs_dim=obs_dim, action_dim=action_dim, **fields))
    replay = partial(filled_replay, td, agent, capacity, 1)
    return of_online_script(td, agent, call, replay, jnp.ones((n, obs_dim)))


def pixels(td, call: str, n: int, capacity: int, **fields) -> Program:
    agent = td.with_model_size(td.Agent(action_dim=ACTION, **fields))
    replay = partial(filled_replay, td, agent, capacity, 1)
    return of_online_script(td, agent, call, replay, jnp.zeros((n, 64, 64, 9), jnp.uint8))


def first_version(td, call: str, n: int, capacity: int, model_size: int = 0, **fields) -> Program:
    """At the end of its schedules. It has one size."""
    agent = td.with_task_defaults(td.Args()).agent
    agent = dataclasses.replace(agent, obs_dim=OBS, action_dim=ACTION, **fields)
    limits = td.Schedule(jnp.full(n, agent.horizon), jnp.full((), agent.min_std))
    replay = partial(filled_tree, td, agent, capacity)
    return of_online_script(td, agent, call, replay, jnp.ones((n, OBS)), (limits,))


def filled_tree(td, agent, entries: int):
    """The first version's replay full of random entries, all of them starts, with priorities between 1e-3 and 10."""
    empty = td.init_replay(agent, entries, 1)
    key = jax.random.key(0)
    tree = []
    below = 10 ** (0.6 * jax.random.uniform(key, (entries,), minval=-3, maxval=1))
    for level in empty.tree:
        values = jnp.zeros(level.size).at[: len(below)].set(below).reshape(level.shape)
        tree.append(values)
        below = values.sum(1)
    return empty._replace(
        obs=jax.random.normal(key, empty.obs.shape),
        action=jax.random.uniform(key, empty.action.shape, minval=-1),
        reward=jax.random.uniform(key, empty.reward.shape),
        tree=tuple(tree),
        size=jnp.int32(entries),
        rows=jnp.int32(entries),
    )


def multitask(mt, call: str, n: int, capacity: int, device=None, **fields) -> Program:
    """On a batch that lies on the device."""
    names = mt.environments.TASK_SETS["mt30"]
    agent = mt.for_tasks(mt.Agent(**fields), names)
    H, B, A = agent.horizon, agent.batch_size, agent.action_dim

    def inputs():
        tasks = mt.make_tasks(agent, names)
        state = mt.fresh_state(agent, mt.random_streams(0))
        if call == "plan":
            acting = jnp.zeros((n, agent.obs_dim)), jnp.arange(n) % len(names), jnp.zeros((n, H, A))
            return tasks, state.params, *acting, jnp.zeros(n, bool), jax.random.key(0)
        obs, action, reward = jnp.ones((H + 1, B, agent.obs_dim)), jnp.ones((H, B, A)), jnp.ones((H, B))
        return tasks, state, {"obs": obs, "action": action, "reward": reward, "task": jnp.arange(B) % len(names)}

    if call == "plan":
        return Program(mt.act, (agent,), inputs, {"explore": True}, agent)
    mesh = jax.sharding.Mesh([device or jax.devices()[0]], "devices")
    return Program(jax.jit(partial(mt.train, agent, mesh), donate_argnums=1), (), inputs, {}, agent, state_at=1)


def diffusion(script, call: str, n: int, capacity: int, **fields) -> Program:
    """Updates of the three networks, and plans by them."""
    agent = script.td.with_model_size(script.Agent(obs_dim=OBS, action_dim=ACTION, **fields))

    def inputs():
        learner = script.fresh_learner(agent, 0)
        world = script.world_of(agent, learner["train"])
        if call == "plan":
            acting = jnp.ones((n, OBS)), jnp.zeros((n, agent.future, ACTION)), jnp.zeros(n, bool)
            return script.planner_of(learner["state"], world), *acting, jax.random.key(0)
        key = jax.random.key(0)
        z = jax.nn.softmax(jax.random.normal(key, (5000, agent.latent_dim)))
        action = jax.random.uniform(key, (5000, ACTION), minval=-1)
        starts = jnp.arange(5000) % (5000 - agent.future)
        entries = z, action, jnp.ones(5000), jnp.zeros(5000, int), starts, starts
        return learner["state"], world, script.Recorded(*entries)

    if call == "update":
        return Program(script.train, (agent,), inputs, {"num_updates": 1}, agent, state_at=0)
    return Program(script.act, (agent,), inputs, {"explore": True}, agent)


def newt(script, call: str, n: int, capacity: int, model_size: int = 5, device=None, **fields) -> Program:
    """After the pretraining: n tasks with an embedding and an environment each, half of a batch from demonstrations;
    the model that is nearest in size."""
    size = {1: "S", 5: "B", 19: "L"}.get(model_size, "XL")
    agent = script.with_model_size(script.Agent(model_size=size, **fields), True)
    agent = dataclasses.replace(agent, obs_dim=128, action_dim=16, task_dim=512, num_tasks=n)

    def inputs():
        tasks = script.Tasks(jnp.ones((n, 16)), jnp.full(n, 0.99), jnp.zeros(n), jnp.arange(n))
        state = script.fresh_state(agent, script.random_streams(0), jnp.ones((n, 512)))["train"]
        if call == "update":
            demos, replay = (filled_replay(script.td, agent, capacity // n, n) for _ in range(2))
            return tasks, state, replay, demos
        acting = jnp.ones((n, 128)), jnp.zeros((n, agent.horizon, 16)), jnp.zeros(n, bool), jnp.ones(())
        return tasks, state.params, *acting, jax.random.key(0)

    mesh = jax.sharding.Mesh([device or jax.devices()[0]], "devices")
    if call == "plan":
        return Program(script.act, (agent, mesh), inputs, {"by": "plan", "explore": True}, agent)
    options = {"num_updates": 1, "pretraining": False}
    return Program(script.train, (agent, mesh), inputs, options, agent, state_at=1)


def a_round(script, call: str, n: int, capacity: int, simulator: str = "gymnax/Pendulum-v1", **fields) -> Program:
    """A round of the loop on the device: a plan and a step of n environments of this task, and one update."""
    env = script.open_jax(simulator, "jax")
    agent = script.td.for_task(script.td.with_model_size(script.td.Agent(**fields)), env.spec.name, env)
    schedule = script.Schedule(0, 0, Fraction(1, n))

    def inputs():
        run = script.fresh_run(agent, env, capacity // n, n, script.random_streams(0))
        return script.side_by_side([run]), jnp.ones((), int), jnp.zeros((), int)

    return Program(script.advance, (agent, env, schedule), inputs, {}, agent)


PROGRAMS = {
    "tdmpc2_jax": online,
    "tdmpc2_jax_rgb": pixels,
    "tdmpc2_jax_mt": multitask,
    "tdmpc_jax": first_version,
    "tdmpc2_jax_diffusion": diffusion,
    "newt_jax": newt,
}
