"""Dtypes: a model computes in the dtype of its weights, whatever default or autocast is set; float64 if it exists."""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softcfg.errors import UserError, quote, suggestion

WITHOUT_FLOAT64 = {"mps"}  # types of devices
AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # types of devices that have it


def computes_in(dtype: torch.dtype) -> bool:
    """Whether models compute in a dtype: floats, but those of eight bits, of which there are no products."""
    return dtype.is_floating_point and dtype.itemsize > 1


def as_dtype(value: torch.dtype | str | None, name: str = "dtype", *, floating: bool = True) -> torch.dtype | None:
    """A dtype from itself or its name, such as "bfloat16"; None, and "auto", for the default.

    Args:
        name: what it was given as.
        floating: whether it must be one of floating-point numbers.

    Raises:
        UserError: there is no such dtype, or it is not a floating-point one.
    """
    if value is None or value == "auto":
        return None
    known = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
    found = known.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        hint = suggestion({"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(value), str(value)), known)
        raise UserError(f"{name} must be a dtype of torch or its name, got {quote(value)}{hint and '; '}{hint}")
    if floating and not computes_in(found):
        raise UserError(f"{name} must be a dtype such as float32 or bfloat16, got {quote(value)}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without PyTorch's, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def wanted_dtype(value: torch.dtype | str | None, name: str = "dtype") -> torch.dtype | str | None:
    """As `as_dtype`, but "fastest" stays as it is: what that is depends on the model (`linear.fastest_dtype`)."""
    return value if value == "fastest" else as_dtype(value, name)


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 by instructions of its own; False only where it is known to have none."""
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    try:  # ARM on Linux
        return " bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def tell_of_slow_dtype(dtype: torch.dtype | None, device: torch.device) -> None:
    """Warn of bfloat16 on a processor that has no instructions for it."""
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        warnings.warn(
            "this processor has no instructions for bfloat16 and is slow in it; dtype float32 is faster, for twice the "
            "memory",
            RuntimeWarning,
            stacklevel=3,
        )


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs do not."""
    return device.type not in WITHOUT_FLOAT64


def as_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: on its device, or on the CPU where the device has none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


def as_device(device: torch.device | str | int) -> torch.device:
    """The device, which is there and can compute.

    Raises:
        UserError: it is not, or there is none of this name.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise UserError("device 'meta' is not available here: the device meta holds no numbers; use cpu or cuda")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        shown = str(device) if isinstance(device, torch.device) else device
        raise UserError(
            f"device {quote(shown)} is not available here; use cpu, or cuda on a machine with a GPU"
        ) from error
    return found


@contextlib.contextmanager
def own_dtype() -> Iterator[None]:
    """Context (or decorator) in which no autocast is on, and the default device is the CPU."""
    with contextlib.ExitStack() as stack:
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class KeepsTables(nn.Module):
    """A module whose non-persistent buffers keep their dtype when its weights get another one.

    In bfloat16, rotation angles would tell few positions apart.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # what `to` and its kin call
        tables: list[tuple[dict[str, Any], str, Tensor]] = [
            (module._buffers, name, table)
            for module in (self.modules() if recurse else [self])
            for name in module._non_persistent_buffers_set
            if (table := module._buffers.get(name)) is not None
        ]
        super()._apply(fn, recurse)
        for buffers, name, table in tables:
            moved = buffers[name]
            if moved is not None and moved.dtype != table.dtype:
                buffers[name] = table.to(moved.device)
        return self
