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
from softcfg.tokenizers import Tokenizer, to_uint8
from softcfg.zoo import TOKENIZERS


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
    encode_file: str = ""  # where it is a file of its own
    signed: bool = False  # the released decoder's range is [-1, 1]

    def load(self) -> Golden:
        """The file, with what is the same for all families: a batch of raw images in [0, 1] and their tokens."""
        file = golden(self.file)
        if self.encode_file:
            file.arrays |= golden(self.encode_file).arrays
        raw, raw_uint8 = file.arrays[self.raw], file.arrays[self.raw_uint8]
        if raw.dim() == 3:
            raw, raw_uint8 = raw[None], raw_uint8[None]
        file.arrays["raw"] = (raw + 1) / 2 if self.signed else raw
        file.arrays["raw_uint8"] = raw_uint8
        file.arrays["tokens"] = file.arrays["tokens"][: len(raw)]
        file.arrays[self.encoded] = file.arrays[self.encoded].flatten(1)
        return file


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
    Case(
        "robustok",
        "robustok/golden-tokenizer-decode-a",
        "decoded_0",
        "decoded_0_uint8",
        "image_uint8",
        "latent",
        "encoded_tokens",
        1.5e-5,
        3e-5,
        encode_file="robustok/golden-tokenizer-encode-a",
        signed=True,
    ),
    Case(
        "llamagen-vq",
        "llamagen/golden-tokenizer-decode-a",
        "decoder_raw",
        "decoded_uint8",
        "image_uint8",
        "encoder_latent",
        "encoded_tokens",
        5e-5,
        3e-5,
        signed=True,
    ),
    *(
        Case(
            family,
            file,
            "decoder_raw",
            "decoded_uint8",
            "image_uint8",
            "encoder_latent",
            "encoded_tokens",
            raw_tolerance,
            latent_tolerance,
            signed=True,
        )
        for family, file, raw_tolerance, latent_tolerance in [
            ("llamagen-vq", "llamagen-t2i/golden-tokenizer-decode-a", 5e-5, 3e-5),
            ("janus-vq", "janus/golden-tokenizer-decode-a", 5e-5, 3e-5),
            ("janus-vq", "janus/golden-tokenizer-decode-original-a", 5e-5, 3e-5),
            ("emu3-vq", "emu3/golden-tokenizer-decode-a", 1e-5, 1e-5),
            ("emu3-vq", "emu3/golden-tokenizer-decode-original-a", 1e-5, 1e-5),
        ]
    ),
]
RELEASED = [
    ("maskgit-vq", "rar/keys-maskgit-vqgan.json"),
    ("alitok", "alitok/keys-tokenizer.json"),
    ("robustok", "robustok/keys-tokenizer.json"),
    ("llamagen-vq", "llamagen/keys-vq-16.json"),
    ("movq", "lumina/keys-movqgan-270m.json"),
    ("janus-vq", "janus/keys-hf-1b.json"),
    ("janus-vq", "janus/keys-original-1b.json"),
    ("emu3-vq", "emu3/keys-gen-hf.json"),
    ("emu3-vq", "emu3/keys-visiontokenizer-original.json"),
]
Loaded = tuple[Case, Golden, Tokenizer]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.file.replace("golden-tokenizer-", ""))
def loaded(request: pytest.FixtureRequest) -> Loaded:
    case: Case = request.param
    file = case.load()
    return case, file, softcfg.load_tokenizer(case.family, config=file.config, checkpoint=file.weights())


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_decode(loaded: Loaded) -> None:
    case, file, tokenizer = loaded
    expected = file.arrays["raw"]
    raw = tokenizer.decode_raw(file.arrays["tokens"])
    image = tokenizer.decode(file.arrays["tokens"])
    close(raw, expected, case.raw_tolerance)
    close(image, expected.clamp(0, 1), 1e-4)
    assert torch.equal(image, raw.clamp(0, 1))
    assert image.is_contiguous()
    steps = tokenizer.to_uint8(image).int() - file.arrays["raw_uint8"].int()
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() < 1e-3 * steps.numel()


def test_encode(loaded: Loaded) -> None:
    case, file, tokenizer = loaded
    pixels = file.arrays[case.image].float() / 255
    close(tokenizer.encode_latents(pixels), file.arrays[case.latents], case.latent_tolerance)
    assert torch.equal(tokenizer.encode(pixels), file.arrays[case.encoded])


