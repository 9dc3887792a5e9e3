"""Prompts as pieces of text and special tokens, and their token ids.

What a user writes is text, whatever it looks like: the name of a special token in a caption is not that token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from softcfg.errors import CheckpointError
from softcfg.text_tokenizers import read_tokenizer_json, text_ids, text_tokenizer

TOKENIZER = "tokenizer"  # the role of tokenizer.json among the files of a model


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


def text_of(pieces: Iterable[Piece]) -> str:
    """Return a prompt as one string, special tokens by their names."""
    return "".join(piece if isinstance(piece, str) else piece.name for piece in pieces)


class TextTokenizer:
    """A text tokenizer that takes special tokens only where it is told to.

    Args:
        path: `tokenizer.json`, in the format of the `tokenizers` library.

    Raises:
        CheckpointError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = read_tokenizer_json(path)
        try:
            self._special = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
            # The same tokenizer without its special tokens, for text.
            model = content["model"]
            if isinstance(model["vocab"], dict):
                kept = {model.get("unk_token")}
                model["vocab"] = {
                    name: token for name, token in model["vocab"].items() if name not in self._special or name in kept
                }
            content.update(added_tokens=[], post_processor=None, truncation=None)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged or no tokenizer.json; get it again ({error!r})") from error
        self._plain = text_tokenizer(content, path)

    @classmethod
    def of(cls, files: Mapping[str, Path]) -> TextTokenizer | None:
        """The one in a model's files, by their role; None if it is not among them."""
        return cls(files[TOKENIZER]) if TOKENIZER in files else None

    def special_id(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            CheckpointError: the text tokenizer does not have it.
        """
        if name not in self._special:
            raise CheckpointError(f"{self.path} has no token {name}; it belongs to another model")
        return self._special[name]

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
            elif not piece.required and piece.name not in self._special:
                text += piece.name
            else:
                ids += [*self._text_ids(text), self.special_id(piece.name)]
                text = ""
        return ids + self._text_ids(text)

    def _text_ids(self, text: str) -> list[int]:
        return text_ids(self._plain, text) if text else []
