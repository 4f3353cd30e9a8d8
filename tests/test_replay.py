"""The replay: which windows it holds, and how likely each is."""

from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest
from helpers import likelihoods, terminations, write_episodes
from scipy.stats import chisquare

import tdmpc2_jax
import tdmpc_jax

SIZES = {"horizon": 3, "obs_dim": 3, "action_dim": 1, "batch_size": 500}
AGENTS = {
    "windows": (tdmpc2_jax, tdmpc2_jax.Agent(**SIZES, sample="windows")),
    "episodes": (tdmpc2_jax, tdmpc2_jax.Agent(**SIZES, sample="episodes")),
    "first version": (tdmpc_jax, tdmpc_jax.Agent(**SIZES)),
}
ALL = pytest.mark.parametrize("td, agent", AGENTS.values(), ids=AGENTS)


@partial(jax.jit, static_argnums=0)
def draw_by_priority(agent, replay, key):
    return tdmpc_jax.windows(agent, replay, tdmpc_jax.draw(replay.tree, key, agent.batch_size))


DRAW = {tdmpc2_jax: jax.jit(tdmpc2_jax.sample, static_argnums=0), tdmpc_jax: draw_by_priority}


def sample(td, agent, replay, seed):
    """Windows as the script draws them, when all priorities are what they were at the start."""
    return jax.device_get(DRAW[td](agent, replay, jax.random.key(seed)))


@ALL
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_windows_never_cross_a_reset_nor_the_end_of_the_ring(td, agent, seed):
    rng = np.random.default_rng(seed)
    num_envs, capacity = int(rng.integers(1, 5)), int(rng.integers(10, 40))
    steps, ends = int(rng.integers(5, 150)), rng.uniform(0.02, 0.4)
    replay, valid = write_episodes(td, agent, seed, capacity, num_envs, steps, ends)
    if not valid:
        assert int(replay.size) == 0
        return
    batch = sample(td, agent, replay, seed)
    assert {tuple(obs) for obs in np.asarray(batch.obs[0]).tolist()} <= valid
    steps = np.diff(np.asarray(batch.obs), axis=0)
    assert (steps[..., :2] == 0).all(), "a window stays in one environment and one episode"
    assert (steps[..., 2] == 1).all(), "a window's entries follow each other"
    np.testing.assert_array_equal(batch.action[..., 0], batch.obs[1:, :, 2])  # the action that led to the entry
    np.testing.assert_array_equal(batch.reward, batch.obs[1:, :, 2] * 10)
    np.testing.assert_array_equal(batch.terminated, terminations(replay, batch.obs[1:]))


@ALL
@pytest.mark.parametrize(
    "seed, capacity, num_envs, steps, ends", [(1, 25, 3, 90, 0.15), (2, 30, 1, 100, 0.3), (4, 60, 4, 40, 0.1)]
)
def test_windows_are_as_likely_as_they_should_be(td, agent, seed, capacity, num_envs, steps, ends):
    replay, valid = write_episodes(td, agent, seed, capacity, num_envs, steps, ends)
    drawn = Counter()
    for i in range(40):
        batch = sample(td, agent, replay, i)
        drawn.update(map(tuple, np.asarray(batch.obs[0]).tolist()))
    assert drawn.keys() <= valid
    expected = 40 * agent.batch_size * likelihoods(agent, valid)
    assert expected.min() > 5
    assert chisquare([drawn[window] for window in sorted(valid)], expected).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_an_episode_is_in_the_queue_once_with_as_many_windows_as_it_has(seed):
    """Exactly, at every moment: with episodes that end, terminate and are overwritten, in several environments."""
    td, agent = AGENTS["episodes"]
    rng = np.random.default_rng(seed)
    capacity, num_envs, ends = int(rng.integers(8, 30)), int(rng.integers(1, 5)), rng.uniform(0.05, 0.4)
    for steps in range(4, 100, 7):
        replay, valid = write_episodes(td, agent, seed, capacity, num_envs, steps, ends)
        queue = np.asarray(replay.starts)[(int(replay.head) + np.arange(int(replay.size))) % (capacity * num_envs)]
        rows, envs = queue // num_envs, queue % num_envs
        numbers = np.asarray(replay.is_start)[rows, envs]
        whole = np.minimum(numbers, (rows - int(replay.rows)) % capacity + 1)
        episodes = [tuple(x) for x in np.asarray(replay.obs)[rows, envs, :2].tolist()]
        assert dict(zip(episodes, whole.tolist(), strict=True)) == Counter(window[:2] for window in valid)
        assert len(episodes) == len(set(episodes))


@ALL
def test_an_update_never_sees_filler(td, agent):
    """Actions and rewards of resets are filler: NaN there must not reach a batch."""
    replay = td.init_replay(agent, 40, 2)
    rng = np.random.default_rng(0)
    for i in range(100):
        first = rng.random(2) < 0.2 if i else np.ones(2, bool)
        reward = np.where(first, np.nan, 1.0).astype(np.float32)
        step = td.Step(np.ones((2, 3), np.float32), reward[:, None], reward, np.zeros(2, bool), first)
        replay = td.add(agent, replay, step)
    for seed in range(2):
        batch = sample(td, agent, replay, seed)
        assert np.isfinite(batch.action).all() and np.isfinite(batch.reward).all()
