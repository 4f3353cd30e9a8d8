"""The ground floor: the table of tasks, their names and ids, sets of tasks. Importing it loads no simulator."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium as gym

from tdmpc2_support.envs.guard import close_quietly
from tdmpc2_support.envs.soup import FACTS
from tdmpc2_support.errors import UserError, one_line


class TaskSpec(NamedTuple):
    """What a script must know of a task before it makes the environment."""

    name: str  # canonical short name, or the Gymnasium id
    domain: str
    action_repeat: int  # simulator steps per decision
    episode_length: int  # decisions
    can_terminate: bool  # False: episodes end by the time limit only
    success: bool  # True: the success rate is the figure of merit, not the return
    simulator_steps: int  # of a whole episode


class Domain(NamedTuple):
    """A family of tasks: common settings, and rows (prefix, tasks, observation size, action size, CPU µs/decision)."""

    rows: tuple[tuple[str, str, int | None, int, int], ...]
    action_repeat: int
    episode_length: int
    success: bool
    rgb: bool  # obs="rgb" is supported
    module: str  # the module of this folder whose `make` returns a task's `Simulator`
    package: str  # what that imports
    install: str  # how to get it


_METAWORLD_TASKS = (
    "assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall coffee-button "
    "coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open "
    "faucet-close hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull peg-insert-side "
    "peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back "
    "plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer stick-push stick-pull "
    "sweep-into sweep window-open window-close bin-picking box-close door-lock door-unlock hand-insert"
)

_ATARI_GAMES = (
    "alien assault asterix atlantis bank-heist battle-zone beamrider boxing chopper-command crazy-climber double-dunk "
    "gopher ice-hockey jamesbond kangaroo krull ms-pacman name-this-game phoenix pong road-runner robotank seaquest "
    "space-invaders tutankham upndown yars-revenge"
)

DOMAINS = {
    "DMControl": Domain(
        rows=(
            ("acrobot", "swingup", 6, 1, 70),
            ("cartpole", "balance balance-sparse swingup swingup-sparse", 5, 1, 30),
            ("cheetah", "run run-backwards run-front run-back jump", 17, 6, 40),
            ("cup", "catch spin", 8, 2, 100),
            ("dog", "run stand trot walk", 223, 38, 1400),
            ("finger", "spin", 9, 2, 50),
            ("finger", "turn-easy turn-hard", 12, 2, 95),
            ("fish", "swim", 24, 5, 160),
            ("hopper", "stand hop hop-backwards", 15, 4, 110),
            ("humanoid", "stand walk run", 67, 21, 450),
            ("pendulum", "swingup spin", 3, 1, 25),
            ("quadruped", "walk run", 78, 12, 260),
            ("reacher", "easy hard", 6, 2, 90),
            ("reacher", "three-easy three-hard", 8, 3, 30),
            ("walker", "stand walk run walk-backwards run-backwards", 24, 6, 165),
        ),
        action_repeat=2, episode_length=500, success=False, rgb=True,
        module="dmcontrol", package="dm_control.suite", install="pip install -e .",
    ),
    "Meta-World": Domain(
        rows=(("mw", _METAWORLD_TASKS, 39, 4, 600),),
        action_repeat=2, episode_length=100, success=True, rgb=True,
        module="metaworld", package="metaworld", install="pip install -e .",
    ),
    "MyoSuite": Domain(
        rows=(
            ("myo", "reach reach-hard", 115, 39, 1400),
            ("myo", "pose pose-hard", 108, 39, 1400),
            ("myo", "obj-hold obj-hold-hard", 91, 39, 1400),
            ("myo", "key-turn key-turn-hard", 93, 39, 1400),
            ("myo", "pen-twirl pen-twirl-hard", 83, 39, 1400),
        ),
        action_repeat=1, episode_length=100, success=True, rgb=False,
        module="myosuite", package="myosuite", install="pip install -e '.[myosuite]'",
    ),
    "ManiSkill": Domain(
        rows=(
            ("lift", "cube", 36, 4, 9000),
            ("pick", "cube", 42, 4, 9000),
            ("stack", "cube", 48, 4, 9000),
            ("pick", "ycb", None, 7, 9000),  # None: its files must be downloaded before it can tell
            ("turn", "faucet", None, 7, 9000),
        ),
        action_repeat=2, episode_length=100, success=True, rgb=False,
        module="maniskill", package="mani_skill.envs", install="pip install -e '.[maniskill]'",
    ),
    # Of Newt: each task has its own repeat and length, see soup.py.
    "MuJoCo": Domain(
        rows=(
            ("mujoco", "ant", 27, 8, 150),
            ("mujoco", "halfcheetah", 17, 6, 60),
            ("mujoco", "hopper", 11, 3, 60),
            ("mujoco", "inverted-pendulum", 4, 1, 40),
            ("mujoco", "reacher", 11, 2, 40),
            ("mujoco", "walker", 17, 6, 80),
        ),
        action_repeat=2, episode_length=500, success=False, rgb=False,
        module="gym_mujoco", package="mujoco", install="pip install -e .",
    ),
    "Box2D": Domain(
        rows=(("lunarlander", "land", 8, 2, 100),),
        action_repeat=2, episode_length=250, success=False, rgb=False,
        module="box2d", package="Box2D", install="pip install -e '.[box2d]'",
    ),
    "RoboDesk": Domain(
        rows=(("rd", "push-red push-green push-blue open-slide open-drawer flat-block-in-bin", 73, 5, 15000),),
        action_repeat=10, episode_length=100, success=True, rgb=False,
        module="robodesk", package="robodesk", install="pip install -e '.[robodesk]'",
    ),
    "Atari": Domain(
        rows=(("atari", _ATARI_GAMES, 128, 3, 600),),
        action_repeat=4, episode_length=1000, success=False, rgb=False,
        module="atari", package="ale_py", install="pip install -e '.[atari]'",
    ),
    # Environments in JAX, by the names that `jax_domain` knows: each task has its own repeat and length.
    "Playground": Domain(
        rows=(), action_repeat=2, episode_length=500, success=False, rgb=False,
        module="jax_env", package="mujoco_playground", install="pip install -e '.[playground]'",
    ),
    "gymnax": Domain(
        rows=(), action_repeat=1, episode_length=200, success=False, rgb=False,
        module="jax_env", package="gymnax", install="pip install -e '.[gymnax]'",
    ),
    "JAX": Domain(
        rows=(), action_repeat=1, episode_length=1000, success=False, rgb=False,
        module="jax_env", package="jax", install="pip install -e .",
    ),
}  # fmt: skip


class Row(NamedTuple):
    """A task of the printed table."""

    domain: str
    obs_size: int | None
    action_size: int
    microseconds: int  # of CPU per decision, for `default_workers`


# By canonical name, in the order of the printed table.
TASKS: dict[str, Row] = {
    f"{prefix}-{task}": Row(domain, *sizes_and_time)
    for domain, settings in DOMAINS.items()
    for prefix, tasks, *sizes_and_time in settings.rows
    for task in tasks.split()
}

# What tasks are called by their own package, where that needs it; these ids can be used as names, too.
PACKAGE_IDS = {
    "lift-cube": "LiftCube-v1",
    "pick-cube": "PickCube-v1",
    "stack-cube": "StackCube-v1",
    "pick-ycb": "PickSingleYCB-v1",
    "turn-faucet": "TurnFaucet-v1",
}
PACKAGE_IDS |= {
    f"myo-{task}{hard}": f"myoHand{task.title().replace('-', '')}{kind}-v0"
    for task in "reach pose obj-hold key-turn pen-twirl".split()
    for hard, kind in (("", "Fixed"), ("-hard", "Random"))
}

# The multi-task sets; a task's place in its set is its id in multi-task models and datasets.
_MT30 = tuple(
    (
        "walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup "
        "cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cup-catch finger-spin "
        "finger-turn-easy finger-turn-hard fish-swim hopper-stand hopper-hop walker-walk-backwards "
        "walker-run-backwards cheetah-run-backwards cheetah-run-front cheetah-run-back cheetah-jump "
        "hopper-hop-backwards reacher-three-easy reacher-three-hard cup-spin pendulum-spin"
    ).split()
)
TASK_SETS = {"mt30": _MT30, "mt80": _MT30 + tuple(f"mw-{task}" for task in _METAWORLD_TASKS.split())}

# Gymnasium tasks that only their time limit ends. Gymnasium does not register this fact, so it is a list of names (any
# version); a task missing here is taken as one that may terminate, which costs a termination head and is never wrong.
_NEVER_TERMINATE = {"HalfCheetah", "HumanoidStandup", "Pendulum", "Pusher", "Reacher", "Swimmer"}


def task_spec(task: str, action_repeat: int | None = None) -> TaskSpec:
    """The facts of a task, without loading its simulator.

    Args:
        task: a name of the table (`walker-walk`; dashes or underscores), its package's id (`myoHandReachFixed-v0`,
            `dm_control/walker-walk-v0`), any Gymnasium id with a time limit (`HalfCheetah-v5`, `module:Id-v0`, other
            `dm_control/…` ids), or an environment in JAX (`playground/WalkerWalk`, `gymnax/Pendulum-v1`,
            `module:function`; see jax_env.py), which is loaded for its facts.
        action_repeat: simulator steps per decision, if others than the table's are wanted; an episode has as many
            simulator steps as before, and the last decision of one that it does not divide gets what is left.

    Raises:
        UserError: there is no such task, it has no time limit, or the repeat is not a whole number from 1 on.
    """
    spec = _spec(task)
    if action_repeat is None:
        return spec
    if action_repeat != int(action_repeat) or action_repeat < 1:
        raise UserError(f"the action repeat must be a whole number from 1 on, not {action_repeat}")
    episode_length = -(-spec.simulator_steps // action_repeat)
    return spec._replace(action_repeat=int(action_repeat), episode_length=int(episode_length))


def _spec(task: str) -> TaskSpec:
    if jax_domain(task):
        return importlib.import_module("tdmpc2_support.envs.jax_env").spec(task)
    name = _canonical(task)
    if name in TASKS:
        domain = TASKS[name].domain
        _, repeat, length, success, *_ = DOMAINS[domain]
        if name in FACTS:
            repeat = FACTS[name].action_repeat
            length = FACTS[name].episode_length
        return TaskSpec(name, domain, repeat, length, False, success, repeat * length)
    task = _suite_id(name) or task
    spec = gym_spec(task)
    if task.startswith("dm_control/"):  # suite ids are domain-task; of these only lqr ends early
        can_terminate = "-" not in spec.name or spec.name.startswith("lqr-")
        steps = 250 if spec.name.endswith("_features") else 1000  # manipulation: 10 s of 0.04 s
        return TaskSpec(task, "DMControl", 2, steps // 2, can_terminate, False, steps)
    if spec.max_episode_steps is None:
        close_quietly(task, open_gym(task).close)  # names a worse fault first, if there is one
        raise UserError(f"task {task!r} has no time limit: register it with max_episode_steps=…")
    healthy_only = spec.kwargs.get("terminate_when_unhealthy", True)
    of_gymnasium = str(spec.entry_point).startswith("gymnasium.envs.")
    can_terminate = healthy_only and not (of_gymnasium and spec.name in _NEVER_TERMINATE)
    steps = spec.max_episode_steps
    return TaskSpec(task, "Gymnasium", 1, steps, can_terminate, False, steps)


def jax_domain(task: str) -> str | None:
    """Domain of a task that is an environment in JAX (playground/NAME, gymnax/ID, module:function), or None."""
    family, _, rest = task.partition("/")
    if family in ("playground", "gymnax") and rest:
        return {"playground": "Playground", "gymnax": "gymnax"}[family]
    module, _, name = task.rpartition(":")
    if not module or not name.isidentifier():
        return None
    look_in_current_folder()
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception:  # whatever somebody's module raises: `gym_spec` tells
        return None
    return "JAX" if callable(found) and name not in gym.registry else None


def set_tasks(task_set: str | Sequence[str]) -> tuple[str, ...]:
    """Canonical names of a multi-task set's tasks, in the order of their ids: "mt30", "mt80", or a list of names.

    Raises:
        UserError: there is no such set or task, a name stands twice, or the table does not give the task's sizes.
    """
    if isinstance(task_set, str) and task_set not in TASK_SETS:
        raise UserError(f"unknown task set {task_set!r}; there are {' and '.join(TASK_SETS)}, and lists of tasks")
    tasks = TASK_SETS[task_set] if isinstance(task_set, str) else tuple(task_spec(task).name for task in task_set)
    for task in tasks:
        if task not in TASKS or TASKS[task].obs_size is None:
            raise UserError(f"task {task!r} cannot be in a set: only tasks whose sizes the table has can")
        if tasks.count(task) > 1:
            raise UserError(f"task {task!r} stands twice in the set")
    return tasks


def discount_of(task: str) -> float | None:
    """The discount that a task has whatever the length of its episodes, if it has one."""
    return FACTS[task].discount if task in FACTS else None


def score_of(task: str, returns: Any, successes: Any) -> float:
    """Score of a task from its episodes' returns and successes, in percent: the success rate where that is the figure
    of merit, else the mean return between the bounds that count as 0 and as 100."""
    spec = task_spec(task)
    if spec.success:
        return float(100 * successes.mean())
    low, high = 0.0, 1000.0
    if task in FACTS:
        low, high = FACTS[task].low, FACTS[task].high
    share = (returns - low) / (high - low)
    return float(100 * (share.clip(0, 1) if task in FACTS else share).mean())


def set_sizes(tasks: Sequence[str]) -> tuple[int, int]:
    """Sizes of the largest observation and of the largest action of these tasks: those of all others are padded."""
    return max(TASKS[task].obs_size for task in tasks), max(TASKS[task].action_size for task in tasks)


def _canonical(task: str) -> str:
    """`dm_control/ball_in_cup-catch-v0`, `cup_catch` → `cup-catch`; other ids come out as no name of the table."""
    package_id = task.rpartition(":")[2]
    for name, known in PACKAGE_IDS.items():
        if package_id == known:
            return name
    name = re.sub("^ball-in-cup-", "cup-", _canonical_suite(task))
    if name.endswith("-backward") and f"{name}s" in TASKS:  # what Newt calls it
        name += "s"
    if task.startswith("dm_control/"):
        return name if name in TASKS and TASKS[name].domain == "DMControl" else task
    return re.sub(r"^(.*)-v3$", r"mw-\1", name)


def _suite_id(name: str) -> str | None:
    """`quadruped-run` → `dm_control/quadruped-run-v0`: a task of dm_control's suite that is not in the table."""
    if not re.fullmatch("[a-z-]+-[a-z0-9-]+", name) or name.startswith("mw-") or re.search(r"-v\d+$", name):
        return None
    register_dm_control()
    return next((i for i in gym.registry if i.startswith("dm_control/") and _canonical_suite(i) == name), None)


