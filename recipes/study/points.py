"""Which points the study has: guidance settings, seeds and numbers of samples.

Scale and power of every method are tuned on a seed of their own with fewer samples; all that is reported comes from
other seeds. Image n of a seed draws the same random numbers at every setting, so settings compare seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recipes.study.methods import CANDIDATES, HALF_TRAINED_CANDIDATES, LONGER_CANDIDATES, NONE
from recipes.study.patches import PatchSoftCFG
from softcfg import CFG, SoftCFG
from softcfg.guidance import describe

Row = dict[str, Any]  # of the results

METHODS: Mapping[str, CFG] = {
    "CFG": CFG(),
    "SoftCFG without Step Normalisation": SoftCFG(step_norm=False),
    "SoftCFG": SoftCFG(),
}

TUNING_SEED = 1000
TUNING_SCALES = (1.5, 2.0, 3.0, 5.0, 8.0)
TUNING_POWERS = (1.0, 2.0)
RANGE = (1.5, 2.0, 3.0, 5.0, 8.0, 12.0)
TARGETS = ("value", "key", "both")
CONFIDENCES = ("max", "sampled", "entropy", "margin")
TRACED = 500


@dataclass(frozen=True)
class Point:
    """Something to draw and measure.

    Attributes:
        measure: "images": the metrics of `samples` images; "trace": what guidance does while they are drawn;
            "real": the metrics of as many training images, "reconstructed": of these through the tokenizer.
    """

    guidance: CFG
    seed: int
    samples: int
    measure: str = "images"

    def settings(self) -> Row:
        """What tells the point apart, as the results hold it."""
        return {
            "measure": self.measure,
            "guidance": describe(self.guidance),
            "seed": self.seed,
            "samples": self.samples,
        }


def key(settings: Row) -> str:
    """A text that two rows share if they are of the same point."""
    names = ("measure", "guidance", "seed", "samples", *(["temperature"] if "temperature" in settings else []))
    return json.dumps({name: settings[name] for name in names}, sort_keys=True)


@dataclass(frozen=True)
class Comparison:
    """Methods side by side, each at its best setting.

    Attributes:
        samples: images per point.
        seeds: seeds per point, from 0.
        tuning_samples: images per point of the tuning.
        candidates: the settings of every method, among which its best is looked for; a single one is not tuned.
    """

    samples: int = 10_000
    seeds: int = 3
    tuning_samples: int = 1_000
    candidates: Mapping[str, Sequence[CFG]] = field(default_factory=lambda: CANDIDATES)

    def points(self, rows: Mapping[str, Row]) -> list[Point]:
        """All points that follow from the results so far, the most important first."""
        points = self.tuning_of_candidates()
        for seed in range(self.seeds):
            points += self._images(self.best_candidates(rows).values(), seed)
        return list(dict.fromkeys(points))

    def tuning_of_candidates(self) -> list[Point]:
        """The settings among which the best of every method is looked for."""
        choices = [settings for settings in self.candidates.values() if len(settings) > 1]
        return [self.tuned_with(guidance) for settings in choices for guidance in settings]

    def best_candidates(self, rows: Mapping[str, Row]) -> dict[str, CFG]:
        """Every method at its setting of least FID, as soon as all of its settings are drawn."""
        found: dict[str, CFG] = {}
        for name, settings in self.candidates.items():
            keys = {guidance: key(self.tuned_with(guidance).settings()) for guidance in settings}
            if len(settings) == 1:
                found[name] = settings[0]
            elif rows.keys() >= set(keys.values()):
                found[name] = min(settings, key=lambda guidance: rows[keys[guidance]]["values"]["fid"])
        return found

    def _images(self, settings: Iterable[CFG], seed: int) -> list[Point]:
        return [Point(guidance, seed, self.samples) for guidance in settings]

    def tuned_with(self, guidance: CFG) -> Point:
        """The point at which a setting is judged in the tuning."""
        return Point(guidance, TUNING_SEED, self.tuning_samples)


class Design(Comparison):
    """The whole study of one model: SoftCFG and CFG in detail, and the comparison with the other methods."""

    def tuning(self) -> list[Point]:
        """The grid in which the best scale and power of CFG and SoftCFG are looked for."""
        return [
            self.tuned_with(replace(method, guidance_scale=scale, guidance_scale_pow=power))
            for method in METHODS.values()
            for scale in TUNING_SCALES
            for power in TUNING_POWERS
        ]

    def points(self, rows: Mapping[str, Row]) -> list[Point]:
        """All points that follow from the results so far, the most important first."""
        tuning = self.tuning()
        if not all(key(point.settings()) in rows for point in tuning):
            return tuning
        best = self.best(rows)
        traces = [Point(method, 0, min(TRACED, self.samples), "trace") for method in traced(best).values()]
        first = {"none": NONE, **best}.values()
        others = [
            *at_scale_of(best["CFG"]).values(),
            *scale_range(best).values(),
            *targets(best).values(),
            *definitions(best).values(),
            *of_patches(best).values(),
        ]
        points = [*tuning, *self._images(first, 0), *traces, *self._images(others, 0), *self.bounds()]
        for seed in range(1, self.seeds):
            points += self._images([*first, *others], seed)
        return list(dict.fromkeys([*points, *super().points(rows)]))

    def bounds(self) -> list[Point]:
        """What no generator can do better, as there is nothing else to draw: guidance and seed mean nothing here."""
        return [Point(NONE, 0, self.samples, measure) for measure in ("real", "reconstructed")]

    def best(self, rows: Mapping[str, Row]) -> dict[str, CFG]:
        """CFG and SoftCFG at the scale and power of least FID in the grid."""
        found: dict[str, CFG] = {}
        for name in METHODS:
            grid = [point for point in self.tuning() if at_scale_of(point.guidance)[name] == point.guidance]
            found[name] = min(grid, key=lambda p: rows[key(p.settings())]["values"]["fid"]).guidance
        return found


# Other models, with fewer images: name or folder of the model -> its comparison.
HALF_TRAINED = "runs/fashion-small-quarter"
LONGER = "fashion"
ELSEWHERE: Mapping[str, Comparison] = {
    HALF_TRAINED: Comparison(samples=2_000, seeds=2, tuning_samples=500, candidates=HALF_TRAINED_CANDIDATES),
    LONGER: Comparison(samples=1_000, seeds=1, tuning_samples=250, candidates=LONGER_CANDIDATES),
}


def at_scale_of(guidance: CFG) -> dict[str, CFG]:
    """Every method at one scale and power."""
    shared = {"guidance_scale": guidance.guidance_scale, "guidance_scale_pow": guidance.guidance_scale_pow}
    return {name: replace(method, **shared) for name, method in METHODS.items()}  # type: ignore[arg-type]


def traced(best: Mapping[str, CFG]) -> dict[str, CFG]:
    """What is looked at step by step: no guidance, and every method at the scale and power that are best for CFG."""
    return {"no guidance": NONE, **at_scale_of(best["CFG"])}


def scale_range(best: Mapping[str, CFG]) -> dict[tuple[str, float], CFG]:
    """(method, scale) -> CFG and SoftCFG over a wide range of scales, all at the power that is best for CFG."""
    return {
        (name, scale): replace(METHODS[name], guidance_scale=scale, guidance_scale_pow=best["CFG"].guidance_scale_pow)
        for scale in reversed(RANGE)
        for name in ("CFG", "SoftCFG")
    }


def targets(best: Mapping[str, CFG]) -> dict[str, CFG]:
    """What the weights scale, at the scale and power that are best for SoftCFG."""
    return {target: replace(best["SoftCFG"], target=target) for target in TARGETS}  # type: ignore[call-arg]


def definitions(best: Mapping[str, CFG]) -> dict[str, CFG]:
    """Confidences, and the released definition, at the scale and power that are best for SoftCFG."""
    softcfg = best["SoftCFG"]
    shared = {"guidance_scale": softcfg.guidance_scale, "guidance_scale_pow": softcfg.guidance_scale_pow}
    return {
        **{kind: replace(softcfg, confidence=kind) for kind in CONFIDENCES},  # type: ignore[call-arg]
        "released": SoftCFG.released(**shared),
    }


def of_patches(best: Mapping[str, CFG]) -> dict[str, CFG]:
    """SoftCFG that weakens tokens of black patches alone, or all others, at the scale and power best for CFG."""
    shared = {"guidance_scale": best["CFG"].guidance_scale, "guidance_scale_pow": best["CFG"].guidance_scale_pow}
    return {patches: PatchSoftCFG(**shared, patches=patches) for patches in ("black", "other")}  # type: ignore[arg-type]


def of_seeds(guidance: CFG, rows: Mapping[str, Row], design: Comparison) -> Iterator[Row]:
    """The rows of a setting, one a seed, as far as they are there."""
    for seed in range(design.seeds):
        row = rows.get(key(Point(guidance, seed, design.samples).settings()))
        if row is not None:
            yield row
