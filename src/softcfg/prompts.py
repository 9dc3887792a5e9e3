"""Prompts of text-to-image models: what the user writes, the sentence around it, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.errors import CheckpointError, UserError, quote
from softcfg.text_tokenizers import check_template, read_tokenizer_json, text_ids, text_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from softcfg.models.base import Generator
    from softcfg.models.lumina import TokenPrompt
    from softcfg.tokenizers.base import Tokenizer

# The sentences that Lumina-mGPT 2.0 was trained on.
TEXT_TO_IMAGE = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
DUAL_PANEL = (
    "Generate a dual-panel image of {width}x{height} where the <{map_half} half> displays a <{map}>, while the "
    "<{image_half} half> retains the original image for direct visual comparison:\n{prompt}"
)
TEMPLATE_FIELDS = ("prompt", "width", "height")
# Task -> the words for the map that is drawn in the lower half, below the image it belongs to.
PAIR_TASKS = {
    "depth": "depth map",
    "canny": "canny edge map",
    "hed": "hed edge map",
    "openpose": "pose estimation map",
}
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


@dataclass(frozen=True)
class Prompt:
    """What to draw.

    Attributes:
        text: the description.
        width, height: of the picture, in pixels; by default the model's. Of a picture in two halves, the whole.
        task: None for an image; else a picture in two halves. Without `image`, "depth", "canny", "hed" or "openpose":
            an image above its map of that kind. With it, "depth", "canny" or "subject": what the image is.
        image: an image, or the path of one; cropped to the upper half, and the lower half is drawn from it.

    Raises:
        UserError: a task that does not exist, or an image without a task.
    """

    text: str
    width: int | None = None
    height: int | None = None
    task: str | None = None
    image: str | Path | Image | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UserError(f"the text of a prompt must be a string, got {quote(self.text)}")
        tasks = PAIR_TASKS if self.image is None else IMAGE_TASKS
        if self.task is None and self.image is not None:
            raise UserError(f"a prompt with an image needs a task, one of {', '.join(tasks)}")
        if self.task is not None and self.task not in tasks:
            kind = "without" if self.image is None else "with"
            raise UserError(
                f"the task of a prompt {kind} an image must be one of {', '.join(tasks)}, got {quote(self.task)}"
            )

    def sentence(self, width: int, height: int, template: str = TEXT_TO_IMAGE) -> str:
        """The text that the model reads; `template` is that of prompts without a task."""
        if self.task is None:
            return template.format(width=width, height=height, prompt=self.text)
        halves = ("lower", "upper") if self.image is None else ("upper", "lower")
        words = (PAIR_TASKS if self.image is None else IMAGE_TASKS)[self.task]
        return DUAL_PANEL.format(
            width=width, height=height, map_half=halves[0], map=words, image_half=halves[1], prompt=self.text
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


class PromptReader:
    """Turns prompts into the tokens that a `Lumina` generator reads.

    Args:
        path: `tokenizer.json` of the text tokenizer, in the format of the `tokenizers` library.
        template: the sentence around prompts without a task, with the fields {prompt}, {width} and {height}. A model
            with a template of its own has no other tasks.

    Raises:
        CheckpointError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path, template: str = TEXT_TO_IMAGE) -> None:
        check_template(template, TEMPLATE_FIELDS)
        self.tokenizer = text_tokenizer(read_tokenizer_json(path), path)
        self.template = template

    def special_ids(self) -> dict[str, int]:
        """The fields of `LuminaConfig` for the special tokens that the text tokenizer has by their released names.

        Raises:
            CheckpointError: the tokens of the sizes do not follow one another.
        """
        named = {field: self.tokenizer.token_to_id(name) for field, name in SPECIAL_TOKENS.items()}
        found = {field: token for field, token in named.items() if token is not None}
        sizes = [self.tokenizer.token_to_id(SIZE_TOKEN.format(8800 + cells)) for cells in range(1, 25)]
        if sizes[0] is not None:
            if sizes != list(range(sizes[0], sizes[0] + len(sizes))):
                raise CheckpointError("the tokens of image sizes in tokenizer.json do not follow one another")
            found["size_id"] = sizes[0] - 1
        return found

    def read(self, prompts: Sequence[Prompt], generator: Generator, tokenizer: Tokenizer) -> list[TokenPrompt]:
        """The tokens of `prompts`, of which those with an image have it encoded by the image `tokenizer`.

        Raises:
            UserError: a task that the model does not have, or an image that cannot be used.
        """
        from softcfg.models.lumina import Lumina, TokenPrompt

        assert isinstance(generator, Lumina)
        config, read = generator.config, []
        for prompt in prompts:
            if prompt.task is not None and self.template != TEXT_TO_IMAGE:
                raise UserError(f"this model draws images only, it has no task {prompt.task}")
            width, height = prompt.width or config.image_size, prompt.height or config.image_size
            text = text_ids(self.tokenizer, prompt.sentence(width, height, self.template))
            ids = [config.prompt_start_id, *text, config.separator_id]
            given = None if prompt.image is None else encode_upper_half(prompt.image, width, height, tokenizer)
            read.append(TokenPrompt(ids, width, height, given))
        return read


def encode_upper_half(image: str | Path | Image, width: int, height: int, tokenizer: Tokenizer) -> Tensor:
    """The codes int64 [h / 2, w] of `image` as the upper half of a picture, scaled and cropped about its centre.

    Raises:
        UserError: the image cannot be read, or the half is no multiple of the codes.
    """
    import numpy as np
    import torch
    from PIL import Image as Images
    from PIL import ImageOps

    from softcfg.images import read_picture

    size = (width, height // 2)
    if height % 2 or any(side % tokenizer.patch_size for side in size):
        raise UserError(
            f"the half of a picture of {width} x {height} pixels must be a multiple of {tokenizer.patch_size} pixels"
        )
    if not isinstance(image, Images.Image):
        image = read_picture(image)
    pixels = np.asarray(ImageOps.fit(image.convert("RGB"), size, Images.Resampling.LANCZOS), dtype=np.float32) / 255
    codes = tokenizer.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    return codes.view(size[1] // tokenizer.patch_size, -1)
