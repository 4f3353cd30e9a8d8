"""What a script's command line needs: types of arguments with their bounds, what may be left out, one sentence.

lr: Positive = 3e-4  # learning rate                          a field of a script's `Args`
check_bounds(args)                                            refuses `--lr nan` in one sentence
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import signal
import sys
import typing
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from tdmpc2_support.agents.pretrained import read_record
from tdmpc2_support.envs.tasks import TASK_SETS, set_tasks, task_spec
from tdmpc2_support.errors import UserError


class Bounds(NamedTuple):
    """What an argument may be, as part of its type."""

    holds: Callable[[Any], bool]
    words: str


Count = Annotated[int, Bounds(lambda x: 1 <= x < 2**31, "a whole number from 1 to 2^31 - 1")]
Several = Annotated[int, Bounds(lambda x: 2 <= x < 2**31, "a whole number from 2 to 2^31 - 1")]
Natural = Annotated[int, Bounds(lambda x: 0 <= x < 2**31, "a whole number from 0 to 2^31 - 1")]
Number = Annotated[float, Bounds(math.isfinite, "a finite number")]
Positive = Annotated[float, Bounds(lambda x: 0 < x < math.inf, "a positive number")]
Weight = Annotated[float, Bounds(lambda x: 0 <= x < math.inf, "a number that is not negative")]
Share = Annotated[float, Bounds(lambda x: 0 <= x <= 1, "a number from 0 to 1")]
Fraction = Annotated[float, Bounds(lambda x: 0 <= x < 1, "a number from 0 to less than 1")]


def is_name(x: str) -> bool:
    """Whether a text can be a folder's name, or a path below one."""
    parts = Path(x).parts
    return (
        bool(parts) and x.isprintable() and max(map(len, parts)) <= 100 and len(x) <= 200 and not {"/", ".."} & {*parts}
    )


NewFile = Annotated[str, Bounds(lambda x: Path(x).absolute().parent.is_dir(), "a file in a folder that exists")]
Name = Annotated[str, Bounds(is_name, "a name of at most 100 characters, or a path below the task's folder")]


def names(*known: str) -> Any:
    """Type of an argument that is one of these names, or several of them with commas where a script takes several."""
    return Annotated[str, Bounds(lambda x: {*x.split(",")} <= {*known}, f"one of {', '.join(known)}")]


ORDERS = (  # of two arguments, where a script has both
    "num_pi_trajs < num_samples", "num_elites <= num_samples", "vmin < vmax", "log_std_min < log_std_max",
    "min_std <= max_std", "discount_min <= discount_max", "first_horizon <= horizon", "first_min_std <= max_std",
)  # fmt: skip


def check_bounds(args: Any) -> None:
    """Refuses a dataclass with a field that is not within the bounds of its type, or two that are not in their order;
    UserError names the first."""
    if args.track and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs Weights & Biases: pip install wandb")
    for name, kind in typing.get_type_hints(type(args), include_extras=True).items():
        value, kinds = getattr(args, name), (kind, *typing.get_args(kind))  # the latter of `Count | None`
        bounds = [b for k in kinds for b in getattr(k, "__metadata__", ()) if isinstance(b, Bounds)]
        if value is not None and bounds and not bounds[0].holds(value):
            shown = repr(value) if isinstance(value, str) else value
            raise UserError(f"{as_flag(name)} must be {bounds[0].words}, not {str(shown)[:50]}")
    if getattr(args, "latent_dim", None) and args.latent_dim % getattr(args, "simnorm_dim", 1):
        raise UserError("--latent-dim must be a multiple of --simnorm-dim")
    for small, sign, large in map(str.split, ORDERS):
        if small == "num_pi_trajs" and not hasattr(args, "simnorm_dim"):
            continue  # the first version draws them beside the others
        low, high = getattr(args, small, -math.inf), getattr(args, large, math.inf)
        if low > high or (sign == "<" and low == high):
            raise UserError(f"{as_flag(small)} must be {'smaller than' if sign == '<' else 'at most'} {as_flag(large)}")


def check_replay(args: Any, seed_steps: int) -> None:
    """Refuses a replay that cannot hold the random decisions at the start, or these if they fill no window.

    args has the fields horizon, num_envs and buffer_size."""
    window = (args.horizon + 1) * args.num_envs
    held = f"the {seed_steps} seed steps and a window per environment"
    check_rules(
        (seed_steps >= window, "--seed-steps must fill more than one window per environment"),
        (args.buffer_size >= seed_steps + window, f"--buffer-size {args.buffer_size} does not hold {held}"),
    )


def check_rules(*rules: tuple[Any, str]) -> None:
    """Refuses the first of pairs (whether it holds, sentence) that does not hold, with a UserError."""
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


