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

import envs as environments
from tdmpc2_support import cli, devices
from tdmpc2_support.agents.pretrained import LoadedAgent, check_shapes, load_multitask, load_teacher, sizes_of
from tdmpc2_support.backend import clip_by_global_norm, global_norm, jit_with_graphs, this_backend
from tdmpc2_support.bounds import Count, Fraction, Name, Natural, NewFile, Number, Positive, Several, Share, Weight
from tdmpc2_support.cli import Flat, FromTask
from tdmpc2_support.data.datasets import Dataset
from tdmpc2_support.data.device_data import DeviceData, Source, batch_shardings
from tdmpc2_support.devices import committed, keep_freed_memory, set_up_jax
from tdmpc2_support.run.checkpoints import Checkpoints, checksums
from tdmpc2_support.run.folder import RunFolder, Signals, check_finite, recorded_settings
from tdmpc2_support.run.logging import Logger
from tdmpc2_support.run.reports import SCORES_COLUMNS, SCORES_HEAD, SetEvaluation, joined, progress, report_scores
from tdmpc2_support.run.schedule import Streams, due, random_streams
from tdmpc2_support.run.video import thumbnails


# --------------------------------------------------------------------------------------------------- Agent and Args
@dataclasses.dataclass(frozen=True)
class Agent:
    """What defines the agent: saved with its weights, and a static argument of every compiled function."""

    # World model
    model_size: Literal[1, 5, 19, 48, 317] = 5  # millions of parameters: sets the next six where they are not given
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
    dropout: Fraction = 0.01  # dropout after the first Linear of every value head
    log_std_min: Number = -10.0  # lower bound of the policy's log standard deviation
    log_std_max: Number = 2.0  # upper bound of the policy's log standard deviation
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (on GPUs float32 means TF32)

    # Learning
    batch_size: Count = 1024  # windows per update B
    lr: Positive = 3e-4  # learning rate
    enc_lr_scale: Weight = 0.3  # the encoder's learning rate is this share of lr
    grad_clip_norm: Positive = 20.0  # bound on the global gradient norm, of the model and of the policy each
    tau: Share = 0.01  # step of the target values and of the Q scale
    rho: Share = 0.5  # the paper's lambda: a loss t steps into the window has the weight rho^t
    consistency_coef: Weight = 20.0  # weight of the latent consistency loss
    reward_coef: Weight = 0.1  # weight of the reward loss
    value_coef: Weight = 0.1  # weight of the value loss
    distill_coef: Weight = 0.45  # weight of the distance to the rewards that --teacher expects
    entropy_coef: Weight = 1e-4  # weight of the policy's entropy
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
    temperature: Weight = 0.5  # inverse temperature: the elites' weights are softmax(temperature * value)

    # What the tasks decide, see `for_tasks`: no flags
    obs_dim: FromTask[int] = 0  # observation size O
    action_dim: FromTask[int] = 0  # action size A
    num_tasks: FromTask[int] = 0  # T


@dataclasses.dataclass(frozen=True)
class Args:
    tasks: str | None = None  # mt30, mt80, or names with commas in the dataset's order (default: mt30, or all known)
    agent: Flat[Agent] = Agent()

    # Data
    data_dir: str | None = None  # folder of the original's chunk_0.pt, chunk_1.pt, ..., or of --save-episodes
    storage: Literal["auto", "device", "host", "disk"] = "auto"  # where batches come from: a memory, or the files
    storage_dtype: Literal["files", "float16"] = "files"  # type of the numbers in device memory: the files', or half
    readers: Count = 4  # threads that read batches ahead from the disk or the machine's memory; more for a slow disk
    teacher: str | None = None  # learn rewards from this agent of the same tasks, too: given like --checkpoint

    # Run
    exp_name: Name = "tdmpc2_jax_mt"  # name of this experiment: its files go to RUNS_DIR/TASKS/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the batches and every random draw
    num_updates: Count = 10_000_000  # length of the run in gradient updates
    resume: bool = False  # continue the run of these tasks, name and seed from its last checkpoint, if it has one
    checkpoint: str | None = None  # start from this agent: a run, a checkpoint, a quantised file, an original .pt
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the table of tasks and exit
    json: NewFile | None = None  # with --evaluate: write the results to this file
    eval_freq: Count = 100_000  # updates between evaluations (one more at the end)
    eval_episodes: Count = 10  # of each task in an evaluation, side by side; as many tasks as fit (40 MB an episode)
    checkpoint_freq: Count = 50_000  # updates between checkpoints (one more at the end, on SIGTERM, on Ctrl-C)
    log_freq: Count = 1_000  # updates between two points of the loss curves
    capture_video: bool = False  # write one MP4 of every evaluation, a grid of all tasks (needs a GL library)
    track: bool = False  # also send everything to Weights & Biases (pip install wandb)
    wandb_project_name: str = "tdmpc2-jax"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    compile_cache: bool = True  # keep compiled programs in ~/.cache/tdmpc2-jax: the second start is faster

    # Devices
    shard_params: Literal["auto", "yes", "no"] = "auto"  # spread the learning state (auto: if copies do not fit)
    distributed: bool = False  # one of several processes, of SLURM or as the next three say; all see one --runs-dir
    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None  # number of processes
    process_id: int | None = None  # number of this process, from 0


MODEL_SIZES = {  # millions of parameters: (enc_dim, mlp_dim, latent_dim, num_enc_layers, num_q)
    1: (256, 384, 128, 2, 2),
    5: (256, 512, 512, 2, 5),
    19: (1024, 1024, 768, 3, 5),
    48: (1792, 1792, 768, 4, 5),
    317: (4096, 4096, 1376, 5, 8),
}
SCRIPTS = ("tdmpc2_jax_mt",)  # whose checkpoints this one starts from
SIZE_FIELDS = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q", "task_dim")
DEPLOY = "python deploy.py --checkpoint RUN --quantize int8 --output FILE"
ENV_BYTES = 40_000_000  # memory of an environment: DMControl's take 12 to 94 MB, Meta-World's 27


