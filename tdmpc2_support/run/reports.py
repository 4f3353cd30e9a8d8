"""What evaluations leave: a printed table, a JSON file, a film."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy as np
from gymnasium.vector import VectorEnv
from tqdm import tqdm

from tdmpc2_support.envs.tasks import DOMAINS, TaskSpec, task_spec


class Evaluation(NamedTuple):
    """One episode in each of E environments."""

    returns: np.ndarray  # [E]
    successes: np.ndarray  # [E], at the episodes' ends
    frames: list[np.ndarray]  # of the first environment, uint8 [height, width, 3]; none if none were asked for
    fps: int  # frames per second of simulated time


def play(
    envs: VectorEnv, seed: Any, decide: Callable[..., tuple], memory: tuple, go_on: Callable[[], bool], film: bool
) -> Evaluation | None:
    """One episode in each of E environments, of which the first is filmed.

    Args:
        decide: called with observations [E, ...], whether the episodes begin here, bool [E], and *memory; returns
            actions [E, A] and, one by one, the memory for the next call.
        go_on: asked after every step; if it says no, the episodes are left and None is returned.
    """
    obs, _ = envs.reset(seed=seed)
    running, first = np.ones(envs.num_envs, bool), np.ones(envs.num_envs, bool)
    returns, successes = np.zeros(envs.num_envs), np.zeros(envs.num_envs)
    frames = [envs.render()[0]] if film else []
    while running.any():
        action, *memory = decide(obs, first, *memory)
        obs, reward, terminated, truncated, info = envs.step(np.asarray(action))
        if film and running[0]:
            frames.append(envs.render()[0])
        returns += np.where(running, reward, 0.0)
        successes = np.where(running, info["success"], successes)
        running &= ~(terminated | truncated)
        first = np.zeros(envs.num_envs, bool)
        if not go_on():
            return None
    return Evaluation(returns, successes, frames, envs.metadata.get("render_fps", 25))


RETURNS_COLUMNS = ("step", "reward", "success", "seed")  # of eval.csv, where a run is of one task


def returns_head(spec: TaskSpec) -> str:
    """The head of the printed table of `record_returns`."""
    return f"{'step':>10} {'success ' * spec.success}{'return':>9} {'± std':>8} {'minutes':>8}"


def report_returns(args: Any, spec: TaskSpec, result: Evaluation) -> None:
    """Prints the episodes of --evaluate and their mean, and writes them to --json and the film to the agent's folder.

    args is a dataclass with the fields checkpoint, json, mpc and seed.
    """
    returns, successes = result.returns, result.successes
    for i, (episode_return, succeeded) in enumerate(zip(returns, successes, strict=True)):
        print(f"episode {i:3d}  return {episode_return:8.2f}" + (f"  success {succeeded:.0f}" if spec.success else ""))
    rate = f"success rate {successes.mean():.2f}, " if spec.success else ""
    print(f"{spec.name}: {rate}return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")
    if args.json:
        results = {"task": spec.name, "checkpoint": args.checkpoint, "mpc": args.mpc, "seed": args.seed}
        results |= {"returns": returns.tolist(), "successes": successes.tolist()}
        results |= {"mean": returns.mean(), "std": returns.std()}
        results["success_rate"] = successes.mean() if spec.success else None
        write_atomically(Path(args.json), json.dumps(results, indent=2) + "\n")
    report_video(args.checkpoint, result.frames, result.fps)


def report_video(checkpoint: str, frames: list[np.ndarray], fps: int, task: str = "") -> None:
    """Writes the film of --evaluate, if there is one, to the folder of the run (or beside the .pt) and prints where;
    `task` is for its name, where each of several has one."""
    if frames:
        path = Path(checkpoint)  # a file, a run's folder, its checkpoints/ or one of these
        runs = [folder for folder in (path, *path.parents) if (folder / "args.json").exists()]
        name = f"evaluate{f'-{task}' if task else ''}.mp4"
        film = runs[0] / "videos" / name if runs else path.parent / f"{path.stem}-{name}"
        write_video(film, frames, fps)
        print(f"film: {film}")


@contextlib.contextmanager
def evaluating(total: int) -> Iterator[tuple[Callable[[Any], Any], Callable[[], bool]]]:
    """A bar (on a terminal) of so many steps, outside of a run. Gives what `Run.enter` and `Run.aside` give: a function
    that takes what is to be closed in the end and returns it, and one to be called at every step."""
    with contextlib.ExitStack() as stack, tqdm(total=total, desc="evaluating", leave=False, disable=None) as bar:
        yield lambda thing: stack.enter_context(contextlib.closing(thing)), lambda: bar.update() or True


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content, so that a crash leaves the old or the new one whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_video(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """Writes uint8 frames [height, width, 3] as an MP4; heights and widths become even, as H.264 wants them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = frames[0].shape[1::-1]
    video = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2, ffmpeg_log_level="error")
    with contextlib.closing(video):
        video.send(None)
        for frame in frames:
            video.send(np.ascontiguousarray(frame))


# ---------------------------------------------------------------------------------------------------- Several tasks
SCORES_COLUMNS = ("step", "task", "reward", "success", "seed")  # of eval.csv, where a run is of several tasks


class SetEvaluation(NamedTuple):
    """E episodes of each of T tasks."""

    tasks: tuple[str, ...]
    returns: np.ndarray  # [T, E]
    successes: np.ndarray  # [T, E], at the episodes' ends
    frames: list[np.ndarray]  # grids of the tasks' first episodes; none without --capture-video


