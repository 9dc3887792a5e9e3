"""What stands between the matrix products of a block: as PyTorch's operations or as one kernel each.

The kernels are Triton's on a GPU, and Numba's on a CPU, where it is installed. They serve what has no gradient. Where
they do not run, which the first launch shows, the operations take their place, with one warning; they are also what the
kernels are tested against.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.nn.context import AttentionContext
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import Int8KVCache, KVCache
from softcfg.nn.launches import FEW_ROWS
from softcfg.nn.linear import Linear, are_side_by_side, is_unhooked
from softcfg.nn.memory import is_out_of_memory
from softcfg.nn.norm import LAYER, RMS, RMSNorm
from softcfg.nn.products import Panels
from softcfg.nn.rotary import Rotary
from softcfg.nn.settings import holding

Result = TypeVar("Result")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192  # row of a norm
MOST_BYTES = 7168  # of a row of weights that a kernel for few rows has registers for
LONGEST = 16384  # row of weights
KINDS: dict[type, int] = {type(None): 0, nn.Identity: 0, nn.RMSNorm: RMS, RMSNorm: RMS, nn.LayerNorm: LAYER}  # of norms
UNAVAILABLE: set[torch.device] = set()  # where a kernel has failed
_enabled: ContextVar[bool] = ContextVar("fused_kernels", default=True)


def are_enabled() -> bool:
    """Whether this thread uses kernels where they run."""
    return _enabled.get()


def without_fused_kernels() -> AbstractContextManager[None]:
    """Use PyTorch's operations in this thread while the context is open; graphs that were captured stay as they are."""
    return holding(_enabled, False)


