"""The baseline: decoding in the manner of the released samplers.

Eager float32; the inputs and positions of the whole sequence are rebuilt every step; caches grow by concatenation;
norms and rotations are single operations; SoftCFG multiplies, in place and in every layer, the cached values of the
unconditional half. It runs on the weights of our own modules; `check` shows that it computes the same logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.guidance import CFG, Perturbation
from softcfg.models.alitok import AliTok, AliTokBlock
from softcfg.models.base import ClassGenerator, Generator
from softcfg.models.rar import RAR, RARBlock

Cache = list[tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in separate operations."""
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).type_as(weight) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding through complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)


def attend(query: Tensor, key: Tensor, value: Tensor, cache: Cache, layer: int) -> Tensor:
    """Attention over a cache that grows by concatenation."""
    if layer < len(cache):
        key = torch.cat((cache[layer][0], key), dim=2)
        value = torch.cat((cache[layer][1], value), dim=2)
        cache[layer] = (key, value)
    else:
        cache.append((key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)


def alitok_step(generator: AliTok, classes: Tensor, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits of the newest position; all embeddings and rotations are rebuilt."""
    ids = torch.cat((classes[:, None] + generator.vocab_size + 1, tokens), dim=1)
    x = generator.embeddings(ids)
    cos, sin = generator.rotary_cos[: ids.shape[1]], generator.rotary_sin[: ids.shape[1]]
    x, cos, sin = x[:, -1:], cos[-1:], sin[-1:]
    for layer, block in enumerate(generator.blocks):
        assert isinstance(block, AliTokBlock)
        x = x + _alitok_attention(block, x, cos, sin, cache, layer)
        y = rms_norm(x, block.norm2.weight, generator.config.rms_norm_eps)
        x = x + block.mlp.w2(F.silu(block.mlp.w1(y)) * block.mlp.w3(y))
    return generator.output(rms_norm(x, generator.norm.weight, generator.config.rms_norm_eps))[:, -1]


def _alitok_attention(block: AliTokBlock, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, layer: int) -> Tensor:
    rows, new, width = x.shape
    eps = block.norm1.eps or 0.0
    attention = block.attn
    qkv = attention.qkv(rms_norm(x, block.norm1.weight, eps)).reshape(rows, new, 3, attention.heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query = rotate(rms_norm(query, attention.q_norm.weight, eps), cos, sin)  # type: ignore[arg-type]
    key = rotate(rms_norm(key, attention.k_norm.weight, eps), cos, sin)  # type: ignore[arg-type]
    return attention.proj(attend(query, key, value, cache, layer).transpose(1, 2).reshape(rows, new, width))


def rar_step(generator: RAR, classes: Tensor, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits of the newest position; all inputs, positions and modulations are rebuilt."""
    label = generator.embeddings(classes + generator.vocab_size + 1)[:, None]
    cls = generator.cls_token.expand(len(classes), -1, -1)
    x = torch.cat((cls, label, generator.embeddings(tokens)), dim=1)
    length = x.shape[1]
    x = x + generator.pos_embed[:, :length]
    x = torch.cat((x[:, :1], x[:, 1:] + generator.target_aware_pos_embed[:, 2 : length + 1]), dim=1)
    condition = label + generator.timesteps_embeddings[:, :length]
    if tokens.shape[1]:
        x, condition = x[:, -1:], condition[:, -1:]
    for layer, block in enumerate(generator.blocks):
        assert isinstance(block, RARBlock)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition).chunk(6, dim=-1)
        rows, new, width = x.shape
        attention = block.attn
        qkv = attention.qkv(block.norm1(x) * (1 + scale1) + shift1).reshape(rows, new, 3, attention.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(attention.q_norm(query), attention.k_norm(key), value, cache, layer)
        x = x + gate1 * attention.proj(out.transpose(1, 2).reshape(rows, new, width))
        x = x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)
    head = generator.adaln_before_head
    scale, shift = head.adaLN_modulation(condition).chunk(2, dim=-1)
    return generator.lm_head(head.norm(x) * (1 + scale) + shift)[:, -1]


STEPS: dict[type[Generator], Callable[..., Tensor]] = {AliTok: alitok_step, RAR: rar_step}


class Released:
    """One batch decoded step by step in the released manner."""

    def __init__(self, generator: ClassGenerator, labels: list[int], guidance: CFG) -> None:
        self.generator = generator
        self.guidance = guidance
        self.classes = generator.condition(labels, guided=True).classes
        self.batch = len(labels)
        self.tokens = torch.zeros(self.batch, 0, dtype=torch.int64, device=generator.device)
        self.cache: Cache = []
        self.confidence: list[Tensor] = []
        self.applied: Tensor | None = None

    @torch.inference_mode()
    def step(self, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw (or take) the next token of every image; returns the conditional and unconditional logits."""
        done, total = self.tokens.shape[1], self.generator.num_tokens
        soft = self.guidance.weak_branch if self.guidance.perturbs else None
        if soft is not None and done > 0:
            self._scale_values(soft)
        rows = torch.cat((self.tokens, self.tokens))
        logits = STEPS[type(self.generator)](self.generator, self.classes, rows, self.cache)
        cond, uncond = logits.chunk(2)
        progress = (1 - torch.cos(torch.pi * (torch.tensor(done / total)) ** self.guidance.guidance_scale_pow)) / 2
        guided = uncond + (cond - uncond) * (1 + (self.guidance.guidance_scale - 1) * progress)
        drawn = torch.multinomial(guided.softmax(-1), 1) if forced is None else forced[:, None]
        if soft is not None:
            self.confidence.append(soft.token_confidence(cond, drawn[:, 0]))
        self.tokens = torch.cat((self.tokens, drawn), dim=1)
        return cond, uncond

    def _scale_values(self, soft: Perturbation) -> None:
        """Multiply the cached values of the unconditional half by new weight / previous weight, in place.

        The newest token's value is not cached yet when the released code does this, so it stays unscaled for a step.
        """
        cached = len(self.confidence) - 1
        if cached == 0:
            return
        confidence = F.pad(torch.stack(self.confidence, dim=1), (0, 1))
        weights = soft.weights(confidence)[:, :cached]
        previous = torch.ones_like(weights) if self.applied is None else F.pad(self.applied, (0, 1), value=1.0)
        ratio = (weights / previous)[:, None, :, None]
        slots = slice(self.generator.condition_slots, None)
        for _, value in self.cache:
            value[self.batch :, :, slots] *= ratio
        self.applied = weights


def check(generator: ClassGenerator, guidance: CFG, steps: int = 12) -> float:
    """Largest difference between the baseline's logits and ours over the first `steps` steps of random tokens."""
    labels = list(range(2))
    baseline = Released(generator, labels, guidance)
    tokens = torch.randint(generator.vocab_size, (2, generator.num_tokens))
    logits = [baseline.step(tokens[:, step])[1] for step in range(steps)]

    from softcfg import trace

    ours = trace(generator, labels=labels, guidance=guidance, tokens=tokens, value_weights=False)
    return (torch.stack(logits, dim=1) - ours.uncond_logits[:, :steps]).abs().max().item()
