"""Agents made elsewhere: the original's files, runs and quantised files of ours, a multi-task agent for one task.

    agent = load_agent("walker-walk.pt", None, init)              # compared with the networks that `init` initialises
    agent = load_agent("runs/mt30/tdmpc2_jax_mt/1", "walker-walk", init, "tdmpc2_jax_mt")        # its task folded in

Parameters are named as in the scripts' networks: {component: {"params": {"linear_0": {"kernel", "bias"}, "norm_0":
{"scale", "bias"}, …}}}, with kernels [in, out], those of `q` and of the target Qs stacked along a leading axis [num_q];
an encoder of pictures has "kernel_0" [height, width, in, out] and "bias_0" to "bias_3".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.agents.quantized import VARIANTS, dequantize, nested, quantize, read_safetensors, write_safetensors
from tdmpc2_support.data.pt import check_pt, load_pt
from tdmpc2_support.envs.tasks import TASK_SETS, set_sizes, task_spec
from tdmpc2_support.errors import UserError
from tdmpc2_support.run.checkpoints import find_checkpoint, read_agent, read_meta

Params = dict[str, Any]  # of networks, by component


class Agent(NamedTuple):
    """What goes from one script, or from the original, to another."""

    params: Params  # encoder, dynamics, reward, pi, q, and termination where the agent has one
    target_q: Params  # slow copy of params["q"]
    q_scale: jax.Array | float = 1.0  # 5-95% range of the values; the original's files do not have it
    task_emb: jax.Array | None = None  # [T, E] embeddings of a multi-task agent
    tasks: tuple[str, ...] = ()  # names of its T tasks, if they are known
    args: Mapping[str, Any] = {}  # of the run that it is from
    stored: str = "float32"  # how its numbers were stored

    def check_variant(self, variant: str) -> None:
        """UserError if the agent cannot be quantised so (see `quantize`), as it was stored no finer."""
        if self.stored == variant or self.stored not in ("float32", "float16"):
            raise UserError(f"the agent of --checkpoint is {self.stored} already: quantise the one that it was made of")


# --------------------------------------------------------------------------------------------- Files of the original
def read_tensors(path: str | os.PathLike, in_place: bool = False) -> dict[str, np.ndarray]:
    """The tensors {name: array} of an original checkpoint, {"model": tensors} or the tensors alone; `in_place` leaves
    them in the file, whose checksums are compared first.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if in_place:
        check_pt(path)
    content = load_pt(path, in_place=True) if in_place else load_pt(path)
    model = content.get("model", content) if isinstance(content, dict) else None
    tensors = _arrays(model)
    if not tensors:
        kind = "a tensor" if isinstance(content, np.ndarray) else f"a {type(content).__name__}"
        kind = "no tensors" if isinstance(content, dict) else kind
        raise UserError(f"{path} holds {kind}, so it is no checkpoint {{'model': tensors}}")
    return tensors


def read_original(path: str | os.PathLike, obs: str = "state", parts: Sequence[str] = ()) -> Agent:
    """The agent of an original checkpoint (.pt), in either of its two layouts; `obs` is what it must see. Of its
    parameters only `parts` are taken into memory, if they are named.

    Raises:
        UserError: the file cannot be read, holds no whole agent of TD-MPC2, or one that sees something else.
    """
    tensors = read_tensors(path, in_place=True) if parts else read_tensors(path)
    try:
        return from_torch(tensors, obs, parts)
    except UserError as error:
        raise UserError(f"{path} {error}") from None


