"""TD-MPC in one file, the first version: a latent world model learned by its own predictions, and MPPI on top of it.

Paper: Hansen, Wang, Su, "Temporal Difference Learning for Model Predictive Control" (arXiv 2203.04955).
Online reinforcement learning on one task from states, or from pictures (--obs rgb). `diff tdmpc_jax.py tdmpc2_jax.py`
shows what version 2 changed; where this file departs from the original code, a comment says so. Shapes are written in
the paper's letters: H horizon, B batch, N samples of the planner, P policy sequences, A action size, O observation
size, Z latent size, n environments, q an ensemble of value heads; a picture is [84, 84, 3], a stack of them
[84, 84, 9], oldest first. [..., O] of what is seen stands for both, states and stacks.

    python tdmpc_jax.py --task cheetah-run                                   # train; a killed run goes on with --resume
    python tdmpc_jax.py --task walker-walk --obs rgb
    python tdmpc_jax.py --evaluate --checkpoint runs/walker-walk/tdmpc_jax/1
    python tdmpc_jax.py --evaluate --checkpoint original.pt --task walker-walk           # an agent of the original
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
from tdmpc2_support.agents.pretrained import load_tdmpc
from tdmpc2_support.backend import clip_by_global_norm, global_norm, jit_with_graphs, this_backend
from tdmpc2_support.bounds import Count, Name, Natural, NewFile, Positive, Share, Weight
from tdmpc2_support.cli import Flat, FromTask
from tdmpc2_support.convolution import convolve
from tdmpc2_support.devices import committed, keep_freed_memory, place_replay, set_up_jax
from tdmpc2_support.run.checkpoints import Checkpoints
from tdmpc2_support.run.folder import RunFolder, Signals, check_finite, recorded_settings
from tdmpc2_support.run.logging import Logger
from tdmpc2_support.run.reports import RETURNS_COLUMNS, Evaluation, progress, report_returns, returns_head
from tdmpc2_support.run.schedule import Streams, check_windows, due, random_streams, updates_due


# --------------------------------------------------------------------------------------------------- Agent and Args
@dataclasses.dataclass(frozen=True)
class Agent:
    """What defines the agent: saved with its weights, and a static argument of every compiled function."""

    action_repeat: Count | None = None  # simulator steps per decision; default by task, in DMControl 4, 2 or 8

    # World model
    obs: Literal["state", "rgb"] = "state"  # what is seen: states, or the last three pictures
    num_channels: Count = 32  # channels of the encoder of pictures
    enc_dim: Count = 256  # width of the hidden layer of the encoder of states
    mlp_dim: Count = 512  # width of all other hidden layers
    latent_dim: Count | None = None  # latent size Z; default 50, humanoid and dog 100
    noise_clip: Weight = 0.3  # bound on the policy's noise, whose standard deviation is min_std
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (on GPUs float32 means TF32)

    # Learning
    batch_size: Count | None = None  # windows per update B; default 512, dog 2048, from pictures 256
    lr: Positive | None = None  # learning rate; default 1e-3, dog and from pictures 3e-4
    grad_clip_norm: Positive = 10.0  # bound on the global gradient norm, of the model and of the policy each
    tau: Share = 0.01  # step of the slow encoder and the slow values
    target_update_freq: Count = 2  # updates from one such step to the next
    rho: Share = 0.5  # the paper's lambda: a loss t steps into the window has the weight rho^t
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
    temperature: Weight = 0.5  # inverse temperature: the elites' weights are softmax(temperature * value)
    momentum: Share = 0.1  # share of its old value that the planner's mean keeps in an iteration

    # What the task decides, see `for_task`: no flags
    obs_dim: FromTask[int] = 0  # observation size O, of a picture 84 * 84 * 3
    action_dim: FromTask[int] = 0  # action size A


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "walker-walk"  # a short name (python envs.py lists them) or any Gymnasium id with a Box action space
    agent: Flat[Agent] = Agent()

    # Data
    num_envs: Count = 1  # environments stepped side by side; one batched plan acts in all of them
    buffer_size: Count = 1_000_000  # decisions that the replay holds; a picture takes 21 KB
    storage: Literal["auto", "device", "host"] = "auto"  # whose memory holds the replay: the device's if it fits
    seed_steps: Natural = 5000  # random decisions, then as many updates at once
    utd: Positive = 1.0  # gradient updates per decision of one environment

    # Run
    exp_name: Name = "tdmpc_jax"  # name of this experiment: its files go to RUNS_DIR/TASK/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the environments and every random draw
    total_timesteps: Count | None = None  # simulator steps; default 500,000; dog 5, humanoid and pictures 3 million
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
PIXEL_DEFAULTS = {"batch_size": 256, "lr": 3e-4, "total_timesteps": 3_000_000}
REPEATS = {"cartpole": 8, "finger": 2, "walker": 2, "humanoid": 2, "dog": 2}  # in other domains of DMControl 4
PIXELS = 84  # height and width of a picture
SHIFT = 4  # pixels that a stack is moved at most, in each direction, when it is learned from


def with_task_defaults(args: Args) -> Args:
    """Fills in what was not given by what the original sets for the task; repeats outside DMControl are the tasks'."""
    spec = environments.task_spec(args.task)
    values = DEFAULTS | {"action_repeat": spec.action_repeat}
    if spec.domain == "DMControl":
        domain = spec.name.removeprefix("dm_control/").partition("-")[0]
        values |= {"action_repeat": REPEATS.get(domain, 4)} | TASK_DEFAULTS.get(domain, {})
    if args.agent.obs == "rgb":
        values |= PIXEL_DEFAULTS
    total_timesteps = values.pop("total_timesteps")
    if args.total_timesteps is not None:
        total_timesteps = args.total_timesteps
    missing = {k: v for k, v in values.items() if getattr(args.agent, k, 0) is None}
    agent = dataclasses.replace(args.agent, **missing)
    return dataclasses.replace(args, agent=agent, total_timesteps=total_timesteps)


