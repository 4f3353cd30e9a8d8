"""Latent diffusion MPC in one file: three transformers on the latent states of a TD-MPC2 world model plan by sampling.

After D-MPC (Zhou et al., arXiv 2410.05364), moved into the latent space of TD-MPC2 (arXiv 2310.16828). Read
tdmpc2_jax.py first; blocks that are the same there stand here letter for letter. What is new: a diffusion model p_d of
the latent future that a sequence of actions leads to, a diffusion model rho that proposes such sequences, and a
sequence objective J. A plan samples candidates, rolls them out, scores and ranks them ("SSR"), and may refine the best.
Shapes, beside those of tdmpc2_jax.py: F steps of a plan and of a training window, N candidates, D width of a token,
T tasks, E size of a task's embedding, M draws of p_d for each candidate, S scales.

    python tdmpc2_jax.py --task walker-walk --save-episodes data                              # a world model and data
    python tdmpc2_jax_diffusion.py --task walker-walk --world-model runs/walker-walk/tdmpc2_jax/1 --data-dir data
    python tdmpc2_jax_diffusion.py --task walker-walk --evaluate --planner ssr --scorer model random
    python tdmpc2_jax_diffusion.py --mode joint --task walker-walk                    # everything at once, from scratch
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"  # task of the world model and of the data
    tasks: str | None = None  # instead: several tasks with commas, of a world model of tdmpc2_jax_mt.py

    # Diffusion
    preset: Literal["small", "base", "paper"] = "small"  # sets the thirteen fields below where they are not given
    width: int | None = None  # width D of the tokens
    heads: int | None = None  # attention heads
    dynamics_blocks: int | None = None  # transformer blocks of p_d
    proposal_blocks: int | None = None  # transformer blocks of rho
    objective_blocks: int | None = None  # transformer blocks of J
    future: int | None = None  # steps F of a plan and of a window
    num_proposals: int | None = None  # candidates that rho draws
    num_policy: int | None = None  # candidates that the policy prior rolls out, the first without noise
    warm_start: int | None = None  # 1: the last plan, shifted, is one more candidate; 0: it is not
    dynamics_steps: int | None = None  # sampling steps of p_d
    proposal_steps: int | None = None  # sampling steps of rho
    diffusion_batch_size: int | None = None  # windows per update of the three networks
    diffusion_lr: float | None = None  # their learning rate, after 200 updates of warm-up; it falls to a tenth
    anchor: Literal["onestep", "current", "none"] = "onestep"  # p_d diffuses what is left beyond this guess
    prediction: Literal["x0", "v", "eps"] = "x0"  # what the outputs of p_d and rho mean
    scales: Literal["1", "1,4"] = "1"  # steps between two tokens of p_d, trained side by side; plans use 1
    beta: float = 0.0  # rho clones actions with weights exp(beta * standardised advantage); 0: all alike
    eta: float = 0.0  # fresh noise in every sampling step: 0 none (DDIM), 1 as much as DDPM

    # Diffusion planning
    planner: Literal["ssr", "ssr_mppi", "mppi", "pi"] = "ssr"  # rank candidates; refine the best; without diffusion
    scorer: Literal["model", "J", "mix", "random"] = "model"  # reward and value heads; J; sum of both ranks; control
    rollouts: Literal["diffusion", "onestep"] = "diffusion"  # latent futures of candidates: p_d's, or d's as a control
    draws: int = 1  # futures M that p_d draws for each candidate
    top: int = 8  # best candidates that are refined, or from which exploration draws
    refine_iterations: int = 2  # iterations of MPPI that refine them
    refine_samples: int = 256  # action sequences of each
    mppi_min_std: float = 0.05  # lower bound of the standard deviation with which refinement starts

    # Model
    model_size: Literal[1, 5, 19, 48, 317] = (
        5  # millions of parameters: sets the five sizes below where they are not given
    )
    enc_dim: int | None = None  # width of the encoder's hidden layers
    mlp_dim: int | None = None  # width of all other hidden layers
    latent_dim: int | None = None  # latent size Z
    num_enc_layers: int | None = None  # layers of the encoder
    num_q: int | None = None  # value heads
    episodic: bool = (
        True  # learn a termination head where the environment can terminate; --no-episodic plans as if it could not
    )
    num_bins: int = 101  # bins K of the discrete regression of rewards and values
    vmin: float = -10.0  # lowest bin, in symlog space
    vmax: float = 10.0  # highest bin, in symlog space
    simnorm_dim: int = 8  # size of the groups in which SimNorm takes softmaxes
    dropout: float = 0.01  # dropout after the first layer of every value head
    log_std_min: float = -10.0  # lower bound of the policy's log standard deviation
    log_std_max: float = 2.0  # upper bound of the policy's log standard deviation
    compute_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # type of the inputs of matrix products; parameters, statistics and losses stay float32
    )

    # Optimisation
    num_updates: int = 3000  # updates of the three networks, the length of an offline run
    batch_size: int = 256  # windows per update B
    buffer_size: int = 1000000  # decisions that the replay holds
    seed_steps: int | None = (
        None  # random decisions before the first update, and updates made then at once; default max(1000, 5 episodes)
    )
    lr: float = 0.0003  # learning rate
    enc_lr_scale: float = 0.3  # the encoder's learning rate is this share of lr
    grad_clip_norm: float = 20.0  # bound on the global gradient norm, of the model and of the policy each
    tau: float = 0.01  # step of the target values and of the Q scale
    rho: float = 0.5  # weight of a loss t steps into the window is rho^t
    consistency_coef: float = 20.0  # weight of the latent consistency loss
    reward_coef: float = 0.1  # weight of the reward loss
    value_coef: float = 0.1  # weight of the value loss
    termination_coef: float = 1.0  # weight of the termination loss
    entropy_coef: float = 0.0001  # weight of the policy's entropy
    discount_denom: float = (
        5.0  # episode length L gives the discount (L/denom - 1) / (L/denom), clipped to the next two
    )
    discount_min: float = 0.95  # lowest discount
    discount_max: float = 0.995  # highest discount

    # Planning
    horizon: int = 3  # steps H of a plan and of a training window
    iterations: int = 6  # iterations of MPPI (two more for 20 or more action dimensions)
    num_samples: int = 512  # action sequences N per iteration
    num_elites: int = 64  # sequences that the next distribution is fitted to
    num_pi_trajs: int = 24  # sequences P proposed by the policy
    min_std: float = 0.05  # lower bound of the planner's standard deviation
    max_std: float = 2.0  # initial value and upper bound of the planner's standard deviation
    temperature: float = 0.5  # inverse temperature of the elites' weights
    mpc: bool = True  # act by planning; --no-mpc acts with the policy alone


PRESETS = {
    "small": (64, 4, 2, 2, 2, 8, 32, 16, 1, 2, 8, 128, 1e-3),
    "base": (128, 4, 3, 3, 3, 16, 64, 24, 1, 4, 16, 256, 3e-4),
    "paper": (256, 8, 5, 5, 10, 32, 64, 0, 0, 10, 32, 256, 1e-4),
}
PRESET_FIELDS = "width heads dynamics_blocks proposal_blocks objective_blocks future num_proposals num_policy".split()
PRESET_FIELDS += "warm_start dynamics_steps proposal_steps diffusion_batch_size diffusion_lr".split()


def with_preset(args: Args) -> Args:
    """Fills in the fields of the preset that were not given."""
    values = dict(zip(PRESET_FIELDS, PRESETS[args.preset], strict=True))
    return dataclasses.replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})


def scales_of(args: Args) -> tuple[int, ...]:
    return tuple(map(int, args.scales.split(",")))


def window_length(args: Args) -> int:
    """Steps L of a training window: F of the largest scale."""
    return args.future * max(scales_of(args))


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


class World(NamedTuple):
    """World models of T tasks that share all weights but the biases of the first layers (`[T, ...]`), into which a
    multi-task agent's embeddings have been folded. `for_task` takes one of them out."""

    params: dict[str, Any]  # as those of tdmpc2_jax.py, but for those biases
    target_q: dict[str, Any]
    emb: jax.Array | None  # [T, E] embeddings, which the three transformers are told; None: one task
    mask: jax.Array  # [T, A] 1 where the task has this action
    discount: jax.Array  # [T]


