"""Recorded episodes in a device's memory, some held out; what networks know of these.

recorded = read_recorded(["walker-walk"], "data", steps=8)   # windows of 9 entries lie within one episode each
print_measures(measures(answers))                            # of networks, on windows that they have not seen
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.data.datasets import Dataset, load_dataset
from tdmpc2_support.devices import available_bytes
from tdmpc2_support.errors import UserError

FRAMES = 3  # pictures in a stack, oldest first; before an episode's first one it is repeated
PICTURES_AT_ONCE = 1024  # that are encoded


class Recorded(NamedTuple):
    """Entries, one episode after the other. An entry is an observation (or what was made of it), the action that led to
    it and the reward it brought; an episode's first entry has zeros for these, which are in no window."""

    obs: jax.Array  # [entries, O]
    action: jax.Array  # [entries, A]
    reward: jax.Array  # [entries]
    task: jax.Array  # [entries] index of the task
    starts: jax.Array  # [W] entries at which windows to learn from start
    held_out: jax.Array  # [V] and those at which windows of the other episodes start


class Windows(NamedTuple):
    """B windows of L+1 consecutive entries; action[j] and reward[j] lead from z[j] to z[j+1]. Functions of a single
    window take it without B."""

    z: jax.Array  # [B, L+1, Z] observations, or the latent states that were made of them
    action: jax.Array  # [B, L, A]
    reward: jax.Array  # [B, L]
    terminated: jax.Array  # [B, L]
    task: jax.Array | None = None  # [B] index of the task, where there are several


