"""Models inside of other modules, models without positions, and passes or caches that lose what was kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from plug_models import PROMPTS, SHORT, TEXT, janus, llama, with_large_weights  # noqa: E402
from softcfg import CFG, SoftCFG, UserError  # noqa: E402
from softcfg.integrations import transformers as plug  # noqa: E402

T, SIZE = 9, {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}


def gpt2() -> Any:
    config = transformers.GPT2Config(**SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def bart() -> Any:
    return transformers.BartForCausalLM(
        transformers.BartConfig(**SIZE, **SMALL, max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False)
    )


def roformer() -> Any:
    """Rotary positions, which count the padding too."""
    config = transformers.RoFormerConfig(
        **SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True
    )
    return transformers.RoFormerForCausalLM(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(**SIZE, hidden_size=32, n_layer=2, n_head=4))


def mpt() -> Any:
    config = transformers.MptConfig(vocab_size=60, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2)
    return transformers.MptForCausalLM(config)


def gpt_neo() -> Any:
    kinds = [[["global", "local"], 1]]
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            **SIZE, hidden_size=32, num_layers=2, attention_types=kinds, num_heads=4, window_size=4,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def minimax() -> Any:
    kinds = ["linear_attention", "full_attention"]
    return transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(**TEXT, head_dim=8, num_local_experts=2, layer_types=kinds, block_size=4)
    )


def chameleon() -> Any:
    """Image codes are the tokens from 20 to 43."""
    codes = {f"IMGIMG{chr(65 + code // 6)}{chr(65 + code % 6)}Z": 20 + code for code in range(24)}
    vq = {
        "num_embeddings": 24, "embed_dim": 16, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "resolution": 16,
    }  # fmt: skip
    words = {"<image>": 5, "<racm3:break>": 6, "<eoss>": 7, **codes}
    size = {**TEXT, "num_key_value_heads": 4}
    return transformers.ChameleonForConditionalGeneration(
        transformers.ChameleonConfig(vocabulary_map=words, vq_config=vq, **size)
    )


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(7)
    return with_large_weights(make())


def decode(model: Any, guidance: Any, **settings: Any) -> Tensor:
    usual = {"num_tokens": T, "unconditional_ids": SHORT, "attention_mask": PROMPTS > 0, "seed": 3}
    return plug.decode(model, settings.pop("prompts", PROMPTS), guidance, **{**usual, **settings})


class Outside(nn.Module):
    """Hands everything on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Adapted(Outside):
    """As PEFT: some arguments by name, and a module between it and the model."""

    def __init__(self, model: Any) -> None:
        super().__init__(Outside(model))

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Derived(transformers.GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def derived(model: Any) -> Any:
    if not isinstance(model, transformers.GPT2LMHeadModel):
        pytest.skip("derives from GPT-2")
    other = Derived(model.config)
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation("softcfg")
    return other.eval()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "module": Outside,
    "adapter": Adapted,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled adapter": lambda model: torch.compile(Adapted(model), backend="eager"),
    "data parallel": lambda model: Outside(nn.DataParallel(Outside(model)).module),
    "subclass": derived,
}


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_draws_what_its_model_draws(make: Callable[[], Any], wrapper: str) -> None:
    """With prompts of unequal lengths, whose positions count from the padding on."""
    model = made(make)
    inside = WRAPPERS[wrapper](model)
    for guidance in (CFG(3.0, schedule="constant"), SoftCFG(3.0, schedule="constant")):
        with torch.compiler.set_stance("force_eager"):  # compiling takes long
            tokens = decode(inside, guidance)
        assert torch.equal(tokens, decode(model, guidance))


def test_image_tokens_that_the_model_rules_out() -> None:
    """Chameleon's forward call rules out its image tokens by the least number there is, so its head is asked."""
    model, codes, seen = made(chameleon), torch.arange(20, 44), []

    def only_codes(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits)
        return torch.full_like(logits, -torch.inf).index_copy(1, codes, logits[:, codes])

    settings = {"logits_processor": [only_codes], "prompts": PROMPTS[1:], "attention_mask": None}
    assert torch.isin(decode(model, SoftCFG(4.0), **settings), codes).all()
    bare = [model.lm_head(model.model(ids).last_hidden_state[:, -1]) for ids in (PROMPTS[1:], SHORT)]
    torch.testing.assert_close(seen[0], CFG(4.0).guide(*bare, scale=CFG(4.0).scales(T)[0]), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"every code is ruled out; try .* codes that the model itself allows"):
        decode(Outside(model), CFG(3.0), **settings)
    assert not torch.isin(decode(Outside(model), CFG(3.0)), codes).any()
    sequences = generate(model, logits_processor=[lambda ids, logits: logits.index_fill(1, torch.tensor([2]), 1e9)])
    assert sequences.shape == (2, 6)  # its end token ends a sequence, as it does not in an image of Janus


