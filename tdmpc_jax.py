"""TD-MPC in one file, the first version: a latent world model learned by its own predictions, and MPPI on top of it.

Paper: Hansen, Wang, Su, "Temporal Difference Learning for Model Predictive Control" (arXiv 2203.04955).
Online reinforcement learning on one task with state observations. `diff tdmpc_jax.py tdmpc2_jax.py` shows what version
2 changed. Where this file departs from the original code, a comment says so. Shapes are written in the paper's letters:
H horizon, B batch, N samples of the planner, P policy sequences, A action size, O observation size, Z latent size,
n environments, q an ensemble of value heads.

    python tdmpc_jax.py --task cheetah-run                                   # train; a killed run goes on with --resume
    python tdmpc_jax.py --evaluate --checkpoint runs/walker-walk/tdmpc_jax/1
    python tdmpc_jax.py --evaluate --checkpoint original.pt --task walker-walk           # an agent of the original
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
    task: str = "walker-walk"  # short name (python envs.py lists them) or any Gymnasium id with a Box action space
    seed: int = 1  # seed of the parameters, the environments and every random draw
    num_envs: int = 1  # environments stepped side by side; one batched plan acts in all of them
    utd: float = 1.0  # gradient updates per decision of one environment
    mpc: bool = True  # act by planning; --no-mpc acts with the policy alone
    action_repeat: int | None = None  # simulator steps per decision; default: 2, 4 or 8 by the task, as in the original

    # Model
    enc_dim: int = 256  # width of the encoder's hidden layer
    mlp_dim: int = 512  # width of all other hidden layers
    latent_dim: int | None = None  # latent size Z; default 50, humanoid and dog 100
    noise_clip: float = 0.3  # bound on the policy's noise
    compute_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # type of the inputs of matrix products; parameters, statistics and losses stay float32
    )

    # Optimisation
    batch_size: int | None = None  # windows per update B; default 512, dog 2048
    buffer_size: int = 1_000_000  # decisions that the replay holds
    seed_steps: int = 5000  # random decisions before the first update, and updates made then at once
    lr: float | None = None  # learning rate; default 1e-3, dog 3e-4
    grad_clip_norm: float = 10.0  # bound on the global gradient norm, of the model and of the policy each
    tau: float = 0.01  # step of the slow encoder and the slow values
    target_update_freq: int = 2  # updates from one step of the slow networks to the next
    rho: float = 0.5  # weight of a loss t steps into the window is rho^t
    consistency_coef: float = 2.0  # weight of the latent consistency loss
    reward_coef: float = 0.5  # weight of the reward loss
    value_coef: float = 0.1  # weight of the value loss
    loss_bound: float = 1e4  # bound on each of these losses and on the priority of one window
    per_alpha: float = 0.6  # windows are drawn in proportion to their priorities to this power
    per_beta: float = 0.4  # windows weigh in the loss as their probabilities to minus this power
    discount: float = 0.99  # discount, whatever the action repeat

    # Planning
    horizon: int = 5  # steps H of a training window, and of a plan at the end of its schedule
    first_horizon: int = 1  # steps of a plan at the start of its schedule
    iterations: int | None = None  # iterations of MPPI; default 6, humanoid 12, dog 8
    num_samples: int = 512  # action sequences N per iteration
    num_elites: int = 64  # sequences that the next distribution is fitted to
    num_pi_trajs: int = 25  # sequences P proposed by the policy, beside the N
    first_min_std: float = 0.5  # lower bound of the planner's standard deviation at the start of its schedule
    min_std: float = 0.05  # the same at the end, and the standard deviation of the policy's noise
    max_std: float = 2.0  # initial value and upper bound of the planner's standard deviation
    schedule_steps: int = (
        25_000  # length of both schedules in DECISIONS (50,000 to 200,000 simulator steps, by the action repeat)
    )
    temperature: float = 0.5  # inverse temperature of the elites' weights
    momentum: float = 0.1  # share of its old value that the planner's mean keeps in an iteration


# what the original sets by domain, beside the action repeats
DEFAULTS = {"latent_dim": 50, "batch_size": 512, "lr": 1e-3, "iterations": 6, "total_timesteps": 500_000}
TASK_DEFAULTS = {
    "humanoid": {"latent_dim": 100, "iterations": 12, "total_timesteps": 3_000_000},
    "dog": {"latent_dim": 100, "iterations": 8, "batch_size": 2048, "lr": 3e-4, "total_timesteps": 5_000_000},
}


def schedules(args: Args, decisions: int) -> tuple[int, float]:
    """Planning horizon and lower bound of the planner's standard deviation after so many decisions. Both are linear;
    the original takes the bound at its last update, which lags behind, first leaps forward and then falls back."""
    done = min(decisions, args.schedule_steps) / args.schedule_steps
    horizon = int(args.first_horizon + done * (args.horizon - args.first_horizon))
    return horizon, args.first_min_std + done * (args.min_std - args.first_min_std)


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
        init = nn.initializers.zeros if self.zero_init else nn.initializers.orthogonal()
        kernel = self.param("kernel", init, (sum(sizes), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows = jnp.split(kernel, np.cumsum(sizes)[:-1])
        dot = partial(jnp.dot, preferred_element_type=jnp.float32)
        return sum(dot(x.astype(self.dtype), w.astype(self.dtype)) for x, w in zip(inputs, rows, strict=True)) + bias


class MLP(nn.Module):
    """Hidden layers Linear -> ELU, the first one Linear -> LayerNorm -> tanh if asked for, then Linear(out)."""

    hidden: tuple[int, ...]
    out: int
    norm_first: bool = False
    zero_init: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, *inputs):
        """Inputs [..., in_i] -> [..., out]."""
        for i, width in enumerate(self.hidden):
            x = Linear(width, dtype=self.dtype, name=f"linear_{i}")(*inputs)
            norm = self.norm_first and i == 0
            inputs = (jnp.tanh(nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(x)) if norm else nn.elu(x),)
        i = len(self.hidden)
        return Linear(self.out, self.zero_init, self.dtype, name=f"linear_{i}")(*inputs)


class WorldModel(NamedTuple):
    """The components of the model. Hashable and without parameters: a static argument of the jitted functions."""

    encoder: MLP  # h(s) -> z
    dynamics: MLP  # d(z, a) -> z'
    reward: MLP  # R(z, a)
    pi: MLP  # p(z) -> mean of A actions
    q: MLP  # Q(z, a): one head; the ensemble of two is the same module over stacked parameters
    obs_dim: int
    action_dim: int


def make_model(args: Args, obs_dim: int, action_dim: int) -> WorldModel:
    """The networks for O = obs_dim and A = action_dim."""
    mlp = partial(MLP, (args.mlp_dim, args.mlp_dim), dtype=args.compute_dtype)
    return WorldModel(
        encoder=MLP((args.enc_dim,), args.latent_dim, dtype=args.compute_dtype),
        dynamics=mlp(args.latent_dim),
        reward=mlp(1, zero_init=True),
        pi=mlp(action_dim),
        q=mlp(1, norm_first=True, zero_init=True),
        obs_dim=obs_dim,
        action_dim=action_dim,
    )


def init_params(args: Args, model: WorldModel, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, one entry per component; those of `q` are stacked along a leading axis [2]."""
    z, a = jnp.zeros(args.latent_dim), jnp.zeros(model.action_dim)
    keys = jax.random.split(key, 5)
    return {
        "encoder": model.encoder.init(keys[0], jnp.zeros(model.obs_dim)),
        "dynamics": model.dynamics.init(keys[1], z, a),
        "reward": model.reward.init(keys[2], z, a),
        "pi": model.pi.init(keys[3], z),
        "q": jax.vmap(lambda k: model.q.init(k, z, a))(jax.random.split(keys[4], 2)),
    }


