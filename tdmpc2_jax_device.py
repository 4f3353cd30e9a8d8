"""TD-MPC2 with everything on the accelerator: environments in JAX, planner, replay and updates in one compiled program.

Read tdmpc2_jax.py first: its networks, planner, updates and replay are imported from there (`td`). New is the loop: a
step of the Python program there is a round of a compiled loop here, a hundred of them in a dispatch. Several runs that
differ in their seeds are side by side in one program, by `vmap`. A run is one pytree, its environments among it; all of
it is in a checkpoint, and a run that was killed goes on as if it had not been (on a CPU to the last bit).

Letters are those of tdmpc2_jax.py: n environments of a run; and S runs, a leading axis where there are several.

    python tdmpc2_jax_device.py --task playground/WalkerWalk --num-envs 128 --utd 0.05 --num-seeds 5
    python tdmpc2_jax_device.py --task gymnax/Pendulum-v1 --num-envs 4
    python tdmpc2_jax_device.py --task my_robot:make             # an environment of your own in JAX, see docs/device.md
    python tdmpc2_jax_device.py --evaluate --checkpoint runs/gymnax_Pendulum-v1/tdmpc2_jax_device/1 --capture-video
"""

import contextlib
import dataclasses
import sys
from fractions import Fraction
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import envs as environments
import tdmpc2_jax as td
from tdmpc2_support import cli
from tdmpc2_support.agents.pretrained import load_agent
from tdmpc2_support.backend import jit_with_graphs
from tdmpc2_support.bounds import Count, Name
from tdmpc2_support.cli import FromTask
from tdmpc2_support.devices import available_bytes, bytes_of, committed, keep_freed_memory, set_up_jax, shapes_on
from tdmpc2_support.envs.jax_env import Episode, JaxEnv, open_jax
from tdmpc2_support.errors import UserError
from tdmpc2_support.run.checkpoints import Checkpoints
from tdmpc2_support.run.folder import RunFolder, Signals, check_finite, recorded_settings
from tdmpc2_support.run.logging import Logger
from tdmpc2_support.run.reports import RETURNS_COLUMNS, Evaluation, returns_head
from tdmpc2_support.run.schedule import Streams, check_first_window, check_windows, due, random_streams, seed_steps_of
from tdmpc2_support.run.seeds import RunFiles, from_numbered, most, numbered, of_seed, over_seeds, side_by_side


# ------------------------------------------------------------------------------------------------------------- Args
@dataclasses.dataclass(frozen=True)
class Args(td.Args):
    """Those of tdmpc2_jax.py, and what is new here."""

    task: str = "playground/WalkerWalk"  # playground/NAME, gymnax/ID, or module:function that returns an environment
    num_seeds: Count = 1  # runs in one program: seeds seed, seed + 1, ..., each with a folder and a replay of its own
    chunk: Count = 100  # rounds of a dispatch at most: signals wait for its end; no number depends on it
    physics: Literal["auto", "jax", "warp"] = "auto"  # of MuJoCo Playground; auto: warp for one seed on a GPU, else jax
    exp_name: Name = "tdmpc2_jax_device"  # name of this experiment: its files go to RUNS_DIR/TASK/EXP_NAME/SEED
    save_episodes: FromTask[None] = None  # no flag: episodes do not leave the device


SCRIPT = "tdmpc2_jax_device"


# -------------------------------------------------------------------------------------------------------------- Run
class Run(NamedTuple):
    """Everything that a run consists of."""

    train: td.TrainState
    act_key: jax.Array
    env_key: jax.Array  # with the number of steps (`replay.rows`) it makes the keys of new episodes
    replay: td.Replay
    episodes: Episode  # [n] of each environment, at its last entry of the replay
    prev_mean: jax.Array  # [n, H, A] of the planner
    decisions: jax.Array  # number of decisions made, in all environments


class Schedule(NamedTuple):
    """How long actions are random, and when updates are made."""

    random_decisions: int  # decisions that are random, at the start
    seed_steps: int  # decisions before the first updates, which are as many
    utd: Fraction  # updates per decision from there on


class Record(NamedTuple):
    """What one dispatch leaves for the log."""

    episodes: jax.Array  # number of episodes that have ended
    returns: jax.Array  # sum of their returns
    lengths: jax.Array  # sum of their lengths
    finite: dict[str, jax.Array]  # NaN if an action, reward or observation was not finite, else 0
    info: dict[str, jax.Array]  # scalars of the last update


