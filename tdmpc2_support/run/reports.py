"""What an evaluation returns, and what --evaluate prints of it and writes to --json."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tdmpc2_support.envs.tasks import DOMAINS, TaskSpec, score_of, task_spec
from tdmpc2_support.errors import UserError, writing
from tdmpc2_support.files import write_atomically
from tdmpc2_support.run.video import side_by_side, write_video

RETURNS_COLUMNS = ("step", "reward", "success", "seed")  # of eval.csv, where a run is of one task
SCORES_COLUMNS = ("step", "task", "reward", "success", "seed")  # and where it is of several
SCORES_HEAD = f"{'update':>10} {'minutes':>8}  result"  # head of the printed table, where a run is of several tasks


class Evaluation(NamedTuple):
    """One episode in each of E environments."""

    returns: np.ndarray  # [E]
    successes: np.ndarray  # [E], at the episodes' ends
    frames: list[np.ndarray]  # of the first environment, uint8 [height, width, 3]; none if none were asked for
    fps: int = 25  # frames per second of simulated time


class SetEvaluation(NamedTuple):
    """E episodes of each of T tasks; or lists [T] of arrays, if there are more of some."""

    tasks: tuple[str, ...]
    returns: np.ndarray | list[np.ndarray]  # [T, E]
    successes: np.ndarray | list[np.ndarray]  # [T, E], at the episodes' ends
    frames: list[np.ndarray]  # grids of the tasks' first episodes; none without --capture-video
    fps: int = 25


def joined(tasks: tuple[str, ...], parts: Sequence[tuple[np.ndarray, np.ndarray, list]]) -> SetEvaluation:
    """The evaluation of all tasks from those of some of them at a time, each as returns and successes of all episodes,
    those of the first task first, and for every step a picture of each task (or no steps)."""
    returns, successes = (np.concatenate([part[i] for part in parts]).reshape(len(tasks), -1) for i in range(2))
    films = [list(film) for _, _, frames in parts for film in zip(*frames, strict=True)]
    return SetEvaluation(tasks, returns, successes, side_by_side(films) if films else [])


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar (on a terminal) of so many steps; yields the function that advances it."""
    with tqdm(total=total, desc="evaluating", leave=False, disable=None) as bar:
        yield lambda: bar.update() and None


# ---------------------------------------------------------------------------------------------------------- One task
def returns_head(spec: TaskSpec) -> str:
    """The head of the printed table of a run of one task."""
    rate = "success " if spec.success else ""
    return f"{'step':>10} {rate}{'return':>9} {'± std':>8} {'minutes':>8}"


def report_returns(args: Any, spec: TaskSpec, result: Evaluation) -> None:
    """Prints the episodes of --evaluate and their mean, and writes them to --json and the film to the agent's folder.

    args has the fields checkpoint, json, seed and agent.mpc.
    """
    returns = result.returns
    successes = result.successes
    for i, (episode_return, succeeded) in enumerate(zip(returns, successes, strict=True)):
        print(f"episode {i:3d}  return {episode_return:8.2f}" + (f"  success {succeeded:.0f}" if spec.success else ""))
    rate = f"success rate {successes.mean():.2f}, " if spec.success else ""
    print(f"{spec.name}: {rate}return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")
    if args.json:
        results = {"task": spec.name, "checkpoint": args.checkpoint, "mpc": args.agent.mpc, "seed": args.seed}
        results |= {"returns": returns.tolist(), "successes": successes.tolist()}
        results |= {"mean": returns.mean(), "std": returns.std()}
        results["success_rate"] = successes.mean() if spec.success else None
        write_results(args.json, results)
    report_video(args.checkpoint, result.frames, result.fps)


def write_results(path: str, results: dict[str, Any]) -> None:
    """Writes --json."""
    with writing(path):
        write_atomically(Path(path), json.dumps(results, indent=2) + "\n")


