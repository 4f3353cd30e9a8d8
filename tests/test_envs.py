"""Environments: the original's tasks, one contract for all of them, and worker processes that never hang."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import envs
from tdmpc2_support.envs import dmcontrol, rendering
from tdmpc2_support.envs.soup import FACTS
from tdmpc2_support.envs.vector import env_seeds
from tdmpc2_support.run.folder import Signals

ROOT = Path(envs.__file__).parent
DMCONTROL = [name for name, row in envs.TASKS.items() if row.domain == "DMControl"]


def installed(task):
    return importlib.util.find_spec(envs.DOMAINS[envs.TASKS[task].domain].package.split(".")[0]) is not None


def absent(task, *values):
    """A parameter for machines that lack the task's simulator."""
    return pytest.param(task, *values, marks=pytest.mark.skipif(installed(task), reason="its simulator is installed"))


def run_python(code, timeout=60, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def alive(pid):
    """Whether a process runs still (a zombie counts as one that was left behind)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Environments of no known package, for the faults that a simulator does not have on demand.


class Counter(gym.Env):
    """Observes [step, seed, last action]; ends after `last` steps."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, last=10**9, fail_at=None, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = gym.spaces.Box(0.0, 10.0, (1,), np.float32)
        self.last, self.fail_at, self.render_mode, self.seed = last, fail_at, render_mode, -1

    def reset(self, *, seed=None, options=None):
        self.count, self.seed = 0, self.seed if seed is None else seed
        return np.array([0.0, self.seed, 0.0]), {}

    def step(self, action):
        self.count += 1
        if self.count == self.fail_at:
            raise ValueError("the simulation exploded")
        return np.array([self.count, self.seed, action[0]]), 1.0, self.count >= self.last, False, {"success": True}

    def render(self):
        return np.full((4, 4, 3), self.count, np.uint8)


class Strict(gym.Env):
    """Takes no render_mode, asserts that actions fit its space to the dtype, and tells more with every step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-2.0, 3.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.told = []
        return np.zeros(1), {"told": np.array(self.told)}

    def step(self, action):
        assert self.action_space.contains(action)
        self.told.append(self.np_random.random())
        return np.zeros(1), 0.0, False, False, {"told": np.array(self.told[: self.np_random.integers(9)])}


class Unspeakable(Exception):
    """Cannot be sent to another process."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


class Broken(Counter):
    """Where it is pushed to the right, its reward is no number, or it raises an exception of this class."""

    def __init__(self, raises=None, render_mode=None):
        super().__init__()
        self.raises = raises

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if action[0] < 5.0:
            return obs, reward, *rest
        if self.raises:
            raise self.raises("what happened here")
        return obs, float("nan"), *rest


class Third(Counter):
    """Every third one cannot be made."""

    made = closed = 0

    def __init__(self, render_mode=None):
        super().__init__()
        Third.made += 1
        if Third.made % 3 == 0:
            raise ValueError("the third one")

    def close(self):
        Third.closed += 1


class Odd(Counter):
    """A Counter with one unusable space."""

    def __init__(self, render_mode=None, **spaces):
        super().__init__()
        for name, space in spaces.items():
            setattr(self, name, space)


def register(name, limit=5, entry=Counter, **kwargs):
    gym.register(name, entry_point=entry, max_episode_steps=limit, kwargs=kwargs)


register("Counter-v0")
register("Ends-v0", last=3)
register("Fails-v0", limit=100, fail_at=50)
register("NoLimit-v0", limit=None)
register("Strict-v0", entry=Strict)
register("NoNumber-v0", entry=Broken)
register("Unspeakable-v0", entry=Broken, raises=Unspeakable)
register("Third-v0", entry=Third)
box = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
register("DictObs-v0", entry=Odd, observation_space=gym.spaces.Dict(a=box, b=box))
register("ImageObs-v0", entry=Odd, observation_space=gym.spaces.Box(0, 255, (64, 64, 3), np.uint8))
register("DiscreteActions-v0", entry=Odd, action_space=gym.spaces.Discrete(3))
register("DictActions-v0", entry=Odd, action_space=gym.spaces.Dict(a=box))
register("UnboundedActions-v0", entry=Odd, action_space=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32))


# --- the original's tasks ---------------------------------------------------------------------------------------------


def set_start(physics, recording, task):
    """Puts a recorded start state in place. Dog's muscles are no part of it, but of its observation."""
    for field in ("geom_pos", "geom_size", "site_pos"):
        getattr(physics.model, field)[:] = recording[f"{task}/{field}"]
    physics.data.qpos[:] = recording[f"{task}/qpos"]
    physics.data.qvel[:] = recording[f"{task}/qvel"]
    if physics.model.nmocap:
        physics.data.mocap_pos[:] = recording[f"{task}/mocap_pos"]
    if task.startswith("dog"):
        muscles = recording[f"{task}/obs"][0, -physics.model.na :]
        if np.abs(physics.data.act - muscles).max() > 1e-6:  # else keep the seed's: the observation is rounded
            physics.data.act[:] = muscles
    physics.after_reset()


@pytest.mark.golden
@pytest.mark.parametrize("task", DMCONTROL)
def test_rollouts_equal_the_originals(golden, task):
    recording = golden("dmcontrol_rollouts.npz")
    env = envs.make_env(task, seed=3)
    env.reset()
    set_start(env.unwrapped.physics, recording, task)
    observations, rewards = [], []
    for action in recording[f"{task}/actions"]:
        obs, reward, terminated, truncated, _ = env.step(action)
        observations.append(obs)
        rewards.append(reward)
        assert not terminated and not truncated
    expected = recording[f"{task}/obs"][1:]
    error = np.abs(np.array(observations) - expected) / np.maximum(np.abs(expected), 1.0)
    assert error.max() <= (0.05 if task.startswith("dog") else 1e-4)
    expected = recording[f"{task}/rewards"]
    assert (np.abs(np.array(rewards) - expected) <= 1e-4 * np.maximum(np.abs(expected), 1e-3)).all()


