"""Make a large generator fit: 8 or 4 bit weights by torchao, layers on several devices by Accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from softcfg.errors import UserError, needing, quote

if TYPE_CHECKING:
    import torch
    from torch import nn

    from softcfg.models.base import Generator
    from softcfg.tokenizers.base import Tokenizer

ModuleT = TypeVar("ModuleT", bound="nn.Module")

QUANTIZATIONS = ("int8", "int4")
GROUP_SIZES = (128, 64, 32)  # weights that share a scale in int4, the preferred number first


def quantize(module: ModuleT, kind: str, device: torch.device) -> ModuleT:
    """Round the weights of the linear layers to integers, one layer after the other, and move all to `device`.

    "int8" has one scale per row. "int4" has one per 128 weights of a row (fewer in narrow layers) and saves memory on
    GPUs only, where the weights must be bfloat16; on a CPU it is the same rounding, kept in one byte per weight.

    Raises:
        UserError: torchao is missing, or there is no such kind.
    """
    import torch
    from torch import nn

    from softcfg.nn.precision import dtype_name

    if kind not in QUANTIZATIONS:
        raise UserError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quote(kind)}")
    with needing(f"{kind} weights need torchao", "quantize"):
        from torchao.quantization import quantize_
    dtype = next(module.parameters()).dtype
    if kind == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        raise UserError(f"int4 weights on a GPU need bfloat16, not {dtype_name(dtype)}")
    for group in GROUP_SIZES if kind == "int4" else (1,):

        def fits(layer: nn.Module, name: str, group: int = group) -> bool:
            if not isinstance(layer, nn.Linear) or type(layer.weight.data) is not torch.Tensor:
                return False
            return layer.in_features % group == 0

        quantize_(module, _recipe(kind, group, device), fits, device=device)
    return module.to(device)


def _recipe(kind: str, group: int, device: torch.device) -> Any:
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cuda":
        return Int4WeightOnlyConfig(group, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))  # type: ignore[attr-defined]


def spread(
    generator: Generator,
    device_map: str | Mapping[str, Any],
    *,
    max_memory: Mapping[Any, int | str] | None = None,
    offload_folder: str | None = None,
) -> Generator:
    """Place the layers of a generator that lies on the CPU on several devices.

    Args:
        device_map: "auto", which fills the GPUs and then the CPU; or the device of every module ("model.layers.0": 1).
        max_memory: with "auto", the most a device may hold of the weights ({0: "20GiB", "cpu": "60GiB"}). The
            key/value cache comes on top: it lies where its layers are.
        offload_folder: where modules on "disk" are kept.

    Raises:
        UserError: Accelerate is missing, the generator cannot be spread, or the map does not fit it.
    """
    import torch

    if not generator.no_split_modules:
        raise UserError(f"{type(generator).__name__} generators fit on one device: leave out device_map")
    with needing("device_map needs Accelerate", "runs"):
        from accelerate import dispatch_model, infer_auto_device_map
    if isinstance(device_map, Mapping):
        placed = dict(device_map)
    elif device_map == "auto":
        placed = infer_auto_device_map(generator, max_memory, no_split_module_classes=list(generator.no_split_modules))
    else:
        raise UserError(f"device_map must be 'auto' or a mapping of modules to devices, got {quote(device_map)}")
    if set(placed.values()) == {"cpu"}:
        return generator
    try:
        # A norm that is given to a layer is placed like any other module, not moved like an input.
        dispatch_model(generator, placed, offload_dir=offload_folder, force_hooks=True, skip_keys=["norm"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"device_map does not fit: {' '.join(str(error).split())}") from error
    generator.layer_devices = [torch.device(block._hf_hook.execution_device) for block in generator.blocks]
    for name, buffer in generator.named_buffers(recurse=False):
        generator.register_buffer(name, buffer.to(generator.device), persistent=False)
    return generator


def move(
    generator: Generator,
    tokenizer: Tokenizer,
    where: Iterable[torch.device | torch.dtype | str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantized: str | None = None,
) -> None:
    """Move both halves of a model to a device, give the generator a dtype, or both.

    Args:
        where: devices and dtypes in any order, as `nn.Module.to` takes them.
        quantized: the integers that the generator's weights were rounded to, if any.

    Raises:
        UserError: there is no such device or dtype, or the generator is quantized, spread over several devices, or
            draws at the moment.
    """
    import torch

    from softcfg.nn.linear import weights_at_rest
    from softcfg.nn.precision import as_device, as_dtype, computes_in, tell_of_slow_dtype

    for what in where:
        if isinstance(what, torch.dtype) or (isinstance(what, str) and not _is_device(what)):
            dtype = what
        else:
            device = what
    dtype = as_dtype(dtype, floating=False)
    if generator.layer_devices is not None:
        raise UserError("the generator is spread over several devices and stays there: load the model anew")
    if dtype is not None and quantized is not None:
        raise UserError(f"the weights of the generator are {quantized}: load the model anew")
    if dtype is not None and not computes_in(dtype):
        raise UserError(f"a generator computes in floating point, not in {dtype}; see quantize of from_pretrained")
    device = None if device is None else as_device(device)
    with weights_at_rest(generator):  # before anything is moved
        if device is not None:
            tokenizer.to(device)
            generator.to(device)
        if dtype is not None:
            tell_of_slow_dtype(dtype, generator.device)
            generator.to(dtype)


def _is_device(name: str) -> bool:
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
