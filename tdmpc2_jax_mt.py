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
    python tdmpc2_jax_mt.py --data-dir data/mt30 --model-size 1 --teacher mt30-317M.pt         # distil a large agent
"""

import contextlib
import dataclasses
import signal
from collections import deque
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tdmpc2_support.run.runs import Run

import envs as environments
from tdmpc2_support import cli, devices
from tdmpc2_support.agents.pretrained import (
    Agent,
    check_shapes,
    load_multitask,
    load_teacher,
    sizes_of,
    write_quantized,
)
from tdmpc2_support.agents.quantized import Visited, compare, print_comparison
from tdmpc2_support.cli import Count, Fraction, Name, Natural, NewFile, Number, Positive, Several, Share, Weight
from tdmpc2_support.data.device_data import DeviceData, choose_storage, data_shapes, describe, to_devices
from tdmpc2_support.devices import bytes_of, global_arrays, least_available_bytes, local_replica, replicated, split
from tdmpc2_support.run.checkpoints import checksums
from tdmpc2_support.run.reports import SetEvaluation, evaluating, grid, record_scores, report_scores


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args:
    tasks: str | None = None  # mt30, mt80, or names with commas in the dataset's order (default: mt30, or all known)
    data_dir: str | None = None  # folder of the original's chunk_0.pt, chunk_1.pt, ..., or of --save-episodes

    # World model
    model_size: Literal[1, 5, 19, 48, 317] = 5  # millions of parameters: sets what of the next six is not given
    enc_dim: Count | None = None  # width of the encoder's hidden layers
    mlp_dim: Count | None = None  # width of all other hidden layers
    latent_dim: Count | None = None  # latent size Z
    num_enc_layers: Count | None = None  # layers of the encoder
    num_q: Several | None = None  # value heads
    task_dim: Count | None = None  # size E of the task embedding
    num_bins: Several = 101  # bins K of the discrete regression of rewards and values
    vmin: Number = -10.0  # lowest bin, in symlog space
    vmax: Number = 10.0  # highest bin, in symlog space
    simnorm_dim: Count = 8  # size of the groups in which SimNorm takes softmaxes
    dropout: Fraction = 0.01  # dropout after the first layer of every value head
    log_std_min: Number = -10.0  # lower bound of the policy's log standard deviation
    log_std_max: Number = 2.0  # upper bound of the policy's log standard deviation
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (on GPUs float32 means TF32)

    # Learning
    batch_size: Count = 1024  # windows per update B
    lr: Positive = 3e-4  # learning rate
    enc_lr_scale: Weight = 0.3  # the encoder's learning rate is this share of lr
    grad_clip_norm: Positive = 20.0  # bound on the global gradient norm, of the model and of the policy each
    tau: Share = 0.01  # step of the target values and of the Q scale
    rho: Share = 0.5  # weight of a loss t steps into the window is rho^t
    consistency_coef: Weight = 20.0  # weight of the latent consistency loss
    reward_coef: Weight = 0.1  # weight of the reward loss
    value_coef: Weight = 0.1  # weight of the value loss
    entropy_coef: Weight = 1e-4  # weight of the policy's entropy
    teacher: str | None = None  # learn rewards from this agent of the same tasks, too: given like --checkpoint
    distill_coef: Weight = 0.45  # weight of the distance to the teacher's rewards
    discount_denom: Positive = 5.0  # episode length L gives the discount (L/denom - 1) / (L/denom), within the next two
    discount_min: Share = 0.95  # lowest discount
    discount_max: Share = 0.995  # highest discount

    # Planning
    mpc: bool = True  # act by planning; --no-mpc acts with the policy alone
    horizon: Count = 3  # steps H of a plan and of a training window
    iterations: Count = 6  # iterations of MPPI (two more for 20 or more action dimensions)
    num_samples: Count = 512  # action sequences N per iteration
    num_elites: Count = 64  # sequences that the next distribution is fitted to
    num_pi_trajs: Natural = 24  # sequences P proposed by the policy
    min_std: Weight = 0.05  # lower bound of the planner's standard deviation
    max_std: Positive = 2.0  # initial value and upper bound of the planner's standard deviation
    temperature: Weight = 0.5  # inverse temperature of the elites' weights

    # Run
    exp_name: Name = "tdmpc2_jax_mt"  # name of this experiment: its files go to RUNS_DIR/TASKS/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the batches and every random draw
    num_updates: Count = 10_000_000  # length of the run in gradient updates
    resume: bool = False  # continue the run of these tasks, name and seed from its last checkpoint, if it has one
    checkpoint: str | None = None  # start from this agent: a run, a checkpoint, a quantised file, an original .pt
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the table of tasks and exit
    json: NewFile | None = None  # with --evaluate: write the results to this file
    quantize: Literal["float16", "int8", "mixed"] | None = None  # do not train: write --checkpoint in these types
    output: NewFile | None = None  # with --quantize: the file; mixed is int8 with an encoder in float16
    keep_target_q: bool = False  # with --quantize: write the target Qs, too, which only learning needs
    eval_freq: Count = 100_000  # updates between evaluations (one more at the end)
    eval_episodes: Count = 10  # of each task in an evaluation; all run side by side (10-40 MB of memory each)
    checkpoint_freq: Count = 50_000  # updates between checkpoints (one more at the end, on SIGTERM, on Ctrl-C)
    log_freq: Count = 1_000  # updates between two points of the loss curves
    capture_video: bool = False  # write one MP4 of every evaluation, a grid of all tasks (needs a GL library)
    storage: Literal["auto", "device", "host", "disk"] = "auto"  # where batches come from: a memory, or the files
    storage_dtype: Literal["files", "float16"] = "files"  # type of the numbers in device memory: the files', or half
    readers: Count = 4  # threads that read batches ahead from the disk or the machine's memory; more for a slow disk
    shard_params: Literal["auto", "yes", "no"] = "auto"  # spread the learning state (auto: if copies do not fit)
    distributed: bool = False  # one of several processes, of SLURM or as the next three say; all see one --runs-dir
    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None  # number of processes
    process_id: int | None = None  # number of this process, from 0
    track: bool = False  # also send everything to Weights & Biases (pip install wandb)
    wandb_project_name: str = "tdmpc2-jax"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    compile_cache: bool = True  # keep compiled programs in ~/.cache/tdmpc2-jax: the second start is faster


MODEL_SIZES = {  # millions of parameters: (enc_dim, mlp_dim, latent_dim, num_enc_layers, num_q)
    1: (256, 384, 128, 2, 2),
    5: (256, 512, 512, 2, 5),
    19: (1024, 1024, 768, 3, 5),
    48: (1792, 1792, 768, 4, 5),
    317: (4096, 4096, 1376, 5, 8),
}
SCRIPTS = ("tdmpc2_jax_mt",)  # whose checkpoints this one starts from
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
        pairs = [(x.astype(self.dtype), w.astype(self.dtype)) for x, w in zip(inputs, rows, strict=True)]
        return sum((x @ w).astype(jnp.float32) for x, w in pairs) + bias  # the cast keeps gradients' products in dtype


class MLP(nn.Module):
    """Hidden layers Linear -> LayerNorm -> Mish, then Linear(out), followed by LayerNorm -> SimNorm if asked for."""

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
class PolicySample(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise
    log_std: jax.Array  # [..., A]
    entropy: jax.Array  # [...] -log pi(action)
    scaled_entropy: jax.Array  # [...] the entropy that the policy's loss rewards


def policy(args: Args, model: WorldModel, pi_params, z: jax.Array, task: TaskInput, eps: jax.Array) -> PolicySample:
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
    return PolicySample(action, jnp.tanh(mean), log_std, -log_pi, -log_pi * entropy_scale)


def q_logits(model: WorldModel, q_params, z: jax.Array, emb: jax.Array, action: jax.Array, dropout=None) -> jax.Array:
    """All heads in q_params: z [..., Z], emb [..., E], action [..., A] -> [q, ..., K]; dropout [q, ..., mlp_dim] or
    None."""
    if dropout is None:
        heads = (pick_heads(q_params, i) for i in range(len(jax.tree.leaves(q_params)[0])))
        return jnp.stack([model.q.apply(p, z, emb, action) for p in heads])  # on a CPU faster than batched products
    return jax.vmap(lambda p, d: model.q.apply(p, z, emb, action, dropout=d))(q_params, dropout)


def pick_heads(q_params, heads: jax.Array):
    """Parameters of the value heads with these indices only: where two Qs are needed, two are computed."""
    return jax.tree.map(lambda p: p[heads], q_params)


def dropout_mask(args: Args, key: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """Inverted dropout as a factor, from 16 random bits a unit: each 32-bit word that is drawn serves two units."""
    if args.dropout == 0:
        return None
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), "uint32")
    bits = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., : shape[-1]]
    return jnp.where(bits < round(args.dropout * 2**16), 0.0, 1 / (1 - args.dropout))


# ------------------------------------------------------------------------------------------------------------ Planning
class PlanNoise(NamedTuple):
    """Every random draw of one plan in n environments. All are made up front, so that `plan` is a plain function of
    arrays: given the draws that another program has recorded, it must return that program's plan."""

    pi: jax.Array  # [n, H, P, A] normal: the policy's sequences
    sample: jax.Array  # [n, iterations, H, N-P, A] normal: the sampled sequences
    terminal: jax.Array  # [n, iterations, N, A] normal: the policy's action after the horizon
    gumbel: jax.Array  # [n, num_elites]: choice of the elite
    exploration: jax.Array  # [n, A] normal: added to the action


