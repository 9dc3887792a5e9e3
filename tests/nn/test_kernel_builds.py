"""The Triton kernels compile ahead of time, without a GPU, for what the zoo's models need, and make good use of it.

`python tests/nn/test_kernel_builds.py` prints the registers of every variant as a table.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from softcfg.zoo.registry import GENERATORS, MODELS, Component, ModelFile
from tiny_models import module

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds on Linux")

from softcfg.nn.fused import MOST_BYTES  # noqa: E402
from softcfg.nn.kernels import decode_attention, few_rows, fused, launching  # noqa: E402
from softcfg.nn.norm import LAYER, RMS  # noqa: E402

CAPABILITIES = (80, 90, 100)
WEIGHTS = ("none", "value", "key", "both")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_REGISTERS = 128  # of a thread: 512 threads on a multiprocessor; 160 where vectors are loaded in small pieces


class Variant(NamedTuple):
    """One way in which decoding launches the kernels."""

    head_dim: int
    groups: int
    slots: int
    padded: bool
    dtype: torch.dtype
    int8: bool
    weights: str
    whole: bool  # whether rows and heads are so many that slots are not split

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("-int8" if self.int8 else "")
        also = ("-padded" if self.padded else "") + ("-whole" if self.whole else "")
        return f"{self.head_dim}-groups{self.groups}-{kind}-{self.weights}{also}"


class Kernel(NamedTuple):
    registers: int
    stack: int  # bytes: what did not fit into the registers
    loads: list[int]  # bytes of each load of a thread from memory


def shapes() -> list[tuple[int, int, int, bool]]:
    """Head dimension, heads per key head, slots and whether rows are padded: of the zoo, and of families by default."""
    found: dict[tuple[int, int, bool], int] = {}
    unpublished = [Component(GENERATORS[name], {}, ModelFile("none")) for name in ("janus-pro", "emu3")]
    for component in [*(entry.generator for entry in MODELS.values()), *unpublished]:
        depth = "n_layer" if component.family.name.startswith("llamagen") else "num_hidden_layers"
        generator = module(replace(component, config={**component.config, depth: 1}), "meta")  # its layers are alike
        _, key_heads, head_dim = generator.cache_shape  # type: ignore[attr-defined, misc]
        config = generator.config
        heads = getattr(config, "num_attention_heads", None) or config.n_head
        key = (head_dim, heads // key_heads, not generator.num_classes)  # type: ignore[operator]
        found[key] = max(found.get(key, 0), generator.num_tokens)  # type: ignore[arg-type, call-overload]
    return sorted((head_dim, groups, tokens + 1, padded) for (head_dim, groups, padded), tokens in found.items())


def variants() -> list[Variant]:
    kinds = product(DTYPES, (False, True), WEIGHTS, (False, True))
    return [Variant(*shape, *kind) for kind, shape in product(kinds, shapes())]


@contextmanager
def compiling_for(capability: int, kernels: ModuleType) -> Iterator[dict[str, Any]]:
    """Launches of the module's kernels compile for a GPU of this compute capability, and do not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 1000 + capability  # compiled kernels are kept by device

        def get_current_stream(self, device: int) -> int:
            return 0

    built: dict[str, Any] = {}
    before = dict(vars(driver))  # a driver is looked for when it is first used; there may be none
    driver.set_active(Absent())
    patch = pytest.MonkeyPatch()
    for name, kernel in vars(kernels).items():
        if not isinstance(kernel, triton.JITFunction):
            continue

        def build(*args: Any, run: Any, name: str, **kwargs: Any) -> None:
            built[name] = run(*args, **{**kwargs, "warmup": True})

        patch.setattr(kernel, "run", partial(build, run=kernel.run, name=name))
    try:
        yield built
    finally:
        patch.undo()
        vars(driver).update(before)


def compiled(variant: Variant, capability: int, tmp_path: Path) -> dict[str, Kernel]:
    """Both kernels as `decode_attention` launches them; tensors without contents are aligned like those of a GPU."""
    rows, key_heads = 512 if variant.whole else 4, 2
    kind: dict[str, Any] = {"device": "meta", "dtype": torch.float32}
    query = torch.empty(rows, key_heads * variant.groups, 1, variant.head_dim, device="meta", dtype=variant.dtype)
    shape = (rows, key_heads, variant.slots)
    stored = torch.int8 if variant.int8 else variant.dtype
    keys, values = (torch.empty(*shape, variant.head_dim, device="meta", dtype=stored) for _ in range(2))
    scales = torch.empty(*shape, 1, **kind) if variant.int8 else None
    weights = torch.empty(rows, variant.slots, **kind)
    row = torch.empty(rows, device="meta", dtype=torch.int64)
    with compiling_for(capability, decode_attention) as built:
        decode_attention.decode_attention(
            query, keys, values, row,
            first=row if variant.padded else None, key_scales=scales, value_scales=scales,
            value_weights=weights if variant.weights in ("value", "both") else None,
            key_weights=weights if variant.weights in ("key", "both") else None,
        )  # fmt: skip
    return {name: read(kernel, tmp_path) for name, kernel in built.items()}


