"""Agents made elsewhere: the original's files, and runs and quantised files of ours.

    agent = load_agent("walker-walk.pt", None, init)              # compared with the networks that `init` initialises
    agent = load_agent("runs/mt30/tdmpc2_jax_mt/1", "walker-walk", init, "tdmpc2_jax_mt")        # its task folded in

Parameters are named as in the scripts' networks: {component: {"params": {"linear_0": {"kernel", "bias"}, "norm_0":
{"scale", "bias"}, …}}}, with kernels [in, out], those of `q` and of the target Qs stacked along a leading axis [num_q];
an encoder of pictures has "kernel_0" [height, width, in, out] and "bias_0" to "bias_3".
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.agents.fold import fold_agent
from tdmpc2_support.agents.quantized import VARIANTS, dequantize, nested, quantize, read_safetensors, write_safetensors
from tdmpc2_support.data.embeddings import read_embeddings
from tdmpc2_support.data.pt import check_pt, load_pt
from tdmpc2_support.envs.soup import SOUP
from tdmpc2_support.envs.tasks import TASK_SETS, TASKS, set_sizes
from tdmpc2_support.errors import UserError
from tdmpc2_support.run.checkpoints import find_checkpoint, read_agent, read_meta

Params = dict[str, Any]  # of networks, by component
MOST = 100  # layers or value heads: a file of a MB can name the same numbers a hundred thousand times
RGB_LAYERS = [f"_encoder.rgb.{i}" for i in (2, 4, 6, 8)]  # convolutions; the modules in between have no parameters


class LoadedAgent(NamedTuple):
    """What goes from one script, or from the original, to another."""

    params: Params  # encoder, dynamics, reward, pi, q, and termination where the agent has one
    target_q: Params  # slow copy of params["q"]
    q_scale: jax.Array | float = 1.0  # 5-95% range of the values; the original's files do not have it
    task_emb: jax.Array | None = None  # [T, E] embeddings of a multi-task agent
    tasks: tuple[str, ...] = ()  # names of its T tasks, if they are known
    args: Mapping[str, Any] = {}  # of the run that it is from
    stored: str = "float32"  # how its numbers were stored
    learned_emb: bool = True  # embeddings longer than 1 are scaled back to that when read; those of language are not
    decisions: int | None = None  # that the run has made, if it has counted them

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
    if isinstance(content, dict):
        tensors = _arrays(content.get("model", content))
        kind = "no tensors"
    else:
        tensors = {}
        kind = "a tensor" if isinstance(content, np.ndarray) else f"a {type(content).__name__}"
    if not tensors:
        raise UserError(f"{path} holds {kind}, so it is no checkpoint {{'model': tensors}}")
    return tensors


def read_original(path: str | os.PathLike, obs: str = "state", parts: Sequence[str] = ()) -> LoadedAgent:
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


def from_torch(tensors: Mapping[str, np.ndarray], obs: str = "state", parts: Sequence[str] = ()) -> LoadedAgent:
    """The agent that these tensors of an original checkpoint are, or `parts` of it; UserError if they are none, or not
    a whole one."""
    newt = any("_Qs.online." in name for name in tensors)
    if newt:
        tensors = _from_newt(tensors)
    encoder_weight = {"state": "_encoder.state.0.weight", "rgb": "_encoder.rgb.2.weight"}[obs]
    if encoder_weight not in tensors or "_pi.2.weight" not in tensors:
        kind = "states" if obs == "state" else "pixels"
        raise UserError(f"holds no TD-MPC2 agent that sees {kind}{_other_script(tensors)}")
    params = {
        "encoder": _convolutions(tensors, RGB_LAYERS) if obs == "rgb" else _mlp(tensors, "_encoder.state"),
        "dynamics": _mlp(tensors, "_dynamics"),
        "reward": _mlp(tensors, "_reward"),
        "pi": _mlp(tensors, "_pi"),
        "q": _mlp(tensors, "_Qs.params"),
    }
    if "_termination.0.weight" in tensors:
        params["termination"] = _mlp(tensors, "_termination")
    released = "_target_Qs_params.0.weight" not in tensors  # the layout of 2023
    target_q = _mlp(tensors, "_target_Qs.params" if released else "_target_Qs_params")
    task_emb = None
    task_dim = 0
    tasks = ()
    if "_task_emb.weight" in tensors:
        task_emb = _numbers(tensors, "_task_emb.weight", 2)
        task_dim = task_emb.shape[-1]
        known = {len(SOUP): SOUP} if newt else {len(names): names for names in TASK_SETS.values()}
        tasks = known.get(len(task_emb), ())
    _check_whole(params | {"target Q": target_q}, task_dim)
    if parts:
        params = {name: params[name] for name in parts}
        target_q = {}
    kinds = {array.dtype.name for name, array in tensors.items() if name.endswith(".weight")}
    return LoadedAgent(
        params=_float32(params),
        target_q=_float32(target_q),
        task_emb=_float32(task_emb),
        tasks=tasks,
        stored="float16" if kinds == {"float16"} else "float32",
        learned_emb=not newt,
    )


def _from_newt(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same in TD-MPC2's current layout: Newt has an entry for every value head, and begins all names with "module."
    if it was trained on several devices."""
    plain = {name.removeprefix("module."): array for name, array in tensors.items()}
    found = {name: array for name, array in plain.items() if not name.startswith("_Qs.")}
    for there, here in (("_Qs.online._Qs", "_Qs.params"), ("_Qs.target._Qs", "_target_Qs_params")):
        names = [name.removeprefix(f"{there}.0.") for name in plain if name.startswith(f"{there}.0.")]
        number = next(i for i in itertools.count() if f"{there}.{i}.0.weight" not in plain)
        if number > MOST:
            raise UserError(f"holds no agent: it has {number} value heads")
        for name in names:
            arrays = [plain.get(f"{there}.{i}.{name}") for i in range(number)]
            if not number or len({np.shape(array) for array in arrays}) > 1:
                raise UserError(f"holds no whole agent: {there}.….{name} is not of one shape in all heads")
            found[f"{here}.{name}"] = np.stack(arrays)
    return found