def with_model_size(agent: Agent, names: tuple[str, ...]) -> Agent:
    """Fills in the six sizes that were not given: the table's, with what the released mt30 models have otherwise."""
    sizes = dict(zip(SIZE_FIELDS, (*MODEL_SIZES[agent.model_size], 96), strict=True))
    if names == environments.TASK_SETS["mt30"] and agent.model_size in (5, 19, 48):
        sizes["task_dim"] = 64
    if names == environments.TASK_SETS["mt30"] and agent.model_size == 19:
        sizes["latent_dim"] = 512
    return dataclasses.replace(agent, **{k: v for k, v in sizes.items() if getattr(agent, k) is None})


def discount_of(agent: Agent, episode_length: int) -> float:
    """Discount of time scale 1 / (1 - discount) = episode_length / discount_denom, within its bounds (appendix)."""
    scale = episode_length / agent.discount_denom
    return float(np.clip((scale - 1) / scale, agent.discount_min, agent.discount_max))


def for_tasks(agent: Agent, names: tuple[str, ...]) -> Agent:
    """The agent with all sizes filled in, and what these tasks decide."""
    obs_dim, action_dim = environments.set_sizes(names)
    agent = with_model_size(agent, names)
    return dataclasses.replace(agent, obs_dim=obs_dim, action_dim=action_dim, num_tasks=len(names))


# ------------------------------------------------------------------------------------------------------------ Maths
def symlog(x):
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x):
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot(agent: Agent, x: jax.Array) -> jax.Array:
    """Scalars [...] as weights [..., K] on the two nearest bins in symlog space."""
    bins = np.linspace(agent.vmin, agent.vmax, agent.num_bins)
    x = jnp.clip(symlog(x), agent.vmin, agent.vmax)[..., None]
    return jax.nn.relu(1 - jnp.abs(x - bins) * ((agent.num_bins - 1) / (agent.vmax - agent.vmin)))


def two_hot_inv(agent: Agent, logits: jax.Array) -> jax.Array:
    """The scalars [...] that logits [..., K] stand for."""
    bins = np.linspace(agent.vmin, agent.vmax, agent.num_bins)
    return symexp((jax.nn.softmax(logits) * bins).sum(-1))


def soft_ce(agent: Agent, logits: jax.Array, x: jax.Array) -> jax.Array:
    """Cross entropy [...] of logits [..., K] against the two-hot encoding of scalars x [...]."""
    return -(two_hot(agent, x) * jax.nn.log_softmax(logits)).sum(-1)


def mish(x):
    """x * tanh(softplus(x)) by one exponential instead of three transcendentals: 2-4 times faster on a CPU."""
    e = jnp.exp(jnp.minimum(x, 20.0))  # beyond 20, mish(x) = x in float32, and e * e must not overflow
    n = e * (e + 2)
    return x * (n / (n + 2))


def simnorm(x: jax.Array, group: int) -> jax.Array:
    """Softmax within groups of `group` units."""
    return jax.nn.softmax(x.reshape(*x.shape[:-1], x.shape[-1] // group, group)).reshape(x.shape)


# --------------------------------------------------------------------------------------------------------- Networks
class Linear(nn.Module):
    """Affine layer on the concatenation of its inputs, as a sum of products: what all samples of a plan share (their
    first latent state, in the first step of the dynamics) is multiplied once instead of N times."""

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
        return sum((x @ w).astype(jnp.float32) for x, w in pairs) + bias  # cast after the product: so is the gradient


class MLP(nn.Module):
    """Hidden layers Linear -> LayerNorm -> Mish, then Linear(out), followed by LayerNorm -> SimNorm if asked for."""

    hidden: tuple[int, ...]
    out: int
    simnorm_dim: int = 0
    zero_init: bool = False
    one_product: bool = False  # join the inputs and multiply once, not each by its own rows of the kernel
    dtype: str = "float32"

    @nn.compact
    def __call__(self, *inputs, dropout=None):
        """Inputs [..., in_i] -> [..., out]; dropout [..., hidden[0]] multiplies the first Linear's output."""
        layer_norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=this_backend().one_pass_variance)
        if self.one_product:
            shape = jnp.broadcast_shapes(*(x.shape[:-1] for x in inputs))
            inputs = (jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in inputs], axis=-1),)
        for i, width in enumerate(self.hidden):
            x = Linear(width, dtype=self.dtype, name=f"linear_{i}")(*inputs)
            if i == 0 and dropout is not None:
                x = x * dropout
            inputs = (mish(layer_norm(name=f"norm_{i}")(x)),)
        i = len(self.hidden)
        x = Linear(self.out, self.zero_init, self.dtype, name=f"linear_{i}")(*inputs)
        if self.simnorm_dim:
            x = simnorm(layer_norm(name=f"norm_{i}")(x), self.simnorm_dim)
        return x


class Networks(NamedTuple):
    """The components of the world model and the policy: modules without parameters."""

    encoder: MLP  # h(s, e) -> z
    dynamics: MLP  # d(z, e, a) -> z'
    reward: MLP  # R(z, e, a) -> K logits
    pi: MLP  # p(z, e) -> mean and log std of A actions
    q: MLP  # Q(z, e, a) -> K logits: one head; the ensemble is the same module over stacked parameters


def networks(agent: Agent) -> Networks:
    """The networks of an agent."""
    mlp = partial(MLP, (agent.mlp_dim, agent.mlp_dim), dtype=agent.compute_dtype)
    enc_hidden = (agent.enc_dim,) * max(agent.num_enc_layers - 1, 1)
    to_bins = mlp(agent.num_bins, zero_init=True, one_product=this_backend().one_product)  # not d: samples share a z
    return Networks(
        encoder=MLP(enc_hidden, agent.latent_dim, agent.simnorm_dim, dtype=agent.compute_dtype),
        dynamics=mlp(agent.latent_dim, agent.simnorm_dim),
        reward=to_bins,
        pi=mlp(2 * agent.action_dim),
        q=to_bins,
    )