@partial(jax.jit, static_argnames=("agent", "env", "capacity", "n"))
def fresh_run(agent: td.Agent, env: JaxEnv, capacity: int, n: int, streams: Streams) -> Run:
    """A run before its first decision, in n environments."""
    state = td.fresh_state(agent, streams)
    episodes = env.begin_all(jax.random.fold_in(streams.environments, 0), n)
    resets = jnp.ones(n, bool)
    entry = td.Step(episodes.obs, jnp.zeros((n, agent.action_dim)), episodes.reward, episodes.terminated, first=resets)
    return Run(
        **state,
        env_key=streams.environments,
        replay=td.add(agent, td.init_replay(agent, capacity, n), entry),
        episodes=episodes,
        prev_mean=jnp.zeros((n, agent.horizon, agent.action_dim)),
        decisions=jnp.zeros((), jnp.int32),
    )


def schedule_of(args: Args, env: JaxEnv) -> Schedule:
    seed_steps = seed_steps_of(args, env.spec)
    random_decisions = 0 if args.checkpoint else seed_steps + 1  # as in td.loop
    largest = int(min(2.0**30, (2.0**30 / args.utd) ** 0.5))  # denominator with which `updates_due` stays below 2^31
    return Schedule(random_decisions, seed_steps, Fraction(args.utd).limit_denominator(largest))


def updates_due(schedule: Schedule, decisions, updates, windows):
    """Number of updates that are to be made now: `seed_steps` at once when so many decisions have been made, then `utd`
    for each more, rounded down. In whole numbers, so that none is lost however long the run is."""
    later = decisions - schedule.seed_steps
    times, per = schedule.utd.as_integer_ratio()
    total = schedule.seed_steps + later // per * times + later % per * times // per
    return jnp.where((later >= 0) & (windows > 0), total - updates, 0)


def one_round(agent: td.Agent, env: JaxEnv, schedule: Schedule, axis, run: Run, record: Record, surely_random):
    """One step of all environments of a run, and the updates that are due: a round of the loop in tdmpc2_jax.py, in the
    same order. axis: see `over_seeds`; surely_random: no run of this program needs a plan in this round."""
    n = len(run.prev_mean)
    over = run.episodes.terminated | run.episodes.truncated  # [n] in this step they are reset, and ignore the action

    # Act
    first = run.episodes.decisions == 0
    act = partial(td.act, agent, run.train.params, run.episodes.obs, run.prev_mean, first, run.act_key, explore=True)
    drawn = act(random=True)
    planned = jax.lax.cond(surely_random, lambda: drawn, lambda: act(random=False))
    random = run.decisions < schedule.random_decisions
    action, prev_mean, act_key = jax.tree.map(partial(jnp.where, random), drawn, planned)

    # Learn
    number = updates_due(schedule, run.decisions, run.train.updates, run.replay.size)

    def learn(i, before):
        replay, train, info = before
        after = td.train(agent, train, replay, num_updates=1)
        if axis is not None:  # other runs may have more to do
            after = jax.tree.map(partial(jnp.where, i < number), after, (train, info))
        return jax.lax.optimization_barrier((replay, *after))  # read before `add` writes: else the replay is copied

    before = run.replay, run.train, record.info
    replay, train, info = jax.lax.fori_loop(0, most(number, axis), learn, before)

    # Step
    key = jax.random.fold_in(run.env_key, replay.rows)
    some_over = most(over.any(), axis)
    episodes = env.decide_or_begin(run.episodes, action, key, some_over)
    entry = td.Step(episodes.obs, action, episodes.reward, episodes.terminated, first=over)
    replay = td.add(agent, replay, entry)
    decisions = run.decisions + n - over.sum()

    # For the log
    ended = episodes.terminated | episodes.truncated
    finite = {"action": action, "reward": episodes.reward, "observation": episodes.obs}
    record = Record(
        episodes=record.episodes + ended.sum(),
        returns=record.returns + jnp.where(ended, episodes.total, 0.0).sum(),
        lengths=record.lengths + jnp.where(ended, episodes.decisions, 0).sum(),
        finite={k: jnp.where(jnp.isfinite(x).all(), record.finite[k], jnp.nan) for k, x in finite.items()},
        info=info,
    )
    return Run(train, act_key, run.env_key, replay, episodes, prev_mean, decisions), record


