"""What holds for every tokenizer, at sizes that take a moment."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg import UserError
from softcfg.configuration import load_config
from softcfg.tokenizers import (
    AliTokTokenizer,
    AliTokTokenizerConfig,
    Emu3VQ,
    Emu3VQConfig,
    JanusVQ,
    JanusVQConfig,
    LlamaGenVQ,
    LlamaGenVQConfig,
    MaskGITVQ,
    MaskGITVQConfig,
    RobusTokTokenizer,
    RobusTokTokenizerConfig,
    Tokenizer,
    base,
    to_uint8,
)
from softcfg.zoo.source import describe_module

VQ = {
    "channel_mult": [1, 2],
    "hidden_channels": 32,
    "num_res_blocks": 1,
    "resolution": 12,
    "z_channels": 5,
    "codebook_size": 16,
}
# Sizes that are all different, so that none can stand in for another.
ALITOK = {
    "codebook_size": 16,
    "token_size": 5,
    "num_latent_tokens": 14,
    "image_size": 12,
    "patch_size": 4,
    "aux_tokens": 5,
    "num_buffer_tokens": 3,
    "encoder_width": 24,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "decoder_width": 40,
    "decoder_num_layers": 1,
    "decoder_num_heads": 4,
    "mlp_ratio": 2,
}
ROBUSTOK = {
    "codebook_size": 16,
    "codebook_embed_dim": 5,
    "vit_embed_dim": 24,
    "vit_depth": 2,
    "vit_num_heads": 3,
    "mlp_ratio": 2,
    "image_size": 12,
    "patch_size": 4,
}
LLAMAGEN = {
    "ch": 16,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 6,
    "codebook_size": 16,
    "codebook_embed_dim": 5,
    "num_groups": 8,
    "image_size": 12,
}
JANUS = {
    "base_channels": 16,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 6,
    "code_count": 16,
    "code_dim": 5,
    "num_groups": 8,
    "grid_size": 6,
}
EMU3 = {
    "codebook_size": 16,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "image_size": 12,
}


def maskgit_vq(**changes: Any) -> MaskGITVQ:
    torch.manual_seed(0)
    return MaskGITVQ(load_config(MaskGITVQConfig, {**VQ, **changes}))


def alitok(**changes: Any) -> AliTokTokenizer:
    torch.manual_seed(0)
    return AliTokTokenizer(load_config(AliTokTokenizerConfig, {**ALITOK, **changes}))


def robustok(**changes: Any) -> RobusTokTokenizer:
    torch.manual_seed(0)
    tokenizer = RobusTokTokenizer(load_config(RobusTokTokenizerConfig, {**ROBUSTOK, **changes}))
    for name, parameter in tokenizer.named_parameters():
        if "pos_embed" in name or "token" in name:  # as small as they start, every patch gets the same code
            torch.nn.init.normal_(parameter)
    return tokenizer


def llamagen_vq(**changes: Any) -> LlamaGenVQ:
    torch.manual_seed(0)
    return LlamaGenVQ(load_config(LlamaGenVQConfig, {**LLAMAGEN, **changes}))


def janus_vq(**changes: Any) -> JanusVQ:
    torch.manual_seed(0)
    return JanusVQ(load_config(JanusVQConfig, {**JANUS, **changes}))


def emu3_vq(**changes: Any) -> Emu3VQ:
    torch.manual_seed(0)
    tokenizer = Emu3VQ(load_config(Emu3VQConfig, {**EMU3, **changes})).eval()
    for name, parameter in tokenizer.named_parameters():
        if "conv" in name and parameter.dim() > 1:  # as small as they start, every patch gets the same code
            parameter.data.mul_(2.5)
    return tokenizer


BUILDERS = {
    "maskgit-vq": maskgit_vq,
    "alitok": alitok,
    "robustok": robustok,
    "llamagen-vq": llamagen_vq,
    "janus-vq": janus_vq,
    "emu3-vq": emu3_vq,
}


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def some_tokens(tokenizer: Tokenizer, images: int = 3) -> Tensor:
    return torch.randint(tokenizer.codebook_size, (images, tokenizer.num_tokens))


def some_pixels(tokenizer: Tokenizer, images: int = 3) -> Tensor:
    return torch.rand(images, 3, tokenizer.image_size, tokenizer.image_size)


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "size"),
    [
        (maskgit_vq(), 36, 12),
        (maskgit_vq(resolution=32), 256, 32),
        (maskgit_vq(channel_mult=[1], resolution=5), 25, 5),
        (maskgit_vq(channel_mult=[2, 1, 1], resolution=8, num_res_blocks=2), 4, 8),
        (alitok(), 14, 12),
        (alitok(num_latent_tokens=9, aux_tokens=0, num_buffer_tokens=0), 9, 12),
        (alitok(image_size=8, aux_tokens=None), 14, 8),
        (robustok(image_size=20, num_latent_tokens=25), 25, 20),
        (llamagen_vq(), 36, 12),
        (llamagen_vq(ch_mult=[1, 2, 1], image_size=24, num_res_blocks=2), 36, 24),
        (llamagen_vq(grid_size=5), 25, 10),
        (janus_vq(), 36, 12),
        (janus_vq(channel_multiplier=[1, 2, 1], grid_size=4, num_res_blocks=2), 16, 16),
        (emu3_vq(), 36, 12),
        (emu3_vq(ch_mult=[1, 1, 2], attn_resolutions=[0, 2], image_size=8, temporal_downsample_factor=8), 4, 8),
    ],
)
def test_sizes_follow_the_configuration(tokenizer: Tokenizer, tokens: int, size: int) -> None:
    assert (tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.image_size) == (tokens, 16, size)
    codes = tokenizer.encode(torch.rand(2, 3, size, size))
    assert (codes.shape, codes.dtype) == ((2, tokens), torch.int64)
    images = tokenizer.decode(codes)
    assert (images.shape, images.dtype) == ((2, 3, size, size), torch.float32)


def test_alitok_sizes_of_a_released_configuration() -> None:
    sections = {"vq_model": {"codebook_size": 4096, "token_size": 32, "num_latent_tokens": 273}, "generator": {}}
    assert load_config(AliTokTokenizerConfig, {"model": sections}) == AliTokTokenizerConfig()


def test_tokens_come_as_tensors_arrays_and_lists(tokenizer: Tokenizer) -> None:
    tokens = some_tokens(tokenizer)
    expected = tokenizer.decode(tokens)
    assert expected.std() > 0.01
    for same in (tokens.tolist(), tokens.numpy().astype(np.uint16), tokens.int(), tokens[:, None], tokens.T.clone().T):
        assert torch.equal(tokenizer.decode(same), expected)
    assert tokenizer.decode(tokens[:0]).shape == (0, *expected.shape[1:])


def test_pixels_come_as_tensors_arrays_and_lists(tokenizer: Tokenizer) -> None:
    pixels = some_pixels(tokenizer)
    expected = tokenizer.encode(pixels)
    assert len(expected.unique()) > 1
    for same in (pixels.tolist(), pixels.double().numpy(), pixels.to(memory_format=torch.channels_last)):
        assert torch.equal(tokenizer.encode(same), expected)
    assert tokenizer.encode(pixels[:0]).shape == (0, tokenizer.num_tokens)


def test_images_of_a_batch_do_not_mix(tokenizer: Tokenizer) -> None:
    tokens, pixels = some_tokens(tokenizer), some_pixels(tokenizer)
    torch.testing.assert_close(tokenizer.decode(tokens)[1:2], tokenizer.decode(tokens[1:2]))
    torch.testing.assert_close(tokenizer.encode_latents(pixels)[1:2], tokenizer.encode_latents(pixels[1:2]))


def test_pieces_can_be_trained(tokenizer: Tokenizer) -> None:
    pixels = some_pixels(tokenizer)
    latents = tokenizer.encode_latents(pixels)
    codes = tokenizer.embed_tokens(tokenizer.quantize_latents(latents))
    straight_through = latents + (codes - latents).detach()
    loss = F.mse_loss(tokenizer.decode_latents(straight_through), pixels) + F.mse_loss(codes, latents.detach())
    loss.backward()
    untouched = [name for name, value in tokenizer.named_parameters() if value.grad is None or not value.grad.any()]
    # A code or position that no token uses has no gradient, but each tensor has some.
    assert untouched == []
    assert not tokenizer.decode(some_tokens(tokenizer)).requires_grad


def test_float64_agrees(tokenizer: Tokenizer) -> None:
    tokens, pixels = some_tokens(tokenizer), some_pixels(tokenizer)
    precise = copy.deepcopy(tokenizer).double()
    latents = precise.encode_latents(pixels.double())
    torch.testing.assert_close(tokenizer.encode_latents(pixels).double(), latents, rtol=0, atol=5e-6)
    raw = precise.decode_raw(tokens)
    torch.testing.assert_close(tokenizer.decode_raw(tokens).double(), raw, rtol=0, atol=5e-6)
    assert (latents.dtype, raw.dtype, precise.decode(tokens).dtype) == (torch.float64, torch.float64, torch.float32)
    assert torch.equal(precise.encode(pixels), tokenizer.encode(pixels))


@pytest.mark.parametrize(("at_once", "pieces"), [(1, [1] * 5), (2.5, [2] * 3), (4, [3, 3]), (5, [5]), (100, [5])])
def test_a_few_images_at_a_time(
    tokenizer: Tokenizer, at_once: float, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the memory of their activations; as many each time, for other shapes have other last bits."""
    tokens, pixels, seen = some_tokens(tokenizer, 5), some_pixels(tokenizer, 5), []
    wanted = tokenizer.decode(tokens), tokenizer.encode(pixels)

    def noted(name: str) -> None:
        method = getattr(tokenizer, name)
        monkeypatch.setattr(tokenizer, name, lambda given: seen.append(len(given)) or method(given))

    noted("decode_latents")
    noted("encode_latents")
    monkeypatch.setattr(base, "PIXELS_AT_ONCE", int(at_once * tokenizer.image_size**2))
    torch.testing.assert_close(tokenizer.decode(tokens), wanted[0], rtol=0, atol=5e-6)
    assert torch.equal(tokenizer.encode(pixels), wanted[1])
    assert seen == 2 * pieces
    assert tokenizer.decode(tokens[:0]).shape == (0, *wanted[0].shape[1:])


