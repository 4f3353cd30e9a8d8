"""What people bring: environments that return what they should not, and the sentence that says so."""

import dataclasses
import io
import os
import subprocess
import sys
from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Tuple
from gymnasium.spaces.utils import flatdim, flatten

import envs
import tdmpc2_jax
from tdmpc2_support import cli, devices
from tdmpc2_support.envs import guard
from tdmpc2_support.envs.guard import Actions, Observations, is_image, picture
from tdmpc2_support.envs.tasks import task_spec
from tdmpc2_support.errors import UserError
from tdmpc2_support.run.reports import film_path

pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment")
TASK = "Strange-v0"


class Plain(gym.Env):
    """Sees the number of its step, three times."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t, np.float32), float(self.t), False, False, {}

    def render(self):
        return np.full((4, 4, 3), self.t, np.uint8)


def strange(render_mode=None, **changed):
    """The environment of an id whose class has these in place of the plain ones."""
    kind = type("Strange", (Plain,), changed)
    gym.register(TASK, entry_point=kind, max_episode_steps=10)
    return envs.make_env(TASK, seed=1, render_mode=render_mode)


def step_with(position, value):
    """A step that returns this in the place of one of its values."""

    def step(self, action):
        result = [*Plain.step(self, action)]
        result[position] = value
        return tuple(result)

    return step


def step_as(convert):
    return lambda self, action: convert(*Plain.step(self, action))


def reset_as(convert):
    return lambda self, *, seed=None, options=None: convert(*Plain.reset(self, seed=seed))


# ------------------------------------------------------------------------------------------------------- Reset and step
@pytest.mark.parametrize("value", [2, True, np.float16(2), np.array([2.0]), np.array([[2]]), [2], np.int8(2)], ids=repr)
def test_a_reward_is_one_number_of_any_type(value):
    env = strange(step=step_with(1, value))
    env.reset()
    reward = env.step(np.zeros(2))[1]
    assert type(reward) is float and reward == float(np.ravel(value)[0])


@pytest.mark.parametrize("name", ["success", "is_success"])
@pytest.mark.parametrize("value", [True, 1, np.array([True]), np.float32(1), [1.0]], ids=repr)
def test_success_goes_by_either_name_and_is_a_number_of_any_type(name, value):
    env = strange(step=step_with(4, {name: value}))
    env.reset()
    success = env.step(np.zeros(2))[4]["success"]
    assert type(success) is float and success == 1.0


TAKEN = {
    "four values": {"step": step_as(lambda obs, reward, *_: (obs, reward, True, {"TimeLimit.truncated": False}))},
    "four values with None": {"step": step_as(lambda obs, reward, *_: (obs, reward, True, None))},
    "a list": {"step": step_as(lambda obs, reward, *_: [obs, reward, True, False, {}])},
    "no info": {"step": step_as(lambda obs, reward, *_: (obs, reward, True, False))},
    "None as info": {"step": step_with(4, None)},
    "a reset without info": {"reset": reset_as(lambda obs, info: obs)},
    "None as the info of a reset": {"reset": reset_as(lambda obs, info: (obs, None))},
    "no arguments": {"reset": lambda self: Plain.reset(self)},
    "a seed alone": {"reset": lambda self, seed=None: Plain.reset(self, seed=seed)},
    "any arguments": {"reset": lambda self, **given: Plain.reset(self, **given)},
    "numbers for flags": {"step": step_as(lambda obs, reward, *_: (obs, reward, np.array([1]), np.bool_(0), {}))},
    "a column": {"step": step_as(lambda obs, *rest: (obs[:, None], *rest))},
    "a row": {"reset": reset_as(lambda obs, info: (obs[None], info))},
    "a list of numbers": {"step": step_as(lambda obs, *rest: (obs.tolist(), *rest))},
    "64 bits": {"step": step_as(lambda obs, *rest: (obs.astype(float), *rest))},
    "objects": {"step": step_as(lambda obs, *rest: (obs.astype(object), *rest))},
}


@pytest.mark.parametrize("changed", TAKEN.values(), ids=TAKEN.keys())
def test_what_can_be_meant_in_one_way_only_is_taken(changed):
    env = strange(**changed)
    obs, info = env.reset()
    assert obs.shape == (3,) and obs.dtype == np.float32 and info == {"success": 0.0}
    obs, reward, terminated, truncated, info = env.step(np.zeros(2))
    assert obs.dtype == np.float32 and obs.tolist() == [1, 1, 1] and reward == 1.0 and info["success"] == 0.0
    assert type(terminated) is bool and truncated is False


def test_the_end_of_four_values_is_the_time_limit_if_their_info_says_so():
    env = strange(step=step_as(lambda obs, reward, *_: (obs, reward, True, {"TimeLimit.truncated": True})))
    env.reset()
    assert env.step(np.zeros(2))[2:4] == (False, True)


def named(name, arguments):
    """A method that takes these arguments."""
    scope = {}
    exec(f"def {name}({arguments}): pass", scope)
    return scope[name]


REFUSED = {
    "reset returned 3 values; expected two": {"reset": reset_as(lambda obs, info: (obs, info, 0))},
    "reset returned an observation of type NoneType; expected numbers": {"reset": reset_as(lambda obs, info: None)},
    "reset returned an info of type str; expected a dict": {"reset": reset_as(lambda obs, info: (obs, "x"))},
    "reset returned an observation of shape \\(5,\\); expected shape": {
        "reset": reset_as(lambda obs, info: (np.zeros(5), info))
    },
    "reset returned an observation whose entry 1 is nan; expected finite": {
        "reset": reset_as(lambda obs, info: (np.array([0, np.nan, 0], np.float32), info))
    },
    "reset cannot be called as Gymnasium calls it": {"reset": named("reset", "self, place")},
    "does not implement step": {"step": gym.Env.step},
    "step cannot be called as Gymnasium calls it": {"step": named("step", "self")},
    "step returned NoneType; expected five": {"step": lambda self, action: None},
    "step returned 6 values; expected five": {"step": step_as(lambda *values: (*values, 0))},
    "step returned 3 values; expected five": {"step": step_as(lambda *values: values[:3])},
    "an observation of shape \\(1,\\); expected shape": {"step": step_with(0, np.zeros(1, np.float32))},
    "an observation of shape \\(3, 3\\); expected shape": {"step": step_with(0, np.zeros((3, 3)))},
    "an observation whose entry 2 is inf; expected finite": {"step": step_with(0, [0, 0, np.inf])},
    "an observation whose entry 0 is 1e\\+39; expected finite": {"step": step_with(0, np.array([1e39, 0, 0]))},
    "an observation of type str; expected numbers": {"step": step_with(0, "left")},
    "an observation of type dict; expected numbers": {"step": step_with(0, {"x": 1})},
    "an observation of type ndarray; expected numbers": {"step": step_with(0, np.zeros(3, complex))},
    "a reward of shape \\(2,\\).*expected one number": {"step": step_with(1, np.array([1.0, 2.0]))},
    "a reward of type NoneType \\(None\\); expected one number": {"step": step_with(1, None)},
    "a reward of type str \\(2\\); expected one number": {"step": step_with(1, "2")},
    "a reward of nan; expected a finite number": {"step": step_with(1, np.nan)},
    "a reward of -1e\\+39; expected a finite number": {"step": step_with(1, -1e39)},
    "a value for terminated of type NoneType": {"step": step_with(2, None)},
    "a value for truncated of type str": {"step": step_with(3, "False")},
    "terminated = 0.5; expected True or False": {"step": step_with(2, 0.5)},
    "a value for terminated of shape \\(2,\\)": {"step": step_with(2, np.array([True, False]))},
    "an info of type list; expected a dict": {"step": step_with(4, ["solved"])},
    "info\\['success'\\] of type str \\(yes\\); expected one number": {"step": step_with(4, {"success": "yes"})},
    "info\\['success'\\] of type NoneType": {"step": step_with(4, {"success": None})},
    "info\\['is_success'\\] of shape \\(2,\\)": {"step": step_with(4, {"is_success": np.ones(2)})},
    "info\\['success'\\] = nan; expected": {"step": step_with(4, {"success": np.nan})},
}


@pytest.mark.parametrize(("sentence", "changed"), REFUSED.items(), ids=REFUSED.keys())
def test_all_else_is_one_sentence(sentence, changed):
    env = strange(**changed)
    with pytest.raises(envs.UserError, match=f"^task '{TASK}'.*{sentence}") as error:
        env.reset()
        env.step(np.zeros(2))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_an_error_within_the_environment_is_not_ours_to_name():
    env = strange(step=lambda self, action: int("no number"))
    env.reset()
    with pytest.raises(ValueError, match="invalid literal"):
        env.step(np.zeros(2))


def constructor(text):
    def __init__(self, *needed, **options):
        raise FileNotFoundError(text)

    return __init__


MAKING = {
    "cannot be made: TypeError: .*missing 1 required positional argument: 'robot'$": {
        "__init__": lambda self, robot: None
    },
    "cannot be made: FileNotFoundError: arm.urdf \\(test_border.py, line \\d+\\)": {
        "__init__": constructor("arm.urdf")
    },
    "has no observation_space; expected one of gymnasium.spaces": {"observation_space": None},
    "has a builtins.list as action_space; expected one of gymnasium": {"action_space": [-1, 1]},
    "has no observations": {"observation_space": Box(-1, 1, (0,))},
    "has no actions": {"action_space": Box(-1, 1, (0,))},
    "has Sequence observations": {"observation_space": Sequence(Box(-1, 1))},
    "has Sequence in \\['a'\\] observations": {"observation_space": Dict(a=Sequence(Box(-1, 1)))},
    "has pictures as observations": {"observation_space": Box(0, 255, (84, 84, 3), np.uint8)},
    "has pictures among its observations: \\['camera'\\]": {
        "observation_space": Dict(camera=Box(0, 255, (84, 84), np.uint8), joints=Box(-1, 1))
    },
    "has actions Discrete\\(3\\); only a Box": {"action_space": Discrete(3)},
}  # fmt: skip


@pytest.mark.parametrize(("sentence", "changed"), MAKING.items(), ids=MAKING.keys())
def test_an_environment_that_cannot_be_used_says_why_when_it_is_made(sentence, changed):
    with pytest.raises(envs.UserError, match=f"^task '{TASK}' {sentence}"):
        strange(**changed)


def test_seeds_of_registered_ids_have_31_bits():
    seen = []

    def reset(self, *, seed=None, options=None):
        seen.append(seed)
        return Plain.reset(self, seed=seed)

    env = strange(reset=reset)
    for seed in (2**31 - 1, 2**31, 2**32 - 1):
        env.reset(seed=seed)
    assert seen == [2**31 - 1, 0, 2**31 - 1] and all(type(seed) is int for seed in seen)


def test_a_reset_that_takes_no_seed_is_seeded_by_what_it_draws_from(capsys):
    def reset(self):
        return self.np_random.uniform(size=3), {}

    guard.say.cache_clear()
    first, again, other = (strange(reset=reset).reset(seed=seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert capsys.readouterr().err.count("reset takes no seed") == 1
    old = strange(reset=reset, seed=lambda self, seed: setattr(self, "np_random", np.random.default_rng(0)))
    assert old.reset(seed=1)[0].tolist() == old.reset(seed=2)[0].tolist()


def test_rewards_that_the_model_cannot_tell_apart_are_said_once(capsys):
    guard.say.cache_clear()
    env = strange(step=step_with(1, 1e6))
    env.reset()
    assert [env.step(np.zeros(2))[1] for _ in range(3)] == [1e6] * 3
    assert capsys.readouterr().err.count("rewards beyond ±22,025") == 1


def test_a_close_that_fails_loses_nothing(capsys):
    env = strange(close=lambda self: self.gone.disconnect())
    env.reset()
    env.close()
    assert "close raised AttributeError" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- Spaces
box = Box(-2, 2, (2, 3), np.float64)
SPACES = [
    Box(-9, 9, (), np.float32),
    box,
    Box(0, 255, (7,), np.uint8),
    Box(0, 1, (4,), bool),
    Discrete(4),
    Discrete(3, start=-1),
    MultiDiscrete([2, 3]),
    MultiDiscrete([[2, 3], [1, 2]]),
    MultiBinary((2, 2)),
    Tuple((Discrete(2), box)),
    Dict(observation=box, achieved_goal=Box(-1, 1, (3,)), desired_goal=Box(-1, 1, (3,))),
    Dict(b=Dict(z=MultiBinary(2), a=box), a=Tuple((Discrete(2), Discrete(3)))),
]


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_observations_of_any_space_are_flattened_as_gymnasium_does(space):
    to_vector = Observations(TASK, space)
    space.seed(0)
    for _ in range(5):
        value = space.sample()
        vector = to_vector("step", value)
        assert vector.dtype == np.float32 and vector.shape == (flatdim(space),) == (to_vector.size,)
        np.testing.assert_array_equal(vector, flatten(space, value).astype(np.float32))


WRONG_PARTS = [
    (SPACES[-2], {"observation": np.zeros((2, 3)), "desired_goal": np.zeros(3)}, "without 'achieved_goal'"),
    (Dict(a=Dict(b=Discrete(3))), {"a": 1}, r"observation\['a'\] of type int without 'b'; expected \['a'\]\['b'\]"),
    (Dict(a=Discrete(3)), {"a": 3}, r"observation\['a'\] of 3; expected one of Discrete\(3\)"),
    (Dict(a=Discrete(3)), {"a": 0.5}, r"observation\['a'\] of 0.5"),
    (Dict(a=box), {"a": np.zeros((3, 2))}, r"observation\['a'\] of shape \(3, 2\); expected shape \(2, 3\)"),
    (Tuple((box, box)), (np.zeros((2, 3)),), "of type tuple without 1"),
    (Dict(a=box), {"a": np.full((2, 3), np.nan)}, "whose entry 0 is nan"),
    (MultiDiscrete([2, 3]), [1, 3], "one of MultiDiscrete"),
]


@pytest.mark.parametrize(("space", "value", "sentence"), WRONG_PARTS, ids=repr)
def test_the_part_of_an_observation_that_is_wrong_is_named(space, value, sentence):
    with pytest.raises(envs.UserError, match=sentence):
        Observations(TASK, space)("step", value)


def test_what_was_made_of_the_spaces_is_said_whoever_steps_the_environments():
    changed = {"observation_space": SPACES[-2], "action_space": Box(-1, 1, (2, 2)), "reset": reset_as(goal)}
    strange(**changed)
    for num_workers in (0, 1):
        with_envs = envs.make_envs(TASK, 2, num_workers=num_workers)
        assert with_envs.metadata["observations"] == "12 observations (observation 6, achieved_goal 3, desired_goal 3)"
        assert with_envs.metadata["actions"] == "4 actions ((2, 2) flattened)"
        assert with_envs.reset()[0].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2
        with_envs.close()


def goal(obs, info):
    return {"observation": np.zeros((2, 3)), "achieved_goal": np.ones(3), "desired_goal": np.full(3, 2)}, info


def test_pictures_are_bytes_or_have_channels_and_all_else_is_numbers():
    pictures = [((64, 64, 3), "uint8"), ((3, 64, 64), "uint8"), ((84, 84), "uint8"), ((4, 84, 84, 3), "uint8")]
    pictures += [((64, 64, 3), "float32"), ((1, 28, 28), "float32")]
    numbers = [
        ((3, 2), "float32"),
        ((30, 40), "float32"),
        ((10_000,), "float32"),
        ((300,), "uint8"),
        ((7, 7, 3), "uint8"),
    ]
    for shapes, expected in ((pictures, True), (numbers, False)):
        for shape, dtype in shapes:
            assert is_image(Box(0, 1, shape, np.dtype(dtype))) is expected, (shape, dtype)


# -------------------------------------------------------------------------------------------------------------- Actions
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_of_any_shape_reach_their_bounds_and_stay_within_them(dtype):
    rng = np.random.default_rng(0)
    for shape in ((), (1,), (2, 3), (50,)):
        low = rng.uniform(-10, 1, shape).astype(dtype)
        space = Box(low, (low + rng.uniform(0, 5, shape)).astype(dtype), shape, dtype)
        to_own = Actions(TASK, space)
        for action in (-np.ones(to_own.size), np.ones(to_own.size), rng.uniform(-1, 1, to_own.size)):
            assert space.contains(to_own(action.astype(np.float32)))
        np.testing.assert_allclose(to_own(np.ones(to_own.size)), space.high, rtol=1e-3)
        np.testing.assert_array_equal(to_own(-np.ones(to_own.size)), space.low)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64])
def test_whole_numbers_have_equal_shares_of_the_actions(dtype):
    space = Box(0, 3, (1,), dtype)
    to_own = Actions(TASK, space)
    drawn = [int(to_own(np.array([action]))[0]) for action in np.linspace(-1, 1, 4001)]
    assert {n: drawn.count(n) // 100 for n in range(4)} == dict.fromkeys(range(4), 10)
    assert all(space.contains(to_own(np.array([action]))) for action in (-1.0, 1.0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64])
def test_bounds_that_mean_none_are_refused(dtype):
    largest = (np.iinfo if np.dtype(dtype).kind == "i" else np.finfo)(dtype).max
    with pytest.raises(envs.UserError, match="actions without finite bounds"):
        Actions(TASK, Box(-largest, largest, (1,), dtype))


# ------------------------------------------------------------------------------------------------------------- Pictures
seen = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.mark.parametrize(
    "value",
    [seen, np.dstack([seen, seen[..., :1]]), seen.astype(np.int64), [seen], seen.tolist(), seen.transpose(2, 0, 1)],
    ids=["rgb", "rgba", "integers", "a list of one", "lists", "channels first"],
)
def test_a_picture_that_can_be_read_in_one_way_only_is_read(value):
    np.testing.assert_array_equal(picture(TASK, "render", value), seen)


def test_a_picture_without_colours_is_grey():
    np.testing.assert_array_equal(picture(TASK, "render", seen[..., 0]), np.repeat(seen[..., :1], 3, -1))


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (None, "type NoneType"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.full((4, 4, 3), 300), "int64"),
        ([seen, seen], r"shape \(2, 4, 5, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        ("ansi", "type str"),
    ],
)
def test_other_pictures_are_refused_before_a_run_begins(value, came):
    gym.register(TASK, entry_point=type("Strange", (Plain,), {"render": lambda self: value}), max_episode_steps=10)
    with pytest.raises(envs.UserError, match=f"render returned a picture of {came}; expected a picture: uint8"):
        envs.check_rendering(TASK)


def test_pictures_of_a_film_have_one_size():
    env = strange("rgb_array", render=lambda self: np.zeros((4 + self.t, 4, 3), np.uint8))
    env.reset()
    assert env.render().shape == (4, 4, 3)
    env.step(np.zeros(2))
    with pytest.raises(envs.UserError, match=r"a picture of shape \(5, 4, 3\); expected shape \(4, 4, 3\)"):
        env.render()


@pytest.mark.parametrize("fps", [None, 0, -1, "fast", np.inf, [30]], ids=repr)
def test_a_film_has_a_speed_whatever_the_environment_says(fps):
    env = strange("rgb_array", metadata={"render_modes": ["rgb_array"], "render_fps": fps})
    assert env.metadata["render_fps"] == (30 if fps == [30] else 25)


# ------------------------------------------------------------------------------------------- The shell and the machine
MODULE = """
import gymnasium as gym
import parts_of_mine
gym.register("Mine-v0", parts_of_mine.Env, max_episode_steps=7)
"""


def test_a_module_in_the_current_folder_is_found_and_so_is_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "module_of_mine.py").write_text(MODULE)
    (tmp_path / "parts_of_mine.py").write_text("from strange_envs import Point as Env")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for task in ("module_of_mine:Mine-v0", "module_of_mine.py:Mine-v0"):
        assert task_spec(task).episode_length == 7
    vector = envs.make_envs("module_of_mine:Mine-v0", 2, num_workers=2)
    assert vector.reset()[0].shape == (2, 2)
    vector.close()
    (tmp_path / "broken_module.py").write_text("\nx = y")
    with pytest.raises(UserError, match=r"cannot be imported: NameError: name 'y' .* \(broken_module.py, line 2\)$"):
        task_spec("broken_module:Mine-v0")


def test_output_into_a_pipe_that_was_closed_is_given_up(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with cli.errors_as_sentences():
            for _ in range(3):
                print("x" * 100_000, flush=True)
        assert sys.stdout is stream
        stream.flush()


def test_a_terminal_without_all_letters_shows_question_marks(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with cli.errors_as_sentences():
        print("± std")
    assert raw.getvalue() == b"? std\n"


def test_output_that_the_shell_has_closed_is_no_reason_to_stop(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with cli.errors_as_sentences():
        print("x", flush=True)
        sys.stderr.write("y")


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_sentence(platform):
    code = "from tdmpc2_support import cli, devices\nwith cli.errors_as_sentences(): devices.set_up_jax(False)"
    env = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("it is there")
    assert done.stderr.splitlines()[-1].startswith(f"error: JAX finds no device here (JAX_PLATFORMS={platform}): ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name, value", [("jax_enable_x64", True), ("jax_numpy_rank_promotion", "raise")])
def test_settings_of_the_shell_that_other_programs_need_are_put_right(name, value, capsys):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        devices.set_up_jax(compile_cache=False)
        assert getattr(jax.config, name) == devices.NEEDED[name]
        assert capsys.readouterr().err.startswith(f"{name.upper()}={value} is not for this program")
    finally:
        jax.config.update(name, before)


def test_without_any_home_there_is_no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        devices.use_compile_cache(True)
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_replay_that_memory_does_not_hold_is_refused_with_a_size_that_fits():
    make = partial(jnp.zeros, (10**9, 10**6))
    with pytest.raises(UserError, match=r"^--buffer-size 1000000000 takes .* enough for --buffer-size \d+$"):
        devices.check_memory(make, 10**9, 10**9)


def test_a_run_that_can_learn_nothing_says_so(capsys):
    args = tdmpc2_jax.Args(task="cartpole-swingup", total_timesteps=1000)
    spec = task_spec(args.task)
    cli.check_replay(args, spec, 500)
    assert "nothing will be learned: --total-timesteps 1000 ends within the 500 random" in capsys.readouterr().err
    cli.check_replay(dataclasses.replace(args, total_timesteps=1002), spec, 500)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="end after 2 decisions, before --horizon 3"):
        cli.check_replay(args, spec._replace(episode_length=2), 500)


def test_a_tracker_without_an_account_is_refused_before_anything_starts(monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("def login():\n    raise ValueError('No API key\\nconfigured')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    args = dataclasses.replace(tdmpc2_jax.Args(), track=True)
    agent = tdmpc2_jax.with_model_size(args.agent)
    with pytest.raises(UserError, match="^--track: No API key"):
        cli.check_bounds(dataclasses.replace(args, agent=agent))
    monkeypatch.setenv("WANDB_MODE", "offline")
    cli.check_bounds(dataclasses.replace(args, agent=agent))


def test_a_film_goes_where_it_can_be_written_or_is_refused_before_the_episodes(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").touch()
    monkeypatch.chdir(tmp_path)
    assert film_path(str(run / "checkpoints" / "100")) == run / "videos" / "evaluate.mp4"
    assert str(film_path("agents/walker.pt", "dog-run")) == "agents/walker-evaluate-dog-run.mp4"
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) == str(tmp_path))
    assert str(film_path(str(run))) == "evaluate.mp4"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="neither .* nor the current folder can be written"):
        film_path(str(run))