def from_torch(tensors: Mapping[str, np.ndarray], obs: str = "state", parts: Sequence[str] = ()) -> Agent:
    """The agent that these tensors of an original checkpoint are, or `parts` of it; UserError if they are none, or not
    a whole one."""
    first = {"state": "_encoder.state.0.weight", "rgb": "_encoder.rgb.2.weight"}
    if not {first[obs], "_pi.2.weight"} <= tensors.keys():
        raise UserError(f"holds no TD-MPC2 agent that sees {'states' if obs == 'state' else 'pixels'}{_other(tensors)}")
    encoder = _convolutions(tensors) if obs == "rgb" else _mlp(tensors, "_encoder.state")
    prefixes = {"dynamics": "_dynamics", "reward": "_reward", "pi": "_pi", "q": "_Qs.params"}
    prefixes |= {"termination": "_termination"} if "_termination.0.weight" in tensors else {}
    target = "_target_Qs_params" if "_target_Qs_params.0.weight" in tensors else "_target_Qs.params"
    params = {"encoder": encoder} | {name: _mlp(tensors, prefix) for name, prefix in prefixes.items()}
    target_q = _mlp(tensors, target)
    table = _numbers(tensors, "_task_emb.weight", 2) if "_task_emb.weight" in tensors else None
    _check_whole(params | {"target Q": target_q}, 0 if table is None else table.shape[-1])
    tasks = () if table is None else TASK_SETS.get(f"mt{len(table)}", ())
    kinds = {tensors[name].dtype.name for name in tensors if name.endswith(".weight")}
    params, target_q = ({name: params[name] for name in parts}, {}) if parts else (params, target_q)
    params, target_q, table = jax.tree.map(lambda x: jnp.array(x, jnp.float32), (params, target_q, table))
    stored = "float16" if kinds == {"float16"} else "float32"
    return Agent(params, target_q, task_emb=table, tasks=tasks, stored=stored)


def _arrays(part: Any) -> dict[str, np.ndarray]:
    return {k: v for k, v in part.items() if isinstance(v, np.ndarray)} if isinstance(part, dict) else {}


def _other(tensors: Mapping[str, np.ndarray]) -> str:
    kinds = {"_encoder.rgb.2": "pixels, for tdmpc2_jax_rgb", "_encoder.state.0": "states, for tdmpc2_jax"}
    kinds |= {"_Q1.0": "TD-MPC, for tdmpc_jax"}
    return next((f": it is one of {kind}.py" for name, kind in kinds.items() if f"{name}.weight" in tensors), "")


def _numbers(tensors: Mapping[str, np.ndarray], name: str, ndim: int = 1) -> np.ndarray:
    if name not in tensors or tensors[name].dtype.kind != "f":
        raise UserError(f"holds no whole agent: {name} is missing")
    if tensors[name].ndim < ndim:
        raise UserError(f"holds no whole agent: {name} has shape {tensors[name].shape}")
    return tensors[name]


def _mlp(tensors: Mapping[str, np.ndarray], prefix: str) -> Params:
    fields, names = ("weight", "bias", "ln.weight", "ln.bias"), []
    while f"{prefix}.{len(names)}.weight" in tensors:
        norm = f"{prefix}.{len(names)}.ln.weight" in tensors
        names.append([f"{prefix}.{len(names)}.{field}" for field in fields[: 4 if norm else 2]])
    if not names:  # the layout released in 2023: one running number per tensor; the last layer has no norm
        names = [[f"{prefix}.{i}" for i in range(4 * layer, min(4 * layer + 4, 10))] for layer in range(3)]
    params = {}
    for i, (weight, *others) in enumerate(names):
        bias, *norm = (_numbers(tensors, name) for name in others)
        params[f"linear_{i}"] = {"kernel": _numbers(tensors, weight, 2).swapaxes(-1, -2), "bias": bias}
        params |= {f"norm_{i}": {"scale": norm[0], "bias": norm[1]}} if norm else {}
    return {"params": params}


def _convolutions(tensors: Mapping[str, np.ndarray]) -> Params:
    params = {}
    for i in range(4):  # the modules in between have no parameters; kernels [out, in, height, width]
        name = f"_encoder.rgb.{2 + 2 * i}"
        params[f"kernel_{i}"] = np.moveaxis(_numbers(tensors, f"{name}.weight", 4), (0, 1), (-1, -2))
        params[f"bias_{i}"] = _numbers(tensors, f"{name}.bias")
    return {"params": params}


