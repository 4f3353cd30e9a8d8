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
import dataclasses
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
from tdmpc2_support import cli
from tdmpc2_support.agents.pretrained import load_agent
from tdmpc2_support.backend import clip_by_global_norm, global_norm, jit_with_graphs, this_backend
from tdmpc2_support.bounds import Count, Fraction, Name, Natural, NewFile, Number, Positive, Several, Share, Weight
from tdmpc2_support.cli import Flat, FromTask
from tdmpc2_support.devices import check_memory, committed, keep_freed_memory, set_up_jax
from tdmpc2_support.run.checkpoints import Checkpoints
from tdmpc2_support.run.folder import RunFolder, Signals, check_finite, recorded_settings
from tdmpc2_support.run.logging import Logger
from tdmpc2_support.run.reports import RETURNS_COLUMNS, Evaluation, progress, report_returns, returns_head
from tdmpc2_support.run.schedule import Streams, check_windows, due, random_streams, seed_steps_of, updates_due


# --------------------------------------------------------------------------------------------------- Agent and Args
@dataclasses.dataclass(frozen=True)
class Agent:
    """What defines the agent: saved with its weights, and a static argument of every compiled function."""

    # World model
    model_size: Literal[1, 5, 19, 48, 317] = 5  # millions of parameters: sets the next five where they are not given
    enc_dim: Count | None = None  # width of the encoder's hidden layers
    mlp_dim: Count | None = None  # width of all other hidden layers
    latent_dim: Count | None = None  # latent size Z
    num_enc_layers: Count | None = None  # layers of the encoder
    num_q: Several | None = None  # value heads
    episodic: bool = True  # learn a termination head where episodes can terminate; --no-episodic: none
    num_bins: Several = 101  # bins K of the discrete regression of rewards and values
    vmin: Number = -10.0  # lowest bin, in symlog space
    vmax: Number = 10.0  # highest bin, in symlog space
    simnorm_dim: Count = 8  # size of the groups in which SimNorm takes softmaxes
    dropout: Fraction = 0.01  # dropout after the first Linear of every value head
    log_std_min: Number = -10.0  # lower bound of the policy's log standard deviation
    log_std_max: Number = 2.0  # upper bound of the policy's log standard deviation
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (on GPUs float32 means TF32)

    # Learning
    batch_size: Count = 256  # windows per update B
    sample: Literal["episodes", "windows"] = "episodes"  # draw an episode, then a window of it; or any window
    lr: Positive = 3e-4  # learning rate
    enc_lr_scale: Weight = 0.3  # the encoder's learning rate is this share of lr
    grad_clip_norm: Positive = 20.0  # bound on the global gradient norm, of the model and of the policy each
    tau: Share = 0.01  # step of the target values and of the Q scale
    rho: Share = 0.5  # the paper's lambda: a loss t steps into the window has the weight rho^t
    consistency_coef: Weight = 20.0  # weight of the latent consistency loss
    reward_coef: Weight = 0.1  # weight of the reward loss
    value_coef: Weight = 0.1  # weight of the value loss
    termination_coef: Weight = 1.0  # weight of the termination loss
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

    # What the task decides, see `for_task`: no flags
    obs_dim: FromTask[int] = 0  # observation size O
    action_dim: FromTask[int] = 0  # action size A
    can_terminate: FromTask[bool] = False  # whether episodes can end before their time limit
    discount: FromTask[float] = 0.99  # gamma


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"  # a short name (python envs.py lists them) or any Gymnasium id with a Box action space
    agent: Flat[Agent] = Agent()

    # Data
    num_envs: Count = 1  # environments stepped side by side; one batched plan acts in all of them
    buffer_size: Count = 1_000_000  # decisions that the replay holds
    seed_steps: Natural | None = None  # random decisions, then as many updates at once; default max(1000, 5 episodes)
    utd: Positive = 1.0  # gradient updates per decision of one environment

    # Run
    exp_name: Name = "tdmpc2_jax"  # name of this experiment: its files go to RUNS_DIR/TASK/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the environments and every random draw
    total_timesteps: Count = 4_000_000  # length of the run in simulator steps (decisions x action repeat)
    resume: bool = False  # continue the run of this task, name and seed from its last checkpoint, if it has one
    checkpoint: str | None = None  # start from a run (of tdmpc2_jax_mt.py, too), a quantised file or an original .pt
    source_task: str | None = None  # task whose embedding is folded in, if --checkpoint is a multi-task agent
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the returns and exit
    json: NewFile | None = None  # with --evaluate: write the results to this file
    eval_freq: Count = 100_000  # simulator steps between evaluations (one more at step 0 and at the end)
    eval_episodes: Count = 10  # episodes of an evaluation, run side by side
    checkpoint_freq: Count = 100_000  # simulator steps between checkpoints (one more at the end, on SIGTERM, on Ctrl-C)
    log_freq: Count = 2_000  # simulator steps between two points of the loss curves
    capture_video: bool = False  # write one MP4 of every evaluation (needs a GL library)
    save_episodes: str | None = None  # also write the training episodes to this folder: a dataset for tdmpc2_jax_mt.py
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
SCRIPTS = ("tdmpc2_jax", "tdmpc2_jax_mt", "tdmpc2_jax_device", "newt_jax")  # whose checkpoints this one starts from
SIZE_FIELDS = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q")