def is_task_bias(path) -> bool:
    return jax.tree_util.keystr(path).endswith("['linear_0']['bias']")


def make_world(agents: list[tuple[Any, Any]], emb, mask, discount) -> World:
    """World of the parameters and target Qs of every task; their kernels are the same."""

    def stack(path, *leaves):
        return jnp.stack(leaves) if is_task_bias(path) else leaves[0]

    params, target_q = (jax.tree_util.tree_map_with_path(stack, *trees) for trees in zip(*agents, strict=True))
    return World(params, target_q, emb, jnp.asarray(mask), jnp.asarray(discount))


def for_task(world: World, task: jax.Array, mask_inputs: bool = False) -> World:
    """The world of one task; under `vmap` over tasks only first biases become batched, unless the inputs of actions
    that a task does not have are silenced, for planners that know of no mask."""
    num_tasks = len(world.discount)
    task = task if num_tasks > 1 else 0

    def pick(path, x):
        if is_task_bias(path):
            return x[task]
        name, layer = jax.tree_util.keystr(path[:1]), jax.tree_util.keystr(path)
        if mask_inputs and num_tasks > 1 and layer.endswith("['linear_0']['kernel']") and name[2:-2] in ACTION_INPUTS:
            return x * jnp.pad(world.mask[task], (x.shape[-2] - world.mask.shape[-1], 0), constant_values=1.0)[:, None]
        return x

    params = jax.tree_util.tree_map_with_path(pick, world.params)
    target_q = jax.tree_util.tree_map_with_path(pick, world.target_q)
    emb = None if world.emb is None else world.emb[task]
    return World(params, target_q, emb, world.mask[task], world.discount[task])


ACTION_INPUTS = ("dynamics", "reward", "q")


def roll_out(model: WorldModel, params, z: jax.Array, actions: jax.Array) -> jax.Array:
    """Latent states [L, Z] to which d leads from z [Z] with actions [L, A]."""

    def step(z, action):
        z = model.dynamics.apply(params["dynamics"], z, action)
        return z, z

    return jax.lax.scan(step, z, actions)[1]


def value(args: Args, model: WorldModel, world: World, z: jax.Array) -> jax.Array:
    """V(z): mean [...] of the target Qs at z [..., Z] and the policy's action without noise."""
    pi = policy(args, model, world.params["pi"], z, jnp.zeros((*z.shape[:-1], model.action_dim)))
    return two_hot_inv(args, q_logits(model, world.target_q, z, pi.mean * world.mask)).mean(0)


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