def read(kernel: Any, tmp_path: Path) -> Kernel:
    from triton.backends import nvidia

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", kernel.asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], 0x(\w+)", kernel.asm["ptx"])  # into shared memory
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in loads] + [int(size, 16) for size in copies]
    return Kernel(int(registers), int(stack), sizes)


def check(variant: Variant, capability: int, tmp_path: Path) -> None:
    if capability >= 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this Triton's assembler does not know the GPU")
    from softcfg.nn.kernels.decode_attention import WARPS, slots_at_once

    kernels = compiled(variant, capability, tmp_path)
    for kernel in kernels.values():
        assert kernel.stack == 0
        assert kernel.registers <= MOST_REGISTERS + 32 * bool(
            variant.head_dim * (1 if variant.int8 else variant.dtype.itemsize) % 16
        )
    itemsize = 1 if variant.int8 else variant.dtype.itemsize
    # 16 bytes at once, or what a vector of the cache is a multiple of: 8 or 4 at head_dim 88 and 100.
    widest = gcd(variant.head_dim * itemsize, 16)
    width = 1 << (variant.head_dim - 1).bit_length()
    stored = torch.int8 if variant.int8 else variant.dtype
    block = 2 * slots_at_once(width, stored) * width * itemsize // (32 * WARPS)  # bytes of keys and values of a thread
    assert kernels["_attend_chunk"].loads.count(widest) * widest >= block


# What differs most in registers and in loads; all of them are in the slow test.
REACHED = [
    variant
    for variant in variants()
    if variant.weights == "value"
    and variant.whole == (variant.dtype == torch.bfloat16)
    and (variant.dtype, variant.int8) in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
]
HUNGRY = [variant for variant in REACHED if variant.head_dim >= 88 and variant.groups == 1]


@pytest.mark.parametrize("variant", REACHED, ids=str)
def test_a_variant_compiles_without_spills_and_loads_wide(variant: Variant, tmp_path: Path) -> None:
    check(variant, 90, tmp_path)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("variant", HUNGRY, ids=str)
