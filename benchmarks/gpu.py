"""All that a GPU has to show, in less than eight minutes: correctness, then speed, against others and the bound.

    python -m benchmarks.gpu --output gpu.jsonl --limit 170
    python -m benchmarks.gpu --output gpu.jsonl --only check profile

It needs PyTorch with Triton and what softcfg itself needs; weights are random. The most telling parts come first. Every
result is printed and appended to the output file as it comes, so an interrupted run has shown what it found; the table
comes last. A part that fails leaves its traceback there, and the others go on: in a new process if the GPU's context is
broken. After a crash, `--resume` goes on with the parts that no process has begun yet.

The bound of a step is the longer of two times at ceilings that are measured first: reading the weights and the filled
part of the cache once, and the operations of the linear layers. Steps are timed in the middle of the sequence, which
stands for all of it: what is read grows evenly. `--small` runs the same code on a small model, on a CPU for example.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import gc
import itertools
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from benchmarks.decoding import released_step
from benchmarks.timing import machine, medians, table
from softcfg import doctor
from softcfg.decoding import decode, graphs, image_uniforms
from softcfg.decoding.throughput import TimedStep, batch_bytes, filled_cache
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import ClassGenerator
from softcfg.models.rar import Modulation
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.memory import free_memory, in_short, is_out_of_memory
from softcfg.nn.precision import dtype_name
from softcfg.tokenizers.base import Tokenizer
from softcfg.zoo.loading import random_weights
from softcfg.zoo.registry import resolve

COLUMNS = {
    "model": "model", "dtype": "dtype", "cache": "cache", "batch": "batch", "CFG": "CFG, ms", "SoftCFG": "SoftCFG, ms",
    "over CFG": "over CFG", "released CFG": "released CFG, ms", "released SoftCFG": "released SoftCFG, ms",
    "times released": "released / ours, SoftCFG", "bound": "bound, ms", "of bound": "bound / ours",
    "capture, s": "capture, s", "peak, GiB": "peak, GiB", "pixels, ms": "pixels, ms an image",
    "images/s": "images/s with pixels", "50,000 images, min": "50,000 images, min",
}  # fmt: skip
CFG_RULE, SOFT_RULE = CFG(guidance_scale=4.0), SoftCFG.released(guidance_scale=4.0)
KERNELS = 15  # of a profile, those that take longest
GRACE = 60  # seconds after the limit at which a part that hangs ends the process


@dataclass(frozen=True)
class Point:
    """One part: "steps", whole "images", the "profile" of a step, or "pixels" alone, of a model at a batch size."""

    kind: str
    model: str
    dtype: torch.dtype
    batch: int
    cache: torch.dtype | None = None
    pixels: torch.dtype = torch.float32  # of the image tokenizer, in whole images

    @property
    def what(self) -> dict[str, Any]:
        """What is measured, as it is written down."""
        dtypes = {"dtype": dtype_name(self.dtype), "cache": dtype_name(self.cache or self.dtype)}
        pixels = {} if self.pixels == torch.float32 else {"pixels": dtype_name(self.pixels)}
        return {"model": self.model, **dtypes, **pixels, "batch": self.batch}

    @property
    def name(self) -> str:
        """For `--only` and messages."""
        cache = [] if self.cache is None else [f"{dtype_name(self.cache)} cache"]
        pixels = [] if self.pixels == torch.float32 else [f"{dtype_name(self.pixels)} pixels"]
        return " ".join([self.kind, self.model, dtype_name(self.dtype), str(self.batch), *cache, *pixels])


@dataclass(frozen=True)
class Plan:
    """What is measured, the most telling first."""

    points: tuple[Point, ...]
    square: int = 8192  # of the matrix product
    repeats: int = 20

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of all models."""
        return list(dict.fromkeys(point.dtype for point in self.points))

    @classmethod
    def full(cls) -> Plan:
        """For a GPU."""
        alitok, rar, bf16 = "alitok-xl", "rar-xl", torch.bfloat16
        first = (
            Point("pixels", alitok, torch.float32, 25), Point("steps", alitok, bf16, 125),
            Point("steps", alitok, bf16, 1), Point("steps", alitok, bf16, 125, torch.int8),
            Point("images", alitok, bf16, 125), Point("images", alitok, bf16, 250, pixels=bf16),
            Point("images", alitok, bf16, 500, pixels=bf16),
            Point("profile", alitok, bf16, 125), Point("profile", alitok, bf16, 1),
            Point("pixels", rar, torch.float32, 25), Point("steps", rar, bf16, 125), Point("images", rar, bf16, 125),
            Point("profile", rar, bf16, 125), Point("steps", rar, bf16, 1),
            Point("pixels", rar, bf16, 25), Point("pixels", alitok, bf16, 25),
        )  # fmt: skip
        rest = [
            Point("steps", *each) for each in itertools.product((alitok, rar), (bf16, torch.float32), (125, 1, 32, 250))
        ]
        rest.append(Point("steps", rar, bf16, 125, torch.int8))
        return cls(tuple(dict.fromkeys((*first, *rest))))

    @classmethod
    def small(cls) -> Plan:
        """For a CPU."""
        kinds = (("pixels", 2), ("steps", 1), ("steps", 2), ("images", 2), ("profile", 1))
        points = [Point(kind, "fashion-small", torch.float32, batch) for kind, batch in kinds]
        points.append(Point("images", "fashion-small", torch.float32, 2, pixels=torch.bfloat16))
        return cls((*points, Point("steps", "fashion-small", torch.float32, 2, torch.int8)), 512, 2)