def test_8_bit_pixels_of_the_raw_image(loaded: Loaded) -> None:
    _, file, tokenizer = loaded
    raw, expected = file.arrays["raw"], file.arrays["raw_uint8"]
    assert torch.equal(tokenizer.to_uint8(raw), expected)
    assert not torch.equal(to_uint8(raw, rounded=not tokenizer.rounds), expected)


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
    weights = TOKENIZERS[case.family].needed(file.weights())
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not name.startswith(("decoder.", "quantize.embedding.", "post_quant_conv.")):
            tensor.fill_(torch.nan)
    tokenizer = softcfg.load_tokenizer(case.family, config=file.config, checkpoint=weights)
    close(tokenizer.decode(file.arrays["tokens"][:1]), file.arrays["raw"][:1].clamp(0, 1), 1e-4)


@pytest.mark.parametrize(("name", "keys"), RELEASED)
def test_released_tensors(name: str, keys: str) -> None:
    released = json.loads((FOLDER / keys).read_text())
    family = TOKENIZERS[name]
    model, config = family.classes()
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in released["tensors"].items()}
        expected = {name: list(tensor.shape) for name, tensor in family.needed(published).items()}
        by_default = model(config())
        as_given = model(load_config(config, released["config"]))
    for module in (by_default, as_given):
        assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == expected


@pytest.mark.parametrize("family", ["janus-vq", "emu3-vq"])
def test_the_names_of_older_library_files(family: str) -> None:
    file = golden(f"{family.removesuffix('-vq')}/golden-tokenizer-decode-a")
    names = [name.removeprefix("model.") for name in file.about["tensors"]]
    older = dict(zip(names, file.weights().values(), strict=True))
    assert {name.partition(".")[0] for name in names} == {"vqmodel"}
    beside = {"text_model.model.norm.weight": torch.ones(4)}
    tokenizer = softcfg.load_tokenizer(family, config=file.config, checkpoint=older | beside)
    close(2 * tokenizer.decode_raw(file.arrays["tokens"][:1]) - 1, file.arrays["decoder_raw"][:1], 1e-4)


def test_released_tensors_of_llamagens_vq_8() -> None:
    released = json.loads((FOLDER / "llamagen/keys-vq-8.json").read_text())
    model, config = TOKENIZERS["llamagen-vq"].classes()
    with torch.device("meta"):
        module = model(load_config(config, released["config"]))
    expected = TOKENIZERS["llamagen-vq"].needed(released["tensors"])
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == expected
    assert module.num_tokens == 32 * 32


def test_llamagen_resizes_the_raw_image() -> None:
    """384 px to 256 px in the released evaluation, here 96 to 64."""
    file = golden("llamagen/golden-tokenizer-decode-a-resize")
    config = {**file.config, "image_size": 96}
    whole = softcfg.load_tokenizer("llamagen-vq", config=config, checkpoint=file.weights())
    close(2 * whole.decode_raw(file.arrays["tokens"]) - 1, file.arrays["decoder_raw"], 1e-4)
    resized = softcfg.load_tokenizer("llamagen-vq", config={**config, "output_size": 64}, checkpoint=file.weights())
    raw = resized.decode_raw(file.arrays["tokens"])
    close(2 * raw - 1, file.arrays["resized_raw"], 1e-4)
    steps = resized.to_uint8(resized.decode(file.arrays["tokens"])).int() - file.arrays["resized_uint8"].int()
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() < 1e-3 * steps.numel()
    assert torch.equal(resized.to_uint8((file.arrays["resized_raw"] + 1) / 2), file.arrays["resized_uint8"])


def test_robustok_decodes_from_what_decoding_needs() -> None:
    """All other tensors together: none of them is part of the decoder."""
    released = json.loads((FOLDER / "robustok/keys-tokenizer.json").read_text())
    needed = TOKENIZERS["robustok"].needed(dict.fromkeys(released["tensors"]))
    rest = needed.keys() - set(released["decode_needs"])
    assert {name.partition(".")[0] for name in rest} == {"encoder", "quant_conv"}


def test_robustok_images_of_a_batch_differ_as_released() -> None:
    file = golden("robustok/golden-tokenizer-decode-a")
    tokenizer = softcfg.load_tokenizer("robustok", config=file.config, checkpoint=file.weights())
    first, second = 2 * tokenizer.decode_raw(file.arrays["tokens"])[:, :, 96:160] - 1
    close(second, file.arrays["decoded_1_rows_96_160"], 3e-5)
    close(second - first, file.arrays["decoded_1_rows_96_160"] - file.arrays["decoded_0"][:, 96:160], 3e-5)
