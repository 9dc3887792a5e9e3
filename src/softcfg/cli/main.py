"""The `softcfg` command: finds the command, runs it, and turns users' mistakes into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from softcfg import plugins
from softcfg.cli import (
    bench,
    compare,
    decode,
    doctor,
    fetch,
    models,
    plot,
    released,
    runs,
    sample,
    sweep,
    t2i_bench,
    trace,
    ui,
)
from softcfg.cli import eval as evaluation
from softcfg.cli.arguments import HelpFormatter
from softcfg.cli.streams import patient_streams
from softcfg.errors import UserError, clean, needing, suggestion
from softcfg.runs.signals import Terminated, termination_raises
from softcfg.version import __version__

PATHS = {"FILE", "DIR", "PATH", "FOLDER", "NEW", "MODEL", "SAMPLES", "PROMPTS"}  # metavars of options that are paths
TEXT = "TEXT"  # and of those that are texts to draw, which alone may be empty
COMMANDS = (sample, t2i_bench, runs, decode, evaluation, compare, sweep, trace, plot, models, fetch, bench, doctor, ui)

SHELLS = ("bash", "zsh", "fish")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the word that was meant."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.set_defaults(parser=self)  # in the end, the one of the command

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse.ArgumentParser.parse_args`; a flag that is not known gets a suggestion."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
            hint = suggestion(flag, parsed.parser._option_string_actions, most=1, cutoff=0.6) if flag else ""
            parsed.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint and '; '}{hint}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        hint = suggestion(str(value), map(str, action.choices or ()), most=1)
        if action.choices is not None and value not in action.choices and hint:
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")
        super()._check_value(action, value)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A value of an argument; `~` in a path is the home folder, which the shell leaves alone in `--png=~/out`."""
        if not arg_string and action.metavar != TEXT and action.nargs != argparse.PARSER:
            self.error(f"{'/'.join(action.option_strings) or action.metavar} must not be empty")
        return super()._get_value(action, os.path.expanduser(arg_string) if action.metavar in PATHS else arg_string)

    def error(self, message: str) -> NoReturn:
        """Print the message and where to read more, and exit with 2."""
        see = " See" if message.endswith("?") else "; see"
        text = f"{clean(message)}{see} '{self.prog} --help'"
        tell_launcher(text)
        self.exit(2, f"softcfg: error: {text}\n")


def tell_launcher(text: str) -> None:
    """Leave the sentence to torchrun, which prints it last, after its own report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(
                json.dumps({"message": {"message": text, "extraInfo": {"timestamp": int(time.time())}}})
            )


class Completion(argparse.Action):
    """`--completion SHELL`: print the script with which a shell completes the command line, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """See `argparse.Action`."""
        with needing("completion needs shtab", "completion"):
            import shtab
        print(shtab.complete(parser, values))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; builds fast, since commands import what they need only when they run."""
    parser = Parser(
        prog="softcfg",
        description="Sample autoregressive image models with SoftCFG: classifier-free guidance "
        "whose unconditional branch is weighted by the model's own confidence.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"softcfg {__version__}")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        action=Completion,
        help="print what makes this shell complete softcfg's words (needs shtab)",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    try:
        for command in COMMANDS:
            each = commands.add_parser(
                command.__name__.rpartition(".")[2].replace("_", "-"),
                help=command.HELP,
                usage=getattr(command, "USAGE", None),
                description=command.DESCRIPTION,
                epilog=command.EXAMPLES,
                formatter_class=HelpFormatter,
                allow_abbrev=False,
            )
            each.set_defaults(run=getattr(command, "run", None))
            command.add_arguments(each)
            each.add_argument(
                plugins.OPTION,
                action="append",
                metavar="MODULE",
                help="import this module or .py file first, for what it registers; may be repeated",
            )
    except argparse.ArgumentError as error:  # of a setting that a plugin registered
        raise UserError(f"{error.message}; give the rule or perturbation with that setting another name") from None
    return parser


# Variables that are read when PyTorch is imported. Large tensors lie in huge pages, which are read faster. And a thread
# that waits for another one turns in a loop for some 20 microseconds instead of a millisecond: on a machine with other
# work it would turn away the time in which the other could run.
BEFORE_PYTORCH = {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "10000"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 if all that was asked for was done, 2 for a user's mistake, 130
    when interrupted, 143 when terminated.

    A reader of the output that goes away ends nothing: the command does its work to the end. Output that could not be
    written, on a full disk, is an error.
    """
    for name, value in BEFORE_PYTORCH.items():
        os.environ.setdefault(name, value)
    words = list(sys.argv[1:] if argv is None else argv)
    with patient_streams() as out, _warnings_in_a_line():
        try:
            code = _run(words)
        except SystemExit as end:  # of argparse
            out.flush()
            if end.code or out.lost is None:
                raise
            code = 0
        out.flush()
        if out.lost is not None and not code:
            print(f"softcfg: error: cannot print: {clean(out.lost.strerror)}; all else is done", file=sys.stderr)
            code = 2
    return code


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print warnings like errors, without the place in the source."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"softcfg: warning: {clean(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(words: list[str]) -> int:
    try:
        plugins.load_all(words)
        args = build_parser().parse_args(_rewritten(words))
        args.words = words
        with termination_raises():
            return args.run(args)
    except UserError as error:
        tell_launcher(str(error))
        print(f"softcfg: error: {error}", file=sys.stderr)
        return 2
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("softcfg: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except MemoryError as error:
        print(f"softcfg: error: {clean(error) or 'out of memory'}", file=sys.stderr)
        return 2
    except OSError as error:  # a name that is too long, a folder that may not be read, a disk that fails
        print(f"softcfg: error: {clean(error)}", file=sys.stderr)
        return 2


def _rewritten(words: Sequence[str]) -> list[str]:
    """Flags may be written with underscores, and `sample` takes the released code's overrides."""
    if words and words[0] == "sample":
        words = released.as_flags(words, _flags_with_a_value())
    return [_hyphenated(word) for word in words]


def _flags_with_a_value() -> set[str]:
    """The flags of `sample` after which there is always a value."""
    parser = argparse.ArgumentParser(add_help=False)
    sample.add_arguments(parser)
    flags = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}
    return {plugins.OPTION, *flags}


def _hyphenated(word: str) -> str:
    """Flags may be written with underscores, as in the released code."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
