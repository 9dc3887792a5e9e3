"""Train the class-conditional generator on the tokens of the images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.fashion_mnist.data import Split
from recipes.fashion_mnist.presets import Preset
from recipes.fashion_mnist.train_tokenizer import tokenizer_from
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
from softcfg.files import hash_file
from softcfg.kept import read_kept, write_kept
from softcfg.models.alitok import AliTok, AliTokConfig
from softcfg.tokenizers.maskgit_vq import MaskGITVQ

LABEL_DROPOUT = 0.1
EVALUATED = 320


@dataclass(frozen=True)
class Tokens:
    """Images as tokens int64 [N, T] and their labels int64 [N]."""

    tokens: Tensor
    labels: Tensor


def train(out: Path, budget: Budget, data: Split, test: Split, preset: Preset, *, compiled: bool = False) -> Path:
    """Tokenise the images with the tokenizer in `out`, train, and return the path of the weights."""
    tokenizer = tokenizer_from(out / "tokenizer.safetensors", preset.tokenizer)
    codes = [Tokens(tokenise(split, tokenizer, out / "tokenizer.safetensors"), split.labels) for split in (data, test)]
    return train_on_tokens(
        out, budget, *codes, config=preset.generator, batch_size=preset.generator_batch, compiled=compiled
    )


def train_on_tokens(
    out: Path,
    budget: Budget,
    data: Tokens,
    test: Tokens,
    *,
    config: AliTokConfig,
    batch_size: int,
    compiled: bool = False,
    stop_at: int | None = None,
) -> Path:
    """Train and return the path of the averaged weights."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    model = AliTok(config).to(device.device)
    initialise(model)
    average = Average(model, 0.998)
    averaged = AliTok(config).to(device.device).eval()
    training = Training(out / "generator", device, {"model": model, "average": average}, optimizers_of(model))
    predict = torch.compile(model) if compiled else model

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        index = batch_index(budget.seed, step, batch_size, len(data.tokens))
        dropped = torch.rand(len(index), generator=randomness(budget.seed + 1, step)) < LABEL_DROPOUT
        labels = data.labels[index].masked_fill(dropped, config.condition_num_classes)
        return nats_per_token(predict, data.tokens[index].to(device.device), labels.to(device.device)), {}

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        averaged.load_state_dict(average.weights())
        tokens, labels = test.tokens[:EVALUATED], test.labels[:EVALUATED]
        null = torch.full_like(labels, config.condition_num_classes)
        save_weights(out / "generator.safetensors", averaged.state_dict())
        return {"test_conditional": mean_loss(tokens, labels), "test_unconditional": mean_loss(tokens, null)}

    def mean_loss(tokens: Tensor, labels: Tensor) -> float:
        pairs = zip(tokens.to(device.device).split(80), labels.to(device.device).split(80), strict=True)
        return sum(len(c) * float(nats_per_token(averaged, t, c)) for t, c in pairs) / len(labels)

    plan = Plan(warmup_steps=100, decay_share=0.35, evaluate_every=1250)
    training.fit(budget, plan, loss, after_step=average.update, evaluate=evaluate, stop_at=stop_at)
    return out / "generator.safetensors"


def nats_per_token(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of predicting every token; label 10 is the null class."""
    logits = model(model.class_condition(labels), tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def initialise(model: AliTok) -> None:
    """Set the weights: normal with the inverse root of the width, what is added to the residual stream zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        elif name.endswith(("attn.proj.weight", "mlp.w2.weight")) or name == "output.weight":
            nn.init.zeros_(parameter)
        elif name == "embeddings.weight":
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def optimizers_of(model: AliTok) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for everything else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(matrices, lr=6e-3, weight_decay=0.03),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def tokenise(data: Split, tokenizer: MaskGITVQ, weights: Path) -> Tensor:
    """Return the tokens int64 `[N, T]` of all images, kept beside the weights in a file that is named after both."""
    digest = hashlib.sha256(hash_file(weights).encode())
    digest.update(data.images.numpy().tobytes())
    cache = weights.with_name(f"tokens-{digest.hexdigest()[:16]}.safetensors")
    if (known := read_kept(cache)) is not None:
        return known["tokens"].long()
    tokenizer = tokenizer.to(accelerator().device)
    tokens = torch.cat([tokenizer.encode(data.pixels(part)).cpu() for part in torch.arange(len(data)).split(250)])
    write_kept(cache, {"tokens": tokens.short()})
    return tokens