def test_the_largest_variants_fit_other_gpus(variant: Variant, capability: int, tmp_path: Path) -> None:
    check(variant, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_fits_every_gpu(capability: int, tmp_path: Path) -> None:
    for variant in variants():
        if capability == 90 or variant.dtype != torch.float16:  # which compiles as bfloat16 does
            check(variant, capability, tmp_path)


class Heads(NamedTuple):
    """How a family treats queries and keys before attention."""

    head_dim: int
    heads: int
    key_heads: int
    norm: int
    rotation: str


# AliTok XL and L, LlamaGen, RAR XL and XXL, Janus, Emu3, Lumina.
HEADS = [
    Heads(80, 16, 16, RMS, "neighbours"), Heads(64, 16, 16, RMS, "neighbours"),
    Heads(100, 32, 32, 0, "neighbours"), Heads(80, 16, 16, LAYER, ""), Heads(88, 16, 16, LAYER, ""),
    Heads(128, 16, 16, 0, "halves"), Heads(128, 32, 8, 0, "halves"), Heads(128, 32, 32, LAYER, "halves"),
]  # fmt: skip
# With a weight alone, and with all there is.
NORMS = [(width, kind) for width in (768, 1280, 1408, 4096, 7168) for kind in (RMS, LAYER)]


def build_norm(width: int, kind: int, dtype: torch.dtype) -> None:
    empty = partial(torch.empty, device="meta", dtype=dtype)
    x, added, weight = empty(500, width), empty(500, width), empty(width)
    gate, scale, shift = empty(500, 6 * width).chunk(6, dim=-1)[:3]
    at = torch.empty(500, device="meta", dtype=torch.int64)
    every = (gate, weight, (scale, shift), at) if kind == LAYER else (None,) * 4
    fused.add_norm(x, added, every[0], kind, weight, every[1], 1e-5, every[2], every[3])


def build_heads(shape: Heads, dtype: torch.dtype, int8: bool) -> None:
    rows, slots, dim, shared = 500, 273, shape.head_dim, shape.key_heads
    empty = partial(torch.empty, device="meta")
    together = empty(rows, (shape.heads + 2 * shared) * dim, dtype=dtype).split(
        [shape.heads * dim, shared * dim, shared * dim], dim=-1
    )
    query, key, value = (part.unflatten(-1, (-1, dim))[:, :, None] for part in together)
    keys, values = empty(2, rows, shared, slots, dim, dtype=torch.int8 if int8 else dtype)
    weights: Any = (empty(dim, dtype=dtype), empty(dim, dtype=dtype) if shape.norm == LAYER else None)
    weights = weights if shape.norm else (None, None)
    table = empty(rows, dim // 2) if shape.rotation else None
    scales = empty(rows, shared, slots, 1) if int8 else None
    fused.rotate_and_cache(
        query, key, value, empty(rows, dtype=torch.int64), keys, values,
        norm=shape.norm, query_weights=weights, key_weights=weights, eps=(1e-5, 1e-5), cos=table, sin=table,
        neighbours=shape.rotation == "neighbours", key_scales=scales, value_scales=scales,
    )  # fmt: skip


def build_guidance(tokens: int, codes: int) -> None:
    empty = partial(torch.empty, device="meta", dtype=torch.float32)
    weights, confidence = empty(500, tokens + 1)[250:, 1:], empty(250, tokens)
    for strength in (1.0, 2.0):
        fused.write_weights(confidence, weights, step_norm=True, strength=strength, floor=0.0, eps=0.0, successor=False)
    at, are_codes = torch.empty(1, device="meta", dtype=torch.int64), torch.empty(tokens, device="meta").bool()
    drawn = torch.empty(250, device="meta", dtype=torch.int64)
    for tokens in (None, drawn):
        fused.write_confidence(empty(500, 1, codes)[:250, 0], confidence, at, 1.0, are_codes, tokens)


def check_fused(build: Callable[..., None], arguments: tuple[Any, ...], capability: int, tmp_path: Path) -> None:
    if capability >= 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this Triton's assembler does not know the GPU")
    with compiling_for(capability, fused) as built:
        build(*arguments)
    assert built
    for kernel in (read(each, tmp_path) for each in built.values()):
        assert kernel.stack == 0
        assert kernel.registers <= MOST_REGISTERS // 2  # a warp more or less decides how many rows are in flight
        if build is build_norm:
            assert set(kernel.loads) <= {8, 16}  # 8: which row of the modulations


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fused_kernels_fit_the_registers(capability: int, tmp_path: Path) -> None:
    for norm in NORMS if capability == 90 else NORMS[-1:]:
        check_fused(build_norm, (*norm, torch.bfloat16), capability, tmp_path)
    for shape in HEADS if capability == 90 else HEADS[-1:]:
        check_fused(build_heads, (shape, torch.bfloat16, capability != 90), capability, tmp_path)
    for tokens, codes in ((273, 4096), (9313, 65536)):  # AliTok, Lumina
        check_fused(build_guidance, (tokens, codes), capability, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_fused_kernel_fits_the_registers(capability: int, tmp_path: Path) -> None:
    for dtype in DTYPES:
        for norm in NORMS:
            check_fused(build_norm, (*norm, dtype), capability, tmp_path)
        for shape, int8 in product(HEADS, (False, True)):
            check_fused(build_heads, (shape, dtype, int8), capability, tmp_path)


# Width and hidden width of a block: the bundled models, AliTok B to XL, RAR XXL, and the widest that is served.
BLOCKS = [(320, 1024), (768, 2048), (1024, 2816), (1280, 3584), (1408, 1408)]


def build_few_rows(width: int, hidden: int, kind: str, dtype: torch.dtype) -> None:
    empty = partial(torch.empty, device="meta", dtype=dtype)
    x, norm = empty(2, width), (empty(width), 1e-5)
    if kind == "norm":
        few_rows.few_rows(x, empty(3 * width, width), empty(3 * width), norm=norm)
    elif kind == "gated":
        up = (empty(hidden, width), None)
        few_rows.few_rows(x, empty(hidden, width), up=up, added=empty(2, width), norm=norm)
    else:
        few_rows.few_rows(empty(2, hidden), empty(width, hidden), onto=x)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_few_rows_fit_the_registers(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And linked with the kernel before, all of the first weights are on their way before they wait for its end."""
    if capability >= 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this Triton's assembler does not know the GPU")
    linked = capability >= 90 and launching.CAN_WAIT
    options = {"LINKED": linked, "enable_fp_fusion": True, **({"launch_pdl": True} if linked else {})}
    monkeypatch.setattr(few_rows, "launch_options", lambda x: options)
    for (width, hidden), kind in product(BLOCKS if capability == 90 else BLOCKS[-2:-1], ("norm", "gated", "onto")):
        if hidden * dtype.itemsize > MOST_BYTES:
            continue
        with compiling_for(capability, few_rows) as built:
            build_few_rows(width, hidden, kind, dtype)
        kernel = read(built["_few_rows"], tmp_path)
        assert kernel.stack == 0
        assert set(kernel.loads) & {16}
        if linked:
            before, after = built["_few_rows"].asm["ptx"].split("griddepcontrol.wait")
            assert "griddepcontrol.launch_dependents" in before
            rows = few_rows.GATED_OUTPUTS * 2 if kind == "gated" else few_rows.OUTPUTS
            part = min(few_rows.WIDEST, 1 << ((hidden if kind == "onto" else width).bit_length() - 1))
            assert before.count("ld.global") >= rows * 2 // dtype.itemsize * part * dtype.itemsize // (16 * 32)
            assert "ld.global" in after


if __name__ == "__main__":
    import tempfile

    print("| variant | " + " | ".join(f"sm_{each}" for each in CAPABILITIES) + " |\n| --- | --- | --- | --- |")
    for variant in variants():
        with tempfile.TemporaryDirectory() as folder:
            used = [compiled(variant, each, Path(folder))["_attend_chunk"] for each in CAPABILITIES]
        print(
            f"| {variant} | " + " | ".join(f"{each.registers}, stack {each.stack}" for each in used) + " |", flush=True
        )
