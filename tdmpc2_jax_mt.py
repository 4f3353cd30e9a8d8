"""TD-MPC2 in one file, many tasks: one world model, policy and value function for 30 or 80 tasks, learned offline.

Paper: Hansen, Su, Wang, "TD-MPC2: Scalable, Robust World Models for Continuous Control" (arXiv 2310.16828). Read
tdmpc2_jax.py first; blocks that are the same there stand here letter for letter. What differs: every network is
also told the task, by a learned embedding e; observations and actions are padded with zeros to the largest task's, and
what a task does not have is masked; each task has its own discount; batches come from files of recorded episodes; the
computation is spread over all devices, of one host or of many. Shapes are written in the paper's letters: H horizon,
B batch, N samples of the planner, P policy sequences, A action size, O observation size, Z latent size, K bins of the
discrete regression, n environments, q an ensemble of value heads, T tasks, E size of the task embedding.

    python tdmpc2_jax_mt.py --tasks mt30 --data-dir data/mt30                # train; a killed run goes on with --resume
    python tdmpc2_jax_mt.py --evaluate --checkpoint mt80-48M.pt --eval-episodes 1
    python tdmpc2_jax_mt.py --tasks walker-walk,cheetah-run --data-dir data  # what --save-episodes data has collected
"""

import contextlib
import csv
import dataclasses
import fcntl
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import flax
import flax.linen as nn
import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from imageio_ffmpeg import get_ffmpeg_exe
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

import envs as environments


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args:
    tasks: str | None = None
    """mt30, mt80, or names with commas, in the order of the dataset's ids (default: mt30; evaluating: all it knows)"""
    data_dir: str | None = None
    """folder of the dataset: chunk_0.pt, chunk_1.pt, ... of the original, or what --save-episodes has written"""
    exp_name: str = "tdmpc2_jax_mt"
    """name of this experiment: its files go to RUNS_DIR/TASKS/EXP_NAME/SEED"""
    runs_dir: str = "runs"
    """folder of all runs"""
    seed: int = 1
    """seed of the parameters, the batches and every random draw"""
    num_updates: int = 10_000_000
    """length of the run in gradient updates"""
    resume: bool = False
    """continue the run of these tasks, name and seed from its last checkpoint (start it if there is none)"""
    checkpoint_freq: int = 50_000
    """updates between checkpoints (one more is written at the end, on SIGTERM and on Ctrl-C)"""
    log_freq: int = 1_000
    """updates between two points of the loss curves"""
    track: bool = False
    """also send everything to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "tdmpc2-jax"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    # Data and devices
    storage: Literal["auto", "device", "host", "disk"] = "auto"
    """where batches are drawn from: device memory, this machine's memory, or the files as they lie on the disk"""
    storage_dtype: Literal["files", "float16"] = "files"
    """type of the numbers in device memory: that of the files, or half precision"""
    readers: int = 4
    """threads that read batches ahead from the disk or the machine's memory; more for a slow disk"""
    shard_params: Literal["auto", "yes", "no"] = "auto"
    """spread parameters and optimiser state over the devices, instead of a copy on each (auto: if copies do not fit)"""
    distributed: bool = False
    """this is one of several processes, which SLURM or the next three arguments describe; all see one --runs-dir"""
    coordinator: str | None = None
    """HOST:PORT of process 0"""
    num_processes: int | None = None
    """number of processes"""
    process_id: int | None = None
    """number of this process, from 0"""

    # Evaluation
    eval_freq: int = 100_000
    """updates between evaluations (one more at the end)"""
    eval_episodes: int = 10
    """episodes of each task in an evaluation; all of all tasks run side by side (10-40 MB of memory each)"""
    capture_video: bool = False
    """write one MP4 of every evaluation, a grid of all tasks, to RUNS_DIR/... and trackers (needs a GL library)"""
    evaluate: bool = False
    """do not train: evaluate --checkpoint, print the table of tasks and exit"""
    checkpoint: str | None = None
    """start from these parameters: a run folder, a checkpoint folder, or an original multi-task .pt file"""
    json: str | None = None
    """with --evaluate: write the results to this file"""
    mpc: bool = True
    """act by planning; --no-mpc acts with the policy alone"""

    # Model
    model_size: Literal[1, 5, 19, 48, 317] = 5
    """millions of parameters: sets the six sizes below where neither they nor --checkpoint are given"""
    enc_dim: int | None = None
    """width of the encoder's hidden layers"""
    mlp_dim: int | None = None
    """width of all other hidden layers"""
    latent_dim: int | None = None
    """latent size Z"""
    num_enc_layers: int | None = None
    """layers of the encoder"""
    num_q: int | None = None
    """value heads"""
    task_dim: int | None = None
    """size E of the task embedding"""
    num_bins: int = 101
    """bins K of the discrete regression of rewards and values"""
    vmin: float = -10.0
    """lowest bin, in symlog space"""
    vmax: float = 10.0
    """highest bin, in symlog space"""
    simnorm_dim: int = 8
    """size of the groups in which SimNorm takes softmaxes"""
    dropout: float = 0.01
    """dropout after the first layer of every value head"""
    log_std_min: float = -10.0
    """lower bound of the policy's log standard deviation"""
    log_std_max: float = 2.0
    """upper bound of the policy's log standard deviation"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the inputs of matrix products; parameters, statistics and losses stay float32"""

    # Optimisation
    batch_size: int = 1024
    """windows per update B"""
    lr: float = 3e-4
    """learning rate"""
    enc_lr_scale: float = 0.3
    """the encoder's learning rate is this share of lr"""
    grad_clip_norm: float = 20.0
    """bound on the global gradient norm, of the model and of the policy each"""
    tau: float = 0.01
    """step of the target values and of the Q scale"""
    rho: float = 0.5
    """weight of a loss t steps into the window is rho^t"""
    consistency_coef: float = 20.0
    """weight of the latent consistency loss"""
    reward_coef: float = 0.1
    """weight of the reward loss"""
    value_coef: float = 0.1
    """weight of the value loss"""
    entropy_coef: float = 1e-4
    """weight of the policy's entropy"""
    discount_denom: float = 5.0
    """episode length L gives the discount (L/denom - 1) / (L/denom), clipped to the next two"""
    discount_min: float = 0.95
    """lowest discount"""
    discount_max: float = 0.995
    """highest discount"""

    # Planning
    horizon: int = 3
    """steps H of a plan and of a training window"""
    iterations: int = 6
    """iterations of MPPI (two more for 20 or more action dimensions)"""
    num_samples: int = 512
    """action sequences N per iteration"""
    num_elites: int = 64
    """sequences that the next distribution is fitted to"""
    num_pi_trajs: int = 24
    """sequences P proposed by the policy"""
    min_std: float = 0.05
    """lower bound of the planner's standard deviation"""
    max_std: float = 2.0
    """initial value and upper bound of the planner's standard deviation"""
    temperature: float = 0.5
    """inverse temperature of the elites' weights"""


# millions of parameters: (enc_dim, mlp_dim, latent_dim, num_enc_layers, num_q)
MODEL_SIZES = {
    1: (256, 384, 128, 2, 2),
    5: (256, 512, 512, 2, 5),
    19: (1024, 1024, 768, 3, 5),
    48: (1792, 1792, 768, 4, 5),
    317: (4096, 4096, 1376, 5, 8),
}
SIZE_FIELDS = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q", "task_dim")


def with_model_size(args: Args, tasks: tuple[str, ...]) -> Args:
    """Fills in the six sizes that were not given: the table's, with what the released mt30 models have otherwise."""
    mt30 = tasks == environments.TASK_SETS["mt30"]
    task_dim = 64 if mt30 and args.model_size in (5, 19, 48) else 96
    sizes = dict(zip(SIZE_FIELDS, (*MODEL_SIZES[args.model_size], task_dim), strict=True))
    sizes |= {"latent_dim": 512} if mt30 and args.model_size == 19 else {}
    return dataclasses.replace(args, **{k: v for k, v in sizes.items() if getattr(args, k) is None})


def discount_of(args: Args, episode_length: int) -> float:
    """Discount for episodes of this many decisions: a fifth of the episode is the time scale (appendix)."""
    scale = episode_length / args.discount_denom
    return float(np.clip((scale - 1) / scale, args.discount_min, args.discount_max))


# --------------------------------------------------------------------------------------------------------------- Maths
def symlog(x):
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x):
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot(args: Args, x: jax.Array) -> jax.Array:
    """Scalars [...] as weights [..., K] on the two nearest bins in symlog space."""
    bins = jnp.linspace(args.vmin, args.vmax, args.num_bins)
    x = jnp.clip(symlog(x), args.vmin, args.vmax)[..., None]
    return jax.nn.relu(1 - jnp.abs(x - bins) * ((args.num_bins - 1) / (args.vmax - args.vmin)))


def two_hot_inv(args: Args, logits: jax.Array) -> jax.Array:
    """The scalars [...] that logits [..., K] stand for."""
    bins = jnp.linspace(args.vmin, args.vmax, args.num_bins)
    return symexp((jax.nn.softmax(logits) * bins).sum(-1))


def soft_ce(args: Args, logits: jax.Array, x: jax.Array) -> jax.Array:
    """Cross entropy [...] of logits [..., K] against the two-hot encoding of scalars x [...]."""
    return -(two_hot(args, x) * jax.nn.log_softmax(logits)).sum(-1)


