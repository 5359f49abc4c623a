"""The one exception that stands for a user's mistake."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: one line with the value, what was expected and the remedy.

    The command line prints the message on rank 0 and exits with status 2; no traceback is shown.
    Broken invariants of our own code are asserts instead.
    """