def _canonical_suite(task: str) -> str:
    """`dm_control/point_mass-easy-v0` → `point-mass-easy`."""
    return re.sub(r"^dm_control/(.*)-v0$|^dm_control/(.*)$", r"\1\2", task).replace("_", "-").lower()


def register_dm_control() -> None:
    """Registers the dm_control/ ids with Gymnasium."""
    import_simulator("DMControl")
    with contextlib.redirect_stdout(None):  # where labmaze is not installed, it prints that some ids are missing
        import shimmy  # noqa: F401


def gym_spec(task: str) -> Any:
    """The Gymnasium registry's entry of an id; UserError where there is none."""
    if task.startswith("dm_control/"):
        register_dm_control()
    module, _, env_id = task.rpartition(":")
    if module:
        import_module_of(task, module)
    try:
        return gym.spec(env_id)
    except gym.error.Error:
        raise UserError(f"unknown task {task!r}; {hint_for(task)}python envs.py lists all tasks") from None


def import_module_of(task: str, module: str) -> None:
    """Imports the module that registers a task: one that is installed, or lies beside the script or in the current
    folder."""
    look_in_current_folder()
    try:
        importlib.import_module(module.removesuffix(".py"))
    except Exception as error:  # whatever somebody's module raises
        raise UserError(f"task {task!r} cannot be imported: {reason_of(error)}") from error