def mish(x):
    """x * tanh(softplus(x)) by one exponential instead of three transcendentals: 2-4 times faster on a CPU."""
    e = jnp.exp(jnp.minimum(x, 20.0))  # beyond 20, mish(x) = x in float32, and e * e must not overflow
    n = e * (e + 2)
    return x * (n / (n + 2))


def simnorm(x: jax.Array, group: int) -> jax.Array:
    """Softmax within groups of `group` units."""
    return jax.nn.softmax(x.reshape(*x.shape[:-1], -1, group)).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------ Networks
class Linear(nn.Module):
    """Affine layer on the concatenation of its inputs, which broadcast and are never written out side by side: what
    all samples of a plan share (their first latent state) is multiplied once instead of N times."""

    features: int
    zero_init: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, *inputs):
        sizes = [x.shape[-1] for x in inputs]
        init = nn.initializers.zeros if self.zero_init else nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (sum(sizes), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows = jnp.split(kernel, np.cumsum(sizes)[:-1])
        dot = partial(jnp.dot, preferred_element_type=jnp.float32)
        return sum(dot(x.astype(self.dtype), w.astype(self.dtype)) for x, w in zip(inputs, rows, strict=True)) + bias


class MLP(nn.Module):
    """Hidden layers Linear -> LayerNorm -> Mish, then Linear(out), with LayerNorm -> SimNorm behind it if asked for."""

    hidden: tuple[int, ...]
    out: int
    simnorm_dim: int = 0
    zero_init: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, *inputs, dropout=None):
        """Inputs [..., in_i] -> [..., out]; dropout [..., hidden[0]] multiplies the first Linear's output."""
        for i, width in enumerate(self.hidden):
            x = Linear(width, dtype=self.dtype, name=f"linear_{i}")(*inputs)
            x = x if dropout is None or i > 0 else x * dropout
            inputs = (mish(nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(x)),)
        i = len(self.hidden)
        x = Linear(self.out, self.zero_init, self.dtype, name=f"linear_{i}")(*inputs)
        return simnorm(nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(x), self.simnorm_dim) if self.simnorm_dim else x


class WorldModel(NamedTuple):
    """The components of the model. Hashable and without parameters: a static argument of the jitted functions."""

    encoder: MLP  # h(s, e) -> z
    dynamics: MLP  # d(z, e, a) -> z'
    reward: MLP  # R(z, e, a) -> K logits
    pi: MLP  # p(z, e) -> mean and log std of A actions
    q: MLP  # Q(z, e, a) -> K logits: one head; the ensemble is the same module over stacked parameters
    num_q: int
    obs_dim: int
    action_dim: int
    task_dim: int
    num_tasks: int


def make_model(args: Args, tasks: tuple[str, ...]) -> WorldModel:
    """The networks for these tasks: O and A are the sizes of the largest."""
    args = with_model_size(args, tasks)
    obs_dim, action_dim = environments.set_sizes(tasks)
    mlp = partial(MLP, (args.mlp_dim, args.mlp_dim), dtype=args.compute_dtype)
    enc_hidden = (args.enc_dim,) * max(args.num_enc_layers - 1, 1)
    return WorldModel(
        encoder=MLP(enc_hidden, args.latent_dim, args.simnorm_dim, dtype=args.compute_dtype),
        dynamics=mlp(args.latent_dim, args.simnorm_dim),
        reward=mlp(args.num_bins, zero_init=True),
        pi=mlp(2 * action_dim),
        q=mlp(args.num_bins, zero_init=True),
        num_q=args.num_q,
        obs_dim=obs_dim,
        action_dim=action_dim,
        task_dim=args.task_dim,
        num_tasks=len(tasks),
    )


