"""The original's numbers, pixels: same inputs, same recorded random draws, same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import LAYOUTS, close, shapes_of

import envs
import tdmpc2_jax_rgb as rgb
from tdmpc2_support.agents.pretrained import check_shapes, from_torch

pytestmark = pytest.mark.golden


def agent_of(tensors, params):
    """The agent of the recorded model."""
    return rgb.Agent(
        latent_dim=len(tensors["_dynamics.2.bias"]),
        mlp_dim=len(tensors["_dynamics.0.bias"]),
        num_q=len(params["q"]["params"]["linear_0"]["bias"]),
        action_dim=len(tensors["_pi.2.bias"]) // 2,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_shifted_and_encoded_as_recorded(golden, layout):
    tensors, recording = envs.load_pt(golden(f"rgb{layout}.pt"))["model"], golden("rgb_encoder.npz")
    params = from_torch(tensors, "rgb").params
    agent = agent_of(tensors, params)
    encode = jax.jit(rgb.encode, static_argnums=0)
    stacks = jnp.asarray(recording["in_obs"].transpose(0, 2, 3, 1))  # [2, 64, 64, 9]
    for i in range(5):
        shift = jnp.broadcast_to(jnp.asarray(recording[f"shift{i}"]), (2, 2))
        shifted = np.asarray(jax.vmap(rgb.shift_stack)(stacks, shift)).transpose(0, 3, 1, 2)
        expected = recording[f"shifted{i}"]
        np.testing.assert_array_equal(shifted, np.rint(expected))  # interpolation left up to 0.002 in the recording
        assert np.abs(shifted - expected).max() < 2e-3
        close(encode(agent, params["encoder"], stacks, shift), recording[f"encode{i}"], 1e-4)
    # on a CPU, eight and more pictures go another way
    many, shifts = jnp.tile(stacks, (4, 1, 1, 1)), jnp.tile(shift, (4, 1))
    close(encode(agent, params["encoder"], many, shifts), np.tile(recording["encode4"], (4, 1)), 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rest_of_a_recorded_pixel_agent_has_the_shapes_of_ours(golden, layout):
    tensors = envs.load_pt(golden(f"rgb{layout}.pt"))["model"]
    params, target_q = from_torch(tensors, "rgb")[:2]
    check_shapes(params, shapes_of(rgb, agent_of(tensors, params)), "rgb.pt", "the model")
    assert jax.tree.map(jnp.shape, target_q) == jax.tree.map(jnp.shape, params["q"])