# ------------------------------------------------------------------------------------------------------ World model
class Policy(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise


def policy(args: Args, model: WorldModel, pi_params, z: jax.Array, eps: jax.Array) -> Policy:
    """Policy p(z), a mean with clipped noise of fixed size: z [..., Z] and standard normal eps [..., A] -> sample."""
    mean = jnp.tanh(model.pi.apply(pi_params, z))
    action = mean + jnp.clip(args.min_std * eps, -args.noise_clip, args.noise_clip)
    clipped = jnp.clip(action, -1 + 1e-6, 1 - 1e-6)
    return Policy(action + jax.lax.stop_gradient(clipped - action), mean)  # the gradient passes the clip


def q_values(model: WorldModel, q_params, z: jax.Array, action: jax.Array) -> jax.Array:
    """All heads in q_params: z [..., Z], action [..., A] -> [q, ...]."""
    return jax.vmap(lambda p: model.q.apply(p, z, action))(q_params)[..., 0]


# --------------------------------------------------------------------------------------------------------- Planning
class PlanNoise(NamedTuple):
    """Every random draw of one plan in n environments."""

    pi: jax.Array  # [n, H, P, A] normal: the policy's sequences
    sample: jax.Array  # [n, iterations, H, N, A] normal: the sampled sequences
    terminal: jax.Array  # [n, iterations, N+P, A] normal: the policy's action behind the horizon
    gumbel: jax.Array  # [n, num_elites]: choice of the elite
    explore: jax.Array  # [n, A] normal: exploration


def plan_noise(args: Args, model: WorldModel, key: jax.Array, n: int) -> PlanNoise:
    """Draws what a plan in n environments needs."""
    H, P, N, A = args.horizon, args.num_pi_trajs, args.num_samples, model.action_dim
    keys = jax.random.split(key, 5)
    return PlanNoise(
        pi=jax.random.normal(keys[0], (n, H, P, A)),
        sample=jax.random.normal(keys[1], (n, args.iterations, H, N, A)),
        terminal=jax.random.normal(keys[2], (n, args.iterations, N + P, A)),
        gumbel=jax.random.gumbel(keys[3], (n, args.num_elites)),
        explore=jax.random.normal(keys[4], (n, A)),
    )


def envs_at_once(args: Args, model: WorldModel) -> int:
    """Environments whose plans are computed side by side, the others after them: on a CPU as many as leave a layer's
    activations in the cache (30 side by side take 1.8 times as long as six times five), elsewhere as 512 MB hold."""
    budget = 2**22 if jax.default_backend() == "cpu" else 2**29  # bytes of one layer's activations
    return max(1, budget // (4 * args.num_samples * model.q.hidden[0]))


def estimate_value(args: Args, model: WorldModel, params, z, actions, horizon, eps) -> jax.Array:
    """Value [N+P] of action sequences [H, N+P, A] from z [1, Z]: rewards of `horizon` steps, then the lower of two
    Qs. `horizon` is a number that only the device knows: one program serves the whole schedule."""

    def step(t, carry):
        value, z = carry
        value = value + args.discount**t * model.reward.apply(params["reward"], z, actions[t])[..., 0]
        return value, model.dynamics.apply(params["dynamics"], z, actions[t])

    carry = step(0, (0.0, z))  # not in the loop: all sequences share z
    value, z = jax.lax.fori_loop(1, horizon, step, carry)
    action = policy(args, model, params["pi"], z, eps).action
    q = q_values(model, params["q"], z, action).min(0)
    return jnp.nan_to_num(value + args.discount**horizon * q, nan=0.0)


def plan(
    args: Args, model: WorldModel, params, obs, prev_mean, first, horizon, min_std, noise: PlanNoise, explore: bool
) -> tuple[jax.Array, jax.Array]:
    """Model predictive path integral control (MPPI) in n environments at once.

    obs [n, O]; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the start of an episode;
    horizon [n], the steps to plan, 1 .. H; min_std, a scalar, the lower bound of the standard deviation; explore adds
    noise to the action. Returns actions [n, A] in [-1, 1] and the new means [n, H, A].
    """
    n, H, A = len(obs), args.horizon, model.action_dim
    chex.assert_shape([obs, prev_mean, first, horizon], [(n, model.obs_dim), (n, H, A), (n,), (n,)])

    def plan_one(env):
        obs, prev_mean, first, horizon, draws = env
        z = model.encoder.apply(params["encoder"], obs)[None]  # [1, Z]
        pi_actions, pi_z = [], z
        for t in range(H):
            pi_actions.append(policy(args, model, params["pi"], pi_z, draws.pi[t]).action)
            pi_z = model.dynamics.apply(params["dynamics"], pi_z, pi_actions[-1]) if t < H - 1 else None
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(carry, draw):
            mean, std = carry
            sampled = jnp.clip(mean[:, None] + std[:, None] * draw.sample, -1, 1)
            actions = jnp.concatenate([sampled, pi_actions], axis=1)  # [H, N+P, A]
            values = estimate_value(args, model, params, z, actions, horizon, draw.terminal)
            elite_values, elite_indices = jax.lax.top_k(values, args.num_elites)
            elites = actions[:, elite_indices]  # [H, E, A]
            weights = jax.nn.softmax(args.temperature * elite_values)  # [E]
            elite_mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - elite_mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), min_std, args.max_std)
            mean = args.momentum * mean + (1 - args.momentum) * elite_mean
            return (mean, std), (elites[0], weights)

        unplanned = jnp.arange(H)[:, None] >= horizon - 1  # by the last call, and beyond the horizon
        mean = jnp.where(first | unplanned, 0.0, jnp.roll(prev_mean, -1, axis=0))
        scanned = PlanNoise(None, draws.sample, draws.terminal, None, None)
        start = (mean, jnp.full((H, A), args.max_std))
        (mean, std), (first_actions, weights) = jax.lax.scan(iterate, start, scanned)
        chosen = jnp.argmax(jnp.log(weights[-1]) + draws.gumbel)
        action = first_actions[-1, chosen]  # [A]
        action = action + std[0] * draws.explore if explore else action
        return jnp.clip(action, -1, 1), mean  # the original sends and stores what lies beyond, too

    envs = (obs, prev_mean, first, horizon, noise)
    at_once = envs_at_once(args, model)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