def test_task_sets_are_the_originals():
    assert [len(envs.TASK_SETS[name]) for name in ("mt30", "mt80")] == [30, 80]
    assert envs.TASK_SETS["mt30"][:2] == ("walker-stand", "walker-walk")
    assert envs.TASK_SETS["mt30"][29] == "pendulum-spin"
    assert envs.TASK_SETS["mt80"][:30] == envs.TASK_SETS["mt30"]
    assert envs.TASK_SETS["mt80"][30] == "mw-assembly" and envs.TASK_SETS["mt80"][79] == "mw-hand-insert"
    assert all(task in envs.TASKS for task in envs.TASK_SETS["mt80"])
    assert len(set(envs.TASK_SETS["mt80"])) == 80
    assert max(envs.TASKS[task].obs_size for task in envs.TASK_SETS["mt30"]) == 24
    assert len(DMCONTROL) == 39 and len(envs.TASKS) == 144


def test_cup_spin_starts_mostly_in_the_cup():
    env = envs.make_env("cup-spin", seed=0)
    task, physics, inside = env.unwrapped.dm_env.task, env.unwrapped.physics, 0
    for _ in range(100):
        env.reset()
        inside += physics.in_target()
        assert task.get_reward(physics) == 0 or not physics.in_target()
    assert 80 <= inside < 100


@pytest.mark.parametrize(
    ("own", "stock"),
    [
        ("walker-run-backwards", "walker-run"),
        ("hopper-hop-backwards", "hopper-hop"),
        ("pendulum-spin", "pendulum-swingup"),
        ("cheetah-jump", "cheetah-run"),
        ("cup-spin", "cup-catch"),
    ],
)
def test_own_tasks_observe_what_the_stock_task_of_their_domain_does(own, stock):
    first, second = envs.make_env(own, seed=0).unwrapped, envs.make_env(stock, seed=1).unwrapped
    first.reset(seed=0)
    second.reset(seed=1)
    state = first.physics.get_state()
    for env in (first, second):
        with env.physics.reset_context():
            env.physics.set_state(state)
    observations = [env.dm_env.task.get_observation(env.physics) for env in (first, second)]
    assert list(observations[0]) == list(observations[1])
    np.testing.assert_array_equal(*map(dmcontrol.flatten, observations))


# --- one contract for all ---------------------------------------------------------------------------------------------


GYMNASIUM = ["HalfCheetah-v5", "Hopper-v5", "Pendulum-v1", "Counter-v0"]
SAMPLE = ["cartpole-swingup", "dog-run", "cup-spin", "reacher-three-hard", "mw-reach", "mw-assembly", "mw-bin-picking"]
SAMPLE += [
    "mujoco-ant",
    "mujoco-reacher",
    "lunarlander-land",
    "atari-ms-pacman",
    "myo-reach",
    "myo-key-turn-hard",
    "lift-cube",
    "pick-cube",
    "stack-cube",
    "pick-ycb",
    "turn-faucet",
]


@pytest.mark.parametrize("task", [*SAMPLE, *GYMNASIUM])
def test_a_task_keeps_the_contract(task):
    check_contract(task)


@pytest.mark.all_tasks
@pytest.mark.parametrize("task", [*envs.TASKS, *GYMNASIUM])
def test_every_task_keeps_the_contract(task):
    check_contract(task)


def check_contract(task):
    if task in envs.TASKS and not installed(task):
        pytest.skip("its simulator is not installed")
    try:
        env, spec = envs.make_env(task, seed=1), envs.task_spec(task)
    except envs.UserError as error:
        if "download_asset" not in str(error) and "Vulkan" not in str(error):
            raise
        pytest.skip(str(error))
    obs, info = env.reset()
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    if task in envs.TASKS:
        domain, obs_size, action_size, _ = envs.TASKS[task]
        assert env.observation_space.shape == (obs_size or env.observation_space.shape[0],)
        assert env.action_space.shape == (action_size,)
        facts = {"DMControl": (2, 500), "Meta-World": (2, 100), "MyoSuite": (1, 100), "ManiSkill": (2, 100)}.get(domain)
        if task in FACTS:
            facts = FACTS[task].action_repeat, FACTS[task].episode_length
        success = domain in ("Meta-World", "MyoSuite", "ManiSkill", "RoboDesk")
        assert spec == envs.TaskSpec(task, domain, *facts, False, success, facts[0] * facts[1])
    assert info["success"] == 0.0
    env.action_space.seed(0)
    for _ in range(3):
        assert obs in env.observation_space and obs.dtype == np.float32 and np.isfinite(obs).all()
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert type(reward) is float and np.isfinite(reward)
        assert type(terminated) is bool and type(truncated) is bool
        assert type(info["success"]) is float
    if spec.episode_length <= 100:
        ends = [env.step(env.action_space.sample())[2:4] for _ in range(spec.episode_length - 3)]
        assert spec.can_terminate or ends == [(False, False)] * (len(ends) - 1) + [(False, True)]
    env.close()


@pytest.mark.parametrize(("task", "asset"), [("pick-ycb", "ycb"), ("turn-faucet", "partnet_mobility_faucet")])
def test_a_task_without_its_files_names_the_download_and_never_asks(monkeypatch, task, asset):
    if not installed(task):
        pytest.skip("ManiSkill is not installed")
    from mani_skill.utils import assets

    monkeypatch.setattr(assets, "is_data_source_downloaded", lambda _: False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(envs.UserError, match=f"python -m mani_skill.utils.download_asset -y {asset}$"):
        envs.make_env(task)


@pytest.mark.parametrize(
    ("task", "decisions"), [("pendulum-swingup", 500), ("cheetah-run", 500), ("mw-reach", 100), ("Counter-v0", 5)]
)
def test_the_time_limit_truncates_and_does_not_terminate(task, decisions):
    env = envs.make_env(task)
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(env.action_space.shape, np.float32))[2:4] for _ in range(decisions)]
        assert ends == [(False, False)] * (decisions - 1) + [(False, True)]
    assert envs.task_spec(task).episode_length == decisions


def test_only_a_real_end_terminates():
    env = envs.make_env("Ends-v0")
    env.reset()
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (True, False)]


