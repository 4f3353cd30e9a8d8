"""Environments in JAX: the protocol, episodes of many side by side, and the same seen from outside."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from tdmpc2_support.envs.jax_env import open_jax
from tdmpc2_support.errors import UserError


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def played(env, n, steps, seed=0, action=0.7):
    """Episodes [n] after each of some steps, all with the same action."""
    begin = jax.jit(lambda key: env.begin_all(key, n))
    step = jax.jit(env.decide_or_begin)
    episodes = begin(jax.random.key(seed))
    trace = [episodes]
    for i in range(steps):
        episodes = step(episodes, jnp.full((n, env.action_size), action), jax.random.fold_in(jax.random.key(seed), i))
        trace.append(episodes)
    return jax.tree.map(lambda *x: np.stack(x), *[e._replace(state=()) for e in trace])


def test_every_episode_begins_in_another_state_and_in_the_step_after_an_end():
    trace = played(open_jax("jax_toys:falling"), 4, 100)
    over = trace.terminated | trace.truncated
    firsts = trace.obs[trace.decisions == 0]
    assert len(firsts) == 4 + over[:-1].sum() > 12
    assert len(np.unique(firsts, axis=0)) == len(firsts)
    assert (trace.decisions[1:][over[:-1]] == 0).all() and (trace.reward[trace.decisions == 0] == 0).all()


def test_a_time_limit_truncates_and_the_environments_own_end_terminates():
    trace = played(open_jax("jax_toys:falling"), 8, 100, action=0.1)
    assert trace.terminated.any() and trace.truncated.any()
    assert not (trace.terminated & trace.truncated).any()
    assert (np.abs(trace.obs[trace.terminated, 0]) > 1).all()
    assert (trace.decisions[trace.truncated] == 40).all()


def test_an_action_is_repeated_until_the_episode_ends_at_most():
    env = open_jax("jax_toys:repeated")
    assert (env.spec.action_repeat, env.spec.episode_length, env.spec.simulator_steps) == (4, 10, 40)
    trace = played(env, 8, 60)
    held = trace.decisions > 0
    assert (trace.reward[held] <= 4).all() and (trace.reward[held] > 3).any()
    assert trace.terminated.any()
    assert (np.abs(trace.obs[trace.terminated, 0]) > 1).all(), "the state of the end, not one beyond it"
    ended = trace.terminated | trace.truncated
    assert np.allclose(trace.total[ended].sum(), trace.reward[: np.flatnonzero(ended.any(1))[-1] + 1].sum(), rtol=0.2)


@pytest.mark.parametrize("task", ["jax_toys:falling", "jax_toys:repeated"])
def test_from_outside_it_is_the_same_environment(task):
    """Same first state, same actions: same rewards, observations and ends."""
    env = open_jax(task)
    outside = envs.make_env(task, seed=3)
    obs, _ = outside.reset()
    state = outside.unwrapped.state
    no = jnp.zeros((), bool)
    episode = env.begin(jax.random.key(0))._replace(state=state, obs=jnp.asarray(obs), terminated=no)
    decide = jax.jit(env.decide)
    rng = np.random.default_rng(0)
    over = False
    while not over:
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        episode = decide(episode, action)
        obs, reward, terminated, truncated, info = outside.step(action)
        np.testing.assert_allclose(episode.obs, obs, atol=1e-6)
        np.testing.assert_allclose(episode.reward, reward, rtol=1e-6)
        assert (bool(episode.terminated), bool(episode.truncated)) == (terminated, truncated)
        assert info["success"] == episode.success
        over = terminated or truncated


def test_its_facts_are_those_of_its_function_and_no_process_is_started_for_it():
    spec = envs.task_spec("jax_toys:falling")
    assert (spec.domain, spec.episode_length, spec.can_terminate) == ("JAX", 40, True)
    assert envs.default_workers("jax_toys:falling", 64, cores=16) == 0
    assert open_jax("jax_toys:falling") is open_jax("jax_toys:falling"), "compiled once"


def test_a_module_in_the_current_folder_is_found_and_its_faults_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "toy_of_mine.py").write_text("import jax_toys\n\n\ndef make():\n    return jax_toys.point()\n")
    assert open_jax("toy_of_mine:make").spec.domain == "JAX"
    for name, text in (("toy_that_fails", "1 / 0"), ("toy_of_no_python", "def")):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(UserError, match=f"task '{name}:make' cannot be imported"):
            open_jax(f"{name}:make")


def test_a_missing_package_is_one_sentence(monkeypatch):
    for package, domain in (("mujoco_playground", "playground"), ("gymnax", "gymnax")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(UserError, match=rf"cannot be imported .*pip install -e '.\[{domain}\]'"):
            envs.task_spec(f"{domain}/NotYetOpened")


@needs("gymnax")
def test_gymnax_pendulum_is_gymnasiums():
    outside = envs.make_env("gymnax/Pendulum-v1", seed=1)
    spec = envs.task_spec("gymnax/Pendulum-v1")
    assert (spec.episode_length, spec.can_terminate) == (200, False)
    obs, _ = outside.reset()
    same = envs.make_env("Pendulum-v1", seed=1)
    same.reset()
    same.unwrapped.state = np.array([np.arctan2(obs[1], obs[0]), obs[2]], np.float64)
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 1)).astype(np.float32):
        one, reward, *_ = outside.step(action)
        two, other, *_ = same.step(action)
        np.testing.assert_allclose(one, two, atol=1e-3)
        np.testing.assert_allclose(reward, other, atol=1e-2)


@needs("gymnax")
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("gymnax/Pendulum-v0", "did you mean 'gymnax/Pendulum-v1'"),
        ("gymnax/CartPole-v1", "Discrete actions"),
    ],
)
def test_tasks_of_gymnax_that_cannot_be_are_one_sentence(task, words):
    with pytest.raises(UserError, match=words):
        envs.task_spec(task)


@needs("mujoco_playground")
def test_playgrounds_cartpole_is_dm_controls():
    """Rewards and observations of one decision from the same state: two steps of the simulator."""
    spec = envs.task_spec("playground/CartpoleSwingup")
    assert (spec.action_repeat, spec.episode_length, spec.can_terminate) == (2, 500, False)
    env = envs.make_env("playground/CartpoleSwingup", seed=1)
    same = envs.make_env("cartpole-swingup", seed=1)
    env.reset()
    same.reset()
    physics = same.unwrapped.physics
    physics.data.qpos[:] = env.unwrapped.state.data.qpos
    physics.data.qvel[:] = env.unwrapped.state.data.qvel
    physics.forward()
    for _ in range(3):
        obs, reward, *_ = env.step(np.ones(1, np.float32))
        other, its_reward, *_ = same.step(np.ones(1, np.float32))
        np.testing.assert_allclose(np.sort(obs), np.sort(other), atol=5e-3)  # another integrator
        np.testing.assert_allclose(reward, its_reward, atol=1e-3)


@needs("mujoco_playground")
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("playground/WalkerWlak", "did you mean 'playground/WalkerWalk'"),
        ("playground/Go1JoystickFlatTerrain", "models of robots, which could not be fetched"),
    ],
)
def test_tasks_of_playground_that_cannot_be_are_one_sentence(task, words, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # without git: as offline
    with pytest.raises(UserError, match=words):
        open_jax(task)
