"""Embeddings that tell an agent of many tasks what its task is: a table of numbers, one row for each task.

table = read_embeddings(("walker-walk", "cup-catch"), "tasks.json")    # [2, 512]

The language embeddings here and in the files of Newt are of CLIP's text model (openai/clip-vit-base-patch32): its last
hidden states for the text "ROBOT. INSTRUCTION.", averaged over all tokens. Nothing here needs that model.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tdmpc2_support.envs.soup import newt_name
from tdmpc2_support.errors import UserError

UNREADABLE = (OSError, EOFError, BadZipFile, zlib.error, ValueError, KeyError, TypeError, AttributeError)
UNREADABLE = (*UNREADABLE, RecursionError, MemoryError)  # deep nesting, and sizes that a file only claims
SHIPPED = Path(__file__).with_name("embeddings.npz")  # names [tasks], embeddings [tasks, 512]


def read_embeddings(names: Sequence[str], source: str | None) -> np.ndarray | None:
    """The embeddings [T, E] of tasks, float32; None if they are to be learned.

    Args:
        names: of the tasks.
        source: "none" (E = 0), "one-hot" (E = T), "learned", "language" (those that come along) or a file: an .npz of
            `names` and `embeddings`, or a JSON of names with numbers, as Newt's tasks.json. None: "none" for one task;
            "language" if all tasks have one; else "learned".

    Raises:
        UserError: the file cannot be read, a task is not in it, or its numbers are not of one size.
    """
    if source is None:
        source = _default(names)
    if source == "learned":
        return None
    if source == "none":
        return np.zeros((len(names), 0), np.float32)
    if source == "one-hot":
        return np.eye(len(names), dtype=np.float32)
    path = SHIPPED if source == "language" else Path(source)
    known = _read(path)
    missing = [name for name in names if name not in known and newt_name(name) not in known]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        ways = "give a file that has it, or --embeddings learned or one-hot"
        raise UserError(f"{path.name} has no embedding of {', '.join(missing[:3])}{more}: {ways}")
    rows = [np.asarray(known.get(name, known.get(newt_name(name))), np.float32) for name in names]
    if any(row.ndim != 1 or row.shape != rows[0].shape or not np.isfinite(row).all() for row in rows):
        raise UserError(f"{path} holds embeddings that are no vectors of one size")
    table = np.stack(rows)
    _say_equal(names, table)
    return table


def _default(names: Sequence[str]) -> str:
    if len(names) == 1:
        return "none"
    known = _read(SHIPPED)
    return "language" if all(name in known or newt_name(name) in known for name in names) else "learned"


def _read(path: Path) -> Mapping[str, np.ndarray]:
    """Embeddings by name."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                return dict(zip(file["names"].tolist(), file["embeddings"], strict=True))
        content = json.loads(path.read_text())
        found = {}
        for name, entry in content.items():
            numbers = entry
            if isinstance(entry, dict):  # of Newt: beside sizes and texts
                numbers = max((value for value in entry.values() if isinstance(value, list)), key=len, default=[])
            found[name] = np.asarray(numbers, np.float32)
        return found
    except FileNotFoundError:
        words = "a file, or one of learned, one-hot, none and language"
        raise UserError(f"--embeddings {path}: there is no such file ({words})") from None
    except UNREADABLE as error:
        raise UserError(f"{path} holds no embeddings ({type(error).__name__})") from None


def _say_equal(names: Sequence[str], table: np.ndarray) -> None:
    """Says once which tasks an agent cannot tell apart by their embeddings."""
    groups: dict[bytes, list[str]] = {}
    for name, row in zip(names, table, strict=True):
        groups.setdefault(row.tobytes(), []).append(name)
    same = [" = ".join(group) for group in groups.values() if len(group) > 1]
    if same:
        print(f"equal embeddings, so that observations alone tell them apart: {'; '.join(same)}", file=sys.stderr)
