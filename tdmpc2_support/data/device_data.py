"""Where the batches of an offline dataset come from: device memory, the machine's, or the files.

source = Source(dataset, "auto", "files", mesh, batch_size=1024, horizon=3)
source.load()                                                 # into the memory that it has chosen
for batch in source.batches(seed=1, first=0, readers=4):      # `DeviceData` or a dict of arrays, split over the devices
    ...
"""

import contextlib
import socket
import zlib
from collections.abc import Generator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from tdmpc2_support.data.datasets import Dataset
from tdmpc2_support.devices import available_bytes, bytes_of, global_arrays, least_available_bytes, replicated, split
from tdmpc2_support.errors import UserError

PIECE = 500_000  # entries that are copied at a time: a hundred MB of the machine's memory
MEMORY_SHARE = {"device": 0.6, "host": 0.4}  # of what is free: the rest is for the agent and for other programs


class DeviceData(NamedTuple):
    """A dataset in device memory, the episodes of all files in a row, split over the devices. `Dataset` is
    the same on the disk or in the machine's memory."""

    obs: jax.Array  # [entries, O]
    action: jax.Array  # [entries, A] the action that led to the observation
    reward: jax.Array  # [entries]
    task: jax.Array  # [entries] ids
    ends: jax.Array  # [F] number of windows in the files up to this one
    first_entry: jax.Array  # [F] where the file begins
    episode_entries: jax.Array  # [F] entries of an episode of this file


def data_dtype(data: Dataset, storage_dtype: str) -> np.dtype:
    """Type of the dataset's numbers in device memory."""
    types = {array.dtype for chunk in data.chunks for array in (chunk.obs, chunk.action, chunk.reward)}
    half = storage_dtype == "float16" or types == {np.dtype(np.float16)}
    return np.dtype(np.float16 if half else np.float32)


