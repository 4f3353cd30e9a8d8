"""TD-MPC2 from pixels in one file: a latent world model, a policy and values learned together, and MPPI planning.

Paper: Hansen, Su, Wang, "TD-MPC2: Scalable, Robust World Models for Continuous Control" (arXiv 2310.16828).
Online reinforcement learning on one task from pictures: tdmpc2_jax.py with a convolutional encoder of the last three
frames, random shifts of them, and a replay of single frames. Shapes are written in the paper's letters: H horizon,
B batch, N samples of the planner, P policy sequences, A action size, Z latent size, K bins of the discrete regression,
n environments, q an ensemble of value heads; a picture is [64, 64, 3], a stack of them [64, 64, 9], oldest first.

    python tdmpc2_jax_rgb.py --task dm_control/walker-walk-v0               # train; a killed run goes on with --resume
    python tdmpc2_jax_rgb.py --evaluate --checkpoint runs/walker-walk/tdmpc2_jax_rgb/1
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
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
from tdmpc2_support import cli
from tdmpc2_support.agents.pretrained import load_agent
from tdmpc2_support.cli import Count, Fraction, Name, Natural, NewFile, Number, Positive, Several, Share, Weight
from tdmpc2_support.convolution import convolve
from tdmpc2_support.devices import keep_freed_memory, place_replay, use_compile_cache
from tdmpc2_support.run.reports import RETURNS_COLUMNS, evaluating, play, report_returns, returns_head


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"  # one of DMControl or Meta-World (python envs.py), or a Gymnasium id of 64 x 64 pictures
    shadows: bool = True  # shadows and reflections in the pictures, as published; --no-shadows draws them faster

    # World model
    model_size: Literal[1, 5, 19, 48, 317] = 5  # millions of parameters, if it saw states: sets the next three
    mlp_dim: Count | None = None  # width of all hidden layers
    latent_dim: Count | None = None  # latent size Z: 16 units for each channel of the encoder's convolutions
    num_q: Several | None = None  # value heads
    episodic: bool = True  # learn a termination head where episodes can terminate; --no-episodic plans as if not
    num_bins: Several = 101  # bins K of the discrete regression of rewards and values
    vmin: Number = -10.0  # lowest bin, in symlog space
    vmax: Number = 10.0  # highest bin, in symlog space
    simnorm_dim: Count = 8  # size of the groups in which SimNorm takes softmaxes
    dropout: Fraction = 0.01  # dropout after the first layer of every value head
    log_std_min: Number = -10.0  # lower bound of the policy's log standard deviation
    log_std_max: Number = 2.0  # upper bound of the policy's log standard deviation
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (on GPUs float32 means TF32)

    # Learning
    batch_size: Count = 256  # windows per update B
    buffer_size: Count = 1_000_000  # decisions that the replay holds, 12.3 KB each
    num_envs: Count = 1  # environments stepped side by side; one batched plan acts in all of them
    utd: Positive = 1.0  # gradient updates per decision of one environment
    seed_steps: Natural | None = None  # random decisions, then as many updates at once; default max(1000, 5 episodes)
    lr: Positive = 3e-4  # learning rate
    enc_lr_scale: Weight = 0.3  # the encoder's learning rate is this share of lr
    grad_clip_norm: Positive = 20.0  # bound on the global gradient norm, of the model and of the policy each
    tau: Share = 0.01  # step of the target values and of the Q scale
    rho: Share = 0.5  # weight of a loss t steps into the window is rho^t
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
    temperature: Weight = 0.5  # inverse temperature of the elites' weights

    # Run
    exp_name: Name = "tdmpc2_jax_rgb"  # name of this experiment: its files go to RUNS_DIR/TASK/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the environments and every random draw
    total_timesteps: Count = 4_000_000  # length of the run in simulator steps (decisions x action repeat)
    resume: bool = False  # continue the run of this task, name and seed from its last checkpoint, if it has one
    checkpoint: str | None = None  # start from this agent: a run, or an original .pt
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the returns and exit
    json: NewFile | None = None  # with --evaluate: write the results to this file
    eval_freq: Count = 100_000  # simulator steps between evaluations (one more at step 0 and at the end)
    eval_episodes: Count = 10  # episodes of an evaluation, run side by side
    checkpoint_freq: Count = 100_000  # simulator steps between checkpoints (one more at the end, on SIGTERM, on Ctrl-C)
    log_freq: Count = 2_000  # simulator steps between two points of the loss curves
    capture_video: bool = False  # write one MP4 of every evaluation (needs a GL library)
    storage: Literal["auto", "device", "host"] = "auto"  # whose memory holds the replay: the device's if it fits
    track: bool = False  # also send everything to Weights & Biases (pip install wandb)
    wandb_project_name: str = "tdmpc2-jax"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    compile_cache: bool = True  # keep compiled programs in ~/.cache/tdmpc2-jax: the second start is faster


MODEL_SIZES = {  # millions of parameters: (mlp_dim, latent_dim, num_q)
    1: (384, 128, 2),
    5: (512, 512, 5),
    19: (1024, 768, 5),
    48: (1792, 768, 5),
    317: (4096, 1376, 8),
}
SCRIPTS = ("tdmpc2_jax_rgb",)  # whose checkpoints this one starts from
SIZE_FIELDS = ("mlp_dim", "latent_dim", "num_q")
PIXELS = environments.PIXELS  # height and width of a picture
FRAMES = 3  # pictures in a stack
SHIFT = 3  # pixels that a stack is moved at most, in each direction


def with_model_size(args: Args) -> Args:
    """Fills in the three sizes that were not given from the table of model sizes."""
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


class ConvEncoder(nn.Module):
    """Four convolutions with ReLUs between them, flattened channel by channel, then SimNorm."""

    channels: int
    simnorm_dim: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, stack):
        """Stacks [b, 64, 64, 9] of numbers 0 .. 255 -> z [b, 16 * channels]."""
        x = stack / 255.0 - 0.5
        for i, (size, stride) in enumerate([(7, 2), (5, 2), (3, 2), (3, 1)]):  # 64 -> 29 -> 13 -> 6 -> 4
            bound = (size * size * x.shape[-1]) ** -0.5
            init = partial(jax.random.uniform, minval=-bound, maxval=bound)
            kernel = self.param(f"kernel_{i}", init, (size, size, x.shape[-1], self.channels))
            bias = self.param(f"bias_{i}", init, (self.channels,))
            x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), stride).astype(jnp.float32) + bias
            x = nn.relu(x) if i < 3 else x
        return simnorm(jnp.moveaxis(x, -1, 1).reshape(len(x), -1), self.simnorm_dim)


class WorldModel(NamedTuple):
    """The components of the model. Hashable and without parameters: a static argument of the jitted functions."""

    encoder: ConvEncoder  # h(s) -> z
    dynamics: MLP  # d(z, a) -> z'
    reward: MLP  # R(z, a) -> K logits
    pi: MLP  # p(z) -> mean and log std of A actions
    q: MLP  # Q(z, a) -> K logits: one head; the ensemble is the same module over stacked parameters
    termination: MLP | None  # logit of the probability that the episode ended on reaching z
    num_q: int
    action_dim: int


def make_model(args: Args, action_dim: int, episodic: bool) -> WorldModel:
    """The networks for A = action_dim; with a termination head if episodic."""
    args = with_model_size(args)
    mlp = partial(MLP, (args.mlp_dim, args.mlp_dim), dtype=args.compute_dtype)
    return WorldModel(
        encoder=ConvEncoder(args.latent_dim // 16, args.simnorm_dim, args.compute_dtype),
        dynamics=mlp(args.latent_dim, args.simnorm_dim),
        reward=mlp(args.num_bins, zero_init=True),
        pi=mlp(2 * action_dim),
        q=mlp(args.num_bins, zero_init=True),
        termination=mlp(1) if episodic else None,
        num_q=args.num_q,
        action_dim=action_dim,
    )


def init_params(args: Args, model: WorldModel, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, one entry per component; those of `q` are stacked along a leading axis [num_q]."""
    z, a = jnp.zeros(with_model_size(args).latent_dim), jnp.zeros(model.action_dim)
    keys = jax.random.split(key, 6)
    params = {
        "encoder": model.encoder.init(keys[0], jnp.zeros((1, PIXELS, PIXELS, 3 * FRAMES))),
        "dynamics": model.dynamics.init(keys[1], z, a),
        "reward": model.reward.init(keys[2], z, a),
        "pi": model.pi.init(keys[3], z),
        "q": jax.vmap(lambda k: model.q.init(k, z, a))(jax.random.split(keys[4], model.num_q)),
    }
    return params | ({"termination": model.termination.init(keys[5], z)} if model.termination else {})