def init_params(agent: Agent, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, one entry per component; those of `q` are stacked along a leading axis [num_q], and `task_emb`
    is the table [T, E]."""
    model = networks(agent)
    z = jnp.zeros(agent.latent_dim)
    emb = jnp.zeros(agent.task_dim)
    action = jnp.zeros(agent.action_dim)
    keys = jax.random.split(key, 6)
    return {
        "encoder": model.encoder.init(keys[0], jnp.zeros(agent.obs_dim), emb),
        "dynamics": model.dynamics.init(keys[1], z, emb, action),
        "reward": model.reward.init(keys[2], z, emb, action),
        "pi": model.pi.init(keys[3], z, emb),
        "q": jax.vmap(lambda k: model.q.init(k, z, emb, action))(jax.random.split(keys[4], agent.num_q)),
        "task_emb": jax.random.uniform(keys[5], (agent.num_tasks, agent.task_dim), minval=-0.02, maxval=0.02),
    }


# ------------------------------------------------------------------------------------------------------------ Tasks
class Tasks(NamedTuple):
    """What is fixed of each task."""

    mask: jax.Array  # [T, A] 1 for the actions that the task has, 0 for padding
    discount: jax.Array  # [T]


class TaskInput(NamedTuple):
    """What the functions below are told of the tasks at hand, one of each for every entry of a batch."""

    emb: jax.Array  # [..., E] input of every network
    mask: jax.Array  # [..., A]
    discount: jax.Array  # [...]


def make_tasks(agent: Agent, names: tuple[str, ...]) -> Tasks:
    """Masks and discounts of these tasks."""
    mask = [np.arange(agent.action_dim) < environments.TASKS[name].action_size for name in names]
    discount = [discount_of(agent, environments.task_spec(name).episode_length) for name in names]
    return Tasks(jnp.asarray(mask, jnp.float32), jnp.asarray(discount, jnp.float32))


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


# ------------------------------------------------------------------------------------------------------ World model
class PolicySample(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise
    log_std: jax.Array  # [..., A]
    entropy: jax.Array  # [...] -log pi(action)
    scaled_entropy: jax.Array  # [...] the entropy that the policy's loss rewards


def policy(agent: Agent, pi_params, z: jax.Array, task: TaskInput, eps: jax.Array) -> PolicySample:
    """Policy prior p(z, e), a squashed Gaussian in the actions that the task has; the others are 0.

    z [..., Z] and standard normal eps [..., A] -> sample and statistics.
    """
    mean, log_std = jnp.split(networks(agent).pi.apply(pi_params, z, task.emb), 2, axis=-1)
    log_std = agent.log_std_min + 0.5 * (agent.log_std_max - agent.log_std_min) * (jnp.tanh(log_std) + 1)
    mean = mean * task.mask
    log_std = log_std * task.mask
    eps = eps * task.mask
    action = jnp.tanh(mean + eps * jnp.exp(log_std))
    log_gauss = (-0.5 * eps**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
    log_pi = log_gauss - jnp.log(jax.nn.relu(1 - action**2) + 1e-6).sum(-1)
    entropy_scale = task.mask.sum(-1) * log_gauss / (log_pi + 1e-8)
    return PolicySample(action, jnp.tanh(mean), log_std, -log_pi, -log_pi * entropy_scale)


def q_logits(agent: Agent, q_params, z: jax.Array, emb: jax.Array, action: jax.Array, dropout=None) -> jax.Array:
    """All heads in q_params: z [..., Z], emb [..., E], action [..., A] -> [q, ..., K]; dropout [q, ..., mlp_dim] or
    None."""
    head = networks(agent).q
    if dropout is not None or this_backend().heads_together:
        return jax.vmap(lambda params, factors: head.apply(params, z, emb, action, dropout=factors))(q_params, dropout)
    num_heads = len(jax.tree.leaves(q_params)[0])
    logits = [head.apply(pick_heads(q_params, i), z, emb, action) for i in range(num_heads)]
    return jnp.stack(logits)


def pick_heads(q_params, heads: jax.Array):
    """Parameters of the value heads with these indices only: where two Qs are needed, two are computed."""
    return jax.tree.map(lambda p: p[heads], q_params)


def dropout_mask(agent: Agent, key: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """Inverted dropout as a factor, from 16 random bits a unit: each 32-bit word that is drawn serves two units. Words
    keep all axes but the last, so that each of several devices draws only those of its windows."""
    if agent.dropout == 0:
        return None
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), "uint32")
    bits = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., : shape[-1]]
    return jnp.where(bits < round(agent.dropout * 2**16), 0.0, 1 / (1 - agent.dropout))


# --------------------------------------------------------------------------------------------------------- Planning
class PlanNoise(NamedTuple):
    """Every random draw of one plan in n environments. All are made up front, so that `plan` is a plain function of
    arrays: given the draws that another program has recorded, it must return that program's plan."""

    pi: jax.Array  # [n, H, P, A] normal: the policy's sequences
    sample: jax.Array  # [n, iterations, H, N-P, A] normal: the sampled sequences
    terminal: jax.Array  # [n, iterations, N, A] normal: the policy's action after the horizon
    gumbel: jax.Array  # [n, num_elites]: choice of the elite
    exploration: jax.Array  # [n, A] normal: added to the action


def plan_noise(agent: Agent, key: jax.Array, n: int) -> tuple[PlanNoise, jax.Array]:
    """Draws what a plan in n environments needs, and for each iteration the two value heads [iterations, 2] that all of
    them use, so that their parameters are gathered once."""
    H = agent.horizon
    P = agent.num_pi_trajs
    N = agent.num_samples
    A = agent.action_dim
    iterations = agent.iterations + 2 if A >= 20 else agent.iterations
    keys = jax.random.split(key, 6)
    noise = PlanNoise(
        pi=jax.random.normal(keys[0], (n, H, P, A)),
        sample=jax.random.normal(keys[1], (n, iterations, H, N - P, A)),
        terminal=jax.random.normal(keys[2], (n, iterations, N, A)),
        gumbel=jax.random.gumbel(keys[4], (n, agent.num_elites)),
        exploration=jax.random.normal(keys[5], (n, A)),
    )
    heads = jax.vmap(partial(two_heads, agent))(jax.random.split(keys[3], iterations))
    return noise, heads


def two_heads(agent: Agent, key: jax.Array) -> jax.Array:
    """Indices [2] of two different value heads, drawn at random: any first one, then any step to another."""
    head, step = jax.random.randint(key, (2,), jnp.array([0, 1]), agent.num_q)
    return jnp.stack([head, (head + step) % agent.num_q])


def estimate_value(agent: Agent, params, z, actions, task: TaskInput, heads, eps) -> jax.Array:
    """Value [N] of action sequences [H, N, A] from z [1, Z]: rewards over the horizon, then the mean of two Qs."""
    model = networks(agent)
    zs = [z]
    for t in range(agent.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], task.emb, actions[t]))
    last_z = zs[-1]
    zs = jnp.stack([jnp.broadcast_to(z, last_z.shape), *zs[1:]])  # [H+1, N, Z]
    reward = two_hot_inv(agent, model.reward.apply(params["reward"], zs[:-1], task.emb, actions))  # [H, N]
    action = policy(agent, params["pi"], last_z, task, eps).action
    q = two_hot_inv(agent, q_logits(agent, pick_heads(params["q"], heads), last_z, task.emb, action)).mean(0)
    weight = task.discount ** np.arange(agent.horizon + 1)[:, None]  # [H+1, 1]
    return jnp.nan_to_num((weight[:-1] * reward).sum(0) + weight[-1] * q, nan=0.0)