def grid(pictures: tuple[np.ndarray | None, ...], width: int = 768) -> np.ndarray:
    """The pictures that there are, small ones side by side in rows, uint8 [height, width, 3]."""
    pictures = [picture for picture in pictures if picture is not None]
    columns = int(np.ceil(np.sqrt(len(pictures))))
    step = -(-columns * pictures[0].shape[1] // width)
    pictures = [picture[::step, ::step] for picture in pictures]
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % columns)
    return np.concatenate([np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)])


def summary(result: SetEvaluation) -> dict[str, Any]:
    """Per task its returns and score, per domain the mean, and the normalised score: the mean over tasks of a tenth of
    the return (DMControl: up to 1000) or of the success rate in percent (domains that know success)."""
    tasks, domains = {}, {}
    for task, returns, successes in zip(*result[:3], strict=True):
        spec = task_spec(task)
        score = 100 * successes.mean() if spec.success else returns.mean() / 10
        tasks[task] = {"returns": returns.tolist(), "successes": successes.tolist(), "mean": returns.mean()}
        tasks[task] |= {"std": returns.std(), "success_rate": successes.mean() if spec.success else None}
        tasks[task] |= {"score": score, "domain": spec.domain}
        domains.setdefault(spec.domain, []).append(successes.mean() if spec.success else returns.mean())
    means = {domain: {"mean": np.mean(values), "tasks": len(values)} for domain, values in domains.items()}
    return {"normalized_score": np.mean([row["score"] for row in tasks.values()]), "domains": means, "tasks": tasks}


def headline(results: dict[str, Any]) -> str:
    """The normalised score and the domains' means in one line."""
    words = {True: "success rate {:.2f}", False: "return {:.1f}"}
    means = [
        f"{domain} {words[DOMAINS[domain].success].format(row['mean'])}" for domain, row in results["domains"].items()
    ]
    return f"normalized score {results['normalized_score']:.1f} ({', '.join(means)})"


def report_scores(args: Any, result: SetEvaluation) -> None:
    """Prints the table of --evaluate: tasks, the domains' means and the normalised score; writes it to --json and the
    film to the agent's folder. args is as in `report_returns`."""
    results = summary(result)
    print(f"{'task':<32}{'return':>9}{'± std':>9}{'success':>9}{'score':>8}")
    for name, row in results["tasks"].items():
        rate = "" if row["success_rate"] is None else f"{row['success_rate']:.2f}"
        print(f"{name:<32}{row['mean']:>9.1f}{row['std']:>9.1f}{rate:>9}{row['score']:>8.1f}")
    print(f"{headline(results)} over {len(result.tasks)} task(s), {result.returns.shape[1]} episode(s) each")
    report_video(args.checkpoint, result.frames, 25)
    if args.json:
        results |= {"checkpoint": args.checkpoint, "mpc": args.mpc, "seed": args.seed}
        write_atomically(Path(args.json), json.dumps(results, indent=2) + "\n")


def curve_of(tasks: Sequence[str], several: bool) -> tuple[tuple[str, ...], str]:
    """Columns of eval.csv and head of the printed table, of a run of one task or of several."""
    if several:
        return SCORES_COLUMNS, f"{'update':>10} {'minutes':>8}  result"
    return RETURNS_COLUMNS, returns_head(task_spec(tasks[0]))


def record_each(
    run: Any, step: int, tasks: Sequence[str], evaluate: Sequence[Callable[..., Evaluation | None]]
) -> None:
    """`record_scores` of what these functions, one for each task, return for (seed=..., go_on=...), called one after
    the other; nothing if a signal comes before the last has ended. `Run.record_returns` where the run is of one task.
    """
    if "task" not in run.columns:
        return run.record_returns(step, task_spec(tasks[0]), evaluate[0])
    minutes, results, seed = run.seconds() / 60, [], (run.args["seed"], 1, step)
    with run.aside(f"evaluating at step {step}", sum(task_spec(task).episode_length for task in tasks)) as go_on:
        for play_task in evaluate:
            results.append(play_task(seed=seed, go_on=go_on))
            if results[-1] is None:
                return
    returns, successes, films, _ = zip(*results, strict=True)
    longest = max(map(len, films))  # what has ended stands still
    films = [film + film[-1:] * (longest - len(film)) for film in films]
    frames = [grid(pictures) for pictures in zip(*films, strict=True)]
    record_scores(run, step, minutes, SetEvaluation(tuple(tasks), np.stack(returns), np.stack(successes), frames))


def record_scores(run: Any, step: int, minutes: float, result: SetEvaluation) -> None:
    """Adds an evaluation to the table, the curves and the films of a run (`runs.Run`)."""
    results, rows = summary(result), []
    scalars = {"eval/normalized_score": results["normalized_score"]}
    for task, returns, successes in zip(*result[:3], strict=True):
        rows.append([step, task, returns.mean(), successes.mean(), run.args["seed"]])
        scalars[f"eval/score/{task}"] = results["tasks"][task]["score"]
    scalars |= {f"eval/mean/{domain}": row["mean"] for domain, row in results["domains"].items()}
    run.record(step, f"{step:>10} {minutes:>8.1f}  {headline(results)}", rows, scalars, result.frames, 25)
