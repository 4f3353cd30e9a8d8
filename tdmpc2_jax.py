"""TD-MPC2 in one file: a latent world model, a policy and values learned together, and MPPI planning on top of them.

Paper: Hansen, Su, Wang, "TD-MPC2: Scalable, Robust World Models for Continuous Control" (arXiv 2310.16828).
Online reinforcement learning on one task with state observations. Shapes are written in the paper's letters:
H horizon, B batch, N samples of the planner, P policy sequences, A action size, O observation size, Z latent size,
K bins of the discrete regression, n environments, q an ensemble of value heads.

    python tdmpc2_jax.py --task dm_control/dog-run-v0                       # train; a killed run goes on with --resume
    python tdmpc2_jax.py --evaluate --checkpoint runs/walker-walk/tdmpc2_jax/1
    python tdmpc2_jax.py --task walker-run --checkpoint mt30-5M.pt --source-task walker-walk            # fine-tune
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
import subprocess
import sys
import time
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
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

import envs as environments


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"
    """task to learn: a short name (python envs.py lists them) or any Gymnasium id with a Box action space"""
    exp_name: str = "tdmpc2_jax"
    """name of this experiment: its files go to RUNS_DIR/TASK/EXP_NAME/SEED"""
    runs_dir: str = "runs"
    """folder of all runs"""
    seed: int = 1
    """seed of the parameters, the environments and every random draw"""
    total_timesteps: int = 4_000_000
    """length of the run in simulator steps (decisions x action repeat), the axis of the paper's curves"""
    num_envs: int = 1
    """environments stepped side by side; one batched plan acts in all of them"""
    utd: float = 1.0
    """gradient updates per decision of one environment"""
    resume: bool = False
    """continue the run of this task, name and seed from its last checkpoint (start it if there is none)"""
    checkpoint_freq: int = 100_000
    """simulator steps between checkpoints (one more is written at the end, on SIGTERM and on Ctrl-C)"""
    log_freq: int = 2_000
    """simulator steps between two points of the loss curves"""
    save_episodes: str | None = None
    """also write the training episodes to SAVE_EPISODES/TASK, at every checkpoint: a dataset for tdmpc2_jax_mt.py"""
    track: bool = False
    """also send everything to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "tdmpc2-jax"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    # Evaluation
    eval_freq: int = 100_000
    """simulator steps between evaluations (one more at step 0 and at the end)"""
    eval_episodes: int = 10
    """episodes of an evaluation, run side by side"""
    capture_video: bool = False
    """write one MP4 of every evaluation to the run folder and the trackers (needs a GL library)"""
    evaluate: bool = False
    """do not train: evaluate --checkpoint, print the returns and exit"""
    checkpoint: str | None = None
    """start from these parameters: a run folder (of tdmpc2_jax_mt.py, too), a checkpoint folder, or an original .pt"""
    source_task: str | None = None
    """task whose embedding is folded in, if --checkpoint is a multi-task agent"""
    json: str | None = None
    """with --evaluate: write the results to this file"""
    mpc: bool = True
    """act by planning; --no-mpc acts with the policy alone"""

    # Model
    model_size: Literal[1, 5, 19, 48, 317] = 5
    """millions of parameters: sets the five sizes below where they are not given"""
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
    episodic: bool = True
    """learn a termination head where the environment can terminate; --no-episodic plans as if it could not"""
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
    batch_size: int = 256
    """windows per update B"""
    buffer_size: int = 1_000_000
    """decisions that the replay holds"""
    seed_steps: int | None = None
    """random decisions before the first update, and updates made then at once; default max(1000, 5 episodes)"""
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
    termination_coef: float = 1.0
    """weight of the termination loss"""
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
SIZE_FIELDS = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q")


def with_model_size(args: Args) -> Args:
    """Fills in the five sizes that were not given from the table of model sizes."""
    sizes = dict(zip(SIZE_FIELDS, MODEL_SIZES[args.model_size], strict=True))
    return dataclasses.replace(args, **{k: v for k, v in sizes.items() if getattr(args, k) is None})


def discount_of(args: Args, episode_length: int) -> float:
    """Discount for episodes of this many decisions: a fifth of the episode is the time scale (appendix)."""
    scale = episode_length / args.discount_denom
    return float(np.clip((scale - 1) / scale, args.discount_min, args.discount_max))


# ------------------------------------------------------------------------------------------------------------ Maths
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


# --------------------------------------------------------------------------------------------------------- Networks
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

    encoder: MLP  # h(s) -> z
    dynamics: MLP  # d(z, a) -> z'
    reward: MLP  # R(z, a) -> K logits
    pi: MLP  # p(z) -> mean and log std of A actions
    q: MLP  # Q(z, a) -> K logits: one head; the ensemble is the same module over stacked parameters
    termination: MLP | None  # logit of the probability that the episode ended on reaching z
    num_q: int
    obs_dim: int
    action_dim: int


def make_model(args: Args, obs_dim: int, action_dim: int, episodic: bool) -> WorldModel:
    """The networks for O = obs_dim and A = action_dim; with a termination head if episodic."""
    args = with_model_size(args)
    mlp = partial(MLP, (args.mlp_dim, args.mlp_dim), dtype=args.compute_dtype)
    enc_hidden = (args.enc_dim,) * max(args.num_enc_layers - 1, 1)
    return WorldModel(
        encoder=MLP(enc_hidden, args.latent_dim, args.simnorm_dim, dtype=args.compute_dtype),
        dynamics=mlp(args.latent_dim, args.simnorm_dim),
        reward=mlp(args.num_bins, zero_init=True),
        pi=mlp(2 * action_dim),
        q=mlp(args.num_bins, zero_init=True),
        termination=mlp(1) if episodic else None,
        num_q=args.num_q,
        obs_dim=obs_dim,
        action_dim=action_dim,
    )


def init_params(args: Args, model: WorldModel, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, one entry per component; those of `q` are stacked along a leading axis [num_q]."""
    z, a = jnp.zeros(with_model_size(args).latent_dim), jnp.zeros(model.action_dim)
    keys = jax.random.split(key, 6)
    params = {
        "encoder": model.encoder.init(keys[0], jnp.zeros(model.obs_dim)),
        "dynamics": model.dynamics.init(keys[1], z, a),
        "reward": model.reward.init(keys[2], z, a),
        "pi": model.pi.init(keys[3], z),
        "q": jax.vmap(lambda k: model.q.init(k, z, a))(jax.random.split(keys[4], model.num_q)),
    }
    if model.termination:
        params["termination"] = model.termination.init(keys[5], z)
    return params


