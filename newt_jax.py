"""Newt in one file: one agent learns many tasks side by side, online, after demonstrations, told its task in words.

Paper: Hansen, Su, Wang, "Learning Massively Multitask World Models for Continuous Control" (arXiv 2511.19584). Read
tdmpc2_jax.py and tdmpc2_jax_mt.py first: layers, policy and value heads are imported from there. What differs from the
latter: an embedding of the task's description in place of a learned one; all tasks' environments are stepped side by
side; the policy also imitates the actions of the replay; before anything is stepped, everything is learned from
demonstrations, and a half of every later batch is; a plan begins near the policy's own actions. Shapes are written in
the paper's letters: H horizon, B batch, N samples of the planner, P policy sequences, A action size, O observation
size, Z latent size, K bins, q an ensemble of value heads, T tasks, E size of the embedding, n environments in all.

    python newt_jax.py --tasks walker-walk,cheetah-run,mw-door-open --demos data   # as --save-episodes leaves it
    python newt_jax.py --tasks soup                              # all that can be made here of the paper's 200 tasks
    python newt_jax.py --tasks walker-walk --num-envs 10         # one task; a killed run goes on with --resume
    python newt_jax.py --evaluate --checkpoint soup-L.pt --tasks walker-walk,cup-catch
    srun python newt_jax.py --distributed --tasks soup --num-envs 2    # processes share out the environments
"""

import contextlib
import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

import envs as environments
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support import cli, devices
from tdmpc2_support.agents.pretrained import LoadedAgent, check_shapes, embeddings_of, load_newt, padding_of, sizes_of
from tdmpc2_support.backend import clipped, global_norm, jit_with_graphs, this_backend
from tdmpc2_support.bounds import Count, Name, Natural, NewFile, Positive, Share, Weight
from tdmpc2_support.cli import Flat, FromTask
from tdmpc2_support.data.demonstrations import in_columns, read_demonstrations
from tdmpc2_support.data.embeddings import read_embeddings
from tdmpc2_support.devices import keep_freed_memory, set_up_jax
from tdmpc2_support.run import schedule
from tdmpc2_support.run.checkpoints import Checkpoints, checksums, complete_checkpoints
from tdmpc2_support.run.folder import RunFolder, Signals, check_finite, recorded_settings
from tdmpc2_support.run.logging import Logger
from tdmpc2_support.run.reports import SCORES_COLUMNS, SCORES_HEAD, SetEvaluation, progress, report_scores
from tdmpc2_support.run.schedule import Streams, due, random_streams
from tdmpc2_support.run.video import side_by_side, thumbnails


# --------------------------------------------------------------------------------------------------- Agent and Args
@dataclasses.dataclass(frozen=True)
class Agent(td.Agent):
    """What defines the agent: `td.Agent`, with other defaults here and there, and what is new; the static argument."""

    # World model
    model_size: Literal["S", "B", "L", "XL"] | None = None  # 2, 7, 20, 82M parameters (default: L; B for one task)
    pad_obs: Natural = 128  # observations are padded to this size; 0: to the largest of these tasks
    pad_action: Natural = 16  # actions are padded to this size; 0: to the largest of these tasks

    # Learning
    batch_size: Count = 1024  # windows per update B
    warmup_updates: Natural = 5_000  # updates in which lr grows to what it is, where demonstrations come first
    rho: Share = 0.5  # weight of a loss t steps into the window is rho^t / (1 + rho + ... + rho^H)
    pretrain_bc_coef: Weight = 1.0  # weight of the policy's loss in pretraining: imitation, with its entropy
    bc_coef: Weight = 1.0  # weight of imitating the replay's actions afterwards

    # Planning
    constrained: bool = True  # begin plans with the policy's mean and deviation: wholly up to constraint_start, less on
    constraint_start: Natural = 2_000_000  # decisions up to which that is so, with or without demonstrations
    constraint_end: Natural = 10_000_000  # from there on it takes so many decisions until nothing is left of it

    # What the tasks decide, see `for_tasks`: no flags
    task_dim: FromTask[int] = 0  # size E of the embedding
    num_tasks: FromTask[int] = 0  # T
    learn_embedding: FromTask[bool] = False  # the embedding is a parameter, which the model's losses change
    dropout: FromTask[float] = 0.0  # none; what is imported asks for it
    can_terminate: FromTask[bool] = False  # whether episodes of some task can end before their time limit


@dataclasses.dataclass(frozen=True)
class Args:
    tasks: str = "soup"  # soup: the paper's tasks, as far as they can be made here; or names with commas
    agent: Flat[Agent] = Agent()

    # Data
    demos: str | None = None  # folder of demonstrations: TASK/chunk_0.pt, ... of --save-episodes, or TASK.pt of mmbench
    demo_episodes: Count | None = None  # of each task take so many with the highest returns (default: all)
    pretrain_updates: Natural = 200_000  # updates on the demonstrations before anything is stepped
    embeddings: str | None = None  # file, language, learned, one-hot, none; of one task none, else language or learned
    num_envs: Count | None = None  # environments of each task (default: 1; 10 of a task alone)
    buffer_size: Count = 10_000_000  # decisions that the replay holds, the demonstrations at first among them
    obs_dtype: Literal["float32", "float16"] = "float32"  # of the observations in the replay
    seed_steps: Natural | None = None  # decisions before planning and learning; default: 5 of the longest episodes each
    utd: Positive = 0.075  # gradient updates per decision of one environment

    # Run
    exp_name: Name = "newt_jax"  # name of this experiment: its files go to RUNS_DIR/TASKS/EXP_NAME/SEED
    runs_dir: str = "runs"  # folder of all runs
    seed: Natural = 1  # of the parameters, the environments and every random draw
    total_timesteps: Count = 100_000_000  # length of the run in decisions of all environments, after the pretraining
    resume: bool = False  # continue the run of these tasks, name and seed from its last checkpoint, if it has one
    checkpoint: str | None = None  # start from this agent, without pretraining: a run, or an original .pt
    evaluate: bool = False  # do not train: evaluate --checkpoint, print the table of tasks and exit
    json: NewFile | None = None  # with --evaluate: write the results to this file
    eval_freq: Count | None = None  # decisions (or updates of the pretraining) between evaluations; default: 10,000 n
    eval_episodes: Count = 2  # an evaluation ends when every environment has finished so many; all count
    checkpoint_freq: Count | None = None  # the same between checkpoints; default: five evaluations
    log_freq: Count = 10_000  # the same between two points of the loss curves
    capture_video: bool = False  # write one MP4 of every evaluation, a grid of all tasks (needs a GL library)
    track: bool = False  # also send everything to Weights & Biases (pip install wandb)
    wandb_project_name: str = "tdmpc2-jax"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    compile_cache: bool = True  # keep compiled programs in ~/.cache/tdmpc2-jax: the second start is faster

    # Devices
    distributed: bool = False  # one of several processes, of SLURM or as the next three say; all see one --runs-dir
    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None  # number of processes
    process_id: int | None = None  # number of this process, from 0


