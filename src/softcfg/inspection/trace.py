"""Replay tokens and keep what guidance did at every step."""

from __future__ import annotations

import json
from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcfg.decoding import Sampling, decode, image_uniforms
from softcfg.decoding.batch import finished_logits, ruled_logits, step_scales
from softcfg.decoding.filtering import one_sampling
from softcfg.decoding.finite import BRANCHES, FiniteLogits
from softcfg.decoding.perturbed import confidence_in, query_weights, require_confidence, step_weights, weak_inputs
from softcfg.decoding.weak import weak_model
from softcfg.errors import UserError, require_whole, user_errors
from softcfg.files import as_path, write_atomically
from softcfg.guidance import CFG, Perturbation, as_guidance, describe
from softcfg.models.base import ClassCondition, Condition, Generator
from softcfg.models.ids import as_ids
from softcfg.nn.position import Position
from softcfg.nn.precision import own_dtype
from softcfg.version import __version__

WEIGHTS_BY_DEFAULT_UP_TO = 1024  # tokens; beyond, [B, T, T] is hundreds of megabytes


@dataclass
class Trace:
    """What guidance did while B images of T tokens over V codes were drawn (or replayed).

    Attributes:
        guidance: the method and its settings.
        temperature: of the confidences, and of the sampling where the trace drew its tokens.
        labels: int64 [B]; None for generators that are not conditioned on a class.
        tokens: int64 [B, T].
        cond_logits, uncond_logits, guided_logits: float32 [B, T, V]; entry t predicts token t. The guided ones
            are -inf for tokens that the generator rules out.
        guidance_scale: float32 [T], the scale s_t = 1 + gamma_t.
        confidence: float32 [B, T], confidence in each token (plain CFG: p_max, without effect); 0 where no slot
            carries it, as the first token's with "successor" alignment.
        value_weights: float32 [B, T, T]: step, slot of the generated token; the perturbation's weights, whether they
            act on values or on something else. None where it was not asked for.
        perturbed_logits: like `cond_logits`, of the third branch; None where there is none.
        weak_logits: like `cond_logits`, of the weak model; None where there is none.
    """

    guidance: CFG
    temperature: float
    labels: Tensor | None
    tokens: Tensor
    cond_logits: Tensor
    uncond_logits: Tensor
    guided_logits: Tensor
    guidance_scale: Tensor
    confidence: Tensor
    value_weights: Tensor | None = None
    perturbed_logits: Tensor | None = None
    weak_logits: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def at(self, chosen: Tensor) -> Trace:
        """The trace of some of the tokens alone, bool [T]; of image codes without the ends of lines, for example."""
        weights = None if self.value_weights is None else self.value_weights[:, chosen.cpu()][:, :, chosen.cpu()]
        whole = ("labels", "guidance_scale", "value_weights")
        per_token: dict[str, Any] = {
            name: tensor[:, chosen] for name, tensor in self.tensors().items() if name not in whole
        }
        scale = self.guidance_scale[chosen]
        return replace(self, **per_token, guidance_scale=scale, value_weights=weights)

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write the tensors as safetensors; the metadata entry `softcfg` holds the settings and `facts` as JSON.

        Raises:
            UserError: the file cannot be written, or the guidance has no settings (see `softcfg.guidance.describe`).
        """
        from safetensors.torch import save

        with user_errors():
            guidance = describe(self.guidance)
        settings: dict[str, Any] = {
            "version": __version__,
            "method": guidance.pop("method"),
            "guidance": guidance,
            "temperature": self.temperature,
            **facts,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        write_atomically(as_path(path), save(tensors, metadata={"softcfg": json.dumps(settings)}))


@torch.no_grad()
@own_dtype()
def trace(
    generator: Generator,
    *,
    labels: Any,
    guidance: CFG | float,
    tokens: Any = None,
    sampling: Sampling | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    value_weights: bool | None = None,
    steps_per_pass: int = 1024,
    weak: Generator | None = None,
) -> Trace:
    """Replay `tokens` (teacher forcing) and keep what guidance did at every step.

    The conditional confidences do not depend on the weights, so both branches are replayed in one parallel pass
    each (in pieces for long sequences): query t of the unconditional pass sees the weights of step t.

    Args:
        labels: B class ids, or what else the generator is conditioned on.
        guidance: the method that is traced; a number is SoftCFG at this scale. Where it is inactive the
            unconditional logits are still computed.
        tokens: [B, T] ids (tensor, array or list); None draws them first, from `seed`, as `sampling` says.
        sampling: its temperature is also that of the confidences; by default temperature 1 alone.
        temperature, top_k, top_p: the same one by one, in place of `sampling`.
        value_weights: whether to keep the [B, T, T] weights; by default up to 1,024 tokens.
        steps_per_pass: tokens replayed at once; bounds the memory of attention, without effect on the result.
        weak: the weak model of guidance with a `weak_share`; it is conditioned on the same labels.

    Raises:
        UserError: labels, tokens or the weak model do not fit the generator, `guidance` is none or acts in no step, or
            the logits hold NaN or infinity.
    """
    if not callable(getattr(generator, "condition", None)):
        raise UserError(
            f"trace takes a generator, such as the one of a pipeline (pipe.generator), got {type(generator).__name__}"
        )
    if isinstance(labels, Sized) and not len(labels):
        raise UserError("labels must name at least one class or prompt")
    require_whole(steps_per_pass, "steps_per_pass", 1)
    with user_errors():
        guidance = as_guidance(guidance)
    sampling = one_sampling(sampling, temperature, top_k, top_p)
    condition = generator.condition(labels, guided=True)
    batch, total = condition.rows // 2, condition.num_tokens
    scales = step_scales(guidance, condition).to(generator.device)
    cond, uncond = condition[:batch], condition[batch:]
    steps = torch.arange(total, device=generator.device)
    codes = generator.is_code(steps, cond)
    if tokens is None:
        uniforms = image_uniforms(seed, range(batch), total)
        tokens = decode(generator, labels, guidance, uniforms=uniforms, sampling=sampling, weak=weak)
    tokens = as_ids(tokens, "tokens", generator.vocab_size).to(generator.device)
    if tokens.shape != (batch, total):
        raise UserError(f"tokens must have shape [{batch}, {total}], got {list(tokens.shape)}")

    if value_weights is None:
        value_weights = total <= WEIGHTS_BY_DEFAULT_UP_TO
    kept = torch.ones(batch, total, total, dtype=torch.float32) if value_weights else None
    confidence = torch.zeros(batch, total, dtype=torch.float32, device=generator.device)
    rows = {"cond": (generator, cond), "uncond": (generator, uncond)}
    if (weaker := weak_model(guidance, generator, cond, weak, labels)) is not None:
        rows["weak"] = weaker
    if guidance.has_third_branch:
        rows["perturbed"] = (generator, condition[:batch])  # of its own: a condition may keep what it is fed
    perturbed = {"perturbed"} if guidance.has_third_branch else {"uncond", "weak"}
    logits: dict[str, list[Tensor]] = {name: [] for name in rows}
    caches = {name: each.new_cache(part) for name, (each, part) in rows.items()}
    for start in range(0, total, steps_per_pass):
        stop = min(start + steps_per_pass, total)
        piece = _Pass(tokens, start, stop, codes)
        cond_logits = piece.run(*rows["cond"], caches["cond"])
        token_confidences = confidence_in(
            guidance.weak_branch, cond_logits, tokens[:, start:stop], float(sampling.temperature)
        )
        confidence[:, start:stop] = token_confidences if codes is None else token_confidences * codes[..., start:stop]
        weights = None
        if guidance.perturbs:
            weights = step_weights(confidence, guidance.weak_branch, steps[start:stop])
            if kept is not None:
                kept[:, start:stop] = weights.cpu()
        logits["cond"].append(cond_logits)
        for name in list(rows)[1:]:
            perturbation = guidance.weak_branch if name in perturbed else None
            logits[name].append(piece.run(*rows[name], caches[name], perturbation, weights))

    of = {name: torch.cat(parts, dim=1) for name, parts in logits.items()}
    cond_logits, uncond_logits = of["cond"], of["uncond"]
    other, third = None, of.get("perturbed")
    if guidance.is_active:
        other = guidance.away_from(uncond_logits if guidance.has_unconditional_branch else None, of.get("weak"))
    guided, _ = ruled_logits(generator, cond, guidance, cond_logits, other, third, scales, steps)
    guided = finished_logits(generator, cond, guided, steps)
    names = [BRANCHES[name] for name in rows]
    finite = FiniteLogits(batch, names, total, generator.dtype, generator.device)
    finite.note(steps, tuple(of.values()), guided.amax(dim=-1))
    finite.check()
    require_confidence(guidance.weak_branch, confidence)
    return Trace(
        guidance=guidance,
        temperature=sampling.temperature,
        labels=cond.classes if isinstance(cond, ClassCondition) else None,
        tokens=tokens,
        cond_logits=cond_logits,
        uncond_logits=uncond_logits,
        guided_logits=guided,
        guidance_scale=scales,
        confidence=guidance.weak_branch.carried(confidence),
        value_weights=kept,
        perturbed_logits=of.get("perturbed"),
        weak_logits=of.get("weak"),
    )


class _Pass:
    """The pass that predicts tokens start .. stop - 1: from the condition on, or from token start - 1 on."""

    def __init__(self, tokens: Tensor, start: int, stop: int, codes: Tensor | None) -> None:
        self.tokens = tokens
        self.fed = torch.arange(max(start - 1, 0), stop - 1, device=tokens.device)
        self.start = start
        self.codes = codes

    def run(
        self,
        generator: Generator,
        condition: Condition,
        cache: Any,
        perturbation: Perturbation | None = None,
        step_weights: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, stop - start, V] in float32."""
        weights, inputs = {}, self.tokens[:, self.fed]
        if perturbation is not None and step_weights is not None:
            weights = query_weights(perturbation, step_weights, condition, from_start=self.start == 0)
            inputs = weak_inputs(perturbation, self.tokens, self.fed, self.codes)
        slot = Position.shared(condition.slots + self.start - 1) if self.start else Position.start()
        return generator(condition, inputs, cache=cache, slot=slot, **weights).float()
