"""Train the judge: a classifier of names, styles and colours, on real pictures and apart from the generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    batch_index,
    by_device,
    randomness,
    save_weights,
)
from softcfg.evaluation.emoji_judge import UNKNOWN, EmojiJudge, agreement
from softcfg.files import write_atomically

BATCH_SIZE = 64
GPU_BATCH_SIZE = 512
# Shares of a batch, by whether the pictures are of other names than the model's and whether they are recoloured.
SHARES = {(False, False): 0.45, (False, True): 0.2, (True, False): 0.25, (True, True): 0.1}
SMALL_SIZE, SMALL_SHARE = 64, 0.75  # pixels of a side, which cost half as much, for this share of the training
MOVES = Moves(turn=12, scale=0.15, shift=0.06, mirrored=0.5)
SMOOTHING = 0.1
PER_HEAD = (1.0, 0.5, 0.3)


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
    average = Average(model, 0.995)
    averaged = judge_of(collection).to(device.device).eval()
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3]
    apart = {id(p) for p in kernels}
    rest = [p for p in model.parameters() if id(p) not in apart]
    optimizers = [Muon(kernels, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.01)]
    training = Training(out / "judge", device, {"model": model, "average": average}, optimizers)
    labels = torch.tensor([wanted(picture) for picture in learnt.pictures])
    mirror = torch.tensor([mirrors(picture.name) for picture in learnt.pictures])
    sets = kinds(learnt, len(collection.names))
    pictures = {SIZE: torch.from_numpy(learnt.pixels).to(device.device)}
    pictures[SMALL_SIZE] = smaller(pictures[SIZE])

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        small = budget.progress(step, training.seconds) < SMALL_SHARE
        model.image_size = SMALL_SIZE if small else SIZE
        chosen = torch.cat(
            [
                known[batch_index(budget.seed + kind, step, count, len(known))]
                for kind, (known, share) in enumerate(sets)
                if (count := min(round(share * batch_size), len(known)))
            ]
        )
        numbers = randomness(budget.seed, step)
        pixels = floats(pictures[model.image_size][chosen.to(device.device)])
        pixels, *same = disguised(moved(pixels, MOVES, numbers, mirror[chosen]), numbers)
        targets = list(labels[chosen].to(device.device).T)
        targets[1:] = [target.where(kept, UNKNOWN) for target, kept in zip(targets[1:], same, strict=True)]
        heads = model(pixels)
        value = torch.zeros((), device=device.device)
        for logits, target, share in zip(heads, targets, PER_HEAD, strict=True):
            entropy = F.cross_entropy(
                logits.float(), target, ignore_index=UNKNOWN, label_smoothing=SMOOTHING, reduction="sum"
            )
            value = value + share * entropy / len(chosen)
        return value, {"names_right": (heads[0].argmax(1) == targets[0]).float().mean()}

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


def kinds(learnt: Collection, names: int) -> list[tuple[Tensor, float]]:
    """The numbers of pictures to learn from, as drawn and recoloured, of the first `names` names and of others; and
    which share of a batch they are.
    """
    found = []
    for (others, recoloured), share in SHARES.items():
        chosen = [i for i in learnt.where(recoloured=recoloured) if (learnt.pictures[i].subject >= names) == others]
        found.append((torch.tensor(chosen, dtype=torch.int64), share))
    there = sum(share for chosen, share in found if len(chosen))
    return [(chosen, share / there) for chosen, share in found]


def smaller(pixels: Tensor) -> Tensor:
    """uint8 [N, S, S, 3] at SMALL_SIZE."""
    size = (SMALL_SIZE, SMALL_SIZE)
    parts = [F.interpolate(floats(part), size=size, mode="bilinear", antialias=True) for part in pixels.split(500)]
    return torch.cat([part.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1) for part in parts])