MODEL_SIZES = {  # (enc_dim, mlp_dim, latent_dim, num_enc_layers, num_q)
    "S": (128, 256, 384, 2, 3),
    "B": (256, 512, 512, 2, 5),
    "L": (1024, 1024, 512, 3, 5),
    "XL": (2048, 2048, 704, 4, 7),
}
SCRIPTS = ("newt_jax",)  # whose checkpoints this one starts from
LEARNED_DIM = 96  # size of embeddings that are learned
PRETRAIN_BURST = 10  # updates of one dispatch in pretraining
PIECE = 500  # rows of demonstrations that are written in one dispatch


def with_model_size(agent: Agent, many: bool) -> Agent:
    """Fills in the five sizes that were not given from the table of model sizes."""
    model_size = agent.model_size or ("L" if many else "B")
    sizes = dict(zip(td.SIZE_FIELDS, MODEL_SIZES[model_size], strict=True))
    return dataclasses.replace(agent, **{k: v for k, v in sizes.items() if getattr(agent, k) is None})


def for_tasks(agent: Agent, names: tuple[str, ...], task_dim: int, learned_emb: bool, warm_up: bool) -> Agent:
    """The agent with all sizes filled in, and what these tasks and their embeddings decide. UserError if a task is
    larger than what it is padded to."""
    sizes = {name: environments.task_sizes(name) for name in names}
    obs_dim = agent.pad_obs or max(obs for obs, _ in sizes.values())
    action_dim = agent.pad_action or max(action for _, action in sizes.values())
    for name, (obs, action) in sizes.items():
        large = f"{name} has {obs} observations and {action} actions, more than --pad-obs {obs_dim} --pad-action"
        cli.require(obs <= obs_dim and action <= action_dim, f"{large} {action_dim}: give more, or 0 for the largest")
    return dataclasses.replace(
        with_model_size(agent, len(names) > 1),
        obs_dim=obs_dim,
        action_dim=action_dim,
        task_dim=task_dim,
        num_tasks=len(names),
        learn_embedding=learned_emb,
        can_terminate=any(environments.task_spec(name).can_terminate for name in names),
        warmup_updates=agent.warmup_updates if warm_up else 0,
    )


# --------------------------------------------------------------------------------------------------------- Networks
def networks(agent: Agent) -> td.Networks:
    """Those of tdmpc2_jax_mt.py, without dropout; with a termination head if episodes of some task can terminate."""
    termination = None
    if agent.episodic and agent.can_terminate:
        termination = mt.MLP((agent.mlp_dim, agent.mlp_dim), 1, dtype=agent.compute_dtype)
    return td.Networks(*mt.networks(agent), termination)


def init_params(agent: Agent, key: jax.Array, table: jax.Array | None = None) -> dict[str, Any]:
    """Fresh parameters, one entry per component; `task_emb` is the table [T, E] of embeddings, as it is given or, if it
    is to be learned, drawn."""
    key, termination_key = jax.random.split(key)
    params = mt.init_params(agent, key)
    model = networks(agent)
    if model.termination:
        inputs = jnp.zeros(agent.latent_dim), jnp.zeros(agent.task_dim)
        params["termination"] = model.termination.init(termination_key, *inputs)
    if table is not None:
        params["task_emb"] = jnp.asarray(table, jnp.float32)
    return params


# ------------------------------------------------------------------------------------------------------------ Tasks
class Tasks(NamedTuple):
    """What is fixed of each task."""

    mask: jax.Array  # [T, A] 1 for the actions that the task has, 0 for padding
    discount: jax.Array  # [T]
    can_terminate: jax.Array  # [T] 1 where episodes can end before their time limit
    of_env: jax.Array  # [n] ids of the environments' tasks


class TaskInput(NamedTuple):
    """What the functions below are told of the tasks at hand, one of each for every entry of a batch."""

    emb: jax.Array  # [..., E] input of every network
    mask: jax.Array  # [..., A]
    discount: jax.Array  # [...]
    can_terminate: jax.Array  # [...]


def make_tasks(agent: Agent, names: tuple[str, ...], num_envs: int) -> Tasks:
    """What is fixed of these tasks, with so many environments of each. The discount is that of the table of tasks or,
    where it has none, the one that the length of the episodes gives."""
    specs = [environments.task_spec(name) for name in names]
    mask = [np.arange(agent.action_dim) < environments.task_sizes(name)[1] for name in names]
    discount = [environments.discount_of(s.name) or mt.discount_of(agent, s.episode_length) for s in specs]
    return Tasks(
        jnp.asarray(mask, jnp.float32),
        jnp.asarray(discount, jnp.float32),
        jnp.asarray([spec.can_terminate for spec in specs], jnp.float32),
        jnp.repeat(jnp.arange(len(names), dtype=jnp.int32), num_envs),
    )


def task_input(agent: Agent, tasks: Tasks, table: jax.Array, task: jax.Array) -> TaskInput:
    """What belongs to task ids [...]. Embeddings that are learned are scaled back to unit norm if they are longer,
    outside of any gradient; others are used as they are, whatever their length, and no gradient changes them."""
    emb = table[task]
    if agent.learn_embedding:
        emb = emb / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.linalg.norm(emb, axis=-1, keepdims=True)))
    else:
        emb = jax.lax.stop_gradient(emb)
    return TaskInput(emb, tasks.mask[task], tasks.discount[task], tasks.can_terminate[task])


