"""Latent diffusion MPC in one file: three transformers on the latent states of a TD-MPC2 world model plan by sampling.

After D-MPC (Zhou et al., arXiv 2410.05364), moved into the latent space of TD-MPC2 (arXiv 2310.16828). Read
tdmpc2_jax.py first: its networks, planner, updates and replay come from world_model.py, letter for letter, unchanged.
New are p_d, a diffusion model of the latent future that a sequence of actions leads to; rho, one that proposes such
sequences; J, which estimates what a future is worth; and a plan that samples candidates, rolls them out, scores and
ranks them (SSR) and may refine the best by MPPI.

Letters, beside those of tdmpc2_jax.py: F steps of a plan and of a training window, N candidates, M draws of p_d for
each, D width of a token, k one of 1000 noise levels, C size of the actions between two tokens, S scales.

    python tdmpc2_jax.py --task walker-walk --save-episodes data                    # a world model and its episodes
    python tdmpc2_jax_diffusion.py --world-model runs/walker-walk/tdmpc2_jax/1 --data-dir data
    python tdmpc2_jax_diffusion.py --mode joint --task walker-walk     # or both from scratch, acting by these plans
    python tdmpc2_jax_diffusion.py --evaluate --checkpoint runs/walker-walk/tdmpc2_jax_diffusion/1 --planner ssr,mppi,pi
"""

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
from tdmpc2_support.run.runs import Run

import envs as environments
import world_model
from tdmpc2_support import cli
from tdmpc2_support.cli import Count, Name, Natural, NewFile, Positive, Share, Weight, names, task_names
from tdmpc2_support.data.recorded import (
    Recorded,
    Windows,
    compare_planners,
    measures,
    of_one,
    read_recorded,
    table_rows,
    windows_at,
)
from tdmpc2_support.devices import keep_freed_memory, shapes_on, use_compile_cache
from tdmpc2_support.run.checkpoints import find_checkpoint, read_checkpoint, read_meta
from tdmpc2_support.run.reports import RETURNS_COLUMNS, curve_of, evaluating, play, record_each, returns_head
from world_model import World, WorldModel, follow, init_replays, make_model, policy, two_hot_inv, value, world_of


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args(world_model.Args):
    task: str = "walker-walk"  # a short name (python envs.py lists them) or any Gymnasium id with a Box action space
    tasks: str | None = None  # or several, offline: mt30, mt80 or names with commas, in the order of the dataset's ids
    task_dim: Natural = 0  # with --tasks: size E of the task embedding; where --world-model is a run, that of the run
    mode: Literal["offline", "joint"] = "offline"  # for a finished world model, from episodes; or online, with one
    data_dir: str | None = None  # folder of the episodes to learn from, as tdmpc2_jax.py --save-episodes writes them

    # Diffusion
    preset: Literal["small", "base", "paper"] = "small"  # sets the next thirteen where they are not given
    width: Count | None = None  # width D of the tokens
    heads: Count | None = None  # attention heads
    dynamics_blocks: Count | None = None  # transformer blocks of p_d
    proposal_blocks: Count | None = None  # transformer blocks of rho
    objective_blocks: Count | None = None  # transformer blocks of J
    future: Count | None = None  # steps F of a plan and of a training window
    num_proposals: Natural | None = None  # candidates that rho draws
    num_policy: Natural | None = None  # candidates that the policy prior rolls out, the first without noise
    warm_start: bool | None = None  # one more candidate: the last plan, shifted
    dynamics_steps: Count | None = None  # sampling steps of p_d
    proposal_steps: Count | None = None  # sampling steps of rho
    diffusion_batch_size: Count | None = None  # windows per update
    diffusion_lr: Positive | None = None  # learning rate after 200 updates of warm-up; offline it falls to a tenth
    anchor: Literal["onestep", "current", "none"] = "onestep"  # p_d diffuses what this guess of the future leaves open
    prediction: Literal["x0", "v", "eps"] = "x0"  # what the outputs of p_d and rho mean
    scales: Literal["1", "1,4"] = "1"  # steps between two tokens of p_d, learned side by side; plans use 1
    beta: Weight = 0.0  # rho clones actions with weights exp(beta * standardised advantage); 0: all alike
    num_updates: Count = 3_000  # offline: length of the run, updates of the three networks
    diffusion_every: Count = 4  # joint: updates of the world model for one of the three networks

    # Planning by diffusion
    planner: names("ssr", "ssr_mppi", "mppi", "pi") = "ssr"  # rank candidates, or also refine the best; or do without
    scorer: names("model", "J", "mix", "random") = "model"  # reward and value heads; J; sum of both ranks; a control
    rollouts: names("diffusion", "onestep") = "diffusion"  # futures of the candidates: drawn from p_d, or d's
    draws: Count = 1  # futures M that p_d draws for each candidate
    eta: Share = 0.0  # fresh noise in every sampling step: 0 none (DDIM), 1 as much as DDPM
    top: Count = 8  # best candidates that are refined
    refine_iterations: Natural = 2  # iterations of MPPI that refine them
    refine_samples: Count = 256  # action sequences of each
    mppi_min_std: Weight = 0.05  # lower bound of the standard deviation with which refinement starts
    planner_start: Natural = 5_000  # joint: updates of the world model from which on --planner acts; before, MPPI
    explore_temperature: Positive = 0.5  # joint, ssr: plays one of the best --top, by softmax of their scores over this

    # Run
    exp_name: Name = "tdmpc2_jax_diffusion"  # name of this experiment: files go to RUNS_DIR/TASK/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the environments and every random draw
    total_timesteps: Count = 4_000_000  # joint: length of the run in simulator steps (decisions x action repeat)
    resume: bool = False  # continue the run of this task, name and seed from its last checkpoint, if it has one
    world_model: str | None = None  # a run (its task and arguments are taken) or a .pt; of many tasks: the parts named
    checkpoint: str | None = None  # with --evaluate: the run to evaluate
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the table and exit
    json: NewFile | None = None  # with --evaluate: write the results to this file
    eval_freq: Count | None = None  # updates between evaluations, 1,000; joint: simulator steps, 100,000
    eval_episodes: Count = 10  # episodes of an evaluation, run side by side
    checkpoint_freq: Count | None = None  # updates between checkpoints, 500; joint: simulator steps, 100,000
    log_freq: Count | None = None  # updates between two points of the loss curves, 100; joint: simulator steps, 2,000
    capture_video: bool = False  # write one MP4 of every evaluation (needs a GL library)
    track: bool = False  # also send everything to Weights & Biases (pip install wandb)
    wandb_project_name: str = "tdmpc2-jax"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    compile_cache: bool = True  # keep compiled programs in ~/.cache/tdmpc2-jax: the second start is faster


