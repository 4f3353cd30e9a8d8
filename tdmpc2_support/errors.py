"""The one error that a user sees as a sentence."""

import contextlib
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """A mistake of the user; its text is the one sentence to print."""


@contextlib.contextmanager
def writing(what: Any) -> Iterator[None]:
    """Turns what the system says of a file or folder that cannot be written into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or what} cannot be written: {error.strerror or error}") from error


def one_line(text: Any, limit: int = 200) -> str:
    """One short line that a terminal can print, whatever a file has put into the text."""
    text = str(text)
    line = "".join(c if c.isprintable() else "?" for c in text[:limit])
    if len(text) > limit:
        line += "…"
    return line