def plan(agent: Agent, params, obs, task: TaskInput, prev_mean, first, noise: PlanNoise, heads, explore: bool):
    """Model predictive path integral control (MPPI) in n environments at once, each of its own task.
    obs [n, O]; task of [n] entries; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the
    start of an episode; noise and heads as `plan_noise` draws them; explore adds noise to the action. Returns actions
    [n, A] in [-1, 1], 0 where the task has none, and the new means [n, H, A].
    """
    n = len(obs)
    H = agent.horizon
    A = agent.action_dim
    chex.assert_shape([obs, task.emb, prev_mean, first], [(n, agent.obs_dim), (n, agent.task_dim), (n, H, A), (n,)])
    model = networks(agent)

    def plan_one(env):
        env_obs, env_task, last_mean, starts, draws = env
        z = model.encoder.apply(params["encoder"], env_obs, env_task.emb)[None]  # [1, Z]
        pi_actions = []
        pi_z = z
        for t in range(H):
            pi_actions.append(policy(agent, params["pi"], pi_z, env_task, draws.pi[t]).action)
            if t < H - 1:
                pi_z = model.dynamics.apply(params["dynamics"], pi_z, env_task.emb, pi_actions[t])
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(distribution, draw):
            mean, std = distribution
            sample_noise, terminal_noise, q_heads = draw
            sampled = jnp.clip(mean[:, None] + std[:, None] * sample_noise, -1, 1) * env_task.mask
            actions = jnp.concatenate([pi_actions, sampled], axis=1)  # [H, N, A]
            values = estimate_value(agent, params, z, actions, env_task, q_heads, terminal_noise)
            elite_values, elite_indices = jax.lax.top_k(values, agent.num_elites)
            elites = actions[:, elite_indices]  # [H, num_elites, A]
            weights = jax.nn.softmax(agent.temperature * elite_values)  # [num_elites]
            mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), agent.min_std, agent.max_std) * env_task.mask
            return (mean, std), (elites[0], weights)

        mean = jnp.where(starts, 0.0, jnp.roll(last_mean, -1, axis=0).at[-1].set(0.0))
        std = jnp.full((H, A), agent.max_std)
        draws_of_each = (draws.sample, draws.terminal, heads)
        unroll = this_backend().plan_written_out
        (mean, std), (elite_actions, weights) = jax.lax.scan(iterate, (mean, std), draws_of_each, unroll=unroll)
        elite = jnp.argmax(jnp.log(weights[-1]) + draws.gumbel)  # drawn by weight, in evaluations too
        action = elite_actions[-1, elite]  # [A]
        if explore:
            action = action + std[0] * draws.exploration
        return jnp.clip(action, -1, 1), mean

    envs = (obs, task, prev_mean, first, noise)
    at_once = environments_at_once(agent)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


