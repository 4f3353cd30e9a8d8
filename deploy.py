"""Makes an agent small, a file of a half or a quarter of its size, or portable, a file that runs without this project.

    python deploy.py --checkpoint runs/walker-walk/tdmpc2_jax/1 --quantize int8 --output walker.safetensors
    python tdmpc2_jax.py --evaluate --checkpoint walker.safetensors
    python deploy.py --checkpoint mt80-48M.pt --quantize mixed --output robot.safetensors
    python tdmpc2_jax_mt.py --evaluate --checkpoint robot.safetensors

    python deploy.py --checkpoint runs/walker-walk/tdmpc2_jax/1 --export onnx --what policy --output robot.onnx
    python deploy.py --checkpoint mt30-5M.pt --source-task walker-walk --export onnx --what planner \
        --num-samples 128 --num-elites 32 --output robot.onnx

float16 rounds all numbers; int8 gives kernels a scale for each output and rounds the rest to float16; mixed is int8
with an encoder in float16. The table that is printed has a row for each component of the agent that is quantised
alone, and one for all: the errors of latent states z, and z3 after three actions, of rewards, values and the policy's
actions, on states of recorded episodes or on those that the agent visits by its policy. What is in a file stands in
tdmpc2_support/agents/quantized.py.

--export writes the policy (observation to action) or the planner (observation, last mean and noise to action and mean)
as ONNX, for onnxruntime, or as StableHLO, for JAX alone; examples/robot.py runs them.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
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
from tdmpc2_support.agents.export import Function, check_packages, runner, write_onnx, write_stablehlo
from tdmpc2_support.agents.fold import fold_agent
from tdmpc2_support.agents.pretrained import check_shapes, load_any, read_record, sizes_of, write_quantized
from tdmpc2_support.agents.quantized import compare, dequantize, nested, print_comparison
from tdmpc2_support.agents.quantized import quantize as quantize_numbers
from tdmpc2_support.bounds import Count, Natural, NewFile
from tdmpc2_support.devices import set_up_jax

SCRIPTS = ("tdmpc2_jax", "tdmpc2_jax_mt", "tdmpc2_jax_device")  # whose agents are made small
STATES = 200  # of each task, on which the agent is compared


@dataclasses.dataclass(frozen=True)
class Args:
    checkpoint: str  # the agent: a run of tdmpc2_jax.py or tdmpc2_jax_mt.py, a checkpoint, or an original .pt
    output: NewFile  # the file to write
    quantize: Literal["float16", "int8", "mixed"] | None = None  # types of its numbers; mixed: encoder in float16
    export: Literal["onnx", "stablehlo"] | None = None  # write what it computes, for onnxruntime or for JAX alone
    what: Literal["policy", "planner", "both"] = "policy"  # what to export; both go to two files
    source_task: str | None = None  # task to export, if --checkpoint is a multi-task agent
    num_samples: Count | None = None  # action sequences per iteration of the exported planner, if not the agent's
    num_elites: Count | None = None  # its elites, if not the agent's
    iterations: Count | None = None  # its iterations, if not the agent's
    tasks: str | None = None  # what it was trained on, where it does not say: a task, mt30, mt80, or names with commas
    data_dir: str | None = None  # compare on episodes of this folder, not on those that the agent's policy makes
    keep_target_q: bool = False  # write the target Qs, too, which only learning needs
    seed: Natural = 1  # of the states and of the planner's noise
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
    if args.quantize:
        loaded.check_variant(args.quantize)
    record = read_record(args.checkpoint, *SCRIPTS)["args"]
    several = "task_emb" in loaded.params
    module = mt if several else td
    names = loaded.tasks
    if not several:
        names = (environments.task_spec(record["task"]).name,) if "task" in record else named
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
    last = max(0, len(active) - horizon + 1)
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


# ------------------------------------------------------------------------------------------------------------ Export
def one_task(args: Args, trained: Trained) -> tuple[td.Agent, dict[str, Any], str]:
    """The agent of one task that is exported, a multi-task agent with its embedding folded in, its parameters and the
    task."""
    agent = trained.agent
    params = trained.loaded.params
    name = trained.names[0]
    if trained.script == "tdmpc2_jax_mt":
        networks = {key: value for key, value in params.items() if key != "task_emb"}
        several = trained.loaded._replace(params=networks, task_emb=params["task_emb"])
        cli.require(args.source_task, f"{args.checkpoint} is a multi-task agent: name its task with --source-task")
        name = environments.task_spec(args.source_task).name
        obs_dim, action_dim = environments.set_sizes([name])
        params = fold_agent(several, name, obs_dim, action_dim, args.checkpoint).params
        shared = {field.name for field in cli.saved_fields(td.Agent)} & vars(agent).keys()
        agent = td.Agent(**{field: getattr(agent, field) for field in shared})
        agent = dataclasses.replace(agent, obs_dim=obs_dim, action_dim=action_dim)
    else:
        cli.require(not args.source_task, f"{args.checkpoint} is a single-task agent: leave out --source-task")
    if args.export == "onnx":  # onnxruntime has no products in bfloat16
        agent = dataclasses.replace(agent, compute_dtype="float32")
    sizes = {key: getattr(args, key) for key in ("num_samples", "num_elites", "iterations") if getattr(args, key)}
    discount = td.discount_of(agent, environments.task_spec(name).episode_length)
    return dataclasses.replace(agent, discount=discount, **sizes), params, name


def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def policy_function(agent: td.Agent) -> Function:
    """The policy without noise: obs [O] -> action [A]."""

    def policy(params, obs):
        model = td.networks(agent)
        return (policy_mean(model, params, model.encoder.apply(params["encoder"], obs)),)

    return Function(policy, {"obs": shaped(agent.obs_dim)}, ("action",))


def planner_function(agent: td.Agent) -> Function:
    """A plan without exploration: obs [O], the last plan's mean [H, A], whether an episode starts, and the draws of
    `plan_noise` -> action [A] and mean [H, A]."""

    def planner(params, obs, previous_mean, first, normal_pi, normal_sample, normal_terminal, gumbel, heads):
        draws = normal_pi, normal_sample, normal_terminal, gumbel, jnp.zeros(agent.action_dim)
        noise = td.PlanNoise(*(draw[None] for draw in draws))
        start = jnp.reshape(first, (1,))
        action, mean = td.plan(agent, params, obs[None], previous_mean[None], start, noise, heads, explore=False)
        return action[0], mean[0]

    noise, heads = jax.eval_shape(lambda key: td.plan_noise(agent, key, 1), jax.random.key(0))
    inputs = {
        "obs": shaped(agent.obs_dim),
        "previous_mean": shaped(agent.horizon, agent.action_dim),
        "first": shaped(dtype=bool),
        "normal_pi": shaped(*noise.pi.shape[1:]),
        "normal_sample": shaped(*noise.sample.shape[1:]),
        "normal_terminal": shaped(*noise.terminal.shape[1:]),
        "gumbel": shaped(*noise.gumbel.shape[1:]),
        "heads": heads,
    }
    return Function(planner, inputs, ("action", "mean"))


def planner_inputs(agent: td.Agent, obs: np.ndarray, mean: np.ndarray, first: bool, key: jax.Array) -> dict[str, Any]:
    """The inputs of one call of the planner."""
    noise, heads = td.plan_noise(agent, key, 1)
    draws = {f"normal_{name}": getattr(noise, name)[0] for name in ("pi", "sample", "terminal")}
    return {
        "obs": obs,
        "previous_mean": mean,
        "first": np.array(first),
        **draws,
        "gumbel": noise.gumbel[0],
        "heads": heads,
    }


def differences(agent: td.Agent, params, what: str, function: Function, run, observations, seed: int) -> list[float]:
    """The largest difference between the outputs of JAX and those in a file, of each call, one after the other."""
    call = jax.jit(function.call)
    mean = np.zeros((agent.horizon, agent.action_dim), np.float32)
    largest = []
    for i, obs in enumerate(observations):
        inputs = {"obs": obs}
        if what == "planner":
            inputs = planner_inputs(agent, obs, mean, i % 25 == 0, jax.random.key(seed + i))
        expected = call(params, *inputs.values())
        found = run(**inputs)
        largest.append(max(float(np.abs(x - y).max()) for x, y in zip(expected, found, strict=True)))
        mean = np.asarray(expected[-1])
    return largest


def random_observations(env, seed: int) -> np.ndarray:
    """Of an episode with random actions: STATES [.., O] at most."""
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)[0]]
    ended = False
    while not ended and len(seen) < STATES:
        obs, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        ended = terminated or truncated
        seen.append(obs)
    return np.stack(seen)


def output_of(args: Args, what: str) -> str:
    """The file of one function: robot-policy.onnx beside robot-planner.onnx, where both are asked for."""
    path = Path(args.output)
    return str(path.with_name(f"{path.stem}-{what}{path.suffix}")) if args.what == "both" else args.output


def export(args: Args) -> None:
    """Writes what is exported, and prints how far it is from what JAX computes."""
    functions = ("policy", "planner") if args.what == "both" else (args.what,)
    for what in functions:
        cli.require(
            not Path(output_of(args, what)).exists(), f"{output_of(args, what)} exists: choose another --output"
        )
    if args.export == "onnx":
        check_packages()
    cli.require(args.export == "onnx" or not args.quantize, "--quantize goes with --export onnx, or without --export")
    trained = load(args)
    agent, params, task = one_task(args, trained)
    cli.require(
        agent.num_pi_trajs < agent.num_samples, f"--num-samples must be more than {agent.num_pi_trajs}, the policy's"
    )
    cli.require(agent.num_elites <= agent.num_samples, "--num-elites must be at most --num-samples")
    stored = quantize_numbers(params, args.quantize) if args.quantize else {}
    params = params | nested(dequantize(stored))
    with contextlib.closing(environments.make_env(task)) as env:
        here = env.observation_space.shape[0], env.action_space.shape[0]
        check_sizes(args, trained._replace(agent=agent, names=(task,)), *here)
        interface = env.interface()
        observations = random_observations(env, args.seed)
    for what in functions:
        function = policy_function(agent) if what == "policy" else planner_function(agent)
        path = output_of(args, what)
        metadata = {
            "function": what,
            "task": task,
            **{key: json.dumps(value) for key, value in interface.items()},
            "numbers": args.quantize or "float32",
            "value_heads": str(agent.num_q),
            "made_by": f"tdmpc2-jax-single-file {importlib.metadata.version('tdmpc2-jax-single-file')}",
        }
        if args.export == "onnx":
            write_onnx(path, function, params, stored, metadata)
        else:
            write_stablehlo(path, function, params, metadata)
        run = runner(path, args.export)
        differ = differences(agent, params, what, function, run, observations, args.seed)
        size = Path(path).stat().st_size / 1e6
        near = f"{np.count_nonzero(np.array(differ) <= 1e-5)} of {len(differ)} outputs within 1e-5 of JAX's"
        print(f"{path}: {size:.2f} MB, {near} (median {np.median(differ):.1e}, at most {max(differ):.1e})")


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
        cli.require(args.quantize or args.export, "name --quantize, --export or both")
        planned = args.export and args.what != "policy"
        sizes = args.num_samples or args.num_elites or args.iterations
        cli.require(planned or not sizes, "--num-samples, --num-elites and --iterations go with --what planner")
        cli.require(args.export or not args.source_task, "--source-task goes with --export")
        cli.require(args.export or args.what == "policy", "--what goes with --export")
        cli.require(not args.export or not args.keep_target_q, "--keep-target-q goes with --quantize alone")
        cli.require(not args.export or not args.data_dir, "--data-dir goes with --quantize alone")
        if args.export:
            export(args)
        else:
            quantize(args)


if __name__ == "__main__":
    main()