def with_model_size(agent: Agent) -> Agent:
    """Fills in the five sizes that were not given from the table of model sizes."""
    sizes = dict(zip(SIZE_FIELDS, MODEL_SIZES[agent.model_size], strict=True))
    return dataclasses.replace(agent, **{k: v for k, v in sizes.items() if getattr(agent, k) is None})


def discount_of(agent: Agent, episode_length: int) -> float:
    """Discount of time scale 1 / (1 - discount) = episode_length / discount_denom, within its bounds (appendix)."""
    scale = episode_length / agent.discount_denom
    return float(np.clip((scale - 1) / scale, agent.discount_min, agent.discount_max))


def for_task(agent: Agent, task: str, envs) -> Agent:
    """The agent with all sizes filled in, and what the task and its vector environment decide."""
    spec = environments.task_spec(task)
    return dataclasses.replace(
        with_model_size(agent),
        obs_dim=envs.single_observation_space.shape[0],
        action_dim=envs.single_action_space.shape[0],
        can_terminate=spec.can_terminate,
        discount=discount_of(agent, spec.episode_length),
    )


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

    encoder: MLP  # h(s) -> z
    dynamics: MLP  # d(z, a) -> z'
    reward: MLP  # R(z, a) -> K logits
    pi: MLP  # p(z) -> mean and log std of A actions
    q: MLP  # Q(z, a) -> K logits: one head; the ensemble is the same module over stacked parameters
    termination: MLP | None  # logit of the probability that the episode ended on reaching z


def networks(agent: Agent) -> Networks:
    """The networks of an agent; with a termination head if episodes can terminate."""
    mlp = partial(MLP, (agent.mlp_dim, agent.mlp_dim), dtype=agent.compute_dtype)
    enc_hidden = (agent.enc_dim,) * max(agent.num_enc_layers - 1, 1)
    to_bins = mlp(agent.num_bins, zero_init=True, one_product=this_backend().one_product)  # not d: samples share a z
    return Networks(
        encoder=MLP(enc_hidden, agent.latent_dim, agent.simnorm_dim, dtype=agent.compute_dtype),
        dynamics=mlp(agent.latent_dim, agent.simnorm_dim),
        reward=to_bins,
        pi=mlp(2 * agent.action_dim),
        q=to_bins,
        termination=mlp(1) if agent.episodic and agent.can_terminate else None,
    )


