"""Train the image tokenizer: 32x32 pixels to 16x16 or 8x8 tokens and back.

The autoencoder first learns without quantisation; k-means over its latents then gives the codebook, which from there on
follows the latents as a moving average. Codes that fall out of use restart at latents of the current batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from recipes.codebook import MovingCodebook, rows
from recipes.fashion_mnist.data import Split
from recipes.training import Budget, Plan, Training, accelerator, batch_index, randomness, save_weights
from softcfg.tokenizers.maskgit_vq import MaskGITVQ, MaskGITVQConfig

BATCH_SIZE = 16
COMMITMENT = 0.25
LOCALITY = 1.0
BACKGROUND_WEIGHT = 10.0
CONTINUOUS_STEPS = 200


def train(
    out: Path,
    budget: Budget,
    data: Split,
    test: Split,
    *,
    config: MaskGITVQConfig,
    continuous_steps: int = CONTINUOUS_STEPS,
    batch_size: int = BATCH_SIZE,
    stop_at: int | None = None,
) -> Path:
    """Train and return the path of the weights."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    model = MaskGITVQ(config).to(device.device)
    model.quantize.requires_grad_(False)
    moving = MovingCodebook(model.quantize.embedding).to(device.device)
    patch = config.downsampling
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    training = Training(out / "tokenizer", device, {"model": model, "moving": moving}, [optimizer])

    def batch(step: int) -> Tensor:
        index = batch_index(budget.seed, step, batch_size, len(data))
        pixels = data.pixels(index, device.device)
        flip = torch.rand(len(pixels), 1, 1, 1, generator=randomness(budget.seed + 1, step)) < 0.5
        pixels = torch.where(flip.to(pixels.device), pixels.flip(3), pixels)
        return pixels.contiguous()

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        pixels = batch(step)
        if step == continuous_steps:
            with torch.no_grad():
                size = min(512, len(data))
                parts = data.pixels(slice(size), device.device).split(64)
                many = torch.cat([rows(model.encode_latents(part))[content(part, patch)] for part in parts])
            moving.initialise(many.float(), randomness(budget.seed + 2, step))
        latents = latents_of_encoder = model.encode_latents(pixels).float()
        numbers: dict[str, Any] = {}
        commitment: Tensor | float = 0.0
        if step >= continuous_steps:
            tokens = model.quantize_latents(latents.detach())
            codes = model.embed_tokens(tokens)
            commitment = F.mse_loss(latents, codes)
            numbers = {"commitment": commitment.detach(), "codes_used": tokens.unique().numel()}
            kept = content(pixels, patch)
            moving.update(rows(latents.detach())[kept], tokens.flatten()[kept], randomness(budget.seed + 3, step))
            latents = latents + (codes - latents).detach()  # straight through
        decoded = model.decode_latents(latents).float()
        error = F.mse_loss(decoded, pixels)
        numbers["psnr"] = -10 * error.detach().log10()
        target = haar(pixels, patch)
        wrong = rows(latents_of_encoder - F.pad(target, (0, 0, 0, 0, 0, config.z_channels - 4))).square()
        local = torch.where(content(pixels, patch), wrong[:, :4].mean(1), BACKGROUND_WEIGHT * wrong.mean(1)).mean()
        numbers["local"] = local.detach()
        return F.l1_loss(decoded, pixels) + 4 * error + COMMITMENT * commitment + LOCALITY * local, numbers

    def evaluate() -> dict[str, float]:
        return reconstruction_quality(model, test.pixels(slice(1000), device.device))

    plan = Plan(warmup_steps=50, decay_share=0.5, evaluate_every=250)
    training.fit(budget, plan, loss, evaluate=evaluate, stop_at=stop_at)
    weights = out / "tokenizer.safetensors"
    save_weights(weights, model.state_dict())
    return weights


def tokenizer_from(weights: Path, config: MaskGITVQConfig) -> MaskGITVQ:
    """Return the trained tokenizer."""
    model = MaskGITVQ(config).eval()
    model.load_state_dict(load_file(weights))
    return model


@torch.inference_mode()
def reconstruction_quality(model: MaskGITVQ, pixels: Tensor) -> dict[str, float]:
    """Return PSNR in dB, and the entropy in nats of the codes of all patches and of black patches."""
    error, tokens = 0.0, []
    for part in pixels.split(100):
        tokens.append(model.encode(part))
        error += float((model.decode(tokens[-1]) - part).square().mean()) * len(part) / len(pixels)
    share = torch.bincount(torch.cat(tokens).flatten(), minlength=model.codebook_size).float() / (
        model.num_tokens * len(pixels)
    )
    black = F.max_pool2d(pixels[:, 0], model.config.downsampling).flatten(1) == 0
    black_share = torch.bincount(torch.cat(tokens)[black], minlength=model.codebook_size).float() / black.sum()
    return {
        "test_psnr": -10 * torch.tensor(error).log10().item(),
        "code_entropy": -share.xlogy(share).sum().item(),
        "codes_used": int((share > 0).sum()),
        "black_entropy": -black_share.xlogy(black_share).sum().item(),
    }


def haar(pixels: Tensor, patch: int) -> Tensor:
    """Return what a token should say of its patch: sum and differences of the means of its quadrants."""
    quadrants = F.avg_pool2d(pixels[:, :1], patch // 2)
    a, b, c, d = F.pixel_unshuffle(quadrants, 2).chunk(4, dim=1)
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2


def content(pixels: Tensor, patch: int) -> Tensor:
    """Return which of the `B * T` patches are not black throughout."""
    return F.max_pool2d(pixels[:, 0], patch).flatten() > 0