def test_dmcontrol_holds_an_action_for_two_simulator_steps_and_sums_their_rewards():
    from dm_control import suite

    env, stock = envs.make_env("walker-walk", seed=4), suite.load("walker", "walk", task_kwargs={"random": 4})
    np.testing.assert_array_equal(env.reset()[0], flat(stock.reset()))
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 6)):
        obs, reward, *_ = env.step(action)
        timesteps = [stock.step(action), stock.step(action)]
        assert reward == pytest.approx(sum(timestep.reward for timestep in timesteps), rel=1e-12)
        np.testing.assert_array_equal(obs, flat(timesteps[1]))


def flat(timestep):
    return np.concatenate([np.ravel(value) for value in timestep.observation.values()]).astype(np.float32)


@pytest.mark.parametrize(
    ("task", "repeat", "decisions"),
    [("pendulum-swingup", 8, 125), ("pendulum-swingup", 3, 334), ("mw-reach", 7, 29), ("Counter-v0", 2, 3)],
)
def test_an_episode_has_its_simulator_steps_whatever_the_action_repeat(task, repeat, decisions):
    spec, usual = envs.task_spec(task, repeat), envs.task_spec(task)
    assert (spec.action_repeat, spec.episode_length) == (repeat, decisions)
    assert spec.simulator_steps == usual.simulator_steps == usual.action_repeat * usual.episode_length
    env = envs.make_env(task, action_repeat=repeat)
    for _ in range(2):
        env.reset()
        start = env.unwrapped.physics.time() if "swingup" in task else 0.0
        ends = [env.step(np.zeros(env.action_space.shape, np.float32))[2:4] for _ in range(decisions)]
        assert ends == [(False, False)] * (decisions - 1) + [(False, True)]
        if "swingup" in task:
            assert env.unwrapped.physics.time() - start == pytest.approx(1000 * env.unwrapped.physics.timestep())
    if task == "Counter-v0":
        assert env.unwrapped.count == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_action_repeat_sums_that_many_rewards_in_every_environment(num_workers):
    vector = envs.make_envs("Counter-v0", 2, num_workers=num_workers, action_repeat=4)
    vector.reset()
    obs, reward, *_ = vector.step(np.zeros((2, 1)))
    assert obs[:, 0].tolist() == [4, 4] and reward.tolist() == [4, 4]
    obs, reward, _, truncated, _ = vector.step(np.zeros((2, 1)))
    assert obs[:, 0].tolist() == [5, 5] and reward.tolist() == [1, 1] and truncated.all()
    vector.close()
    same = [envs.make_env("walker-walk", seed=3, action_repeat=repeat) for repeat in (4, 2)]
    for env in same:
        env.reset()
    action = np.full(6, 0.3, np.float32)
    four, (_, first, *_), two = same[0].step(action), same[1].step(action), same[1].step(action)
    np.testing.assert_array_equal(four[0], two[0])
    assert four[1] == pytest.approx(first + two[1])


@pytest.mark.parametrize("repeat", [0, -2, 1.5])
def test_an_action_repeat_that_makes_no_sense_is_one_sentence(repeat):
    for ask in (envs.task_spec, lambda task, n: envs.make_envs(task, 2, action_repeat=n)):
        with pytest.raises(envs.UserError, match=f"must be a whole number from 1 on, not {repeat}"):
            ask("walker-walk", repeat)


def test_actions_are_scaled_from_minus_one_to_one_to_the_tasks_own_range():
    env = envs.make_env("Counter-v0")
    env.reset()
    assert [env.step(np.array([a], np.float32))[0][2] for a in (-1.0, 0.0, 0.5, 1.0)] == [0.0, 5.0, 7.5, 10.0]


SEEDED = ["reacher-three-easy", "cup-spin", "dog-run", "Hopper-v5", "mw-reach", "mw-assembly", "mw-stick-push"]
SEEDED += ["myo-reach-hard", "myo-pose-hard", "myo-obj-hold-hard", "myo-key-turn-hard", "myo-pen-twirl-hard"]
SEEDED += ["lift-cube", "pick-cube", "stack-cube"]


@pytest.mark.parametrize("task", SEEDED)
def test_a_seed_decides_everything_whatever_else_uses_numpys_global_generator(task):
    if task in envs.TASKS and not installed(task):
        pytest.skip("its simulator is not installed")

    def rollout(seed, noise):
        np.random.seed(noise)
        env = envs.make_env(task, seed=seed)
        observations = [env.reset()[0]]
        for _ in range(3):
            np.random.rand()
            observations.append(env.step(np.full(env.action_space.shape, 0.5, np.float32))[0])
        return np.array([*observations, env.reset()[0], env.reset(seed=seed)[0]])

    first = rollout(7, noise=0)
    np.testing.assert_array_equal(first, rollout(7, noise=1))
    assert not np.array_equal(first, rollout(8, noise=0))
    np.testing.assert_array_equal(first[0], first[-1])  # reset(seed=…) begins the stream again
    assert not np.array_equal(first[0], first[-2])  # reset() goes on with it


@pytest.mark.parametrize("task", [task for task in envs.TASKS if task.startswith("mw-")])
def test_every_reset_of_meta_world_draws_anew(task):
    env = envs.make_env(task, seed=1)
    starts = np.array([env.reset()[0] for _ in range(3)])
    assert (np.ptp(starts, axis=0).max() > 0.01) and not np.array_equal(starts[0], starts[1])
    fixed = {"mw-hammer", "mw-sweep-into", "mw-bin-picking"}  # the goal is a part of the scene; the object moves
    assert (np.ptp(starts[:, 36:], axis=0).max() > 0.01) != (task in fixed)
    env.close()


def test_meta_world_starts_with_a_zero_action_and_repeats_each_action():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    env, stock = envs.make_env("mw-reach", seed=4), ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["reach-v3-goal-observable"]()
    stock.seeded_rand_vec, stock._freeze_rand_vec = True, False
    stock.seed(4)
    stock.reset()
    expected = stock.step(np.zeros(4))[0]
    np.testing.assert_array_equal(env.reset()[0], expected.astype(np.float32))
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32):
        obs, reward, _, _, info = env.step(action)
        first, second = stock.step(action), stock.step(action)
        np.testing.assert_array_equal(obs, second[0].astype(np.float32))
        assert reward == pytest.approx(first[1] + second[1]) and info["success"] == second[4]["success"]