def _float32(arrays: Any) -> Any:
    return jax.tree.map(lambda array: jax.device_put(np.array(array, np.float32)), arrays)  # nothing to compile


def _arrays(part: Any) -> dict[str, np.ndarray]:
    if not isinstance(part, dict):
        return {}
    return {name: value for name, value in part.items() if isinstance(value, np.ndarray)}


def _other_script(tensors: Mapping[str, np.ndarray]) -> str:
    """Which script takes these tensors, as the end of a sentence; nothing if none does."""
    if "_encoder.rgb.2.weight" in tensors:
        return ": it is one of pixels, for tdmpc2_jax_rgb.py"
    if "_encoder.state.0.weight" in tensors:
        return ": it is one of states, for tdmpc2_jax.py"
    if "_Q1.0.weight" in tensors:
        return ": it is one of TD-MPC, for tdmpc_jax.py"
    return ""


def _numbers(tensors: Mapping[str, np.ndarray], name: str, ndim: int = 1) -> np.ndarray:
    if name not in tensors or tensors[name].dtype.kind != "f":
        raise UserError(f"holds no whole agent: {name} is missing")
    if tensors[name].ndim < ndim:
        raise UserError(f"holds no whole agent: {name} has shape {tensors[name].shape}")
    return tensors[name]


def _mlp(tensors: Mapping[str, np.ndarray], prefix: str) -> Params:
    params = {}
    for i, names in enumerate(_layer_names(tensors, prefix)):
        kernel = _numbers(tensors, names[0], 2).swapaxes(-1, -2)
        params[f"linear_{i}"] = {"kernel": kernel, "bias": _numbers(tensors, names[1])}
        if len(names) == 4:
            params[f"norm_{i}"] = {"scale": _numbers(tensors, names[2]), "bias": _numbers(tensors, names[3])}
    return {"params": params}


def _layer_names(tensors: Mapping[str, np.ndarray], prefix: str) -> list[list[str]]:
    """For each layer the names of its weight and bias, and of its norm's where it has one."""
    layers = []
    while f"{prefix}.{len(layers)}.weight" in tensors:
        layer = f"{prefix}.{len(layers)}"
        names = [f"{layer}.weight", f"{layer}.bias"]
        if f"{layer}.ln.weight" in tensors:
            names += [f"{layer}.ln.weight", f"{layer}.ln.bias"]
        layers.append(names)
    if len(layers) > MOST:
        raise UserError(f"holds no agent: it has {len(layers)} layers named {prefix}")
    if layers:
        return layers
    # the layout released in 2023: tensors of three layers are numbered through; the last layer has no norm
    return [[f"{prefix}.{i}" for i in numbers] for numbers in (range(0, 4), range(4, 8), range(8, 10))]