@pytest.mark.parametrize("make", [bart, roformer], ids=["bart", "roformer"])
def test_padding_without_positions_is_refused(make: Callable[[], Any]) -> None:
    model, longer = made(make), torch.tensor([[1, 3, 4, 5, 6]])
    sentence = rf"{type(model).__name__} does not say that it takes position_ids"
    cases: list[dict[str, Any]] = [
        {},
        {"unconditional_ids": longer},
        {"prompts": PROMPTS[1:], "attention_mask": None},
    ]
    for settings in cases:
        for inside in (model, Outside(model)):
            with pytest.raises(UserError, match=sentence):
                decode(inside, CFG(3.0), **settings)
    settings = {"prompts": PROMPTS[1:], "attention_mask": None, "unconditional_ids": longer}
    assert decode(model, CFG(3.0), **settings).shape == (1, T)


def recurrent_gemma() -> Any:
    """Its recurrent layers take positions, but not the mask."""
    kinds = ["recurrent", "recurrent", "attention"]
    size = {**TEXT, "num_hidden_layers": 3}
    return transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(**size, lru_width=32, attention_window_size=64, block_types=kinds)
    )


def test_padding_that_changes_logits_is_refused() -> None:
    model = made(recurrent_gemma)
    for settings in ({}, {"prompts": PROMPTS[1:], "attention_mask": None}):
        with pytest.raises(
            UserError, match=r"^RecurrentGemmaForCausalLM gives other logits .*: give prompts of one length"
        ):
            decode(model, CFG(3.0), **settings)
    settings = {"prompts": PROMPTS[1:], "attention_mask": None, "unconditional_ids": PROMPTS[1:] + 1}
    assert decode(model, CFG(3.0), **settings).shape == (1, T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_is_tried_once_for_a_generator(dtype: torch.dtype) -> None:
    model = made(llama).to(dtype)
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda *call: lengths.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    generator = plug.TransformersGenerator(model, T)
    for _ in range(2):
        generator.condition(plug.Prompts(PROMPTS, SHORT), guided=True)
    assert lengths == [5, 2]  # with and without padding
    generator.condition(plug.Prompts(PROMPTS[1:], PROMPTS[1:]), guided=True)
    assert lengths == [5, 2]


ROTATIONS: list[dict[str, Any]] = [
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 3.0],
     "original_max_position_embeddings": 14},
]  # fmt: skip


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda rotation: rotation["rope_type"])
def test_a_rotation_by_the_longest_row_is_refused_with_padding(rotation: dict[str, Any]) -> None:
    """Where the longest row passes the length up to which all are rotated alike."""
    size = {**TEXT, "max_position_embeddings": 14 if rotation["rope_type"] == "dynamic" else 64}
    settings = {"rope_parameters": {"rope_theta": 1e4, **rotation}}
    model = made(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **settings)))
    assert decode(model, CFG(3.0), num_tokens=10).shape == (2, 10)  # the last of them is not fed
    with pytest.raises(
        UserError, match="rotates all rows by the longest of them where it passes 14 tokens, as it does"
    ):
        decode(model, CFG(3.0), num_tokens=11)
    alike = {"prompts": PROMPTS[1:], "attention_mask": None, "unconditional_ids": PROMPTS[1:] + 1}
    assert decode(model, CFG(3.0), num_tokens=11, **alike).shape == (1, 11)


@pytest.mark.parametrize("make", [bloom, mpt], ids=["bloom", "mpt"])
def test_models_that_count_from_the_mask(make: Callable[[], Any]) -> None:
    model, settings = made(make), {"unconditional_ids": torch.tensor([[1, 3, 4]])}
    both = decode(model, CFG(3.0), **settings)
    assert torch.equal(both[:1], decode(model, CFG(3.0), prompts=PROMPTS[:1, 2:], attention_mask=None, **settings))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [llama, gpt2, janus], ids=["llama", "gpt2", "janus"])
