"""What the tests of recorded numbers share."""

from functools import cache

import jax
import numpy as np

import tdmpc2_jax as td

LAYOUTS = ["", "_released_layout"]


def close(actual, expected, tolerance):
    """Largest difference relative to the largest value of the recording, as one number per array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    actual = actual.reshape(expected.shape)
    scale = max(np.abs(expected).max(), 1e-8)
    assert np.abs(actual - expected).max() <= tolerance * scale


def changes_are_close(actual, expected, before, tolerance=0.05):
    """Of every array the change since `before`, which may be a thousandth of it or less, by its norm."""
    for mine, original, start in zip(*map(jax.tree.leaves, (actual, expected, before)), strict=True):
        start, change = np.asarray(start), np.linalg.norm(np.asarray(original) - start)
        assert np.linalg.norm(np.asarray(mine) - np.asarray(original)) <= tolerance * change


def agent_of(tensors, recording, plan=None):
    """The agent of a recorded model, read off its tensors and draws."""
    dims = {
        "enc_dim": len(tensors["_encoder.state.0.bias"]),
        "mlp_dim": len(tensors["_dynamics.0.bias"]),
        "latent_dim": len(tensors["_dynamics.2.bias"]),
        "num_enc_layers": max(2, len([k for k in tensors if k.startswith("_encoder.state") and k.endswith("ln.bias")])),
        "num_q": len(recording["q_logits_all"]),
        "batch_size": recording["in_obs"].shape[1],
        "horizon": len(recording["in_action"]),
        "num_bins": recording["reward_logits"].shape[-1],
        "dropout": 0.0,
    }
    if plan is not None:
        iterations, action_dim = int(plan["iterations"]), recording["in_action"].shape[-1]
        gumbel = next(v for k, v in plan.items() if k.startswith("explore0") and k.endswith("gumbel"))
        samples = next(v for k, v in plan.items() if k.startswith("explore0") and v.ndim == 3)
        dims |= {
            "iterations": iterations - 2 * (action_dim >= 20),
            "num_elites": len(gumbel),
            "num_pi_trajs": len(plan["explore0_draw000_normal"]),
            "num_samples": samples.shape[1] + len(plan["explore0_draw000_normal"]),
        }
    return td.Agent(
        **dims,
        obs_dim=recording["in_obs"].shape[-1],
        action_dim=recording["in_action"].shape[-1],
        can_terminate="termination" in recording,
        discount=float(recording["discount"]) if recording["discount"].ndim == 0 else 0.99,
    )


@cache
def shapes_of(script, agent):
    """Shapes of the parameters of a script's networks."""
    return jax.eval_shape(lambda: script.init_params(agent, jax.random.key(0)))


def draws_of(recording, prefix):
    """The draws under this prefix in the order in which they were made."""
    return [recording[k] for k in sorted(recording) if k.startswith(prefix + "_draw")]
