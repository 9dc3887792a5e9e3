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
from recipes.emoji.data import Collection, Picture, mirrors
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
    out: Path, budget: Budget, collection: Collection, *, batch_size: int | None = None, stop_at: int | None = None
) -> Path:
    """Train on the pictures that are not held out and return the path of the averaged weights."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    batch_size = batch_size or by_device(device, cpu=BATCH_SIZE, gpu=GPU_BATCH_SIZE)
    model = judge_of(collection).to(device.device)
    average = Average(model, 0.995)
    averaged = judge_of(collection).to(device.device).eval()
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3]
    apart = {id(p) for p in kernels}
    rest = [p for p in model.parameters() if id(p) not in apart]
    optimizers = [Muon(kernels, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.01)]
    training = Training(out / "judge", device, {"model": model, "average": average}, optimizers)
    labels = torch.tensor([wanted(picture) for picture in collection.pictures])
    mirror = torch.tensor([mirrors(picture.name) for picture in collection.pictures])
    known = torch.tensor(collection.where())
    pictures = torch.from_numpy(collection.pixels).to(device.device)

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        chosen = known[batch_index(budget.seed, step, batch_size, len(known))]
        numbers = randomness(budget.seed, step)
        pixels = floats(pictures[chosen.to(device.device)])
        pixels, *same = disguised(moved(pixels, MOVES, numbers, mirror[chosen]), numbers)
        targets = list(labels[chosen].to(device.device).T)
        targets[1:] = [target.where(kept, UNKNOWN) for target, kept in zip(targets[1:], same, strict=True)]
        heads = model(pixels)
        value = torch.zeros((), device=device.device)
        for logits, target, share in zip(heads, targets, PER_HEAD, strict=True):
            entropy = F.cross_entropy(
                logits.float(), target, ignore_index=UNKNOWN, label_smoothing=SMOOTHING, reduction="sum"
            )
            value = value + share * entropy / batch_size
        return value, {"names_right": (heads[0].argmax(1) == targets[0]).float().mean()}

    def evaluate() -> dict[str, float]:
        averaged.load_state_dict(average.weights())
        weights = {name: t.half() if t.is_floating_point() else t for name, t in average.weights().items()}
        save_weights(out / "judge.safetensors", weights)
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
