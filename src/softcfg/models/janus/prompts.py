"""How Janus-Pro reads prompts: the conversation in the README of https://github.com/deepseek-ai/Janus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.errors import UserError
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.text import Piece, Special, TextTokenizer
from softcfg.prompts import Prompt
from softcfg.text_tokenizers import check_template

if TYPE_CHECKING:
    from softcfg.models.janus.generator import Janus

BEGIN_OF_SENTENCE = Special("<｜begin▁of▁sentence｜>")
PAD = Special("<｜▁pad▁｜>")
BEGIN_OF_IMAGE = Special("<begin_of_image>")
USER = Special("<|User|>", required=False)
ASSISTANT = Special("<|Assistant|>", required=False)


TEMPLATE = "<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>"


def prompt_pieces(caption: str) -> list[Piece]:
    """Return the prompt of an image, from after the begin-of-sentence token to the begin-of-image token."""
    caption = caption.strip()
    said = f": {caption}\n\n" if caption else ":"
    return [USER, said, ASSISTANT, ":", BEGIN_OF_IMAGE]


class JanusPrompts(PromptConditioning):
    """The prompts of a Janus-Pro model: texts, for images of one size.

    Its one file is "tokenizer", the `tokenizer.json`, and its one setting is "template", what stands around a caption.
    """

    generator: Janus
    read_settings = ("template",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings.setdefault("template", TEMPLATE)
        check_template(self.settings["template"], ["prompt"])
        self.reader = TextTokenizer.of(self.files)

    @classmethod
    def published_config(cls, files: Mapping[str, Path]) -> dict[str, Any]:
        """See `Conditioning.published_config`: the ids of the special tokens, which differ between the models."""
        reader = TextTokenizer.of(files)
        if reader is None:
            return {}
        named = {"bos": BEGIN_OF_SENTENCE, "pad": PAD, "boi": BEGIN_OF_IMAGE}
        return {"special_ids": {name: reader.special_id(token.name) for name, token in named.items()}}

    def inputs(self, requests: Sequence[Prompt]) -> list[list[int]]:
        """See `Conditioning.inputs`."""
        if self.reader is None:
            raise UserError(f"{self.name} has no text tokenizer, so it cannot read prompts")
        begin = self.generator.config.special_ids["bos"]
        return [[begin, *self.reader.ids(self._pieces(self.reader, prompt.text))] for prompt in requests]

    def _pieces(self, reader: TextTokenizer, caption: str) -> list[Piece]:
        template = self.settings["template"]
        if template == TEMPLATE:
            return prompt_pieces(caption)
        return reader.pieces(template, {"prompt": caption.strip()})
