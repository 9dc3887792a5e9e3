"""Train the image tokenizer: 96 x 96 pixels to 12 x 12 tokens and back.

What a token says is fixed beforehand: the code nearest to a summary of its 8 x 8 patch, its mean colour and the
coarsest patterns in it, where k-means over the summaries of many patches gives the codes. The decoder learns to draw
pictures from these codes, and the encoder learns the summary.
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
from recipes.emoji.augment import Moves, moved
from recipes.emoji.data import SIZE, Collection
from recipes.muon import Muon
from recipes.training import Budget, Plan, Training, accelerator, batch_index, by_device, randomness, save_weights
from softcfg.tokenizers.movq import MoVQ, MoVQConfig

PATCH = 8
# Channel (brightness, red - blue, red - 2 green + blue) and the half waves down and across of what a summary holds.
WAVES = sorted(((i, j) for i in range(5) for j in range(5)), key=lambda wave: (sum(wave), max(wave)))
PATTERNS = [(0, *wave) for wave in WAVES[:15]] + [(c, *wave) for c in (1, 2) for wave in WAVES[:6]]

CONFIG = MoVQConfig(
    ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=SIZE,
    z_channels=len(PATTERNS), embed_dim=len(PATTERNS), n_embed=2048,
)  # fmt: skip
BATCH_SIZE = 8
GPU_BATCH_SIZE = 64
MOVES = Moves(turn=4, scale=0.1, shift=0.06)
CODEBOOK_PICTURES = 1500
CODEBOOK_ROUNDS = 20
EDGES = 0.5
ENCODER_EVERY = 3  # steps
EVALUATED = 300


def prepare(out: Path, collection: Collection, seed: int, config: MoVQConfig = CONFIG) -> Path:
    """Choose the codes by k-means over patches of pictures that are not held out; return the file they are in."""
    path = out / "codebook.safetensors"
    if not path.exists():
        numbers = randomness(seed, 0)
        known = collection.where()
        chosen = torch.randperm(len(known), generator=numbers)[:CODEBOOK_PICTURES].tolist()
        pixels = pixels_of(collection, [known[i] for i in chosen])
        model = MoVQ(config)
        patches = rows(summary(pixels))[content(pixels)]
        MovingCodebook(model.quantize.embedding).initialise(patches, numbers, CODEBOOK_ROUNDS)
        save_weights(path, {"codes": model.quantize.embedding.weight})
    return path


def train(
    out: Path,
    budget: Budget,
    collection: Collection,
    *,
    config: MoVQConfig = CONFIG,
    batch_size: int | None = None,
    stop_at: int | None = None,
) -> Path:
    """Train on the pictures that are not held out and return the path of the weights."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    batch_size = batch_size or by_device(device, cpu=BATCH_SIZE, gpu=GPU_BATCH_SIZE)
    model = MoVQ(config).to(device.device)
    model.quantize.requires_grad_(False)
    model.quantize.embedding.weight.copy_(load_file(prepare(out, collection, budget.seed, config))["codes"])
    training = Training(out / "tokenizer", device, {"model": model}, optimizers_of(model))
    known, unknown = torch.tensor(collection.where()), collection.where(held_out="style")
    pictures = torch.from_numpy(collection.pixels).to(device.device)

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        chosen = known[batch_index(budget.seed, step, batch_size, len(known))]
        pixels = moved(floats(pictures[chosen.to(device.device)]), MOVES, randomness(budget.seed, step))
        decoded = model.decode_latents(model.embed_tokens(tokens_of(model, pixels))).float()
        error = F.mse_loss(decoded, pixels)
        value = F.l1_loss(decoded, pixels) + EDGES * edge_loss(decoded, pixels) + 4 * error
        numbers = {"psnr": -10 * error.detach().log10()}
        if step % ENCODER_EVERY == 0:
            wrong = F.mse_loss(model.encode_latents(pixels).float(), summary(pixels))
            numbers["encoder_error"] = wrong.detach()
            value = value + wrong
        return value, numbers

    def evaluate() -> dict[str, float]:
        save_weights(out / "tokenizer.safetensors", model.state_dict())
        chosen = unknown[:: max(1, len(unknown) // EVALUATED)]
        return reconstruction_quality(model, pixels_of(collection, chosen).to(device.device)) if chosen else {}

    plan = Plan(warmup_steps=50, decay_share=0.5, evaluate_every=500, log_every=21)
    training.fit(budget, plan, loss, evaluate=evaluate, stop_at=stop_at)
    return out / "tokenizer.safetensors"


def optimizers_of(model: MoVQ) -> list[torch.optim.Optimizer]:
    """Muon for the 3x3 kernels inside, AdamW for everything else."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kernels = {name: p for name, p in parameters.items() if p.shape[2:] == (3, 3) and min(p.shape[:2]) >= 32}
    rest = [p for name, p in parameters.items() if name not in kernels]
    return [Muon(kernels.values(), lr=6e-3), torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)]


def pixels_of(collection: Collection, chosen: Sequence[int]) -> Tensor:
    """Return pictures as float32 [N, 3, S, S] in [0, 1]."""
    return floats(torch.from_numpy(collection.pixels[np.asarray(chosen, dtype=np.int64)]))


def floats(pixels: Tensor) -> Tensor:
    """uint8 [N, S, S, 3] as float32 [N, 3, S, S] in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def edge_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels: it punishes blur."""
    return sum(  # type: ignore[return-value]
        (decoded.diff(dim=dim) - pixels.diff(dim=dim)).abs().mean() for dim in (2, 3)
    )


def summary(pixels: Tensor) -> Tensor:
    """What a token should say of its 8 x 8 patch, as coefficients [B, 27, h, w] of cosines; zero for white."""
    red, green, blue = (1 - pixels).unbind(1)
    light = (red + green + blue) / 3**0.5
    colour = torch.stack([light, (red - blue) / 2**0.5, (red - 2 * green + blue) / 6**0.5], dim=1)
    place = (torch.arange(PATCH, device=pixels.device) + 0.5) * torch.pi / PATCH
    waves = torch.stack([(place * k).cos() * (2**0.5 if k else 1) for k in range(5)]) / PATCH  # [5, 8]
    patches = colour.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, 3, h, 8, w, 8]
    patterns = torch.einsum("bchyvx,iy,jx->bcijhv", patches, waves, waves)
    return torch.stack([patterns[:, c, i, j] for c, i, j in PATTERNS], dim=1)


def tokens_of(model: MoVQ, pixels: Tensor) -> Tensor:
    """The tokens int64 [B, T] that the decoder learns to draw from; `model.encode` comes near them."""
    with torch.autocast(pixels.device.type, enabled=False):
        return model.quantize_latents(summary(pixels))


def content(pixels: Tensor) -> Tensor:
    """Return which of the `B * T` patches are not white throughout."""
    return F.max_pool2d(1 - pixels.amin(1, keepdim=True), PATCH).flatten() > 0.02


@torch.inference_mode()
def reconstruction_quality(model: MoVQ, pixels: Tensor) -> dict[str, float]:
    """Return the PSNR in dB of pictures through the summary and through the encoder, and more of their codes."""
    wanted = torch.cat([tokens_of(model, part) for part in pixels.split(50)])
    found = torch.cat([model.encode(part) for part in pixels.split(50)])
    share = torch.bincount(wanted.flatten(), minlength=model.codebook_size).float()
    share /= share.sum()

    def psnr(tokens: Tensor) -> float:
        decoded = torch.cat([model.decode(part) for part in tokens.split(50)])
        return -10 * (decoded - pixels).square().mean().log10().item()

    return {
        "test_psnr": psnr(wanted),
        "test_psnr_encoder": psnr(found),
        "encoder_agrees": float((wanted == found).float().mean()),
        "code_entropy": -share.xlogy(share).sum().item(),
        "codes_used": int((share > 0).sum()),
    }
