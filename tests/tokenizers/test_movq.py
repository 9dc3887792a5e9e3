"""MoVQGAN computes what the released code computes, at any size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import softcfg
from goldens import Golden, golden
from softcfg import UserError
from softcfg.configuration import load_config
from softcfg.tokenizers import MoVQ, MoVQConfig
from tiny_models import VQ_ON_DRIVE, module

GRID = (8, 12)


@pytest.fixture(scope="module")
def file() -> Golden:
    return golden("lumina/golden-movqgan-decode-8x12")


@pytest.fixture(scope="module")
def tokenizer(file: Golden) -> MoVQ:
    loaded = softcfg.load_tokenizer("movq", config=file.config, checkpoint=file.weights())
    assert isinstance(loaded, MoVQ)
    return loaded


def close(got: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_decode(file: Golden, tokenizer: MoVQ) -> None:
    tokens = file.arrays["tokens"][None]
    raw = tokenizer.decode_raw(tokens, grid=GRID)
    close(2 * raw - 1, file.arrays["image"])
    image = tokenizer.decode(tokens, grid=GRID)
    assert torch.equal(image, raw.clamp(0, 1))
    steps = tokenizer.to_uint8(image)[0].int() - file.arrays["image_uint8"].int()
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() <= 29  # values of this picture that lie within 1e-3 of a rounding boundary
    as_released = torch.round((file.arrays["image"] + 1) * 127.5).clamp(0, 255)[0].permute(1, 2, 0)
    assert torch.equal(as_released.to(torch.uint8), file.arrays["image_uint8"])


def test_encode(file: Golden, tokenizer: MoVQ) -> None:
    pixels = file.arrays["encode_image_uint8"].permute(2, 0, 1)[None].double() / 255
    close(2 * pixels.float() - 1, file.arrays["encode_input"], 2e-7)
    close(tokenizer.encode_latents(pixels.float()), file.arrays["encode_latent"])
    tokens = tokenizer.encode(pixels.float())
    assert torch.equal(tokens[0], file.arrays["encode_tokens"].long())
    close(2 * tokenizer.decode_raw(tokens, grid=GRID) - 1, file.arrays["reconstruction"])


def test_images_of_a_batch_do_not_mix(file: Golden, tokenizer: MoVQ, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.stack((file.arrays["tokens"], file.arrays["tokens"].flip(0)))
    together = tokenizer.decode_raw(tokens, grid=GRID)
    monkeypatch.setattr("softcfg.tokenizers.movq.PIXELS_AT_ONCE", 64 * 96)
    close(tokenizer.decode_raw(tokens, grid=GRID), together, 1e-5)
    close(2 * together[:1] - 1, file.arrays["image"])
    assert (together[0] - together[1]).abs().max() > 0.1


def test_float64_agrees(file: Golden, tokenizer: MoVQ) -> None:
    raw = copy.deepcopy(tokenizer).double().decode_raw(file.arrays["tokens"][None], grid=GRID)
    close(2 * raw - 1, file.arrays["image"].double())


def test_decoding_reads_decoder_and_codebook_only(file: Golden) -> None:
    weights = file.weights()
    for name, tensor in weights.items():
        if not name.startswith(("decoder.", "quantize.embedding.", "post_quant_conv.")):
            tensor.fill_(torch.nan)
    tokenizer = softcfg.load_tokenizer("movq", config=file.config, checkpoint=weights)
    close(2 * tokenizer.decode_raw(file.arrays["tokens"][None], grid=GRID) - 1, file.arrays["image"])


def test_sizes(tokenizer: MoVQ) -> None:
    assert (tokenizer.num_tokens, tokenizer.image_size, tokenizer.patch_size) == (32 * 32, 256, 8)
    with pytest.raises(UserError, match=r"tokens must have shape \[B, 1024\]"):
        tokenizer.decode(torch.zeros(1, 96, dtype=torch.int64))
    with pytest.raises(UserError, match=r"tokens must have shape \[B, 95\]"):
        tokenizer.decode(torch.zeros(1, 96, dtype=torch.int64), grid=(5, 19))
    with pytest.raises(UserError, match="grid must be two numbers"):
        tokenizer.decode(torch.zeros(1, 0, dtype=torch.int64), grid=(0, 4))
    with pytest.raises(UserError, match="H and W multiples of 8"):
        tokenizer.encode(torch.zeros(1, 3, 64, 60))


def test_a_tokenizer_of_one_size_refuses_another_grid() -> None:
    tokenizer = module(VQ_ON_DRIVE)
    tokens = torch.arange(4)[None]
    assert torch.equal(tokenizer.decode(tokens, grid=(2, 2)), tokenizer.decode(tokens))
    with pytest.raises(UserError, match=r"grid is \[2, 2\], got \[1, 4\]"):
        tokenizer.decode(tokens, grid=(1, 4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"ch": 48}, "multiple of 32"), ({"resolution": 60}, "multiple of 8"), ({"double_z": True}, "double_z false")],
)
def test_configurations_that_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(MoVQConfig, changed)
