"""What a script's command line needs: what may be left out, checks, error sentences.

A script has two frozen dataclasses: `Agent`, which is what defines the agent, and `Args`, which is all else and holds
an `Agent` in its field `agent`. On the command line, in args.json and in checkpoints the names of both stand together.
"""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import signal
import sys
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from tdmpc2_support.bounds import Bounds
from tdmpc2_support.envs.tasks import TASK_SETS, TASKS, TaskSpec, jax_domain, set_tasks, task_spec
from tdmpc2_support.errors import UserError, one_line

T = TypeVar("T")
Flat = tyro.conf.OmitArgPrefixes  # Flat[Agent]: the flags of its fields are --lr, not --agent.lr
FromTask = Annotated[T, tyro.conf.Suppress]  # FromTask[int]: no flag; the task decides it, so that it is not saved


# ------------------------------------------------------------------------------------------------ The two dataclasses
# Settings that another start of the same run may change; what else `Agent` and `Args` have is compared by --resume.
MAY_CHANGE = frozenset(
    "runs_dir exp_name seed total_timesteps num_updates resume evaluate json eval_freq eval_episodes checkpoint_freq "
    "log_freq capture_video save_episodes track wandb_project_name wandb_entity compile_cache storage storage_dtype "
    "readers shard_params distributed coordinator num_processes process_id data_dir demos tasks num_seeds chunk".split()
)


def settings(args: Any) -> dict[str, Any]:
    """The arguments by name, those of the agent first: what args.json and checkpoints keep. Without what the task
    decides."""
    agent = {field.name: getattr(args.agent, field.name) for field in saved_fields(type(args.agent))}
    return agent | {name: value for name, value in vars(args).items() if name != "agent"}