def data_shapes(data: Dataset, storage_dtype: str, mesh: Mesh) -> DeviceData:
    """Shapes, types and places of the dataset in device memory; its length is rounded up to be split evenly."""
    length = -(-data.num_entries // mesh.size) * mesh.size
    floats = partial(jax.ShapeDtypeStruct, dtype=data_dtype(data, storage_dtype), sharding=split(mesh, 0))
    table = [jax.ShapeDtypeStruct((len(data.chunks),), np.int32, sharding=replicated(mesh)) for _ in range(3)]
    task = jax.ShapeDtypeStruct((length,), np.int16, sharding=split(mesh, 0))
    obs = floats((length, data.obs_size))
    action = floats((length, data.action_size))
    return DeviceData(obs, action, floats((length,)), task, *table)


def choose_storage(storage: str, data: Dataset, storage_dtype: str, mesh: Mesh) -> str:
    """--storage, or the fastest that the dataset fits into with memory to spare."""
    if storage != "auto":
        return storage
    on_device = bytes_of(data_shapes(data, storage_dtype, mesh))
    if jax.devices()[0].platform != "cpu" and on_device < MEMORY_SHARE["device"] * least_available_bytes():
        return "device"
    available = available_bytes()  # of the machine, whose memory is not the device's
    if jax.process_count() > 1:
        available = multihost_utils.process_allgather(np.float64(available)).min()  # all decide alike
    if _processes_of_this_host() * data.nbytes < MEMORY_SHARE["host"] * available:
        return "host"
    return "disk"


def _processes_of_this_host() -> int:
    """How many processes of a distributed run share this machine's memory."""
    if jax.process_count() == 1:
        return 1
    host = np.array(zlib.crc32(socket.gethostname().encode()), np.uint32)
    return int((multihost_utils.process_allgather(host) == host).sum())


@partial(jax.jit, donate_argnums=0)
def write_piece(arrays: Any, piece: Any, start: int) -> Any:
    """Overwrites entries start, start + 1, ... of the arrays."""
    return jax.tree.map(lambda a, p: jax.lax.dynamic_update_slice_in_dim(a, p, start, 0), arrays, piece)


def to_devices(data: Dataset, storage_dtype: str, mesh: Mesh, horizon: int) -> DeviceData:
    """Copies a dataset into device memory, piece by piece: neither file nor set is ever whole in the machine's."""
    shapes = data_shapes(data, storage_dtype, mesh)
    dtype = data_dtype(data, storage_dtype)
    names = ("obs", "action", "reward", "task")
    by_device = split(mesh, 0).addressable_devices_indices_map((len(shapes.task),))
    parts = []
    for device, (rows,) in by_device.items():
        start = rows.start or 0
        stop = rows.stop or len(shapes.task)
        arrays = {}
        with jax.default_device(device):
            for name in names:
                shape = getattr(shapes, name)
                arrays[name] = jnp.zeros((stop - start, *shape.shape[1:]), shape.dtype)
        last = min(stop, data.num_entries)  # what is behind it fills the last device up
        for first in range(start, last, PIECE):
            piece = _read_piece(data, first, min(first + PIECE, last), dtype)
            arrays = write_piece(arrays, jax.device_put(piece, device), first - start)
        parts.append(arrays)
    whole = []
    for name in names:
        shape = getattr(shapes, name).shape
        whole.append(jax.make_array_from_single_device_arrays(shape, split(mesh, 0), [part[name] for part in parts]))
    table = [global_arrays(values.astype(np.int32), replicated(mesh)) for values in data.window_table(horizon)]
    return DeviceData(*whole, *table)


def _read_piece(data: Dataset, start: int, stop: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    piece = data.read(start, stop)
    for name in ("obs", "action", "reward"):
        with np.errstate(over="ignore"):
            piece[name] = piece[name].astype(dtype)
        if not np.isfinite(piece[name]).all():
            raise UserError(f"the dataset holds numbers beyond {np.finfo(dtype).max:.5g}, the largest of {dtype.name}")
    return piece


# ------------------------------------------------------------------------------------------------------------- Batches
def batch_shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    """Every device has its share of a batch's windows."""
    second_axis = split(mesh, 1)
    return {"obs": second_axis, "action": second_axis, "reward": second_axis, "task": split(mesh, 0)}


def batch_shapes(
    obs_size: int, action_size: int, batch_size: int, horizon: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and places of a batch as `Dataset.sample` draws it."""
    H, B = horizon, batch_size
    shapes = {"obs": (H + 1, B, obs_size), "action": (H, B, action_size), "reward": (H, B), "task": (B,)}
    types = dict.fromkeys(shapes, np.float32) | {"task": np.int32}
    places = batch_shardings(mesh)
    return {name: jax.ShapeDtypeStruct(shapes[name], types[name], sharding=places[name]) for name in shapes}


class Source:
    """Batches of a dataset, from where it is kept.

    Args:
        storage: "device", "host", "disk" or "auto": see `choose_storage`.
        storage_dtype: see `data_dtype`.
        batch_size, horizon: windows B of H + 1 entries.
    """

    def __init__(self, data: Dataset, storage: str, storage_dtype: str, mesh: Mesh, batch_size: int, horizon: int):
        self.storage = choose_storage(storage, data, storage_dtype, mesh)
        self._data = data
        self._storage_dtype = storage_dtype
        self._mesh = mesh
        self._batch_size = batch_size
        self._horizon = horizon
        self._loaded: Dataset | DeviceData = data

    def __str__(self) -> str:
        where = {"disk": "on disk", "host": "in memory", "device": "in device memory"}[self.storage]
        return f"{self._data.num_episodes} episodes, {self._data.nbytes / 1e9:.2f} GB, {where}"

    def shapes(self) -> DeviceData | dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and places of what `batches` yields."""
        if self.storage == "device":
            return data_shapes(self._data, self._storage_dtype, self._mesh)
        data = self._data
        return batch_shapes(data.obs_size, data.action_size, self._batch_size, self._horizon, self._mesh)

    def check(self) -> None:
        """Compares the checksums of files that will be read whole; UserError if one is damaged."""
        if self.storage != "disk":
            self._data.check_files()

    def load(self) -> None:
        """Reads what is kept in memory; UserError as `Dataset.to_host` and `to_devices`."""
        if self.storage == "host":
            self._loaded = self._data.to_host()
        if self.storage == "device":
            self._loaded = to_devices(self._data, self._storage_dtype, self._mesh, self._horizon)

    def batches(self, seed: int, first: int, readers: int) -> Generator[DeviceData | dict[str, jax.Array], None, None]:
        """Endlessly batch after batch from number `first` on, of several processes each with its share of the windows,
        or the same device memory each time; see `Dataset.batches`."""
        if isinstance(self._loaded, DeviceData):
            while True:
                yield self._loaded
        share = self._batch_size // jax.process_count()
        rows = slice(share * jax.process_index(), share * (jax.process_index() + 1))
        batches = self._loaded.batches(seed, self._batch_size, self._horizon, first, readers, rows)
        places = batch_shardings(self._mesh)
        with contextlib.closing(batches):
            for batch in batches:
                yield {name: global_arrays(batch[name], places[name]) for name in places}