def init_params(args: Args, model: WorldModel, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, one entry per component; those of `q` are stacked along a leading axis [num_q], and `task_emb`
    is the table [T, E]."""
    z, e, a = (jnp.zeros(size) for size in (model.dynamics.out, model.task_dim, model.action_dim))
    keys = jax.random.split(key, 6)
    return {
        "encoder": model.encoder.init(keys[0], jnp.zeros(model.obs_dim), e),
        "dynamics": model.dynamics.init(keys[1], z, e, a),
        "reward": model.reward.init(keys[2], z, e, a),
        "pi": model.pi.init(keys[3], z, e),
        "q": jax.vmap(lambda k: model.q.init(k, z, e, a))(jax.random.split(keys[4], model.num_q)),
        "task_emb": jax.random.uniform(keys[5], (model.num_tasks, model.task_dim), minval=-0.02, maxval=0.02),
    }


# --------------------------------------------------------------------------------------------------------------- Tasks
class Tasks(NamedTuple):
    """What is fixed of each task."""

    mask: jax.Array  # [T, A] 1 for the actions that the task has, 0 for padding
    discount: jax.Array  # [T]


class TaskInput(NamedTuple):
    """What the functions below are told of the tasks at hand, one of each for every entry of a batch."""

    emb: jax.Array  # [..., E] input of every network
    mask: jax.Array  # [..., A]
    discount: jax.Array  # [...]


def make_tasks(args: Args, tasks: tuple[str, ...]) -> Tasks:
    """Masks and discounts of these tasks."""
    rows, (_, action_dim) = [environments.TASKS[task] for task in tasks], environments.set_sizes(tasks)
    mask = np.array([np.arange(action_dim) < row.action_size for row in rows], np.float32)
    discount = [discount_of(args, environments.task_spec(task).episode_length) for task in tasks]
    return Tasks(jnp.asarray(mask), jnp.asarray(discount, jnp.float32))


def embed(table: jax.Array, task: jax.Array) -> jax.Array:
    """Rows [..., E] of the embedding table: they are scaled back to unit norm if they are longer."""
    rows = table[task]
    return rows / jnp.maximum(1.0, jnp.linalg.norm(rows, axis=-1, keepdims=True))


def renormalise(table: jax.Array, task: jax.Array) -> jax.Array:
    """The table [T, E] after rows of it were read in training: scaled back for good, outside of any gradient."""
    return table.at[task].set(embed(table, task))


def task_input(tasks: Tasks, emb: jax.Array, task: jax.Array) -> TaskInput:
    """Puts together what belongs to task ids [...], whose embeddings [..., E] are given."""
    return TaskInput(emb, tasks.mask[task], tasks.discount[task])


# --------------------------------------------------------------------------------------------------------- World model
class Policy(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise
    log_std: jax.Array  # [..., A]
    entropy: jax.Array  # [...] -log pi(action)
    scaled_entropy: jax.Array  # [...] the entropy that the policy's loss rewards


def policy(args: Args, model: WorldModel, pi_params, z: jax.Array, task: TaskInput, eps: jax.Array) -> Policy:
    """Policy prior p(z, e), a squashed Gaussian in the actions that the task has; the others are 0.

    z [..., Z] and standard normal eps [..., A] -> sample and statistics.
    """
    mean, log_std = jnp.split(model.pi.apply(pi_params, z, task.emb), 2, axis=-1)
    log_std = args.log_std_min + 0.5 * (args.log_std_max - args.log_std_min) * (jnp.tanh(log_std) + 1)
    mean, log_std, eps = mean * task.mask, log_std * task.mask, eps * task.mask
    action = jnp.tanh(mean + eps * jnp.exp(log_std))
    log_gauss = (-0.5 * eps**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
    log_pi = log_gauss - jnp.log(jax.nn.relu(1 - action**2) + 1e-6).sum(-1)
    entropy_scale = task.mask.sum(-1) * log_gauss / (log_pi + 1e-8)
    return Policy(action, jnp.tanh(mean), log_std, -log_pi, -log_pi * entropy_scale)


def q_logits(model: WorldModel, q_params, z: jax.Array, emb: jax.Array, action: jax.Array, dropout=None) -> jax.Array:
    """All heads in q_params: z [..., Z], emb [..., E], action [..., A] -> [q, ..., K]; dropout [q, ..., mlp_dim] or
    None."""
    if dropout is None:
        return jax.vmap(lambda p: model.q.apply(p, z, emb, action))(q_params)
    return jax.vmap(lambda p, d: model.q.apply(p, z, emb, action, dropout=d))(q_params, dropout)


def pick_heads(q_params, heads: jax.Array):
    """Parameters of the value heads with these indices only: where two Qs are needed, two are computed."""
    return jax.tree.map(lambda p: p[heads], q_params)


def dropout_mask(args: Args, key: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """Inverted dropout as a factor, from 16 random bits a unit (half the cost of the usual 32)."""
    if args.dropout == 0:
        return None
    drop = jax.random.bits(key, shape, "uint16") < round(args.dropout * 2**16)
    return jnp.where(drop, 0.0, 1 / (1 - args.dropout))


# ------------------------------------------------------------------------------------------------------------ Planning
class PlanNoise(NamedTuple):
    """Every random draw of one plan in n environments (the heads are shared: their parameters are gathered once)."""

    pi: jax.Array  # [n, H, P, A] normal: the policy's sequences
    sample: jax.Array  # [n, iterations, H, N-P, A] normal: the sampled sequences
    terminal: jax.Array  # [n, iterations, N, A] normal: the policy's action behind the horizon
    heads: jax.Array  # [iterations, 2] indices of value heads
    gumbel: jax.Array  # [n, num_elites]: choice of the elite
    explore: jax.Array  # [n, A] normal: exploration


def plan_noise(args: Args, model: WorldModel, key: jax.Array, n: int) -> PlanNoise:
    """Draws what a plan in n environments needs."""
    H, P, N, A = args.horizon, args.num_pi_trajs, args.num_samples, model.action_dim
    iterations = args.iterations + 2 * (A >= 20)
    keys = jax.random.split(key, 6)
    return PlanNoise(
        pi=jax.random.normal(keys[0], (n, H, P, A)),
        sample=jax.random.normal(keys[1], (n, iterations, H, N - P, A)),
        terminal=jax.random.normal(keys[2], (n, iterations, N, A)),
        heads=jax.vmap(lambda k: two_heads(model, k))(jax.random.split(keys[3], iterations)),
        gumbel=jax.random.gumbel(keys[4], (n, args.num_elites)),
        explore=jax.random.normal(keys[5], (n, A)),
    )


def two_heads(model: WorldModel, key: jax.Array) -> jax.Array:
    """Indices [2] of two different value heads, drawn at random: any first one, then any step to another."""
    head, step = jax.random.randint(key, (2,), jnp.array([0, 1]), model.num_q)
    return jnp.stack([head, (head + step) % model.num_q])


def envs_at_once(args: Args, model: WorldModel) -> int:
    """Environments whose plans are computed side by side, the others after them: on a CPU as many as leave a layer's
    activations in the cache (30 side by side take 1.8 times as long as six times five), elsewhere as 512 MB hold."""
    budget = 2**22 if jax.default_backend() == "cpu" else 2**29  # bytes of one layer's activations
    return max(1, budget // (4 * args.num_samples * model.q.hidden[0]))


def estimate_value(args: Args, model: WorldModel, params, z, actions, task: TaskInput, heads, eps) -> jax.Array:
    """Value [N] of action sequences [H, N, A] from z [1, Z]: rewards over the horizon, then the mean of two Qs."""
    value = 0.0
    for t in range(args.horizon):
        reward = two_hot_inv(args, model.reward.apply(params["reward"], z, task.emb, actions[t]))
        value = value + task.discount**t * reward
        z = model.dynamics.apply(params["dynamics"], z, task.emb, actions[t])
    action = policy(args, model, params["pi"], z, task, eps).action
    q = two_hot_inv(args, q_logits(model, pick_heads(params["q"], heads), z, task.emb, action)).mean(0)
    return jnp.nan_to_num(value + task.discount**args.horizon * q, nan=0.0)


def plan(
    args: Args, model: WorldModel, params, obs, task: TaskInput, prev_mean, first, noise: PlanNoise, explore: bool
) -> tuple[jax.Array, jax.Array]:
    """Model predictive path integral control (MPPI) in n environments at once, each of its own task.

    obs [n, O]; task of [n] entries; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the
    start of an episode; explore adds noise to the action. Returns actions [n, A] in [-1, 1], 0 where the task has none,
    and the new means [n, H, A].
    """
    n, H, A = len(obs), args.horizon, model.action_dim
    chex.assert_shape([obs, task.emb, prev_mean, first], [(n, model.obs_dim), (n, model.task_dim), (n, H, A), (n,)])

    def plan_one(env):
        obs, task, prev_mean, first, draws = env
        z = model.encoder.apply(params["encoder"], obs, task.emb)[None]  # [1, Z]
        pi_actions, pi_z = [], z
        for t in range(H):
            pi_actions.append(policy(args, model, params["pi"], pi_z, task, draws.pi[t]).action)
            pi_z = model.dynamics.apply(params["dynamics"], pi_z, task.emb, pi_actions[-1]) if t < H - 1 else None
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(carry, draw):
            mean, std = carry
            sampled = jnp.clip(mean[:, None] + std[:, None] * draw.sample, -1, 1) * task.mask
            actions = jnp.concatenate([pi_actions, sampled], axis=1)  # [H, N, A]
            values = estimate_value(args, model, params, z, actions, task, draw.heads, draw.terminal)
            elite_values, elite_indices = jax.lax.top_k(values, args.num_elites)
            elites = actions[:, elite_indices]  # [H, num_elites, A]
            weights = jax.nn.softmax(args.temperature * elite_values)  # [num_elites]
            mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), args.min_std, args.max_std) * task.mask
            return (mean, std), (elites[0], weights)

        mean = jnp.where(first, 0.0, jnp.roll(prev_mean, -1, axis=0).at[-1].set(0.0))
        scanned = PlanNoise(None, draws.sample, draws.terminal, noise.heads, None, None)
        start = (mean, jnp.full((H, A), args.max_std))
        (mean, std), (first_actions, weights) = jax.lax.scan(iterate, start, scanned)
        chosen = jnp.argmax(jnp.log(weights[-1]) + draws.gumbel)
        action = first_actions[-1, chosen]  # [A]
        action = action + std[0] * draws.explore if explore else action
        return jnp.clip(action, -1, 1), mean

    envs = (obs, task, prev_mean, first, noise._replace(heads=None))
    at_once = envs_at_once(args, model)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


@partial(jax.jit, static_argnames=("args", "model", "explore"))
def act(args: Args, model: WorldModel, tasks: Tasks, params, obs, task_ids, prev_mean, first, key, explore: bool):
    """Actions [n, A] for obs [n, O] in tasks task_ids [n] by planning, or by the policy alone with --no-mpc; see
    `plan`. Returns the actions, the planner's means and the key for the next call."""
    key, noise_key = jax.random.split(key)
    task = task_input(tasks, embed(params["task_emb"], task_ids), task_ids)
    if args.mpc:
        noise = plan_noise(args, model, noise_key, len(obs))
        action, prev_mean = plan(args, model, params, obs, task, prev_mean, first, noise, explore)
    else:
        eps = jax.random.normal(noise_key, (len(obs), model.action_dim))
        z = model.encoder.apply(params["encoder"], obs, task.emb)
        sample = policy(args, model, params["pi"], z, task, eps)
        action = sample.action if explore else sample.mean
    return action, prev_mean, key


# ------------------------------------------------------------------------------------------------------------ Learning
class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict[str, Any]  # encoder, dynamics, reward, pi, q, task_emb
    target_q: dict[str, Any]  # slow copy of params["q"]
    model_opt: optax.OptState  # of everything but the policy
    pi_opt: optax.OptState
    emb_grad: jax.Array  # [T, E] the policy loss's gradient in the embedding, which the next update takes along
    q_scale: jax.Array  # running 5-95% range of the values, by which the policy's loss is divided
    key: jax.Array
    updates: jax.Array  # number of updates made


class Batch(NamedTuple):
    """Windows of H+1 consecutive entries: actions and rewards lead from one observation to the next."""

    obs: jax.Array  # [H+1, B, O]
    action: jax.Array  # [H, B, A]
    reward: jax.Array  # [H, B]
    task: jax.Array  # [B] ids


class UpdateNoise(NamedTuple):
    """Every random draw of one update."""

    next_action: jax.Array  # [H, B, A] normal: the policy's actions in the TD targets
    target_heads: jax.Array  # [2] indices of the target heads
    pi_action: jax.Array  # [H+1, B, A] normal: the policy's actions in its own loss
    pi_heads: jax.Array  # [2] indices of the heads that judge them
    dropout: jax.Array | None  # [q, H, B, mlp_dim] factors of the heads' first layers in the value loss
    pi_dropout: jax.Array | None  # [2, H+1, B, mlp_dim] and in the policy's loss


def update_noise(args: Args, model: WorldModel, key: jax.Array) -> UpdateNoise:
    """Draws what one update needs."""
    H, B, A, width = args.horizon, args.batch_size, model.action_dim, model.q.hidden[0]
    keys = jax.random.split(key, 6)
    return UpdateNoise(
        next_action=jax.random.normal(keys[0], (H, B, A)),
        target_heads=two_heads(model, keys[1]),
        pi_action=jax.random.normal(keys[2], (H + 1, B, A)),
        pi_heads=two_heads(model, keys[3]),
        dropout=dropout_mask(args, keys[4], (model.num_q, H, B, width)),
        pi_dropout=dropout_mask(args, keys[5], (2, H + 1, B, width)),
    )


def optimizers(args: Args) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the model (the encoder slower) and for the policy, each behind its own global-norm clip."""
    clip = optax.clip_by_global_norm(args.grad_clip_norm)
    rates = {"encoder": optax.scale(-args.lr * args.enc_lr_scale), "other": optax.scale(-args.lr)}
    rates = optax.multi_transform(rates, lambda params: {k: k if k == "encoder" else "other" for k in params})
    return (
        optax.chain(clip, optax.scale_by_adam(eps=1e-8), rates),
        optax.chain(clip, optax.scale_by_adam(eps=1e-5), optax.scale(-args.lr)),
    )


def init_state(args: Args, params: dict[str, Any], target_q, key: jax.Array) -> TrainState:
    """Learning state at the start of a run with these parameters."""
    model_tx, pi_tx = optimizers(args)
    model_opt = model_tx.init({k: v for k, v in params.items() if k != "pi"})
    target_q = jax.tree.map(jnp.copy, target_q)  # not the same buffers: both are donated
    pi_opt, emb_grad = pi_tx.init(params["pi"]), jnp.zeros_like(params["task_emb"])
    return TrainState(params, target_q, model_opt, pi_opt, emb_grad, jnp.ones(()), key, jnp.zeros((), jnp.int32))


def td_target(args: Args, model: WorldModel, state: TrainState, next_z, batch: Batch, task: TaskInput, noise):
    """TD targets [H, B]: r + discount * min of two random target Qs at the policy's next action."""
    next_action = policy(args, model, state.params["pi"], next_z, task, noise.next_action).action
    target_q = pick_heads(state.target_q, noise.target_heads)
    q = two_hot_inv(args, q_logits(model, target_q, next_z, task.emb, next_action))
    return batch.reward + task.discount * q.min(0)


def model_loss(args: Args, model: WorldModel, params, batch: Batch, next_z, target, noise):
    """World-model objective (eq. 3) on latent rollouts from the windows' first observations. Returns the total loss,
    and the rollouts [H+1, B, Z] and the parts of the loss."""
    rho = args.rho ** jnp.arange(args.horizon)  # [H]
    emb = params["task_emb"][batch.task]  # [B, E]
    zs = [model.encoder.apply(params["encoder"], batch.obs[0], emb)]
    for t in range(args.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], emb, batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward_logits = model.reward.apply(params["reward"], zs[:-1], emb, batch.action)  # [H, B, K]
    value_logits = q_logits(model, params["q"], zs[:-1], emb, batch.action, noise.dropout)  # [q, H, B, K]
    losses = {
        "consistency_loss": (rho * ((zs[1:] - next_z) ** 2).mean((1, 2))).mean(),
        "reward_loss": (rho * soft_ce(args, reward_logits, batch.reward).mean(1)).mean(),
        "value_loss": (rho * soft_ce(args, value_logits, target).mean(2)).mean(),
    }
    total = sum(getattr(args, name.replace("loss", "coef")) * loss for name, loss in losses.items())
    return total, (zs, losses | {"total_loss": total})


def policy_loss(
    args: Args, model: WorldModel, tasks: Tasks, pi_params, task_emb, q_params, zs, task_ids, q_scale, noise
):
    """Policy objective (eq. 4) on latent states zs [H+1, B, Z]. Returns the loss, and the new Q scale and entropies."""
    task = task_input(tasks, task_emb[task_ids], task_ids)
    pi = policy(args, model, pi_params, zs, task, noise.pi_action)
    logits = q_logits(model, pick_heads(q_params, noise.pi_heads), zs, task.emb, pi.action, noise.pi_dropout)
    q = two_hot_inv(args, logits).mean(0)  # [H+1, B]
    low, high = jnp.percentile(jax.lax.stop_gradient(q[0]), jnp.array([5.0, 95.0]))
    q_scale = q_scale + args.tau * (jnp.maximum(high - low, 1.0) - q_scale)
    rho = args.rho ** jnp.arange(args.horizon + 1)
    loss = -(rho * (args.entropy_coef * pi.scaled_entropy + q / q_scale).mean(1)).mean()
    info = {"pi_entropy": pi.entropy.mean(), "pi_scaled_entropy": pi.scaled_entropy.mean(), "pi_scale": q_scale}
    return loss, (q_scale, info | {"pi_loss": loss})


def update(args: Args, model: WorldModel, tasks: Tasks, state: TrainState, batch: Batch, noise: UpdateNoise):
    """One gradient step on the world model and the task embedding, then one on the policy, then one of the target
    values. Returns the new state and a dict of scalars for the log.

    The policy's loss depends on the embedding, too. Like the original, which does not clear that gradient, the model's
    next step adds it to its own.
    """
    H, B = args.horizon, len(batch.obs[0])
    chex.assert_shape(list(batch), [(H + 1, B, model.obs_dim), (H, B, model.action_dim), (H, B), (B,)])
    model_tx, pi_tx = optimizers(args)

    params = state.params | {"task_emb": renormalise(state.params["task_emb"], batch.task)}
    task = task_input(tasks, params["task_emb"][batch.task], batch.task)
    next_z = model.encoder.apply(params["encoder"], batch.obs[1:], task.emb)  # [H, B, Z]
    target = td_target(args, model, state, next_z, batch, task, noise)  # [H, B]
    model_params = {k: v for k, v in params.items() if k != "pi"}
    loss = partial(model_loss, args, model, batch=batch, next_z=next_z, target=target, noise=noise)
    grads, (zs, info) = jax.grad(loss, has_aux=True)(model_params)
    grads["task_emb"] += state.emb_grad
    updates, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, updates)

    task_emb = renormalise(model_params["task_emb"], batch.task)
    loss = partial(policy_loss, args, model, tasks, q_params=model_params["q"], zs=zs, task_ids=batch.task)
    loss = partial(loss, q_scale=state.q_scale, noise=noise)
    (pi_grads, emb_grad), (q_scale, pi_info) = jax.grad(loss, (0, 1), has_aux=True)(params["pi"], task_emb)
    updates, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(params["pi"], updates)

    target_q = optax.incremental_update(model_params["q"], state.target_q, args.tau)
    info |= pi_info | {"grad_norm": optax.tree.norm(grads), "pi_grad_norm": optax.tree.norm(pi_grads)}
    params = model_params | {"pi": pi_params, "task_emb": task_emb}
    updates = state.updates + 1
    return TrainState(params, target_q, model_opt, pi_opt, emb_grad, q_scale, state.key, updates), info


