"""Types of arguments with their bounds.

lr: Positive = 3e-4  # learning rate                          a field of a script's `Agent` or `Args`
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple


class Bounds(NamedTuple):
    """What an argument may be, as part of its type."""

    holds: Callable[[Any], bool]
    words: str


Count = Annotated[int, Bounds(lambda x: 1 <= x < 2**31, "a whole number from 1 to 2^31 - 1")]
Several = Annotated[int, Bounds(lambda x: 2 <= x < 2**31, "a whole number from 2 to 2^31 - 1")]
Natural = Annotated[int, Bounds(lambda x: 0 <= x < 2**31, "a whole number from 0 to 2^31 - 1")]
Number = Annotated[float, Bounds(math.isfinite, "a finite number")]
Positive = Annotated[float, Bounds(lambda x: 0 < x < math.inf, "a positive number")]
Weight = Annotated[float, Bounds(lambda x: 0 <= x < math.inf, "a number that is not negative")]
Share = Annotated[float, Bounds(lambda x: 0 <= x <= 1, "a number from 0 to 1")]
Fraction = Annotated[float, Bounds(lambda x: 0 <= x < 1, "a number from 0 to less than 1")]


def is_name(x: str) -> bool:
    """Whether a text can be a folder's name, or a path below one."""
    parts = Path(x).parts
    if not parts or not x.isprintable() or {"/", ".."} & {*parts}:
        return False
    return max(map(len, parts)) <= 100 and len(x) <= 200


def is_new_file(x: str) -> bool:
    """Whether a file of this name could be written."""
    path = Path(x).absolute()
    return path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_dir()


NewFile = Annotated[str, Bounds(is_new_file, "a file in a folder that exists and can be written")]
Name = Annotated[str, Bounds(is_name, "a name of at most 100 characters, or a path below the task's folder")]


def names(*known: str) -> Any:
    """Type of an argument that is one of these names, or several of them with commas where a script takes several."""
    return Annotated[str, Bounds(lambda x: {*x.split(",")} <= {*known}, f"one of {', '.join(known)}")]
