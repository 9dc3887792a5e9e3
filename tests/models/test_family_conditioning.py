"""Prompts of Janus-Pro, Emu3-Gen and LlamaGen T2I: from text to what the generator is conditioned on."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from softcfg import UserError
from softcfg.errors import CheckpointError
from softcfg.models.emu3 import Emu3, Emu3Config, Emu3Prompts
from softcfg.models.emu3.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT, SPECIAL_TOKENS
from softcfg.models.janus import Janus, JanusConfig, JanusPrompts
from softcfg.models.llamagen_t2i import LlamaGenCaptions, LlamaGenT2I, LlamaGenT2IConfig
from softcfg.prompts import Prompt
from softcfg.tokenizers import Emu3VQ, Emu3VQConfig, JanusVQ, JanusVQConfig, LlamaGenVQ, LlamaGenVQConfig
from softcfg.zoo.loading import load_text_encoder

LLAMA: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
JANUS_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<|User|>"]


def byte_tokenizer(folder: Path, special: list[str]) -> Path:
    """A text tokenizer of bytes, whose special tokens come last."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def janus(folder: Path) -> JanusPrompts:
    file = byte_tokenizer(folder, JANUS_TOKENS)
    config = JanusConfig(
        **LLAMA, vocab_size=300, code_count=16, grid_size=2, **JanusPrompts.published_config({"tokenizer": file})
    )
    vq = JanusVQConfig(base_channels=32, channel_multiplier=(1, 1), code_count=16, grid_size=2)
    return JanusPrompts(Janus(config), JanusVQ(vq), name="tiny", files={"tokenizer": file})


def emu3(folder: Path, **settings: str) -> Emu3Prompts:
    file = byte_tokenizer(folder, list(SPECIAL_TOKENS.values()))
    published = Emu3Prompts.published_config({"tokenizer": file})
    config = Emu3Config(**LLAMA, vocab_size=300, code_count=16, image_size=32, **published)
    vq = Emu3VQConfig(codebook_size=16, ch=32, ch_mult=(1, 1, 1, 1), attn_resolutions=(), image_size=32)
    return Emu3Prompts(Emu3(config), Emu3VQ(vq), name="tiny", files={"tokenizer": file}, settings=settings)


def test_janus(tmp_path: Path) -> None:
    prompts = janus(tmp_path)
    bos, pad, boi, user = range(256, 260)
    assert prompts.generator.config.special_ids == {"bos": bos, "pad": pad, "boi": boi}
    requests = prompts.requests(prompts=["a <begin_of_image> cat", "dog"])
    assert (requests[0].width, requests[0].height) == (4, 4)
    ids, short = prompts.inputs(requests)
    assert (ids[0], ids[1], ids[-1], ids.count(boi)) == (bos, user, boi, 1)
    assert len(ids) == 3 + len(": a <begin_of_image> cat\n\n<|Assistant|>:")
    condition = prompts.generator.condition([ids, short], guided=True)
    assert condition.ids[2].tolist() == [bos, *[pad] * (len(ids) - 2), boi]
    with pytest.raises(UserError, match="4 x 4 pixels only"):
        prompts.requests(prompts="a cat", width=8)
    with pytest.raises(UserError, match="no negative prompt"):
        prompts.requests(prompts=[Prompt("a cat", negative_text="blurry")])
    with pytest.raises(UserError, match="no text tokenizer"):
        JanusPrompts(prompts.generator, prompts.tokenizer, name="tiny").inputs(requests)


def test_a_text_tokenizer_of_another_model(tmp_path: Path) -> None:
    file = byte_tokenizer(tmp_path, JANUS_TOKENS)
    with pytest.raises(CheckpointError, match=r"has no token <\|endoftext\|>"):
        Emu3Prompts.published_config({"tokenizer": file})