def init_params(agent: Agent, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, one entry per component; those of `q` are stacked along a leading axis [num_q]."""
    model = networks(agent)
    z = jnp.zeros(agent.latent_dim)
    action = jnp.zeros(agent.action_dim)
    keys = jax.random.split(key, 6)
    params = {
        "encoder": model.encoder.init(keys[0], jnp.zeros(agent.obs_dim)),
        "dynamics": model.dynamics.init(keys[1], z, action),
        "reward": model.reward.init(keys[2], z, action),
        "pi": model.pi.init(keys[3], z),
        "q": jax.vmap(lambda k: model.q.init(k, z, action))(jax.random.split(keys[4], agent.num_q)),
    }
    if model.termination:
        params["termination"] = model.termination.init(keys[5], z)
    return params


# ------------------------------------------------------------------------------------------------------ World model
class PolicySample(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise
    log_std: jax.Array  # [..., A]
    entropy: jax.Array  # [...] -log pi(action)
    scaled_entropy: jax.Array  # [...] the entropy that the policy's loss rewards


def policy(agent: Agent, pi_params, z: jax.Array, eps: jax.Array) -> PolicySample:
    """Policy prior p(z), a squashed Gaussian: z [..., Z] and standard normal eps [..., A] -> sample and statistics."""
    mean, log_std = jnp.split(networks(agent).pi.apply(pi_params, z), 2, axis=-1)
    log_std = agent.log_std_min + 0.5 * (agent.log_std_max - agent.log_std_min) * (jnp.tanh(log_std) + 1)
    action = jnp.tanh(mean + eps * jnp.exp(log_std))
    log_gauss = (-0.5 * eps**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
    log_pi = log_gauss - jnp.log(jax.nn.relu(1 - action**2) + 1e-6).sum(-1)
    entropy_scale = agent.action_dim * log_gauss / (log_pi + 1e-8)
    return PolicySample(action, jnp.tanh(mean), log_std, -log_pi, -log_pi * entropy_scale)


def q_logits(agent: Agent, q_params, z: jax.Array, action: jax.Array, dropout=None) -> jax.Array:
    """All heads in q_params: z [..., Z], action [..., A] -> [q, ..., K]; dropout [q, ..., mlp_dim] or None."""
    head = networks(agent).q
    if dropout is not None or this_backend().heads_together:
        return jax.vmap(lambda params, factors: head.apply(params, z, action, dropout=factors))(q_params, dropout)
    num_heads = len(jax.tree.leaves(q_params)[0])
    logits = [head.apply(pick_heads(q_params, i), z, action) for i in range(num_heads)]
    return jnp.stack(logits)


def pick_heads(q_params, heads: jax.Array):
    """Parameters of the value heads with these indices only: where two Qs are needed, two are computed."""
    return jax.tree.map(lambda p: p[heads], q_params)


def dropout_mask(agent: Agent, key: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """Inverted dropout as a factor, from 16 random bits a unit: each 32-bit word that is drawn serves two units. Words
    are drawn in one row: of several axes they take more kernels."""
    if agent.dropout == 0:
        return None
    size = int(np.prod(shape))
    words = jax.random.bits(key, (-(-size // 2),), "uint32")
    bits = jnp.concatenate([words & 0xFFFF, words >> 16])[:size].reshape(shape)
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


def estimate_value(agent: Agent, params, z, actions, heads, eps) -> jax.Array:
    """Value [N] of action sequences [H, N, A] from z [1, Z]: rewards over the horizon, then the mean of two Qs."""
    model = networks(agent)
    zs = [z]
    for t in range(agent.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], actions[t]))
    last_z = zs[-1]
    zs = jnp.stack([jnp.broadcast_to(z, last_z.shape), *zs[1:]])  # [H+1, N, Z]
    reward = two_hot_inv(agent, model.reward.apply(params["reward"], zs[:-1], actions))  # [H, N]
    action = policy(agent, params["pi"], last_z, eps).action
    q = two_hot_inv(agent, q_logits(agent, pick_heads(params["q"], heads), last_z, action)).mean(0)
    weight = agent.discount ** np.arange(agent.horizon + 1)[:, None]  # [H+1, 1]
    if model.termination:  # nothing counts after a predicted termination
        alive = model.termination.apply(params["termination"], zs[1:])[..., 0] <= 0  # [H, N]
        weight = weight * jnp.cumprod(jnp.pad(alive, ((1, 0), (0, 0)), constant_values=True), axis=0)
    return jnp.nan_to_num((weight[:-1] * reward).sum(0) + weight[-1] * q, nan=0.0)


def plan(agent: Agent, params, obs, prev_mean, first, noise: PlanNoise, heads, explore: bool):
    """Model predictive path integral control (MPPI) in n environments at once.
    obs [n, O]; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the start of an episode;
    noise and heads as `plan_noise` draws them; explore adds noise to the action. Returns actions [n, A] in [-1, 1] and
    the new means [n, H, A].
    """
    n = len(obs)
    H = agent.horizon
    A = agent.action_dim
    chex.assert_shape([obs, prev_mean, first], [(n, agent.obs_dim), (n, H, A), (n,)])
    model = networks(agent)

    def plan_one(env):
        env_obs, last_mean, starts, draws = env
        z = model.encoder.apply(params["encoder"], env_obs)[None]  # [1, Z]
        pi_actions = []
        pi_z = z
        for t in range(H):
            pi_actions.append(policy(agent, params["pi"], pi_z, draws.pi[t]).action)
            if t < H - 1:
                pi_z = model.dynamics.apply(params["dynamics"], pi_z, pi_actions[t])
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(distribution, draw):
            mean, std = distribution
            sample_noise, terminal_noise, q_heads = draw
            sampled = jnp.clip(mean[:, None] + std[:, None] * sample_noise, -1, 1)
            actions = jnp.concatenate([pi_actions, sampled], axis=1)  # [H, N, A]
            values = estimate_value(agent, params, z, actions, q_heads, terminal_noise)
            elite_values, elite_indices = jax.lax.top_k(values, agent.num_elites)
            elites = actions[:, elite_indices]  # [H, num_elites, A]
            weights = jax.nn.softmax(agent.temperature * elite_values)  # [num_elites]
            mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), agent.min_std, agent.max_std)
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

    envs = (obs, prev_mean, first, noise)
    at_once = environments_at_once(agent)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


def environments_at_once(agent: Agent) -> int:
    """How many environments are planned for side by side, the others after them."""
    layer_bytes = 4 * agent.num_samples * agent.mlp_dim
    return max(1, this_backend().plan_bytes // layer_bytes)


@partial(jit_with_graphs, static_argnames=("agent", "explore", "random"))
def act(agent: Agent, params, obs, prev_mean, first, key, explore: bool, random: bool = False):
    """Actions [n, A] for obs [n, O] by `plan`, by the policy (--no-mpc) or random; the planner's means; a new key."""
    n = len(obs)
    key, noise_key = jax.random.split(key)
    if random:
        action = jax.random.uniform(noise_key, (n, agent.action_dim), minval=-1, maxval=1)
    elif agent.mpc:
        noise, heads = plan_noise(agent, noise_key, n)
        action, prev_mean = plan(agent, params, obs, prev_mean, first, noise, heads, explore)
    else:
        z = networks(agent).encoder.apply(params["encoder"], obs)
        sample = policy(agent, params["pi"], z, jax.random.normal(noise_key, (n, agent.action_dim)))
        action = sample.action if explore else sample.mean
    return action, prev_mean, key


# --------------------------------------------------------------------------------------------------------- Learning
class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict[str, Any]  # encoder, dynamics, reward, pi, q, and termination if the task is episodic
    target_q: dict[str, Any]  # slow copy of params["q"]
    model_opt: optax.OptState  # of everything but the policy
    pi_opt: optax.OptState
    q_scale: jax.Array  # running 5-95% range of the values, at least 1, by which Q is divided in the policy's loss
    key: jax.Array
    updates: jax.Array  # number of updates made


class Batch(NamedTuple):
    """Windows of H+1 consecutive entries: actions and rewards lead from one observation to the next."""

    obs: jax.Array  # [H+1, B, O]
    action: jax.Array  # [H, B, A]
    reward: jax.Array  # [H, B]
    terminated: jax.Array  # [H, B]


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
        q_scale=jnp.asarray(q_scale, jnp.float32),
        key=key,
        updates=jnp.zeros((), jnp.int32),
    )


