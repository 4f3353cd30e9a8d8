"""Recorded episodes in a device's memory, some held out; what is known of these; tables of planners.

recorded = read_recorded(["walker-walk"], "data", steps=8)   # windows of 9 entries lie within one episode each
print_measures(measures(answers))                            # of networks, on windows that they have not seen
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdmpc2_support.data.datasets import load_dataset
from tdmpc2_support.envs.tasks import task_spec
from tdmpc2_support.errors import UserError
from tdmpc2_support.run.reports import Evaluation, report_video, write_atomically


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
    firsts, held = np.cumsum(lengths) - lengths, np.zeros(len(lengths), bool)
    inside = [np.arange(first, first + max(length - steps, 0)) for first, length in zip(firsts, lengths, strict=True)]
    for task in np.unique(tasks):
        its = np.flatnonzero(tasks == task)
        held[its] = np.arange(len(its)) % 10 == min(5, len(its) // 2)
        windows = np.array([len(inside[i]) for i in its])
        if not windows[held[its]].sum() or not windows[~held[its]].sum():
            where = f"{names[task]}: " * (len(names) > 1)
            entries = f"{len(its)} episode(s) of at most {max(lengths[its])} entries"
            raise UserError(f"{where}{entries} are too few: two or more with windows of {steps + 1} entries are needed")
    starts, held_out = (np.concatenate([*itertools.compress(inside, some), []]).astype(int) for some in (~held, held))
    return starts, held_out


def read_recorded(tasks: Sequence[str], data_dir: str, steps: int) -> Recorded:
    """Episodes of these tasks, in the sizes of the largest, as tdmpc2_jax.py --save-episodes leaves them or as
    `load_dataset` finds them, on the first device.

    Raises:
        UserError: there are none, they are damaged or of other tasks, or too few for windows of steps + 1 entries.
    """
    data = load_dataset(tasks, data_dir)
    data.check_files()
    entries, lengths = data.read(0, data.num_entries), [[chunk.obs.shape[1]] * len(chunk.obs) for chunk in data.chunks]
    lengths, absent = np.concatenate(lengths), {*range(len(tasks))} - {*np.unique(entries["task"]).tolist()}
    if absent:
        raise UserError(f"{data_dir} holds no episodes of {tasks[min(absent)]}")
    starts = window_starts(lengths, steps, entries["task"][np.cumsum(lengths) - lengths], tasks)
    arrays = [jnp.asarray(entries[name], jnp.float32) for name in ("obs", "action", "reward")]
    arrays = [*arrays, jnp.asarray(entries["task"], jnp.int32), *map(jnp.asarray, starts)]
    return jax.device_put(Recorded(*arrays), jax.devices()[0])


def of_one(recorded: Recorded, starts: jax.Array, task: int, number: int) -> jax.Array:
    """At most so many of the windows that start there and are of this task, evenly spread."""
    return spread_out(starts[recorded.task[starts] == task], number)


def spread_out(starts: jax.Array, number: int) -> jax.Array:
    """At most so many of them, evenly spread."""
    return starts[np.linspace(0, len(starts) - 1, min(number, len(starts))).astype(int)]


def windows_at(recorded: Recorded, starts: jax.Array, steps: int) -> Windows:
    """The windows of steps + 1 entries that start at these [B]. Recorded episodes are whole: none terminates."""
    rows = starts[:, None] + jnp.arange(steps + 1)  # [B, L+1]
    reward = recorded.reward[rows[:, 1:]]
    action, ended = recorded.action[rows[:, 1:]], jnp.zeros_like(reward)
    return Windows(recorded.obs[rows], action, reward, ended, recorded.task[starts])


# ---------------------------------------------------------------------------------------------------------- Measures
def nmse(guess: np.ndarray, truth: np.ndarray) -> list[float]:
    """Squared error [F] of latent futures [B, F, Z], in units of the truth's own variance."""
    error, spread = (((x - truth) ** 2).sum(-1).mean(0) for x in (guess, truth.mean((0, 1))))
    return (error / spread).tolist()


