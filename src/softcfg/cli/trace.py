"""`softcfg trace`: keep what guidance did at every step."""

from __future__ import annotations

import argparse
from pathlib import Path

from softcfg.cli import arguments
from softcfg.errors import UserError
from softcfg.files import make_folder, refuse_overwriting

HELP = "save what guidance did at every step"
USAGE = "softcfg trace MODEL (--labels LABELS | --prompt TEXT) [options]"
DESCRIPTION = """\
Draw images (or replay given tokens) and save what guidance did at every step, as safetensors:
labels [B] (where they are classes), tokens [B, T], cond_logits, uncond_logits, guided_logits [B, T, V],
guidance_scale [T], confidence [B, T] and value_weights [B, T, T] (step, slot). The settings, and the
prompts if there are, are in the file's metadata."""

EXAMPLES = """\
examples:
  softcfg trace fashion --labels Sneaker --output sneaker.safetensors
  softcfg trace emoji --prompt "red apple, flat style"
  softcfg trace fashion --labels Sneaker --tokens sneaker.safetensors --softcfg-strength 0.5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("what to trace")
    group.add_argument("--labels", help="class ids, ranges or names, one image each: 0,3,7 or 0-9")
    arguments.add_prompt_arguments(group)
    group.add_argument("--tokens", metavar="FILE", help="replay the entry 'tokens' [B, T] of this safetensors file")
    group.add_argument("--output", default="trace.safetensors", metavar="FILE", help="default: trace.safetensors")
    group.add_argument(
        "--value-weights",
        action=argparse.BooleanOptionalAction,
        help="save the [B, T, T] weights (default: up to 1,024 tokens)",
    )
    arguments.add_guidance_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.inspection import trace
    from softcfg.nn.precision import dtype_name
    from softcfg.zoo.reading import read_state_dict

    pipeline = arguments.load_pipeline(args)
    refuse_overwriting({"--output": args.output}, arguments.files_read(args, pipeline))
    sampling = arguments.sampling_from(args, pipeline)
    guidance = arguments.guidance_from(args, pipeline)
    inputs, names = arguments.parse_inputs(args, pipeline)
    tokens = None
    if args.tokens is not None:
        tokens = read_state_dict(args.tokens).get("tokens")
        if tokens is None:
            raise UserError(f"{args.tokens} has no entry 'tokens'")
    output = Path(args.output)
    make_folder(output.parent)
    result = trace(
        pipeline.generator,
        labels=inputs,
        tokens=tokens,
        guidance=guidance,
        sampling=sampling,
        seed=args.seed,
        value_weights=args.value_weights,
        weak=pipeline.weak_generator,
    )
    result.save(output, **({"prompts": names} if pipeline.conditioning.takes_prompts else {}))
    for name, tensor in result.tensors().items():
        print(f"{name:16} {dtype_name(tensor.dtype):8} {list(tensor.shape)}")
    print(f"saved to {output}")
    return 0
