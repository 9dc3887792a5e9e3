"""Sampling runs: many images by many processes, into a folder that loses nothing and can be continued.

A run is cut into shards, one per batch: shard k holds the images k B .. (k + 1) B - 1 of batch size B, whichever
process draws it. The folder holds `run.json` (settings and environment), `shards/`, and what is made from them.
`draw_run` draws one from Python; the names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcfg.lazy import lazy_names

if TYPE_CHECKING:
    from softcfg.runs.export import export_npz, export_pngs, write_pngs
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.job import DrawnRun, RunRequest, decode_run, draw_run
    from softcfg.runs.pictures import write_comparison, write_grid
    from softcfg.runs.plan import Prompts
    from softcfg.runs.processes import Processes
    from softcfg.runs.progress import Progress, ProgressBar
    from softcfg.runs.shards import Shard

_HOMES = {
    "DrawnRun": "softcfg.runs.job",
    "Processes": "softcfg.runs.processes",
    "Progress": "softcfg.runs.progress",
    "ProgressBar": "softcfg.runs.progress",
    "Prompts": "softcfg.runs.plan",
    "RunFolder": "softcfg.runs.folder",
    "RunRequest": "softcfg.runs.job",
    "Shard": "softcfg.runs.shards",
    "decode_run": "softcfg.runs.job",
    "draw_run": "softcfg.runs.job",
    "export_npz": "softcfg.runs.export",
    "export_pngs": "softcfg.runs.export",
    "write_comparison": "softcfg.runs.pictures",
    "write_grid": "softcfg.runs.pictures",
    "write_pngs": "softcfg.runs.export",
}

__all__ = [
    "DrawnRun",
    "Processes",
    "Progress",
    "ProgressBar",
    "Prompts",
    "RunFolder",
    "RunRequest",
    "Shard",
    "decode_run",
    "draw_run",
    "export_npz",
    "export_pngs",
    "write_comparison",
    "write_grid",
    "write_pngs",
]

__getattr__ = lazy_names(globals(), _HOMES)