@partial(jax.jit, static_argnames=("args", "model", "explore"))
def act(args: Args, model: WorldModel, params, obs, prev_mean, first, horizon, min_std, key, explore: bool):
    """Actions [n, A] for obs [n, O] by planning, or by the policy alone with --no-mpc; see `plan`. Returns the actions,
    the planner's means and the key for the next call."""
    key, noise_key = jax.random.split(key)
    if args.mpc:
        noise = plan_noise(args, model, noise_key, len(obs))
        action, prev_mean = plan(args, model, params, obs, prev_mean, first, horizon, min_std, noise, explore)
    else:
        eps = jax.random.normal(noise_key, (len(obs), model.action_dim))
        sample = policy(args, model, params["pi"], model.encoder.apply(params["encoder"], obs), eps)
        action = sample.action if explore else sample.mean
    return action, prev_mean, key


# --------------------------------------------------------------------------------------------------------- Learning
class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict[str, Any]  # encoder, dynamics, reward, pi, q
    target: dict[str, Any]  # slow copies of params["encoder"] and params["q"]
    model_opt: optax.OptState  # of everything but the policy
    pi_opt: optax.OptState
    key: jax.Array
    updates: jax.Array  # number of updates made


class Batch(NamedTuple):
    """Windows of H+1 consecutive entries: actions and rewards lead from one observation to the next."""

    obs: jax.Array  # [H+1, B, O]
    action: jax.Array  # [H, B, A]
    reward: jax.Array  # [H, B]
    terminated: jax.Array  # [H, B]
    weight: jax.Array  # [B] of each window in the loss


