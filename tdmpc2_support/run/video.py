"""Films of evaluations."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Writes uint8 frames [height, width, 3] as an MP4; heights and widths become even, as H.264 wants them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = frames[0].shape[1::-1]
    video = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2, ffmpeg_log_level="error")
    with contextlib.closing(video):
        video.send(None)
        for frame in frames:
            video.send(np.ascontiguousarray(frame))


def thumbnails(pictures: Sequence[np.ndarray | None], number: int, width: int = 768) -> list[np.ndarray]:
    """The pictures that are not None, as small as `number` of them must be to stand side by side in `grid`."""
    shown = [picture for picture in pictures if picture is not None]
    step = -(-columns_of(number) * shown[0].shape[1] // width)
    return [picture[::step, ::step] for picture in shown]


def columns_of(number: int) -> int:
    return int(np.ceil(np.sqrt(number)))


def grid(pictures: Sequence[np.ndarray | None]) -> np.ndarray:
    """The pictures that are not None, made small, side by side in rows: uint8 [height, width, 3]."""
    shown = thumbnails(pictures, sum(picture is not None for picture in pictures))
    columns = columns_of(len(shown))
    shown += [np.zeros_like(shown[0])] * (-len(shown) % columns)
    rows = [np.concatenate(shown[i : i + columns], axis=1) for i in range(0, len(shown), columns)]
    return np.concatenate(rows)


def side_by_side(films: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    """One film of several, of different lengths: those that have ended stand still."""
    longest = max(map(len, films))
    films = [film + film[-1:] * (longest - len(film)) for film in films]
    return [grid(pictures) for pictures in zip(*films, strict=True)]
