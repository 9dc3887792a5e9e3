"""What the commands of the recipes share."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from softcfg.errors import UserError

Number = TypeVar("Number", int, float)


def run_command(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Read the options and work; what the user can mend is told in a sentence, with exit code 2."""
    given = parser.parse_args()
    with told(parser.prog):
        work(given)


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """End the process with exit code 2, and a sentence, for what the user can mend."""
    try:
        yield
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return
    print(f"{name}: {problem}", file=sys.stderr)
    sys.exit(2)


def positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """The type of an option that is a number above 0."""

    def read(text: str) -> Number:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return number

    return read
