"""TD-MPC in one file, the first version: a latent world model learned by its own predictions, and MPPI on top of it.

Paper: Hansen, Wang, Su, "Temporal Difference Learning for Model Predictive Control" (arXiv 2203.04955).
Online reinforcement learning on one task with state observations. `diff tdmpc_jax.py tdmpc2_jax.py` shows what version
2 changed; where this file departs from the original code, a comment says so. Shapes are written in the paper's letters:
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
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import envs as environments
from tdmpc2_support import cli
from tdmpc2_support.agents.pretrained import load_tdmpc
from tdmpc2_support.cli import Count, Name, Natural, NewFile, Positive, Share, Weight
from tdmpc2_support.devices import use_compile_cache, use_huge_pages
from tdmpc2_support.run.reports import RETURNS_COLUMNS, evaluating, play, report_returns, returns_head
from tdmpc2_support.run.runs import Run


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"  # a short name (python envs.py lists them) or any Gymnasium id with a Box action space
    action_repeat: Count | None = None  # simulator steps per decision; default by task, in DMControl 4, 2 or 8

    # World model
    enc_dim: Count = 256  # width of the encoder's hidden layer
    mlp_dim: Count = 512  # width of all other hidden layers
    latent_dim: Count | None = None  # latent size Z; default 50, humanoid and dog 100
    noise_clip: Weight = 0.3  # bound on the policy's noise, whose standard deviation is min_std
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (on GPUs float32 means TF32)

    # Learning
    batch_size: Count | None = None  # windows per update B; default 512, dog 2048
    buffer_size: Count = 1_000_000  # decisions that the replay holds
    num_envs: Count = 1  # environments stepped side by side; one batched plan acts in all of them
    utd: Positive = 1.0  # gradient updates per decision of one environment
    seed_steps: Natural = 5000  # random decisions, then as many updates at once
    lr: Positive | None = None  # learning rate; default 1e-3, dog 3e-4
    grad_clip_norm: Positive = 10.0  # bound on the global gradient norm, of the model and of the policy each
    tau: Share = 0.01  # step of the slow encoder and the slow values
    target_update_freq: Count = 2  # updates from one such step to the next
    rho: Share = 0.5  # weight of a loss t steps into the window is rho^t
    consistency_coef: Weight = 2.0  # weight of the latent consistency loss
    reward_coef: Weight = 0.5  # weight of the reward loss
    value_coef: Weight = 0.1  # weight of the value loss
    loss_bound: Positive = 1e4  # bound on each of these losses and on the priority, of every window
    per_alpha: Share = 0.6  # windows are drawn in proportion to their priorities to this power
    per_beta: Share = 0.4  # windows weigh in the loss as their probabilities to minus this power
    discount: Share = 0.99  # discount, whatever the action repeat

    # Planning
    mpc: bool = True  # act by planning; --no-mpc acts with the policy alone
    horizon: Count = 5  # steps H of a training window, and of a plan at the end of its schedule
    first_horizon: Count = 1  # steps of a plan at the start of its schedule
    iterations: Count | None = None  # iterations of MPPI; default 6, humanoid 12, dog 8
    num_samples: Count = 512  # action sequences N per iteration
    num_elites: Count = 64  # sequences that the next distribution is fitted to
    num_pi_trajs: Natural = 25  # sequences P proposed by the policy, beside the N
    first_min_std: Weight = 0.5  # lower bound of the planner's standard deviation at the start of its schedule
    min_std: Weight = 0.05  # lower bound of the planner's standard deviation at the end of its schedule
    schedule_steps: Count = 25_000  # length of both schedules in DECISIONS: 50,000 to 200,000 simulator steps
    max_std: Positive = 2.0  # initial value and upper bound of the planner's standard deviation
    temperature: Weight = 0.5  # inverse temperature of the elites' weights
    momentum: Share = 0.1  # share of its old value that the planner's mean keeps in an iteration

    # Run
    exp_name: Name = "tdmpc_jax"  # name of this experiment: its files go to RUNS_DIR/TASK/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the environments and every random draw
    total_timesteps: Count | None = None  # length in simulator steps; default 500,000, humanoid 3 and dog 5 million
    resume: bool = False  # continue the run of this task, name and seed from its last checkpoint, if it has one
    checkpoint: str | None = None  # start from this agent: a run, or an original .pt
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the returns and exit
    json: NewFile | None = None  # with --evaluate: write the results to this file
    eval_freq: Count = 20_000  # simulator steps between evaluations (one more at step 0 and at the end)
    eval_episodes: Count = 10  # episodes of an evaluation, run side by side
    checkpoint_freq: Count = 100_000  # simulator steps between checkpoints (one more at the end, on SIGTERM, on Ctrl-C)
    log_freq: Count = 2_000  # simulator steps between two points of the loss curves
    capture_video: bool = False  # write one MP4 of every evaluation (needs a GL library)
    save_episodes: str | None = None  # also write the training episodes to this folder, in the form of a dataset
    track: bool = False  # also send everything to Weights & Biases (pip install wandb)
    wandb_project_name: str = "tdmpc2-jax"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    compile_cache: bool = True  # keep compiled programs in ~/.cache/tdmpc2-jax: the second start is faster


SCRIPTS = ("tdmpc_jax",)  # whose checkpoints this one starts from
DEFAULTS = {"latent_dim": 50, "batch_size": 512, "lr": 1e-3, "iterations": 6, "total_timesteps": 500_000}
TASK_DEFAULTS = {  # by domain of DMControl, as in the original
    "humanoid": {"latent_dim": 100, "iterations": 12, "total_timesteps": 3_000_000},
    "dog": {"latent_dim": 100, "iterations": 8, "batch_size": 2048, "lr": 3e-4, "total_timesteps": 5_000_000},
}
REPEATS = {"cartpole": 8, "finger": 2, "walker": 2, "humanoid": 2, "dog": 2}  # in other domains of DMControl 4


def with_task_defaults(args: Args) -> Args:
    """Fills in what was not given by what the original sets for the task; repeats outside DMControl are the tasks'."""
    spec = environments.task_spec(args.task)
    domain = spec.name.removeprefix("dm_control/").partition("-")[0] if spec.domain == "DMControl" else None
    repeat = REPEATS.get(domain, 4) if domain else spec.action_repeat
    values = DEFAULTS | {"action_repeat": repeat} | TASK_DEFAULTS.get(domain, {})
    return dataclasses.replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})