def td_target(agent: Agent, state: TrainState, next_z, batch: Batch, noise: UpdateNoise) -> jax.Array:
    """TD targets [H, B]: r + discount * (1 - terminated) * min of two random target Qs at the policy's next action."""
    next_action = policy(agent, state.params["pi"], next_z, noise.next_action).action
    q = two_hot_inv(agent, q_logits(agent, pick_heads(state.target_q, noise.target_heads), next_z, next_action))
    return batch.reward + agent.discount * (1 - batch.terminated) * q.min(0)


def model_loss(agent: Agent, params, batch: Batch, next_z, target, noise: UpdateNoise):
    """World-model objective (eq. 3, the original's means over steps, heads and Z in place of sums) on latent rollouts
    [H+1, B, Z], which are returned with it and its parts."""
    model = networks(agent)
    rho = agent.rho ** np.arange(agent.horizon)[:, None]  # [H, 1]
    zs = [model.encoder.apply(params["encoder"], batch.obs[0])]
    for t in range(agent.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward_logits = model.reward.apply(params["reward"], zs[:-1], batch.action)  # [H, B, K]
    value_logits = q_logits(agent, params["q"], zs[:-1], batch.action, noise.dropout)  # [q, H, B, K]
    consistency = (rho * ((zs[1:] - next_z) ** 2).mean(-1)).mean()
    reward = (rho * soft_ce(agent, reward_logits, batch.reward)).mean()
    value = (rho * soft_ce(agent, value_logits, target)).mean()
    total = agent.consistency_coef * consistency + agent.reward_coef * reward + agent.value_coef * value
    info = {"consistency_loss": consistency, "reward_loss": reward, "value_loss": value}
    if model.termination:  # not in the paper: a later addition of the original
        logits = model.termination.apply(params["termination"], zs[1:])[..., 0]  # [H, B]
        termination = optax.sigmoid_binary_cross_entropy(logits, batch.terminated).mean()
        total = total + agent.termination_coef * termination
        info["termination_loss"] = termination
    return total, (zs, info | {"total_loss": total})


def policy_loss(agent: Agent, pi_params, q_params, zs, q_scale, noise: UpdateNoise):
    """Policy objective (eq. 4) on latent states zs [H+1, B, Z]. Returns the loss, and the new Q scale and entropies."""
    pi = policy(agent, pi_params, zs, noise.pi_action)
    logits = q_logits(agent, pick_heads(q_params, noise.pi_heads), zs, pi.action, noise.pi_dropout)
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


def update(agent: Agent, state: TrainState, batch: Batch, noise: UpdateNoise) -> tuple[TrainState, dict[str, Any]]:
    """One gradient step on the world model, then one on the policy, then a step of the target values towards the new
    ones. Returns the new state and a dict of scalars for the log."""
    H = agent.horizon
    B = len(batch.obs[0])
    chex.assert_shape(list(batch), [(H + 1, B, agent.obs_dim), (H, B, agent.action_dim), (H, B), (H, B)])
    model_tx, pi_tx = optimizers(agent)

    next_z = networks(agent).encoder.apply(state.params["encoder"], batch.obs[1:])  # [H, B, Z] no gradient
    target = td_target(agent, state, next_z, batch, noise)  # [H, B] no gradient, either
    model_params = {k: v for k, v in state.params.items() if k != "pi"}
    loss = partial(model_loss, agent, batch=batch, next_z=next_z, target=target, noise=noise)
    grads, (zs, info) = jax.grad(loss, has_aux=True)(model_params)
    change, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, change)

    # The new values judge the policy, on the latent states of before the model's step; neither learns from it
    loss = partial(policy_loss, agent, q_params=model_params["q"], zs=zs, q_scale=state.q_scale, noise=noise)
    pi_grads, (q_scale, pi_info) = jax.grad(loss, has_aux=True)(state.params["pi"])
    pi_change, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(state.params["pi"], pi_change)

    target_q = optax.incremental_update(model_params["q"], state.target_q, agent.tau)
    info |= pi_info | {"grad_norm": global_norm(grads), "pi_grad_norm": global_norm(pi_grads)}
    params = model_params | {"pi": pi_params}
    return TrainState(params, target_q, model_opt, pi_opt, q_scale, state.key, state.updates + 1), info


