"""Text tokenizers and templates from foreign files; what they may do to a prompt is bounded."""

from __future__ import annotations

import json
import math
import string
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.errors import CheckpointError, UserError, clean, quote
from softcfg.files import read_text, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGEST = 1 << 25  # bytes of a tokenizer.json
LONGEST_TEXT = 20_000  # characters of a prompt, with the sentence around it
LONGEST_GROWTH = 256  # times as many characters that a tokenizer may make of a text
MOST_STEPS = 100  # of normalization and splitting
SECONDS = 2.0  # for the tokens of a text


def read_tokenizer_json(path: str | Path) -> dict[str, Any]:
    """Read a `tokenizer.json`.

    Raises:
        CheckpointError: the file is missing or damaged, or its steps would let a text grow beyond measure.
    """
    with reading(path, CheckpointError):
        text = read_text(path, LARGEST)
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        steps = list(_steps([content.get("normalizer"), content.get("pre_tokenizer")]))
        growth = math.prod(max(1, len(str(step.get("content", "")))) for step in steps if step["type"] == "Replace")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if len(steps) > MOST_STEPS or growth > LONGEST_GROWTH:
        raise CheckpointError(
            f"{path} was refused: it has {len(steps)} steps that make a text up to {clean(growth, 20)} times as long; "
            f"the limits are {MOST_STEPS} and {LONGEST_GROWTH}"
        )
    return content


def text_tokenizer(content: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """Build the tokenizer that a `tokenizer.json` describes, without padding and the dropout of a training.

    Raises:
        CheckpointError: it describes none.
    """
    from tokenizers import Tokenizer

    try:
        model = {name: None if name == "dropout" else value for name, value in content["model"].items()}
        return Tokenizer.from_str(json.dumps({**content, "model": model, "padding": None}))
    except Exception as error:  # the library raises plain exceptions
        raise _damaged(path, error) from error


def text_ids(tokenizer: Tokenizer, text: str, *, specials: bool = False) -> list[int]:
    """Return the token ids of a text; with `specials`, those that the tokenizer puts around it included.

    Raises:
        UserError: the text is too long or no text, or the tokenizer fails on it or does not come to an end.
    """
    check_text(text)
    found: list[Any] = []

    def encode() -> None:
        try:
            # Unlike `encode`, this lets other threads run, so that somebody can watch the clock.
            found.append(tokenizer.encode_batch([text], add_special_tokens=specials)[0].ids)
        except BaseException as error:  # a panic of the library is not an Exception
            found.append(error)

    worker = threading.Thread(target=encode, daemon=True)
    worker.start()
    worker.join(SECONDS)
    if not found:
        raise UserError(f"the text tokenizer takes more than {SECONDS:g} seconds for a prompt: its patterns do not end")
    if isinstance(found[0], BaseException):
        raise UserError(f"the text tokenizer fails on a prompt: {clean(found[0], 200)}") from found[0]
    return found[0]


def check_text(text: str) -> None:
    """Raise `UserError` for a text that is too long or no valid Unicode."""
    if len(text) > LONGEST_TEXT:
        raise UserError(f"a prompt of {len(text):,} characters is too long; the limit is {LONGEST_TEXT:,}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"a prompt holds half a character: {quote(text)}; write it again")


def check_template(template: str, fields: Collection[str]) -> None:
    """Raise `UserError` unless a template holds plain fields, such as {prompt}, among `fields`."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the template {quote(template)} is malformed: {error}") from error
    for _, field, form, conversion in parts:
        if field is not None and (field not in fields or form or conversion):
            known = ", ".join(f"{{{name}}}" for name in fields)
            raise UserError(f"the template {quote(template)} holds another field than {known}")
    if len(template) > LONGEST_TEXT or len(parts) > MOST_STEPS:
        raise UserError(f"the template {quote(template)} is too long")


def _steps(node: Any) -> Iterator[dict[str, Any]]:
    """Every normalizer and pre-tokenizer, however they are nested."""
    if isinstance(node, dict) and isinstance(node.get("type"), str):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _steps(child)


def _damaged(path: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or no tokenizer.json; get it again ({clean(error, 200)})")
