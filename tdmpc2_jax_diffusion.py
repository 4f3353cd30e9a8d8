"""Latent diffusion MPC in one file: three transformers on the latent states of a TD-MPC2 world model plan by sampling.

After D-MPC (Zhou et al., arXiv 2410.05364), moved into the latent space of TD-MPC2 (arXiv 2310.16828). Read
tdmpc2_jax.py first: its networks, planner, updates and replay are imported from there (`td`). New are p_d, a diffusion
model of the latent future that a sequence of actions leads to; rho, one that proposes such sequences; J, which
estimates what a future is worth; and a plan that samples candidates, rolls them out, scores and ranks them (SSR) and
may refine the best by MPPI.

Letters, beside those of tdmpc2_jax.py: F steps of a plan and of a training window, D width of a token, k one of 1000
noise levels, C size of the actions between two tokens, S scales, L steps of the largest scale's window, T tasks. d is
the world model's one-step dynamics, V(z) the mean of its target Qs at the policy's action.

    (1) n(z) = (z - mean) / std                                         latent states in units of their spread
    (2) x_i = (n(z_{t+i}) - n(d's guess of z_{t+i}) - mu_i) / sigma_i   what p_d diffuses: what d leaves open
    (3) x_k = sqrt(abar_k) x_0 + sqrt(1 - abar_k) noise                 abar_k: power of the signal at level k
    (4) x_k' = sqrt(abar_k') x_0 + sqrt(1 - abar_k') noise              a step of DDIM; x_0 is the network's answer
    (5) |answer - x_0|^2                                                loss of p_d and of rho
    (6) adv = sum_i gamma^i r_{t+1+i} + gamma^F V(z_{t+F}) - V(z_t)     advantage of a window; J's loss: |J - adv|^2
    (7) score = sum_i gamma^i R(z_i, a_i) + gamma^F V(z_F)              of a candidate's future

    python tdmpc2_jax.py --task walker-walk --save-episodes data  # a world model, its episodes (or tdmpc2_jax_rgb.py)
    python tdmpc2_jax_diffusion.py --world-model runs/walker-walk/tdmpc2_jax/1 --data-dir data
    python tdmpc2_jax_diffusion.py --mode joint --task walker-walk     # or both from scratch, acting by these plans
    python tdmpc2_jax_diffusion.py --evaluate --checkpoint runs/walker-walk/tdmpc2_jax_diffusion/1 --planner ssr,mppi,pi
"""

import contextlib
import dataclasses
import sys
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import envs as environments
import tdmpc2_jax as td
import tdmpc2_jax_rgb as rgb
from tdmpc2_support import cli
from tdmpc2_support.agents.worlds import World, join, load_world, of_task, recorded_world, without_lacking
from tdmpc2_support.backend import clip_by_global_norm, global_norm, jit_with_graphs, this_backend
from tdmpc2_support.bounds import Count, Name, Natural, Positive, names
from tdmpc2_support.cli import Flat, FromTask
from tdmpc2_support.data.recorded import Recorded, Windows, measures, of_one, read_recorded, windows_at
from tdmpc2_support.devices import check_memory, committed, keep_freed_memory, set_up_jax, shapes_on
from tdmpc2_support.run.checkpoints import Checkpoints, find_checkpoint, read_checkpoint, read_meta
from tdmpc2_support.run.folder import RunFolder, Signals, check_finite, recorded_settings
from tdmpc2_support.run.logging import Logger
from tdmpc2_support.run.planner_table import PlannerTable, table_rows, write_tables
from tdmpc2_support.run.reports import RETURNS_COLUMNS, SCORES_COLUMNS, SCORES_HEAD, Evaluation, progress, returns_head
from tdmpc2_support.run.schedule import Streams, check_windows, due, random_streams, seed_steps_of, updates_due


# --------------------------------------------------------------------------------------------------- Agent and Args
@dataclasses.dataclass(frozen=True)
class Agent(td.Agent):
    """What defines the agent, the world model (see `td.Agent`) and what is new here; the static argument again."""

    mode: Literal["offline", "joint"] = "offline"  # for a finished world model, from episodes; or online, with one
    obs: Literal["state", "rgb"] = "state"  # what the world model sees; offline as its run does
    shadows: bool = True  # of pictures, see tdmpc2_jax_rgb.py; offline as in its run
    task_dim: Natural = 0  # with --tasks: size E of the task embedding; where --world-model is a run, that of the run

    # Diffusion
    width: Count = 64  # width D of the tokens
    heads: Count = 4  # attention heads
    dynamics_blocks: Count = 2  # transformer blocks of p_d
    proposal_blocks: Count = 2  # transformer blocks of rho
    objective_blocks: Count = 2  # transformer blocks of J
    future: Count = 8  # steps F of a plan and of a training window
    scales: Literal["1", "1,4"] = "1"  # steps between two tokens of p_d, learned side by side; plans use 1
    diffusion_batch_size: Count = 128  # windows per update
    diffusion_lr: Positive = 1e-3  # learning rate after 200 updates of warm-up; offline it falls to a tenth
    num_updates: Count = 3_000  # offline: length of the run, updates of the three networks

    # Planning by diffusion
    planner: names("ssr", "ssr_mppi", "mppi", "pi") = "ssr"  # rank candidates, or also refine the best; or do without
    scorer: names("model", "J", "random") = "model"  # reward and value heads; J; a control
    rollouts: names("diffusion", "onestep") = "diffusion"  # futures of the candidates: drawn from p_d, or d's
    num_proposals: Natural = 32  # candidates that rho draws
    num_policy: Natural = 16  # candidates that the policy prior rolls out, the first without noise
    dynamics_steps: Count = 2  # sampling steps of p_d
    proposal_steps: Count = 8  # sampling steps of rho
    top: Count = 8  # best candidates that are refined
    refine_iterations: Natural = 2  # iterations of MPPI that refine them
    refine_samples: Count = 256  # action sequences of each
    explore_temperature: Positive = 0.5  # joint, ssr: plays one of the best --top, by softmax of their scores over this
    mpc: FromTask[bool] = True  # no flag: --planner says it


@dataclasses.dataclass(frozen=True)
class Args(td.Args):
    """Those of tdmpc2_jax.py, and what is new here."""

    tasks: str | None = None  # or several, offline: mt30, mt80 or names with commas, in the order of the dataset's ids
    agent: Flat[Agent] = Agent()
    world_model: str | None = None  # offline: a run, whose task and arguments are taken, or a .pt; of many tasks: parts
    data_dir: str | None = None  # offline: folder of the episodes to learn from, written by --save-episodes
    diffusion_every: Count = 4  # joint: updates of the world model for one of the three networks
    planner_start: Natural = 5_000  # joint: updates of the world model from which on --planner acts; before, MPPI
    exp_name: Name = "tdmpc2_jax_diffusion"  # name of this experiment: files go to RUNS_DIR/TASK/EXP_NAME/SEED
    checkpoint: str | None = None  # with --evaluate: the run to evaluate
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the table and exit
    eval_freq: Count | None = None  # updates between evaluations, 1,000; joint: simulator steps, 100,000
    checkpoint_freq: Count | None = None  # updates between checkpoints, 500; joint: simulator steps, 100,000
    log_freq: Count | None = None  # updates between two points of the loss curves, 100; joint: simulator steps, 2,000
    source_task: FromTask[None] = None  # no flag: --task says it
    save_episodes: FromTask[None] = None  # no flag


FREQUENCIES = {
    "offline": {"eval_freq": 1_000, "checkpoint_freq": 500, "log_freq": 100},
    "joint": {"eval_freq": 100_000, "checkpoint_freq": 100_000, "log_freq": 2_000},
}


def scales_of(agent: Agent) -> tuple[int, ...]:
    """Steps between two tokens, of each scale."""
    return tuple(map(int, agent.scales.split(",")))


def window_steps(agent: Agent) -> int:
    """Steps L of a training window: F of the largest scale."""
    return agent.future * max(scales_of(agent))


def script_of(agent: Agent):
    """The script whose world model it is: all but the encoder and what it sees is the same in both."""
    return rgb if agent.obs == "rgb" else td


