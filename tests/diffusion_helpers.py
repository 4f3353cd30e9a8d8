"""What the tests of latent diffusion MPC share: a small agent, networks that answer anything but zero, episodes."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from helpers import jitter

import envs
import tdmpc2_jax as td
import tdmpc2_jax_diffusion as diffusion
from tdmpc2_support.agents.worlds import World
from tdmpc2_support.data.recorded import Windows

OBS, A, Z, F = 5, 2, 16, 4
SMALL = diffusion.Agent(
    enc_dim=16,
    mlp_dim=16,
    latent_dim=Z,
    num_enc_layers=2,
    num_q=2,
    num_samples=32,
    num_elites=8,
    num_pi_trajs=4,
    iterations=2,
    width=16,
    heads=2,
    dynamics_blocks=1,
    proposal_blocks=1,
    objective_blocks=1,
    future=F,
    scales="1,4",
    num_proposals=4,
    num_policy=3,
    top=3,
    refine_samples=16,
    diffusion_batch_size=16,
    obs_dim=OBS,
    action_dim=A,
    discount=0.9,
)
TINY = """--width 16 --heads 2 --dynamics-blocks 1 --proposal-blocks 1 --objective-blocks 1 --future 4 --num-proposals 2
--num-policy 1 --diffusion-batch-size 8 --eval-episodes 1 --no-compile-cache""".split()

static = partial(jax.jit, static_argnums=0)  # one program in place of one for each operation
encode = jax.jit(td.networks(SMALL).encoder.apply)
changed = partial(dataclasses.replace, SMALL)


def make_windows(number, seed=0, steps=4 * F):
    rng = np.random.default_rng(seed)
    z = rng.dirichlet(np.ones(8), (number, steps + 1, 2)).reshape(number, steps + 1, Z)
    action = rng.uniform(-1, 1, (number, steps, A))
    reward = rng.random((number, steps))
    return Windows(*(x.astype(np.float32) for x in (z, action, reward, np.zeros((number, steps)))))


def one(tree, i=0):
    """The element i of every array."""
    return jax.tree.map(lambda x: x[i], tree)


@jax.jit
def policy_mean(params, z):
    """The policy's actions [..., A] without noise, in latent states [..., Z]."""
    return td.policy(SMALL, params["pi"], z, jnp.zeros((*z.shape[:-1], A))).mean


@cache
def make_planner():
    """A planner with networks that answer anything but zero, and the learning state that it is of, for `SMALL`."""
    learner = jax.jit(partial(diffusion.fresh_learner, SMALL, 0))()
    params = jitter(learner["train"].params, 0.3)
    world = World(params, jitter(params["q"], 0.3, 1), jnp.ones(A), jnp.float32(SMALL.discount))
    state = learner["state"]._replace(
        params=jitter(learner["state"].params, 0.1),
        ema=jitter(learner["state"].params, 0.1, 2),
        stats=diffusion.statistics(SMALL, world, make_windows(64)),
    )
    return diffusion.planner_of(state, world), state


def write_episodes(folder, task, obs, action, reward):
    """Writes episodes, obs [episodes, entries, O] and so on, as a dataset of one task."""
    tensors = {"obs": obs, "action": action, "reward": reward, "task": np.zeros(reward.shape, np.int64)}
    (Path(folder) / task).mkdir(parents=True)
    envs.save_tensordict(Path(folder) / task / "chunk_0.pt", tensors)


def cartpole_episodes(folder, episodes=12, length=40):
    """Episodes in which reward and next observation tell the observation and the action before; filler is NaN."""
    rng = np.random.default_rng(0)
    obs = np.zeros((episodes, length, OBS), np.float32)
    action = rng.uniform(-1, 1, (episodes, length, 1)).astype(np.float32)
    reward = np.full((episodes, length), np.nan, np.float32)
    obs[:, 0] = rng.normal(size=(episodes, OBS))
    obs[..., 4] = np.arange(episodes)[:, None]
    for i in range(1, length):
        obs[:, i, :4] = 0.9 * obs[:, i - 1, :4] + 0.1 * action[:, i]
        reward[:, i] = 2 * obs[:, i - 1, 0] + action[:, i, 0]
    action[:, 0] = np.nan
    write_episodes(folder, "cartpole-swingup", obs, action, reward)