def saved_fields(kind: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that have a flag."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [f for f in dataclasses.fields(kind) if tyro.conf.Suppress not in getattr(hints[f.name], "__metadata__", ())]


def with_settings(args: Any, record: Mapping[str, Any]) -> Any:
    """The arguments, but for those that the record names; names that it has beside them are of other versions."""
    fields = {field.name for field in saved_fields(type(args.agent))} & record.keys()
    hints = typing.get_type_hints(type(args.agent))
    agent = {name for name in fields if can_be(hints[name], record[name])}  # scripts have other model sizes
    other = {field.name for field in dataclasses.fields(args)} & record.keys() - {"agent"}
    changed = dataclasses.replace(args.agent, **{name: record[name] for name in agent})
    return dataclasses.replace(args, agent=changed, **{name: record[name] for name in other})


def can_be(hint: Any, value: Any) -> bool:
    """Whether a value is one of those that a type names, if it is a Literal (or None)."""
    parts = [hint, *typing.get_args(hint)]
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    choices = [choice for literal in literals for choice in typing.get_args(literal)]
    return not choices or value in choices or (value is None and type(None) in parts)


def parse(Args: type, argv: list[str] | None, description: str, recorded: Callable[[Any], Mapping[str, Any]]) -> Any:
    """The command line as an instance of the dataclass Args.

    Args:
        Args: has the fields agent, evaluate, checkpoint and json.
        argv: the command line; None for that of the process.
        description: for --help.
        recorded: called with the arguments, returns those that an earlier run has recorded: what the command line
            leaves out is as there (see `run.folder.recorded_settings`).
    """
    args = tyro.cli(Args, args=argv, description=description)
    require(not args.evaluate or args.checkpoint, "--evaluate needs --checkpoint")
    require(not args.json or args.evaluate, "--json goes with --evaluate")
    require(args.checkpoint or not getattr(args, "source_task", None), "--source-task goes with --checkpoint")
    default = with_settings(Args(), recorded(args))
    return tyro.cli(Args, args=argv, default=default, description=description)


def refuse_moved(argv: list[str] | None, flags: Sequence[str], command: str) -> None:
    """Raises a UserError that names the new command if the command line has one of these flags, which were a script's
    and are another's now."""
    words = sys.argv[1:] if argv is None else argv
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    moved = [flag for flag in flags if flag in given]
    require(not moved, f"{', '.join(moved)}: this is another command now: {command}")


# ---------------------------------------------------------------------------------------------------------- Checks
ORDERS = (  # of two arguments, where a script has both
    "num_pi_trajs < num_samples", "num_elites <= num_samples", "vmin < vmax", "log_std_min < log_std_max",
    "min_std <= max_std", "discount_min <= discount_max", "first_horizon <= horizon", "first_min_std <= max_std",
    "horizon <= future",
)  # fmt: skip


def require(holds: Any, sentence: str) -> None:
    """Raises a UserError with this sentence if something that must hold does not."""
    if not holds:
        raise UserError(sentence)


def check_bounds(args: Any) -> None:
    """Refuses arguments that are not within the bounds of their types, or two that are not in their order; UserError
    names the first."""
    check_fields(args.agent)
    check_fields(args)
    if args.track and not args.evaluate:
        check_wandb()
    agent = args.agent
    if getattr(agent, "latent_dim", None) and hasattr(agent, "simnorm_dim"):
        require(agent.latent_dim % agent.simnorm_dim == 0, "--latent-dim must be a multiple of --simnorm-dim")
    for order in ORDERS:
        small, sign, large = order.split()
        if not (hasattr(agent, small) and hasattr(agent, large)):
            continue
        if small == "num_pi_trajs" and not hasattr(agent, "simnorm_dim"):
            continue  # the first version draws them beside the others
        low, high = getattr(agent, small), getattr(agent, large)
        words = "smaller than" if sign == "<" else "at most"
        holds = low < high if sign == "<" else low <= high
        require(holds, f"{as_flag(small)} must be {words} {as_flag(large)}")


def check_wandb() -> None:
    """Refuses --track without Weights & Biases or an account of theirs; on a terminal they ask for one."""
    require(importlib.util.find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    try:
        wandb.login()
    except Exception as error:  # of many kinds: no account, no network, no home
        raise UserError(f"--track: {one_line(error)} (or set WANDB_MODE=offline)") from error


def check_fields(part: Any) -> None:
    """Refuses fields of a dataclass that are not within the bounds of their types; UserError names the first."""
    for name, kind in typing.get_type_hints(type(part), include_extras=True).items():
        kinds = (kind, *typing.get_args(kind))  # the latter for `Count | None`
        bounds = [b for k in kinds for b in getattr(k, "__metadata__", ()) if isinstance(b, Bounds)]
        value = getattr(part, name)
        if value is not None and bounds and not bounds[0].holds(value):
            shown = repr(value) if isinstance(value, str) else str(value)
            raise UserError(f"{as_flag(name)} must be {bounds[0].words}, not {shown[:50]}")


def refuse_useless(argv: list[str] | None, useless: Set[str], mode: str) -> None:
    """Refuses a command line (None: that of the process) that names an argument of which this mode makes no use."""
    words = [word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")]
    found = [word for word in words if word[2:].removeprefix("no-").replace("-", "_") in useless]
    require(not found, f"{mode} makes no use of {', '.join(found)}")


def check_replay(args: Any, spec: TaskSpec, seed_steps: int) -> None:
    """Refuses a replay that cannot hold the random decisions at the start, these if they fill no window, and a task
    whose episodes fill none; says so if the run ends within those decisions.

    args has the fields num_envs, buffer_size, total_timesteps and agent.horizon."""
    row = TASKS.get(spec.name)
    of_table = "--save-episodes writes datasets, which only tasks of the table (python envs.py) can be in"
    saves = getattr(args, "save_episodes", None)
    require(not saves or (row and row.obs_size is not None), f"{of_table}: {spec.name!r} is none")
    window = (args.agent.horizon + 1) * args.num_envs
    short = (
        f"episodes of {spec.name!r} end after {spec.episode_length} decisions, before --horizon {args.agent.horizon}"
    )
    require(spec.episode_length >= args.agent.horizon, short)
    if seed_steps * spec.action_repeat >= args.total_timesteps:
        words = f"the {seed_steps} random decisions with which it starts (--seed-steps)"
        print(f"nothing will be learned: --total-timesteps {args.total_timesteps} ends within {words}", file=sys.stderr)
    content = f"the {seed_steps} seed steps and a window per environment"
    require(seed_steps >= window, "--seed-steps must fill more than one window per environment")
    require(args.buffer_size >= seed_steps + window, f"--buffer-size {args.buffer_size} does not hold {content}")


def number_of_envs(args: Any, names: Sequence[str]) -> int:
    """Environments of an online run of several tasks: --num-envs of each, or one; of a task alone ten."""
    return len(names) * (args.num_envs or (10 if len(names) == 1 else 1))


def check_online(args: Any, names: Sequence[str], seed_steps: int) -> None:
    """Refuses a batch or a replay of an online run of several tasks that cannot be used, and episodes shorter than a
    window. Says if the run ends within its `seed_steps` decisions without learning.

    args has the fields num_envs, buffer_size, total_timesteps, demos, capture_video, distributed, agent.batch_size and
    agent.horizon."""
    agent = args.agent
    if seed_steps >= args.total_timesteps and not args.demos:
        words = f"the {seed_steps} decisions before learning begins (--seed-steps)"
        print(f"nothing will be learned: --total-timesteps {args.total_timesteps} ends within {words}", file=sys.stderr)
    film = "--capture-video films in one process: leave out --distributed, or film a checkpoint with --evaluate"
    require(not (args.capture_video and args.distributed), film)
    require(agent.batch_size > 1, "--batch-size must be 2 or more: a half is for the demonstrations")
    for name in names:
        length = task_spec(name).episode_length
        short = f"episodes of {name!r} end after {length} decisions, before --horizon {agent.horizon}"
        require(length >= agent.horizon, short)
    n = number_of_envs(args, names)
    small = f"--buffer-size {args.buffer_size} does not hold a window of each of the {n} environments"
    require(args.buffer_size // n > agent.horizon + 1, small)


def check_cluster(args: Any) -> None:
    """Refuses arguments of `devices.start_distributed` that do not go together, or stand without --distributed."""
    flags = "--coordinator, --num-processes and --process-id"
    given = [value is not None for value in (args.coordinator, args.num_processes, args.process_id)]
    if any(given) and not args.distributed:
        raise UserError(f"{flags} go with --distributed")
    if any(given) and not all(given):
        raise UserError(f"{flags} go together")
    if args.evaluate and args.distributed:
        raise UserError("--evaluate runs in one process: leave out --distributed")
    if args.distributed and any(map(jax_domain, (args.tasks or "").split(","))):
        raise UserError("tasks that are compiled are for one process: leave out --distributed")


def as_flag(name: str, *value: Any) -> str:
    """An argument, and its value if one is given, as it is written on the command line."""
    flag = name.replace("_", "-")
    if not value:
        return f"--{flag}"
    if isinstance(value[0], bool):
        return f"--{flag}" if value[0] else f"--no-{flag}"
    return f"without --{flag}" if value[0] is None else f"--{flag} {value[0]}"


def check_envs_module() -> None:
    """UserError if the script has imported somebody else's `envs`: a folder or a file beside a copy of the script."""
    module = sys.modules.get("envs")
    ours = ("make_envs", "task_spec", "EpisodeWriter")
    if module is None or all(hasattr(module, name) for name in ours):
        return
    place = module.__file__ or next(iter(module.__path__))
    raise UserError(f"{place} hides this project's envs.py: rename it, or start the script where there is no such file")


@contextlib.contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Ends the process with one sentence for a mistake of the user and for a Ctrl-C before or after the loop. What is
    printed meanwhile cannot fail."""
    try:
        with lasting_output():
            check_envs_module()
            yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; a run goes on from its last whole checkpoint with --resume, if it has one", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class Lasting:
    """A stream that can always be written to: what its terminal or pipe does not take, closed as it may be by then, is
    given up, since a run's results are in its files."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # of a terminal that has not all letters: they become question marks
            self._stream.reconfigure(errors="replace")
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # else what is left in its buffer fails at the end of the process
            os.close(null)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and errors as `Lasting` streams, where they are files of this process (not a notebook's)."""
    before = sys.stdout, sys.stderr
    try:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed by the shell
                setattr(sys, name, open(os.devnull, "w"))
            elif isinstance(stream, io.TextIOWrapper):
                setattr(sys, name, Lasting(stream))
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


# ----------------------------------------------------------------------------------------------------- Run folders
def run_folder(args: Any) -> Path:
    """The folder of a run of one task; args has the fields runs_dir, task, exp_name and seed. That of several (see
    `set_folder`) if it has a field tasks that names them."""
    if getattr(args, "tasks", None):
        return set_folder(args)
    return Path(args.runs_dir, task_spec(args.task).name.replace("/", "_"), args.exp_name, str(args.seed))


def task_set(tasks: str | None) -> str | list[str]:
    """--tasks of a multi-task script as `set_tasks` and `load_dataset` want it."""
    tasks = tasks or "mt30"
    if tasks in TASK_SETS or re.fullmatch(r"mt\d+", tasks):
        return tasks
    return tasks.split(",")


def task_names(args: Any) -> tuple[str, ...]:
    """Canonical names of --tasks or, without it, of --task alone."""
    if args.tasks:
        return set_tasks(task_set(args.tasks))
    return (task_spec(args.task).name,)


def set_folder(args: Any) -> Path:
    """The folder of a multi-task run, named after its task set, or its tasks if they are few; args has the fields
    runs_dir, tasks, exp_name and seed."""
    tasks = set_tasks(task_set(args.tasks))
    known = [name for name, known in TASK_SETS.items() if known == tasks]
    return Path(args.runs_dir, known[0] if known else joined(tasks), args.exp_name, str(args.seed))


def online_folder(args: Any) -> Path:
    """That of an online run of several tasks, of any names; "soup" stands for all that can be made."""
    name = (
        args.tasks if args.tasks in ("soup", *TASK_SETS) else joined([task_spec(t).name for t in args.tasks.split(",")])
    )
    return Path(args.runs_dir, name, args.exp_name, str(args.seed))


def joined(tasks: Sequence[str]) -> str:
    """What the folder of a run of these tasks is called: after all of them, if they are few."""
    if len(tasks) <= 4:
        return "+".join(tasks).replace("/", "_")
    return f"{tasks[0]}+{len(tasks) - 1}-{zlib.crc32(','.join(tasks).encode()):08x}".replace("/", "_")
