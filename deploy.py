"""Makes an agent small: a file of a half or a quarter of its size, and how far what it computes moves by that.

    python deploy.py --checkpoint runs/walker-walk/tdmpc2_jax/1 --quantize int8 --output walker.safetensors
    python tdmpc2_jax.py --evaluate --checkpoint walker.safetensors
    python deploy.py --checkpoint mt80-48M.pt --quantize mixed --output robot.safetensors
    python tdmpc2_jax_mt.py --evaluate --checkpoint robot.safetensors

float16 rounds all numbers; int8 gives kernels a scale for each output and rounds the rest to float16; mixed is int8
with an encoder in float16. The table that is printed has a row for each component of the agent that is quantised
alone, and one for all: the errors of latent states z, and z3 after three actions, of rewards, values and the policy's
actions, on states of recorded episodes or on those that the agent visits by its policy. What is in a file stands in
tdmpc2_support/agents/quantized.py.
"""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import envs as environments
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support import cli
from tdmpc2_support.agents.pretrained import check_shapes, load_any, read_record, sizes_of, write_quantized
from tdmpc2_support.agents.quantized import compare, print_comparison
from tdmpc2_support.bounds import Natural, NewFile
from tdmpc2_support.devices import set_up_jax

SCRIPTS = ("tdmpc2_jax", "tdmpc2_jax_mt")  # whose agents are made small
STATES = 200  # of each task, on which the agent is compared


@dataclasses.dataclass(frozen=True)
class Args:
    checkpoint: str  # the agent: a run of tdmpc2_jax.py or tdmpc2_jax_mt.py, a checkpoint, or an original .pt
    quantize: Literal["float16", "int8", "mixed"]  # types of its numbers; mixed is int8 with an encoder in float16
    output: NewFile  # the file to write
    tasks: str | None = None  # what it was trained on, where it does not say: a task, mt30, mt80, or names with commas
    data_dir: str | None = None  # compare on episodes of this folder, not on those that the agent's policy makes
    keep_target_q: bool = False  # write the target Qs, too, which only learning needs
    seed: Natural = 1  # of the states
    compile_cache: bool = True  # keep compiled programs in ~/.cache/tdmpc2-jax: the second start is faster


class Trained(NamedTuple):
    """An agent with what made it."""

    script: str  # whose agent it is
    agent: td.Agent | mt.Agent
    loaded: Any  # its parameters and how they were stored
    names: tuple[str, ...]  # its tasks


class Windows(NamedTuple):
    """Some states and the actions that followed, of episodes of the agent's tasks."""

    obs: np.ndarray  # [B, O]
    action: np.ndarray  # [H, B, A]
    task: np.ndarray  # [B] place of the task in the agent's


# ------------------------------------------------------------------------------------------------------------ Agents
def task_names(tasks: str | None) -> tuple[str, ...]:
    """The names of --tasks."""
    task_set = cli.task_set(tasks) if tasks else []
    if isinstance(task_set, str):
        return environments.set_tasks(task_set)
    return tuple(environments.task_spec(task).name for task in task_set)


def load(args: Args) -> Trained:
    """The agent of --checkpoint, of one task or of several.

    Raises:
        UserError: there is none that fits, it is quantised already, or its tasks are others or not known.
    """
    named = task_names(args.tasks)
    loaded = load_any(args.checkpoint, named, *SCRIPTS)
    loaded.check_variant(args.quantize)
    record = read_record(args.checkpoint, *SCRIPTS)["args"]
    several = "task_emb" in loaded.params
    module = mt if several else td
    names = loaded.tasks
    if not several:
        names = (record["task"],) if "task" in record else named
        cli.require(len(names) == 1, f"{args.checkpoint} does not say its task: name it with --tasks")
    same = f"{args.checkpoint} knows other tasks than --tasks names, or in another order"
    cli.require(named in ((), names), same)
    known = {field.name for field in cli.saved_fields(module.Agent)}
    agent = module.Agent(**{name: value for name, value in record.items() if name in known} | sizes_of(loaded.params))
    if several:
        agent = mt.for_tasks(agent, names)
    else:
        obs_dim = loaded.params["encoder"]["params"]["linear_0"]["kernel"].shape[0]
        action_dim = loaded.params["pi"]["params"]["linear_2"]["bias"].shape[0] // 2
        can_terminate = "termination" in loaded.params
        agent = dataclasses.replace(agent, obs_dim=obs_dim, action_dim=action_dim, can_terminate=can_terminate)
    like = jax.eval_shape(partial(module.init_params, agent), jax.random.key(0))
    check_shapes(loaded.params, like, args.checkpoint, "this version of the script")
    return Trained(module.__name__, agent, loaded, names)