def add_norm(
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None = None,
    *,
    norm: nn.Module,
    modulation: tuple[Tensor, Tensor] | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream x + gate * added, and norm(it) * (1 + scale) + shift for the next branch.

    Args:
        x: [rows, n, width].
        added: what a branch adds to the stream, shaped alike; None for nothing.
        gate: factors on it, shaped alike; None for ones.
        modulation: scale and shift, shaped alike; None for zeros.
        at: int64 [rows, n]. Gate, scale and shift are then tables [entries, width], and this says which entry is whose.
    """
    of_rows = (gate, *(modulation or ()))
    alike = (added, *of_rows) if at is None else (added,)
    fit = all(each is None or each.shape == x.shape for each in alike)
    kind = _kind(norm, x) if fit and _serves(x, added, *of_rows) else None
    if kind and x.shape[-1] <= WIDEST:

        def launch() -> tuple[Tensor, Tensor]:
            return _kernels(x).add_norm(x, added, gate, kind, *_parameters(norm), _eps(norm), modulation, at)

        found = _launched(x.device, launch)
        if found is not None:
            return found
    if at is not None:
        gate = None if gate is None else gate[at]
        modulation = None if modulation is None else (modulation[0][at], modulation[1][at])
    if added is not None:
        x = x + (added if gate is None else gate * added)
    normed = norm(x)
    if modulation is not None:
        scale, shift = modulation
        normed = normed * (1 + scale) + shift
    return x, normed


def rotate_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    context: AttentionContext,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """The queries and keys of a pass, normalised and rotated; keys and values are written into the cache of the layer.

    Args:
        query: [rows, heads, n, head_dim].
        key, value: [rows, key_heads, n, head_dim].
        q_norm, k_norm: over head_dim; None for none.
    """
    if _fits(query, key, value, layer, context, q_norm, k_norm):

        def launch() -> tuple[Tensor, Tensor]:
            cache, rotary = context.cache, context.rotary
            assert cache is not None
            more: dict[str, Any] = {}
            if rotary is not None:
                more = {"cos": rotary.first_cos, "sin": rotary.first_sin, "neighbours": not rotary.halves}
            more["key_scales"], more["value_scales"] = cache.scales(layer)
            where = context.position.row_slots if available.on_gpu(query) else context.position.slot
            return _kernels(query).rotate_and_cache(
                query, key, value, where, cache.keys[layer], cache.values[layer],
                norm=_kind(q_norm, query) or 0, query_weights=_parameters(q_norm), key_weights=_parameters(k_norm),
                eps=(_eps(q_norm), _eps(k_norm)), **more,
            )  # fmt: skip

        found = _launched(query.device, launch)
        if found is not None:
            return found
    query, key = _rotated(query, key, context.rotary, q_norm, k_norm)
    if context.cache is not None:
        context.cache.write(layer, key, value, context.position)
    return query, key


def _rotated(
    query: Tensor, key: Tensor, rotary: Rotary | None, q_norm: nn.Module | None, k_norm: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys [rows, heads, n, head_dim], normalised and rotated; both at once where one product made them."""
    if (
        type(q_norm) is RMSNorm and type(k_norm) is RMSNorm and q_norm.eps == k_norm.eps and q_norm.takes_five(query)
        and is_unhooked(q_norm) and is_unhooked(k_norm) and _are_neighbours(query, key)
    ):  # fmt: skip
        rows, heads, new, head_dim = query.shape
        both = q_norm.normalised(query.as_strided((rows, 2 * heads, new, head_dim), query.stride()))
        query, key = both.chunk(2, dim=1)
        query.mul_(q_norm.weight)
        key.mul_(k_norm.weight)
        if rotary is not None:
            query, key = rotary(both).chunk(2, dim=1)
        return query, key
    query, key = (x if norm is None else norm(x) for x, norm in ((query, q_norm), (key, k_norm)))
    return (query, key) if rotary is None else (rotary(query), rotary(key))


def _are_neighbours(query: Tensor, key: Tensor) -> bool:
    """Whether the heads of `key` follow those of `query` in the memory of one tensor, and in the same steps."""
    return (
        (query.shape, query.stride()) == (key.shape, key.stride())
        and key.storage_offset() == query.storage_offset() + query.shape[1] * query.stride(1)
        and query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    )


def products(x: Tensor, *layers: nn.Linear, norm: nn.Module | None = None) -> Sequence[Tensor]:
    """The products of norm(x) with some layers; as one product where it may be and their weights lie side by side.

    `linear.prepared_linear_layers` lays them so.

    Args:
        x: [rows, n, width].
        norm: None for none.
    """
    if not available.on_gpu(x):
        inputs = x if norm is None else add_norm(x, None, norm=norm)[1]
        return [layer(inputs) for layer in layers]
    plain = all(map(_is_plain, layers))
    joined = _joined(layers) if plain and _serves(x, *(layer.weight for layer in layers)) else None
    if norm is not None and (joined is None or not _are_few(x, norm, joined[0])):
        x, norm = add_norm(x, None, norm=norm)[1], None
    if joined is None:
        return [layer(x) for layer in layers]
    weight, bias, sizes = joined
    found = None
    if _are_few(x, norm, weight):
        found = _launched(x.device, lambda: _few_rows(x, weight, bias, norm=_root_mean_square(norm))[1])
    if found is None:
        found = F.linear(x if norm is None else norm(x), weight, bias)
    return found.split(sizes, dim=-1)


def add_gated_products(
    x: Tensor, gate: nn.Linear, up: nn.Linear, *, added: Tensor | None = None, norm: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream x + added, and silu(gate(inputs)) * up(inputs) of its norm.

    Args:
        x: [rows, n, width].
        added: what a branch adds to the stream, shaped alike; None for nothing.
        norm: None for none.
    """
    plain = available.on_gpu(x) and _is_plain(gate) and _is_plain(up) and (gate.bias is None) == (up.bias is None)
    alike = plain and gate.weight.shape == up.weight.shape
    if alike and _serves(x, added, gate.weight, up.weight) and _are_few(x, norm, gate.weight, up.weight):

        def launch() -> tuple[Tensor, Tensor]:
            more = (up.weight, up.bias)
            return _few_rows(x, gate.weight, gate.bias, up=more, added=added, norm=_root_mean_square(norm))

        found = _launched(x.device, launch)
        if found is not None:
            return found
    if norm is not None:
        x, inputs = add_norm(x, added, norm=norm)
    else:
        x = inputs = x if added is None else x + added
    return x, silu_product(*products(inputs, gate, up))


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if gate.shape == up.shape and _serves(gate, up) and gate.stride(-1) == up.stride(-1) == 1:
        found = _launched(gate.device, lambda: _kernels(gate).silu_product(gate, up))
        if found is not None:
            return found
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x times the chance that a normal number is less; PyTorch has one kernel of it for a GPU."""
    if not available.on_gpu(x) and _serves(x):
        found = _launched(x.device, lambda: _kernels(x).gelu(x))
        if found is not None:
            return found
    return F.gelu(x)


def add_product(x: Tensor, layer: nn.Linear, inputs: Tensor) -> Tensor:
    """x + layer(inputs), the last use of `x`, whose memory the result may take: the product then adds to it."""
    if not available.on_gpu(x):
        found = _add_panels(x, layer, inputs)
        return x + layer(inputs) if found is None else found
    if _is_plain(layer) and _serves(x, inputs, layer.weight) and x.is_contiguous():
        weight, bias = layer.weight, layer.bias
        if _are_few(inputs, None, weight):
            found = _launched(x.device, lambda: _few_rows(inputs, weight, bias, onto=x)[1])
            if found is not None:
                return found
        if bias is None:
            x.view(-1, x.shape[-1]).addmm_(inputs.reshape(-1, inputs.shape[-1]), weight.t())
            return x
    return x + layer(inputs)


def _add_panels(x: Tensor, layer: nn.Linear, inputs: Tensor) -> Tensor | None:
    """x + layer(inputs) by the kernel of a layer that is laid out for it; None where it is not."""
    if type(layer) is not Linear or layer.laid_out is None or not isinstance(layer.product, Panels):
        return None
    packed, bias = layer.laid_out, layer.bias
    if not is_unhooked(layer) or not _serves(x, inputs, bias) or (bias is not None and not bias.is_contiguous()):
        return None
    return _launched(x.device, lambda: _kernels(x).product(inputs, packed, bias, x))


def _joined(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None, list[int]] | None:
    """Weights and bias of several plain layers as of one, and the outputs of each; None where they cannot be."""
    weights = [layer.weight for layer in layers]
    if len(layers) == 1:
        return weights[0], layers[0].bias, [len(weights[0])]
    if any(layer.bias is not None for layer in layers) or not are_side_by_side(weights):
        return None
    sizes = [len(weight) for weight in weights]
    width = weights[0].shape[1]
    return weights[0].as_strided((sum(sizes), width), (width, 1)), None, sizes


def _few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    added: Tensor | None = None,
    onto: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """`kernels.few_rows.few_rows` of [..., width]."""
    from softcfg.nn.kernels.few_rows import few_rows

    width, count = x.shape[-1], len(weight)
    added = None if added is None else added.reshape(-1, width).contiguous()
    onto = None if onto is None else onto.view(-1, count)
    total, out = few_rows(x.reshape(-1, width).contiguous(), weight, bias, added=added, onto=onto, **more)
    return total.view(x.shape), out.view(*x.shape[:-1], count)


def _are_few(x: Tensor, norm: nn.Module | None, *weights: Tensor) -> bool:
    """Whether a kernel of its own multiplies [..., width]: so few rows, after an RMS norm or none."""
    width = x.shape[-1]
    if x.numel() > FEW_ROWS * width or width * x.itemsize > MOST_BYTES:
        return False
    return all(weight.is_contiguous() for weight in weights) and (norm is None or _kind(norm, x) == RMS)


def _root_mean_square(norm: nn.Module | None) -> tuple[Tensor | None, float] | None:
    """Weight and eps of an RMS norm, as the kernel takes them."""
    return None if norm is None else (_parameters(norm)[0], _eps(norm))


def write_weights(confidence: Tensor, weights: Tensor, **settings: Any) -> bool:
    """Write the weights of SoftCFG for the confidences, both float32 [B, T], in one kernel, if it runs here.

    Args:
        settings: those of `guidance.perturbation_weights`, which defines the weights; `successor` for its alignment.

    Returns:
        Whether it was done.
    """
    if confidence.shape != weights.shape or confidence.shape[1] > LONGEST or not settings["strength"]:
        return False
    if not _are_rows(confidence, weights):
        return False

    def launch() -> bool:
        _kernels(weights).write_weights(confidence, weights, **settings)
        return True

    return bool(_launched(confidence.device, launch))


def write_confidence(
    logits: Tensor,
    confidence: Tensor,
    at: Tensor,
    temperature: float,
    codes: Tensor | None = None,
    tokens: Tensor | None = None,
) -> bool:
    """Write the largest of softmax(logits / temperature), of float32 [B, V], into column `at`, int64 [1], of float32
    [B, T], in one kernel, if it runs here.

    Args:
        codes: bool [T] or [B, T], where it is kept; elsewhere 0 is written. None: everywhere.
        tokens: int64 [B], whose probability it is instead; 0 for those outside of 0 .. V - 1.

    Returns:
        Whether it was done.
    """
    if not _are_rows(logits, confidence) or len(logits) != len(confidence):
        return False
    if codes is not None and (codes.dtype is not torch.bool or codes.stride(-1) != 1):
        return False
    if codes is not None and codes.shape not in (confidence.shape[1:], confidence.shape):
        return False
    if tokens is not None and (tokens.dtype is not torch.int64 or tokens.shape != logits.shape[:1]):
        return False
    tokens = None if tokens is None else tokens.contiguous()

    def launch() -> bool:
        _kernels(logits).write_confidence(logits, confidence, at, temperature, codes, tokens)
        return True

    return bool(_launched(logits.device, launch))


def draw(
    cond: Tensor,
    other: Tensor | None,
    scale: Tensor,
    temperature: float,
    uniforms: Tensor,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Tokens from softmax((other + scale (cond - other)) / temperature) by inverse CDF, in one kernel, if it runs here.

    Args:
        cond, other: logits float32 [B, V] of the conditional branch, and of what is guided away from; None for nothing.
        scale: float32 [1].
        uniforms: float64 [B] in [0, 1).
        allowed: int64 [1, 2], the first token that may be drawn and the one after the last; None: all.

    Returns:
        int64 [B], and float32 [n, B]: the largest of the logits of each branch and of the guided ones, NaN where there
        is one among them. Where that is not finite, the token is any. None if it was not done.
    """
    if available.on_gpu(cond) or uniforms.dtype is not torch.float64 or scale.dtype is not torch.float32:
        return None
    if not (_are_rows(cond) if other is None else _are_rows(cond, other) and other.shape == cond.shape):
        return None
    if uniforms.shape != cond.shape[:1] or scale.numel() != 1:
        return None
    return _launched(cond.device, lambda: _kernels(cond).draw(cond, other, scale, temperature, uniforms, allowed))


def _are_rows(*tensors: Tensor) -> bool:
    """Whether the kernels may be tried on float32 tensors [B, *], the entries of a row side by side."""
    for each in tensors:
        if each.dtype is not torch.float32 or each.dim() != 2 or each.stride(1) != 1:
            return False
    return _serves(*tensors)


def _serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels may be tried: where they run, on tensors of one dtype, and without a gradient."""
    x = tensors[0]
    if x is None or not _enabled.get() or torch.is_grad_enabled():
        return False
    on_gpu = available.on_gpu(x)
    if not (on_gpu or available.on_cpu(x)):
        return False
    dtype, device = x.dtype, x.device
    if device in UNAVAILABLE or not (dtype is torch.float32 or (dtype in DTYPES and on_gpu)):
        return False
    for each in tensors:
        if each is not None and (each.dtype is not dtype or each.device != device):
            return False
        if not on_gpu and each is not None and type(each) is not Tensor:
            return False
    return True


def _kernels(x: Tensor) -> Any:
    """The module of the kernels on the device of `x`."""
    if available.on_gpu(x):
        from softcfg.nn.kernels import fused

        return fused
    return available.cpu_kernels()


def _launched(device: torch.device, launch: Callable[[], Result]) -> Result | None:
    """What a launch gives; None if kernels do not run on the device: for want of a compiler, or it is not supported."""
    try:
        return launch()
    except Exception as error:  # Triton, Numba, their compilers and drivers have no common type of error
        if is_out_of_memory(error):  # the operations take more
            raise
        if device.type == "cpu" and isinstance(error, (ValueError, IndexError)):  # about what it was given
            raise
        UNAVAILABLE.add(device)
        message = f"fused kernels do not run on {device}, PyTorch's operations take their place"
        warnings.warn(f"{message}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)
        return None


def _fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    context: AttentionContext,
    q_norm: nn.Module | None,
    k_norm: nn.Module | None,
) -> bool:
    cache, rotary, (_, _, new, dim) = context.cache, context.rotary, query.shape
    if cache is None or new != 1 or dim % 2 or not _serves(query, key, value):
        return False
    slot, row_slots = context.position.slot, context.position.row_slots
    if type(cache).write not in (KVCache.write, Int8KVCache.write) or cache.dtype != query.dtype:
        return False
    if available.on_gpu(query):
        by_head = cache.keys[layer].stride(2) == dim
        served = by_head and row_slots is not None and (rotary is None or rotary.cos.dim() == 3)
    else:
        served = slot is not None and slot < cache.slots
    if not served or (rotary is not None and not _is_table(rotary, dim)):
        return False
    if _kind(q_norm, query) is None or _kind(q_norm, query) != _kind(k_norm, key):
        return False
    side_by_side = all((each.stride(1), each.stride(3)) == (dim, 1) for each in (query, key, value))
    keys, values = cache.keys[layer], cache.values[layer]
    if keys.dtype != query.dtype and (keys.dtype is not torch.int8 or cache.scales(layer)[0] is None):
        return False
    fit = key.shape == value.shape and key.shape[::3] == query.shape[::3] and keys.shape[:2] == key.shape[:2]
    return fit and side_by_side and keys.stride() == values.stride() and keys.stride(3) == 1


def _is_table(rotary: Rotary, dim: int) -> bool:
    """Whether the kernels can read the rotations of heads of `dim` channels."""
    cos, sin = rotary.cos, rotary.sin
    alike = (cos.dtype, cos.shape, cos.stride()) == (sin.dtype, sin.shape, sin.stride())
    return alike and cos.dtype is torch.float32 and cos.stride(-1) == 1 and 2 * cos.shape[-1] == dim


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a product with weights as they are, perhaps a bias, and no adapter, quantization or hook."""
    return (
        type(layer) in (Linear, nn.Linear)
        and getattr(layer, "product", None) is None
        and type(layer.weight.data) is Tensor
        and is_unhooked(layer)
    )


def _kind(norm: nn.Module | None, x: Tensor) -> int | None:
    """How the kernels know a norm over the last dimension of `x`; 0 for no norm, None for one that they do not know."""
    kind = KINDS.get(type(norm))
    if not kind or norm is None:
        return kind
    width, dtype, device = x.shape[-1], x.dtype, x.device
    if norm.eps is None or norm.normalized_shape != (width,) or not is_unhooked(norm):
        return None
    for each in norm._parameters.values():  # `parameters()` takes longer than a small kernel
        if each is not None and (
            each.dtype is not dtype or each.device != device or each.shape[-1] != width or not each.is_contiguous()
        ):
            return None
    return kind


def _parameters(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm._parameters.get("weight"), norm._parameters.get("bias"))


def _eps(norm: nn.Module | None) -> float:
    return getattr(norm, "eps", 0.0)
