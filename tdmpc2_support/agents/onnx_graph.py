"""A JAX function as an ONNX graph: what `jax.make_jaxpr` says of it, written with ONNX operators (opset 18).

    graph = Graph()
    inputs = [graph.input("obs", (24,), np.float32)]
    with layer_norms_as_nodes():
        jaxpr = jax.make_jaxpr(policy)(obs)
    (action,) = graph.function(jaxpr, inputs)
    model = graph.model({"action": (action, (6,))}, {"task": "walker-walk"}, "policy")

All shapes are fixed. Loops (`lax.scan`) are written out, what constants alone decide is computed here, equal nodes are
one, and what no output needs is left out. It knows the primitives that the networks and the planner of these scripts
need; another one is refused by its name. `onnx` writes the model, and is imported only for that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tdmpc2_support.errors import UserError

OPSET = 18
EPSILON = 1e-5  # of the networks' LayerNorms
IR_VERSION = 9
_SMALL = 4096  # numbers: larger constants are not made out of smaller ones


class Value(NamedTuple):
    """An array of the graph. Its shape may have a 1 where JAX has a larger size: it is broadcast where it is used."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    constant: np.ndarray | None = None


class Node(NamedTuple):
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@jax.jit
def one_layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, which becomes one node of a graph by this function's name."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


def layer_norms_as_nodes() -> contextlib.AbstractContextManager:
    """While a function is traced in this context, LayerNorms of Flax are nodes: ten of ONNX's take twice as long."""

    def layer_norm(call: Callable, args: tuple, options: dict, context: Any) -> Any:
        if not isinstance(context.module, nn.LayerNorm) or context.method_name != "__call__":
            return call(*args, **options)
        if context.module.epsilon != EPSILON:
            raise UserError(f"ONNX export: a LayerNorm with epsilon {context.module.epsilon}, not {EPSILON}")
        params = context.module.variables["params"]
        return one_layer_norm(*args, params["scale"], params["bias"])

    return nn.intercept_methods(layer_norm)