@pytest.mark.parametrize("at_once", [2**24, 50, 1])
def test_nearest_code(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "DISTANCES_AT_ONCE", at_once)
    tokenizer = maskgit_vq()
    latents = torch.randn(3, 5, 6, 6)
    rows = tokenizer.quantize.embedding.weight
    distances = (latents.permute(0, 2, 3, 1)[..., None, :] - rows).square().sum(-1)  # [B, h, w, codes]
    assert torch.equal(tokenizer.quantize_latents(latents), distances.argmin(-1).flatten(1))
    assert torch.equal(tokenizer.quantize_latents(latents.double()), distances.argmin(-1).flatten(1))


def test_unit_length_codes() -> None:
    plain, unit = alitok(), alitok(use_l2_norm=True)
    with torch.no_grad():
        plain.quantize.embedding.weight.copy_(F.normalize(plain.quantize.embedding.weight, dim=-1))
        unit.quantize.embedding.weight.mul_(torch.linspace(0.1, 10, 16)[:, None])
    tokens = some_tokens(plain)
    torch.testing.assert_close(unit.decode(tokens), plain.decode(tokens))
    latents = torch.randn(3, 5, 1, 14)
    expected = plain.quantize_latents(F.normalize(latents, dim=1))
    for scale in (1, 1e-9, 1e9):
        assert torch.equal(unit.quantize_latents(latents * scale), expected)
    assert not torch.equal(plain.quantize_latents(latents), alitok().quantize_latents(latents))