def environments_at_once(agent: Agent) -> int:
    """How many environments are planned for side by side, the others after them."""
    layer_bytes = 4 * agent.num_samples * agent.mlp_dim
    return max(1, this_backend().plan_bytes // layer_bytes)


@partial(jit_with_graphs, static_argnames=("agent", "explore"))
def act(agent: Agent, tasks: Tasks, params, obs, task_ids, prev_mean, first, key, explore: bool):
    """Actions [n, A] for obs [n, O] in tasks task_ids [n] by `plan` or by the policy (--no-mpc); the planner's means; a
    new key."""
    n = len(obs)
    key, noise_key = jax.random.split(key)
    task = task_input(tasks, embed(params["task_emb"], task_ids), task_ids)
    if agent.mpc:
        noise, heads = plan_noise(agent, noise_key, n)
        action, prev_mean = plan(agent, params, obs, task, prev_mean, first, noise, heads, explore)
    else:
        z = networks(agent).encoder.apply(params["encoder"], obs, task.emb)
        sample = policy(agent, params["pi"], z, task, jax.random.normal(noise_key, (n, agent.action_dim)))
        action = sample.action if explore else sample.mean
    return action, prev_mean, key


# --------------------------------------------------------------------------------------------------------- Learning
class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict[str, Any]  # encoder, dynamics, reward, pi, q, task_emb
    target_q: dict[str, Any]  # slow copy of params["q"]
    model_opt: optax.OptState  # of everything but the policy
    pi_opt: optax.OptState
    emb_grad: jax.Array  # [T, E] the policy loss's gradient in the embedding, which the next update takes along
    q_scale: jax.Array  # running 5-95% range of the values, at least 1, by which Q is divided in the policy's loss
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


def update_noise(agent: Agent, key: jax.Array) -> UpdateNoise:
    """Draws what one update needs."""
    H = agent.horizon
    B = agent.batch_size
    A = agent.action_dim
    width = agent.mlp_dim
    keys = jax.random.split(key, 6)
    return UpdateNoise(
        next_action=jax.random.normal(keys[0], (H, B, A)),
        target_heads=two_heads(agent, keys[1]),
        pi_action=jax.random.normal(keys[2], (H + 1, B, A)),
        pi_heads=two_heads(agent, keys[3]),
        dropout=dropout_mask(agent, keys[4], (agent.num_q, H, B, width)),
        pi_dropout=dropout_mask(agent, keys[5], (2, H + 1, B, width)),
    )


def optimizers(agent: Agent) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the model (the encoder slower) and for the policy, each behind its own global-norm clip."""
    clip = clip_by_global_norm(agent.grad_clip_norm)
    rates = {"encoder": optax.scale(-agent.lr * agent.enc_lr_scale), "other": optax.scale(-agent.lr)}
    rates = optax.multi_transform(rates, lambda params: {k: k if k == "encoder" else "other" for k in params})
    model_tx = optax.chain(clip, optax.scale_by_adam(eps=1e-8), rates)
    pi_tx = optax.chain(clip, optax.scale_by_adam(eps=1e-5), optax.scale(-agent.lr))
    return model_tx, pi_tx


def init_state(agent: Agent, params: dict[str, Any], target_q, q_scale, key: jax.Array) -> TrainState:
    """Learning state at the start of a run with these parameters."""
    model_tx, pi_tx = optimizers(agent)
    return TrainState(
        params=params,
        target_q=jax.tree.map(jnp.copy, target_q),  # not the same buffers: both are donated
        model_opt=model_tx.init({k: v for k, v in params.items() if k != "pi"}),
        pi_opt=pi_tx.init(params["pi"]),
        emb_grad=jnp.zeros_like(params["task_emb"]),
        q_scale=jnp.asarray(q_scale, jnp.float32),
        key=key,
        updates=jnp.zeros((), jnp.int32),
    )


def td_target(agent: Agent, state: TrainState, next_z, batch: Batch, task: TaskInput, noise: UpdateNoise) -> jax.Array:
    """TD targets [H, B]: r + discount * min of two random target Qs at the policy's next action."""
    next_action = policy(agent, state.params["pi"], next_z, task, noise.next_action).action
    target_q = pick_heads(state.target_q, noise.target_heads)
    q = two_hot_inv(agent, q_logits(agent, target_q, next_z, task.emb, next_action))
    return batch.reward + task.discount * q.min(0)


def predict_reward(agent: Agent, params, obs, action, task) -> jax.Array:
    """Rewards [B] that a trained agent expects of actions [B, A] in states [B, O] of tasks [B]."""
    model = networks(agent)
    emb = embed(params["task_emb"], task)
    z = model.encoder.apply(params["encoder"], obs, emb)
    return two_hot_inv(agent, model.reward.apply(params["reward"], z, emb, action))


def model_loss(agent: Agent, params, batch: Batch, next_z, target, noise: UpdateNoise, teacher_reward=None):
    """World-model objective (eq. 3, the original's means over steps, heads and Z in place of sums) on latent rollouts
    [H+1, B, Z], which are returned with it and its parts. With a teacher's rewards [B] of the windows' first steps also
    the distance to these (TD-MPC-Opt, arXiv 2507.01823): in units of reward, after decoding."""
    model = networks(agent)
    rho = agent.rho ** np.arange(agent.horizon)[:, None]  # [H, 1]
    emb = params["task_emb"][batch.task]  # [B, E]
    zs = [model.encoder.apply(params["encoder"], batch.obs[0], emb)]
    for t in range(agent.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], emb, batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward_logits = model.reward.apply(params["reward"], zs[:-1], emb, batch.action)  # [H, B, K]
    value_logits = q_logits(agent, params["q"], zs[:-1], emb, batch.action, noise.dropout)  # [q, H, B, K]
    consistency = (rho * ((zs[1:] - next_z) ** 2).mean(-1)).mean()
    reward = (rho * soft_ce(agent, reward_logits, batch.reward)).mean()
    value = (rho * soft_ce(agent, value_logits, target)).mean()
    total = agent.consistency_coef * consistency + agent.reward_coef * reward + agent.value_coef * value
    info = {"consistency_loss": consistency, "reward_loss": reward, "value_loss": value}
    if teacher_reward is not None:
        distillation = ((two_hot_inv(agent, reward_logits[0]) - teacher_reward) ** 2).mean()
        total = total + agent.distill_coef * distillation
        info["distillation_loss"] = distillation
    return total, (zs, info | {"total_loss": total})


def policy_loss(agent: Agent, tasks: Tasks, pi_params, task_emb, q_params, zs, task_ids, q_scale, noise: UpdateNoise):
    """Policy objective (eq. 4) on latent states zs [H+1, B, Z]. Returns the loss, and the new Q scale and entropies."""
    task = task_input(tasks, task_emb[task_ids], task_ids)
    pi = policy(agent, pi_params, zs, task, noise.pi_action)
    logits = q_logits(agent, pick_heads(q_params, noise.pi_heads), zs, task.emb, pi.action, noise.pi_dropout)
    q = two_hot_inv(agent, logits).mean(0)  # [H+1, B]
    low, high = jnp.percentile(jax.lax.stop_gradient(q[0]), jnp.array([5.0, 95.0]))
    q_scale = q_scale + agent.tau * (jnp.maximum(high - low, 1.0) - q_scale)
    rho = agent.rho ** np.arange(agent.horizon + 1)[:, None]  # [H+1, 1]
    loss = -(rho * (agent.entropy_coef * pi.scaled_entropy + q / q_scale)).mean()
    info = {
        "pi_loss": loss,
        "pi_entropy": pi.entropy.mean(),
        "pi_scaled_entropy": pi.scaled_entropy.mean(),
        "pi_scale": q_scale,
    }
    return loss, (q_scale, info)


def update(agent: Agent, tasks: Tasks, state: TrainState, batch: Batch, noise: UpdateNoise, teacher=None):
    """One gradient step on the world model and the task embedding, then one on the policy, then a step of the target
    values towards the new ones. Returns the new state and a dict of scalars for the log. The teacher (see
    `make_teacher`) is only asked if its weight is not 0.

    The policy's loss depends on the embedding, too. Like the original, which does not clear that gradient, the model's
    next step adds it to its own.
    """
    H = agent.horizon
    B = len(batch.obs[0])
    chex.assert_shape(list(batch), [(H + 1, B, agent.obs_dim), (H, B, agent.action_dim), (H, B), (B,)])
    model_tx, pi_tx = optimizers(agent)

    params = state.params | {"task_emb": renormalise(state.params["task_emb"], batch.task)}
    task = task_input(tasks, params["task_emb"][batch.task], batch.task)
    next_z = networks(agent).encoder.apply(params["encoder"], batch.obs[1:], task.emb)  # [H, B, Z]
    target = td_target(agent, state, next_z, batch, task, noise)  # [H, B]
    teacher_reward = None
    if teacher is not None and agent.distill_coef > 0:
        teacher_reward = teacher(batch.obs[0], batch.action[0], batch.task)  # [B]
    model_params = {k: v for k, v in params.items() if k != "pi"}
    loss = partial(model_loss, agent, batch=batch, next_z=next_z, target=target, noise=noise)
    loss = partial(loss, teacher_reward=teacher_reward)
    grads, (zs, info) = jax.grad(loss, has_aux=True)(model_params)
    grads["task_emb"] += state.emb_grad
    change, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, change)

    task_emb = renormalise(model_params["task_emb"], batch.task)
    loss = partial(policy_loss, agent, tasks, q_params=model_params["q"], zs=zs, task_ids=batch.task)
    loss = partial(loss, q_scale=state.q_scale, noise=noise)
    (pi_grads, emb_grad), (q_scale, pi_info) = jax.grad(loss, (0, 1), has_aux=True)(params["pi"], task_emb)
    pi_change, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(params["pi"], pi_change)

    target_q = optax.incremental_update(model_params["q"], state.target_q, agent.tau)
    info |= pi_info | {"grad_norm": global_norm(grads), "pi_grad_norm": global_norm(pi_grads)}
    params = model_params | {"pi": pi_params, "task_emb": task_emb}
    return TrainState(params, target_q, model_opt, pi_opt, emb_grad, q_scale, state.key, state.updates + 1), info