class Graph:
    """Collects nodes and constants."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._inputs: list[Value] = []
        self._arrays: dict[str, np.ndarray] = {}  # constants by name
        self._known: dict[Any, Any] = {}  # nodes and constants that exist
        self.made_by: dict[str, tuple[str, list[Value]]] = {}  # operator and inputs of a value, by its name

    # ------------------------------------------------------------------------------------------------ Arrays and nodes
    def input(self, name: str, shape: tuple[int, ...], dtype: Any) -> Value:
        value = Value(name, shape, np.dtype(dtype))
        self._inputs.append(value)
        return value

    def constant(self, array: Any) -> Value:
        """An array that is known now."""
        array = np.asarray(array, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = f"c{len(self._arrays)}"
            self._arrays[name] = array
            self._known[key] = Value(name, array.shape, array.dtype, array)
        return self._known[key]

    def stored(self, array: np.ndarray, scale: np.ndarray | None = None) -> Value:
        """float32 numbers that the file holds in another type, int8 with a scale [..., out] or float16."""
        value = self.node("Cast", [self.constant(array)], array.shape, np.float32, to=np.float32)
        if scale is None:
            return value
        return self.node("Mul", [value, self.constant(scale[..., None, :])], array.shape, np.float32)

    def node(self, op: str, inputs: Sequence[Value], shape: Sequence[int], dtype: Any, **attributes: Any) -> Value:
        return self.nodes(op, inputs, [tuple(shape)], dtype, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[Value], shapes: Sequence[tuple], dtype: Any, **attributes: Any
    ) -> list[Value]:
        """A node with an output for each of `shapes`; the same node again is the first one."""
        key = (op, tuple(value.name for value in inputs), repr(sorted(attributes.items())))
        if key not in self._known:
            names = [f"n{len(self._nodes)}_{i}" for i in range(len(shapes))]
            self._nodes.append(Node(op, key[1], tuple(names), attributes))
            self.made_by |= dict.fromkeys(names, (op, list(inputs)))
            kind = np.dtype(dtype)
            self._known[key] = [Value(name, tuple(map(int, s)), kind) for name, s in zip(names, shapes, strict=True)]
        return self._known[key]

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        shape = tuple(map(int, shape))
        if shape == value.shape:
            return value
        if value.constant is not None:
            return self.constant(value.constant.reshape(shape))
        wanted = self.constant(np.array(shape, np.int64))
        return self.node("Reshape", [value, wanted], shape, value.dtype, allowzero=1)  # a 0 is a size, too

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        order = [int(i) for i in order]
        shape = [value.shape[i] for i in order]
        if order == sorted(order):
            return value
        moved = [i for i in order if value.shape[i] != 1]
        if moved == sorted(moved):
            return self.reshape(value, shape)
        if value.constant is not None:
            return self.constant(value.constant.transpose(order))
        return self.node("Transpose", [value], shape, value.dtype, perm=order)

    def whole(self, value: Value, shape: Sequence[int]) -> Value:
        """The array with all its numbers: what is broadcast elsewhere is repeated."""
        shape = tuple(map(int, shape))
        if value.shape == shape:
            return value
        if value.constant is not None and math.prod(shape) <= _SMALL:
            return self.constant(np.broadcast_to(value.constant, shape))
        return self.node("Expand", [value, self.constant(np.array(shape, np.int64))], shape, value.dtype)

    def cast(self, value: Value, dtype: Any) -> Value:
        if value.dtype == np.dtype(dtype):
            return value
        if value.constant is not None:
            return self.constant(value.constant.astype(dtype))
        return self.node("Cast", [value], value.shape, dtype, to=np.dtype(dtype).type)

    def slice(self, value: Value, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> Value:
        axes = [i for i in range(len(value.shape)) if (starts[i], stops[i], steps[i]) != (0, value.shape[i], 1)]
        if not axes:
            return value
        shape = list(value.shape)
        for i in axes:
            shape[i] = -(-(stops[i] - starts[i]) // steps[i])
        bounds = [self.constant(np.array([x[i] for i in axes], np.int64)) for x in (starts, stops)]
        more = [self.constant(np.array(axes, np.int64)), self.constant(np.array([steps[i] for i in axes], np.int64))]
        return self.node("Slice", [value, *bounds, *more], shape, value.dtype)

    def part(self, value: Value, axis: int, start: int, stop: int) -> Value:
        """Entries start ... stop of one axis."""
        starts = [0] * len(value.shape)
        stops = list(value.shape)
        starts[axis] = start
        stops[axis] = stop
        return self.slice(value, starts, stops, [1] * len(value.shape))

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.node("Concat", values, shape, values[0].dtype, axis=int(axis))

    # ------------------------------------------------------------------------------------------------------- Functions
    def function(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """The outputs of a function of these inputs."""
        return self._evaluate(closed.jaxpr, [self.constant(x) for x in closed.consts], inputs)

    def _evaluate(self, jaxpr: Jaxpr, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(variable: Any) -> Value:
            if isinstance(variable, Literal):
                return self.constant(np.asarray(variable.val, variable.aval.dtype))
            return values[variable]

        for equation in jaxpr.eqns:
            operands = [read(variable) for variable in equation.invars]
            results = self._apply(equation, operands)
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _apply(self, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
        name = equation.primitive.name
        params = equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
        if name == "scan":
            return self._scan(equation, operands)
        if params.get("name") == one_layer_norm.__name__ and len(operands[1].shape) == 1:
            inputs = [self.whole(operands[0], equation.invars[0].aval.shape), *operands[1:]]
            shape = inputs[0].shape
            return [self.node("LayerNormalization", inputs, shape, np.float32, axis=-1, epsilon=EPSILON)]
        if inner is not None:  # a function that JAX calls: jit, custom_jvp_call
            return self._call(inner, operands)
        size = sum(math.prod(variable.aval.shape) for variable in equation.outvars)
        of_constants = all(operand.constant is not None for operand in operands)
        if of_constants and size <= max(_SMALL, *(operand.constant.size for operand in operands), 0):
            return self._compute(equation, operands)
        if name not in _RULES:
            raise UserError(f"ONNX export: the primitive {name!r} of JAX is not known")
        return _RULES[name](self, operands, equation)

    def _call(self, inner: ClosedJaxpr | Jaxpr, operands: list[Value]) -> list[Value]:
        if isinstance(inner, ClosedJaxpr):
            return self.function(inner, operands)
        return self._evaluate(inner, [], operands)

    def _compute(self, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
        """The results of what constants alone decide."""
        shapes = [variable.aval.shape for variable in equation.invars]
        arrays = [np.broadcast_to(x.constant, shape) for x, shape in zip(operands, shapes, strict=True)]
        results = equation.primitive.bind(*arrays, **equation.params)
        return [self.constant(x) for x in (results if equation.primitive.multiple_results else [results])]

    def _scan(self, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
        """Inputs are constants, what is carried on, and rows; versions of JAX name their numbers in other ways, so that
        they are told by their axes: stacked rows have one more than a row."""
        params = equation.params
        body = params["jaxpr"]
        inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
        rows_of = [variable.aval for variable in inner.invars]
        stacked_at = [len(x.aval.shape) > len(row.shape) for x, row in zip(equation.invars, rows_of, strict=True)]
        outer = [variable.aval.shape for variable in equation.outvars]
        num_carry = sum(len(x) == len(y.aval.shape) for x, y in zip(outer, inner.outvars, strict=True))
        num_rows = sum(stacked_at)
        first_row = len(operands) - num_rows
        constants = operands[: first_row - num_carry]
        carry = operands[first_row - num_carry : first_row]
        shapes = [(params["length"], *row.shape) for row in rows_of[first_row:]]
        stacked = [self.whole(x, shape) for x, shape in zip(operands[first_row:], shapes, strict=True)]
        outputs = []
        for i in reversed(range(params["length"])) if params["reverse"] else range(params["length"]):
            each = [self.reshape(self.part(x, 0, i, i + 1), x.shape[1:]) for x in stacked]
            results = self._call(body, [*constants, *carry, *each])
            carry = results[:num_carry]
            outputs.append(results[num_carry:])
        if params["reverse"]:
            outputs.reverse()
        shapes = [variable.aval.shape for variable in inner.outvars[num_carry:]]
        rows = [
            [self.reshape(self.whole(step[k], shape), (1, *shape)) for step in outputs]
            for k, shape in enumerate(shapes)
        ]
        return [*carry, *(self.concat(row, 0) for row in rows)]

    # ---------------------------------------------------------------------------------------------------------- Model
    def model(self, outputs: Mapping[str, tuple[Value, Sequence[int]]], metadata: Mapping[str, str], name: str) -> Any:
        """The ONNX model with these outputs, each with its shape."""
        import onnx
        from onnx import helper, numpy_helper

        results = {}
        for key, (value, shape) in outputs.items():
            value = self.whole(value, shape)
            results[key] = Value(key, value.shape, value.dtype)
            self._nodes.append(Node("Identity", (value.name,), (key,), {}))
        needed = set(results)
        kept = []
        for node in reversed(self._nodes):
            if needed & {*node.outputs}:
                needed |= {*node.inputs}
                kept.append(node)

        def onnx_type(dtype: Any) -> int:
            return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

        def info(value: Value) -> Any:
            return helper.make_tensor_value_info(value.name, onnx_type(value.dtype), value.shape)

        nodes = []
        for node in reversed(kept):
            attributes = {k: onnx_type(v) if k == "to" else v for k, v in node.attributes.items()}
            nodes.append(helper.make_node(node.op, node.inputs, node.outputs, name=node.outputs[0], **attributes))
        arrays = [numpy_helper.from_array(array, key) for key, array in self._arrays.items() if key in needed]
        graph = helper.make_graph(nodes, name, [*map(info, self._inputs)], [*map(info, results.values())], arrays)
        imports = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name=name)
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model


# ---------------------------------------------------------------------------------------------------------- Primitives
Rule = Callable[[Graph, list[Value], JaxprEqn], list[Value]]


def _broadcast_shape(operands: Sequence[Value]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(operand.shape for operand in operands))


def _elementwise(op: str, **attributes: Any) -> Rule:
    def rule(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
        dtype = equation.outvars[0].aval.dtype
        return [graph.node(op, operands, _broadcast_shape(operands), dtype, **attributes)]

    return rule


def _add(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    """Nothing is added to what zero is added to; a bias becomes part of the product that it is added to."""
    shape = _broadcast_shape(operands)
    for x, y in (operands, operands[::-1]):
        if x.constant is not None and x.shape == () and x.constant == 0 and y.shape == shape:
            return [y]
        op, inputs = graph.made_by.get(y.name, ("", []))
        product = inputs[0] if op == "Reshape" else y
        op, inputs = graph.made_by.get(product.name, ("", []))
        one_row = math.prod(x.shape) == shape[-1] == x.shape[-1] if x.shape else False
        if (
            op == "MatMul"
            and len(product.shape) == 2
            and one_row
            and product.shape[-1] == shape[-1]
            and y.shape == shape
        ):
            inputs = [*inputs, graph.reshape(x, shape[-1:])]
            return [graph.reshape(graph.node("Gemm", inputs, product.shape, y.dtype), shape)]
    return [graph.node("Add", operands, shape, equation.outvars[0].aval.dtype)]


def _composed(formula: Callable[..., Value]) -> Rule:
    """formula(do, x, ...) with do(op, ...): elementwise operators of ONNX."""

    def rule(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
        dtype = equation.outvars[0].aval.dtype

        def do(op: str, *parts: Any, dtype: Any = dtype) -> Value:
            values = [x if isinstance(x, Value) else graph.constant(np.asarray(x, dtype)) for x in parts]
            return graph.node(op, values, _broadcast_shape(values), dtype)

        return [formula(do, *operands)]

    return rule


def _reduce(op: str) -> Rule:
    def rule(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
        aval = equation.invars[0].aval
        axes = [int(axis) for axis in equation.params["axes"]]
        shape = [size for axis, size in enumerate(aval.shape) if axis not in axes]
        value = operands[0]
        wide = [value.shape[i] if i not in axes else aval.shape[i] for i in range(len(aval.shape))]
        value = graph.whole(value, wide)
        shape = [size for i, size in enumerate(value.shape) if i not in axes]
        inputs = [value, graph.constant(np.array(axes, np.int64))]
        return [graph.node(op, inputs, shape, value.dtype, keepdims=0)]

    return rule


def _argmax(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    (axis,) = map(int, equation.params["axes"])
    aval = equation.invars[0].aval
    shape = [size for i, size in enumerate(aval.shape) if i != axis]
    value = graph.whole(operands[0], aval.shape)
    index = graph.node("ArgMax", [value], shape, np.int64, axis=axis, keepdims=0)
    return [graph.cast(index, equation.params["index_dtype"])]


def _cumprod(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    axis = equation.params["axis"]
    value = graph.whole(operands[0], equation.invars[0].aval.shape)
    parts = [graph.part(value, axis, i, i + 1) for i in range(value.shape[axis])]
    if equation.params["reverse"]:
        parts.reverse()
    products = [parts[0]]
    for part in parts[1:]:
        products.append(graph.node("Mul", [products[-1], part], part.shape, part.dtype))
    if equation.params["reverse"]:
        products.reverse()
    return [graph.concat(products, axis)]


def _top_k(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    value = graph.whole(operands[0], equation.invars[0].aval.shape)
    k = int(equation.params["k"])
    shape = (*value.shape[:-1], k)
    inputs = [value, graph.constant(np.array([k], np.int64))]
    values, indices = graph.nodes("TopK", inputs, [shape, shape], value.dtype, axis=-1)
    indices = indices._replace(dtype=np.dtype(np.int64))
    return [values, graph.cast(indices, np.int32)]


def _broadcast_in_dim(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    """Only axes of size 1 are added here."""
    shape = [1] * len(equation.params["shape"])
    for axis, size in zip(equation.params["broadcast_dimensions"], operands[0].shape, strict=True):
        shape[axis] = size
    return [graph.reshape(operands[0], shape)]


def _reshape(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    before = equation.invars[0].aval.shape
    return [graph.reshape(graph.whole(operands[0], before), equation.outvars[0].aval.shape)]


def _squeeze(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    gone = {int(axis) for axis in equation.params["dimensions"]}
    return [graph.reshape(operands[0], [size for i, size in enumerate(operands[0].shape) if i not in gone])]


def _transpose(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    return [graph.transpose(operands[0], equation.params["permutation"])]


def _concatenate(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    values = [graph.whole(x, v.aval.shape) for x, v in zip(operands, equation.invars, strict=True)]
    return [graph.concat(values, int(equation.params["dimension"]))]


def _stack(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    axis = int(equation.params["axis"])
    shape = list(equation.outvars[0].aval.shape)
    shape[axis] = 1
    values = [graph.whole(x, v.aval.shape) for x, v in zip(operands, equation.invars, strict=True)]
    return [graph.concat([graph.reshape(x, shape) for x in values], axis)]


def _split(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    value = graph.whole(operands[0], equation.invars[0].aval.shape)
    ends = np.cumsum([int(size) for size in equation.params["sizes"]])
    axis = int(equation.params["axis"])
    return [graph.part(value, axis, int(i), int(j)) for i, j in zip([0, *ends[:-1]], ends, strict=True)]


def _slice(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    value = graph.whole(operands[0], equation.invars[0].aval.shape)
    steps = equation.params["strides"] or [1] * len(value.shape)
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    return [graph.slice(value, *([int(i) for i in x] for x in (starts, stops, steps)))]


def _dynamic_slice(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    value = graph.whole(operands[0], equation.invars[0].aval.shape)
    sizes = [int(size) for size in equation.params["slice_sizes"]]
    for axis, (start, size) in enumerate(zip(operands[1:], sizes, strict=True)):
        free = value.shape[axis] - size
        if free == 0:
            continue
        if start.constant is not None:
            first = int(np.clip(start.constant, 0, free))
            value = graph.part(value, axis, first, first + size)
            continue
        inside = graph.node(
            "Clip", [start, *(graph.constant(np.array(x, start.dtype)) for x in (0, free))], (), start.dtype
        )
        rows = graph.constant(np.arange(size, dtype=np.int64))
        index = graph.node("Add", [graph.cast(inside, np.int64), rows], (size,), np.int64)
        shape = [*value.shape[:axis], size, *value.shape[axis + 1 :]]
        value = graph.node("Gather", [value, index], shape, value.dtype, axis=axis)
    return [value]


def _gather(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    """Of some axes one entry each, named by indices; of the others all. Batching axes must have size 1."""
    numbers = equation.params["dimension_numbers"]
    sizes = [int(size) for size in equation.params["slice_sizes"]]
    value = graph.whole(operands[0], equation.invars[0].aval.shape)
    indices = graph.cast(graph.whole(operands[1], equation.invars[1].aval.shape), np.int64)
    batching = {int(axis) for axis in numbers.operand_batching_dims}
    drawn = [int(axis) for axis in numbers.start_index_map]
    chosen = [(i, axis) for i, axis in enumerate(drawn) if sizes[axis] != value.shape[axis] or axis in batching]
    supported = all(value.shape[axis] == 1 for axis in batching) and all(sizes[axis] == 1 for _, axis in chosen)
    others = [axis for axis in range(len(value.shape)) if axis not in {*drawn, *batching}]
    if not supported or any(sizes[axis] != value.shape[axis] for axis in others):
        raise UserError("ONNX export: JAX gathers in a way that is not known")
    axes = [axis for _, axis in chosen]
    rest = [axis for axis in range(len(value.shape)) if axis not in {*axes, *batching}]
    shape = tuple(value.shape[axis] for axis in rest)
    batch = indices.shape[:-1]
    named = [graph.part(indices, len(batch), i, i + 1) for i, _ in chosen]
    ends = np.array([value.shape[axis] - 1 for axis in axes], np.int64)
    value = graph.reshape(graph.transpose(value, [*batching, *axes, *rest]), [*(ends + 1), *shape])
    index = graph.concat(named, len(batch))
    index = graph.node("Max", [index, graph.constant(np.zeros(len(axes), np.int64))], index.shape, np.int64)
    index = graph.node("Min", [index, graph.constant(ends)], index.shape, np.int64)
    result = graph.node("GatherND", [value, index], (*batch, *shape), value.dtype)
    offsets = [int(i) for i in numbers.offset_dims]
    gone = {int(i) for i in numbers.collapsed_slice_dims} | batching
    seen = [sizes[axis] for axis in range(len(sizes)) if axis not in gone]  # of the axes that the result has
    result = graph.reshape(result, [*batch, *seen])
    order = [0] * (len(batch) + len(offsets))
    behind = iter(range(len(batch), len(order)))
    before = iter(range(len(batch)))
    for i in range(len(order)):
        order[i] = next(behind) if i in offsets else next(before)
    return [graph.transpose(result, order)]


def _scatter(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    """x.at[i].set(...) of one axis, i known."""
    numbers = equation.params["dimension_numbers"]
    value, index, update = operands
    one = len(numbers.scatter_dims_to_operand_dims) == 1 and index.constant is not None and index.constant.size == 1
    if not one or numbers.inserted_window_dims != numbers.scatter_dims_to_operand_dims:
        raise UserError("ONNX export: JAX scatters in a way that is not known")
    (axis,) = map(int, numbers.inserted_window_dims)
    shape = equation.invars[0].aval.shape
    value = graph.whole(value, shape)
    i = int(index.constant.item())
    row = [*shape[:axis], 1, *shape[axis + 1 :]]
    update = graph.reshape(graph.whole(update, equation.invars[2].aval.shape), row)
    parts = [graph.part(value, axis, 0, i)] * (i > 0) + [update]
    parts += [graph.part(value, axis, i + 1, shape[axis])] * (i + 1 < shape[axis])
    return [graph.concat(parts, axis)]


def _pad(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    value = graph.whole(operands[0], equation.invars[0].aval.shape)
    low, high, inner = np.array(equation.params["padding_config"]).T
    if inner.any() or (low < 0).any() or (high < 0).any():
        raise UserError("ONNX export: JAX pads in a way that is not known")
    kind = value.dtype if value.dtype != bool else np.dtype(np.int32)
    pads = graph.constant(np.array([*low, *high], np.int64))
    inputs = [graph.cast(value, kind), pads, graph.cast(operands[1], kind)]
    padded = graph.node("Pad", inputs, equation.outvars[0].aval.shape, kind)
    return [graph.cast(padded, value.dtype)]


def _select_n(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    which, no, yes = operands
    inputs = [graph.cast(which, bool), yes, no]
    return [graph.node("Where", inputs, _broadcast_shape(inputs), yes.dtype)]


def _integer_pow(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    value = operands[0]
    if equation.params["y"] == 2:
        return [graph.node("Mul", [value, value], value.shape, value.dtype)]
    power = graph.constant(np.asarray(equation.params["y"], value.dtype))
    return [graph.node("Pow", [value, power], value.shape, value.dtype)]


def _dot_general(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    """MatMul of [batch, rows, inner] and [batch, inner, columns]; the result has axes batch, rows, columns."""
    (left_inner, right_inner), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (graph.whole(x, v.aval.shape) for x, v in zip(operands, equation.invars, strict=True))
    left_free = [i for i in range(len(left.shape)) if i not in {*left_inner, *left_batch}]
    right_free = [i for i in range(len(right.shape)) if i not in {*right_inner, *right_batch}]
    batch = [left.shape[i] for i in left_batch]
    rows = [left.shape[i] for i in left_free]
    columns = [right.shape[i] for i in right_free]
    inner = math.prod(left.shape[i] for i in left_inner)
    left = graph.transpose(left, [*left_batch, *left_free, *left_inner])
    right = graph.transpose(right, [*right_batch, *right_inner, *right_free])
    together = [math.prod(batch)] if batch else []
    left = graph.reshape(left, [*together, math.prod(rows), inner])
    right = graph.reshape(right, [*together, inner, math.prod(columns)])
    shape = [*together, math.prod(rows), math.prod(columns)]
    return [graph.reshape(graph.node("MatMul", [left, right], shape, left.dtype), [*batch, *rows, *columns])]


def _same(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    return operands[:1]


def _convert(graph: Graph, operands: list[Value], equation: JaxprEqn) -> list[Value]:
    return [graph.cast(operands[0], equation.params["new_dtype"])]


_ELEMENTWISE = {
    "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow", "exp": "Exp", "log": "Log",
    "tanh": "Tanh", "logistic": "Sigmoid", "neg": "Neg", "sign": "Sign", "abs": "Abs", "sqrt": "Sqrt", "lt": "Less",
    "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal", "and": "And", "or": "Or", "not": "Not",
}  # fmt: skip
_RULES: dict[str, Rule] = {
    **{name: _elementwise(op) for name, op in _ELEMENTWISE.items()},
    "add": _add,
    "argmax": _argmax,
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _composed(lambda do, low, x, high: do("Min", do("Max", x, low), high)),
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "copy": _same,
    "cumprod": _cumprod,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "expm1": _composed(lambda do, x: do("Mul", do("Add", do("Exp", x), 1), do("Tanh", do("Mul", x, 0.5)))),
    "gather": _gather,
    "integer_pow": _integer_pow,
    "ne": _composed(lambda do, x, y: do("Not", do("Equal", x, y))),
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": _reshape,
    "rsqrt": _composed(lambda do, x: do("Reciprocal", do("Sqrt", x))),
    "scatter": _scatter,
    "select_n": _select_n,
    "slice": _slice,
    "split": _split,
    "square": _composed(lambda do, x: do("Mul", x, x)),
    "squeeze": _squeeze,
    "stack": _stack,
    "stop_gradient": _same,
    "top_k": _top_k,
    "transpose": _transpose,
}
