"""Recorded episodes of one task in a device's memory, some held out; what is known of these; tables of planners.

recorded = read_recorded("walker-walk", "data", steps=8)     # windows of 9 entries lie within one episode each
print_measures(measures(answers))                            # of networks, on windows that they have not seen
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from domains.tasks import UserError, task_spec
from files.datasets import load_dataset
from files.reports import Evaluation, report_video, write_atomically


class Recorded(NamedTuple):
    """Entries, one episode after the other. An entry is an observation (or what was made of it), the action that led to
    it and the reward it brought; an episode's first entry has zeros for these, which are in no window."""

    obs: jax.Array  # [entries, O]
    action: jax.Array  # [entries, A]
    reward: jax.Array  # [entries]
    starts: jax.Array  # [W] entries at which windows to learn from start
    held_out: jax.Array  # [V] and those at which windows of the other episodes start


def window_starts(lengths: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries at which windows of steps + 1 entries start, in episodes of these lengths, one after the other: those to
    learn from, and those of every tenth episode, or of the middle one of fewer, which are held out.

    Raises:
        UserError: there are not both.
    """
    count, firsts = len(lengths), np.cumsum(lengths) - lengths
    held = np.arange(count) % 10 == min(5, count // 2)
    inside = [np.arange(first, first + max(length - steps, 0)) for first, length in zip(firsts, lengths, strict=True)]
    starts, held_out = (np.concatenate([*itertools.compress(inside, some), []]).astype(int) for some in (~held, held))
    if not len(starts) or not len(held_out):
        entries = f"{count} episode(s) of at most {max(lengths)} entries"
        raise UserError(f"{entries} are too few: two or more with windows of {steps + 1} entries are needed")
    return starts, held_out


def read_recorded(task: str, data_dir: str, steps: int) -> Recorded:
    """The task's episodes, as tdmpc2_jax.py --save-episodes leaves them, on the first device.

    Raises:
        UserError: there are none, they are damaged or of another task, or too few for windows of steps + 1 entries.
    """
    data = load_dataset([task_spec(task).name], data_dir)
    data.check_files()
    lengths = np.concatenate([[chunk.obs.shape[1]] * len(chunk.obs) for chunk in data.chunks])
    starts = window_starts(lengths, steps)
    entries = data.read(0, data.num_entries)
    arrays = [jnp.asarray(entries[name], jnp.float32) for name in ("obs", "action", "reward")]
    return jax.device_put(Recorded(*arrays, *map(jnp.asarray, starts)), jax.devices()[0])


def spread_out(starts: jax.Array, number: int) -> jax.Array:
    """At most so many of them, evenly spread."""
    return starts[np.linspace(0, len(starts) - 1, min(number, len(starts))).astype(int)]


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


def measures(answers: dict[str, Any]) -> dict[str, Any]:
    """What networks know of held-out windows.

    Args:
        answers: arrays; "futures": for each scale {"true": [B, F, Z], name: [B, F, Z]}; "advantages": {"true": [B],
            name: [B]}; "actions": {name: [B, F, A]}.

    Returns:
        {"nmse": {scale: {name: [F]}}, "advantages": {name: {r2, spearman}}, "actions": {name: {std, correlation}}}.
    """
    answers = jax.device_get(answers)
    futures, advantages = answers["futures"], answers["advantages"]
    errors = {scale: {k: nmse(x, of["true"]) for k, x in of.items() if k != "true"} for scale, of in futures.items()}
    agreements = {k: agreement(x, advantages["true"]) for k, x in advantages.items() if k != "true"}
    return {"nmse": errors, "advantages": agreements, "actions": {k: variety(x) for k, x in answers["actions"].items()}}


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


def print_planners(row: Any = None, returns: np.ndarray | None = None) -> None:
    """Prints the table's head or, given the arguments of a row and its returns [E], that row."""
    if row is None:
        print(f"{'planner':<10}{'scorer':<8}{'roll-outs':<11}{'return':>8} {'± std':>8}")
    else:
        mean, std = returns.mean(), returns.std()
        print(f"{row.planner:<10}{row.scorer:<8}{row.rollouts:<11}{mean:>8.1f} {std:>8.1f}", flush=True)


def report_planners(
    args: Any, task: str, rows: list[tuple[Any, np.ndarray]], known: dict[str, Any], last: Evaluation
) -> None:
    """Prints what networks know (`measures`; or nothing); writes it and the rows of the table, pairs of arguments and
    returns, to --json, and the film of the last row; args has the fields checkpoint, json and seed."""
    if known:
        print_measures(known)
    if args.json:
        table = [{name: getattr(row, name) for name in HOW} | {"returns": returns.tolist()} for row, returns in rows]
        results = {"task": task, "checkpoint": args.checkpoint, "seed": args.seed, "table": table, "held_out": known}
        write_atomically(Path(args.json), json.dumps(results, indent=2) + "\n")
    report_video(args.checkpoint, last.frames, last.fps)
