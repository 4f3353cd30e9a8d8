"""The folder of a run while it is trained: its lock, its arguments, and the signals that end it.

with RunFolder(path, settings) as folder, Signals() as signals:
    folder.begin()                                        # from here on it holds a run: args.json is written
    while not signals:
        ...
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import jax
import numpy as np

from tdmpc2_support.agents.pretrained import read_record
from tdmpc2_support.cli import MAY_CHANGE, as_flag, saved_fields
from tdmpc2_support.devices import any_process
from tdmpc2_support.errors import UserError, writing
from tdmpc2_support.files import write_atomically
from tdmpc2_support.processes import SIGNALS
from tdmpc2_support.run.checkpoints import complete_checkpoints, read_meta
from tdmpc2_support.run.reports import film_path

BEFORE = {"sample": "windows"}  # what was fixed before it became an argument
BEFORE_OF_PIXELS = {"obs": "rgb", "state_keys": None}  # the same of tdmpc2_jax_rgb.py
OF_ONE_START = "resume runs_dir distributed coordinator num_processes process_id".split()  # given anew to every one
NOT_IN_SHAPES = "vmin vmax simnorm_dim log_std_min log_std_max".split()  # of networks, with which they have learned
WRITTEN = "args.json eval.csv .wandb_run_id events.out.tfevents.* videos wandb checkpoints".split()  # in the folder
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks


class RunFolder:
    """A run's folder: a context manager that holds its lock, so that no other process trains there.

    Args:
        path: the folder.
        settings: the run's arguments by name (`cli.settings`). When the run is resumed, those may differ from the ones
            it was started with that may_change names.
        primary: whether this process writes files (one of several does).

    Raises:
        UserError: on entering, if the folder is in use, holds a run that is not to be resumed or was started with other
            arguments, or cannot be written.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], primary: bool = True, may_change: frozenset[str] = MAY_CHANGE
    ):
        self.path = path
        self.settings = settings
        self.primary = primary
        self.may_change = may_change
        self._lock: TextIO | None = None
        self._refused = False  # by a live run: the folder is left as it is
        self._found: set[Path] = set()  # what lay there before
        self.learned = False  # set when there is something to keep without a checkpoint: curves of learning

    def __enter__(self) -> "RunFolder":
        if not self.primary:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._found = set(self.path.iterdir())
            self._take_lock()
            self._check()
        except OSError as error:
            self._clean_up(failed=not self.holds_run)
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        except UserError:
            self._clean_up(failed=not self.holds_run)
            raise
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        saved = bool(complete_checkpoints(self.path))
        if self.primary and saved and isinstance(value, UserError) and "checkpoint" not in str(value):
            print(f"{self.path} stops here; its last checkpoint is kept", file=sys.stderr)
        learned = saved or self.learned or self._last_row() > 0
        self._clean_up(failed=not learned and (kind is not None or not self.holds_run))

    def _last_row(self) -> int:
        """Step of the last evaluation that stands in eval.csv, 0 if there is none."""
        try:
            rows = (self.path / "eval.csv").read_text().splitlines()[1:]
            return int(float(rows[-1].split(",")[0])) if rows else 0
        except (OSError, ValueError):
            return 0

    @property
    def holds_run(self) -> bool:
        """Whether a run that got anywhere is here: with a checkpoint, or a row in its curve."""
        if complete_checkpoints(self.path):
            return True
        try:
            return len((self.path / "eval.csv").read_bytes().splitlines()) > 1
        except FileNotFoundError:
            return False
        except OSError:  # whatever it is, it is not to be written over
            return True

    def begin(self) -> None:
        """From here on the folder is a run's: writes args.json."""
        if self.primary:
            with writing(self.path):
                write_atomically(self.path / "args.json", json.dumps(self.settings, indent=2))

    def _take_lock(self) -> None:
        """Opens `.lock` and locks it until the process ends, however it does."""
        path = self.path / ".lock"
        while True:
            self._lock = open(path, "w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._refused = True
                raise UserError(f"{self.path} is in use by a live run; choose another --exp-name or --seed") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"{self.path} lies where files cannot be locked: start no second run there", file=sys.stderr)
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(path)):
                    return
            self._lock.close()  # between opening and locking, a start that was refused has removed the file

    def _check(self) -> None:
        resume = self.settings.get("resume")
        if resume and not complete_checkpoints(self.path):
            print(f"--resume finds no checkpoint in {self.path}: a new run begins{self._others()}", file=sys.stderr)
        if not self.holds_run:
            return
        if not resume:
            raise UserError(f"{self.path} holds a run; go on with --resume, or choose another --exp-name or --seed")
        before = started_with(self.path)
        if "state_keys" in self.settings:  # only tdmpc2_jax_rgb.py has it
            before = BEFORE_OF_PIXELS | before
        fixed = {name: value for name, value in self.settings.items() if name not in self.may_change}
        changed = [name for name, value in fixed.items() if before.get(name, value) != value]
        if changed:
            flags = ", ".join(as_flag(name, before[name]) for name in changed)
            raise UserError(f"--resume continues a run as it was started: {flags}")

    def _others(self) -> str:
        """Runs of other seeds or names that may have been meant, as the end of a sentence."""
        runs = {
            path.parent for path in self.path.parent.parent.glob("*/*/checkpoints") if complete_checkpoints(path.parent)
        }
        shown = ", ".join(map(str, sorted(runs)[:3]))
        return f"; there is {shown}{', …' if len(runs) > 3 else ''}" if runs else ""

    def _clean_up(self, failed: bool) -> None:
        """Releases the lock. A start that failed before it learned leaves nothing behind: no files of its own, neither
        its lock nor empty folders. What it has found stays."""
        if self.primary and failed and not self._refused and self.path.is_dir():
            with contextlib.suppress(OSError):  # the first folder that is not empty
                for pattern in WRITTEN:
                    for path in {*self.path.glob(pattern)} - self._found:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                (self.path / ".lock").unlink(missing_ok=True)  # while it is locked: see _take_lock
                for folder in (self.path, *self.path.parents[:2]):
                    folder.rmdir()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def started_with(folder: Path) -> dict[str, Any]:
    """The settings of a run: those of args.json, but what defines the agent as the newest checkpoint has it, and all of
    them if that file is damaged or gone.

    Raises:
        UserError: neither can be read.
    """
    record: Any = None
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "args.json").read_text("utf-8-sig"))
    record = record if isinstance(record, dict) else {}
    for checkpoint in complete_checkpoints(folder):
        with contextlib.suppress(UserError):
            meta = read_meta(checkpoint)
            record |= {k: v for k, v in meta["args"].items() if k not in MAY_CHANGE or k not in record}
            break
    if record.get("physics") == "auto":  # of earlier versions, which did not say what that was
        del record["physics"]
    if record:
        return BEFORE | record
    raise UserError(
        f"{folder}/args.json cannot be read, nor a checkpoint: the run cannot be continued as it was started"
    )


