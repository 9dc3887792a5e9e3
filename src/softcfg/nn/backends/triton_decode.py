"""Attention of a decoding step on a GPU, with weights, by the Triton kernel in `softcfg.nn.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from softcfg.nn.backends.registry import AttentionBackend, AttentionCall, BackendUnavailableError, register_backend
from softcfg.nn.kernels import available


@register_backend
class TritonDecode(AttentionBackend):
    """One query per row against the whole cache, as it is stored, with the position read from a tensor."""

    name = "triton_decode"

    def why_not(self, call: AttentionCall) -> str | None:
        """See `AttentionBackend.why_not`."""
        if call.query.shape[2] != 1:
            return "it takes one query per row"
        if not call.query.is_cuda:
            return "it runs on GPUs alone"
        if call.query.dtype == torch.float64:
            return "it computes in float32, and the query is float64"
        if call.context.cache is None or call.context.position.row_slots is None:
            return "it needs a cache and a position by row"
        if call.context.attention_weights is not None:
            return "it has weights on values and keys alone"
        return None if available.has_triton() else "Triton is not installed"

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionBackend.attend`.

        Raises:
            BackendUnavailableError: the kernel cannot be compiled or launched: there is no C compiler for Triton's
                launcher, or the GPU is not supported.
        """
        context, cache, last = call.context, call.context.cache, call.context.position.row_slots
        assert cache is not None
        assert last is not None
        key_scales, value_scales = cache.scales(call.layer)
        try:
            from softcfg.nn.kernels.decode_attention import decode_attention

            return decode_attention(
                call.query,
                cache.keys[call.layer],
                cache.values[call.layer],
                last,
                first=context.padding,
                key_scales=key_scales,
                value_scales=value_scales,
                value_weights=context.value_weights,
                key_weights=context.key_weights,
            )
        except torch.OutOfMemoryError:  # the other backends take more
            raise
        except Exception as error:  # Triton, its compiler and its driver have no common type of error
            raise BackendUnavailableError(f"{type(error).__name__}: {error}") from error
