"""Train tokenizer, generator and judge of `emoji` one after the other and complete the model folder.

Killed and started again with the same options, it continues where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from recipes.commands import positive, run_command
from recipes.emoji import data, train_generator, train_judge, train_tokenizer
from recipes.training import Budget, described
from softcfg.errors import UserError
from softcfg.files import write_atomically
from softcfg.zoo.registry import BUNDLED

NOTICE = BUNDLED / "emoji" / "NOTICE.txt"
LICENCE = "that of the pictures: Apache License 2.0, MIT and CC BY 4.0 (NOTICE.txt)"
# The last two were never seen: a name in a style, a colour on a name.
EXAMPLES = (
    "rocket, flat style", "octopus, flat style", "red apple, flat style", "blue apple, cartoon style",
    "flag of japan, cartoon style", "cat face, shaded style", "penguin, cartoon style", "pink rocket, glossy style",
)  # fmt: skip
SHARES = {"tokenizer": 0.15, "generator": 0.7, "judge": 0.15}
SAMPLING = {"temperature": 0.7, "guidance_scale": 2.0, "schedule": "constant"}


def write_model_card(folder: Path) -> None:
    """Write model.yaml, which makes the folder of the weights a model folder, and the notice of the pictures."""
    card = {
        "name": "emoji",
        "description": "emoji by nine artists from name, colour and style, 96 x 96 pixels, 144 codes; for a CPU",
        "licence": LICENCE,
        "generator": described(folder / "generator.safetensors", "lumina-mgpt-2", train_generator.CONFIG),
        "tokenizer": described(folder / "tokenizer.safetensors", "movq", train_tokenizer.CONFIG),
        "text": {"tokenizer": "tokenizer.json", "template": "{prompt}"},
        "sampling": SAMPLING,
        "examples": dict.fromkeys(EXAMPLES, 0),
    }
    write_atomically(folder / "model.yaml", yaml.safe_dump(card, sort_keys=False).encode())
    write_atomically(folder / NOTICE.name, NOTICE.read_bytes())


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="the cache of the pictures [$SOFTCFG_PICTURES]")
    parser.add_argument("--names", type=int, help="learn this many names only, for a quick try")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="the model folder, with logs, checkpoints")
    parser.add_argument(
        "--minutes", type=positive(float), default=80, help="training time in all; the schedules follow the clock"
    )
    parser.add_argument(
        "--steps", type=positive(int), help="train each part for this many steps instead (reproducible)"
    )
    parser.add_argument("--only", choices=SHARES, help="train this part alone, with all of the minutes")
    parser.add_argument(
        "--compile", action="store_true", help="compile the generator; on a CPU this needs a C++ compiler"
    )
    parser.add_argument("--batch-size", type=int, help="examples per step, of the part that --only names")
    parser.add_argument("--seed", type=int, default=0)
    run_command(parser, train)


def train(given: argparse.Namespace) -> None:
    """Train what is asked for and write model.yaml."""
    if given.batch_size is not None and not (given.only and given.batch_size > 0):
        raise UserError("--batch-size takes a number above 0, and --only the part that it is meant for")
    collection = data.load(given.pictures, names=given.names)
    for part, share in ({given.only: 1.0} if given.only else SHARES).items():
        budget = Budget(given.minutes * share, given.steps, given.seed)
        if part == "generator":
            train_generator.train(given.out, budget, collection, batch_size=given.batch_size, compiled=given.compile)
        elif part == "tokenizer":
            train_tokenizer.train(given.out, budget, collection, batch_size=given.batch_size)
        else:
            others = data.load_others(collection, given.pictures)
            train_judge.train(given.out, budget, collection, others=others, batch_size=given.batch_size)
    if all((given.out / f"{part}.safetensors").exists() for part in ("tokenizer", "generator")):
        write_model_card(given.out)


if __name__ == "__main__":
    main()
