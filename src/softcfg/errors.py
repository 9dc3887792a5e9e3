"""Errors that are the user's to mend: one clear sentence, exit code 2 on the command line, no traceback."""


class UserError(ValueError):
    """A mistake in what the user gave; the text says what is wrong and what to do about it."""


class CheckpointError(UserError):
    """A weights file that is missing, damaged, unsafe to open, or does not fit the configured model."""
