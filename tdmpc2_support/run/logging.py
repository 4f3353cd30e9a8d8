"""The curves of a run: eval.csv, TensorBoard events, Weights & Biases, the printed table and the progress bar.

with Logger(folder, RETURNS_COLUMNS) as logger:
    logger.begin(title, table_head, params, step, total, count)
    logger.log_losses(step, info)
    with logger.paused("evaluating", total=500) as advance:
        ...
    logger.record_returns(step, spec, evaluation)
"""

import contextlib
import errno
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from tdmpc2_support.backend import graph_options
from tdmpc2_support.envs.tasks import TaskSpec, task_spec
from tdmpc2_support.errors import UserError, one_line
from tdmpc2_support.files import write_atomically
from tdmpc2_support.run.folder import RunFolder, Signals, check_finite
from tdmpc2_support.run.reports import Evaluation, SetEvaluation, headline, summary
from tdmpc2_support.run.video import side_by_side, write_video


class Logger:
    """Curves, table and progress of a run: a context manager.

    Args:
        folder: the run's.
        columns: of eval.csv; the first is the step.
        unit: what steps are called in sentences.
        label: what printed rows begin with, where several runs share a terminal.
        shown: whether there is a title and a progress bar; of several runs the first has them.
        signals: what the loop asks whether it is to end: it is, with a checkpoint, once a file cannot be written.

    Raises:
        UserError: a file cannot be written: in `begin`, and without signals in every method that writes.
    """

    def __init__(
        self,
        folder: RunFolder,
        columns: tuple[str, ...],
        unit: str = "simulator step",
        label: str = "",
        shown: bool = True,
        signals: Signals | None = None,
    ):
        self._run = folder
        self.folder = folder.path
        self.settings = folder.settings
        self.may_change = folder.may_change
        self.primary = folder.primary  # whether this process shows and writes anything
        self.columns = columns
        self.unit = unit
        self.label = label
        self.shown = shown and folder.primary
        self.signals = signals
        self.logged = 0  # step at which losses were last logged
        self._stack = contextlib.ExitStack()
        self._events: EventFile | None = None
        self._wandb: Any = None
        self._first_returns: list[float] = []

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._stack.close()
        if self._wandb is not None:
            with self._wandb_trouble():
                self._wandb.finish(exit_code=0 if kind is None else 1)

    def begin(self, title: str, table_head: str, params: Any, step: int, total: int, count: dict[str, Any]) -> None:
        """Opens the curves, prints title and head of the table, and shows a progress bar (on a terminal). Points and
        rows beyond those that the last checkpoint knows of are dropped.

        Args:
            title: what is trained.
            params: whose size is printed.
            step: where the run is.
            total: where it ends.
            count: the run's counters: "evaluated", step of the last evaluation, and "seconds" that the run has taken.
        """
        self.logged = step
        self._total = total
        self._tick = time.time()
        self._began = time.time() - count["seconds"]
        self._count = count
        self._evaluated = count["evaluated"]  # the last evaluation that is in eval.csv
        if self.primary:
            with self._unwritable(beginning=True):
                self._drop_rows_after(count["evaluated"])
                self._events = self._stack.enter_context(EventFile(self.folder))
                self._events.restart_at(step + 1 if step else 0)
                rows = "\n".join(f"|{name}|{value}|" for name, value in self.settings.items())
                self._events.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", step)
            if self.settings.get("track"):
                self._start_wandb()
        if self.shown:
            self._print_title(title, table_head, params, step)
        options = {"unit": f" {self.unit}s", "mininterval": 1, "dynamic_ncols": True}
        bar = tqdm(total=total, initial=step, disable=None if self.shown else True, **options)
        self._bar = self._stack.enter_context(bar)

    def _print_title(self, title: str, table_head: str, params: Any, step: int) -> None:
        size = sum(x.size for x in jax.tree.leaves(params)) / 1e6
        devices = jax.devices()
        where = devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"
        if graph_options():
            where += " with kernels side by side in CUDA graphs"
        print(f"{title}, {size:.1f}M parameters, on {where}; from {self.unit} {step}, in {self.folder}")
        if step >= self._total:
            lengths = {"total_timesteps", "num_updates"} & self.settings.keys() & self.may_change
            more = ": ask for more to go on" if lengths else ""
            print(f"all {self._total} {self.unit}s have been made{more}")
        print(table_head, flush=True)

    # ------------------------------------------------------------------------------------------------------- Progress
    def seconds(self) -> float:
        """How long the run has taken, in all its sessions."""
        return time.time() - self._began

    @contextlib.contextmanager
    def paused(self, text: str = "", total: int = 0) -> Iterator[Callable[[], None]]:
        """For what is not learning: its time does not count in the speed of learning. With a text it has a bar of
        `total` steps of its own, which the function that it yields advances."""
        began = time.time()
        with tqdm(total=total, desc=text, leave=False, disable=None if text and self.primary else True) as bar:
            bar.set_postfix_str("compiling ...")

            def advance() -> None:
                bar.set_postfix_str("", refresh=False)
                bar.update()

            yield advance
        self._tick += time.time() - began

    def with_bar(self, text: str, items: Iterable[Any]) -> Iterator[Any]:
        """The items; many of them get a bar of their own."""
        items = list(items)
        hidden = None if len(items) > 50 and self.primary else True
        return iter(tqdm(items, desc=text, leave=False, disable=hidden))

    def advance(self, step: int) -> None:
        """Moves the progress bar to this step."""
        self._bar.update(min(step, self._total) - self._bar.n)

    # --------------------------------------------------------------------------------------------------------- Curves
    def log(self, step: int, scalars: dict[str, Any]) -> None:
        """Adds points to the trackers' curves."""
        if self._events is None:
            return
        with self._unwritable():
            self._events.add_scalars(scalars, step)
        if self._wandb is not None:
            with self._wandb_trouble():
                self._wandb.log({name: float(value) for name, value in scalars.items()} | {"global_step": step})

    def log_episodes(self, step: int, done: np.ndarray, infos: dict[str, Any]) -> None:
        """Adds points for the episodes that have just ended, as `RecordEpisodeStatistics` describes them."""
        for i in np.flatnonzero(done):
            episode_return = infos["episode"]["r"][i]
            length = infos["episode"]["l"][i]
            self.log(step, {"charts/episodic_return": episode_return, "charts/episodic_length": length})
            self._bar.set_postfix_str(f"return {episode_return:.1f}", refresh=False)
            self._note_tiny(abs(float(episode_return)))

    def _note_tiny(self, episode_return: float) -> None:
        """Says so if the returns of the first ten episodes can teach nothing."""
        if len(self._first_returns) >= 10:
            return
        self._first_returns.append(episode_return)
        if len(self._first_returns) < 10:
            return
        largest = max(self._first_returns)
        if largest == min(self._first_returns):
            self._bar.write(f"the first ten episodes have the same return, {largest:.4g}: nothing to learn from so far")
        elif largest < 1e-3:
            self._bar.write(f"returns so far are at most {largest:.1g}, too little to be learned: scale the rewards")

    def log_losses(self, step: int, info: dict[str, Any], speed: str = "charts/SPS") -> None:
        """Adds points for the losses (on the device until here) and for steps per second of learning."""
        values = jax.device_get(info)
        check_finite(self.folder, f"{self.unit} {step}", **values)
        scalars = {f"losses/{name}": value for name, value in values.items()}
        scalars[speed] = (step - self.logged) / max(time.time() - self._tick, 1e-9)
        self.log(step, scalars)
        self._run.learned = self._run.learned or bool(values)
        self.logged = step
        self._tick = time.time()

    # ---------------------------------------------------------------------------------------------------- Evaluations
    def record_returns(self, step: int, spec: TaskSpec, result: Evaluation) -> None:
        """Adds an evaluation in one task to the printed table, eval.csv, the trackers and the films."""
        returns = result.returns
        successes = result.successes
        rate = f"{successes.mean():>7.2f} " if spec.success else ""
        line = f"{step:>10} {rate}{returns.mean():>9.1f} {returns.std():>8.1f} {self.seconds() / 60:>8.1f}"
        row = [step, returns.mean(), successes.mean(), self.settings["seed"]]
        scalars = {
            "eval/episodic_return": returns.mean(),
            "eval/episodic_return_std": returns.std(),
            "eval/success_rate": successes.mean(),
        }
        self._record(step, line, [row], scalars, result.frames, result.fps)

    def record_scores(self, step: int, result: SetEvaluation) -> None:
        """Adds an evaluation in several tasks to the printed table, eval.csv, the trackers and the films."""
        results = summary(result)
        rows = []
        scalars = {"eval/normalized_score": results["normalized_score"]}
        for task, returns, successes in zip(result.tasks, result.returns, result.successes, strict=True):
            rows.append([step, task, returns.mean(), successes.mean(), self.settings["seed"]])
            scalars[f"eval/score/{task}"] = results["tasks"][task]["score"]
        for domain, row in results["domains"].items():
            scalars[f"eval/mean/{domain}"] = row["mean"]
        line = f"{step:>10} {self.seconds() / 60:>8.1f}  {headline(results)}"
        self._record(step, line, rows, scalars, result.frames, result.fps)

    def record_evaluations(self, step: int, tasks: tuple[str, ...], results: Sequence[Evaluation]) -> None:
        """`record_returns` of an evaluation in one task, `record_scores` of those in each of several; by eval.csv."""
        if "task" not in self.columns:
            self.record_returns(step, task_spec(tasks[0]), results[0])
            return
        returns = np.stack([result.returns for result in results])
        successes = np.stack([result.successes for result in results])
        frames = side_by_side([result.frames for result in results])
        self.record_scores(step, SetEvaluation(tasks, returns, successes, frames, results[0].fps))

    def _record(
        self, step: int, line: str, rows: list[list], scalars: dict[str, Any], frames: list[np.ndarray], fps: int
    ) -> None:
        if not self.primary:
            return
        self._bar.write(self.label + line)
        sys.stdout.flush()
        self._count["evaluated"] = self._evaluated  # an evaluation that is not written is made again
        with self._unwritable():
            append(self.folder / "eval.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
            self._count["evaluated"] = self._evaluated = step
        self.log(step, scalars)
        if not frames:
            return
        path = self.folder / "videos" / f"step-{step:09d}.mp4"
        with self._unwritable():
            write_video(path, frames, fps)
        if self._wandb is not None and path.exists():
            import wandb

            with self._wandb_trouble():
                self._wandb.log({"eval/video": wandb.Video(str(path)), "global_step": step})

    def _drop_rows_after(self, last: int) -> None:
        """Drops the rows of eval.csv after this step, and half written ones; keeps a copy if others cannot be read."""
        path = self.folder / "eval.csv"
        rows: list[dict[str, str]] = []
        if path.exists():
            rows, whole = read_rows(path, self.columns)
            if not whole:
                copy = self.folder / f"damaged-{int(time.time())}-eval.csv"
                shutil.copyfile(path, copy)
                print(f"{path} has rows or columns that are not of a run; as it was, it is kept as {copy.name}")
        rows = [row for row in rows if int(float(row[self.columns[0]])) <= last]
        lines = [self.columns, *([row[name] for name in self.columns] for row in rows)]
        write_atomically(path, "".join(",".join(line) + "\n" for line in lines))

    def _start_wandb(self) -> None:
        """Joins Weights & Biases: the same run there when this one is resumed, by a name kept in the folder."""
        import wandb

        path = self.folder / ".wandb_run_id"
        if not path.exists() or not path.read_text(errors="replace").isalnum():
            write_atomically(path, uuid.uuid4().hex)
        names = {"project": self.settings["wandb_project_name"], "entity": self.settings["wandb_entity"]}
        name = "__".join(self.folder.parts[-3:])
        try:
            self._wandb = wandb.init(
                **names, name=name, id=path.read_text(), config=self.settings, resume="allow", dir=self.folder
            )
        except wandb.Error as error:
            raise UserError(f"--track: Weights & Biases says: {one_line(error)}") from error
        self._wandb.define_metric("*", step_metric="global_step")

    @contextlib.contextmanager
    def _wandb_trouble(self) -> Iterator[None]:
        """No fault of a tracker somewhere else ends a run, whose curves are here, too."""
        try:
            yield
        except Exception as error:
            self._wandb = None
            print(f"Weights & Biases gets no more of this run: {one_line(error)}", file=sys.stderr)

    @contextlib.contextmanager
    def _unwritable(self, beginning: bool = False) -> Iterator[None]:
        """Turns what the system says of a file that cannot be written into a sentence, and into an end in order."""
        try:
            yield
        except OSError as error:
            problem = UserError(f"{error.filename or self.folder} cannot be written: {error.strerror}")
            if beginning or self.signals is None:
                raise problem from error
            self.signals.stop(problem)


def append(path: Path, text: str) -> None:
    """Adds a text to a file, all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        data = text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def read_rows(path: Path, columns: Sequence[str]) -> tuple[list[dict[str, str]], bool]:
    """The rows of a table that a run has written and others perhaps edited since, with whatever separators; and whether
    all of it could be read. A last row that was cut off counts as one that was not written."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    if not lines:
        return [], True
    names, separator = [], ","
    for separator in (",", ";", "\t"):
        names = [name.strip(' "').lower() for name in lines[0].split(separator)]
        if {*columns} <= {*names}:
            break
    rows = []
    for line in lines[1:]:
        values = [value.strip(' "') for value in line.split(separator)]
        if separator != ",":
            values = [value.replace(",", ".") for value in values]  # such a program writes numbers so, too
        row = dict(zip(names, values, strict=False))
        if len(values) == len(names) and {*columns} <= {*row} and is_step(row[columns[0]]):
            rows.append(row)
    filled = [line for line in lines[1:] if line.strip(separator + " ")]
    return rows, len(rows) == len(filled) and len(names) == len(columns)


def is_step(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


class EventFile:
    """A file of TensorBoard events, each written when it is added: a context manager."""

    def __init__(self, folder: Path):
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file: IO[bytes] = open(folder / name, "wb")
        self._writer = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said when it was added
            self._file.close()

    def restart_at(self, step: int) -> None:
        """Points of earlier files from this step on are no longer shown."""
        self._add(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(self, scalars: dict[str, Any], step: int) -> None:
        """Adds a point to each curve, by its tag."""
        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Adds a text in Markdown."""
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=kind, tensor=tensor)
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def _add(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._file.flush()