# --------------------------------------------------------------------------------------------------------- Planning
def estimate_value(agent: Agent, params, z, actions, task: TaskInput, heads, eps) -> jax.Array:
    """Value [N] of action sequences [H, N, A] from z [1, Z]: rewards over the horizon, then the mean of two Qs."""
    model = networks(agent)
    zs = [z]
    for t in range(agent.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], task.emb, actions[t]))
    last_z = zs[-1]
    zs = jnp.stack([jnp.broadcast_to(z, last_z.shape), *zs[1:]])  # [H+1, N, Z]
    reward = mt.two_hot_inv(agent, model.reward.apply(params["reward"], zs[:-1], task.emb, actions))  # [H, N]
    action = mt.policy(agent, params["pi"], last_z, task, eps).action
    logits = mt.q_logits(agent, mt.pick_heads(params["q"], heads), last_z, task.emb, action)
    q = mt.two_hot_inv(agent, logits).mean(0)
    weight = task.discount ** np.arange(agent.horizon + 1)[:, None]  # [H+1, 1]
    if model.termination:  # nothing counts after a predicted termination, where the task has any
        logit = model.termination.apply(params["termination"], zs[1:], task.emb)[..., 0]  # [H, N]
        alive = (logit <= 0) | (task.can_terminate == 0)
        weight = weight * jnp.cumprod(jnp.pad(alive, ((1, 0), (0, 0)), constant_values=True), axis=0)
    return jnp.nan_to_num((weight[:-1] * reward).sum(0) + weight[-1] * q, nan=0.0)


def prior_share(agent: Agent, decisions: int | None) -> float:
    """How much of a plan's beginning is the policy's after so many decisions: all of it, then less and less. None: a
    plan of an agent whose age is not known, where nothing is."""
    if decisions is None or not agent.constrained:
        return 0.0
    if decisions < agent.constraint_start:
        return 1.0
    return max(0.0, 1.0 - (decisions - agent.constraint_start) / max(1, agent.constraint_end))


def plan(agent: Agent, params, obs, task: TaskInput, prev_mean, first, share, noise: mt.PlanNoise, heads, explore):
    """Model predictive path integral control (MPPI) in n environments at once, each of its own task, around what the
    policy would do. obs [n, O]; task of [n] entries; prev_mean [n, H, A], the mean that the last call returned; first
    [n], true at the start of an episode; share as `prior_share` says; noise and heads as `mt.plan_noise` draws them;
    explore adds noise to the action. Returns actions [n, A] in [-1, 1], 0 where the task has none, and the new means.
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
            pi_actions.append(mt.policy(agent, params["pi"], pi_z, env_task, draws.pi[t]).action)
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
        if agent.constrained:
            pi_std = jnp.clip(pi_actions.std(1, ddof=1), agent.min_std, agent.max_std)
            mean = share * pi_actions.mean(1) + (1 - share) * mean
            std = share * pi_std + (1 - share) * std
        draws_of_each = (draws.sample, draws.terminal, heads)
        unroll = this_backend().plan_written_out
        (mean, std), (elite_actions, weights) = jax.lax.scan(iterate, (mean, std), draws_of_each, unroll=unroll)
        elite = jnp.argmax(jnp.log(weights[-1] + 1e-9) + draws.gumbel)  # drawn by weight, in evaluations too
        action = elite_actions[-1, elite]  # [A]
        if explore:
            action = action + std[0] * draws.exploration
        return jnp.clip(action, -1, 1), mean

    envs = (obs, task, prev_mean, first, noise)
    at_once = mt.environments_at_once(agent)
    return jax.vmap(plan_one)(envs) if n <= at_once else jax.lax.map(plan_one, envs, batch_size=at_once)


@partial(jit_with_graphs, static_argnames=("agent", "mesh", "by", "explore"))
def act(agent: Agent, mesh: Mesh, tasks: Tasks, params, obs, prev_mean, first, share, key, by, explore: bool):
    """Actions [n, A] for obs [n, O] of all environments, the planner's means, and a new key. by: "plan", of which every
    device does its share of the environments, if they can be split evenly; "policy", a sample of it or, without
    exploring, its mean; or "chance"."""
    n = len(obs)
    key, noise_key = jax.random.split(key)
    task = task_input(agent, tasks, params["task_emb"], tasks.of_env)
    if by == "chance":
        action = jax.random.uniform(noise_key, (n, agent.action_dim), minval=-1, maxval=1) * task.mask
    elif by == "plan" and agent.mpc:
        noise, heads = mt.plan_noise(agent, noise_key, n)
        plans = partial(plan, agent, explore=explore)
        if mesh.size > 1 and n % mesh.size == 0:
            copy = PartitionSpec()
            part = PartitionSpec("devices")
            places = (copy, part, part, part, part, copy, part, copy)  # as the arguments below
            plans = jax.shard_map(plans, mesh=mesh, in_specs=places, out_specs=part, check_vma=False)
        action, prev_mean = plans(params, obs, task, prev_mean, first, share, noise, heads)
    else:
        z = networks(agent).encoder.apply(params["encoder"], obs, task.emb)
        sample = mt.policy(agent, params["pi"], z, task, jax.random.normal(noise_key, (n, agent.action_dim)))
        action = sample.action if explore else sample.mean
    action, prev_mean = jax.lax.with_sharding_constraint((action, prev_mean), devices.replicated(mesh))
    return action, prev_mean, key


# --------------------------------------------------------------------------------------------------------- Learning
class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict[str, Any]  # encoder, dynamics, reward, pi, q, task_emb, and termination if there is one
    target_q: dict[str, Any]  # slow copy of params["q"]
    model_opt: optax.OptState  # of everything but the policy
    pi_opt: optax.OptState  # of the policy: fresh when the pretraining is over
    q_scale: jax.Array  # running 5-95% range of the values, at least 1, by which Q is divided in the policy's loss
    key: jax.Array
    updates: jax.Array  # number of updates made


class Batch(NamedTuple):
    """Windows of H+1 consecutive entries: actions and rewards lead from one observation to the next."""

    obs: jax.Array  # [H+1, B, O]
    action: jax.Array  # [H, B, A]
    reward: jax.Array  # [H, B]
    terminated: jax.Array  # [H, B]
    task: jax.Array  # [B] ids


MODEL_ADAM = optax.scale_by_adam(eps=1e-8)  # in pretraining of the policy, too
PI_ADAM = optax.scale_by_adam(eps=1e-5)


def learning_rate(agent: Agent, updates: jax.Array) -> jax.Array:
    """After so many updates. The very first one already has the second step of the warm-up."""
    if not agent.warmup_updates:
        return jnp.float32(agent.lr)
    return agent.lr * jnp.minimum(1.0, (updates + 2) / agent.warmup_updates)


def descend(params, change, rate):
    """Parameters one step further."""
    return jax.tree.map(lambda p, c: p - rate * c, params, change)


def init_state(agent: Agent, params: dict[str, Any], target_q, q_scale, key: jax.Array) -> TrainState:
    """Learning state at the start of a run with these parameters."""
    return TrainState(
        params=params,
        target_q=jax.tree.map(jnp.copy, target_q),  # not the same buffers: both are donated
        model_opt=MODEL_ADAM.init({k: v for k, v in params.items() if k != "pi"}),
        pi_opt=PI_ADAM.init(params["pi"]),
        q_scale=jnp.asarray(q_scale, jnp.float32),
        key=key,
        updates=jnp.zeros((), jnp.int32),
    )


def after_pretraining(state: TrainState) -> TrainState:
    """The same with an optimiser of the policy that has seen nothing: it goes on with another loss."""
    return state._replace(pi_opt=jax.tree.map(jnp.zeros_like, state.pi_opt))


def loss_weights(agent: Agent) -> np.ndarray:
    """Weights [H+1] of losses along a window, whose sum is 1."""
    rho = agent.rho ** np.arange(agent.horizon + 1)
    return rho / rho.sum()


def td_target(
    agent: Agent, state: TrainState, next_z, batch: Batch, task: TaskInput, noise: mt.UpdateNoise
) -> jax.Array:
    """TD targets [H, B]: r + discount * (1 - terminated) * min of two random target Qs at the policy's next action."""
    next_action = mt.policy(agent, state.params["pi"], next_z, task, noise.next_action).action
    target_q = mt.pick_heads(state.target_q, noise.target_heads)
    q = mt.two_hot_inv(agent, mt.q_logits(agent, target_q, next_z, task.emb, next_action))
    return batch.reward + task.discount * (1 - batch.terminated) * q.min(0)