@pytest.mark.parametrize("task", ["cup-spin", "mw-reach"])
def test_numpys_global_generator_is_left_alone(task):
    np.random.seed(5)
    env = envs.make_env(task, seed=1)
    env.reset()
    env.step(env.action_space.sample())
    drawn = np.random.rand()
    np.random.seed(5)
    assert drawn == np.random.rand()


def test_unwrapped_reaches_the_simulator():
    env = envs.make_env("walker-walk")
    env.reset()
    assert env.unwrapped.physics.torso_height() > 0 and env.unwrapped.dm_env.physics is env.unwrapped.physics


@pytest.mark.parametrize(
    "name", ["cup-catch", "cup_catch", "ball_in_cup-catch", "ball-in-cup_catch", "dm_control/ball_in_cup-catch-v0"]
)
def test_a_task_has_many_spellings_and_one_name(name):
    assert envs.task_spec(name).name == "cup-catch"


@pytest.mark.parametrize(
    ("package_id", "name"),
    [
        ("myoHandReachFixed-v0", "myo-reach"),
        ("myoHandKeyTurnRandom-v0", "myo-key-turn-hard"),
        ("PickCube-v1", "pick-cube"),
        ("PickSingleYCB-v1", "pick-ycb"),
        ("myosuite:myoHandPoseFixed-v0", "myo-pose"),
        ("door-open-v3", "mw-door-open"),
        ("mw_door_open", "mw-door-open"),
    ],
)
def test_the_packages_own_ids_are_names_too(package_id, name):
    assert envs.task_spec(package_id).name == name


@pytest.mark.parametrize(
    ("task", "decisions", "may_end", "sizes"),
    [
        ("dm_control/fish-upright-v0", 500, False, (21, 5)),
        ("dm_control/reach_site_features-v0", 125, True, (45, 9)),
    ],
)
def test_dm_control_ids_beyond_the_table_work(task, decisions, may_end, sizes):
    env, spec = envs.make_env(task, seed=3), envs.task_spec(task)
    assert (spec.action_repeat, spec.episode_length, spec.can_terminate) == (2, decisions, may_end)
    obs, _ = env.reset()
    assert obs.shape == sizes[:1] and obs.dtype == np.float32
    assert obs in env.observation_space
    np.testing.assert_array_equal(obs, envs.make_env(task, seed=3).reset()[0])
    ends = [env.step(np.zeros(sizes[1], np.float32))[2:4] for _ in range(decisions)]
    assert ends == [(False, False)] * (decisions - 1) + [(False, True)]


@pytest.mark.parametrize(("task", "may_end"), [("HalfCheetah-v5", False), ("Hopper-v5", True), ("Pendulum-v1", False)])
def test_gymnasium_tasks_may_terminate_unless_known_not_to(task, may_end):
    spec = envs.task_spec(task)
    assert spec.can_terminate == may_end and spec.action_repeat == 1


def test_a_task_of_ones_own_may_terminate_whatever_its_name():
    gym.register("mine/Pendulum-v7", entry_point=Counter, max_episode_steps=10)
    assert envs.task_spec("mine/Pendulum-v7").can_terminate


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("dog-rum", "unknown task 'dog-rum'; did you mean 'dog-run'.*python envs.py lists all tasks"),
        ("Walker_Wolk", "did you mean 'walker-walk'"),
        ("HalfCheeta-v5", "did you mean 'HalfCheetah-v5'"),
        ("dm_control/dog-rum-v0", "unknown task"),
        ("nowhere/Nothing-v0", "unknown task 'nowhere/Nothing-v0'; .*python envs.py"),
        ("no_module:Thing-v0", "cannot be imported: No module named 'no_module'"),
        ("mt30", "that is a set of tasks, for tdmpc2_jax_mt.py --tasks mt30"),
        ("reach-v2", "did you mean 'mw-reach'"),
        ("FetchReach-v4", "gymnasium_robotics:FetchReach-v4"),
        (".module:Thing-v0", "cannot be imported"),
        ("dm_control/walker-walk-v9", "unknown task"),
        ("dm_control/mw-reach-v0", "unknown task"),
        ("walker-walk-v3", "unknown task"),
        ("", "unknown task ''"),
        ("CartPole-v1", "has actions Discrete"),
        ("DiscreteActions-v0", "has actions Discrete"),
        ("DictActions-v0", "has actions Dict"),
        ("UnboundedActions-v0", "without finite bounds"),
        ("ImageObs-v0", "has pictures as observations"),
        ("NoLimit-v0", "has no time limit: register it with max_episode_steps"),
        absent("myo-reach", "MyoSuite cannot be imported .*: pip install -e '.\\[myosuite\\]'"),
        absent("pick-cube", "ManiSkill cannot be imported .*: pip install -e '.\\[maniskill\\]'"),
    ],
)
@pytest.mark.parametrize("num_workers", [None, 1])
def test_a_task_that_cannot_be_used_is_one_sentence(task, sentence, num_workers):
    with pytest.raises(envs.UserError, match=sentence) as error:
        envs.make_env(task) if num_workers is None else envs.make_envs(task, 1, num_workers=num_workers)
    assert "\n" not in str(error.value)


def test_other_wrong_arguments_are_one_sentence():
    for make, sentence in [
        (lambda: envs.make_envs("walker-walk", 0), "at least 1, not 0"),
        (lambda: envs.make_env("walker-walk", obs="depth"), "'state' or 'rgb', not 'depth'"),
        (lambda: envs.make_env("Pendulum-v1", obs="rgb"), "has no pictures of 64 x 64 as observations"),
        (lambda: envs.make_env("walker-walk", render_mode="human"), "not 'human'"),
    ]:
        with pytest.raises(envs.UserError, match=sentence):
            make()


# --- many environments ------------------------------------------------------------------------------------------------


def vector_rollout(task, num_workers, steps, num_envs=3, seed=10):
    vector = envs.make_envs(task, num_envs, seed=seed, num_workers=num_workers)
    rng = np.random.default_rng(0)
    obs, infos = vector.reset()
    results = [(obs, infos["success"])]
    for _ in range(steps):
        actions = rng.uniform(-1, 1, vector.action_space.shape).astype(np.float32)
        obs, reward, terminated, truncated, infos = vector.step(actions)
        results.append((obs, reward, terminated, truncated, infos["success"]))
    reseeded = vector.reset(seed=seed)[0]
    vector.close()
    return results, reseeded


