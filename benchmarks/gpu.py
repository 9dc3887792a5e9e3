"""All that a GPU has to show, in less than eight minutes: correctness, then speed, against others and the bound.

    python -m benchmarks.gpu --output gpu.jsonl

It needs PyTorch with Triton and what softcfg itself needs; weights are random. Every result is printed and appended to
the output file as it comes, so an interrupted run has shown what it found; the table comes last. What no time or memory
is left for is left out, and said.

The bound of a step is the longer of two times at ceilings that are measured first: reading the weights and the filled
part of the cache once, and the operations of the linear layers. Steps are timed in the middle of the sequence, which
stands for all of it: what is read grows evenly. `--small` runs the same code on a small model, on a CPU for example.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.decoding import released_step
from benchmarks.timing import machine, medians, table
from softcfg import doctor
from softcfg.decoding.throughput import batch_bytes, decoding_step, filled_cache
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import ClassGenerator
from softcfg.models.rar import Modulation
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.memory import free_memory, in_short, is_out_of_memory
from softcfg.zoo.loading import random_weights
from softcfg.zoo.registry import resolve

COLUMNS = {
    "model": "model", "dtype": "dtype", "cache": "cache", "batch": "batch", "CFG": "CFG, ms", "SoftCFG": "SoftCFG, ms",
    "over CFG": "over CFG", "released CFG": "released CFG, ms", "released SoftCFG": "released SoftCFG, ms",
    "times released": "released / ours, SoftCFG", "bound": "bound, ms", "of bound": "bound / ours",
    "capture, s": "capture, s", "peak, GiB": "peak, GiB", "pixels, ms": "pixels, ms an image",
    "images/s": "images/s with pixels", "50,000 images, min": "50,000 images, min",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    models: tuple[str, ...] = ("alitok-xl", "rar-xl")
    batches: tuple[int, ...] = (125, 1, 32, 250)  # the most telling first
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    int8_batch: int = 125
    pixels_batch: int = 25
    square: int = 8192  # of the matrix product
    repeats: int = 20


SMALL = Plan(("fashion-small",), (1, 2), (torch.float32,), 2, 2, 512, 2)


class Results:
    """What was found so far, in a file that grows, and the time that is left."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path = path
        self.end = time.monotonic() + limit
        self.rows: list[dict[str, Any]] = []

    def add(self, kind: str, found: dict[str, Any]) -> None:
        """Keep and print a result."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **found}) + "\n")
        print(f"{kind}: " + ", ".join(f"{name} {_short(value)}" for name, value in found.items()), flush=True)
        if kind == "steps":
            self.rows.append(found)

    def attempt(self, name: str, part: Callable[[], Any]) -> Any:
        """What a part gives; None where it was left out for want of time or memory, or failed, which is kept."""
        found = None
        if time.monotonic() > self.end:
            self.add("left out", {"what": name, "why": "no time is left"})
            return None
        try:
            found = part()
        except Exception as error:  # the other parts have something to say all the same
            self.add("left out" if is_out_of_memory(error) else "failed", {"what": name, "why": in_short(error)})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do: bytes a second, and operations a second of products by dtype."""

    bandwidth: float
    operations: dict[torch.dtype, float]

    @classmethod
    def measured(cls, device: torch.device, plan: Plan) -> Ceilings:
        """Of a copy, and of a product of square matrices; float32 as the steps have it, in TF32 on a GPU."""
        operations = {}
        for dtype in plan.dtypes:
            a, b = torch.randn(2, plan.square, plan.square, device=device, dtype=dtype)
            seconds = _median(lambda a=a, b=b: a @ b, plan.repeats)  # type: ignore[misc]
            operations[dtype] = 2 * plan.square**3 / seconds
        return cls(doctor.bandwidth(device, None if device.type == "cuda" else 2**26), operations)


def bound(generator: ClassGenerator, batch: int, ceilings: Ceilings) -> float:
    """Seconds that no step in the middle of the sequence can do without, see the head of this file.

    RAR's modulations do not depend on the tokens, so they are not counted.
    """
    ahead = {
        id(layer) for part in generator.modules() if isinstance(part, Modulation) for layer in part.adaLN_modulation
    }
    layers = [layer for layer in generator.modules() if isinstance(layer, nn.Linear) and id(layer) not in ahead]
    numbers = sum(layer.weight.numel() for layer in layers)
    condition = generator.condition(range(batch), guided=True)
    read = numbers * generator.dtype.itemsize + generator.cache_bytes(condition) / 2
    return max(read / ceilings.bandwidth, 2 * numbers * condition.rows / ceilings.operations[generator.dtype])


