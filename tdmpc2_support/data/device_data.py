"""Offline datasets in the memory of devices, and where a dataset is best kept.

storage = choose_storage("auto", dataset, "float32", mesh)   # "disk", "host" or "device"
data = to_devices(dataset, "float32", mesh, horizon=3)       # split over the devices
"""

import socket
import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tdmpc2_support.data.datasets import Dataset
from tdmpc2_support.devices import bytes_of, global_arrays, least_available_bytes, replicated, split
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
    available = least_available_bytes() * jax.local_device_count()
    if _processes_of_this_host() * data.nbytes < MEMORY_SHARE["host"] * available:
        return "host"
    return "disk"


def _processes_of_this_host() -> int:
    """How many processes of a distributed run share this machine's memory."""
    if jax.process_count() == 1:
        return 1
    host = np.array(zlib.crc32(socket.gethostname().encode()), np.uint32)
    return int((multihost_utils.process_allgather(host) == host).sum())


def describe(data: Dataset, storage: str) -> str:
    """How large the dataset is, and where it is kept."""
    where = {"disk": "on disk", "host": "in memory", "device": "in device memory"}[storage]
    return f"{data.num_episodes} episodes, {data.nbytes / 1e9:.2f} GB, {where}"


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
            raise UserError("--storage-dtype float16: the dataset holds numbers beyond 65504")
    return piece
