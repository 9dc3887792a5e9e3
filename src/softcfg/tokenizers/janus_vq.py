"""The image tokenizer of Janus-Pro: the architecture of LlamaGen's VQ-16, with 8-bit values truncated.

Janus-Pro (https://arxiv.org/abs/2501.17811, https://github.com/deepseek-ai/Janus). Its weights
are part of the model's files: `gen_vision_model.*` in the original layout, whose names the parameters have here, and
`model.vqmodel.*` in that of the transformers library. Codes are compared and read at unit length, as the original does;
the library's encoder lacks that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from softcfg.configuration import require_positive
from softcfg.layouts import rename
from softcfg.tokenizers.convolution import check_levels
from softcfg.tokenizers.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig


@dataclass(frozen=True)
class JanusVQConfig:
    """Sizes of a `JanusVQ`; the defaults are those of Janus-Pro 1B and 7B.

    Attributes:
        base_channels, channel_multiplier: level i works on 1 / 2^i of the resolution with their product's channels.
        code_count, code_dim: the codebook.
        grid_size: tokens along a side of the images, unless given otherwise with them.
    """

    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int = 256
    code_count: int = 16384
    code_dim: int = 8
    num_groups: int = 32
    norm_eps: float = 1e-6
    grid_size: int = 24

    def __post_init__(self) -> None:
        require_positive(
            self, "base_channels", "num_res_blocks", "latent_channels", "code_count", "code_dim", "num_groups",
            "norm_eps", "grid_size",
        )  # fmt: skip
        check_levels(self, "channel_multiplier", "base_channels", "num_groups")


class JanusVQ(LlamaGenVQ):
    """Janus-Pro's tokenizer: tokens in raster order."""

    rounds = False

    def __init__(self, config: JanusVQConfig) -> None:
        super().__init__(
            LlamaGenVQConfig(
                ch=config.base_channels,
                ch_mult=config.channel_multiplier,
                num_res_blocks=config.num_res_blocks,
                z_channels=config.latent_channels,
                codebook_size=config.code_count,
                codebook_embed_dim=config.code_dim,
                num_groups=config.num_groups,
                norm_eps=config.norm_eps,
                grid_size=config.grid_size,
            )
        )


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `JanusVQ`, of a whole checkpoint of either layout."""
    return rename(
        tensors,
        prefixes=("gen_vision_model.", "model.vqmodel.", "vqmodel."),
        patterns=[
            (r"^(encoder|decoder)\.(down|up)\.(\d+)\.block\.", r"\1.conv_blocks.\3.res."),
            (r"^(encoder|decoder)\.(down|up)\.", r"\1.conv_blocks."),
            (r"\.mid\.block_1\.", ".mid.0."),
            (r"\.mid\.attn_1\.", ".mid.1."),
            (r"\.mid\.block_2\.", ".mid.2."),
        ],
    )