def recorded_settings(
    args: Any,
    run_folder: Callable[[Any], Path],
    scripts: tuple[str, ...],
    of_run: tuple[str, ...] = ("task",),
    gone: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an earlier run has recorded of the arguments that the command line leaves out: all of them if --resume
    continues it; if --evaluate takes its agent, those of the agent and of_run; if another run begins with its agent,
    those that say what its networks' numbers mean.

    Args:
        args: has the fields agent, evaluate, checkpoint, resume and perhaps source_task.
        run_folder: called with args, returns the run's folder.
        scripts: whose agents --evaluate takes.
        of_run: arguments beside the agent's that an evaluation takes from the agent's run.
        gone: arguments that earlier versions had, and the values at which they did what is done now.

    Raises:
        UserError: the agent or the run's record cannot be read, or has another value of an argument that is gone.
    """
    record = _recorded(args, run_folder, scripts)
    other = [as_flag(name, record[name]) for name, value in (gone or {}).items() if record.get(name, value) != value]
    if other:
        raise UserError(f"the run was made with {', '.join(other)}, which this version does not have")
    if args.evaluate:
        wanted = {field.name for field in saved_fields(type(args.agent))} | {*of_run}
        record = {name: value for name, value in record.items() if name in wanted}
        if getattr(args, "source_task", None):
            record["task"] = args.source_task
    return record


def _recorded(args: Any, run_folder: Callable[[Any], Path], scripts: tuple[str, ...]) -> dict[str, Any]:
    if args.evaluate:
        if args.capture_video:
            film_path(args.checkpoint)  # refused here rather than after all episodes
        return read_record(args.checkpoint, *scripts)["args"]
    if args.resume:
        folder = RunFolder(run_folder(args), {})
        record = {}
        with contextlib.ExitStack() as stack:
            if not folder.holds_run:  # at most one that has only begun
                stack.enter_context(contextlib.suppress(UserError))
            record = started_with(folder.path)
        if record:
            return {name: value for name, value in record.items() if name not in OF_ONE_START}
    if args.checkpoint:
        record = {}
        with contextlib.suppress(UserError):  # whoever reads all of it tells
            record = read_record(args.checkpoint, *scripts)["args"]
        return {name: value for name, value in record.items() if name in NOT_IN_SHAPES}
    return {}


class Signals:
    """Notes what asks a run to end, so that its loop can end in order: a context manager, true from then on.

    All signals but Ctrl-C may come any number of times: schedulers send several. A second Ctrl-C, when a second has
    passed since the first, does not wait any longer. Under nohup the end of the terminal is no reason to stop.
    """

    NUMBERS = SIGNALS

    def __init__(self) -> None:
        self.received: int | None = None  # the first one's number
        self.problem: UserError | None = None  # another reason to end
        self._interrupted: float | None = None  # when the first Ctrl-C came
        self._before: dict[int, Any] = {}
        self._calls = 0  # of in_any_process
        self._agreed = False  # what it has returned last

    def __enter__(self) -> "Signals":
        for number in self.NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None or self.problem is not None

    def stop(self, problem: UserError) -> None:
        """Asks for the end in order for another reason, such as a curve that cannot be written."""
        self.problem = self.problem or problem

    def in_any_process(self, now: bool = False) -> bool:
        """Whether a signal has come to any of several processes, which all must ask at the same time; from then on this
        one is true in all of them. To ask the others takes as long as an update: where there are any, only every
        twentieth call does, or one for `now`."""
        self._calls += 1
        if jax.process_count() > 1 and not now and self._calls % 20:
            return self._agreed
        self._agreed = any_process(self)
        if self._agreed and self.received is None:
            self.received = signal.SIGTERM
        return self._agreed

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is not None and now - self._interrupted > 1:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or now

    def exit_if_received(self, where: str, primary: bool = True, saved: bool = True) -> None:
        """Ends the process with the status that shells give to a signal, if one has come.

        Args:
            where: the run stopped, as "simulator step 1000".
            primary: whether this process says so.
            saved: whether there was something to save.

        Raises:
            UserError: there was another reason.
        """
        goes_on = "--resume continues the run" if saved else "nothing was saved yet"
        if self.problem is not None:
            raise UserError(f"{self.problem}; stopped at {where}, {goes_on}") from self.problem
        if self.received is None:
            return
        if primary:
            print(f"stopped by {signal.Signals(self.received).name} at {where}; {goes_on}", file=sys.stderr)
        sys.exit(128 + self.received)


def check_finite(folder: Path, where: str, **values: Any) -> None:
    """Stops the run with a UserError when a number that it lives on is no longer one.

    Args:
        folder: the run's.
        where: as "simulator step 1000".
        values: arrays of this process by their names.
    """
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    if bad:
        kept = "its last checkpoint is kept" if complete_checkpoints(folder) else "no checkpoint was written yet"
        raise UserError(f"{bad[0]} is not finite at {where}: {folder} stops here; {kept}")
