"""What can go wrong, by whose mistake, and the exit status that says so.

Every message is one line that names the culprit, the place, what was found, what was
expected and the nearest valid choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 12  # names that a message lists


class RwftError(Exception):
    """Anything this library raises on purpose; `exit_status` is what the command line ends with."""

    exit_status = 1


class UserError(RwftError, ValueError):
    """A mistake in a config, in data or in an objective: the user can mend it."""

    exit_status = 2


class ConfigError(UserError):
    """A key, value or combination of settings that makes no sense."""


class DataError(UserError):
    """A row, file or column that cannot be trained on as it is."""


class ObjectiveError(UserError):
    """An objective (or adapter, regularizer, verifier) that breaks its contract."""


class PolicyError(UserError):
    """A model that cannot be trained correctly here."""


class CheckpointError(RwftError):
    """A checkpoint that cannot be trusted, or none that can."""

    exit_status = 3


class SaveError(RwftError):
    """A checkpoint that could not be written; the previous one is intact."""

    exit_status = 4


class NonFiniteError(RwftError):
    """A loss, weight or gradient that is not finite; the parameters were not touched."""

    exit_status = 5


class Interrupted(RwftError):
    """The run was asked to stop, finished its step and saved; `exit_status` is 128 + the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.exit_status - 128)  # so that it travels between processes whole


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence that offers the nearest of `choices` to `name`, or lists them all."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    if not known:
        return "there are none"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"known: {', '.join(known[:LISTED])}{more}"