def for_task(agent: Agent, envs) -> Agent:
    """The agent with what the task's vector environment decides."""
    shape = envs.single_observation_space.shape
    size = f"{PIXELS} x {PIXELS}, not {' x '.join(map(str, shape[:2]))}"
    cli.require(agent.obs == "state" or shape == (PIXELS, PIXELS, 3), f"the encoder takes pictures of {size}")
    (action_dim,) = envs.single_action_space.shape
    return dataclasses.replace(agent, obs_dim=int(np.prod(shape)), action_dim=action_dim)


def observed(agent: Agent) -> dict[str, Any]:
    """What environments are asked for."""
    return {"action_repeat": agent.action_repeat, "obs": agent.obs, "pixels": PIXELS}


def num_frames(agent: Agent) -> int:
    """How many observations in a row the agent sees."""
    return 3 if agent.obs == "rgb" else 1


def seen_shape(agent: Agent) -> tuple[int, ...]:
    """Shape of what the encoder sees: a state or a stack of pictures."""
    return (PIXELS, PIXELS, 3 * num_frames(agent)) if agent.obs == "rgb" else (agent.obs_dim,)


class Schedule(NamedTuple):
    horizon: np.ndarray  # [n] steps that are planned, 1 .. H
    min_std: np.ndarray  # lower bound of the planner's standard deviation


def schedule(agent: Agent, decisions: int, first: np.ndarray, horizon: np.ndarray) -> Schedule:
    """Limits of plans after so many decisions: linear, with a new horizon at an episode's start (`first` [n]) only. The
    original takes the bound at its last update, which first lags behind, then leaps ahead and falls back."""
    done = min(decisions, agent.schedule_steps)
    new_horizon = agent.first_horizon + (agent.horizon - agent.first_horizon) * done // agent.schedule_steps
    min_std = agent.first_min_std + (agent.min_std - agent.first_min_std) * done / agent.schedule_steps
    return Schedule(np.where(first, np.int32(new_horizon), horizon), np.float32(min_std))


# --------------------------------------------------------------------------------------------------------- Networks
def orthogonal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A random matrix with orthonormal rows or columns, whichever are fewer: the orthogonal factor of a normal matrix,
    by Newton's iteration. (By QR it is the same, but LAPACK, called from several of XLA's threads at once, can wait for
    itself for ever.)"""
    x = jax.random.normal(key, (max(shape), min(shape)))
    x = x / jnp.linalg.norm(x)  # all singular values below 1, from where they go to 1
    multiply = partial(jnp.matmul, precision="highest")
    x = jax.lax.fori_loop(0, 60, lambda _, x: 1.5 * x - 0.5 * multiply(x, multiply(x.T, x)), x)
    return x if shape[0] >= shape[1] else x.T


def orthogonal_kernel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A kernel [size, size, in, out] of a convolution whose outputs' weights are orthonormal."""
    return orthogonal(key, (int(np.prod(shape[:-1])), shape[-1])).reshape(shape)


class Linear(nn.Module):
    """Affine layer on the concatenation of its inputs, as a sum of products: what all samples of a plan share (their
    first latent state, in the first step of the dynamics) is multiplied once instead of N times."""

    features: int
    zero_init: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, *inputs):
        sizes = [x.shape[-1] for x in inputs]
        init = nn.initializers.zeros if self.zero_init else orthogonal
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
        layer_norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=this_backend().one_pass_variance)
        for i, width in enumerate(self.hidden):
            x = Linear(width, dtype=self.dtype, name=f"linear_{i}")(*inputs)
            if i == 0 and self.norm_first:
                x = jnp.tanh(layer_norm(name=f"norm_{i}")(x))
            else:
                x = nn.elu(x)
            inputs = (x,)
        i = len(self.hidden)
        return Linear(self.out, self.zero_init, self.dtype, name=f"linear_{i}")(*inputs)


class ConvEncoder(nn.Module):
    """Four convolutions, each followed by ReLU, and a Linear layer."""

    channels: int
    out: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, stacks):
        """Stacks [..., 84, 84, 9] of numbers 0 .. 255 -> z [..., out]."""
        x = stacks.reshape(-1, *stacks.shape[-3:]) / 255.0
        for i, size in enumerate([7, 5, 3, 3]):  # 84 -> 39 -> 18 -> 8 -> 3
            shape = (size, size, x.shape[-1], self.channels)
            kernel = self.param(f"kernel_{i}", lambda key, shape=shape: 2**0.5 * orthogonal_kernel(key, shape))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.channels,))
            x = nn.relu(convolve(x.astype(self.dtype), kernel.astype(self.dtype), 2).astype(jnp.float32) + bias)
        x = jnp.moveaxis(x, -1, 1).reshape(*stacks.shape[:-3], -1)
        return Linear(self.out, dtype=self.dtype, name="last")(x)


class Networks(NamedTuple):
    """The components of the world model and the policy: modules without parameters."""

    encoder: MLP | ConvEncoder  # h(s) -> z
    dynamics: MLP  # d(z, a) -> z'
    reward: MLP  # R(z, a)
    pi: MLP  # p(z) -> mean of A actions
    q: MLP  # Q(z, a): one head; the ensemble of two is the same module over stacked parameters


def networks(agent: Agent) -> Networks:
    """The networks of an agent."""
    mlp = partial(MLP, (agent.mlp_dim, agent.mlp_dim), dtype=agent.compute_dtype)
    if agent.obs == "rgb":
        encoder = ConvEncoder(agent.num_channels, agent.latent_dim, agent.compute_dtype)
    else:
        encoder = MLP((agent.enc_dim,), agent.latent_dim, dtype=agent.compute_dtype)
    return Networks(
        encoder=encoder,
        dynamics=mlp(agent.latent_dim),
        reward=mlp(1, zero_init=True),
        pi=mlp(agent.action_dim),
        q=mlp(1, norm_first=True, zero_init=True),
    )