def test_emu3(tmp_path: Path) -> None:
    prompts = emu3(tmp_path)
    special = prompts.generator.config.special_ids
    (prompt,) = prompts.inputs(prompts.requests(prompts=["a cat"], width=40, height=24))
    header = f"{chr(3 + 48)}*{chr(5 + 48)}"
    assert prompt.grid == (3, 5)
    for ids, text in ((prompt.ids, "a cat" + POSITIVE_PROMPT), (prompt.negative, NEGATIVE_PROMPT)):
        assert ids is not None
        assert (ids[0], ids[-1], ids[-len(header) - 2]) == (special["bos"], special["img"], special["boi"])
        assert len(ids) == len(text) + len(header) + 3
    condition = prompts.generator.condition([prompt], guided=True)
    assert condition.geometry == prompts.geometry(40, 24)
    assert condition.num_tokens == 3 * (5 + 1) + 3
    plain = emu3(tmp_path, positive_text="").inputs([Prompt("a cat", negative_text="")])[0]
    assert len(plain.ids) == len("a cat") + len("4*4") + 3
    assert plain.negative == [special["bos"], *list(plain.ids)[-len("4*4") - 2 :]]
    assert prompts.default_size == (32, 32)
    assert prompts.size_of_ratio("2:1") == (48, 24)
    with pytest.raises(UserError, match="WIDTH:HEIGHT"):
        prompts.size_of_ratio("2x1")
    for size, message in ((20, "width must be a multiple of 8"), (16, "3 columns")):
        with pytest.raises(UserError, match=message):
            prompts.requests(prompts="a cat", width=size, height=32)


def test_sizes_of_ratios(tmp_path: Path) -> None:
    prompts = emu3(tmp_path)  # images of 32 x 32 pixels
    assert prompts.size_of_ratio("4:1") == (64, 16)
    assert prompts.size_of_ratio("1:1") == (32, 32)
    for ratio, message in (("4x1", "WIDTH:HEIGHT"), ("1:16", "3 columns")):
        with pytest.raises(UserError, match=message):
            prompts.size_of_ratio(ratio)
    with pytest.raises(UserError, match="not the ratio '1:1'"):
        janus(tmp_path).size_of_ratio("1:1")


def test_a_template_of_one_s_own(tmp_path: Path) -> None:
    made = janus(tmp_path)
    assert made.settings == {"template": "<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>"}
    other = JanusPrompts(
        made.generator,
        made.tokenizer,
        name="tiny",
        files=made.files,
        settings={"template": "draw {prompt}<begin_of_image>"},
    )
    (ids,) = other.inputs(other.requests(prompts=["a cat"]))
    assert (len(ids), ids[0], ids[-1]) == (len("draw a cat") + 2, 256, 258)
    with pytest.raises(UserError, match="another field"):
        JanusPrompts(made.generator, made.tokenizer, settings={"template": "{caption}"})


def test_emu3_needs_the_tokenizer_of_its_codes(tmp_path: Path) -> None:
    prompts = emu3(tmp_path)
    with pytest.raises(UserError, match="16 codes, 8 pixels wide"):
        Emu3Prompts(prompts.generator, janus(tmp_path).tokenizer)


