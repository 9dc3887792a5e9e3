"""The memory of a process at its peak while it loads a generator, against the weights alone.

    python -m benchmarks.loading --model janus-pro-1b
    python -m benchmarks.loading --model janus-pro-7b --layers 4
    python -m benchmarks.loading --model emu3-gen-original --layers 4 --stored float32
    python -m benchmarks.loading --model llamagen-t2i-xl-256 --encoder --stored float32 --quantize int8

Random weights are written to disk under the published names, in the published files, and loaded by a fresh process in
the model's own dtype, or in `--dtype`. The peak is VmHWM, which counts the pages of mapped files that were touched; the
baseline is what the process has before it loads. With `--encoder` it is the text encoder that is loaded, from the whole
of flan-T5-XL as published, decoder included. Anonymous memory (RssAnon, what a swap file would have to hold) is
given at the end beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.timing import machine, table
from softcfg.zoo import placement
from softcfg.zoo.loading import empty_module
from softcfg.zoo.registry import MODELS, Component, resolve

MIB = 2**20
PART = 2**30  # bytes of a file
# Pattern of the parameter's name -> the published one, of the layouts that differ from ours.
PUBLISHED = {
    "janus-pro": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^gen_embed\.", "model.generation_embeddings."),
        (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
        (r"^gen_aligner\.layers\.2\.", "model.generation_aligner.hidden_layers.0."),
        (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
        (r"^gen_head\.", "model.generation_head."),
    ],
    "emu3": [(r"^model\.", "model.text_model.")],
}
STATUS = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def baseline():
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
    return {"VmHWM": status("VmRSS"), "RssAnon": status("RssAnon"), "RssFile": status("RssFile")}

def held(before, tensors):
    loading = status("VmHWM") - before["VmHWM"]
    tensors = [part for tensor in tensors for part in parts(tensor)]
    for tensor in tensors:
        tensor.amax()  # every page is touched
    found = {field: status(field) - value for field, value in before.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
    print(json.dumps({"weights": size, "loading": loading, **found}))

def parts(tensor):  # of a rounded one: the integers and their scales
    names = getattr(tensor, "tensor_data_names", [])
    return [getattr(tensor, name) for name in names] or [tensor]
"""
LOAD_GENERATOR = """
from softcfg.zoo import MODELS, load_generator
from softcfg.zoo.loading import empty_module

name, layers, checkpoint, dtype = sys.argv[1:]
entry = MODELS[name]
if int(layers):
    field = "n_layer" if "n_layer" in entry.generator.config else "num_hidden_layers"
    config = {**entry.generator.config, field: int(layers)}
    entry = replace(entry, generator=replace(entry.generator, config=config))
empty_module(entry.generator)
torch.ones(8, 8) @ torch.ones(8, 8)
before = baseline()
generator = load_generator(entry, checkpoint=checkpoint, dtype=getattr(torch, dtype))
held(before, generator.state_dict().values())
"""
LOAD_ENCODER = """
import functools
from transformers import T5EncoderModel
from softcfg.models.llamagen_t2i.encoder import CaptionEncoder
from softcfg.zoo import placement
from softcfg.zoo.loading import load_text_encoder

folder, dtype, kind = sys.argv[1:]
device = torch.device("cpu")
if kind:
    from torchao.quantization import quantize_
place = functools.partial(placement.quantize, kind=kind, device=device) if kind else lambda module: module.to(device)
torch.ones(8, 8) @ torch.ones(8, 8)
before = baseline()
load = functools.partial(load_text_encoder, place=place)
encoder = CaptionEncoder(Path(folder, "model.safetensors.index.json"), 120, dtype=getattr(torch, dtype), load=load)
held(before, {id(each): each for each in encoder.model.parameters()}.values())
"""
FLAN_T5_XL = {
    "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


def publish(component: Component, folder: Path, stored: torch.dtype) -> Path:
    """Write random weights of `component` as it is published. Returns the file."""
    names = PUBLISHED.get(component.family.name, [])
    if component.file.repository.startswith("deepseek-ai/"):
        names = []
    shapes = {}
    for name, tensor in empty_module(component).state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        shapes[name] = tensor
    target = folder / component.file.name
    write(shapes, target, stored)
    return target


def publish_encoder(folder: Path, stored: torch.dtype) -> None:
    """Write random weights of flan-T5-XL as it is published, in a folder that a `CaptionEncoder` reads."""
    from tokenizers import Tokenizer, models
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**FLAN_T5_XL)
    config.save_pretrained(folder)
    Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    with torch.device("meta"):
        shapes = T5ForConditionalGeneration(config).state_dict()
    once = {name: tensor for name, tensor in shapes.items() if not name.endswith("embed_tokens.weight")}
    write(once, folder / "model.safetensors.index.json", stored)


def write(shapes: Mapping[str, torch.Tensor], target: Path, stored: torch.dtype) -> None:
    """Write weights of these shapes; in parts if `target` is an index."""
    split = target.name.endswith(".index.json")
    part: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        suffix = ".safetensors" if "safetensors" in target.name else ".bin"
        path = target.with_name(f"part-{len(set(weight_map.values())):05d}{suffix}") if split else target
        if suffix == ".safetensors":
            save_file(dict(part), str(path), metadata={"format": "pt"})
        else:
            torch.save(dict(part), path)
        weight_map.update(dict.fromkeys(part, path.name))
        part.clear()

    for name, tensor in shapes.items():
        part[name] = torch.full(tensor.shape, 0.01, dtype=stored if tensor.is_floating_point() else tensor.dtype)
        if split and sum(each.numel() * each.element_size() for each in part.values()) > PART:
            flush()
    if part:
        flush()
    if split:
        target.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name, entry in MODELS.items() if entry.text], required=True)
    parser.add_argument("--encoder", action="store_true", help="the text encoder of LlamaGen, not the generator")
    parser.add_argument("--layers", type=int, default=0, help="of the generator, cut to so many (default: all)")
    parser.add_argument("--dtype", help="to load in (default: the model's own)")
    parser.add_argument("--quantize", choices=placement.QUANTIZATIONS, help="round the weights of the text encoder")
    parser.add_argument("--stored", default="bfloat16", help="dtype on disk (default: bfloat16)")
    parser.add_argument("--folder", help="where to write the weights (default: the system's temporary folder)")
    args = parser.parse_args()

    component = resolve(args.model).generator
    if args.layers:
        field = "n_layer" if "n_layer" in component.config else "num_hidden_layers"
        component = replace(component, config={**component.config, field: args.layers})
    dtype, stored = args.dtype or component.dtype, getattr(torch, args.stored)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.encoder:
            publish_encoder(Path(folder), stored)
            words = [LOAD_ENCODER, folder, dtype, args.quantize or ""]
        else:
            checkpoint = publish(component, Path(folder), stored)
            words = [LOAD_GENERATOR, args.model, str(args.layers), str(checkpoint), dtype]
        words = [sys.executable, "-c", STATUS + words[0], *words[1:]]
        found = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    what = "text encoder" if args.encoder else f"{args.layers or 'all'} layers"
    print(f"{args.model}, {what}, {args.stored} on disk, {args.quantize or dtype} in memory; {machine('cpu')}; MiB\n")
    header = ["weights", "peak of loading", "peak with every weight read", "peak / weights", "anonymous", "of files"]
    row = [found[key] for key in ("weights", "loading", "VmHWM")]
    print(table(header, [[*row, found["VmHWM"] / found["weights"], found["RssAnon"], found["RssFile"]]]))


if __name__ == "__main__":
    main()