def encode(agent: Agent, params, obs: jax.Array, key: jax.Array) -> jax.Array:
    """Latent states [..., Z] of obs [..., O]; of stacks [..., 64, 64, 9], each shifted at random as in `rgb.act`."""
    if agent.obs == "state":
        return td.networks(agent).encoder.apply(params["encoder"], obs)
    return rgb.encode(agent, params["encoder"], obs, rgb.draw_shifts(key, *obs.shape[:-3]))


# ----------------------------------------------------------------------------------------------------- Transformers
def time_waves(future: int) -> jax.Array:
    """Sines and cosines [F+1, 32] of the times 0 .. F at 16 frequencies, the last of which alternates."""
    angle = jnp.pi * jnp.arange(future + 1)[:, None] / (future + 1) * jnp.linspace(1, (future + 1) / 2, 16)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def level_waves(k: jax.Array, width: int) -> jax.Array:
    """Sines and cosines [D] of a noise level k."""
    angle = k * 1e4 ** (-jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])


class Transformer(nn.Module):
    """Blocks in which every token sees all others and then goes through a wide layer by itself, without dropout."""

    width: int  # D
    blocks: int
    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        """Tokens [tokens, D] -> [tokens, D]."""
        T = len(x)
        D = self.width
        h = self.heads
        dense = partial(nn.Dense, dtype=self.dtype)
        layer_norm = partial(nn.LayerNorm, use_fast_variance=this_backend().one_pass_variance)
        for i in range(self.blocks):
            qkv = dense(3 * D, name=f"qkv_{i}")(layer_norm(name=f"norm_{i}_0")(x)).reshape(T, 3, h, D // h)
            query = qkv[:, 0]
            key = qkv[:, 1]
            value = qkv[:, 2]
            logits = jnp.einsum("qhc,khc->hqk", query, key).astype(jnp.float32) * (D // h) ** -0.5
            seen = jnp.einsum("hqk,khc->qhc", jax.nn.softmax(logits).astype(qkv.dtype), value).reshape(T, D)
            x = x + dense(D, name=f"seen_{i}")(seen).astype(jnp.float32)
            wide = nn.gelu(dense(4 * D, name=f"wide_{i}")(layer_norm(name=f"norm_{i}_1")(x)))
            x = x + dense(D, name=f"narrow_{i}")(wide).astype(jnp.float32)
        return layer_norm(name="norm")(x)


class Denoiser(nn.Module):
    """p_d and rho: tokens are the task, if it is one of several, the latent state now, F noisy things of size `out`."""

    out: int
    body: Transformer

    @nn.compact
    def __call__(self, z, x, k, chunk=None, scale=0, task=None):
        """n(z_t) [Z], x [F, out] at noise level k, for p_d the actions chunk [F, C] that lead from token to token and
        the index of the scale, the task's embedding [E] -> x_0 [F, out] without the noise."""
        D = self.body.width
        table = nn.initializers.normal(0.02)
        dense = partial(nn.Dense, D, dtype=self.body.dtype)
        level = nn.silu(nn.Dense(4 * D, dtype=self.body.dtype, name="level_0")(level_waves(k, D)))
        level = dense(name="level_1")(level) + self.param("scales", table, (2, D))[scale]
        kinds = self.param("kinds", table, (2, D))
        now = dense(name="now")(z)[None] + kinds[0]
        noisy = dense(name="x")(x) + kinds[1]
        if chunk is not None:
            noisy = noisy + dense(name="chunk")(chunk)
        tokens = jnp.concatenate([now, noisy]) + dense(name="time")(time_waves(len(x))) + level  # [F+1, D]
        if task is not None:
            tokens = jnp.concatenate([dense(name="task")(task)[None] + level, tokens])
        head = nn.Dense(self.out, kernel_init=nn.initializers.zeros, name="head")
        return head(self.body(tokens)[-len(x) :])


class Objective(nn.Module):
    """J: how much better than V(z_t) a latent future and its actions are, read from a token of its own."""

    body: Transformer

    @nn.compact
    def __call__(self, zs, actions, task=None):
        """n(z_t) ... n(z_{t+F}) [F+1, Z], actions [F, A], the task's embedding [E] -> standardised advantage []."""
        D = self.body.width
        dense = partial(nn.Dense, D, dtype=self.body.dtype)
        readout = self.param("readout", nn.initializers.normal(0.02), (1, D))
        tokens = dense(name="z")(zs) + dense(name="time")(time_waves(len(actions)))
        tokens = tokens.at[:-1].add(dense(name="action")(actions))
        if task is not None:
            tokens = jnp.concatenate([tokens, dense(name="task")(task)[None]])
        tokens = self.body(jnp.concatenate([readout, tokens]))  # [F+2, D]
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="head")(tokens[0])[0]


def diffusion_networks(agent: Agent) -> dict[str, nn.Module]:
    """p_d, rho and J for one sequence: `vmap` makes batches. Their parameters are dicts with the same names."""
    body = partial(Transformer, agent.width, heads=agent.heads, dtype=agent.compute_dtype)
    return {
        "dynamics": Denoiser(agent.latent_dim, body(agent.dynamics_blocks)),
        "proposal": Denoiser(agent.action_dim, body(agent.proposal_blocks)),
        "objective": Objective(body(agent.objective_blocks)),
    }


def network(agent: Agent, params: dict[str, Any], name: str):
    """One of the three as a function of its inputs, with its parameters among these."""
    return partial(diffusion_networks(agent)[name].apply, params[name])


def init_nets(agent: Agent, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of the three networks."""
    nets = diffusion_networks(agent)
    zs = jnp.zeros((agent.future + 1, agent.latent_dim))
    actions = jnp.zeros((agent.future, agent.action_dim))
    task = jnp.zeros(agent.task_dim) if agent.task_dim else None
    keys = jax.random.split(key, 3)
    return {
        "dynamics": nets["dynamics"].init(keys[0], zs[0], zs[1:], 0, chunks(agent, actions, 1), 0, task),
        "objective": nets["objective"].init(keys[1], zs, actions, task),
        "proposal": nets["proposal"].init(keys[2], zs[0], actions, 0, task=task),
    }


# -------------------------------------------------------------------------------------------------------- Diffusion
LEVELS = 1000  # from 0, almost clean, to pure noise
LATENT_CLIP = 6.0  # bound on standardised latents: clipping true ones there costs an NMSE of 2e-5, at 4 already 2e-3


def signal_powers() -> np.ndarray:
    """abar [1000] of the cosine schedule (arXiv 2102.09672)."""
    f = np.cos((np.arange(LEVELS + 1) / LEVELS + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.clip(1 - f[1:] / f[:-1], 1e-4, 0.9999))


def sampling_levels(steps: int) -> np.ndarray:
    """Levels [steps] from noisy to clean."""
    return np.round(np.linspace(LEVELS - 1, 0, steps + 1)).astype(int)[:-1]


def sample_ddim(denoise, key: jax.Array, shape: tuple[int, ...], steps: int, clip: float, mask=1.0) -> jax.Array:
    """Samples of this shape by DDIM (arXiv 2010.02502). denoise(x, k) is the network's answer x_0, which clip bounds;
    mask multiplies all that is drawn. A step (4) goes from signal power abar to that of the next level, after, which
    behind the last is exactly 1: x_0."""
    levels = sampling_levels(steps)
    abars = signal_powers()[levels]
    afters = np.append(abars[1:], 1.0)

    def step(x, level):
        k, abar, after = level
        x0 = jnp.clip(denoise(x, k), -clip, clip) * mask
        noise = (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)
        return jnp.sqrt(after) * x0 + jnp.sqrt(1 - after) * noise, None

    start = jax.random.normal(key, shape) * mask
    return jax.lax.scan(step, start, jax.tree.map(jnp.float32, (levels, abars, afters)))[0]


# -------------------------------------------------------------------------------------- Windows and what is diffused
class Stats(NamedTuple):
    """What the networks' inputs and outputs are standardised by, from windows to learn from; [T, ...] for T tasks."""

    mean: jax.Array  # [Z] of latent states
    std: jax.Array  # [Z]
    mu: jax.Array  # [S, F, Z] of what d leaves open
    sigma: jax.Array  # [S, F, Z]
    adv_mean: jax.Array  # of advantages
    adv_std: jax.Array


def part_of(stats: Stats, world: World, task) -> tuple[Stats, World]:
    """What belongs to one of several tasks, by its index; what belongs to an only task as it is."""
    if world.emb is None:
        return stats, world
    return jax.tree.map(lambda x: x[task], stats), of_task(world, task)


def normalise(stats: Stats, z: jax.Array) -> jax.Array:
    """n(z), equation (1): latent states vary by about 0.1, so that unit noise would drown them."""
    return (z - stats.mean) / stats.std


def denormalise(agent: Agent, stats: Stats, x: jax.Array) -> jax.Array:
    """The latent states [..., Z] for n(z) = x, each group back on the simplex on which SimNorm has put it."""
    z = jnp.maximum(x * stats.std + stats.mean, 1e-6).reshape(*x.shape[:-1], -1, agent.simnorm_dim)
    return (z / z.sum(-1, keepdims=True)).reshape(x.shape)


def chunks(agent: Agent, actions: jax.Array, scale) -> jax.Array:
    """Actions [L, A] as chunks [F, C] that lead from token to token at this scale: single actions if 1 is the only one,
    else as many as the largest has, with bits that tell which of them are used."""
    largest = max(scales_of(agent))
    slot = jnp.arange(largest)
    index = jnp.arange(agent.future)[:, None] * scale + slot  # [F, largest]
    used = jnp.broadcast_to((slot < scale).astype(jnp.float32), index.shape)
    chunk = actions[jnp.minimum(index, len(actions) - 1)] * used[..., None]
    chunk = chunk.reshape(agent.future, largest * agent.action_dim)
    return jnp.concatenate([chunk, used], axis=-1) if largest > 1 else chunk


def follow(agent: Agent, world: World, z: jax.Array, actions: jax.Array) -> jax.Array:
    """Latent states [L, Z] that d predicts, step by step, from z [Z] under actions [L, A]."""
    dynamics = td.networks(agent).dynamics

    def step(z, action):
        z = dynamics.apply(world.params["dynamics"], z, action)
        return z, z

    return jax.lax.scan(step, z, actions)[1]


def value(agent: Agent, world: World, z: jax.Array) -> jax.Array:
    """V(z) [...]: mean of the target Qs at z [..., Z] and the policy's action without noise."""
    no_noise = jnp.zeros((*z.shape[:-1], agent.action_dim))
    mean = td.policy(agent, world.params["pi"], z, no_noise).mean
    return td.two_hot_inv(agent, td.q_logits(agent, world.target_q, z, mean * world.mask)).mean(0)


def anchors(agent: Agent, world: World, stats: Stats, z, actions, scale) -> jax.Array:
    """d's guess [F, Z] of n(z) at the tokens behind z [Z], under actions [L, A]. What it leaves open is a small part of
    the whole, and so is an error in it: the error of whole latent states has a floor far above d's."""
    return normalise(stats, follow(agent, world, z, actions)[(jnp.arange(agent.future) + 1) * scale - 1])


def left_open(agent: Agent, world: World, stats: Stats, window: Windows, scale) -> jax.Array:
    """What the anchors leave open of one window's future [F, Z]: the difference in equation (2)."""
    future = normalise(stats, window.z[(jnp.arange(agent.future) + 1) * scale])
    return future - anchors(agent, world, stats, window.z[0], window.action, scale)


def advantage(agent: Agent, world: World, window: Windows) -> jax.Array:
    """Equation (6) for one window; behind a termination nothing has value."""
    F = agent.future
    now, last = value(agent, world, window.z[jnp.array([0, F])])
    rewards = (world.discount ** jnp.arange(F) * window.reward[:F]).sum()
    return rewards + world.discount**F * (1 - window.terminated[F - 1]) * last - now


@partial(jax.jit, static_argnames="agent")
def statistics(agent: Agent, world: World, windows: Windows) -> Stats:
    """Means and standard deviations over windows [B, ...]."""
    z = windows.z.reshape(-1, agent.latent_dim)
    stats = Stats(z.mean(0), jnp.maximum(z.std(0), 1e-2), mu=0.0, sigma=1.0, adv_mean=0.0, adv_std=1.0)
    rest = []
    for scale in scales_of(agent):  # a few windows at a time: gigabytes for all of large networks
        one = partial(left_open, agent, world, stats, scale=scale)
        rest.append(jax.lax.map(one, windows, batch_size=256))
    rest = jnp.stack(rest)  # [S, B, F, Z]
    adv = jax.vmap(partial(advantage, agent, world))(windows)
    return stats._replace(
        mu=rest.mean(1),
        sigma=jnp.maximum(rest.std(1), 0.02),
        adv_mean=adv.mean(),
        adv_std=jnp.maximum(adv.std(), 1e-3),
    )


# --------------------------------------------------------------------------------------------------------- Learning
class DiffusionState(NamedTuple):
    """All that learning changes, and what it is standardised by."""

    params: dict[str, Any]  # dynamics, proposal, objective
    ema: dict[str, Any]  # slow copy of params, which plans
    opt: dict[str, optax.OptState]
    stats: Stats
    key: jax.Array
    updates: jax.Array  # number of updates made


def denoising_loss(denoise, x0: jax.Array, key: jax.Array, mask=1.0) -> jax.Array:
    """Squared errors (5) [F, out] of what denoise(x_k, k) answers to x0 [F, out] with noise (3) of a random level k."""
    level_key, noise_key = jax.random.split(key)
    k = jax.random.randint(level_key, (), 0, LEVELS)
    abar = jnp.asarray(signal_powers(), jnp.float32)[k]
    x = jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * jax.random.normal(noise_key, x0.shape)
    return ((denoise(x * mask, k) - x0) * mask) ** 2


def dynamics_loss(agent: Agent, params, stats: Stats, world: World, window: Windows, key: jax.Array) -> jax.Array:
    """p_d's loss on one window: it is told n(z_t) and the actions, and guesses what the anchors leave open (2)."""
    scale_key, key = jax.random.split(key)
    scale = jax.random.randint(scale_key, (), 0, len(scales_of(agent)))
    steps = jnp.array(scales_of(agent))[scale]
    x0 = (left_open(agent, world, stats, window, steps) - stats.mu[scale]) / stats.sigma[scale]
    now = normalise(stats, window.z[0])
    chunk = chunks(agent, window.action, steps)
    denoise = partial(network(agent, params, "dynamics"), now, chunk=chunk, scale=scale, task=world.emb)
    return denoising_loss(denoise, x0, key).mean()


def proposal_loss(agent: Agent, params, stats: Stats, world: World, window: Windows, key: jax.Array) -> jax.Array:
    """rho's loss on one window: it is told n(z_t) and guesses the actions. Those that the task lacks do not count."""
    now = normalise(stats, window.z[0])
    denoise = partial(network(agent, params, "proposal"), now, task=world.emb)
    errors = denoising_loss(denoise, window.action[: agent.future], key, world.mask)
    return errors.mean() / world.mask.mean()


def objective_loss(agent: Agent, params, stats: Stats, world: World, window: Windows):
    """J's loss on one window: the squared error of the standardised advantage (6)."""
    adv = (advantage(agent, world, window) - stats.adv_mean) / stats.adv_std
    zs = normalise(stats, window.z[: agent.future + 1])
    actions = window.action[: agent.future]
    return (network(agent, params, "objective")(zs, actions, world.emb) - adv) ** 2


def diffusion_losses(agent: Agent, params, stats: Stats, world: World, windows: Windows, key: jax.Array):
    """The three losses on windows [B, ...]; each depends on the parameters of its own network only."""

    def losses(window, key):
        of_its_task = part_of(stats, world, window.task)
        keys = jax.random.split(key)
        return {
            "dynamics": dynamics_loss(agent, params, *of_its_task, window, keys[0]),
            "proposal": proposal_loss(agent, params, *of_its_task, window, keys[1]),
            "objective": objective_loss(agent, params, *of_its_task, window),
        }

    keys = jax.random.split(key, len(windows.z))
    return jax.tree.map(jnp.mean, jax.vmap(losses)(windows, keys))


def diffusion_optimizer(agent: Agent) -> optax.GradientTransformation:
    """Adam behind a clip, for each network its own; a linear warm-up, then a cosine down to a tenth, but in joint mode,
    where the latent states never come to rest, a constant."""
    lr = agent.diffusion_lr
    last = lr / 10 if agent.mode == "offline" else lr
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, 200, max(agent.num_updates, 201), last)
    return optax.chain(clip_by_global_norm(5.0), optax.adam(schedule))


@partial(jax.jit, static_argnames="agent")
def init_diffusion(agent: Agent, stats: Stats, key: jax.Array) -> DiffusionState:
    """Learning state at the start of a run."""
    init_key, key = jax.random.split(key)
    params = init_nets(agent, init_key)
    tx = diffusion_optimizer(agent)
    opt = {name: tx.init(net) for name, net in params.items()}
    return DiffusionState(params, jax.tree.map(jnp.copy, params), opt, stats, key, jnp.zeros((), jnp.int32))


def diffusion_update(agent: Agent, state: DiffusionState, world: World, windows: Windows, key: jax.Array):
    """One gradient step of each network; the world model gets none. Returns the new state and scalars for the log."""
    B = len(windows.z)
    L = window_steps(agent)
    Z = agent.latent_dim
    A = agent.action_dim
    chex.assert_shape(list(windows[:4]), [(B, L + 1, Z), (B, L, A), (B, L), (B, L)])
    tx = diffusion_optimizer(agent)

    def loss(params):
        losses = diffusion_losses(agent, params, state.stats, world, windows, key)
        return sum(losses.values()), losses

    grads, losses = jax.grad(loss, has_aux=True)(state.params)
    params = {}
    opt = {}
    info = {}
    for name in grads:
        change, opt[name] = tx.update(grads[name], state.opt[name])
        params[name] = optax.apply_updates(state.params[name], change)
        info[f"{name}_loss"] = losses[name]
        info[f"{name}_grad_norm"] = global_norm(grads[name])
    decay = jnp.minimum(0.995, (1 + state.updates) / (10 + state.updates))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    return DiffusionState(params, ema, opt, state.stats, state.key, state.updates + 1), info


class Replays(NamedTuple):
    """Joint mode: the replay of the world model, with windows of H+1 entries, and one more for its queue of windows of
    L+1 entries. The second has observations and actions of size 1, which stand for those of the first."""

    short: td.Replay
    long: td.Replay


def of_long_windows(agent: Agent) -> Agent:
    """The agent as functions of `td` need it to write and sample the second replay."""
    sizes = {"horizon": window_steps(agent), "batch_size": agent.diffusion_batch_size}
    return dataclasses.replace(agent, **sizes, obs_dim=1, action_dim=1)


def init_replays(agent: Agent, capacity: int, num_envs: int) -> Replays:
    """Empty replays of `capacity` steps of each environment."""
    long = td.init_replay(of_long_windows(agent), capacity, num_envs)
    return Replays(td.init_replay(agent, capacity, num_envs), long)


@partial(jax.jit, static_argnames="agent", donate_argnames="replays")
def add_to_both(agent: Agent, replays: Replays, step: td.Step) -> Replays:
    """Writes one step of all environments over the oldest one."""
    small = step._replace(obs=step.obs[:, :1], action=step.action[:, :1])
    return Replays(td.add(agent, replays.short, step), td.add(of_long_windows(agent), replays.long, small))


def sample_windows(agent: Agent, world: World, replays: Replays, key: jax.Array) -> Windows:
    """Windows of L+1 entries from the replays, with the latent states of the world model as it is now."""
    whole = replays.long._replace(obs=replays.short.obs, action=replays.short.action)
    batch = td.sample(of_long_windows(agent), whole, key)
    z = td.networks(agent).encoder.apply(world.params["encoder"], batch.obs)
    return Windows(*(x.swapaxes(0, 1) for x in (z, batch.action, batch.reward, batch.terminated)))


def moved_statistics(agent: Agent, state: DiffusionState, world: World, windows: Windows) -> Stats:
    """Joint mode, where latent states move: means over all updates so far, later over about the last 1000 of them."""
    rate = jnp.maximum(0.001, 1 / (1 + state.updates))
    return optax.incremental_update(statistics(agent, world, windows), state.stats, rate)


@partial(jit_with_graphs, static_argnames=("agent", "num_updates"), donate_argnames=("state",))
def train(agent: Agent, state: DiffusionState, world: World, data: Recorded | Replays, num_updates: int):
    """`num_updates` updates on fresh windows in one dispatch. Returns the new state and the means of their scalars."""

    def one(state, _):
        key, window_key, noise_key = jax.random.split(state.key, 3)
        if agent.mode == "joint":
            windows = sample_windows(agent, world, data, window_key)
            state = state._replace(stats=moved_statistics(agent, state, world, windows))
        else:
            starts = data.starts[jax.random.randint(window_key, (agent.diffusion_batch_size,), 0, len(data.starts))]
            windows = windows_at(data, starts, window_steps(agent))
        return diffusion_update(agent, state._replace(key=key), world, windows, noise_key)

    state, infos = jax.lax.scan(one, state, None, length=num_updates)
    return state, jax.tree.map(jnp.mean, infos)


# -------------------------------------------------------------------------------------------- Sample, score and rank
class Planner(NamedTuple):
    """What plans are made with."""

    nets: dict[str, Any]  # parameters of p_d, rho and J
    stats: Stats
    world: World


def planner_of(state: DiffusionState, world: World, task: int = 0) -> Planner:
    """The planner with the slow copies, for one of the tasks."""
    stats, part = part_of(state.stats, world, task)
    return Planner(state.ema, stats, part if world.emb is None else without_lacking(part))


def propose(agent: Agent, planner: Planner, z: jax.Array, number: int, key: jax.Array) -> jax.Array:
    """Action sequences [number, F, A] at z [Z], drawn from rho."""
    nets, stats, world = planner
    one = partial(network(agent, nets, "proposal"), normalise(stats, z), task=world.emb)
    denoise = jax.vmap(one, (0, None))
    shape = (number, agent.future, agent.action_dim)
    return sample_ddim(denoise, key, shape, agent.proposal_steps, clip=1.0, mask=world.mask)


def policy_sequences(agent: Agent, world: World, z: jax.Array, number: int, key: jax.Array) -> jax.Array:
    """Action sequences [number, F, A] of the policy prior, rolled out through d from z [Z], the first without noise."""
    dynamics = td.networks(agent).dynamics

    def step(z, eps):
        action = td.policy(agent, world.params["pi"], z, eps).action * world.mask
        return dynamics.apply(world.params["dynamics"], z, action), action

    eps = jax.random.normal(key, (agent.future, number, agent.action_dim)).at[:, 0].set(0.0)
    return jax.lax.scan(step, jnp.tile(z, (number, 1)), eps)[1].swapaxes(0, 1)


def candidates_at(agent: Agent, planner: Planner, z, best, first, key) -> jax.Array:
    """Candidates [N, F, A] at z [Z]: of rho, of the policy prior, and the last plan best [F, A] shifted by one (at an
    episode's start, first, candidate 0 once more)."""
    rho_key, pi_key = jax.random.split(key)
    parts = []
    if agent.num_proposals:
        parts.append(propose(agent, planner, z, agent.num_proposals, rho_key))
    if agent.num_policy:
        parts.append(policy_sequences(agent, planner.world, z, agent.num_policy, pi_key))
    shifted = jnp.concatenate([best[1:], best[-1:]])
    parts.append(jnp.where(first, parts[0][0], shifted)[None])
    return jnp.concatenate(parts)


def rollout(agent: Agent, planner: Planner, z: jax.Array, actions: jax.Array, key: jax.Array, scale: int = 0):
    """Latent futures [N, F+1, Z] of z [Z] under actions [N, L, A]: drawn from p_d, or those of d. scale is an index; at
    scale s the tokens are s steps apart."""
    nets, stats, world = planner
    steps = scales_of(agent)[scale]
    N = len(actions)
    F = agent.future
    Z = len(z)
    if agent.rollouts == "onestep":
        future = jax.vmap(partial(follow, agent, world, z))(actions)[:, (np.arange(F) + 1) * steps - 1]
    else:
        chunk = jax.vmap(lambda a: chunks(agent, a, steps))(actions)  # [N, F, C]
        one = partial(network(agent, nets, "dynamics"), normalise(stats, z), scale=scale, task=world.emb)
        denoise = jax.vmap(one, (0, None, 0))
        x0 = sample_ddim(lambda x, k: denoise(x, k, chunk), key, (N, F, Z), agent.dynamics_steps, LATENT_CLIP)
        guess = jax.vmap(lambda a: anchors(agent, world, stats, z, a, steps))(actions)
        future = denormalise(agent, stats, guess + x0 * stats.sigma[scale] + stats.mu[scale])
    return jnp.concatenate([jnp.broadcast_to(z, (N, 1, Z)), future], axis=1)


def score_by_model(agent: Agent, world: World, zs: jax.Array, actions: jax.Array) -> jax.Array:
    """Equation (7): [N] for futures zs [N, F+1, Z] under actions [N, F, A]; an end that is predicted is one."""
    F = agent.future
    model = td.networks(agent)
    rewards = td.two_hot_inv(agent, model.reward.apply(world.params["reward"], zs[:, :-1], actions))  # [N, F]
    alive = jnp.ones((len(zs), F + 1))  # 0 after a predicted termination
    if model.termination:
        ended = model.termination.apply(world.params["termination"], zs[:, 1:])[..., 0] > 0
        alive = alive.at[:, 1:].set(jnp.cumprod(~ended, axis=-1))
    parts = jnp.concatenate([rewards, value(agent, world, zs[:, -1])[:, None]], axis=-1)
    return (world.discount ** jnp.arange(F + 1) * alive * parts).sum(-1)


def score_by_objective(agent: Agent, planner: Planner, zs: jax.Array, actions: jax.Array) -> jax.Array:
    """J's advantage [N] of futures zs [N, F+1, Z] under actions [N, F, A], in the unit of rewards."""
    nets, stats, world = planner
    one = partial(network(agent, nets, "objective"), task=world.emb)
    return jax.vmap(one)(normalise(stats, zs), actions) * stats.adv_std + stats.adv_mean


def score(agent: Agent, planner: Planner, zs: jax.Array, actions: jax.Array, key: jax.Array) -> jax.Array:
    """Scores [N] of futures zs [N, F+1, Z] under actions [N, F, A]; no number: -inf."""
    if agent.scorer == "model":
        scores = score_by_model(agent, planner.world, zs, actions)
    elif agent.scorer == "J":
        scores = score_by_objective(agent, planner, zs, actions)
    else:  # random, but not for actions that are no numbers
        scores = jax.random.uniform(key, (len(actions),)) + 0.0 * actions.sum((1, 2))
    return jnp.where(jnp.isfinite(scores), scores, -jnp.inf)


REFINED_STD = 0.05  # least one with which refinement starts: at 0.5 it fell back to what MPPI alone returns


def refine(agent: Agent, world: World, z: jax.Array, candidates: jax.Array, key: jax.Array) -> jax.Array:
    """Mean [H, A] of MPPI's distribution, which starts at the best candidates [top, F, A] and is fitted to the elites
    among them and fresh samples."""
    H = agent.horizon
    A = agent.action_dim
    samples = agent.refine_samples
    best = candidates[:, :H].swapaxes(0, 1)  # [H, top, A]

    def iterate(distribution, key):
        mean, std = distribution
        sample_key, eps_key, head_key = jax.random.split(key, 3)
        sampled = jnp.clip(mean[:, None] + std[:, None] * jax.random.normal(sample_key, (H, samples, A)), -1, 1)
        actions = jnp.concatenate([best, sampled * world.mask], axis=1)
        eps = jax.random.normal(eps_key, (actions.shape[1], A))
        values = td.estimate_value(agent, world.params, z[None], actions, td.two_heads(agent, head_key), eps)
        elite_values, elite_indices = jax.lax.top_k(values, min(agent.num_elites, len(values)))
        elites = actions[:, elite_indices]
        weights = jax.nn.softmax(agent.temperature * elite_values)
        mean = jnp.einsum("e,hea->ha", weights, elites)
        variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
        return (mean, jnp.clip(jnp.sqrt(variance), agent.min_std, agent.max_std)), None

    start = (best.mean(1), jnp.clip(best.std(1), REFINED_STD, agent.max_std))
    return jax.lax.scan(iterate, start, jax.random.split(key, agent.refine_iterations))[0][0]


def plan_by_diffusion(agent: Agent, planner: Planner, obs, best, first, key, explore: bool = False):
    """Sample, score and rank in one environment: obs [O] or a stack, the last plan best [F, A], first (an episode
    begins) -> action [A], this plan [F, A], and whether no candidate could be scored, so that the policy prior acts.
    explore plays one of the best, drawn by softmax of their scores in units of the scores' standard deviation, and adds
    noise."""
    chex.assert_shape(best, (agent.future, agent.action_dim))
    world = planner.world
    keys = jax.random.split(key, 7)
    z = encode(agent, world.params, obs, keys[6])
    candidates = candidates_at(agent, planner, z, best, first, keys[0])
    zs = rollout(agent, planner, z, candidates, keys[1])
    every_score = score(agent, planner, zs, candidates, keys[2])  # [N]
    scores, order = jax.lax.top_k(every_score, min(agent.top, len(candidates)))
    chosen = 0
    if explore:
        unit = agent.explore_temperature * jnp.std(every_score, where=jnp.isfinite(every_score)) + 1e-6
        chosen = jax.random.categorical(keys[3], (scores - scores[0]) / unit)
    best = candidates[order[chosen]]
    if agent.planner == "ssr_mppi":
        best = best.at[: agent.horizon].set(refine(agent, world, z, candidates[order], keys[4]))
    failed = ~jnp.isfinite(scores[0]) | ~jnp.isfinite(z).all() | ~jnp.isfinite(best).all()
    pi = td.policy(agent, world.params["pi"], z, jnp.zeros(agent.action_dim)).mean
    action = jnp.where(failed, jnp.nan_to_num(pi), best[0])
    if explore:
        action = action + agent.min_std * jax.random.normal(keys[5], action.shape)
    return jnp.clip(action, -1, 1) * world.mask, jnp.where(failed, 0.0, best), failed


@partial(jit_with_graphs, static_argnames=("agent", "explore", "random"))
def act(agent: Agent, planner: Planner, obs, best, first, key, explore: bool, random: bool = False):
    """Actions [n, A] of --planner for obs [n, O], or random; best [n, F, A], the last plans; first [n], true where
    episodes begin. Returns the actions, the plans, whether they failed [n] (see `plan_by_diffusion`) and a new key."""
    if agent.planner in ("ssr", "ssr_mppi") and not random:
        key, plan_key = jax.random.split(key)
        plan_one = partial(plan_by_diffusion, agent, planner, explore=explore)
        action, best, failed = jax.vmap(plan_one)(obs, best, first, jax.random.split(plan_key, len(obs)))
        return action, best, failed, key
    world = planner.world
    H = agent.horizon
    agent = dataclasses.replace(agent, mpc=agent.planner == "mppi")
    decide = partial(script_of(agent).act, explore=explore, random=random)
    action, mean, key = decide(agent, world.params, obs, best[:, :H], first, key)
    return action * world.mask, best.at[:, :H].set(mean), jnp.zeros(len(obs), bool), key


# ------------------------------------------------------------------------------------------------------- Evaluation
def make_eval_envs(args: Args, name: str, number: int):
    """`number` environments of a task; several tasks have observations and actions of the largest."""
    options = {"render_mode": "rgb_array" if args.capture_video else None}
    options |= {"obs": args.agent.obs, "shadows": args.agent.shadows}
    if args.tasks:
        options["sizes"] = environments.set_sizes(cli.task_names(args))
    return environments.make_envs([name] if args.tasks else name, number, (args.seed, 1), **options)


def agents_of(args: Args) -> list[Agent]:
    """For each task the agent with what the task decides."""
    agents = []
    for name in cli.task_names(args):
        with contextlib.closing(make_eval_envs(args, name, 1)) as envs:
            agents.append(script_of(args.agent).for_task(args.agent, name, envs))
    return agents


def evaluate(agent: Agent, planner: Planner, envs, key, seed, film=False, advance=lambda: None, stop=False):
    """One episode in each of n environments, without exploration; arguments and result are those of `td.evaluate`. Says
    how many plans failed, if any did."""
    n = envs.num_envs
    obs, _ = envs.reset(seed=seed)
    first = np.ones(n, bool)
    running = np.ones(n, bool)
    returns = np.zeros(n)
    successes = np.zeros(n)
    failures = 0
    frames = [envs.render()[0]] if film else []
    best, key = committed((jnp.zeros((n, agent.future, agent.action_dim)), key))
    seen = None
    while running.any():
        seen = rgb.stack_pictures(seen, obs, first) if agent.obs == "rgb" else obs
        action, best, failed, key = act(agent, planner, seen, best, first, key, explore=False)
        obs, reward, terminated, truncated, info = envs.step(np.asarray(action))
        if film and running[0]:
            frames.append(envs.render()[0])
        failures += (np.asarray(failed) & running).sum()
        returns += np.where(running, reward, 0.0)
        successes = np.where(running, info["success"], successes)
        running &= ~(terminated | truncated)
        first = np.zeros(n, bool)
        advance()
        if stop:
            return None
    if failures:
        print(f"in {failures} plans no candidate could be scored: the policy has acted", file=sys.stderr)
    return Evaluation(returns, successes, frames, envs.metadata.get("render_fps", 25))


@partial(jax.jit, static_argnames="agent")
def answers(agent: Agent, planner: Planner, windows: Windows, key: jax.Array) -> dict[str, Any]:
    """What the networks answer on windows [B, ...], for `measures`: futures of p_d and of d under the actions and under
    those of another window, and of a latent state that stays; advantages by the world model's heads and by J, of true,
    p_d's and d's futures; actions of rho and of the record."""
    F = agent.future
    B = len(windows.z)
    world = planner.world
    keys = jax.random.split(key, B)
    shuffled = jnp.roll(windows.action, B // 2, axis=0)
    futures = {}
    for scale, s in reversed([*enumerate(scales_of(agent))]):  # scale 1 last: its futures are scored below
        z = windows.z[:, : F * s + 1 : s]
        found = {"true": z, "copy": jnp.broadcast_to(z[:, :1], z.shape)}
        for name, rollouts in (("p_d", "diffusion"), ("d", "onestep")):
            one = partial(rollout, dataclasses.replace(agent, rollouts=rollouts), planner, scale=scale)
            each = jax.vmap(lambda z, a, key, one=one: one(z, a[None], key)[0])
            found[name] = each(z[:, 0], windows.action, keys)
            found[f"{name} shuffled"] = each(z[:, 0], shuffled, keys)
        futures[str(s)] = {name: zs[:, 1:] for name, zs in found.items()}

    actions = windows.action[:, :F]
    now = value(agent, world, z[:, 0])
    advantages = {"true": jax.vmap(partial(advantage, agent, world))(windows)}
    for name in ("true", "p_d", "d"):
        advantages[f"model on {name}"] = score_by_model(agent, world, found[name], actions) - now
        advantages[f"J on {name}"] = score_by_objective(agent, planner, found[name], actions)
    drawn = jax.vmap(lambda z, key: propose(agent, planner, z, 1, key)[0])(z[:, 0], keys)
    return {"futures": futures, "advantages": advantages, "actions": {"rho": drawn, "recorded": actions}}


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints for each task a table of planners, scorers and roll-outs over the same episodes, and what the
    networks know of held-out ones of --data-dir; writes them to --json."""
    several = len(cli.task_names(args)) > 1
    key = random_streams(args.seed).evaluate
    tables = []
    agents = agents_of(args)
    world, state = read_run(args, agents[0])
    data = encoded(args, agents[0], world) if args.data_dir else None
    for i, name in enumerate(cli.task_names(args)):
        planner = planner_of(state, world, i)
        table = PlannerTable(args, name, several)
        with contextlib.closing(make_eval_envs(args, name, args.eval_episodes)) as envs:
            for agent in table_rows(agents[i]):
                with progress(environments.task_spec(name).episode_length) as advance:
                    result = evaluate(agent, planner, envs, key, (args.seed, 1), args.capture_video, advance)
                table.add_row(agent, result)
        if data:
            windows = windows_at(data, of_one(data, data.held_out, i, 256), window_steps(args.agent))
            known = answers(agents[i], planner, windows, key)
            table.add_measures(measures(known, int(planner.world.mask.sum())))
        tables.append(table)
    write_tables(args, tables)


def read_run(args: Args, agent: Agent) -> tuple[World, DiffusionState]:
    """World model and learning state of the run of --checkpoint."""
    checkpoint = find_checkpoint(args.checkpoint)
    meta = read_meta(checkpoint, *SCRIPTS)
    if agent.mode == "offline":
        items = read_checkpoint(checkpoint, meta, **offline_shapes(args, agent))
        return items["world"], items["state"]
    learner = shapes_on(jax.sharding.SingleDeviceSharding(jax.devices()[0]), partial(fresh_learner, agent, 0))
    learner = read_checkpoint(checkpoint, meta, learner=learner)["learner"]
    return world_of(agent, learner["train"]), learner["state"]


# ------------------------------------------------------------------------------------------------------ Run: offline
SCRIPTS = ("tdmpc2_jax_diffusion",)  # whose runs this one evaluates
WORLD_SCRIPTS = ("tdmpc2_jax", "tdmpc2_jax_mt", "tdmpc2_jax_device", "tdmpc2_jax_rgb")  # not Newt: other discounts
BURST = 20  # updates of one dispatch
# Settings that another start of an offline run may change: the number of updates shapes the learning rate
MAY_CHANGE = cli.MAY_CHANGE - {"num_updates", "total_timesteps"}
MAY_CHANGE |= {"planner", "scorer", "rollouts", "top", "refine_iterations", "refine_samples"}


def encoded(args: Args, agent: Agent, world: World) -> Recorded:
    """The recorded episodes of --data-dir, with latent states as observations."""
    if agent.obs == "rgb":
        key = random_streams(args.seed).batches
        encode_many = jax.jit(encode, static_argnums=0)

        def encode_stacks(stacks, number):
            return encode_many(agent, world.params, stacks, jax.random.fold_in(key, number))

        return read_recorded(cli.task_names(args), args.data_dir, window_steps(agent), agent.latent_dim, encode_stacks)
    data = read_recorded(cli.task_names(args), args.data_dir, window_steps(agent), agent.latent_dim)

    @jax.jit
    def encode_all(world, obs, task):
        def encode_one(entry):
            one_obs, one_task = entry
            return td.networks(agent).encoder.apply(of_task(world, one_task).params["encoder"], one_obs)

        return jax.lax.map(encode_one, (obs, task), batch_size=4096)

    return data._replace(obs=encode_all(world, data.obs, data.task))


def no_statistics(agent: Agent) -> Stats:
    """Those of before the first window."""
    Z = agent.latent_dim
    of_rest = (len(scales_of(agent)), agent.future, Z)
    return Stats(jnp.zeros(Z), jnp.ones(Z), jnp.zeros(of_rest), jnp.ones(of_rest), jnp.zeros(()), jnp.ones(()))


def offline_shapes(args: Args, agent: Agent) -> dict[str, Any]:
    """Shapes of what an offline run's checkpoint holds."""

    def make():
        params = script_of(agent).init_params(agent, jax.random.key(0))
        world = World(params, params["q"], jnp.ones(agent.action_dim), jnp.float32(0))
        stats = no_statistics(agent)
        if args.tasks:
            number = len(cli.task_names(args))
            world = join([world._replace(params=params | {"task_emb": jnp.zeros(agent.task_dim)})] * number)
            stats = jax.tree.map(lambda x: jnp.stack([x] * number), stats)
        return {"world": world, "state": init_diffusion(agent, stats, jax.random.key(0))}

    return shapes_on(jax.sharding.SingleDeviceSharding(jax.devices()[0]), make)


def start_or_resume(args: Args, agents: list[Agent], checkpoints: Checkpoints):
    """World model, learning state and counters of the run's last checkpoint, or those of --world-model and new ones;
    and the recorded episodes in the latent states of that model."""
    agent = agents[0]
    names = cli.task_names(args)
    count = {"updates": 0, "evaluated": 0, "seconds": 0.0}  # no evaluation before the first update
    if restored := checkpoints.restore(**offline_shapes(args, agent)):
        meta, items = restored
        return items["world"], items["state"], encoded(args, agent, items["world"]), count | meta["count"]
    discounts = [agent.discount for agent in agents]
    init = partial(script_of(agent).init_params, agent)
    world = load_world(args.world_model, names, discounts, init, agent.task_dim, *WORLD_SCRIPTS, obs=agent.obs)
    world = committed(world)
    data = encoded(args, agent, world)
    number = min(8192, 2**18 // window_steps(agent))  # of windows that the statistics are of
    stats = []
    for task in range(len(names)):
        windows = windows_at(data, of_one(data, data.starts, task, number), window_steps(agent))
        stats.append(statistics(agent, of_task(world, task), windows))
    stats = jax.tree.map(lambda *x: jnp.stack(x), *stats) if args.tasks else stats[0]
    return world, committed(init_diffusion(agent, stats, diffusion_stream(args.seed))), data, count


def diffusion_stream(seed: int) -> jax.Array:
    """The key of the three networks: the one behind those of `random_streams`."""
    return jax.random.split(jax.random.key(seed), len(Streams._fields) + 1)[-1]


def offline_loop(args: Args, agents, world, state, data, count, checkpoints, logger, signals) -> int:
    """Evaluates, saves, learns and logs, until --num-updates or a signal. Returns the last update."""
    names = cli.task_names(args)
    last = args.agent.num_updates
    steps_to_evaluate = sum(environments.task_spec(name).episode_length for name in names)
    step = saved = count["updates"]
    info = {}
    while True:
        # Evaluate
        finished = step >= last
        if due(step, count["evaluated"], args.eval_freq, finished):
            with logger.paused(f"evaluating at update {step}", steps_to_evaluate) as advance:
                draws = jax.random.fold_in(random_streams(args.seed).evaluate, step), (args.seed, 1, step)
                shown = args.capture_video, advance, signals
                results = []
                for i, name in enumerate(names):  # not all at once, for memory
                    with contextlib.closing(make_eval_envs(args, name, args.eval_episodes)) as envs:
                        results.append(evaluate(agents[i], planner_of(state, world, i), envs, *draws, *shown))
            if all(result is not None for result in results):
                count["evaluated"] = step
                logger.record_evaluations(step, names, results)

        # Save
        if due(step, saved, args.checkpoint_freq, finished or signals):
            check_finite(logger.folder, f"update {step}", **jax.device_get(info))
            count["updates"] = step
            count["seconds"] = logger.seconds()
            with logger.paused():
                checkpoints.save(step, count, world=world, state=state)
            saved = step
        if saved == step and (finished or signals):  # a signal that comes only now waits until the next step is saved
            return step

        # Learn
        number = min(BURST, last - step)
        state, info = train(agents[0], state, world, data, num_updates=number)
        jax.block_until_ready(info)  # a signal should be answered soon
        step += number

        # Log
        if due(step, logger.logged, args.log_freq):
            logger.log_losses(step, info, "charts/updates_per_second")
        logger.advance(step)


def run_offline(args: Args) -> None:
    """Trains the three networks on recorded episodes, and keeps the run's files."""
    names = cli.task_names(args)
    columns = RETURNS_COLUMNS
    head = returns_head(environments.task_spec(names[0]))
    if args.tasks:
        columns = SCORES_COLUMNS
        head = SCORES_HEAD
    signals = Signals()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(cli.run_folder(args), cli.settings(args), may_change=MAY_CHANGE))
        agents = agents_of(args)
        checkpoints = stack.enter_context(Checkpoints(folder, *SCRIPTS))
        world, state, data, count = start_or_resume(args, agents, checkpoints)
        folder.begin()
        logger = stack.enter_context(Logger(folder, columns, "update", signals=signals))
        title = f"{', '.join(names)}: {len(data.obs)} entries, {len(data.starts)} windows to learn from"
        logger.begin(title, head, state.params, count["updates"], args.agent.num_updates, count)
        stack.enter_context(signals)
        step = offline_loop(args, agents, world, state, data, count, checkpoints, logger, signals)
    signals.exit_if_received(f"update {step}", saved=step > 0)


# -------------------------------------------------------------------------------------------------------- Run: joint
def world_of(agent: Agent, state: td.TrainState) -> World:
    """The world model of a learning state, on a task that has all its actions."""
    return World(state.params, state.target_q, jnp.ones(agent.action_dim), jnp.float32(agent.discount))


def fresh_learner(agent: Agent, seed: int) -> dict[str, Any]:
    """The part of a checkpoint that learns and draws: that of tdmpc2_jax.py, and the three networks."""
    state = init_diffusion(agent, no_statistics(agent), diffusion_stream(seed))
    return td.fresh_state(agent, random_streams(seed)) | {"state": state}


def joint_loop(args: Args, agent: Agent, learner, replays, count, envs, eval_envs, checkpoints, logger, signals) -> int:
    """The loop of tdmpc2_jax.py: the same run until --planner-start, but for the updates of the three networks in
    between. Returns the simulator step at which it has stopped."""
    spec = environments.task_spec(args.task)
    n = args.num_envs
    eval_key = random_streams(args.seed).evaluate
    seed_steps = seed_steps_of(args, spec)
    burst = max(1, int(args.utd * n))  # updates of one dispatch
    by_mppi = dataclasses.replace(agent, planner="mppi")
    by_policy = dataclasses.replace(agent, planner="pi")
    model_state = learner["train"]
    state = learner["state"]
    key = learner["act_key"]
    world = world_of(agent, model_state)
    step = saved = count["decisions"] * spec.action_repeat
    info = {}
    diffusion_info = {}
    best = committed(jnp.zeros((n, agent.future, agent.action_dim)))
    obs, _ = envs.reset(seed=(args.seed, 0, step))  # a resumed run begins new episodes, not the first ones again
    action = np.zeros((n, agent.action_dim), np.float32)
    done = np.zeros(n, bool)
    zeros = np.zeros(n, np.float32)
    entry = td.Step(obs, committed(action), zeros, terminated=done, first=~done)  # a reset: the rest is filler
    while True:
        # Act: dispatched here, read when the environments are stepped
        acting = agent if count["updates"] >= args.planner_start else by_mppi
        random = count["decisions"] <= seed_steps
        planner = planner_of(state, world)
        replays = add_to_both(agent, replays, entry)
        action, best, _, key = act(acting, planner, obs, best, entry.first, key, explore=True, random=random)

        # Evaluate
        finished = step >= args.total_timesteps
        if due(step, count["evaluated"], args.eval_freq, finished):
            if step == 0:  # untrained: on a CPU its plans would take minutes
                acting = by_policy if jax.default_backend() == "cpu" else by_mppi
            with logger.paused(f"evaluating at step {step}", spec.episode_length) as advance:
                draws = jax.random.fold_in(eval_key, step), (args.seed, 1, step)
                shown = args.capture_video, advance, signals
                result = evaluate(acting, planner, eval_envs, *draws, *shown)
            if result is not None:
                count["evaluated"] = step
                logger.record_returns(step, spec, result)

        # Save
        if due(step, saved, args.checkpoint_freq, finished or signals):
            check_finite(logger.folder, f"simulator step {step}", **jax.device_get(info | diffusion_info))
            count["seconds"] = logger.seconds()
            learner = {"train": model_state, "state": state, "act_key": key}
            with logger.paused():
                checkpoints.save(step, count, learner=learner, replay=replays)
            saved = step
        if saved == step and (finished or signals):  # a signal that comes only now waits until the next step is saved
            return step

        # Learn
        bursts = updates_due(count["decisions"], count["updates"], seed_steps, args.utd, burst, replays.short.size)
        for _ in logger.with_bar("learning", range(bursts)):
            model_state, info = td.train(agent, model_state, replays.short, num_updates=burst)
            world = world._replace(params=model_state.params, target_q=model_state.target_q)
            before = count["updates"]
            count["updates"] += burst
            number = count["updates"] // args.diffusion_every - before // args.diffusion_every
            if number and (diffusion_info or replays.long.size):  # there is a window of theirs
                state, diffusion_info = train(agent, state, world, replays, num_updates=number)
            if signals:
                break

        if bursts and not diffusion_info and count["updates"] >= args.planner_start:
            short = f"no episode so far has the {window_steps(agent)} steps of a window of the three networks: --future"
            cli.require(replays.long.size, short)

        # Step: an environment whose episode is over is reset by this step and ignores the action
        on_device = action
        action = np.asarray(action)  # all that is fetched from the device between two decisions
        obs, reward, terminated, truncated, infos = envs.step(action)
        check_finite(logger.folder, f"simulator step {step}", action=action, reward=reward, observation=obs)
        entry = td.Step(
            obs, on_device, reward.astype(np.float32), terminated, first=done
        )  # done before: now it is reset
        count["decisions"] += n - int(done.sum())
        done = terminated | truncated
        step = count["decisions"] * spec.action_repeat

        # Log
        logger.log_episodes(step, done, infos)
        if due(step, logger.logged, args.log_freq):
            check_windows(replays.short.size, count["updates"], agent.horizon)
            check_windows(replays.long.size, len(diffusion_info), window_steps(agent))
            logger.log_losses(step, info | diffusion_info)
        logger.advance(step)


def run_jointly(args: Args) -> None:
    """Trains a world model as tdmpc2_jax.py does and, between its updates, the three networks on the same replay."""
    spec = environments.task_spec(args.task)
    cli.check_replay(dataclasses.replace(args, agent=of_long_windows(args.agent)), spec, seed_steps_of(args, spec))
    signals = Signals()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(cli.run_folder(args), cli.settings(args)))
        envs = environments.make_envs(args.task, args.num_envs, (args.seed, 0))
        envs = stack.enter_context(contextlib.closing(RecordEpisodeStatistics(envs)))
        eval_envs = stack.enter_context(contextlib.closing(make_eval_envs(args, args.task, args.eval_episodes)))
        (agent,) = agents_of(args)
        checkpoints = stack.enter_context(Checkpoints(folder, *SCRIPTS))
        count = {"decisions": 0, "updates": 0, "evaluated": -1, "seconds": 0.0}
        new_replays = partial(init_replays, agent, args.buffer_size // args.num_envs, args.num_envs)
        check_memory(new_replays, args.buffer_size, args.total_timesteps)
        learner, replays = checkpoints.restore_or_make(
            count,
            learner=partial(fresh_learner, agent, args.seed),
            replay=new_replays,
        )
        folder.begin()
        logger = stack.enter_context(Logger(folder, RETURNS_COLUMNS, signals=signals))
        made = f"{envs.metadata['observations']}, {envs.metadata['actions']}"
        title = f"{spec.name}: {made}, {args.num_envs} environment(s)"
        params = learner["train"].params, learner["state"].params
        step = count["decisions"] * spec.action_repeat
        logger.begin(title, returns_head(spec), params, step, args.total_timesteps, count)
        stack.enter_context(signals)
        step = joint_loop(args, agent, learner, replays, count, envs, eval_envs, checkpoints, logger, signals)
    signals.exit_if_received(f"simulator step {step}", saved=step > 0)


# ---------------------------------------------------------------------------------------------------- The command line
OF_RUN = ("task", "tasks", "data_dir")  # what --evaluate takes from the run beside the agent
GONE = {  # options of earlier versions, and what remained of them
    **{"anchor": "onestep", "prediction": "x0", "warm_start": True},
    **{"draws": 1, "eta": 0, "beta": 0, "mppi_min_std": 0.05},
}
NO_USE = {  # what a mode has no use for
    "offline": "num_envs buffer_size seed_steps utd total_timesteps diffusion_every planner_start explore_temperature "
    "batch_size sample lr enc_lr_scale grad_clip_norm tau rho consistency_coef reward_coef value_coef termination_coef "
    "entropy_coef dropout",
    "joint": "world_model data_dir num_updates tasks",
}


def parse(argv: list[str] | None) -> Args:
    """The command line. What it leaves out is as in the run of --world-model, whose task says which run --resume means,
    and as in the run that is continued or evaluated."""

    def of_world_model(args):
        if args.evaluate or not args.world_model:
            return {}
        record = recorded_world(args.world_model, cli.task_names(args) if args.tasks else (), Agent, *WORLD_SCRIPTS)
        one_kind = f"{args.world_model} sees pictures and states: --world-model must see one of them"
        cli.require(record.get("obs", "state") in ("state", "rgb"), one_kind)
        if not args.tasks:  # of an agent of many tasks the part of one is taken, which has no embedding
            record["task_dim"] = 0
        return record

    def of_run(args):
        return recorded_settings(args, cli.run_folder, SCRIPTS, OF_RUN, GONE)

    args = cli.parse(Args, argv, __doc__, of_world_model)
    earlier = of_world_model(args) | of_run(args)
    args = cli.parse(Args, argv, __doc__, lambda _: earlier)
    useless = {"task"} if args.tasks else {"task_dim"}
    if args.evaluate:
        cli.require(args.tasks == earlier.get("tasks"), f"--tasks must be {earlier.get('tasks')}")
    else:
        useless |= {*NO_USE[args.agent.mode].split()}
    cli.refuse_useless(argv, useless, f"--mode {args.agent.mode}")
    frequencies = {name: freq for name, freq in FREQUENCIES[args.agent.mode].items() if getattr(args, name) is None}
    return dataclasses.replace(args, **frequencies)


def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    agent = args.agent
    joint = agent.mode == "joint"
    specs = [environments.task_spec(name) for name in cli.task_names(args)]
    steps = window_steps(agent)
    several = [f"--{name}" for name in ("planner", "scorer", "rollouts") if "," in getattr(agent, name)]
    cli.check_bounds(dataclasses.replace(args, agent=td.with_model_size(agent)))
    for holds, sentence in (
        (args.evaluate or not args.checkpoint, "--checkpoint goes with --evaluate"),
        (args.evaluate or joint or args.world_model, "training needs a world model: --world-model, or --mode joint"),
        (args.evaluate or args.data_dir or joint, "the folder of the episodes is missing: --data-dir"),
        (agent.obs == "state" or not joint, "--mode joint learns from states: leave out --obs rgb"),
        (agent.obs == "state" or not args.tasks, "--tasks goes with world models that see states"),
        (agent.task_dim or not args.tasks, "--tasks needs an agent of many tasks and, if it is a .pt, its --task-dim"),
        (args.evaluate or not several, f"several names for {' and '.join(several)} go with --evaluate"),
        (agent.width % (2 * agent.heads) == 0, "--width must be a multiple of twice --heads"),
        (max(agent.dynamics_steps, agent.proposal_steps) <= LEVELS, f"there are {LEVELS} sampling steps at most"),
        (agent.num_proposals + agent.num_policy, "--num-proposals and --num-policy leave no candidate"),
        (steps <= min(spec.episode_length for spec in specs), f"no episode has {steps} steps: --future, --scales"),
        (
            not (joint and specs[0].can_terminate) or agent.scales == "1",
            "--scales 1 alone where episodes can terminate",
        ),
    ):
        cli.require(holds, sentence)
    film = "rgb_array" if args.capture_video else None
    for spec in specs if film or agent.obs == "rgb" else ():
        environments.check_rendering(spec.name, agent.obs, film)


def main(argv: list[str] | None = None) -> None:
    with cli.errors_as_sentences():
        args = parse(argv)
        check_args(args)
        set_up_jax(args.compile_cache)
        if args.evaluate:
            evaluate_checkpoint(args)
        elif args.agent.mode == "offline":
            run_offline(args)
        else:
            run_jointly(args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
