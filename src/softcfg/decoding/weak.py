"""The weak model that guidance leads away from (autoguidance, arXiv 2406.02507)."""

from __future__ import annotations

from typing import Any, NamedTuple

from softcfg.errors import UserError
from softcfg.guidance import CFG
from softcfg.models.base import Condition, Generator


class WeakModel(NamedTuple):
    """A weak model in one batch.

    Attributes:
        condition: of its B rows, the same as of the conditional rows of the strong model.
    """

    generator: Generator
    condition: Condition


def weak_model(
    guidance: CFG, generator: Generator, condition: Condition, weak: Generator | None, labels: Any
) -> WeakModel | None:
    """The weak model of a batch; None where guidance takes none.

    Args:
        generator, condition: of the strong model.
        weak: the generator of the weak model.
        labels: what the images are conditioned on, as of `Generator.condition`.

    Raises:
        UserError: there is no weak model, or it does not draw what the strong one draws.
    """
    if not guidance.has_weak_model:
        return None
    if weak is None:
        raise UserError(
            f"weak_share {guidance.weak_share:g} takes a weak model, and there is none: give one with weak=, or a "
            "weak_share of 0"
        )
    check_weak(generator, weak)
    made = weak.condition(labels, guided=False)
    if made.geometry != condition.geometry:
        raise UserError(
            f"the weak model draws {_layout(made)}, the strong one {_layout(condition)}: take one with the same grid"
        )
    return WeakModel(weak, made)


def check_weak(generator: Generator, weak: Generator) -> None:
    """Raise `UserError` unless `weak` draws from the vocabulary and the classes of `generator`, on its device."""
    for one, other, what in (
        (generator.vocab_size, weak.vocab_size, "tokens to draw from"),
        (generator.num_tokens, weak.num_tokens, "tokens an image"),
        (generator.num_classes, weak.num_classes, "classes"),
    ):
        if one != other:
            raise UserError(f"the weak model has {other} {what}, the strong one {one}: they must be the same")
    if weak.device != generator.device:
        raise UserError(f"the weak model is on {weak.device}, the strong one on {generator.device}: move one of them")


def _layout(condition: Condition) -> str:
    height, width = condition.geometry.grid
    return f"{condition.num_tokens} tokens of {height} x {width} codes"
