"""The one error that a user sees as a sentence."""

from typing import Any


class UserError(Exception):
    """A mistake of the user; its text is the one sentence to print."""


def one_line(text: Any, limit: int = 200) -> str:
    """One short line that a terminal can print, whatever a file has put into the text."""
    text = str(text)
    line = "".join(c if c.isprintable() else "?" for c in text[:limit])
    if len(text) > limit:
        line += "…"
    return line