class TestLlamaGen:
    """Captions, encoded by a small T5."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        pytest.importorskip("ftfy")
        pytest.importorskip("bs4")
        from transformers import T5Config, T5EncoderModel

        folder = tmp_path_factory.mktemp("t5")
        words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "cat", "and", "dog"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
        torch.manual_seed(0)
        config = T5Config(vocab_size=8, d_model=12, d_kv=4, d_ff=8, num_layers=2, num_heads=3)
        T5EncoderModel(config).save_pretrained(folder)
        return folder

    def captions(self, folder: Path) -> LlamaGenCaptions:
        config = LlamaGenT2IConfig(
            dim=16, n_layer=1, n_head=2, vocab_size=16, block_size=4, ffn_hidden_dim=8, cls_token_num=6, caption_dim=12
        )
        vq = LlamaGenVQConfig(ch=32, ch_mult=(1, 1), codebook_size=16, grid_size=2)
        files = {"encoder": folder / "model.safetensors"}
        load = functools.partial(load_text_encoder, place=lambda part: part)
        return LlamaGenCaptions(LlamaGenT2I(config).eval(), LlamaGenVQ(vq), name="tiny", files=files, load=load)

    def test_captions(self, folder: Path) -> None:
        captions = self.captions(folder)
        texts = ["A red CAT http://cats.com", "cat.png", "a red cat and a dog and a cat"]
        features = captions.inputs(captions.requests(prompts=texts))
        assert [len(feature) for feature in features] == [4, 1, 6]  # with the end of the text, cut at the sixth
        again = captions.inputs(captions.requests(prompts=texts[:1]))
        assert torch.equal(again[0], features[0])
        for kept in Path(os.environ["SOFTCFG_CAPTIONS"]).rglob("*.safetensors"):  # altered by a bit
            content = bytearray(kept.read_bytes())
            content[-1] ^= 1
            kept.write_bytes(content)
        assert torch.equal(self.captions(folder).inputs(captions.requests(prompts=texts[:1]))[0], features[0])
        condition = captions.generator.condition(features, guided=True)
        assert condition.padding is not None
        assert condition.padding.tolist() == [2, 5, 0] * 2
        logits = captions.generator(condition, torch.zeros(6, 3, dtype=torch.int64))
        assert logits.shape == (6, 4, 16)
        assert logits.isfinite().all()

    def test_padded_encoding_gives_the_same(self, folder: Path) -> None:
        """The released program pads captions to the most tokens and masks what it added."""
        encoder = self.captions(folder).encoder
        ids = torch.tensor([[3, 4, 5, 1, 0, 0]])
        padded = encoder.model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[0, :4]
        torch.testing.assert_close(encoder.encode("a red cat"), padded, rtol=0, atol=1e-5)

    def test_the_end_of_the_text_in_a_caption_is_text(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "t5")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["<pad>", "</s>"])
        tokenizer.save(str(tmp_path / "t5" / "tokenizer.json"))
        encoder = self.captions(tmp_path / "t5").encoder
        assert encoder.tokenizer.encode("a red cat").ids == [3, 4, 5, 1]
        ids = encoder.tokenizer.encode("a </s> cat").ids
        assert ids[0] == 3
        assert ids.count(1) == 1  # behind the text
        assert ids[-1] == 1
        assert 0 not in encoder.tokenizer.encode("<pad>").ids

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_read_layer_by_layer(self, folder: Path, dtype: torch.dtype) -> None:
        """As the library reads it; while a part is rounded, no later one has been read."""
        from transformers import T5EncoderModel

        captions, waiting = self.captions(folder), []
        captions.generator.to(dtype)

        def place(part: nn.Module) -> nn.Module:
            waiting.append(sum(parameter.is_meta for parameter in encoder[0].parameters()))
            return part

        def load(module: nn.Module, *args: Any) -> nn.Module:
            encoder.append(module)
            return load_text_encoder(module, *args, place=place)

        encoder: list[nn.Module] = []
        captions.load = load
        features = captions.encoder.encode("a red cat")
        assert features.dtype == dtype
        ids = torch.tensor([[3, 4, 5, 1]])
        with torch.no_grad():
            expected = T5EncoderModel.from_pretrained(folder, dtype=dtype)(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(features, expected, rtol=0, atol=0)
        assert waiting == [*reversed(range(12)), 0]  # of two blocks, with four layers of attention and two of the MLP

    @pytest.mark.parametrize(
        ("file", "content", "said"),
        [
            ("config.json", None, "config.json"),
            ("config.json", "[]", "does not describe a text encoder"),
            ("config.json", '{"d_model": "wide"}', "does not describe a text encoder"),
            ("config.json", '{"d_model": 12, "num_layers": 3, "vocab_size": 8}', "does not fit the text encoder"),
            ("config.json", {"num_layers": 1}, r"does not fit the text encoder: 8 unexpected \(encoder\.block\.1\."),
            ("config.json", {"num_layers": 20_000}, "20,000 layers, more than 200, the limit"),
            ("model.safetensors", None, "model.safetensors"),
            ("model.safetensors", "damaged", "damaged or not a weights file"),
            ("tokenizer.json", None, "tokenizer.json"),
        ],
    )
    def test_encoders_that_are_incomplete(
        self, folder: Path, tmp_path: Path, file: str, content: str | dict[str, int] | None, said: str
    ) -> None:
        shutil.copytree(folder, tmp_path / "t5")
        if isinstance(content, dict):
            content = json.dumps({**json.loads((tmp_path / "t5" / file).read_text()), **content})
        (tmp_path / "t5" / file).unlink()
        if content is not None:
            (tmp_path / "t5" / file).write_text(content)
        with pytest.raises(CheckpointError, match=said):
            self.captions(tmp_path / "t5").inputs([Prompt("a cat")])

    def test_models_without_an_encoder(self, folder: Path) -> None:
        captions = self.captions(folder)
        without = LlamaGenCaptions(captions.generator, captions.tokenizer, name="tiny")
        with pytest.raises(UserError, match="no text encoder"):
            without.inputs([Prompt("a cat")])
        with pytest.raises(UserError, match="4 x 4 pixels only"):
            captions.requests(prompts="a cat", width=8)
