"""Token by token decoding, once for all generators and guidance methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcfg.decoding.filtering import Sampling, draw
from softcfg.errors import UserError
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import Generator, LabelsLike, as_ids
from softcfg.nn.linear import prepared_linear_layers


@torch.inference_mode()
def decode(
    generator: Generator,
    labels: LabelsLike,
    guidance: CFG,
    *,
    uniforms: Tensor,
    sampling: Sampling | None = None,
    forced_tokens: Tensor | None = None,
    forced_mask: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Draw the image tokens of a batch.

    Args:
        labels: B class ids.
        guidance: `CFG` or `SoftCFG`; inactive guidance (scale 0 or 1) skips the unconditional rows.
        uniforms: [B, T] in [0, 1), one number a token (see `image_uniforms`).
        sampling: temperature, top-k and top-p; by default temperature 1 alone.
        forced_tokens: int64 [B, T]; these tokens take the place of drawn ones (teacher forcing).
        forced_mask: bool [B, T], where `forced_tokens` is used; everywhere if None.
        on_step: called with the number of tokens drawn so far after every step.
        on_tokens: called with the tokens drawn so far, int64 [B, n], after every step; what it raises ends the
            decoding.

    Returns:
        int64 [B, T].

    Raises:
        UserError: labels, uniforms or forced tokens do not fit the generator.
    """
    sampling = sampling or Sampling()
    condition = generator.condition(labels, guided=guidance.is_active)
    total, device = generator.num_tokens, generator.device
    batch = condition.rows // 2 if guidance.is_active else condition.rows
    forced, mask = _forcing(generator, batch, forced_tokens, forced_mask)
    if uniforms.shape != (batch, total):
        raise UserError(f"uniforms must have shape [{batch}, {total}], got {list(uniforms.shape)}")

    uniforms = uniforms.to(device)
    scales = guidance.scales(total).tolist()
    cache = generator.new_cache(condition.rows)
    tokens = torch.zeros(batch, total, dtype=torch.int64, device=device)
    perturbation = None
    if isinstance(guidance, SoftCFG) and guidance.is_active and guidance.perturbs:
        perturbation = Perturbation(guidance, batch, total, generator.condition_slots, device)

    inputs, slot = tokens.new_zeros(condition.rows, 0), 0
    with prepared_linear_layers(generator, condition.rows):
        for step in range(total):
            weights = perturbation.row_weights() if perturbation else {}
            logits = generator(condition, inputs, cache=cache, slot=slot, **weights)[:, -1].float()
            cond = logits[:batch]
            guided = guidance.guide(cond, logits[batch:], scales[step]) if guidance.is_active else cond
            drawn = draw(sampling.probabilities(guided), uniforms[:, step])
            if forced is not None and mask is not None:
                drawn = torch.where(mask[:, step], forced[:, step], drawn)
            tokens[:, step] = drawn
            if perturbation:
                perturbation.record(step, cond, drawn, sampling.temperature)
            slot = generator.condition_slots + step
            inputs = drawn[:, None].repeat(2 if guidance.is_active else 1, 1)
            if on_step is not None:
                on_step(step + 1)
            if on_tokens is not None:
                on_tokens(tokens[:, : step + 1])
    return tokens


class Perturbation:
    """The state of SoftCFG over one decoding: the confidence buffer and the weights of all rows and slots."""

    def __init__(self, guidance: SoftCFG, batch: int, tokens: int, condition_slots: int, device: torch.device) -> None:
        self.guidance = guidance
        self.batch = batch
        self.condition_slots = condition_slots
        self.confidence = torch.zeros(batch, tokens, device=device)
        self._weights = torch.ones(2 * batch, condition_slots + tokens, device=device)

    def record(self, step: int, cond_logits: Tensor, tokens: Tensor, temperature: float) -> None:
        """Keep the confidence in the tokens [B] of `step`, from the conditional logits [B, V]."""
        self.confidence[:, step] = self.guidance.token_confidence(cond_logits, tokens, temperature)

    def row_weights(self) -> dict[str, Tensor]:
        """Keyword arguments for the generator: weights [2B, slots], one but for the unconditional rows' tokens."""
        self._weights[self.batch :, self.condition_slots :] = self.guidance.weights(self.confidence)
        return targeted(self.guidance, self._weights)


def targeted(guidance: SoftCFG, weights: Tensor) -> dict[str, Tensor]:
    """Hand `weights` to the generator's values, keys or both, as the guidance's target says."""
    names = {"value": ["value"], "key": ["key"], "both": ["value", "key"]}[guidance.target]
    return {f"{name}_weights": weights for name in names}


def _forcing(
    generator: Generator, batch: int, tokens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    shape = (batch, generator.num_tokens)
    if tokens is None:
        if mask is not None:
            raise UserError("forced_mask says where to use forced_tokens, which are missing")
        return None, None
    forced = as_ids(tokens, "forced_tokens", generator.vocab_size).to(generator.device)
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    for name, value in (("forced_tokens", forced), ("forced_mask", mask)):
        if value.shape != shape:
            raise UserError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if mask.dtype != torch.bool:
        raise UserError(f"forced_mask must be boolean, got {mask.dtype}")
    return forced, mask.to(generator.device)
