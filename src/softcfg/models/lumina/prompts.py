"""How Lumina-mGPT 2.0 reads prompts: its sentences, its special tokens, its tasks, and images to draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as Images
from PIL import ImageOps
from torch import Tensor

from softcfg.errors import CheckpointError, UserError, quote
from softcfg.images import read_picture
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.geometry import Geometry
from softcfg.models.text import TOKENIZER, TextTokenizer
from softcfg.prompts import Prompt
from softcfg.text_tokenizers import check_template

if TYPE_CHECKING:
    from softcfg.images import Picture
    from softcfg.models.lumina.generator import Lumina
    from softcfg.tokenizers.base import Tokenizer

# The sentences that Lumina-mGPT 2.0 was trained on.
TEXT_TO_IMAGE = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
DUAL_PANEL = (
    "Generate a dual-panel image of {width}x{height} where the <{map_half} half> displays a <{map}>, while the "
    "<{image_half} half> retains the original image for direct visual comparison:\n{prompt}"
)
TEMPLATE_FIELDS = ("prompt", "width", "height")
# Task -> the words for the map that is drawn in the lower half, below the image it belongs to.
PAIR_TASKS = {"depth": "depth map", "canny": "canny edge map", "hed": "hed edge map", "openpose": "pose estimation map"}
# Task -> the words for the given image, which becomes the upper half.
IMAGE_TASKS = {
    "depth": "depth map",
    "canny": "canny edge map",
    "subject": "Bubbly and effervescent with a sparkling allure.",
}

# Field of `LuminaConfig` -> the name of the special token in the released tokenizer.json.
SPECIAL_TOKENS = {
    "prompt_start_id": "<|im_end|>",
    "separator_id": "<reserved08706>",
    "image_start_id": "<racm3:break>",
    "image_end_id": "<eoss>",
    "new_line_id": "<reserved08799>",
}
SIZE_TOKEN = "<reserved{:05d}>"  # 8800 + the side in grid cells
SIZES = range(1, 25)  # in grid cells


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the generator reads it.

    Attributes:
        ids: the tokens of the text, from the first prompt token to the separator. Without any, the prompt is an
            unconditional one.
        width, height: of the image, in pixels; by default the model's.
        given: int64 [k, w], codes of the image's first k lines, where they are not to be drawn.
    """

    ids: Sequence[int] | Tensor
    width: int | None = None
    height: int | None = None
    given: Tensor | None = None


def tasks(prompt: Prompt) -> Mapping[str, str]:
    """The tasks that a prompt may have, with their words: others with an image than without."""
    return PAIR_TASKS if prompt.image is None else IMAGE_TASKS


def check_task(prompt: Prompt) -> None:
    """Raise `UserError` for a task that does not exist, or an image without a task."""
    known = tasks(prompt)
    if prompt.task is None and prompt.image is not None:
        raise UserError(f"a prompt with an image needs a task, one of {', '.join(known)}")
    if prompt.task is not None and prompt.task not in known:
        kind = "without" if prompt.image is None else "with"
        raise UserError(
            f"the task of a prompt {kind} an image must be one of {', '.join(known)}, got {quote(prompt.task)}"
        )


def sentence(prompt: Prompt, width: int, height: int, template: str = TEXT_TO_IMAGE) -> str:
    """The text that the model reads; `template` is that of prompts without a task."""
    template, values = _filled_in(prompt, width, height, template)
    return template.format(**values)


def _filled_in(prompt: Prompt, width: int, height: int, template: str) -> tuple[str, dict[str, Any]]:
    """The template of the prompt's task, and what stands in its fields."""
    values: dict[str, Any] = {"width": width, "height": height, "prompt": prompt.text}
    if prompt.task is None:
        return template, values
    halves = ("lower", "upper") if prompt.image is None else ("upper", "lower")
    return DUAL_PANEL, {**values, "map_half": halves[0], "map": tasks(prompt)[prompt.task], "image_half": halves[1]}