def _check_whole(components: Params, task_dim: int) -> None:
    """UserError if the layers do not fit together, as they must where tasks are folded in and sizes are read off."""
    layers = {name: component["params"] for name, component in components.items() if "linear_0" in component["params"]}
    widths = {name: _widths(its) for name, its in layers.items()}
    latent_dim, action_dim = widths["dynamics"][-1], widths["pi"][-1] // 2
    inputs = dict.fromkeys(layers, latent_dim + task_dim + action_dim)
    inputs |= dict.fromkeys(("pi", "termination"), latent_dim + task_dim)
    if "encoder" in layers:  # its observations: at least one
        inputs["encoder"] = max(layers["encoder"]["linear_0"]["kernel"].shape[-2], task_dim + 1)
    outputs = {"encoder": latent_dim, "pi": 2 * action_dim}
    for name, its in layers.items():
        heads = layers["q"]["linear_0"]["bias"].shape[:1] if name in ("q", "target Q") else ()
        hidden, last = widths[name][:-1], outputs.get(name, widths[name][-1])
        fits = _shapes(its) == _mlp_shapes(heads, inputs[name], [*hidden, last], name in ("encoder", "dynamics"))
        if not fits or 0 in (*heads, *hidden, last) or len(hidden) != 2 and (name != "encoder" or not hidden):
            raise UserError(f"holds no whole agent: the layers of its {name} do not fit together")


def _mlp_shapes(heads: tuple[int, ...], inputs: int, widths: list[int], simnorm: bool) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i, (before, width) in enumerate(zip([inputs, *widths[:-1]], widths, strict=True)):
        shapes |= {f"linear_{i}/kernel": (*heads, before, width), f"linear_{i}/bias": (*heads, width)}
        if simnorm or i < len(widths) - 1:
            shapes |= dict.fromkeys((f"norm_{i}/scale", f"norm_{i}/bias"), (*heads, width))
    return shapes


def read_tdmpc(path: str | os.PathLike) -> tuple[Params, Params]:
    """The agent of a checkpoint (.pt) of TD-MPC, the first version, for states: its parameters, and the slow copies
    of `encoder` and `q`. The file holds {"model": tensors, "model_target": tensors}.

    Raises:
        UserError: the file cannot be read, or holds no whole agent of TD-MPC.
    """
    content = load_pt(path)
    parts = [content.get(part) if isinstance(content, dict) else None for part in ("model", "model_target")]
    try:
        params, target = (tdmpc_from_torch(_arrays(part)) for part in parts)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    return params, {name: target[name] for name in ("encoder", "q")}


def tdmpc_from_torch(tensors: Mapping[str, np.ndarray]) -> Params:
    """The networks that these tensors of a TD-MPC checkpoint are; UserError if they are none, or not all."""
    if not {"_encoder.0.weight", "_Q1.0.weight"} <= tensors.keys():
        raise UserError(f"holds no TD-MPC agent that sees states{'' if '_Q1.0.weight' in tensors else _other(tensors)}")

    def mlp(prefix: str, *places: int, norm: int | None = None) -> dict[str, Any]:
        params = {}
        for i, place in enumerate(places):
            kernel = _numbers(tensors, f"{prefix}.{place}.weight", 2).swapaxes(-1, -2)
            params[f"linear_{i}"] = {"kernel": kernel, "bias": _numbers(tensors, f"{prefix}.{place}.bias")}
        if norm is not None:
            scale, bias = (_numbers(tensors, f"{prefix}.{norm}.{field}") for field in ("weight", "bias"))
            params["norm_0"] = {"scale": scale, "bias": bias}
        return {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}

    params = {name: mlp(f"_{name}", 0, 2, 4) for name in ("dynamics", "reward", "pi")}
    qs = [mlp(name, 0, 3, 5, norm=1) for name in ("_Q1", "_Q2")]
    if _shapes(qs[0]) != _shapes(qs[1]):
        raise UserError("holds no whole agent: its two values differ in size")
    return params | {"encoder": mlp("_encoder", 0, 2), "q": jax.tree.map(lambda *p: jnp.stack(p), *qs)}


