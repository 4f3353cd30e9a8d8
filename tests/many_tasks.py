"""What the tests of the script of many tasks share: episodes, an agent of two tasks, what a checkpoint holds."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import envs
import tdmpc2_jax_mt as mt
from tdmpc2_support.cli import settings
from tdmpc2_support.run import checkpoints
from tdmpc2_support.run.schedule import random_streams

TWO_TASKS = ("cartpole-balance", "pendulum-swingup")


def state_of(folder):
    """All arrays of the last checkpoint's learning state."""
    path = checkpoints.find_checkpoint(folder).absolute() / "state"
    leaves = jax.tree.leaves(ocp.PyTreeCheckpointer().restore(path))
    is_key = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [jax.random.key_data(x) if key else x for x, key in zip(leaves, is_key, strict=True)]


def write_random_episodes(folder):
    """Episodes of random numbers, four of each of the two tasks."""
    rng = np.random.default_rng(0)
    for task in TWO_TASKS:
        writer = envs.EpisodeWriter(folder, task, 4)
        row = envs.TASKS[task]
        for step in range(envs.task_spec(task).episode_length + 1):
            obs = rng.normal(size=(4, row.obs_size))
            action = rng.uniform(-1, 1, (4, row.action_size))
            writer.add(obs, action, rng.uniform(0, 2, 4), np.full(4, step == 0))
        writer.flush()


def write_agent(folder):
    """A run of ours: an agent of the two tasks with random parameters, larger than the students and with other bins."""
    agent = mt.Agent(
        enc_dim=24, num_enc_layers=3, mlp_dim=32, latent_dim=24, task_dim=12, num_q=3, vmin=-8.0, num_bins=51
    )
    agent = dataclasses.replace(agent, distill_coef=0.3)  # it was taught itself
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: mt.fresh_state(mt.for_tasks(agent, TWO_TASKS), random_streams(1)))
    numbers = partial(jax.tree.map, lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32))
    state = {name: numbers(getattr(shapes, name)) for name in ("params", "target_q", "q_scale")}
    args = mt.Args(agent=agent, teacher="its.pt")
    meta = {"script": "tdmpc2_jax_mt", "args": settings(args), "tasks": TWO_TASKS}
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        checkpoints.write_checkpoint(manager, 5, meta, state=state)