def imitation(pi_action, action, task: TaskInput) -> jax.Array:
    """Mean square distance [...] of the policy's actions [..., A] to the replay's, in the actions that the task has."""
    return (((pi_action - action) ** 2) * task.mask).sum(-1) / jnp.maximum(task.mask.sum(-1), 1.0)


def model_loss(agent: Agent, tasks: Tasks, params, batch: Batch, next_z, target, noise: mt.UpdateNoise):
    """World-model objective on latent rollouts [H+1, B, Z], which are returned with it and its parts; in pretraining,
    when the policy's parameters are among `params`, with the policy's imitation of the demonstrations. Its gradient
    goes through the latent states into dynamics and encoder, too."""
    model = networks(agent)
    weight = loss_weights(agent)[:-1]  # [H]
    task = task_input(agent, tasks, params["task_emb"], batch.task)
    zs = [model.encoder.apply(params["encoder"], batch.obs[0], task.emb)]
    for t in range(agent.horizon):
        zs.append(model.dynamics.apply(params["dynamics"], zs[t], task.emb, batch.action[t]))
    zs = jnp.stack(zs)  # [H+1, B, Z]

    reward_logits = model.reward.apply(params["reward"], zs[:-1], task.emb, batch.action)  # [H, B, K]
    value_logits = mt.q_logits(agent, params["q"], zs[:-1], task.emb, batch.action)  # [q, H, B, K]
    consistency = (weight * ((zs[1:] - next_z) ** 2).mean((1, 2))).sum()
    reward = (weight * mt.soft_ce(agent, reward_logits, batch.reward).mean(1)).sum()
    value = (weight * mt.soft_ce(agent, value_logits, target).mean(2)).sum(1).mean()
    total = agent.consistency_coef * consistency + agent.reward_coef * reward + agent.value_coef * value
    info = {"consistency_loss": consistency, "reward_loss": reward, "value_loss": value}
    if model.termination:  # entries of tasks that never terminate teach nothing
        logits = model.termination.apply(params["termination"], zs[1:], task.emb)[..., 0]  # [H, B]
        termination = (optax.sigmoid_binary_cross_entropy(logits, batch.terminated) * task.can_terminate).mean()
        total = total + agent.termination_coef * termination
        info["termination_loss"] = termination
    if "pi" in params:
        pi = mt.policy(agent, params["pi"], zs[:-1], task, noise.pi_action[:-1])
        bc = imitation(pi.action, batch.action, task)  # [H, B]
        entropy = agent.entropy_coef * pi.scaled_entropy
        prior = (weight * (bc - entropy).mean(1)).mean()  # a mean over the window here, sums above
        total = total + agent.pretrain_bc_coef * prior
        info |= {"bc_loss": bc.mean(), "pi_prior_loss": prior} | policy_info(pi)
    return total, (zs, info | {"total_loss": total})


def policy_loss(agent: Agent, pi_params, q_params, zs, action, task: TaskInput, q_scale, noise: mt.UpdateNoise):
    """Policy objective on latent states zs [H+1, B, Z]: values, entropy, and imitation of the replay's actions
    [H, B, A]. Returns the loss, the values [B] of the first states, and scalars for the log."""
    pi = mt.policy(agent, pi_params, zs, task, noise.pi_action)
    logits = mt.q_logits(agent, mt.pick_heads(q_params, noise.pi_heads), zs, task.emb, pi.action)
    q = mt.two_hot_inv(agent, logits).mean(0)  # [H+1, B]
    weight = loss_weights(agent)
    bc = imitation(pi.action[:-1], action, task)  # [H, B]
    prior = (weight[:-1] * bc.mean(1)).sum()
    loss = agent.bc_coef * prior - (weight * (agent.entropy_coef * pi.scaled_entropy + q / q_scale).mean(1)).sum()
    return loss, (q[0], {"pi_loss": loss, "pi_prior_loss": prior, "bc_loss": bc.mean()} | policy_info(pi))


def policy_info(pi: mt.PolicySample) -> dict[str, jax.Array]:
    """What is logged of the policy's samples; the deviation of padded actions counts as 1."""
    std = jnp.exp(pi.log_std).mean()
    return {"pi_entropy": pi.entropy.mean(), "pi_scaled_entropy": pi.scaled_entropy.mean(), "pi_std": std}