# -------------------------------------------------------------------------------------------------- Multi-task agents
def fold_agent(agent: Agent, source_task: str | None, obs_dim: int, action_dim: int, path: str | os.PathLike) -> Agent:
    """A single-task agent as it is, or what a multi-task agent from `path` is for its task `source_task`, cut to the
    sizes of the task at hand; see `fold_task`.

    Raises:
        UserError: a task is named and the agent has one only, or the reverse; it does not know it, or is too small.
    """
    if (agent.task_emb is None) != (source_task is None):
        single = agent.task_emb is None
        want = "is a single-task agent: leave out" if single else "is a multi-task agent: name its task with"
        raise UserError(f"{path} {want} --source-task")
    if agent.task_emb is None:
        return agent
    source = task_spec(source_task).name
    if source not in agent.tasks:
        known = ", ".join(agent.tasks) or f"{len(agent.task_emb)} tasks without names"
        known = next((f"the tasks of {name}" for name, tasks in TASK_SETS.items() if tasks == agent.tasks), known)
        raise UserError(f"{path} was not trained on {source}: it knows {known}")
    inputs = agent.params["encoder"]["params"]["linear_0"]["kernel"].shape[0]
    there = inputs - agent.task_emb.shape[1], agent.params["pi"]["params"]["linear_2"]["bias"].shape[0] // 2
    if there[0] < obs_dim or there[1] < action_dim:
        sizes = "it knows {} observations and {} actions, the task has {} and {}"
        raise UserError(f"{path} does not fit this task: {sizes.format(*there, obs_dim, action_dim)}")
    emb = np.asarray(agent.task_emb[agent.tasks.index(source)])
    params = fold_task(agent.params | {"q_target": agent.target_q}, emb, obs_dim, action_dim)
    return Agent(params, params.pop("q_target"), agent.q_scale)


def fold_task(params: Params, emb: np.ndarray, obs_dim: int, action_dim: int) -> Params:
    """Turns a multi-task agent's parameters (with or without `q_target`) into those of one task, exactly.

    emb [task_dim] is the task's embedding, a constant input: it moves into the first layers' biases. Observations and
    actions beyond the task's own sizes were always zero there: their inputs and outputs go. Inputs are obs|e, z|e|a.
    """
    emb = np.asarray(emb, np.float64)  # on the host: an accelerator would round the products
    emb = emb / max(1.0, np.linalg.norm(emb))  # rows of the table have at most unit norm when read
    E, Z = len(emb), params["dynamics"]["params"]["linear_2"]["bias"].shape[-1]

    def fold(name: str, component: Params) -> dict[str, Any]:
        layers = dict(component["params"])
        kernel, bias = (np.asarray(layers["linear_0"][field]) for field in ("kernel", "bias"))
        before = kernel.shape[-2] - E if name == "encoder" else Z
        keep = [kernel[..., : obs_dim if name == "encoder" else Z, :], kernel[..., before + E :, :]]
        if name in ("dynamics", "reward", "q", "q_target"):
            keep[1] = keep[1][..., :action_dim, :]
        bias = bias + np.einsum("e,...eo->...o", emb, kernel[..., before : before + E, :])
        layers["linear_0"] = {"kernel": jnp.asarray(np.concatenate(keep, axis=-2)), "bias": jnp.float32(bias)}
        if name == "pi":
            half = layers["linear_2"]["bias"].shape[-1] // 2
            outputs = np.r_[:action_dim, half : half + action_dim]  # means, log stds
            layers["linear_2"] = jax.tree.map(lambda p: p[..., outputs], layers["linear_2"])
        return {"params": layers}

    return {name: fold(name, component) for name, component in params.items()}


