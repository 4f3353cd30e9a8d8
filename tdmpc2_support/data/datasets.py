"""Offline datasets: episodes of several tasks, read where they lie, from disk or from memory, and written.

    data = load_dataset("mt30", "data/mt30")  # the original's files, or a folder of files for every task
    batch = data.sample(rng, 256, horizon=3)  # windows that lie within one episode

Files are those of `tdmpc2_support/data/pt.py`; what `EpisodeWriter` writes, PyTorch with tensordict reads, too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import resource
import sys
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from tdmpc2_support.data.pt import check_pt, load_pt, save_tensordict
from tdmpc2_support.envs.rendering import PIXELS
from tdmpc2_support.envs.tasks import TASKS, set_sizes, set_tasks, task_spec
from tdmpc2_support.errors import UserError
from tdmpc2_support.files import new_file

_CHUNKS = {"mt30": 4, "mt80": 20}  # files of the published datasets
_CHECKED_AT_ONCE = 1000  # episodes: checking copies them
_PICTURE = (PIXELS, PIXELS, 3)  # one frame
_BYTES_AT_ONCE = 2**29  # of finished episodes that wait to be written


def load_dataset(task_set: str | Sequence[str], data_dir: str | os.PathLike, obs: str = "state") -> Dataset:
    """Opens the episodes of a set of tasks where they lie: nothing is copied into memory, see `Dataset.to_host`.

    `data_dir` holds the original's files `chunk_0.pt`, `chunk_1.pt`, … as they are, or a folder of such files for every
    task, as `EpisodeWriter` leaves it. A file is a TensorDict [episodes, entries] of obs [·, ·, O], action [·, ·, A],
    reward and task, the task's place in the set: a set's files need all its names, in its order. O and A are the sizes
    of the set's largest tasks, smaller ones are padded with zeros; a file in a task's own folder is a set of this one
    task. Entry 0 of an episode is its reset, with filler for action and reward; entry i has the action that led to it
    and the reward it brought. With pictures obs are uint8 [·, ·, 64, 64, 3], single frames.

    Args:
        task_set: "mt30", "mt80", or names of tasks.
        data_dir: folder of the files, or of the tasks' folders.
        obs: "state" or "rgb", what the files must hold.

    Raises:
        UserError: names the file that is missing, cannot be read, or does not fit the set.
    """
    tasks = set_tasks(task_set)
    folder = pathlib.Path(data_dir)
    if any(folder.glob("chunk_*.pt")):
        chunks = _open_chunks(folder, tasks, np.arange(len(tasks)), obs)
        expected = _CHUNKS.get(task_set) if isinstance(task_set, str) else None
        if expected and len(chunks) < expected:
            warnings.warn(f"{folder} holds {len(chunks)} of the {expected} files of {task_set}", stacklevel=2)
        return Dataset(tasks, chunks)
    missing = [task for task in tasks if not (folder / task).is_dir()]
    if missing:
        raise UserError(f"{folder} holds neither chunk_0.pt, chunk_1.pt, … nor a folder {missing[0]} of such files")
    chunks = []
    for i, task in enumerate(tasks):
        chunks += _open_chunks(folder / task, (task,), np.array([i]), obs)
    return Dataset(tasks, chunks)


class Chunk(NamedTuple):
    """One file of a dataset."""

    path: pathlib.Path
    obs: np.ndarray  # [episodes, entries, O], or pictures uint8 [episodes, entries, 64, 64, 3]
    action: np.ndarray  # [episodes, entries, A]
    reward: np.ndarray  # [episodes, entries]
    task: np.ndarray  # [episodes, entries], place in `ids`
    ids: np.ndarray  # the set's ids of the tasks that the file is about


def _open_chunks(folder: pathlib.Path, tasks: tuple[str, ...], ids: np.ndarray, obs: str) -> list[Chunk]:
    found = {}
    for path in folder.glob("chunk_*.pt"):
        number = path.stem.removeprefix("chunk_")
        if number.isdecimal() and number == str(int(number)):
            found[int(number)] = path
    missing = next(i for i in itertools.count() if i not in found)
    if missing <= max(found, default=0):
        last = f", though there is {found[max(found)].name}" if found else ""
        raise UserError(f"{folder / f'chunk_{missing}.pt'} is missing{last}")
    _allow_open_files(len(found))
    return [_check_chunk(path, load_pt(path, in_place=True), tasks, ids, obs) for _, path in sorted(found.items())]


def _allow_open_files(number: int) -> None:
    """Raises the limit of this process by so many open files, of which a file that is mapped into memory is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = soft + number if hard == resource.RLIM_INFINITY else min(soft + number, hard)
    with contextlib.suppress(ValueError, OSError):  # some systems have a limit of their own
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _check_chunk(path: pathlib.Path, tensors: Any, tasks: tuple[str, ...], ids: np.ndarray, obs: str) -> Chunk:
    names = Chunk._fields[1:-1]
    if not isinstance(tensors, dict) or not set(names) <= set(tensors):
        raise UserError(f"{path} is no dataset: it must hold {', '.join(names)}")
    chunk = Chunk(path=path, ids=ids, **{name: tensors[name] for name in names})
    if not all(isinstance(array, np.ndarray) for array in chunk[1:-1]):
        raise UserError(f"{path} is no dataset: {', '.join(names)} must be tensors")
    pictures = chunk.obs.dtype == np.uint8
    if pictures != (obs == "rgb"):
        found, wanted = ("pictures", "states") if pictures else ("states", "pictures")
        raise UserError(f"{path} holds episodes of {found}, {wanted} are needed")
    if pictures and chunk.obs.shape[2:] != _PICTURE:
        size = " x ".join(map(str, chunk.obs.shape[2:]))
        raise UserError(f"{path}: pictures are {size}, {PIXELS} x {PIXELS} x 3 is needed")
    for name, ndim in (("obs", 5 if pictures else 3), ("action", 3), ("reward", 2), ("task", 2)):
        array = getattr(chunk, name)
        if array.ndim != ndim or array.shape[:2] != chunk.obs.shape[:2]:
            raise UserError(f"{path}: {name} has shape {array.shape}, which does not fit obs {chunk.obs.shape}")
        if array.dtype.kind not in ("iu" if name == "task" else "u" if name == "obs" and pictures else "f"):
            raise UserError(f"{path}: {name} is of type {array.dtype}")
    for name, size in zip(("obs", "action"), set_sizes(tasks), strict=True):
        if name == "obs" and pictures:
            continue
        if getattr(chunk, name).shape[2] != size:
            raise UserError(f"{path}: {name} has size {getattr(chunk, name).shape[2]}, these tasks need {size}")
    if 0 in chunk.obs.shape:
        raise UserError(f"{path} holds no episodes")
    return chunk


