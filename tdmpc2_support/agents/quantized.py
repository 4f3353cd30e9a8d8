"""Quantised agents: files of a quarter of the size, and what that costs. Formulas: TD-MPC-Opt (arXiv 2507.01823) rounds
weights to integers; here each output channel has a scale of its own.

    tensors = quantize(params, "int8")                        # {"encoder.linear_0.kernel": int8 [in, out], ...}
    write_safetensors("robot.safetensors", tensors, {"script": ...})
    stored = read_safetensors("robot.safetensors")
    params = nested(dequantize(stored.tensors))               # float32, as the scripts' networks take them

The files are safetensors: eight bytes with the length of a header, the header in JSON, and the numbers. Nothing in them
can be executed, and the library of that name reads them in many languages. Who has NumPy alone needs this:

    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])              # {name: {"dtype", "shape", "data_offsets"}}
    start, stop = header[name]["data_offsets"]
    tensor = np.frombuffer(content[8 + length + start : 8 + length + stop], dtype).reshape(header[name]["shape"])

A kernel in int8 stands for `kernel * kernel_scale` (float32, one for each output); all else is float16.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tdmpc2_support.errors import UserError, one_line
from tdmpc2_support.files import new_file

VARIANTS = ("float16", "int8", "mixed")  # all float16; kernels int8; kernels int8 but for those of the encoder
Params = dict[str, Any]  # of networks, by component
_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "I8": np.dtype(np.int8)}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_MAX_HEADER = 2**20  # bytes; those of TD-MPC2 have 10,000


# ------------------------------------------------------------------------------------------------------------- Numbers
def flat(params: Params) -> dict[str, np.ndarray]:
    """Parameters {component: {"params": {layer: {field: array}}}} by their names, "component.layer.field"."""
    tensors = {}
    for component, value in params.items():
        layers = value["params"] if isinstance(value, Mapping) else {"": {"": value}}
        for layer, fields in layers.items():
            for field, array in fields.items():
                name = ".".join(part for part in (component, layer, field) if part)
                tensors[name] = np.asarray(array)
    return tensors


def nested(tensors: Mapping[str, np.ndarray]) -> Params:
    """The parameters that `flat` has named."""
    params: Params = {}
    for name, array in tensors.items():
        component, *path = name.split(".")
        if path:
            layer, field = path
            layers = params.setdefault(component, {"params": {}})["params"]
            layers.setdefault(layer, {})[field] = array
        else:
            params[component] = array
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
        exact_encoder = variant == "mixed" and name.startswith("encoder.")
        if name.endswith(".kernel") and variant != "float16" and not exact_encoder:
            scale = np.abs(array).max(-2).astype(np.float32) / 127
            scale[scale == 0] = 1
            tensors[name] = np.clip(np.rint(array / scale[..., None, :]), -127, 127).astype(np.int8)
            tensors[f"{name}_scale"] = scale
        else:
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if not np.isfinite(half).all():
                raise UserError(f"{name} holds numbers beyond 65504, which float16 ends at")
            tensors[name] = half
    return tensors


def dequantize(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that `quantize` was given, in float32."""
    values = {}
    for name, array in tensors.items():
        if name.endswith(".kernel_scale"):
            continue
        values[name] = np.array(array, np.float32)
        if array.dtype == np.int8:
            scale = tensors[f"{name}_scale"]
            if scale.shape != array.shape[:-2] + array.shape[-1:] or not (scale > 0).all() or np.isinf(scale).any():
                raise UserError(f"{name}_scale is not one positive number for each of {array.shape[-1]} columns")
            values[name] *= scale[..., None, :]
    return values


# --------------------------------------------------------------------------------------------------------------- Files
class Stored(NamedTuple):
    """What a file holds, or a part of it."""

    tensors: dict[str, np.ndarray]  # by name, "component.layer.field": those that were asked for
    shapes: dict[str, jax.ShapeDtypeStruct]  # of all tensors of the file
    record: dict[str, str]  # what the file tells about the agent


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], record: Mapping[str, str]) -> None:
    """Writes arrays (float32, float16, int8) as a safetensors file, whole or not at all; its metadata are `record` and
    a checksum.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    if Path(path).exists():
        raise UserError(f"{path} exists: choose another --output")
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}  # a scalar stays one
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    header = _header(shapes)
    checksum = _checksum(header, record)
    for name in header:
        checksum = zlib.crc32(arrays[name], checksum)
    content = save(arrays, metadata={**record, "crc32": str(checksum)})
    write_new(path, content)


def write_new(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file for --output; UserError if there is such a file, or it cannot be written."""
    try:
        with new_file(path, overwrite=False) as temporary:
            temporary.write_bytes(content)
    except FileExistsError:
        raise UserError(f"{path} exists: choose another --output") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None