def agreement(guess: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """R2 and rank correlation (Spearman) of guesses [B]."""
    unexplained = ((guess - truth) ** 2).sum() / max(((truth - truth.mean()) ** 2).sum(), 1e-12)
    places = [np.argsort(np.argsort(x)) for x in (guess, truth)]
    return {"r2": float(1 - unexplained), "spearman": float(np.corrcoef(*places)[0, 1])}


def variety(actions: np.ndarray) -> dict[str, float]:
    """Standard deviation and correlation of neighbours in time of action sequences [B, F, A]."""
    centred = actions - actions.mean((0, 1))
    lag_1 = (centred[:, 1:] * centred[:, :-1]).mean() / (centred**2).mean()
    return {"std": float(centred.std()), "correlation": float(lag_1)}


def measures(answers: dict[str, Any], action_size: int | None = None) -> dict[str, Any]:
    """What networks know of held-out windows.

    Args:
        answers: arrays; "futures": for each scale {"true": [B, F, Z], name: [B, F, Z]}; "advantages": {"true": [B],
            name: [B]}; "actions": {name: [B, F, A]}.
        action_size: of the task, if A is that of a larger one.

    Returns:
        {"nmse": {scale: {name: [F]}}, "advantages": {name: {r2, spearman}}, "actions": {name: {std, correlation}}}.
    """
    answers = jax.device_get(answers)
    futures, advantages = answers["futures"], answers["advantages"]
    errors = {scale: {k: nmse(x, of["true"]) for k, x in of.items() if k != "true"} for scale, of in futures.items()}
    agreements = {k: agreement(x, advantages["true"]) for k, x in advantages.items() if k != "true"}
    varieties = {name: variety(actions[..., :action_size]) for name, actions in answers["actions"].items()}
    return {"nmse": errors, "advantages": agreements, "actions": varieties}


def print_measures(found: dict[str, Any]) -> None:
    """Prints what `measures` returns."""
    future = len(next(iter(next(iter(found["nmse"].values())).values())))
    at = [h for h in (1, 2, 4, 8, 16, 32) if h < future] + [future]
    print("\n" + f"{'NMSE at token':<30}" + "".join(f"{h:>9}" for h in at))
    for scale, rows in found["nmse"].items():
        for name, errors in rows.items():
            print(f"{f'{name}, scale {scale}':<30}" + "".join(f"{errors[h - 1]:>9.4f}" for h in at))
    for part in ("advantages", "actions"):
        for name, row in found[part].items():
            print(f"{f'{part}: {name}':<30}" + "".join(f"  {key} {value:.3f}" for key, value in row.items()))


# ------------------------------------------------------------------------------------------------ Planners in a table
HOW = ("planner", "scorer", "rollouts")


def table_rows(args: Any) -> Iterator[Any]:
    """The arguments of every row of a table of planners: all combinations of the names in args (a dataclass with the
    fields of `HOW`), but for parts that a planner or scorer ignores."""
    seen = set()
    for row in itertools.product(*(getattr(args, name).split(",") for name in HOW)):
        planner, scorer, rollouts = (row[0], "-", "-") if row[0] in ("mppi", "pi") else row
        rollouts = "-" if scorer == "random" else rollouts
        if (planner, scorer, rollouts) not in seen:
            seen.add((planner, scorer, rollouts))
            yield dataclasses.replace(args, planner=planner, scorer=scorer, rollouts=rollouts)


def compare_planners(
    args: Any, tasks: Sequence[str], evaluate: Callable[[Any, int], Evaluation], know: Callable[[int], dict[str, Any]]
) -> None:
    """What --evaluate leaves: for each task a table of planners, scorers and roll-outs, and what the networks know;
    all of it in --json, and films of the last rows. args has the fields of `HOW`, checkpoint, json and seed.

    Args:
        evaluate: called with the arguments of a row and a task's index.
        know: called with a task's index; returns what `measures` does, or nothing.
    """
    parts = []
    for i, task in enumerate(tasks):
        spec, table = task_spec(task), []
        print(f"\n{task}\n" if len(tasks) > 1 else "", end="")
        rate = f"{'success':>9}" * spec.success
        print(f"{'planner':<10}{'scorer':<8}{'roll-outs':<11}{'return':>8} {'± std':>8}{rate}", flush=True)
        for row in table_rows(args):
            returns, successes, frames, fps = evaluate(row, i)
            rate = f"{successes.mean():>9.2f}" * spec.success
            how = f"{row.planner:<10}{row.scorer:<8}{row.rollouts:<11}"
            print(f"{how}{returns.mean():>8.1f} {returns.std():>8.1f}{rate}", flush=True)
            table.append({name: getattr(row, name) for name in HOW} | {"returns": returns.tolist()})
            table[-1] |= {"successes": successes.tolist()} if spec.success else {}
        if known := know(i):
            print_measures(known)
        parts.append({"task": task, "table": table, "held_out": known})
        report_video(args.checkpoint, frames, fps, task if len(tasks) > 1 else "")
    if args.json:
        parts = parts[0] if len(tasks) == 1 else {"tasks": parts}
        results = {"checkpoint": args.checkpoint, "seed": args.seed} | parts
        write_atomically(Path(args.json), json.dumps(results, indent=2) + "\n")
