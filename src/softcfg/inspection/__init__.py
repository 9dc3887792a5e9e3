"""Seeing what guidance does."""

from softcfg.inspection.trace import Trace, trace

__all__ = ["Trace", "trace"]
