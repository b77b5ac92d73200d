"""The errors that are a user's to fix."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Bad input: one sentence that names the file, key, row or sample, its value and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Inside, the sentence of a :class:`UserError` gets ``where`` in front."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def nearest(word: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the choice spelled most like ``word``, or the list of choices if none is close."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (choices: {', '.join(choices)})" if choices else ""