# ------------------------------------------------------------------------------------------------- Data and devices
def sample(agent: Agent, data: DeviceData, key: jax.Array) -> Batch:
    """Windows drawn uniformly from all that lie in one episode, with replacement."""
    window = jax.random.randint(key, (agent.batch_size,), 0, data.ends[-1])
    file = jnp.searchsorted(data.ends, window, side="right")
    in_file = window - jnp.where(file > 0, data.ends[file - 1], 0)
    episode, start = jnp.divmod(in_file, data.episode_entries[file] - agent.horizon)
    start = data.first_entry[file] + episode * data.episode_entries[file] + start
    rows = start + jnp.arange(agent.horizon + 1)[:, None]  # [H+1, B]
    obs = data.obs[rows].astype(jnp.float32)
    action = data.action[rows[1:]].astype(jnp.float32)
    reward = data.reward[rows[1:]].astype(jnp.float32)
    return Batch(obs, action, reward, data.task[start].astype(jnp.int32))


def train(agent: Agent, mesh: Mesh, tasks: Tasks, state: TrainState, source: DeviceData | dict, teacher=None):
    """One update, on a batch that is drawn here from device memory or was drawn before. Every device computes on its
    share of the batch; the sums over it, and so the gradients, are those of one device. Returns the new state and a
    dict of scalars."""
    key, sample_key, noise_key = jax.random.split(state.key, 3)
    if isinstance(source, DeviceData):
        batch = sample(agent, source, sample_key)
    else:
        batch = Batch(**source)
    batch = jax.lax.with_sharding_constraint(batch, Batch(**batch_shardings(mesh)))
    return update(agent, tasks, state._replace(key=key), batch, update_noise(agent, noise_key), teacher)


def compile_train(args: Args, agent: Agent, mesh: Mesh, tasks: Tasks, source, teacher=None):
    """Compiles `train` for a source of these shapes, prints what memory it takes and refuses what cannot fit. Returns
    the program, a function of the learning state and a source, and the shapes of the learning state."""
    state = jax.eval_shape(lambda: fresh_state(agent, random_streams(args.seed)))
    state, teacher_shapes = devices.placed((state, teacher), mesh, args.shard_params)
    parts = {
        "parameters": devices.bytes_of((state.params, state.target_q)),
        "optimiser": devices.bytes_of((state.model_opt, state.pi_opt)),
        "data": devices.bytes_of(source) if isinstance(source, DeviceData) else 0,
    }
    if teacher is not None:
        parts["teacher"] = devices.bytes_of(teacher_shapes)
    # At least what one layer of all heads leaves for its gradient, in bfloat16; counted once it is compiled
    parts["activations"] = 2 * agent.num_q * agent.horizon * agent.batch_size * agent.mlp_dim // mesh.size
    places, teacher_places = jax.tree.map(lambda x: x.sharding, (state, teacher_shapes))
    options = {"donate_argnums": 1, "out_shardings": (places, devices.replicated(mesh))}
    ways = "a smaller --model-size or --batch-size, more devices, --shard-params yes or --storage disk"
    inputs = (tasks, state, source, teacher_shapes)
    program = devices.compile_within_memory(partial(train, agent, mesh), inputs, parts, ways, **options)
    teacher = jax.jit(lambda x: x, out_shardings=teacher_places)(teacher)
    return lambda state, source: program(tasks, state, source, teacher), state


# ------------------------------------------------------------------------------------------------------- Evaluation
def evaluate(agent: Agent, tasks: Tasks, params, task_ids, envs, key, film=0, advance=lambda: None, stop=False):
    """One episode in each of n environments, whose tasks are task_ids [n], without exploration. One batched call plans
    for all episodes that still run, and only these are stepped.

    Args:
        film: of how many pictures a film consists; 0 for none.
        advance: called after every step.
        stop: true when the evaluation is to be left; then None is returned.

    Returns:
        Returns [n], successes [n], and for every step the pictures of the environments that draw.
    """
    n = envs.num_envs
    obs, _ = envs.reset()
    first = np.ones(n, bool)
    running = np.arange(n)  # these have not ended
    returns = np.zeros(n)
    successes = np.zeros(n)
    frames = [thumbnails(envs.render(), film)] if film else []
    action = np.zeros((n, agent.action_dim), np.float32)
    mean, key = committed((jnp.zeros((n, agent.horizon, agent.action_dim)), key))
    while len(running):
        action[running], mean, key = act(
            agent, tasks, params, obs[running], task_ids[running], mean, first, key, explore=False
        )
        obs, reward, terminated, truncated, info = envs.step(action, active=np.isin(np.arange(n), running))
        if film:
            frames.append(thumbnails(envs.render(), film))
        returns[running] += reward[running]
        successes[running] = info["success"][running]
        goes_on = ~(terminated | truncated)[running]
        if not goes_on.all():  # tasks of another domain have longer episodes
            running = running[goes_on]
            mean = mean[goes_on]
        first = np.zeros(len(running), bool)
        advance()
        if stop:
            return None
    return returns, successes, frames