def plan_noise(args: Args, model: WorldModel, key: jax.Array, n: int) -> tuple[PlanNoise, jax.Array]:
    """Draws what a plan in n environments needs, and for each iteration the two value heads [iterations, 2] that all of
    them use, so that their parameters are gathered once."""
    H, P, N, A = args.horizon, args.num_pi_trajs, args.num_samples, model.action_dim
    iterations = args.iterations + 2 * (A >= 20)
    keys = jax.random.split(key, 6)
    noise = PlanNoise(
        pi=jax.random.normal(keys[0], (n, H, P, A)),
        sample=jax.random.normal(keys[1], (n, iterations, H, N - P, A)),
        terminal=jax.random.normal(keys[2], (n, iterations, N, A)),
        gumbel=jax.random.gumbel(keys[4], (n, args.num_elites)),
        exploration=jax.random.normal(keys[5], (n, A)),
    )
    return noise, jax.vmap(lambda k: two_heads(model, k))(jax.random.split(keys[3], iterations))


def two_heads(model: WorldModel, key: jax.Array) -> jax.Array:
    """Indices [2] of two different value heads, drawn at random: any first one, then any step to another."""
    head, step = jax.random.randint(key, (2,), jnp.array([0, 1]), model.num_q)
    return jnp.stack([head, (head + step) % model.num_q])


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


