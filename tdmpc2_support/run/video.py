"""Films of evaluations."""

import contextlib
import errno
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from tdmpc2_support.files import new_file
from tdmpc2_support.processes import held_back


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Writes uint8 frames [height, width, 3] as an MP4, whole or not at all; heights and widths become even, as H.264
    wants them.

    imageio_ffmpeg has a function for this, which forks a process that has JAX's threads: that may hang, and says so.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    taken = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()
    made = f"-an -pix_fmt yuv420p -crf 25 -vf scale={width + width % 2}:{height + height % 2} -f mp4 -y".split()
    with new_file(path) as temporary:
        command = [_ffmpeg(path), "-v", "error", *taken, *made, str(temporary)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with held_back():  # what ends the run is not for it
            process = subprocess.Popen(command, **pipes)
        with process:
            with contextlib.suppress(BrokenPipeError):  # its exit status and last words tell more
                for frame in frames:
                    process.stdin.write(np.ascontiguousarray(frame))
            _, said = process.communicate()
        if process.returncode:
            lines = said.decode(errors="replace").split("\n")
            full = "No space left" in said.decode(errors="replace")
            reason = "No space left on device" if full else f"ffmpeg says: {lines[0]}"
            raise OSError(errno.ENOSPC if full else errno.EIO, reason, str(path))


def _ffmpeg(path: Path) -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise OSError(errno.ENOENT, "there is no ffmpeg", str(path)) from None


def thumbnails(pictures: Sequence[np.ndarray | None], number: int, width: int = 768) -> list[np.ndarray]:
    """The pictures that are not None, as small as `number` of them must be to stand side by side in `grid`."""
    shown = [picture for picture in pictures if picture is not None]
    widest = max(picture.shape[1] for picture in shown)
    step = -(-columns_of(number) * widest // width)
    return [picture[::step, ::step] for picture in shown]


def columns_of(number: int) -> int:
    return int(np.ceil(np.sqrt(number)))


def grid(pictures: Sequence[np.ndarray | None]) -> np.ndarray:
    """The pictures that are not None, made small, side by side in rows on black: uint8 [height, width, 3]. Each has as
    much room as the largest."""
    shown = thumbnails(pictures, sum(picture is not None for picture in pictures))
    columns = columns_of(len(shown))
    rows = -(-len(shown) // columns)
    height, width = np.max([picture.shape[:2] for picture in shown], axis=0)
    canvas = np.zeros((rows, height, columns, width, 3), np.uint8)
    for i, picture in enumerate(shown):
        row, column = divmod(i, columns)
        canvas[row, : picture.shape[0], column, : picture.shape[1]] = picture
    return canvas.reshape(rows * height, columns * width, 3)


def side_by_side(films: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    """One film of several, of different lengths: those that have ended stand still."""
    longest = max(map(len, films))
    films = [film + film[-1:] * (longest - len(film)) for film in films]
    return [grid(pictures) for pictures in zip(*films, strict=True)]
