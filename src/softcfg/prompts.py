"""What the user of a text-to-image model writes; each family turns it into what its generator reads."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softcfg.errors import UserError, quote, require_whole

if TYPE_CHECKING:
    from softcfg.images import Picture

# The fields of a prompt that only some families read; `PromptConditioning.options` says which.
PROMPT_OPTIONS = ("task", "image", "negative_text")
LONGEST_TITLE = 48  # characters


@dataclass(frozen=True)
class Prompt:
    """What to draw.

    Attributes:
        text: the description.
        width, height: of the picture, in pixels; by default the model's.
        task: what kind of picture, for families that have several.
        image: a picture, for families that draw from pictures too: the path of a file, an image of PIL, the bytes of a
            file or an array uint8 [H, W, 3]; see `softcfg.images.read_picture`.
        negative_text: what the unconditional branch reads, for families where it reads a text.

    Raises:
        UserError: a text that is no string or no UTF-8, a size that is no number of pixels, or an image that is none.
            What a path leads to is read later.
    """

    text: str
    width: int | None = None
    height: int | None = None
    task: str | None = None
    image: Picture | None = None
    negative_text: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("text", self.text), ("negative text", self.negative_text or "")):
            if not isinstance(value, str):
                raise UserError(f"the {name} of a prompt must be a string, got {quote(value)}")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise UserError(f"the {name} of a prompt is no UTF-8, but of another encoding: {quote(value)}")
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None:
                require_whole(size, name, 1)
        if self.image is not None and not isinstance(self.image, (str, os.PathLike)):
            from softcfg.images import read_picture

            object.__setattr__(self, "image", read_picture(self.image, name="the image of a prompt"))

    @property
    def title(self) -> str:
        """The text, shortened to a title of its images."""
        return textwrap.shorten(self.text, LONGEST_TITLE, placeholder="…")


def is_text(values: Any) -> bool:
    """Whether these are prompts, not labels."""
    return isinstance(values, (str, Prompt)) or (
        isinstance(values, Sequence) and len(values) > 0 and isinstance(values[0], (str, Prompt))
    )


def as_prompts(prompts: Any, width: int | None = None, height: int | None = None) -> list[Prompt]:
    """Turn strings and `Prompt`s into a list of `Prompt`s; `width` and `height` are those of prompts without.

    Raises:
        UserError: no prompts, or something that is no prompt.
    """
    if isinstance(prompts, (str, Prompt)):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise UserError(f"prompts must be a list of at least one text, got {quote(prompts)}")
    made = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = Prompt(prompt)
        if not isinstance(prompt, Prompt):
            raise UserError(f"prompts must be texts or Prompt objects, got {quote(prompt)}")
        made.append(replace(prompt, width=prompt.width or width, height=prompt.height or height))
    return made


def with_negative(prompts: list[Prompt], negative: Any) -> list[Prompt]:
    """The prompts with negative texts, one for all or one each, where they have none of their own.

    Raises:
        UserError: there are not as many.
    """
    if negative is None or isinstance(negative, str):
        texts = [negative] * len(prompts)
    elif isinstance(negative, Sequence) and len(negative) == len(prompts):
        texts = list(negative)
    else:
        raise UserError(
            f"negative_prompt must be a text, or one for each of {len(prompts)} prompts, got {quote(negative)}"
        )
    return [
        prompt if prompt.negative_text is not None else replace(prompt, negative_text=text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
