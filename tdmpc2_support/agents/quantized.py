"""Quantised agents: files of a quarter of the size, and what that costs. Formulas: TD-MPC-Opt (arXiv 2507.01823) rounds
weights to integers; here each output channel has a scale of its own.

    tensors = quantize(params, "int8")                        # {"encoder.linear_0.kernel": int8 [in, out], ...}
    write_safetensors("robot.safetensors", tensors, {"script": ...})
    tensors, record = read_safetensors("robot.safetensors")   # left in the file
    params = nested(dequantize(tensors))                      # float32, as the scripts' networks take them

The files are safetensors: eight bytes with the length of a header, the header in JSON, and the numbers. Nothing in them
can be executed, and whatever reads that format reads them. Who has NumPy alone needs this:

    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])              # {name: {"dtype", "shape", "data_offsets"}}
    start, stop = header[name]["data_offsets"]
    tensor = np.frombuffer(content[8 + length + start : 8 + length + stop], dtype).reshape(header[name]["shape"])

A kernel in int8 stands for `kernel * kernel_scale` (float32, one for each output); all else is float16.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdmpc2_support.errors import UserError

VARIANTS = ("float16", "int8", "mixed")  # all float16; kernels int8; kernels int8 but for those of the encoder
Params = dict[str, Any]  # of networks, by component
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
_MAX_HEADER = 2**20  # bytes; those of TD-MPC2 have 10,000


# ------------------------------------------------------------------------------------------------------------- Numbers
def flat(params: Params) -> dict[str, np.ndarray]:
    """Parameters {component: {"params": {layer: {field: array}}}} by their names, "component.layer.field"."""
    tensors = {}
    for component, value in params.items():
        layers = value["params"] if isinstance(value, Mapping) else {"": {"": value}}
        for layer, fields in layers.items():
            tensors |= {".".join(filter(None, (component, layer, f))): np.asarray(x) for f, x in fields.items()}
    return tensors


def nested(tensors: Mapping[str, np.ndarray]) -> Params:
    """The parameters that `flat` has named."""
    params: Params = {}
    for name, array in tensors.items():
        component, *path = name.split(".")
        if not path:
            params[component] = array
            continue
        layer, field = path
        params.setdefault(component, {"params": {}})["params"].setdefault(layer, {})[field] = array
    return params


def quantize(params: Params, variant: str) -> dict[str, np.ndarray]:
    """The tensors of a file of this variant, by name; an int8 kernel [..., in, out] has a `kernel_scale` [..., out].

    Raises:
        UserError: a number is beyond float16, or none at all.
    """
    tensors = {}
    for name, array in flat(params).items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds numbers that are not finite")
        encoder = name.startswith("encoder.") and variant == "mixed"
        if name.endswith(".kernel") and variant != "float16" and not encoder:
            scale = np.abs(array).max(-2).astype(np.float32) / 127
            scale[scale == 0] = 1
            tensors[name] = np.clip(np.rint(array / scale[..., None, :]), -127, 127).astype(np.int8)
            tensors[f"{name}_scale"] = scale
        else:
            with np.errstate(over="ignore"):
                tensors[name] = array.astype(np.float16)
            if not np.isfinite(tensors[name]).all():
                raise UserError(f"{name} holds numbers beyond 65504, which float16 ends at")
    return tensors


def dequantize(tensors: Mapping[str, np.ndarray], parts: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The same tensors in float32, of all components or of `parts`."""
    values = {}
    for name, array in tensors.items():
        if name.endswith(".kernel_scale") or (parts and name.partition(".")[0] not in parts):
            continue
        values[name] = np.array(array, np.float32)
        if array.dtype == np.int8:
            values[name] *= tensors[f"{name}_scale"][..., None, :]
    return values


# --------------------------------------------------------------------------------------------------------------- Files
def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], record: Mapping[str, str]) -> None:
    """Writes arrays as a safetensors file, whole or not at all; its metadata are `record` and a checksum.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    path, types = Path(path), {np.dtype(code): name for name, code in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(record)}
    numbers = bytearray()
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # so that all are aligned
        array = tensors[name].astype(tensors[name].dtype.newbyteorder("<"), copy=False)
        offsets = [len(numbers), len(numbers) + array.nbytes]
        header[name] = {"dtype": types[array.dtype], "shape": [*array.shape], "data_offsets": offsets}
        numbers += array.tobytes()
    header["__metadata__"]["crc32"] = str(_checksum(header, numbers))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        if path.exists():
            raise UserError(f"{path} exists: choose another --output")
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file that `write_safetensors` has written, read-only and left in the file, which must not change
    while they are in use; and its record.

    Raises:
        UserError: it is missing, damaged, or another file.
    """
    try:
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        length = int.from_bytes(content[:8], "little")
        _expect(2 <= length <= min(len(content) - 8, _MAX_HEADER), "it has no header")
        header, numbers = json.loads(bytes(content[8 : 8 + length])), content[8 + length :]
        record = header["__metadata__"]
        _expect(all(type(value) is str for value in record.values()), "its record is no text")
        _expect("crc32" in record and int(record["crc32"]) == _checksum(header, numbers), "it has another checksum")
        tensors = {name: _tensor(entry, numbers) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # files can go wrong in as many ways as there are bytes
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"{path} is damaged or no quantised agent ({reason})") from None
    return tensors, record


