"""Measuring images: feature networks, metrics and reports."""

from softcfg.evaluation.extractors import load_extractor, register_extractor
from softcfg.evaluation.features import Extractor, Features, extract
from softcfg.evaluation.metrics import (
    Statistics,
    class_accuracy,
    frechet_distance,
    inception_score,
    precision_recall,
    statistics,
)
from softcfg.evaluation.protocol import METRICS, evaluate
from softcfg.evaluation.report import Report
from softcfg.evaluation.sources import ImageSource, open_source
from softcfg.evaluation.statistics_file import StatisticsFile, read_statistics, save_statistics

__all__ = [
    "METRICS",
    "Extractor",
    "Features",
    "ImageSource",
    "Report",
    "Statistics",
    "StatisticsFile",
    "class_accuracy",
    "evaluate",
    "extract",
    "frechet_distance",
    "inception_score",
    "load_extractor",
    "open_source",
    "precision_recall",
    "read_statistics",
    "register_extractor",
    "save_statistics",
    "statistics",
]
