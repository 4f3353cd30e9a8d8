"""A small agent in four environments that terminate learns to balance a pole; not with a broken update or planner."""

import json

import pytest
from conftest import said

import tdmpc2_jax as td

TASK = "InvertedPendulum-v5"  # MuJoCo; 1 per step until the pole falls, after 5 steps for a random agent


@pytest.fixture(scope="module")
def returns_of(tmp_path_factory):
    """Mean returns after 1600 steps of training: with planning, and of the policy alone."""
    folder = tmp_path_factory.mktemp("learning")
    small = {"enc_dim": 32, "mlp_dim": 64, "latent_dim": 32, "num_q": 2, "batch_size": 64, "iterations": 3}
    small |= {"num_samples": 64, "num_elites": 16, "num_pi_trajs": 8, "seed_steps": 500, "buffer_size": 10_000}
    args = td.Args(
        task=TASK, runs_dir=str(folder), num_envs=4, total_timesteps=1600, eval_freq=10_000, eval_episodes=4, **small
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
