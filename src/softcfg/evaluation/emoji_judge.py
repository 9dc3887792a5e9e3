"""A small network that recognises what an emoji shows, its style and its colour, to compare with the prompt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.errors import CheckpointError, UserError, clean, quote
from softcfg.evaluation.arithmetic import full_float32
from softcfg.evaluation.fashion_classifier import SmallNetwork, conv_block
from softcfg.evaluation.weights import load_network
from softcfg.files import read_text

UNKNOWN = -1
STYLE = 1  # which of the heads


class View(NamedTuple):
    """How the judge looks at an image: turned to the right by some degrees, and scaled, about its middle."""

    turn: float = 0.0
    scale: float = 1.0


VIEWS = (View(), View(turn=6.0), View(turn=-6.0), View(scale=1.1), View(scale=1 / 1.1))
LARGEST_VOCABULARY = 1 << 20  # bytes


@dataclass(frozen=True)
class Vocabulary:
    """The words that the judge knows; logit c of a head is that of word c.

    Attributes:
        names: what pictures show: "red apple".
        styles: words for styles: "flat".
        colours: words for the main colour.
    """

    names: tuple[str, ...]
    styles: tuple[str, ...]
    colours: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read it from a JSON file.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            content = json.loads(read_text(path, LARGEST_VOCABULARY))
            return cls(*(tuple(map(str, content[key])) for key in ("names", "styles", "colours")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} does not hold the vocabulary of a judge: {clean(error, 200)}") from error

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Return what prompts ask for, int64 [N, 3]: name, style and colour, -1 for what a prompt does not say.

        A prompt is "[colour] name[, style style]". The colour of "red apple", which is in the name, counts as well.

        Raises:
            UserError: a prompt without a name that the judge knows.
        """
        return torch.tensor([self._read(prompt) for prompt in prompts], dtype=torch.int64).view(-1, 3)

    def _read(self, prompt: str) -> tuple[int, int, int]:
        words = " ".join(re.findall(r"[^\W_]+", prompt.lower().replace("'", "").replace("’", "")))
        style = UNKNOWN
        if found := re.fullmatch(rf"(.*?) ({'|'.join(map(re.escape, self.styles))}) style", words):
            words, style = found[1], self.styles.index(found[2])
        first, _, rest = words.partition(" ")
        colour = self.colours.index(first) if first in self.colours else UNKNOWN
        for name in (words, rest if colour != UNKNOWN else ""):
            if name in self.names:
                return self.names.index(name), style, colour
        if colour != UNKNOWN:  # "blue apple" is a "red apple" of another colour
            for number, name in enumerate(self.names):
                if " ".join(word for word in name.split() if word not in self.colours) == rest:
                    return number, style, colour
        raise UserError(f"the judge does not know what {quote(prompt)} shows: no picture of the model has its name")