class PromptReader:
    """The text tokenizer of a Lumina model.

    Args:
        path: `tokenizer.json`, in the format of the `tokenizers` library.
        template: the sentence around prompts without a task, with the fields {prompt}, {width} and {height}. A model
            with a template of its own has no other tasks.

    Raises:
        CheckpointError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path, template: str = TEXT_TO_IMAGE) -> None:
        check_template(template, TEMPLATE_FIELDS)
        self.tokenizer = TextTokenizer(path)
        self.path = Path(path)
        self.template = template

    def special_ids(self) -> dict[str, int]:
        """The fields of `LuminaConfig` for the special tokens that the text tokenizer has by their released names.

        Raises:
            CheckpointError: the tokens of the sizes do not follow one another.
        """
        named = {field: self.tokenizer.find(name) for field, name in SPECIAL_TOKENS.items()}
        found = {field: token for field, token in named.items() if token is not None}
        sizes = [self.tokenizer.find(SIZE_TOKEN.format(8800 + cells)) for cells in SIZES]
        if sizes[0] is not None:
            if sizes != list(range(sizes[0], sizes[0] + len(sizes))):
                raise CheckpointError("the tokens of image sizes in tokenizer.json do not follow one another")
            found["size_id"] = sizes[0] - 1
        return found

    def text_ids(self, prompt: Prompt, width: int, height: int) -> list[int]:
        """The tokens of the prompt's sentence, without those that open and close a prompt; its text is text alone."""
        return self.tokenizer.ids(self.tokenizer.pieces(*_filled_in(prompt, width, height, self.template)))


class LuminaPrompts(PromptConditioning):
    """The prompts of a Lumina model: texts, pictures in two halves, and images of which the lower half is drawn.

    Without an image, the tasks "depth", "canny", "hed" and "openpose" draw an image above its map of that kind. With
    an image, "depth", "canny" or "subject" says what it is; it is cropped to the upper half, and the lower half is
    drawn from it.

    Its one file is "tokenizer", the `tokenizer.json`, and its one setting is "template", the sentence around a prompt.
    """

    generator: Lumina
    read_settings = ("template",)
    options = ("task", "image")
    any_size = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings.setdefault("template", TEXT_TO_IMAGE)
        path = self.files.get(TOKENIZER)
        self.reader = None if path is None else PromptReader(path, self.settings["template"])

    @classmethod
    def published_config(cls, files: Mapping[str, Path]) -> dict[str, Any]:
        """See `Conditioning.published_config`: the ids of the special tokens."""
        return PromptReader(files[TOKENIZER]).special_ids() if TOKENIZER in files else {}

    def check_tokenizer(self) -> None:
        """See `Conditioning.check_tokenizer`: it decodes images of any size, of the generator's codes."""
        config = self.generator.config
        drawn = (config.num_codes, config.cell_pixels // config.codes_per_cell)
        if not self.tokenizer.any_size or drawn != (self.tokenizer.codebook_size, self.tokenizer.patch_size):
            raise UserError(
                f"the generator draws {drawn[0]} codes, {drawn[1]} pixels wide, for images of any size; the tokenizer "
                "does not decode them"
            )

    def check(self, prompt: Prompt) -> None:
        """See `PromptConditioning.check`."""
        super().check(prompt)
        check_task(prompt)
        if prompt.task is not None and self.settings["template"] != TEXT_TO_IMAGE:
            raise UserError(f"this model draws images only, it has no task {prompt.task}")

    def inputs(self, requests: Sequence[Prompt]) -> list[TokenPrompt]:
        """See `Conditioning.inputs`."""
        if self.reader is None:
            raise UserError(f"{self.name} has no text tokenizer, so it cannot read prompts")
        config, read = self.generator.config, []
        for prompt in requests:
            self.check(prompt)
            width, height = prompt.width or config.image_size, prompt.height or config.image_size
            ids = [config.prompt_start_id, *self.reader.text_ids(prompt, width, height), config.separator_id]
            given = None if prompt.image is None else encode_upper_half(prompt.image, width, height, self.tokenizer)
            read.append(TokenPrompt(ids, width, height, given))
        return read

    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        """See `Conditioning.geometry`."""
        default_width, default_height = self.default_size
        return self.generator.config.geometry(width or default_width, height or default_height)

    @property
    def default_size(self) -> tuple[int, int]:
        """See `PromptConditioning.default_size`."""
        return self.generator.config.image_size, self.generator.config.image_size


def encode_upper_half(image: Picture, width: int, height: int, tokenizer: Tokenizer) -> Tensor:
    """The codes int64 [h / 2, w] of `image` as the upper half of a picture, scaled and cropped about its centre.

    Args:
        image: see `softcfg.images.read_picture`.

    Raises:
        UserError: the image cannot be read, or the half is no multiple of the codes.
    """
    size = (width, height // 2)
    if height % 2 or any(side % tokenizer.patch_size for side in size):
        raise UserError(
            f"the half of a picture of {width} x {height} pixels must be a multiple of {tokenizer.patch_size} pixels"
        )
    fitted = ImageOps.fit(read_picture(image), size, Images.Resampling.LANCZOS)
    pixels = np.asarray(fitted, dtype=np.float32) / 255
    codes = tokenizer.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    return codes.view(size[1] // tokenizer.patch_size, -1)
