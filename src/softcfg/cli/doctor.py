"""`softcfg doctor`: what this machine will do, and whether it does it right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from softcfg.cli import arguments

HELP = "say what this machine will do, and test it"
DESCRIPTION = """\
Print what to paste into a report of a problem, and test the machine for less than a minute: versions, device, driver
and compiler; which attention and matrix product a step will use, and why; for each model whose files are here the
batch that fits into the free memory. The test compares attention with float64, repeated steps with single ones and the
tokens of the bundled models with the CPU's, and measures the speed. The exit code is 1 if a check failed."""

EXAMPLES = """\
examples:
  softcfg doctor
  softcfg doctor --no-test --json"""

MARKS = {True: "ok", False: "FAILED", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--no-test", action="store_true", help="leave out the test")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code is 1 if a check failed."""
    import torch

    from softcfg import doctor

    device = arguments.parse_device(args.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = doctor.report(device, test=not args.no_test)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for title in ("environment", "choices"):
            _print(title, found[title])
        batches = {
            name: f"damaged: {each['damaged']}"
            if "damaged" in each
            else f"{each['weights, GiB']} GiB of {each['dtype']} weights, largest batch {each['largest batch']}"
            for name, each in found["models"].items()
        }
        _print("models whose files are here; batches are estimated, without pixels", batches)
        _print("test", {check["name"]: f"{MARKS[check['ok']]}: {check['detail']}" for check in found["checks"]})
    return 0 if found["ok"] else 1


def _print(title: str, values: Mapping[str, Any]) -> None:
    if not values:
        return
    print(f"{title}:")
    width = max(map(len, values))
    for name, value in values.items():
        print(f"  {name:{width}}  {'none' if value is None else value}")
