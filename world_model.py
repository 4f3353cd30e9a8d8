"""A trained TD-MPC2 world model and its MPPI planner, for scripts that build on one without changing it.

The blocks are those of tdmpc2_jax.py, letter for letter (tests/test_copies.py compares them): read them there.

    args, model = Args(model_size=1), make_model(Args(model_size=1), obs_dim=24, action_dim=6, episodic=False)
    action, mean, key = act(args, model, params, obs, mean, first, discount, key, explore=False)
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from arguments import Count, Natural, Number, Positive, Several, Share, Weight


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args:
    # World model
    model_size: Literal[1, 5, 19, 48, 317] = 5  # millions of parameters: sets the next five where they are not given
    enc_dim: Count | None = None  # width of the encoder's hidden layers
    mlp_dim: Count | None = None  # width of all other hidden layers
    latent_dim: Count | None = None  # latent size Z
    num_enc_layers: Count | None = None  # layers of the encoder
    num_q: Several | None = None  # value heads
    episodic: bool = True  # learn a termination head where episodes can terminate; --no-episodic plans as if not
    num_bins: Several = 101  # bins K of the discrete regression of rewards and values
    vmin: Number = -10.0  # lowest bin, in symlog space
    vmax: Number = 10.0  # highest bin, in symlog space
    simnorm_dim: Count = 8  # size of the groups in which SimNorm takes softmaxes
    log_std_min: Number = -10.0  # lower bound of the policy's log standard deviation
    log_std_max: Number = 2.0  # upper bound of the policy's log standard deviation
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (on GPUs float32 means TF32)
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


MODEL_SIZES = {  # millions of parameters: (enc_dim, mlp_dim, latent_dim, num_enc_layers, num_q)
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
def symexp(x):
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot_inv(args: Args, logits: jax.Array) -> jax.Array:
    """The scalars [...] that logits [..., K] stand for."""
    bins = jnp.linspace(args.vmin, args.vmax, args.num_bins)
    return symexp((jax.nn.softmax(logits) * bins).sum(-1))


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
    z, a, keys = jnp.zeros(with_model_size(args).latent_dim), jnp.zeros(model.action_dim), jax.random.split(key, 6)
    params = {
        "encoder": model.encoder.init(keys[0], jnp.zeros(model.obs_dim)),
        "dynamics": model.dynamics.init(keys[1], z, a),
        "reward": model.reward.init(keys[2], z, a),
        "pi": model.pi.init(keys[3], z),
        "q": jax.vmap(lambda k: model.q.init(k, z, a))(jax.random.split(keys[4], model.num_q)),
    }
    return params | ({"termination": model.termination.init(keys[5], z)} if model.termination else {})


# ------------------------------------------------------------------------------------------------------ World model
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


# --------------------------------------------------------------------------------------------------------- Planning
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
    obs [n, O]; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the start of an episode;
    discount, a scalar; noise and heads as `plan_noise` draws them; explore adds noise to the action. Returns actions
    [n, A] in [-1, 1] and the new means [n, H, A].
    """
    n, H, A = len(obs), args.horizon, model.action_dim
    chex.assert_shape([obs, prev_mean, first], [(n, model.obs_dim), (n, H, A), (n,)])

    def plan_one(env):
        env_obs, last_mean, starts, draws = env
        z = model.encoder.apply(params["encoder"], env_obs)[None]  # [1, Z]
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
    """Actions [n, A] for obs [n, O] by `plan`, by the policy (--no-mpc) or random; the planner's means; a new key."""
    key, noise_key = jax.random.split(key)
    if random:
        return jax.random.uniform(noise_key, (len(obs), model.action_dim), minval=-1, maxval=1), prev_mean, key
    if args.mpc:
        noise, heads = plan_noise(args, model, noise_key, len(obs))
        return *plan(args, model, params, obs, prev_mean, first, discount, noise, heads, explore), key
    eps = jax.random.normal(noise_key, (len(obs), model.action_dim))
    sample = policy(args, model, params["pi"], model.encoder.apply(params["encoder"], obs), eps)
    return sample.action if explore else sample.mean, prev_mean, key
