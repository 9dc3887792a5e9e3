"""Make the study of guidance: draw and measure every point that is not there yet, then write the document.

Stop it whenever you like: the same command goes on at the point where it was. Several of these commands, on one
machine or on several with one file system, share the points among them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

from recipes.commands import run_command, told
from recipes.fashion_mnist.data import DEFAULT_FOLDER
from recipes.study.measure import Laboratory
from recipes.study.points import ELSEWHERE, HALF_TRAINED, Comparison, Design, key, traced
from recipes.study.results import Results, rows_of
from softcfg.errors import UserError
from softcfg.files import hash_file
from softcfg.nn.limits import cores
from softcfg.zoo import resolve

PROGRAM = "python -m recipes.study"
MODEL = "fashion-small"
DOCUMENT = Path("docs/study.md")
RESULTS = Path("docs/study/results.jsonl")


def main() -> None:
    """Read the options and work."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    size = Design()
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=MODEL, help="a bundled model, or a model folder")
    parser.add_argument("--samples", type=int, default=size.samples, help="images per point")
    parser.add_argument("--seeds", type=int, default=size.seeds, help="seeds per point")
    parser.add_argument(
        "--tuning-samples", type=int, default=size.tuning_samples, help="images per point of the tuning"
    )
    parser.add_argument(
        "--softcfg-alone", action="store_true", help="leave out the other guidance methods, and the other models"
    )
    parser.add_argument("--only", choices=(MODEL, *ELSEWHERE), help="draw the points of this model alone")
    parser.add_argument("--batch-size", type=int, default=1000 if gpu else 250, help="images at once")
    parser.add_argument(
        "--workers", type=int, default=1 if gpu else min(2, cores()), help="processes, of one thread each"
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the IDX files of Fashion-MNIST")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are collected")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="the document whose tables and plots are made")
    parser.add_argument("--draw-only", action="store_true", help="write no document")
    parser.add_argument("--document-only", action="store_true", help="draw nothing, use what results there are")
    run_command(parser, make)


def make(given: argparse.Namespace) -> None:
    """Draw and measure what is missing, then write the document."""
    if not given.document_only:
        models = list(comparisons(given))
        if given.only and given.only not in models:
            raise UserError(f"with these options nothing is drawn with {given.only}, only with {', '.join(models)}")
        for model in [given.only] if given.only else models:
            if model == HALF_TRAINED and not Path(model).is_dir():
                print(f"left out: {model} is not there; recipes/fashion_mnist/README.md trains it", file=sys.stderr)
            else:
                results_of(model, given)
                work_together(model, given)
    if not given.draw_only:
        from recipes.study import report  # where points are drawn alone, matplotlib need not be there

        rows, design = results_of(given.model, given).rows(), design_of(given)
        elsewhere = {model: rows_of(model, given.results) for model in ELSEWHERE}
        report.write(given.document, rows, design, elsewhere)
        if not given.document_only:
            laboratory = Laboratory(given.model, given.data, given.batch_size)
            report.write_picture(given.document, laboratory.picture(traced(design.best(rows))))


def comparisons(given: argparse.Namespace) -> dict[str, Comparison]:
    """Model -> what is drawn with it."""
    others = {} if given.softcfg_alone or given.model != MODEL else ELSEWHERE
    return {given.model: design_of(given), **others}


def design_of(given: argparse.Namespace) -> Design:
    """The size that the options give the study."""
    size = (given.samples, given.seeds, given.tuning_samples)
    return Design(*size, candidates={}) if given.softcfg_alone else Design(*size)


def results_of(model: str, given: argparse.Namespace) -> Results:
    """The results of a model."""
    entry = resolve(model)
    if entry.folder is None:
        raise UserError(f"the study needs a model of Fashion-MNIST in a folder, and {model} is none")
    return Results(given.results, hash_file(entry.folder / entry.generator.file.local_name)[:16])


def work_together(model: str, given: argparse.Namespace) -> None:
    """Run the workers until all points of a model are there."""
    if given.workers == 1:
        work(model, given)
        return
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(model, given, os.getpid())) for _ in range(given.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError("a worker failed; the points that are done are kept")


def work(model: str, given: argparse.Namespace, parent: int | None = None) -> None:
    """Draw points that nobody else draws until all are there, or until the parent process is gone."""
    torch.set_num_threads(1)
    with told(PROGRAM):
        _work(model, given, parent)


def _work(model: str, given: argparse.Namespace, parent: int | None) -> None:
    laboratory = Laboratory(model, given.data, given.batch_size)
    results, design = results_of(model, given), comparisons(given)[model]
    while parent in (None, os.getppid()):
        rows = results.rows()
        points = [point for point in design.points(rows) if key(point.settings()) not in rows]
        if not points:
            return
        for point in points:
            with results.claim(point.settings()) as free:
                if free:
                    row = laboratory.run(point)
                    results.append(row)
                    print(f"{len(points) - 1} to go: {point} {row['seconds']} s", flush=True)
                    break
        else:
            time.sleep(2)  # others draw what is left; further points may follow from it