def evaluate_tasks(args: Args, agent: Agent, params, known, names, seed, key, bar, stop=False) -> SetEvaluation | None:
    """--eval-episodes of each of the tasks `names` of an agent that knows the tasks `known`, by `evaluate`: at a time
    as many tasks as memory is free for, with environments that are made for it and closed after it.

    Args:
        seed: of the environments; which tasks are evaluated at a time does not change it.
        bar: called with the number of steps, a context manager that yields the function `advance`.
        stop: as in `evaluate`.
    """
    each = args.eval_episodes
    tasks = make_tasks(agent, known)
    film = len(names) if args.capture_video else 0
    options = {"sizes": (agent.obs_dim, agent.action_dim), "render_mode": "rgb_array" if film else None}
    groups = devices.groups_that_fit(names, each * ENV_BYTES)
    steps = sum(max(environments.task_spec(name).episode_length for name in group) for group in groups)
    results = []
    with bar(steps) as advance:
        for group, group_key in zip(groups, jax.random.split(key, len(groups)), strict=True):
            task_ids = np.repeat([known.index(name) for name in group], each)
            first = each * names.index(group[0])
            with contextlib.closing(environments.make_envs(group, each, seed, first=first, **options)) as envs:
                result = evaluate(agent, tasks, params, task_ids, envs, group_key, film, advance, stop)
            if result is None:
                return None
            results.append(result)
    return joined(names, results)


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints the table of tasks, the domains' means and the normalised score; writes them to --json."""
    agent, loaded = load_agent(args)
    names = environments.set_tasks(cli.task_set(args.tasks)) if args.tasks else loaded.tasks
    unknown = [name for name in names if name not in loaded.tasks]
    cli.require(not unknown, f"{args.checkpoint} was not trained on {', '.join(unknown)}")
    for name in names if args.capture_video else ():
        environments.check_rendering(name)
    key = random_streams(args.seed).evaluate
    result = evaluate_tasks(args, agent, loaded.params, loaded.tasks, names, (args.seed, 1), key, progress)
    report_scores(args, result)


# -------------------------------------------------------------------------------------------------------------- Run
def fresh_state(agent: Agent, streams: Streams) -> TrainState:
    """The learning state at the start of a run from scratch."""
    params = init_params(agent, streams.init)
    return init_state(agent, params, params["q"], 1.0, streams.train)


def load_agent(args: Args) -> tuple[Agent, LoadedAgent]:
    """The agent of --checkpoint, with the sizes that it has where they are not given, and what was loaded of it; the
    task embeddings are among its parameters."""
    named = environments.set_tasks(cli.task_set(args.tasks)) if args.tasks else ()
    loaded = load_multitask(args.checkpoint, named, *SCRIPTS)
    missing = {name: size for name, size in sizes_of(loaded.params).items() if getattr(args.agent, name) is None}
    agent = for_tasks(dataclasses.replace(args.agent, **missing), loaded.tasks)
    like = jax.eval_shape(partial(init_params, agent), jax.random.key(0))
    check_shapes(loaded.params, like, args.checkpoint, "these sizes and tasks")
    return agent, loaded


def make_teacher(args: Args, names: tuple[str, ...]) -> jax.tree_util.Partial | None:
    """The agent of --teacher as a function of states [B, O], actions [B, A] and tasks [B] that returns rewards [B]. It
    is a pytree of its parameters, in this process's memory, with kernels in the type in which they are multiplied."""
    if not args.teacher:
        return None
    loaded = load_teacher(args.teacher, names, *SCRIPTS)
    dtype = args.agent.compute_dtype
    agent = for_tasks(Agent(**loaded.args, compute_dtype=dtype), names)
    params = {name: loaded.params[name] for name in ("encoder", "reward")}
    params = jax.tree.map(lambda x: np.asarray(x, dtype if x.ndim == 2 else x.dtype), params)
    params["task_emb"] = np.asarray(loaded.params["task_emb"])
    return jax.tree_util.Partial(partial(predict_reward, agent), params)


class Inputs(NamedTuple):
    """What a run is made of: opened and compared before anything starts."""

    data: Dataset
    agent: Agent
    loaded: LoadedAgent | None  # of --checkpoint, if the run begins with it
    teacher: jax.tree_util.Partial | None
    record: dict[str, Any]  # what checkpoints hold of these beside arrays


def open_inputs(args: Args, names: tuple[str, ...], checkpoints: Checkpoints) -> Inputs:
    """Refuses in one sentence what cannot be opened, or is not what the run was started with."""
    data = environments.load_dataset(cli.task_set(args.tasks), args.data_dir)
    data.window_table(args.agent.horizon)
    if jax.process_index() == 0:  # the others evaluate nothing
        environments.check_simulators(names)
    teacher = make_teacher(args, names)
    teacher_sum = sum(checksums({"teacher": teacher}).values())
    agent = for_tasks(args.agent, names)
    loaded = None
    if meta := checkpoints.read_meta():
        other = f"{args.teacher} is another agent than the one that has taught this run"
        cli.require(meta.get("teacher", 0) == teacher_sum, other)
        sizes = {name: meta["args"].get(name) for name in SIZE_FIELDS}
        agent = for_tasks(dataclasses.replace(args.agent, **sizes), names)
    elif args.checkpoint:
        agent, loaded = load_agent(args)
        same = f"{args.checkpoint} knows other tasks than --tasks names, or in another order"
        cli.require(loaded.tasks == names, same)
    settings = cli.settings(dataclasses.replace(args, agent=agent))
    return Inputs(data, agent, loaded, teacher, {"args": settings, "tasks": names, "teacher": teacher_sum})


