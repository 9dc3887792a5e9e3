"""How Janus-Pro reads prompts: the conversation in the README of https://github.com/deepseek-ai/Janus."""

from __future__ import annotations

from softcfg.models.text import Piece, Special

BEGIN_OF_SENTENCE = Special("<｜begin▁of▁sentence｜>")
PAD = Special("<｜▁pad▁｜>")
BEGIN_OF_IMAGE = Special("<begin_of_image>")
USER = Special("<|User|>", required=False)
ASSISTANT = Special("<|Assistant|>", required=False)


def prompt_pieces(caption: str) -> list[Piece]:
    """Return the prompt of an image, from after the begin-of-sentence token to the begin-of-image token."""
    caption = caption.strip()
    said = f": {caption}\n\n" if caption else ":"
    return [USER, said, ASSISTANT, ":", BEGIN_OF_IMAGE]