def run_folder(args: Any) -> Path:
    """The folder of a run of one task; args has the fields runs_dir, task, exp_name and seed. That of several (see
    `set_folder`) if it has a field tasks that names them."""
    if getattr(args, "tasks", None):
        return set_folder(args)
    return Path(args.runs_dir, task_spec(args.task).name.replace("/", "_"), args.exp_name, str(args.seed))


def task_set(tasks: str | None) -> str | list[str]:
    """--tasks of a multi-task script as `set_tasks` and `load_dataset` want it."""
    tasks = tasks or "mt30"
    return tasks if tasks in TASK_SETS or re.fullmatch(r"mt\d+", tasks) else tasks.split(",")


def task_names(args: Any) -> tuple[str, ...]:
    """Canonical names of --tasks or, without it, of --task alone."""
    return set_tasks(task_set(args.tasks)) if args.tasks else (task_spec(args.task).name,)


def set_folder(args: Any) -> Path:
    """The folder of a multi-task run, named after its task set, or its tasks if they are few; args has the fields
    runs_dir, tasks, exp_name and seed."""
    tasks = set_tasks(task_set(args.tasks))
    known = [name for name, known in TASK_SETS.items() if known == tasks]
    crc = zlib.crc32(",".join(tasks).encode())
    name = known[0] if known else "+".join(tasks) if len(tasks) <= 4 else f"{tasks[0]}+{len(tasks) - 1}-{crc:08x}"
    return Path(args.runs_dir, name, args.exp_name, str(args.seed))


def parse(Args: type, argv: list[str] | None, description: str, folder_of: Callable[[Any], Path], *scripts: str):
    """The command line as an instance of the dataclass Args. What it leaves out is as in the run that --resume
    continues or, of what makes the agent, as in the run of one of `scripts` whose agent --evaluate or --quantize takes
    or, of what two scripts share, as in the run that --world-model names.

    Args has the fields evaluate, checkpoint, json, resume, runs_dir and exp_name; from exp_name on they keep the run,
    those before it make the agent. folder_of gives the run's folder.
    """
    args = tyro.cli(Args, args=argv, description=description)
    names, record = [field.name for field in dataclasses.fields(Args)], {}
    check_rules((not args.evaluate or args.checkpoint, "--evaluate needs --checkpoint"))
    check_rules((not getattr(args, "quantize", None) or args.checkpoint, "--quantize needs --checkpoint"))
    check_rules((not args.json or args.evaluate, "--json goes with --evaluate"))
    source_task = getattr(args, "source_task", None)
    check_rules((not source_task or args.checkpoint, "--source-task goes with --checkpoint"))
    quantize, world_model = getattr(args, "quantize", None), getattr(args, "world_model", None)
    its_own = {*names[: names.index("exp_name")]} - ({"data_dir"} if quantize else set())
    if world_model and not args.evaluate:  # whose task says which run --resume means
        record = read_record(world_model, "tdmpc2_jax", "tdmpc2_jax_mt")
        known, record = record.get("tasks", ()), record["args"]
        unknown = [name for name in (task_names(args) if args.tasks else ()) if known and name not in known]
        some = ", ".join(unknown[:3]) + f" and {len(unknown) - 3} more" * (len(unknown) > 3)
        check_rules((not unknown, f"{world_model} was not trained on {some}: it knows {', '.join(known[:9])}"))
        made = itertools.takewhile(lambda item: item[0] != "exp_name", record.items())
        record = {name: value for name, value in made if name in its_own - {"tasks"}}
        args = tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **record), description=description)
    if args.evaluate or quantize:
        record = read_record(args.checkpoint, *scripts)["args"] | ({"task": source_task} if source_task else {})
    elif args.resume and (folder_of(args) / "args.json").exists():
        record, its_own = json.loads((folder_of(args) / "args.json").read_text()), {*names} - {"resume", "runs_dir"}
    record = {name: value for name, value in record.items() if name in its_own}
    return tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **record), description=description)


def check_named(argv: list[str] | None, useless: set[str], mode: str) -> None:
    """Refuses a command line (None: that of the process) that names an argument of which this mode makes no use."""
    words = [word[2:].split("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")]
    found = [word for word in words if word.removeprefix("no-").replace("-", "_") in useless]
    check_rules((not found, f"--mode {mode} makes no use of --{', --'.join(found)}"))


def as_flag(name: str, *value: Any) -> str:
    """An argument, and its value if one is given, as it is said on the command line."""
    flag = name.replace("_", "-")
    if not value:
        return f"--{flag}"
    if isinstance(value[0], bool):
        return f"--{flag}" if value[0] else f"--no-{flag}"
    return f"without --{flag}" if value[0] is None else f"--{flag} {value[0]}"


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with one sentence for a mistake of the user and for a Ctrl-C before or after the loop."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; a run goes on from its last whole checkpoint with --resume, if it has one", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