class Dataset:
    """Episodes of several tasks, from `load_dataset`.

    Attributes:
        tasks: names, in the order of their ids.
        chunks: the files; episodes of one file have the same number of entries.
        obs_size, action_size: of the set; smaller observations and actions are padded with zeros.
        obs_shape, obs_type: of an observation as it is returned: (obs_size,) and float32, or a picture's and uint8.
        num_episodes, num_entries: of all files together.
        nbytes: of all arrays.
    """

    def __init__(self, tasks: tuple[str, ...], chunks: list[Chunk]):
        self.tasks = tasks
        self.chunks = chunks
        self.obs_size, self.action_size = set_sizes(tasks)
        pictures = chunks[0].obs.dtype == np.uint8
        self.obs_shape = _PICTURE if pictures else (self.obs_size,)
        self.obs_type = np.uint8 if pictures else np.float32
        self.num_episodes = sum(len(chunk.obs) for chunk in chunks)
        self.num_entries = sum(chunk.task.size for chunk in chunks)
        self.nbytes = sum(array.nbytes for chunk in chunks for array in chunk[1:-1])

    def to_host(self) -> Dataset:
        """The same episodes in memory; UserError if a number among them is not finite or a task not of the set."""
        chunks = []
        for chunk in self.chunks:
            episodes = np.arange(len(chunk.obs))
            for first in range(0, len(episodes), _CHECKED_AT_ONCE):
                self._read(chunk, episodes[first : first + _CHECKED_AT_ONCE, None], np.arange(chunk.obs.shape[1]))
            chunks.append(chunk._replace(**{name: np.array(getattr(chunk, name)) for name in Chunk._fields[1:-1]}))
        return Dataset(self.tasks, chunks)

    def check_files(self) -> None:
        """Reads all files and compares their checksums; UserError if one is damaged."""
        for chunk in self.chunks:
            check_pt(chunk.path)

    def window_table(self, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the windows of horizon + 1 entries within one episode are, as int64 arrays over the F files: the number
        of windows up to and with each file [F], the file's first entry in the whole [F], its entries an episode [F].
        """
        episodes, entries = np.array([chunk.obs.shape[:2] for chunk in self.chunks]).T
        windows = np.cumsum(episodes * np.maximum(entries - horizon, 0))
        if windows[-1] == 0:
            raise UserError(f"episodes of {entries.max()} entries have no windows of {horizon + 1}")
        first_entry = np.cumsum(episodes * entries) - episodes * entries
        return windows, first_entry, entries

    def sample(
        self, rng: np.random.Generator, batch_size: int, horizon: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """Draws windows of horizon + 1 entries within one episode, each start equally likely.

        Args:
            rng: moves on by the same number of draws whatever `rows` is.
            batch_size: number B of windows drawn.
            horizon: H.
            rows: the part of the batch to read and return: what one of several hosts needs.

        Returns:
            float32 obs [H+1, B, O] (pictures: uint8 [H+1, B, 64, 64, 3]), action [H, B, A], reward [H, B]; int32 task
            [B].

        Raises:
            UserError: what was drawn holds NaN, or a task that is not of the set; names the file and the episode.
        """
        ends, _, entries = self.window_table(horizon)
        window = rng.integers(ends[-1], size=batch_size)[rows]
        which = np.searchsorted(ends, window, side="right")
        batch = {
            "obs": np.zeros((len(window), horizon + 1, *self.obs_shape), self.obs_type),
            "action": np.zeros((len(window), horizon, self.action_size), np.float32),
            "reward": np.empty((len(window), horizon), np.float32),
            "task": np.empty(len(window), np.int32),
        }
        for i in np.unique(which):
            of_file = which == i
            windows_before = ends[i - 1] if i > 0 else 0
            windows_an_episode = entries[i] - horizon
            episode, start = np.divmod(window[of_file] - windows_before, windows_an_episode)
            read = self._read(self.chunks[i], episode[:, None], start[:, None] + np.arange(horizon + 1))
            batch["obs"][of_file, :, : read["obs"].shape[2]] = read["obs"]
            batch["action"][of_file, :, : read["action"].shape[2]] = read["action"][:, 1:]
            batch["reward"][of_file] = read["reward"][:, 1:]
            batch["task"][of_file] = read["task"][:, 0]
        return {name: values if name == "task" else values.swapaxes(0, 1) for name, values in batch.items()}

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Entries start … stop of the whole, all episodes of all files in a row, to keep them elsewhere.

        Returns:
            obs [n, O] (pictures: [n, 64, 64, 3]), action [n, A], reward [n] in the type of the files, with zeros for
            filler; int16 task [n].

        Raises:
            UserError: as `sample`.
        """
        parts = []
        first = 0  # entry of the file
        for chunk in self.chunks:
            of_file = np.arange(max(start - first, 0), max(min(stop - first, chunk.task.size), 0))
            episode, entry = np.divmod(of_file, chunk.obs.shape[1])
            first += chunk.task.size
            if not len(episode):
                continue
            read = self._read(chunk, episode[:, None], entry[:, None])
            for name, width in (("obs", self.obs_shape[0]), ("action", self.action_size)):
                no_more = [(0, 0)] * (read[name].ndim - 3)  # pictures are not padded
                read[name] = np.pad(read[name], [(0, 0), (0, 0), (0, width - read[name].shape[2]), *no_more])
            read["action"][entry == 0] = 0
            read["reward"][entry == 0] = 0
            parts.append({name: values[:, 0] for name, values in read.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _read(self, chunk: Chunk, episode: np.ndarray, entry: np.ndarray) -> dict[str, np.ndarray]:
        """Entries [E, n] of episodes [E, 1], checked; filler stands only at the windows' first entries."""
        read = {name: getattr(chunk, name)[episode, entry] for name in ("obs", "action", "reward")}
        behind_reset = np.broadcast_to(entry > 0, read["reward"].shape)
        for name, values in read.items():
            if values.dtype == np.uint8:  # pictures
                continue
            finite = np.isfinite(values) if name == "reward" else np.isfinite(values).all(-1)
            finite |= ~behind_reset & (name != "obs")
            if not finite.all():
                wrong = episode[~finite.all(1)][0, 0]
                raise UserError(f"{chunk.path}: {name} of episode {wrong} is not finite")
        task = chunk.task[episode, entry]
        outside = (task < 0) | (task >= len(chunk.ids))
        if outside.any():
            wrong = f"episode {episode[outside.any(1)][0, 0]} is of task {task[outside][0]}"
            number = "1 task" if len(chunk.ids) == 1 else f"{len(chunk.ids)} tasks"
            raise UserError(f"{chunk.path}: {wrong}, but the set has {number}")
        return read | {"task": chunk.ids[task].astype(np.int16)}

    def batches(
        self,
        seed: int,
        batch_size: int,
        horizon: int,
        first: int = 0,
        readers: int = 4,
        rows: slice = slice(None),
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """Endless batches of `sample`, drawn ahead by threads; batch i depends on the seed and i only.

        Args:
            first: number of the first batch: a resumed run goes on where it was.
            readers: threads; each has two batches ready. Reading lets other threads run.
            rows: as in `sample`.
        """

        def draw(i: int) -> dict[str, np.ndarray]:
            return self.sample(np.random.default_rng((seed, i)), batch_size, horizon, rows)

        pool = ThreadPoolExecutor(readers)
        try:
            ahead = deque(pool.submit(draw, i) for i in range(first, first + 2 * readers))
            for i in itertools.count(first + 2 * readers):
                yield ahead.popleft().result()
                ahead.append(pool.submit(draw, i))
        finally:
            pool.shutdown(cancel_futures=True)


class EpisodeWriter:
    """Writes a task's episodes to DATA_DIR/TASK/chunk_0.pt, chunk_1.pt, …, as `load_dataset` reads them.

    PyTorch with tensordict reads the files, too. They are complete or absent at any moment, and several runs may write
    to one folder: each takes the next free number. Without a data_dir nothing is written. action_repeat is as in
    `task_spec`: decisions with another one than the table's are other data, and belong in a folder of their own, as do
    pictures (obs="rgb"), which are written as they are: files are read in place, a window at a time.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike | None,
        task: str,
        num_envs: int,
        action_repeat: int | None = None,
        obs: str = "state",
    ):
        self._folder = None
        self._finished = []
        if data_dir is None:
            return
        spec = task_spec(task, action_repeat)
        set_tasks([task])
        self._folder = pathlib.Path(data_dir, spec.name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"episodes cannot be written to {self._folder}: {error.strerror}") from None
        self._check_files(spec.episode_length, obs)
        row = TASKS[spec.name]
        length = spec.episode_length + 1
        shape = (num_envs, length, *_PICTURE) if obs == "rgb" else (num_envs, length, row.obs_size)
        self._open = {  # the episodes under way
            "obs": np.zeros(shape, np.uint8 if obs == "rgb" else np.float32),
            "action": np.zeros((num_envs, length, row.action_size), np.float32),
            "reward": np.zeros((num_envs, length), np.float32),
        }
        self._entry = np.full(num_envs, -1)

    def _check_files(self, length: int, obs: str) -> None:
        """UserError if the folder holds episodes of another number of decisions, or states beside pictures."""
        path = next(self._folder.glob("chunk_*.pt"), None)  # all have episodes of one length
        if path is None:
            return
        episodes = load_pt(path, in_place=True)
        arrays = [episodes.get(key) if isinstance(episodes, dict) else None for key in ("obs", "reward")]
        if not all(isinstance(array, np.ndarray) and array.ndim > 1 for array in arrays):
            raise UserError(f"{path} holds no episodes: choose another --save-episodes")
        if (episodes["obs"].dtype == np.uint8) != (obs == "rgb"):
            kinds = ("states", "pictures") if obs == "rgb" else ("pictures", "states")
            raise UserError(
                "{} holds episodes of {}, these are of {}: choose another --save-episodes".format(self._folder, *kinds)
            )
        found = episodes["reward"].shape[1] - 1
        if found != length:
            words = f"{self._folder} holds episodes of {found} decisions, these have {length}"
            raise UserError(f"{words}, another action repeat: choose another --save-episodes")

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, first: np.ndarray) -> None:
        """Takes one step of all environments; where `first`, it is a reset, whose action and reward are filler."""
        if self._folder is None:
            return
        envs = np.arange(len(first))
        self._entry = np.where(first, 0, self._entry + 1)
        self._open["obs"][envs, self._entry] = obs
        self._open["action"][envs, self._entry] = np.where(first[:, None], np.nan, action)
        self._open["reward"][envs, self._entry] = np.where(first, np.nan, reward)
        ended = np.flatnonzero(self._entry + 1 == self._open["reward"].shape[1])
        for i in ended:
            self._finished.append({name: values[i].copy() for name, values in self._open.items()})
        if len(ended) and len(self._finished) * self._open["obs"][0].nbytes > _BYTES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Writes the episodes that have ended since the last call, if there are any, to a file of their own."""
        if not self._finished:
            return
        tensors = {name: np.stack([episode[name] for episode in self._finished]) for name in self._open}
        tensors["task"] = np.zeros(tensors["reward"].shape, np.int64)
        for i in itertools.count():
            path = self._folder / f"chunk_{i}.pt"
            if path.exists():
                continue
            try:
                with new_file(path, overwrite=False) as temporary:
                    save_tensordict(temporary, tensors)
                break
            except FileExistsError:  # another run has taken the number meanwhile
                continue
            except OSError as error:
                print(
                    f"{len(self._finished)} episodes cannot be written to {self._folder} ({error.strerror}): they stay "
                    "in memory, to be written later",
                    file=sys.stderr,
                )
                return
        self._finished = []
