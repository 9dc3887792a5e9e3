"""The networks that compute features, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from softcfg.errors import UserError, require_kind, require_name
from softcfg.evaluation.emoji_judge import VIEWS, answers, load_judge, shares_right
from softcfg.evaluation.fashion_classifier import FashionClassifier, SmallNetwork
from softcfg.evaluation.features import Extractor, Features
from softcfg.evaluation.inception import InceptionV3
from softcfg.evaluation.weights import INCEPTION_WEIGHTS, load_network, require_weights
from softcfg.files import as_path
from softcfg.nn.precision import as_device, as_dtype
from softcfg.plugins import imported
from softcfg.zoo.registry import BUNDLED

ExtractorFactory = Callable[[Path | None, torch.device, torch.dtype], Extractor]  # weights, device, dtype

EXTRACTORS: dict[str, ExtractorFactory] = {}


def register_extractor(name: str, factory: ExtractorFactory) -> None:
    """Make an extractor known by name; `factory(weights, device, dtype)` is called when it is needed."""
    EXTRACTORS[name] = factory


def load_extractor(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Extractor:
    """Load an extractor: a registered name, or "package.module:factory".

    Raises:
        UserError: there is none of that name, or its weights cannot be had.
    """
    require_kind(name, "the name of an extractor", str)
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            factory = getattr(imported(module_name), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"extractor {name} cannot be imported: {error}") from error
    else:
        factory = EXTRACTORS[require_name(name, EXTRACTORS, "there is no feature extractor named")]
    arguments = (None if weights is None else as_path(weights), as_device(device), as_dtype(dtype))
    try:
        inspect.signature(factory).bind(*arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"extractor {name} is not a function of weights, device and dtype: {error}") from error
    extractor = factory(*arguments)
    if not isinstance(extractor, Extractor):
        raise UserError(f"extractor {name} must return an Extractor, got a {type(extractor).__name__}")
    return extractor


def _inception(weights: Path | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    path = weights or require_weights(INCEPTION_WEIGHTS)
    network, digest = load_network(InceptionV3, path, device, dtype)
    note = ""
    if digest != INCEPTION_WEIGHTS.sha256:
        note = f"{path} is not the published file of Inception weights: figures compare with no paper's"
    return Extractor("inception", network, digest, device, dtype, note)


def _fashion(weights: Path | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    path = weights or BUNDLED / "fashion" / "classifier.safetensors"
    network, digest = load_network(FashionClassifier, path, device, dtype)

    def describe(pixels: Tensor) -> Features:
        pooled = network.features(_scaled("fashion", network, pixels, dtype))
        return Features(pooled, logits=network.head(pooled))

    return Extractor("fashion", describe, digest, device, dtype, classifies=True)


def _emoji(weights: Path | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    judge, words, digest = load_judge(weights or BUNDLED / "emoji" / "judge.safetensors", device, dtype)

    def describe(pixels: Tensor) -> Features:
        pooled, logits = judge(_scaled("emoji", judge, pixels, dtype))
        return Features(pooled, logits=logits[0], answers=answers(logits))

    def agreement(seen: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return shares_right(seen.long(), words.read(prompts))

    # Answers that were kept are those of the same views.
    return Extractor("emoji", describe, f"{digest}, {len(VIEWS)} views", device, dtype, agreement=agreement)


def _scaled(name: str, network: SmallNetwork, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Images uint8 [B, 3, H, W] in [0, 1], for a network that takes one size."""
    side, (height, width) = network.image_size, pixels.shape[2:]
    if (height, width) != (side, side):
        raise UserError(f"the extractor {name} takes images of {side} x {side} pixels, these have {height} x {width}")
    return pixels.to(dtype) / 255


register_extractor("inception", _inception)
register_extractor("fashion", _fashion)
register_extractor("emoji", _emoji)
