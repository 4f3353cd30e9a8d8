"""Demonstrations: recorded episodes of several tasks, of any lengths, to begin with.

episodes = read_demonstrations(("walker-walk", "mw-reach"), "data", best=20)
steps = in_columns(episodes, num_tasks=2, num_envs=2, obs_dim=128, action_dim=16, multiple=500)   # as a replay has them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tdmpc2_support.data.datasets import load_dataset
from tdmpc2_support.data.pt import load_pt
from tdmpc2_support.envs.soup import newt_name
from tdmpc2_support.errors import UserError


class Episode(NamedTuple):
    """One episode of L decisions. Entry 0 is the reset, whose action and reward are zeros; entry i holds the action
    that led to its observation and the reward that it brought."""

    task: int  # place among the names
    obs: np.ndarray  # [L+1, O]
    action: np.ndarray  # [L+1, A]
    reward: np.ndarray  # [L+1]
    terminated: np.ndarray  # [L+1] true at the end of an episode that the environment has ended, not its time limit


def read_demonstrations(names: Sequence[str], folder: str | os.PathLike, best: int | None = None) -> list[Episode]:
    """The episodes of these tasks in a folder, those of the first task first. A task's are in TASK/chunk_0.pt, … as
    `EpisodeWriter` leaves them, or in TASK.pt as mmbench has them: a TensorDict [rows] of obs, action, reward and
    episode, and perhaps terminated. Tasks without any are named, and no mistake.

    Args:
        best: of each task take so many, those with the highest returns.

    Raises:
        UserError: there are none at all, or a file cannot be read, is damaged, or is of another task.
    """
    episodes = []
    missing = []
    for task, name in enumerate(names):
        files = [Path(folder, f"{known}.pt") for known in dict.fromkeys((name, newt_name(name)))]
        file = next((path for path in files if path.exists()), None)
        if Path(folder, name).is_dir():
            found = _from_dataset(task, name, folder)
        elif file is not None:
            found = _from_rows(task, file)
        else:
            missing.append(name)
            continue
        order = sorted(range(len(found)), key=lambda i: -float(found[i].reward.sum()))
        kept = {*order[: best or len(found)]}
        episodes += [episode for i, episode in enumerate(found) if i in kept]
    if not episodes:
        raise UserError(f"{folder} holds no demonstrations: neither {names[0]}/chunk_0.pt nor {names[0]}.pt, …")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        print(f"{folder} holds no demonstrations of {', '.join(missing[:5])}{more}", file=sys.stderr)
    return episodes


def _from_dataset(task: int, name: str, folder: str | os.PathLike) -> list[Episode]:
    data = load_dataset((name,), folder)
    data.check_files()
    entries = data.read(0, data.num_entries)
    lengths = np.concatenate([np.full(len(chunk.obs), chunk.obs.shape[1]) for chunk in data.chunks])
    bounds = np.cumsum(lengths)[:-1]
    columns = [np.split(entries[key], bounds) for key in ("obs", "action", "reward")]
    columns.append([np.zeros(length, bool) for length in lengths])  # only whole episodes are written
    return [Episode(task, *arrays) for arrays in zip(*columns, strict=True)]


def _from_rows(task: int, path: Path) -> list[Episode]:
    content: Any = load_pt(path)
    wanted = {"obs": 2, "action": 2, "reward": 1, "episode": 1}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), np.ndarray) for key in wanted):
        raise UserError(f"{path} holds no demonstrations: it must hold {', '.join(wanted)}")
    arrays = {}
    if isinstance(content.get("terminated"), np.ndarray):
        wanted["terminated"] = 1
    for key, ndim in wanted.items():
        array = content[key]
        if ndim == 1:
            array = array.reshape(len(array), -1)[:, 0] if array.ndim and array.size == len(array) > 0 else array
        if array.ndim != ndim or len(array) != len(content["obs"]) or not array.size:
            raise UserError(f"{path}: {key} has shape {content[key].shape}")
        arrays[key] = array
    terminated = arrays.get("terminated", np.zeros(len(arrays["reward"]))).astype(bool)
    ids = arrays["episode"]
    firsts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
    inner = np.ones(len(ids), bool)
    inner[firsts] = False
    episodes = []
    for key in ("action", "reward"):
        filled = np.array(arrays[key], np.float32)
        filled[~inner] = 0  # filler
        arrays[key] = filled
    for key in ("obs", "action", "reward"):
        finite = np.isfinite(arrays[key]).reshape(len(ids), -1).all(1)
        if not finite.all():
            raise UserError(f"{path}: {key} of episode {ids[~finite][0]} is not finite")
    for rows in np.split(np.arange(len(ids)), firsts[1:]):
        obs, action, reward = (arrays[key][rows] for key in ("obs", "action", "reward"))
        episodes.append(Episode(task, obs, action, reward, terminated[rows]))
    return episodes


def in_columns(
    episodes: Sequence[Episode], num_tasks: int, num_envs: int, obs_dim: int, action_dim: int, multiple: int
) -> dict[str, np.ndarray]:
    """Episodes in the columns of a replay: a task's in those of its environments, one behind the other. Columns end
    together; rows before their first episodes are resets that belong to no window.

    Args:
        num_envs: number n of columns, as many for each task.
        obs_dim, action_dim: smaller observations and actions are padded with zeros.
        multiple: the number of rows R is a multiple of this.

    Returns:
        obs [R, n, O], action [R, n, A], reward, terminated, first [R, n].

    Raises:
        UserError: an observation or an action has numbers beyond these sizes.
    """
    each = num_envs // num_tasks
    columns: list[list[Episode]] = [[] for _ in range(num_envs)]
    height = np.zeros(num_envs, int)
    for episode in episodes:
        own = slice(episode.task * each, (episode.task + 1) * each)
        column = own.start + int(np.argmin(height[own]))  # the shortest of the task's
        columns[column].append(episode)
        height[column] += len(episode.reward)
    R = -(-int(height.max()) // multiple) * multiple
    steps = {
        "obs": np.zeros((R, num_envs, obs_dim), np.float32),
        "action": np.zeros((R, num_envs, action_dim), np.float32),
        "reward": np.zeros((R, num_envs), np.float32),
        "terminated": np.zeros((R, num_envs), bool),
        "first": np.ones((R, num_envs), bool),
    }
    for column, own_episodes in enumerate(columns):
        row = R - height[column]
        for episode in own_episodes:
            rows = slice(row, row + len(episode.reward))
            for key in ("obs", "action"):
                values = getattr(episode, key)
                width = min(values.shape[1], steps[key].shape[2])
                if values[:, width:].any():
                    raise UserError(f"a demonstration has {key} of {values.shape[1]} numbers, the agent's have {width}")
                steps[key][rows, column, :width] = values[:, :width]
            steps["reward"][rows, column] = episode.reward
            steps["terminated"][rows, column] = episode.terminated
            steps["first"][rows, column] = np.arange(len(episode.reward)) == 0
            row += len(episode.reward)
    return steps
