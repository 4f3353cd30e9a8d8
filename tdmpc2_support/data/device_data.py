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
    """--storage, or the fastest that the dataset fits into with room to spare."""
    if storage != "auto":
        return storage
    on_device = bytes_of(data_shapes(data, storage_dtype, mesh))
    if jax.devices()[0].platform != "cpu" and on_device < 0.6 * least_available_bytes():
        return "device"
    host = np.array(zlib.crc32(socket.gethostname().encode()), np.uint32)
    neighbours = 1 if jax.process_count() == 1 else int((multihost_utils.process_allgather(host) == host).sum())
    return "host" if neighbours * data.nbytes < 0.4 * least_available_bytes() * jax.local_device_count() else "disk"


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
    shapes, dtype, piece_size = data_shapes(data, storage_dtype, mesh), data_dtype(data, storage_dtype), 500_000
    names, parts = ("obs", "action", "reward", "task"), []
    for device, (rows,) in split(mesh, 0).addressable_devices_indices_map((len(shapes.task),)).items():
        start, stop = rows.start or 0, rows.stop or len(shapes.task)
        with jax.default_device(device):
            wholes = {k: getattr(shapes, k) for k in names}
            arrays = {k: jnp.zeros((stop - start, *whole.shape[1:]), whole.dtype) for k, whole in wholes.items()}
        for at in range(start, min(stop, data.num_entries), piece_size):
            with np.errstate(over="ignore"):
                piece = data.read(at, min(at + piece_size, stop, data.num_entries))
                piece = {k: v if k == "task" else v.astype(dtype) for k, v in piece.items()}
            if not all(np.isfinite(values).all() for values in piece.values()):
                raise UserError("--storage-dtype float16: the dataset holds numbers beyond 65504")
            arrays = write_piece(arrays, jax.device_put(piece, device), at - start)
        parts.append(arrays)
    whole = [
        jax.make_array_from_single_device_arrays(getattr(shapes, k).shape, split(mesh, 0), [part[k] for part in parts])
        for k in names
    ]
    table = [global_arrays(values.astype(np.int32), replicated(mesh)) for values in data.window_table(horizon)]
    return DeviceData(*whole, *table)