PRESETS = {
    "small": (64, 4, 2, 2, 2, 8, 32, 16, True, 2, 8, 128, 1e-3),
    "base": (128, 4, 3, 3, 3, 16, 64, 24, True, 4, 16, 256, 3e-4),
    "paper": (256, 8, 5, 5, 10, 32, 64, 0, False, 10, 32, 256, 1e-4),
}
FREQUENCIES = {"offline": (1_000, 500, 100), "joint": (100_000, 100_000, 2_000)}
ONLINE = {"total_timesteps", "diffusion_every", "planner_start", "explore_temperature", *world_model.LEARNING}
OTHERS = {"offline": {*ONLINE, "mpc"}, "joint": {"world_model", "data_dir", "num_updates", "mpc", "tasks"}}  # of no use


def with_preset(args: Args) -> Args:
    """Fills in the fields of the preset that were not given, and the frequencies of the mode."""
    fields = [field.name for field in dataclasses.fields(Args)]
    values = dict(zip(fields[fields.index("width") : fields.index("anchor")], PRESETS[args.preset], strict=True))
    values |= dict(zip(("eval_freq", "checkpoint_freq", "log_freq"), FREQUENCIES[args.mode], strict=True))
    return dataclasses.replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})


def scales_of(args: Args) -> tuple[int, ...]:
    return tuple(map(int, args.scales.split(",")))