def plan(args: Args, model: WorldModel, params, obs, task, prev_mean, first, noise: PlanNoise, heads, explore):
    """Model predictive path integral control (MPPI) in n environments at once, each of its own task.
    obs [n, O]; task of [n] entries; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the
    start of an episode; noise and heads as `plan_noise` draws them; explore adds noise to the action. Returns actions
    [n, A] in [-1, 1], 0 where the task has none, and the new means [n, H, A].
    """
    n, H, A = len(obs), args.horizon, model.action_dim
    chex.assert_shape([obs, task.emb, prev_mean, first], [(n, model.obs_dim), (n, model.task_dim), (n, H, A), (n,)])

    def plan_one(env):
        env_obs, env_task, last_mean, starts, draws = env
        z = model.encoder.apply(params["encoder"], env_obs, env_task.emb)[None]  # [1, Z]
        pi_actions, pi_z = [], z
        for t in range(H):
            pi_actions.append(policy(args, model, params["pi"], pi_z, env_task, draws.pi[t]).action)
            pi_z = model.dynamics.apply(params["dynamics"], pi_z, env_task.emb, pi_actions[t]) if t < H - 1 else None
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(distribution, draw):
            (mean, std), (sample_noise, terminal_noise, two) = distribution, draw
            sampled = jnp.clip(mean[:, None] + std[:, None] * sample_noise, -1, 1) * env_task.mask
            actions = jnp.concatenate([pi_actions, sampled], axis=1)  # [H, N, A]
            values = estimate_value(args, model, params, z, actions, env_task, two, terminal_noise)
            elite_values, elite_indices = jax.lax.top_k(values, args.num_elites)
            elites = actions[:, elite_indices]  # [H, E, A]
            weights = jax.nn.softmax(args.temperature * elite_values)  # [E]
            mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), args.min_std, args.max_std) * env_task.mask
            return (mean, std), (elites[0], weights)

        mean = jnp.where(starts, 0.0, jnp.roll(last_mean, -1, axis=0).at[-1].set(0.0))
        distribution = (mean, jnp.full((H, A), args.max_std))
        iterations = (draws.sample, draws.terminal, heads)
        (mean, std), (elite_actions, weights) = jax.lax.scan(iterate, distribution, iterations)
        action = elite_actions[-1, jnp.argmax(jnp.log(weights[-1]) + draws.gumbel)]  # [A] of one elite, drawn by weight
        action = action + std[0] * draws.exploration if explore else action
        return jnp.clip(action, -1, 1), mean

    # Side by side, but on a CPU only as many as leave a layer in the cache, the others after them: 30 of them side
    # by side take 1.8 times as long as six times five.
    at_once = max(1, (2**22 if jax.default_backend() == "cpu" else 2**29) // (4 * args.num_samples * model.q.hidden[0]))
    envs = (obs, task, prev_mean, first, noise)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


@partial(jax.jit, static_argnames=("args", "model", "explore"))
def act(args: Args, model: WorldModel, tasks: Tasks, params, obs, task_ids, prev_mean, first, key, explore: bool):
    """Actions [n, A] for obs [n, O] in tasks task_ids [n] by planning, or by the policy alone with --no-mpc; see
    `plan`. Returns the actions, the planner's means and the key for the next call."""
    key, noise_key = jax.random.split(key)
    task = task_input(tasks, embed(params["task_emb"], task_ids), task_ids)
    if args.mpc:
        noise, heads = plan_noise(args, model, noise_key, len(obs))
        return *plan(args, model, params, obs, task, prev_mean, first, noise, heads, explore), key
    eps = jax.random.normal(noise_key, (len(obs), model.action_dim))
    sample = policy(args, model, params["pi"], model.encoder.apply(params["encoder"], obs, task.emb), task, eps)
    return sample.action if explore else sample.mean, prev_mean, key


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
    """Every random draw of one update, made up front for the same reason as those of a plan."""

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
    model_tx = optax.chain(clip, optax.scale_by_adam(eps=1e-8), rates)
    return model_tx, optax.chain(clip, optax.scale_by_adam(eps=1e-5), optax.scale(-args.lr))


def init_state(args: Args, params: dict[str, Any], target_q, q_scale, key: jax.Array) -> TrainState:
    """Learning state at the start of a run with these parameters."""
    model_tx, pi_tx = optimizers(args)
    model_opt = model_tx.init({k: v for k, v in params.items() if k != "pi"})
    target_q = jax.tree.map(jnp.copy, target_q)  # not the same buffers: both are donated
    pi_opt, emb_grad = pi_tx.init(params["pi"]), jnp.zeros_like(params["task_emb"])
    q_scale, updates = jnp.asarray(q_scale, jnp.float32), jnp.zeros((), jnp.int32)
    return TrainState(params, target_q, model_opt, pi_opt, emb_grad, q_scale, key, updates)


def fresh_state(args: Args, model: WorldModel) -> TrainState:
    """The learning state at the start of a run from scratch."""
    init_key, train_key = jax.random.split(jax.random.key(args.seed))
    params = init_params(args, model, init_key)
    return init_state(args, params, params["q"], 1.0, train_key)


def td_target(args: Args, model: WorldModel, state: TrainState, next_z, batch: Batch, task: TaskInput, noise):
    """TD targets [H, B]: r + discount * min of two random target Qs at the policy's next action."""
    next_action = policy(args, model, state.params["pi"], next_z, task, noise.next_action).action
    target_q = pick_heads(state.target_q, noise.target_heads)
    q = two_hot_inv(args, q_logits(model, target_q, next_z, task.emb, next_action))
    return batch.reward + task.discount * q.min(0)


def predict_reward(args: Args, model: WorldModel, params, obs, action, task) -> jax.Array:
    """Rewards [B] that a trained agent of these arguments expects of actions [B, A] in states [B, O] of tasks [B]."""
    emb = embed(params["task_emb"], task)
    z = model.encoder.apply(params["encoder"], obs, emb)
    return two_hot_inv(args, model.reward.apply(params["reward"], z, emb, action))


def model_loss(args: Args, model: WorldModel, params, batch: Batch, next_z, target, noise, teacher_reward=None):
    """World-model objective (eq. 3) on latent rollouts from the windows' first observations, with a teacher's rewards
    [B] of their first steps also the distance to these (TD-MPC-Opt, arXiv 2507.01823): in units of reward, after
    decoding. Returns the total loss, and the rollouts [H+1, B, Z] and the parts of the loss."""
    rho = args.rho ** jnp.arange(args.horizon)  # [H]
    emb = params["task_emb"][batch.task]  # [B, E]
    zs = [model.encoder.apply(params["encoder"], batch.obs[0], emb)]
    for t in range(args.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], emb, batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward_logits = model.reward.apply(params["reward"], zs[:-1], emb, batch.action)  # [H, B, K]
    value_logits = q_logits(model, params["q"], zs[:-1], emb, batch.action, noise.dropout)  # [q, H, B, K]
    consistency = (rho * ((zs[1:] - next_z) ** 2).mean((1, 2))).mean()
    reward = (rho * soft_ce(args, reward_logits, batch.reward).mean(1)).mean()
    value = (rho * soft_ce(args, value_logits, target).mean(2)).mean()
    total = args.consistency_coef * consistency + args.reward_coef * reward + args.value_coef * value
    info = {"consistency_loss": consistency, "reward_loss": reward, "value_loss": value}
    if teacher_reward is not None:
        info["distillation_loss"] = ((two_hot_inv(args, reward_logits[0]) - teacher_reward) ** 2).mean()
        total += args.distill_coef * info["distillation_loss"]
    return total, (zs, info | {"total_loss": total})


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


def update(
    args: Args, model: WorldModel, tasks: Tasks, state: TrainState, batch: Batch, noise: UpdateNoise, teacher=None
):
    """One gradient step on the world model and the task embedding, then one on the policy, then one of the target
    values. Returns the new state and a dict of scalars for the log. The teacher (as `make_teacher` gives it) is only
    asked if its weight is not 0.

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
    distilled = teacher is not None and args.distill_coef > 0
    teacher_reward = teacher(batch.obs[0], batch.action[0], batch.task) if distilled else None  # [B]
    loss = partial(model_loss, args, model, batch=batch, next_z=next_z, target=target, noise=noise)
    loss = partial(loss, teacher_reward=teacher_reward)
    grads, (zs, info) = jax.grad(loss, has_aux=True)(model_params)
    grads["task_emb"] += state.emb_grad
    change, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, change)

    task_emb = renormalise(model_params["task_emb"], batch.task)
    pi_loss = partial(policy_loss, args, model, tasks, q_params=model_params["q"], zs=zs, task_ids=batch.task)
    pi_loss = partial(pi_loss, q_scale=state.q_scale, noise=noise)
    (pi_grads, emb_grad), (q_scale, pi_info) = jax.grad(pi_loss, (0, 1), has_aux=True)(params["pi"], task_emb)
    pi_change, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(params["pi"], pi_change)

    target_q = optax.incremental_update(model_params["q"], state.target_q, args.tau)
    info |= pi_info | {"grad_norm": optax.tree.norm(grads), "pi_grad_norm": optax.tree.norm(pi_grads)}
    params = model_params | {"pi": pi_params, "task_emb": task_emb}
    updates = state.updates + 1
    return TrainState(params, target_q, model_opt, pi_opt, emb_grad, q_scale, state.key, updates), info


# ---------------------------------------------------------------------------------------------------- Data and devices
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


def batch_shardings(mesh: Mesh) -> Batch:
    """Every device works on its share of the windows."""
    return Batch(split(mesh, 1), split(mesh, 1), split(mesh, 1), split(mesh, 0))


def batch_shapes(args: Args, model: WorldModel, mesh: Mesh) -> Batch:
    """Shapes, types and places of a batch."""
    H, B = args.horizon, args.batch_size
    shapes = Batch((H + 1, B, model.obs_dim), (H, B, model.action_dim), (H, B), (B,))
    types = Batch(np.float32, np.float32, np.float32, np.int32)
    return Batch(*map(lambda s, t, p: jax.ShapeDtypeStruct(s, t, sharding=p), shapes, types, batch_shardings(mesh)))


def placed(shapes, mesh: Mesh, shard: bool):
    """The same shapes and types with places: a copy on every device or, if `shard`, each array split over the devices
    along its longest axis that can be."""

    def place(x):
        axes = [i for i in range(x.ndim) if x.shape[i] % mesh.size == 0] if shard else []
        sharding = split(mesh, max(axes, key=lambda i: x.shape[i])) if axes else replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def train(
    args: Args, model: WorldModel, mesh: Mesh, tasks: Tasks, state: TrainState, source: DeviceData | Batch, teacher=None
):
    """One update, on a batch drawn here from device memory or drawn before. Every device computes on its share of the
    batch; the sums over it, and so the gradients, are those of one device. Returns the new state and scalars."""
    key, sample_key, noise_key = jax.random.split(state.key, 3)
    batch = source if isinstance(source, Batch) else sample(source, sample_key, args.batch_size, args.horizon)
    batch = jax.lax.with_sharding_constraint(batch, batch_shardings(mesh))
    noise = update_noise(args, model, noise_key)
    return update(args, model, tasks, state._replace(key=key), batch, noise, teacher)


def compile_train(args: Args, model: WorldModel, mesh: Mesh, tasks: Tasks, source, teacher=None):
    """Compiles `train` for a source of these shapes, says what memory it takes and refuses what cannot fit.

    Returns the program, with the teacher on the devices bound to it, and the shapes of the learning state. These two
    are split over the devices if --shard-params says so or, by default, if copies would take more than half of each.
    """
    free = least_available_bytes()
    shapes = jax.eval_shape(partial(fresh_state, args, model)), teacher
    state, its = placed(shapes, mesh, args.shard_params == "yes")
    if args.shard_params == "auto" and mesh.size > 1 and 2 * bytes_of((state, its)) > free:
        state, its = placed(shapes, mesh, True)
    parts = {
        "parameters": bytes_of((state.params, state.target_q)),
        "optimiser": bytes_of((state.model_opt, state.pi_opt)),
        "data": bytes_of(source) if isinstance(source, DeviceData) else 0,
    } | ({"teacher": bytes_of(its)} if teacher else {})
    program = None
    if sum(parts.values()) <= free:  # compiling takes its time
        places, its_places = jax.tree.map(lambda x: x.sharding, (state, its))
        compute = jax.jit(train, static_argnums=(0, 1, 2), donate_argnums=4, out_shardings=(places, replicated(mesh)))
        program = compute.lower(args, model, mesh, tasks, state, source, its).compile()
        parts["activations"] = program.memory_analysis().temp_size_in_bytes
    text = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    if jax.process_index() == 0:
        print(f"memory of each device: {text}; {free / 1e9:.2f} GB are free", flush=True)
    if program is None or sum(parts.values()) > free:
        ways = "a smaller --model-size or --batch-size, more devices, --shard-params yes or --storage disk"
        raise environments.UserError(f"{sum(parts.values()) / 1e9:.2f} GB do not fit into {free / 1e9:.2f} GB ({ways})")
    teacher = jax.jit(lambda x: x, out_shardings=its_places)(teacher)
    return lambda tasks, state, source: program(tasks, state, source, teacher), state


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
            yield jax.tree.map(global_arrays, Batch(**batch), batch_shardings(mesh))


# ---------------------------------------------------------------------------------------------------------- Evaluation
def evaluate(
    args: Args, model: WorldModel, tasks: Tasks, params, names: tuple[str, ...], ids, envs, seed, go_on=lambda: True
) -> SetEvaluation | None:
    """Acts without exploration noise in `envs`, some of each of the tasks `names`, whose ids in the model are `ids`;
    one batched call plans for all episodes that still run, and only these are stepped. None if go_on(), which is asked
    after every step, says no."""
    n, each = envs.num_envs, envs.num_envs // len(names)
    obs, _ = envs.reset(seed=seed)
    task_ids, running, key = np.repeat(ids, each), np.arange(n), jax.random.key(args.seed)
    prev_mean, first = jnp.zeros((n, args.horizon, model.action_dim)), np.ones(n, bool)
    action, returns, successes = np.zeros((n, model.action_dim), np.float32), np.zeros(n), np.zeros(n)
    frames = [grid(envs.render())] if args.capture_video else []
    while len(running):
        acted, prev_mean, key = act(
            args, model, tasks, params, obs[running], task_ids[running], prev_mean, first, key, explore=False
        )
        action[running] = acted
        obs, reward, terminated, truncated, info = envs.step(action, active=np.isin(np.arange(n), running))
        if args.capture_video:
            frames.append(grid(envs.render()))
        returns[running] += reward[running]
        successes[running] = info["success"][running]
        going = ~(terminated | truncated)[running]
        if not going.all():  # tasks of another domain have longer episodes
            running, prev_mean = running[going], prev_mean[going]
        first = np.zeros(len(running), bool)
        if not go_on():
            return None
    return SetEvaluation(names, returns.reshape(-1, each), successes.reshape(-1, each), frames)


def play_tasks(args: Args, model: WorldModel, agent: Agent, names: tuple[str, ...], wrap=lambda envs: envs):
    """Evaluates an agent in environments of its tasks `names`; returns the result, and the environments as `wrap` has
    wrapped them."""
    ids = np.array([agent.tasks.index(name) for name in names])
    steps = max(environments.task_spec(name).episode_length for name in names)
    with evaluating(steps) as (enter, go_on):
        envs, tasks = enter(wrap(make_eval_envs(args, names, agent.tasks))), make_tasks(args, agent.tasks)
        return evaluate(args, model, tasks, agent.params, names, ids, envs, (args.seed, 1), go_on), envs


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints the table of tasks, the domains' means and the normalised score; writes them to --json."""
    args, model, agent = load_agent(args)
    names = environments.set_tasks(cli.task_set(args.tasks)) if args.tasks else agent.tasks
    unknown = [name for name in names if name not in agent.tasks]
    cli.check_rules((not unknown, f"{args.checkpoint} was not trained on {', '.join(unknown)}"))
    report_scores(args, play_tasks(args, model, agent, names)[0])


def outputs(args: Args, model: WorldModel, tasks: Tasks, params, obs, action, task) -> dict[str, jax.Array]:
    """What networks make of states [B, O] and the actions [H, B, A] after them; actions that a task lacks are NaN."""
    task = task_input(tasks, embed(params["task_emb"], task), task)
    z = later = model.encoder.apply(params["encoder"], obs, task.emb)
    for a in action:
        later = model.dynamics.apply(params["dynamics"], later, task.emb, a)
    reward = two_hot_inv(args, model.reward.apply(params["reward"], z, task.emb, action[0]))
    q = two_hot_inv(args, q_logits(model, params["q"], z, task.emb, action[0])).mean(0)
    mean = jnp.where(task.mask > 0, policy(args, model, params["pi"], z, task, jnp.zeros_like(a)).mean, jnp.nan)
    return {"z": z, f"z{len(action)}": later, "reward": reward, "Q": q, "action": mean}


def quantize_checkpoint(args: Args) -> None:
    """--quantize: writes the agent to --output, and prints what that changes: on states of --data-dir or, without it,
    on those that the agent visits by its policy."""
    args, model, agent = load_agent(args)
    agent.check_variant(args.quantize)
    count, rng = 200 * len(agent.tasks), np.random.default_rng(args.seed)
    if args.data_dir:
        data = environments.load_dataset(agent.tasks, args.data_dir).sample(rng, count, args.horizon)
        seen, where = (data["obs"][0], data["action"], data["task"]), f"of {args.data_dir}"
    else:
        acting = dataclasses.replace(args, mpc=False, eval_episodes=1, capture_video=False)
        _, envs = play_tasks(acting, model, agent, agent.tasks, Visited)
        seen, where = envs.windows(count, args.horizon), "that its policy visits"
    write_quantized(args.output, agent, args.quantize, "tdmpc2_jax_mt", dataclasses.asdict(args), args.keep_target_q)
    compute = jax.jit(partial(outputs, args, model, make_tasks(args, agent.tasks)))
    rows = compare(args.output, agent.params, lambda params: compute(params, *seen))
    print_comparison(rows, f"on {count} states {where}")


# ----------------------------------------------------------------------------------------------------------------- Run
def load_agent(args: Args) -> tuple[Args, WorldModel, Agent]:
    """The agent of --checkpoint, the arguments completed by its sizes, and its networks; the task embeddings are among
    its parameters."""
    named = environments.set_tasks(cli.task_set(args.tasks)) if args.tasks else ()
    agent = load_multitask(args.checkpoint, named, *SCRIPTS)
    unsaid = {name: size for name, size in sizes_of(agent.params).items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unsaid)
    model = make_model(args, agent.tasks)
    like = jax.eval_shape(partial(init_params, args, model), jax.random.key(0))
    check_shapes(agent.params, like, args.checkpoint, "these sizes and tasks")
    return args, model, agent


def make_teacher(args: Args, names: tuple[str, ...]) -> jax.tree_util.Partial | None:
    """The agent of --teacher as a function of states [B, O], actions [B, A] and tasks [B] that gives rewards [B]. It is
    a pytree of its parameters, in this process's memory, with kernels in the type in which they are multiplied."""
    if not args.teacher:
        return None
    agent = load_teacher(args.teacher, names, *SCRIPTS)
    its_args = Args(**agent.args, compute_dtype=args.compute_dtype)
    model, networks = make_model(its_args, names), {name: agent.params[name] for name in ("encoder", "reward")}
    networks = jax.tree.map(lambda x: np.asarray(x, args.compute_dtype if x.ndim == 2 else x.dtype), networks)
    params = networks | {"task_emb": np.asarray(agent.params["task_emb"])}
    return jax.tree_util.Partial(partial(predict_reward, its_args, model), params)


def make_eval_envs(args: Args, names: tuple[str, ...], known: tuple[str, ...]):
    """--eval-episodes environments of each of the tasks `names`, in the sizes of all tasks that the model knows."""
    sizes, render_mode = environments.set_sizes(known), "rgb_array" if args.capture_video else None
    return environments.make_envs(names, args.eval_episodes, (args.seed, 1), render_mode=render_mode, sizes=sizes)


def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    cli.check_bounds(args)
    tasks = environments.set_tasks(cli.task_set(args.tasks))
    cluster, none = (args.coordinator, args.num_processes, args.process_id), (None, None, None)
    flags, single = "--coordinator, --num-processes and --process-id", args.evaluate or args.quantize
    cli.check_rules(
        (
            with_model_size(args, tasks).latent_dim % args.simnorm_dim == 0,
            "--latent-dim must be a multiple of --simnorm-dim",
        ),
        (single or args.data_dir, "training needs the dataset's folder: --data-dir"),
        (bool(args.quantize) == bool(args.output), "--quantize and --output go together"),
        (not args.output or not args.output.endswith(".pt"), "--output: .pt is the ending of PyTorch's files"),
        (not (args.quantize and args.evaluate), "--quantize and --evaluate are two commands"),
        (args.teacher or args.distill_coef == Args.distill_coef, "--distill-coef goes with --teacher"),
        (args.distributed or cluster == none, f"{flags} go with --distributed"),
        (None not in cluster or cluster == none, f"{flags} go together"),
        (not (single and args.distributed), "--evaluate and --quantize run in one process: leave out --distributed"),
    )
    for task in tasks if args.capture_video else ():
        environments.check_rendering(task)


def prepare(args: Args, names: tuple[str, ...], keeper: Run):
    """Opens what may be refused: the dataset, the run's folder, the agents. Returns the arguments with the sizes of the
    agent that goes on learning, what its checkpoints say of it, the dataset, the agent of --checkpoint, the teacher."""
    data = environments.load_dataset(cli.task_set(args.tasks), args.data_dir)
    data.window_table(args.horizon)
    uneven = f"--batch-size {args.batch_size} cannot be split over {jax.device_count()} devices evenly"
    cli.check_rules((args.batch_size % jax.device_count() == 0, uneven))
    its_args, agent, teacher = with_model_size(args, names), None, make_teacher(args, names)
    mark = sum(checksums({"teacher": teacher}).values())
    if meta := keeper.read_meta():
        other = f"{args.teacher} is another agent than the one that has taught this run"
        cli.check_rules((meta.get("teacher", 0) == mark, other))
        its_args = Args(**{name: meta["args"].get(name) for name in SIZE_FIELDS})
    elif args.checkpoint:
        its_args, _, agent = load_agent(args)
        same = f"{args.checkpoint} knows other tasks than --tasks names, or in another order"
        cli.check_rules((agent.tasks == names, same))
    args = dataclasses.replace(args, **{name: getattr(its_args, name) for name in SIZE_FIELDS})
    return args, {"args": dataclasses.asdict(args), "tasks": names, "teacher": mark}, data, agent, teacher


def start_or_resume(args: Args, model: WorldModel, keeper: Run, shapes: TrainState, agent: Agent | None) -> TrainState:
    """Learning state of the run's last checkpoint, placed as `shapes` says; if there is none, a fresh one, with the
    parameters and target Qs of `agent` if that is not None."""
    if restored := keeper.restore(state=shapes):
        return restored[1]["state"]
    keeper.count["evaluated"], places = 0, jax.tree.map(lambda x: x.sharding, shapes)  # not before the first update
    if agent is None:
        return jax.jit(partial(fresh_state, args, model), out_shardings=places)()
    key = jax.random.split(jax.random.key(args.seed))[1]
    parts = jax.tree.map(np.asarray, (agent.params, agent.target_q, agent.q_scale))  # of no device, to go to any
    return jax.jit(lambda *parts: init_state(args, *parts, key), out_shardings=places)(*parts)


def evaluate_all(args: Args, model: WorldModel, tasks, params, names, envs, mesh: Mesh, keeper: Run, step: int) -> bool:
    """Evaluates in process 0 while the others wait; whether a signal came in the middle."""
    params, result, minutes = local_replica(params, mesh), None, keeper.seconds() / 60
    steps = max(environments.task_spec(name).episode_length for name in names)
    with keeper.aside(f"evaluating at update {step}", steps) as go_on:
        if keeper.primary:
            here = jax.tree.map(lambda x: x.addressable_data(0), tasks)
            ids, seed = np.arange(len(names)), (args.seed, 1, step)
            result = evaluate(args, model, here, params, names, ids, envs, seed, go_on)
        if result is not None:
            record_scores(keeper, step, minutes, result)
        stopping = devices.any_process(keeper.primary and result is None)
    keeper.count["evaluated"] = keeper.count["evaluated"] if stopping else step
    return stopping


def run(args: Args) -> None:
    """Trains one agent: learns from batch after batch, and keeps the run's files. With --distributed, process 0 does
    what is not computation on all devices: it evaluates and writes; the others wait."""
    names, said = environments.set_tasks(cli.task_set(args.tasks)), dataclasses.asdict(args)
    mesh, free = Mesh(np.array(jax.devices()), "devices"), ("tasks", "data_dir", "storage", "readers", "shard_params")
    columns = ("step", "task", "reward", "success", "seed")
    keeper = Run(cli.set_folder(args), said, "tdmpc2_jax_mt", columns, "update", jax.process_index() == 0, free)
    with devices.on_all_processes(keeper.open):
        args, meta, data, agent, teacher = devices.on_all_processes(lambda: prepare(args, names, keeper))
        model, tasks = make_model(args, names), global_arrays(make_tasks(args, names), replicated(mesh))
        storage = choose_storage(args.storage, data, args.storage_dtype, mesh)
        if storage != "disk":  # what is read whole can be checked
            devices.on_all_processes(data.check_files)
        source_shapes = (
            data_shapes(data, args.storage_dtype, mesh) if storage == "device" else batch_shapes(args, model, mesh)
        )
        program, shapes = compile_train(args, model, mesh, tasks, source_shapes, teacher)
        envs = devices.on_all_processes(
            lambda: keeper.enter(make_eval_envs(args, names, names)) if keeper.primary else None
        )
        state = start_or_resume(args, model, keeper, shapes, agent)
        held = {
            "disk": lambda: data,
            "host": data.to_host,
            "device": lambda: to_devices(data, args.storage_dtype, mesh, args.horizon),
        }
        agent = teacher = None  # they are on the devices
        held, count, step = devices.on_all_processes(held[storage]), keeper.count, keeper.count["updates"]
        batches, head = keeper.enter(sources(args, held, mesh, step)), f"{'update':>10} {'minutes':>8}  result"
        title = f"{len(names)} task(s): {model.obs_dim} observations, {model.action_dim} actions, "
        keeper.begin(title + describe(data, storage), head, state.params, step, args.num_updates)
        in_flight, info, stopping = deque(), {}, False
        while True:
            # Evaluate and save
            finished, count["updates"] = step >= args.num_updates, step
            if keeper.due(step, count["evaluated"], args.eval_freq, finished):
                stopping = evaluate_all(args, model, tasks, state.params, names, envs, mesh, keeper, step)
            if jax.process_count() == 1 or step % 20 == 0 or finished:  # to ask takes longer than a small update
                stopping = stopping or devices.any_process(keeper.stop)
            if keeper.due(step, keeper.saved, args.checkpoint_freq, finished or stopping):
                keeper.save(step, info, meta, state=state)
            if finished or stopping:
                break

            # Learn: dispatched here and computed while the next batch is fetched, at most eight updates after it
            state, info = program(tasks, state, next(batches))
            in_flight.append(info["total_loss"])
            if len(in_flight) > 8:
                jax.block_until_ready(in_flight.popleft())
            step += 1

            # Log
            keeper.advance(step)
            if keeper.due(step, keeper.logged, args.log_freq, False):
                keeper.log_losses(step, info, "charts/updates_per_second")
        if stopping and not keeper.stop:  # the signal came to another process
            keeper.stop.append(signal.SIGTERM)


def main(argv: list[str] | None = None) -> None:
    with cli.one_sentence():
        args = cli.parse(Args, argv, __doc__, cli.set_folder, *SCRIPTS)
        check_args(args)
        devices.use_compile_cache(args.compile_cache)
        if args.distributed:
            devices.start_distributed(args.coordinator, args.num_processes, args.process_id)
        (quantize_checkpoint if args.quantize else evaluate_checkpoint if args.evaluate else run)(args)


if __name__ == "__main__":
    devices.keep_freed_memory()
    main()
