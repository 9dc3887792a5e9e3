"""Train the parts of a bundled model one after the other and complete the model folder.

Killed and started again with the same options, it continues where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from recipes.commands import positive, run_command
from recipes.fashion_mnist import train_classifier, train_generator, train_tokenizer
from recipes.fashion_mnist.data import CLASSES, DEFAULT_FOLDER, load
from recipes.fashion_mnist.presets import PRESETS
from recipes.training import Budget, described
from softcfg.files import write_atomically


def write_model_card(folder: Path, name: str) -> None:
    """Write model.yaml, which makes the folder of the weights a model folder."""
    preset = PRESETS[name]
    card = {
        "name": name,
        "description": preset.description,
        "generator": described(folder / "generator.safetensors", "alitok", preset.generator),
        "tokenizer": described(folder / "tokenizer.safetensors", "maskgit-vq", preset.tokenizer),
        "sampling": dict(preset.sampling),
        "classes": list(CLASSES),
    }
    write_atomically(folder / "model.yaml", yaml.safe_dump(card, sort_keys=False).encode())


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help="folder of the four IDX files, gzipped or plain"
    )
    parser.add_argument("--preset", choices=PRESETS, default="fashion", help="the model to make")
    parser.add_argument("--out", type=Path, help="the model folder, with logs and checkpoints; by default runs/PRESET")
    parser.add_argument(
        "--minutes",
        type=positive(float),
        help="training time in all; the schedules follow the clock; by default the preset's",
    )
    parser.add_argument(
        "--steps", type=positive(int), help="train each part for this many steps instead (reproducible)"
    )
    parser.add_argument(
        "--only",
        choices=("classifier", "tokenizer", "generator"),
        help="train this part alone, with all of the minutes",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the generator; on a CPU this needs a C++ compiler"
    )
    parser.add_argument("--seed", type=int, default=0)
    run_command(parser, train)


def train(given: argparse.Namespace) -> None:
    """Train what is asked for and write model.yaml."""
    data, test = load(given.data, "train"), load(given.data, "test")
    preset = PRESETS[given.preset]
    out, minutes = given.out or Path("runs") / given.preset, given.minutes or preset.minutes
    for part, share in ({given.only: 1.0} if given.only else preset.shares).items():
        budget = Budget(minutes * share, given.steps, given.seed)
        if part == "classifier":
            train_classifier.train(out, budget, data, test)
        elif part == "tokenizer":
            train_tokenizer.train(out, budget, data, test, config=preset.tokenizer)
        else:
            train_generator.train(out, budget, data, test, preset, compiled=given.compile)
    if all((out / f"{part}.safetensors").exists() for part in preset.shares):
        write_model_card(out, given.preset)


if __name__ == "__main__":
    main()
