"""Measure a trained model folder with the judge: does each picture show what its prompt says?

Prompts are of pictures seen in training, of pairs of name and style that were held out, and of colours that were.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from recipes.commands import run_command
from recipes.emoji import data
from recipes.emoji.data import Collection, Picture
from recipes.emoji.train_judge import wanted
from recipes.emoji.train_tokenizer import pixels_of
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.errors import UserError
from softcfg.evaluation.emoji_judge import Vocabulary, load_judge, look, shares_right
from softcfg.images import grid
from softcfg.zoo import resolve

SHOWN = (
    "rocket, flat style", "rocket, ink style", "octopus, cartoon style", "octopus, glossy style",
    "red apple, flat style", "blue apple, flat style", "blue apple, cartoon style", "flag of japan, flat style",
    "cat face, shaded style", "cat face, ink style", "purple octopus, glossy style", "green car, vivid style",
    "hamburger, classic style", "guitar, blob style", "pink bicycle, matte style", "fire, glossy style",
    "penguin, cartoon style", "yellow rose, flat style",
)  # fmt: skip
KINDS = {"seen": "", "style": "style", "colour": "colour"}


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="the model folder, or a bundled model")
    parser.add_argument("--pictures", type=Path, help="the cache of the pictures [$SOFTCFG_PICTURES]")
    parser.add_argument("--names", type=int, help="as in training")
    parser.add_argument("--images", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--methods", choices=("cfg", "softcfg"), nargs="+", default=["cfg", "softcfg"])
    parser.add_argument("--temperature", type=float, help="[the model's]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=Path, help="folder for a grid of each row, and one of well-known prompts")
    run_command(parser, measure)


def folder_of(model: str) -> Path:
    """The folder of a model by its path or name."""
    folder = resolve(model).folder
    if folder is None or not (folder / "judge.safetensors").is_file():
        raise UserError(f"{model} is no model folder with a judge (judge.safetensors)")
    return folder


def chosen(collection: Collection, kind: str, count: int) -> list[int]:
    """Return `count` pictures of a kind, evenly spread; only those held out for their colour are recoloured."""
    recoloured = kind == "colour"
    suitable = collection.where(held_out=KINDS[kind], recoloured=recoloured)
    count = min(count, len(suitable))
    return [suitable[i * len(suitable) // count] for i in range(count)]


def measure(given: argparse.Namespace) -> None:
    """Print the table."""
    collection = data.load(given.pictures, names=given.names)
    judge, words, _ = load_judge(folder_of(given.model) / "judge.safetensors")
    pipeline = Pipeline.from_pretrained(given.model)
    for kind in given.kinds:
        numbers = chosen(collection, kind, given.images)
        pictures = [collection.pictures[i] for i in numbers]
        real = pixels_of(collection, numbers)
        decoded = torch.cat([pipeline.tokenizer.decode(pipeline.tokenizer.encode(part)) for part in real.split(50)])
        for name, pixels in (("the pictures", real), ("through tokens", decoded)):
            report(kind, name, right(look(judge, pixels)[1], words, pictures))
        prompts = [picture.caption for picture in pictures]
        for name, guidance in guidances(given.scales, given.methods):
            out = pipeline(
                prompts=prompts,
                guidance=guidance,
                seed=given.seed,
                batch_size=given.batch_size,
                temperature=given.temperature,
            )
            seen = look(judge, torch.from_numpy(out.pixels).permute(0, 3, 1, 2))[1]
            report(kind, name, right(seen, words, pictures))
            if given.grids:
                save_grid(given.grids / f"{kind}-{name}.png", out.images[:100], 10)
    if given.grids:
        for name, guidance in guidances(given.scales, given.methods):
            out = pipeline(prompts=list(SHOWN), guidance=guidance, seed=given.seed, temperature=given.temperature)
            save_grid(given.grids / f"shown-{name}.png", out.images, 6)


def right(seen: Tensor, words: Vocabulary, pictures: Sequence[Picture]) -> dict[str, float]:
    """Return the shares of images that show what the captions of pictures say: "name", "style", and "all" that is said.

    "colour" is that of the picture, whether the caption says it or not.

    Args:
        seen: what the judge answers, see `look`.
    """
    seen = seen.cpu()
    shares = shares_right(seen, torch.tensor([wanted(picture) for picture in pictures]))
    return {**shares, "all": shares_right(seen, words.read([picture.caption for picture in pictures]))["all"]}


def report(kind: str, name: str, shares: Mapping[str, float]) -> None:
    """Print a row of the table."""
    text = "  ".join(f"{key} {value:.3f}" for key, value in shares.items())
    print(f"{kind:8} {name:16} {text}", flush=True)


def save_grid(path: Path, images: Sequence, columns: int) -> None:
    """Write images in rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid([images[i : i + columns] for i in range(0, len(images), columns)]).save(str(path).replace(" ", "-"))


def guidances(scales: Sequence[float], methods: Sequence[str]) -> list[tuple[str, CFG]]:
    """Return names and guidance settings: none, and the methods at every scale."""
    found: list[tuple[str, CFG]] = []
    for scale in scales:
        if scale == 1:
            found.append(("none", CFG(guidance_scale=1.0)))
            continue
        known = {"cfg": CFG, "softcfg": SoftCFG}
        found += [(f"{name} {scale:g}", known[name](guidance_scale=scale, schedule="constant")) for name in methods]
    return found


if __name__ == "__main__":
    main()