# ------------------------------------------------------------------------------------------------------ World model
class Policy(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise
    log_std: jax.Array  # [..., A]
    entropy: jax.Array  # [...] -log pi(action)
    scaled_entropy: jax.Array  # [...] the entropy that the policy's loss rewards


def policy(args: Args, model: WorldModel, pi_params, z: jax.Array, eps: jax.Array) -> Policy:
    """Policy prior p(z), a squashed Gaussian: z [..., Z] and standard normal eps [..., A] -> sample and statistics."""
    mean, log_std = jnp.split(model.pi.apply(pi_params, z), 2, axis=-1)
    log_std = args.log_std_min + 0.5 * (args.log_std_max - args.log_std_min) * (jnp.tanh(log_std) + 1)
    action = jnp.tanh(mean + eps * jnp.exp(log_std))
    log_gauss = (-0.5 * eps**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
    log_pi = log_gauss - jnp.log(jax.nn.relu(1 - action**2) + 1e-6).sum(-1)
    entropy_scale = model.action_dim * log_gauss / (log_pi + 1e-8)
    return Policy(action, jnp.tanh(mean), log_std, -log_pi, -log_pi * entropy_scale)


def q_logits(model: WorldModel, q_params, z: jax.Array, action: jax.Array, dropout=None) -> jax.Array:
    """All heads in q_params: z [..., Z], action [..., A] -> [q, ..., K]; dropout [q, ..., mlp_dim] or None."""
    if dropout is None:
        return jax.vmap(lambda p: model.q.apply(p, z, action))(q_params)
    return jax.vmap(lambda p, d: model.q.apply(p, z, action, dropout=d))(q_params, dropout)


def pick_heads(q_params, heads: jax.Array):
    """Parameters of the value heads with these indices only: where two Qs are needed, two are computed."""
    return jax.tree.map(lambda p: p[heads], q_params)


def dropout_mask(args: Args, key: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """Inverted dropout as a factor, from 16 random bits a unit (half the cost of the usual 32)."""
    if args.dropout == 0:
        return None
    drop = jax.random.bits(key, shape, "uint16") < round(args.dropout * 2**16)
    return jnp.where(drop, 0.0, 1 / (1 - args.dropout))


# --------------------------------------------------------------------------------------------------------- Planning
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


def estimate_value(args: Args, model: WorldModel, params, z, actions, discount, heads, eps) -> jax.Array:
    """Value [N] of action sequences [H, N, A] from z [1, Z]: rewards over the horizon, then the mean of two Qs."""
    value, alive = 0.0, 1.0  # alive: 0 behind a predicted termination
    for t in range(args.horizon):
        reward = two_hot_inv(args, model.reward.apply(params["reward"], z, actions[t]))
        value = value + discount**t * alive * reward
        z = model.dynamics.apply(params["dynamics"], z, actions[t])
        if model.termination:
            alive = alive * (model.termination.apply(params["termination"], z)[..., 0] <= 0)
    action = policy(args, model, params["pi"], z, eps).action
    q = two_hot_inv(args, q_logits(model, pick_heads(params["q"], heads), z, action)).mean(0)
    return jnp.nan_to_num(value + discount**args.horizon * alive * q, nan=0.0)


def plan(
    args: Args, model: WorldModel, params, obs, prev_mean, first, discount, noise: PlanNoise, explore: bool
) -> tuple[jax.Array, jax.Array]:
    """Model predictive path integral control (MPPI) in n environments at once.

    obs [n, O]; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the start of an episode;
    discount, a scalar; explore adds noise to the action. Returns actions [n, A] in [-1, 1] and the new means [n, H, A].
    """
    n, H, A = len(obs), args.horizon, model.action_dim
    chex.assert_shape([obs, prev_mean, first], [(n, model.obs_dim), (n, H, A), (n,)])

    def plan_one(env):
        obs, prev_mean, first, draws = env
        z = model.encoder.apply(params["encoder"], obs)[None]  # [1, Z]
        pi_actions, pi_z = [], z
        for t in range(H):
            pi_actions.append(policy(args, model, params["pi"], pi_z, draws.pi[t]).action)
            pi_z = model.dynamics.apply(params["dynamics"], pi_z, pi_actions[-1]) if t < H - 1 else None
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(carry, draw):
            mean, std = carry
            sampled = jnp.clip(mean[:, None] + std[:, None] * draw.sample, -1, 1)
            actions = jnp.concatenate([pi_actions, sampled], axis=1)  # [H, N, A]
            values = estimate_value(args, model, params, z, actions, discount, draw.heads, draw.terminal)
            elite_values, elite_indices = jax.lax.top_k(values, args.num_elites)
            elites = actions[:, elite_indices]  # [H, E, A]
            weights = jax.nn.softmax(args.temperature * elite_values)  # [E]
            mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), args.min_std, args.max_std)
            return (mean, std), (elites[0], weights)

        mean = jnp.where(first, 0.0, jnp.roll(prev_mean, -1, axis=0).at[-1].set(0.0))
        scanned = PlanNoise(None, draws.sample, draws.terminal, noise.heads, None, None)
        start = (mean, jnp.full((H, A), args.max_std))
        (mean, std), (first_actions, weights) = jax.lax.scan(iterate, start, scanned)
        chosen = jnp.argmax(jnp.log(weights[-1]) + draws.gumbel)
        action = first_actions[-1, chosen]  # [A]
        action = action + std[0] * draws.explore if explore else action
        return jnp.clip(action, -1, 1), mean

    envs = (obs, prev_mean, first, noise._replace(heads=None))
    at_once = envs_at_once(args, model)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


@partial(jax.jit, static_argnames=("args", "model", "explore"))
def act(args: Args, model: WorldModel, params, obs, prev_mean, first, discount, key, explore: bool):
    """Actions [n, A] for obs [n, O] by planning, or by the policy alone with --no-mpc; see `plan`. Returns the actions,
    the planner's means and the key for the next call."""
    key, noise_key = jax.random.split(key)
    if args.mpc:
        noise = plan_noise(args, model, noise_key, len(obs))
        action, prev_mean = plan(args, model, params, obs, prev_mean, first, discount, noise, explore)
    else:
        eps = jax.random.normal(noise_key, (len(obs), model.action_dim))
        sample = policy(args, model, params["pi"], model.encoder.apply(params["encoder"], obs), eps)
        action = sample.action if explore else sample.mean
    return action, prev_mean, key


# --------------------------------------------------------------------------------------------------------- Learning
class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict[str, Any]  # encoder, dynamics, reward, pi, q, and termination if the task is episodic
    target_q: dict[str, Any]  # slow copy of params["q"]
    model_opt: optax.OptState  # of everything but the policy
    pi_opt: optax.OptState
    q_scale: jax.Array  # running 5-95% range of the values, by which the policy's loss is divided
    key: jax.Array
    updates: jax.Array  # number of updates made


class Batch(NamedTuple):
    """Windows of H+1 consecutive entries: actions and rewards lead from one observation to the next."""

    obs: jax.Array  # [H+1, B, O]
    action: jax.Array  # [H, B, A]
    reward: jax.Array  # [H, B]
    terminated: jax.Array  # [H, B]


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
    return TrainState(
        params, target_q, model_opt, pi_tx.init(params["pi"]), jnp.ones(()), key, jnp.zeros((), jnp.int32)
    )


def td_target(args: Args, model: WorldModel, state: TrainState, next_z, batch: Batch, discount, noise) -> jax.Array:
    """TD targets [H, B]: r + discount * (1 - terminated) * min of two random target Qs at the policy's next action."""
    next_action = policy(args, model, state.params["pi"], next_z, noise.next_action).action
    q = two_hot_inv(args, q_logits(model, pick_heads(state.target_q, noise.target_heads), next_z, next_action))
    return batch.reward + discount * (1 - batch.terminated) * q.min(0)


def model_loss(args: Args, model: WorldModel, params, batch: Batch, next_z, target, noise):
    """World-model objective (eq. 3) on latent rollouts from the windows' first observations. Returns the total loss,
    and the rollouts [H+1, B, Z] and the parts of the loss."""
    rho = args.rho ** jnp.arange(args.horizon)  # [H]
    zs = [model.encoder.apply(params["encoder"], batch.obs[0])]
    for t in range(args.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward_logits = model.reward.apply(params["reward"], zs[:-1], batch.action)  # [H, B, K]
    value_logits = q_logits(model, params["q"], zs[:-1], batch.action, noise.dropout)  # [q, H, B, K]
    losses = {
        "consistency_loss": (rho * ((zs[1:] - next_z) ** 2).mean((1, 2))).mean(),
        "reward_loss": (rho * soft_ce(args, reward_logits, batch.reward).mean(1)).mean(),
        "value_loss": (rho * soft_ce(args, value_logits, target).mean(2)).mean(),
        "termination_loss": jnp.zeros(()),
    }
    if model.termination:
        logits = model.termination.apply(params["termination"], zs[1:])[..., 0]  # [H, B]
        losses["termination_loss"] = optax.sigmoid_binary_cross_entropy(logits, batch.terminated).mean()
    total = sum(getattr(args, name.replace("loss", "coef")) * loss for name, loss in losses.items())
    return total, (zs, losses | {"total_loss": total})


def policy_loss(args: Args, model: WorldModel, pi_params, q_params, zs, q_scale, noise):
    """Policy objective (eq. 4) on latent states zs [H+1, B, Z]. Returns the loss, and the new Q scale and entropies."""
    pi = policy(args, model, pi_params, zs, noise.pi_action)
    logits = q_logits(model, pick_heads(q_params, noise.pi_heads), zs, pi.action, noise.pi_dropout)
    q = two_hot_inv(args, logits).mean(0)  # [H+1, B]
    low, high = jnp.percentile(jax.lax.stop_gradient(q[0]), jnp.array([5.0, 95.0]))
    q_scale = q_scale + args.tau * (jnp.maximum(high - low, 1.0) - q_scale)
    rho = args.rho ** jnp.arange(args.horizon + 1)
    loss = -(rho * (args.entropy_coef * pi.scaled_entropy + q / q_scale).mean(1)).mean()
    info = {"pi_entropy": pi.entropy.mean(), "pi_scaled_entropy": pi.scaled_entropy.mean(), "pi_scale": q_scale}
    return loss, (q_scale, info | {"pi_loss": loss})


def update(args: Args, model: WorldModel, state: TrainState, batch: Batch, discount, noise: UpdateNoise):
    """One gradient step on the world model, then one on the policy, then one of the target values.

    discount is a scalar. Returns the new state and a dict of scalars for the log.
    """
    H, B = args.horizon, len(batch.obs[0])
    shapes = [(H + 1, B, model.obs_dim), (H, B, model.action_dim), (H, B), (H, B)]
    chex.assert_shape(list(batch), shapes)
    model_tx, pi_tx = optimizers(args)

    next_z = model.encoder.apply(state.params["encoder"], batch.obs[1:])  # [H, B, Z]
    target = td_target(args, model, state, next_z, batch, discount, noise)  # [H, B]
    model_params = {k: v for k, v in state.params.items() if k != "pi"}
    loss = partial(model_loss, args, model, batch=batch, next_z=next_z, target=target, noise=noise)
    grads, (zs, info) = jax.grad(loss, has_aux=True)(model_params)
    updates, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, updates)

    loss = partial(policy_loss, args, model, q_params=model_params["q"], zs=zs, q_scale=state.q_scale, noise=noise)
    pi_grads, (q_scale, pi_info) = jax.grad(loss, has_aux=True)(state.params["pi"])
    updates, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(state.params["pi"], updates)

    target_q = optax.incremental_update(model_params["q"], state.target_q, args.tau)
    info |= pi_info | {"grad_norm": optax.tree.norm(grads), "pi_grad_norm": optax.tree.norm(pi_grads)}
    params = model_params | {"pi": pi_params}
    return TrainState(params, target_q, model_opt, pi_opt, q_scale, state.key, state.updates + 1), info


# ----------------------------------------------------------------------------------------------------------- Replay
class Replay(NamedTuple):
    """Ring of the last C steps of n environments, on the device. Entry i of an environment holds an observation, the
    action that led to it and what it brought; `first` marks a reset, whose action and reward are filler.

    A window of H+1 entries may start at any entry that has H more behind it and no reset among those. `starts` is a
    queue of all such entries in order of time, so that a uniform draw from it is a uniform draw of windows.
    """

    obs: jax.Array  # [C, n, O]
    action: jax.Array  # [C, n, A]
    reward: jax.Array  # [C, n]
    terminated: jax.Array  # [C, n]
    first: jax.Array  # [C, n]
    is_start: jax.Array  # [C, n] the entry is in the queue
    starts: jax.Array  # [C * n] ring of flat indices row * n + environment
    head: jax.Array  # position of the oldest start in the ring
    size: jax.Array  # number of starts
    rows: jax.Array  # number of steps ever written


def init_replay(capacity: int, num_envs: int, obs_dim: int, action_dim: int) -> Replay:
    """Empty replay of `capacity` steps of each environment."""
    C, n, zero = capacity, num_envs, partial(jnp.zeros, (), jnp.int32)
    obs, action, reward = jnp.zeros((C, n, obs_dim)), jnp.zeros((C, n, action_dim)), jnp.zeros((C, n))
    flags = [jnp.zeros((C, n), bool) for _ in range(3)]
    return Replay(obs, action, reward, *flags, jnp.zeros(C * n, jnp.int32), zero(), zero(), zero())


@partial(jax.jit, static_argnames=("horizon",), donate_argnames=("replay",))
def add(replay: Replay, horizon: int, obs, action, reward, terminated, first) -> Replay:
    """Writes one step of all environments (obs [n, O], action [n, A], the rest [n]) over the oldest one."""
    C, n = replay.first.shape
    row = replay.rows % C
    expired = replay.is_start[row].sum()  # starts in the row that is overwritten: they are the oldest of the queue
    head, size = (replay.head + expired) % (C * n), replay.size - expired
    entry = {"obs": obs, "action": action, "reward": reward, "terminated": terminated, "first": first}
    written = {k: getattr(replay, k).at[row].set(v) for k, v in entry.items()}

    start = (replay.rows - horizon) % C  # the windows that this step completes start here
    after_start = (start + 1 + jnp.arange(horizon)) % C
    valid = ~written["first"][after_start].any(0) & (replay.rows >= horizon)  # [n]
    slots = jnp.where(valid, (head + size + jnp.cumsum(valid) - 1) % (C * n), C * n)  # C * n: dropped
    starts = replay.starts.at[slots].set(start * n + jnp.arange(n), mode="drop")
    is_start = replay.is_start.at[row].set(False).at[start].set(valid)
    return Replay(**written, is_start=is_start, starts=starts, head=head, size=size + valid.sum(), rows=replay.rows + 1)


def sample(replay: Replay, key: jax.Array, batch_size: int, horizon: int) -> Batch:
    """Windows drawn uniformly from all valid ones, with replacement."""
    C, n = replay.first.shape
    drawn = replay.starts[(replay.head + jax.random.randint(key, (batch_size,), 0, replay.size)) % (C * n)]
    rows = (drawn // n + jnp.arange(horizon + 1)[:, None]) % C  # [H+1, B]
    env = drawn % n
    terminated = replay.terminated[rows[1:], env].astype(jnp.float32)
    return Batch(replay.obs[rows, env], replay.action[rows[1:], env], replay.reward[rows[1:], env], terminated)


@partial(jax.jit, static_argnames=("args", "model", "num_updates"), donate_argnames=("state",))
def train(args: Args, model: WorldModel, state: TrainState, replay: Replay, discount, num_updates: int):
    """`num_updates` updates on fresh samples in one dispatch. Returns the new state and the means of their scalars."""

    def one(state, _):
        key, sample_key, noise_key = jax.random.split(state.key, 3)
        batch = sample(replay, sample_key, args.batch_size, args.horizon)
        return update(args, model, state._replace(key=key), batch, discount, update_noise(args, model, noise_key))

    state, infos = jax.lax.scan(one, state, None, length=num_updates)
    return state, jax.tree.map(jnp.mean, infos)


# ------------------------------------------------------------------------------------------------------ Checkpoints
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


def fold_task(params: dict[str, Any], emb: np.ndarray, obs_dim: int, action_dim: int) -> dict[str, Any]:
    """Turns a multi-task agent's parameters (with or without `q_target`) into those of one task, exactly.

    emb [task_dim] is the task's embedding, a constant input: it moves into the first layers' biases. Observations and
    actions beyond the task's own sizes were always zero there: their inputs and outputs go. Inputs are obs|e, z|e|a.
    """
    emb = jnp.asarray(emb / max(1.0, np.linalg.norm(emb)))  # rows of the table have at most unit norm when read
    E, Z = len(emb), params["dynamics"]["params"]["linear_2"]["bias"].shape[-1]

    def fold(name, component):
        layers = dict(component["params"])
        kernel, bias = layers["linear_0"]["kernel"], layers["linear_0"]["bias"]
        before = kernel.shape[-2] - E if name == "encoder" else Z
        keep = [kernel[..., : obs_dim if name == "encoder" else Z, :], kernel[..., before + E :, :]]
        if name in ("dynamics", "reward", "q", "q_target"):
            keep[1] = keep[1][..., :action_dim, :]
        bias = bias + jnp.einsum("e,...eo->...o", emb, kernel[..., before : before + E, :])
        layers["linear_0"] = {"kernel": jnp.concatenate(keep, axis=-2), "bias": bias}
        if name == "pi":
            half = layers["linear_2"]["bias"].shape[-1] // 2
            outputs = np.r_[:action_dim, half : half + action_dim]  # means, log stds
            layers["linear_2"] = jax.tree.map(lambda p: p[..., outputs], layers["linear_2"])
        return {"params": layers}

    return {name: fold(name, component) for name, component in params.items()}


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
    """What a checkpoint of this script or of tdmpc2_jax_mt.py says of itself: its script, arguments, sizes, tasks and
    counters."""
    what = "is damaged or not a checkpoint of tdmpc2_jax.py"
    try:
        meta = json.loads((checkpoint / "meta" / "metadata").read_text())
        if meta["script"] == "tdmpc2_jax":
            return meta | {"args": Args(**meta["args"])}
        if meta["script"] == "tdmpc2_jax_mt":
            shared = {k: v for k, v in meta["args"].items() if k in {field.name for field in dataclasses.fields(Args)}}
            return meta | {"args": Args(**shared)}
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


def on_device(shapes, device):
    """Shapes and types as `jax.eval_shape` gives them, of arrays on this device: what `restore` fills there, whatever
    device has written it."""
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def check_shapes(args: Args, model: WorldModel, params) -> None:
    """Refuses parameters that are not those of this model, naming the first difference and the size that would fit."""

    def shapes(tree):
        return {k: tuple(v.shape) for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}

    there = shapes(params)
    here = shapes(jax.eval_shape(lambda: init_params(args, model, jax.random.key(0))))
    wrong = [name for name in here | there if here.get(name) != there.get(name)]
    if not wrong:
        return
    layers = "encoder/params/linear_0/bias", "reward/params/linear_0/bias", "dynamics/params/linear_2/bias"
    widths = tuple(there[name][-1] for name in layers if name in there)  # enc_dim, mlp_dim, latent_dim
    hint = [f"; it looks like --model-size {size}" for size, row in MODEL_SIZES.items() if row[:3] == widths]
    sizes = f"{wrong[0]} is {there.get(wrong[0], 'missing')} there and {here.get(wrong[0], 'missing')} here"
    what = f"{args.checkpoint} does not fit --model-size {args.model_size} on this task: {sizes}"
    raise environments.UserError("".join([what, *hint]))


def load_agent(args: Args, model: WorldModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and target Qs of args.checkpoint, of whichever kind it is; those of a multi-task agent are folded to
    args.source_task."""
    table = None  # of the multi-task agent's embeddings [T, E]
    if args.checkpoint.endswith(".pt"):
        tensors = environments.load_pt(args.checkpoint).get("model", {})
        params, target_q = from_torch(tensors)
        if (table := tensors.get("_task_emb.weight")) is not None:
            tasks, known = environments.TASK_SETS.get(f"mt{len(table)}", ()), f"the tasks of mt{len(table)}"
    else:
        checkpoint = find_checkpoint(Path(args.checkpoint))
        meta = read_meta(checkpoint)
        if meta["script"] == "tdmpc2_jax_mt":
            params, target_q = restore_multitask(checkpoint)
            table, tasks, known = params.pop("task_emb"), tuple(meta["tasks"]), ", ".join(meta["tasks"])
        else:
            its_model = make_model(meta["args"], meta["obs_dim"], meta["action_dim"], meta["episodic"])
            like = on_device(jax.eval_shape(partial(fresh_state, meta["args"], its_model)), jax.devices()[0])
            params, target_q = (train_state := restore(checkpoint, "state", like)["train"]).params, train_state.target_q
    if (table is None) != (args.source_task is None):
        want = "is a single-task agent: leave out" if table is None else "is a multi-task agent: name its task with"
        raise environments.UserError(f"{args.checkpoint} {want} --source-task")
    if table is not None:
        source = environments.task_spec(args.source_task).name
        if source not in tasks:
            raise environments.UserError(f"{args.checkpoint} was not trained on {source}: it knows {known}")
        inputs, outputs = params["encoder"]["params"]["linear_0"]["kernel"], params["pi"]["params"]["linear_2"]["bias"]
        there = inputs.shape[0] - table.shape[1], outputs.shape[0] // 2
        if there[0] < model.obs_dim or there[1] < model.action_dim:
            sizes = "it knows {} observations and {} actions, the task has {} and {}"
            sizes = sizes.format(*there, model.obs_dim, model.action_dim)
            raise environments.UserError(f"{args.checkpoint} does not fit this task: {sizes}")
        emb = np.asarray(table[tasks.index(source)], np.float32)
        params = fold_task(params | {"q_target": target_q}, emb, model.obs_dim, model.action_dim)
        target_q = params.pop("q_target")
    if args.checkpoint.endswith(".pt") and model.termination is None:
        params.pop("termination", None)
    check_shapes(args, model, params)
    return params, target_q


def fresh_state(args: Args, model: WorldModel) -> dict[str, Any]:
    """The part of a checkpoint that learns and draws: the learning state, and the key of the acting."""
    init_key, train_key, act_key = jax.random.split(jax.random.key(args.seed), 3)
    params = init_params(args, model, init_key)
    return {"train": init_state(args, params, params["q"], train_key), "act_key": act_key}


# ------------------------------------------------------------------------------------------------------- Evaluation
class Evaluation(NamedTuple):
    """One episode in each of E environments."""

    returns: np.ndarray  # [E]
    successes: np.ndarray  # [E], at the episodes' ends
    frames: list[np.ndarray]  # of the first environment; none without --capture-video
    fps: int  # frames per second of simulated time


def evaluate(args: Args, model: WorldModel, params, discount, envs, seed: int, stop=()) -> Evaluation | None:
    """Acts without exploration noise; None if a signal in `stop` came in the middle."""
    obs, _ = envs.reset(seed=seed)
    prev_mean, key = jnp.zeros((envs.num_envs, args.horizon, model.action_dim)), jax.random.key(seed)
    prev_mean, key = jax.device_put((prev_mean, key), jax.devices()[0])  # as they come out of act: it compiles once
    first, running = np.ones(envs.num_envs, bool), np.ones(envs.num_envs, bool)
    returns, successes = np.zeros(envs.num_envs), np.zeros(envs.num_envs)
    frames = [envs.render()[0]] if args.capture_video else []
    while running.any():
        if stop:
            return None
        action, prev_mean, key = act(args, model, params, obs, prev_mean, first, discount, key, explore=False)
        obs, reward, terminated, truncated, info = envs.step(np.asarray(action))
        if args.capture_video and running[0]:
            frames.append(envs.render()[0])
        returns += reward * running
        successes = np.where(running, info["success"], successes)
        running &= ~(terminated | truncated)
        first = np.zeros(envs.num_envs, bool)
    return Evaluation(returns, successes, frames, envs.metadata.get("render_fps", 25))


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
    """--evaluate: prints every episode's return and their mean, and writes them to --json."""
    if args.source_task and args.task == Args().task:
        args = dataclasses.replace(args, task=args.source_task)
    if not args.checkpoint.endswith(".pt"):  # what made the agent comes from its run, but for what the user says now
        recorded = read_meta(find_checkpoint(Path(args.checkpoint)))["args"]
        names = [f.name for f in dataclasses.fields(Args)]
        names = ["task", "mpc", *names[names.index("model_size") :]]
        unsaid = [name for name in names if getattr(args, name) == getattr(Args(), name)]
        args = dataclasses.replace(args, **{name: getattr(recorded, name) for name in unsaid})
    spec = environments.task_spec(args.task)
    envs = environments.make_envs(args.task, args.eval_episodes, args.seed, render_mode=render_mode(args))
    try:
        model = model_for(args, envs, spec)
        params, _ = load_agent(args, model)
        discount = discount_of(args, spec.episode_length)
        returns, successes, frames, fps = evaluate(args, model, params, discount, envs, args.seed)
    finally:
        envs.close()
    for i, (episode_return, success) in enumerate(zip(returns, successes, strict=True)):
        print(f"episode {i:3d}  return {episode_return:8.2f}" + (f"  success {success:.0f}" if spec.success else ""))
    rate = f"success rate {successes.mean():.2f}, " if spec.success else ""
    print(f"{spec.name}: {rate}return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")
    if frames:
        write_video(run_folder(args, spec) / "videos" / "evaluate.mp4", frames, fps)
    if args.json:
        results = {"task": spec.name, "checkpoint": args.checkpoint, "mpc": args.mpc, "seed": args.seed}
        results |= {"returns": returns.tolist(), "successes": successes.tolist()}
        results |= {"mean": returns.mean(), "std": returns.std()}
        results["success_rate"] = successes.mean() if spec.success else None
        write_atomically(Path(args.json), json.dumps(results, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------------- Run
def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content, so that a crash leaves the old or the new one whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def render_mode(args: Args) -> str | None:
    return "rgb_array" if args.capture_video else None


def model_for(args: Args, envs, spec) -> WorldModel:
    """The model that fits these vectorised environments."""
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    return make_model(args, obs_dim, action_dim, args.episodic and spec.can_terminate)


def run_folder(args: Args, spec) -> Path:
    return Path(args.runs_dir, spec.name.replace("/", "_"), args.exp_name, str(args.seed))


def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    sized = with_model_size(args)
    spec = environments.task_spec(args.task)
    seed_steps = seed_steps_of(args, spec)
    rules = [
        (min(args.num_envs, args.batch_size, args.horizon, args.iterations, args.eval_episodes) >= 1,
         "--num-envs, --batch-size, --horizon, --iterations and --eval-episodes must be at least 1"),
        (min(args.total_timesteps, args.eval_freq, args.checkpoint_freq, args.log_freq) >= 1,
         "--total-timesteps, --eval-freq, --checkpoint-freq and --log-freq must be at least 1"),
        (".." not in Path(args.exp_name).parts and not Path(args.exp_name).is_absolute(),
         "--exp-name must be a name, or a path below the task's folder"),
        (0 <= args.seed < 2**31, "--seed must lie in 0 .. 2^31 - 1"),
        (args.utd > 0, "--utd must be positive"),
        (args.num_pi_trajs < args.num_samples, "--num-pi-trajs must be smaller than --num-samples"),
        (1 <= args.num_elites <= args.num_samples, "--num-elites must lie in 1 .. --num-samples"),
        (sized.latent_dim % args.simnorm_dim == 0, "--latent-dim must be a multiple of --simnorm-dim"),
        (sized.num_q >= 2, "--num-q must be at least 2: the targets need two value heads"),
        (args.num_bins >= 2 and args.vmin < args.vmax, "--num-bins must be at least 2 and --vmin below --vmax"),
        (0 <= args.dropout < 1, "--dropout must lie in 0 .. 1"),
        (args.buffer_size >= seed_steps + (args.horizon + 1) * args.num_envs,
         f"--buffer-size {args.buffer_size} does not hold the {seed_steps} seed steps and a window per environment"),
        (seed_steps > args.horizon * args.num_envs, "--seed-steps must fill more than one window per environment"),
        (not args.evaluate or args.checkpoint, "--evaluate needs --checkpoint"),
        (not args.json or args.evaluate, "--json goes with --evaluate"),
        (not args.json or Path(args.json).absolute().parent.is_dir(), f"the folder of {args.json} does not exist"),
        (not args.source_task or args.checkpoint, "--source-task goes with --checkpoint"),
        (not args.track or importlib.util.find_spec("wandb"), "--track needs Weights & Biases: pip install wandb"),
    ]  # fmt: skip
    for holds, sentence in rules:
        if not holds:
            raise environments.UserError(sentence)
    if args.capture_video:
        environments.check_rendering(args.task)
    if args.save_episodes:
        environments.set_tasks([args.task])
    if args.checkpoint and not args.checkpoint.endswith(".pt"):
        read_meta(find_checkpoint(Path(args.checkpoint)))


def seed_steps_of(args: Args, spec) -> int:
    """Random decisions before the first update."""
    return max(1000, 5 * spec.episode_length) if args.seed_steps is None else args.seed_steps


def as_flag(name: str, value) -> str:
    """An argument as it is said on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"without --{flag}" if value is None else f"--{flag} {value}"


# what may differ when a run is resumed
FREE_TO_CHANGE = {"resume", "runs_dir", "total_timesteps", "checkpoint_freq", "log_freq", "eval_freq", "eval_episodes"}
FREE_TO_CHANGE |= {"track", "wandb_project_name", "wandb_entity", "capture_video", "save_episodes"}


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


EVAL_COLUMNS = ["step", "reward", "success", "seed"]


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
        raise environments.UserError(f"{bad[0]} is not finite at simulator step {step}: {folder} stops here; {kept}")


def save(manager, args: Args, model: WorldModel, step: int, count: dict, state, replay: Replay) -> None:
    """Writes a checkpoint: complete or not at all, and the one before it goes only when it is complete."""
    meta = {"script": "tdmpc2_jax", "args": dataclasses.asdict(args), "count": count}
    meta |= {"obs_dim": model.obs_dim, "action_dim": model.action_dim, "episodic": model.termination is not None}
    items = {"state": ocp.args.StandardSave(state), "replay": ocp.args.StandardSave(replay)}
    manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items), force=True)


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


def progress_bar(args: Args, spec, model: WorldModel, state: TrainState, folder: Path, step: int) -> tqdm:
    """Says what runs, prints the head of the table of evaluations, and opens a bar (only on a terminal)."""
    size = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
    print(f"{spec.name}: {model.obs_dim} observations, {model.action_dim} actions, {size:.1f}M parameters, ", end="")
    print(f"{args.num_envs} environment(s), on {jax.devices()[0].device_kind}; from simulator step {step}, in {folder}")
    if step >= args.total_timesteps:
        print("all steps are made: a larger --total-timesteps goes on")
    print(f"{'step':>10} {'success ' * spec.success}{'return':>9} {'± std':>8} {'minutes':>8}", flush=True)
    total, done = -(-args.total_timesteps // spec.action_repeat), step // spec.action_repeat
    return tqdm(total=total, initial=done, unit=" decisions", mininterval=1, disable=None)


def record_evaluation(args: Args, spec, folder, writer, bar, step: int, seconds: float, result: Evaluation) -> None:
    """Adds an evaluation to the table, to eval.csv and to the trackers; its video to the folder and the trackers."""
    returns, successes, frames, fps = result
    rate = f"{successes.mean():>7.2f} " if spec.success else ""
    bar.write(f"{step:>10} {rate}{returns.mean():>9.1f} {returns.std():>8.1f} {seconds / 60:>8.1f}")
    sys.stdout.flush()
    with (folder / "eval.csv").open("a") as file:
        csv.writer(file, lineterminator="\n").writerow([step, returns.mean(), successes.mean(), args.seed])
    writer.add_scalar("eval/episodic_return", returns.mean(), step)
    writer.add_scalar("eval/episodic_return_std", returns.std(), step)
    writer.add_scalar("eval/success_rate", successes.mean(), step)
    if frames:
        path = folder / "videos" / f"step-{step:09d}.mp4"
        write_video(path, frames, fps)
        thumbnails = np.stack(frames)[::4, ::3, ::3]  # TensorBoard shows videos as GIFs, which are large
        gif = imageio.imwrite("<bytes>", thumbnails, extension=".gif", duration=125, loop=0)
        image = Summary.Image(height=thumbnails.shape[1], width=thumbnails.shape[2], encoded_image_string=gif)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="eval/video", image=image)]), step)
        if args.track:
            import wandb

            wandb.log({"eval/episode": wandb.Video(str(path))})
    writer.flush()


def crossed(step: int, last: int, freq: int) -> bool:
    """Whether a multiple of freq lies in (last, step]."""
    return step // freq > last // freq


def updates_due(args: Args, seed_steps: int, count: dict) -> int:
    """Updates that the decisions so far call for and that were not made: seed_steps at once, then utd per decision."""
    ready = count["decisions"] >= seed_steps
    return int(seed_steps + (count["decisions"] - seed_steps) * args.utd) - count["updates"] if ready else 0


def start_or_resume(args: Args, model: WorldModel, folder: Path) -> tuple[dict[str, Any], Replay, dict[str, Any]]:
    """Learning state, replay and counters of the run's last checkpoint; if there is none, fresh ones, with the
    parameters of --checkpoint if that is given."""
    device, sizes = jax.devices()[0], (args.num_envs, model.obs_dim, model.action_dim)
    new_replay = partial(init_replay, args.buffer_size // args.num_envs, *sizes)
    if has_checkpoint(folder):
        checkpoint = find_checkpoint(folder)
        state = restore(checkpoint, "state", on_device(jax.eval_shape(partial(fresh_state, args, model)), device))
        replay = restore(checkpoint, "replay", on_device(jax.eval_shape(new_replay), device))
        return state, replay, read_meta(checkpoint)["count"]
    state = jax.jit(fresh_state, static_argnums=(0, 1))(args, model)
    if args.checkpoint:
        params, target_q = load_agent(args, model)
        state["train"] = init_state(args, params, target_q, state["train"].key)
    state, replay = jax.device_put((state, new_replay()), device)  # placed as they are restored: it compiles once
    return state, replay, {"decisions": 0, "updates": 0, "evaluated": -1, "seconds": 0.0}


def run(args: Args) -> None:
    """Trains one agent: acts, learns, and keeps the run's files."""
    spec = environments.task_spec(args.task)
    folder, n = run_folder(args, spec), args.num_envs
    discount, seed_steps = discount_of(args, spec.episode_length), seed_steps_of(args, spec)
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_run(args, folder))
        envs = stack.enter_context(contextlib.closing(environments.make_envs(args.task, n, args.seed)))
        eval_envs = environments.make_envs(args.task, args.eval_episodes, args.seed, render_mode=render_mode(args))
        stack.enter_context(contextlib.closing(eval_envs))
        model = model_for(args, envs, spec)

        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)
        state, replay, count = start_or_resume(args, model, folder)
        train_state, act_key = state["train"], state["act_key"]
        step = logged = saved = count["decisions"] * spec.action_repeat
        write_atomically(folder / "args.json", json.dumps(dataclasses.asdict(args), indent=2))
        trim_curve(folder / "eval.csv", count["evaluated"])  # from here on the folder holds a run
        writer = stack.enter_context(contextlib.closing(start_writer(args, folder, step)))
        bar = stack.enter_context(progress_bar(args, spec, model, train_state, folder, step))
        stop = stack.enter_context(catch_signals())

        obs, _ = envs.reset(seed=args.seed + step)  # a resumed run begins new episodes, not the first ones again
        first, done, returns, lengths = np.ones(n, bool), np.zeros(n, bool), np.zeros(n), np.zeros(n, int)
        filler = np.zeros((n, model.action_dim), np.float32), np.zeros(n, np.float32), np.zeros(n, bool)
        replay = add(replay, args.horizon, obs, *filler, first)
        episodes = environments.EpisodeWriter(args.save_episodes, args.task, n) if args.save_episodes else None
        if episodes:
            episodes.add(obs, *filler[:2], first)
        prev_mean, info = jax.device_put(jnp.zeros((n, args.horizon, model.action_dim)), jax.devices()[0]), {}
        burst = max(1, int(args.utd * n))  # updates per dispatch
        clock, tick = time.time() - count["seconds"], time.time()

        while True:
            finished = step >= args.total_timesteps
            count["seconds"] = time.time() - clock
            if crossed(step, count["evaluated"], args.eval_freq) or (finished and count["evaluated"] != step):
                eval_seed = args.seed + 1_000_000 + step
                result = evaluate(args, model, train_state.params, discount, eval_envs, eval_seed, stop)
                if result is not None:
                    record_evaluation(args, spec, folder, writer, bar, step, count["seconds"], result)
                    count["evaluated"] = step
            if crossed(step, saved, args.checkpoint_freq) or (finished or stop) and saved != step:
                check_finite(step, folder, **jax.device_get(info))
                writer.flush()  # first: a checkpoint must not be ahead of the curves
                if episodes:
                    episodes.flush()
                save(manager, args, model, step, count, {"train": train_state, "act_key": act_key}, replay)
                saved = step
            if finished or stop:
                break

            learnable = count["updates"] > 0 or replay.size > 0  # no window yet if all episodes were shorter

            # Act, at random at first
            if count["decisions"] < seed_steps and not args.checkpoint:
                act_key, key = jax.random.split(act_key)
                action = jax.random.uniform(key, (n, model.action_dim), minval=-1, maxval=1)
            else:
                action, prev_mean, act_key = act(
                    args, model, train_state.params, obs, prev_mean, first, discount, act_key, explore=True
                )
            action = np.asarray(action)  # the only place where the loop waits for the device

            # Learn: dispatched here, computed while the environments step
            while learnable and (due := updates_due(args, seed_steps, count)) >= burst and not stop:
                check_finite(step, folder, **jax.device_get(info))  # of the burst before, which is complete by now
                train_state, info = train(args, model, train_state, replay, discount, num_updates=burst)
                count["updates"] += burst
                if due > 2 * burst:  # after the seed phase
                    bar.set_postfix_str(f"{due - burst} updates to go")

            # Step; an environment whose episode is over is reset by this step and ignores the action
            check_finite(step, folder, action=action)
            obs, reward, terminated, truncated, _ = envs.step(action)
            check_finite(step, folder, reward=reward, observation=obs)
            first, done = done, terminated | truncated
            replay = add(replay, args.horizon, obs, action, reward.astype(np.float32), terminated, first)
            if episodes:
                episodes.add(obs, action, reward, first)
            count["decisions"] += n - int(first.sum())
            step = count["decisions"] * spec.action_repeat

            # Log
            bar.update(count["decisions"] - bar.n)
            returns, lengths = np.where(first, 0, returns + reward), np.where(first, 0, lengths + 1)
            for i in np.flatnonzero(done):
                writer.add_scalar("charts/episodic_return", returns[i], step)
                writer.add_scalar("charts/episodic_length", lengths[i], step)
                bar.set_postfix_str(f"return {returns[i]:.1f}", refresh=False)
            if crossed(step, logged, args.log_freq):
                writer.add_scalar("charts/SPS", (step - logged) / (time.time() - tick), step)
                for name, value in jax.device_get(info).items():
                    writer.add_scalar(f"losses/{name}", value, step)
                writer.flush()  # for those who watch
                logged, tick = step, time.time()
    if stop:
        name = signal.Signals(stop[0]).name
        print(f"stopped by {name} at simulator step {step}; --resume continues the run", file=sys.stderr)
        sys.exit(128 + stop[0])


def main(args: Args) -> None:
    try:
        check_args(args)
        evaluate_checkpoint(args) if args.evaluate else run(args)
    except environments.UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # during start-up, or a second one
        way_on = "" if args.evaluate else "; --resume goes on from the last complete checkpoint, if there is one"
        print(f"interrupted{way_on}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
