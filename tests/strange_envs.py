"""Environments for tests, named strange_envs:NAME-v0 on the command line."""

import time
from pathlib import Path

import gymnasium as gym
import numpy as np


class Point(gym.Env):
    """A point on a line: two numbers seen, one pushed; the reward is high near 0. Misbehaves as told."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, render_mode=None, bad_reward_at=None, bad_obs_at=None, raise_at=None, terminates=False):
        self.render_mode, self.bad_reward_at, self.bad_obs_at = render_mode, bad_reward_at, bad_obs_at
        self.raise_at, self.terminates, self.steps = raise_at, terminates, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.steps += 1
        if self.steps == self.raise_at:
            raise RuntimeError("the simulator broke")
        self.state[1] = 0.8 * self.state[1] + 0.1 * float(action[0])
        self.state[0] += 0.2 * self.state[1]
        obs, reward = self.state.copy(), float(np.exp(-4 * self.state[0] ** 2))
        if self.steps == self.bad_reward_at:
            reward = float("nan")
        if self.steps == self.bad_obs_at:
            obs[:] = 3e38  # finite, but no network survives it
        fallen = self.terminates and bool(abs(self.state[0]) > 1)
        return obs, reward, fallen, False, {"success": float(fallen)}


class Slow(Point):
    def step(self, action):
        if self.steps >= 40:  # from the second evaluation on
            Path("slow").touch()
            time.sleep(0.2)
        return super().step(action)


class Discrete(Point):
    action_space = gym.spaces.Discrete(3)


class Goal(Point):
    """The point as robots' tasks show it, with success by the name in use there."""

    observation_space = gym.spaces.Dict(
        {"observation": Point.observation_space, "achieved_goal": gym.spaces.Box(-9, 9, (1,))}
    )
    action_space = gym.spaces.Box(-2.0, 2.0, (1, 1), np.float32)

    def observed(self, obs):
        return {"observation": obs, "achieved_goal": obs[:1]}

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return self.observed(obs), info

    def step(self, action):
        obs, *rest, info = super().step(action[0])
        return self.observed(obs), *rest, {"is_success": np.array([True])}


class Pixels(Point):
    """The point as a bright bar in a picture."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def draw(self):
        picture = np.zeros((64, 64, 3), np.uint8)
        column = int(np.clip(32 + 24 * self.state[0], 2, 61))
        picture[:, column - 2 : column + 3] = (255, 160, 80)
        return picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.draw(), {}

    def step(self, action):
        _, *rest = super().step(action)
        return self.draw(), *rest


class LargePixels(Pixels):
    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)

    def draw(self):
        return np.pad(super().draw(), ((16, 16), (16, 16), (0, 0)))


class Pixels84(Pixels):
    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)

    def draw(self):
        return np.pad(super().draw(), ((10, 10), (10, 10), (0, 0)))


class PixelsAndNumbers(Pixels):
    """The bar, and beside it where the point is, how fast it is and on which side; or more than one picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, pictures=("camera",), numbers=True, **kwargs):
        super().__init__(**kwargs)
        self.pictures, spaces = pictures, {name: Pixels.observation_space for name in pictures}
        if numbers:
            spaces |= {"place": gym.spaces.Box(-np.inf, np.inf, (), np.float64), "speed": Point.observation_space}
            spaces["left"] = gym.spaces.Discrete(2)
        self.observation_space = gym.spaces.Dict(spaces)

    def draw(self):
        x, v = self.state
        seen = {name: super(PixelsAndNumbers, self).draw() for name in self.pictures}
        numbers = {"place": np.float64(x), "speed": np.array([v, abs(v)], np.float32), "left": int(x < 0)}
        return seen | {name: value for name, value in numbers.items() if name in self.observation_space.spaces}

    def render(self):
        return super().draw()


class Counting(gym.Env):
    """An observation is the task's number, the episode's and the place in it; the first action is rewarded near 0.5.
    It never ends by itself, and says so in its arguments."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, task=0, actions=1, terminate_when_unhealthy=False):
        self.action_space = gym.spaces.Box(-1.0, 1.0, (actions,), np.float32)
        self.task, self.episode, self.place = task, -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.place = self.episode + 1, 0
        return np.array([self.task, self.episode, 0], np.float32), {}

    def step(self, action):
        self.place += 1
        obs = np.array([self.task, self.episode, self.place], np.float32)
        return obs, float(1 - abs(action[0] - 0.5)), False, False, {"success": self.task / 2}


for name, cls, kwargs in [
    ("Point", Point, {}),
    ("Falling", Point, {"terminates": True}),
    ("NanReward", Point, {"bad_reward_at": 250}),
    ("HugeObs", Point, {"bad_obs_at": 50}),
    ("Raising", Point, {"raise_at": 50}),
    ("Slow", Slow, {}),
    ("Discrete", Discrete, {}),
    ("Goal", Goal, {}),
    ("Pixels", Pixels, {}),
    ("LargePixels", LargePixels, {}),
    ("Pixels84", Pixels84, {}),
    ("PixelsFalling", Pixels, {"terminates": True}),
    ("PixelsAndNumbers", PixelsAndNumbers, {"terminates": True}),
    ("PixelsInDict", PixelsAndNumbers, {"numbers": False}),
    ("TwoCameras", PixelsAndNumbers, {"pictures": ("left_eye", "right_eye")}),
]:
    gym.register(f"{name}-v0", entry_point=cls, max_episode_steps=40, kwargs=kwargs)
for i, length in enumerate((12, 6, 4)):
    kwargs = {"task": i, "actions": 1 + i, "terminate_when_unhealthy": False}
    gym.register(f"Counting{length}-v0", entry_point=Counting, max_episode_steps=length, kwargs=kwargs)