class Results:
    """What was found so far, in a file that grows, and the time that is left.

    Args:
        limit: seconds after which no part is begun.
        only: parts of names; parts without any of them are passed over. Empty: none is.
        resume: go on after a process that ended early: the parts that it has begun are passed over.
    """

    def __init__(self, path: Path, limit: float, only: list[str], *, resume: bool) -> None:
        self.path, self.only = path, only
        self.started = time.monotonic()
        self.end = self.started + limit
        self.sound = True
        self.rows: list[dict[str, Any]] = []
        self.begun: set[str] = set()
        self.pixels: dict[str, float] = {}  # model -> seconds an image
        if resume:
            self._read()

    def _read(self) -> None:
        for line in self.path.read_text().splitlines():
            found = json.loads(line)
            kind = found.pop("kind")
            if kind == "machine":  # of a later run
                self.rows, self.begun, self.sound = [], set(), True
            elif kind == "begun":
                self.begun.add(found["what"])
            else:
                self._take(kind, found)

    def _take(self, kind: str, found: dict[str, Any]) -> None:
        if kind == "steps":
            self.rows.append(found)
        if kind == "pixels" and found["dtype"] == "float32":
            self.pixels[found["model"]] = 1e-3 * found["pixels, ms"]
        failed_check = kind == "failed" and found["what"].startswith("check")
        self.sound &= not failed_check and found.get("ok", True) is not False

    def add(self, kind: str, found: dict[str, Any], *, say: bool = True) -> None:
        """Keep and print a result."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **found}) + "\n")
        if say:
            text = ", ".join(f"{name} {_short(value)}" for name, value in found.items() if name != "traceback")
            print(f"[{time.monotonic() - self.started:4.0f} s] {kind}: {text}", flush=True)
        self._take(kind, found)

    def attempt(self, name: str, part: Callable[[], Any], *, again: bool = False) -> Any:
        """What a part gives; None where it was left out for want of time or memory, or failed, which is kept.

        Args:
            again: do it whatever was asked for, and even if it has been done.
        """
        found = None
        if not again and (name in self.begun or (self.only and not any(word in name for word in self.only))):
            return None
        if time.monotonic() > self.end:
            self.add("left out", {"what": name, "why": "no time is left"})
            return None
        self.add("begun", {"what": name}, say=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = part()
            except Exception as error:  # the other parts have something to say all the same
                kind = "left out" if is_out_of_memory(error) else "failed"
                trace = "".join(traceback.format_exception(error))
                self.add(kind, {"what": name, "why": in_short(error) or type(error).__name__, "traceback": trace})
                print(trace[-1500:] if kind == "failed" else "", end="", flush=True)
        for message in sorted({str(warning.message) for warning in caught}):
            self.add("warning", {"what": name, "message": message[:1000]})
        gc.collect()
        if torch.cuda.is_available():
            self._require_context()
        return found

    def _require_context(self) -> None:
        """Go on in a new process if no kernel runs in this one any more, as after an illegal access."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            left = str(max(0.0, self.end - time.monotonic()))
            words = ["-m", "benchmarks.gpu", *sys.argv[1:], "--limit", left, "--resume"]
            os.execv(sys.executable, [sys.executable, *words])


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
    condition = generator.condition(generator.example_inputs(batch), guided=True)
    read = numbers * generator.dtype.itemsize + generator.cache_bytes(condition) / 2
    return max(read / ceilings.bandwidth, 2 * numbers * condition.rows / ceilings.operations[generator.dtype])


