"""Train the tokenizer and the generator of `emoji` one after the other and complete the model folder.

Killed and started again with the same options, it continues where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import yaml

from recipes.commands import run_command
from recipes.emoji import data, train_generator, train_tokenizer
from recipes.training import Budget, parameters
from softcfg.files import write_atomically

SHARES = {"tokenizer": 0.19, "generator": 0.81}
SAMPLING = {"temperature": 0.4, "guidance_scale": 1.5, "schedule": "constant"}


def write_model_card(folder: Path) -> None:
    """Write model.yaml, which makes the folder of the weights a model folder."""
    codec = train_tokenizer.CONFIG
    card = {
        "name": "emoji",
        "description": "Noto Color Emoji from their names, 32 x 32 pixels, 64 codes; small enough for a CPU",
        "generator": {
            "family": "lumina-mgpt-2",
            "config": asdict(train_generator.CONFIG),
            "checkpoint": "generator.safetensors",
            "parameters": parameters(folder / "generator.safetensors"),
        },
        "tokenizer": {
            "family": "movq",
            "config": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(codec).items()},
            "checkpoint": "tokenizer.safetensors",
            "parameters": parameters(folder / "tokenizer.safetensors"),
        },
        "text": {"tokenizer": "tokenizer.json", "template": "{prompt}"},
        "sampling": SAMPLING,
    }
    write_atomically(folder / "model.yaml", yaml.safe_dump(card, sort_keys=False).encode())


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--font", type=Path, default=data.FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--names", type=Path, default=data.NAMES, help="emoji-test.txt of Unicode")
    parser.add_argument("--keywords", type=Path, default=data.KEYWORDS, help="annotations/en.xml of CLDR")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="the model folder, with logs, checkpoints")
    parser.add_argument(
        "--minutes", type=float, default=80, help="training time in all; the schedules follow the clock"
    )
    parser.add_argument("--steps", type=int, help="train each part for this many steps instead (reproducible)")
    parser.add_argument("--only", choices=SHARES, help="train this part alone, with all of the minutes")
    parser.add_argument(
        "--compile", action="store_true", help="compile the generator; on a CPU this needs a C++ compiler"
    )
    parser.add_argument("--seed", type=int, default=0)
    run_command(parser, train)


def train(given: argparse.Namespace) -> None:
    """Train what is asked for and write model.yaml."""
    pictures = data.load(given.font, given.names, given.keywords)
    for part, share in ({given.only: 1.0} if given.only else SHARES).items():
        budget = Budget(given.minutes * share, given.steps, given.seed)
        if part == "tokenizer":
            train_tokenizer.train(given.out, budget, pictures)
        else:
            train_generator.train(given.out, budget, pictures, compiled=given.compile)
    if all((given.out / f"{part}.safetensors").exists() for part in SHARES):
        write_model_card(given.out)


if __name__ == "__main__":
    main()