# ------------------------------------------------------------------------------------------------------ World model
def random_shift(stack: jax.Array, shift: jax.Array) -> jax.Array:
    """A stack [64, 64, 9] moved right and down by 3 - shift pixels, shift (x, y) in 0 .. 6, all its pictures alike.
    What comes in repeats the edge; no pixel changes its value."""
    padded = jnp.pad(stack, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    return jax.lax.dynamic_slice(padded, (shift[1], shift[0], 0), stack.shape)


def encode(model: WorldModel, encoder_params, stack: jax.Array, shift: jax.Array) -> jax.Array:
    """Encoder h(s): stacks uint8 [..., 64, 64, 9], each moved by its shift [..., 2] -> z [..., Z]."""

    def one(stack_and_shift):
        return model.encoder.apply(encoder_params, random_shift(*stack_and_shift)[None])[0]

    flat = stack.reshape(-1, *stack.shape[-3:]), shift.reshape(-1, 2)
    if jax.default_backend() == "cpu":  # so few at once that a layer stays in the cache
        z = jax.lax.map(one, flat, batch_size=8)
    else:
        z = jax.vmap(one)(flat)
    return z.reshape(*stack.shape[:-3], -1)


class PolicySample(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise
    log_std: jax.Array  # [..., A]
    entropy: jax.Array  # [...] -log pi(action)
    scaled_entropy: jax.Array  # [...] the entropy that the policy's loss rewards


def policy(args: Args, model: WorldModel, pi_params, z: jax.Array, eps: jax.Array) -> PolicySample:
    """Policy prior p(z), a squashed Gaussian: z [..., Z] and standard normal eps [..., A] -> sample and statistics."""
    mean, log_std = jnp.split(model.pi.apply(pi_params, z), 2, axis=-1)
    log_std = args.log_std_min + 0.5 * (args.log_std_max - args.log_std_min) * (jnp.tanh(log_std) + 1)
    action = jnp.tanh(mean + eps * jnp.exp(log_std))
    log_gauss = (-0.5 * eps**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
    log_pi = log_gauss - jnp.log(jax.nn.relu(1 - action**2) + 1e-6).sum(-1)
    entropy_scale = model.action_dim * log_gauss / (log_pi + 1e-8)
    return PolicySample(action, jnp.tanh(mean), log_std, -log_pi, -log_pi * entropy_scale)


def q_logits(model: WorldModel, q_params, z: jax.Array, action: jax.Array, dropout=None) -> jax.Array:
    """All heads in q_params: z [..., Z], action [..., A] -> [q, ..., K]; dropout [q, ..., mlp_dim] or None."""
    if dropout is None:
        heads = (pick_heads(q_params, i) for i in range(len(jax.tree.leaves(q_params)[0])))
        return jnp.stack([model.q.apply(p, z, action) for p in heads])  # on a CPU faster than batched products
    return jax.vmap(lambda p, d: model.q.apply(p, z, action, dropout=d))(q_params, dropout)


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


# --------------------------------------------------------------------------------------------------------- Planning
class PlanNoise(NamedTuple):
    """Every random draw of one plan in n environments. All are made up front, so that `plan` is a plain function of
    arrays: given the draws that another program has recorded, it must return that program's plan."""

    shift: jax.Array  # [n, 2] (x, y) in 0 .. 6: of the pictures
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
    keys = jax.random.split(key, 7)
    noise = PlanNoise(
        shift=jax.random.randint(keys[6], (n, 2), 0, 2 * SHIFT + 1),
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


def estimate_value(args: Args, model: WorldModel, params, z, actions, discount, heads, eps) -> jax.Array:
    """Value [N] of action sequences [H, N, A] from z [1, Z]: rewards over the horizon, then the mean of two Qs."""
    value, alive = 0.0, 1.0  # alive: 0 after a predicted termination
    for t in range(args.horizon):
        reward = two_hot_inv(args, model.reward.apply(params["reward"], z, actions[t]))
        value = value + discount**t * alive * reward
        z = model.dynamics.apply(params["dynamics"], z, actions[t])
        if model.termination:
            alive = alive * (model.termination.apply(params["termination"], z)[..., 0] <= 0)
    action = policy(args, model, params["pi"], z, eps).action
    q = two_hot_inv(args, q_logits(model, pick_heads(params["q"], heads), z, action)).mean(0)
    return jnp.nan_to_num(value + discount**args.horizon * alive * q, nan=0.0)


def plan(args: Args, model: WorldModel, params, obs, prev_mean, first, discount, noise: PlanNoise, heads, explore):
    """Model predictive path integral control (MPPI) in n environments at once.
    obs [n, 64, 64, 9]; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the start of an
    episode; discount, a scalar; noise and heads as `plan_noise` draws them; explore adds noise to the action. Returns
    actions [n, A] in [-1, 1] and the new means [n, H, A].
    """
    n, H, A = len(obs), args.horizon, model.action_dim
    chex.assert_shape([obs, prev_mean, first], [(n, PIXELS, PIXELS, 3 * FRAMES), (n, H, A), (n,)])

    def plan_one(env):
        env_obs, last_mean, starts, draws = env
        z = encode(model, params["encoder"], env_obs, draws.shift)[None]  # [1, Z]
        pi_actions, pi_z = [], z
        for t in range(H):
            pi_actions.append(policy(args, model, params["pi"], pi_z, draws.pi[t]).action)
            pi_z = model.dynamics.apply(params["dynamics"], pi_z, pi_actions[t]) if t < H - 1 else None
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(distribution, draw):
            (mean, std), (sample_noise, terminal_noise, two) = distribution, draw
            sampled = jnp.clip(mean[:, None] + std[:, None] * sample_noise, -1, 1)
            actions = jnp.concatenate([pi_actions, sampled], axis=1)  # [H, N, A]
            values = estimate_value(args, model, params, z, actions, discount, two, terminal_noise)
            elite_values, elite_indices = jax.lax.top_k(values, args.num_elites)
            elites = actions[:, elite_indices]  # [H, E, A]
            weights = jax.nn.softmax(args.temperature * elite_values)  # [E]
            mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), args.min_std, args.max_std)
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
    envs = (obs, prev_mean, first, noise)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


@partial(jax.jit, static_argnames=("args", "model", "explore", "random"))
def act(args: Args, model: WorldModel, params, obs, prev_mean, first, discount, key, explore: bool, random=False):
    """Actions [n, A] for stacks obs [n, 64, 64, 9] by `plan`, by the policy (--no-mpc) or random, the planner's means,
    and a new key."""
    key, noise_key = jax.random.split(key)
    if random:
        return jax.random.uniform(noise_key, (len(obs), model.action_dim), minval=-1, maxval=1), prev_mean, key
    if args.mpc:
        noise, heads = plan_noise(args, model, noise_key, len(obs))
        return *plan(args, model, params, obs, prev_mean, first, discount, noise, heads, explore), key
    eps_key, shift_key = jax.random.split(noise_key)
    eps = jax.random.normal(eps_key, (len(obs), model.action_dim))
    shift = jax.random.randint(shift_key, (len(obs), 2), 0, 2 * SHIFT + 1)
    sample = policy(args, model, params["pi"], encode(model, params["encoder"], obs, shift), eps)
    return sample.action if explore else sample.mean, prev_mean, key


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

    obs: jax.Array  # uint8 [H+1, B, 64, 64, 9]; as they leave the replay, single pictures [H+3, B, 64, 64, 3]
    action: jax.Array  # [H, B, A]
    reward: jax.Array  # [H, B]
    terminated: jax.Array  # [H, B]


class UpdateNoise(NamedTuple):
    """Every random draw of one update, made up front for the same reason as those of a plan."""

    shift: jax.Array  # [H+1, B, 2] (x, y) in 0 .. 6: of the pictures
    next_action: jax.Array  # [H, B, A] normal: the policy's actions in the TD targets
    target_heads: jax.Array  # [2] indices of the target heads
    pi_action: jax.Array  # [H+1, B, A] normal: the policy's actions in its own loss
    pi_heads: jax.Array  # [2] indices of the heads that judge them
    dropout: jax.Array | None  # [q, H, B, mlp_dim] factors of the heads' first layers in the value loss
    pi_dropout: jax.Array | None  # [2, H+1, B, mlp_dim] and in the policy's loss


def update_noise(args: Args, model: WorldModel, key: jax.Array) -> UpdateNoise:
    """Draws what one update needs."""
    H, B, A, width = args.horizon, args.batch_size, model.action_dim, model.q.hidden[0]
    keys = jax.random.split(key, 7)
    return UpdateNoise(
        shift=jax.random.randint(keys[6], (H + 1, B, 2), 0, 2 * SHIFT + 1),
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
    q_scale, updates = jnp.asarray(q_scale, jnp.float32), jnp.zeros((), jnp.int32)
    return TrainState(params, target_q, model_opt, pi_tx.init(params["pi"]), q_scale, key, updates)


def td_target(args: Args, model: WorldModel, state: TrainState, next_z, batch: Batch, discount, noise) -> jax.Array:
    """TD targets [H, B]: r + discount * (1 - terminated) * min of two random target Qs at the policy's next action."""
    next_action = policy(args, model, state.params["pi"], next_z, noise.next_action).action
    q = two_hot_inv(args, q_logits(model, pick_heads(state.target_q, noise.target_heads), next_z, next_action))
    return batch.reward + discount * (1 - batch.terminated) * q.min(0)


def model_loss(args: Args, model: WorldModel, params, batch: Batch, next_z, target, noise):
    """World-model objective (eq. 3) on latent rollouts [H+1, B, Z], which are returned with it and its parts."""
    rho = args.rho ** jnp.arange(args.horizon)  # [H]
    zs = [encode(model, params["encoder"], batch.obs[0], noise.shift[0])]
    for t in range(args.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward_logits = model.reward.apply(params["reward"], zs[:-1], batch.action)  # [H, B, K]
    value_logits = q_logits(model, params["q"], zs[:-1], batch.action, noise.dropout)  # [q, H, B, K]
    consistency = (rho * ((zs[1:] - next_z) ** 2).mean((1, 2))).mean()
    reward = (rho * soft_ce(args, reward_logits, batch.reward).mean(1)).mean()
    value = (rho * soft_ce(args, value_logits, target).mean(2)).mean()
    termination = jnp.zeros(())
    if model.termination:
        logits = model.termination.apply(params["termination"], zs[1:])[..., 0]  # [H, B]
        termination = optax.sigmoid_binary_cross_entropy(logits, batch.terminated).mean()
    total = args.consistency_coef * consistency + args.reward_coef * reward + args.value_coef * value
    total = total + args.termination_coef * termination
    info = {"consistency_loss": consistency, "reward_loss": reward, "value_loss": value}
    return total, (zs, info | {"termination_loss": termination, "total_loss": total})


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
    shapes = [(H + 1, B, PIXELS, PIXELS, 3 * FRAMES), (H, B, model.action_dim), (H, B), (H, B)]
    chex.assert_shape(list(batch), shapes)
    model_tx, pi_tx = optimizers(args)

    next_z = encode(model, state.params["encoder"], batch.obs[1:], noise.shift[1:])  # [H, B, Z]
    target = td_target(args, model, state, next_z, batch, discount, noise)  # [H, B]
    model_params = {k: v for k, v in state.params.items() if k != "pi"}
    loss = partial(model_loss, args, model, batch=batch, next_z=next_z, target=target, noise=noise)
    grads, (zs, info) = jax.grad(loss, has_aux=True)(model_params)
    change, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, change)

    pi_loss = partial(policy_loss, args, model, q_params=model_params["q"], zs=zs, q_scale=state.q_scale, noise=noise)
    pi_grads, (q_scale, pi_info) = jax.grad(pi_loss, has_aux=True)(state.params["pi"])
    pi_change, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(state.params["pi"], pi_change)

    target_q = optax.incremental_update(model_params["q"], state.target_q, args.tau)
    info |= pi_info | {"grad_norm": optax.tree.norm(grads), "pi_grad_norm": optax.tree.norm(pi_grads)}
    params = model_params | {"pi": pi_params}
    return TrainState(params, target_q, model_opt, pi_opt, q_scale, state.key, state.updates + 1), info


# ----------------------------------------------------------------------------------------------------------- Replay
class Replay(NamedTuple):
    """Ring of the last C steps of n environments, in device memory or the machine's; a row holds an entry of each. A
    window of H+1 entries may start wherever H more follow without a reset among them; its first stack needs the two
    pictures before it, too, or repeats that of the reset. `starts` is a queue of all such entries in order of time, so
    that a uniform draw from it is a uniform draw of windows. Those of the episode under way are among them (the
    original waits for its end). With H = 2:

        row       0  1  2  3  4  5  6  7  8     the last row written is 8
        first     x           x                 episodes of 4 entries, and of 5 so far
        start     x  x        x  x  x           entries 2 and 3 lack followers, 7 and 8 do so far
        starts    0  1  4  5  6                 a draw of 5 is the window of rows 5, 6, 7
    """

    obs: jax.Array  # uint8 [C, n, 64 * 64 * 3]; flat, as TPUs would pad a last axis of 3 to 128
    action: jax.Array  # [C, n, A] that led to the picture
    reward: jax.Array  # [C, n] that it brought
    terminated: jax.Array  # [C, n]
    first: jax.Array  # [C, n] the entry is a reset: action and reward are filler
    is_start: jax.Array  # [C, n] the entry is in the queue
    starts: jax.Array  # [C * n] ring of flat indices row * n + environment
    head: jax.Array  # position of the oldest start in the ring
    size: jax.Array  # number of starts
    rows: jax.Array  # number of steps ever written


def init_replay(capacity: int, num_envs: int, action_dim: int) -> Replay:
    """Empty replay of `capacity` steps of each environment, and two rows more for the first stack."""
    C, n, zero = capacity + FRAMES - 1, num_envs, partial(jnp.zeros, (), jnp.int32)
    obs = jnp.zeros((C, n, PIXELS * PIXELS * 3), jnp.uint8)
    action, reward = jnp.zeros((C, n, action_dim)), jnp.zeros((C, n))
    flags = [jnp.zeros((C, n), bool) for _ in range(3)]
    return Replay(obs, action, reward, *flags, jnp.zeros(C * n, jnp.int32), zero(), zero(), zero())


@partial(jax.jit, static_argnames=("horizon",), donate_argnames=("replay",))
def add(replay: Replay, horizon: int, obs, action, reward, terminated, first) -> Replay:
    """Writes one step of all environments (obs [n, 64, 64, 3], action [n, A], the rest [n]) over the oldest one."""
    C, n = replay.first.shape
    row = replay.rows % C
    oldest = (row + FRAMES - 1) % C  # starts here, the oldest of the queue, need the picture that is overwritten
    expired = replay.is_start[oldest].sum()
    head, size = (replay.head + expired) % (C * n), replay.size - expired
    entry = {"obs": obs.reshape(n, -1), "action": action, "reward": reward, "terminated": terminated, "first": first}
    written = {k: getattr(replay, k).at[row].set(v) for k, v in entry.items()}

    start = (replay.rows - horizon) % C  # the windows that this step completes start here
    after_start = (start + 1 + jnp.arange(horizon)) % C
    valid = ~written["first"][after_start].any(0) & (replay.rows >= horizon)  # [n]
    slots = jnp.where(valid, (head + size + jnp.cumsum(valid) - 1) % (C * n), C * n)  # C * n: dropped
    starts = replay.starts.at[slots].set(start * n + jnp.arange(n), mode="drop")
    is_start = replay.is_start.at[oldest].set(False).at[start].set(valid)
    return Replay(**written, is_start=is_start, starts=starts, head=head, size=size + valid.sum(), rows=replay.rows + 1)


def sample(replay: Replay, key: jax.Array, batch_size: int, horizon: int) -> Batch:
    """Windows drawn uniformly from all valid ones, with replacement. Their obs [H+3, B, 64, 64, 3] are single pictures,
    half as much to carry from one memory to another as the stacks that `stack_windows` makes of them."""
    C, n = replay.first.shape
    drawn = replay.starts[(replay.head + jax.random.randint(key, (batch_size,), 0, replay.size)) % (C * n)]
    rows = (drawn // n + jnp.arange(horizon + 1)[:, None]) % C  # [H+1, B]
    env = drawn % n
    terminated = replay.terminated[rows[1:], env].astype(jnp.float32)

    before = [rows[0]]  # of the first entry's stack: up to two rows back, but not beyond the reset
    for _ in range(FRAMES - 1):
        before.insert(0, jnp.where(replay.first[before[0], env], before[0], (before[0] - 1) % C))
    seen = jnp.concatenate([jnp.stack(before[:-1]), rows])  # [H+3, B]
    obs = replay.obs[seen, env].reshape(*seen.shape, PIXELS, PIXELS, 3)
    return Batch(obs, replay.action[rows[1:], env], replay.reward[rows[1:], env], terminated)


@partial(jax.jit, static_argnames=("batch_size", "horizon"))
def sample_many(replay: Replay, keys: jax.Array, batch_size: int, horizon: int) -> Batch:
    """A batch for each of several keys, along a new leading axis."""
    return jax.lax.map(lambda key: sample(replay, key, batch_size, horizon), keys)


def stack_windows(batch: Batch) -> Batch:
    """A batch of `sample` with stacks [H+1, B, 64, 64, 9] for obs."""
    n = len(batch.obs) - FRAMES + 1
    return batch._replace(obs=jnp.concatenate([batch.obs[i : i + n] for i in range(FRAMES)], axis=-1))


def stack_pictures(stack: np.ndarray, obs: np.ndarray, first: np.ndarray) -> np.ndarray:
    """What acting sees [n, 64, 64, 9]: obs [n, 64, 64, 3] after the last two pictures of `stack`, or where an episode
    begins (first [n]) three times."""
    pushed = np.concatenate([stack[..., 3:], obs], axis=-1)
    return np.where(first[:, None, None, None], np.tile(obs, FRAMES), pushed)


@partial(jax.jit, static_argnames=("args", "model", "num_updates"), donate_argnames=("state",))
def train(args: Args, model: WorldModel, state: TrainState, source: Replay | Batch, discount, num_updates: int):
    """`num_updates` updates in one dispatch, on fresh samples of a replay in device memory, or on batches [num_updates,
    ...] of `sample_many` from one in the machine's. Returns the new state and the means of their scalars."""

    def one(state, batch):
        key, sample_key, noise_key = jax.random.split(state.key, 3)
        batch = stack_windows(batch or sample(source, sample_key, args.batch_size, args.horizon))
        return update(args, model, state._replace(key=key), batch, discount, update_noise(args, model, noise_key))

    state, infos = jax.lax.scan(one, state, source if isinstance(source, Batch) else None, length=num_updates)
    return state, jax.tree.map(jnp.mean, infos)


# ------------------------------------------------------------------------------------------------------- Evaluation
def evaluate(args: Args, model: WorldModel, params, discount, envs, seed: tuple[int, ...], go_on=lambda: True):
    """One episode in each of E environments, without exploration: what `play` returns."""
    memory = jnp.zeros((envs.num_envs, args.horizon, model.action_dim)), jax.random.key(args.seed)
    memory = jax.device_put(memory, jax.devices()[0])  # as they come out of act: it compiles once
    pictures = np.zeros((envs.num_envs, PIXELS, PIXELS, 3 * FRAMES), np.uint8)

    def decide(obs, first, prev_mean, key, seen):
        seen = stack_pictures(seen, obs, first)
        return *act(args, model, params, seen, prev_mean, first, discount, key, explore=False), seen

    return play(envs, seed, decide, (*memory, pictures), go_on, args.capture_video)


def setup(args: Args, enter):
    """Environments to evaluate in, which are to be closed by `enter`, the networks and the discount."""
    spec, render_mode = environments.task_spec(args.task), "rgb_array" if args.capture_video else None
    pictures = {"obs": "rgb", "shadows": args.shadows, "render_mode": render_mode}
    envs = enter(environments.make_envs(args.task, args.eval_episodes, (args.seed, 1), **pictures))
    model = make_model(args, envs.single_action_space.shape[0], args.episodic and spec.can_terminate)
    return envs, model, jax.device_put(jnp.float32(discount_of(args, spec.episode_length)), jax.devices()[0])


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints every episode's return and their mean, and writes them to --json."""
    spec = environments.task_spec(args.task)
    with evaluating(spec.episode_length) as (enter, go_on):
        envs, model, discount = setup(args, enter)
        agent = load_agent(args.checkpoint, None, partial(init_params, args, model), *SCRIPTS, obs="rgb")
        result = evaluate(args, model, agent.params, discount, envs, (args.seed, 1), go_on)
    report_returns(args, spec, result)


# -------------------------------------------------------------------------------------------------------------- Run
def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    sized, spec = with_model_size(args), environments.task_spec(args.task)
    cli.check_bounds(sized)
    cli.check_rules(
        (sized.latent_dim % 16 == 0, "--latent-dim must be a multiple of 16, the units of a channel of the encoder"),
        (args.shadows or spec.domain != "Gymnasium", "--no-shadows goes with DMControl and Meta-World"),
    )
    environments.check_rendering(args.task, "rgb", "rgb_array" if args.capture_video else None)


def fresh_state(args: Args, model: WorldModel) -> dict[str, Any]:
    """The part of a checkpoint that learns and draws: the learning state, and the key of the acting."""
    init_key, train_key, act_key = jax.random.split(jax.random.key(args.seed), 3)
    params = init_params(args, model, init_key)
    return {"train": init_state(args, params, params["q"], 1.0, train_key), "act_key": act_key}


def start_or_resume(args: Args, model: WorldModel, keeper: Run):
    """What the run's last checkpoint holds, and the device in whose memory the replay lies; without a checkpoint all is
    fresh, but for the agent if --checkpoint names one."""
    new_replay = partial(init_replay, args.buffer_size // args.num_envs, args.num_envs, model.action_dim)
    memory = place_replay(new_replay, args.storage, args.buffer_size, args.total_timesteps)
    learner, replay = keeper.start({"replay": memory}, state=partial(fresh_state, args, model), replay=new_replay)
    state = learner["train"]
    if args.checkpoint and not keeper.count["decisions"]:
        agent = load_agent(args.checkpoint, None, partial(init_params, args, model), *SCRIPTS, obs="rgb")
        state = init_state(args, agent.params, agent.target_q, agent.q_scale, state.key)
        state = jax.device_put(state, jax.devices()[0])  # placed as it comes out of `train`: it compiles once
    return state, learner["act_key"], replay, memory


def draw_ahead(args: Args, pool: ThreadPoolExecutor, replay: Replay, memory, updates: int, num: int):
    """A function that returns what `train` learns from after so many updates: the replay itself, if it lies in the
    memory of the device that learns, else `num` batches that are drawn and sent there in the meantime."""
    device = jax.devices()[0]
    if memory == device and args.storage != "host":
        return lambda: replay
    with jax.default_device(memory):
        key = jax.random.fold_in(jax.random.key(args.seed), 3)  # 0, 1 and 2 are those of fresh_state
        keys = jax.random.split(jax.random.fold_in(key, updates), num)
        batches = sample_many(replay, keys, args.batch_size, args.horizon)
    return pool.submit(jax.device_put, batches, device).result


def run(args: Args) -> None:
    """Trains one agent: acts, learns, steps the environments, and keeps the run's files."""
    spec, n, burst = environments.task_spec(args.task), args.num_envs, max(1, int(args.utd * args.num_envs))
    seed_steps = max(1000, 5 * spec.episode_length) if args.seed_steps is None else args.seed_steps
    cli.check_replay(args, seed_steps)
    with Run(cli.run_folder(args), dataclasses.asdict(args), "tdmpc2_jax_rgb", RETURNS_COLUMNS) as keeper:
        envs = environments.make_envs(args.task, n, (args.seed, 0), obs="rgb", shadows=args.shadows)
        envs = keeper.enter(RecordEpisodeStatistics(envs))
        eval_envs, model, discount = setup(args, keeper.enter)
        state, key, replay, memory = start_or_resume(args, model, keeper)
        count, step = keeper.count, keeper.count["decisions"] * spec.action_repeat
        title = f"{spec.name}: {FRAMES} pictures of {PIXELS} x {PIXELS}, {model.action_dim} actions, {n} environment(s)"
        keeper.begin(title, returns_head(spec), state.params, step, args.total_timesteps)
        prev_mean = jax.device_put(jnp.zeros((n, args.horizon, model.action_dim)), jax.devices()[0])
        sent, pool, info = np.zeros((n, model.action_dim), np.float32), keeper.enter(ThreadPoolExecutor(1)), {}
        obs, _ = envs.reset(seed=(args.seed, 0, step))  # a resumed run begins new episodes, not the first ones again
        first, done, seen = np.ones(n, bool), np.zeros(n, bool), np.tile(obs, FRAMES)
        replay = add(replay, args.horizon, obs, sent, np.zeros(n, np.float32), done, first)
        while True:
            # Draw from the machine's memory while the planner acts, and while the updates before are computed
            due = int(seed_steps + (count["decisions"] - seed_steps) * args.utd) - count["updates"]
            ready = count["decisions"] >= seed_steps and (count["updates"] or replay.size)  # there is a window
            bursts = due // burst if ready else 0
            source = draw_ahead(args, pool, replay, memory, count["updates"], burst) if bursts else None

            # Act: dispatched here, read when the environments are stepped
            how = {"explore": True, "random": count["decisions"] <= seed_steps and not args.checkpoint}
            action, prev_mean, key = act(args, model, state.params, seen, prev_mean, first, discount, key, **how)

            # Evaluate and save
            finished = step >= args.total_timesteps
            if keeper.due(step, count["evaluated"], args.eval_freq, finished):
                keeper.record_returns(step, spec, partial(evaluate, args, model, state.params, discount, eval_envs))
            if keeper.due(step, keeper.saved, args.checkpoint_freq, finished or keeper.stop):
                keeper.save(step, info, state={"train": state, "act_key": key}, replay=replay)
            if finished or keeper.stop:
                break

            # Learn: seed_steps updates at once, then utd per decision; computed while the environments step
            for i in keeper.steps("learning", bursts):
                state, info = train(args, model, state, source(), discount, num_updates=burst)
                count["updates"] += burst
                if i + 1 < bursts:
                    source = draw_ahead(args, pool, replay, memory, count["updates"], burst)

            # Step: an environment whose episode is over is reset by this step and ignores the action
            sent = np.asarray(action)  # all that is fetched from the device between two decisions
            obs, reward, terminated, truncated, infos = envs.step(sent)
            keeper.check_finite(step, action=sent, reward=reward)
            first, done = done, terminated | truncated
            replay = add(replay, args.horizon, obs, sent, reward.astype(np.float32), terminated, first)
            seen = stack_pictures(seen, obs, first)
            count["decisions"] += n - int(first.sum())
            step = count["decisions"] * spec.action_repeat

            # Log
            keeper.log_episodes(step, done, infos)
            if keeper.due(step, keeper.logged, args.log_freq, False):
                keeper.log_losses(step, info)
            keeper.advance(step)


def main(argv: list[str] | None = None) -> None:
    with cli.one_sentence():
        args = cli.parse(Args, argv, __doc__, cli.run_folder, *SCRIPTS)
        check_args(args)
        use_compile_cache(args.compile_cache)
        evaluate_checkpoint(args) if args.evaluate else run(args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
