"""Errors that are the user's to mend: one clear sentence, exit code 2 on the command line, no traceback."""

from __future__ import annotations

import operator
import reprlib

LONGEST_SENTENCE = 2000  # characters


def clean(text: object, longest: int = LONGEST_SENTENCE) -> str:
    """Make text from a file, a name or a person safe to print on a line.

    What a terminal would act on or cannot show (control characters, escape sequences, marks that turn the direction of
    writing, halves of characters) is written as an escape such as \\x1b, and the text is cut to `longest` characters.
    """
    text = str(text)
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _ShortRepr(reprlib.Repr):
    """`repr` of a few entries and levels, whatever the size of the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python refuses to write numbers of many thousand digits
            return f"a number of {x.bit_length():,} bits"


_SHORT = _ShortRepr()


def quote(value: object) -> str:
    """Show a value from a file or a person in a message: `repr`, clean and cut to a few entries and levels."""
    return clean(_SHORT.repr(value), 500)


class UserError(ValueError):
    """A mistake in what the user gave; the text says what is wrong and what to do about it.

    The text is one line that is safe to print, whatever was quoted in it; see `clean`.
    """

    def __init__(self, text: object) -> None:
        super().__init__(clean(text))


def require_whole(value: object, name: str, least: int) -> None:
    """Raise `UserError` unless `value`, which goes by `name`, is a whole number from `least` on."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise UserError(f"{name} must be a whole number, got {quote(value)}")
    if number < least:
        raise UserError(f"{name} must be at least {least}, got {quote(value)}")


class CheckpointError(UserError):
    """A weights file that is missing, damaged, unsafe to open, or does not fit the configured model."""