# ---------------------------------------------------------------------------------------------------- Data and devices
class DeviceData(NamedTuple):
    """A dataset in device memory, the episodes of all files in a row, split over the devices. `environments.Dataset`
    is the same on the disk or in the machine's memory."""

    obs: jax.Array  # [entries, O]
    action: jax.Array  # [entries, A] the action that led to the observation
    reward: jax.Array  # [entries]
    task: jax.Array  # [entries] ids
    ends: jax.Array  # [F] number of windows in the files up to this one
    first_entry: jax.Array  # [F] where the file begins
    episode_entries: jax.Array  # [F] entries of an episode of this file


def sample(data: DeviceData, key: jax.Array, batch_size: int, horizon: int) -> Batch:
    """Windows drawn uniformly from all that lie in one episode, with replacement."""
    window = jax.random.randint(key, (batch_size,), 0, data.ends[-1])
    file = jnp.searchsorted(data.ends, window, side="right")
    in_file = window - jnp.where(file > 0, data.ends[file - 1], 0)
    episode, start = jnp.divmod(in_file, data.episode_entries[file] - horizon)
    start = data.first_entry[file] + episode * data.episode_entries[file] + start
    rows = start + jnp.arange(horizon + 1)[:, None]  # [H+1, B]
    action, reward = data.action[rows[1:]], data.reward[rows[1:]]
    arrays = [array.astype(jnp.float32) for array in (data.obs[rows], action, reward)]
    return Batch(*arrays, data.task[start].astype(jnp.int32))


def data_dtype(args: Args, data: environments.Dataset) -> np.dtype:
    """Type of the dataset's numbers in device memory."""
    types = {array.dtype for chunk in data.chunks for array in (chunk.obs, chunk.action, chunk.reward)}
    half = args.storage_dtype == "float16" or types == {np.dtype(np.float16)}
    return np.dtype(np.float16 if half else np.float32)


def data_shapes(args: Args, data: environments.Dataset, mesh: Mesh) -> DeviceData:
    """Shapes, types and places of the dataset in device memory; its length is rounded up to be split evenly."""
    length = -(-data.num_entries // mesh.size) * mesh.size
    floats = partial(jax.ShapeDtypeStruct, dtype=data_dtype(args, data), sharding=split(mesh, 0))
    table = [jax.ShapeDtypeStruct((len(data.chunks),), np.int32, sharding=everywhere(mesh)) for _ in range(3)]
    task = jax.ShapeDtypeStruct((length,), np.int16, sharding=split(mesh, 0))
    shapes = (length, data.obs_size), (length, data.action_size), (length,)
    return DeviceData(*map(floats, shapes), task, *table)


@partial(jax.jit, donate_argnums=0)
def write_piece(arrays, piece, start):
    """Overwrites entries start, start + 1, ... of the arrays."""
    return jax.tree.map(lambda a, p: jax.lax.dynamic_update_slice_in_dim(a, p, start, 0), arrays, piece)


def to_devices(args: Args, data: environments.Dataset, mesh: Mesh) -> DeviceData:
    """Copies a dataset into device memory, piece by piece: neither file nor set is ever whole in the machine's."""
    shapes, dtype, piece_size = data_shapes(args, data, mesh), data_dtype(args, data), 500_000
    names, parts = ("obs", "action", "reward", "task"), []
    for device, (rows,) in split(mesh, 0).addressable_devices_indices_map((len(shapes.task),)).items():
        start, stop = rows.start or 0, rows.stop or len(shapes.task)
        with jax.default_device(device):
            wholes = {k: getattr(shapes, k) for k in names}
            arrays = {k: jnp.zeros((stop - start, *whole.shape[1:]), whole.dtype) for k, whole in wholes.items()}
        for at in range(start, min(stop, data.num_entries), piece_size):
            with np.errstate(over="ignore"):
                piece = data.read(at, min(at + piece_size, stop, data.num_entries))
                piece = {k: v if k == "task" else v.astype(dtype) for k, v in piece.items()}
            if not all(np.isfinite(values).all() for values in piece.values()):
                raise environments.UserError("--storage-dtype float16: the dataset holds numbers beyond 65504")
            arrays = write_piece(arrays, jax.device_put(piece, device), at - start)
        parts.append(arrays)
    whole = [
        jax.make_array_from_single_device_arrays(getattr(shapes, k).shape, split(mesh, 0), [part[k] for part in parts])
        for k in names
    ]
    table = [on_devices(values.astype(np.int32), everywhere(mesh)) for values in data.window_table(args.horizon)]
    return DeviceData(*whole, *table)


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int) -> NamedSharding:
    """The axis with this number is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "devices"))


def on_devices(values, sharding: NamedSharding):
    """Arrays of this process, equal in all processes if the sharding says everywhere, as arrays of all devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), values)