def read_safetensors(path: str | os.PathLike, parts: Sequence[str] | None = None) -> Stored:
    """Reads a file that `write_safetensors` has written, and compares its checksum.

    Args:
        parts: components whose tensors are kept in memory, all if it is None: the others are looked at one by one.

    Raises:
        UserError: it is missing, damaged, or another file.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        _expect(2 <= length <= _MAX_HEADER, "it has no header")  # the library would take one of 100 MB
        with safe_open(path, framework="numpy") as file:
            return _read(file, parts)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or one_line(error)})") from None
    except (UserError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or no quantised agent ({one_line(error)})") from None
    except Exception as error:  # files can go wrong in as many ways as there are bytes
        raise UserError(f"{path} is damaged or no quantised agent ({type(error).__name__})") from None


def _read(file: safe_open, parts: Sequence[str] | None) -> Stored:
    shapes = {}
    for name in file.keys():
        tensor = file.get_slice(name)
        code = tensor.get_dtype()
        _expect(code in _TYPES, f"numbers of type {code} are not read")
        shapes[name] = jax.ShapeDtypeStruct(tuple(tensor.get_shape()), _TYPES[code])
    record = dict(file.metadata() or {})
    recorded = record.pop("crc32", None)
    header = _header(shapes)
    checksum = _checksum(header, record)
    tensors = {}
    for name in header:
        array = file.get_tensor(name)
        checksum = zlib.crc32(array, checksum)
        if parts is None or _component(name) in parts:
            tensors[name] = array
    _expect(recorded == str(checksum), "it has another checksum")
    return Stored(tensors, shapes, record)


def _header(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, dict[str, Any]]:
    """The header of a file of these tensors, in their order: the widest numbers first, then by name."""
    header = {}
    start = 0
    for name in sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name)):
        shape = shapes[name].shape
        stop = start + math.prod(shape) * shapes[name].dtype.itemsize
        header[name] = {"dtype": _CODES[shapes[name].dtype], "shape": [*shape], "data_offsets": [start, stop]}
        start = stop
    return header


def _checksum(header: Mapping[str, Any], record: Mapping[str, str]) -> int:
    """CRC-32 of a header with the record; the numbers follow in the header's order."""
    text = json.dumps({**header, "__metadata__": dict(record)}, sort_keys=True)
    return zlib.crc32(text.encode())


def _component(name: str) -> str:
    return name.partition(".")[0]


def _expect(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


# -------------------------------------------------------------------------------------------------------------- Errors
def errors(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far outputs of networks have moved, by name.

    Vectors [B, size]: the norm of the error relative to the vector's norm, the mean over all states. Scalars [B]: the
    root mean square of the error relative to that of the scalars. "action" [B, A], NaN where a task has fewer: the root
    mean square of the error itself, and as "action_moved" the share of entries that have moved by more than 0.1.
    """

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x))))

    result = {}
    for name in before:
        exact = np.asarray(before[name], np.float64)
        error = after[name] - exact
        if name == "action":
            error = error[~np.isnan(error)]
            result["action"] = rms(error)
            result["action_moved"] = float((np.abs(error) > 0.1).mean())
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
        outputs: called with parameters; returns what the networks compute with them on some states, by name; "action"
            is the policy's.
    """
    tensors = read_safetensors(path, tuple(params)).tensors
    written = nested(dequantize(tensors))
    before = outputs(params)
    rows = []
    for component in params:
        changed = params | {component: written[component]}
        sizes = _sizes(tensors, params, [component])
        rows.append({"component": component, **sizes, **errors(before, outputs(changed))})
    sizes = _sizes(tensors, params, [*params])
    rows.append({"component": "all", **sizes, **errors(before, outputs(written))})
    return rows


def _sizes(tensors: Mapping[str, np.ndarray], params: Params, components: Sequence[str]) -> dict[str, float]:
    """Bytes of these components in a file, and their share of the bytes in float32."""
    stored = sum(array.nbytes for name, array in tensors.items() if _component(name) in components)
    numbers = sum(array.size for name, array in flat(params).items() if _component(name) in components)
    return {"bytes": stored, "share": stored / (4 * numbers)}


def print_comparison(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """The table of `compare`."""
    print(f"errors {where}; a component alone is quantised in each row, all of them in the last")
    names = [name for name in rows[0] if name not in ("component", "bytes", "share", "action", "action_moved")]
    head = "".join(f"{name + ' %':>10}" for name in names)
    print(f"{'component':<12}{'kB':>10}{'of float32':>12}{head}{'action rms':>12}{'moved > 0.1':>13}")
    for row in rows:
        shares = "".join(f"{100 * row[name]:>10.2f}" for name in names)
        line = f"{row['component']:<12}{row['bytes'] / 1e3:>10.1f}{row['share']:>12.0%}{shares}"
        print(f"{line}{row['action']:>12.4f}{row['action_moved']:>13.1%}")