def outputs(trained: Trained, params: dict[str, Any], windows: Windows) -> dict[str, jax.Array]:
    """What networks with some parameters make of B states and the actions after them: z and z3 [B, Z], reward and Q
    [B], the policy's action [B, A], NaN where a task has none, and the termination's logit [B]."""
    agent = trained.agent
    emb = ()
    mask = jnp.ones(agent.action_dim)
    if isinstance(agent, mt.Agent):
        emb = (mt.embed(params["task_emb"], windows.task),)
        mask = mt.make_tasks(agent, trained.names).mask[windows.task]
        model = mt.networks(agent)
    else:
        model = td.networks(agent)
    z = model.encoder.apply(params["encoder"], windows.obs, *emb)
    later = z
    for action in windows.action:
        later = model.dynamics.apply(params["dynamics"], later, *emb, action)
    action = windows.action[0]
    reward = td.two_hot_inv(agent, model.reward.apply(params["reward"], z, *emb, action))
    q_logits = jax.vmap(lambda head: model.q.apply(head, z, *emb, action))(params["q"])
    q = td.two_hot_inv(agent, q_logits).mean(0)
    pi = jnp.where(mask > 0, policy_mean(model, params, z, *emb), jnp.nan)
    found = {"z": z, f"z{len(windows.action)}": later, "reward": reward, "Q": q, "action": pi}
    if "termination" in params:
        found["end"] = model.termination.apply(params["termination"], later)[..., 0]
    return found


def policy_mean(model: td.Networks | mt.Networks, params: dict[str, Any], z: jax.Array, *emb: jax.Array) -> jax.Array:
    """The policy's actions [..., A] without noise."""
    mean, _ = jnp.split(model.pi.apply(params["pi"], z, *emb), 2, axis=-1)
    return jnp.tanh(mean)


# ------------------------------------------------------------------------------------------------------------ States
def recorded_windows(args: Args, trained: Trained) -> Windows:
    """States of the episodes in --data-dir."""
    data = environments.load_dataset(trained.names, args.data_dir)
    check_sizes(args, trained, data.obs_size, data.action_size)
    rng = np.random.default_rng(args.seed)
    drawn = data.sample(rng, STATES * len(trained.names), trained.agent.horizon)
    return Windows(drawn["obs"][0], drawn["action"], drawn["task"])


def visited_windows(args: Args, trained: Trained) -> Windows:
    """States of one episode of each task in which the agent acts by its policy."""
    agent = trained.agent
    names = trained.names
    several = isinstance(agent, mt.Agent)

    @jax.jit
    def act(params, obs):
        model = mt.networks(agent) if several else td.networks(agent)
        emb = (mt.embed(params["task_emb"], jnp.arange(len(names))),) if several else ()
        return policy_mean(model, params, model.encoder.apply(params["encoder"], obs, *emb), *emb)

    seen = []
    acted = []
    active = []
    with contextlib.closing(environments.make_envs(names if several else names[0], 1, (args.seed, 1))) as envs:
        check_sizes(args, trained, envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
        obs, _ = envs.reset(seed=(args.seed, 1))
        running = np.ones(envs.num_envs, bool)
        while running.any():
            action = np.asarray(act(trained.loaded.params, obs))
            seen.append(obs)
            acted.append(action)
            active.append(running)
            obs, _, terminated, truncated, _ = envs.step(action, active=running)
            running = running & ~(terminated | truncated)
    found = whole_windows(np.stack(seen), np.stack(acted), np.stack(active), STATES * len(names), agent.horizon)
    cli.require(len(found.obs), f"its episodes are shorter than {agent.horizon} decisions: compare on --data-dir")
    return found


def whole_windows(obs: np.ndarray, action: np.ndarray, active: np.ndarray, count: int, horizon: int) -> Windows:
    """`count` states at most, evenly spread over those of n environments that were followed by as many actions as the
    horizon has: obs [steps, n, O], action [steps, n, A], active [steps, n] where the environment was stepped."""
    last = len(active) - horizon + 1
    whole = np.logical_and.reduce([active[i : last + i] for i in range(horizon)])
    step, env = np.nonzero(whole)
    chosen = np.unique(np.linspace(0, len(step) - 1, count).astype(int)) if len(step) else np.zeros(0, int)
    step = step[chosen]
    env = env[chosen]
    actions = np.stack([action[step + i, env] for i in range(horizon)])
    return Windows(obs[step, env], actions, env)


def check_sizes(args: Args, trained: Trained, *there: int) -> None:
    """Refuses episodes of other sizes than the agent's."""
    here = trained.agent.obs_dim, trained.agent.action_dim
    words = "{} does not fit {}: it knows {} observations and {} actions, there are {} and {}"
    cli.require(here == there, words.format(args.checkpoint, ", ".join(trained.names[:3]), *here, *there))


# -------------------------------------------------------------------------------------------------------------- Main
def quantize(args: Args) -> None:
    """Writes --output and prints the comparison."""
    cli.require(not args.output.endswith(".pt"), "--output: .pt is the ending of PyTorch's files")
    cli.require(not Path(args.output).exists(), f"{args.output} exists: choose another --output")
    trained = load(args)
    windows = recorded_windows(args, trained) if args.data_dir else visited_windows(args, trained)
    made = {field.name: getattr(trained.agent, field.name) for field in cli.saved_fields(type(trained.agent))}
    if trained.script == "tdmpc2_jax":
        made["task"] = trained.names[0]
    write_quantized(args.output, trained.loaded, args.quantize, trained.script, made, args.keep_target_q)
    compute = jax.jit(lambda params: outputs(trained, params, windows))
    rows = compare(args.output, trained.loaded.params, compute)
    where = f"of {args.data_dir}" if args.data_dir else "that its policy visits"
    print_comparison(rows, f"on {len(windows.obs)} states {where}")


def main(argv: list[str] | None = None) -> None:
    with cli.errors_as_sentences():
        args = tyro.cli(Args, args=argv, description=__doc__)
        cli.check_fields(args)
        set_up_jax(args.compile_cache)
        quantize(args)


if __name__ == "__main__":
    main()
