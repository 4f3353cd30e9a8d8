"""DMControl's tasks: 28 of dm_control's suite, and TD-MPC2's own 11 that change a stock one's reward, start or model.

Only dmcontrol.py imports this, when a DMControl task is made. The own tasks subclass the stock ones and change their
models in memory. They read the simulator's arrays by integer indices, looked up once: dm_control's access by name and
its reward function work on arrays and take most of the time of a small model's step. For the same reason the stock
cartpole and walker are written out here once more.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
from dm_control import suite
from dm_control.rl import control
from dm_control.suite import ball_in_cup, cartpole, cheetah, hopper, pendulum, reacher, walker

INF = float("inf")


def load(name: str) -> control.Environment:
    """The dm_control environment of a short name (`walker-walk`, `cup-spin`); seed it with `.task.random.seed`."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # MuJoCo calls a word in the stock cheetah deprecated, each time it is made
    try:
        if name in MADE_HERE:
            physics, task, control_timestep = MADE_HERE[name]()
            return control.Environment(physics, task, control_timestep=control_timestep)
        domain, task_name = name.split("-", 1)
        return suite.load({"cup": "ball_in_cup"}.get(domain, domain), task_name.replace("-", "_"))
    finally:
        log.setLevel(level)


def tol(x: float, low: float, high: float, margin: float, at: float = 0.1, shape: str = "gaussian") -> float:
    """dm_control's `rewards.tolerance` of one number: 1 in [low, high], falling to `at` at `margin` outside of it."""
    if low <= x <= high:
        return 1.0
    if margin == 0:
        return 0.0
    distance = (low - x if x < low else x - high) / margin
    return max(0.0, 1.0 - (1.0 - at) * distance) if shape == "linear" else at ** (distance * distance)


def _sensor(physics: Any, name: str) -> int:
    """Where a sensor's numbers begin in the sensor data."""
    return int(physics.model.sensor_adr[physics.model.name2id(name, "sensor")])


def _double_floor(physics: Any) -> Any:
    """Twice as much floor in x, for tasks that run the other way."""
    physics.model.geom_size[0, 0] *= 2
    return physics


# --- cheetah: backwards, on the front or the back foot, jumping -------------------------------------------------------


class Cheetah(cheetah.Cheetah):
    """Reward: a function of the speed and of the heights of torso, back foot and front foot."""

    def __init__(self, physics: Any, reward: Callable[[float, float, float, float], float]):
        super().__init__()
        self._reward = reward
        self._speed = _sensor(physics, "torso_subtreelinvel")
        self._bodies = [physics.model.name2id(body, "body") for body in ("torso", "bfoot", "ffoot")]

    def get_reward(self, physics: Any) -> float:
        speed, heights = physics.data.sensordata[self._speed], physics.data.xpos[self._bodies, 2]
        return self._reward(float(speed), *heights.tolist())


def _cheetah_backwards(speed: float, torso: float, back: float, front: float) -> float:
    return tol(speed, -INF, -8.0, 8.0, 0.0, "linear")


def _cheetah_on_one_foot(speed: float, torso: float, lifted: float) -> float:
    up = (3 * tol(lifted, 1.2, INF, 0.6) + 2 * tol(torso, 1.2, INF, 0.6)) / 5
    return up * (5 * tol(speed, 6.0, INF, 6.0, 0.0, "linear") + 1) / 6


def _cheetah_on_front(speed: float, torso: float, back: float, front: float) -> float:
    return _cheetah_on_one_foot(speed, torso, back)


def _cheetah_on_back(speed: float, torso: float, back: float, front: float) -> float:
    return _cheetah_on_one_foot(speed, torso, front)


def _cheetah_jump(speed: float, torso: float, back: float, front: float) -> float:
    up = (tol((torso + back) / 2, 1.2, INF, 0.6) + tol((torso + front) / 2, 1.2, INF, 0.6)) / 2
    return (5 * up + tol(speed, -0.5, 0.5, 0.5, 0.0, "linear")) / 6


