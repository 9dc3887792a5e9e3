"""What the forward call of a model takes, also where the model of transformers is inside of another module."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel


class Arguments(NamedTuple):
    """The arguments of a forward call.

    Attributes:
        names: those that are named.
        others: whether it takes any others as well.
    """

    names: frozenset[str]
    others: bool


def arguments(module: Any) -> Arguments:
    """What `module.forward` takes. A wrapper that takes anything (`torch.compile`, PEFT) takes what its model takes."""
    parameters = inspect.signature(module.forward).parameters.values()
    found = Arguments(
        frozenset(parameter.name for parameter in parameters),
        any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters),
    )
    is_wrapper = not isinstance(module, PreTrainedModel) or not found.names & {"input_ids", "inputs_embeds"}
    inner = _outermost_within(module) if found.others and is_wrapper else None
    if inner is None:
        return found
    of_inner = arguments(inner)
    return Arguments(found.names | of_inner.names, of_inner.others)


def unwrapped(module: Any) -> Any:
    """The model of transformers that a module is, or the only one that it wraps; otherwise the module itself."""
    if isinstance(module, PreTrainedModel):
        return module
    inner = _outermost_within(module)
    return module if inner is None else inner


def is_causal(module: Any) -> bool:
    """Whether a layer of the decoder that keeps keys says that it is causal, or none says anything."""
    model = unwrapped(module)
    layers = model.get_decoder().modules() if isinstance(model, PreTrainedModel) else ()
    said = {bool(layer.is_causal) for layer in layers if hasattr(layer, "layer_idx") and hasattr(layer, "is_causal")}
    return said != {False}


def longest_with_usual_rotation(module: nn.Module) -> int | None:
    """Up to which length its rotary positions do not depend on the longest row of a batch; None for any."""
    limits = []
    rotary: Any
    for rotary in module.modules():
        kinds = getattr(rotary, "rope_type", None)
        for layers, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                settings = rotary.config.rope_parameters
                limits.append((settings if layers is None else settings[layers])["original_max_position_embeddings"])
            elif isinstance(kind, str) and "dynamic" in kind:
                limits.append(rotary.original_max_seq_len)
    return min(limits, default=None)


def _outermost_within(module: Any) -> PreTrainedModel | None:
    """The model of transformers inside of a module; None if there is none, or more than one."""
    found: list[PreTrainedModel] = []
    ahead = list(module.children()) if isinstance(module, nn.Module) else []
    while ahead:
        child = ahead.pop()
        if isinstance(child, PreTrainedModel):
            found.append(child)
        else:
            ahead.extend(child.children())
    return found[0] if len(set(found)) == 1 else None
