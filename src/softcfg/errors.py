"""Errors that are the user's to mend: one clear sentence, exit code 2 on the command line, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import operator
import reprlib
from collections.abc import Iterable, Iterator, Mapping

from softcfg.version import __version__

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


def suggestion(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.5) -> str:
    """ "did you mean ONE or OTHER?" with the known names that are like `name`; empty if none is.

    Capitals count as small letters, and underscores as hyphens.
    """
    spelt = {_plain(each): each for each in known}
    near = difflib.get_close_matches(_plain(name[:100]), spelt, n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(spelt[each] for each in near)}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").lstrip("-")


class UserError(ValueError):
    """A mistake in what the user gave; the text says what is wrong and what to do about it.

    The text is one line that is safe to print, whatever was quoted in it; see `clean`.
    """

    def __init__(self, text: object) -> None:
        super().__init__(clean(text))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a `ValueError`, with which `softcfg.guidance` and settings refuse a value, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(error) from error


class UnexpectedArgumentError(UserError, TypeError):
    """A keyword that a function does not take.

    Args:
        function: its name, as users call it.
        known: the keywords that it takes.
        foreign: words of other libraries, and what they are called here.
    """

    def __init__(
        self, function: str, name: str, known: Iterable[str], foreign: Mapping[str, str] | None = None
    ) -> None:
        local = (foreign or {}).get(name)
        hint = f"did you mean {local}?" if local else suggestion(name, known, most=1, cutoff=0.6)
        super().__init__(f"{function} takes no {name}{hint and '; '}{hint}")


def how_to_install(extra: str) -> str:
    """How the packages of an extra are installed: the one way, from the clone or a wheel."""
    return f"pip install '.[{extra}]' in the clone, or 'softcfg-{__version__}-py3-none-any.whl[{extra}]' from a wheel"


@contextlib.contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Turn a failed import into a sentence: what needs which package, such as "device_map needs Accelerate"."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what.format(error.name)}: {how_to_install(extra)}") from error


def require_name(name: str, known: Iterable[str], problem: str) -> str:
    """Return `name` if it is known, or raise a `UserError` that starts with `problem` and suggests near names."""
    known = list(known)
    if name in known:
        return name
    hint = suggestion(name, known) if isinstance(name, str) else ""
    raise UserError(f"{problem} {quote(name)}; {hint or 'known: ' + ', '.join(known)}")


def require_kind(value: object, name: str, kind: type) -> None:
    """Raise `UserError` unless `value`, which goes by `name`, is a `kind`."""
    if not isinstance(value, kind):
        raise UserError(f"{name} must be a {kind.__name__}, got {quote(value)}")


def require_whole(value: object, name: str, least: int) -> int:
    """Return `value`, which goes by `name`; raise `UserError` unless it is a whole number from `least` on."""
    number = _whole(value)
    if number is None:
        raise UserError(f"{name} must be a whole number, got {quote(value)}")
    if number < least:
        raise UserError(f"{name} must be at least {least}, got {quote(value)}")
    return number


def require_index(value: object, name: str, count: int) -> int:
    """Return `value`, the place of one of `count` things; raise `UserError` if it is none."""
    number = _whole(value)
    if number is None or not 0 <= number < count:
        raise UserError(f"{name} must be a whole number in 0..{count - 1}, got {quote(value)}")
    return number


def require_uint64(value: object, name: str) -> int:
    """Return `value`, a seed or what else is 64 bits of a random stream's key; raise `UserError` if it is none."""
    number = _whole(value)
    if number is None or not 0 <= number < 2**64:
        raise UserError(f"{name} must be a whole number in 0..2^64-1, got {quote(value)}")
    return number


def _whole(value: object) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


class CheckpointError(UserError):
    """A weights file that is missing, damaged, unsafe to open, or does not fit the configured model."""
