"""Errors a person can act on: one sentence with what is wrong, the value seen, where, and the remedy."""

from __future__ import annotations


class VdamkitError(Exception):
    """Base of every error vdamkit raises on purpose; its text is complete and needs no traceback."""


class InputError(VdamkitError):
    """Something in the user's files is wrong; the text names file, row, column, value and remedy."""


class SettingsError(VdamkitError):
    """An option has a value that cannot work; the text names the option, the value and what is allowed."""


class OutputError(VdamkitError):
    """A result could not be written; nothing already computed is lost."""


class ParticleError(InputError):
    """One particle cannot be used (truncated, NaN, all zero); the run reports it and goes on without it."""

    def __init__(self, message: str, *, index: int | None = None):
        super().__init__(message)
        self.index = index
