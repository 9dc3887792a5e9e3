"""What `softcfg doctor` finds out: what this machine will do, and whether it does it right."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcfg.decoding import decode, image_uniforms
from softcfg.decoding.sequential import steps_are_static
from softcfg.decoding.throughput import largest_batch, time_steps
from softcfg.errors import CheckpointError, how_to_install
from softcfg.guidance import SoftCFG
from softcfg.inspection import trace
from softcfg.models.base import Generator
from softcfg.nn import AttentionContext, KVCache, Position, products, use_backend
from softcfg.nn.backends import BACKENDS, AttentionCall, attention, numba_decode
from softcfg.nn.choices import processor
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import CACHES
from softcfg.nn.memory import free_memory
from softcfg.version import __version__
from softcfg.zoo.files import missing_files
from softcfg.zoo.loading import empty_module, load_generator, random_weights
from softcfg.zoo.registry import MODELS, resolve

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub", "transformers", "torchao", "numba",
)  # fmt: skip
# What rounding moves attention by, of values of a standard deviation of 1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LOGITS_TOLERANCE = 1e-2  # between devices, in float32
CLOSE, MOST = 1e-4, 0.9  # where logits differ by less, the steps must draw nearly all tokens alike
BATCHES = (4, 1)  # images: a GPU has kernels of its own for the steps of one
PRODUCT_SHAPE, PRODUCT_ROWS = (2304, 768), (2, 8, 32)  # as in AliTok-B
BUNDLED = "fashion-small"
COMPARED = (BUNDLED, "fashion", "emoji")  # with the CPU
TIMED = {"cpu": (BUNDLED, 16, torch.float32), "other": ("alitok-b", 64, torch.bfloat16)}


@dataclass(frozen=True)
class Check:
    """One test of the machine.

    Attributes:
        ok: None where it was left out.
        detail: what was found, or why it was left out.
    """

    name: str
    ok: bool | None
    detail: str


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, driver, compiler and memory."""
    found: dict[str, Any] = {
        "softcfg": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "device": str(device),
        "device name": processor(),
        "threads": torch.get_num_threads(),
        "C compiler": _compiler(),
        "free memory, GiB": _gib(free_memory(device)),
    }
    if device.type == "cpu":
        found["CPU capability"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = Path("/proc/driver/nvidia/version")
        found |= {
            "device name": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory, GiB": _gib(properties.total_memory),
            "CUDA": torch.version.cuda or torch.version.hip,
            "driver": driver.read_text().partition("\n")[0] if driver.is_file() else None,
        }
    return found


@torch.inference_mode()
def choices(device: torch.device) -> dict[str, str]:
    """Which attention and which matrix product a decoding step will use, and why."""
    static = device.type == "cuda"
    steps = "of constant shapes, replayed as a CUDA graph" if static else "one by one, of growing shapes"
    if device.type == "cpu":
        replayed = "replayed where all layers of a model are kernels (Numba)"
        if available.has_numba():
            steps += f"; {replayed}" if available.cpu_kernels() is not None else "; Numba's kernels do not run here"
        elif find_spec("numba") is None:
            steps += f"; faster with Numba: {how_to_install('fast')}"
        else:
            steps += f"; Numba's kernels are turned off by {available.CPU_VARIABLE}"
    found = {"steps": steps}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        call = _call(device, dtype, head_dim=64, groups=1, static=static, weighted=True)
        skipped: list[str] = []
        for backend in reversed(BACKENDS.values()):
            why = backend.unavailable.get(call.query.device) or backend.why_not(call)
            if why is None and backend.preferred(call):
                found[f"attention, {name}"] = "; ".join([backend.name, *skipped])
                break
            skipped.append(f"not {backend.name}: {why or 'it is slower'}")
    if device.type == "cuda":
        precision = torch.get_float32_matmul_precision()
        exact = "float32" if precision == "highest" else "TF32"
        found["matrix product"] = f"cuBLAS; float32 in {exact} (precision {precision!r})"
    elif device.type == "cpu":
        why = "as was asked for" if products.forced_product() else "the fastest measured for a layer of 768 to 2,304"
        for rows in PRODUCT_ROWS:
            product = products.choose([torch.randn(PRODUCT_SHAPE)], None, rows, products.MEASURED, replayed=True)
            found[f"matrix product, {rows} rows"] = f"{product.name}, {why}"
    return found


def fitting_batches(device: torch.device) -> dict[str, dict[str, Any]]:
    """For each model whose files are here: the bytes of its weights, and the largest batch with SoftCFG.

    Of a model with a damaged file, what is "damaged".
    It is an estimate, of tokens without pixels; on a CPU the weights count twice, as loaded and as laid out.
    """
    free = free_memory(device)
    found: dict[str, dict[str, Any]] = {}
    for name, entry in MODELS.items():
        try:
            if missing_files(entry.files):
                continue
        except CheckpointError as error:
            found[name] = {"damaged": str(error)}
            continue
        dtype = getattr(torch, entry.generator.dtype)
        generator: Any = empty_module(entry.generator).to(dtype)
        weights = sum(parameter.nbytes for parameter in generator.parameters())
        copies = 2 if device.type == "cpu" else 1
        batch = None if free is None else largest_batch(generator, SoftCFG(), max(0, free - copies * weights))
        found[name] = {"dtype": entry.generator.dtype, "weights, GiB": _gib(weights), "largest batch": batch}
    return found


def self_test(device: torch.device) -> Iterator[Check]:
    """The checks, one after the other, of less than a minute in all; what raises an error has failed."""
    for name, test in TESTS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                ok, detail = test(device)
            except Exception as error:  # a broken driver may raise anything, and the other checks say more about it
                ok, detail = False, f"{type(error).__name__}: {error}"
        said = {str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)}
        yield Check(name, ok, "; ".join([detail, *sorted(said)]))


