"""What evaluations leave: a printed table, a JSON file, a film."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

from domains.tasks import TaskSpec


class Evaluation(NamedTuple):
    """One episode in each of E environments."""

    returns: np.ndarray  # [E]
    successes: np.ndarray  # [E], at the episodes' ends
    frames: list[np.ndarray]  # of the first environment, uint8 [height, width, 3]; none if none were asked for
    fps: int  # frames per second of simulated time


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


def report_video(checkpoint: str, frames: list[np.ndarray], fps: int) -> None:
    """Writes the film of --evaluate, if there is one, to the folder of the run (or beside the .pt) and prints where."""
    if frames:
        path = Path(checkpoint)  # a file, a run's folder, its checkpoints/ or one of these
        runs = [folder for folder in (path, *path.parents) if (folder / "args.json").exists()]
        folder = runs[0] if runs else path.parent
        film = folder / "videos" / f"evaluate-{path.stem}.mp4"
        write_video(film, frames, fps)
        print(f"film: {film}")


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], bool]]:
    """A bar (on a terminal) outside of a run; gives what `Run.aside` gives."""
    with tqdm(total=total, desc=text, leave=False, disable=None) as bar:
        yield lambda: bar.update() or True


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
