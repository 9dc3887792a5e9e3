"""The tokenizers compute what the released code computes."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import softcfg
from goldens import FOLDER, Golden, golden
from softcfg.configuration import load_config
from softcfg.tokenizers import (
    AliTokTokenizer,
    AliTokTokenizerConfig,
    MaskGITVQ,
    MaskGITVQConfig,
    Tokenizer,
    to_uint8,
)


@dataclass
class Case:
    """A golden file: the names of its arrays, and how far float32 may be from them."""

    family: str
    file: str
    raw: str
    raw_uint8: str
    image: str
    latents: str
    encoded: str
    raw_tolerance: float
    latent_tolerance: float


CASES = [
    Case(
        "maskgit-vq",
        "rar/golden-tokenizer-decode-a",
        "decoder_raw",
        "decoded_uint8",
        "image_uint8",
        "encoder_latent",
        "encoded_tokens",
        5e-4,
        3e-5,
    ),
    Case(
        "alitok",
        "alitok/golden-tokenizer-decode",
        "decoded_image",
        "decoded_image_uint8",
        "encode_image_uint8",
        "encoder_latents",
        "encode_tokens",
        5e-6,
        3e-5,
    ),
]
RELEASED = [
    ("rar/keys-maskgit-vqgan.json", MaskGITVQ, MaskGITVQConfig),
    ("alitok/keys-tokenizer.json", AliTokTokenizer, AliTokTokenizerConfig),
]
Loaded = tuple[Case, Golden, Tokenizer]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.family)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    case: Case = request.param
    file = golden(case.file)
    return case, file, softcfg.load_tokenizer(case.family, config=file.config, checkpoint=file.weights())


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_decode(loaded: Loaded) -> None:
    case, file, tokenizer = loaded
    expected = file.arrays[case.raw]
    raw = tokenizer.decode_raw(file.arrays["tokens"])
    image = tokenizer.decode(file.arrays["tokens"])
    close(raw, expected, case.raw_tolerance)
    close(image, expected.clamp(0, 1), 1e-4)
    assert torch.equal(image, raw.clamp(0, 1))
    assert image.is_contiguous()
    steps = to_uint8(image).int() - file.arrays[case.raw_uint8].int()
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() < 1e-3 * steps.numel()


def test_encode(loaded: Loaded) -> None:
    case, file, tokenizer = loaded
    pixels = file.arrays[case.image].float() / 255
    close(tokenizer.encode_latents(pixels), file.arrays[case.latents], case.latent_tolerance)
    assert torch.equal(tokenizer.encode(pixels), file.arrays[case.encoded])


def test_8_bit_pixels_are_truncated(loaded: Loaded) -> None:
    case, file, _ = loaded
    assert torch.equal(to_uint8(file.arrays[case.raw].clamp(0, 1)), file.arrays[case.raw_uint8])


@pytest.mark.slow
def test_float64_agrees(loaded: Loaded) -> None:
    case, file, tokenizer = loaded
    precise = copy.deepcopy(tokenizer).double()
    pixels = file.arrays[case.image].double() / 255
    latents = precise.encode_latents(pixels)
    close(tokenizer.encode_latents(pixels.float()).double(), latents, 1e-5)
    assert torch.equal(precise.quantize_latents(latents), file.arrays[case.encoded])
    raw = precise.decode_raw(file.arrays["tokens"])
    close(tokenizer.decode_raw(file.arrays["tokens"]).double(), raw, 5e-5)


def test_decoding_reads_decoder_and_codebook_only(loaded: Loaded) -> None:
    case, file, _ = loaded
    weights = file.weights()
    for name, tensor in weights.items():
        if not name.startswith(("decoder.", "quantize.")):
            tensor.fill_(torch.nan)
    tokenizer = softcfg.load_tokenizer(case.family, config=file.config, checkpoint=weights)
    close(tokenizer.decode(file.arrays["tokens"]), file.arrays[case.raw].clamp(0, 1), 1e-4)


@pytest.mark.parametrize(("keys", "model", "config"), RELEASED, ids=["maskgit-vq", "alitok"])
def test_released_tensors(keys: str, model: type, config: type) -> None:
    released = json.loads((FOLDER / keys).read_text())
    with torch.device("meta"):
        by_default = model(config())
        as_given = model(load_config(config, released["config"]))
    for module in (by_default, as_given):
        assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == released["tensors"]
