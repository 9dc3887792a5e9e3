"""`softcfg fetch`: bring the weights of a model onto this machine."""

from __future__ import annotations

import argparse

from softcfg.errors import UserError

HELP = "download the weights of a model"
DESCRIPTION = """\
Bring the weights of a model onto this machine and check that they fit it.

Files published on Hugging Face are downloaded into its cache; HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE apply.
Files published on Google Drive have to be downloaded in a browser; the command says which, and takes them
over with --from into the folder SOFTCFG_CHECKPOINTS (default: ~/.cache/softcfg/checkpoints)."""

EXAMPLES = """\
examples:
  softcfg fetch rar-b
  softcfg fetch alitok-xl --from ~/Downloads"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="a name that 'softcfg models' lists, or a repository USER/NAME")
    parser.add_argument("--from", dest="source", metavar="PATH", help="take the files from this folder, or this file")
    parser.add_argument("--link", action="store_true", help="with --from: link to the files instead of copying them")


def run(args: argparse.Namespace) -> int:
    """Run the command; a file that is still missing afterwards is an error that says how to get it."""
    from softcfg.zoo.fetching import fetch
    from softcfg.zoo.files import require_file
    from softcfg.zoo.registry import resolve

    if args.link and args.source is None:
        raise UserError("--link needs --from, the files to link to")
    paths = fetch(args.model, args.source, link=args.link)
    entry = resolve(args.model)
    if entry.bundled:
        print(f"{entry.name} is bundled with softcfg: there is nothing to fetch")
    for path in paths:
        print(path)
    for file in entry.files:
        require_file(file, entry)
    return 0