@pytest.mark.parametrize("task", ["Ends-v0", "Counter-v0", "cartpole-swingup", "mw-push"])
def test_the_number_of_workers_changes_nothing(task):
    expected, expected_reset = vector_rollout(task, 0, 8)
    for num_workers in (1, 2):
        results, reset = vector_rollout(task, num_workers, 8)
        np.testing.assert_array_equal(reset, expected_reset)
        for step, expected_step in zip(results, expected, strict=True):
            for value, expected_value in zip(step, expected_step, strict=True):
                np.testing.assert_array_equal(value, expected_value)
                assert value.dtype == expected_value.dtype and value.shape == expected_value.shape


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_step_after_an_end_returns_the_reset_observation_and_ignores_the_action(num_workers):
    results, _ = vector_rollout("Ends-v0", num_workers, 5)
    assert [obs[0, 0] for obs, *_ in results] == [0, 1, 2, 3, 0, 1]
    assert [step[1][0] for step in results[1:]] == [1, 1, 1, 0, 1]
    assert [bool(step[2][0]) for step in results[1:]] == [False, False, True, False, False]
    assert not any(step[3].any() for step in results[1:])
    assert [step[-1][0] for step in results] == [0, 1, 1, 1, 0, 1]  # success
    assert results[4][0][0, 2] == 0  # the action never came through


@pytest.mark.parametrize("num_workers", [0, 2])
def test_environments_need_no_render_mode_and_may_tell_what_they_like(num_workers):
    results, _ = vector_rollout("Strict-v0", num_workers, 5)
    assert len(results) == 6


def counter_seeds(seed, num_envs):
    """What Counters observe of the seeds that they get: those of Gymnasium ids are below 2^31."""
    return np.float32(np.array(env_seeds(seed, num_envs)) % 2**31).tolist()


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_workers_make_the_task_that_this_process_has_registered():
    before = gym.spec("Pendulum-v1")
    gym.register("Pendulum-v1", entry_point=Counter, max_episode_steps=5)
    try:
        vector = envs.make_envs("Pendulum-v1", 2, num_workers=2)
        assert vector.reset(seed=3)[0].tolist() == [[0, seed, 0] for seed in counter_seeds(3, 2)]
        vector.close()
    finally:
        gym.registry["Pendulum-v1"] = before


def test_an_interrupted_step_closes_the_environments_and_leaves_no_stale_answer(monkeypatch):
    vector = envs.make_envs("Counter-v0", 2, num_workers=2)
    vector.reset()
    receive = vector._receive
    monkeypatch.setattr(vector, "_receive", lambda worker: receive(worker) if worker == 0 else interrupt())
    with pytest.raises(KeyboardInterrupt):
        vector.step(np.zeros((2, 1), np.float32))
    with pytest.raises(RuntimeError, match="closed"):
        vector.reset()
    assert wait_for_end([process.pid for process in vector.processes])


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_workers", [0, 2])
def test_actions_of_another_shape_are_refused(num_workers):
    vector = envs.make_envs("Counter-v0", 2, num_workers=num_workers)
    vector.reset()
    with pytest.raises((ValueError, IndexError)):
        vector.step(np.zeros(1, np.float32))
    vector.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_environment_i_gets_number_i_of_the_seeds_that_follow_from_one_seed(num_workers):
    seeds = counter_seeds(10, 3)
    results, reseeded = vector_rollout("Counter-v0", num_workers, 1, seed=10)
    assert results[0][0][:, 1].tolist() == seeds and reseeded[:, 1].tolist() == seeds
    results, _ = vector_rollout("walker-walk", num_workers, 0, seed=10)
    for i, seed in enumerate(env_seeds(10, 3)):
        np.testing.assert_array_equal(results[0][0][i], envs.make_env("walker-walk", seed=seed).reset()[0])


def test_environments_that_are_made_some_at_a_time_start_as_all_of_them_do():
    together = envs.make_envs(["cartpole-swingup", "pendulum-swingup"], 3, (1, 1), num_workers=0)
    second = envs.make_envs(["pendulum-swingup"], 3, (1, 1), num_workers=0, sizes=(5, 1), first=3)
    np.testing.assert_array_equal(second.reset()[0], together.reset()[0][3:])
    second.close()
    together.close()


def test_a_simulator_that_is_not_installed_is_found_out_before_it_is_needed(monkeypatch):
    envs.check_simulators(("walker-walk", "cartpole-swingup", "mw-reach"))
    monkeypatch.setitem(sys.modules, "metaworld", None)
    envs.check_simulators(("walker-walk", "cartpole-swingup"))
    with pytest.raises(envs.UserError, match="Meta-World cannot be imported .*; to install it: pip"):
        envs.check_simulators(("walker-walk", "mw-reach", "mw-soccer"))