def _make_cheetah(reward: Callable[[float, float, float, float], float]) -> tuple[Any, Any, float | None]:
    physics = _double_floor(cheetah.Physics.from_xml_string(*cheetah.get_model_and_assets()))
    return physics, Cheetah(physics, reward), None


# --- cartpole ---------------------------------------------------------------------------------------------------------


class Cartpole(cartpole.Balance):
    """The stock tasks with one pole, by index."""

    def __init__(self, physics: Any, swing_up: bool, sparse: bool):
        super().__init__(swing_up, sparse)
        data = physics.data.ptr
        self._qpos, self._qvel, self._ctrl = data.qpos, data.qvel, data.ctrl
        self._pole = data.xmat[physics.model.name2id("pole_1", "body")]

    def get_observation(self, physics: Any) -> OrderedDict:
        position = np.array([self._qpos[0], self._pole[8], self._pole[2]])
        return OrderedDict(position=position, velocity=self._qvel.copy())

    def get_reward(self, physics: Any) -> float:
        cart, cosine = self._qpos.item(0), self._pole.item(8)
        if self._sparse:
            return tol(cart, -0.25, 0.25, 0.0) * tol(cosine, 0.995, 1.0, 0.0)
        centred = (1 + tol(cart, 0.0, 0.0, 2.0)) / 2
        small_control = (4 + max(0.0, 1 - self._ctrl.item(0) ** 2)) / 5
        small_velocity = (1 + tol(self._qvel.item(1), 0.0, 0.0, 5.0)) / 2
        return (cosine + 1) / 2 * small_control * small_velocity * centred


def _make_cartpole(swing_up: bool, sparse: bool) -> tuple[Any, Any, float | None]:
    physics = cartpole.Physics.from_xml_string(*cartpole.get_model_and_assets())
    return physics, Cartpole(physics, swing_up, sparse), None


# --- walker: the stock tasks by index, and backwards ------------------------------------------------------------------


class Walker(walker.PlanarWalker):
    """Stand, and move at `move_speed` or faster; a negative speed is one backwards."""

    def __init__(self, physics: Any, move_speed: float):
        super().__init__(move_speed)
        data, torso = physics.data.ptr, physics.model.name2id("torso", "body")
        self._qvel, self._xmat = data.qvel, data.xmat.reshape(-1)  # a view, as all of these
        self._xx_and_xz = np.arange(9, data.xmat.size).reshape(-1, 9)[:, [0, 2]].ravel()  # of all bodies but the world
        self._torso_position, self._torso_matrix = data.xpos[torso], data.xmat[torso]
        self._velocity = data.sensordata[_sensor(physics, "torso_subtreelinvel") :]

    def get_observation(self, physics: Any) -> OrderedDict:
        orientations, height = self._xmat[self._xx_and_xz], self._torso_position[2]
        return OrderedDict(orientations=orientations, height=height, velocity=self._qvel.copy())

    def get_reward(self, physics: Any) -> float:
        height, upright = self._torso_position.item(2), self._torso_matrix.item(8)
        stand = (3 * tol(height, 1.2, INF, 0.6) + (1 + upright) / 2) / 4
        if self._move_speed == 0:
            return stand
        speed, wanted = self._velocity.item(0), abs(self._move_speed)
        forwards = speed if self._move_speed > 0 else -speed
        return stand * (5 * tol(forwards, wanted, INF, wanted / 2, 0.5, "linear") + 1) / 6


def _make_walker(move_speed: float) -> tuple[Any, Any, float | None]:
    physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
    return (_double_floor(physics) if move_speed < 0 else physics), Walker(physics, move_speed), 0.025


# --- hopper: backwards ------------------------------------------------------------------------------------------------


