"""Measures of recorded episodes, where these do not move."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from tdmpc2_support.data.recorded import agreement, measures, nmse, spread_out, variety, window_starts


def test_every_tenth_episode_of_a_task_is_held_out():
    lengths, task = np.full(31, 20), np.zeros(31, int)
    assert {*(window_starts(lengths, 4, task)[1] // 20)} == {5, 15, 25}
    assert {*(window_starts(lengths[:2], 4, task[:2])[1] // 20)} == {1}
    assert {*(window_starts(lengths, 4, np.arange(31) % 3)[1] // 20)} == {15, 16, 17}, "of each task every tenth"


def test_a_few_of_many_windows_are_spread_over_all_of_them():
    starts = jnp.arange(1000)
    assert len(spread_out(starts, 10_000)) == 1000
    few = np.asarray(spread_out(starts, 50))
    assert len(few) == 50 and few[0] == 0 and few[-1] == 999 and np.diff(few).max() <= 21


def test_rank_correlation_and_explained_variance_are_the_usual_ones():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50).astype(np.float32)
    guess = (truth + rng.normal(size=50)).astype(np.float32)
    found = agreement(guess, truth)
    assert found["spearman"] == pytest.approx(spearmanr(guess, truth).statistic, abs=1e-5)
    assert found["r2"] == pytest.approx(1 - ((guess - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def test_errors_of_futures_are_in_units_of_the_variance_of_all_of_them():
    futures = np.random.default_rng(0).normal(size=(200, 4, 3)) + np.arange(4)[:, None]
    error = ((futures - futures.mean(0)) ** 2).sum(-1).mean(0)[0]
    variance = ((futures - futures.mean((0, 1))) ** 2).sum(-1).mean(0)[0]
    assert nmse(np.broadcast_to(futures.mean(0), futures.shape), futures)[0] == pytest.approx(error / variance)


def test_action_sequences_have_a_spread_and_a_correlation_in_time():
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(2000, 6, 2))
    assert variety(steps * 0.5)["std"] == pytest.approx(0.5, rel=0.05)
    assert variety(np.cumsum(steps, 1))["correlation"] > 0.4 > 0.1 > abs(variety(steps)["correlation"])


def test_measures_of_a_tasks_actions_are_of_those_that_it_has():
    actions = np.random.default_rng(0).normal(size=(50, 4, 2))
    padded = np.concatenate([actions, np.zeros((50, 4, 3))], axis=-1)
    of = {"futures": {}, "advantages": {"true": np.zeros(50)}, "actions": {"recorded": actions}}
    assert measures(of | {"actions": {"recorded": padded}}, 2) == measures(of)
    assert measures(of | {"actions": {"recorded": padded}}) != measures(of)


def test_measures_of_what_never_changes_are_finite_numbers():
    constant = np.ones((20, 4, 3))
    answers = {
        "futures": {1: {"true": constant, "exact": constant, "off": constant + 1}},
        "advantages": {"true": np.zeros(20), "exact": np.zeros(20)},
        "actions": {"recorded": constant},
    }
    found = measures(answers)
    assert found["nmse"][1]["exact"] == [0, 0, 0, 0]
    assert min(found["nmse"][1]["off"]) > 1e6, "no error is small beside no variance"
    assert found["actions"]["recorded"] == {"std": 0, "correlation": 0}
    json.dumps(found, allow_nan=False)