@partial(jit_with_graphs, static_argnames=("agent", "env", "schedule"), donate_argnames="runs")
def advance(agent: td.Agent, env: JaxEnv, schedule: Schedule, runs: Run, rounds, random_rounds) -> tuple[Run, Record]:
    """`rounds` rounds of all runs [S] in one dispatch; in the first `random_rounds` of them no run needs a plan. Both
    are arguments of the compiled program: it serves dispatches of any length, whose bounds change no number."""

    def one_seed(run: Run, axis):
        _, info = jax.eval_shape(partial(td.train, agent, num_updates=1), run.train, run.replay)
        info = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info)
        finite = dict.fromkeys(("action", "reward", "observation"), jnp.zeros(()))
        record = Record(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros((), jnp.int32), finite, info)

        def step(i, before):
            return one_round(agent, env, schedule, axis, *before, i < random_rounds)

        return jax.lax.fori_loop(0, rounds, step, (run, record))

    return over_seeds(one_seed, runs)


# ------------------------------------------------------------------------------------------------------- Evaluation
class Players(NamedTuple):
    """Episodes of an evaluation."""

    episodes: Episode  # [n]
    prev_mean: jax.Array  # [n, H, A]
    key: jax.Array


@partial(jax.jit, static_argnames=("agent", "env", "number"))
def players_at_start(agent: td.Agent, env: JaxEnv, number: int, key: jax.Array) -> Players:
    key, env_key = jax.random.split(key)
    return Players(env.begin_all(env_key, number), jnp.zeros((number, agent.horizon, agent.action_dim)), key)


@partial(jax.jit, static_argnames=("agent", "env"), donate_argnames="players")
def play(agent: td.Agent, env: JaxEnv, params, players: Players, decisions) -> tuple[Players, jax.Array]:
    """`decisions` decisions without exploration; an episode that is over stays as it is. Also returns if all are."""

    def decide(_, before: Players) -> Players:
        episodes, mean, key = before
        first = episodes.decisions == 0
        action, mean, key = td.act(agent, params, episodes.obs, mean, first, key, explore=False)
        return Players(env.decide_or_stay(episodes, action), mean, key)

    players = jax.lax.fori_loop(0, decisions, decide, players)
    return players, (players.episodes.terminated | players.episodes.truncated).all()


def evaluate(args: Args, agent: td.Agent, env: JaxEnv, params, key, advance, stop) -> Evaluation | None:
    """--eval-episodes episodes without exploration, side by side on the device; None if `stop` becomes true. The
    arguments are otherwise those of `td.evaluate`."""
    players = players_at_start(agent, env, args.eval_episodes, committed(key))
    over = False
    while not over:
        players, over = play(agent, env, params, players, args.chunk)
        for _ in range(args.chunk):
            advance()
        if stop:
            return None
    returns, successes = jax.device_get((players.episodes.total, players.episodes.success))
    return Evaluation(returns, successes, [])


# ------------------------------------------------------------------------------------------------------------- Loop
def items_of(run: Run) -> dict[str, Any]:
    """A run as the items of a checkpoint: the first two are those of tdmpc2_jax.py."""
    state = {"train": run.train, "act_key": run.act_key}
    rest = run._replace(train=None, act_key=None, replay=None)
    return {"state": state, "replay": run.replay, "environments": numbered(rest)}


