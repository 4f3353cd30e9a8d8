"""A multi-task agent for one task: its embedding, a constant input there, becomes part of the biases. Exact."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.envs.tasks import TASK_SETS, task_spec
from tdmpc2_support.errors import UserError

if TYPE_CHECKING:
    from tdmpc2_support.agents.pretrained import LoadedAgent

Params = dict[str, Any]  # of networks, by component


def fold_agent(
    agent: LoadedAgent, source_task: str | None, obs_dim: int, action_dim: int, path: str | os.PathLike
) -> LoadedAgent:
    """A single-task agent as it is, or what a multi-task agent from `path` computes for its task `source_task`, cut to
    the sizes of the task at hand; see `fold_task`.

    Raises:
        UserError: a task is named and the agent has one only, or the reverse; it does not know it, or is too small.
    """
    if agent.task_emb is None:
        if source_task is not None:
            raise UserError(f"{path} is a single-task agent: leave out --source-task")
        return agent
    if source_task is None:
        raise UserError(f"{path} is a multi-task agent: name its task with --source-task")
    source = task_spec(source_task).name
    if source not in agent.tasks:
        raise UserError(f"{path} was not trained on {source}: it knows {_known_tasks(agent)}")
    inputs = agent.params["encoder"]["params"]["linear_0"]["kernel"].shape[0]
    agent_obs_dim = inputs - agent.task_emb.shape[1]
    agent_action_dim = agent.params["pi"]["params"]["linear_2"]["bias"].shape[0] // 2
    if agent_obs_dim < obs_dim or agent_action_dim < action_dim:
        known = f"it knows {agent_obs_dim} observations and {agent_action_dim} actions"
        raise UserError(f"{path} does not fit this task: {known}, the task has {obs_dim} and {action_dim}")
    emb = np.asarray(agent.task_emb[agent.tasks.index(source)])
    networks = agent.params | {"q_target": agent.target_q}
    params = fold_task(networks, emb, obs_dim, action_dim, agent.learned_emb)
    target_q = params.pop("q_target")
    return type(agent)(params, target_q, agent.q_scale)


def _known_tasks(agent: LoadedAgent) -> str:
    for name, tasks in TASK_SETS.items():
        if tasks == agent.tasks:
            return f"the tasks of {name}"
    return ", ".join(agent.tasks) or f"{len(agent.task_emb)} tasks without names"


def fold_task(params: Params, emb: np.ndarray, obs_dim: int, action_dim: int, learned_emb: bool = True) -> Params:
    """Turns a multi-task agent's parameters (with or without `q_target`) into those of one task, exactly.

    emb [task_dim] is the task's embedding, a constant input: it moves into the first layers' biases. Observations and
    actions beyond the task's own sizes were always zero there: the weights of these inputs and outputs go. Inputs are
    obs|e, z|e|a.
    """
    emb = np.asarray(emb, np.float64)  # on the host: an accelerator would round the products
    if learned_emb:
        emb = emb / max(1.0, np.linalg.norm(emb))  # rows of a learned table have at most unit norm when read
    latent_dim = params["dynamics"]["params"]["linear_2"]["bias"].shape[-1]
    folded = {}
    for name, component in params.items():
        layers = dict(component["params"])
        kernel = np.asarray(layers["linear_0"]["kernel"])
        if name == "encoder":
            emb_start = kernel.shape[-2] - len(emb)
            first_inputs = kernel[..., :obs_dim, :]
        else:
            emb_start = latent_dim
            first_inputs = kernel[..., :latent_dim, :]
        emb_stop = emb_start + len(emb)
        action_inputs = kernel[..., emb_stop:, :][..., :action_dim, :]  # none in the encoder and the policy
        constant = np.einsum("e,...eo->...o", emb, kernel[..., emb_start:emb_stop, :])
        layers["linear_0"] = {
            "kernel": jnp.asarray(np.concatenate([first_inputs, action_inputs], axis=-2)),
            "bias": jnp.float32(np.asarray(layers["linear_0"]["bias"]) + constant),
        }
        if name == "pi":
            layers["linear_2"] = _cut_policy(layers["linear_2"], action_dim)
        folded[name] = {"params": layers}
    return folded


def _cut_policy(layer: Params, action_dim: int) -> Params:
    """The policy's last layer for the first actions: their means and their log stds, which stand behind all means."""
    half = layer["bias"].shape[-1] // 2
    outputs = np.r_[:action_dim, half : half + action_dim]
    return jax.tree.map(lambda weights: weights[..., outputs], layer)