# ----------------------------------------------------------------------------------------------------- Transformers
def waves(angle: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def time_waves(future: int) -> jax.Array:
    """Sines and cosines [F+1, 32] of the times 0 .. F, at 16 frequencies up to one that alternates."""
    return waves(jnp.pi * jnp.arange(future + 1)[:, None] / (future + 1) * jnp.linspace(1, (future + 1) / 2, 16))


def level_waves(k: jax.Array, width: int) -> jax.Array:
    """Sines and cosines [D] of a noise level k."""
    return waves(k * 1e4 ** (-jnp.arange(width // 2) / (width // 2)))


class Blocks(nn.Module):
    """Transformer without dropout or masks: all tokens see all others. The last LayerNorm is included."""

    heads: int
    blocks: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):  # [tokens, D] -> [tokens, D]
        width, dense = x.shape[-1], partial(nn.Dense, dtype=self.dtype)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(nn.LayerNorm()(x))
            x = x + dense(width)(nn.gelu(dense(4 * width)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x)


class Denoiser(nn.Module):
    """p_d or rho: F noisy tokens of size `out` and a context, the latent state now -> what `prediction` means."""

    width: int
    heads: int
    blocks: int
    out: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z, x, k, emb=None, chunks=None, scale=0):
        """n(z_t) [Z], x [F, out], level k, the task's emb [E], chunks of actions [F, C] and the index of their scale
        -> [F, out]."""
        dense, table = partial(nn.Dense, dtype=self.dtype), partial(self.param, init_fn=nn.initializers.normal(0.02))
        kinds, scales = table("kinds", shape=(2, self.width)), table("scales", shape=(2, self.width))
        times = dense(self.width, name="time")(time_waves(len(x)))  # [F+1, D]
        level = dense(4 * self.width, name="level_0")(level_waves(k, self.width))
        level = dense(self.width, name="level_1")(nn.silu(level)) + scales[scale]  # [D]
        context = dense(self.width, name="context")(z) + times[0] + kinds[0]
        tokens = dense(self.width, name="x")(x) + times[1:] + kinds[1]
        tokens = tokens if chunks is None else tokens + dense(self.width, name="chunk")(chunks)
        task = [] if emb is None else [dense(self.width, name="task")(emb)[None]]
        tokens = Blocks(self.heads, self.blocks, self.dtype)(jnp.concatenate([*task, context[None], tokens]) + level)
        return nn.Dense(self.out, kernel_init=nn.initializers.zeros, name="head")(tokens[-len(x) :])


class Objective(nn.Module):
    """J: a latent future and the actions that led there -> the standardised advantage, read from a token of its own."""

    width: int
    heads: int
    blocks: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, zs, actions, emb=None):
        """n(z_t .. z_{t+F}) [F+1, Z], actions [F, A], the task's emb [E] -> scalar."""
        dense = partial(nn.Dense, self.width, dtype=self.dtype)
        readout = self.param("readout", nn.initializers.normal(0.02), (1, self.width))
        tokens = dense(name="z")(zs) + dense(name="time")(time_waves(len(actions)))
        tokens = tokens.at[:-1].add(dense(name="action")(actions))
        task = [] if emb is None else [dense(name="task")(emb)[None]]
        tokens = Blocks(self.heads, self.blocks, self.dtype)(jnp.concatenate([readout, *task, tokens]))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="head")(tokens[0])[0]


class Nets(NamedTuple):
    """The three networks, for one sequence; `vmap` gives batches."""

    dynamics: Denoiser  # p_d
    proposal: Denoiser  # rho
    objective: Objective  # J


def make_nets(args: Args, model: WorldModel) -> Nets:
    sizes = {"width": args.width, "heads": args.heads, "dtype": args.compute_dtype}
    return Nets(
        dynamics=Denoiser(blocks=args.dynamics_blocks, out=model.dynamics.out, **sizes),
        proposal=Denoiser(blocks=args.proposal_blocks, out=model.action_dim, **sizes),
        objective=Objective(blocks=args.objective_blocks, **sizes),
    )


def init_nets(args: Args, model: WorldModel, emb, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of the three networks; emb [T, E] or None."""
    F, A, z, nets, keys = args.future, model.action_dim, jnp.zeros(model.dynamics.out), make_nets(args, model), None
    keys = jax.random.split(key, 3)
    emb, zs, actions = None if emb is None else emb[0], jnp.zeros((F, len(z))), jnp.zeros((F, A))
    return {
        "dynamics": nets.dynamics.init(keys[0], z, zs, 0, emb, chunks(args, actions, 1)),
        "proposal": nets.proposal.init(keys[1], z, actions, 0, emb),
        "objective": nets.objective.init(keys[2], jnp.zeros((F + 1, len(z))), actions, emb),
    }


# -------------------------------------------------------------------------------------------------------- Diffusion
LEVELS = 1000  # K; level 0 is almost clean, level K-1 pure noise
LATENT_CLIP = 6.0  # bound on x0 of latents: clipping true ones there costs an NMSE of 2e-5, at 4 already 2e-3


def signal_power() -> np.ndarray:
    """abar [K] of the cosine schedule: a noisy x is sqrt(abar) x0 + sqrt(1 - abar) noise."""
    f = np.cos((np.arange(LEVELS + 1) / LEVELS + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.clip(1 - f[1:] / f[:-1], 1e-4, 0.9999))


def sampling_levels(steps: int, prediction: str) -> np.ndarray:
    """Levels [steps] from noisy to clean. From eps one cannot tell x0 at the last levels, which hold no signal."""
    if prediction == "eps":
        return np.arange(steps - 1, -1, -1) * (LEVELS // steps)
    return np.round(np.linspace(LEVELS - 1, 0, steps + 1)).astype(int)[:-1]


def target_of(prediction: str, x0: jax.Array, noise: jax.Array, abar) -> jax.Array:
    """What a network should answer to sqrt(abar) x0 + sqrt(1 - abar) noise."""
    v = jnp.sqrt(abar) * noise - jnp.sqrt(1 - abar) * x0
    return {"x0": x0, "v": v, "eps": noise}[prediction]


def x0_of(prediction: str, output: jax.Array, x: jax.Array, abar) -> jax.Array:
    """The clean x0 that a network's answer to x means."""
    if prediction == "x0":
        return output
    if prediction == "v":
        return jnp.sqrt(abar) * x - jnp.sqrt(1 - abar) * output
    return (x - jnp.sqrt(1 - abar) * output) / jnp.sqrt(abar)


def draw(denoise, key: jax.Array, shape, steps: int, clip: float, prediction="x0", eta=0.0, mask=1.0) -> jax.Array:
    """Samples of this shape by DDIM: denoise(x, k) -> the network's answer; clip bounds x0, mask multiplies all draws.

    The step from power abar to the next level's, `after`, ends with after = 1: the last x is x0 itself.
    """
    start_key, key = jax.random.split(key)
    levels = sampling_levels(steps, prediction)
    abars = signal_power()[levels]
    after = np.append(abars[1:], 1.0)
    std = eta * np.sqrt((1 - after) / (1 - abars) * (1 - abars / after))  # of the fresh noise

    def step(x, inputs):
        k, abar, after, std, key = inputs
        x0 = jnp.clip(x0_of(prediction, denoise(x, k), x, abar), -clip, clip) * mask
        noise = (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)
        x = jnp.sqrt(after) * x0 + jnp.sqrt(jnp.maximum(1 - after - std**2, 0)) * noise
        return x + std * jax.random.normal(key, shape) * mask if eta else x, None

    inputs = jax.tree.map(jnp.float32, (levels, abars, after, std))
    return jax.lax.scan(step, jax.random.normal(start_key, shape) * mask, (*inputs, jax.random.split(key, steps)))[0]


# ------------------------------------------------------------------------------------------ Windows and their scales
class Windows(NamedTuple):
    """Training windows of L+1 consecutive entries of one episode; action[j] and reward[j] lead from z[j] to z[j+1]."""

    z: jax.Array  # [B, L+1, Z]
    action: jax.Array  # [B, L, A]
    reward: jax.Array  # [B, L]
    terminated: jax.Array  # [B, L]
    task: jax.Array  # [B]


class Stats(NamedTuple):
    """What the networks' inputs and outputs are standardised by."""

    mean: jax.Array  # [Z] of the latent states
    std: jax.Array  # [Z]
    mu: jax.Array  # [S, F, Z] mean of what p_d diffuses
    sigma: jax.Array  # [S, F, Z]
    adv_mean: jax.Array  # [T] of the advantages y - V(z_t)
    adv_std: jax.Array  # [T]


def normalise(stats: Stats, z: jax.Array) -> jax.Array:
    """n(z): without it unit noise would drown latent states, whose standard deviations are about 0.1."""
    return (z - stats.mean) / stats.std


def denormalise(args: Args, stats: Stats, x: jax.Array) -> jax.Array:
    """The latent states for n(z) = x, back on the simplices on which SimNorm puts them."""
    z = jnp.maximum(x * stats.std + stats.mean, 1e-6).reshape(*x.shape[:-1], -1, args.simnorm_dim)
    return (z / z.sum(-1, keepdims=True)).reshape(x.shape)


def chunks(args: Args, actions: jax.Array, scale) -> jax.Array:
    """Actions [L, A] as the chunks [F, C] that lead from token to token at this scale: the actions themselves if 1 is the
    only scale, else padded to the largest scale, with bits that tell which slots are used."""
    largest, A = max(scales_of(args)), actions.shape[-1]
    slot = jnp.arange(largest)
    index = jnp.arange(args.future)[:, None] * scale + slot  # [F, largest]
    used = (slot < scale).astype(jnp.float32)
    chunk = (actions[jnp.minimum(index, len(actions) - 1)] * used[:, None]).reshape(args.future, largest * A)
    bits = jnp.broadcast_to(used, (args.future, largest))
    return jnp.concatenate([chunk, bits], axis=-1) if largest > 1 else chunk


def anchor(args: Args, stats: Stats, z: jax.Array, onestep: jax.Array, steps) -> jax.Array:
    """First guess [F, Z] of n(z) at these steps [F] behind z [Z]; onestep [L, Z] is d's roll-out. p_d diffuses the
    standardised rest: what the guess leaves open is a tenth of the whole, and so is then the error of the samples."""
    if args.anchor == "none":
        return jnp.zeros((args.future, len(z)))
    return normalise(stats, onestep[steps - 1] if args.anchor == "onestep" else jnp.broadcast_to(z, onestep.shape[-2:]))


def residual(args: Args, model: WorldModel, world: World, stats: Stats, window: Windows, scale) -> jax.Array:
    """What p_d diffuses of one window, not yet standardised [F, Z]."""
    steps = (jnp.arange(args.future) + 1) * scale
    onestep = roll_out(model, world.params, window.z[0], window.action) if args.anchor == "onestep" else None
    return normalise(stats, window.z[steps]) - anchor(args, stats, window.z[0], onestep, steps)


def returns(args: Args, model: WorldModel, world: World, window: Windows) -> tuple[jax.Array, jax.Array]:
    """y of one window, F rewards and the value behind them, and V(z_t)."""
    F = args.future
    now, last = value(args, model, world, window.z[jnp.array([0, F])])
    rewards = (world.discount ** jnp.arange(F) * window.reward[:F]).sum()
    return rewards + world.discount**F * (1 - window.terminated[F - 1]) * last, now


@partial(jax.jit, static_argnames=("args", "model"))
def statistics(args: Args, model: WorldModel, world: World, windows: Windows) -> Stats:
    """Means and standard deviations over these windows."""
    z = windows.z.reshape(-1, model.dynamics.out)
    stats = Stats(z.mean(0), jnp.maximum(z.std(0), 1e-2), None, None, None, None)
    each = jax.vmap(lambda w, scale: residual(args, model, for_task(world, w.task), stats, w, scale), (0, None))
    x = jnp.stack([each(windows, scale) for scale in scales_of(args)])  # [S, B, F, Z]
    keep = 0.0 if args.anchor == "none" else 1.0
    mu, sigma = x.mean(1) * keep, jnp.maximum(x.std(1), 0.02) ** keep
    y, now = jax.vmap(lambda w: returns(args, model, for_task(world, w.task), w))(windows)
    of_task = jax.nn.one_hot(windows.task, len(world.discount))
    of_task /= jnp.maximum(of_task.sum(0), 1)  # [B, T] weights that give means
    adv_mean = (y - now) @ of_task
    adv_std = jnp.sqrt((y - now) ** 2 @ of_task - adv_mean**2)
    return stats._replace(mu=mu, sigma=sigma, adv_mean=adv_mean, adv_std=jnp.maximum(adv_std, 1e-3))


# ------------------------------------------------------------------------------------- Learning the three networks
class DiffusionState(NamedTuple):
    """All that learning of the three networks changes."""

    params: dict[str, Any]  # dynamics, proposal, objective
    ema: dict[str, Any]  # slow copy of params, which plans
    opt: dict[str, optax.OptState]
    stats: Stats
    key: jax.Array
    updates: jax.Array


class DiffusionNoise(NamedTuple):
    """Random draws for one window."""

    scale: jax.Array  # index of the scale
    dynamics_level: jax.Array
    proposal_level: jax.Array
    dynamics: jax.Array  # [F, Z] normal
    proposal: jax.Array  # [F, A] normal


def diffusion_noise(args: Args, model: WorldModel, key: jax.Array, batch_size: int) -> DiffusionNoise:
    keys, B, F = jax.random.split(key, 5), batch_size, args.future
    return DiffusionNoise(
        jax.random.randint(keys[0], (B,), 0, len(scales_of(args))),
        jax.random.randint(keys[1], (B,), 0, LEVELS),
        jax.random.randint(keys[2], (B,), 0, LEVELS),
        jax.random.normal(keys[3], (B, F, model.dynamics.out)),
        jax.random.normal(keys[4], (B, F, model.action_dim)),
    )


def diffusion_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam behind a clip: linear warm-up over 200 updates, then a cosine down to a tenth."""
    lr = args.diffusion_lr
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, 200, max(args.num_updates, 201), lr / 10)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))


def init_diffusion(args: Args, model: WorldModel, world: World, stats: Stats, key: jax.Array) -> DiffusionState:
    init_key, key = jax.random.split(key)
    params = init_nets(args, model, world.emb, init_key)
    opt = {name: diffusion_optimizer(args).init(p) for name, p in params.items()}
    return DiffusionState(params, jax.tree.map(jnp.copy, params), opt, stats, key, jnp.zeros((), jnp.int32))


def diffusion_losses(args: Args, model: WorldModel, params, stats: Stats, world: World, windows: Windows, noise):
    """Losses of the three networks on windows [B], as a dict of scalars. The world model gets no gradient."""
    nets, abars = make_nets(args, model), jnp.asarray(signal_power(), jnp.float32)

    def losses(window, draws):  # of one window
        w = for_task(world, window.task)
        z, actions = normalise(stats, window.z[0]), window.action[: args.future]
        adv_mean, adv_std = stats.adv_mean[window.task], stats.adv_std[window.task]

        def denoising(net, name, x0, level, noise, mask, *inputs):
            abar = abars[level]
            x = jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * noise
            output = net.apply(params[name], z, x, level, w.emb, *inputs)
            return ((output - target_of(args.prediction, x0, noise, abar)) ** 2 * mask).mean() / mask.mean()

        scale = jnp.array(scales_of(args))[draws.scale]
        x0 = residual(args, model, w, stats, window, scale) - stats.mu[draws.scale]
        x0, chunk = x0 / stats.sigma[draws.scale], chunks(args, window.action, scale)
        every = jnp.ones(1)
        dynamics = denoising(
            nets.dynamics, "dynamics", x0, draws.dynamics_level, draws.dynamics, every, chunk, draws.scale
        )
        masked = draws.proposal * w.mask
        proposal = denoising(nets.proposal, "proposal", actions, draws.proposal_level, masked, w.mask)

        y, now = returns(args, model, w, window)
        adv = (y - now - adv_mean) / adv_std
        estimate = nets.objective.apply(
            params["objective"], normalise(stats, window.z[: args.future + 1]), actions, w.emb
        )
        weight = jnp.minimum(jnp.exp(args.beta * adv), 20.0)
        return {"dynamics": dynamics, "proposal": proposal, "objective": (estimate - adv) ** 2}, weight

    each, weight = jax.vmap(losses)(windows, noise)
    each["proposal"] *= weight / weight.mean()
    return jax.tree.map(jnp.mean, each)


def diffusion_update(args: Args, model: WorldModel, state: DiffusionState, world: World, windows: Windows, noise):
    """One gradient step of each of the three networks. Returns the new state and a dict of scalars."""

    def loss(params):
        losses = diffusion_losses(args, model, params, state.stats, world, windows, noise)
        return sum(losses.values()), losses

    grads, losses = jax.grad(loss, has_aux=True)(state.params)
    steps = {k: diffusion_optimizer(args).update(grads[k], state.opt[k]) for k in grads}
    params = {k: optax.apply_updates(state.params[k], steps[k][0]) for k in grads}
    decay = jnp.minimum(0.995, (1 + state.updates) / (10 + state.updates))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    info = {f"{k}_diffusion_loss" if k != "objective" else "objective_loss": v for k, v in losses.items()}
    info |= {f"{k}_grad_norm": optax.tree.norm(grads[k]) for k in grads}
    opt = {k: steps[k][1] for k in grads}
    return DiffusionState(params, ema, opt, state.stats, state.key, state.updates + 1), info


class Data(NamedTuple):
    """Recorded entries on the device, encoded once by the frozen world model. An entry holds a latent state, the action
    that led to it and what it brought; at an episode's first entry, action and reward are zero and never read."""

    z: jax.Array  # [C, Z]
    action: jax.Array  # [C, A]
    reward: jax.Array  # [C]
    task: jax.Array  # [C]
    starts: jax.Array  # [W] entries at which a training window starts
    held_out: jax.Array  # [V] entries at which a window of a held-out episode starts


def window_starts(args: Args, lengths: np.ndarray, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries at which windows of L+1 entries start, of episodes with these lengths and tasks that lie one behind the
    other: those to learn from, and those of every task's every tenth episode (at least one), which are held out.
    """
    starts, held_out = [], []
    order = np.zeros(len(lengths), int)  # place of an episode among those of its task
    for task in np.unique(tasks):
        order[tasks == task] = np.arange((tasks == task).sum())
    for task, place, length, first in zip(tasks, order, lengths, np.cumsum(lengths) - lengths, strict=True):
        episodes = (tasks == task).sum()
        found = held_out if place % 10 == min(5, episodes - 1) else starts
        found.append(np.arange(first, first + max(length - window_length(args), 0)))
    return np.concatenate(starts or [np.zeros(0, int)]), np.concatenate(held_out or [np.zeros(0, int)])


def windows_at(args: Args, data: Data, starts: jax.Array) -> Windows:
    """The windows that start at these entries [B]."""
    rows = starts[:, None] + jnp.arange(window_length(args) + 1)  # [B, L+1]
    reward = data.reward[rows[:, 1:]]
    return Windows(data.z[rows], data.action[rows[:, 1:]], reward, jnp.zeros_like(reward), data.task[starts])


@partial(jax.jit, static_argnames=("args", "model", "num_updates"), donate_argnames=("state",))
def train_offline(args: Args, model: WorldModel, state: DiffusionState, world: World, data: Data, num_updates: int):
    """`num_updates` updates on windows drawn from the data, in one dispatch. Returns the new state and mean scalars."""

    def one(state, _):
        key, window_key, noise_key = jax.random.split(state.key, 3)
        B = args.diffusion_batch_size
        windows = windows_at(args, data, data.starts[jax.random.randint(window_key, (B,), 0, len(data.starts))])
        noise = diffusion_noise(args, model, noise_key, B)
        return diffusion_update(args, model, state._replace(key=key), world, windows, noise)

    state, infos = jax.lax.scan(one, state, None, length=num_updates)
    return state, jax.tree.map(jnp.mean, infos)


# ------------------------------------------------------------------------------------- Planning: sample, score, rank
def propose(args: Args, model: WorldModel, ema, stats: Stats, world: World, z, best, first, key) -> jax.Array:
    """Candidates [N, F, A] from z [Z]: drawn from rho, rolled out by the policy prior, and the last plan best [F, A]
    shifted by one (where there is none yet, the first candidate again)."""
    rho_key, pi_key = jax.random.split(key)
    F, A, candidates = args.future, model.action_dim, []
    if args.num_proposals:
        net, context = make_nets(args, model).proposal, normalise(stats, z)
        denoise = jax.vmap(lambda x, k: net.apply(ema["proposal"], context, x, k, world.emb), (0, None))
        shape, steps = (args.num_proposals, F, A), args.proposal_steps
        candidates.append(draw(denoise, rho_key, shape, steps, 1.0, args.prediction, args.eta, world.mask))
    if args.num_policy:

        def step(z, eps):
            action = policy(args, model, world.params["pi"], z, eps).action * world.mask
            return model.dynamics.apply(world.params["dynamics"], z, action), action

        eps = jax.random.normal(pi_key, (F, args.num_policy, A)).at[:, 0].set(0.0)
        actions = jax.lax.scan(step, jnp.broadcast_to(z, (args.num_policy, len(z))), eps)[1]  # [F, N_pi, A]
        candidates.append(actions.swapaxes(0, 1))
    if args.warm_start:
        shifted = jnp.concatenate([best[1:], best[-1:]])[None]
        candidates.append(jnp.where(first, candidates[0][:1], shifted))
    return jnp.concatenate(candidates)


def rollout(args: Args, model: WorldModel, ema, stats: Stats, world: World, z, actions, key, scale=0) -> jax.Array:
    """Latent futures [M, N, F+1, Z] from z [Z] under actions [N, L, A]: drawn from p_d, or those of d.

    scale is an index of scales; at scale s the futures are s steps apart, and L is F * s.
    """
    N, F, s = len(actions), args.future, scales_of(args)[scale]
    steps = (np.arange(F) + 1) * s
    onestep = jax.vmap(lambda a: roll_out(model, world.params, z, a))(actions)  # [N, L, Z]
    if args.rollouts == "onestep":
        future = onestep[None, :, steps - 1]
    else:
        net, context = make_nets(args, model).dynamics, normalise(stats, z)
        chunk = jnp.tile(jax.vmap(lambda a: chunks(args, a, s))(actions), (args.draws, 1, 1))
        each = jax.vmap(lambda x, k, c: net.apply(ema["dynamics"], context, x, k, world.emb, c, scale), (0, None, 0))
        shape = (args.draws * N, F, len(z))
        denoise = partial(lambda x, k: each(x, k, chunk))
        x = draw(denoise, key, shape, args.dynamics_steps, LATENT_CLIP, args.prediction, args.eta)
        x = x.reshape(args.draws, *shape[:0], N, F, len(z)) * stats.sigma[scale] + stats.mu[scale]
        future = denormalise(args, stats, x + jax.vmap(lambda o: anchor(args, stats, z, o, steps))(onestep))
    return jnp.concatenate([jnp.broadcast_to(z, (*future.shape[:2], 1, len(z))), future], axis=2)


def score_model(args: Args, model: WorldModel, world: World, zs: jax.Array, actions: jax.Array) -> jax.Array:
    """Rewards over the F steps and the value behind them [...] of zs [..., F+1, Z] and actions [..., F, A]."""
    F = args.future
    rewards = two_hot_inv(args, model.reward.apply(world.params["reward"], zs[..., :-1, :], actions))
    alive = jnp.ones((*rewards.shape[:-1], F + 1))  # 0 behind a predicted termination
    if model.termination:
        ends = model.termination.apply(world.params["termination"], zs[..., 1:, :])[..., 0] > 0
        alive = alive.at[..., 1:].set(jnp.cumprod(~ends, axis=-1))
    amounts = jnp.concatenate([rewards, value(args, model, world, zs[..., -1, :])[..., None]], axis=-1)
    return (world.discount ** jnp.arange(F + 1) * alive * amounts).sum(-1)


def score_objective(args: Args, model: WorldModel, ema, stats: Stats, world: World, zs, actions, task) -> jax.Array:
    """J's estimates [N] of the advantages of zs [N, F+1, Z] and actions [N, F, A], in the unit of y."""
    net = make_nets(args, model).objective
    estimate = jax.vmap(lambda z, a: net.apply(ema["objective"], z, a, world.emb))(normalise(stats, zs), actions)
    return estimate * stats.adv_std[task] + stats.adv_mean[task]


def score(args: Args, model: WorldModel, ema, stats: Stats, world: World, zs, actions, task, key) -> jax.Array:
    """Scores [N], means over the draws of zs [M, N, F+1, Z]; actions [N, F, A]; -inf where they are not finite."""
    scores = {
        "model": lambda: jax.vmap(lambda z: score_model(args, model, world, z, actions))(zs).mean(0),
        "J": lambda: jax.vmap(lambda z: score_objective(args, model, ema, stats, world, z, actions, task))(zs).mean(0),
        "mix": lambda: ranks(scores["model"]()) + ranks(scores["J"]()),
        "random": lambda: jax.random.uniform(key, (len(actions),)),
    }
    result = scores[args.scorer]()
    return jnp.where(jnp.isfinite(result), result, -jnp.inf)


def ranks(x: jax.Array) -> jax.Array:
    """Place of every number [N] in ascending order."""
    return jnp.argsort(jnp.argsort(x)).astype(jnp.float32)


def refine(args: Args, model: WorldModel, world: World, z, candidates, order, key) -> jax.Array:
    """Mean [H, A] of MPPI's distribution, which starts as that of the best candidates and is fitted again to the elites
    among fresh samples and all candidates [N, F, A]; `order` [top] are the indices of the best."""
    H, A, samples = args.horizon, model.action_dim, args.refine_samples
    start = candidates[order, :H]  # [top, H, A]
    candidates = candidates[:, :H].swapaxes(0, 1)  # [H, N, A]

    def iterate(carry, key):
        mean, std = carry
        sample_key, eps_key, head_key = jax.random.split(key, 3)
        sampled = jnp.clip(mean[:, None] + std[:, None] * jax.random.normal(sample_key, (H, samples, A)), -1, 1)
        actions = jnp.concatenate([candidates, sampled], axis=1)
        eps, heads = jax.random.normal(eps_key, (actions.shape[1], A)), two_heads(model, head_key)
        values = estimate_value(args, model, world.params, z[None], actions, world.discount, heads, eps)
        elite_values, elite_indices = jax.lax.top_k(values, min(args.num_elites, len(values)))
        elites, weights = actions[:, elite_indices], jax.nn.softmax(args.temperature * elite_values)
        mean = jnp.einsum("e,hea->ha", weights, elites)
        variance = jnp.einsum("e,hea->ha", weights, (elites - mean[:, None]) ** 2)
        return (mean, jnp.clip(jnp.sqrt(variance), args.min_std, args.max_std)), None

    std = jnp.clip(start.std(0), args.mppi_min_std, args.max_std)
    keys = jax.random.split(key, args.refine_iterations)
    return jax.lax.scan(iterate, (start.mean(0), std), keys)[0][0]


def plan_diffusion(
    args: Args, model: WorldModel, ema, stats: Stats, world: World, obs, best, first, task, key, explore
):
    """Sample, score and rank in one environment: obs [O], the last plan best [F, A], first (a new episode), the task's
    id -> action [A], this plan [F, A], and whether no candidate could be scored (the policy prior acts then)."""
    chex.assert_shape([obs, best], [(model.obs_dim,), (args.future, model.action_dim)])
    keys, masked = jax.random.split(key, 6), for_task(world, task, mask_inputs=True)
    world = for_task(world, task)
    z = model.encoder.apply(world.params["encoder"], obs)
    candidates = propose(args, model, ema, stats, world, z, best, first, keys[0])
    zs = rollout(args, model, ema, stats, world, z, candidates, keys[1])
    scores = score(args, model, ema, stats, world, zs, candidates, task, keys[2])
    top, order = jax.lax.top_k(scores, min(args.top, len(scores)))
    chosen = order[0]
    if explore and args.planner == "ssr":
        spread = jnp.where(jnp.isfinite(top), top, top[0])
        chosen = order[jax.random.categorical(keys[3], (top - spread.mean()) / (spread.std() + 1e-6) / 0.5)]
    plan = candidates[chosen]
    if args.planner == "ssr_mppi":
        plan = plan.at[: args.horizon].set(refine(args, model, masked, z, candidates, order, keys[4]))
    failed = ~jnp.isfinite(top[0]) | ~jnp.isfinite(z).all()
    pi = policy(args, model, world.params["pi"], z, jnp.zeros(model.action_dim)).mean
    action = plan[0] + args.min_std * jax.random.normal(keys[5], plan[0].shape) if explore else plan[0]
    action = jnp.where(failed, jnp.nan_to_num(pi), action)
    return jnp.clip(action, -1, 1) * world.mask, jnp.where(failed, 0.0, plan) * world.mask, failed


@partial(jax.jit, static_argnames=("args", "model", "explore"))
def act_diffusion(args: Args, model: WorldModel, ema, stats: Stats, world: World, obs, best, first, task, key, explore):
    """Actions [n, A] for obs [n, O] in tasks [n] by --planner; best [n, F, A] are the last plans, first [n] tells of
    new episodes. Returns actions, plans, failures [n] (see `plan_diffusion`) and the key for the next call."""
    n, H = len(obs), args.horizon
    if args.planner in ("ssr", "ssr_mppi"):
        key, plan_key = jax.random.split(key)
        one = partial(plan_diffusion, args, model, ema, stats, world, explore=explore)
        return *jax.vmap(one)(obs, best, first, task, jax.random.split(plan_key, n)), key
    args = dataclasses.replace(args, mpc=args.planner == "mppi")
    if len(world.discount) == 1:
        w = for_task(world, 0)
        action, mean, key = act(args, model, w.params, obs, best[:, :H], first, w.discount, key, explore)
    else:

        def one(obs, mean, first, task, key):
            w = for_task(world, task, mask_inputs=True)
            action, mean, _ = act(args, model, w.params, obs[None], mean[None], first[None], w.discount, key, explore)
            return action[0] * w.mask, mean[0] * w.mask

        key, plan_key = jax.random.split(key)
        action, mean = jax.vmap(one)(obs, best[:, :H], first, task, jax.random.split(plan_key, n))
    return action, best.at[:, :H].set(mean), jnp.zeros(n, bool), key


# ---------------------------------------------------------------------------------------------------------- Metrics
def spearman(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.corrcoef(ranks(x), ranks(y))[0, 1]


def r_squared(estimate: jax.Array, truth: jax.Array) -> jax.Array:
    return 1 - ((estimate - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()


def nmse(stats: Stats, estimate: jax.Array, z: jax.Array) -> jax.Array:
    """Squared error [F] of latent futures [B, F, Z], in units of the latent states' own spread around their mean."""
    return ((estimate - z) ** 2).sum(-1).mean(0) / ((z - stats.mean) ** 2).sum(-1).mean(0)


@partial(jax.jit, static_argnames=("args", "model"))
def measure(
    args: Args, model: WorldModel, ema, stats: Stats, world: World, windows: Windows, key
) -> dict[str, jax.Array]:
    """How well the networks do on windows [B] that they have not learned from.

    Returns arrays [F] `nmse/NAME` of the dynamics p_d, d, of both with the actions of another window, and of standing
    still (at scale 4: `nmse4/NAME`); scalars `r2/SCORER/LATENTS` and `spearman/...` of advantages; and of rho's actions
    and the data's `std` and lag-1 `correlation`.
    """
    F, B, result = args.future, len(windows.z), {}
    keys, shuffled = jax.random.split(key, 3 + B), jnp.roll(windows.action, B // 2, axis=0)

    def futures(rollouts, actions, scale):  # [B, F+1, Z]
        def one(z, action, task, key):
            changed = dataclasses.replace(args, rollouts=rollouts, draws=1)
            return rollout(changed, model, ema, stats, for_task(world, task), z, action[None], key, scale)[0, 0]

        return jax.vmap(one)(windows.z[:, 0], actions, windows.task, keys[3:])

    for scale, s in reversed(list(enumerate(scales_of(args)))):  # scale 1 last: its latents are judged below
        name, z = "nmse" if s == 1 else f"nmse{s}", windows.z[:, : F * s + 1 : s]
        names = {"p_d": ("diffusion", windows.action), "d": ("onestep", windows.action)}
        names |= {"p_d_shuffled": ("diffusion", shuffled), "d_shuffled": ("onestep", shuffled)}
        found = {k: futures(rollouts, actions[:, : F * s], scale) for k, (rollouts, actions) in names.items()}
        result |= {f"{name}/{k}": nmse(stats, v[:, 1:], z[:, 1:]) for k, v in found.items()}
        result[f"{name}/copy"] = nmse(stats, jnp.broadcast_to(z[:, :1], z[:, 1:].shape), z[:, 1:])
        latents = {"true": z, "p_d": found["p_d"], "d": found["d"]}

    def advantages(z, window):  # of one window: truth, by the world model's heads, by J
        w, actions = for_task(world, window.task), window.action[:F]
        y, now = returns(args, model, w, window)
        by_j = score_objective(args, model, ema, stats, w, z[None], actions[None], window.task)[0]
        return y - now, score_model(args, model, w, z, actions) - now, by_j

    for name, z in latents.items():
        truth, by_model, by_j = jax.vmap(advantages)(z, windows)
        for scorer, estimate in {"model": by_model, "J": by_j}.items():
            result |= {f"r2/{scorer}/{name}": r_squared(estimate, truth)}
            result |= {f"spearman/{scorer}/{name}": spearman(estimate, truth)}

    def proposals(z, task, key):
        alone = dataclasses.replace(args, num_proposals=1, num_policy=0, warm_start=0)
        return propose(alone, model, ema, stats, for_task(world, task), z, None, None, key)[0]

    drawn = jax.vmap(proposals)(windows.z[:, 0], windows.task, keys[3:])  # [B, F, A]
    mask = world.mask[windows.task][:, None] * jnp.ones((F, 1))  # [B, F, A]
    for name, a in {"rho": drawn, "data": windows.action[:, :F]}.items():
        mean = (a * mask).sum() / mask.sum()
        centred = (a - mean) * mask
        variance = (centred**2).sum() / mask.sum()
        result[f"{name}/std"] = jnp.sqrt(variance)
        result[f"{name}/correlation"] = (centred[:, 1:] * centred[:, :-1]).sum() / mask[:, 1:].sum() / variance
    return result
