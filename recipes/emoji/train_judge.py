"""Train the judge: a classifier of names, styles and colours, on real pictures and apart from the generator.

It is to recognise things in the hands of artists who were never seen to draw them. So a batch holds several pictures of
a name by different artists, whose features are pulled together in the end; and on the way to the name the means and
deviations of the channels, in which the style shows, are mixed with those of other pictures.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.emoji.augment import Moves, disguised, moved
from recipes.emoji.colours import COLOURS
from recipes.emoji.data import SIZE, Collection, Picture, joined, mirrors
from recipes.emoji.sources import STYLES
from recipes.emoji.train_tokenizer import floats, pixels_of
from recipes.muon import Muon
from recipes.training import (
    Average,
    Budget,
    Plan,
    Training,
    accelerator,
    by_device,
    randomness,
    save_weights,
)
from softcfg.evaluation.emoji_judge import UNKNOWN, EmojiJudge, agreement
from softcfg.files import write_atomically

BATCH_SIZE = 64
GPU_BATCH_SIZE = 512
OWN = 0.65  # share of a batch that the model's names are, the rest others
MIXED_BEFORE = (3, 5)  # blocks of the network, after the layers that the style is told from
SMOOTHING = 0.1
PER_HEAD = (1.0, 0.5, 0.3)
TEMPERATURE = 0.1  # of `contrast`


class Stage(NamedTuple):
    """How hard it is made.

    Attributes:
        size: pixels of a side.
        moves: of the pictures.
        group: pictures of a name in a batch.
        dropout: share of the features.
        mixed: share of the pictures that others are mixed into, see `mixing`.
        contrast: weight of `contrast`.
    """

    size: int
    moves: Moves
    group: int
    dropout: float
    mixed: float
    contrast: float


# A network that knows nothing learns hardly a name in 800 steps of the second stage. Small pictures cost half as much.
EASY = Stage(
    64,
    Moves(turn=12, scale=0.15, shift=0.06, mirrored=0.5),
    group=1,
    dropout=0.25,
    mixed=0.0,
    contrast=0.0,
)
EASY_SHARE = 0.5  # of the training
HARD = Stage(
    SIZE,
    Moves(turn=20, scale=0.25, shift=0.1, mirrored=0.5, shear=0.18, aspect=0.15, warp=0.12, weak=0.25),
    group=4,
    dropout=0.4,
    mixed=0.5,
    contrast=0.25,
)


def judge_of(collection: Collection) -> EmojiJudge:
    """Return a network for the names of a collection."""
    return EmojiJudge(len(collection.names), len(STYLES), len(COLOURS))


def wanted(picture: Picture) -> tuple[int, int, int]:
    """Return name, style and colour as numbers."""
    style = next(i for i, style in enumerate(STYLES) if style.word == picture.style)
    return picture.subject, style, COLOURS.index(picture.colour) if picture.colour else UNKNOWN


def train(
    out: Path,
    budget: Budget,
    collection: Collection,
    *,
    others: Collection | None = None,
    batch_size: int | None = None,
    stop_at: int | None = None,
) -> Path:
    """Train on the pictures that are not held out and return the path of the averaged weights.

    Args:
        others: pictures of further names (`data.load_others`), of which it learns to recognise a thing in any hand. The
            judge that is written does not know these names.
    """
    torch.manual_seed(budget.seed)
    device = accelerator()
    batch_size = batch_size or by_device(device, cpu=BATCH_SIZE, gpu=GPU_BATCH_SIZE)
    learnt = collection if others is None else joined(collection, others)
    model = judge_of(learnt).to(device.device)
    width = model.num_features
    projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)).to(device.device)
    average = Average(model, 0.998)
    averaged = judge_of(collection).to(device.device).eval()
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3]
    apart = {id(p) for p in kernels}
    rest = [p for p in (*model.parameters(), *projection.parameters()) if id(p) not in apart]
    optimizers = [Muon(kernels, lr=1e-2, weight_decay=0.25), torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.05)]
    modules = {"model": model, "projection": projection, "average": average}
    training = Training(out / "judge", device, modules, optimizers)
    labels = torch.tensor([wanted(picture) for picture in learnt.pictures])
    mirror = torch.tensor([mirrors(picture.name) for picture in learnt.pictures])
    groups = Groups(learnt, len(collection.names))
    pictures = {SIZE: torch.from_numpy(learnt.pixels).to(device.device)}
    pictures[EASY.size] = smaller(pictures[SIZE])

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        stage = EASY if budget.progress(step, training.seconds) < EASY_SHARE else HARD
        model.image_size, model.dropout.p = stage.size, stage.dropout
        numbers = randomness(budget.seed, step)
        torch.manual_seed(numbers.initial_seed())  # of the dropout and of the mixing
        chosen = torch.tensor(groups.batch(budget.seed, step, batch_size, stage.group))
        names, styles, colours = labels[chosen].to(device.device).T
        pixels = floats(pictures[stage.size][chosen.to(device.device)])
        pixels, same_style, same_colour = disguised(moved(pixels, stage.moves, numbers, mirror[chosen]), numbers)
        share = torch.distributions.Beta(0.3, 0.3).sample((len(chosen),))
        share = share.where(torch.rand(len(chosen)) < stage.mixed, 1.0).to(device.device)
        partner = torch.randperm(len(chosen)).to(device.device)
        with mixing(model, share, partner):
            features, heads = model.describe(pixels)
        contrasted = contrast(projection(features), names, styles)
        value = stage.contrast * contrasted
        targets = (names, styles.where(same_style, UNKNOWN), colours.where(same_colour & (share == 1), UNKNOWN))
        for logits, target, weight in zip(heads, targets, PER_HEAD, strict=True):
            entropy = F.cross_entropy(
                logits.float(), target, ignore_index=UNKNOWN, label_smoothing=SMOOTHING, reduction="sum"
            )
            value = value + weight * entropy / (target != UNKNOWN).sum().clamp(min=1)
        return value, {"names_right": (heads[0].argmax(1) == names).float().mean(), "contrast": contrasted.detach()}

    def evaluate() -> dict[str, float]:
        known = averaged.state_dict()  # whose names come first
        weights = {name: t[: len(known[name])] if t.dim() else t for name, t in average.weights().items()}
        averaged.load_state_dict(weights)
        save_weights(
            out / "judge.safetensors",
            {name: t.half() if t.is_floating_point() else t for name, t in weights.items()},
        )
        numbers: dict[str, float] = {}
        for kind in ("style", "colour"):
            chosen = [
                i for i in collection.where(held_out=kind) if kind == "colour" or not collection.pictures[i].recoloured
            ]
            if chosen:
                found = agreement(averaged, pixels_of(collection, chosen).to(device.device), labels[chosen])
                numbers |= {f"held_out_{kind}_{key}": value for key, value in found.items()}
        return numbers

    words = {"names": collection.names, "styles": [style.word for style in STYLES], "colours": COLOURS}
    write_atomically(out / "judge.json", json.dumps(words).encode())
    plan = Plan(warmup_steps=100, decay_share=0.5)
    training.fit(budget, plan, loss, after_step=average.update, evaluate=evaluate, stop_at=stop_at)
    return out / "judge.safetensors"


class Groups:
    """What batches are made of: the pictures to learn from, by name and style.

    Args:
        learnt: the pictures.
        own: how many of the names, the first, are the model's.
    """

    def __init__(self, learnt: Collection, own: int) -> None:
        found: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i in learnt.where():
            found[learnt.pictures[i].subject][learnt.pictures[i].style].append(i)
        self.own = [[*styles.values()] for name, styles in sorted(found.items()) if name < own]
        self.others = [[*styles.values()] for name, styles in sorted(found.items()) if name >= own]

    def batch(self, seed: int, step: int, size: int, group: int) -> list[int]:
        """Return the pictures of a step: `group` of a name side by side, of different styles where there are as many.

        It takes no name twice unless there are too few.
        """
        numbers = random.Random(f"{seed} {step}")
        count = max(1, size // group)
        own = round(OWN * count) if self.others else count
        chosen = []
        for names, share in ((self.own, own), (self.others, count - own)):
            names = numbers.sample(names, len(names))
            for i in range(share):
                order = numbers.sample(names[i % len(names)], len(names[i % len(names)]))
                chosen += [numbers.choice(order[k % len(order)]) for k in range(group)]
        return chosen


@contextmanager
def mixing(judge: EmojiJudge, share: Tensor, partner: Tensor) -> Iterator[None]:
    """MixStyle, on the way to features, names and colours: the style, which is told from earlier layers, stays.

    Source: https://arxiv.org/abs/2104.02008.

    Args:
        judge: the network.
        share: float [B], how much stays of a picture's own statistics.
        partner: int64 [B], the pictures of the batch that the rest is taken from.
    """
    hooks = [
        judge.blocks[i].register_forward_pre_hook(lambda _, given: mixed(given[0], share, partner))
        for i in MIXED_BEFORE
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mixed(maps: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """Mix means and deviations of the channels of [B, C, h, w], which no gradient goes through, see `mixing`."""
    x, share = maps.float(), share.view(-1, 1, 1, 1)
    mean, deviation = x.detach().mean((2, 3), keepdim=True), (x.detach().var((2, 3), keepdim=True) + 1e-5).sqrt()
    means, deviations = (share * own + (1 - share) * own[partner] for own in (mean, deviation))
    return ((x - mean) / deviation * deviations + means).to(maps)


def contrast(vectors: Tensor, names: Tensor, styles: Tensor) -> Tensor:
    """How much nearer a picture is to those of other names than to those of its own by other artists.

    Pictures of one name and style count as neither. Source: https://arxiv.org/abs/2004.11362.

    Args:
        vectors: [B, D].
        names, styles: int64 [B].
    """
    with torch.autocast(vectors.device.type, enabled=False):
        directions = F.normalize(vectors.float(), dim=1)
        near = directions @ directions.T / TEMPERATURE
    same = names[:, None] == names
    wanted = same & (styles[:, None] != styles)
    found = near.masked_fill(same & ~wanted, -1e4).log_softmax(1)
    count = wanted.sum(1)
    return -((found * wanted).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def smaller(pixels: Tensor) -> Tensor:
    """uint8 [N, S, S, 3] at the size of the first stage."""
    size = (EASY.size, EASY.size)
    parts = [F.interpolate(floats(part), size=size, mode="bilinear", antialias=True) for part in pixels.split(500)]
    return torch.cat([part.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1) for part in parts])