def _convolutions(tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> Params:
    params = {}
    for i, name in enumerate(names):  # kernels [out, in, height, width]
        params[f"kernel_{i}"] = np.moveaxis(_numbers(tensors, f"{name}.weight", 4), (0, 1), (-1, -2))
        params[f"bias_{i}"] = _numbers(tensors, f"{name}.bias")
    return {"params": params}


def _check_whole(components: Params, task_dim: int) -> None:
    """UserError if the layers do not fit together, as they must where tasks are folded in and sizes are read off."""
    networks = {name: network["params"] for name, network in components.items() if "linear_0" in network["params"]}
    latent_dim = _widths(networks["dynamics"])[-1]
    action_dim = _widths(networks["pi"])[-1] // 2
    inputs = dict.fromkeys(networks, latent_dim + task_dim + action_dim)
    inputs["pi"] = latent_dim + task_dim
    inputs["termination"] = latent_dim + task_dim
    if "encoder" in networks:  # one observation at least
        inputs["encoder"] = max(networks["encoder"]["linear_0"]["kernel"].shape[-2], task_dim + 1)
    outputs = {"encoder": latent_dim, "pi": 2 * action_dim}
    for name, layers in networks.items():
        heads = networks["q"]["linear_0"]["bias"].shape[:1] if name in ("q", "target Q") else ()
        *hidden, last = _widths(layers)
        last = outputs.get(name, last)
        simnorm = name in ("encoder", "dynamics")
        fits = _shapes(layers) == _mlp_shapes(heads, inputs[name], [*hidden, last], simnorm)
        deep = len(hidden) >= 1 if name == "encoder" else len(hidden) == 2
        if not fits or not deep or 0 in (*heads, *hidden, last):
            raise UserError(f"holds no whole agent: the layers of its {name} do not fit together")


def _mlp_shapes(heads: tuple[int, ...], inputs: int, widths: list[int], simnorm: bool) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i, (before, width) in enumerate(zip([inputs, *widths[:-1]], widths, strict=True)):
        shapes[f"linear_{i}/kernel"] = (*heads, before, width)
        shapes[f"linear_{i}/bias"] = (*heads, width)
        if simnorm or i < len(widths) - 1:
            shapes[f"norm_{i}/scale"] = (*heads, width)
            shapes[f"norm_{i}/bias"] = (*heads, width)
    return shapes


def read_tdmpc(path: str | os.PathLike, obs: str = "state") -> tuple[Params, Params]:
    """The agent of a checkpoint (.pt) of TD-MPC, the first version: its parameters, and the slow copies of `encoder`
    and `q`; `obs` is what it must see, "state" or "rgb". The file holds {"model": tensors, "model_target": tensors}.

    Raises:
        UserError: the file cannot be read, or holds no whole agent of TD-MPC.
    """
    content = load_pt(path)
    if not isinstance(content, dict):
        content = {}
    try:
        params = tdmpc_from_torch(_arrays(content.get("model")), obs)
        target = tdmpc_from_torch(_arrays(content.get("model_target")), obs)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    return params, {name: target[name] for name in ("encoder", "q")}


def tdmpc_from_torch(tensors: Mapping[str, np.ndarray], obs: str = "state") -> Params:
    """The networks that these tensors of a TD-MPC checkpoint are; UserError if they are none, or not all."""
    kind = "states" if obs == "state" else "pixels"
    if "_Q1.0.weight" not in tensors:
        raise UserError(f"holds no TD-MPC agent that sees {kind}{_other_script(tensors)}")
    if ("_encoder.0.weight" if obs == "state" else "_encoder.10.weight") not in tensors:
        other = "--obs rgb" if "_encoder.10.weight" in tensors else "--obs state"
        raise UserError(f"holds no TD-MPC agent that sees {kind}: it is one for {other}")

    params = {name: _sequential(tensors, f"_{name}", (0, 2, 4)) for name in ("dynamics", "reward", "pi")}
    if obs == "state":
        params["encoder"] = _sequential(tensors, "_encoder", (0, 2))
    else:
        convolutions = _convolutions(tensors, [f"_encoder.{i}" for i in (1, 3, 5, 7)])["params"]
        last = _sequential(tensors, "_encoder", (10,))["params"]["linear_0"]
        params["encoder"] = {"params": _float32(convolutions) | {"last": last}}
    qs = [_sequential(tensors, name, (0, 3, 5), norm=1) for name in ("_Q1", "_Q2")]
    if _shapes(qs[0]) != _shapes(qs[1]):
        raise UserError("holds no whole agent: its two values differ in size")
    params["q"] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *qs)
    return params