def test_start_states_of_different_seeds_and_streams_are_all_different():
    vector, starts = envs.make_envs("cartpole-swingup", 10, (1, 0), num_workers=0), []
    streams = [1, 2, (1, 0), (1, 1), (2, 1), (1, 1, 1000), (1, 1, 1002), (1, 0, 0), (0, 1)]
    for seed in streams:
        obs, _ = vector.reset(seed=seed)
        np.testing.assert_array_equal(obs, vector.reset(seed=seed)[0], "the same seed gives the same states")
        starts += [tuple(state) for state in obs]
    vector.close()
    assert len(set(starts)) == 10 * len(streams)
    with pytest.raises(envs.UserError, match="a seed is a whole number"):
        env_seeds(-1, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_environments_that_are_not_active_are_left_as_they_are(num_workers):
    vector = envs.make_envs("Counter-v0", 3, num_workers=num_workers)
    obs, _ = vector.reset(seed=1)
    some, action = np.array([True, False, True]), np.zeros((3, 1), np.float32)
    for _ in range(2):
        obs, reward, terminated, truncated, _ = vector.step(action, active=some)
    assert obs[:, 0].tolist() == [2, 0, 2] and reward[1] == 0 and not (terminated | truncated).any()
    assert vector.step(action)[0][:, 0].tolist() == [3, 1, 3]
    vector.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_environment_that_has_ended_and_is_not_active_starts_no_episode(num_workers):
    vector = envs.make_envs("Ends-v0", 2, num_workers=num_workers)
    vector.reset()
    action = np.zeros((2, 1), np.float32)
    assert [vector.step(action)[2].all() for _ in range(3)] == [False, False, True]
    obs, reward, terminated, *_ = vector.step(action, active=[True, False])
    assert obs[:, 0].tolist() == [0, 3] and reward.tolist() == [0, 0] and not terminated.any()
    assert vector.step(action)[0][:, 0].tolist() == [1, 0], "made active again, it begins the next one"
    vector.close()


def test_worker_processes_are_the_default_where_they_pay(monkeypatch):
    assert [envs.default_workers("dog-run", n, cores=4) for n in (1, 2, 4, 8, 9)] == [0, 2, 4, 4, 3]
    assert [envs.default_workers("cartpole-swingup", n, cores=4) for n in (1, 2, 8)] == [0, 0, 0]
    assert envs.default_workers("cartpole-swingup", 64, cores=16) in range(3, 9)
    assert all(envs.default_workers(task, 8, cores=1) == 0 for task in ("dog-run", "mw-reach", "Hopper-v5"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for task, size, num_envs, num_workers in [("dog-run", 223, 1, 0), ("dog-run", 223, 3, 2), ("cup-spin", 8, 2, 0)]:
        vector = envs.make_envs(task, num_envs)
        assert vector.num_envs == num_envs and len(getattr(vector, "processes", [])) == num_workers
        assert vector.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
        assert vector.reset()[0].shape == (num_envs, size) == vector.observation_space.shape
        vector.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_environment_zero_draws(num_workers):
    vector = envs.make_envs("Counter-v0", 3, render_mode="rgb_array", num_workers=num_workers)
    vector.reset()
    vector.step(np.zeros((3, 1), np.float32))
    frames = vector.render()
    assert frames[0].shape == (4, 4, 3) and frames[0][0, 0, 0] == 1 and frames[1:] == (None, None)
    vector.close()
    vector = envs.make_envs("Counter-v0", 2, num_workers=num_workers)
    vector.reset()
    assert not any(frame is not None for frame in vector.render() or ())
    vector.close()


def test_workers_have_one_thread_each_and_no_jax_and_this_process_keeps_its_threads():
    before = dict(os.environ)
    vector = envs.make_envs("cartpole-swingup", 2, num_workers=2)
    for process in vector.processes:
        loaded = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libmujoco" in loaded and "jaxlib" not in loaded
        assert b"OMP_NUM_THREADS=1\0" in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert dict(os.environ) == before
    vector.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_environment_that_raises_ends_the_run_with_its_traceback(num_workers):
    vector = envs.make_envs("Fails-v0", 3, num_workers=num_workers)
    vector.reset()
    for _ in range(49):
        vector.step(np.zeros((3, 1), np.float32))
    with pytest.raises((RuntimeError, ValueError), match="the simulation exploded") as error:
        vector.step(np.zeros((3, 1), np.float32))
    if num_workers:
        assert "Fails-v0" in str(error.value) and "in step" in str(error.value)
        assert not any(alive(process.pid) for process in vector.processes)
        with pytest.raises(RuntimeError, match="closed"):
            vector.step(np.zeros((3, 1), np.float32))
    vector.close()
    vector.close()


def test_an_exception_that_cannot_be_pickled_is_reported_with_its_traceback_too():
    vector = envs.make_envs("Unspeakable-v0", 2, num_workers=2)
    vector.reset()
    with pytest.raises(RuntimeError, match="(?s)task 'Unspeakable-v0': .*in step.*Unspeakable: what happened here"):
        vector.step(np.array([[-1.0], [1.0]]))
    assert not any(alive(process.pid) for process in vector.processes)


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError], ids=lambda error: error.__name__)
def test_what_an_environment_raises_is_not_taken_for_the_end_of_its_parent(error):
    register(f"{error.__name__}-v0", entry=Broken, raises=error)
    with closing(envs.make_envs(f"{error.__name__}-v0", 2, num_workers=1)) as vector:
        vector.reset()
        with pytest.raises(RuntimeError, match=f"(?s)in step.*{error.__name__}: what happened here"):
            vector.step(np.array([[-1.0], [1.0]]))


def test_environments_that_were_made_before_one_that_cannot_be_are_closed():
    with pytest.raises(envs.UserError, match="the third one"):
        envs.make_envs("Third-v0", 6, num_workers=0)
    assert (Third.made, Third.closed) == (3, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reward_that_is_no_number_is_one_sentence_and_leaves_no_process(num_workers):
    vector = envs.make_envs("NoNumber-v0", 3, num_workers=num_workers)
    vector.reset()
    with pytest.raises(envs.UserError, match="^task 'NoNumber-v0': step returned a reward of nan; expected a finite"):
        vector.step(np.array([[-1.0], [1.0], [-1.0]]))
    assert not any(alive(process.pid) for process in getattr(vector, "processes", []))
    vector.close()


@pytest.mark.parametrize(("task", "seconds"), [("Pendulum-v1", 0.05), ("Hopper-v5", 0.008), ("cartpole-balance", 0.02)])
def test_a_decision_is_kept_as_long_as_the_simulator_says(task, seconds):
    with closing(envs.make_env(task)) as env:
        assert env.interface()["control_period"] == pytest.approx(seconds)


@pytest.mark.parametrize(("victim", "command"), [(0, "step"), (1, "step"), (1, "reset"), (0, "render"), (1, "close")])
def test_a_killed_worker_is_one_sentence_and_leaves_no_process(victim, command):
    vector = envs.make_envs("Counter-v0", 3, num_workers=2, render_mode="rgb_array")
    vector.reset()
    os.kill(vector.processes[victim].pid, signal.SIGKILL)
    calls = {
        "step": lambda: vector.step(np.zeros((3, 1), np.float32)),
        "reset": vector.reset,
        "render": lambda: (vector.render(), vector.step(np.zeros((3, 1), np.float32))),
    }
    if command in calls:
        with pytest.raises(envs.UserError, match=rf"'Counter-v0': environment worker {victim} .* killed by signal 9"):
            calls[command]()
    vector.close()
    assert not any(alive(process.pid) for process in vector.processes)


@pytest.mark.parametrize("number", [n for n in Signals.NUMBERS], ids=lambda number: signal.Signals(number).name)
def test_workers_go_on_after_every_signal_that_ends_a_run_in_order(number):
    vector = envs.make_envs("Counter-v0", 2, num_workers=1)
    try:
        vector.reset()
        os.kill(vector.processes[0].pid, number)
        vector.step(np.zeros((2, 1), np.float32))
    finally:
        vector.close()


SCRIPT = """
import envs, numpy as np, os, sys, time
vector = envs.make_envs("cartpole-swingup", 3, num_workers=2)
vector.reset()
print(*[process.pid for process in vector.processes], flush=True)
"""


def pids(text):
    return [int(pid) for pid in text.split()]


def wait_for_end(processes, seconds=60):
    deadline = time.perf_counter() + seconds
    while any(alive(pid) for pid in processes) and time.perf_counter() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in processes)


def test_workers_need_no_main_guard_and_end_with_a_script_that_does_not_close_them(tmp_path):
    (tmp_path / "script.py").write_text("print('imported')\n" + SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, text in [([str(tmp_path / "script.py")], None), (["-"], "print('imported')\n" + SCRIPT)]:
        run = subprocess.run(
            [sys.executable, *arguments], input=text, env=environment, capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 0 and run.stderr == ""
        first, second = run.stdout.splitlines()
        assert first == "imported"  # once: the workers do not run the script again
        assert wait_for_end(pids(second))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_stopped(signal_number):
    code = SCRIPT + "while True: vector.step(np.zeros((3, 1), np.float32))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = pids(parent.stdout.readline())
    assert all(alive(worker) for worker in workers)
    if signal_number == signal.SIGKILL:
        parent.kill()
    else:
        os.killpg(parent.pid, signal_number)  # as a terminal and a batch system do: workers get it, too
    try:
        _, stderr = parent.communicate(timeout=20)
    finally:
        parent.kill()
    assert parent.returncode != 0
    assert stderr.count("Traceback") == (signal_number == signal.SIGINT)  # the parent's own KeyboardInterrupt only
    assert wait_for_end(workers)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gl():
    try:
        envs.check_rendering("cartpole-swingup")
    except envs.UserError as error:
        pytest.skip(str(error))
    return os.environ["MUJOCO_GL"]


DRAWN = ["cartpole-swingup", "quadruped-walk", "cup-spin", "HalfCheetah-v5", "mw-window-open", "myo-pose", "lift-cube"]


@pytest.mark.parametrize("task", DRAWN)
def test_frames_are_384_pixels_square(gl, task):
    if task in envs.TASKS and not installed(task):
        pytest.skip("its simulator is not installed")
    env = envs.make_env(task, render_mode="rgb_array")
    env.reset()
    first = env.render()
    for _ in range(10):
        env.step(env.action_space.sample())
    second = env.render()
    env.close()
    assert first.shape == second.shape == (384, 384, 3) and first.dtype == np.uint8
    assert first.std() > 10 and (first != second).any()


def test_frames_are_dm_controls_own_pictures(gl):
    code = """
import envs, numpy as np
for task, camera in [("walker-walk", 0), ("quadruped-walk", 2)]:
    env = envs.make_env(task, render_mode="rgb_array")
    env.reset()
    expected = env.unwrapped.physics.render(384, 384, camera_id=camera)
    print(np.abs(env.render().astype(int) - expected).max())
"""
    run = run_python(code, MUJOCO_GL=gl)
    assert run.returncode == 0, run.stderr
    assert all(int(difference) <= 1 for difference in run.stdout.split()) and len(run.stdout.split()) == 2


def test_a_dropped_environment_leaves_the_pictures_of_others_alone(gl):
    code = """
import envs, gc, numpy as np
first = envs.make_env("cartpole-swingup", render_mode="rgb_array")
first.reset(), first.render()
second = envs.make_env("walker-walk", render_mode="rgb_array")
second.reset()
before = second.render()
del first
gc.collect()
print(np.abs(second.render().astype(int) - before).max())
print(second.unwrapped.physics.model.vis.global_.offwidth)
"""
    run = run_python(code, MUJOCO_GL=gl)
    assert run.stdout.split("\n")[:2] == ["0", "640"] and run.stderr == "", run.stderr


@pytest.mark.parametrize("task", ["mw-reach", "myo-pose", "myo-obj-hold", "myo-key-turn", "myo-pen-twirl-hard"])
def test_cameras_hang_the_right_way_up(gl, task):
    if not installed(task):
        pytest.skip("its simulator is not installed")
    env = envs.make_env(task, render_mode="rgb_array")
    env.reset()
    _, data = env._simulator.scene()
    assert data.cam_xmat[env._simulator.camera, 7] > -0.1  # z of the picture's upward direction
    env.close()


def test_meta_worlds_frames_are_the_right_way_up(gl):
    env = envs.make_env("mw-reach", render_mode="rgb_array")
    env.reset()
    frame = env.render().astype(int)
    env.close()
    table = (frame[..., 0] - frame[..., 2] > 25) & (frame[..., 1] > 60)  # wood: brown, not the robot's red
    assert table[-100:].mean() > 0.3 and table[:100].mean() < 0.05


@pytest.mark.parametrize("task", ["walker-walk", "mw-reach"])
def test_pixel_observations_are_one_small_frame(gl, task):
    env = envs.make_env(task, obs="rgb")
    obs, _ = env.reset()
    assert obs.shape == (64, 64, 3) and obs.dtype == np.uint8 and obs in env.observation_space and obs.std() > 10
    after = env.step(np.ones(env.action_space.shape, np.float32))[0]
    assert after.dtype == np.uint8 and (after != obs).any()
    env.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pictures_and_the_state_of_the_same_moment_are_seen_together(gl, num_workers):
    kinds = ("rgb+state", "rgb+state:velocity", "rgb", "state")
    vectors = [envs.make_envs("cartpole-swingup", 2, 1, obs=kind, num_workers=num_workers) for kind in kinds]
    seen = [vector.reset()[0] for vector in vectors]
    for step in range(3):
        if step:
            seen = [vector.step(np.full((2, 1), 0.5, np.float32))[0] for vector in vectors]
        both, velocities, pictures, states = seen
        np.testing.assert_array_equal(both["rgb"], pictures)
        np.testing.assert_array_equal(both["state"], states)
        np.testing.assert_array_equal(velocities["state"], states[:, 3:])
        assert both in vectors[0].observation_space and velocities["state"].dtype == np.float32
    for vector in vectors:
        vector.close()


def test_what_is_not_in_a_state_is_refused_with_what_is(gl):
    with pytest.raises(envs.UserError, match="'cartpole-swingup' has no 'angle'; it has position, velocity"):
        envs.make_env("cartpole-swingup", obs="rgb+state:position,angle")
    env = envs.make_env("mw-reach", obs="rgb+state:goal,hand")
    obs, alone = env.reset()[0], envs.make_env("mw-reach").reset()[0]
    assert obs["state"].shape == (6,) and env.observation_space["state"].shape == (6,)
    np.testing.assert_array_equal(obs["state"], alone[[0, 1, 2, 36, 37, 38]])
    env.close()


def test_drawing_counts_when_workers_are_chosen():
    assert envs.default_workers("cartpole-swingup", 4, cores=4) == 0
    assert envs.default_workers("cartpole-swingup", 4, cores=4, obs="rgb") == 4


def test_pictures_without_shadows_and_reflections_differ_only_in_observations(gl):
    def frames(shadows):
        env = envs.make_env("walker-walk", obs="rgb", render_mode="rgb_array", shadows=shadows)
        obs, large = env.reset()[0], env.render()
        env.close()
        return obs, large

    (obs, large), (plain, same) = frames(True), frames(False)
    np.testing.assert_array_equal(large, same)
    assert 0 < (obs != plain).mean() < 0.9


def test_suite_tasks_beyond_the_table_have_short_names_and_pictures(gl):
    assert envs.task_spec("quadruped-run") == envs.task_spec("dm_control/quadruped-run-v0")
    assert envs.task_spec("point_mass-easy").name == "dm_control/point_mass-easy-v0"
    env = envs.make_env("quadruped-run", obs="rgb")
    obs, _ = env.reset()
    assert obs.shape == (64, 64, 3) and obs.std() > 10
    env.close()


def test_workers_draw_on_several_gpus_in_turn_unless_the_user_says_where():
    def chosen(worker, **environment):
        rendering._choose_gpu(environment, worker)
        return environment.get("MUJOCO_EGL_DEVICE_ID")

    assert [chosen(worker, CUDA_VISIBLE_DEVICES="3,0") for worker in (0, 1, 2)] == ["3", "0", "3"]
    assert chosen(1, CUDA_VISIBLE_DEVICES="3,0", MUJOCO_EGL_DEVICE_ID="1") == "1"
    assert chosen(1) is None and chosen(1, CUDA_VISIBLE_DEVICES="") is None
    assert chosen(1, CUDA_VISIBLE_DEVICES="GPU-1a2b") is None


def test_a_gpu_that_cannot_be_opened_is_passed_over(gl):
    code = "from tdmpc2_support.envs import rendering; rendering._worker = 1; import envs; "
    code += "env = envs.make_env('cartpole-swingup', obs='rgb'); assert env.reset()[0].std() > 10; print('drawn')"
    run = run_python(code, CUDA_VISIBLE_DEVICES="0,99")
    assert "drawn" in run.stdout, run.stderr


def test_pictures_come_from_worker_processes_too(gl):
    vector = envs.make_envs("cartpole-swingup", 2, obs="rgb", render_mode="rgb_array", num_workers=2)
    obs, _ = vector.reset()
    assert obs.shape == (2, 64, 64, 3) and obs.dtype == np.uint8 and obs.std() > 10
    assert vector.render()[0].shape == (384, 384, 3)
    vector.close()


def test_missing_gl_is_one_sentence_that_names_the_packages(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(envs.UserError, match="neither EGL nor OSMesa .*: apt-get install .*libegl1.*libosmesa6"):
        envs.check_rendering("walker-walk")


def test_the_users_choice_of_gl_is_respected():
    code = "import envs; envs.make_env('walker-walk').reset(); envs.check_rendering('walker-walk')"
    assert "UserError" in run_python("import envs; envs.make_env('mw-reach')", MUJOCO_GL="nonsense").stderr
    for choice in ("disable", "nonsense"):
        run = run_python(code, MUJOCO_GL=choice)
        assert "UserError" in run.stderr.splitlines()[-1] and choice in run.stderr.splitlines()[-1]


def test_a_gl_library_that_is_chosen_and_missing_is_one_sentence(tmp_path):
    (tmp_path / "OpenGL").mkdir()  # what PyOpenGL does when it is imported without the library
    (tmp_path / "OpenGL" / "__init__.py").write_text("raise AttributeError('no eglQueryString')")
    run = run_python("import envs; envs.make_env('walker-walk')", MUJOCO_GL="egl", PYTHONPATH=str(tmp_path))
    assert "UserError: DMControl cannot be imported with MUJOCO_GL=egl" in run.stderr.splitlines()[-1]


def test_states_need_no_gl_library_and_no_display():
    code = """
import envs
for task in ("walker-walk", "cheetah-jump", "Hopper-v5", "mw-reach"):
    env = envs.make_env(task)
    env.reset()
    env.step(env.action_space.sample())
    env.close()
maps = open("/proc/self/maps").read()
print([name for name in ("libGL", "libEGL", "libOSMesa") if name in maps])
"""
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
    assert run.stderr == ""


# --- the command ------------------------------------------------------------------------------------------------------


def test_importing_and_asking_for_a_task_loads_no_simulator():
    code = """
import envs, sys
[envs.task_spec(task) for task in envs.TASKS]
print([name for name in ("dm_control", "mujoco", "jax", "shimmy", "metaworld", "torch") if name in sys.modules])
"""
    run = run_python(code)
    assert run.stdout.strip() == "[]", run.stderr


def test_the_command_prints_every_task_and_loads_no_simulator():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "envs.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line for line in run.stdout.splitlines() if line.split()[0] in envs.DOMAINS]
    assert len(rows) == 144 and len(run.stdout.splitlines()) == 146
    assert "mujoco" not in run.stderr and "dm_control" not in run.stderr