def report(device: torch.device, *, test: bool = True) -> dict[str, Any]:
    """All of it, ready for JSON; "ok" is False if a check failed."""
    checks = list(self_test(device)) if test else []
    return {
        "environment": environment(device),
        "choices": choices(device),
        "models": fitting_batches(device),
        "checks": [asdict(check) for check in checks],
        "ok": all(check.ok is not False for check in checks),
    }


@torch.inference_mode()
def _attention(device: torch.device) -> tuple[bool, str]:
    """The attention of a step against plain products in float64 on the CPU, for the zoo's shapes."""
    shapes, worst, where, served = set(), 0.0, "", 0
    for entry in MODELS.values():
        generator: Any = empty_module(entry.generator)
        _, key_heads, head_dim = generator.cache_shape
        heads = getattr(generator.config, "num_attention_heads", None) or generator.config.n_head
        shapes.add((head_dim, heads // key_heads))
    kinds: list[Any] = [(torch.float32, None, False), *((dtype, None, True) for dtype in TOLERANCE)]
    kinds += [(torch.bfloat16, stored, True) for stored in CACHES]  # a kernel compiles for each on a GPU: not all
    for (head_dim, groups), (dtype, stored, weighted) in itertools.product(sorted(shapes), kinds):
        call = _call(device, dtype, head_dim, groups, static=True, weighted=weighted, stored=stored)
        found = attention(call).cpu().double()
        off = float((found - _exact(call)).abs().nan_to_num(nan=torch.inf).max()) / TOLERANCE[dtype]
        if off > worst:
            worst, where = off, f"{dtype}, head_dim {head_dim}, heads in groups of {groups}, {stored or dtype} cache"
        served += 1
    return worst <= 1, f"{served} kinds, the largest error is {worst:.2g} of what rounding explains ({where})"


def _graph(device: torch.device) -> tuple[bool | None, str]:
    """Steps of constant shapes, on a GPU as a captured graph, against steps one by one."""
    generator = load_generator(BUNDLED, device=device)
    guidance, equal = SoftCFG(guidance_scale=3.0), []
    for batch in BATCHES:
        uniforms = image_uniforms(0, range(batch), generator.num_tokens)
        one, other = (
            decode(generator, range(batch), guidance, uniforms=uniforms, static=static).cpu()
            for static in (True, False)
        )
        equal.append(float((one == other).float().mean()))
    kind = "replayed as a graph" if steps_are_static(generator) else "of constant shapes"
    return min(equal) == 1, f"{min(equal):.1%} of the tokens of steps {kind} are those of steps one by one"


def _tokens(device: torch.device) -> tuple[bool | None, str]:
    """The logits and tokens of the bundled models on the device against those on the CPU."""
    if device.type == "cpu":
        return None, "the device is the CPU"
    words, ok = [], True
    for name in COMPARED:
        here, there = (load_generator(name, device=where) for where in ("cpu", device))
        off, equal, guidance = 0.0, [], SoftCFG(guidance_scale=3.0)
        for batch in BATCHES:
            inputs = here.example_inputs(batch)
            uniforms = image_uniforms(0, range(batch), here.condition(inputs, guided=False).num_tokens)
            tokens = [decode(each, inputs, guidance, uniforms=uniforms).cpu() for each in (here, there)]
            logits = [
                trace(each, labels=inputs, tokens=tokens[0], guidance=guidance).cond_logits for each in (here, there)
            ]
            off = max(off, float((logits[0].cpu() - logits[1].cpu()).nan_to_num(0, 0, 0).abs().max()))
            equal.append(float((tokens[0] == tokens[1]).float().mean()))
        ok &= off <= LOGITS_TOLERANCE and (off > CLOSE or min(equal) >= MOST)
        words.append(f"{name}: {min(equal):.1%} of the tokens are the CPU's, logits differ by up to {off:.1g}")
    return ok, "; ".join(words)


def _speed(device: torch.device) -> tuple[bool | None, str]:
    """Images a second of a model, and the share of the memory's bandwidth that its steps reach."""
    name, batch, dtype = TIMED.get(device.type, TIMED["other"])
    guidance, entry = SoftCFG(guidance_scale=3.0), resolve(name)
    generator: Generator = random_weights(entry.generator, device=device, dtype=dtype)
    seconds = time_steps(generator, batch, guidance, positions=(0.5,)).step
    condition = generator.condition(generator.example_inputs(batch), guided=True)
    weights = sum(parameter.nbytes for layer in generator.blocks for parameter in layer.parameters())
    read = weights + generator.cache_bytes(condition) // 2  # half of it is filled
    measured = bandwidth(device)
    return None, (
        f"{batch / (seconds * condition.num_tokens):.3g} images/s without pixels, {name} with random weights in "
        f"{dtype}, batch {batch}: {1e3 * seconds:.3g} ms a step, {read / seconds / 1e9:.3g} GB/s of weights and cache, "
        f"{read / seconds / measured:.0%} of the {measured / 1e9:.3g} GB/s of a copy"
    )


def bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second that the device's memory reads and writes in a copy, the best of several."""
    size = size or (2**30 if device.type == "cuda" else 2**27)
    source = torch.ones(size // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


TESTS: dict[str, Callable[[torch.device], tuple[bool | None, str]]] = {
    "attention against float64": _attention,
    "repeated steps": _graph,
    "tokens against the CPU's": _tokens,
    "speed": _speed,
}


def _call(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    groups: int,
    *,
    static: bool,
    weighted: bool,
    stored: torch.dtype | None = None,
) -> AttentionCall:
    """The attention of a decoding step on random contents: 2 key heads, 300 slots of which 290 are filled."""
    numbers = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers).to(device, dtype)

    rows = PRODUCT_ROWS[-1] if device.type == "cpu" else 3  # small steps have an attention of their own on a CPU
    key_heads, slots, filled = 2, 300, 290
    cache_type = KVCache if stored is None else CACHES[stored]
    by_slot = numba_decode.reads_cache(dtype, device)
    cache = cache_type(1, rows, key_heads, slots, head_dim, dtype=dtype, device=device, by_slot=by_slot)
    key, value = random(rows, key_heads, slots, head_dim), random(rows, key_heads, slots, head_dim)
    cache.write(0, key, value, Position.start())
    last = torch.full((rows,), filled - 1, device=device)
    position = Position.by_row(last) if static else Position.shared(filled - 1)
    weights = torch.rand(rows, slots, generator=numbers).to(device) if weighted else None
    context = AttentionContext.create(position, 1, cache, value_weights=weights)
    return AttentionCall(random(rows, key_heads * groups, 1, head_dim), key[:, :, -1:], value[:, :, -1:], context)


def _exact(call: AttentionCall) -> Tensor:
    """The same call by plain products in float64 on the CPU, from what the cache holds."""
    context = call.context
    assert context.cache is not None
    cache = KVCache(1, *context.cache.keys[0].shape, dtype=torch.float64)
    for to, of, scales in zip(
        (cache.keys, cache.values), (context.cache.keys, context.cache.values), context.cache.scales(0), strict=True
    ):
        to[0].copy_(of[0].cpu().double() * (1 if scales is None else scales.cpu().double()))
    moved = AttentionContext(
        context.position.on(torch.device("cpu")),
        context.slots,
        cache,
        value_weights=None if context.value_weights is None else context.value_weights.cpu().double(),
        given_mask=None if context.mask is None else context.mask.cpu(),
    )
    query, key, value = (tensor.cpu().double() for tensor in (call.query, call.key, call.value))
    with use_backend("math"):
        return attention(AttentionCall(query, key, value, moved))


def _version(package: str) -> str | None:
    try:
        return torch.__version__ if package == "torch" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The C compiler that Triton's launcher is built with."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)