def update(agent: Agent, tasks: Tasks, state: TrainState, batch: Batch, noise: mt.UpdateNoise, pretraining: bool):
    """One gradient step on the world model, in pretraining with the policy, and a step of the target values; then,
    after the pretraining, one on the policy alone. Returns the new state and a dict of scalars for the log."""
    H = agent.horizon
    B = len(batch.obs[0])
    shapes = [(H + 1, B, agent.obs_dim), (H, B, agent.action_dim), (H, B), (H, B), (B,)]
    chex.assert_shape(list(batch), shapes)
    rate = learning_rate(agent, state.updates)
    params = state.params
    if agent.learn_embedding:
        params = params | {"task_emb": mt.renormalise(params["task_emb"], batch.task)}
    task = task_input(agent, tasks, params["task_emb"], batch.task)

    next_z = networks(agent).encoder.apply(params["encoder"], batch.obs[1:], task.emb)  # [H, B, Z]
    target = td_target(agent, state, next_z, batch, task, noise)  # [H, B]
    learned = params if pretraining else {k: v for k, v in params.items() if k != "pi"}
    loss = partial(model_loss, agent, tasks, batch=batch, next_z=next_z, target=target, noise=noise)
    grads, (zs, info) = jax.grad(loss, has_aux=True)(learned)
    info["grad_norm"] = global_norm(grads)
    grads = clipped(grads, agent.grad_clip_norm)  # all together, the policy's among them
    pi_grads = grads.pop("pi", None)
    change, model_opt = MODEL_ADAM.update(grads, state.model_opt)
    rates = {k: rate * agent.enc_lr_scale if k == "encoder" else rate for k in change}
    model_params = {k: descend(params[k], change[k], rates[k]) for k in change}
    target_q = optax.incremental_update(model_params["q"], state.target_q, agent.tau)

    q_scale = state.q_scale
    if pretraining:
        pi_change, pi_opt = MODEL_ADAM.update(pi_grads, state.pi_opt)
    else:
        loss = partial(policy_loss, agent, q_params=model_params["q"], zs=zs, action=batch.action, task=task)
        loss = partial(loss, q_scale=q_scale, noise=noise)
        pi_grads, (q, pi_info) = jax.grad(loss, has_aux=True)(params["pi"])
        pi_change, pi_opt = PI_ADAM.update(clipped(pi_grads, agent.grad_clip_norm), state.pi_opt)
        low, high = jnp.percentile(q, jnp.array([5.0, 95.0]))
        q_scale = q_scale + agent.tau * (jnp.maximum(high - low, 1.0) - q_scale)  # for the next update
        info |= pi_info | {"pi_scale": q_scale, "pi_grad_norm": global_norm(pi_grads)}
    params = model_params | {"pi": descend(params["pi"], pi_change, rate)}
    return TrainState(params, target_q, model_opt, pi_opt, q_scale, state.key, state.updates + 1), info


# ----------------------------------------------------------------------------------------------------------- Replay
# The replay is that of tdmpc2_jax.py (`td.Replay`, which explains its queue of windows): every environment, and so
# every task, has a column of its own, in which its episodes follow one another, however long they are. Of the
# demonstrations there are two copies: in a replay of their own, and at the beginning of the one that is written over.
class WindowDraws(NamedTuple):
    """The random draws of B windows, made up front as those of an update."""

    number: jax.Array  # [B] in the queue: of an episode, or with --sample windows of a window
    place: jax.Array  # [B] in [0, 1) within the episode


def draw(replay: td.Replay, key: jax.Array, number: int) -> WindowDraws:
    """Draws so many episodes, or windows, uniformly and with replacement."""
    number_key, place_key = jax.random.split(key)
    drawn = jax.random.randint(number_key, (number,), 0, replay.size)
    return WindowDraws(drawn, jax.random.uniform(place_key, (number,)))


def windows(agent: Agent, tasks: Tasks, replay: td.Replay, draws: WindowDraws) -> Batch:
    """The windows that these draws choose: an episode of at least H+1 entries, however long, and a window of it."""
    C, n = replay.first.shape
    row, env = jnp.divmod(replay.starts[(replay.head + draws.number) % (C * n)], n)
    if agent.sample == "episodes":
        in_ring = (row - replay.rows) % C + 1  # what is before them is overwritten
        count = jnp.minimum(replay.is_start[row, env], in_ring)
        row += jnp.minimum(jnp.floor(draws.place * count).astype(jnp.int32), count - 1) - (count - 1)
    rows = (row + jnp.arange(agent.horizon + 1)[:, None]) % C  # [H+1, B]
    return Batch(
        obs=replay.obs[rows, env].astype(jnp.float32),
        action=replay.action[rows[1:], env],
        reward=replay.reward[rows[1:], env],
        terminated=replay.terminated[rows[1:], env].astype(jnp.float32),
        task=tasks.of_env[env],
    )


@partial(jax.jit, static_argnames="agent", donate_argnames="replay")
def add_all(agent: Agent, replay: td.Replay, steps: td.Step) -> td.Replay:
    """Writes steps [R, n] one after the other, observations in the replay's type."""
    steps = steps._replace(obs=steps.obs.astype(replay.obs.dtype))
    return jax.lax.scan(lambda replay, step: (td.add(agent, replay, step), None), replay, steps)[0]


