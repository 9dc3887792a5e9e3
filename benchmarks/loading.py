"""The memory of a process at its peak while it loads a generator, against the weights alone.

    python -m benchmarks.loading --model janus-pro-1b
    python -m benchmarks.loading --model janus-pro-7b --layers 4
    python -m benchmarks.loading --model emu3-gen-original --layers 4 --stored float32

Random weights are written to disk under the published names, in the published files, and loaded by a fresh process in
the model's own dtype, or in `--dtype`. The peak is VmHWM, which counts the pages of mapped files that were touched; the
baseline is what the process has before it loads. Anonymous memory (RssAnon, what a swap file would have to hold) is
given at the end beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.timing import table
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
LOAD = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch
from softcfg.zoo import MODELS, load_generator
from softcfg.zoo.loading import empty_module

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

name, layers, checkpoint, dtype = sys.argv[1:]
entry = MODELS[name]
if int(layers):
    field = "n_layer" if "n_layer" in entry.generator.config else "num_hidden_layers"
    config = {**entry.generator.config, field: int(layers)}
    entry = replace(entry, generator=replace(entry.generator, config=config))
empty_module(entry.generator)
torch.ones(8, 8) @ torch.ones(8, 8)
before = status("VmHWM")
generator = load_generator(entry, checkpoint=checkpoint, dtype=getattr(torch, dtype))
loaded = status("VmHWM")
total = sum(float(tensor.double().sum()) for tensor in generator.state_dict().values() if tensor.numel() < 1 << 22)
for tensor in generator.state_dict().values():
    tensor.amax()  # every page is touched
held = {field: status(field) - before for field in ("VmHWM", "RssAnon", "RssFile")}
size = sum(tensor.numel() * tensor.element_size() for tensor in generator.state_dict().values()) / 2**20
print(json.dumps({"weights": size, "loading": loaded - before, **held}))
"""


def publish(component: Component, folder: Path, stored: torch.dtype) -> Path:
    """Write random weights of `component` as it is published; in parts if it goes by an index. Returns the file."""
    names = PUBLISHED.get(component.family.name, [])
    target = folder / component.file.name
    split = target.name.endswith(".index.json")
    if component.file.repository.startswith("deepseek-ai/"):
        names = []
    part: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        suffix = ".safetensors" if "safetensors" in target.name else ".bin"
        path = folder / f"part-{len(set(weight_map.values())):05d}{suffix}" if split else target
        (save_file if suffix == ".safetensors" else torch.save)(dict(part), str(path))
        weight_map.update(dict.fromkeys(part, path.name))
        part.clear()

    for name, tensor in empty_module(component).state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        part[name] = torch.full(tensor.shape, 0.01, dtype=stored if tensor.is_floating_point() else tensor.dtype)
        if split and sum(each.numel() * each.element_size() for each in part.values()) > PART:
            flush()
    if part:
        flush()
    if split:
        target.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name, entry in MODELS.items() if entry.text], required=True)
    parser.add_argument("--layers", type=int, default=0, help="cut to so many layers (default: all)")
    parser.add_argument("--dtype", help="to load in (default: the model's own)")
    parser.add_argument("--stored", default="bfloat16", help="dtype on disk (default: bfloat16)")
    parser.add_argument("--folder", help="where to write the weights (default: the system's temporary folder)")
    args = parser.parse_args()

    component = resolve(args.model).generator
    if args.layers:
        field = "n_layer" if "n_layer" in component.config else "num_hidden_layers"
        component = replace(component, config={**component.config, field: args.layers})
    dtype = args.dtype or component.dtype
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoint = publish(component, Path(folder), getattr(torch, args.stored))
        words = [sys.executable, "-c", LOAD, args.model, str(args.layers), str(checkpoint), dtype]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    print(f"{args.model}, {args.layers or 'all'} layers, {args.stored} on disk, {dtype} in memory; MiB\n")
    header = ["weights", "peak of loading", "peak with every weight read", "peak / weights", "anonymous", "of files"]
    row = [found[key] for key in ("weights", "loading", "VmHWM")]
    print(table(header, [[*row, found["VmHWM"] / found["weights"], found["RssAnon"], found["RssFile"]]]))


if __name__ == "__main__":
    main()
