"""`softcfg models`: the models known by name, and which of their files are here."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from softcfg.zoo.registry import Component, ModelEntry, ModelFile

HELP = "list the models and which of their files are here"
DESCRIPTION = "List the models, their default guidance, and which of their files are here."

EXAMPLES = """\
examples:
  softcfg models
  softcfg models alitok-xl
  softcfg models --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="show one model in full: a name or a model folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.zoo.registry import MODELS, resolve

    if args.model is not None:
        entry = resolve(args.model)
        print(json.dumps(describe(entry), indent=2) if args.json else details(entry))
        return 0
    entries = [describe(entry) for entry in MODELS.values()]
    print(json.dumps(entries, indent=2) if args.json else table(entries))
    return 0


def describe(entry: ModelEntry) -> dict[str, Any]:
    """What there is to know about a model, ready for JSON; a file that is missing or damaged has the `path` None."""
    from softcfg.errors import CheckpointError
    from softcfg.zoo.files import find_file, missing_files

    def where(files: list[ModelFile]) -> dict[str, Any]:
        missing: list[ModelFile] = []
        paths: list[Path | None] = [None] * len(files)
        damaged = None
        try:
            missing, paths = missing_files(files), [find_file(file) for file in files]
        except CheckpointError as error:
            damaged = str(error)
        return {
            "file": files[0].name,
            "published": files[0].published,
            "path": None if missing or damaged else str(paths[0]),
            "missing": [file.name for file in missing],
            "damaged": damaged,
            "files": [
                {"file": file.name, "published": file.published, "path": str(path) if path else None}
                for file, path in zip(files, paths, strict=True)
            ],
        }

    def described(component: Component) -> dict[str, Any]:
        return {
            "family": component.family.name,
            "parameters": component.parameters,
            "config": dict(component.config),
            **where(component.files),
        }

    text = None if entry.text is None else where(list(entry.text.files.values()))
    return {
        "name": entry.name,
        "description": entry.description,
        "licence": entry.licence,
        "generator": described(entry.generator),
        "tokenizer": described(entry.tokenizer),
        "text": text,
        "sampling": dict(entry.sampling),
        "fid": entry.fid,
        "classes": list(entry.classes),
    }


def table(entries: list[dict[str, Any]]) -> str:
    """One line per model."""
    rows = [("MODEL", "GENERATOR", "TOKENIZER", "SCALE", "POWER", "TEMP.", "FID", "PUBLISHED", "FILES HERE")]
    for entry in entries:
        halves = (entry["generator"], entry["tokenizer"])
        files = (*halves, *([entry["text"]] if entry["text"] else []))
        damaged = [file["damaged"] for file in files if file["damaged"]]
        missing = list(dict.fromkeys(name for file in files for name in file["missing"]))
        settings = (entry["sampling"].get(key, "") for key in ("guidance_scale", "guidance_scale_pow", "temperature"))
        rows.append(
            (
                entry["name"],
                *(f"{half['family']} {_count(half['parameters'])}".strip() for half in halves),
                *(str(value) for value in settings),
                f"{entry['fid']:.2f}" if entry["fid"] else "",
                _publisher(entry["generator"]["published"]),
                f"damaged: {damaged[0]}" if damaged else f"missing {', '.join(missing)}" if missing else "all",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def details(entry: ModelEntry) -> str:
    """Everything about one model, and how to get what is missing."""
    from softcfg.zoo.files import how_to_get, missing_files

    known = describe(entry)
    facts: list[tuple[str, str]] = []
    for kind in ("generator", "tokenizer"):
        half = known[kind]
        number = f", {half['parameters']:,} parameters" if half["parameters"] else ""
        facts += [
            (kind, half["family"] + number),
            ("", _listing(half["config"])),
            ("", half["path"] or f"{half['file']} is missing: {half['published']}"),
        ]
    if known["text"]:
        for i, file in enumerate(known["text"]["files"]):
            found = file["path"] or f"{file['file']} is missing: {file['published']}"
            facts.append(("" if i else "prompts", found))
    facts.append(("defaults", _listing(known["sampling"])))
    if entry.fid:
        facts.append(("FID", f"{entry.fid:.2f}, as its authors report for plain guidance"))
    if entry.licence:
        facts.append(("licence", entry.licence))
    if entry.classes:
        facts.append(("classes", ", ".join(entry.classes)))
    if missing := missing_files(entry.files):
        facts.append(("to get it", how_to_get(missing, entry)))
    wrapper = textwrap.TextWrapper(100, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        (f"{entry.name}: {entry.description}", *(wrapper.fill(f"  {name:11}{fact}") for name, fact in facts))
    )


def _listing(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _count(parameters: int | None) -> str:
    if not parameters:
        return ""
    return f"{parameters / 1e6:.{0 if parameters >= 1e7 else 1}f}M"


def _publisher(published: str) -> str:
    if published.startswith("https://drive.google.com/"):
        return "Google Drive"
    return "Hugging Face" if published.startswith("https://") else "bundled"
