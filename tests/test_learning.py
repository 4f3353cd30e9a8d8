"""A small agent in four environments that terminate learns to balance a pole; not with a broken update or planner."""

import json

import numpy as np
import pytest
from conftest import said
from jax._src.array import ArrayImpl

import tdmpc2_jax
import tdmpc2_jax as td
import tdmpc_jax

TASK = "InvertedPendulum-v5"  # MuJoCo; 1 per step until the pole falls, after 5 steps for a random agent
OWN = {tdmpc2_jax: {"num_q": 2}, tdmpc_jax: {"horizon": 3, "schedule_steps": 500}}  # what one of the scripts has only


@pytest.fixture(scope="module", params=OWN, ids=lambda td: td.__name__)
def returns_of(request, tmp_path_factory):
    """Mean returns after 2500 steps of training: with planning, and of the policy alone."""
    folder, td = tmp_path_factory.mktemp("learning"), request.param
    small = {"enc_dim": 32, "mlp_dim": 64, "latent_dim": 32, "batch_size": 64, "iterations": 3} | OWN[td]
    small |= {"num_samples": 64, "num_elites": 16, "num_pi_trajs": 8, "seed_steps": 500, "buffer_size": 10_000}
    args = td.Args(
        task=TASK, runs_dir=str(folder), num_envs=4, total_timesteps=2500, eval_freq=10_000, eval_episodes=4, **small
    )
    td.main(said(args))
    results = {}
    for mpc in (True, False):
        run = folder / TASK / args.exp_name / str(args.seed)
        how = td.Args(evaluate=True, checkpoint=str(run), mpc=mpc, json=str(folder / "r.json"), eval_episodes=4)
        td.main(said(how))
        results["planner" if mpc else "policy"] = json.loads((folder / "r.json").read_text())["mean"]
    return results


def test_the_planner_balances_the_pole(returns_of):
    assert returns_of["planner"] >= 30, returns_of


def test_the_policy_balances_the_pole_without_planning(returns_of):
    assert returns_of["policy"] >= 20, returns_of


def test_between_two_decisions_nothing_is_fetched_from_the_device_but_the_action(tmp_path, monkeypatch):
    fetched, at_step, value, asarray = [], [], ArrayImpl._value.fget, np.asarray

    def fetch(array, *args, **kwargs):
        fetched.extend([array.shape] if isinstance(array, ArrayImpl) else [])
        return asarray(array, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", fetch)  # reads an array's memory; all else (int, bool, device_get) takes _value
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda array: fetched.append(array.shape) or value(array)))
    make_envs = td.environments.make_envs

    def watched(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        step = envs.step
        envs.step = lambda action: at_step.append(len(fetched)) or step(action)
        return envs

    monkeypatch.setattr(td.environments, "make_envs", watched)
    flags = "--num-envs 4 --enc-dim 16 --mlp-dim 16 --latent-dim 16 --num-q 2 --batch-size 16 --iterations 1".split()
    flags += "--num-samples 16 --num-elites 4 --num-pi-trajs 2 --seed-steps 100 --buffer-size 3000".split()
    flags += ["--total-timesteps", "400", "--eval-freq", "10000", "--eval-episodes", "1", "--runs-dir", str(tmp_path)]
    td.main(["--task", TASK, *flags])
    learning = slice(40, 80)  # decisions of a row that are neither evaluated nor logged
    assert np.diff(at_step[len(at_step) // 3 :])[learning].tolist() == [1] * 40
    assert fetched[at_step[len(at_step) // 3 :][50] - 1] == (4, 1), "the actions of four environments"
