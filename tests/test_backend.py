"""What accelerators compute in another way than a CPU is the same but for rounding, and launches few kernels."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT, jitter

import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support import backend
from tdmpc2_support.backend import clip_by_global_norm, global_norm, graph_options, jit_with_graphs
from tdmpc2_support.run.schedule import random_streams

SIZES = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_enc_layers": 2, "num_q": 3, "num_bins": 21}
AGENT = td.Agent(**SIZES, batch_size=16, num_samples=32, num_elites=8, num_pi_trajs=4, iterations=2)
AGENT = dataclasses.replace(AGENT, obs_dim=5, action_dim=3, can_terminate=True)


@pytest.fixture
def on_both(monkeypatch):
    """on_both(f) -> what f() computes, compiled as for a CPU and as for an accelerator."""

    def compute(function):
        found = []
        for name in ("cpu", "gpu"):
            monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
            found.append(jax.jit(lambda: function())())
        return found

    return compute


def equal_but_for_rounding(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), one, other)


def with_values(key):
    """Parameters with rewards, values and terminations that are not all the same, as fresh ones are."""
    params = jax.jit(td.init_params, static_argnums=0)(AGENT, key)
    return jitter(params, 0.1)


def test_an_accelerator_values_and_plans_as_a_cpu_does(on_both):
    params = with_values(jax.random.key(0))
    obs = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
    noise, heads = jax.jit(td.plan_noise, static_argnums=(0, 2))(AGENT, jax.random.key(2), 2)
    mean, first = np.zeros((2, AGENT.horizon, 3), np.float32), np.array([True, False])
    plans = on_both(lambda: td.plan(AGENT, params, obs, mean, first, noise, heads, explore=True))
    equal_but_for_rounding(*plans)
    assert np.abs(plans[0][0]).min() < 1  # not all of it is cut off


def test_an_accelerator_values_many_tasks_as_a_cpu_does_with_an_embedding_for_each_window_or_for_all(on_both):
    agent = mt.Agent(**SIZES, task_dim=8, num_tasks=2, obs_dim=5, action_dim=3)
    params = jitter(jax.jit(mt.init_params, static_argnums=0)(agent, jax.random.key(0)), 0.1)
    rng = np.random.default_rng(0)
    z, action = (rng.normal(size=(3, 4, width)).astype(np.float32) for width in (16, 3))

    def logits(emb):
        reward = mt.networks(agent).reward.apply(params["reward"], z, emb, action)
        return reward, mt.q_logits(agent, params["q"], z, emb, action)

    for shape in ((4, 8), (8,)):
        emb = rng.normal(size=shape).astype(np.float32)
        equal_but_for_rounding(*on_both(lambda emb=emb: logits(emb)))


@pytest.mark.slow
def test_an_accelerator_learns_as_a_cpu_does(on_both):
    params = with_values(jax.random.key(0))
    state = td.init_state(AGENT, params, params["q"], 1.0, random_streams(0).train)
    rng = np.random.default_rng(0)
    H, B = AGENT.horizon, AGENT.batch_size
    shapes = (H + 1, B, 5), (H, B, 3), (H, B)
    batch = td.Batch(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes), jnp.zeros((H, B)))
    noise = td.update_noise(AGENT, jax.random.key(3))
    (cpu, cpu_info), (gpu, gpu_info) = on_both(lambda: td.update(AGENT, state, batch, noise))
    equal_but_for_rounding(cpu_info, gpu_info)
    equal_but_for_rounding(cpu.model_opt, gpu.model_opt)
    assert np.isfinite(cpu_info["grad_norm"]) and cpu_info["grad_norm"] > 0


def test_an_accelerator_clips_a_gradient_as_optax_does(on_both):
    tree = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(4)}
    for bound in (1.0, 100.0):
        clipped = optax.clip_by_global_norm(bound).update(tree, optax.EmptyState())[0]
        for found in on_both(lambda bound=bound: clip_by_global_norm(bound).update(tree, optax.EmptyState())[0]):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, clipped)
    for norm in on_both(lambda: global_norm(tree)):
        assert norm == pytest.approx(np.sqrt(59))


@pytest.mark.slow
def test_after_a_predicted_termination_no_reward_counts():
    """Every reward is 1 and every value 0: a sequence is worth the rewards up to the termination."""
    agent = dataclasses.replace(AGENT, discount=1.0)
    params = td.init_params(agent, jax.random.key(0))
    reward, termination = params["reward"]["params"]["linear_2"], params["termination"]["params"]["linear_2"]
    reward["bias"] = jnp.log(td.two_hot(agent, jnp.array(1.0)) + 1e-30)
    termination["kernel"] *= 0
    z = jnp.full((1, agent.latent_dim), 1 / agent.simnorm_dim)
    inputs = z, jnp.zeros((agent.horizon, 4, 3)), jnp.array([0, 1]), jnp.zeros((4, 3))
    for logit, worth in ((-1.0, agent.horizon), (1.0, 1)):
        termination["bias"] = jnp.array([logit])
        np.testing.assert_allclose(td.estimate_value(agent, params, *inputs), worth, rtol=1e-4)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Options are asked for as on an NVIDIA GPU; they are known here, too, but mean nothing."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    graph_options.cache_clear()
    yield monkeypatch
    graph_options.cache_clear()


def test_kernels_run_side_by_side_on_a_gpu_alone(on_a_gpu):
    assert graph_options() == backend.GRAPH_OPTIONS
    on_a_gpu.setattr(jax, "default_backend", lambda: "cpu")
    graph_options.cache_clear()
    assert graph_options() == {}


@pytest.mark.parametrize(
    "name, value", [("TDMPC2_CUDA_GRAPHS", "0"), ("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")]
)
def test_the_user_decides_about_graphs(on_a_gpu, name, value):
    on_a_gpu.setenv(name, value)
    assert graph_options() == {}


def test_options_that_xla_does_not_know_are_left_out(on_a_gpu):
    on_a_gpu.setattr(backend, "GRAPH_OPTIONS", {"xla_gpu_of_another_version": True})
    assert graph_options() == {}
    assert jit_with_graphs(lambda x: x + 1)(1) == 2


def test_a_function_with_graphs_is_compiled_at_its_first_call_and_once(on_a_gpu):
    traced = []

    @partial(jit_with_graphs, static_argnames="by", donate_argnames="x")
    def scaled(x, by: int):
        """Its docstring."""
        traced.append(by)
        return x * by

    assert scaled.__doc__ == "Its docstring." and not traced
    x = jnp.ones(3)
    assert (scaled(scaled(x, by=2), by=2) == 4).all() and traced == [2] and x.is_deleted()
    assert scaled.trace(jnp.ones(3), by=2).out_info.shape == (3,)


def test_a_function_with_graphs_is_part_of_one_that_calls_it(on_a_gpu):
    @partial(jit_with_graphs, static_argnames="by")
    def scaled(x, by: int):
        return x * by

    assert (jax.jit(lambda x: scaled(x, by=2) + 1)(jnp.ones(3)) == 3).all()
    assert (jax.lax.fori_loop(0, 2, lambda i, x: scaled(x, by=3), jnp.ones(3)) == 9).all()
    assert jax.eval_shape(lambda x: scaled(x, by=2), jnp.ones(3)).shape == (3,)
    assert (scaled(jnp.ones(3), by=2) == 2).all()


def test_programs_launch_no_more_kernels_than_recorded(tmp_path):
    """Those of the 5M model, compiled for a GPU that is not there; more than 3% more are refused."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="needs pip install -e .[gpu-aot]")
    record = json.loads((ROOT / "benchmarks/results/kernels.json").read_text())
    if record["jax_version"] != jax.__version__:
        pytest.skip(f"recorded with JAX {record['jax_version']}")
    command = [sys.executable, ROOT / "benchmarks/kernels.py", "--scripts", "tdmpc2_jax", "--json", tmp_path / "now"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    now = json.loads((tmp_path / "now").read_text())["rows"]
    assert len(now) == 2
    for row in now:
        program = {name: row[name] for name in ("script", "call", "model_size", "num_envs")}
        recorded = next(r for r in record["rows"] if program.items() <= r.items())
        for figure in ("launches", "chain", "graphs", "outside"):
            assert row["checkouts"][-1][figure] <= 1.03 * recorded["checkouts"][-1][figure], (program, figure)
