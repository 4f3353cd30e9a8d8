"""The one error that a user sees as a sentence."""


class UserError(Exception):
    """A mistake of the user; its text is the one sentence to print."""
