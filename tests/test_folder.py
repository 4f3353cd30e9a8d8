"""The folder of a run: who may train in it, what a start that is refused leaves, and signals that end a run."""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import read_scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from tdmpc2_support.envs.tasks import task_spec
from tdmpc2_support.errors import UserError
from tdmpc2_support.run import folder as module
from tdmpc2_support.run.checkpoints import Checkpoints
from tdmpc2_support.run.folder import RunFolder, Signals, recorded_settings, started_with
from tdmpc2_support.run.logging import Logger, append
from tdmpc2_support.run.reports import Evaluation

SETTINGS = {"task": "x", "lr": 1.0, "seed": 1, "total_timesteps": 10, "resume": False}


def begun(path, **changed):
    """A folder of a run that has ended, with a checkpoint."""
    with RunFolder(path, SETTINGS | changed) as folder, Checkpoints(folder, "x") as checkpoints:
        folder.begin()
        checkpoints.save(1, {"decisions": 1})
    return path


def start(path, **changed):
    """Enters the folder and leaves it before a run begins."""
    with RunFolder(path, SETTINGS | changed):
        pass


def test_a_folder_without_its_curve_is_a_run_all_the_same(tmp_path):
    path = begun(tmp_path / "run")
    assert not (path / "eval.csv").exists()
    with pytest.raises(UserError, match="holds a run; go on with --resume"):
        start(path)
    with pytest.raises(UserError, match="--resume continues a run as it was started: --lr 1.0"):
        start(path, resume=True, lr=2.0)
    start(path, resume=True)


def test_a_resumed_run_may_differ_in_what_does_not_define_it(tmp_path):
    path = begun(tmp_path / "run", eval_freq=1, save_episodes=None)
    start(path, resume=True, total_timesteps=20, eval_freq=3, save_episodes="data")


def test_a_run_whose_record_does_not_say_which_physics_it_had_goes_on_with_that_of_this_machine(tmp_path):
    path = begun(tmp_path / "run", physics="auto")
    start(path, resume=True, physics="jax")
    with pytest.raises(UserError, match="--physics warp"):
        start(begun(tmp_path / "other", physics="warp"), resume=True, physics="jax")


def test_a_resumed_run_takes_what_it_was_started_with_but_not_the_processes_of_that_start(tmp_path):
    path = begun(tmp_path / "run", distributed=True, coordinator="host:1", num_processes=2, process_id=0)
    args = SimpleNamespace(resume=True, evaluate=False, checkpoint=None)
    record = recorded_settings(args, lambda args: path, ("x",))
    assert record.items() >= {"task": "x", "lr": 1.0, "seed": 1, "total_timesteps": 10}.items()
    assert not record.keys() & {"distributed", "coordinator", "num_processes", "process_id"}


def test_a_run_that_begins_with_an_agent_takes_what_its_networks_numbers_mean(tmp_path, monkeypatch):
    saved = {"args": {"vmin": -5.0, "simnorm_dim": 4, "lr": 1.0, "model_size": 1, "task": "y"}}
    monkeypatch.setattr(module, "read_record", lambda path, *scripts: saved)
    for resume in (False, True):  # one that has not begun
        args = SimpleNamespace(resume=resume, evaluate=False, checkpoint="agent")
        found = recorded_settings(args, lambda args: tmp_path / "run", ("x",))
        assert found == {"vmin": -5.0, "simnorm_dim": 4}


@pytest.mark.parametrize("content", ["", '{"lr": 1.0, ', "[]", "{}", '{"lr": null}', "\xff\x00", None])
def test_a_damaged_record_of_arguments_is_taken_from_the_newest_checkpoint(tmp_path, content):
    path = begun(tmp_path / "run")
    (path / "args.json").unlink()
    if content is not None:
        (path / "args.json").write_text(content, "latin-1")
    assert started_with(path)["lr"] == 1.0
    start(path, resume=True)
    with pytest.raises(UserError, match="--lr 1.0"):
        start(path, resume=True, lr=2.0)
    with RunFolder(path, SETTINGS | {"resume": True}) as folder:
        folder.begin()
    assert json.loads((path / "args.json").read_text())["lr"] == 1.0, "it is made again"
    shutil.rmtree(path / "checkpoints")
    (path / "args.json").write_text("")
    with pytest.raises(UserError, match="args.json cannot be read, nor a checkpoint"):
        started_with(path)


def test_a_run_of_before_windows_were_drawn_by_episodes_draws_them_as_it_did(tmp_path):
    assert started_with(begun(tmp_path / "run"))["sample"] == "windows"


