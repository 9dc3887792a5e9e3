"""A codebook learnt as k-means: each code is the moving average of the latents that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovingCodebook(nn.Module):
    """Keeps each code at the moving average of the latents that it stands for; code 0 stays zero, for background."""

    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: nn.Embedding, decay: float = 0.99, revive_below: float = 0.05) -> None:
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self._codes = [codebook.weight]  # in a list: no parameter of this module
        self.register_buffer("counts", torch.zeros(codebook.num_embeddings - 1))
        self.register_buffer("sums", torch.zeros(codebook.num_embeddings - 1, codebook.embedding_dim))

    @torch.no_grad()
    def initialise(self, latents: Tensor, generator: torch.Generator, rounds: int = 20) -> None:
        """Set the codes by k-means++ over `latents` `[N, C]`."""
        size = len(self.counts)
        codes = latents.new_zeros(1 + size, latents.shape[1])
        distance = latents.square().sum(1)
        for i in range(1, 1 + size):
            if not distance.any():  # fewer different latents than codes: the others stay zero
                break
            codes[i] = latents[int(torch.multinomial(distance.cpu(), 1, generator=generator))]
            distance = torch.minimum(distance, (latents - codes[i]).square().sum(1))
        for _ in range(rounds):
            counts, sums = _tally(latents, torch.cdist(latents, codes).argmin(1), size)
            codes[1:] = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes[1:])
        self._codes[0].copy_(codes)
        self.counts.copy_(counts.clamp(min=1))
        self.sums.copy_(codes[1:] * self.counts[:, None])

    @torch.no_grad()
    def update(self, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
        """Move the codes towards `latents` `[N, C]` that have the given tokens `[N]`; restart unused ones."""
        counts, sums = _tally(latents, tokens, len(self.counts))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        unused = self.counts < self.revive_below * self.counts.mean()
        if number := int(unused.sum()):
            # Far latents first: most of an image is background, which one code serves.
            distance = (latents - self._codes[0][tokens]).square().sum(1).cpu() + 1e-12
            chosen = torch.multinomial(distance, number, generator=generator).to(latents.device)
            count = self.counts.mean()
            self.counts[unused] = count
            self.sums[unused] = latents[chosen] * count
        self._codes[0][1:] = self.sums / self.counts[:, None]


def _tally(latents: Tensor, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Count and sum the latents of the codes 1 to `size`."""
    counts = torch.bincount(tokens, minlength=size + 1).to(latents)
    return counts[1:], latents.new_zeros(size + 1, latents.shape[1]).index_add_(0, tokens, latents)[1:]


def rows(latents: Tensor) -> Tensor:
    """Turn latents [B, C, h, w] into [B h w, C]."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)
