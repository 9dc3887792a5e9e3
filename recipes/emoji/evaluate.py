"""Measure a trained model folder: the tokenizer's reconstructions, then pictures drawn from their names.

A picture is right if, of all emoji, the one that it was asked for lies nearest to it in its pixels; "among 5" if that
one is among the five nearest. Recoloured pictures that were kept from training are looked for among all pictures, the
recoloured ones included.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.commands import run_command
from recipes.emoji import data
from recipes.emoji.data import Picture
from recipes.emoji.train_tokenizer import pixels_of
from recipes.training import randomness, save_weights
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.files import write_atomically
from softcfg.images import grid

GOLDEN = 300  # pictures


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="the model folder, or the name of a bundled model")
    parser.add_argument("--images", type=int, default=200, help="prompts for each row of the table")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--top-k", type=int, nargs="+", default=[0])
    parser.add_argument("--held-out", action="store_true", help="prompts for pictures that were kept from training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--golden", type=Path, help="folder for names and small pictures that tests compare with")
    parser.add_argument("--grids", type=Path, help="folder for a picture of 100 images of each row")
    run_command(parser, measure)


def measure(given: argparse.Namespace) -> None:
    """Print the table."""
    pictures = data.load()
    if given.golden:
        write_golden(given.golden, pictures)
    pipeline = Pipeline.from_pretrained(given.model)
    candidates = pictures if given.held_out else [picture for picture in pictures if not picture.recoloured]
    pixels = pixels_of(candidates)
    decoded = torch.cat([pipeline.tokenizer.decode(pipeline.tokenizer.encode(part)) for part in pixels.split(50)])
    error = -10 * (decoded - pixels).square().mean().log10().item()
    print(f"{len(candidates)} pictures, reconstructed with a PSNR of {error:.2f} dB")
    wanted = chosen(candidates, given.images, held_out=given.held_out)
    prompts = [candidates[i].name for i in wanted]
    print("guidance      temperature  top-k   right  among 5  seconds")
    for temperature in given.temperatures:
        for top_k in given.top_k:
            for name, guidance in guidances(given.scales):
                start = time.monotonic()
                out = pipeline(
                    prompts=prompts,
                    guidance=guidance,
                    seed=given.seed,
                    batch_size=given.batch_size,
                    temperature=temperature,
                    top_k=top_k,
                )
                drawn = torch.from_numpy(out.pixels).permute(0, 3, 1, 2).float() / 255
                ranks = rank(drawn, pixels, wanted)
                first, five = (float((ranks < n).float().mean()) for n in (1, 5))
                seconds = time.monotonic() - start
                print(f"{name:14} {temperature:10g} {top_k:6} {first:7.3f} {five:8.3f} {seconds:8.1f}", flush=True)
                if given.grids:
                    given.grids.mkdir(parents=True, exist_ok=True)
                    rows = [out.images[i : i + 10] for i in range(0, min(100, len(wanted)), 10)]
                    grid(rows).save(given.grids / f"{name}-{temperature:g}-{top_k}.png".replace(" ", "-"))


def write_golden(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write the names of emoji, in random order, and their pictures uint8 [300, 16, 16, 3]."""
    drawn = [picture for picture in pictures if not picture.recoloured]
    some = [drawn[i] for i in torch.randperm(len(drawn), generator=randomness(0, 0))[:GOLDEN]]
    small = F.avg_pool2d(pixels_of(some), 2).mul(255).round().byte().permute(0, 2, 3, 1)
    save_weights(folder / "pictures.safetensors", {"pictures": small})
    facts = {
        "source": "Noto Color Emoji 2.042, SIL Open Font License 1.1; names of Unicode 15.0",
        "names": [picture.name for picture in some],
    }
    write_atomically(folder / "names.json", json.dumps(facts).encode())


def chosen(pictures: Sequence[Picture], count: int, *, held_out: bool) -> list[int]:
    """`count` pictures spread evenly, held out from training or not."""
    suitable = [i for i, picture in enumerate(pictures) if picture.held_out == held_out]
    return [suitable[i * len(suitable) // count] for i in range(min(count, len(suitable)))]


def rank(drawn: Tensor, pixels: Tensor, wanted: Sequence[int]) -> Tensor:
    """How many of `pixels` lie nearer to each of `drawn` than the wanted one; same pictures share a rank."""
    distance = torch.cdist(drawn.flatten(1), pixels.flatten(1))
    own = distance[torch.arange(len(wanted)), torch.tensor(wanted)]
    return (distance < own[:, None] - 1e-4).sum(1)


def guidances(scales: Sequence[float]) -> Iterator[tuple[str, CFG]]:
    """Return names and guidance settings: none, and CFG and SoftCFG at every scale."""
    for scale in scales:
        if scale == 1:
            yield "none", CFG(guidance_scale=1.0)
            continue
        for method in (CFG, SoftCFG):
            yield f"{method.__name__} {scale:g}", method(guidance_scale=scale, schedule="constant")


if __name__ == "__main__":
    main()