# ----------------------------------------------------------------------------------------------------------- Replay
class Step(NamedTuple):
    """One step of n environments, as the replay stores it."""

    obs: jax.Array  # [n, O]
    action: jax.Array  # [n, A] that led to the observation
    reward: jax.Array  # [n] that it brought
    terminated: jax.Array  # [n]
    first: jax.Array  # [n] the observation is that of a reset: action, reward and terminated are filler


class Replay(NamedTuple):
    """Ring of the last C steps of n environments, on the device; a row holds an entry of each. A window of H+1 entries
    starts at an entry that H more follow without a reset among them. `starts` is a queue of these starts, the oldest
    first. With --sample windows it holds all of them: a uniform draw is one of windows. With --sample episodes it holds
    the last start of each episode: a uniform draw is one of episodes. The episode under way is among them (the original
    waits for its end). With H = 2:

        row       0  1  2  3  4  5  6  7  8     the last row written is 8
        first     x           x                 episodes of 4 entries, and of 5 so far
        start     x  x        x  x  x           entries 2 and 3 lack followers, 7 and 8 do so far
        starts    0  1  4  5  6                 windows: a draw of 5 is the window of rows 5, 6, 7
        starts       1        6                 episodes: a draw of 6 is the second one, ...
        is_start  0  2  0  0  0  0  3  0  0     ... which has three windows up to there
    """

    obs: jax.Array  # [C, n, O]
    action: jax.Array  # [C, n, A] that led to the observation
    reward: jax.Array  # [C, n] that it brought
    terminated: jax.Array  # [C, n]
    first: jax.Array  # [C, n] the entry is a reset: action and reward are filler
    is_start: jax.Array  # [C, n] 0: not in the queue; for episodes, how many windows its episode has up to it
    starts: jax.Array  # [C * n] ring of flat indices row * n + environment
    head: jax.Array  # position of the oldest start in the ring
    size: jax.Array  # length of the queue
    rows: jax.Array  # number of steps ever written


def init_replay(agent: Agent, capacity: int, num_envs: int) -> Replay:
    """Empty replay of `capacity` steps of each environment."""
    C = capacity
    n = num_envs
    return Replay(
        obs=jnp.zeros((C, n, agent.obs_dim)),
        action=jnp.zeros((C, n, agent.action_dim)),
        reward=jnp.zeros((C, n)),
        terminated=jnp.zeros((C, n), bool),
        first=jnp.zeros((C, n), bool),
        is_start=jnp.zeros((C, n), jnp.int32 if agent.sample == "episodes" else bool),
        starts=jnp.zeros(C * n, jnp.int32),
        head=jnp.zeros((), jnp.int32),
        size=jnp.zeros((), jnp.int32),
        rows=jnp.zeros((), jnp.int32),
    )


