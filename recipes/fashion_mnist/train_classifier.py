"""Train the classifier that measures class accuracy and gives the features of the bundled model's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.fashion_mnist.data import Split
from recipes.muon import Muon
from recipes.training import (
    Average,
    Budget,
    Plan,
    Training,
    accelerator,
    batch_index,
    randomness,
    save_weights,
)
from softcfg.evaluation.fashion_classifier import FashionClassifier

BATCH_SIZE = 128


def train(
    out: Path, budget: Budget, data: Split, test: Split, *, batch_size: int = BATCH_SIZE, stop_at: int | None = None
) -> Path:
    """Train and return the path of the weights."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    model = FashionClassifier().to(memory_format=torch.channels_last).to(device.device)  # type: ignore[call-overload]
    kernels = [p for p in model.blocks.parameters() if p.ndim == 4]
    rest = [p for p in model.parameters() if p.ndim < 4]
    optimizers = [Muon(kernels, lr=6e-3, weight_decay=0.05), torch.optim.AdamW(rest, lr=4e-3, weight_decay=0.01)]
    average = Average(model, 0.995)
    training = Training(out / "classifier", device, {"model": model, "average": average}, optimizers)
    best = FashionClassifier().to(device.device).eval()

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        index = batch_index(budget.seed, step, batch_size, len(data))
        pixels = augment(data.pixels(index, device.device), randomness(budget.seed + 1, step))
        logits = model(pixels.contiguous(memory_format=torch.channels_last))
        target = data.labels[index].to(device.device)
        accuracy = (logits.detach().argmax(1) == target).float().mean()
        return F.cross_entropy(logits.float(), target, label_smoothing=0.1), {"accuracy": accuracy}

    def evaluate() -> dict[str, float]:
        best.load_state_dict(average.weights())
        pixels = test.pixels(slice(None), device.device)
        return {"test_accuracy": best.accuracy(pixels, test.labels)}

    plan = Plan(warmup_steps=200, decay_share=0.8, evaluate_every=1000)
    training.fit(budget, plan, loss, after_step=average.update, evaluate=evaluate, stop_at=stop_at)
    weights = out / "classifier.safetensors"
    save_weights(weights, average.weights())
    return weights


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and shift each batch by up to two pixels (the border is black)."""
    flip = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(flip.to(pixels.device), pixels.flip(3), pixels)
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return pixels.roll((down, right), dims=(2, 3))