def _tensor(entry: Mapping[str, Any], numbers: memoryview) -> np.ndarray:
    dtype, shape, (start, stop) = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    fits = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and stop <= len(numbers)
    _expect(fits and stop - start == math.prod(shape) * dtype.itemsize, "a tensor is not where its header says")
    return np.frombuffer(numbers[start:stop], dtype).reshape(shape)


def _checksum(header: Mapping[str, Any], numbers: bytearray | memoryview) -> int:
    record = {name: value for name, value in header["__metadata__"].items() if name != "crc32"}
    text = json.dumps(dict(header) | {"__metadata__": record}, sort_keys=True)
    return zlib.crc32(numbers, zlib.crc32(text.encode()))


def _expect(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


# -------------------------------------------------------------------------------------------------------------- Errors
class Visited:
    """Vectorised environments that keep what was seen and done in them, of the environments that were stepped."""

    def __init__(self, envs: Any):
        self._envs, self._obs, self._action, self._active = envs, [], [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envs, name)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = self._envs.reset(**options)
        self._obs = [np.copy(obs)]
        return obs, info

    def step(self, action: np.ndarray, active: np.ndarray) -> tuple:
        result = self._envs.step(action, active=active)
        self._action.append(np.copy(action))
        self._active.append(np.copy(active))
        self._obs.append(np.copy(result[0]))
        return result

    def windows(self, count: int, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`count` states, evenly spread over what was visited, the actions that followed, and the numbers of the
        environments: obs [count, O], action [H, count, A], env [count]."""
        action, active = np.stack(self._action), np.stack(self._active)  # [steps, n, A], [steps, n]
        whole = np.logical_and.reduce([active[i : len(active) - horizon + 1 + i] for i in range(horizon)])
        step, env = np.nonzero(whole)
        chosen = np.linspace(0, len(step) - 1, count).astype(int)
        step, env = step[chosen], env[chosen]
        actions = np.stack([action[step + i, env] for i in range(horizon)])
        return np.stack(self._obs)[step, env], actions, env


def errors(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far outputs of networks have moved: vectors [B, size] by the norm of the error relative to theirs, the mean
    over all states; scalars [B] by the root mean square of the error relative to theirs; "action" [B, A], NaN where a
    task has fewer, by that of the error itself, and the share of entries that have moved by more than 0.1."""

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x))))

    result = {}
    for name in before:
        exact = np.asarray(before[name], np.float64)
        error = after[name] - exact
        if name == "action":
            error = error[~np.isnan(error)]
            result |= {"action": rms(error), "action_moved": float((np.abs(error) > 0.1).mean())}
        elif exact.ndim == 2:
            norms = np.linalg.norm(exact, axis=1)
            result[name] = float(np.mean(np.linalg.norm(error, axis=1) / np.maximum(norms, 1e-12)))
        else:
            result[name] = rms(error) / max(rms(exact), 1e-12)
    return result


def compare(
    path: str | os.PathLike, params: Params, outputs: Callable[[Params], Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """What the quantisation of a file has changed in the agent with these parameters that it was made of: a row for
    each component that is quantised alone, and one for all.

    Args:
        outputs: gives what the networks with some parameters compute on some states, by name; "action" is the policy's.
    """
    tensors, _ = read_safetensors(path)
    tensors = {name: array for name, array in tensors.items() if name.partition(".")[0] in params}
    written, before, rows = nested(dequantize(tensors)), outputs(params), []
    for component in (*params, None):
        changed = written if component is None else params | {component: written[component]}
        mine = [x.nbytes for name, x in tensors.items() if component in (None, name.partition(".")[0])]
        exact = [x.size for name, x in flat(params).items() if component in (None, name.partition(".")[0])]
        row = {"component": component or "all", "bytes": sum(mine), "share": sum(mine) / (4 * sum(exact))}
        rows.append(row | errors(before, outputs(changed)))
    return rows


def print_comparison(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """The table of `compare`."""
    print(f"errors {where}; a component alone is quantised in each row, all of them in the last")
    names = [name for name in rows[0] if name not in ("component", "bytes", "share", "action", "action_moved")]
    head = "".join(f"{name + ' %':>10}" for name in names)
    print(f"{'component':<10}{'kB':>10}{'of float32':>12}{head}{'action rms':>12}{'moved > 0.1':>13}")
    for row in rows:
        shares = "".join(f"{100 * row[name]:>10.2f}" for name in names)
        line = f"{row['component']:<10}{row['bytes'] / 1e3:>10.1f}{row['share']:>12.0%}{shares}"
        print(f"{line}{row['action']:>12.4f}{row['action_moved']:>13.1%}")