def steps(generator: ClassGenerator, baseline: ClassGenerator | None, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step in the middle of the sequence, ours and in the released manner, and of the capture."""
    position, found = generator.num_tokens // 2, {}
    cfg, soft = CFG(guidance_scale=4.0), SoftCFG.released(guidance_scale=4.0)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    with prepared_linear_layers(generator, 2 * batch):
        cache = filled_cache(generator, generator.condition(range(batch), guided=True))
        started = time.perf_counter()
        sides: dict[str, Callable[[], object]] = {"CFG": decoding_step(generator, range(batch), cfg, position, cache)}
        doctor.wait(generator.device)
        found["capture, s"] = time.perf_counter() - started
        sides["SoftCFG"] = decoding_step(generator, range(batch), soft, position, cache)
        found |= medians(sides, repeats)
    if cuda:
        weights = sum(parameter.nbytes for parameter in generator.parameters())
        found["peak, GiB"] = (torch.cuda.max_memory_allocated() - before + weights) / 2**30
    del cache, sides
    if baseline is None:
        return found
    try:
        with torch.device(generator.device):
            sides = {
                "released CFG": released_step(baseline, batch, cfg, position),
                "released SoftCFG": released_step(baseline, batch, soft, position),
            }
            found |= medians(sides, max(2, repeats // 4))
    except RuntimeError as error:  # it takes more memory than ours, whose figures stand
        if not is_out_of_memory(error):
            raise
    return found


def measure(name: str, device: torch.device, plan: Plan, ceilings: Ceilings, results: Results) -> None:
    """All of one model."""
    entry = resolve(name)
    full: ClassGenerator = random_weights(entry.generator, device=device, dtype=torch.float32)

    def pixel_seconds() -> float:
        tokenizer = random_weights(entry.tokenizer, device=device)
        tokens = torch.randint(tokenizer.codebook_size, (plan.pixels_batch, full.num_tokens), device=device)
        return _median(lambda: tokenizer.decode(tokens), max(2, plan.repeats // 4)) / plan.pixels_batch

    @torch.inference_mode()
    def row(generator: ClassGenerator, batch: int) -> dict[str, Any]:
        needed, free = batch_bytes(generator, batch, SoftCFG()), free_memory(device)
        if free is not None and needed > free:
            raise torch.OutOfMemoryError
        # The released samplers compute in float32.
        found = steps(generator, None if generator.cache_dtype else full, batch, plan.repeats)
        return _derived(found, bound(generator, batch, ceilings), pixels, batch, full.num_tokens)

    pixels = results.attempt(f"pixels of {name}", pixel_seconds)
    for dtype in plan.dtypes:
        generator = full if dtype == torch.float32 else copy.deepcopy(full).to(dtype)
        for batch, stored in [*((batch, None) for batch in plan.batches), (plan.int8_batch, torch.int8)]:
            generator.cache_dtype = stored
            what = {"model": name, "dtype": _name(dtype), "cache": _name(stored or dtype), "batch": batch}
            found = results.attempt(", ".join(map(str, what.values())), partial(row, generator, batch))
            if found is not None:
                results.add("steps", {**what, **found})


def _derived(found: dict[str, Any], least: float, pixels: float | None, batch: int, tokens: int) -> dict[str, Any]:
    """The figures of a row, times of a step in milliseconds."""
    row = {name: value if name in ("capture, s", "peak, GiB") else 1e3 * value for name, value in found.items()}
    soft = found["SoftCFG"]
    row |= {"over CFG": f"{100 * (soft / found['CFG'] - 1):+.1f} %", "bound": 1e3 * least, "of bound": least / soft}
    if "released SoftCFG" in found:
        row["times released"] = found["released SoftCFG"] / soft
    if pixels is not None:
        images = 1 / (soft * tokens / batch + pixels)
        row |= {"pixels, ms": 1e3 * pixels, "images/s": images, "50,000 images, min": 50_000 / images / 60}
    return row


def _median(run: Callable[[], object], repeats: int) -> float:
    with torch.inference_mode():
        return medians({"it": run}, repeats)["it"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Run all parts; the exit code is 1 if something is not correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"), help="file that results are appended to")
    parser.add_argument("--limit", type=float, default=450, help="seconds after which no part is begun")
    parser.add_argument("--small", action="store_true", help="a small model and few repeats, to try this script")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        parser.error("there is no GPU; --small tries this script on a CPU")
    plan, results, sound = SMALL if args.small else Plan(), Results(args.output, args.limit), True
    results.add("machine", {"device": machine(), "versions": doctor.environment(device), "small": args.small})
    for check in doctor.self_test(device):
        results.add("check", {"name": check.name, "ok": check.ok, "detail": check.detail})
        sound &= check.ok is not False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ceilings = results.attempt("ceilings", partial(Ceilings.measured, device, plan))
    if ceilings is not None:
        rates = {f"{_name(dtype)}, TFLOP/s": 1e-12 * rate for dtype, rate in ceilings.operations.items()}
        results.add("ceilings", {"copy, GB/s": 1e-9 * ceilings.bandwidth, **rates})
        for name in plan.models:
            results.attempt(name, partial(measure, name, device, plan, ceilings, results))
    print(f"\n{machine()}; float32 in TF32 where the GPU has it; steps of all images of a batch\n")
    print(table(list(COLUMNS.values()), [[row.get(name, "") for name in COLUMNS] for row in results.rows]))
    print("\nall checks passed" if sound else "\nA CHECK FAILED, see above")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