def test_a_run_that_fails_before_it_has_learned_leaves_nothing(tmp_path):
    path = tmp_path / "task" / "name" / "1"
    for learned in (False, "losses", "a row"):
        with pytest.raises(UserError, match="^x$"), RunFolder(path, SETTINGS) as folder:
            folder.begin()
            logger = Logger(folder, ("step", "reward"))
            with logger:
                logger.begin("title", "head", {}, 0, 100, {"seconds": 0.0, "evaluated": -1})
                if learned == "losses":
                    logger.log_losses(10, {"loss": 1.0})
                if learned == "a row":
                    append(path / "eval.csv", "10,1.0\n")
                raise UserError("x")
        assert [*tmp_path.iterdir()] == ([tmp_path / "task"] if learned else [])
        if learned:
            assert {"args.json", "eval.csv"} < {file.name for file in path.iterdir()}
            shutil.rmtree(tmp_path / "task")


def test_a_failed_start_leaves_the_curves_and_films_that_it_has_found(tmp_path):
    """Those of a run that was killed before its first checkpoint."""
    path = tmp_path / "run"
    (path / "videos").mkdir(parents=True)
    found = path / "videos" / "step-000000000.mp4", path / "events.out.tfevents.1.x", path / "eval.csv"
    for file in found:
        file.write_text("step,reward\n0,1.0\n")
    (path / "args.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(UserError, match="after it began"), RunFolder(path, SETTINGS | {"resume": True}) as folder:
        folder.begin()
        (path / "events.out.tfevents.2.x").touch()
        raise UserError("after it began")
    assert all(file.exists() for file in found) and not (path / "events.out.tfevents.2.x").exists()


def test_a_folder_of_a_start_that_was_killed_before_it_did_anything_takes_the_next(tmp_path):
    for rows in ("", "0,1.0\n"):
        path = tmp_path / "task" / "name" / "1"
        path.mkdir(parents=True, exist_ok=True)
        (path / "args.json").write_text(json.dumps(SETTINGS))
        (path / "eval.csv").write_text(f"step,reward\n{rows}")
        with pytest.raises(UserError, match="holds a run") if rows else contextlib.nullcontext():
            start(path)


def test_a_resumed_run_without_a_checkpoint_says_that_it_begins_and_where_others_are(tmp_path, capsys):
    begun(tmp_path / "name" / "2")
    start(tmp_path / "name" / "1", resume=True)
    said = capsys.readouterr().err
    assert f"finds no checkpoint in {tmp_path}/name/1: a new run begins; there is {tmp_path}/name/2" in said
    start(tmp_path / "name" / "2", resume=True)
    assert not capsys.readouterr().err


def test_a_start_that_ends_before_the_run_begins_leaves_nothing(tmp_path):
    start(tmp_path / "task" / "name" / "1")
    assert not list(tmp_path.iterdir())
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.txt").write_text("stays")
    start(tmp_path / "task" / "name" / "1")
    assert [path.name for path in tmp_path.rglob("*")] == ["task", "mine.txt"]


def test_a_folder_of_a_live_run_is_refused_and_left_as_it_is(tmp_path):
    with RunFolder(tmp_path / "run", SETTINGS):
        with pytest.raises(UserError, match="in use by a live run"):
            start(tmp_path / "run")
        assert (tmp_path / "run" / ".lock").exists()


def test_a_lock_whose_file_was_removed_before_it_was_taken_is_taken_anew(tmp_path, monkeypatch):
    """A start that is refused removes the file; who had opened it by then would lock what nobody else sees."""
    path = tmp_path / "run"
    flock = fcntl.flock

    def slow(file, how):
        if not removed:
            (path / ".lock").unlink()
            removed.append(True)
        return flock(file, how)

    removed = []
    monkeypatch.setattr(module.fcntl, "flock", slow)
    with RunFolder(path, SETTINGS) as folder:
        folder.begin()
        with open(path / ".lock", "a") as seen, pytest.raises(BlockingIOError):
            flock(seen, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ------------------------------------------------------------------------------------------------------------ Signals
NAMES = ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_terminations_ask_for_one_end_in_order(name, capsys):
    first = getattr(signal, name)
    before = signal.getsignal(first)
    with Signals() as signals:
        assert not signals
        for number in (first, first, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals and signals.received == first
    assert signal.getsignal(first) == before
    for step, words in ((7, "--resume continues the run"), (0, "nothing was saved yet")):
        with pytest.raises(SystemExit) as stop:
            signals.exit_if_received(f"simulator step {step}", saved=step > 0)
        assert stop.value.code == 128 + first
        assert f"stopped by {name} at simulator step {step}; {words}" in capsys.readouterr().err


def test_under_nohup_the_end_of_the_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_a_second_ctrl_c_a_second_later_does_not_wait(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Signals() as signals:
        for seconds in (0.0, 0.4, 0.5):  # a hand that trembles, or a terminal that sends it to a whole group
            now[0] += seconds
            signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_without_a_signal_nothing_ends():
    with Signals() as signals:
        pass
    signals.exit_if_received("simulator step 7")


# ------------------------------------------------------------------------------------------------------------- Curves
def logger_at(path, step, evaluated, **settings):
    logger = Logger(RunFolder(path, SETTINGS | settings), ("step", "reward"))
    logger.begin("title", "head", {}, step, 100, {"seconds": 0.0, "evaluated": evaluated})
    return logger


def test_points_and_rows_beyond_the_last_checkpoint_are_dropped(tmp_path):
    path = begun(tmp_path / "run")
    with logger_at(path, 0, -1) as logger:
        for step in (10, 20, 30):
            logger.log(step, {"charts/x": step})
    (path / "eval.csv").write_text("step,reward\n0,1.0\n10,2.0\n20,3.0\n30,")  # the last one was cut off
    with logger_at(path, 20, 10) as logger:
        logger.log(25, {"charts/x": 1})
    assert (path / "eval.csv").read_text() == "step,reward\n0,1.0\n10,2.0\n"
    assert read_scalars(path, "charts/x") == [(10, 10.0), (20, 20.0), (25, 1.0)]


def test_arguments_stand_beside_the_curves_and_what_is_logged_is_on_the_disk_at_once(tmp_path):
    path = begun(tmp_path / "run")
    with logger_at(path, 0, -1) as logger:
        logger.log(10, {"charts/x": 1.5})
        events = EventAccumulator(str(path)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("charts/x")] == [(10, 1.5)]
        (text,) = events.Tensors("hyperparameters/text_summary")
        assert "|lr|1.0|" in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("separator, end", [(";", "\n"), ("\t", "\n"), (",", "\r\n")])
def test_a_curve_that_a_spreadsheet_has_written_goes_on_as_ours(tmp_path, separator, end):
    path = begun(tmp_path / "run")
    rows = [["step", "reward"], ["0", "1.5"], ["10", "2.5"], ["20", "3.5"]]
    if separator == ";":
        rows = [[value.replace(".", ",") for value in row] for row in rows]
    (path / "eval.csv").write_bytes(b"\xef\xbb\xbf" + "".join(separator.join(row) + end for row in rows).encode())
    with logger_at(path, 20, 10):
        pass
    assert (path / "eval.csv").read_bytes() == b"step,reward\n0,1.5\n10,2.5\n"
    assert not [*path.glob("damaged*")]


@pytest.mark.parametrize("content", ["x\x00\xff\nstep\n", "a,b\n1,2\n", "step,reward\n0,1.0\nhello\n", "step;x\n0;1\n"])
def test_a_curve_that_is_damaged_is_kept_as_a_copy_and_begun_again(tmp_path, content, capsys):
    path = begun(tmp_path / "run")
    (path / "eval.csv").write_text(content, "latin-1")
    with logger_at(path, 20, 10):
        pass
    (copy,) = path.glob("damaged-*-eval.csv")
    assert copy.read_text("latin-1") == content and copy.name in capsys.readouterr().out
    kept = "0,1.0\n" if "hello" in content else ""
    assert (path / "eval.csv").read_text() == f"step,reward\n{kept}"


full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
RESULT = Evaluation(np.ones(2), np.ones(2), [])


@full_device
def test_a_disk_that_is_full_is_one_sentence(tmp_path):
    path = begun(tmp_path / "run")
    with logger_at(path, 0, -1) as logger:
        (path / "eval.csv").unlink()
        (path / "eval.csv").symlink_to("/dev/full")
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            logger.record_returns(10, task_spec("walker-walk"), RESULT)


@full_device
@pytest.mark.parametrize("file", ["eval.csv", "events.out.tfevents", "film"])
def test_a_curve_that_cannot_be_written_ends_the_run_in_order_and_is_made_again(tmp_path, file, monkeypatch):
    path = begun(tmp_path / "run")
    count = {"seconds": 0.0, "evaluated": 0}
    with Signals() as signals, Logger(RunFolder(path, SETTINGS), ("step", "reward"), signals=signals) as logger:
        logger.begin("title", "head", {}, 0, 100, count)
        result = RESULT
        if file == "eval.csv":
            (path / file).unlink()
            (path / file).symlink_to("/dev/full")
        elif file == "film":
            result = Evaluation(np.ones(2), np.ones(2), [np.zeros((4, 4, 3), np.uint8)])
            (path / "videos").write_text("no folder")
        else:
            monkeypatch.setattr(logger._events, "_file", open("/dev/full", "wb"))
            monkeypatch.setattr(logger._events, "_writer", RecordWriter(logger._events._file))
        count["evaluated"] = 10
        logger.record_returns(10, task_spec("walker-walk"), result)
        assert signals and count["evaluated"] == (0 if file == "eval.csv" else 10)
    with pytest.raises(UserError, match="cannot be written: .*; stopped at simulator step 10, --resume continues"):
        signals.exit_if_received("simulator step 10")


def test_a_row_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "table").write_text("a\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limit[1]))
    try:
        with pytest.raises(OSError):
            append(tmp_path / "table", "b,c,d\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "table").read_text() == "a\n"