@partial(jax.jit, static_argnames="agent", donate_argnames="replay")
def add(agent: Agent, replay: Replay, step: Step) -> Replay:
    """Writes one step of all environments over the oldest one."""
    C, n = replay.first.shape
    row = replay.rows % C
    written = {k: getattr(replay, k).at[row].set(v) for k, v in step._asdict().items()}
    start = (replay.rows - agent.horizon) % C  # the windows that this step completes start here
    after_start = (start + 1 + jnp.arange(agent.horizon)) % C
    valid = ~written["first"][after_start].any(0) & (replay.rows >= agent.horizon)  # [n]
    return Replay(**written, **move_queue(agent, replay, row, start, valid), rows=replay.rows + 1)


def move_queue(agent: Agent, replay: Replay, row: jax.Array, start: jax.Array, valid: jax.Array) -> dict:
    """Fields of the queue without the starts in `row`, which is overwritten: they are its oldest; and with those in row
    `start` where valid [n]."""
    C, n = replay.first.shape
    expired = (replay.is_start[row] > 0).sum()
    head = (replay.head + expired) % (C * n)
    size = replay.size - expired
    before = (start - 1) % C
    newest = replay.is_start.at[row].set(False)[before]  # [n] the newest of the queue
    stays = newest > 0
    number = valid.astype(newest.dtype)
    if agent.sample == "episodes":  # the new window takes the place of the one before it in its episode
        stays &= ~valid
        number *= newest + 1
    size -= (newest > 0).sum()
    added = jnp.concatenate([stays, valid])
    index = jnp.concatenate([before * n + jnp.arange(n), start * n + jnp.arange(n)])
    slots = jnp.where(added, (head + size + jnp.cumsum(added) - 1) % (C * n), C * n)  # C * n: dropped
    return {
        "is_start": replay.is_start.at[row].set(False).at[before].set(newest * stays).at[start].set(number),
        "starts": replay.starts.at[slots].set(index, mode="drop"),
        "head": head,
        "size": size + added.sum(),
    }


