"""Train the image tokenizer: 32x32 pixels to 8x8 tokens and back.

As in `fashion`, the autoencoder first learns without quantisation; k-means over its latents then gives the codebook,
which from there on follows the latents as a moving average.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from recipes.codebook import MovingCodebook, rows
from recipes.emoji.data import SIZE, Picture
from recipes.training import Budget, Plan, Training, accelerator, batch_index, randomness, save_weights
from softcfg.tokenizers.movq import MoVQ, MoVQConfig

CONFIG = MoVQConfig(
    ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=SIZE,
    z_channels=8, embed_dim=8, n_embed=1024,
)  # fmt: skip
BATCH_SIZE = 16
CONTINUOUS_STEPS = 200
INITIAL_PICTURES = 1500
COMMITMENT = 0.25
LOCALITY = 0.3
BACKGROUND_WEIGHT = 10.0
EDGES = 0.5


def train(
    out: Path,
    budget: Budget,
    pictures: Sequence[Picture],
    *,
    config: MoVQConfig = CONFIG,
    continuous_steps: int = CONTINUOUS_STEPS,
    batch_size: int = BATCH_SIZE,
    stop_at: int | None = None,
) -> Path:
    """Train on the pictures that are not held out and return the path of the weights."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    model = MoVQ(config).to(device.device)
    model.quantize.requires_grad_(False)
    moving = MovingCodebook(model.quantize.embedding).to(device.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    training = Training(out / "tokenizer", device, {"model": model, "moving": moving}, [optimizer])
    data = pixels_of([picture for picture in pictures if not picture.held_out])
    test = pixels_of([picture for picture in pictures if picture.held_out])

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        pixels = data[batch_index(budget.seed, step, batch_size, len(data))].to(device.device)
        if step == continuous_steps:
            with torch.no_grad():
                chosen = data[batch_index(budget.seed + 1, 0, min(INITIAL_PICTURES, len(data)), len(data))]
                parts = chosen.to(device.device).split(64)
                many = torch.cat([rows(model.encode_latents(part))[content(part)] for part in parts])
            moving.initialise(many.float(), randomness(budget.seed + 2, step))
        latents = latents_of_encoder = model.encode_latents(pixels).float()
        numbers: dict[str, Any] = {}
        commitment: Tensor | float = 0.0
        if step >= continuous_steps:
            tokens = model.quantize_latents(latents.detach())
            codes = model.embed_tokens(tokens)
            commitment = F.mse_loss(latents, codes)
            numbers = {"commitment": commitment.detach(), "codes_used": tokens.unique().numel()}
            kept = content(pixels)
            moving.update(rows(latents.detach())[kept], tokens.flatten()[kept], randomness(budget.seed + 3, step))
            latents = latents + (codes - latents).detach()  # straight through
        decoded = model.decode_latents(latents).float()
        error = F.mse_loss(decoded, pixels)
        numbers["psnr"] = -10 * error.detach().log10()
        wrong = rows(latents_of_encoder - summary(pixels, config.embed_dim)).square().mean(1)
        local = torch.where(content(pixels), wrong, BACKGROUND_WEIGHT * wrong).mean()
        numbers["local"] = local.detach()
        pixel_loss = F.l1_loss(decoded, pixels) + EDGES * edge_loss(decoded, pixels) + 4 * error
        return pixel_loss + COMMITMENT * commitment + LOCALITY * local, numbers

    def evaluate() -> dict[str, float]:
        save_weights(out / "tokenizer.safetensors", model.state_dict())
        return reconstruction_quality(model, test.to(device.device)) if len(test) else {}

    plan = Plan(warmup_steps=50, decay_share=0.5, evaluate_every=250)
    training.fit(budget, plan, loss, evaluate=evaluate, stop_at=stop_at)
    return out / "tokenizer.safetensors"


def tokenizer_from(weights: Path, config: MoVQConfig = CONFIG) -> MoVQ:
    """Return the trained tokenizer."""
    model = MoVQ(config).eval()
    model.load_state_dict(load_file(weights))
    return model


def pixels_of(pictures: Sequence[Picture]) -> Tensor:
    """Float32 [N, 3, 32, 32] in [0, 1]."""
    if not pictures:
        return torch.zeros(0, 3, SIZE, SIZE)
    return torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def edge_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels: it punishes blur."""
    return sum(  # type: ignore[return-value]
        (decoded.diff(dim=dim) - pixels.diff(dim=dim)).abs().mean() for dim in (2, 3)
    )


def summary(pixels: Tensor, channels: int) -> Tensor:
    """What a token should say of its 4x4 patch: its mean colour and the coarsest patterns of its brightness.

    These are coefficients [B, channels, h, w] of orthonormal cosines, zero for a white patch.
    """
    red, green, blue = (1 - pixels).unbind(1)
    light = (red + green + blue) / 3**0.5
    colour = torch.stack([light, (red - blue) / 2**0.5, (red - 2 * green + blue) / 6**0.5], dim=1)
    place = (torch.arange(4, device=pixels.device) + 0.5) * torch.pi / 4
    waves = torch.stack([(place * k).cos() * (2**0.5 if k else 1) for k in range(4)]) / 4  # [4, 4]
    patches = colour.unflatten(3, (-1, 4)).unflatten(2, (-1, 4))  # [B, 3, h, 4, w, 4]
    patterns = torch.einsum("bchyvx,iy,jx->bcijhv", patches, waves, waves)
    order = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 2), (0, 2, 0)]
    return torch.stack([patterns[:, c, i, j] for c, i, j in order[:channels]], dim=1)


def content(pixels: Tensor) -> Tensor:
    """Return which of the `B * T` patches are not white throughout."""
    return F.max_pool2d(1 - pixels.amin(1, keepdim=True), 4).flatten() > 0.02


@torch.inference_mode()
def reconstruction_quality(model: MoVQ, pixels: Tensor) -> dict[str, float]:
    """Return PSNR in dB of held-out pictures, and how their codes are spread."""
    error, tokens = 0.0, []
    for part in pixels.split(100):
        tokens.append(model.encode(part))
        error += float((model.decode(tokens[-1]) - part).square().mean()) * len(part) / len(pixels)
    share = torch.bincount(torch.cat(tokens).flatten(), minlength=model.codebook_size).float()
    share /= share.sum()
    white = torch.cat(tokens).flatten()[~content(pixels)]
    return {
        "test_psnr": -10 * torch.tensor(error).log10().item(),
        "code_entropy": -share.xlogy(share).sum().item(),
        "codes_used": int((share > 0).sum()),
        "white_as_background": float((white == 0).float().mean()),
    }