def window_starts(
    lengths: np.ndarray, steps: int, tasks: np.ndarray, names: Sequence[str] = ("",)
) -> tuple[np.ndarray, np.ndarray]:
    """Entries at which windows of steps + 1 entries start, in episodes of these lengths and tasks, one after the other:
    those to learn from, and those of every tenth episode of a task, or of the middle one of fewer, which are held out.

    Raises:
        UserError: there are not both, of each task.
    """
    firsts = np.cumsum(lengths) - lengths
    starts = [np.arange(first, first + max(length - steps, 0)) for first, length in zip(firsts, lengths, strict=True)]
    held_out = np.zeros(len(lengths), bool)  # by episode
    for task in np.unique(tasks):
        episodes = np.flatnonzero(tasks == task)
        held_out[episodes] = np.arange(len(episodes)) % 10 == min(5, len(episodes) // 2)
        windows = np.array([len(starts[i]) for i in episodes])
        if not windows[held_out[episodes]].sum() or not windows[~held_out[episodes]].sum():
            task_name = f"{names[task]}: " if len(names) > 1 else ""
            found = f"{len(episodes)} episode(s) of at most {max(lengths[episodes])} entries"
            wanted = f"two or more with windows of {steps + 1} entries are needed"
            raise UserError(f"{task_name}{found} are too few: {wanted}")
    return _joined(itertools.compress(starts, ~held_out)), _joined(itertools.compress(starts, held_out))


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([*arrays, []]).astype(int)


def read_recorded(
    tasks: Sequence[str],
    data_dir: str,
    steps: int,
    made: int,
    encode_stacks: Callable[[np.ndarray, int], jax.Array] | None = None,
) -> Recorded:
    """Episodes of these tasks, in the sizes of the largest, as tdmpc2_jax.py --save-episodes leaves them or as
    `load_dataset` finds them, on the first device.

    Args:
        made: how many numbers the caller makes of an entry's observation.
        encode_stacks: for episodes of pictures, which stay in their files but for a few: called with stacks uint8
            [n, 64, 64, 9] of entries in a row and the number of the first of them, returns what is kept of each.

    Raises:
        UserError: there are none, they are damaged or of other tasks, too few for windows of steps + 1 entries, or more
            than memory can hold.
    """
    data = load_dataset(tasks, data_dir, "rgb" if encode_stacks else "state")
    each = data.action_size + made + (0 if encode_stacks else data.obs_size) + 2  # numbers of an entry
    size = 4 * each * data.num_entries
    free = min(available_bytes(jax.devices()[0]), available_bytes() / 2)  # they pass through the machine's memory
    if size > free:
        takes = f"{data_dir} holds {data.num_entries} entries, {size / 1e9:.1f} GB with what is made of them"
        raise UserError(f"{takes}: {free / 1e9:.1f} GB are free for them")
    data.check_files()
    lengths = np.concatenate([np.full(len(chunk.obs), chunk.obs.shape[1]) for chunk in data.chunks])
    if encode_stacks:
        entries = _encoded(data, lengths, encode_stacks)
    else:
        entries = data.read(0, data.num_entries)
    for i, task in enumerate(tasks):
        if not (entries["task"] == i).any():
            raise UserError(f"{data_dir} holds no episodes of {task}")
    first_entries = np.cumsum(lengths) - lengths
    starts, held_out = window_starts(lengths, steps, entries["task"][first_entries], tasks)
    recorded = Recorded(
        obs=jnp.asarray(entries["obs"], jnp.float32),
        action=jnp.asarray(entries["action"], jnp.float32),
        reward=jnp.asarray(entries["reward"], jnp.float32),
        task=jnp.asarray(entries["task"], jnp.int32),
        starts=jnp.asarray(starts),
        held_out=jnp.asarray(held_out),
    )
    return jax.device_put(recorded, jax.devices()[0])


def _encoded(data: Dataset, lengths: np.ndarray, encode_stacks: Callable) -> dict[str, Any]:
    """All entries as `Dataset.read` returns them, but what was made of pictures in their place."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)  # for each entry the first one of its episode
    parts = []
    for first in range(0, data.num_entries, PICTURES_AT_ONCE):
        last = min(first + PICTURES_AT_ONCE, data.num_entries)
        before = max(first - FRAMES + 1, 0)
        part = data.read(before, last)
        entry = np.arange(first, last)
        frames = [np.maximum(entry - i, starts[first:last]) - before for i in reversed(range(FRAMES))]
        stacks = np.concatenate([part["obs"][rows] for rows in frames], axis=-1)
        part = {name: values[first - before :] for name, values in part.items()}
        parts.append(part | {"obs": np.asarray(encode_stacks(stacks, first))})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def of_one(recorded: Recorded, starts: jax.Array, task: int, number: int) -> jax.Array:
    """At most so many of the windows with these starts that are of this task, evenly spread."""
    return spread_out(starts[recorded.task[starts] == task], number)


def spread_out(starts: jax.Array, number: int) -> jax.Array:
    """At most so many of them, evenly spread."""
    return starts[np.linspace(0, len(starts) - 1, min(number, len(starts))).astype(int)]


def windows_at(recorded: Recorded, starts: jax.Array, steps: int) -> Windows:
    """The windows of steps + 1 entries that start at these [B]. Recorded episodes are whole: none terminates."""
    rows = starts[:, None] + jnp.arange(steps + 1)  # [B, L+1]
    reward = recorded.reward[rows[:, 1:]]
    return Windows(
        z=recorded.obs[rows],
        action=recorded.action[rows[:, 1:]],
        reward=reward,
        terminated=jnp.zeros_like(reward),
        task=recorded.task[starts],
    )


# ---------------------------------------------------------------------------------------------------------- Measures
TINY = 1e-12  # least variance that is divided by: of what never changes it is 0


def nmse(guess: np.ndarray, truth: np.ndarray) -> list[float]:
    """Squared error [F] of latent futures [B, F, Z], in units of the truth's own variance."""
    error = ((guess - truth) ** 2).sum(-1).mean(0)
    variance = ((truth - truth.mean((0, 1))) ** 2).sum(-1).mean(0)
    return (error / np.maximum(variance, TINY)).tolist()


def agreement(guess: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """R2 and rank correlation (Spearman) of guesses [B]."""
    unexplained = ((guess - truth) ** 2).sum() / max(((truth - truth.mean()) ** 2).sum(), TINY)
    ranks = [np.argsort(np.argsort(values)) for values in (guess, truth)]
    return {"r2": float(1 - unexplained), "spearman": float(np.corrcoef(*ranks)[0, 1])}


def variety(actions: np.ndarray) -> dict[str, float]:
    """Standard deviation and correlation of neighbours in time of action sequences [B, F, A]."""
    centred = actions - actions.mean((0, 1))
    lag_1 = (centred[:, 1:] * centred[:, :-1]).mean() / max((centred**2).mean(), TINY)
    return {"std": float(centred.std()), "correlation": float(lag_1)}


def measures(answers: dict[str, Any], action_size: int | None = None) -> dict[str, Any]:
    """How well networks predict held-out windows.

    Args:
        answers: arrays; "futures": for each scale {"true": [B, F, Z], name: [B, F, Z]}; "advantages": {"true": [B],
            name: [B]}; "actions": {name: [B, F, A]}.
        action_size: of the task, if A is that of a larger one.

    Returns:
        {"nmse": {scale: {name: [F]}}, "advantages": {name: {r2, spearman}}, "actions": {name: {std, correlation}}}.
    """
    answers = jax.device_get(answers)
    errors: dict[str, Any] = {}
    for scale, futures in answers["futures"].items():
        errors[scale] = {name: nmse(x, futures["true"]) for name, x in futures.items() if name != "true"}
    truth = answers["advantages"]["true"]
    agreements = {name: agreement(x, truth) for name, x in answers["advantages"].items() if name != "true"}
    varieties = {name: variety(actions[..., :action_size]) for name, actions in answers["actions"].items()}
    return {"nmse": errors, "advantages": agreements, "actions": varieties}


def print_measures(found: dict[str, Any]) -> None:
    """Prints the result of `measures`."""
    first_scale = next(iter(found["nmse"].values()))
    future = len(next(iter(first_scale.values())))
    tokens = [h for h in (1, 2, 4, 8, 16, 32) if h < future] + [future]
    print(f"\n{'NMSE at token':<30}" + "".join(f"{h:>9}" for h in tokens))
    for scale, rows in found["nmse"].items():
        for name, errors in rows.items():
            print(f"{f'{name}, scale {scale}':<30}" + "".join(f"{errors[h - 1]:>9.4f}" for h in tokens))
    for part in ("advantages", "actions"):
        for name, row in found[part].items():
            print(f"{f'{part}: {name}':<30}" + "".join(f"  {key} {value:.3f}" for key, value in row.items()))