def start_or_resume(args: Args, agent: Agent, checkpoints: Checkpoints, shapes: TrainState, loaded):
    """Learning state and counters of the run's last checkpoint, the state placed as `shapes` says; without one all is
    fresh, but for the parameters of the agent `loaded` if --checkpoint names one."""
    count = {"updates": 0, "evaluated": 0, "seconds": 0.0}  # no evaluation before the first update
    if restored := checkpoints.restore(state=shapes):
        meta, items = restored
        return items["state"], count | meta["count"]
    parts = None
    if loaded is not None:
        parts = jax.tree.map(np.asarray, (loaded.params, loaded.target_q, loaded.q_scale))  # of no device, to go to any

    def make(streams, parts):
        return fresh_state(agent, streams) if parts is None else init_state(agent, *parts, streams.train)

    make = jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))
    return make(random_streams(args.seed), parts), count


def loop(args: Args, inputs: Inputs, mesh: Mesh, state, program, batches, count, checkpoints, logger, signals) -> int:
    """Evaluates, saves, learns from batch after batch and logs, until --num-updates or a signal. Process 0 evaluates
    while the others wait. Returns the update at which it has stopped."""
    agent = inputs.agent
    names = inputs.data.tasks
    eval_key = random_streams(args.seed).evaluate
    step = saved = count["updates"]
    info = {}
    in_flight = deque()  # total losses of the updates that may not be over
    while True:
        # Evaluate
        finished = step >= args.num_updates
        evaluating = due(step, count["evaluated"], args.eval_freq, finished)
        if evaluating:
            params = devices.local_replica(state.params, mesh)
            result = None
            if logger.primary:
                draws = (args.seed, 1, step), jax.random.fold_in(eval_key, step)
                bar = partial(logger.paused, f"evaluating at update {step}")
                result = evaluate_tasks(args, agent, params, names, names, *draws, bar, signals)
            if not devices.any_process(logger.primary and result is None):
                count["evaluated"] = step
            if result is not None:
                logger.record_scores(step, result)

        # Save
        stopping = signals.in_any_process(now=evaluating or finished) or finished
        if due(step, saved, args.checkpoint_freq, stopping):
            check_finite(logger.folder, f"update {step}", **jax.device_get(info))
            count["updates"] = step
            count["seconds"] = logger.seconds()
            with logger.paused():
                checkpoints.save(step, count, inputs.record, state=state)
            saved = step
            stopping = stopping or signals.in_any_process(now=True)  # one that has come meanwhile
        if stopping:
            return step

        # Learn: computed while the next batches are fetched; the host runs at most eight updates ahead of the device
        state, info = program(state, next(batches))
        in_flight.append(info["total_loss"])
        if len(in_flight) > 8:
            jax.block_until_ready(in_flight.popleft())
        step += 1

        # Log
        if due(step, logger.logged, args.log_freq):
            logger.log_losses(step, info, "charts/updates_per_second")
        logger.advance(step)


def run(args: Args) -> None:
    """Trains one agent and keeps the run's files; with --distributed, process 0 writes them."""
    names = environments.set_tasks(cli.task_set(args.tasks))
    devices.check_shares(args.agent.batch_size)
    mesh = Mesh(np.array(jax.devices()), "devices")
    primary = jax.process_index() == 0
    signals = Signals()
    with contextlib.ExitStack() as stack:
        folder = RunFolder(cli.set_folder(args), cli.settings(args), primary)
        devices.on_all_processes(lambda: stack.enter_context(folder))
        checkpoints = stack.enter_context(Checkpoints(folder, "tdmpc2_jax_mt"))
        inputs = devices.on_all_processes(lambda: open_inputs(args, names, checkpoints))
        agent = inputs.agent
        tasks = devices.global_arrays(make_tasks(agent, names), devices.replicated(mesh))
        source = Source(inputs.data, args.storage, args.storage_dtype, mesh, agent.batch_size, agent.horizon)
        devices.on_all_processes(source.check)
        program, shapes = compile_train(args, agent, mesh, tasks, source.shapes(), inputs.teacher)
        state, count = start_or_resume(args, agent, checkpoints, shapes, inputs.loaded)
        inputs = inputs._replace(loaded=None, teacher=None)  # they are on the devices
        devices.on_all_processes(source.load)
        batches = source.batches(args.seed, count["updates"], args.readers)
        stack.enter_context(contextlib.closing(batches))
        devices.on_all_processes(folder.begin)
        logger = stack.enter_context(Logger(folder, SCORES_COLUMNS, "update", signals=signals))
        title = f"{len(names)} task(s): {agent.obs_dim} observations, {agent.action_dim} actions, {source}"
        begin = partial(logger.begin, title, SCORES_HEAD, state.params, count["updates"], args.num_updates, count)
        devices.on_all_processes(begin)
        stack.enter_context(signals)
        step = loop(args, inputs, mesh, state, program, batches, count, checkpoints, logger, signals)
    signals.exit_if_received(f"update {step}", primary, saved=step > 0)


def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    tasks = environments.set_tasks(cli.task_set(args.tasks))
    cli.check_bounds(dataclasses.replace(args, agent=with_model_size(args.agent, tasks)))
    cli.require(args.evaluate or args.data_dir, "training needs the dataset's folder: --data-dir")
    taught = args.evaluate or args.teacher or args.agent.distill_coef == Agent.distill_coef
    cli.require(taught, "--distill-coef goes with --teacher")
    cli.check_cluster(args)
    for task in tasks if args.capture_video and not args.evaluate else ():
        environments.check_rendering(task)


def main(argv: list[str] | None = None) -> None:
    with cli.errors_as_sentences():
        cli.refuse_moved(argv, ("--quantize", "--output", "--keep-target-q"), DEPLOY)
        args = cli.parse(Args, argv, __doc__, lambda args: recorded_settings(args, cli.set_folder, SCRIPTS, ()))
        check_args(args)
        set_up_jax(args.compile_cache, args.distributed)
        if args.distributed:
            devices.start_distributed(args)
        if args.evaluate:
            evaluate_checkpoint(args)
        else:
            run(args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
