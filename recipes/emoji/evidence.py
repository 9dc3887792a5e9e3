"""What guidance does on the text-to-image model: draw and measure point by point, as the judge sees it.

Prompts are of pictures seen in training, of pairs of name and style that were held out, and of colours that were. The
most telling points come first, and each is kept as soon as it is measured: stop whenever you like, the same command
goes on, and several processes share the points among them. `--report` prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import softcfg
from recipes.commands import run_command
from recipes.emoji import data
from recipes.emoji.data import Collection
from recipes.emoji.evaluate import KINDS, chosen, folder_of, right
from recipes.study.measure import TRACED_AT_ONCE, distances, means, on_background, per_step, row_of
from recipes.study.patches import brightness
from recipes.study.points import NONE, TRACED, TUNING_SEED, Point, Row, key
from recipes.study.results import Results
from softcfg import CFG, Pipeline, SoftCFG, evaluation
from softcfg.decoding import decode, image_uniforms
from softcfg.decoding.perturbed import step_weights
from softcfg.errors import UserError
from softcfg.evaluation.emoji_judge import VIEWS, load_judge, look
from softcfg.files import hash_file, make_folder
from softcfg.nn.linear import weights_in_use
from softcfg.zoo import resolve

RESULTS = Path("docs/study/emoji.jsonl")
LATE = (78, 157)  # the second half of the steps
METHODS: Mapping[str, CFG] = {
    "CFG": CFG(schedule="constant"),
    "SoftCFG": SoftCFG(schedule="constant"),
    "SoftCFG without Step Normalisation": SoftCFG(schedule="constant", step_norm=False),
    "APG": CFG(schedule="constant", rule="apg"),  # type: ignore[arg-type]
    "rescaled CFG": CFG(schedule="constant", rule="rescale"),  # type: ignore[arg-type]
    "CFG-Zero*": CFG(schedule="constant", rule="zero_star"),  # type: ignore[arg-type]
    "CFG in the second half": CFG(schedule="constant", interval=LATE),
}
SCALES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
FIRST_SCALES = (2.0, 4.0, 1.5, 3.0, 6.0)  # the most telling one first
TRACED_SCALE = 3.0
TRACED_METHODS = ("CFG", "SoftCFG", "SoftCFG without Step Normalisation")
WHITE = 0.97  # mean of a patch's least channel from which on it is background
JUDGED_AT_ONCE = 500
LOOKS = VIEWS[:1]  # one, where `softcfg eval` takes five: the results that are kept were judged so


@dataclass(frozen=True)
class Drawn(Point):
    """A point of this model.

    `measure` is the kind of prompts ("seen", "style", "colour"), "trace", or "real" or "tokens" and a kind: the
    pictures themselves, as they are or through the image tokenizer.
    """

    temperature: float = 1.0

    def settings(self) -> Row:
        """See `Point.settings`."""
        return {**super().settings(), "temperature": self.temperature}


@dataclass(frozen=True)
class Plan:
    """Which points there are.

    Attributes:
        samples: images per point.
        seeds: seeds per point, from 0.
        temperatures: the first is that of all points; at the others the first ones are drawn once, and those of CFG and
            SoftCFG at the most telling scale, for seen prompts, with all seeds.
    """

    samples: int = 5000
    seeds: int = 3
    temperatures: tuple[float, ...] = (1.0,)

    def points(self, rows: Mapping[str, Row]) -> list[Drawn]:
        """All points that follow from the results so far, the most telling first.

        Settings are tuned on a seed of their own, and on prompts of seen pictures alone.
        """
        first = [NONE, *(at(name, scale) for scale in FIRST_SCALES for name in ("CFG", "SoftCFG"))]
        every = list(dict.fromkeys([NONE, *(at(name, scale) for name in METHODS for scale in SCALES)]))
        best = [guidance for found in self.best(rows).values() for guidance in found.values()]
        points = [
            *self.of(first, 0),
            *self.traces().values(),
            *self.bounds(),
            *self.tuning(every),
            *self.of(best, 0),
            *self.of(every, 0, ["seen"]),
            *(point for seed in range(1, self.seeds) for point in self.of([*first, *best], seed)),
        ]
        others = self.of(first, 0)
        for seed in range(1, self.seeds):
            others += self.of([at(name, FIRST_SCALES[0]) for name in ("CFG", "SoftCFG")], seed, ["seen"])
        for temperature in self.temperatures[1:]:
            points += [replace(point, temperature=temperature) for point in others]
        points += [point for seed in range(self.seeds) for point in self.of(every, seed)]
        return list(dict.fromkeys(points))

    def of(self, settings: Iterable[CFG], seed: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Drawn]:
        """The points of settings, those of seen pictures first."""
        settings = list(settings)
        return [self.point(guidance, seed, kind) for kind in kinds for guidance in settings]

    def point(self, guidance: CFG, seed: int, measure: str) -> Drawn:
        """One point."""
        return Drawn(guidance, seed, self.samples, measure, self.temperatures[0])

    def tuning(self, settings: Iterable[CFG]) -> list[Drawn]:
        """The points by which each method's scale is chosen."""
        samples = min(self.samples, max(self.samples // 5, 16))
        return [Drawn(guidance, TUNING_SEED, samples, "seen", self.temperatures[0]) for guidance in settings]

    def traces(self) -> dict[str, Drawn]:
        """What is looked at step by step."""
        settings = {"no guidance": NONE, **{name: at(name, TRACED_SCALE) for name in TRACED_METHODS}}
        samples = min(TRACED, self.samples)
        return {name: Drawn(each, 0, samples, "trace", self.temperatures[0]) for name, each in settings.items()}

    def bounds(self) -> list[Drawn]:
        """What the judge says of the pictures themselves; guidance, seed and temperature mean nothing here."""
        return [Drawn(NONE, 0, self.samples, f"{what} {kind}") for what in ("real", "tokens") for kind in KINDS]

    def best(self, rows: Mapping[str, Row]) -> dict[str, dict[str, CFG]]:
        """Method -> "FID" and "prompt" -> the setting of least FID, or of most pictures that are all right.

        Only methods that are tuned in full are there.
        """
        found: dict[str, dict[str, CFG]] = {}
        for name in METHODS:
            points = self.tuning(at(name, scale) for scale in SCALES)
            keys = [key(point.settings()) for point in points]
            if rows.keys() >= set(keys):
                values = {point.guidance: rows[k]["values"] for point, k in zip(points, keys, strict=True)}
                found[name] = {
                    "FID": min(values, key=lambda guidance: values[guidance]["fid"]),
                    "prompt": max(values, key=lambda guidance: values[guidance]["all"]),
                }
        return found

    def of_seeds(self, guidance: CFG, kind: str, rows: Mapping[str, Row]) -> dict[int, Row]:
        """Seed -> values, for the seeds that are there."""
        keys = {seed: key(self.point(guidance, seed, kind).settings()) for seed in range(self.seeds)}
        return {seed: rows[k]["values"] for seed, k in keys.items() if k in rows}


@functools.cache
def at(name: str, scale: float) -> CFG:
    """A method at a scale."""
    return replace(METHODS[name], guidance_scale=scale)


def title(guidance: CFG) -> str:
    """Method and scale."""
    if guidance == NONE:
        return "no guidance"
    return next(
        f"{name} {guidance.guidance_scale:g}" for name in METHODS if at(name, guidance.guidance_scale) == guidance
    )


class Laboratory:
    """A model, its judge, and the pictures that images are compared with."""

    def __init__(
        self,
        collection: Collection,
        model: str,
        device: torch.device,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.collection = collection
        self.device = device
        self.batch_size = batch_size
        self.pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype, tokenizer_dtype=dtype)
        self.judge, self.words, _ = load_judge(folder_of(model) / "judge.safetensors", device)
        if device.type == "cuda":
            self.judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.reference, _ = self.look(self.pictures(collection.where(recoloured=False)))
        self.statistics = evaluation.statistics(self.reference).to(torch.device("cpu"))

    def run(self, point: Drawn) -> Row:
        """The row of a point for the results."""
        kinds = {**dict.fromkeys(KINDS, self.images), "trace": self.trace}
        return row_of(point, kinds.get(point.measure, self.bound), self.pipeline.name, self.device)  # type: ignore[arg-type]

    def images(self, point: Drawn) -> Row:
        """What the judge sees in images drawn with the point's settings."""
        pictures = self.prompted(point.measure, point.samples)
        return self.judged(self.drawn(point, pictures), pictures, with_distances=point.measure == "seen")

    def bound(self, point: Drawn) -> Row:
        """What the judge sees in the pictures, as they are or as the tokenizer gives them back."""
        what, kind = point.measure.split()
        pictures = chosen(self.collection, kind, point.samples)
        pixels = self.pictures(pictures)
        if what == "tokens":
            tokenizer, parts = self.pipeline.tokenizer, pixels.split(min(self.batch_size, JUDGED_AT_ONCE))
            with torch.inference_mode():
                decoded = [tokenizer.to_uint8(tokenizer.decode(tokenizer.encode(part / 255))) for part in parts]
            pixels = torch.cat(decoded).permute(0, 3, 1, 2)
        return self.judged(pixels, pictures, with_distances=point.measure == "tokens seen")

    def prompted(self, kind: str, count: int) -> list[int]:
        """The pictures whose captions are the prompts, over again if there are fewer than `count`.

        Raises:
            UserError: there are none of this kind.
        """
        pictures = chosen(self.collection, kind, count)
        if not pictures:
            raise UserError(f"the collection has no pictures for prompts of the kind {kind}")
        return [pictures[i % len(pictures)] for i in range(count)]

    @torch.inference_mode()
    def drawn(self, point: Drawn, pictures: Sequence[int]) -> Tensor:
        """The images that `draw` draws, uint8 [N, 3, 96, 96], which stay on the device; prompts are read once."""
        generator, tokenizer = self.pipeline.generator, self.pipeline.tokenizer
        inputs, uniforms = self.inputs(tuple(pictures)), self.uniforms(point.seed, len(pictures))
        found = []
        with weights_in_use(generator):
            for start in range(0, len(pictures), self.batch_size):
                part = slice(start, start + self.batch_size)
                condition = generator.condition(inputs[part], guided=False)
                tokens = decode(
                    generator,
                    inputs[part],
                    point.guidance,
                    uniforms=uniforms[part],
                    sampling=self.pipeline.sampling(point.temperature),
                )
                for codes in generator.image_codes(tokens, condition).split(JUDGED_AT_ONCE):
                    found.append(tokenizer.to_uint8(tokenizer.decode(codes, condition.grid)))
        return torch.cat(found).permute(0, 3, 1, 2)

    @functools.cache  # noqa: B019  # there is one laboratory a process
    def inputs(self, pictures: tuple[int, ...]) -> list[object]:
        """The captions of pictures as the generator reads them."""
        captions = [self.collection.pictures[i].caption for i in pictures]
        return self.pipeline.conditioning.inputs(self.pipeline.conditioning.requests(None, captions))

    @functools.lru_cache(1)  # noqa: B019
    def uniforms(self, seed: int, count: int) -> Tensor:
        """The random numbers of a seed's first images."""
        return image_uniforms(seed, range(count), self.pipeline.num_tokens())

    def draw(self, point: Drawn, pictures: Sequence[int]) -> softcfg.calls.PipelineOutput:
        """Draw an image for each picture's caption; image n has random numbers of its own."""
        return self.pipeline(
            prompts=[self.collection.pictures[i].caption for i in pictures],
            guidance=point.guidance,
            seed=point.seed,
            temperature=point.temperature,
            batch_size=self.batch_size,
            progress=False,
        )

    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """Pictures of the collection, uint8 [N, 3, 96, 96] on the device."""
        return torch.from_numpy(self.collection.pixels[numbers]).permute(0, 3, 1, 2).to(self.device)

    def judged(self, images: Tensor, pictures: Sequence[int], *, with_distances: bool) -> Row:
        """Shares of images [N, 3, 96, 96] that are right, and their distances from the seen pictures if asked for."""
        features, seen = self.look(images)
        values: Row = {**right(seen, self.words, [self.collection.pictures[i] for i in pictures])}
        return {**values, **distances(self.reference, self.statistics, features)} if with_distances else values

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The judge's features [N, D] and answers [N, 3] of uint8 images [N, 3, 96, 96]; in TF32 on a GPU."""
        return look(self.judge, images, JUDGED_AT_ONCE, views=LOOKS, exact=self.device.type == "cpu")

    def trace(self, point: Drawn) -> Row:
        """What guidance does while the image codes are drawn, means over the images, and where the confidence lies.

        As in the study, and `object`, the share of object at each place; `background_weakened` and
        `object_weakened` are mean 1 - w at the last step, on white patches and on all others.
        """
        found: dict[str, list[Tensor]] = defaultdict(list)
        weakened: list[Tensor] = []
        pictures = self.prompted("seen", point.samples)
        drawn = self.draw(point, pictures)
        inputs = self.pipeline.conditioning.inputs(drawn.prompts or [])
        for start in range(0, len(pictures), TRACED_AT_ONCE):
            part = slice(start, start + TRACED_AT_ONCE)
            generator = self.pipeline.generator
            trace = softcfg.trace(
                generator,
                labels=inputs[part],
                tokens=drawn.tokens[part],
                guidance=point.guidance,
                sampling=self.pipeline.sampling(point.temperature),
                value_weights=False,
            )
            steps = torch.arange(drawn.tokens.shape[1], device=generator.device)
            codes = generator.is_code(steps, generator.condition(inputs[part], guided=False))
            trace = trace if codes is None else trace.at(codes)
            for name, each in per_step(trace).items():
                found[name].append(each)
            if point.guidance.perturbs:
                last = torch.tensor([trace.confidence.shape[1] - 1])
                weakened.append(1 - step_weights(trace.confidence, point.guidance.weak_branch, last)[:, 0])
            least = torch.from_numpy(drawn.pixels[part].min(axis=3)).float() / 255
            found["object"].append((brightness(least, self.pipeline.tokenizer.latent_size) < WHITE).float())
        background = torch.cat(found["object"]) == 0
        values: Row = {**means(found), **on_background(torch.cat(found["confidence"]), background)}
        if weakened:
            named = on_background(torch.cat(weakened), background)
            values |= {f"{where}_weakened": named[f"{where}_confidence"] for where in ("background", "object")}
        return values


def results_of(model: str, path: Path) -> Results:
    """The results of a model as its judge sees it; the two are told by their weights."""
    folder = folder_of(model)
    make_folder(path.parent)
    files = (resolve(model).generator.file.local_name, "judge.safetensors")
    hashes = "".join(hash_file(folder / name) for name in files)
    return Results(path, hashlib.sha256(hashes.encode()).hexdigest()[:16])


def temperatures_of(model: str, given: Sequence[float] | None) -> tuple[float, ...]:
    """Those asked for, or the model's own."""
    return tuple(given or [resolve(model).sampling.get("temperature", 1.0)])


def measure(
    collection: Collection,
    model: str | Path,
    results: str | Path,
    device: str | torch.device = "cpu",
    limit: float | None = None,
    images: int = 5000,
    *,
    seeds: int = 3,
    temperatures: Sequence[float] | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Draw and measure what is not in the results yet; return whether all points are there.

    Args:
        collection: see `data.load`.
        model: a model folder with its judge, or the name of a bundled one.
        results: the file of results, to which each point is added as soon as it is measured.
        limit: seconds after which no point is begun, nor one that is expected to take longer.
        images: images per point.
        seeds, temperatures: see `Plan`; the model's temperature by default.
        batch_size: images drawn at once; 2,500 by default, 50 on a CPU.
        dtype: of generator and image tokenizer.
    """
    begun, device, model = time.monotonic(), torch.device(device), str(model)
    file = results_of(model, Path(results))
    plan = Plan(images, seeds, temperatures_of(model, temperatures))
    laboratory = Laboratory(collection, model, device, batch_size or (50 if device.type == "cpu" else 2500), dtype)
    took: dict[tuple[str, int], float] = {}
    while todo := missing(plan, file):
        for point in todo:
            kind, spent = (point.measure, point.samples), time.monotonic() - begun
            if limit is not None and spent + took.get(kind, 0) > limit:
                return False
            with file.claim(point.settings()) as free:
                if not free:
                    continue
                row = laboratory.run(point)
                file.append(row)
            took[kind] = row["seconds"]
            shares = " ".join(f"{name} {row['values'][name]:.3f}" for name in ("all", "fid") if name in row["values"])
            print(f"{spent:.0f} s: {point.measure}, {title(point.guidance)}, seed {point.seed}: {shares}", flush=True)
            if point.seed == TUNING_SEED:
                break  # a setting that was found best may come next
        else:
            time.sleep(1)  # others draw what is left; further points may follow from it
    return True


def missing(plan: Plan, file: Results) -> list[Drawn]:
    """The points that are not in the results yet."""
    rows = file.rows()
    return [point for point in plan.points(rows) if key(point.settings()) not in rows]


def main() -> None:
    """Read the options and work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="the model folder, or a bundled model")
    parser.add_argument("--pictures", type=Path, help="the cache of the pictures [$SOFTCFG_PICTURES]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are collected")
    parser.add_argument("--images", type=int, default=Plan.samples, help="images per point")
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="seeds per point")
    parser.add_argument("--temperatures", type=float, nargs="+", help="the main one first [the model's]")
    parser.add_argument("--batch-size", type=int, help="images at once [2500, on a CPU 50]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what draws")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop after this time")
    parser.add_argument("--report", action="store_true", help="draw nothing, print the tables")
    parser.add_argument("--plots", type=Path, help="folder for the plots of the report")
    run_command(parser, work)


def work(given: argparse.Namespace) -> None:
    """Measure, or print the report."""
    if given.report:
        from recipes.emoji.evidence_report import report

        plan = Plan(given.images, given.seeds, temperatures_of(given.model, given.temperatures))
        print(report(results_of(given.model, given.results).rows(), plan, given.plots))
        return
    size = {"seeds": given.seeds, "temperatures": given.temperatures, "batch_size": given.batch_size}
    size["dtype"] = getattr(torch, given.dtype)
    collection = data.load(given.pictures)
    measure(collection, given.model, given.results, given.device, given.limit, given.images, **size)


if __name__ == "__main__":
    main()