def _sequential(
    tensors: Mapping[str, np.ndarray], prefix: str, places: Sequence[int], norm: int | None = None
) -> Params:
    """The layers at these places of a torch.nn.Sequential, and the norm behind the first one."""
    params = {}
    for i, place in enumerate(places):
        kernel = _numbers(tensors, f"{prefix}.{place}.weight", 2).swapaxes(-1, -2)
        params[f"linear_{i}"] = {"kernel": kernel, "bias": _numbers(tensors, f"{prefix}.{place}.bias")}
    if norm is not None:
        scale = _numbers(tensors, f"{prefix}.{norm}.weight")
        params["norm_0"] = {"scale": scale, "bias": _numbers(tensors, f"{prefix}.{norm}.bias")}
    return {"params": jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)}


# -------------------------------------------------------------------------------------------------------------- Sizes
def sizes_of(params: Params) -> dict[str, int]:
    """The sizes of the model that these parameters are of, as far as they have them, by their names in `Args`."""
    sizes = {}
    encoder = _widths(params["encoder"]["params"])
    if encoder:
        sizes["enc_dim"] = encoder[0]
    if "dynamics" in params:
        dynamics = _widths(params["dynamics"]["params"])
        sizes["mlp_dim"] = dynamics[0]
        sizes["latent_dim"] = dynamics[-1]
    else:
        sizes["mlp_dim"] = _widths(params["reward"]["params"])[0]
        sizes["latent_dim"] = encoder[-1]
    if "norm_1" not in (params.get("q") or params["reward"])["params"]:  # the first version: others are fixed
        return sizes
    if encoder:
        sizes["num_enc_layers"] = len(encoder)
    if "q" in params:
        sizes["num_q"] = params["q"]["params"]["linear_0"]["bias"].shape[0]
    if "task_emb" in params:
        sizes["task_dim"] = params["task_emb"].shape[-1]
    return sizes


def _widths(layers: Params) -> list[int]:
    numbers = sorted(int(name.removeprefix("linear_")) for name in layers if name.startswith("linear_"))
    return [layers[f"linear_{number}"]["bias"].shape[-1] for number in numbers]


def check_shapes(params: Params, like: Params, path: str | os.PathLike, what: str) -> None:
    """Compares the shapes of an agent's parameters with those of the networks at hand.

    Args:
        like: parameters of the networks at hand, or their shapes from `jax.eval_shape`.
        path: where the agent is from, for the sentence.
        what: what it should fit, as "this task and these sizes".

    Raises:
        UserError: they differ; the sentence names the first difference, and the agent's sizes.
    """
    found = _shapes(params)
    expected = _shapes(like)
    different = [name for name in expected | found if expected.get(name) != found.get(name)]
    if not different:
        return
    first = different[0]
    shapes = f"{first} is {found.get(first, 'missing')} there and {expected.get(first, 'missing')} here"
    sizes = sizes_of(params)
    hint = ""
    if sizes != sizes_of(like):
        hint = "; it has " + " ".join(f"--{name.replace('_', '-')} {size}" for name, size in sizes.items())
    raise UserError(f"{path} does not fit {what}: {shapes}{hint}")


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
) -> LoadedAgent:
    """The agent of an original .pt file, a run or a quantised file of ours, for single-task networks: one task of a
    multi-task agent (`fold_agent`), without a termination head if they have none, and compared (`check_shapes`).

    Args:
        path: a file that ends in .pt, a run's folder, a checkpoint's, or a quantised file.
        source_task: the multi-task agent's task; None for a single-task agent.
        init: called with a key, returns fresh parameters of the networks at hand; only their shapes are asked for.
        scripts: whose runs will do.
        obs: what the agent must see, "state" or "rgb".
        task: the task of a multi-task agent where source_task is None.

    Raises:
        UserError: there is no such agent, it is damaged, or it does not fit.
    """
    agent = _read(path, obs, scripts)
    like = jax.eval_shape(init, jax.random.key(0))
    if not source_task:
        source_task = None if agent.task_emb is None else task
    if "linear_0" in like["encoder"]["params"]:  # agents of pictures have one task
        agent = fold_agent(agent, source_task, *_obs_and_action_dim(like), path)
    params = {name: value for name, value in agent.params.items() if name in like or name != "termination"}
    check_shapes(params, like, path, "this task and these sizes")
    return agent._replace(params=params)


