"""What keeps a run: its folder and lock, arguments, checkpoints, curves, trackers, videos, progress and signals.

    with Run(folder, dataclasses.asdict(args), script="my_fork", ...) as run:
        envs = run.enter(make_envs(...))                      # closed with the run, however it ends
        state, replay = run.start(state=..., replay=...)      # from the last whole checkpoint, or made anew
        run.begin(title, ...)
        while not run.stop:                                   # a SIGINT or SIGTERM has come
            run.save(step, sizes, state=..., replay=...)

Everything goes to one folder: `args.json`, `eval.csv`, TensorBoard events, `checkpoints/`, `videos/`. A run that was
killed at any moment goes on from its last whole checkpoint. Nothing here knows a script: values and pytrees come in.
"""

import contextlib
import csv
import errno
import fcntl
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from tdmpc2_support.cli import as_flag
from tdmpc2_support.devices import shapes_on
from tdmpc2_support.envs.tasks import TaskSpec
from tdmpc2_support.errors import UserError
from tdmpc2_support.run.checkpoints import complete_checkpoints, read_checkpoint, read_meta, write_checkpoint
from tdmpc2_support.run.reports import Evaluation, write_atomically, write_video


class Run:
    """A run's folder while it is trained: a context manager that holds its lock and closes what was entered.

    Args:
        folder: of the run.
        args: its arguments, for args.json and the trackers. When it is resumed those from exp_name on may differ, but
            for checkpoint, source_task and world_model, and `free` ones.
        script: name of the script, which its checkpoints carry.
        columns: of eval.csv; the first is the step.
        axis: what steps are called in sentences.
        primary: whether this process writes files (one of several does).

    Raises:
        UserError: on entering, if the folder is in use, holds a run that is not to be resumed or was started with other
            arguments, or cannot be written.
    """

    def __init__(
        self, folder: Path, args: dict[str, Any], script: str, columns: tuple[str, ...],
        axis: str = "simulator step", primary: bool = True, free: tuple[str, ...] = (),
    ):  # fmt: skip
        self.folder, self.args, self.script, self.columns, names = folder, args, script, columns, [*args]
        self.free = {*names[names.index("exp_name") :], *free} - {"checkpoint", "source_task", "world_model"}
        self.axis, self.primary, self.stop = axis, primary, []  # stop: signals that have come
        self.count = {"decisions": 0, "updates": 0, "evaluated": -1, "seconds": 0.0}  # what checkpoints count
        self.step = self.saved = self.logged = 0
        self._stack, self._manager, self._opened, self._begun = contextlib.ExitStack(), None, False, False

    def open(self) -> "Run":
        """Creates or reopens the folder and takes its lock; entering does that, unless it was done before."""
        if self.primary and not self._opened:
            try:
                self._open_folder()
            except (OSError, UserError) as error:
                self.__exit__(type(error), None, None)
                unwritable = f"{self.folder} cannot be written: {getattr(error, 'strerror', None)}"
                raise UserError(unwritable if isinstance(error, OSError) else str(error)) from None
        self._opened = True
        return self

    def __enter__(self) -> "Run":
        return self.open()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._stack.close()
        if kind is not None and not self._begun and self.primary and not complete_checkpoints(self.folder):
            self._leave_no_trace()
        if kind is None and self.stop:
            if self.primary:
                name = signal.Signals(self.stop[0]).name
                print(f"stopped by {name} at {self.axis} {self.step}; --resume continues the run", file=sys.stderr)
            sys.exit(128 + self.stop[0])

    def enter(self, thing: Any) -> Any:
        """Closes `thing` (by its close method, or as the context manager that it is) when the run ends; returns it."""
        self._stack.enter_context(thing if hasattr(thing, "__exit__") else contextlib.closing(thing))
        return thing

    def _open_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._stack.enter_context(open(self.folder / ".lock", "w"))  # held until the process ends, however
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._begun = True  # by another process
            raise UserError(f"{self.folder} is in use by a live run; choose another --exp-name or --seed") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{self.folder} lies where files cannot be locked: start no second run there", file=sys.stderr)
        if (self.folder / "eval.csv").exists():
            if not self.args.get("resume"):
                raise UserError(
                    f"{self.folder} holds a run; go on with --resume, or choose another --exp-name or --seed"
                )
            before = json.loads((self.folder / "args.json").read_text())
            changed = [k for k, v in self.args.items() if k not in self.free and before.get(k, v) != v]
            if changed:
                flags = ", ".join(as_flag(k, before[k]) for k in changed)
                raise UserError(f"--resume continues a run as it was started: {flags}")

    def _leave_no_trace(self) -> None:
        """Removes what a start that was refused has made: the lock, and folders that are empty without it."""
        if not (self.folder / "eval.csv").exists():
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the first that is not empty
                for folder in (self.folder / "checkpoints", self.folder, *self.folder.parents[:2]):
                    folder.rmdir() if folder.exists() else None

    # ------------------------------------------------------------------------------------------------- Checkpoints
    def read_meta(self) -> dict[str, Any] | None:
        """What the newest checkpoint that can be read says of itself; None if there is none."""
        for checkpoint in complete_checkpoints(self.folder):
            with contextlib.suppress(UserError):  # `restore` tells
                return read_meta(checkpoint, self.script)
        return None

    def restore(self, **like: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What the newest whole checkpoint says of itself, and its items in the structure of `like`; None if there is
        none. A damaged one is put aside, with a sentence, for the one before it."""
        problems = []
        for checkpoint in complete_checkpoints(self.folder):
            try:
                meta = read_meta(checkpoint, self.script)
                items = read_checkpoint(checkpoint, meta, **like)
            except UserError as error:
                problems.append((checkpoint, error))
                continue
            for damaged, error in problems if self.primary else ():
                aside = self.folder / f"damaged-{damaged.name}-{int(time.time())}"
                damaged.rename(aside)
                print(f"{error}; it is kept as {aside.name}, the run goes on from {checkpoint}", file=sys.stderr)
            self.count |= meta["count"]
            return meta, items
        if problems:
            raise UserError("; ".join(str(error) for _, error in problems))
        return None

    def start(self, places: dict[str, jax.Device] | None = None, **make: Callable[[], Any]) -> list[Any]:
        """The items of these names in the last whole checkpoint, or what the functions make; on the first device, or
        where `places` says, placed alike, so that what takes them is compiled once."""
        places = dict.fromkeys(make, jax.devices()[0]) | (places or {})
        on = jax.sharding.SingleDeviceSharding
        if restored := self.restore(**{name: shapes_on(on(places[name]), function) for name, function in make.items()}):
            return [restored[1][name] for name in make]
        items = []
        for name, function in make.items():
            with jax.default_device(places[name]):
                items.append(jax.device_put(jax.jit(function)(), places[name]))
        return items

    def save(self, step: int, info: dict[str, Any], meta: dict[str, Any] | None = None, **items: Any) -> None:
        """Writes a checkpoint of pytrees, beside the newest one before it, unless a number of `info` is none any more;
        `meta` (JSON) is what it says of itself beside the script, the arguments and the counters."""
        self.check_finite(step, **jax.device_get(info))
        with self.aside():
            if self._manager is None:
                options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
                self._manager = ocp.CheckpointManager((self.folder / "checkpoints").absolute(), options=options)
                self.enter(self._manager)
            if self.primary:
                self.writer.flush()  # first: a checkpoint must not be ahead of the curves
            self.count["seconds"] = self.seconds()
            meta = {"script": self.script, "args": self.args, "count": self.count} | (meta or {})
            write_checkpoint(self._manager, step, meta, **items)
        self.saved = self.step = step

    def check_finite(self, step: int, **values: Any) -> None:
        """Stops the run with a UserError when a number that it lives on is no longer one."""
        bad = [name for name, value in values.items() if not np.isfinite(value).all()]
        if bad:
            kept = (
                "its last checkpoint is kept" if complete_checkpoints(self.folder) else "no checkpoint was written yet"
            )
            raise UserError(f"{bad[0]} is not finite at {self.axis} {step}: {self.folder} stops here; {kept}")

    # ------------------------------------------------------------------------------------------- Curves and progress
    def begin(self, title: str, table_head: str, params: Any, step: int, total: int) -> None:
        """From here on the folder holds a run: writes args.json, drops points of the curves beyond those that `count`
        knows, prints title and table head, opens a progress bar (on a terminal), and catches SIGINT and SIGTERM."""
        self.step = self.saved = self.logged = step
        self._begun, self._tick, self._clock = True, time.time(), time.time() - self.count["seconds"]
        if self.primary:
            write_atomically(self.folder / "args.json", json.dumps(self.args, indent=2))
            path, first = self.folder / "eval.csv", self.columns[0]
            rows = list(csv.DictReader(path.open())) if path.exists() else []
            rows = [row for row in rows if None not in row.values() and int(row[first]) <= self.count["evaluated"]]
            lines = [self.columns, *([row[name] for name in self.columns] for row in rows)]
            write_atomically(path, "".join(",".join(line) + "\n" for line in lines))
            self.writer = self.enter(self._start_writer(step))
            size, devices = sum(x.size for x in jax.tree.leaves(params)) / 1e6, jax.devices()
            where = f"on {f'{len(devices)} x ' * (len(devices) > 1)}{devices[0].device_kind}"
            print(f"{title}, {size:.1f}M parameters, {where}; from {self.axis} {step}, in {self.folder}")
            if step >= total:
                more = ": ask for more to go on" if {"total_timesteps", "num_updates"} & self.free else ""
                print(f"all {total} {self.axis}s have been made{more}")
            print(table_head, flush=True)
        hidden = None if self.primary else True
        settings = {"unit": f" {self.axis}s", "mininterval": 1, "disable": hidden, "dynamic_ncols": True}
        self.bar = self.enter(tqdm(total=total, initial=step, **settings))
        self._stack.enter_context(catch_signals(self.stop))

    def seconds(self) -> float:
        """How long the run has taken, in all its sessions."""
        return time.time() - self._clock

    def due(self, step: int, last: int, freq: int, end: bool) -> bool:
        """Whether a multiple of freq lies in (last, step], or the run ends at a step where it was not done."""
        return step // freq > last // freq or (end and last != step)

    @contextlib.contextmanager
    def aside(self, text: str = "", total: int = 0) -> Iterator[Callable[[], bool]]:
        """For what is not learning: its time does not count in charts/SPS. With a text it has a bar of its own. Gives a
        function to be called at every step of it, which says whether to go on."""
        began = time.time()
        with tqdm(total=total, desc=text, leave=False, disable=None if text and self.primary else True) as bar:
            bar.set_postfix_str("compiling ...")
            yield lambda: (bar.set_postfix_str("", refresh=False), bar.update(), not self.stop)[-1]
        self._tick += time.time() - began

    def steps(self, text: str, total: int) -> Iterator[int]:
        """range(total), to its end or to a signal; a long one has a bar of its own."""
        for i in tqdm(range(total), desc=text, leave=False, disable=None if total > 50 and self.primary else True):
            if self.stop:
                break
            yield i

    def advance(self, done: int) -> None:
        """Moves the progress bar to `done`."""
        self.bar.update(min(done, self.bar.total) - self.bar.n)

    def log(self, step: int, scalars: dict[str, Any]) -> None:
        """Adds points to the trackers' curves."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)

    def log_episodes(self, step: int, done: np.ndarray, infos: dict[str, Any]) -> None:
        """Adds points for the episodes that have just ended, as `RecordEpisodeStatistics` tells of them."""
        for i in np.flatnonzero(done):
            returns, length = infos["episode"]["r"][i], infos["episode"]["l"][i]
            self.log(step, {"charts/episodic_return": returns, "charts/episodic_length": length})
            self.bar.set_postfix_str(f"return {returns:.1f}", refresh=False)

    def log_losses(self, step: int, info: dict[str, Any], speed: str = "charts/SPS") -> None:
        """Adds points for the losses (on the device until here) and for steps per second of learning; shows all."""
        values = jax.device_get(info)
        self.check_finite(step, **values)
        if self.primary:
            self.log(step, {f"losses/{name}": value for name, value in values.items()})
            self.log(step, {speed: (step - self.logged) / max(time.time() - self._tick, 1e-9)})
            self.writer.flush()  # for those who watch
        self.logged, self._tick = step, time.time()

    def record(
        self, step: int, line: str, rows: list[list[Any]], scalars: dict[str, Any], frames: list[np.ndarray], fps: int
    ) -> None:
        """Adds an evaluation to the printed table, eval.csv and the trackers, and its film to videos/ and W&B."""
        self.count["evaluated"] = step
        self.bar.write(line)
        sys.stdout.flush()
        with (self.folder / "eval.csv").open("a") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.log(step, scalars)
        if frames:
            path = self.folder / "videos" / f"step-{step:09d}.mp4"
            write_video(path, frames, fps)
            if self.args.get("track"):
                import wandb

                wandb.log({"eval/video": wandb.Video(str(path))})
        self.writer.flush()

    def record_returns(self, step: int, spec: TaskSpec, evaluate: Callable[..., Evaluation | None]) -> None:
        """`record` of what evaluate(seed=..., go_on=...) returns for one task; nothing if a signal comes before."""
        minutes = self.seconds() / 60
        with self.aside(f"evaluating at step {step}", spec.episode_length) as go_on:
            result = evaluate(seed=(self.args["seed"], 1, step), go_on=go_on)
        if result is None:
            return
        returns, successes = result.returns, result.successes
        rate = f"{successes.mean():>7.2f} " if spec.success else ""
        line = f"{step:>10} {rate}{returns.mean():>9.1f} {returns.std():>8.1f} {minutes:>8.1f}"
        rows = [[step, returns.mean(), successes.mean(), self.args["seed"]]]
        scalars = {"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()}
        scalars["eval/success_rate"] = successes.mean()
        self.record(step, line, rows, scalars, result.frames, result.fps)

    def _start_writer(self, step: int) -> SummaryWriter:
        """TensorBoard, and Weights & Biases if asked for, which copies what TensorBoard gets."""
        if self.args.get("track"):
            import wandb

            name = "__".join(self.folder.parts[-3:])
            run_id = re.sub(r"[^\w-]", "-", f"{name}-{self.folder.stat().st_ino}")  # the same when it is resumed
            names = {"project": self.args["wandb_project_name"], "entity": self.args["wandb_entity"], "name": name}
            wandb.init(**names, id=run_id, config=self.args, resume="allow", sync_tensorboard=True, dir=self.folder)
        writer = SummaryWriter(str(self.folder))
        events = writer.file_writer.event_writer
        events.add_event = events._ev_writer.write_event  # not by its queue, which flush and close do not wait for
        purge = Event(session_log=SessionLog(status=SessionLog.START))
        writer.file_writer.add_event(purge, step + 1 if step else 0)  # points beyond the step are dropped
        rows = "\n".join(f"|{name}|{value}|" for name, value in self.args.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", step)
        return writer


@contextlib.contextmanager
def catch_signals(received: list[int]) -> Iterator[None]:
    """Lists the SIGINTs and SIGTERMs that come, so that the loop can end in order; a second one ends it at once."""

    def handler(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)
