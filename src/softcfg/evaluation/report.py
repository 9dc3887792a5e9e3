"""The outcome of an evaluation, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

TITLES = {  # of all metrics
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
    "agreement": "agreement",
    "name_agreement": "name right",
    "style_agreement": "style right",
    "colour_agreement": "colour right",
}
DECIMALS = {**dict.fromkeys(TITLES, 4), "fid": 3, "sfid": 3, "inception_score": 2}


@dataclass(frozen=True)
class Report:
    """Metrics, and what it takes to compute them again.

    Attributes:
        metrics: value by name.
        settings: samples, reference and extractor with their hashes; parameters of the metrics; versions.
        notes: what a reader of the figures has to know.
    """

    metrics: dict[str, float]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric]

    @property
    def reference_hash(self) -> str | None:
        """SHA-256 of what the samples were compared with; None for nothing."""
        reference = self.settings["reference"]
        return reference and reference["sha256"]

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def to_table(self) -> str:
        """One line per metric, then what was compared, and the notes."""
        width = max(map(len, TITLES.values())) + 2
        lines = [f"{TITLES[name]:{width}}{value:>10.{DECIMALS[name]}f}" for name, value in self.metrics.items()]
        for name in ("samples", "reference", "extractor"):
            if about := self.settings[name]:
                lines.append(f"{name:{width}}{_line(about)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _line(about: dict[str, Any]) -> str:
    count = f", {about['count']:,} images" if about.get("count") else ""
    size = " of {} x {}".format(*about["size"]) if about.get("size") else ""
    statistics = ", statistics of the file" if about.get("statistics") == "from the file" else ""
    dtype = f", {about['dtype']} on {about['device']}" if "dtype" in about else ""
    return about["name"] + count + size + statistics + dtype
