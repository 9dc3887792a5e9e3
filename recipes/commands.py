"""What the commands of the recipes share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from softcfg.errors import UserError


def run_command(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Read the options and work; what the user can mend is told in a sentence, with exit code 2."""
    given = parser.parse_args()
    try:
        work(given)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
