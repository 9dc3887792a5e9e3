"""What the user of a text-to-image model writes; each family turns it into what its generator reads."""

from __future__ import annotations

import importlib
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.errors import UserError, quote, require_whole

if TYPE_CHECKING:
    from PIL.Image import Image

# The fields of a prompt that only some families read; `PromptConditioning.options` says which.
PROMPT_OPTIONS = ("task", "image", "negative_text")
LONGEST_TITLE = 48  # characters
MOVED_TO_LUMINA = ("PromptReader", "TEXT_TO_IMAGE", "DUAL_PANEL", "PAIR_TASKS", "IMAGE_TASKS", "encode_upper_half")


@dataclass(frozen=True)
class Prompt:
    """What to draw.

    Attributes:
        text: the description.
        width, height: of the picture, in pixels; by default the model's.
        task: what kind of picture, for families that have several.
        image: an image, or the path of one, for families that draw from images too.
        negative_text: what the unconditional branch reads, for families where it reads a text.

    Raises:
        UserError: a text that is no string or no UTF-8, or a size that is no number of pixels.
    """

    text: str
    width: int | None = None
    height: int | None = None
    task: str | None = None
    image: str | Path | Image | None = None
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


def __getattr__(name: str) -> Any:
    if name not in MOVED_TO_LUMINA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} has moved to softcfg.models.lumina", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("softcfg.models.lumina"), name)