def batch_shardings(mesh: Mesh) -> Batch:
    """Every device works on its share of the windows."""
    return Batch(split(mesh, 1), split(mesh, 1), split(mesh, 1), split(mesh, 0))


def batch_shapes(args: Args, model: WorldModel, mesh: Mesh) -> Batch:
    """Shapes, types and places of a batch."""
    H, B = args.horizon, args.batch_size
    shapes = Batch((H + 1, B, model.obs_dim), (H, B, model.action_dim), (H, B), (B,))
    types = Batch(np.float32, np.float32, np.float32, np.int32)
    return Batch(*map(lambda s, t, p: jax.ShapeDtypeStruct(s, t, sharding=p), shapes, types, batch_shardings(mesh)))


def state_shapes(args: Args, model: WorldModel, mesh: Mesh, shard: bool) -> TrainState:
    """Shapes, types and places of the learning state: a copy on every device or, if `shard`, each array split over the
    devices along its longest axis that can be."""

    def place(x):
        axes = [i for i in range(x.ndim) if x.shape[i] % mesh.size == 0] if shard else []
        sharding = split(mesh, max(axes, key=lambda i: x.shape[i])) if axes else everywhere(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(partial(fresh_state, args, model)))


def train(args: Args, model: WorldModel, mesh: Mesh, tasks: Tasks, state: TrainState, source: DeviceData | Batch):
    """One update, on a batch drawn here from device memory or drawn before. Every device computes on its share of the
    batch; the sums over it, and so the gradients, are those of one device. Returns the new state and scalars."""
    key, sample_key, noise_key = jax.random.split(state.key, 3)
    batch = source if isinstance(source, Batch) else sample(source, sample_key, args.batch_size, args.horizon)
    batch = jax.lax.with_sharding_constraint(batch, batch_shardings(mesh))
    noise = update_noise(args, model, noise_key)
    return update(args, model, tasks, state._replace(key=key), batch, noise)


def available_bytes() -> int:
    """Memory that a device may use: what the device says or, on CPUs, its share of what is free; of several processes
    the least, so that all decide alike."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError):  # only Linux says what is free of it
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError, KeyError):  # a container's limit; no limit is the word max
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["file"])  # what it caches of files gives way
            free = min(free, int((group / "memory.max").read_text()) - used)
        free //= jax.local_device_count()
    return free if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.float64(free)).min())


def bytes_of(shapes) -> int:
    """Bytes on one device of arrays, or of shapes with types and places."""
    return sum(np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def compile_train(args: Args, model: WorldModel, mesh: Mesh, tasks: Tasks, source):
    """Compiles `train` for a source of these shapes, says what memory it takes and refuses what cannot fit.

    Returns the program and the shapes of the learning state, which is split over the devices if --shard-params says so
    or, by default, if copies of it would take more than half of each.
    """
    free = available_bytes()
    shard = args.shard_params == "yes"
    state = state_shapes(args, model, mesh, shard)
    if args.shard_params == "auto" and mesh.size > 1 and 2 * bytes_of(state) > free:
        state = state_shapes(args, model, mesh, True)
    parts = {
        "parameters": bytes_of((state.params, state.target_q)),
        "optimiser": bytes_of((state.model_opt, state.pi_opt)),
        "data": bytes_of(source) if isinstance(source, DeviceData) else 0,
    }
    program = None
    if sum(parts.values()) <= free:  # compiling takes its time
        places = jax.tree.map(lambda x: x.sharding, state)
        compute = jax.jit(train, static_argnums=(0, 1, 2), donate_argnums=4, out_shardings=(places, everywhere(mesh)))
        program = compute.lower(args, model, mesh, tasks, state, source).compile()
        parts["activations"] = program.memory_analysis().temp_size_in_bytes
    text = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    if jax.process_index() == 0:
        print(f"memory of each device: {text}; {free / 1e9:.2f} GB are free", flush=True)
    if program is None or sum(parts.values()) > free:
        ways = "a smaller --model-size or --batch-size, more devices, --shard-params yes or --storage disk"
        raise environments.UserError(f"{sum(parts.values()) / 1e9:.2f} GB do not fit into {free / 1e9:.2f} GB ({ways})")
    return program, state


def choose_storage(args: Args, data: environments.Dataset, mesh: Mesh) -> str:
    """--storage, or the fastest that the dataset fits into with room to spare."""
    if args.storage != "auto":
        return args.storage
    on_device = bytes_of(data_shapes(args, data, mesh))
    if jax.devices()[0].platform != "cpu" and on_device < 0.6 * available_bytes():
        return "device"
    host = np.array(zlib.crc32(socket.gethostname().encode()), np.uint32)
    neighbours = 1 if jax.process_count() == 1 else int((multihost_utils.process_allgather(host) == host).sum())
    return "host" if neighbours * data.nbytes < 0.4 * available_bytes() * jax.local_device_count() else "disk"


def sources(args: Args, data, mesh: Mesh, first: int):
    """Endlessly what `train` takes: batch after batch from number `first` on, or the same device memory each time."""
    if isinstance(data, DeviceData):
        while True:
            yield data
    share = args.batch_size // jax.process_count()
    rows = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    batches = data.batches(args.seed, args.batch_size, args.horizon, first, args.readers, rows)
    with contextlib.closing(batches):
        for batch in batches:
            yield jax.tree.map(on_devices, Batch(**batch), batch_shardings(mesh))


# --------------------------------------------------------------------------------------------------------- Checkpoints
def from_torch(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and target Qs from an original checkpoint's tensors, in either of its two layouts."""

    def mlp(names: list[list[str]]):  # per layer: weight [out, in], bias [, ln.weight, ln.bias]
        params = {}
        for i, layer in enumerate(names):
            weight, bias, *norm = (np.asarray(tensors[name], np.float32) for name in layer)
            params[f"linear_{i}"] = {"kernel": weight.swapaxes(-1, -2), "bias": bias}
            params |= {f"norm_{i}": {"scale": norm[0], "bias": norm[1]}} if norm else {}
        return {"params": jax.tree.map(jnp.asarray, params)}

    def layers(prefix: str):
        fields, names = ("weight", "bias", "ln.weight", "ln.bias"), []
        while f"{prefix}.{len(names)}.weight" in tensors:
            names.append([name for f in fields if (name := f"{prefix}.{len(names)}.{f}") in tensors])
        if not names:  # the layout released in 2023: one running number per tensor; the last layer has no norm
            names = [[f"{prefix}.{i}" for i in range(4 * layer, min(4 * layer + 4, 10))] for layer in range(3)]
        return mlp(names)

    if not {"_encoder.state.0.weight", "_pi.2.weight"} <= tensors.keys():
        other = ": it is one of pixels, for tdmpc2_jax_rgb.py" if "_encoder.rgb.2.weight" in tensors else ""
        raise environments.UserError(f"the .pt file holds no TD-MPC2 agent that sees states{other}")
    prefixes = {"encoder": "_encoder.state", "dynamics": "_dynamics", "reward": "_reward", "pi": "_pi"}
    prefixes |= {"q": "_Qs.params"} | ({"termination": "_termination"} if "_termination.0.weight" in tensors else {})
    target = "_target_Qs_params" if "_target_Qs_params.0.weight" in tensors else "_target_Qs.params"
    return {k: layers(prefix) for k, prefix in prefixes.items()}, layers(target)


def load_pt_agent(args: Args) -> tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]:
    """Tasks, parameters and target Qs of an original multi-task .pt file."""
    tensors = environments.load_pt(args.checkpoint).get("model", {})
    params, target_q = from_torch(tensors)
    table = tensors.get("_task_emb.weight")
    if table is None:
        raise environments.UserError(f"{args.checkpoint} is a single-task agent: it is for tdmpc2_jax.py")
    named = environments.set_tasks(task_set(args.tasks)) if args.tasks else ()
    tasks = environments.TASK_SETS.get(f"mt{len(table)}", named)
    if len(tasks) != len(table):
        raise environments.UserError(f"{args.checkpoint} knows {len(table)} tasks: name them all with --tasks")
    params.pop("termination", None)
    return tasks, params | {"task_emb": jnp.asarray(table, jnp.float32)}, target_q


def find_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint of a run folder or of its checkpoints/, or the checkpoint folder itself."""
    candidates = [path, *path.glob("*"), *path.glob("checkpoints/*")]
    complete = [p for p in candidates if p.name.isdigit() and (p / "meta" / "metadata").is_file()]
    if not complete:
        what = "holds no checkpoint of this script" if path.exists() else "does not exist"
        raise environments.UserError(f"{path} {what}")
    return max(complete, key=lambda p: int(p.name))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint that was written to its end (others have longer names)."""
    return any(path.name.isdigit() for path in folder.glob("checkpoints/*"))