def init_params(agent: Agent, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, one entry per component; those of `q` are stacked along a leading axis [2]."""
    model = networks(agent)
    z = jnp.zeros(agent.latent_dim)
    action = jnp.zeros(agent.action_dim)
    keys = jax.random.split(key, 5)
    return {
        "encoder": model.encoder.init(keys[0], jnp.zeros(seen_shape(agent))),
        "dynamics": model.dynamics.init(keys[1], z, action),
        "reward": model.reward.init(keys[2], z, action),
        "pi": model.pi.init(keys[3], z),
        "q": jax.vmap(lambda k: model.q.init(k, z, action))(jax.random.split(keys[4], 2)),
    }


# ------------------------------------------------------------------------------------------------------ World model
def encode(agent: Agent, encoder_params, obs: jax.Array) -> jax.Array:
    """Encoder h(s): states [..., O], or stacks uint8 [..., 84, 84, 9], on a CPU a few at a time -> z [..., Z]."""
    encoder = partial(networks(agent).encoder.apply, encoder_params)
    at_once = this_backend().stacks_at_once
    if agent.obs == "state" or not at_once:
        return encoder(obs)
    z = jax.lax.map(encoder, obs.reshape(-1, *seen_shape(agent)), batch_size=at_once)
    return z.reshape(*obs.shape[:-3], -1)


def shift_stack(stack: jax.Array, shift: jax.Array) -> jax.Array:
    """A stack [84, 84, 9] moved right and down by 4 - shift pixels, shift (x, y) in 0 .. 8, all its pictures alike.
    What comes in repeats the edge; no pixel changes its value."""
    padded = jnp.pad(stack, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    return jax.lax.dynamic_slice(padded, (shift[1], shift[0], 0), stack.shape)


class PolicySample(NamedTuple):
    action: jax.Array  # [..., A] in (-1, 1)
    mean: jax.Array  # [..., A] the action without noise


def policy(agent: Agent, pi_params, z: jax.Array, eps: jax.Array) -> PolicySample:
    """Policy p(z), a mean with noise of a fixed size: z [..., Z] and standard normal eps [..., A] -> sample."""
    mean = jnp.tanh(networks(agent).pi.apply(pi_params, z))
    action = mean + jnp.clip(agent.min_std * eps, -agent.noise_clip, agent.noise_clip)
    clipped = jnp.clip(action, -1 + 1e-6, 1 - 1e-6)
    return PolicySample(action + jax.lax.stop_gradient(clipped - action), mean)  # gradients pass the clip


def q_values(agent: Agent, q_params, z: jax.Array, action: jax.Array) -> jax.Array:
    """Both heads in q_params: z [..., Z], action [..., A] -> [2, ...]."""
    head = networks(agent).q
    if this_backend().heads_together:
        return jax.vmap(lambda params: head.apply(params, z, action)[..., 0])(q_params)
    values = [head.apply(jax.tree.map(lambda p, i=i: p[i], q_params), z, action)[..., 0] for i in range(2)]
    return jnp.stack(values)


# --------------------------------------------------------------------------------------------------------- Planning
class PlanNoise(NamedTuple):
    """Every random draw of one plan in n environments. All are made up front, so that `plan` is a plain function of
    arrays: given the draws that another program has recorded, it must return that program's plan."""

    pi: jax.Array  # [n, H, P, A] normal: the policy's sequences
    sample: jax.Array  # [n, iterations, H, N, A] normal: the sampled sequences
    terminal: jax.Array  # [n, iterations, N+P, A] normal: the policy's action after the horizon
    gumbel: jax.Array  # [n, num_elites]: choice of the elite
    exploration: jax.Array  # [n, A] normal: added to the action


def plan_noise(agent: Agent, key: jax.Array, n: int) -> PlanNoise:
    """Draws what a plan in n environments needs."""
    H = agent.horizon
    P = agent.num_pi_trajs
    N = agent.num_samples
    A = agent.action_dim
    keys = jax.random.split(key, 5)
    return PlanNoise(
        pi=jax.random.normal(keys[0], (n, H, P, A)),
        sample=jax.random.normal(keys[1], (n, agent.iterations, H, N, A)),
        terminal=jax.random.normal(keys[2], (n, agent.iterations, N + P, A)),
        gumbel=jax.random.gumbel(keys[3], (n, agent.num_elites)),
        exploration=jax.random.normal(keys[4], (n, A)),
    )


def estimate_value(agent: Agent, params, z, actions, horizon, eps) -> jax.Array:
    """Value [N+P] of action sequences [H, N+P, A] from z [1, Z]: rewards of `horizon` steps, then the lower of two Qs.
    How many steps only the device knows: one program serves the whole schedule and makes no step in vain."""
    model = networks(agent)

    def step(t, carry):
        value, z = carry
        value = value + agent.discount**t * model.reward.apply(params["reward"], z, actions[t])[..., 0]
        return value, model.dynamics.apply(params["dynamics"], z, actions[t])

    value, z = jax.lax.fori_loop(1, horizon, step, step(0, (0.0, z)))  # in the first step all share z
    action = policy(agent, params["pi"], z, eps).action
    q = q_values(agent, params["q"], z, action).min(0)
    return jnp.nan_to_num(value + agent.discount**horizon * q, nan=0.0)


def plan(agent: Agent, params, obs, prev_mean, first, limits: Schedule, noise: PlanNoise, explore: bool):
    """Model predictive path integral control (MPPI) in n environments at once.
    obs [n, O]; prev_mean [n, H, A], the mean that the last call returned; first [n], true at the start of an episode;
    limits of `schedule`; noise as `plan_noise` draws it; explore adds noise to the action. Returns actions [n, A] in
    [-1, 1] and the new means [n, H, A]."""
    n = len(obs)
    H = agent.horizon
    A = agent.action_dim
    chex.assert_shape([obs, prev_mean, first, limits.horizon], [(n, *seen_shape(agent)), (n, H, A), (n,), (n,)])
    model = networks(agent)

    def plan_one(env):
        env_obs, last_mean, starts, horizon, draws = env
        z = encode(agent, params["encoder"], env_obs)[None]  # [1, Z]
        pi_actions = []
        pi_z = z
        for t in range(H):
            pi_actions.append(policy(agent, params["pi"], pi_z, draws.pi[t]).action)
            if t < H - 1:
                pi_z = model.dynamics.apply(params["dynamics"], pi_z, pi_actions[t])
        pi_actions = jnp.stack(pi_actions)  # [H, P, A]

        def iterate(distribution, draw):
            mean, std = distribution
            sample_noise, terminal_noise = draw
            sampled = jnp.clip(mean[:, None] + std[:, None] * sample_noise, -1, 1)
            actions = jnp.concatenate([sampled, pi_actions], axis=1)  # [H, N+P, A]
            values = estimate_value(agent, params, z, actions, horizon, terminal_noise)
            elite_values, elite_indices = jax.lax.top_k(values, agent.num_elites)
            elites = actions[:, elite_indices]  # [H, num_elites, A]
            weights = jax.nn.softmax(agent.temperature * elite_values)  # [num_elites]
            elite_mean = jnp.einsum("e,hea->ha", weights, elites)
            variance = jnp.einsum("e,hea->ha", weights, (elites - elite_mean[:, None]) ** 2)
            std = jnp.clip(jnp.sqrt(variance), limits.min_std, agent.max_std)
            mean = agent.momentum * mean + (1 - agent.momentum) * elite_mean
            return (mean, std), (elites[0], weights)

        unplanned = jnp.arange(H)[:, None] >= horizon - 1  # by the last call
        mean = jnp.where(starts | unplanned, 0.0, jnp.roll(last_mean, -1, axis=0))
        std = jnp.full((H, A), agent.max_std)
        draws_of_each = (draws.sample, draws.terminal)
        unroll = this_backend().plan_written_out
        (mean, std), (elite_actions, weights) = jax.lax.scan(iterate, (mean, std), draws_of_each, unroll=unroll)
        elite = jnp.argmax(jnp.log(weights[-1]) + draws.gumbel)  # drawn by weight, in evaluations too
        action = elite_actions[-1, elite]  # [A]
        if explore:
            action = action + std[0] * draws.exploration
        return jnp.clip(action, -1, 1), mean  # the original sends and stores what lies beyond, too

    envs = (obs, prev_mean, first, limits.horizon, noise)
    at_once = environments_at_once(agent)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


def environments_at_once(agent: Agent) -> int:
    """How many environments are planned for side by side, the others after them."""
    layer_bytes = 4 * agent.num_samples * agent.mlp_dim
    return max(1, this_backend().plan_bytes // layer_bytes)


@partial(jax.jit, static_argnames=("agent", "explore", "random"))
def act(agent: Agent, params, obs, prev_mean, first, limits, key, explore: bool, random: bool = False):
    """Actions [n, A] for obs [n, O] by `plan`, by the policy (--no-mpc) or random; the planner's means; a new key."""
    n = len(obs)
    key, noise_key = jax.random.split(key)
    if random:
        action = jax.random.uniform(noise_key, (n, agent.action_dim), minval=-1, maxval=1)
    elif agent.mpc:
        noise = plan_noise(agent, noise_key, n)
        action, prev_mean = plan(agent, params, obs, prev_mean, first, limits, noise, explore)
    else:
        z = encode(agent, params["encoder"], obs)
        sample = policy(agent, params["pi"], z, jax.random.normal(noise_key, (n, agent.action_dim)))
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

    obs: jax.Array  # [H+1, B, O]; as they leave the replay, single pictures uint8 [H+3, B, 84, 84, 3]
    action: jax.Array  # [H, B, A]
    reward: jax.Array  # [H, B]
    terminated: jax.Array  # [H, B]
    weight: jax.Array  # [B] of each window in the loss


class UpdateNoise(NamedTuple):
    """Every random draw of one update, made up front for the same reason as those of a plan."""

    next_action: jax.Array  # [H, B, A] normal: the policy's actions in the TD targets
    pi_action: jax.Array  # [H+1, B, A] normal: the policy's actions in its own loss
    shift: jax.Array | None = None  # [H+1, B, 2] (x, y) in 0 .. 8: of pictures


def update_noise(agent: Agent, key: jax.Array) -> UpdateNoise:
    """Draws what one update needs."""
    H = agent.horizon
    B = agent.batch_size
    A = agent.action_dim
    keys = jax.random.split(key, 3)
    noise = UpdateNoise(jax.random.normal(keys[0], (H, B, A)), jax.random.normal(keys[1], (H + 1, B, A)))
    if agent.obs == "state":
        return noise
    return noise._replace(shift=jax.random.randint(keys[2], (H + 1, B, 2), 0, 2 * SHIFT + 1))


def optimizers(agent: Agent) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the model and for the policy, each behind its own global-norm clip."""
    clip = clip_by_global_norm(agent.grad_clip_norm)
    tx = optax.chain(clip, optax.scale_by_adam(eps=1e-8), optax.scale(-agent.lr))
    return tx, tx


def init_state(agent: Agent, params: dict[str, Any], target, key: jax.Array) -> TrainState:
    """Learning state at the start of a run with these parameters; target has at least an encoder and q."""
    model_tx, pi_tx = optimizers(agent)
    return TrainState(
        params=params,
        target={k: jax.tree.map(jnp.copy, target[k]) for k in ("encoder", "q")},  # copies, as both are donated
        model_opt=model_tx.init({k: v for k, v in params.items() if k != "pi"}),
        pi_opt=pi_tx.init(params["pi"]),
        key=key,
        updates=jnp.zeros((), jnp.int32),
    )


def td_target(agent: Agent, state: TrainState, batch: Batch, noise: UpdateNoise) -> jax.Array:
    """TD targets [H, B]: r + discount * (1 - terminated) * min of the slow Qs at the policy's next action, in states of
    the encoder that learns. The original knows no terminations."""
    next_z = encode(agent, state.params["encoder"], batch.obs[1:])  # [H, B, Z]
    next_action = policy(agent, state.params["pi"], next_z, noise.next_action).action
    q = q_values(agent, state.target["q"], next_z, next_action)
    return batch.reward + agent.discount * (1 - batch.terminated) * q.min(0)


def model_loss(agent: Agent, params, batch: Batch, next_z, target):
    """World-model objective (eq. 10) / H on latent rollouts [H+1, B, Z], which are returned with it, the windows' new
    priorities [B] and its parts. Losses of a window are sums over its steps, each bounded."""
    model = networks(agent)
    rho = agent.rho ** np.arange(agent.horizon)[:, None]  # [H, 1]
    zs = [encode(agent, params["encoder"], batch.obs[0])]
    for t in range(agent.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    rewards = model.reward.apply(params["reward"], zs[:-1], batch.action)[..., 0]  # [H, B]
    q_error = q_values(agent, params["q"], zs[:-1], batch.action) - target  # [2, H, B]
    consistency = (rho * ((zs[1:] - next_z) ** 2).mean(-1)).sum(0)  # [B]
    reward = (rho * (rewards - batch.reward) ** 2).sum(0)
    value = (rho * q_error**2).sum((0, 1))
    priority = jnp.minimum((rho * jnp.abs(q_error)).sum((0, 1)), agent.loss_bound) + 1e-6
    bounded = partial(jnp.minimum, agent.loss_bound)
    total = (
        agent.consistency_coef * bounded(consistency)
        + agent.reward_coef * bounded(reward)
        + agent.value_coef * bounded(value)
    )
    weighted = (batch.weight * total).mean()
    info = {
        "consistency_loss": consistency.mean(),
        "reward_loss": reward.mean(),
        "value_loss": value.mean(),
        "total_loss": total.mean(),
        "weighted_loss": weighted,
    }
    return weighted / agent.horizon, (zs, priority, info)


def policy_loss(agent: Agent, pi_params, q_params, zs, noise: UpdateNoise):
    """Policy objective (eq. 11) on latent states zs [H+1, B, Z], which get no gradient."""
    pi = policy(agent, pi_params, zs, noise.pi_action)
    q = q_values(agent, q_params, zs, pi.action).min(0)  # [H+1, B]
    rho = agent.rho ** np.arange(agent.horizon + 1)
    loss = -(rho * q.mean(1)).sum()
    return loss, {"pi_loss": loss}


def update(agent: Agent, state: TrainState, batch: Batch, noise: UpdateNoise):
    """One gradient step on the world model, then one on the policy, then, every --target-update-freq updates, a step of
    the slow encoder and values towards the new ones. Returns the new state, priorities [B] and a dict of scalars for
    the log."""
    H = agent.horizon
    B = len(batch.obs[0])
    chex.assert_shape(list(batch), [(H + 1, B, *seen_shape(agent)), (H, B, agent.action_dim), (H, B), (H, B), (B,)])
    model_tx, pi_tx = optimizers(agent)
    if agent.obs == "rgb":  # all encoders see the same
        batch = batch._replace(obs=jax.vmap(jax.vmap(shift_stack))(batch.obs, noise.shift))

    next_z = encode(agent, state.target["encoder"], batch.obs[1:])  # [H, B, Z]
    target = td_target(agent, state, batch, noise)  # [H, B]
    model_params = {k: v for k, v in state.params.items() if k != "pi"}
    loss = partial(model_loss, agent, batch=batch, next_z=next_z, target=target)
    grads, (zs, priority, info) = jax.grad(loss, has_aux=True)(model_params)
    change, model_opt = model_tx.update(grads, state.model_opt)
    model_params = optax.apply_updates(model_params, change)

    loss = partial(policy_loss, agent, q_params=model_params["q"], zs=zs, noise=noise)
    pi_grads, pi_info = jax.grad(loss, has_aux=True)(state.params["pi"])
    pi_change, pi_opt = pi_tx.update(pi_grads, state.pi_opt)
    pi_params = optax.apply_updates(state.params["pi"], pi_change)

    tau = jnp.where(state.updates % agent.target_update_freq == 0, agent.tau, 0.0)
    slow = optax.incremental_update({k: model_params[k] for k in state.target}, state.target, tau)
    info |= pi_info | {"grad_norm": global_norm(grads), "pi_grad_norm": global_norm(pi_grads)}
    params = model_params | {"pi": pi_params}
    return TrainState(params, slow, model_opt, pi_opt, state.key, state.updates + 1), priority, info


# ----------------------------------------------------------------------------------------------------------- Replay
class Step(NamedTuple):
    """One step of n environments, as the replay stores it."""

    obs: jax.Array  # [n, O], or single pictures uint8 [n, 84, 84, 3]
    action: jax.Array  # [n, A] that led to the observation
    reward: jax.Array  # [n] that it brought
    terminated: jax.Array  # [n]
    first: jax.Array  # [n] the observation is that of a reset: action, reward and terminated are filler


class Replay(NamedTuple):
    """Ring of the last C steps of n environments; a row holds an entry of each. A window of H+1 entries may start
    wherever H more follow without a reset among them; of pictures its first stack needs the two rows before it, too, or
    repeats that of the reset. These entries have priorities above 0, all others 0.
    A sum tree finds entries by priority: its lowest level holds priority^per_alpha of all entries by their flat index
    row * n + environment, and a value above is the sum of FANOUT below. With H = 2 and a FANOUT of 4:

        row       0  1  2  3  4  5  6  7  8     the last row written is 8
        first     x           x                 episodes of 4 entries, and of 5 so far
        tree      3  1  0  0  2  5  1  0  0     entries 2 and 3 lack followers, 7 and 8 do so far
                  4           8           0     sums: a draw takes one of these by its size, then one below it
    """

    obs: jax.Array  # [C, n, O], pictures flat in uint8
    action: jax.Array  # [C, n, A] that led to the observation
    reward: jax.Array  # [C, n] that it brought
    terminated: jax.Array  # [C, n]
    first: jax.Array  # [C, n] the entry is a reset: action and reward are filler
    tree: tuple[jax.Array, ...]  # levels [rows, FANOUT], the last one a single row
    size: jax.Array  # number of starts
    rows: jax.Array  # number of steps ever written


FANOUT = 128


def init_replay(agent: Agent, capacity: int, num_envs: int) -> Replay:
    """Empty replay of `capacity` steps of each environment, and of two more for the first stack of pictures."""
    C = capacity + num_frames(agent) - 1
    n = num_envs
    rows = [-(-C * n // FANOUT)]
    while rows[-1] > 1:
        rows.append(-(-rows[-1] // FANOUT))
    return Replay(
        obs=jnp.zeros((C, n, agent.obs_dim), jnp.uint8 if agent.obs == "rgb" else jnp.float32),
        action=jnp.zeros((C, n, agent.action_dim)),
        reward=jnp.zeros((C, n)),
        terminated=jnp.zeros((C, n), bool),
        first=jnp.zeros((C, n), bool),
        tree=tuple(jnp.zeros((row, FANOUT)) for row in rows),
        size=jnp.zeros((), jnp.int32),
        rows=jnp.zeros((), jnp.int32),
    )


def set_priorities(tree: tuple[jax.Array, ...], index: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    """The sum tree with `value` [m] at entries `index` [m]; of several values for one entry the largest, on every
    device (in the original any, on a GPU)."""
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


@partial(jax.jit, static_argnames="agent", donate_argnames="replay")
def add(agent: Agent, replay: Replay, step: Step) -> Replay:
    """Writes one step of all environments over the oldest one. Windows that it completes get the largest priority: at
    once, and an episode's last one, too, unlike the original's."""
    C, n = replay.first.shape
    row = replay.rows % C
    last = (row + num_frames(agent) - 1) % C  # windows that start here need the row that is overwritten
    expired = replay.tree[0].ravel()[last * n + jnp.arange(n)] > 0
    step = step._replace(obs=step.obs.reshape(n, -1))
    written = {k: getattr(replay, k).at[row].set(v) for k, v in step._asdict().items()}

    start = (replay.rows - agent.horizon) % C  # the windows that this step completes start here
    after_start = (start + 1 + jnp.arange(agent.horizon)) % C
    valid = ~written["first"][after_start].any(0) & (replay.rows >= agent.horizon)  # [n]
    largest = jnp.where(replay.size > 0, replay.tree[0].max(), 1.0)
    changed = (jnp.stack([last, start])[:, None] * n + jnp.arange(n)).ravel()
    tree = set_priorities(replay.tree, changed, jnp.concatenate([jnp.zeros(n), jnp.where(valid, largest, 0.0)]))
    size = replay.size + valid.sum() - expired.sum()
    return Replay(**written, tree=tree, size=size, rows=replay.rows + 1)


def windows(agent: Agent, replay: Replay, drawn: jax.Array) -> Batch:
    """The windows that start at the entries `drawn` [B], with single pictures: `stack_windows` stacks them. Each weighs
    as its probability^-per_beta, relative to the largest weight among them: neither the number nor the sum of all
    priorities matters."""
    C, n = replay.first.shape
    rows = (drawn // n + jnp.arange(agent.horizon + 1)[:, None]) % C  # [H+1, B]
    env = drawn % n
    terminated = replay.terminated[rows[1:], env].astype(jnp.float32)
    values = replay.tree[0].ravel()[drawn]
    weight = (values.min() / values) ** agent.per_beta
    seen = [*rows]
    for _ in range(num_frames(agent) - 1):  # rows of the first stack, none before a reset
        seen.insert(0, jnp.where(replay.first[seen[0], env], seen[0], (seen[0] - 1) % C))
    obs = replay.obs[jnp.stack(seen), env]
    if agent.obs == "rgb":
        obs = obs.reshape(*obs.shape[:2], PIXELS, PIXELS, 3)
    return Batch(obs, replay.action[rows[1:], env], replay.reward[rows[1:], env], terminated, weight)


def stack_windows(agent: Agent, batch: Batch) -> Batch:
    """A batch of `windows` with stacks for single pictures."""
    frames = [batch.obs[i : i + agent.horizon + 1] for i in range(num_frames(agent))]
    return batch._replace(obs=jnp.concatenate(frames, axis=-1))


def see(agent: Agent, before: np.ndarray | None, obs: np.ndarray, first: np.ndarray) -> np.ndarray:
    """What acting sees of observations: states as they are; pictures [n, 84, 84, 3] after the last two of what was seen
    before (None at the start), or where an episode begins (first [n]) three times."""
    if agent.obs == "state":
        return obs
    stacks = np.tile(obs, num_frames(agent))
    if before is None:
        return stacks
    return np.where(first[:, None, None, None], stacks, np.concatenate([before[..., 3:], obs], axis=-1))


@partial(jit_with_graphs, static_argnames=("agent", "num_updates"), donate_argnames=("state", "replay"))
def train(agent: Agent, state: TrainState, replay: Replay, num_updates: int):
    """`num_updates` updates on fresh samples in one dispatch. Returns the new state, the replay with the new priorities
    and the means of their scalars."""

    def one(learner, _):
        state, tree = learner
        key, sample_key, noise_key = jax.random.split(state.key, 3)
        drawn = draw(tree, sample_key, agent.batch_size)
        batch = stack_windows(agent, windows(agent, replay._replace(tree=tree), drawn))
        state, priority, info = update(agent, state._replace(key=key), batch, update_noise(agent, noise_key))
        return (state, set_priorities(tree, drawn, priority**agent.per_alpha)), info

    (state, tree), infos = jax.lax.scan(one, (state, replay.tree), None, length=num_updates)
    return state, replay._replace(tree=tree), jax.tree.map(jnp.mean, infos)


@partial(jax.jit, static_argnames=("agent", "num_updates"))
def draw_many(agent: Agent, replay: Replay, key: jax.Array, updates: int, num_updates: int) -> tuple[jax.Array, Batch]:
    """Entries [num_updates, B] and their windows for the updates after so many, drawn where the replay lies."""

    def one(sample_key):
        drawn = draw(replay.tree, sample_key, agent.batch_size)
        return drawn, windows(agent, replay, drawn)

    return jax.lax.map(one, jax.random.split(jax.random.fold_in(key, updates), num_updates))


@partial(jit_with_graphs, static_argnames="agent", donate_argnames="state")
def train_on(agent: Agent, state: TrainState, batches: Batch):
    """Updates on batches [updates, ...] of `draw_many`. Returns the new state, priorities [updates, B] and scalars."""

    def one(state, batch):
        key, noise_key = jax.random.split(state.key)
        noise = update_noise(agent, noise_key)
        state, priority, info = update(agent, state._replace(key=key), stack_windows(agent, batch), noise)
        return state, (priority, info)

    state, (priority, infos) = jax.lax.scan(one, state, batches)
    return state, priority, jax.tree.map(jnp.mean, infos)


@partial(jax.jit, static_argnames="agent", donate_argnames="replay")
def with_priorities(agent: Agent, replay: Replay, drawn: jax.Array, priority: jax.Array) -> Replay:
    """The replay after updates whose entries `drawn` [updates, B] have these priorities [updates, B]."""
    return replay._replace(tree=set_priorities(replay.tree, drawn.ravel(), priority.ravel() ** agent.per_alpha))


def learn(args: Args, agent: Agent, state: TrainState, replay: Replay, key: jax.Array, updates: int, num_updates: int):
    """`train`; or if the replay lies in another memory than that of the device that learns, the same on batches that
    are all drawn there before, so that their priorities are `num_updates` old at most."""
    device = jax.devices()[0]
    memory = replay.rows.device
    if memory == device and args.storage != "host":
        return train(agent, state, replay, num_updates)
    drawn, batches = draw_many(agent, replay, key, updates, num_updates)
    state, priority, info = train_on(agent, state, jax.device_put(batches, device))
    return state, with_priorities(agent, replay, drawn, jax.device_put(priority, memory)), info


# ------------------------------------------------------------------------------------------------------- Evaluation
def make_eval_envs(args: Args):
    """The environments of an evaluation, one for each of its episodes (the original's are those that it trains in)."""
    render_mode = "rgb_array" if args.capture_video else None
    seed = (args.seed, 1)
    return environments.make_envs(args.task, args.eval_episodes, seed, render_mode=render_mode, **observed(args.agent))


def evaluate(
    agent: Agent, params, decisions, envs, key, seed, film=False, advance=lambda: None, stop=False
) -> Evaluation | None:
    """One episode in each of n environments, without exploration; with a film of the first environment if asked for.

    Args:
        decisions: how many the agent has learned from: they set the planner's limits.
        seed: of the environments.
        advance: called after every step.
        stop: true when the evaluation is to be left; then None is returned.
    """
    n = envs.num_envs
    limits = schedule(agent, decisions, np.ones(n, bool), np.int32(0))
    obs, _ = envs.reset(seed=seed)
    first = np.ones(n, bool)
    running = np.ones(n, bool)
    returns = np.zeros(n)
    successes = np.zeros(n)
    frames = [envs.render()[0]] if film else []
    mean, key = committed((jnp.zeros((n, agent.horizon, agent.action_dim)), key))
    seen = None
    while running.any():
        seen = see(agent, seen, obs, first)
        action, mean, key = act(agent, params, seen, mean, first, limits, key, explore=False)
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
    spec = environments.task_spec(args.task, args.agent.action_repeat)
    with contextlib.closing(make_eval_envs(args)) as envs, progress(spec.episode_length) as advance:
        agent = for_task(args.agent, envs)
        params, _, decisions = load_tdmpc(args.checkpoint, partial(init_params, agent), *SCRIPTS, obs=agent.obs)
        if decisions is None:
            decisions = agent.schedule_steps  # the original's files do not tell
        key = random_streams(args.seed).evaluate
        result = evaluate(agent, params, decisions, envs, key, (args.seed, 1), args.capture_video, advance)
    report_returns(args, spec, result)


# -------------------------------------------------------------------------------------------------------------- Run
@partial(jax.jit, static_argnames="agent")
def fresh_state(agent: Agent, streams: Streams) -> dict[str, Any]:
    """What a checkpoint holds beside the replay: the learning state, and the random key of the acting."""
    params = init_params(agent, streams.init)
    return {"train": init_state(agent, params, params, streams.train), "act_key": streams.act}


def start_or_resume(args: Args, agent: Agent, checkpoints: Checkpoints) -> tuple[TrainState, Any, Replay, dict]:
    """Learning state, key of the acting, replay and counters of the run's last checkpoint; without one all is fresh,
    but for the agent if --checkpoint names one."""
    count = {"decisions": 0, "loaded": 0, "updates": 0, "evaluated": -1, "seconds": 0.0}  # loaded: of --checkpoint
    new_replay = partial(init_replay, agent, args.buffer_size // args.num_envs, args.num_envs)
    memory = place_replay(new_replay, args.storage, args.buffer_size, args.total_timesteps)
    learner, replay = checkpoints.restore_or_make(
        count,
        {"replay": memory},
        state=partial(fresh_state, agent, random_streams(args.seed)),
        replay=new_replay,
    )
    state = learner["train"]
    if args.checkpoint and not count["decisions"]:
        params, target, decisions = load_tdmpc(args.checkpoint, partial(init_params, agent), *SCRIPTS, obs=agent.obs)
        count["loaded"] = agent.schedule_steps if decisions is None else decisions  # where its schedules go on
        state = committed(init_state(agent, params, target, state.key))
    return state, learner["act_key"], replay, count


def loop(args: Args, agent: Agent, state, key, replay, count, envs, eval_envs, checkpoints, logger, signals) -> int:
    """Acts, evaluates, saves, learns, steps the environments and logs, until --total-timesteps or a signal. Returns the
    simulator step at which it has stopped."""
    spec = environments.task_spec(args.task, agent.action_repeat)
    n = args.num_envs
    eval_key = random_streams(args.seed).evaluate
    batch_key = jax.device_put(random_streams(args.seed).batches, replay.rows.device)
    seed_steps = args.seed_steps
    burst = max(1, int(args.utd * n))  # updates of one dispatch
    untrained = agent
    if jax.default_backend() == "cpu" and not args.checkpoint:
        untrained = dataclasses.replace(agent, mpc=False)  # there its plans would take minutes
    episodes = environments.EpisodeWriter(args.save_episodes, args.task, n, agent.action_repeat)
    step = saved = count["decisions"] * spec.action_repeat
    info = {}
    prev_mean = committed(jnp.zeros((n, agent.horizon, agent.action_dim)))
    obs, _ = envs.reset(seed=(args.seed, 0, step))  # a resumed run begins new episodes, not the first ones again
    action = np.zeros((n, agent.action_dim), np.float32)
    done = np.zeros(n, bool)
    entry = Step(obs, action, np.zeros(n, np.float32), terminated=done, first=~done)  # a reset: the rest is filler
    limits = Schedule(np.zeros(n, np.int32), np.float32(0))
    seen = None
    while True:
        # Act: dispatched here, read when the environments are stepped
        random = count["decisions"] <= seed_steps and not args.checkpoint  # the original plans one episode before
        age = count["loaded"] + count["decisions"]
        limits = schedule(agent, age, entry.first, limits.horizon)
        episodes.add(obs, action, entry.reward, entry.first)
        replay = add(agent, replay, entry)  # on its own, as the replay may lie in another memory
        seen = see(agent, seen, obs, entry.first)
        action, prev_mean, key = act(
            agent, state.params, seen, prev_mean, entry.first, limits, key, explore=True, random=random
        )

        # Evaluate
        finished = step >= args.total_timesteps
        if due(step, count["evaluated"], args.eval_freq, finished):
            with logger.paused(f"evaluating at step {step}", spec.episode_length) as advance:
                draws = jax.random.fold_in(eval_key, step), (args.seed, 1, step)
                shown = args.capture_video, advance, signals
                evaluated = agent if step else untrained
                result = evaluate(evaluated, state.params, age, eval_envs, *draws, *shown)
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

        # Learn: seed_steps updates at once, then utd per decision (not per episode), while the environments step
        bursts = updates_due(count["decisions"], count["updates"], seed_steps, args.utd, burst, replay.size)
        for _ in logger.with_bar("learning", range(bursts)):
            state, replay, info = learn(args, agent, state, replay, batch_key, count["updates"], burst)
            count["updates"] += burst
            if signals:
                break

        # Step: an environment whose episode is over is reset by this step and ignores the action
        action = np.asarray(action)  # all that is fetched from the device between two decisions
        obs, reward, terminated, truncated, infos = envs.step(action)
        check_finite(logger.folder, f"simulator step {step}", action=action, reward=reward, observation=obs)
        entry = Step(obs, action, reward.astype(np.float32), terminated, first=done)  # done before: now it is reset
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
    spec = environments.task_spec(args.task, args.agent.action_repeat)
    cli.check_replay(args, spec, args.seed_steps)
    signals = Signals()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(cli.run_folder(args), cli.settings(args)))
        envs = environments.make_envs(args.task, args.num_envs, (args.seed, 0), **observed(args.agent))
        envs = stack.enter_context(contextlib.closing(RecordEpisodeStatistics(envs)))
        eval_envs = stack.enter_context(contextlib.closing(make_eval_envs(args)))
        agent = for_task(args.agent, envs)
        checkpoints = stack.enter_context(Checkpoints(folder, "tdmpc_jax"))
        state, key, replay, count = start_or_resume(args, agent, checkpoints)
        folder.begin()
        logger = stack.enter_context(Logger(folder, RETURNS_COLUMNS, signals=signals))
        stacked = f"{num_frames(agent)} " if agent.obs == "rgb" else ""
        made = f"{stacked}{envs.metadata['observations']}, {envs.metadata['actions']}"
        title = f"{spec.name}: {made}, {args.num_envs} environment(s)"
        step = count["decisions"] * spec.action_repeat
        logger.begin(title, returns_head(spec), state.params, step, args.total_timesteps, count)
        stack.enter_context(signals)
        step = loop(args, agent, state, key, replay, count, envs, eval_envs, checkpoints, logger, signals)
    signals.exit_if_received(f"simulator step {step}", saved=step > 0)


def main(argv: list[str] | None = None) -> None:
    with cli.errors_as_sentences():
        args = cli.parse(Args, argv, __doc__, lambda args: recorded_settings(args, cli.run_folder, SCRIPTS))
        args = with_task_defaults(args)
        cli.check_bounds(args)
        if args.capture_video or args.agent.obs == "rgb":
            film = "rgb_array" if args.capture_video else None
            environments.check_rendering(args.task, args.agent.obs, film, PIXELS)
        cli.require(args.agent.obs == "state" or not args.save_episodes, "--save-episodes goes with --obs state")
        set_up_jax(args.compile_cache)
        if args.evaluate:
            evaluate_checkpoint(args)
        else:
            run(args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
