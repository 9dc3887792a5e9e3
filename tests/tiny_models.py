"""Models small enough to save and load in a moment, and their weights."""

import torch
from torch import Tensor, nn

from softcfg.configuration import load_config
from softcfg.zoo import GENERATORS, TOKENIZERS, ModelEntry, ModelFile, Part

ALITOK = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "codebook_size": 16,
    "condition_num_classes": 3,
    "image_seq_len": 6,
    "grid_size": 2,
}
# Wide enough for a file of more than 10 MiB, the unit in which the Hub's client writes to the disk.
RAR = {
    "hidden_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "codebook_size": 16,
    "condition_num_classes": 3,
    "image_seq_len": 4,
}
VQ = {
    "channel_mult": [1, 1],
    "hidden_channels": 32,
    "num_res_blocks": 1,
    "resolution": 4,
    "z_channels": 4,
    "codebook_size": 16,
}

VQ_ON_DRIVE = Part(TOKENIZERS["maskgit-vq"], VQ, ModelFile("tiny_vq.pth", drive_id="vq-id"))
ON_DRIVE = ModelEntry(
    "tiny-drive",
    Part(GENERATORS["alitok"], ALITOK, ModelFile("tiny_alitok.bin", drive_id="alitok-id")),
    VQ_ON_DRIVE,
    "a model on Google Drive",
)


def on_hub(repository: str, file: str) -> ModelEntry:
    """A model whose generator is a file of a Hugging Face repository."""
    return ModelEntry(
        "tiny-hub",
        Part(GENERATORS["rar"], RAR, ModelFile(file, repository=repository)),
        Part(TOKENIZERS["maskgit-vq"], VQ, ModelFile("tiny_vq.bin", repository="someone/tiny")),
        "a model on Hugging Face",
    )


def module(part: Part, device: str = "cpu") -> nn.Module:
    """A generator or tokenizer with random weights; on "meta" they take no memory."""
    module_class, config_class = part.family.classes()
    torch.manual_seed(0)
    with torch.device(device):
        return module_class(load_config(config_class, part.config))


def weights(part: Part, device: str = "cpu") -> dict[str, Tensor]:
    """The state dict of `module(part, device)`."""
    return module(part, device).state_dict()