def look_in_current_folder() -> None:
    """Modules in the current folder can be imported from here on: Python does not look there when a script is started
    by its path. Worker processes get the path, too."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


# Packages that register their ids when they are imported, and how some of these begin
PACKAGES_OF_IDS = {
    "gymnasium_robotics": "Fetch|HandReach|HandManipulate|AdroitHand|PointMaze|AntMaze|FrankaKitchen",
    "panda_gym": "Panda",
    "highway_env": "highway|merge|roundabout|parking|intersection|racetrack",
    "mo_gymnasium": "mo-",
    "safety_gymnasium": "Safety",
    "ogbench": "pointmaze|antmaze|humanoidmaze|antsoccer|cube-|scene-|puzzle-|powderworld",
}


def hint_for(task: str) -> str:
    """What may have been meant by an id that is not known, as a part of a sentence."""
    if re.fullmatch(r"mt\d+", task):
        return f"that is a set of tasks, for tdmpc2_jax_mt.py --tasks {task}; "
    for module, begins in PACKAGES_OF_IDS.items():
        if re.match(begins, task):
            return f"if it is one of {module}, name that, too: {module}:{task}; "
    names = [*TASKS, *gym.registry]
    without_version = re.sub(r"-v\d+$", "", _canonical(task))
    if f"mw-{without_version}" in TASKS:
        return f"did you mean 'mw-{without_version}'? "
    near = difflib.get_close_matches(task, names, n=3) or difflib.get_close_matches(_canonical(task), names, n=3)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def import_simulator(domain: str) -> None:
    """Imports a domain's simulator such that it touches no GL library, unless the user's MUJOCO_GL wants one.

    dm_control and others bind their renderer when they are imported, and fail there when that one does not work. We
    draw with MuJoCo's own instead (rendering.py), so they can always be told to do without.
    """
    settings = DOMAINS[domain]
    gl = os.environ.get("MUJOCO_GL")
    try:
        with environ(MUJOCO_GL=gl or "disable"):
            importlib.import_module(settings.package)
    except (ImportError, RuntimeError, AttributeError) as error:  # the last: PyOpenGL without its library
        under = f" with MUJOCO_GL={gl}" if gl else ""
        raise UserError(f"{domain} cannot be imported{under} ({error}); to install it: {settings.install}") from error


@contextlib.contextmanager
def environ(**values: str) -> Iterator[None]:
    """Sets environment variables for the length of a with block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def open_gym(task: str, **options: Any) -> gym.Env:
    """The environment of a Gymnasium id, without its time limit (`Task` has one) and Gymnasium's checks (`Guard` has
    its own); one sentence for what may be wrong with it."""
    spec = dataclasses.replace(gym_spec(task), max_episode_steps=None, order_enforce=False, disable_env_checker=True)
    try:
        return gym.make(spec, **options)
    except Exception as error:
        if "unexpected keyword argument 'render_mode'" in str(error):
            raise UserError(f"task {task!r} has no pictures: its constructor takes no render_mode") from error
        raise UserError(f"task {task!r} cannot be made: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What an exception of somebody else's code says, in one line, and where it was raised."""
    text = " ".join(str(error).split()).partition(" was raised from the environment creator")[0]  # gym.make adds it
    if not isinstance(error, gym.error.Error | ImportError):
        text = f"{type(error).__name__}: {text}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        if f"{os.sep}gymnasium{os.sep}" not in last.filename:
            text += f" ({os.path.basename(last.filename)}, line {last.lineno})"
    return one_line(text, 250)
