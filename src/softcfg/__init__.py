"""SoftCFG: uncertainty-weighted classifier-free guidance for autoregressive image models.

The public names below are imported when they are first used, so that `import softcfg` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from softcfg.version import __version__

if TYPE_CHECKING:
    from softcfg.decoding import Sampling
    from softcfg.errors import CheckpointError, UserError
    from softcfg.guidance import CFG, SoftCFG
    from softcfg.inspection import Trace, trace
    from softcfg.pipeline import Pipeline, PipelineOutput
    from softcfg.zoo.loading import load_generator, load_tokenizer

_HOMES = {
    "CFG": "softcfg.guidance",
    "CheckpointError": "softcfg.errors",
    "Pipeline": "softcfg.pipeline",
    "PipelineOutput": "softcfg.pipeline",
    "Sampling": "softcfg.decoding",
    "SoftCFG": "softcfg.guidance",
    "Trace": "softcfg.inspection",
    "UserError": "softcfg.errors",
    "load_generator": "softcfg.zoo.loading",
    "load_tokenizer": "softcfg.zoo.loading",
    "trace": "softcfg.inspection",
}

__all__ = [
    "CFG",
    "CheckpointError",
    "Pipeline",
    "PipelineOutput",
    "Sampling",
    "SoftCFG",
    "Trace",
    "UserError",
    "__version__",
    "load_generator",
    "load_tokenizer",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'softcfg' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
