"""Several runs in one program: their arrays side by side along a leading axis [S], and the files of each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.run.checkpoints import Checkpoints
from tdmpc2_support.run.folder import RunFolder
from tdmpc2_support.run.logging import Logger


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What is kept of one run."""

    seed: int
    folder: RunFolder
    checkpoints: Checkpoints
    logger: Logger
    count: dict[str, Any]  # counters: decisions, updates, evaluated, seconds


SEEDS = "seeds"  # name of the leading axis in compiled programs


def over_seeds(function: Callable[[Any, str | None], Any], runs: Any) -> Any:
    """function(run, axis) of every run, compiled for all at once; axis: the name by which `most` knows of the
    others, None if there are none."""
    if len(jax.tree.leaves(runs)[0]) == 1:
        results = function(jax.tree.map(lambda x: x[0], runs), None)
        return jax.tree.map(lambda x: x[None], results)
    return jax.vmap(lambda run: function(run, SEEDS), axis_name=SEEDS)(runs)


def most(number: jax.Array, axis: str | None) -> jax.Array:
    """The largest of the runs' numbers: the same for all of them. By `vmap` a loop whose end is another in each run
    selects all that it holds, old or new, in every round; and of a condition both sides are computed."""
    return number if axis is None else jax.lax.pmax(number, axis)


def side_by_side(runs: list[Any]) -> Any:
    """Runs, each a pytree, as one whose arrays have a leading axis [S]."""
    return _stacked(runs)


@jax.jit
def _stacked(runs: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


@jax.jit
def of_seed(runs: Any, number: int) -> Any:
    """One of several runs, by its place among them."""
    return jax.tree.map(lambda x: x[number], runs)


def numbered(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree by numbers, but for empty ones: what a checkpoint can hold, whatever classes a simulator's
    state consists of."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if np.prod(leaf.shape)}


def from_numbered(arrays: dict[str, Any], like: Any) -> Any:
    """The pytree whose arrays `numbered` has returned; like: its shapes and types."""
    leaves, structure = jax.tree.flatten(like)
    for i, leaf in enumerate(leaves):
        leaves[i] = arrays[f"{i:04d}"] if np.prod(leaf.shape) else jnp.zeros(leaf.shape, leaf.dtype)
    return jax.tree.unflatten(structure, leaves)
