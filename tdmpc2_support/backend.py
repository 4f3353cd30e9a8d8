"""What programs compute in one way on a CPU and in another on accelerators; the results are equal but for rounding."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.flatten_util import ravel_pytree

# By default the kernels of a CUDA graph run one behind the other, although many do not need each other's results
GRAPH_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


class Backend(NamedTuple):
    """On a CPU arithmetic and memory take the time. On an accelerator a kernel takes some microseconds whatever it
    computes, so few of them, and few that wait for one another, are fast (benchmarks/kernels.py counts them)."""

    one_pass_variance: bool  # LayerNorm: E[x^2] - E[x]^2; of centred values it is one kernel with what follows
    one_product: bool  # inputs of rewards and values are joined (a copy) and multiplied once, not one after the other
    heads_together: bool  # value heads as one batched product, not one after the other
    plan_written_out: bool  # no loop around a plan's iterations: it takes longer to compile
    one_norm: bool  # a gradient's norm is that of one vector: no kernels for each array, but all arrays on one device
    plan_bytes: int  # a layer's outputs for all environments that are planned for side by side; see this_backend
    stacks_at_once: int  # pictures that are encoded side by side; 0: all


def this_backend() -> Backend:
    """The choice for the devices that JAX computes on. A layer should stay in a CPU's cache: plans for 30 environments
    side by side take 1.8 times as long there as six times five; elsewhere memory is the bound."""
    if jax.default_backend() == "cpu":
        return Backend(
            one_pass_variance=True,
            one_product=False,
            heads_together=False,
            plan_written_out=False,
            one_norm=False,
            plan_bytes=2**22,
            stacks_at_once=8,
        )
    return Backend(
        one_pass_variance=False,
        one_product=True,
        heads_together=True,
        plan_written_out=True,
        one_norm=jax.device_count() == 1,
        plan_bytes=2**29,
        stacks_at_once=0,
    )


def global_norm(tree: Any) -> jax.Array:
    """Norm of all arrays together."""
    if this_backend().one_norm:
        tree = ravel_pytree(tree)[0]
    return optax.tree.norm(tree)


def clipped(grads: Any, bound: float) -> Any:
    """Gradients with a global norm of at most `bound`."""
    norm = global_norm(grads)
    return jax.tree.map(lambda grad: jax.lax.select(norm < bound, grad, grad / norm * bound), grads)


def clip_by_global_norm(bound: float) -> optax.GradientTransformation:
    """That of Optax, by the norm above."""
    return optax.stateless(lambda grads, _: clipped(grads, bound))


@functools.cache
def graph_options() -> dict[str, Any]:
    """XLA's options that let kernels of a CUDA graph run side by side. None where it is not for NVIDIA GPUs, does not
    know them (any version may drop them), or the user has decided: TDMPC2_CUDA_GRAPHS=0, or on graphs in XLA_FLAGS."""
    decided = os.environ.get("TDMPC2_CUDA_GRAPHS") == "0" or "command_buffer" in os.environ.get("XLA_FLAGS", "")
    if decided or jax.default_backend() != "gpu" or "rocm" in jax.devices()[0].client.platform_version:
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=GRAPH_OPTIONS).lower(0).compile()
    except (RuntimeError, ValueError):
        return {}
    return GRAPH_OPTIONS


def jit_with_graphs(function: Callable, **options: Any) -> Callable:
    """jax.jit with these options and with `graph_options`, which are looked for at the first call: importing a script
    asks for no device. JAX takes such options for the outermost function only: called by another one that is compiled,
    it has none."""

    @functools.cache
    def jitted(outermost: bool) -> Any:
        return jax.jit(function, compiler_options=graph_options() if outermost else None, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        return jitted(not traced)(*args, **kwargs)

    wrapped: Any = functools.wraps(function)(call)
    wrapped.trace = lambda *args, **kwargs: jitted(True).trace(*args, **kwargs)
    wrapped.lower = lambda *args, **kwargs: jitted(True).lower(*args, **kwargs)
    return wrapped