class Schedule(NamedTuple):
    horizon: np.ndarray  # [n] steps that are planned, 1 .. H
    min_std: np.ndarray  # lower bound of the planner's standard deviation


def schedule(args: Args, decisions: int, first: np.ndarray, horizon: np.ndarray) -> Schedule:
    """Limits of plans after so many decisions: linear, with a new horizon at an episode's start (`first` [n]) only. The
    original takes the bound at its last update, which first lags behind, then leaps ahead and falls back."""
    done = min(decisions, args.schedule_steps)
    new_horizon = args.first_horizon + (args.horizon - args.first_horizon) * done // args.schedule_steps
    min_std = args.first_min_std + (args.min_std - args.first_min_std) * done / args.schedule_steps
    return Schedule(np.where(first, np.int32(new_horizon), horizon), np.float32(min_std))


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
        pairs = [(x.astype(self.dtype), w.astype(self.dtype)) for x, w in zip(inputs, rows, strict=True)]
        return sum((x @ w).astype(jnp.float32) for x, w in pairs) + bias  # the cast keeps gradients' products in dtype


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
class PolicySample(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise


def policy(args: Args, model: WorldModel, pi_params, z: jax.Array, eps: jax.Array) -> PolicySample:
    """Policy p(z), a mean with noise of a fixed size: z [..., Z] and standard normal eps [..., A] -> sample."""
    mean = jnp.tanh(model.pi.apply(pi_params, z))
    action = mean + jnp.clip(args.min_std * eps, -args.noise_clip, args.noise_clip)
    clipped = jnp.clip(action, -1 + 1e-6, 1 - 1e-6)
    return PolicySample(action + jax.lax.stop_gradient(clipped - action), mean)  # gradients pass the clip


def q_values(model: WorldModel, q_params, z: jax.Array, action: jax.Array) -> jax.Array:
    """Both heads in q_params: z [..., Z], action [..., A] -> [2, ...]."""
    heads = [jax.tree.map(lambda p, i=i: p[i], q_params) for i in range(2)]
    return jnp.stack([model.q.apply(p, z, action)[..., 0] for p in heads])  # on a CPU faster than batched products


# --------------------------------------------------------------------------------------------------------- Planning
class PlanNoise(NamedTuple):
    """Every random draw of one plan in n environments. All are made up front, so that `plan` is a plain function of
    arrays: given the draws that another program has recorded, it must return that program's plan."""

    pi: jax.Array  # [n, H, P, A] normal: the policy's sequences
    sample: jax.Array  # [n, iterations, H, N, A] normal: the sampled sequences
    terminal: jax.Array  # [n, iterations, N+P, A] normal: the policy's action after the horizon
    gumbel: jax.Array  # [n, num_elites]: choice of the elite
    exploration: jax.Array  # [n, A] normal: added to the action


def plan_noise(args: Args, model: WorldModel, key: jax.Array, n: int) -> PlanNoise:
    """Draws what a plan in n environments needs."""
    H, P, N, A = args.horizon, args.num_pi_trajs, args.num_samples, model.action_dim
    keys = jax.random.split(key, 5)
    return PlanNoise(
        pi=jax.random.normal(keys[0], (n, H, P, A)),
        sample=jax.random.normal(keys[1], (n, args.iterations, H, N, A)),
        terminal=jax.random.normal(keys[2], (n, args.iterations, N + P, A)),
        gumbel=jax.random.gumbel(keys[3], (n, args.num_elites)),
        exploration=jax.random.normal(keys[4], (n, A)),
    )


def estimate_value(args: Args, model: WorldModel, params, z, actions, horizon, eps) -> jax.Array:
    """Value [N+P] of action sequences [H, N+P, A] from z [1, Z]: rewards of `horizon` steps, then the lower of two Qs.
    How many steps only the device knows: one program serves the whole schedule and makes no step in vain."""

    def step(t, carry):
        value, z = carry
        value = value + args.discount**t * model.reward.apply(params["reward"], z, actions[t])[..., 0]
        return value, model.dynamics.apply(params["dynamics"], z, actions[t])

    value, z = jax.lax.fori_loop(1, horizon, step, step(0, (0.0, z)))  # in the first step all share z
    action = policy(args, model, params["pi"], z, eps).action
    q = q_values(model, params["q"], z, action).min(0)
    return jnp.nan_to_num(value + args.discount**horizon * q, nan=0.0)


def plan(args: Args, model: WorldModel, params, obs, prev_mean, first, limits: Schedule, noise: PlanNoise, explore):
    """Model predictive path integral control (MPPI) in n environments at once.
    obs [n, O]; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the start of an episode;
    limits of `schedule`; noise as `plan_noise` draws it; explore adds noise to the action. Returns actions [n, A] in
    [-1, 1] and the new means [n, H, A]."""
    n, H, A = len(obs), args.horizon, model.action_dim
    chex.assert_shape([obs, prev_mean, first, limits.horizon], [(n, model.obs_dim), (n, H, A), (n,), (n,)])

    def plan_one(env):
        env_obs, last_mean, starts, horizon, draws = env
        z = model.encoder.apply(params["encoder"], env_obs)[None]  # [1, Z]
        pi_actions, pi_z = [], z
        for t in range(H):
            pi_actions.append(policy(args, model, params["pi"], pi_z, draws.pi[t]).action)
            pi_z = model.dynamics.apply(params["dynamics"], pi_z, pi_actions[t]) if t < H - 1 else None
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(distribution, draw):
            (mean, std), (sample_noise, terminal_noise) = distribution, draw
            sampled = jnp.clip(mean[:, None] + std[:, None] * sample_noise, -1, 1)
            actions = jnp.concatenate([sampled, pi_actions], axis=1)  # [H, N+P, A]
            values = estimate_value(args, model, params, z, actions, horizon, terminal_noise)
            elite_values, elite_indices = jax.lax.top_k(values, args.num_elites)
            elites = actions[:, elite_indices]  # [H, E, A]
            weights = jax.nn.softmax(args.temperature * elite_values)  # [E]
            elite_mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - elite_mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), limits.min_std, args.max_std)
            mean = args.momentum * mean + (1 - args.momentum) * elite_mean
            return (mean, std), (elites[0], weights)

        unplanned = jnp.arange(H)[:, None] >= horizon - 1  # by the last call
        mean = jnp.where(starts | unplanned, 0.0, jnp.roll(last_mean, -1, axis=0))
        distribution = (mean, jnp.full((H, A), args.max_std))
        (mean, std), (elite_actions, weights) = jax.lax.scan(iterate, distribution, (draws.sample, draws.terminal))
        action = elite_actions[-1, jnp.argmax(jnp.log(weights[-1]) + draws.gumbel)]  # [A] of one elite, drawn by weight
        action = action + std[0] * draws.exploration if explore else action
        return jnp.clip(action, -1, 1), mean  # the original sends and stores what lies beyond, too

    # Side by side, but on a CPU only as many as leave a layer in the cache, the others after them: 30 of them side
    # by side take 1.8 times as long as six times five.
    at_once = max(1, (2**22 if jax.default_backend() == "cpu" else 2**29) // (4 * args.num_samples * model.q.hidden[0]))
    envs = (obs, prev_mean, first, limits.horizon, noise)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


@partial(jax.jit, static_argnames=("args", "model", "explore", "random"))
def act(args: Args, model: WorldModel, params, obs, prev_mean, first, limits, key, explore: bool, random=False):
    """Actions [n, A] for obs [n, O] by `plan`, by the policy (--no-mpc) or random; the planner's means; a new key."""
    key, noise_key = jax.random.split(key)
    if random:
        return jax.random.uniform(noise_key, (len(obs), model.action_dim), minval=-1, maxval=1), prev_mean, key
    if args.mpc:
        noise = plan_noise(args, model, noise_key, len(obs))
        return *plan(args, model, params, obs, prev_mean, first, limits, noise, explore), key
    eps = jax.random.normal(noise_key, (len(obs), model.action_dim))
    sample = policy(args, model, params["pi"], model.encoder.apply(params["encoder"], obs), eps)
    return sample.action if explore else sample.mean, prev_mean, key


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
    """Every random draw of one update, made up front for the same reason as those of a plan."""

    next_action: jax.Array  # [H, B, A] normal: the policy's actions in the TD targets
    pi_action: jax.Array  # [H+1, B, A] normal: the policy's actions in its own loss


def update_noise(args: Args, model: WorldModel, key: jax.Array) -> UpdateNoise:
    """Draws what one update needs."""
    H, B, A = args.horizon, args.batch_size, model.action_dim
    keys = jax.random.split(key, 2)
    return UpdateNoise(jax.random.normal(keys[0], (H, B, A)), jax.random.normal(keys[1], (H + 1, B, A)))


def optimizers(args: Args) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the model and for the policy, each behind its own global-norm clip."""
    clip = optax.clip_by_global_norm(args.grad_clip_norm)
    tx = optax.chain(clip, optax.scale_by_adam(eps=1e-8), optax.scale(-args.lr))
    return tx, tx


def init_state(args: Args, params: dict[str, Any], target, key: jax.Array) -> TrainState:
    """Learning state at the start of a run with these parameters; target holds at least an encoder and q."""
    model_tx, pi_tx = optimizers(args)
    model_opt = model_tx.init({k: v for k, v in params.items() if k != "pi"})
    target = {k: jax.tree.map(jnp.copy, target[k]) for k in ("encoder", "q")}  # not the same buffers: both are donated
    return TrainState(params, target, model_opt, pi_tx.init(params["pi"]), key, jnp.zeros((), jnp.int32))


def td_target(args: Args, model: WorldModel, state: TrainState, batch: Batch, noise) -> jax.Array:
    """TD targets [H, B]: r + discount * (1 - terminated) * min of the slow Qs at the policy's next action, in states of
    the encoder that learns. The original knows no terminations."""
    next_z = model.encoder.apply(state.params["encoder"], batch.obs[1:])  # [H, B, Z]
    next_action = policy(args, model, state.params["pi"], next_z, noise.next_action).action
    q = q_values(model, state.target["q"], next_z, next_action)
    return batch.reward + args.discount * (1 - batch.terminated) * q.min(0)


def model_loss(args: Args, model: WorldModel, params, batch: Batch, next_z, target):
    """World-model objective (eq. 10) / H on latent rollouts [H+1, B, Z], which are returned with it, the windows' new
    priorities [B] and its parts. Losses of a window are sums over its steps, each bounded."""
    rho = args.rho ** jnp.arange(args.horizon)[:, None]  # [H, 1]
    zs = [model.encoder.apply(params["encoder"], batch.obs[0])]
    for t in range(args.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    rewards = model.reward.apply(params["reward"], zs[:-1], batch.action)[..., 0]  # [H, B]
    q_error = q_values(model, params["q"], zs[:-1], batch.action) - target  # [2, H, B]
    consistency = (rho * ((zs[1:] - next_z) ** 2).mean(-1)).sum(0)  # [B]
    reward = (rho * (rewards - batch.reward) ** 2).sum(0)
    value = (rho * q_error**2).sum((0, 1))
    priority = jnp.minimum((rho * jnp.abs(q_error)).sum((0, 1)), args.loss_bound) + 1e-6
    bounded = partial(jnp.minimum, args.loss_bound)
    total = args.consistency_coef * bounded(consistency) + args.reward_coef * bounded(reward)
    total = total + args.value_coef * bounded(value)
    weighted = (batch.weight * total).mean()
    info = {"consistency_loss": consistency.mean(), "reward_loss": reward.mean(), "value_loss": value.mean()}
    info |= {"total_loss": total.mean(), "weighted_loss": weighted}
    return weighted / args.horizon, (zs, priority, info)


def policy_loss(args: Args, model: WorldModel, pi_params, q_params, zs, noise):
    """Policy objective (eq. 11) on latent states zs [H+1, B, Z], which get no gradient."""
    pi = policy(args, model, pi_params, zs, noise.pi_action)
    q = q_values(model, q_params, zs, pi.action).min(0)  # [H+1, B]
    rho = args.rho ** jnp.arange(args.horizon + 1)
    loss = -(rho * q.mean(1)).sum()
    return loss, {"pi_loss": loss}


def update(args: Args, model: WorldModel, state: TrainState, batch: Batch, noise: UpdateNoise):
    """One gradient step on the world model, then one on the policy, then, every second time, a step of the slow encoder
    and values towards the new ones. Returns the new state, priorities [B] and a dict of scalars for the log."""
    H, B = args.horizon, len(batch.obs[0])
    chex.assert_shape(list(batch), [(H + 1, B, model.obs_dim), (H, B, model.action_dim), (H, B), (H, B), (B,)])
    model_tx, pi_tx = optimizers(args)

    next_z = model.encoder.apply(state.target["encoder"], batch.obs[1:])  # [H, B, Z]
    target = td_target(args, model, state, batch, noise)  # [H, B]
    model_params = {k: v for k, v in state.params.items() if k != "pi"}
    loss = partial(model_loss, args, model, batch=batch, next_z=next_z, target=target)
    grads, (zs, priority, info) = jax.grad(loss, has_aux=True)(model_params)
    change, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, change)

    pi_loss = partial(policy_loss, args, model, q_params=model_params["q"], zs=zs, noise=noise)
    pi_grads, pi_info = jax.grad(pi_loss, has_aux=True)(state.params["pi"])
    pi_change, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(state.params["pi"], pi_change)

    tau = jnp.where(state.updates % args.target_update_freq == 0, args.tau, 0.0)
    slow = optax.incremental_update({k: model_params[k] for k in state.target}, state.target, tau)
    info |= pi_info | {"grad_norm": optax.tree.norm(grads), "pi_grad_norm": optax.tree.norm(pi_grads)}
    params = model_params | {"pi": pi_params}
    return TrainState(params, slow, model_opt, pi_opt, state.key, state.updates + 1), priority, info


# ----------------------------------------------------------------------------------------------------------- Replay
class Replay(NamedTuple):
    """Ring of the last C steps of n environments, on the device; a row holds an entry of each. A window of H+1 entries
    may start wherever H more follow without a reset among them. These entries have priorities above 0, all others 0.
    A sum tree finds entries by priority: its lowest level holds priority^per_alpha of all entries by their flat index
    row * n + environment, and a value above is the sum of FANOUT below. With H = 2 and a FANOUT of 4:

        row       0  1  2  3  4  5  6  7  8     the last row written is 8
        first     x           x                 episodes of 4 entries, and of 5 so far
        tree      3  1  0  0  2  5  1  0  0     entries 2 and 3 lack followers, 7 and 8 do so far
                  4           8           0     sums: a draw takes one of these by its size, then one below it
    """

    obs: jax.Array  # [C, n, O]
    action: jax.Array  # [C, n, A] that led to the observation
    reward: jax.Array  # [C, n] that it brought
    terminated: jax.Array  # [C, n]
    first: jax.Array  # [C, n] the entry is a reset: action and reward are filler
    tree: tuple[jax.Array, ...]  # levels [rows, FANOUT], the last one a single row
    size: jax.Array  # number of starts
    rows: jax.Array  # number of steps ever written


FANOUT = 128


def init_replay(capacity: int, num_envs: int, obs_dim: int, action_dim: int) -> Replay:
    """Empty replay of `capacity` steps of each environment."""
    C, n, zero = capacity, num_envs, partial(jnp.zeros, (), jnp.int32)
    obs, action, reward = jnp.zeros((C, n, obs_dim)), jnp.zeros((C, n, action_dim)), jnp.zeros((C, n))
    flags = [jnp.zeros((C, n), bool) for _ in range(2)]
    rows = [-(-C * n // FANOUT)]
    while rows[-1] > 1:
        rows.append(-(-rows[-1] // FANOUT))
    return Replay(obs, action, reward, *flags, tuple(jnp.zeros((row, FANOUT)) for row in rows), zero(), zero())


def set_priorities(tree: tuple[jax.Array, ...], index: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    """The sum tree with `value` [m] at entries `index` [m]; of several values for one entry the largest, everywhere the
    same (in the original any, on a GPU)."""
    row, column = jnp.divmod(index, FANOUT)
    levels = [tree[0].at[row, column].set(0.0).at[row, column].max(value)]
    for level in tree[1:]:
        sums = levels[-1][row].sum(-1)  # anew, not adjusted: no rounding adds up
        row, column = jnp.divmod(row, FANOUT)
        levels.append(level.at[row, column].set(sums))
    return tuple(levels)


def draw(tree: tuple[jax.Array, ...], key: jax.Array, batch_size: int) -> jax.Array:
    """Entries [batch_size] drawn in proportion to their values, with replacement (in the original without, once the
    replay is full): one of FANOUT a level, as one float32 sum over a million entries could not tell them apart."""
    row = jnp.zeros(batch_size, jnp.int32)
    for level, level_key in zip(reversed(tree), jax.random.split(key, len(tree)), strict=True):
        sums = jnp.where(level[row] > 0, jnp.cumsum(level[row], axis=1), 0.0)  # [batch_size, FANOUT]
        bound = jax.random.uniform(level_key, (batch_size, 1)) * sums.max(1, keepdims=True)
        row = row * FANOUT + jnp.argmax(sums > bound, axis=1)
    return row


@partial(jax.jit, static_argnames=("horizon",), donate_argnames=("replay",))
def add(replay: Replay, horizon: int, obs, action, reward, terminated, first) -> Replay:
    """Writes one step of all environments (obs [n, O], action [n, A], the rest [n]) over the oldest one. Windows that
    it completes get the largest priority: at once, and an episode's last one, too, unlike the original's."""
    C, n = replay.first.shape
    row = replay.rows % C
    expired = replay.tree[0].ravel()[row * n + jnp.arange(n)] > 0  # starts in the row that is overwritten
    entry = {"obs": obs, "action": action, "reward": reward, "terminated": terminated, "first": first}
    written = {k: getattr(replay, k).at[row].set(v) for k, v in entry.items()}

    start = (replay.rows - horizon) % C  # the windows that this step completes start here
    after_start = (start + 1 + jnp.arange(horizon)) % C
    valid = ~written["first"][after_start].any(0) & (replay.rows >= horizon)  # [n]
    largest = jnp.where(replay.size > 0, replay.tree[0].max(), 1.0)
    changed = (jnp.stack([row, start])[:, None] * n + jnp.arange(n)).ravel()
    tree = set_priorities(replay.tree, changed, jnp.concatenate([jnp.zeros(n), jnp.where(valid, largest, 0.0)]))
    size = replay.size + valid.sum() - expired.sum()
    return Replay(**written, tree=tree, size=size, rows=replay.rows + 1)


def windows(replay: Replay, drawn: jax.Array, horizon: int, beta: float) -> Batch:
    """The windows that start at the entries `drawn` [B]. Each weighs as its probability^-beta, relative to the largest
    weight among them: neither the number nor the sum of all priorities matters."""
    C, n = replay.first.shape
    rows = (drawn // n + jnp.arange(horizon + 1)[:, None]) % C  # [H+1, B]
    env = drawn % n
    terminated = replay.terminated[rows[1:], env].astype(jnp.float32)
    values = replay.tree[0].ravel()[drawn]
    weight = (values.min() / values) ** beta
    return Batch(replay.obs[rows, env], replay.action[rows[1:], env], replay.reward[rows[1:], env], terminated, weight)


@partial(jax.jit, static_argnames=("args", "model", "random"), donate_argnames=("replay", "prev_mean"))
def add_and_act(args: Args, model: WorldModel, params, replay: Replay, entry, prev_mean, limits, key, random: bool):
    """What a decision needs, in one dispatch: `add` writes the last step, entry = (obs, action, reward, terminated,
    first), and `act` explores on it. Returns the replay and what `act` returns."""
    obs, _, _, _, first = entry
    acted = act(args, model, params, obs, prev_mean, first, limits, key, explore=True, random=random)
    return add(replay, args.horizon, *entry), *acted


@partial(jax.jit, static_argnames=("args", "model", "num_updates"), donate_argnames=("state", "replay"))
def train(args: Args, model: WorldModel, state: TrainState, replay: Replay, num_updates: int):
    """`num_updates` updates on fresh samples in one dispatch. Returns the new state, the replay with the new priorities
    and the means of their scalars."""

    def one(learner, _):
        state, tree = learner
        key, sample_key, noise_key = jax.random.split(state.key, 3)
        drawn = draw(tree, sample_key, args.batch_size)
        batch = windows(replay._replace(tree=tree), drawn, args.horizon, args.per_beta)
        noise = update_noise(args, model, noise_key)
        state, priority, info = update(args, model, state._replace(key=key), batch, noise)
        return (state, set_priorities(tree, drawn, priority**args.per_alpha)), info

    (state, tree), infos = jax.lax.scan(one, (state, replay.tree), None, length=num_updates)
    return state, replay._replace(tree=tree), jax.tree.map(jnp.mean, infos)


# ------------------------------------------------------------------------------------------------------- Evaluation
def evaluate(args: Args, model: WorldModel, params, decisions, envs, seed: tuple[int, ...], go_on=lambda: True):
    """One episode in each of E environments, without exploration, after so many decisions: what `play` returns."""
    limits = schedule(args, decisions, np.ones(envs.num_envs, bool), np.int32(0))
    memory = jnp.zeros((envs.num_envs, args.horizon, model.action_dim)), jax.random.key(args.seed)
    memory = jax.device_put(memory, jax.devices()[0])  # as they come out of act: it compiles once

    def decide(obs, first, prev_mean, key):
        return act(args, model, params, obs, prev_mean, first, limits, key, explore=False)

    return play(envs, seed, decide, memory, go_on, args.capture_video)


def setup(args: Args, enter):
    """Environments to evaluate in, which are to be closed by `enter` (the original evaluates in those that it trains
    in), and the networks."""
    how = {"action_repeat": args.action_repeat, "render_mode": "rgb_array" if args.capture_video else None}
    envs = enter(environments.make_envs(args.task, args.eval_episodes, (args.seed, 1), **how))
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    return envs, make_model(args, obs_dim, action_dim)


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints every episode's return and their mean, and writes them to --json."""
    spec = environments.task_spec(args.task, args.action_repeat)
    with evaluating(spec.episode_length) as (enter, go_on):
        envs, model = setup(args, enter)
        params, _, decisions = load_tdmpc(args.checkpoint, partial(init_params, args, model), *SCRIPTS)
        decisions = args.schedule_steps if decisions is None else decisions  # the original's files do not tell
        result = evaluate(args, model, params, decisions, envs, (args.seed, 1), go_on)
    report_returns(args, spec, result)


# -------------------------------------------------------------------------------------------------------------- Run
def fresh_state(args: Args, model: WorldModel) -> dict[str, Any]:
    """The part of a checkpoint that learns and draws: the learning state, and the key of the acting."""
    init_key, train_key, act_key = jax.random.split(jax.random.key(args.seed), 3)
    params = init_params(args, model, init_key)
    return {"train": init_state(args, params, params, train_key), "act_key": act_key}


def start_or_resume(args: Args, model: WorldModel, keeper: Run) -> tuple[TrainState, jax.Array, Replay]:
    """What the run's last checkpoint holds; without one all is fresh, but for the agent if --checkpoint names one."""
    new_replay = partial(init_replay, args.buffer_size // args.num_envs, args.num_envs, model.obs_dim, model.action_dim)
    learner, replay = keeper.start(state=partial(fresh_state, args, model), replay=new_replay)
    state = learner["train"]
    if args.checkpoint and not keeper.count["decisions"]:
        params, target, _ = load_tdmpc(args.checkpoint, partial(init_params, args, model), *SCRIPTS)
        state = init_state(args, params, target, state.key)
        state = jax.device_put(state, jax.devices()[0])  # placed as it comes out of `train`: it compiles once
    return state, learner["act_key"], replay


def run(args: Args) -> None:
    """Trains one agent: acts, learns, steps the environments, and keeps the run's files."""
    spec, n, seed_steps = environments.task_spec(args.task, args.action_repeat), args.num_envs, args.seed_steps
    burst = max(1, int(args.utd * n))
    cli.check_replay(args, seed_steps)
    with Run(cli.run_folder(args), dataclasses.asdict(args), "tdmpc_jax", RETURNS_COLUMNS) as keeper:
        envs = environments.make_envs(args.task, n, (args.seed, 0), action_repeat=args.action_repeat)
        envs = keeper.enter(RecordEpisodeStatistics(envs))
        eval_envs, model = setup(args, keeper.enter)
        state, key, replay = start_or_resume(args, model, keeper)
        episodes = environments.EpisodeWriter(args.save_episodes, args.task, n, args.action_repeat)
        count, step = keeper.count, keeper.count["decisions"] * spec.action_repeat
        title = f"{spec.name}: {model.obs_dim} observations, {model.action_dim} actions, {n} environment(s)"
        keeper.begin(title, returns_head(spec), state.params, step, args.total_timesteps)
        prev_mean = jax.device_put(jnp.zeros((n, args.horizon, model.action_dim)), jax.devices()[0])
        sent, done, info = np.zeros((n, model.action_dim), np.float32), np.zeros(n, bool), {}
        cheap = args if args.checkpoint or jax.default_backend() != "cpu" else dataclasses.replace(args, mpc=False)
        obs, _ = envs.reset(seed=(args.seed, 0, step))  # a resumed run begins new episodes, not the first ones again
        entry, limits = (obs, sent, np.zeros(n, np.float32), done, ~done), Schedule(np.zeros(n, np.int32), 0)
        while True:
            # Act: dispatched here, read when the environments are stepped
            random = count["decisions"] <= seed_steps and not args.checkpoint  # the original plans one episode before
            limits = schedule(args, count["decisions"], entry[4], limits.horizon)
            replay, action, prev_mean, key = add_and_act(
                args, model, state.params, replay, entry, prev_mean, limits, key, random
            )
            episodes.add(obs, sent, entry[2], entry[4])

            # Evaluate and save; untrained and on a CPU without planning, which would take minutes
            finished = step >= args.total_timesteps
            if keeper.due(step, count["evaluated"], args.eval_freq, finished):
                how = partial(evaluate, args if step else cheap, model, state.params, count["decisions"], eval_envs)
                keeper.record_returns(step, spec, how)
            if keeper.due(step, keeper.saved, args.checkpoint_freq, finished or keeper.stop):
                episodes.flush()
                keeper.save(step, info, state={"train": state, "act_key": key}, replay=replay)
            if finished or keeper.stop:
                break

            # Learn: seed_steps updates at once, then utd per decision (not per episode), while the environments step
            due = int(seed_steps + (count["decisions"] - seed_steps) * args.utd) - count["updates"]
            ready = count["decisions"] >= seed_steps and (count["updates"] or replay.size)  # there is a window
            for _ in keeper.steps("learning", due // burst if ready else 0):
                state, replay, info = train(args, model, state, replay, num_updates=burst)
                count["updates"] += burst

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
                keeper.log_losses(step, info)
            keeper.advance(step)


def main(argv: list[str] | None = None) -> None:
    with cli.one_sentence():
        args = with_task_defaults(cli.parse(Args, argv, __doc__, cli.run_folder, *SCRIPTS))
        cli.check_bounds(args)
        if args.capture_video:
            environments.check_rendering(args.task)
        use_compile_cache(args.compile_cache)
        evaluate_checkpoint(args) if args.evaluate else run(args)


if __name__ == "__main__":
    use_huge_pages()
    main()
