"""What devices.py says of memory and does with arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.devices import committed


def test_a_loop_that_starts_with_committed_arrays_compiles_its_step_once(caplog):
    @jax.jit
    def a_step_of_the_loop(state, constant):
        return jax.tree.map(lambda x: x + constant, state)

    on_device = jax.device_put(jnp.float32(1), jax.devices()[0])  # as a replay is that was placed there
    state = committed({"a": jnp.zeros(3), "b": np.zeros(2, np.float32)})
    with jax.log_compiles():
        for _ in range(3):
            state = a_step_of_the_loop(state, on_device)
    compiled = [line for line in caplog.messages if "XLA compilation" in line and "a_step_of_the_loop" in line]
    assert len(compiled) == 1
    np.testing.assert_array_equal(state["a"], 3.0)