class UpdateNoise(NamedTuple):
    """Every random draw of one update."""

    next_action: jax.Array  # [H, B, A] normal: the policy's actions in the TD targets
    pi_action: jax.Array  # [H+1, B, A] normal: the policy's actions in its own loss


def update_noise(args: Args, model: WorldModel, key: jax.Array) -> UpdateNoise:
    """Draws what one update needs."""
    H, B, A = args.horizon, args.batch_size, model.action_dim
    keys = jax.random.split(key, 2)
    return UpdateNoise(
        next_action=jax.random.normal(keys[0], (H, B, A)),
        pi_action=jax.random.normal(keys[1], (H + 1, B, A)),
    )


def optimizers(args: Args) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the model and for the policy, each behind its own global-norm clip."""
    clip = optax.clip_by_global_norm(args.grad_clip_norm)
    tx = optax.chain(clip, optax.scale_by_adam(eps=1e-8), optax.scale(-args.lr))
    return tx, tx


def init_state(args: Args, params: dict[str, Any], target, key: jax.Array) -> TrainState:
    """Learning state at the start of a run with these parameters."""
    model_tx, pi_tx = optimizers(args)
    model_opt = model_tx.init({k: v for k, v in params.items() if k != "pi"})
    target = jax.tree.map(jnp.copy, target)  # not the same buffers: both are donated
    return TrainState(params, target, model_opt, pi_tx.init(params["pi"]), key, jnp.zeros((), jnp.int32))


def td_target(args: Args, model: WorldModel, state: TrainState, batch: Batch, noise) -> jax.Array:
    """TD targets [H, B]: r + discount * min of the two slow Qs at the policy's next action. Behind a termination there
    is no more value (the original knows no terminations)."""
    next_z = model.encoder.apply(state.params["encoder"], batch.obs[1:])  # [H, B, Z]: not the slow encoder
    next_action = policy(args, model, state.params["pi"], next_z, noise.next_action).action
    q = q_values(model, state.target["q"], next_z, next_action)
    return batch.reward + args.discount * (1 - batch.terminated) * q.min(0)


def model_loss(args: Args, model: WorldModel, params, batch: Batch, next_z, target):
    """World-model objective (eq. 10) on latent rollouts from the windows' first observations. Returns the loss, and the
    rollouts [H+1, B, Z], the windows' new priorities [B] and the parts of the loss."""
    rho = args.rho ** jnp.arange(args.horizon)[:, None]  # [H, 1]
    zs = [model.encoder.apply(params["encoder"], batch.obs[0])]
    for t in range(args.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward = model.reward.apply(params["reward"], zs[:-1], batch.action)[..., 0]  # [H, B]
    q = q_values(model, params["q"], zs[:-1], batch.action)  # [q, H, B]
    consistency_loss = (rho * ((zs[1:] - next_z) ** 2).mean(-1)).sum(0)  # [B], as the next ones
    reward_loss = (rho * (reward - batch.reward) ** 2).sum(0)
    value_loss = (rho * ((q - target) ** 2).sum(0)).sum(0)
    total_loss = (
        args.consistency_coef * jnp.minimum(consistency_loss, args.loss_bound)
        + args.reward_coef * jnp.minimum(reward_loss, args.loss_bound)
        + args.value_coef * jnp.minimum(value_loss, args.loss_bound)
    )
    priority = jnp.minimum((rho * jnp.abs(q - target).sum(0)).sum(0), args.loss_bound) + 1e-6
    loss = (batch.weight * total_loss).mean()
    info = {
        "consistency_loss": consistency_loss.mean(),
        "reward_loss": reward_loss.mean(),
        "value_loss": value_loss.mean(),
        "total_loss": total_loss.mean(),
        "weighted_loss": loss,
    }
    return loss / args.horizon, (zs, priority, info)


def policy_loss(args: Args, model: WorldModel, pi_params, q_params, zs, noise):
    """Policy objective (eq. 11) on latent states zs [H+1, B, Z]."""
    pi = policy(args, model, pi_params, zs, noise.pi_action)
    q = q_values(model, q_params, zs, pi.action).min(0)  # [H+1, B]
    rho = args.rho ** jnp.arange(args.horizon + 1)
    return -(rho * q.mean(1)).sum()


def update(args: Args, model: WorldModel, state: TrainState, batch: Batch, noise: UpdateNoise):
    """One gradient step on the world model, then one on the policy, then, every second time, one of the slow networks.

    Returns the new state, the new priorities [B] of the batch's windows and a dict of scalars for the log.
    """
    H, B = args.horizon, len(batch.obs[0])
    shapes = [(H + 1, B, model.obs_dim), (H, B, model.action_dim), (H, B), (H, B), (B,)]
    chex.assert_shape(list(batch), shapes)
    model_tx, pi_tx = optimizers(args)

    next_z = model.encoder.apply(state.target["encoder"], batch.obs[1:])  # [H, B, Z]
    target = td_target(args, model, state, batch, noise)  # [H, B]
    model_params = {k: v for k, v in state.params.items() if k != "pi"}
    loss = partial(model_loss, args, model, batch=batch, next_z=next_z, target=target)
    grads, (zs, priority, info) = jax.grad(loss, has_aux=True)(model_params)
    updates, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, updates)

    loss = partial(policy_loss, args, model, q_params=model_params["q"], zs=zs, noise=noise)
    pi_loss, pi_grads = jax.value_and_grad(loss)(state.params["pi"])
    updates, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(state.params["pi"], updates)

    tau = jnp.where(state.updates % args.target_update_freq == 0, args.tau, 0.0)
    target = optax.incremental_update({k: model_params[k] for k in state.target}, state.target, tau)
    info |= {"pi_loss": pi_loss, "grad_norm": optax.tree.norm(grads), "pi_grad_norm": optax.tree.norm(pi_grads)}
    params = model_params | {"pi": pi_params}
    return TrainState(params, target, model_opt, pi_opt, state.key, state.updates + 1), priority, info


