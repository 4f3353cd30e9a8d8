"""A small agent in four environments that terminate learns to balance a pole; not with a broken update or planner."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_flags

import tdmpc2_jax
import tdmpc_jax

TASK = "InvertedPendulum-v5"  # MuJoCo; 1 per step until the pole falls, after 5 steps for a random agent
OWN = {tdmpc2_jax: {"num_q": 2}, tdmpc_jax: {"horizon": 3, "schedule_steps": 500}}  # what one of the scripts has only


@pytest.fixture(scope="module", params=OWN, ids=lambda td: td.__name__)
def returns_of(request, tmp_path_factory):
    """Mean returns after 2500 steps of training: with planning, and of the policy alone."""
    folder, td = tmp_path_factory.mktemp("learning"), request.param
    small = {"enc_dim": 32, "mlp_dim": 64, "latent_dim": 32, "batch_size": 64, "iterations": 3} | OWN[td]
    agent = td.Agent(**small, num_samples=64, num_elites=16, num_pi_trajs=8)
    few = {"seed_steps": 500, "buffer_size": 10_000, "eval_freq": 10_000, "eval_episodes": 4}
    args = td.Args(task=TASK, agent=agent, runs_dir=str(folder), num_envs=4, total_timesteps=2500, **few)
    td.main(as_flags(args))
    results = {}
    run = folder / TASK / args.exp_name / str(args.seed)
    for mpc in (True, False):
        flags = ["--evaluate", "--checkpoint", str(run), "--json", str(folder / "r.json"), "--eval-episodes", "4"]
        td.main([*flags, "--mpc" if mpc else "--no-mpc"])
        results["planner" if mpc else "policy"] = json.loads((folder / "r.json").read_text())["mean"]
    return results


@pytest.mark.slow
def test_the_planner_balances_the_pole(returns_of):
    assert returns_of["planner"] >= 30, returns_of


@pytest.mark.slow
def test_the_policy_balances_the_pole_without_planning(returns_of):
    assert returns_of["policy"] >= 20, returns_of


READS = ("__bool__", "__int__", "__float__", "__index__", "__array__", "__iter__", "item", "tolist")


@pytest.fixture
def fetched(monkeypatch):
    """Shapes of the arrays whose numbers were asked for on the host, one after the other."""
    shapes = []
    array = type(jnp.zeros(()))

    def watched(function):
        def read(value, *args, **kwargs):
            shapes.extend(leaf.shape for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array))
            return function(value, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(array, name, watched(getattr(array, name)))
    for module, name in ((np, "asarray"), (np, "array"), (jax, "device_get")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return shapes


@pytest.mark.slow
def test_between_two_decisions_nothing_is_fetched_from_the_device_but_the_action(tmp_path, monkeypatch, fetched):
    at_step = []
    make_envs = tdmpc2_jax.environments.make_envs

    def watched(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        step = envs.step
        if envs.num_envs == 4:  # not those of the evaluation
            envs.step = lambda action: at_step.append(len(fetched)) or step(action)
        return envs

    monkeypatch.setattr(tdmpc2_jax.environments, "make_envs", watched)
    flags = "--num-envs 4 --enc-dim 16 --mlp-dim 16 --latent-dim 16 --num-q 2 --batch-size 16 --iterations 1".split()
    flags += "--num-samples 16 --num-elites 4 --num-pi-trajs 2 --seed-steps 100 --buffer-size 3000".split()
    flags += ["--total-timesteps", "400", "--eval-freq", "10000", "--eval-episodes", "1", "--runs-dir", str(tmp_path)]
    tdmpc2_jax.main(["--task", TASK, *flags])
    learning = at_step[40:80]  # neither evaluated nor logged
    assert set(np.diff(learning).tolist()) == {1}
    assert set(fetched[learning[0] : learning[-1]]) == {(4, 1)}, "the actions of four environments"
