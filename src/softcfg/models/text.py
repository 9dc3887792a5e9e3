"""Prompts as pieces of text and special tokens, and their token ids.

What a user writes is text: the name of a special token in a caption is not that token.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcfg.errors import CheckpointError, quote
from softcfg.files import as_path
from softcfg.text_tokenizers import read_tokenizer_json, text_ids, text_tokenizer

TOKENIZER = "tokenizer"  # the role of tokenizer.json among the files of a model
MARK = re.compile(r"\s*[<\[].*[>\]]\s*", re.DOTALL)  # added tokens of other forms are words, unless they are special


@dataclass(frozen=True)
class Special:
    """A special token in a prompt.

    Attributes:
        name: as the text tokenizer spells it.
        required: whether the text tokenizer must have it. If it need not and has not, the name is text.
    """

    name: str
    required: bool = True


Piece = str | Special


def plain_tokenizer(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` for text: its special tokens get names that nobody can write.

    All ids stay as they are, and so do added tokens that are plain words.

    Raises:
        CheckpointError: it describes no tokenizer; `path` is where it came from.
    """
    try:
        added, model = content.get("added_tokens") or [], dict(content["model"])
        special = [token["content"] for token in added if token.get("special") or MARK.fullmatch(token["content"])]
        names = {name: secrets.token_hex(16) for name in special}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(name, name): token for name, token in model["vocab"].items()}
        else:  # pieces with their scores
            model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        renamed = [{**token, "content": names.get(token["content"], token["content"])} for token in added]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no tokenizer.json; get it again ({quote(error)})") from error
    return {**content, "model": model, "added_tokens": renamed}


class TextTokenizer:
    """A text tokenizer that takes special tokens only where it is told to.

    Args:
        path: `tokenizer.json`, in the format of the `tokenizers` library.

    Raises:
        CheckpointError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path)
        content = read_tokenizer_json(path)
        plain = {**plain_tokenizer(content, path), "post_processor": None, "truncation": None}
        self._plain = text_tokenizer(plain, path)
        self._added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        vocab = content["model"]["vocab"]
        self._vocab = vocab if isinstance(vocab, dict) else {name: i for i, (name, _) in enumerate(vocab)}

    @classmethod
    def of(cls, files: Mapping[str, Path]) -> TextTokenizer | None:
        """The one in a model's files, by their role; None if it is not among them."""
        return cls(files[TOKENIZER]) if TOKENIZER in files else None

    def special_id(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            CheckpointError: the text tokenizer does not have it.
        """
        if (token := self.find(name)) is None:
            raise CheckpointError(f"{self.path} has no token {name}; it belongs to another model")
        return token

    def find(self, name: str) -> int | None:
        """Return the id of a token, None if there is none of this name."""
        return self._added.get(name, self._vocab.get(name))

    def pieces(self, template: str, values: Mapping[str, object]) -> list[Piece]:
        """Return the prompt that a template makes of `values`; special tokens are meant in it, and text in the values.

        Args:
            template: with plain fields (see `softcfg.text_tokenizers.check_template`).
        """
        names = "|".join(map(re.escape, sorted(self._added, key=len, reverse=True)))
        made: list[Piece] = []
        for literal, field, *_ in string.Formatter().parse(template):
            parts = re.split(f"({names})", literal) if names else [literal]
            made += [Special(part) if i % 2 else part for i, part in enumerate(parts)]
            if field is not None:
                made.append(str(values[field]))
        return made

    def ids(self, pieces: Iterable[Piece]) -> list[int]:
        """Return the token ids of a prompt; nothing is put before or after it.

        Raises:
            CheckpointError: the text tokenizer lacks a required special token.
        """
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
            elif not piece.required and self.find(piece.name) is None:
                text += piece.name
            else:
                ids += [*self._text_ids(text), self.special_id(piece.name)]
                text = ""
        return ids + self._text_ids(text)

    def _text_ids(self, text: str) -> list[int]:
        return text_ids(self._plain, text) if text else []