class EmojiJudge(SmallNetwork):
    """A residual convolutional network over 96 x 96 images, with heads for name, style and colour.

    The style is told from the statistics of small surroundings, in which nobody recognises what is drawn. What is
    answered is the mean over `VIEWS` of an image; the features are those of the image as it is.
    """

    image_size = 96
    num_features = 320

    def __init__(self, names: int, styles: int, colours: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            conv_block(3, 40, 2),  # 48 x 48
            conv_block(40, 80, 2),  # 24 x 24
            Residual(80),
            conv_block(80, 160, 2),  # 12 x 12
            Residual(160),
            Residual(160),
            conv_block(160, self.num_features, 2),  # 6 x 6
            Residual(self.num_features),
            Residual(self.num_features),
        )
        self.texture = conv_block(80, self.num_features // 2)  # means and deviations are the features
        self.dropout = nn.Dropout(0.25)
        self.heads = nn.ModuleList(nn.Linear(self.num_features, count) for count in (names, styles, colours))

    def scaled(self, pixels: Tensor) -> Tensor:
        """See `SmallNetwork.scaled`: [0, 1] to [-1, 1]."""
        return 2 * super().scaled(pixels) - 1

    def forward(self, pixels: Tensor, views: Sequence[View] = VIEWS) -> tuple[Tensor, list[Tensor]]:
        """Look at images `[B, 3, 96, 96]` in [0, 1] in several views, of which the first is the image as it is.

        Returns:
            The features `[B, num_features]` that `features` gives; and of names, styles and colours the logarithms of
            the mean probabilities, float32 `[B, count]` each.
        """
        features, logits = self.describe(pixels)
        sums = [each.float().softmax(1) for each in logits]
        for view in views[1:]:
            for total, each in zip(sums, self.describe(seen_in(view, pixels))[1], strict=True):
                total += each.float().softmax(1)
        return features, [(total / len(views)).log() for total in sums]

    def describe(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the features `[B, num_features]` that `features` gives, and the logits of the images as they are."""
        near = self.blocks[:3](self.scaled(pixels))
        features = self.blocks[3:](near).mean(dim=(2, 3))
        near = self.texture(near).float()
        texture = torch.cat((near.mean((2, 3)), near.var((2, 3)).add(1e-4).sqrt()), dim=1).to(features)
        seen = self.dropout(features)
        return features, [head(texture if i == STYLE else seen) for i, head in enumerate(self.heads)]


def seen_in(view: View, pixels: Tensor) -> Tensor:
    """Images [B, 3, S, S] in [0, 1] in a view; what comes in from outside is white."""
    cosine = math.cos(math.radians(view.turn)) / view.scale
    sine = math.sin(math.radians(view.turn)) / view.scale
    places = torch.tensor([[cosine, sine, 0.0], [-sine, cosine, 0.0]], device=pixels.device)
    grid = F.affine_grid(places.expand(len(pixels), 2, 3), list(pixels.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pixels, grid.to(pixels), align_corners=False)


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_block(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape."""
        return F.relu(x + self.second(self.first(x)))


def load_judge(
    weights: str | Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[EmojiJudge, Vocabulary, str]:
    """Return the judge for inference, its words, which lie beside the weights as .json, and the SHA-256 of the weights.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit.
    """
    words = Vocabulary.load(Path(weights).with_suffix(".json"))
    counts = len(words.names), len(words.styles), len(words.colours)
    judge, digest = load_network(lambda: EmojiJudge(*counts), weights, device or torch.device("cpu"), dtype)
    return judge, words, digest


@torch.inference_mode()
def look(
    judge: EmojiJudge,
    pixels: Tensor,
    batch_size: int = 250,
    *,
    views: Sequence[View] = VIEWS,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return features and answers of images.

    Args:
        judge: the network.
        pixels: uint8 `[N, 3, 96, 96]`, or float in [0, 1].
        batch_size: images at once.
        views: in which the judge looks at each.
        exact: in full float32; else in TF32 where a GPU does so by default, which takes a fraction of the time.

    Returns:
        Float `[N, num_features]`, and int64 `[N, 3]`: the likeliest name, style and colour.
    """
    scale = 1 if pixels.is_floating_point() else 255
    with full_float32() if exact else nullcontext():
        parts = [judge(part / scale, views) for part in pixels.split(batch_size)]
    return torch.cat([features for features, _ in parts]), torch.cat([answers(logits) for _, logits in parts])


def answers(logits: Sequence[Tensor]) -> Tensor:
    """The likeliest name, style and colour, int64 [B, 3], of what the judge says of them."""
    return torch.stack([head.argmax(1) for head in logits], 1)


def agreement(judge: EmojiJudge, pixels: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return the shares of images in which the judge sees what was asked for, see `look` and `shares_right`."""
    return shares_right(look(judge, pixels)[1].cpu(), wanted)


def shares_right(seen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return the shares of images in which name, style and colour are those that were asked for.

    Args:
        seen: what the judge sees, int64 `[N, 3]`.
        wanted: int64 `[N, 3]`, see `Vocabulary.read`.

    Returns:
        "name", "style", "colour": of the images whose prompts say it; "all": everything that the prompt says is right.

    Raises:
        UserError: there are not as many prompts as images.
    """
    if wanted.shape != seen.shape:
        raise UserError(f"agreement needs one prompt per image, got {len(wanted)} for {len(seen)} images")
    said, right = wanted != UNKNOWN, seen == wanted
    shares = {
        key: float(right[said[:, i], i].float().mean())
        for i, key in enumerate(("name", "style", "colour"))
        if said[:, i].any()
    }
    return {**shares, "all": float((right | ~said).all(1).float().mean())}
