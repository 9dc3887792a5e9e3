"""`softcfg ui`: the web page."""

from __future__ import annotations

import argparse
import re

from softcfg.cli import arguments
from softcfg.errors import UserError, how_to_install

PORT = 7860

HELP = "show a web page to draw and look into images"
USAGE = "softcfg ui [MODEL ...] [options]"
DESCRIPTION = """\
Show a web page to draw, compare and look into images in a browser.

Without MODEL it offers the bundled models. The page is for this machine alone unless --host says otherwise;
what a public page may take of the machine is bounded by the limits below."""

EXAMPLES = """\
examples:
  softcfg ui
  softcfg ui alitok-xl --device cuda --dtype bfloat16
  softcfg ui emu3-gen --quantize int8 --kv-cache-dtype int8 --max-seconds 600
  softcfg ui --host 0.0.0.0 --port 8000 --max-seconds 30"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="names that 'softcfg models' lists, or paths of model folders (default: the bundled models)",
    )
    arguments.add_memory_arguments(parser.add_argument_group("model"))
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0: any that is free")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that visitors reach the page by, beside --host and localhost; may be given several times",
    )
    group.add_argument(
        "--behind-proxy",
        action="store_true",
        help="believe the X-Forwarded-For, -Host and -Proto of the one web server in front of this one",
    )
    group.add_argument("--open", action="store_true", help="open the page in the browser")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-seconds", type=float, default=120.0, metavar="S", help="computation of a drawing (default: 120)"
    )
    group.add_argument(
        "--max-queue", type=int, default=16, metavar="N", help="requests that wait at a time (default: 16)"
    )
    group.add_argument(
        "--max-places", type=int, default=4, metavar="N", help="requests of one visitor that wait (default: 4)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    for name in ("max_seconds", "max_queue", "max_places"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, got {getattr(args, name)}")
    for name in args.allowed_host:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*", name):
            raise UserError(f"--allowed-host must be a name without scheme and port, like draw.example, got {name!r}")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port must be in 0..65535, got {args.port}")
    try:
        from softcfg.ui import page
    except ModuleNotFoundError as error:
        raise UserError(f"the web page needs the package {error.name}: {how_to_install('ui')}") from None

    from softcfg.pipeline import Pipeline
    from softcfg.ui.studio import Limits, Studio
    from softcfg.zoo.registry import MODELS

    device = arguments.parse_device(args.device)
    pipelines = {}
    for model in args.models or [name for name, entry in MODELS.items() if entry.bundled]:
        pipeline = Pipeline.from_pretrained(
            model,
            device=device,
            dtype=args.dtype,
            quantize=args.quantize,
            kv_cache_dtype=args.kv_cache_dtype,
            tokenizer_dtype=args.tokenizer_dtype,
            device_map=args.device_map,
        )
        if pipeline.name in pipelines:
            raise UserError(f"there are two models named {pipeline.name!r}; give each once")
        pipelines[pipeline.name] = pipeline
    studio = Studio(pipelines, Limits(seconds=args.max_seconds, queue=args.max_queue, places=args.max_places))

    def ready(address: str) -> None:
        print(f"softcfg: {', '.join(pipelines)} at {address} (Ctrl-C ends it)", flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(address)

    page.serve(
        studio,
        args.host,
        args.port,
        ready,
        allowed_hosts=args.allowed_host,
        behind_proxy=args.behind_proxy,
    )
    return 0
