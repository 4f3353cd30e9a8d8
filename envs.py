"""Environments and files: what every script here shares.

    env = make_env("walker-walk", seed=1)                # one gymnasium.Env
    envs = make_envs("walker-walk", num_envs=4, seed=1)  # one gymnasium.vector.VectorEnv
    weights = load_pt("walker.pt")["model"]              # a PyTorch file, read without PyTorch
    episodes = load_dataset("mt30", "data/mt30")         # an offline dataset, read where it lies
    python envs.py                                       # the table of tasks

Every environment looks the same from outside: observation `Box` float32 flat (or uint8 [64, 64, 3] with obs="rgb"),
action `Box(-1, 1)` float32, action repeat inside, `truncated` at the time limit, `terminated` only where the task
really ends, `info["success"]` (float) on every step. Importing this module loads no simulator.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import mmap
import os
import pathlib
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from domains import vector
from domains.parts import Task
from domains.rendering import FRAME, PIXELS
from domains.tasks import DOMAINS, TASK_SETS, TASKS, TaskSpec, UserError, set_sizes, set_tasks, task_spec
from domains.vector import default_workers

__all__ = [
    "DOMAINS", "FRAME", "PIXELS", "TASKS", "TASK_SETS", "Chunk", "Dataset", "EpisodeWriter", "TaskSpec", "UserError",
    "check_rendering", "default_workers", "load_dataset", "load_pt", "make_env", "make_envs", "save_tensordict",
    "set_sizes", "set_tasks", "task_spec",
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# One environment
# ----------------------------------------------------------------------------------------------------------------------


def make_env(
    task: str,
    seed: int = 0,
    obs: str = "state",
    render_mode: str | None = None,
    shadows: bool = True,
    action_repeat: int | None = None,
) -> gym.Env:
    """Makes one environment.

    The first reset is seeded with `seed`; later ones continue its random stream unless they are given a seed. NumPy's
    global generator is neither used nor changed.

    Args:
        task: see `task_spec`.
        seed: seed of the first reset.
        obs: "state" → float32 [size]; "rgb" → uint8 [64, 64, 3], one frame (DMControl and Meta-World, and Gymnasium
            ids whose own observation is such a frame).
        render_mode: None, or "rgb_array": `render()` gives uint8 [384, 384, 3] where the simulator lets us choose.
        shadows: with obs="rgb", draw shadows and reflections, as dm_control and MuJoCo do by default.
        action_repeat: simulator steps per decision, if others than the table's are wanted (see `task_spec`).

    Returns:
        The environment; `env.unwrapped` reaches the simulator (`.physics` and `.dm_env` with DMControl).

    Raises:
        UserError: unknown task, missing package, or a task that is not a vector of numbers in and out.
    """
    spec = task_spec(task, action_repeat)
    if obs not in ("state", "rgb"):
        raise UserError(f"obs must be 'state' or 'rgb', not {obs!r}")
    if obs == "rgb" and spec.domain in DOMAINS and not DOMAINS[spec.domain].rgb:
        domains = " and ".join(domain for domain, settings in DOMAINS.items() if settings.rgb)
        raise UserError(f"pixels as observations exist for {domains}, not for {spec.name!r} ({spec.domain})")
    if render_mode not in (None, "rgb_array"):
        raise UserError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
    room = DOMAINS[spec.domain].room if spec.domain in DOMAINS else "gym_ids"
    parts = importlib.import_module(f"domains.{room}").make(spec, render_mode)
    try:
        return Task(parts, spec, seed, obs, render_mode, shadows)
    except UserError:
        parts.env.close()
        raise


def check_rendering(task: str, obs: str = "state", render_mode: str | None = "rgb_array") -> None:
    """Draws one frame of the task, or with obs="rgb" and no render_mode an observation, to learn before a long run
    whether that works.

    Raises:
        UserError: no frame can be drawn; names what to install.
    """
    try:
        env = make_env(task, obs=obs, render_mode=render_mode)
        try:
            frame = env.reset()[0]
            frame = env.render() if render_mode else frame
        finally:
            env.close()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"task {task!r} cannot be drawn here: {error}") from error
    if frame is None or frame.ndim != 3:
        raise UserError(f"task {task!r} gives no pictures")


# ----------------------------------------------------------------------------------------------------------------------
# Many environments
# ----------------------------------------------------------------------------------------------------------------------


def make_envs(
    task: str | Sequence[str],
    num_envs: int,
    seed: int = 0,
    obs: str = "state",
    render_mode: str | None = None,
    num_workers: int | None = None,
    sizes: tuple[int, int] | None = None,
    shadows: bool = True,
    action_repeat: int | None = None,
) -> gym.vector.VectorEnv:
    """Makes `num_envs` environments that step together; environment i is `make_env(task, seed + i)`.

    With several tasks, they are `num_envs` of the first task, then as many of the next, and so on; observations are
    padded with zeros to the largest of them, and of an action each takes the entries that it needs.

    The step after an episode's end returns the next episode's first observation and ignores the action (NEXT_STEP).
    `reset(seed=s)` gives environment i the seed s + i. `infos["success"]` is float64 [num_envs]. What an environment
    returns depends on its seed and actions only, not on the number of workers.

    Args:
        task, seed, obs, shadows, action_repeat: as in `make_env`; task may also be several names of the table (with
            obs="state" only).
        num_envs: number of environments (of each task), at least 1.
        render_mode: "rgb_array": `envs.render()[i]` is a frame of environment i if it is the first of its task; the
            others draw nothing.
        num_workers: worker processes to spread the environments over; 0 steps them in this process. Default: what
            should be fastest for this task and number of cores (`default_workers`).
        sizes: of observation and action, if larger ones than those of the largest of several tasks are wanted.

    Raises:
        UserError: as `make_env`, or num_envs < 1.
    """
    if num_envs < 1:
        raise UserError(f"the number of environments must be at least 1, not {num_envs}")
    names = [task_spec(task).name] if isinstance(task, str) else list(set_tasks(task))
    modes = [render_mode] + [None] * (num_envs - 1)
    sizes = None if isinstance(task, str) else sizes or set_sizes(names)
    one_each = [(name, mode) for name in names for mode in modes]
    makers = [
        functools.partial(_make_one, sizes, name, seed + i, obs, mode, shadows, action_repeat)
        for i, (name, mode) in enumerate(one_each)
    ]
    if num_workers is None:
        num_workers = default_workers(names, num_envs, obs=obs)
    if num_workers == 0:
        makers = [lambda make=make: vector.SuccessOnly(make()) for make in makers]
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    return vector.WorkerVectorEnv(names, makers, min(num_workers, len(makers)), render_mode)


def _make_one(sizes: tuple[int, int] | None, *arguments: Any) -> gym.Env:
    env = make_env(*arguments)
    return vector.Padded(env, *sizes) if sizes else env


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch files without PyTorch
# ----------------------------------------------------------------------------------------------------------------------

_STORAGE_DTYPES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "QInt8Storage": "int8", "QUInt8Storage": "uint8",
}  # fmt: skip


def load_pt(path: str | os.PathLike, in_place: bool = False) -> Any:
    """Reads a file written by torch.save (the zip format, PyTorch 1.6 or later) without PyTorch.

    Only tensors and plain containers are read; a pickle that names anything else is refused before anything is run.

    Args:
        path: the file.
        in_place: leave the numbers in the file and map them into memory, read-only: costs no memory of the process, and
            checks no checksum. The file must not change while the arrays are in use.

    Returns:
        What was saved, with numpy arrays for tensors: `load_pt(path)["model"]["_encoder.state.0.weight"]`, and dicts
        for TensorDicts. float16 stays float16; bfloat16 becomes float32, and per-tensor quantised tensors their
        float32 values.

    Raises:
        UserError: the file is missing, damaged, no PyTorch file, or holds something else than tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is a zip file, but not one that PyTorch wrote")
            with archive.open(pickles[0]) as file:
                return _TensorUnpickler(file, archive, pickles[0].removesuffix("data.pkl"), in_place).load()
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a PyTorch file") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is damaged or no PyTorch file ({error})") from None
    except Exception as error:  # a pickle can go wrong in as many ways as there are bytes
        raise UserError(f"{path} cannot be read as a PyTorch file ({type(error).__name__}: {error})") from None


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers; everything else is refused by name."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str, in_place: bool):
        super().__init__(file, encoding="utf-8")
        self._archive, self._prefix, self._map = archive, prefix, None
        if in_place:
            self._map = mmap.mmap(archive.fp.fileno(), 0, access=mmap.ACCESS_READ)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch", "per_tensor_affine"): "per_tensor_affine",
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor if self._map is None else _view_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch._utils", "_rebuild_qtensor"): _rebuild_quantised,
            ("tensordict.tensordict", "TensorDict"): _TensorDict,  # up to version 0.2
            ("tensordict._td", "TensorDict"): _TensorDict,  # from version 0.3 on
            ("tensordict._reductions", "_make_td"): _make_tensordict,
            ("tensordict.utils", "_StringOnlyDict"): dict,
            ("__builtin__", "set"): set,
            ("builtins", "set"): set,
        }
        if (module, name) not in allowed:
            raise UserError(f"refused, since it would run {module}.{name}; only tensors and plain containers are read")
        return allowed[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """A storage, ("storage", dtype, key, device, number of elements) → its numbers [n]."""
        _, dtype, key, _, _ = pid
        if self._map is not None and dtype != "bfloat16":
            return self._storage_in_place(f"{self._prefix}data/{key}", np.dtype(dtype).newbyteorder("<"))
        data = self._archive.read(f"{self._prefix}data/{key}")  # checks the CRC, so damaged numbers do not pass
        if dtype == "bfloat16":  # the upper half of a float32
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))

    def _storage_in_place(self, name: str, dtype: np.dtype) -> np.ndarray:
        member = self._archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError("its numbers are compressed, which PyTorch never does")
        header = self._map[member.header_offset : member.header_offset + 30]  # the local one: its lengths may differ
        name_length, extra_length = struct.unpack("<26x2H", header)
        start = member.header_offset + 30 + name_length + extra_length
        return np.frombuffer(self._map, dtype, member.file_size // dtype.itemsize, start)


class _TensorDict(dict):
    """tensordict.TensorDict: a dict of tensors, pickled as the state of an object."""

    def __setstate__(self, state: dict) -> None:
        self.update(state["_tensordict"])


def _make_tensordict(cls: type, state: dict) -> _TensorDict:
    tensors = cls()
    tensors.__setstate__(state)
    return tensors


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    return np.array(_view_tensor(storage, offset, size, stride), order="C")  # writable, and the storage is freed


def _view_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise UserError("damaged, a tensor reaches beyond its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


def _rebuild_quantised(storage: np.ndarray, offset: int, size: tuple, stride: tuple, quantiser: tuple, *_: Any):
    scheme, scale, zero_point = quantiser
    if scheme != "per_tensor_affine":
        raise UserError("per-channel quantised tensors are not supported")
    tensor = _rebuild_tensor(storage, offset, size, stride)
    return (tensor.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


# ----------------------------------------------------------------------------------------------------------------------
# Offline datasets
# ----------------------------------------------------------------------------------------------------------------------

_CHUNKS = {"mt30": 4, "mt80": 20}  # files of the published datasets


def load_dataset(task_set: str | Sequence[str], data_dir: str | os.PathLike) -> Dataset:
    """Opens the episodes of a set of tasks where they lie: nothing is copied into memory, see `Dataset.to_host`.

    `data_dir` holds the original's files `chunk_0.pt`, `chunk_1.pt`, … as they are, or a folder of such files for every
    task, as `EpisodeWriter` leaves it. A file is a TensorDict [episodes, entries] of obs [·, ·, O], action [·, ·, A],
    reward and task, the task's place in the set: a set's files need all its names, in its order. O and A are the sizes
    of the set's largest tasks, smaller ones are padded with zeros; a file in a task's own folder is a set of this one
    task. Entry 0 of an episode is its reset, with filler for action and reward; entry i has the action that led to it
    and the reward it brought.

    Args:
        task_set: "mt30", "mt80", or names of tasks.
        data_dir: folder of the files, or of the tasks' folders.

    Raises:
        UserError: names the file that is missing, cannot be read, or does not fit the set.
    """
    tasks, folder = set_tasks(task_set), pathlib.Path(data_dir)
    if any(folder.glob("chunk_*.pt")):
        chunks = _open_chunks(folder, tasks, np.arange(len(tasks)))
        expected = _CHUNKS.get(task_set) if isinstance(task_set, str) else None
        if expected and len(chunks) < expected:
            warnings.warn(f"{folder} holds {len(chunks)} of the {expected} files of {task_set}", stacklevel=2)
        return Dataset(tasks, chunks)
    missing = [task for task in tasks if not (folder / task).is_dir()]
    if missing:
        raise UserError(f"{folder} holds neither chunk_0.pt, chunk_1.pt, … nor a folder {missing[0]} of such files")
    return Dataset(
        tasks, [c for i, task in enumerate(tasks) for c in _open_chunks(folder / task, (task,), np.array([i]))]
    )


class Chunk(NamedTuple):
    """One file of a dataset."""

    path: pathlib.Path
    obs: np.ndarray  # [episodes, entries, O]
    action: np.ndarray  # [episodes, entries, A]
    reward: np.ndarray  # [episodes, entries]
    task: np.ndarray  # [episodes, entries], place in `ids`
    ids: np.ndarray  # the set's ids of the tasks that the file is about


def _open_chunks(folder: pathlib.Path, tasks: tuple[str, ...], ids: np.ndarray) -> list[Chunk]:
    found = {int(path.stem[6:]): path for path in folder.glob("chunk_*.pt") if path.stem[6:].isdecimal()}
    missing = [folder / f"chunk_{i}.pt" for i in range(max(found, default=0) + 1) if i not in found]
    if missing:
        there = f", though there is {found[max(found)].name}" if found else ""
        raise UserError(f"{missing[0]} is missing{there}")
    return [_check_chunk(path, load_pt(path, in_place=True), tasks, ids) for _, path in sorted(found.items())]


def _check_chunk(path: pathlib.Path, tensors: Any, tasks: tuple[str, ...], ids: np.ndarray) -> Chunk:
    names = Chunk._fields[1:-1]
    if not isinstance(tensors, dict) or not set(names) <= set(tensors):
        raise UserError(f"{path} is no dataset: it must hold {', '.join(names)}")
    chunk = Chunk(path, *(tensors[name] for name in names), ids)
    for name, ndim in (("obs", 3), ("action", 3), ("reward", 2), ("task", 2)):
        array = getattr(chunk, name)
        if not isinstance(array, np.ndarray) or array.ndim != ndim or array.shape[:2] != chunk.obs.shape[:2]:
            raise UserError(f"{path}: {name} has shape {np.shape(array)}, which does not fit obs {chunk.obs.shape}")
        if array.dtype.kind not in ("iu" if name == "task" else "f"):
            raise UserError(f"{path}: {name} is of type {array.dtype}")
    for name, size in zip(("obs", "action"), set_sizes(tasks), strict=True):
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
        num_episodes, num_entries: of all files together.
        nbytes: of all arrays.
    """

    def __init__(self, tasks: tuple[str, ...], chunks: list[Chunk]):
        self.tasks, self.chunks = tasks, chunks
        self.obs_size, self.action_size = set_sizes(tasks)
        self.num_episodes = sum(len(chunk.obs) for chunk in chunks)
        self.num_entries = sum(chunk.task.size for chunk in chunks)
        self.nbytes = sum(array.nbytes for chunk in chunks for array in chunk[1:-1])

    def to_host(self) -> Dataset:
        """The same episodes held in memory; UserError if a number among them is not finite or a task not of the set."""
        chunks = []
        for chunk in self.chunks:
            for i in range(0, len(chunk.obs), 1000):
                self._read(chunk, np.arange(i, min(i + 1000, len(chunk.obs)))[:, None], np.arange(chunk.obs.shape[1]))
            chunks.append(Chunk(chunk.path, *map(np.array, chunk[1:-1]), chunk.ids))
        return Dataset(self.tasks, chunks)

    def check_files(self) -> None:
        """Reads all files and compares their checksums; UserError if one is damaged."""
        for chunk in self.chunks:
            with zipfile.ZipFile(chunk.path) as archive:
                if bad := archive.testzip():
                    raise UserError(f"{chunk.path} is damaged (checksum of {bad})")

    def window_table(self, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the windows of horizon + 1 entries within one episode are, as int64 arrays over the F files: the
        windows up to and with each file [F], the file's first entry in the whole [F], and its entries an episode [F].
        """
        episodes, entries = np.array([chunk.obs.shape[:2] for chunk in self.chunks]).T
        windows = np.cumsum(episodes * np.maximum(entries - horizon, 0))
        if windows[-1] == 0:
            raise UserError(f"episodes of {entries.max()} entries have no windows of {horizon + 1}")
        return windows, np.cumsum(episodes * entries) - episodes * entries, entries

    def sample(
        self, rng: np.random.Generator, batch_size: int, horizon: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """Draws windows of horizon + 1 entries within one episode, each start equally likely.

        Args:
            rng: gives as many numbers whatever `rows` is.
            batch_size: number B of windows drawn.
            horizon: H.
            rows: the part of the batch to read and return: what one of several hosts needs.

        Returns:
            float32 obs [H+1, B, O], action [H, B, A], reward [H, B]; int32 task [B].

        Raises:
            UserError: what was drawn holds NaN, or a task that is not of the set; names the file and the episode.
        """
        ends, _, entries = self.window_table(horizon)
        window = rng.integers(ends[-1], size=batch_size)[rows]
        which = np.searchsorted(ends, window, side="right")
        batch = {
            "obs": np.zeros((len(window), horizon + 1, self.obs_size), np.float32),
            "action": np.zeros((len(window), horizon, self.action_size), np.float32),
            "reward": np.empty((len(window), horizon), np.float32),
            "task": np.empty(len(window), np.int32),
        }
        for i in np.unique(which):
            mine = which == i
            starts = entries[i] - horizon  # in one episode
            episode, start = np.divmod(window[mine] - (ends[i - 1] if i else 0), starts)
            read = self._read(self.chunks[i], episode[:, None], start[:, None] + np.arange(horizon + 1))
            batch["obs"][mine, :, : read["obs"].shape[2]] = read["obs"]
            batch["action"][mine, :, : read["action"].shape[2]] = read["action"][:, 1:]
            batch["reward"][mine], batch["task"][mine] = read["reward"][:, 1:], read["task"][:, 0]
        return {name: values if name == "task" else values.swapaxes(0, 1) for name, values in batch.items()}

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Entries start … stop of the whole, all episodes of all files in a row, to hold them elsewhere.

        Returns:
            obs [n, O], action [n, A], reward [n] in the type of the files, with zeros for filler; int16 task [n].

        Raises:
            UserError: as `sample`.
        """
        parts, first = [], 0
        for chunk in self.chunks:
            inside = slice(max(start - first, 0), max(min(stop - first, chunk.task.size), 0))
            episode, entry = np.divmod(np.arange(inside.start, inside.stop), chunk.obs.shape[1])
            first += chunk.task.size
            if not len(episode):
                continue
            read = self._read(chunk, episode[:, None], entry[:, None])
            widths = {"obs": self.obs_size, "action": self.action_size}
            for name, width in widths.items():
                read[name] = np.pad(read[name], [(0, 0), (0, 0), (0, width - read[name].shape[2])])
            read["action"][entry == 0], read["reward"][entry == 0] = 0, 0
            parts.append({name: values[:, 0] for name, values in read.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _read(self, chunk: Chunk, episode: np.ndarray, entry: np.ndarray) -> dict[str, np.ndarray]:
        """Entries [E, n] of episodes [E, 1], checked; filler stands only at the windows' first entries."""
        read = {name: getattr(chunk, name)[episode, entry] for name in ("obs", "action", "reward")}
        behind_reset = np.broadcast_to(entry > 0, read["reward"].shape)
        for name, values in read.items():
            finite = np.isfinite(values) if name == "reward" else np.isfinite(values).all(-1)
            finite |= ~behind_reset & (name != "obs")
            if not finite.all():
                where = episode[~finite.all(1)][0, 0]
                raise UserError(f"{chunk.path}: {name} of episode {where} is not finite")
        task = chunk.task[episode, entry]
        outside = (task < 0) | (task >= len(chunk.ids))
        if outside.any():
            where = f"episode {episode[outside.any(1)][0, 0]} is of task {task[outside][0]}"
            raise UserError(f"{chunk.path}: {where}, but the set has {len(chunk.ids)} task{'s' * (len(chunk.ids) > 1)}")
        return read | {"task": chunk.ids[task].astype(np.int16)}

    def batches(
        self,
        seed: int,
        batch_size: int,
        horizon: int,
        first: int = 0,
        readers: int = 4,
        rows: slice = slice(None),
    ):
        """Endless batches of `sample`, drawn ahead by threads; batch i depends on the seed and i only.

        Args:
            first: number of the first batch: a resumed run goes on where it was.
            readers: threads; each holds two batches ready. Reading lets other threads run.
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
    to one folder: each takes the next free number.
    """

    def __init__(self, data_dir: str | os.PathLike, task: str, num_envs: int):
        spec = task_spec(task)
        set_tasks([task])
        self._folder = pathlib.Path(data_dir, spec.name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"episodes cannot be written to {self._folder}: {error.strerror}") from None
        row, length = TASKS[spec.name], spec.episode_length + 1
        self._open = {  # the episodes under way
            "obs": np.zeros((num_envs, length, row.obs_size), np.float32),
            "action": np.zeros((num_envs, length, row.action_size), np.float32),
            "reward": np.zeros((num_envs, length), np.float32),
        }
        self._entry, self._finished = np.full(num_envs, -1), []

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, first: np.ndarray) -> None:
        """Takes one step of all environments; where `first`, it is a reset, whose action and reward are filler."""
        envs, self._entry = np.arange(len(first)), np.where(first, 0, self._entry + 1)
        self._open["obs"][envs, self._entry] = obs
        self._open["action"][envs, self._entry] = np.where(first[:, None], np.nan, action)
        self._open["reward"][envs, self._entry] = np.where(first, np.nan, reward)
        for i in np.flatnonzero(self._entry + 1 == self._open["reward"].shape[1]):
            self._finished.append({name: values[i].copy() for name, values in self._open.items()})

    def flush(self) -> None:
        """Writes the episodes that have ended since the last call, if there are any, to a file of their own."""
        if not self._finished:
            return
        tensors = {name: np.stack([episode[name] for episode in self._finished]) for name in self._open}
        temporary = self._folder / f".writing-{os.getpid()}"
        save_tensordict(temporary, tensors | {"task": np.zeros(tensors["reward"].shape, np.int64)})
        for i in itertools.count():
            path = self._folder / f"chunk_{i}.pt"
            try:
                os.link(temporary, path)
                break
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                if not path.exists():
                    temporary.rename(path)
                    break
        temporary.unlink(missing_ok=True)
        self._finished = []


def save_tensordict(path: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """Writes arrays that share their first two axes as torch.save would write them in a TensorDict, without PyTorch.

    The pickle names the class as tensordict 0.1 and 0.2 do, where later versions find it, too.
    """
    kinds = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage"}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    def tensor(key: int, array: np.ndarray) -> bytes:
        kind, strides = kinds[array.dtype.str[1:]], [stride // array.itemsize for stride in array.strides]
        storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(str(key)) + text("cpu")
        storage += numbers([array.size])[1:-1] + b"tQ"
        arguments = storage + numbers([0])[1:-1] + numbers(array.shape) + numbers(strides)
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89ccollections\nOrderedDict\n)RtR"

    members = b"".join(text(name) + tensor(key, array) for key, (name, array) in enumerate(arrays.items()))
    state = text("_tensordict") + b"}(" + members + b"u" + text("_batch_size")
    state += b"ctorch\nSize\n" + numbers(next(iter(arrays.values())).shape[:2]) + b"\x85R"
    state += b"".join(text(name) + b"\x89" for name in ("_is_shared", "_is_memmap", "_is_locked"))
    state += text("_device") + b"N" + text("_names") + b"N"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ctensordict.tensordict\nTensorDict\n)\x81}(" + state + b"ub.")
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            info = zipfile.ZipInfo(f"archive/data/{key}")
            padding = -(archive.fp.tell() + 30 + len(info.filename) + 4) % 64  # aligned when they are mapped
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            archive.writestr(info, array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        archive.writestr("archive/version", "3\n")


# ----------------------------------------------------------------------------------------------------------------------
# The table of tasks
# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Prints every task of the table; loads no simulator."""
    print(f"{'domain':<12}{'task':<34}{'obs':>5}{'action':>8}{'episode':>9}  installed")
    for name, (domain, obs_size, action_size, _) in TASKS.items():
        settings = DOMAINS[domain]
        installed = "yes" if importlib.util.find_spec(settings.module.split(".")[0]) else settings.install
        obs_text = "?" if obs_size is None else obs_size
        print(f"{domain:<12}{name:<34}{obs_text:>5}{action_size:>8}{settings.episode_length:>9}  {installed}")
    print(f"{len(TASKS)} tasks; episode = decisions. Any Gymnasium id with Box actions works too (HalfCheetah-v5).")


if __name__ == "__main__":
    main()
