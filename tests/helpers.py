"""What tests share: runs and what they leave, processes, replays with episodes whose windows are known."""

import csv
import socket
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdmpc2_support.cli import as_flag, settings
from tdmpc2_support.run.checkpoints import find_checkpoint, read_meta

ROOT = Path(__file__).parent.parent


def as_flags(args):
    """The command line that gives what is not a default in these arguments."""
    defaults = settings(type(args)())
    changed = {name: value for name, value in settings(args).items() if value != defaults[name]}
    return [word for name, value in changed.items() for word in as_flag(name, value).split(" ", 1)]


def meta_of(folder, script="tdmpc2_jax"):
    """What the newest checkpoint of a run says of itself."""
    return read_meta(find_checkpoint(folder), script)


def read_curve(folder):
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    return [int(row["step"]) for row in rows], [float(row["reward"]) for row in rows]


def read_scalars(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def count_of(folder):
    return meta_of(folder, folder.parent.name)["count"]


def wait_for(condition, child, seconds=300):
    """Waits until condition() holds; fails if the child ends before."""
    end = time.time() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.time() < end
        time.sleep(0.001)


def children(pid):
    """The processes that a process has started."""
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids):
    """Whether all processes end within seconds, none left as a zombie."""
    end = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.time() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def jitter(params, scale, seed=0):
    """Parameters that are all different from zero, as fresh ones are not."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    jittered = [np.asarray(p) + scale * rng.normal(size=p.shape).astype(np.float32) for p in leaves]
    return jax.device_put(jax.tree.unflatten(tree, jittered))


def write_episodes(td, agent, seed, capacity, num_envs, steps, ends=0.15):
    """A replay after `steps` steps of environments whose episodes end at random; entries name themselves.

    The observation of an entry is (environment, episode, place in the episode); `valid` has the windows that a stranger
    would call valid, computed from the full history, by the observations of their first entries.
    """
    rng = np.random.default_rng(seed)
    replay = jax.jit(td.init_replay, static_argnums=(0, 1, 2))(agent, capacity, num_envs)
    first, episode, place = np.ones(num_envs, bool), np.zeros(num_envs), np.zeros(num_envs)
    history = []
    for _ in range(steps):
        obs = np.stack([np.arange(num_envs), episode, place], -1).astype(np.float32)
        done = ~first & (rng.random(num_envs) < ends)
        replay = td.add(agent, replay, td.Step(obs, obs[:, 2:], obs[:, 2] * 10, done, first))
        history.append((obs, first))
        episode, place, first = episode + done, np.where(done, 0, place + 1), done
        # the step behind an end is the reset: it opens the next episode
    valid = set()
    for start in range(max(0, steps - capacity), steps - agent.horizon):
        for env in range(num_envs):
            if not any(history[start + k][1][env] for k in range(1, agent.horizon + 1)):
                valid.add(tuple(history[start][0][env].tolist()))
    return replay, valid


def terminations(replay, obs):
    """Which of the entries with these observations [..., 3] are terminations in a replay of `write_episodes`."""
    name = lambda x: np.asarray(x, np.int64) @ [10**6, 10**3, 1]  # noqa: E731
    return np.isin(name(obs), name(replay.obs)[np.asarray(replay.terminated, bool)])


def likelihoods(agent, valid):
    """How likely each valid window is, in the order of `valid` sorted."""
    if getattr(agent, "sample", "windows") == "windows":
        return np.full(len(valid), 1 / len(valid))
    windows_of = Counter(window[:2] for window in valid)  # by environment and episode
    return np.array([1 / len(windows_of) / windows_of[window[:2]] for window in sorted(valid)])


def two_processes():
    """The flags of each of two processes that join each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ("--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2)
    return [(*cluster, "--process-id", i) for i in range(2)]