def test_a_pass_that_drops_the_cache_is_refused(make: Callable[[], Any], cache: str) -> None:
    """As gradient checkpointing does in training mode. Training mode alone does not, nor does checkpointing alone."""
    model = made(make)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = {guidance: decode(model, guidance, cache=cache) for guidance in (CFG(3.0), SoftCFG(3.0))}
    model.gradient_checkpointing_enable()
    sentence = r"kept 0 of 5 slots in its cache: call model\.eval\(\)"
    if cache == "static":
        sentence += r"|failed with a StaticCache: .* call model\.eval\(\)"
    for guidance, tokens in expected.items():
        assert torch.equal(decode(model.eval(), guidance, cache=cache), tokens)
        with pytest.raises(UserError, match=sentence):
            decode(model.train(), guidance, cache=cache)
    model.gradient_checkpointing_disable()
    for guidance, tokens in expected.items():
        assert torch.equal(decode(model.train(), guidance, cache=cache), tokens)


def opt() -> Any:
    """Its dropout is no module, but a number in each layer."""
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZE, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
                               max_position_embeddings=64, word_embed_proj_dim=32)
    )  # fmt: skip


@pytest.mark.parametrize("make", [opt, gpt2], ids=["opt", "gpt2"])
def test_dropout_is_refused(make: Callable[[], Any]) -> None:
    model = made(make)
    expected = decode(model, SoftCFG())
    for call in (decode, generate):
        with pytest.raises(UserError, match=r"has dropout on \(0\.1\), .*: call model\.eval\(\)"):
            call(model.train(), guidance=SoftCFG())
    assert torch.equal(decode(model.eval(), SoftCFG()), expected)


def test_a_loop_of_ones_own_may_train_with_dropout() -> None:
    model = made(opt).train()
    model(PROMPTS, value_weights=torch.ones(2, 5)).logits.sum().backward()
    assert model.lm_head.weight.grad.any()


def generate(model: Any, **settings: Any) -> Tensor:
    usual = {"guidance": CFG(3.0), "unconditional_ids": SHORT, "max_new_tokens": T, "attention_mask": PROMPTS > 0}
    return model.generate(PROMPTS, custom_generate=plug.generate, **{**usual, **settings})


def test_static_caches_are_for_models_that_support_them() -> None:
    """GPT-Neo would attend to slots that are empty."""
    model = made(gpt_neo)
    given = transformers.StaticCache(config=model.config, max_cache_len=30)
    for call in (
        lambda: decode(model, CFG(3.0), cache="static"),
        lambda: decode(Outside(model), CFG(3.0), cache="static"),
        lambda: decode(model, CFG(3.0), cache=given),
        lambda: generate(model, cache_implementation="static"),
    ):
        with pytest.raises(UserError, match="GPTNeoForCausalLM does not say that it supports static caches"):
            call()
    assert decode(model, CFG(3.0)).shape == (2, T)


def test_a_model_that_fails_with_a_cache_is_named() -> None:
    with pytest.raises(UserError, match="BloomForCausalLM failed with a StaticCache: leave it dynamic"):
        decode(made(bloom), CFG(3.0), cache="static")
    with pytest.raises(UserError, match=r"MiniMaxForCausalLM failed with a DynamicCache .*cache of its own"):
        decode(made(minimax), CFG(3.0))


def test_encoders_are_refused() -> None:
    """Their caches too."""
    config = transformers.BartConfig(**SIZE, **SMALL, encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=4)
    model = made(lambda: transformers.BartForConditionalGeneration(config))
    for inside in (model, Outside(model)):
        with pytest.raises(UserError, match=r"BartForConditionalGeneration has an encoder, .* use a causal language"):
            decode(inside, CFG(3.0))
    of_both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with pytest.raises(UserError, match="one of a decoder, such as DynamicCache, got EncoderDecoderCache"):
        decode(made(llama), CFG(3.0), cache=of_both)


def test_an_offloaded_model_draws_as_before() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = made(llama)
    expected = decode(model, SoftCFG())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert torch.equal(decode(model, SoftCFG()), expected)
    with pytest.raises(UserError, match=r"weights of LlamaForCausalLM are on no device \(meta\): load them first"):
        decode(made(llama).to("meta"), SoftCFG())
