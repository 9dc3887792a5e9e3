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
    "softcfg.runs.export": ("export_npz", "export_pngs", "write_pngs"),
    "softcfg.runs.folder": ("RunFolder",),
    "softcfg.runs.job": ("DrawnRun", "RunRequest", "decode_run", "draw_run"),
    "softcfg.runs.pictures": ("write_comparison", "write_grid"),
    "softcfg.runs.plan": ("Prompts",),
    "softcfg.runs.processes": ("Processes",),
    "softcfg.runs.progress": ("Progress", "ProgressBar"),
    "softcfg.runs.shards": ("Shard",),
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