def load_parts(
    path: str, tasks: Sequence[str], init: Callable[[jax.Array], Params], *scripts: str
) -> Iterator[tuple[LoadedAgent, np.ndarray]]:
    """For each of these tasks what a multi-task agent is for it (`fold_agent`), compared, and the task's embedding [E].
    The arguments and what is refused are as in `load_agent`; an agent of one task is refused, too."""
    agent = _read(path, "state", scripts)
    like = jax.eval_shape(init, jax.random.key(0))
    if agent.task_emb is None:
        raise UserError(f"{path} is a single-task agent: leave out --tasks")
    if not agent.tasks and len(agent.task_emb) != len(tasks):
        raise UserError(f"{path} knows {len(agent.task_emb)} tasks: name them all with --tasks")
    agent = agent._replace(tasks=agent.tasks or tuple(tasks))
    for task in tasks:
        folded = fold_agent(agent, task, *_obs_and_action_dim(like), path)
        folded.params.pop("termination", None)
        check_shapes(folded.params, like, path, "these tasks and sizes")
        emb = np.asarray(agent.task_emb[agent.tasks.index(task)])
        yield folded, emb / max(1.0, np.linalg.norm(emb)) if agent.learned_emb else emb


def _obs_and_action_dim(params: Params) -> tuple[int, int]:
    """Of single-task networks."""
    obs_dim = params["encoder"]["params"]["linear_0"]["kernel"].shape[0]
    action_dim = params["pi"]["params"]["linear_2"]["bias"].shape[0] // 2
    return obs_dim, action_dim


def load_multitask(path: str, named: Sequence[str], *scripts: str, parts: Sequence[str] = ()) -> LoadedAgent:
    """The multi-task agent of an original .pt file, a run or a quantised file of ours, its embeddings among its
    parameters as `task_emb`; `named` are its tasks, if it is the original's and not one of mt30 or mt80. Of its
    networks only `parts` are read, if they are named.

    Raises:
        UserError: there is no such agent, it is damaged, of one task, or the number of names is not that of its tasks.
    """
    agent = _read(path, "state", scripts, parts)
    if agent.task_emb is None:
        raise UserError(f"{path} is a single-task agent: it is for tdmpc2_jax.py")
    return _with_table(agent, named, path)


def load_any(path: str, named: Sequence[str], *scripts: str) -> LoadedAgent:
    """As `load_multitask`, but a single-task agent, too: without `task_emb` among its parameters."""
    agent = _read(path, "state", scripts)
    return agent if agent.task_emb is None else _with_table(agent, named, path)


def load_newt(path: str, *scripts: str) -> LoadedAgent:
    """An agent for newt_jax.py: of an original .pt file or a run of ours, of one task or of many, whose embeddings are
    `task_emb`. UserError if there is none, or it is damaged."""
    return _read(path, "state", scripts)


def embeddings_of(agent: LoadedAgent, names: Sequence[str], source: str | None, path: str) -> np.ndarray:
    """Embeddings [T, E] of tasks: the agent's own where it knows the task, else those that `read_embeddings` finds; of
    an agent without any, which has learned one task, there are none (E = 0).

    Raises:
        UserError: there is no embedding of a task, or it has another size than the agent's.
    """
    if agent.task_emb is None:
        if len(names) > 1:
            raise UserError(f"{path} is a single-task agent: name one task with --tasks")
        return np.zeros((1, 0), np.float32)
    own = np.asarray(agent.task_emb)
    if not agent.tasks and len(own) == len(names):
        return own
    table = np.zeros((len(names), own.shape[1]), np.float32)
    new = [name for name in names if name not in agent.tasks]
    if new:
        if source is None and agent.learned_emb:
            raise UserError(f"{path} does not know {', '.join(new[:3])}")
        found = read_embeddings(new, source or ("language" if own.shape[1] else "none"))
        if found is None or found.shape[1] != own.shape[1]:
            raise UserError(
                f"{path} has embeddings of {own.shape[1]} numbers: --embeddings {source} is of another size"
            )
        table[[names.index(name) for name in new]] = found
    for i, name in enumerate(names):
        if name in agent.tasks:
            table[i] = own[agent.tasks.index(name)]
    return table