class BackwardsHopper(hopper.Hopper):
    """Stay up, and hop backwards."""

    def __init__(self, physics: Any):
        super().__init__(hopping=True)
        self._torso, self._foot = (physics.model.name2id(body, "body") for body in ("torso", "foot"))
        self._velocity = _sensor(physics, "torso_subtreelinvel")
        self._touch = [_sensor(physics, "touch_toe"), _sensor(physics, "touch_heel")]

    def get_observation(self, physics: Any) -> OrderedDict:  # the stock one, by index
        data = physics.data
        touch = np.log1p(data.sensordata[self._touch])
        return OrderedDict(position=data.qpos[1:].copy(), velocity=data.qvel.copy(), touch=touch)

    def get_reward(self, physics: Any) -> float:
        height = float(physics.data.xipos[self._torso, 2] - physics.data.xipos[self._foot, 2])
        speed = float(physics.data.sensordata[self._velocity])
        return tol(height, 0.6, 2.0, 0.0) * tol(speed, -INF, -1.0, 0.5, 0.5, "linear")


def _make_hopper() -> tuple[Any, Any, float | None]:
    physics = hopper.Physics.from_xml_string(*hopper.get_model_and_assets())
    return physics, BackwardsHopper(physics), 0.02


# --- pendulum: spinning -----------------------------------------------------------------------------------------------


class SpinningPendulum(pendulum.SwingUp):
    """Spin fast, either way."""

    def __init__(self, physics: Any):
        super().__init__()
        self._pole = physics.model.name2id("pole", "body")

    def get_observation(self, physics: Any) -> OrderedDict:  # the stock one, by index
        data = physics.data
        return OrderedDict(orientation=data.xmat[self._pole, [8, 2]], velocity=data.qvel.copy())

    def get_reward(self, physics: Any) -> float:
        return tol(abs(float(physics.data.qvel[0])), 9.0, INF, 4.5, 0.5, "linear")


def _make_pendulum() -> tuple[Any, Any, float | None]:
    physics = pendulum.Physics.from_xml_string(*pendulum.get_model_and_assets())
    return physics, SpinningPendulum(physics), None


# --- ball in cup: spinning --------------------------------------------------------------------------------------------


class SpinningBall(ball_in_cup.BallInCup):
    """Swing the ball around the cup: fast, far from the target, never in it. Most episodes start with it in there."""

    def __init__(self, physics: Any):
        super().__init__()
        model = physics.model
        self._ball, self._target = model.name2id("ball", "body"), model.name2id("target", "site")
        self._ball_joints = [int(model.jnt_qposadr[model.name2id(joint, "joint")]) for joint in ("ball_x", "ball_z")]
        # The ball is in the target when its centre is this close in x and z.
        self._reach = model.site_size[self._target, [0, 2]] - model.geom_size[model.name2id("ball", "geom"), 0]

    def _to_target(self, physics: Any) -> np.ndarray:
        return physics.data.site_xpos[self._target, [0, 2]] - physics.data.xpos[self._ball, [0, 2]]

    def initialize_episode(self, physics: Any) -> None:
        anywhere = self.random.rand() < 0.1
        while True:
            physics.data.qpos[self._ball_joints] = self.random.uniform(-0.2, 0.2), self.random.uniform(0.2, 0.5)
            physics.after_reset()
            if physics.data.ncon == 0 if anywhere else self._in_target(self._to_target(physics)):
                break
        self.after_step(physics)

    def _in_target(self, to_target: np.ndarray) -> bool:
        return bool((np.abs(to_target) < self._reach).all())

    def get_reward(self, physics: Any) -> float:
        to_target = self._to_target(physics)
        if self._in_target(to_target):
            return 0.0
        distance = float(np.hypot(*to_target))
        speed = float(np.hypot(*physics.data.qvel[self._ball_joints]))
        return (tol(distance, 0.5, INF, 0.25, 0.5, "linear") + 2 * tol(speed, 6.0, INF, 3.0, 0.5, "linear")) / 3


def _make_cup() -> tuple[Any, Any, float | None]:
    physics = ball_in_cup.Physics.from_xml_string(*ball_in_cup.get_model_and_assets())
    return physics, SpinningBall(physics), 0.02


# --- reacher: three links ---------------------------------------------------------------------------------------------


