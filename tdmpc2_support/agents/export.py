"""Functions of an agent as files that run without this project: ONNX, or StableHLO for JAX alone.

    function = Function(policy, {"obs": obs}, ("action",))         # policy(params, obs) -> (action,)
    write_onnx("robot.onnx", function, params, {}, {"task": "walker-walk"})
    action = onnx_session("robot.onnx").run(None, {"obs": obs})

The shapes of inputs and outputs are fixed. What a file is about stands in an ONNX file's metadata, and in a JSON file
beside a StableHLO file: all values are text, numbers and lists in JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tdmpc2_support.agents.onnx_graph import Graph, layer_norms_as_nodes
from tdmpc2_support.agents.quantized import Params, write_new
from tdmpc2_support.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")  # that a StableHLO file runs on


class Function(NamedTuple):
    """What becomes a file."""

    call: Callable[..., tuple]  # of parameters and the inputs
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: tuple[str, ...]  # names of what it returns


def check_packages() -> None:
    """UserError if what writes and checks ONNX files is not installed."""
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--export onnx needs {' and '.join(missing)}: pip install -e '.[deploy]'")


def write_onnx(
    path: str | os.PathLike,
    function: Function,
    params: Params,
    stored: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a function with these parameters as an ONNX model, checked by `onnx.checker`.

    Args:
        stored: numbers of parameters as `quantize` makes them, by name, which the file holds instead of float32.

    Raises:
        UserError: JAX computes something that has no form in ONNX here; the file exists, or cannot be written.
    """
    graph = Graph()
    values = []
    for key, leaf in jax.tree_util.tree_leaves_with_path(params):
        component, *path_in = [part.key for part in key]
        name = ".".join([component, *(part for part in path_in if part != "params")])
        if name in stored and stored[name].dtype != np.float32:
            values.append(graph.stored(stored[name], stored.get(f"{name}_scale")))
        else:
            values.append(graph.constant(np.asarray(leaf, np.float32)))
    values += [graph.input(name, x.shape, x.dtype) for name, x in function.inputs.items()]
    with layer_norms_as_nodes():
        closed = jax.make_jaxpr(function.call)(params, *function.inputs.values())
    results = graph.function(closed, values)
    outputs = {
        name: (value, aval.shape) for name, value, aval in zip(function.outputs, results, closed.out_avals, strict=True)
    }
    model = graph.model(outputs, metadata, "tdmpc2-jax-single-file")
    write_new(path, model.SerializeToString())


def write_stablehlo(path: str | os.PathLike, function: Function, params: Params, metadata: Mapping[str, str]) -> None:
    """Writes a function with these parameters for `jax.export.deserialize(content).call(*inputs)`, and its metadata
    beside it; UserError if one of the two files exists, or cannot be written."""
    jitted = jax.jit(lambda *inputs: function.call(params, *inputs))
    exported = jax.export.export(jitted, platforms=PLATFORMS)(*function.inputs.values())
    content = bytes(exported.serialize())
    write_new(f"{path}.json", (json.dumps(dict(metadata), indent=2) + "\n").encode())
    try:
        write_new(path, content)
    except UserError:
        Path(f"{path}.json").unlink(missing_ok=True)
        raise


def runner(path: str | os.PathLike, kind: str) -> Callable[..., tuple]:
    """The function in a file of this kind, "onnx" or "stablehlo", as a function of named inputs."""
    if kind == "onnx":
        session = onnx_session(path)
        return lambda **inputs: tuple(session.run(None, {name: np.asarray(x) for name, x in inputs.items()}))
    exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    return lambda **inputs: exported.call(*inputs.values())


def onnx_session(path: str | os.PathLike) -> Any:
    """An onnxruntime session on one core of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
