"""Searching for the settings of guidance and sampling that give the best metric; needs Optuna."""

from softcfg.tuning.report import write_results
from softcfg.tuning.space import SAMPLERS, SETTINGS, Range, Space, parse_search
from softcfg.tuning.sweep import Row, Sweep, SweepConfig

__all__ = ["SAMPLERS", "SETTINGS", "Range", "Row", "Space", "Sweep", "SweepConfig", "parse_search", "write_results"]
