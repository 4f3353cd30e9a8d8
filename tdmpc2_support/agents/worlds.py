"""A finished world model as planners use it: for one task, or for several that share all but a few arrays.

world = load_world("runs/mt30/tdmpc2_jax_mt/1", ("walker-walk", "cup-catch"), (0.99, 0.99), init, 96, "tdmpc2_jax_mt")
of_task(world, 1)                              # what it is for cup-catch: a world model of one task
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.agents.pretrained import load_agent, load_parts, read_record
from tdmpc2_support.cli import saved_fields
from tdmpc2_support.envs.tasks import TASKS
from tdmpc2_support.errors import UserError

Params = dict[str, Any]


class World(NamedTuple):
    """A world model and its task: what plans on it without changing it. One of several tasks (`join`) has a leading
    axis [T] in all arrays in which they differ."""

    params: Params  # by component; and task_emb [E] of one of several tasks
    target_q: Params
    mask: jax.Array  # [A] 1 where the task has this action
    discount: jax.Array  # gamma

    @property
    def emb(self) -> jax.Array | None:
        """The task's embedding [E], if it is one of several: the biases of first layers have it folded in."""
        return self.params.get("task_emb")


def join(worlds: Sequence[World]) -> World:
    """The world model of several tasks, from what it is for each of them."""

    def stack(path: Any, *leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves) if _differs(path) else leaves[0]

    return jax.tree_util.tree_map_with_path(stack, *worlds)


def of_task(world: World, task: Any) -> World:
    """What a world model of several tasks is for one, by its index; that of an only task as it is."""
    if world.emb is None:
        return world
    return jax.tree_util.tree_map_with_path(lambda path, x: x[task] if _differs(path) else x, world)


def _differs(path: Any) -> bool:
    """Whether tasks differ in an array of `World`: in the biases of first layers, into which embeddings are folded, in
    the embeddings, and in all that is no parameter."""
    if path[0].name not in ("params", "target_q"):
        return True
    return path[1].key == "task_emb" or [key.key for key in path[-2:]] == ["linear_0", "bias"]


def without_lacking(world: World) -> World:
    """The same for one task, with actions that the task lacks made ineffective: samples of MPPI have them."""

    def cut(component: Params) -> Params:
        layers = component["params"]
        kernel = layers["linear_0"]["kernel"]  # its last rows are those of the actions
        rows = jnp.ones(kernel.shape[-2]).at[-len(world.mask) :].set(world.mask)
        return {"params": layers | {"linear_0": layers["linear_0"] | {"kernel": kernel * rows[:, None]}}}

    params = {name: cut(world.params[name]) for name in ("dynamics", "reward", "q")}
    return world._replace(params=world.params | params, target_q=cut(world.target_q))


def load_world(
    path: str,
    tasks: Sequence[str],
    discounts: Sequence[float],
    init: Callable[[jax.Array], Params],
    task_dim: int,
    *scripts: str,
    obs: str = "state",
) -> World:
    """The world model of a run or a .pt (see `load_agent`).

    Args:
        tasks: the task; of an agent of many tasks its part is taken. Or with task_dim several tasks of such an agent.
        discounts: of the tasks.
        init: called with a key, returns fresh parameters of the networks at hand; only their shapes are asked for.
        task_dim: size E of the embeddings; 0 for a world model of one task.
        scripts: whose runs will do.
        obs: what it must see, "state" or "rgb".

    Raises:
        UserError: as `load_agent` and `load_parts`, or the embeddings are of another size.
    """
    like = jax.eval_shape(init, jax.random.key(0))
    action_dim = like["pi"]["params"]["linear_2"]["bias"].shape[0] // 2
    if not task_dim:
        agent = load_agent(path, None, init, *scripts, obs=obs, task=tasks[0])
        return World(agent.params, agent.target_q, jnp.ones(action_dim), jnp.float32(discounts[0]))
    worlds: list[World] = []
    for task, discount, part in zip(tasks, discounts, load_parts(path, tasks, init, *scripts), strict=True):
        agent, emb = part
        if emb.shape != (task_dim,):
            raise UserError(f"{path} does not fit: it has --task-dim {len(emb)}")
        params = agent.params | {"task_emb": jnp.asarray(emb)}
        mask = jnp.float32(np.arange(action_dim) < TASKS[task].action_size)
        world = World(params, agent.target_q, mask, jnp.float32(discount))
        worlds.append(_sharing(world, worlds[0]) if worlds else world)
    return join(worlds)


def recorded_world(path: str, tasks: Sequence[str], agent: type, *scripts: str) -> dict[str, Any]:
    """What a world model's run has recorded of these: the fields of a dataclass, its task, the size of embeddings.

    Raises:
        UserError: there is no such run, or it knows some of the tasks not.
    """
    record = read_record(path, *scripts)
    known = record.get("tasks", ())
    unknown = [name for name in tasks if known and name not in known]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(f"{path} was not trained on {', '.join(unknown[:3])}{more}: it knows {', '.join(known[:9])}")
    wanted = {field.name for field in saved_fields(agent)} | {"task", "task_dim"}
    return {name: value for name, value in record["args"].items() if name in wanted}


def _sharing(world: World, first: World) -> World:
    """The same with the arrays of another task where they do not differ: a large model is in memory once."""
    return jax.tree_util.tree_map_with_path(lambda path, own, other: own if _differs(path) else other, world, first)