def report_video(checkpoint: str, frames: list[np.ndarray], fps: int, task: str = "") -> None:
    """Writes the film of --evaluate, if there is one, to the folder of the run (or beside the .pt) and prints where;
    `task` is for its name, where each of several has one."""
    if not frames:
        return
    film = film_path(checkpoint, task)
    with writing(film):
        write_video(film, frames, fps)
    print(f"film: {film}")


def film_path(checkpoint: str, task: str = "") -> Path:
    """Where the film of --evaluate goes: into the folder of the run, beside the .pt or, where neither can be written,
    into the current folder.

    Raises:
        UserError: that cannot be written, either.
    """
    path = Path(checkpoint)  # a file, a run's folder, its checkpoints/ or one of these
    runs = [folder for folder in (path, *path.parents) if os.path.exists(folder / "args.json")]
    name = f"evaluate-{task}.mp4" if task else "evaluate.mp4"
    film = runs[0] / "videos" / name if runs else path.parent / f"{path.stem}-{name}"
    for place in (film, Path(film.name)):
        folder = next(parent for parent in place.absolute().parents if os.path.isdir(parent))
        if os.access(folder, os.W_OK):
            return place
    raise UserError(f"--capture-video: neither {film.parent} nor the current folder can be written")


# ----------------------------------------------------------------------------------------------------- Several tasks
def summary(result: SetEvaluation) -> dict[str, Any]:
    """Per task the returns and the score (`score_of`), per domain the mean, and the normalised score: the mean over
    tasks of a tenth of the return (DMControl: up to 1000) or of the success rate in percent (domains that know it)."""
    tasks = {}
    values: dict[str, list[float]] = {}
    for task, returns, successes in zip(result.tasks, result.returns, result.successes, strict=True):
        spec = task_spec(task)
        tasks[task] = {
            "returns": returns.tolist(),
            "successes": successes.tolist(),
            "mean": returns.mean(),
            "std": returns.std(),
            "success_rate": successes.mean() if spec.success else None,
            "score": score_of(task, returns, successes),
            "domain": spec.domain,
        }
        values.setdefault(spec.domain, []).append(successes.mean() if spec.success else returns.mean())
    domains = {domain: {"mean": np.mean(means), "tasks": len(means)} for domain, means in values.items()}
    score = np.mean([row["score"] for row in tasks.values()])
    return {"normalized_score": score, "domains": domains, "tasks": tasks}


def headline(results: dict[str, Any]) -> str:
    """The normalised score and the domains' means in one line."""
    means = []
    for domain, row in results["domains"].items():
        success = domain in DOMAINS and DOMAINS[domain].success
        words = f"success rate {row['mean']:.2f}" if success else f"return {row['mean']:.1f}"
        means.append(f"{domain} {words}")
    return f"normalized score {results['normalized_score']:.1f} ({', '.join(means)})"


def report_scores(args: Any, result: SetEvaluation) -> None:
    """Prints the table of --evaluate: tasks, the domains' means and the normalised score; writes it to --json and the
    film to the agent's folder. args is as in `report_returns`."""
    results = summary(result)
    print(f"{'task':<32}{'return':>9}{'± std':>9}{'success':>9}{'score':>8}")
    for name, row in results["tasks"].items():
        rate = "" if row["success_rate"] is None else f"{row['success_rate']:.2f}"
        print(f"{name:<32}{row['mean']:>9.1f}{row['std']:>9.1f}{rate:>9}{row['score']:>8.1f}")
    numbers = sorted({len(returns) for returns in result.returns})
    each = f"{numbers[0]} episode(s) each" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} episodes each"
    print(f"{headline(results)} over {len(result.tasks)} task(s), {each}")
    if args.json:
        results |= {"checkpoint": args.checkpoint, "mpc": args.agent.mpc, "seed": args.seed}
        write_results(args.json, results)
    report_video(args.checkpoint, result.frames, result.fps)