def padding_of(agent: LoadedAgent) -> dict[str, int]:
    """To what size a Newt agent's observations and actions are padded, by the names of the arguments."""
    emb = 0 if agent.task_emb is None else agent.task_emb.shape[-1]
    inputs = agent.params["encoder"]["params"]["linear_0"]["kernel"].shape[0]
    actions = agent.params["pi"]["params"]["linear_2"]["bias"].shape[0] // 2
    return {"pad_obs": inputs - emb, "pad_action": actions}


def _with_table(agent: LoadedAgent, named: Sequence[str], path: str) -> LoadedAgent:
    if not agent.learned_emb:
        raise UserError(f"{path} is an agent of Newt, of {len(agent.task_emb)} tasks: it is for newt_jax.py")
    tasks = agent.tasks or tuple(named)
    if len(tasks) != len(agent.task_emb):
        raise UserError(f"{path} knows {len(agent.task_emb)} tasks: name them all with --tasks")
    params = {name: value for name, value in agent.params.items() if name != "termination"}
    return agent._replace(params=params | {"task_emb": agent.task_emb}, task_emb=None, tasks=tasks)


def load_tdmpc(
    path: str, init: Callable[[jax.Array], Params], *scripts: str, obs: str = "state"
) -> tuple[Params, Params, int | None]:
    """An agent of TD-MPC, the first version: its parameters, the slow copies of its `encoder` and `q`, and how many
    decisions it has made, or None where it is the original's; see `load_agent`."""
    like = jax.eval_shape(init, jax.random.key(0))
    if path.endswith(".pt"):
        params, target = read_tdmpc(path, obs)
        decisions = None
    else:
        checkpoint = find_checkpoint(path)
        meta = read_meta(checkpoint, *scripts)
        state = read_agent(checkpoint, meta, ("params", "target"))
        params = state["params"]
        target = state["target"]
        decisions = meta["count"]["decisions"] + meta["count"].get("loaded", 0)
    slow = {f"slow {name}": target[name] for name in ("encoder", "q")}
    expected = {f"slow {name}": like[name] for name in ("encoder", "q")}
    check_shapes(params | slow, like | expected, path, "this task and these sizes")
    return params, target, decisions


def load_teacher(path: str, tasks: Sequence[str], *scripts: str) -> LoadedAgent:
    """The part of a multi-task agent of these tasks that predicts rewards: `encoder`, `reward` and `task_emb`. Its
    `args` are those that make these networks and decode their outputs.

    Raises:
        UserError: as `load_multitask`; its tasks, or the sizes of its observations and actions, are others.
    """
    agent = load_multitask(path, tasks, *scripts, parts=("encoder", "reward"))
    if agent.tasks != tuple(tasks):
        raise UserError(f"{path} knows other tasks than --tasks names, or in another order")
    sizes = sizes_of(agent.params)
    encoder = agent.params["encoder"]["params"]
    reward = agent.params["reward"]["params"]
    obs_dim = encoder["linear_0"]["kernel"].shape[0] - sizes["task_dim"]
    action_dim = reward["linear_0"]["kernel"].shape[0] - sizes["latent_dim"] - sizes["task_dim"]
    expected = set_sizes(tasks)
    if (obs_dim, action_dim) != expected:
        knows = f"it knows {obs_dim} observations and {action_dim} actions"
        raise UserError(f"{path} does not fit these tasks: {knows}, they have {expected[0]} and {expected[1]}")
    args = {name: agent.args[name] for name in ("vmin", "vmax", "simnorm_dim") if name in agent.args}
    return agent._replace(args=args | sizes | {"num_bins": _widths(reward)[-1]})