def draw_starts(agent: Agent, replay: Replay, key: jax.Array, oldest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows and environments [B] where windows start, drawn with replacement: of all of them uniformly; or an episode
    uniformly, then one of its windows, none before row `oldest`."""
    C, n = replay.first.shape
    key, number_key = jax.random.split(key)
    drawn = jax.random.randint(key, (agent.batch_size,), 0, replay.size)
    row, env = jnp.divmod(replay.starts[(replay.head + drawn) % (C * n)], n)
    if agent.sample == "episodes":
        windows = jnp.minimum(replay.is_start[row, env], (row - oldest) % C + 1)  # those whose rows are still there
        row -= jax.random.randint(number_key, (agent.batch_size,), 0, windows)
    return row % C, env


def sample(agent: Agent, replay: Replay, key: jax.Array) -> Batch:
    """Windows that begin where `draw_starts` says."""
    C = len(replay.first)
    row, env = draw_starts(agent, replay, key, replay.rows % C)
    rows = (row + jnp.arange(agent.horizon + 1)[:, None]) % C  # [H+1, B]
    terminated = replay.terminated[rows[1:], env].astype(jnp.float32)
    return Batch(replay.obs[rows, env], replay.action[rows[1:], env], replay.reward[rows[1:], env], terminated)


@partial(jit_with_graphs, static_argnames=("agent", "random"), donate_argnames=("replay", "prev_mean"))
def add_and_act(agent: Agent, params, replay: Replay, step: Step, prev_mean, key, random: bool):
    """What a decision needs, in one dispatch: `add` writes the last step, and `act` explores on it. Returns the replay
    and what `act` returns."""
    replay = add(agent, replay, step)
    action, prev_mean, key = act(agent, params, step.obs, prev_mean, step.first, key, explore=True, random=random)
    return replay, action, prev_mean, key


@partial(jit_with_graphs, static_argnames=("agent", "num_updates"), donate_argnames=("state",))
def train(agent: Agent, state: TrainState, replay: Replay, num_updates: int):
    """`num_updates` updates on fresh samples in one dispatch. Returns the new state and the means of their scalars."""

    def one(state, _):
        key, sample_key, noise_key = jax.random.split(state.key, 3)
        batch = sample(agent, replay, sample_key)
        return update(agent, state._replace(key=key), batch, update_noise(agent, noise_key))

    state, infos = jax.lax.scan(one, state, None, length=num_updates)
    return state, jax.tree.map(jnp.mean, infos)


# ------------------------------------------------------------------------------------------------------- Evaluation
def make_eval_envs(args: Args):
    """The environments of an evaluation, one for each of its episodes."""
    render_mode = "rgb_array" if args.capture_video else None
    return environments.make_envs(args.task, args.eval_episodes, (args.seed, 1), render_mode=render_mode)


def evaluate(agent: Agent, params, envs, key, seed, film=False, advance=lambda: None, stop=False) -> Evaluation | None:
    """One episode in each of n environments, without exploration; with a film of the first environment if asked for.

    Args:
        seed: of the environments.
        advance: called after every step.
        stop: true when the evaluation is to be left; then None is returned.
    """
    n = envs.num_envs
    obs, _ = envs.reset(seed=seed)
    first = np.ones(n, bool)
    running = np.ones(n, bool)
    returns = np.zeros(n)
    successes = np.zeros(n)
    frames = [envs.render()[0]] if film else []
    mean, key = committed((jnp.zeros((n, agent.horizon, agent.action_dim)), key))
    while running.any():
        action, mean, key = act(agent, params, obs, mean, first, key, explore=False)
        obs, reward, terminated, truncated, info = envs.step(np.asarray(action))
        if film and running[0]:
            frames.append(envs.render()[0])
        returns += np.where(running, reward, 0.0)
        successes = np.where(running, info["success"], successes)
        running &= ~(terminated | truncated)
        first = np.zeros(n, bool)
        advance()
        if stop:
            return None
    return Evaluation(returns, successes, frames, envs.metadata.get("render_fps", 25))


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints every episode's return and their mean, and writes them to --json."""
    spec = environments.task_spec(args.task)
    with contextlib.closing(make_eval_envs(args)) as envs, progress(spec.episode_length) as advance:
        agent = for_task(args.agent, args.task, envs)
        loaded = load_agent(args.checkpoint, args.source_task, partial(init_params, agent), *SCRIPTS)
        key = random_streams(args.seed).evaluate
        result = evaluate(agent, loaded.params, envs, key, (args.seed, 1), args.capture_video, advance)
    report_returns(args, spec, result)


# -------------------------------------------------------------------------------------------------------------- Run
@partial(jax.jit, static_argnames="agent")
def fresh_state(agent: Agent, streams: Streams) -> dict[str, Any]:
    """What a checkpoint holds beside the replay: the learning state, and the random key of the acting."""
    params = init_params(agent, streams.init)
    return {"train": init_state(agent, params, params["q"], 1.0, streams.train), "act_key": streams.act}


def start_or_resume(args: Args, agent: Agent, checkpoints: Checkpoints) -> tuple[TrainState, Any, Replay, dict]:
    """Learning state, key of the acting, replay and counters of the run's last checkpoint; without one all is fresh,
    but for the agent if --checkpoint names one."""
    count = {"decisions": 0, "updates": 0, "evaluated": -1, "seconds": 0.0}
    new_replay = partial(init_replay, agent, args.buffer_size // args.num_envs, args.num_envs)
    check_memory(new_replay, args.buffer_size, args.total_timesteps)
    learner, replay = checkpoints.restore_or_make(
        count,
        state=partial(fresh_state, agent, random_streams(args.seed)),
        replay=new_replay,
    )
    state = learner["train"]
    if args.checkpoint and not count["decisions"]:
        loaded = load_agent(args.checkpoint, args.source_task, partial(init_params, agent), *SCRIPTS)
        state = committed(init_state(agent, loaded.params, loaded.target_q, loaded.q_scale, state.key))
    return state, learner["act_key"], replay, count


def loop(args: Args, agent: Agent, state, key, replay, count, envs, eval_envs, checkpoints, logger, signals) -> int:
    """Acts, evaluates, saves, learns, steps the environments and logs, until --total-timesteps or a signal. Returns the
    simulator step at which it has stopped."""
    spec = environments.task_spec(args.task)
    n = args.num_envs
    eval_key = random_streams(args.seed).evaluate
    seed_steps = seed_steps_of(args, spec)
    burst = max(1, int(args.utd * n))  # updates of one dispatch
    untrained = agent
    if jax.default_backend() == "cpu" and not args.checkpoint:
        untrained = dataclasses.replace(agent, mpc=False)  # there its plans would take minutes
    episodes = environments.EpisodeWriter(args.save_episodes, args.task, n)
    step = saved = count["decisions"] * spec.action_repeat
    info = {}
    prev_mean = committed(jnp.zeros((n, agent.horizon, agent.action_dim)))
    obs, _ = envs.reset(seed=(args.seed, 0, step))  # a resumed run begins new episodes, not the first ones again
    action = np.zeros((n, agent.action_dim), np.float32)
    done = np.zeros(n, bool)
    zeros = np.zeros(n, np.float32)
    entry = Step(obs, committed(action), zeros, terminated=done, first=~done)  # a reset: the rest is filler
    while True:
        # Act: dispatched here, read when the environments are stepped
        random = count["decisions"] <= seed_steps and not args.checkpoint
        episodes.add(obs, action, entry.reward, entry.first)
        replay, action, prev_mean, key = add_and_act(agent, state.params, replay, entry, prev_mean, key, random)

        # Evaluate
        finished = step >= args.total_timesteps
        if due(step, count["evaluated"], args.eval_freq, finished):
            with logger.paused(f"evaluating at step {step}", spec.episode_length) as advance:
                draws = jax.random.fold_in(eval_key, step), (args.seed, 1, step)
                shown = args.capture_video, advance, signals
                result = evaluate(agent if step else untrained, state.params, eval_envs, *draws, *shown)
            if result is not None:
                count["evaluated"] = step
                logger.record_returns(step, spec, result)

        # Save
        if due(step, saved, args.checkpoint_freq, finished or signals):
            check_finite(logger.folder, f"simulator step {step}", **jax.device_get(info))
            episodes.flush()
            count["seconds"] = logger.seconds()
            with logger.paused():
                checkpoints.save(step, count, state={"train": state, "act_key": key}, replay=replay)
            saved = step
        if saved == step and (finished or signals):  # a signal that comes only now waits until the next step is saved
            return step

        # Learn: seed_steps updates at once, then utd per decision; computed while the environments step
        bursts = updates_due(count["decisions"], count["updates"], seed_steps, args.utd, burst, replay.size)
        for _ in logger.with_bar("learning", range(bursts)):
            state, info = train(agent, state, replay, num_updates=burst)
            count["updates"] += burst
            if signals:
                break

        # Step: an environment whose episode is over is reset by this step and ignores the action
        on_device = action
        action = np.asarray(action)  # all that is fetched from the device between two decisions
        obs, reward, terminated, truncated, infos = envs.step(action)
        check_finite(logger.folder, f"simulator step {step}", action=action, reward=reward, observation=obs)
        entry = Step(obs, on_device, reward.astype(np.float32), terminated, first=done)  # done before: now it is reset
        count["decisions"] += n - int(done.sum())
        done = terminated | truncated
        step = count["decisions"] * spec.action_repeat

        # Log
        logger.log_episodes(step, done, infos)
        if due(step, logger.logged, args.log_freq):
            check_windows(replay.size, count["updates"], agent.horizon)
            logger.log_losses(step, info)
        logger.advance(step)


def run(args: Args) -> None:
    """Trains one agent and keeps the run's files."""
    spec = environments.task_spec(args.task)
    cli.check_replay(args, spec, seed_steps_of(args, spec))
    signals = Signals()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(cli.run_folder(args), cli.settings(args)))
        envs = environments.make_envs(args.task, args.num_envs, (args.seed, 0))
        envs = stack.enter_context(contextlib.closing(RecordEpisodeStatistics(envs)))
        eval_envs = stack.enter_context(contextlib.closing(make_eval_envs(args)))
        agent = for_task(args.agent, args.task, envs)
        checkpoints = stack.enter_context(Checkpoints(folder, "tdmpc2_jax"))
        state, key, replay, count = start_or_resume(args, agent, checkpoints)
        folder.begin()
        logger = stack.enter_context(Logger(folder, RETURNS_COLUMNS, signals=signals))
        made = f"{envs.metadata['observations']}, {envs.metadata['actions']}"
        title = f"{spec.name}: {made}, {args.num_envs} environment(s)"
        step = count["decisions"] * spec.action_repeat
        logger.begin(title, returns_head(spec), state.params, step, args.total_timesteps, count)
        stack.enter_context(signals)
        step = loop(args, agent, state, key, replay, count, envs, eval_envs, checkpoints, logger, signals)
    signals.exit_if_received(f"simulator step {step}", saved=step > 0)


def main(argv: list[str] | None = None) -> None:
    with cli.errors_as_sentences():
        args = cli.parse(Args, argv, __doc__, lambda args: recorded_settings(args, cli.run_folder, SCRIPTS))
        cli.check_bounds(dataclasses.replace(args, agent=with_model_size(args.agent)))
        if args.capture_video:
            environments.check_rendering(args.task)
        set_up_jax(args.compile_cache)
        if args.evaluate:
            evaluate_checkpoint(args)
        else:
            run(args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
