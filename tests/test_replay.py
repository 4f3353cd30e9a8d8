"""The replay: which windows it holds, and how likely each is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

import tdmpc2_jax
import tdmpc_jax

H = 3
SCRIPTS = pytest.mark.parametrize("td", [tdmpc2_jax, tdmpc_jax], ids=lambda td: td.__name__)


def sample(td, replay, key, batch_size):
    """Windows as the script draws them, when all priorities are what they were at the start."""
    if td is tdmpc2_jax:
        return td.sample(replay, key, batch_size, H)
    return td.windows(replay, td.draw(replay.tree, key, batch_size), H, 0.4)


def add(td, replay, *step):
    """Writes one step of all environments."""
    return td.add(replay, H, td.Step(*step))


def write_episodes(td, seed, capacity, num_envs, steps, ends=0.15):
    """A replay after `steps` steps of environments whose episodes end at random; entries name themselves.

    The observation of an entry is (environment, episode, place in the episode); `valid` lists the windows that a
    stranger would call valid, computed from the full history.
    """
    rng = np.random.default_rng(seed)
    replay = td.init_replay(capacity, num_envs, 3, 1)
    first, episode, place = np.ones(num_envs, bool), np.zeros(num_envs), np.zeros(num_envs)
    history = []
    for _ in range(steps):
        obs = np.stack([np.arange(num_envs), episode, place], -1).astype(np.float32)
        done = ~first & (rng.random(num_envs) < ends)
        replay = add(td, replay, obs, obs[:, 2:], obs[:, 2] * 10, done, first)
        history.append((obs, first))
        episode, place, first = episode + done, np.where(done, 0, place + 1), done
        # the step behind an end is the reset: it opens the next episode
    valid = set()
    for start in range(max(0, steps - capacity), steps - H):
        for env in range(num_envs):
            if not any(history[start + k][1][env] for k in range(1, H + 1)):
                valid.add(tuple(history[start][0][env]))
    return replay, valid


@SCRIPTS
@pytest.mark.parametrize("seed", range(8))
def test_windows_never_cross_a_reset_nor_the_end_of_the_ring(td, seed):
    rng = np.random.default_rng(seed)
    num_envs, capacity = int(rng.integers(1, 5)), int(rng.integers(10, 40))
    replay, valid = write_episodes(td, seed, capacity, num_envs, int(rng.integers(5, 150)), ends=rng.uniform(0.02, 0.4))
    assert int(replay.size) == len(valid)
    if not valid:
        return
    batch = sample(td, replay, jax.random.key(seed), 500)
    assert {tuple(obs) for obs in np.asarray(batch.obs[0])} <= valid
    steps = np.diff(np.asarray(batch.obs), axis=0)
    assert (steps[..., :2] == 0).all(), "a window stays in one environment and one episode"
    assert (steps[..., 2] == 1).all(), "a window's entries follow each other"
    np.testing.assert_array_equal(batch.action[..., 0], batch.obs[1:, :, 2])  # the action that led to the entry
    np.testing.assert_array_equal(batch.reward, batch.obs[1:, :, 2] * 10)


@SCRIPTS
def test_all_valid_windows_are_equally_likely(td):
    replay, valid = write_episodes(td, seed=1, capacity=25, num_envs=3, steps=90)
    batch = sample(td, replay, jax.random.key(0), 200 * len(valid))
    names, counts = np.unique(np.asarray(batch.obs[0]), axis=0, return_counts=True)
    assert {tuple(name) for name in names} == valid
    assert chisquare(counts).pvalue > 1e-3


@SCRIPTS
def test_an_update_never_sees_filler(td):
    """Actions and rewards of resets are filler: NaN there must not reach a batch."""
    replay = td.init_replay(40, 2, 3, 1)
    rng = np.random.default_rng(0)
    for i in range(100):
        first = rng.random(2) < 0.2 if i else np.ones(2, bool)
        reward = np.where(first, np.nan, 1.0).astype(np.float32)
        replay = add(td, replay, np.ones((2, 3), np.float32), reward[:, None], reward, np.zeros(2, bool), first)
    batch = sample(td, replay, jax.random.key(0), 1000)
    assert jnp.isfinite(batch.action).all() and jnp.isfinite(batch.reward).all()