def _read(path: str, obs: str, scripts: Sequence[str], parts: Sequence[str] = ()) -> LoadedAgent:
    if path.endswith(".pt"):
        return read_original(path, obs, parts) if parts else read_original(path, obs)
    if Path(path).is_file():
        return _read_quantized(path, scripts, parts)
    checkpoint = find_checkpoint(path)
    meta = read_meta(checkpoint, *scripts)
    networks = (*parts, "task_emb") if parts else ()
    state = read_agent(checkpoint, meta, ("params", "target_q", "q_scale"), networks)
    task_emb = state["params"].pop("task_emb", None)
    if task_emb is not None and task_emb.ndim < 2:  # stands for a table without numbers
        task_emb = jnp.zeros((len(meta["tasks"]), 0))
    return LoadedAgent(
        params=state["params"],
        target_q=state.get("target_q", {}),
        q_scale=state.get("q_scale", 1.0),
        task_emb=task_emb,
        tasks=tuple(meta.get("tasks", ())),
        args=meta.get("args", {}),
        learned_emb=meta.get("learned_emb", True),
        decisions=meta.get("count", {}).get("decisions"),
    )


# ---------------------------------------------------------------------------------------------------- Quantised agents
def write_quantized(
    path: str, agent: LoadedAgent, variant: str, script: str, args: Mapping[str, Any], target_q: bool = False
) -> None:
    """Writes an agent of `load_any` to a file of this variant (see `quantize`), with the arguments of its script that
    make it; without target Qs unless asked: only learning needs them.

    Raises:
        UserError: the agent is of a quantised file already, the file exists, or cannot be written.
    """
    agent.check_variant(variant)
    params = dict(agent.params)
    if target_q:
        params["target_q"] = agent.target_q
    tensors = quantize(params, variant)
    tensors["q_scale"] = np.asarray(agent.q_scale, np.float32)
    record = {"script": script, "variant": variant, "tasks": json.dumps(agent.tasks), "args": json.dumps(dict(args))}
    write_safetensors(path, tensors, record)


def read_record(path: str, *scripts: str) -> dict[str, Any]:
    """The record of an agent's run, checkpoint or quantised file, `args` and `tasks` among it; empty `args` if it is
    the original's.

    Raises:
        UserError: there is no such agent, it is damaged, or of none of `scripts`.
    """
    if path.endswith(".pt"):
        return {"args": {}}
    if Path(path).is_file():
        return _parsed_record(path, read_safetensors(path, parts=()).record, scripts)
    return read_meta(find_checkpoint(path), *scripts)


def _parsed_record(path: str, record: Mapping[str, str], scripts: Sequence[str]) -> dict[str, Any]:
    try:
        script = record["script"]
        variant = record["variant"]
        tasks = tuple(json.loads(record["tasks"]))
        args = dict(json.loads(record["args"]))
        known = all(task in TASKS for task in tasks)
        plain = all(value is None or isinstance(value, str | int | float) for value in args.values())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} holds no agent of this project") from None
    if not (known and plain):
        raise UserError(f"{path} holds no agent of this project")
    if script not in scripts or variant not in VARIANTS:
        raise UserError(f"{path} is an agent of {script}.py, not of {scripts[0]}.py")
    return {"variant": variant, "tasks": tasks, "args": args}


def _read_quantized(path: str, scripts: Sequence[str], parts: Sequence[str]) -> LoadedAgent:
    stored = read_safetensors(path, (*parts, "task_emb") if parts else None)
    record = _parsed_record(path, stored.record, scripts)
    try:
        _check_whole_file(stored.shapes)
        params = jax.tree.map(jnp.asarray, nested(dequantize(stored.tensors)))
        q_scale = jnp.reshape(params.pop("q_scale", 1.0), ())  # in files of earlier versions it has shape [1]
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except (KeyError, ValueError, IndexError, AttributeError, TypeError):
        raise UserError(f"{path} holds no whole agent") from None
    task_emb = params.pop("task_emb", None)
    if task_emb is not None and (task_emb.ndim != 2 or len(task_emb) != len(record["tasks"])):
        raise UserError(f"{path} holds no whole agent: {len(record['tasks'])} tasks, embeddings {task_emb.shape}")
    target_q = params.pop("target_q", params.get("q", {}))  # learning that goes on begins with the Qs themselves
    return LoadedAgent(params, target_q, q_scale, task_emb, record["tasks"], record["args"], record["variant"])


def _check_whole_file(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    components = nested({name: shape for name, shape in shapes.items() if not name.endswith(".kernel_scale")})
    names = {"encoder", "dynamics", "reward", "pi", "q"} | {"termination"} & components.keys()
    networks = {name: components[name] for name in names}
    networks["target Q"] = components.get("target_q", components["q"])
    _check_whole(networks, components["task_emb"].shape[-1] if "task_emb" in components else 0)