SCRIPTS = ("tdmpc2_jax", "tdmpc2_jax_mt", "tdmpc2_jax_rgb")


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its script, arguments, tasks and counters."""
    what = "is damaged or not a checkpoint of tdmpc2_jax_mt.py"
    try:
        meta = json.loads((checkpoint / "meta" / "metadata").read_text())
        if meta["script"] == "tdmpc2_jax_mt":
            return meta | {"args": Args(**meta["args"]), "tasks": tuple(meta["tasks"])}
        if meta["script"] in SCRIPTS:
            what = f"is a checkpoint of {meta['script']}.py, not of this script"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise environments.UserError(f"{checkpoint} {what}")


def restore(checkpoint: Path, item: str, like):
    """One item of a checkpoint, in the structure and shapes of `like` (arrays, or their shapes and types)."""
    try:
        return ocp.StandardCheckpointer().restore(checkpoint.absolute() / item, like)
    except Exception as error:  # Orbax raises a different type for every way in which a file can be wrong
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise environments.UserError(f"{checkpoint} is damaged or of another size ({item}: {reason})") from error


def restore_multitask(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and target Qs of a checkpoint of tdmpc2_jax_mt.py, on one device, whatever devices have written it."""
    path, here = checkpoint.absolute() / "state", jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        there = ocp.PyTreeCheckpointHandler().metadata(path).tree
        there = {"params": there["params"], "target_q": there["target_q"]}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), there)
        options = {"restore_args": ocp.checkpoint_utils.construct_restore_args(like), "partial_restore": True}
        agent = ocp.PyTreeCheckpointer().restore(path, args=ocp.args.PyTreeRestore(like, **options))
        return agent["params"], agent["target_q"]
    except Exception as error:  # as above
        raise environments.UserError(f"{checkpoint} is damaged ({type(error).__name__})") from error


def check_shapes(args: Args, model: WorldModel, params) -> None:
    """Refuses parameters that are not those of this model, naming the first difference."""

    def shapes(tree):
        return {k: tuple(v.shape) for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}

    there = shapes(params)
    here = shapes(jax.eval_shape(lambda: init_params(args, model, jax.random.key(0))))
    wrong = [name for name in here | there if here.get(name) != there.get(name)]
    if wrong:
        sizes = f"{wrong[0]} is {there.get(wrong[0], 'missing')} there and {here.get(wrong[0], 'missing')} here"
        its = " ".join(f"--{name.replace('_', '-')} {size}" for name, size in sizes_of(params).items())
        raise environments.UserError(f"{args.checkpoint} does not fit these sizes and tasks: {sizes}; it has {its}")


def sizes_of(params: dict[str, Any]) -> dict[str, int]:
    """The six sizes of the model that these parameters are of."""
    encoder, dynamics = params["encoder"]["params"], params["dynamics"]["params"]
    return {
        "enc_dim": encoder["linear_0"]["bias"].shape[-1],
        "mlp_dim": dynamics["linear_0"]["bias"].shape[-1],
        "latent_dim": dynamics["linear_2"]["bias"].shape[-1],
        "num_enc_layers": sum(name.startswith("linear") for name in encoder),
        "num_q": params["q"]["params"]["linear_0"]["bias"].shape[0],
        "task_dim": params["task_emb"].shape[-1],
    }


def load_agent(args: Args) -> tuple[Args, tuple[str, ...], WorldModel, dict[str, Any], dict[str, Any]]:
    """The agent of args.checkpoint, of whichever kind it is: the arguments completed by its sizes, its tasks, networks,
    parameters and target Qs."""
    if args.checkpoint.endswith(".pt"):
        tasks, params, target_q = load_pt_agent(args)
    else:
        checkpoint = find_checkpoint(Path(args.checkpoint))
        meta = read_meta(checkpoint)
        tasks, (params, target_q) = meta["tasks"], restore_multitask(checkpoint)
    unsaid = {name: size for name, size in sizes_of(params).items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unsaid)
    model = make_model(args, tasks)
    check_shapes(args, model, params)
    return args, tasks, model, params, target_q


def fresh_state(args: Args, model: WorldModel) -> TrainState:
    """The learning state at the start of a run from scratch."""
    init_key, train_key = jax.random.split(jax.random.key(args.seed))
    params = init_params(args, model, init_key)
    return init_state(args, params, params["q"], train_key)


# ---------------------------------------------------------------------------------------------------------- Evaluation
class Evaluation(NamedTuple):
    """E episodes of each of T tasks."""

    tasks: tuple[str, ...]
    returns: np.ndarray  # [T, E]
    successes: np.ndarray  # [T, E], at the episodes' ends
    frames: list[np.ndarray]  # grids of the tasks' first episodes; none without --capture-video


def evaluate(
    args: Args, model: WorldModel, tasks: Tasks, params, names: tuple[str, ...], ids, envs, seed: int, stop=()
) -> Evaluation | None:
    """Acts without exploration noise in `envs`, some of each of the tasks `names`, whose ids in the model are `ids`;
    one batched call plans for all episodes that still run. None if a signal in `stop` came in the middle."""
    n, each = envs.num_envs, envs.num_envs // len(names)
    obs, _ = envs.reset(seed=seed)
    task_ids, running, key = np.repeat(ids, each), np.arange(n), jax.random.key(seed)
    prev_mean, first = jnp.zeros((n, args.horizon, model.action_dim)), np.ones(n, bool)
    action, returns, successes = np.zeros((n, model.action_dim), np.float32), np.zeros(n), np.zeros(n)
    frames = [grid(envs.render())] if args.capture_video else []
    while len(running):
        if stop:
            return None
        acted, prev_mean, key = act(
            args, model, tasks, params, obs[running], task_ids[running], prev_mean, first, key, explore=False
        )
        action[running] = acted
        obs, reward, terminated, truncated, info = envs.step(action)
        if args.capture_video:
            frames.append(grid(envs.render()))
        returns[running] += reward[running]
        successes[running] = info["success"][running]
        goes_on = ~(terminated | truncated)[running]
        if not goes_on.all():  # tasks of another domain have longer episodes
            running, prev_mean = running[goes_on], prev_mean[goes_on]
        first = np.zeros(len(running), bool)
    return Evaluation(names, returns.reshape(-1, each), successes.reshape(-1, each), frames)


def grid(pictures: tuple[np.ndarray | None, ...], width: int = 768) -> np.ndarray:
    """The pictures that there are, small ones side by side in rows, uint8 [height, width, 3]."""
    pictures = [picture for picture in pictures if picture is not None]
    columns = int(np.ceil(np.sqrt(len(pictures))))
    step = -(-columns * pictures[0].shape[1] // width)
    pictures = [picture[::step, ::step] for picture in pictures]
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % columns)
    return np.concatenate([np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)])


def summary(result: Evaluation) -> dict[str, Any]:
    """Per task its returns and score, per domain the mean, and the normalised score: the mean over tasks of a tenth of
    the return (DMControl: up to 1000) or of the success rate in percent (domains that know success)."""
    tasks, domains = {}, {}
    for task, returns, successes in zip(*result[:3], strict=True):
        spec = environments.task_spec(task)
        score = 100 * successes.mean() if spec.success else returns.mean() / 10
        tasks[task] = {"returns": returns.tolist(), "successes": successes.tolist(), "mean": returns.mean()}
        tasks[task] |= {"std": returns.std(), "success_rate": successes.mean() if spec.success else None}
        tasks[task] |= {"score": score, "domain": spec.domain}
        domains.setdefault(spec.domain, []).append(successes.mean() if spec.success else returns.mean())
    means = {domain: {"mean": np.mean(values), "tasks": len(values)} for domain, values in domains.items()}
    return {"normalized_score": np.mean([row["score"] for row in tasks.values()]), "domains": means, "tasks": tasks}


def headline(results: dict[str, Any]) -> str:
    """The normalised score and the domains' means in one line."""
    words = {True: "success rate {:.2f}", False: "return {:.1f}"}
    means = [
        f"{domain} {words[environments.DOMAINS[domain].success].format(row['mean'])}"
        for domain, row in results["domains"].items()
    ]
    return f"normalized score {results['normalized_score']:.1f} ({', '.join(means)})"