# -------------------------------------------------------------------------------------------------------------- Sizes
def sizes_of(params: Params) -> dict[str, int]:
    """The sizes of the model that these parameters are of, as far as they have them, by their names in `Args`."""
    widths = {name: _widths(params[name]["params"]) for name in ("encoder", "dynamics", "reward") if name in params}
    encoder, mlp = widths["encoder"], widths.get("dynamics") or widths["reward"]
    sizes = {"enc_dim": encoder[0]} if encoder else {}
    sizes |= {"mlp_dim": mlp[0], "latent_dim": (widths.get("dynamics") or encoder)[-1]}
    if "norm_1" not in (params.get("q") or params["reward"])["params"]:  # the first version: others are fixed
        return sizes
    sizes |= {"num_enc_layers": len(encoder)} if encoder else {}
    sizes |= {"num_q": params["q"]["params"]["linear_0"]["bias"].shape[0]} if "q" in params else {}
    return sizes | ({"task_dim": params["task_emb"].shape[-1]} if "task_emb" in params else {})


def _widths(layers: Params) -> list[int]:
    return [layers[name]["bias"].shape[-1] for name in sorted(layers) if name.startswith("linear")]


def check_shapes(params: Params, like: Params, path: str | os.PathLike, what: str) -> None:
    """Compares the shapes of an agent's parameters with those of the networks at hand, as `jax.eval_shape` gives them.

    Args:
        path: where the agent is from, for the sentence.
        what: what it should fit, as "this task and these sizes".

    Raises:
        UserError: they differ; the sentence names the first difference, and the agent's sizes.
    """
    there, here = _shapes(params), _shapes(like)
    wrong = next((name for name in here | there if here.get(name) != there.get(name)), None)
    if wrong is None:
        return
    its, hint = sizes_of(params), ""
    if its != sizes_of(like):
        hint = "; it has " + " ".join(f"--{name.replace('_', '-')} {size}" for name, size in its.items())
    sizes = f"{wrong} is {there.get(wrong, 'missing')} there and {here.get(wrong, 'missing')} here"
    raise UserError(f"{path} does not fit {what}: {sizes}{hint}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


# -------------------------------------------------------------------------------------------------------- For scripts
def load_agent(
    path: str,
    source_task: str | None,
    init: Callable[[jax.Array], Params],
    *scripts: str,
    obs: str = "state",
    task: str | None = None,
) -> Agent:
    """The agent of an original .pt file, a run or a quantised file of ours, for single-task networks: one task of a
    multi-task agent (`fold_agent`), without a termination head if they have none, and compared (`check_shapes`).

    Args:
        path: a file that ends in .pt, a run's folder, a checkpoint's, or a quantised file.
        source_task: the multi-task agent's task; None for a single-task agent.
        init: gives fresh parameters of the networks at hand for a key; only their shapes are asked for.
        scripts: whose runs will do.
        obs: what the agent must see, "state" or "rgb".
        task: the task of a multi-task agent where source_task is None.

    Raises:
        UserError: there is no such agent, it is damaged, or it does not fit.
    """
    agent, like = _read(path, obs, scripts), jax.eval_shape(init, jax.random.key(0))
    source_task = source_task or (None if agent.task_emb is None else task)
    if "linear_0" in like["encoder"]["params"]:  # agents of pictures have one task
        obs_dim = like["encoder"]["params"]["linear_0"]["kernel"].shape[0]
        agent = fold_agent(agent, source_task, obs_dim, like["pi"]["params"]["linear_2"]["bias"].shape[0] // 2, path)
    params = {name: value for name, value in agent.params.items() if name in like or name != "termination"}
    check_shapes(params, like, path, "this task and these sizes")
    return agent._replace(params=params)


def load_parts(
    path: str, tasks: Sequence[str], init: Callable[[jax.Array], Params], *scripts: str
) -> Iterator[tuple[Agent, np.ndarray]]:
    """What a multi-task agent is for each of these tasks (`fold_agent`), compared, and the task's embedding [E]; the
    arguments and what is refused are as in `load_agent`, an agent of one task, too."""
    agent, like = _read(path, "state", scripts), jax.eval_shape(init, jax.random.key(0))
    if agent.task_emb is None:
        raise UserError(f"{path} is a single-task agent: leave out --tasks")
    if not agent.tasks and len(agent.task_emb) != len(tasks):
        raise UserError(f"{path} knows {len(agent.task_emb)} tasks: name them all with --tasks")
    agent = agent._replace(tasks=agent.tasks or tuple(tasks))
    inputs, outputs = (like[name]["params"] for name in ("encoder", "pi"))
    sizes = inputs["linear_0"]["kernel"].shape[0], outputs["linear_2"]["bias"].shape[0] // 2
    for task in tasks:
        part = fold_agent(agent, task, *sizes, path)
        part.params.pop("termination", None)
        check_shapes(part.params, like, path, "these tasks and sizes")
        emb = np.asarray(agent.task_emb[agent.tasks.index(task)])
        yield part, emb / max(1.0, np.linalg.norm(emb))


def load_multitask(path: str, named: Sequence[str], *scripts: str, parts: Sequence[str] = ()) -> Agent:
    """The multi-task agent of an original .pt file, a run or a quantised file of ours, its embeddings among its
    parameters as `task_emb`; `named` are its tasks, if it is the original's and not one of mt30 or mt80. Of its
    networks only `parts` are read, if they are named.

    Raises:
        UserError: there is no such agent, it is damaged, of one task, or the number of names is not that of its tasks.
    """
    agent = _read(path, "state", scripts, parts)
    if agent.task_emb is None:
        raise UserError(f"{path} is a single-task agent: it is for tdmpc2_jax.py")
    tasks = agent.tasks or tuple(named)
    if len(tasks) != len(agent.task_emb):
        raise UserError(f"{path} knows {len(agent.task_emb)} tasks: name them all with --tasks")
    params = {name: value for name, value in agent.params.items() if name != "termination"}
    return agent._replace(params=params | {"task_emb": agent.task_emb}, task_emb=None, tasks=tasks)


def load_tdmpc(path: str, init: Callable[[jax.Array], Params], *scripts: str) -> tuple[Params, Params, int | None]:
    """An agent of TD-MPC, the first version: its parameters, the slow copies of its `encoder` and `q`, and how many
    decisions it has made, or None where it is the original's; see `load_agent`."""
    like, decisions = jax.eval_shape(init, jax.random.key(0)), None
    if path.endswith(".pt"):
        params, target = read_tdmpc(path)
    else:
        checkpoint = find_checkpoint(path)
        meta = read_meta(checkpoint, *scripts)
        state, decisions = read_agent(checkpoint, meta, ("params", "target")), meta["count"]["decisions"]
        params, target = state["params"], state["target"]
    there, here = ({f"slow {name}": its[name] for name in ("encoder", "q")} for its in (target, like))
    check_shapes(params | there, like | here, path, "this task and these sizes")
    return params, target, decisions


def load_teacher(path: str, tasks: Sequence[str], *scripts: str) -> Agent:
    """What predicts rewards in a multi-task agent of these tasks: `encoder`, `reward` and `task_emb`. Its `args` are
    those that make the networks and decode their outputs.

    Raises:
        UserError: as `load_multitask`; its tasks, or the sizes of its observations and actions, are others.
    """
    agent = load_multitask(path, tasks, *scripts, parts=("encoder", "reward"))
    if agent.tasks != tuple(tasks):
        raise UserError(f"{path} knows other tasks than --tasks names, or in another order")
    sizes, reward = sizes_of(agent.params), agent.params["reward"]["params"]
    rows = [agent.params[name]["params"]["linear_0"]["kernel"].shape[0] for name in ("encoder", "reward")]
    there = rows[0] - sizes["task_dim"], rows[1] - sizes["latent_dim"] - sizes["task_dim"]
    if there != set_sizes(tasks):
        words = "{} does not fit these tasks: it knows {} observations and {} actions, they have {} and {}"
        raise UserError(words.format(path, *there, *set_sizes(tasks)))
    args = {name: agent.args[name] for name in ("vmin", "vmax", "simnorm_dim") if name in agent.args}
    return agent._replace(args=args | sizes | {"num_bins": _widths(reward)[-1]})


def _read(path: str, obs: str, scripts: Sequence[str], parts: Sequence[str] = ()) -> Agent:
    if path.endswith(".pt"):
        return read_original(path, obs, parts) if parts else read_original(path, obs)
    if Path(path).is_file():
        return _read_quantized(path, obs, scripts, parts)
    checkpoint = find_checkpoint(path)
    meta = read_meta(checkpoint, *scripts)
    state = read_agent(checkpoint, meta, ("params", "target_q", "q_scale"), (*parts, "task_emb") if parts else ())
    task_emb, target_q = state["params"].pop("task_emb", None), state.get("target_q", {})
    tasks = tuple(meta.get("tasks", ()))
    return Agent(state["params"], target_q, state.get("q_scale", 1.0), task_emb, tasks, meta.get("args", {}))


# ---------------------------------------------------------------------------------------------------- Quantised agents
def write_quantized(
    path: str, agent: Agent, variant: str, script: str, args: Mapping[str, Any], target_q: bool = False
) -> None:
    """Writes a multi-task agent of `load_multitask` to a file of this variant (see `quantize`), with those of its
    script's arguments that make it; without target Qs unless asked: only learning needs them.

    Raises:
        UserError: the agent is of a quantised file already, the file exists, or cannot be written.
    """
    agent.check_variant(variant)
    params = agent.params | ({"target_q": agent.target_q} if target_q else {})
    tensors = quantize(params, variant) | {"q_scale": np.asarray(agent.q_scale, np.float32)}
    names = [*args][: [*args].index("exp_name")]
    made = {name: args[name] for name in names if name not in ("data_dir", "teacher", "distill_coef")}
    made |= {"tasks": ",".join(agent.tasks)} if made["tasks"] else {}  # all that it knows, whichever are named now
    record = {"script": script, "variant": variant, "tasks": json.dumps(agent.tasks), "args": json.dumps(made)}
    write_safetensors(path, tensors, record)


def read_record(path: str, *scripts: str) -> dict[str, Any]:
    """What an agent's run, checkpoint or quantised file says of itself, `args` and `tasks` among it; nothing, if it is
    the original's.

    Raises:
        UserError: there is no such agent, it is damaged, or of none of `scripts`.
    """
    if path.endswith(".pt"):
        return {"args": {}}
    if Path(path).is_file():
        return _record(path, read_safetensors(path)[1], scripts)
    return read_meta(find_checkpoint(path), *scripts)


def _record(path: str, record: Mapping[str, str], scripts: Sequence[str]) -> dict[str, Any]:
    try:
        script, variant, tasks, args = (record[name] for name in ("script", "variant", "tasks", "args"))
        tasks, args = tuple(json.loads(tasks)), dict(json.loads(args))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} holds no agent of this project") from None
    if script not in scripts or variant not in VARIANTS:
        raise UserError(f"{path} is an agent of {script}.py, not of {scripts[0]}.py")
    return {"variant": variant, "tasks": tasks, "args": args}


def _read_quantized(path: str, obs: str, scripts: Sequence[str], parts: Sequence[str]) -> Agent:
    tensors, metadata = read_safetensors(path)
    record = _record(path, metadata, scripts)
    try:
        stored = nested({name: array for name, array in tensors.items() if not name.endswith(".kernel_scale")})
        heads = {name: stored[name] for name in ("encoder", "dynamics", "reward", "pi", "q")}
        _check_whole(heads | {"target Q": stored.get("target_q", stored["q"])}, stored["task_emb"].shape[-1])
        values = nested(dequantize(tensors, (*parts, "task_emb") if parts else ()))
    except (KeyError, ValueError, IndexError, AttributeError, UserError) as error:
        reason = str(error) if isinstance(error, UserError) else "holds no whole agent"
        raise UserError(f"{path} {reason}") from None
    values = jax.tree.map(jnp.asarray, values)
    task_emb, q_scale = values.pop("task_emb"), values.pop("q_scale", 1.0)
    target_q = values.pop("target_q", values.get("q", {}))  # learning that goes on begins with the Qs themselves
    return Agent(values, target_q, q_scale, task_emb, record["tasks"], record["args"], record["variant"])