def test_to_uint8() -> None:
    values = torch.tensor([0, 0.9 / 255, 1 / 255, 0.5, 0.9999, 1, 1.5, -0.2])
    expected = [0, 0, 1, 127, 254, 255, 255, 0]
    pixels = values.expand(2, 3, 4, 8).clone().requires_grad_()
    images = to_uint8(pixels)
    assert (images.shape, images.dtype) == ((2, 4, 8, 3), torch.uint8)
    assert images.is_contiguous()
    assert images[0, 0, :, 0].tolist() == expected
    assert torch.equal(to_uint8(pixels.to(memory_format=torch.channels_last)), images)
    rounded = [0, 1, 1, 128, 255, 255, 255, 0]
    assert to_uint8(pixels, rounded=True)[0, 0, :, 0].tolist() == rounded
    # 255 times this is 229.97, in float16 230.
    assert to_uint8(torch.full((1, 3, 1, 1), 230.875 / 256, dtype=torch.float16)).unique().tolist() == [229]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 35, dtype=torch.int64), r"shape \[B, 36\] or \[B, 1, 36\], got \[2, 35\]"),
        (torch.zeros(36, dtype=torch.int64), r"got \[36\]"),
        (torch.zeros(1, 2, 36, dtype=torch.int64), r"got \[1, 2, 36\]"),
        (torch.full((1, 36), 16), "range 0 to 15, found 16"),
        (torch.full((1, 36), -1), "range 0 to 15, found -1"),
        (torch.zeros(1, 36), "integers, got float32"),
        (torch.zeros(1, 36, dtype=torch.bool), "integers, got bool"),
        ([[1, 2], [3]], "tokens must be a tensor, an array or a nested list of numbers"),
        (None, "tokens must be a tensor"),
    ],
)
def test_wrong_tokens(tokens: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        maskgit_vq().decode(tokens)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            torch.rand(1, 3, 12, 13),
            r"shape \[B, 3, (12, 12\]|H, W\] with H and W multiples of 2), got \[1, 3, 12, 13\]",
        ),
        (torch.rand(3, 12, 12), r"got \[3, 12, 12\]"),
        (torch.rand(1, 12, 12, 3), r"got \[1, 12, 12, 3\]"),
        (torch.zeros(1, 3, 12, 12, dtype=torch.uint8), "floats, got uint8; divide 8-bit values by 255"),
        (torch.full((1, 3, 12, 12), torch.nan), "numbers in the range 0 to 1"),
        (torch.full((1, 3, 12, 12), 255.0), "range 0 to 1 .*, found 255 to 255"),
        (torch.full((1, 3, 12, 12), -0.01), "range 0 to 1 .*, found -0.01"),
        ("image.png", "pixels must be a tensor"),
    ],
)
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_wrong_pixels(build: Any, pixels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build().encode(pixels)


@pytest.mark.parametrize("build", [llamagen_vq, janus_vq, emu3_vq])
def test_images_of_any_size(build: Any) -> None:
    tokenizer = build()
    pixels = torch.rand(2, 3, 8, 14)
    tokens = tokenizer.encode(pixels)
    assert tokens.shape == (2, 4 * 7)
    images = tokenizer.decode(tokens, grid=(4, 7))
    assert images.shape == pixels.shape
    assert torch.equal(tokenizer.decode(tokens.view(2, 4, 7)), images)
    with pytest.raises(UserError, match=r"tokens must have shape \[B, 36\]"):
        tokenizer.decode(tokens)
    with pytest.raises(UserError, match=r"tokens must have shape \[B, 27\]"):
        tokenizer.decode(tokens, grid=(3, 9))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_half_precision(build: Any) -> None:
    tokenizer = build().eval()
    tokens, pixels = some_tokens(tokenizer), some_pixels(tokenizer)
    raw, latents = tokenizer.decode_raw(tokens), tokenizer.encode_latents(pixels)
    tokenizer.bfloat16()
    half, half_latents = tokenizer.decode_raw(tokens), tokenizer.encode_latents(pixels.bfloat16())
    assert (half.dtype, half_latents.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (half.float() - raw).abs().max() < 0.1 * raw.std() + 0.05
    assert (half_latents.float() - latents).abs().max() < 0.3 * latents.std()
    assert tokenizer.decode(tokens).dtype == torch.float32
    assert tokenizer.encode(pixels).shape == tokens.shape
    kernels = [weight for weight in tokenizer.parameters() if weight.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    # How they lie is not what they are.
    again = build().eval().bfloat16()
    again.load_state_dict({name: weight.contiguous() for name, weight in tokenizer.state_dict().items()})
    assert describe_module(again)["sha256"] == describe_module(tokenizer)["sha256"]


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_decoder_learns_after_it_was_used_in_inference_mode(build: Any) -> None:
    tokenizer = build().bfloat16()
    tokens = some_tokens(tokenizer)
    with torch.inference_mode():
        tokenizer.decode(tokens)
    tokenizer.decode_latents(tokenizer.embed_tokens(tokens)).float().sum().backward()


def test_one_wrong_pixel_is_found_and_rounding_is_not() -> None:
    tokenizer = maskgit_vq()
    pixels = some_pixels(tokenizer)
    pixels[1, 2, 3, 4] = torch.nan
    with pytest.raises(UserError, match="numbers"):
        tokenizer.encode(pixels)
    pixels[1, 2, 3, 4] = 1 + 1e-6
    tokenizer.encode(pixels)


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (maskgit_vq, {"channel_mult": []}, "channel_mult"),
        (maskgit_vq, {"channel_mult": [1, 0]}, "channel_mult"),
        (maskgit_vq, {"hidden_channels": 48}, "hidden_channels 48 must be a multiple of 32"),
        (maskgit_vq, {"resolution": 13}, "resolution 13 must be a multiple of 2"),
        (maskgit_vq, {"codebook_size": 0}, "codebook_size"),
        (alitok, {"image_size": 13}, "image_size 13 must be a multiple of patch_size 4"),
        (alitok, {"encoder_num_heads": 5}, "encoder_width 24 must be a multiple of encoder_num_heads 5"),
        (alitok, {"decoder_num_heads": 3}, "decoder_width 40 must be a multiple of decoder_num_heads 3"),
        (alitok, {"num_latent_tokens": 8, "aux_tokens": None}, r"num_latent_tokens 8 .* 0 \+ 9"),
        (alitok, {"aux_tokens": 4}, r"num_latent_tokens 14 .* 4 \+ 9"),
        (alitok, {"num_buffer_tokens": -1}, "num_buffer_tokens"),
        (robustok, {"image_size": 13}, "image_size 13 must be a multiple of patch_size 4"),
        (robustok, {"vit_num_heads": 5}, "vit_embed_dim 24 must be a multiple of vit_num_heads 5"),
        (robustok, {"num_latent_tokens": 8}, "num_latent_tokens 8 must be one per patch, here 9"),
        (robustok, {"vit_depth": 0}, "vit_depth"),
        (llamagen_vq, {"ch_mult": []}, "ch_mult"),
        (llamagen_vq, {"ch": 12}, "ch 12 must be a multiple of num_groups 8"),
        (llamagen_vq, {"image_size": 13}, "image_size 13 must be a multiple of 2"),
        (llamagen_vq, {"output_size": 0}, "output_size must be greater than 0"),
        (llamagen_vq, {"grid_size": 0}, "grid_size must be greater than 0"),
        (janus_vq, {"channel_multiplier": [1, 0]}, "channel_multiplier"),
        (janus_vq, {"base_channels": 12}, "base_channels 12 must be a multiple of num_groups 8"),
        (janus_vq, {"grid_size": 0}, "grid_size must be greater than 0"),
        (emu3_vq, {"image_size": 13}, "image_size 13 must be a multiple of 2"),
        (emu3_vq, {"attn_resolutions": [2]}, "attn_resolutions must list levels from 0 to 1"),
        (emu3_vq, {"temporal_downsample_factor": 6}, "power of 2"),
        (emu3_vq, {"z_channels": 8}, r"z_channels 8 must be equal to embed_dim \(4\)"),
        (emu3_vq, {"num_groups": 16}, "num_groups 32"),
    ],
)
def test_wrong_configurations(build: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)