def sample(agent: Agent, tasks: Tasks, replay: td.Replay, demos: td.Replay | None, key: jax.Array) -> Batch:
    """A batch, the first half of it from the demonstrations, if there are any."""
    B = agent.batch_size
    if demos is None:
        return windows(agent, tasks, replay, draw(replay, key, B))
    keys = jax.random.split(key)
    first = windows(agent, tasks, demos, draw(demos, keys[0], B // 2))
    second = windows(agent, tasks, replay, draw(replay, keys[1], B - B // 2))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=min(1, x.ndim - 1)), first, second)


@partial(jit_with_graphs, static_argnames=("agent", "mesh", "num_updates", "pretraining"), donate_argnames="state")
def train(agent: Agent, mesh: Mesh, tasks, state: TrainState, replay, demos, num_updates: int, pretraining: bool):
    """`num_updates` updates on fresh samples in one dispatch. Every device computes on its share of the batch; the sums
    over it, and so the gradients, are those of one device. Returns the new state and the means of their scalars."""

    def one(state, _):
        key, sample_key, noise_key = jax.random.split(state.key, 3)
        batch = sample(agent, tasks, replay, demos, sample_key)
        places = Batch(*[devices.split(mesh, 1)] * 4, devices.split(mesh, 0))
        batch = jax.lax.with_sharding_constraint(batch, places)
        noise = mt.update_noise(agent, noise_key)
        state, info = update(agent, tasks, state._replace(key=key), batch, noise, pretraining)
        return jax.lax.with_sharding_constraint(state, devices.replicated(mesh)), info

    state, infos = jax.lax.scan(one, state, None, length=num_updates)
    return state, jax.tree.map(jnp.mean, infos)


# ------------------------------------------------------------------------------------------------------- Evaluation
def make_envs(names: tuple[str, ...], num_envs: int, agent: Agent, seed, capture_video: bool):
    """`num_envs` environments of each task, in the order of `Tasks.of_env`; several processes share them out."""
    for name in names if capture_video else ():
        environments.check_rendering(name)
    sizes = (agent.obs_dim, agent.action_dim)
    render_mode = "rgb_array" if capture_video else None
    make = partial(environments.make_envs, names, num_envs, seed, sizes=sizes, render_mode=render_mode)
    return make() if jax.process_count() == 1 else devices.EnvsOfAllProcesses(make)


def evaluate(
    args, agent, mesh, tasks, params, names, envs, key, seed, by, share, advance=lambda: None, stop=lambda: False
):
    """All environments begin anew and go on, without exploration, until each has finished --eval-episodes. All that are
    finished by then count: there are more of short ones. --capture-video films the first of each task.

    Args:
        names: of the tasks.
        by, share: as in `act`.
        advance: called after every step.
        stop: called after every step, whether the evaluation is to be left; then None is returned.
    """
    n = envs.num_envs
    task_of = np.asarray(tasks.of_env)
    finished = [[] for _ in names]  # (return, success) of each task's episodes
    films = [[] for _ in names]
    left = np.full(n, args.eval_episodes)
    obs, _ = envs.reset(seed=seed)
    first = np.ones(n, bool)
    over = np.zeros(n, bool)  # the next step of these is a reset, and ignores the action
    returns = np.zeros(n)
    mean = jnp.zeros((n, agent.horizon, agent.action_dim))
    mean, key = devices.copies((mean, key), devices.replicated(mesh))  # as `act` returns them: it compiles once
    while (left > 0).any():
        if args.capture_video and not all(finished):
            for task, picture in enumerate(thumbnails(envs.render(), len(names))):
                films[task] += [] if finished[task] else [picture]
        action, mean, key = act(agent, mesh, tasks, params, obs, mean, first, share, key, by, explore=False)
        obs, reward, terminated, truncated, info = envs.step(np.asarray(action))
        first = over
        over = terminated | truncated
        returns = np.where(first, 0.0, returns + reward)
        for i in np.flatnonzero(over):
            finished[task_of[i]].append((returns[i], info["success"][i]))
        left -= over
        advance()
        if stop():
            return None
    returns, successes = zip(*[np.array(episodes).T for episodes in finished], strict=True)
    return SetEvaluation(names, returns, successes, side_by_side(films) if args.capture_video else [])


def evaluate_checkpoint(args: Args) -> None:
    """--evaluate: prints the table of tasks, the domains' means and the normalised score; writes them to --json."""
    loaded = load_newt(args.checkpoint, *SCRIPTS)
    names = environments.online_tasks(args.tasks, loaded.tasks)
    agent, _, loaded = fit_loaded(args, names, loaded)
    mesh = Mesh(np.array(jax.devices()[:1]), "devices")
    tasks, params = devices.copies((make_tasks(agent, names, 1), loaded.params), devices.replicated(mesh))
    envs = make_envs(names, 1, agent, (args.seed, 1), args.capture_video)
    with contextlib.closing(envs), progress(schedule.evaluation_steps(names, args.eval_episodes)) as advance:
        key = random_streams(args.seed).evaluate
        seed = (args.seed, 1)
        share = prior_share(agent, loaded.decisions)
        result = evaluate(args, agent, mesh, tasks, params, names, envs, key, seed, "plan", share, advance)
    report_scores(args, result)


# -------------------------------------------------------------------------------------------------------------- Run
class Inputs(NamedTuple):
    """What a run begins with: opened and compared before anything starts."""

    agent: Agent
    table: np.ndarray | None  # [T, E] embeddings; None if they are drawn, or in the run's checkpoint
    loaded: LoadedAgent | None  # of --checkpoint, if the run begins with it
    demo_steps: td.Step | None  # [R, n] the demonstrations, in the columns of the replay
    num_demos: int  # episodes of them
    record: dict[str, Any]  # what checkpoints hold of these beside arrays


def fit_loaded(args: Args, names: tuple[str, ...], loaded: LoadedAgent) -> tuple[Agent, np.ndarray, LoadedAgent]:
    """The agent of --checkpoint for these tasks, with the sizes that it has; their embeddings, of those that it does
    not know from --embeddings; and its parameters with these."""
    table = embeddings_of(loaded, names, args.embeddings, args.checkpoint)
    given = dataclasses.replace(args.agent, **sizes_of(loaded.params), **padding_of(loaded))
    agent = for_tasks(given, names, table.shape[1], loaded.learned_emb, warm_up=False)
    like = jax.eval_shape(partial(init_params, agent), jax.random.key(0))
    params = loaded.params | {"task_emb": jnp.asarray(table)}
    if "termination" not in like:  # no task here can terminate, or --no-episodic
        params.pop("termination", None)
    check_shapes(params, like, args.checkpoint, "these tasks")
    return agent, table, loaded._replace(params=params)


def start_of(args: Args, names: tuple[str, ...], meta: dict[str, Any] | None):
    """The agent as the run's checkpoint has it (meta), as --checkpoint has it, or a new one: three of `Inputs`."""
    if meta:
        sizes = {name: meta["args"][name] for name in (*td.SIZE_FIELDS, "pad_obs", "pad_action")}
        given = dataclasses.replace(args.agent, **sizes)
        warm_up = bool(args.demos) and not args.checkpoint
        return for_tasks(given, names, meta["task_dim"], meta["learned_emb"], warm_up), None, None
    if args.checkpoint:
        return fit_loaded(args, names, load_newt(args.checkpoint, *SCRIPTS))
    table = read_embeddings(names, args.embeddings)
    size = LEARNED_DIM if table is None else table.shape[1]
    return for_tasks(args.agent, names, size, table is None, bool(args.demos)), table, None


def open_inputs(args: Args, names: tuple[str, ...], n: int, checkpoints: Checkpoints) -> Inputs:
    """Refuses in one sentence what cannot be opened, does not fit, or is not what the run was started with."""
    environments.check_simulators(names)
    episodes = read_demonstrations(names, args.demos, args.demo_episodes) if args.demos else []
    meta = checkpoints.read_meta()
    agent, table, loaded = start_of(args, names, meta)
    steps = None
    if episodes:
        steps = td.Step(**in_columns(episodes, len(names), n, agent.obs_dim, agent.action_dim, PIECE))
        largest = np.abs(steps.obs).max()
        small = f"--obs-dtype {args.obs_dtype}: --demos {args.demos} holds observations of {largest:.3g}"
        cli.require(largest <= np.finfo(args.obs_dtype).max, small)
    as_given = dataclasses.replace(agent, warmup_updates=args.agent.warmup_updates)  # what --resume compares
    record = {"args": cli.settings(dataclasses.replace(args, agent=as_given)), "tasks": names}
    record |= {"task_dim": agent.task_dim, "learned_emb": agent.learn_embedding}
    record["demos"] = sum(checksums({"demos": steps}).values())
    if meta:
        begun = "than those that the run was started with"
        cli.require(tuple(meta["tasks"]) == names, f"--tasks {args.tasks} are others here {begun}")
        cli.require(meta["demos"] == record["demos"], f"--demos {args.demos} holds others {begun}")
    return Inputs(agent, table, loaded, steps, len(episodes), record)


@partial(jax.jit, static_argnames="agent")
def fresh_state(agent: Agent, streams: Streams, table: jax.Array | None, loaded=None) -> dict[str, Any]:
    """The part of a checkpoint that learns and draws: the learning state, and the key of the acting. Parameters, target
    values and Q scale are fresh ones, or those of `loaded`."""
    if loaded is None:
        params = init_params(agent, streams.init, table)
        loaded = params, params["q"], 1.0
    return {"train": init_state(agent, *loaded, streams.train), "act_key": streams.act}


def new_replay(args: Args, agent: Agent, capacity: int, n: int) -> td.Replay:
    """Empty replay of `capacity` steps of each environment, with observations of --obs-dtype."""
    replay = td.init_replay(agent, capacity, n)
    return replay._replace(obs=replay.obs.astype(args.obs_dtype))


def as_stored(args: Args, steps: td.Step) -> td.Step:
    """Steps with observations of --obs-dtype."""
    return steps._replace(obs=steps.obs.astype(args.obs_dtype))


def fill(args: Args, agent: Agent, mesh: Mesh, capacity: int, n: int, steps: td.Step | None) -> td.Replay:
    """A replay that begins with the demonstrations, or with the last of them that it can hold; its columns are split
    over the devices, if they can be evenly."""
    make = partial(new_replay, args, agent, capacity, n)
    places = jax.tree.map(lambda x: x.sharding, devices.columns_split(jax.eval_shape(make), mesh))
    replay = jax.jit(make, out_shardings=places)()
    rows = 0 if steps is None else len(steps.first)
    for start in range(max(0, rows - capacity) // PIECE * PIECE, rows, PIECE):
        replay = add_all(agent, replay, jax.tree.map(lambda x, i=start: x[i : i + PIECE], steps))
    return jax.device_put(replay, places)


def start_or_resume(args: Args, inputs: Inputs, mesh: Mesh, n: int, checkpoints: Checkpoints):
    """Learning state with the key of the acting, replay and counters of the run's last checkpoint; without one all is
    fresh, but for the agent if --checkpoint names one, and for the demonstrations with which the replay begins."""
    agent = inputs.agent
    evaluated = 0 if pretraining_of(args) else -1  # no evaluation before anything is learned
    count = {"pretrained": 0, "decisions": 0, "updates": 0, "evaluated": evaluated, "seconds": 0.0}
    streams = random_streams(args.seed)
    capacity = args.buffer_size // n
    state_shapes = jax.eval_shape(partial(fresh_state, agent), streams, inputs.table)
    replay_shapes = jax.eval_shape(partial(new_replay, args, agent, capacity, n))
    places = {"state": devices.placed(state_shapes, mesh, "no"), "replay": devices.columns_split(replay_shapes, mesh)}
    if restored := checkpoints.restore(**places):
        meta, items = restored
        return items["state"], items["replay"], count | meta["count"]
    parts = None
    if loaded := inputs.loaded:
        parts = jax.tree.map(np.asarray, (loaded.params, loaded.target_q, loaded.q_scale))  # of no device, to go to any
    make = jax.jit(partial(fresh_state, agent), out_shardings=devices.replicated(mesh))
    return make(streams, inputs.table, parts), fill(args, agent, mesh, capacity, n, inputs.demo_steps), count


def loop(
    args: Args, inputs: Inputs, mesh: Mesh, names, envs, state, replay, demos, count, checkpoints, logger, signals
) -> int:
    """Learns from the demonstrations; then acts, learns and steps the environments; evaluates, saves and logs, until
    --total-timesteps or a signal. A step of the run is an update of the pretraining and later a decision. Returns the
    step at which it has stopped."""
    agent = inputs.agent
    n = envs.num_envs
    tasks = devices.copies(make_tasks(agent, names, n // len(names)), devices.replicated(mesh))
    eval_freq = args.eval_freq or 10_000 * n
    checkpoint_freq = args.checkpoint_freq or 5 * eval_freq
    pretraining = pretraining_of(args)
    seed_steps = schedule.online_seed_steps(args, names)
    burst = max(1, int(args.utd * n))  # updates of one dispatch
    length_of_evaluation = schedule.evaluation_steps(names, args.eval_episodes)
    eval_key = random_streams(args.seed).evaluate
    key = state["act_key"]
    state = state["train"]
    learn = partial(train, agent, mesh, tasks)
    step = saved = count["pretrained"] + count["decisions"]
    info = {}
    entry = None  # what the environments have returned last; None: they are to be reset
    prev_mean = devices.copies(jnp.zeros((n, agent.horizon, agent.action_dim)), devices.replicated(mesh))
    while True:
        # Evaluate: in the same environments, whose episodes under way are left
        finished = step >= pretraining + args.total_timesteps
        share = prior_share(agent, count["decisions"])
        evaluating = due(step, count["evaluated"], eval_freq, finished or step == pretraining)
        if evaluating:
            how = "plan" if count["decisions"] or args.checkpoint else "policy", share
            with logger.paused(f"evaluating at step {step}", length_of_evaluation) as advance:
                draws = jax.random.fold_in(eval_key, step), (args.seed, 1, step)
                parts = agent, mesh, tasks, state.params, names, envs
                result = evaluate(args, *parts, *draws, *how, advance, signals.in_any_process)
            entry = None
            if result is not None:
                count["evaluated"] = step
                logger.record_scores(step, result)

        # Save
        stopping = signals.in_any_process(now=evaluating or finished or step < pretraining) or finished
        freq = min(checkpoint_freq, 20_000) if step < pretraining else checkpoint_freq  # there steps are updates
        if due(step, saved, freq, stopping or step == pretraining):
            check_finite(logger.folder, f"step {step}", **jax.device_get(info))
            count["seconds"] = logger.seconds()
            with logger.paused():
                checkpoints.save(step, count, inputs.record, state={"train": state, "act_key": key}, replay=replay)
            saved = step
            stopping = stopping or signals.in_any_process(now=True)  # one that has come meanwhile
        if stopping:
            return step

        # Learn from the demonstrations alone
        if step < pretraining:
            number = min(PRETRAIN_BURST, pretraining - step)
            state, info = learn(state, replay, demos, num_updates=number, pretraining=True)
            count["pretrained"] += number
            step = count["pretrained"]
            if step == pretraining:
                state = after_pretraining(state)
            if due(step, logger.logged, args.log_freq):
                logger.log_losses(step, info)
                info = {}
            logger.advance(step)
            continue

        # Act: dispatched here, read when the environments are stepped
        if entry is None:
            obs, _ = envs.reset(seed=(args.seed, 0, step))  # a resumed run begins new episodes, not the first again
            zeros = np.zeros(n, np.float32)
            over = np.zeros(n, bool)  # the next step of these is a reset, and ignores the action
            filler = devices.copies(jnp.zeros((n, agent.action_dim)), devices.replicated(mesh))
            entry = td.Step(obs, filler, zeros, terminated=over, first=~over)
            returns = zeros
            replay = td.add(agent, replay, as_stored(args, entry))
        by = "plan"
        if count["decisions"] < seed_steps:
            by = "chance" if demos is None and not args.checkpoint else "policy"
        seen = entry.obs, prev_mean, entry.first
        action, prev_mean, key = act(agent, mesh, tasks, state.params, *seen, share, key, by, explore=True)

        # Learn: utd per decision from the seed steps on; computed while the environments step
        made = count["decisions"], count["updates"]
        bursts = schedule.updates_due(*made, seed_steps, args.utd, burst, replay.size, at_once=0, num_envs=n)
        for _ in logger.with_bar("learning", range(bursts)):
            state, info = learn(state, replay, demos, num_updates=burst, pretraining=False)
            count["updates"] += burst

        # Step
        on_device = action
        action = np.asarray(action)  # all that is fetched from the device between two decisions
        obs, reward, terminated, truncated, _ = envs.step(action)
        stored = {f"observation as {args.obs_dtype}": obs.astype(args.obs_dtype)}
        check_finite(logger.folder, f"step {step}", action=action, **stored)
        entry = td.Step(obs, on_device, reward.astype(np.float32), terminated, first=over)  # over before: now reset
        replay = td.add(agent, replay, as_stored(args, entry))
        count["decisions"] += n - int(over.sum())
        step = pretraining + count["decisions"]

        # Log
        returns = np.where(over, 0.0, returns + reward)
        over = terminated | truncated
        for i in np.flatnonzero(over):
            logger.log(step, {f"charts/episodic_return/{names[i * len(names) // n]}": returns[i]})
        if due(step, logger.logged, args.log_freq):
            schedule.check_windows(replay.size, count["updates"], agent.horizon)
            logger.log_losses(step, info)
            info = {}
        logger.advance(step)


def pretraining_of(args: Args) -> int:
    """Updates of the pretraining: none without demonstrations, or of an agent that is one already."""
    return args.pretrain_updates if args.demos and not args.checkpoint else 0


def run(args: Args) -> None:
    """Trains one agent and keeps the run's files; with --distributed, process 0 writes them."""
    names = environments.online_tasks(args.tasks)
    n = cli.number_of_envs(args, names)
    devices.require_same("--tasks", names)
    devices.check_shares(args.agent.batch_size, n)
    mesh = Mesh(np.array(jax.devices()), "devices")
    primary = jax.process_index() == 0
    signals = Signals()
    with contextlib.ExitStack() as stack:
        folder = RunFolder(cli.online_folder(args), cli.settings(args), primary)
        devices.on_all_processes(lambda: stack.enter_context(folder))
        checkpoints = stack.enter_context(Checkpoints(folder, "newt_jax"))
        inputs = devices.on_all_processes(lambda: open_inputs(args, names, n, checkpoints))
        saved = [path.name for path in complete_checkpoints(folder.path)]
        devices.require_same("--demos and --runs-dir", inputs.record["demos"], saved)
        agent = inputs.agent
        steps = inputs.demo_steps
        replay_of = partial(new_replay, args, agent, args.buffer_size // n, n)
        demos_of = partial(new_replay, args, agent, 0 if steps is None else len(steps.first), n)
        shares = mesh.size if n % mesh.size == 0 else 1
        check = partial(devices.check_memory, replay_of, args.buffer_size, args.total_timesteps, demos_of, shares)
        devices.on_all_processes(check)
        envs = make_envs(names, n // len(names), agent, (args.seed, 0), args.capture_video)
        stack.enter_context(contextlib.closing(envs))
        state, replay, count = start_or_resume(args, inputs, mesh, n, checkpoints)
        demos = None if steps is None else fill(args, agent, mesh, len(steps.first), n, steps)
        cli.require(demos is None or demos.size, f"all demonstrations are shorter than --horizon {agent.horizon}")
        del steps  # their memory
        inputs = inputs._replace(loaded=None, demo_steps=None)
        devices.on_all_processes(folder.begin)
        logger = stack.enter_context(Logger(folder, SCORES_COLUMNS, "step", signals=signals))
        title = f"{len(names)} task(s), {n} environment(s), {inputs.num_demos} demonstration(s): {agent.obs_dim} "
        title += f"observations, {agent.action_dim} actions, embeddings of {agent.task_dim} numbers"
        step = count["pretrained"] + count["decisions"]
        total = pretraining_of(args) + args.total_timesteps
        head = SCORES_HEAD.replace("update", "  step")
        devices.on_all_processes(partial(logger.begin, title, head, state["train"].params, step, total, count))
        stack.enter_context(signals)
        step = loop(args, inputs, mesh, names, envs, state, replay, demos, count, checkpoints, logger, signals)
    signals.exit_if_received(f"step {step}", primary, saved=step > 0)


def check_args(args: Args) -> None:
    """Refuses arguments that cannot work, before anything starts."""
    cli.check_bounds(dataclasses.replace(args, agent=with_model_size(args.agent, many=True)))
    begins = not args.agent.constrained or args.agent.num_pi_trajs > 1
    cli.require(begins, "--constrained begins plans with the policy's sequences: give --num-pi-trajs 2 or more")
    cli.check_cluster(args)
    if not args.evaluate:
        names = environments.online_tasks(args.tasks)
        cli.check_online(args, names, schedule.online_seed_steps(args, names))


def main(argv: list[str] | None = None) -> None:
    with cli.errors_as_sentences():
        args = cli.parse(Args, argv, __doc__, lambda args: recorded_settings(args, cli.online_folder, SCRIPTS, ()))
        set_up_jax(args.compile_cache, args.distributed)
        check_args(args)
        if args.distributed:
            devices.start_distributed(args)
        if args.evaluate:
            evaluate_checkpoint(args)
        else:
            run(args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