def steps(generator: ClassGenerator, baseline: ClassGenerator | None, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step in the middle of the sequence, ours and in the released manner, and of the capture."""
    position, found = generator.num_tokens // 2, {}
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    with prepared_linear_layers(generator, 2 * batch):
        cache = filled_cache(generator, generator.condition(generator.example_inputs(batch), guided=True))
        sides: dict[str, Callable[[], object]] = {
            "CFG": TimedStep(generator, generator.example_inputs(batch), CFG_RULE, position, cache)
        }
        doctor.wait(generator.device)
        started = time.perf_counter()
        sides["SoftCFG"] = TimedStep(generator, generator.example_inputs(batch), SOFT_RULE, position, cache)
        doctor.wait(generator.device)
        found["capture, s"] = time.perf_counter() - started
        found |= medians(sides, repeats, in_a_row=5 if cuda else 1)
    if cuda:
        weights = sum(parameter.nbytes for parameter in generator.parameters())
        found["peak, GiB"] = (torch.cuda.max_memory_allocated() - before + weights) / 2**30
    del cache, sides
    if baseline is None:
        return found
    try:
        for name, rule in (("released CFG", CFG_RULE), ("released SoftCFG", SOFT_RULE)):  # both at once are too large
            with torch.device(generator.device):
                found |= medians({name: released_step(baseline, batch, rule, position)}, max(2, repeats // 4))
    except RuntimeError as error:  # it takes more memory than ours, whose figures stand
        if not is_out_of_memory(error):
            raise
    return found


def profiled(generator: ClassGenerator, batch: int, repeats: int) -> dict[str, Any]:
    """The kernels of a step with SoftCFG, and how long they take: of its graph or, if that shows none, of itself."""
    what, events = "graph", _kernels(generator, batch, repeats)
    if not events:
        with mock.patch.dict(graphs.CAPTURES, clear=True):
            what, events = "step by itself", _kernels(generator, batch, repeats)
    times: Counter[str] = Counter()
    for each in events:
        times[each.name] += each.time_range.elapsed_us()
    counts = Counter(each.name for each in events)
    span = max((each.time_range.end for each in events), default=0) - min(
        (each.time_range.start for each in events), default=0
    )
    return {
        "of": what,
        "kernels": round(len(events) / repeats),
        "kinds": len(times),
        "step, ms": 1e-3 * span / repeats,
        "busy, ms": 1e-3 * sum(times.values()) / repeats,
        "longest": [
            {"kernel": name, "count": counts[name] / repeats, "us": us / repeats}
            for name, us in times.most_common(KERNELS)
        ],
    }


def _kernels(generator: ClassGenerator, batch: int, repeats: int) -> list[Any]:
    """What the profiler saw of some steps on the device (on a CPU: operations, of which some hold others)."""
    cuda = generator.device.type == "cuda"
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities):  # a graph may hide from a profiler that is set up later
        torch.ones(1, device=generator.device).add_(1)
    with prepared_linear_layers(generator, 2 * batch):
        cache = filled_cache(generator, generator.condition(generator.example_inputs(batch), guided=True))
        step = TimedStep(generator, generator.example_inputs(batch), SOFT_RULE, generator.num_tokens // 2, cache)
        step()
        doctor.wait(generator.device)
        with torch.profiler.profile(activities=activities) as seen:
            for _ in range(repeats):
                step()
            doctor.wait(generator.device)
    return [each for each in seen.events() or () if (each.device_type.name == "CUDA") == cuda]


def images(generator: ClassGenerator, tokenizer: Tokenizer, batch: int, repeats: int) -> dict[str, Any]:
    """Whole images of a batch, from labels to uint8 on the host, and of that the tokens: seconds."""
    uniforms = image_uniforms(0, range(batch), generator.num_tokens)
    labels = generator.example_inputs(batch)
    condition = generator.condition(labels, guided=False)

    def tokens(guidance: CFG) -> torch.Tensor:
        return decode(generator, labels, guidance, uniforms=uniforms)

    def whole(guidance: CFG) -> torch.Tensor:
        codes = generator.image_codes(tokens(guidance), condition)
        return tokenizer.to_uint8(tokenizer.decode(codes, condition.grid)).cpu()

    sides = {"CFG": partial(whole, CFG_RULE), "SoftCFG": partial(whole, SOFT_RULE)}
    seconds = medians({**sides, "SoftCFG, tokens alone": partial(tokens, SOFT_RULE)}, repeats)
    found = {f"{name}, s a batch": value for name, value in seconds.items()}
    rate = batch / seconds["SoftCFG"]
    over = f"{100 * (seconds['SoftCFG'] / seconds['CFG'] - 1):+.1f} %"
    return {**found, "over CFG": over, "images/s": rate, "50,000 images, min": 50_000 / rate / 60}


@dataclass
class Bench:
    """Measures points; the weights of the last model are kept."""

    device: torch.device
    plan: Plan
    results: Results
    ceilings: Ceilings | None
    _model: str = ""
    _kept: dict[torch.dtype, ClassGenerator] = field(default_factory=dict)

    def measure(self, point: Point) -> None:
        """Measure a point and keep what it shows."""
        found: dict[str, Any] = getattr(self, f"_{point.kind}")(point)
        self.results.add(point.kind, {**point.what, **found}, say=point.kind != "profile")
        if point.kind == "profile":
            longest = found.pop("longest", [])
            print(f"profile {point.name}: " + ", ".join(f"{name} {_short(each)}" for name, each in found.items()))
            for each in longest:
                print(f"  {each['us']:8.1f} us {each['count']:6.1f} times  {each['kernel'][:110]}")

    def _generator(self, model: str, dtype: torch.dtype) -> ClassGenerator:
        if model != self._model:
            self._kept.clear()
            gc.collect()
            self._model = model
            self._kept[torch.float32] = random_weights(resolve(model).generator, device=self.device)
        if dtype not in self._kept:
            self._kept[dtype] = copy.deepcopy(self._kept[torch.float32]).to(dtype)
        generator = self._kept[dtype]
        generator.cache_dtype = None
        return generator

    @torch.inference_mode()
    def _steps(self, point: Point) -> dict[str, Any]:
        with torch.inference_mode(False):
            generator = self._generator(point.model, point.dtype)
        generator.cache_dtype = point.cache
        needed, free = batch_bytes(generator, point.batch, SoftCFG()), free_memory(self.device)
        if free is not None and needed > free:
            raise torch.OutOfMemoryError
        # The released samplers compute in float32.
        baseline = None if point.cache else self._kept[torch.float32]
        found = steps(generator, baseline, point.batch, self.plan.repeats)
        least = None if self.ceilings is None else bound(generator, point.batch, self.ceilings)
        return _derived(found, least, self.results.pixels.get(point.model), point.batch, generator.num_tokens)

    def _profile(self, point: Point) -> dict[str, Any]:
        generator = self._generator(point.model, point.dtype)
        with torch.inference_mode():
            return profiled(generator, point.batch, 3)

    def _images(self, point: Point) -> dict[str, Any]:
        tokenizer = random_weights(resolve(point.model).tokenizer, device=self.device, dtype=point.pixels)
        return images(self._generator(point.model, point.dtype), tokenizer, point.batch, max(2, self.plan.repeats // 6))

    def _pixels(self, point: Point) -> dict[str, Any]:
        tokenizer = random_weights(resolve(point.model).tokenizer, device=self.device, dtype=point.dtype)
        length = self._generator(point.model, torch.float32).num_tokens
        tokens = torch.randint(tokenizer.codebook_size, (point.batch, length), device=self.device)
        seconds = _median(lambda: tokenizer.decode(tokens), max(2, self.plan.repeats // 4))
        return {"pixels, ms": 1e3 * seconds / point.batch}


def _check(results: Results, name: str, test: Callable[[torch.device], Any], device: torch.device) -> None:
    ok, detail = test(device)
    results.add("check", {"name": name, "ok": ok, "detail": detail})


def _derived(
    found: dict[str, Any], least: float | None, pixels: float | None, batch: int, tokens: int
) -> dict[str, Any]:
    """The figures of a row, times of a step in milliseconds."""
    row = {name: value if name in ("capture, s", "peak, GiB") else 1e3 * value for name, value in found.items()}
    soft = found["SoftCFG"]
    row["over CFG"] = f"{100 * (soft / found['CFG'] - 1):+.1f} %"
    if least is not None:
        row |= {"bound": 1e3 * least, "of bound": least / soft}
    if "released SoftCFG" in found:
        row["times released"] = found["released SoftCFG"] / soft
    if pixels is not None:
        rate = 1 / (soft * tokens / batch + pixels)
        row |= {"pixels, ms": 1e3 * pixels, "images/s": rate, "50,000 images, min": 50_000 / rate / 60}
    return row


def _median(run: Callable[[], object], repeats: int) -> float:
    with torch.inference_mode():
        return medians({"it": run}, repeats)["it"]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Run all parts; the exit code is 1 if something is not correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"), help="file that results are appended to")
    parser.add_argument("--limit", type=float, default=450, help="seconds after which no part is begun")
    parser.add_argument(
        "--only", nargs="+", default=[], help='parts of names, such as check, "steps alitok-xl" or int8'
    )
    parser.add_argument("--resume", action="store_true", help="go on after a run that ended early")
    parser.add_argument("--small", action="store_true", help="a small model and few repeats, to try this script")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        parser.error("there is no GPU; --small tries this script on a CPU")
    if device.type == "cuda":
        faulthandler.enable()
        faulthandler.dump_traceback_later(args.limit + GRACE, exit=True)
    plan = Plan.small() if args.small else Plan.full()
    results = Results(args.output, args.limit, args.only, resume=args.resume)
    if not args.resume:
        results.add("machine", {"device": machine(), "versions": doctor.environment(device), "small": args.small})
    for name, test in doctor.TESTS.items():
        results.attempt(f"check {name}", partial(_check, results, name, test, device))
    results.attempt("check choices", lambda: results.add("choices", dict(doctor.choices(device))))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ceilings = results.attempt("ceilings", partial(Ceilings.measured, device, plan), again=True)
    if ceilings is not None:
        rates = {f"{dtype_name(dtype)}, TFLOP/s": 1e-12 * rate for dtype, rate in ceilings.operations.items()}
        results.add("ceilings", {"copy, GB/s": 1e-9 * ceilings.bandwidth, **rates})
    bench = Bench(device, plan, results, ceilings)
    for point in plan.points:
        results.attempt(point.name, partial(bench.measure, point))
    print(f"\n{machine()}; float32 in TF32 where the GPU has it; steps of all images of a batch\n")
    print(table(list(COLUMNS.values()), [[row.get(name, "") for name in COLUMNS] for row in results.rows]))
    print("\nall checks passed" if results.sound else "\nA CHECK FAILED, see above")
    faulthandler.cancel_dump_traceback_later()
    return 0 if results.sound else 1


if __name__ == "__main__":
    sys.exit(main())
