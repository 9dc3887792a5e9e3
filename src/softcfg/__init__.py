"""SoftCFG: uncertainty-weighted classifier-free guidance for autoregressive image models.

The public names below are imported when they are first used, so that `import softcfg` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcfg.lazy import lazy_names
from softcfg.version import __version__

if TYPE_CHECKING:
    from softcfg.calls import PipelineOutput
    from softcfg.decoding import Sampling
    from softcfg.errors import CheckpointError, UserError
    from softcfg.guidance import CFG, SoftCFG
    from softcfg.inspection import Trace, trace
    from softcfg.pipeline import Pipeline
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.job import RunRequest, draw_run
    from softcfg.zoo.loading import load_generator, load_tokenizer

_HOMES = {
    "softcfg.calls": ("PipelineOutput",),
    "softcfg.decoding": ("Sampling",),
    "softcfg.errors": ("CheckpointError", "UserError"),
    "softcfg.guidance": ("CFG", "SoftCFG"),
    "softcfg.inspection": ("Trace", "trace"),
    "softcfg.pipeline": ("Pipeline",),
    "softcfg.runs.folder": ("RunFolder",),
    "softcfg.runs.job": ("RunRequest", "draw_run"),
    "softcfg.zoo.loading": ("load_generator", "load_tokenizer"),
}

__all__ = [
    "CFG",
    "CheckpointError",
    "Pipeline",
    "PipelineOutput",
    "RunFolder",
    "RunRequest",
    "Sampling",
    "SoftCFG",
    "Trace",
    "UserError",
    "__version__",
    "draw_run",
    "load_generator",
    "load_tokenizer",
    "trace",
]


__getattr__ = lazy_names(globals(), _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