def write_video(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """Writes uint8 frames [height, width, 3] as an MP4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = frames[0].shape
    raw = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -"
    even = "-pix_fmt yuv420p -vf pad=ceil(iw/2)*2:ceil(ih/2)*2"  # as H.264 wants heights and widths
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-y", *raw.split(), *even.split(), str(path)]
    ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # Ctrl-C is not for it
    with contextlib.suppress(BrokenPipeError), ffmpeg:
        for frame in frames:
            ffmpeg.stdin.write(frame.tobytes())
    if ffmpeg.returncode:
        raise RuntimeError(f"ffmpeg could not write {path}")


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints the table of tasks, the domains' means and the normalised score; writes them to --json."""
    if not args.checkpoint.endswith(".pt"):  # what made the agent comes from its run, but for what the user says now
        recorded = read_meta(find_checkpoint(Path(args.checkpoint)))["args"]
        names = [f.name for f in dataclasses.fields(Args)]
        names = ["mpc", *names[names.index("model_size") :]]
        unsaid = [name for name in names if getattr(args, name) == getattr(Args(), name)]
        args = dataclasses.replace(args, **{name: getattr(recorded, name) for name in unsaid})
    args, known, model, params, _ = load_agent(args)
    names = environments.set_tasks(task_set(args.tasks)) if args.tasks else known
    for name in names:
        if name not in known:
            raise environments.UserError(f"{args.checkpoint} was not trained on {name}")
    ids = np.array([known.index(name) for name in names])
    envs = make_eval_envs(args, names, known)
    try:
        result = evaluate(args, model, make_tasks(args, known), params, names, ids, envs, args.seed)
    finally:
        envs.close()
    results = summary(result)
    print(f"{'task':<32}{'return':>9}{'± std':>9}{'success':>9}{'score':>8}")
    for name, row in results["tasks"].items():
        rate = "" if row["success_rate"] is None else f"{row['success_rate']:.2f}"
        print(f"{name:<32}{row['mean']:>9.1f}{row['std']:>9.1f}{rate:>9}{row['score']:>8.1f}")
    print(f"{headline(results)} over {len(names)} task(s), {result.returns.shape[1]} episode(s) each")
    if result.frames:
        write_video(run_folder(args, names) / "videos" / "evaluate.mp4", result.frames, 25)
    if args.json:
        results |= {"checkpoint": args.checkpoint, "mpc": args.mpc, "seed": args.seed}
        write_atomically(Path(args.json), json.dumps(results, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------- Run
def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content, so that a crash leaves the old or the new one whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def render_mode(args: Args) -> str | None:
    return "rgb_array" if args.capture_video else None


def task_set(tasks: str | None) -> str | list[str]:
    """--tasks as `environments.load_dataset` wants it."""
    tasks = tasks or "mt30"
    return tasks if tasks in environments.TASK_SETS or re.fullmatch(r"mt\d+", tasks) else tasks.split(",")


def make_eval_envs(args: Args, names: tuple[str, ...], known: tuple[str, ...]):
    """--eval-episodes environments of each of the tasks `names`, in the sizes of all tasks that the model knows."""
    sizes = environments.set_sizes(known)
    return environments.make_envs(names, args.eval_episodes, args.seed, render_mode=render_mode(args), sizes=sizes)


def run_folder(args: Args, tasks: tuple[str, ...]) -> Path:
    known = [name for name, known in environments.TASK_SETS.items() if known == tasks]
    crc = zlib.crc32(",".join(tasks).encode())
    name = known[0] if known else "+".join(tasks) if len(tasks) <= 4 else f"{tasks[0]}+{len(tasks) - 1}-{crc:08x}"
    return Path(args.runs_dir, name, args.exp_name, str(args.seed))


def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    tasks = environments.set_tasks(task_set(args.tasks))
    sized = with_model_size(args, tasks)
    cluster = (args.coordinator, args.num_processes, args.process_id)
    rules = [
        (min(args.batch_size, args.horizon, args.iterations, args.eval_episodes, args.readers) >= 1,
         "--batch-size, --horizon, --iterations, --eval-episodes and --readers must be at least 1"),
        (min(args.num_updates, args.eval_freq, args.checkpoint_freq, args.log_freq) >= 1,
         "--num-updates, --eval-freq, --checkpoint-freq and --log-freq must be at least 1"),
        (".." not in Path(args.exp_name).parts and not Path(args.exp_name).is_absolute(),
         "--exp-name must be a name, or a path below the task's folder"),
        (0 <= args.seed < 2**31, "--seed must lie in 0 .. 2^31 - 1"),
        (args.num_pi_trajs < args.num_samples, "--num-pi-trajs must be smaller than --num-samples"),
        (1 <= args.num_elites <= args.num_samples, "--num-elites must lie in 1 .. --num-samples"),
        (sized.latent_dim % args.simnorm_dim == 0, "--latent-dim must be a multiple of --simnorm-dim"),
        (sized.num_q >= 2, "--num-q must be at least 2: the targets need two value heads"),
        (args.num_bins >= 2 and args.vmin < args.vmax, "--num-bins must be at least 2 and --vmin below --vmax"),
        (0 <= args.dropout < 1, "--dropout must lie in 0 .. 1"),
        (args.evaluate or args.data_dir, "training needs the dataset's folder: --data-dir"),
        (not args.evaluate or args.checkpoint, "--evaluate needs --checkpoint"),
        (not args.json or args.evaluate, "--json goes with --evaluate"),
        (not args.json or Path(args.json).absolute().parent.is_dir(), f"the folder of {args.json} does not exist"),
        (not args.track or importlib.util.find_spec("wandb"), "--track needs Weights & Biases: pip install wandb"),
        (args.distributed or cluster == (None, None, None),
         "--coordinator, --num-processes and --process-id go with --distributed"),
        (None not in cluster or cluster == (None, None, None),
         "--coordinator, --num-processes and --process-id go together"),
        (not (args.evaluate and args.distributed), "--evaluate runs in one process: leave out --distributed"),
    ]  # fmt: skip
    for holds, sentence in rules:
        if not holds:
            raise environments.UserError(sentence)
    for task in tasks if args.capture_video else ():
        environments.check_rendering(task)
    resumed = args.resume and has_checkpoint(run_folder(args, tasks))
    if args.checkpoint and not args.checkpoint.endswith(".pt") and not resumed:
        read_meta(find_checkpoint(Path(args.checkpoint)))


def as_flag(name: str, value) -> str:
    """An argument as it is said on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"without --{flag}" if value is None else f"--{flag} {value}"


# what may differ when a run is resumed
FREE_TO_CHANGE = {"resume", "runs_dir", "num_updates", "checkpoint_freq", "log_freq", "eval_freq", "eval_episodes"}
FREE_TO_CHANGE |= {"track", "wandb_project_name", "wandb_entity", "capture_video", "data_dir", "storage", "readers"}
FREE_TO_CHANGE |= {"tasks", "shard_params", "distributed", "coordinator", "num_processes", "process_id"}


def open_run(args: Args, folder: Path):
    """Creates or reopens a run's folder. Returns the lock on it: an open file, held until the process ends, however."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise environments.UserError(
            f"{folder} is in use by a live run; choose another --exp-name or --seed"
        ) from error
    if (folder / "eval.csv").exists():
        if not args.resume:
            raise environments.UserError(
                f"{folder} holds a run; continue it with --resume, or choose another --exp-name or --seed"
            )
        before = json.loads((folder / "args.json").read_text())
        changed = [k for k, v in dataclasses.asdict(args).items() if k not in FREE_TO_CHANGE and before.get(k) != v]
        if changed:
            flags = ", ".join(as_flag(k, before.get(k)) for k in changed)
            raise environments.UserError(f"--resume continues a run as it was started: {flags}")
    return lock


EVAL_COLUMNS = ["step", "task", "reward", "success", "seed"]


def trim_curve(path: Path, step: int) -> None:
    """Drops the rows of eval.csv beyond `step`: a resumed run measures them again."""
    rows = list(csv.reader(path.open())) if path.exists() else []
    rows = [row for row in rows[1:] if len(row) == len(EVAL_COLUMNS) and int(row[0]) <= step]
    write_atomically(path, "".join(",".join(row) + "\n" for row in [EVAL_COLUMNS, *rows]))


@contextlib.contextmanager
def catch_signals():
    """Lists the SIGINTs and SIGTERMs that come, so that the loop can end in order; a second one ends it at once."""
    received: list[int] = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


def check_finite(step: int, folder: Path, **values) -> None:
    """Stops the run when a number that it lives on is no longer one."""
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    if bad:
        kept = "its last checkpoint is kept" if has_checkpoint(folder) else "no checkpoint was written yet"
        raise environments.UserError(f"{bad[0]} is not finite at update {step}: {folder} stops here; {kept}")


def save(manager, args: Args, names: tuple[str, ...], count: dict, state: TrainState) -> None:
    """Writes a checkpoint: complete or not at all, and the one before it goes only when it is complete."""
    meta = {
        "script": "tdmpc2_jax_mt",
        "args": dataclasses.asdict(args),
        "count": count,
        "tasks": names,
    }  # all sizes set
    items = {"meta": ocp.args.JsonSave(meta), "state": ocp.args.StandardSave(state)}
    manager.save(count["updates"], args=ocp.args.Composite(**items), force=True)


def start_writer(args: Args, folder: Path, step: int) -> SummaryWriter:
    """TensorBoard, and with --track Weights & Biases, which copies what TensorBoard gets. On resuming at `step`, points
    beyond it are dropped."""
    if args.track:
        import wandb

        name = "__".join(folder.parts[-3:])
        run_id = re.sub(r"[^\w-]", "-", f"{name}-{folder.stat().st_ino}")  # the same again when the run is resumed
        settings = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": name, "id": run_id}
        wandb.init(**settings, config=dataclasses.asdict(args), resume="allow", sync_tensorboard=True, dir=str(folder))
    writer = SummaryWriter(str(folder))
    events = writer.file_writer.event_writer
    events.add_event = events._ev_writer.write_event  # not by way of its queue, which flush and close do not wait for
    purge = Event(session_log=SessionLog(status=SessionLog.START))
    writer.file_writer.add_event(purge, step + 1 if step else 0)
    rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", step)
    return writer


def progress_bar(args: Args, names, model: WorldModel, state: TrainState, data, storage, folder, step: int) -> tqdm:
    """Says what runs, prints the head of the table of evaluations, and opens a bar (only on a terminal)."""
    size, devices = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6, jax.devices()
    where = {"disk": "on disk", "host": "in memory", "device": "in device memory"}[storage]
    print(f"{len(names)} task(s): {model.obs_dim} observations, {model.action_dim} actions, ", end="")
    print(f"{size:.1f}M parameters; {data.num_episodes} episodes, {data.nbytes / 1e9:.2f} GB, {where}; ", end="")
    print(f"on {len(devices)} x {devices[0].device_kind}; from update {step}, in {folder}")
    if step >= args.num_updates:
        print("all updates are made: a larger --num-updates goes on")
    print(f"{'update':>10} {'minutes':>8}  result", flush=True)
    return tqdm(total=args.num_updates, initial=step, unit=" updates", mininterval=1, disable=None)


def record_evaluation(args: Args, folder, writer, bar, step: int, seconds: float, result: Evaluation) -> None:
    """Adds an evaluation to the table, to eval.csv and to the trackers; its video to the folder and the trackers."""
    results = summary(result)
    bar.write(f"{step:>10} {seconds / 60:>8.1f}  {headline(results)}")
    sys.stdout.flush()
    with (folder / "eval.csv").open("a") as file:
        for task, returns, successes in zip(*result[:3], strict=True):
            row = [step, task, returns.mean(), successes.mean(), args.seed]
            csv.writer(file, lineterminator="\n").writerow(row)
            writer.add_scalar(f"eval/score/{task}", results["tasks"][task]["score"], step)
    writer.add_scalar("eval/normalized_score", results["normalized_score"], step)
    for domain, row in results["domains"].items():
        writer.add_scalar(f"eval/mean/{domain}", row["mean"], step)
    if result.frames:
        path = folder / "videos" / f"step-{step:09d}.mp4"
        write_video(path, result.frames, 25)
        thumbnails = np.stack(result.frames[::8])[:, ::2, ::2]  # TensorBoard shows videos as GIFs, which are large
        gif = imageio.imwrite("<bytes>", thumbnails, extension=".gif", duration=250, loop=0)
        image = Summary.Image(height=thumbnails.shape[1], width=thumbnails.shape[2], encoded_image_string=gif)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="eval/video", image=image)]), step)
        if args.track:
            import wandb

            wandb.log({"eval/episode": wandb.Video(str(path))})
    writer.flush()