def start_or_resume(args: Args, agent: td.Agent, env: JaxEnv, files: RunFiles) -> Run:
    """The run of a seed from its last checkpoint, as it was; without one a fresh one, but for the agent if --checkpoint
    names one."""
    make = partial(fresh_run, agent, env, args.buffer_size // args.num_envs, args.num_envs, random_streams(files.seed))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if restored := files.checkpoints.restore(**shapes_on(place, lambda: items_of(make()))):
        meta, items = restored
        files.count.update(meta["count"])
        rest = jax.eval_shape(make)._replace(train=None, act_key=None, replay=None)
        rest = from_numbered(items["environments"], rest)
        return rest._replace(**items["state"], replay=items["replay"])
    run = make()
    if args.checkpoint:
        loaded = load_agent(args.checkpoint, args.source_task, partial(td.init_params, agent), *td.SCRIPTS)
        state = td.init_state(agent, loaded.params, loaded.target_q, loaded.q_scale, run.train.key)
        run = run._replace(train=state)
    return committed(run)


def evaluate_if_due(args: Args, agent, env, params, files: RunFiles, step: int, eval_envs, signals) -> None:
    """The evaluation of one run, on the device; with films in environments that can be drawn."""
    if not due(step, files.count["evaluated"], args.eval_freq, step >= args.total_timesteps):
        return
    if step == 0 and jax.default_backend() == "cpu" and not args.checkpoint:
        agent = dataclasses.replace(agent, mpc=False)  # an untrained agent's plans would take minutes
    key = jax.random.fold_in(random_streams(files.seed).evaluate, step)
    with files.logger.paused(f"evaluating at step {step}", env.spec.episode_length) as advance:
        if eval_envs is None:
            result = evaluate(args, agent, env, params, key, advance, signals)
        else:
            result = td.evaluate(agent, params, eval_envs, key, (files.seed, 1, step), True, advance, signals)
    if result is not None:
        files.count["evaluated"] = step
        files.logger.record_returns(step, env.spec, result)


def save(files: RunFiles, step: int, run: Run) -> None:
    """Writes a checkpoint of one run, all of it."""
    files.count["seconds"] = files.logger.seconds()
    with files.logger.paused():
        files.checkpoints.save(step, files.count, **items_of(run))


def log(agent: td.Agent, files: RunFiles, step: int, updates: int, windows: int, record: Record) -> None:
    """Adds what a dispatch has left to the curves of one run; UserError where the run cannot go on."""
    logger = files.logger
    info = record.info if updates > files.count["updates"] else {}
    finite = {name: record.finite[name] for name in ("reward", "observation", "action")}  # the cause first
    check_finite(logger.folder, f"simulator step {step}", **finite, **info)
    if record.episodes:
        scalars = {"return": record.returns / record.episodes, "length": record.lengths / record.episodes}
        logger.log(step, {f"charts/episodic_{name}": mean for name, mean in scalars.items()})
    if due(step, logger.logged, logger.settings["log_freq"]):
        check_windows(windows, updates, agent.horizon)
        logger.log_losses(step, info)
    logger.advance(step)


def rounds_to(args: Args, schedule: Schedule, steps: list[int], repeat: int) -> tuple[int, int]:
    """Rounds up to the next evaluation or checkpoint of a run, --chunk at most; and in how many of them all runs act at
    random. steps: the simulator steps that the runs have made."""
    first = max(steps)
    ends = [(step // freq + 1) * freq - step for step in steps for freq in (args.eval_freq, args.checkpoint_freq)]
    left = min(*ends, args.total_timesteps - first)
    random = max(0, schedule.random_decisions - first // repeat)
    return min(args.chunk, -(-left // (args.num_envs * repeat))), -(-random // args.num_envs)


def loop(args: Args, agent: td.Agent, env: JaxEnv, runs: Run, files: list[RunFiles], eval_envs, signals) -> int:
    """Evaluates, saves and logs between dispatches, until all runs have --total-timesteps or a signal comes. A run that
    cannot go on stops with a sentence, the others go on. Returns the largest simulator step of all runs."""
    repeat = env.spec.action_repeat
    schedule = schedule_of(args, env)
    active = list(range(len(files)))  # places of the runs that go on; those of others are computed, too, for nothing
    broken = []
    steps = [file.count["decisions"] * repeat for file in files]
    saved = list(steps)
    while True:
        # Evaluate
        for s in active:
            evaluate_if_due(args, agent, env, of_seed(runs.train.params, s), files[s], steps[s], eval_envs, signals)

        # Save: all runs at the same time
        finished = [s for s in active if steps[s] >= args.total_timesteps]
        stopping = bool(signals)
        if stopping or finished or any(due(steps[s], saved[s], args.checkpoint_freq) for s in active):
            for s in active:
                if steps[s] != saved[s]:
                    save(files[s], steps[s], of_seed(runs, s))
                    saved[s] = steps[s]
            stopping = bool(signals)  # again: one that comes only now ends the run if everything has just been saved
        active = [s for s in active if s not in finished]
        if broken and not active:
            raise UserError("; ".join(broken))
        if stopping or not active:
            return max(steps)

        # Advance
        rounds, random_rounds = rounds_to(args, schedule, [steps[s] for s in active], repeat)
        runs, record = advance(agent, env, schedule, runs, rounds, random_rounds)

        # Log
        read = runs.decisions, runs.train.updates, runs.replay.size, record
        for s in list(active):
            decisions, updates, windows, of_run = jax.device_get(of_seed(read, s))
            steps[s] = int(decisions) * repeat
            try:
                log(agent, files[s], steps[s], int(updates), int(windows), of_run)
                if decisions >= schedule.seed_steps and not updates and not windows:
                    check_first_window(int(decisions), args.num_envs)
            except UserError as error:
                active.remove(s)
                broken.append(str(error))
                if active:  # the end of the program is far away
                    print(f"seed {files[s].seed}: {error}", file=sys.stderr)
            files[s].count.update(decisions=int(decisions), updates=int(updates))


def physics_of(args: Args) -> str:
    """What "auto" stands for; a run's record has it, so that each of several seeds can go on alone."""
    if args.physics != "auto":
        return args.physics
    return "warp" if jax.default_backend() == "gpu" and args.num_seeds == 1 else "jax"


def check_memory(args: Args, agent: td.Agent, env: JaxEnv) -> None:
    """Refuses runs that the device's memory cannot hold, before anything is compiled."""
    device = jax.devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    make = partial(fresh_run, agent, env, args.buffer_size // args.num_envs, args.num_envs, random_streams(args.seed))
    run = shapes_on(place, make)
    draws = shapes_on(place, partial(td.plan_noise, agent, n=args.num_envs), jax.random.key(0))
    replay = bytes_of(run.replay)
    rest = bytes_of((run.train, draws)) + 2 * bytes_of(run.episodes)  # gradients and steps need more of each
    total = args.num_seeds * (replay + 2 * rest) + replay * (1 + (device.platform == "cpu"))  # one is copied when saved
    free = available_bytes(device)
    what = f"{args.num_seeds} runs" if args.num_seeds > 1 else "the run"
    parts = f"--num-seeds {args.num_seeds} x (replay {replay / 1e9:.1f} GB, the rest {2 * rest / 1e9:.1f} GB)"
    way = "smaller --buffer-size, --num-envs or --num-seeds"
    cli.require(total < free, f"{what} take {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: {parts}; {way}")


def run(args: Args) -> None:
    """Trains the agents of all seeds and keeps their runs' files."""
    env = open_jax(args.task, args.physics)
    spec = env.spec
    cli.check_replay(args, spec, seed_steps_of(args, spec))
    agent = td.for_task(args.agent, args.task, env)
    check_memory(args, agent, env)
    signals = Signals()
    with contextlib.ExitStack() as stack:
        files = []
        for seed in range(args.seed, args.seed + args.num_seeds):
            own = dataclasses.replace(args, seed=seed, num_seeds=1)  # a run like one that was started alone
            folder = stack.enter_context(RunFolder(cli.run_folder(own), cli.settings(own)))
            checkpoints = stack.enter_context(Checkpoints(folder, SCRIPT))
            label = f"seed {seed}: " if args.num_seeds > 1 else ""
            logger = Logger(folder, RETURNS_COLUMNS, label=label, shown=seed == args.seed, signals=signals)
            stack.enter_context(logger)
            count = {"decisions": 0, "updates": 0, "evaluated": -1, "seconds": 0.0}
            files.append(RunFiles(seed, folder, checkpoints, logger, count))
        eval_envs = None
        if args.capture_video:
            eval_envs = stack.enter_context(contextlib.closing(td.make_eval_envs(args)))
        started = [start_or_resume(args, agent, env, file) for file in files]
        title = f"{spec.name}: {agent.obs_dim} observations, {agent.action_dim} actions, {args.num_envs} environment(s)"
        if args.num_seeds > 1:
            title += f", seeds {args.seed} to {args.seed + args.num_seeds - 1}"
        for file, each in zip(files, started, strict=True):
            file.folder.begin()
            step = file.count["decisions"] * spec.action_repeat
            file.logger.begin(title, returns_head(spec), each.train.params, step, args.total_timesteps, file.count)
        stack.enter_context(signals)
        runs = side_by_side(started)
        del started, each  # their memory
        step = loop(args, agent, env, runs, files, eval_envs, signals)
    signals.exit_if_received(f"simulator step {step}", saved=step > 0)


def recorded(args: Args) -> dict[str, Any]:
    """What an earlier run has recorded; runs of other scripts may be gone on from, but are evaluated there."""
    return recorded_settings(args, cli.run_folder, (SCRIPT,) if args.evaluate else td.SCRIPTS)


def main(argv: list[str] | None = None) -> None:
    with cli.errors_as_sentences():
        args = cli.parse(Args, argv, __doc__, recorded)
        cli.check_bounds(dataclasses.replace(args, agent=td.with_model_size(args.agent)))
        cli.require(args.num_seeds == 1 or not args.track, "--track goes with --num-seeds 1: one run in a process")
        if args.capture_video:
            environments.check_rendering(args.task)
        set_up_jax(args.compile_cache)
        args = dataclasses.replace(args, physics=physics_of(args))
        if args.evaluate:
            open_jax(args.task, args.physics)
            td.evaluate_checkpoint(args)
        else:
            run(args)


if __name__ == "__main__":
    keep_freed_memory()
    main()