# ----------------------------------------------------------------------------------------------------------- Replay
class Replay(NamedTuple):
    """Ring of the last C steps of n environments, on the device. Entry i of an environment holds an observation, the
    action that led to it and what it brought; `first` marks a reset, whose action and reward are filler.

    A window of H+1 entries may start at any entry that has H more behind it and no reset among those. Such an entry has
    a priority above 0, all others have 0. A sum tree finds entries by priority: level 0 holds priority^per_alpha of
    every entry, flat index row * n + environment; each value of the level above is the sum of FANOUT of them.
    """

    obs: jax.Array  # [C, n, O]
    action: jax.Array  # [C, n, A]
    reward: jax.Array  # [C, n]
    terminated: jax.Array  # [C, n]
    first: jax.Array  # [C, n]
    tree: tuple[jax.Array, ...]  # levels [rows, FANOUT]: entries first, a single row last
    size: jax.Array  # number of windows
    rows: jax.Array  # number of steps ever written


FANOUT = 128


def init_replay(capacity: int, num_envs: int, obs_dim: int, action_dim: int) -> Replay:
    """Empty replay of `capacity` steps of each environment."""
    C, n, zero = capacity, num_envs, partial(jnp.zeros, (), jnp.int32)
    obs, action, reward = jnp.zeros((C, n, obs_dim)), jnp.zeros((C, n, action_dim)), jnp.zeros((C, n))
    flags = [jnp.zeros((C, n), bool) for _ in range(2)]
    widths = [-(-C * n // FANOUT)]
    while widths[-1] > 1:
        widths.append(-(-widths[-1] // FANOUT))
    tree = tuple(jnp.zeros((width, FANOUT)) for width in widths)
    return Replay(obs, action, reward, *flags, tree, zero(), zero())


def set_leaves(tree: tuple[jax.Array, ...], index: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    """The sum tree with `value` [m] at the entries `index` [m]; of several values for one entry, the largest."""
    row, column = jnp.divmod(index, FANOUT)
    levels = [tree[0].at[row, column].set(0.0).at[row, column].max(value)]  # the same on every device, unlike `set`
    for level in tree[1:]:
        sums = levels[-1][row].sum(-1)  # anew, not adjusted: no rounding adds up
        row, column = jnp.divmod(row, FANOUT)
        levels.append(level.at[row, column].set(sums))
    return tuple(levels)


def draw_leaves(tree: tuple[jax.Array, ...], key: jax.Array, batch_size: int) -> jax.Array:
    """Entries [batch_size] drawn in proportion to their values, with replacement: from the root down, one of FANOUT at
    a time. One draw from a sum over all entries could not tell a million apart in float32."""
    row = jnp.zeros(batch_size, jnp.int32)
    for level, level_key in zip(reversed(tree), jax.random.split(key, len(tree)), strict=True):
        sums = jnp.where(level[row] > 0, jnp.cumsum(level[row], axis=1), 0.0)  # [batch_size, FANOUT]
        bound = jax.random.uniform(level_key, (batch_size, 1)) * sums.max(1, keepdims=True)
        row = row * FANOUT + jnp.argmax(sums > bound, axis=1)
    return row


@partial(jax.jit, static_argnames=("horizon",), donate_argnames=("replay",))
def add(replay: Replay, horizon: int, obs, action, reward, terminated, first) -> Replay:
    """Writes one step of all environments (obs [n, O], action [n, A], the rest [n]) over the oldest one. The windows
    that it completes get the largest priority of all: at once (the original: when the episode is over), and with them
    the episode's last one (the original leaves it out)."""
    C, n = replay.first.shape
    row = replay.rows % C
    expired = replay.tree[0].ravel()[row * n + jnp.arange(n)] > 0  # starts in the row that is overwritten
    entry = {"obs": obs, "action": action, "reward": reward, "terminated": terminated, "first": first}
    written = {k: getattr(replay, k).at[row].set(v) for k, v in entry.items()}

    start = (replay.rows - horizon) % C  # the windows that this step completes start here
    after_start = (start + 1 + jnp.arange(horizon)) % C
    valid = ~written["first"][after_start].any(0) & (replay.rows >= horizon)  # [n]
    largest = jnp.where(replay.size > 0, replay.tree[0].max(), 1.0)
    index = jnp.concatenate([row * n + jnp.arange(n), start * n + jnp.arange(n)])
    tree = set_leaves(replay.tree, index, jnp.concatenate([jnp.zeros(n), jnp.where(valid, largest, 0.0)]))
    size = replay.size + valid.sum() - expired.sum()
    return Replay(**written, tree=tree, size=size, rows=replay.rows + 1)


def windows(replay: Replay, drawn: jax.Array, horizon: int, per_beta: float) -> Batch:
    """The windows that start at these entries. Each weighs as its probability^-beta, relative to the largest weight:
    neither the number nor the sum of all priorities matters."""
    C, n = replay.first.shape
    rows = (drawn // n + jnp.arange(horizon + 1)[:, None]) % C  # [H+1, B]
    env = drawn % n
    terminated = replay.terminated[rows[1:], env].astype(jnp.float32)
    leaves = replay.tree[0].ravel()[drawn]
    weight = (leaves.min() / leaves) ** per_beta
    return Batch(replay.obs[rows, env], replay.action[rows[1:], env], replay.reward[rows[1:], env], terminated, weight)


@partial(jax.jit, static_argnames=("args", "model", "num_updates"), donate_argnames=("state", "replay"))
def train(args: Args, model: WorldModel, state: TrainState, replay: Replay, num_updates: int):
    """`num_updates` updates on fresh samples in one dispatch. Returns the new state, the replay with the new priorities
    and the means of the updates' scalars."""

    def one(carry, _):
        state, tree = carry
        key, sample_key, noise_key = jax.random.split(state.key, 3)
        drawn = draw_leaves(tree, sample_key, args.batch_size)
        batch = windows(replay._replace(tree=tree), drawn, args.horizon, args.per_beta)
        noise = update_noise(args, model, noise_key)
        state, priority, info = update(args, model, state._replace(key=key), batch, noise)
        return (state, set_leaves(tree, drawn, priority**args.per_alpha)), info

    (state, tree), infos = jax.lax.scan(one, (state, replay.tree), None, length=num_updates)
    return state, replay._replace(tree=tree), jax.tree.map(jnp.mean, infos)


# ------------------------------------------------------------------------------------------------------ Checkpoints
def from_torch(file: dict[str, dict[str, np.ndarray]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and slow networks from the content of an original checkpoint, {"model": …, "model_target": …}."""

    def layer(tensors, kind, *names: str):
        arrays = [
            [np.asarray(tensors[f"{name}.{field}"], np.float32) for field in ("weight", "bias")] for name in names
        ]
        arrays = [jnp.asarray(x[0] if len(names) == 1 else np.stack(x)) for x in zip(*arrays, strict=True)]
        first = arrays[0].swapaxes(-1, -2) if kind == "linear" else arrays[0]
        return {"kernel" if kind == "linear" else "scale": first, "bias": arrays[1]}

    def mlp(tensors, layers, *prefixes: str):
        names = {name: [f"{prefix}.{i}" for prefix in prefixes] for name, i in layers.items()}
        return {"params": {name: layer(tensors, name[:-2], *which) for name, which in names.items()}}

    def components(tensors):
        three = {"linear_0": 0, "linear_1": 2, "linear_2": 4}
        params = {"encoder": mlp(tensors, {"linear_0": 0, "linear_1": 2}, "_encoder")}
        params |= {name: mlp(tensors, three, f"_{name}") for name in ("dynamics", "reward", "pi")}
        return params | {"q": mlp(tensors, {"linear_0": 0, "norm_0": 1, "linear_1": 3, "linear_2": 5}, "_Q1", "_Q2")}

    params, target = components(file["model"]), components(file["model_target"])
    return params, {name: target[name] for name in ("encoder", "q")}