def window_steps(args: Args) -> int:
    """Steps L of a training window: F of the largest scale."""
    return args.future * max(scales_of(args))


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
        """Tokens [T, D] -> [T, D]."""
        T, D, h, dense = len(x), self.width, self.heads, partial(nn.Dense, dtype=self.dtype)
        for i in range(self.blocks):
            qkv = dense(3 * D, name=f"qkv_{i}")(nn.LayerNorm(name=f"norm_{i}_0")(x)).reshape(T, 3, h, D // h)
            logits = jnp.einsum("qhc,khc->hqk", qkv[:, 0], qkv[:, 1]).astype(jnp.float32) * (D // h) ** -0.5
            seen = jnp.einsum("hqk,khc->qhc", jax.nn.softmax(logits).astype(qkv.dtype), qkv[:, 2]).reshape(T, D)
            x = x + dense(D, name=f"seen_{i}")(seen).astype(jnp.float32)
            wide = nn.gelu(dense(4 * D, name=f"wide_{i}")(nn.LayerNorm(name=f"norm_{i}_1")(x)))
            x = x + dense(D, name=f"narrow_{i}")(wide).astype(jnp.float32)
        return nn.LayerNorm(name="norm")(x)


class Denoiser(nn.Module):
    """p_d and rho: tokens are the task, if it is one of several, the latent state now, F noisy things of size `out`."""

    out: int
    body: Transformer

    @nn.compact
    def __call__(self, z, x, k, chunk=None, scale=0, task=None):
        """n(z_t) [Z], x [F, out] at noise level k, for p_d the actions chunk [F, C] that lead from token to token and
        the index of the scale, the task's embedding [E] -> [F, out], which means what --prediction says."""
        D, dtype, table = self.body.width, self.body.dtype, nn.initializers.normal(0.02)
        dense, kinds = partial(nn.Dense, D, dtype=dtype), self.param("kinds", table, (2, D))
        level = nn.silu(nn.Dense(4 * D, dtype=dtype, name="level_0")(level_waves(k, D)))
        level = dense(name="level_1")(level) + self.param("scales", table, (2, D))[scale]
        tokens = jnp.concatenate([dense(name="now")(z)[None] + kinds[0], dense(name="x")(x) + kinds[1]])
        tokens = tokens if chunk is None else tokens.at[1:].add(dense(name="chunk")(chunk))
        tokens = tokens + dense(name="time")(time_waves(len(x))) + level  # [F+1, D]
        tokens = tokens if task is None else jnp.concatenate([dense(name="task")(task)[None] + level, tokens])
        return nn.Dense(self.out, kernel_init=nn.initializers.zeros, name="head")(self.body(tokens)[-len(x) :])


class Objective(nn.Module):
    """J: how much better than V(z_t) a latent future and its actions are, read from a token of its own."""

    body: Transformer

    @nn.compact
    def __call__(self, zs, actions, task=None):
        """n(z_t) ... n(z_{t+F}) [F+1, Z], actions [F, A], the task's embedding [E] -> standardised advantage []."""
        dense = partial(nn.Dense, self.body.width, dtype=self.body.dtype)
        tokens = dense(name="z")(zs) + dense(name="time")(time_waves(len(actions)))
        tokens = tokens.at[:-1].add(dense(name="action")(actions))
        readout = self.param("readout", nn.initializers.normal(0.02), (1, self.body.width))
        tokens = tokens if task is None else jnp.concatenate([tokens, dense(name="task")(task)[None]])
        tokens = self.body(jnp.concatenate([readout, tokens]))  # [F+2, D]
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="head")(tokens[0])[0]


def make_nets(args: Args, model: WorldModel) -> dict[str, nn.Module]:
    """p_d, rho and J for one sequence: `vmap` makes batches."""
    body = partial(Transformer, args.width, heads=args.heads, dtype=args.compute_dtype)
    return {
        "dynamics": Denoiser(model.dynamics.out, body(args.dynamics_blocks)),
        "proposal": Denoiser(model.action_dim, body(args.proposal_blocks)),
        "objective": Objective(body(args.objective_blocks)),
    }


def init_nets(args: Args, model: WorldModel, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of the three networks."""
    zs, actions = jnp.zeros((args.future + 1, model.dynamics.out)), jnp.zeros((args.future, model.action_dim))
    task = jnp.zeros(args.task_dim) if args.tasks else None
    inputs = {"dynamics": (zs[0], zs[1:], 0, chunks(args, actions, 1), 0, task), "objective": (zs, actions, task)}
    inputs |= {"proposal": (zs[0], actions, 0, None, 0, task)}
    keys = dict(zip(inputs, jax.random.split(key, 3), strict=True))
    return {name: net.init(keys[name], *inputs[name]) for name, net in make_nets(args, model).items()}


# -------------------------------------------------------------------------------------------------------- Diffusion
LEVELS = 1000  # from 0, almost clean, to pure noise
LATENT_CLIP = 6.0  # bound on standardised latents: clipping true ones there costs an NMSE of 2e-5, at 4 already 2e-3


def signal_powers() -> np.ndarray:
    """abar [1000] of the cosine schedule: noisy x = sqrt(abar) x0 + sqrt(1 - abar) noise."""
    f = np.cos((np.arange(LEVELS + 1) / LEVELS + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.clip(1 - f[1:] / f[:-1], 1e-4, 0.9999))


def sampling_levels(steps: int, prediction: str) -> np.ndarray:
    """Levels [steps] from noisy to clean. At the noisiest ones eps does not tell x0, as it is divided by abar."""
    if prediction == "eps":
        return np.arange(steps)[::-1] * (LEVELS // steps)
    return np.round(np.linspace(LEVELS - 1, 0, steps + 1)).astype(int)[:-1]


def target_of(prediction: str, x0: jax.Array, noise: jax.Array, abar) -> jax.Array:
    """What a network should answer to sqrt(abar) x0 + sqrt(1 - abar) noise."""
    return {"x0": x0, "eps": noise, "v": jnp.sqrt(abar) * noise - jnp.sqrt(1 - abar) * x0}[prediction]


def clean(prediction: str, output: jax.Array, x: jax.Array, abar) -> jax.Array:
    """The x0 that a network's answer to x means."""
    if prediction == "v":
        return jnp.sqrt(abar) * x - jnp.sqrt(1 - abar) * output
    return output if prediction == "x0" else (x - jnp.sqrt(1 - abar) * output) / jnp.sqrt(abar)


def sample_ddim(denoise, key: jax.Array, shape, steps: int, clip: float, prediction="x0", eta=0.0, mask=1.0):
    """Samples of this shape. denoise(x, k) is the network's answer; clip bounds x0; mask multiplies all that is drawn.
    A step goes from signal power abar to that of the next level, after, which behind the last is exactly 1: x0."""
    start_key, key = jax.random.split(key)
    levels = sampling_levels(steps, prediction)
    abars = signal_powers()[levels]
    after = np.append(abars[1:], 1.0)
    std = eta * np.sqrt((1 - after) / (1 - abars) * (1 - abars / after))  # of the fresh noise

    def step(x, inputs):
        k, abar, after, std, key = inputs
        x0 = jnp.clip(clean(prediction, denoise(x, k), x, abar), -clip, clip) * mask
        noise = (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)
        x = jnp.sqrt(after) * x0 + jnp.sqrt(jnp.maximum(1 - after - std**2, 0)) * noise
        return (x + std * jax.random.normal(key, shape) * mask if eta else x), None

    inputs = jax.tree.map(jnp.float32, (levels, abars, after, std))
    return jax.lax.scan(step, jax.random.normal(start_key, shape) * mask, (*inputs, jax.random.split(key, steps)))[0]


# -------------------------------------------------------------------------------------- Windows and what is diffused
class Stats(NamedTuple):
    """What the networks' inputs and outputs are standardised by, from windows to learn from; [T, ...] for T tasks."""

    mean: jax.Array  # [Z] of latent states
    std: jax.Array  # [Z]
    mu: jax.Array  # [S, F, Z] of what p_d diffuses
    sigma: jax.Array  # [S, F, Z]
    adv_mean: jax.Array  # of advantages y - V(z_t)
    adv_std: jax.Array


def part_of(stats: Stats, world: World, task) -> tuple[Stats, World]:
    """What belongs to one of several tasks, by its index; what belongs to an only task as it is."""
    its = stats if world.emb is None else jax.tree.map(lambda x: x[task], stats)
    return its, world_model.of_task(world, task)


def normalise(stats: Stats, z: jax.Array) -> jax.Array:
    """n(z): latent states vary by about 0.1, so that unit noise would drown them."""
    return (z - stats.mean) / stats.std


def denormalise(args: Args, stats: Stats, x: jax.Array) -> jax.Array:
    """The latent states [..., Z] for n(z) = x, each group back on the simplex on which SimNorm has put it."""
    z = jnp.maximum(x * stats.std + stats.mean, 1e-6).reshape(*x.shape[:-1], -1, args.simnorm_dim)
    return (z / z.sum(-1, keepdims=True)).reshape(x.shape)


def chunks(args: Args, actions: jax.Array, scale) -> jax.Array:
    """Actions [L, A] as chunks [F, C] that lead from token to token at this scale: single actions if 1 is the only one,
    else as many as the largest has, with bits that tell which of them are used."""
    largest, A = max(scales_of(args)), actions.shape[-1]
    slot = jnp.arange(largest)
    index = jnp.arange(args.future)[:, None] * scale + slot  # [F, largest]
    used = jnp.broadcast_to((slot < scale).astype(jnp.float32), index.shape)
    chunk = (actions[jnp.minimum(index, len(actions) - 1)] * used[..., None]).reshape(-1, largest * A)
    return jnp.concatenate([chunk, used], axis=-1) if largest > 1 else chunk


def anchors(args: Args, model: WorldModel, world: World, stats: Stats, z, actions, scale) -> jax.Array:
    """First guess [F, Z] of n(z) at the tokens behind z [Z], under actions [L, A]. What it leaves open is a small part
    of the whole, and so is an error in it: the error of whole latent states has a floor far above d's."""
    if args.anchor == "onestep":
        return normalise(stats, follow(model, world, z, actions)[(jnp.arange(args.future) + 1) * scale - 1])
    return jnp.tile(normalise(stats, z) if args.anchor == "current" else jnp.zeros(len(z)), (args.future, 1))


def rest_of(args: Args, model: WorldModel, world: World, stats: Stats, window: Windows, scale) -> jax.Array:
    """What the anchors leave open of one window's future [F, Z]: standardised, it is what p_d diffuses."""
    future = normalise(stats, window.z[(jnp.arange(args.future) + 1) * scale])
    return future - anchors(args, model, world, stats, window.z[0], window.action, scale)


def advantage(args: Args, model: WorldModel, world: World, window: Windows) -> jax.Array:
    """y - V(z_t) of one window; y is its F rewards and the value behind them, unless the episode has terminated."""
    F = args.future
    now, last = value(args, model, world, window.z[jnp.array([0, F])])
    rewards = (world.discount ** jnp.arange(F) * window.reward[:F]).sum()
    return rewards + world.discount**F * (1 - window.terminated[F - 1]) * last - now


@partial(jax.jit, static_argnames=("args", "model"))
def statistics(args: Args, model: WorldModel, world: World, windows: Windows) -> Stats:
    """Means and standard deviations over windows [B, ...]."""
    z = windows.z.reshape(-1, model.dynamics.out)
    stats = Stats(z.mean(0), jnp.maximum(z.std(0), 1e-2), *[None] * 4)
    each = partial(rest_of, args, model, world, stats)  # a few windows at a time: gigabytes for all of large networks
    rest = jnp.stack([jax.lax.map(partial(each, scale=s), windows, batch_size=256) for s in scales_of(args)])
    keep = 0.0 if args.anchor == "none" else 1.0  # the original standardises nothing
    adv = jax.vmap(partial(advantage, args, model, world))(windows)
    mu, sigma = rest.mean(1) * keep, jnp.maximum(rest.std(1), 0.02) ** keep
    return stats._replace(mu=mu, sigma=sigma, adv_mean=adv.mean(), adv_std=jnp.maximum(adv.std(), 1e-3))


# --------------------------------------------------------------------------------------------------------- Learning
class DiffusionState(NamedTuple):
    """All that learning changes, and what it is standardised by."""

    params: dict[str, Any]  # dynamics, proposal, objective
    ema: dict[str, Any]  # slow copy of params, which plans
    opt: dict[str, optax.OptState]
    stats: Stats
    key: jax.Array
    updates: jax.Array  # number of updates made


class DiffusionNoise(NamedTuple):
    """Every random draw of one update, made up front."""

    scale: jax.Array  # [B] index of the scale
    level: jax.Array  # [B] noise levels of p_d
    proposal_level: jax.Array  # [B] and of rho
    latents: jax.Array  # [B, F, Z] normal
    actions: jax.Array  # [B, F, A] normal


def diffusion_noise(args: Args, model: WorldModel, key: jax.Array, batch_size: int) -> DiffusionNoise:
    """Draws what one update needs."""
    keys, B, F = jax.random.split(key, 5), batch_size, args.future
    return DiffusionNoise(
        scale=jax.random.randint(keys[0], (B,), 0, len(scales_of(args))),
        level=jax.random.randint(keys[1], (B,), 0, LEVELS),
        proposal_level=jax.random.randint(keys[2], (B,), 0, LEVELS),
        latents=jax.random.normal(keys[3], (B, F, model.dynamics.out)),
        actions=jax.random.normal(keys[4], (B, F, model.action_dim)),
    )


def denoising_loss(args: Args, denoise, x0: jax.Array, k: jax.Array, noise: jax.Array, mask=1.0) -> jax.Array:
    """Squared errors [F, out] of what denoise(x, k) answers to x0 [F, out] at level k."""
    abar = jnp.asarray(signal_powers(), jnp.float32)[k]
    x = (jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * noise) * mask
    return ((denoise(x, k) - target_of(args.prediction, x0, noise, abar)) * mask) ** 2


def dynamics_loss(args: Args, model: WorldModel, params, stats: Stats, world: World, window: Windows, noise):
    """p_d's loss on one window: it is told n(z_t) and the actions, and guesses what the anchors leave open."""
    net, now, scale = make_nets(args, model)["dynamics"], normalise(stats, window.z[0]), noise.scale
    steps = jnp.array(scales_of(args))[scale]
    x0 = (rest_of(args, model, world, stats, window, steps) - stats.mu[scale]) / stats.sigma[scale]
    how = {"chunk": chunks(args, window.action, steps), "scale": scale, "task": world.emb}
    denoise = partial(net.apply, params["dynamics"], now, **how)
    return denoising_loss(args, denoise, x0, noise.level, noise.latents).mean()


def proposal_loss(args: Args, model: WorldModel, params, stats: Stats, world: World, window: Windows, noise):
    """rho's loss on one window: it is told n(z_t) and guesses the actions. Those that the task lacks do not count."""
    net, x0, mask = make_nets(args, model)["proposal"], window.action[: args.future], world.mask
    denoise = partial(net.apply, params["proposal"], normalise(stats, window.z[0]), task=world.emb)
    return denoising_loss(args, denoise, x0, noise.proposal_level, noise.actions, mask).mean() / mask.mean()


def objective_loss(args: Args, model: WorldModel, params, stats: Stats, world: World, window: Windows, adv: jax.Array):
    """J's loss on one window of standardised advantage adv."""
    zs, actions = normalise(stats, window.z[: args.future + 1]), window.action[: args.future]
    return (make_nets(args, model)["objective"].apply(params["objective"], zs, actions, world.emb) - adv) ** 2


def diffusion_losses(args: Args, model: WorldModel, params, stats: Stats, world: World, windows: Windows, noise):
    """The three losses on windows [B, ...]; each depends on the parameters of its own network only."""

    def losses(window, noise):
        its = part_of(stats, world, window.task)
        adv = (advantage(args, model, its[1], window) - its[0].adv_mean) / its[0].adv_std
        dynamics = dynamics_loss(args, model, params, *its, window, noise)
        proposal = proposal_loss(args, model, params, *its, window, noise)
        return dynamics, proposal, objective_loss(args, model, params, *its, window, adv), adv

    dynamics, proposal, objective, adv = jax.vmap(losses)(windows, noise)  # [B]
    weight = jnp.minimum(jnp.exp(args.beta * adv), 20.0)
    proposal = weight / weight.mean() * proposal
    return {"dynamics": dynamics.mean(), "proposal": proposal.mean(), "objective": objective.mean()}


def diffusion_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam behind a clip, for each network its own; a linear warm-up, then a cosine down to a tenth, but in joint mode,
    where the latent states never come to rest, a constant."""
    lr, last = args.diffusion_lr, args.diffusion_lr / (10 if args.mode == "offline" else 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, 200, max(args.num_updates, 201), last)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))


@partial(jax.jit, static_argnames=("args", "model"))
def init_diffusion(args: Args, model: WorldModel, stats: Stats, key: jax.Array) -> DiffusionState:
    """Learning state at the start of a run."""
    init_key, key = jax.random.split(key)
    params = init_nets(args, model, init_key)
    opt = {name: diffusion_optimizer(args).init(p) for name, p in params.items()}
    return DiffusionState(params, jax.tree.map(jnp.copy, params), opt, stats, key, jnp.zeros((), jnp.int32))


def diffusion_update(args: Args, model: WorldModel, state: DiffusionState, world: World, windows: Windows, noise):
    """One gradient step of each network; the world model gets none. Returns the new state and scalars for the log."""
    B, L, Z = len(windows.z), window_steps(args), model.dynamics.out
    chex.assert_shape(list(windows[:4]), [(B, L + 1, Z), (B, L, model.action_dim), (B, L), (B, L)])

    def loss(params):
        losses = diffusion_losses(args, model, params, state.stats, world, windows, noise)
        return sum(losses.values()), losses

    grads, losses = jax.grad(loss, has_aux=True)(state.params)
    steps = {name: diffusion_optimizer(args).update(grads[name], state.opt[name]) for name in grads}
    params = {name: optax.apply_updates(state.params[name], change) for name, (change, _) in steps.items()}
    decay = jnp.minimum(0.995, (1 + state.updates) / (10 + state.updates))
    ema, opt = optax.incremental_update(params, state.ema, 1 - decay), {name: opt for name, (_, opt) in steps.items()}
    info = {f"{name}_loss": loss for name, loss in losses.items()}
    info |= {f"{name}_grad_norm": optax.tree.norm(grad) for name, grad in grads.items()}
    return DiffusionState(params, ema, opt, state.stats, state.key, state.updates + 1), info


def sample_windows(args: Args, model: WorldModel, world: World, replays: world_model.Replays, key) -> Windows:
    """Joint mode: windows drawn uniformly from the replay, with the latent states of the world model as it is now."""
    batch = world_model.sample_long(replays, key, args.diffusion_batch_size, window_steps(args))
    z = model.encoder.apply(world.params["encoder"], batch.obs)
    return Windows(*(x.swapaxes(0, 1) for x in (z, *batch[1:])))


@partial(jax.jit, static_argnames=("args", "model", "num_updates"), donate_argnames=("state",))
def train(args: Args, model: WorldModel, state: DiffusionState, world: World, data, num_updates: int):
    """`num_updates` updates on windows drawn uniformly from data, `Recorded` or `Replays`; means of their scalars."""

    def one(state, _):
        (key, window_key, noise_key), B = jax.random.split(state.key, 3), args.diffusion_batch_size
        if args.mode == "joint":
            windows = sample_windows(args, model, world, data, window_key)
            rate = jnp.maximum(0.001, 1 / (1 + state.updates))  # a mean, later of about the last 1000 updates: z moves
            stats = optax.incremental_update(statistics(args, model, world, windows), state.stats, rate)
            state = state._replace(stats=stats)
        else:
            starts = data.starts[jax.random.randint(window_key, (B,), 0, len(data.starts))]
            windows = windows_at(data, starts, window_steps(args))
        noise = diffusion_noise(args, model, noise_key, B)
        return diffusion_update(args, model, state._replace(key=key), world, windows, noise)

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
    stats, its = part_of(state.stats, world, task)
    return Planner(state.ema, stats, its if world.emb is None else world_model.without_lacking(its))


def propose(args: Args, model: WorldModel, planner: Planner, z, best, first, key) -> jax.Array:
    """Candidates [N, F, A] at z [Z]: drawn from rho; rolled out by the policy prior through d, one without noise; and
    the last plan best [F, A] shifted by one (at an episode's start, first, candidate 0 once more)."""
    (nets, stats, world), (rho_key, pi_key), candidates = planner, jax.random.split(key), []
    F, A, N_pi = args.future, model.action_dim, args.num_policy
    if args.num_proposals:
        apply = partial(make_nets(args, model)["proposal"].apply, nets["proposal"], normalise(stats, z), task=world.emb)
        shape, how = (args.num_proposals, F, A), (args.prediction, args.eta, world.mask)
        candidates.append(sample_ddim(jax.vmap(apply, (0, None)), rho_key, shape, args.proposal_steps, 1.0, *how))
    if N_pi:

        def step(z, eps):
            action = policy(args, model, world.params["pi"], z, eps).action * world.mask
            return model.dynamics.apply(world.params["dynamics"], z, action), action

        eps = jax.random.normal(pi_key, (F, N_pi, A)).at[:, 0].set(0.0)
        actions = jax.lax.scan(step, jnp.tile(z, (N_pi, 1)), eps)[1]  # [F, N_pi, A]
        candidates.append(actions.swapaxes(0, 1))
    if args.warm_start:
        shifted = jnp.concatenate([best[1:], best[-1:]])
        candidates.append(jnp.where(first, candidates[0][0], shifted)[None])
    return jnp.concatenate(candidates)


def rollout(args: Args, model: WorldModel, planner: Planner, z, actions, key, scale: int = 0) -> jax.Array:
    """Latent futures [M, N, F+1, Z] of z [Z] under actions [N, L, A]: drawn from p_d, or those of d. scale is an index;
    at scale s the tokens are s steps apart."""
    (nets, stats, world), s = planner, scales_of(args)[scale]
    N, F, M, Z = len(actions), args.future, args.draws, len(z)
    if args.rollouts == "onestep":
        future = jax.vmap(partial(follow, model, world, z))(actions)[None, :, (np.arange(F) + 1) * s - 1]
    else:
        apply = partial(make_nets(args, model)["dynamics"].apply, nets["dynamics"], normalise(stats, z), task=world.emb)
        chunk = jnp.tile(jax.vmap(lambda a: chunks(args, a, s))(actions), (M, 1, 1))  # [M * N, F, C]
        each = jax.vmap(apply, (0, None, 0, None))
        how = (args.dynamics_steps, LATENT_CLIP, args.prediction, args.eta)
        rest = sample_ddim(lambda x, k: each(x, k, chunk, scale), key, (M * N, F, Z), *how).reshape(M, N, F, Z)
        guess = jax.vmap(lambda a: anchors(args, model, world, stats, z, a, s))(actions)
        future = denormalise(args, stats, guess + rest * stats.sigma[scale] + stats.mu[scale])
    return jnp.concatenate([jnp.broadcast_to(z, (*future.shape[:2], 1, Z)), future], axis=2)


def score_by_model(args: Args, model: WorldModel, world: World, zs: jax.Array, actions: jax.Array) -> jax.Array:
    """Discounted rewards and the value behind them [...] of futures zs [..., F+1, Z] under actions [..., F, A]."""
    rewards = two_hot_inv(args, model.reward.apply(world.params["reward"], zs[..., :-1, :], actions))
    alive = jnp.ones((*rewards.shape[:-1], args.future + 1))  # 0 after a predicted termination
    if model.termination:
        ended = model.termination.apply(world.params["termination"], zs[..., 1:, :])[..., 0] > 0
        alive = alive.at[..., 1:].set(jnp.cumprod(~ended, axis=-1))
    parts = jnp.concatenate([rewards, value(args, model, world, zs[..., -1, :])[..., None]], axis=-1)
    return (world.discount ** jnp.arange(args.future + 1) * alive * parts).sum(-1)


def score_by_objective(args: Args, model: WorldModel, planner: Planner, zs: jax.Array, actions: jax.Array):
    """J's advantage [N] of futures zs [N, F+1, Z] under actions [N, F, A], in the unit of rewards."""
    apply, stats = make_nets(args, model)["objective"].apply, planner.stats
    adv = jax.vmap(partial(apply, planner.nets["objective"], task=planner.world.emb))(normalise(stats, zs), actions)
    return adv * stats.adv_std + stats.adv_mean


def score(args: Args, model: WorldModel, planner: Planner, zs: jax.Array, actions: jax.Array, key) -> jax.Array:
    """Scores [N], means over draws, of futures zs [M, N, F+1, Z] under actions [N, F, A]; no number: -inf."""
    scorers = {
        "model": lambda: jax.vmap(lambda z: score_by_model(args, model, planner.world, z, actions))(zs).mean(0),
        "J": lambda: jax.vmap(lambda z: score_by_objective(args, model, planner, z, actions))(zs).mean(0),
        "mix": lambda: ranks(scorers["model"]()) + ranks(scorers["J"]()),
        "random": lambda: jax.random.uniform(key, (len(actions),)) + 0.0 * actions.sum((1, 2)),
    }
    scores = scorers[args.scorer]()
    return jnp.where(jnp.isfinite(scores), scores, -jnp.inf)


def ranks(x: jax.Array) -> jax.Array:
    """Place of every number [N] in ascending order; what is no number has none."""
    return jnp.where(jnp.isnan(x), jnp.nan, jnp.argsort(jnp.argsort(x)))


def refine(args: Args, model: WorldModel, world: World, z, candidates, key) -> jax.Array:
    """Mean [H, A] of MPPI's distribution, which starts at the best candidates [top, F, A] and is fitted to the elites
    among them and fresh samples."""
    H, A, samples = args.horizon, model.action_dim, args.refine_samples
    best = candidates[:, :H].swapaxes(0, 1)  # [H, top, A]

    def iterate(distribution, key):
        (mean, std), (sample_key, eps_key, head_key) = distribution, jax.random.split(key, 3)
        sampled = jnp.clip(mean[:, None] + std[:, None] * jax.random.normal(sample_key, (H, samples, A)), -1, 1)
        actions = jnp.concatenate([best, sampled * world.mask], axis=1)
        eps, heads = jax.random.normal(eps_key, (actions.shape[1], A)), world_model.two_heads(model, head_key)
        values = world_model.estimate_value(args, model, world.params, z[None], actions, world.discount, heads, eps)
        elite_values, elite_indices = jax.lax.top_k(values, min(args.num_elites, len(values)))
        elites, weights = actions[:, elite_indices], jax.nn.softmax(args.temperature * elite_values)
        mean = jnp.einsum("e,hea->ha", weights, elites)
        variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
        return (mean, jnp.clip(jnp.sqrt(variance), args.min_std, args.max_std)), None

    start = (best.mean(1), jnp.clip(best.std(1), args.mppi_min_std, args.max_std))
    return jax.lax.scan(iterate, start, jax.random.split(key, args.refine_iterations))[0][0]


def plan_by_diffusion(args: Args, model: WorldModel, planner: Planner, obs, best, first, key, explore: bool = False):
    """Sample, score and rank in one environment: obs [O], the last plan best [F, A], first (an episode begins) ->
    action [A], this plan [F, A], and whether no candidate could be scored, so that the policy prior acts. explore plays
    one of the best, drawn by softmax of their scores in units of the scores' standard deviation, and adds noise."""
    chex.assert_shape([obs, best], [(model.obs_dim,), (args.future, model.action_dim)])
    world, keys = planner.world, jax.random.split(key, 6 if explore else 4)
    z = model.encoder.apply(world.params["encoder"], obs)
    candidates = propose(args, model, planner, z, best, first, keys[0])
    zs = rollout(args, model, planner, z, candidates, keys[1])
    every_score = score(args, model, planner, zs, candidates, keys[2])  # [N]
    scores, order = jax.lax.top_k(every_score, min(args.top, len(candidates)))
    best = candidates[order[0]]
    if explore:
        unit = args.explore_temperature * jnp.std(every_score, where=jnp.isfinite(every_score)) + 1e-6
        best = candidates[order[jax.random.categorical(keys[4], (scores - scores[0]) / unit)]]
    if args.planner == "ssr_mppi":
        best = best.at[: args.horizon].set(refine(args, model, world, z, candidates[order], keys[3]))
    failed = ~jnp.isfinite(scores[0]) | ~jnp.isfinite(z).all()
    pi = policy(args, model, world.params["pi"], z, jnp.zeros(model.action_dim)).mean
    action = jnp.where(failed, jnp.nan_to_num(pi), best[0])
    action = action + args.min_std * jax.random.normal(keys[5], action.shape) if explore else action
    return jnp.clip(action, -1, 1) * world.mask, jnp.where(failed, 0.0, best), failed


@partial(jax.jit, static_argnames=("args", "model", "explore", "random"))
def act_by(args: Args, model: WorldModel, planner: Planner, obs, best, first, key, explore=False, random=False):
    """Actions [n, A] of --planner for obs [n, O], or random; best [n, F, A], the last plans; first [n], true where
    episodes begin. Returns the actions, the plans, whether they failed [n] (see `plan_by_diffusion`) and a new key."""
    if args.planner in ("ssr", "ssr_mppi") and not random:
        key, plan_key = jax.random.split(key)
        plan_one = partial(plan_by_diffusion, args, model, planner, explore=explore)
        return *jax.vmap(plan_one)(obs, best, first, jax.random.split(plan_key, len(obs))), key
    args, world, H = dataclasses.replace(args, mpc=args.planner == "mppi"), planner.world, args.horizon
    how, mean = {"explore": explore, "random": random}, best[:, :H]
    action, mean, key = world_model.act(args, model, world.params, obs, mean, first, world.discount, key, **how)
    return action * world.mask, best.at[:, :H].set(mean), jnp.zeros(len(obs), bool), key


# ------------------------------------------------------------------------------------------------------- Evaluation
def evaluate(args: Args, model: WorldModel, planner: Planner, envs, seed: tuple[int, ...], go_on=lambda: True):
    """One episode in each of E environments: what `play` returns. Says how many plans failed, if any did."""
    memory, failures = (jnp.zeros((envs.num_envs, args.future, model.action_dim)), jax.random.key(args.seed)), [0]
    memory = jax.device_put(memory, jax.devices()[0])  # as they come out of act_by: it compiles once

    def decide(obs, first, best, key):
        action, best, failed, key = act_by(args, model, planner, obs, best, first, key)
        failures[0] += failed.sum()
        return action, best, key

    result = play(envs, seed, decide, memory, go_on, args.capture_video)
    if failures[0]:
        print(f"in {failures[0]} plans no candidate could be scored: the policy has acted", file=sys.stderr)
    return result


@partial(jax.jit, static_argnames=("args", "model"))
def answers(args: Args, model: WorldModel, planner: Planner, windows: Windows, key) -> dict[str, Any]:
    """What the networks say of windows [B, ...], for `measures`: futures of p_d and of d under the actions and under
    those of another window, and of a latent state that stays; advantages by the world model's heads and by J, of true,
    p_d's and d's futures; actions of rho and of the record."""
    F, B, world = args.future, len(windows.z), planner.world
    keys, shuffled, futures = jax.random.split(key, B), jnp.roll(windows.action, B // 2, axis=0), {}
    for scale, s in reversed([*enumerate(scales_of(args))]):  # scale 1 last: its futures are scored below
        z = windows.z[:, : F * s + 1 : s]
        found = {"true": z, "copy": jnp.broadcast_to(z[:, :1], z.shape)}
        for name, rollouts in (("p_d", "diffusion"), ("d", "onestep")):
            one = partial(rollout, dataclasses.replace(args, rollouts=rollouts, draws=1), model, planner, scale=scale)
            each = jax.vmap(lambda z, a, key, one=one: one(z, a[None], key)[0, 0])
            found |= {name: each(z[:, 0], windows.action, keys), f"{name} shuffled": each(z[:, 0], shuffled, keys)}
        futures[str(s)] = {name: zs[:, 1:] for name, zs in found.items()}
    actions, advantages = windows.action[:, :F], {"true": jax.vmap(partial(advantage, args, model, world))(windows)}
    for name in ("true", "p_d", "d"):
        by_model = score_by_model(args, model, world, found[name], actions) - value(args, model, world, z[:, 0])
        by_objective = score_by_objective(args, model, planner, found[name], actions)
        advantages |= {f"model on {name}": by_model, f"J on {name}": by_objective}
    alone = dataclasses.replace(args, num_proposals=1, num_policy=0, warm_start=False)
    drawn = jax.vmap(lambda z, key: propose(alone, model, planner, z, None, None, key)[0])(z[:, 0], keys)
    return {"futures": futures, "advantages": advantages, "actions": {"rho": drawn, "recorded": actions}}


def setup(args: Args, enter):
    """For each task environments to evaluate in, which are to be closed by `enter`, and its discount; the networks."""
    names, render_mode = task_names(args), "rgb_array" if args.capture_video else None
    specs, sizes = [*map(environments.task_spec, names)], environments.set_sizes(names) if args.tasks else None
    make = partial(environments.make_envs, render_mode=render_mode, sizes=sizes)
    envs = [enter(make([name] if args.tasks else name, args.eval_episodes, (args.seed, 1))) for name in names]
    (obs_dim,), (action_dim,) = envs[0].single_observation_space.shape, envs[0].single_action_space.shape
    model = make_model(args, obs_dim, action_dim, args.episodic and specs[0].can_terminate)
    discounts = [jnp.float32(world_model.discount_of(args, spec.episode_length)) for spec in specs]
    return envs, model, jax.device_put(discounts, jax.devices()[0])


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints for each task a table of planners, scorers and roll-outs over the same episodes, and what the
    networks know of held-out ones of --data-dir; writes them to --json."""
    names, offline, checkpoint = task_names(args), args.mode == "offline", find_checkpoint(args.checkpoint)
    meta, steps = read_meta(checkpoint, "tdmpc2_jax_diffusion"), len([*table_rows(args)])
    cli.check_rules((meta["args"].get("tasks") == args.tasks, f"--tasks must be {meta['args'].get('tasks')}"))
    with evaluating(steps * sum(environments.task_spec(name).episode_length for name in names)) as (enter, go_on):
        envs, model, discounts = setup(args, enter)
        like = shapes_on(jax.sharding.SingleDeviceSharding(jax.devices()[0]), partial(fresh, args, model))
        found = read_checkpoint(checkpoint, meta, **(like if offline else {"learner": like}))
        found = found if offline else found["learner"]
        world = found["world"] if offline else world_of(model, found["train"], discounts[0])
        data = encoded(args, model, world) if args.data_dir else None
        planners, key = [planner_of(found["state"], world, i) for i in range(len(names))], jax.random.key(args.seed)

        def known(i: int) -> dict[str, Any]:
            windows = windows_at(data, of_one(data, data.held_out, i, 256), window_steps(args))
            return measures(answers(args, model, planners[i], windows, key), int(planners[i].world.mask.sum()))

        play_row = lambda row, i: evaluate(row, model, planners[i], envs[i], (args.seed, 1), go_on)  # noqa: E731
        compare_planners(args, names, play_row, known if data else lambda i: {})


# -------------------------------------------------------------------------------------------------------------- Run
def encoded(args: Args, model: WorldModel, world: World) -> Recorded:
    """The recorded episodes of --data-dir, with latent states as observations."""
    data = read_recorded(task_names(args), args.data_dir, window_steps(args))

    def encode(entry):
        return model.encoder.apply(world_model.of_task(world, entry[1]).params["encoder"], entry[0])

    return data._replace(obs=jax.jit(partial(jax.lax.map, encode, batch_size=4096))((data.obs, data.task)))


def fresh(args: Args, model: WorldModel) -> dict[str, Any]:
    """What a checkpoint holds beside a replay: what a joint run starts with; offline, only the shapes count."""
    S, F, Z = len(scales_of(args)), args.future, model.dynamics.out
    stats = Stats(jnp.zeros(Z), jnp.ones(Z), jnp.zeros((S, F, Z)), jnp.ones((S, F, Z)), jnp.zeros(()), jnp.ones(()))
    found = world_model.fresh_state(args, model)
    world = world_of(model, found["train"], jnp.float32(0))
    if args.tasks:
        stats = jax.tree.map(lambda x: jnp.stack([x] * len(task_names(args))), stats)
        world = world_model.join([world.told(jnp.zeros(args.task_dim))] * len(task_names(args)))
    state = init_diffusion(args, model, stats, jax.random.fold_in(jax.random.key(args.seed), 1))
    return (found if args.mode == "joint" else {"world": world}) | {"state": state}


def start_or_resume(args: Args, model: WorldModel, discounts, keeper: Run) -> tuple[World, DiffusionState, Recorded]:
    """World model and learning state of the run's last checkpoint, or of --world-model and anew; and the recorded
    episodes in the latent states of that model."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if restored := keeper.restore(**shapes_on(here, partial(fresh, args, model))):
        world, state = (restored[1][name] for name in ("world", "state"))
        return world, state, encoded(args, model, world)
    keeper.count["evaluated"] = 0  # not before the first update
    world = jax.device_put(world_model.load_world(args, model, task_names(args), discounts), here)
    data, number, each = encoded(args, model, world), min(8192, 2**18 // window_steps(args)), []
    for task in range(len(discounts)):
        windows = windows_at(data, of_one(data, data.starts, task, number), window_steps(args))
        each.append(statistics(args, model, world_model.of_task(world, task), windows))
    stats = jax.tree.map(lambda *x: jnp.stack(x), *each) if args.tasks else each[0]
    return world, jax.device_put(init_diffusion(args, model, stats, jax.random.key(args.seed)), here), data


def run_offline(args: Args) -> None:
    """Trains the three networks on recorded episodes, and keeps the run's files."""
    names, burst = task_names(args), 20  # updates per dispatch
    said = {k: v for k, v in dataclasses.asdict(args).items() if k != "total_timesteps"}  # of the other mode
    free = ("data_dir", "planner", "scorer", "rollouts", "draws", "eta", "top", "refine_iterations", "refine_samples")
    columns, head = curve_of(names, bool(args.tasks))
    with Run(cli.run_folder(args), said, "tdmpc2_jax_diffusion", columns, "update", free=free) as keeper:
        envs, model, discounts = setup(args, keeper.enter)
        world, state, data = start_or_resume(args, model, discounts, keeper)
        count, step, info = keeper.count, keeper.count["updates"], {}
        title = f"{', '.join(names)}: {len(data.obs)} entries, {len(data.starts)} windows to learn from"
        keeper.begin(title, head, state.params, step, args.num_updates)
        while True:
            # Evaluate and save
            finished, count["updates"] = step >= args.num_updates, step
            if keeper.due(step, count["evaluated"], args.eval_freq, finished):
                each = [partial(evaluate, args, model, planner_of(state, world, i), its) for i, its in enumerate(envs)]
                record_each(keeper, step, names, each)
            if keeper.due(step, keeper.saved, args.checkpoint_freq, finished or keeper.stop):
                keeper.save(step, info, world=world, state=state)
            if finished or keeper.stop:
                break

            # Learn
            number = min(burst, args.num_updates - step)
            state, info = train(args, model, state, world, data, num_updates=number)
            jax.block_until_ready(info)  # a signal should be answered soon
            step += number

            # Log
            if keeper.due(step, keeper.logged, args.log_freq, False):
                keeper.log_losses(step, info, "charts/updates_per_second")
            keeper.advance(step)


def run_jointly(args: Args) -> None:
    """Trains a world model as tdmpc2_jax.py does and, between its updates, the three networks on the same replay."""
    spec, n, burst = environments.task_spec(args.task), args.num_envs, max(1, int(args.utd * args.num_envs))
    seed_steps = max(1000, 5 * spec.episode_length) if args.seed_steps is None else args.seed_steps
    cli.check_replay(dataclasses.replace(args, horizon=window_steps(args)), seed_steps)
    with Run(cli.run_folder(args), dataclasses.asdict(args), "tdmpc2_jax_diffusion", RETURNS_COLUMNS) as keeper:
        envs = keeper.enter(RecordEpisodeStatistics(environments.make_envs(args.task, n, (args.seed, 0))))
        (eval_envs,), model, (discount,) = setup(args, keeper.enter)
        learner, replays = keeper.start(learner=partial(fresh, args, model), replay=partial(init_replays, args, model))
        agent, state, key = (learner[name] for name in ("train", "state", "act_key"))
        count, step, every = keeper.count, keeper.count["decisions"] * spec.action_repeat, args.diffusion_every
        title = f"{spec.name}: {model.obs_dim} observations, {model.action_dim} actions, {n} environment(s)"
        keeper.begin(title, returns_head(spec), (agent.params, state.params), step, args.total_timesteps)
        best = jax.device_put(jnp.zeros((n, args.future, model.action_dim)), jax.devices()[0])
        sent, done, info, more = np.zeros((n, model.action_dim), np.float32), np.zeros(n, bool), {}, {}
        obs, _ = envs.reset(seed=(args.seed, 0, step))  # a resumed run begins new episodes, not the first ones again
        entry = obs, sent, np.zeros(n, np.float32), done, ~done
        while True:
            # Act
            how = args if count["updates"] >= args.planner_start else dataclasses.replace(args, planner="mppi")
            planner, random = planner_of(state, world_of(model, agent, discount)), count["decisions"] <= seed_steps
            replays = world_model.add_to_both(args, replays, window_steps(args), *entry)
            action, best, _, key = act_by(how, model, planner, obs, best, entry[4], key, explore=True, random=random)

            # Evaluate and save
            finished = step >= args.total_timesteps
            if keeper.due(step, count["evaluated"], args.eval_freq, finished):
                how = how if step else dataclasses.replace(args, planner="pi")  # untrained: plans are worth no more
                keeper.record_returns(step, spec, partial(evaluate, how, model, planner, eval_envs))
            if keeper.due(step, keeper.saved, args.checkpoint_freq, finished or keeper.stop):
                learner = {"train": agent, "state": state, "act_key": key}
                keeper.save(step, info | more, learner=learner, replay=replays)
            if finished or keeper.stop:
                break

            # Learn
            due = int(seed_steps + (count["decisions"] - seed_steps) * args.utd) - count["updates"]
            ready = count["decisions"] >= seed_steps and (count["updates"] or replays.short.size)  # there is a window
            for _ in keeper.steps("learning", due // burst if ready else 0):
                agent, info = world_model.train(args, model, agent, replays.short, discount, num_updates=burst)
                count["updates"] += burst
                number = count["updates"] // every - (count["updates"] - burst) // every
                if number and (more or replays.long.size):  # there is a window of theirs
                    world = world_of(model, agent, discount)
                    state, more = train(args, model, state, world, replays, num_updates=number)

            # Step: an environment whose episode is over is reset by this step and ignores the action
            sent = np.asarray(action)  # all that is fetched from the device between two decisions
            obs, reward, terminated, truncated, infos = envs.step(sent)
            keeper.check_finite(step, action=sent, reward=reward, observation=obs)
            entry = obs, action, reward.astype(np.float32), terminated, done  # done before it: the entry is a reset
            count["decisions"] += n - int(done.sum())
            done = terminated | truncated
            step = count["decisions"] * spec.action_repeat

            # Log
            keeper.log_episodes(step, done, infos)
            if keeper.due(step, keeper.logged, args.log_freq, False):
                keeper.log_losses(step, info | more)
            keeper.advance(step)


def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    cli.check_bounds(world_model.with_model_size(args))
    several = [f"--{name}" for name in ("planner", "scorer", "rollouts") if "," in getattr(args, name)]
    joint, specs = args.mode == "joint", [*map(environments.task_spec, task_names(args))]
    shortest = min(spec.episode_length for spec in specs)
    cli.check_rules(
        (args.evaluate or not args.checkpoint, "--checkpoint goes with --evaluate"),
        (args.evaluate or joint or args.world_model, "training needs a world model: --world-model, or --mode joint"),
        (args.data_dir or joint, "the folder of the episodes is missing: --data-dir"),
        (args.task_dim or not args.tasks, "--tasks needs an agent of many tasks and, if it is a .pt, its --task-dim"),
        (args.evaluate or not several, f"several names for {' and '.join(several)} go with --evaluate"),
        (args.width % (2 * args.heads) == 0, "--width must be a multiple of twice --heads"),
        (args.horizon <= args.future, "--horizon must be at most --future"),
        (max(args.dynamics_steps, args.proposal_steps) <= LEVELS, f"there are {LEVELS} sampling steps at most"),
        (args.num_proposals + args.num_policy, "--num-proposals and --num-policy leave no candidate"),
        (window_steps(args) <= shortest, f"no episode has {window_steps(args)} steps: --future, --scales"),
        (not (joint and specs[0].can_terminate) or args.scales == "1", "--scales 1 alone where episodes can terminate"),
    )
    for spec in specs if args.capture_video else ():
        environments.check_rendering(spec.name)


def main(argv: list[str] | None = None) -> None:
    with cli.one_sentence():
        args = with_preset(cli.parse(Args, argv, __doc__, cli.run_folder, "tdmpc2_jax_diffusion"))
        useless = {"task"} if args.tasks else {"task_dim"}
        cli.check_named(argv, useless | (set() if args.evaluate else OTHERS[args.mode]), args.mode)
        check_args(args)
        use_compile_cache(args.compile_cache)
        evaluate_checkpoint(args) if args.evaluate else {"offline": run_offline, "joint": run_jointly}[args.mode](args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
