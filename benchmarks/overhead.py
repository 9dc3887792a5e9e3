"""What SoftCFG, and other rules and perturbations, add to a decoding step of CFG, in per cent.

    python -m benchmarks.overhead alitok-b --batch-size 4 16 64
    python -m benchmarks.overhead alitok-b --batch-size 16 --methods all
    python -m benchmarks.overhead alitok-xl --layers 4 --batch-size 4 128
    python -m benchmarks.overhead lumina-mgpt-2 --layers 2 --batch-size 2

All sides take turns on one cache, at several positions of the sequence; CFG is there twice, and what the second
adds is the error of the table. SoftCFG computes the weights once a step and multiplies with them in every layer, so a
model that was cut to a few layers shows more overhead than the whole one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from benchmarks.timing import machine, means_over_sequence, table
from softcfg.configuration import load_config
from softcfg.decoding.throughput import TimedStep, filled_cache
from softcfg.guidance import CFG, PERTURBATIONS, RULES, titled
from softcfg.models.base import Generator
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import prepared_linear_layers
from softcfg.zoo.registry import GENERATORS, MODELS


def build(args: argparse.Namespace) -> Generator:
    """The generator with random weights, cut as asked for."""
    if args.model in MODELS:
        part = MODELS[args.model].generator
        family, content = part.family, dict(part.config)
    else:
        family, content = GENERATORS[args.model], {}
    model, config_type = family.classes()
    config: Any = load_config(config_type, content, family.sections)
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers)
    if family.name == "lumina-mgpt-2":  # its text tokens are of no account here
        config = replace(
            config, vocab_size=20000, prompt_start_id=0, separator_id=1, image_start_id=2, image_end_id=3,
            new_line_id=4, size_id=10, first_code_id=1000,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(config).requires_grad_(False).eval()  # type: ignore[return-value]


def method_names(text: str) -> list[str]:
    """The rules and perturbations of a list; "all" of them."""
    if text == "all":
        return [*(rule for rule in RULES if rule != "cfg"), *(each for each in PERTURBATIONS if each != "none")]
    return text.split(",")


def method_named(name: str) -> tuple[str, CFG]:
    """The title and the guidance of a rule or a perturbation."""
    rule, perturbation = (name, "none") if name in RULES else ("cfg", name)
    guidance = CFG(4.0, rule=rule, perturbation=perturbation)  # type: ignore[arg-type]
    return titled(PERTURBATIONS[perturbation], RULES[rule]), guidance


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of the zoo, or a family with its default configuration")
    parser.add_argument("--layers", type=int, help="as many layers as these")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--methods", default="softcfg", help="rules and perturbations, or all (default: softcfg)", metavar="LIST"
    )
    args = parser.parse_args()

    generator = build(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = generator.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    methods = {"CFG": CFG(4.0), **dict(map(method_named, method_names(args.methods))), "CFG again": CFG(4.0)}
    rows = []
    for batch in args.batch_size:
        inputs = generator.example_inputs(batch)
        condition = generator.condition(inputs, guided=True)
        cache = filled_cache(generator, condition)

        def sides_at(position: int, inputs: list[Any] = inputs, cache: KVCache = cache) -> dict[str, Any]:
            return {name: TimedStep(generator, inputs, guidance, position, cache) for name, guidance in methods.items()}

        with prepared_linear_layers(generator, condition.rows):
            seconds = means_over_sequence(sides_at, condition.num_tokens, args.repeats, warmup=2)
        cfg = seconds["CFG"]
        for name in list(methods)[1:]:
            overhead = f"{100 * (seconds[name] / cfg - 1):+.1f} %"
            rows.append([batch, condition.num_tokens, name, 1e3 * cfg, 1e3 * seconds[name], overhead])
    cut = f" cut to {args.layers} layers" if args.layers else ""
    print(f"{args.model}{cut}, {generator.dtype}, {machine()}\n")
    print(table(["batch", "tokens", "method", "CFG, ms per step", "method, ms per step", "overhead"], rows))


if __name__ == "__main__":
    main()