def crossed(step: int, last: int, freq: int) -> bool:
    """Whether a multiple of freq lies in (last, step]."""
    return step // freq > last // freq


def start_or_resume(args: Args, model: WorldModel, folder: Path, shapes: TrainState, agent):
    """Learning state, placed as `shapes` says, and counters of the run's last checkpoint; if there is none, fresh ones,
    with the parameters and target Qs of `agent` if that is not None."""
    if has_checkpoint(folder):
        checkpoint = find_checkpoint(folder)
        return restore(checkpoint, "state", shapes), read_meta(checkpoint)["count"]
    places = jax.tree.map(lambda x: x.sharding, shapes)
    if agent:
        key = jax.random.split(jax.random.key(args.seed))[1]
        agent = jax.tree.map(np.asarray, agent)  # of no device, so that it can go to any
        state = jax.jit(lambda params, target_q: init_state(args, params, target_q, key), out_shardings=places)(*agent)
    else:
        state = jax.jit(partial(fresh_state, args, model), out_shardings=places)()
    return state, {"updates": 0, "evaluated": 0, "seconds": 0.0}


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes must ask at the same time."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


def agree(prepare):
    """What prepare() returns in this process. If it raises a UserError in any process, it ends all of them: that one
    with its sentence, the others with another."""
    result, problem = None, None
    try:
        result = prepare()
    except environments.UserError as error:
        problem = error
    if any_process(problem is not None):
        raise problem or environments.UserError("another process could not start")
    return result


def local_copy(params, mesh: Mesh):
    """The parameters whole on this process's first device; all processes must ask at the same time."""
    if not all(x.is_fully_replicated for x in jax.tree.leaves(params)):
        params = jax.jit(lambda x: x, out_shardings=everywhere(mesh))(params)
    return jax.tree.map(lambda x: x.addressable_data(0), params)


def prepare(args: Args, names: tuple[str, ...], stack: contextlib.ExitStack):
    """Opens what may be refused: the dataset, the run's folder, the agent to start from. Returns the arguments with the
    sizes of the agent that goes on learning, the dataset, and the parameters and target Qs of --checkpoint."""
    data = environments.load_dataset(task_set(args.tasks), args.data_dir)
    data.window_table(args.horizon)
    if args.batch_size % jax.device_count():
        devices = f"{jax.device_count()} devices"
        raise environments.UserError(f"--batch-size {args.batch_size} cannot be split over {devices} evenly")
    folder = run_folder(args, names)
    if jax.process_index() == 0:
        stack.enter_context(open_run(args, folder))
    its_args, agent = with_model_size(args, names), None
    if has_checkpoint(folder):
        its_args = read_meta(find_checkpoint(folder))["args"]
    elif args.checkpoint:
        its_args, its_tasks, _, *agent = load_agent(args)
        if its_tasks != names:
            raise environments.UserError(f"{args.checkpoint} knows other tasks than --tasks names, or in another order")
    return dataclasses.replace(args, **{name: getattr(its_args, name) for name in SIZE_FIELDS}), data, agent


def run(args: Args) -> None:
    """Trains one agent: learns from batch after batch, and keeps the run's files. With --distributed, process 0 does
    what is not computation on all devices: it evaluates and writes; the others wait."""
    names, said = environments.set_tasks(task_set(args.tasks)), dataclasses.asdict(args)
    folder, primary, mesh = run_folder(args, names), jax.process_index() == 0, Mesh(np.array(jax.devices()), "devices")
    with contextlib.ExitStack() as stack:
        args, data, agent = agree(lambda: prepare(args, names, stack))
        model, tasks = make_model(args, names), on_devices(make_tasks(args, names), everywhere(mesh))
        storage = choose_storage(args, data, mesh)
        agree(data.check_files if storage != "disk" else lambda: None)  # what is read whole can be checked
        source_shapes = data_shapes(args, data, mesh) if storage == "device" else batch_shapes(args, model, mesh)
        program, shapes = compile_train(args, model, mesh, tasks, source_shapes)
        if envs := agree(lambda: make_eval_envs(args, names, names) if primary else None):
            stack.enter_context(contextlib.closing(envs))

        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)
        state, count = start_or_resume(args, model, folder, shapes, agent)
        held = {"disk": lambda: data, "host": data.to_host, "device": lambda: to_devices(args, data, mesh)}
        held, agent, step = agree(held[storage]), None, count["updates"]
        batches = stack.enter_context(contextlib.closing(sources(args, held, mesh, step)))
        if primary:
            write_atomically(folder / "args.json", json.dumps(said, indent=2))
            trim_curve(folder / "eval.csv", count["evaluated"])  # from here on the folder holds a run
            writer = stack.enter_context(contextlib.closing(start_writer(args, folder, step)))
            bar = stack.enter_context(progress_bar(args, names, model, state, data, storage, folder, step))
        stop = stack.enter_context(catch_signals())
        in_flight, info, stopping, saved, logged = deque(), {}, False, step, step
        clock, tick = time.time() - count["seconds"], time.time()

        while True:
            finished = step >= args.num_updates
            count |= {"updates": step, "seconds": time.time() - clock}
            if crossed(step, count["evaluated"], args.eval_freq) or (finished and count["evaluated"] != step):
                params, result = local_copy(state.params, mesh), None
                if primary:
                    here = jax.tree.map(lambda x: x.addressable_data(0), tasks)
                    eval_seed, ids = args.seed + 1_000_000 + step, np.arange(len(names))
                    result = evaluate(args, model, here, params, names, ids, envs, eval_seed, stop)
                    if result is not None:
                        record_evaluation(args, folder, writer, bar, step, count["seconds"], result)
                stopping = any_process(primary and result is None)  # in the middle of it
                count["evaluated"] = count["evaluated"] if stopping else step
                params, tick, logged = None, time.time(), step
            if jax.process_count() == 1 or step % 20 == 0 or finished:  # to ask takes longer than a small update
                stopping = stopping or any_process(stop)
            if crossed(step, saved, args.checkpoint_freq) or (finished or stopping) and saved != step:
                check_finite(step, folder, **jax.device_get(info))
                if primary:
                    writer.flush()  # first: a checkpoint must not be ahead of the curves
                save(manager, args, names, count, state)
                saved = step
            if finished or stopping:
                break

            # Learn: dispatched here and computed while the next batch is fetched, at most eight updates behind
            state, info = program(tasks, state, next(batches))
            in_flight.append(info["total_loss"])
            if len(in_flight) > 8:
                jax.block_until_ready(in_flight.popleft())
            step += 1

            # Log
            if primary:
                bar.update()
            if crossed(step, logged, args.log_freq):
                values = jax.device_get(info)
                check_finite(step, folder, **values)
                if primary:
                    writer.add_scalar("charts/updates_per_second", (step - logged) / (time.time() - tick), step)
                    for name, value in values.items():
                        writer.add_scalar(f"losses/{name}", value, step)
                    writer.flush()  # for those who watch
                logged, tick = step, time.time()
    if stopping:
        number = stop[0] if stop else signal.SIGTERM  # if it came to another process, it may have been another signal
        if primary:
            name = signal.Signals(number).name
            print(f"stopped by {name} at update {step}; --resume continues the run", file=sys.stderr)
        sys.exit(128 + number)


def start_distributed(args: Args) -> None:
    """Joins the other processes, as SLURM or the arguments describe them."""
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM before we do
    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        ways = "start it under SLURM, or give --coordinator, --num-processes and --process-id"
        raise environments.UserError(f"--distributed: {reason} ({ways})") from error


def main(args: Args) -> None:
    try:
        check_args(args)
        if args.distributed:
            start_distributed(args)
        evaluate_checkpoint(args) if args.evaluate else run(args)
    except environments.UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # during start-up, or a second one
        way_on = "" if args.evaluate else "; --resume goes on from the last complete checkpoint, if there is one"
        print(f"interrupted{way_on}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