class ThreeLinkReacher(reacher.Reacher):
    """The stock task, by index, on an arm of three links."""

    def __init__(self, physics: Any, target_size: float):
        super().__init__(target_size)
        self._target, self._finger = (physics.model.name2id(geom, "geom") for geom in ("target", "finger"))

    def _to_target(self, physics: Any) -> np.ndarray:
        return physics.data.geom_xpos[self._target, :2] - physics.data.geom_xpos[self._finger, :2]

    def get_observation(self, physics: Any) -> OrderedDict:
        position, velocity = physics.data.qpos.copy(), physics.data.qvel.copy()
        return OrderedDict(position=position, to_target=self._to_target(physics), velocity=velocity)

    def get_reward(self, physics: Any) -> float:
        radii = physics.model.geom_size[[self._target, self._finger], 0].sum()
        return float(np.hypot(*self._to_target(physics)) <= radii)


def _three_link_model() -> str:
    """The stock reacher's XML with its arm cut in two links of 0.09, and three motors."""
    xml, _ = reacher.get_model_and_assets()
    root = ElementTree.fromstring(xml)
    arm0, hand = root.find(".//body[@name='arm']"), root.find(".//body[@name='hand']")
    arm0.remove(hand)
    arm0.set("name", "arm0")
    for element, name in ((arm0.find("geom"), "arm0"), (arm0.find("joint"), "shoulder0")):
        element.set("name", name)
    arm0.find("geom").set("fromto", "0 0 0 0.09 0 0")
    arm1 = ElementTree.SubElement(arm0, "body", name="arm1", pos="0.09 0 0")
    ElementTree.SubElement(arm1, "geom", {**arm0.find("geom").attrib, "name": "arm1"})
    ElementTree.SubElement(arm1, "joint", name="shoulder1", limited="true", range="-80 80")
    hand.set("pos", "0.09 0 0")
    hand.find("body").set("pos", "0.09 0 0")
    hand.find("joint").set("range", "-80 80")
    arm1.append(hand)
    actuators = root.find("actuator")
    actuators.clear()
    for joint in ("shoulder0", "shoulder1", "wrist"):
        ElementTree.SubElement(actuators, "motor", name=joint, joint=joint)
    return ElementTree.tostring(root, encoding="unicode")


def _make_reacher(target_size: float) -> tuple[Any, Any, float | None]:
    physics = reacher.Physics.from_xml_string(_three_link_model(), reacher.get_model_and_assets()[1])
    return physics, ThreeLinkReacher(physics, target_size), None


# Each makes (physics, task, seconds per control step or None for one simulation step).
MADE_HERE: dict[str, Callable[[], tuple[Any, Any, float | None]]] = {
    "cartpole-balance": lambda: _make_cartpole(swing_up=False, sparse=False),
    "cartpole-balance-sparse": lambda: _make_cartpole(swing_up=False, sparse=True),
    "cartpole-swingup": lambda: _make_cartpole(swing_up=True, sparse=False),
    "cartpole-swingup-sparse": lambda: _make_cartpole(swing_up=True, sparse=True),
    "cheetah-run-backwards": lambda: _make_cheetah(_cheetah_backwards),
    "cheetah-run-front": lambda: _make_cheetah(_cheetah_on_front),
    "cheetah-run-back": lambda: _make_cheetah(_cheetah_on_back),
    "cheetah-jump": lambda: _make_cheetah(_cheetah_jump),
    "walker-stand": lambda: _make_walker(0.0),
    "walker-walk": lambda: _make_walker(1.0),
    "walker-run": lambda: _make_walker(8.0),
    "walker-walk-backwards": lambda: _make_walker(-1.0),
    "walker-run-backwards": lambda: _make_walker(-8.0),
    "hopper-hop-backwards": _make_hopper,
    "pendulum-spin": _make_pendulum,
    "cup-spin": _make_cup,
    "reacher-three-easy": lambda: _make_reacher(0.05),
    "reacher-three-hard": lambda: _make_reacher(0.015),
}
