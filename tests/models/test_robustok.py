"""RobusTok's generators: RAR with more codes, and its teacher forcing."""

from typing import Any

import pytest
import torch
from torch import Tensor

import softcfg
from goldens import golden
from softcfg import CFG, SoftCFG
from softcfg.decoding import Sampling, decode, draw, image_uniforms
from softcfg.models.base import Generator
from softcfg.zoo import GENERATORS, Component, ModelFile
from tiny_models import weights

GUIDANCE = {"guidance_scale": 6.0, "guidance_scale_pow": 1.15}
TEMPERATURE = 1.02


@pytest.fixture(scope="module")
def generator() -> Generator:
    case = golden("rar/golden-generator-cfg-a")
    return softcfg.load_generator("robustok", config=case.config, checkpoint=case.weights())


@pytest.fixture(scope="module")
def short() -> Generator:
    """A generator of few tokens."""
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
              "codebook_size": 40, "condition_num_classes": 5, "image_seq_len": 24}  # fmt: skip
    state = weights(Component(GENERATORS["robustok"], config, ModelFile("")))
    return softcfg.load_generator("robustok", config, {name: 4 * tensor for name, tensor in state.items()})


def sample(generator: Generator, guidance: CFG, **forcing: Any) -> Tensor:
    return decode(
        generator,
        [1, 4],
        guidance,
        uniforms=image_uniforms(0, [0, 1], generator.num_tokens),
        sampling=Sampling(TEMPERATURE),
        **forcing,
    )


def test_it_is_rar_with_more_codes(generator: Generator) -> None:
    case = golden("rar/golden-generator-cfg-a")
    call = case.call
    guidance = CFG(call["guidance_scale"], call["guidance_scale_pow"])
    labels = case.arrays["labels" if "labels" in case.arrays else "condition"]
    trace = softcfg.trace(generator, labels=labels, tokens=case.arrays["tokens"], guidance=guidance)
    torch.testing.assert_close(trace.cond_logits, case.arrays["cond_logits"], rtol=0, atol=3e-5)
    torch.testing.assert_close(trace.guided_logits, case.arrays["guided_logits"], rtol=0, atol=2e-4)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    defaults = {name: GENERATORS[name].classes()[1](**sizes).codebook_size for name in ("rar", "robustok")}
    assert defaults["robustok"] == 4096
    assert defaults["rar"] == 1024


@pytest.mark.parametrize("method", [SoftCFG.paper, SoftCFG.released])
def test_softcfg_acts_on_the_unconditional_logits(generator: Generator, method: Any) -> None:
    """In the released code it is without effect."""
    tokens = sample(generator, CFG(**GUIDANCE))

    def trace(guidance: CFG) -> softcfg.Trace:
        return softcfg.trace(generator, labels=[1, 4], tokens=tokens, guidance=guidance)

    plain, soft, off = trace(CFG(**GUIDANCE)), trace(method(**GUIDANCE)), trace(method(**GUIDANCE, strength=0.0))
    for name in ("cond_logits", "uncond_logits", "guided_logits"):
        assert torch.equal(getattr(off, name), getattr(plain, name))
    assert torch.equal(soft.cond_logits, plain.cond_logits)
    difference = (soft.uncond_logits - plain.uncond_logits).abs().amax(-1)
    assert difference[:, 0].max() < 1e-5  # there is no token to weight yet
    assert difference[:, 2:].min() > 1e-3
    assert (soft.guided_logits - plain.guided_logits)[:, 100:].abs().amax(-1).min() > 1e-2


def test_forced_tokens_are_those_given_where_the_mask_says_so(short: Generator) -> None:
    """`generate(tf_tokens, prob)` replaces the drawn token where a mask, uniform < prob, is true."""
    guidance = SoftCFG(**GUIDANCE)
    torch.manual_seed(0)
    tf_tokens = torch.randint(short.vocab_size, (2, short.num_tokens, 1))
    mask = torch.rand(2, short.num_tokens, 1) < 0.7
    forcing = {"forced_tokens": tf_tokens.squeeze(-1), "forced_mask": mask.squeeze(-1)}
    tokens = sample(short, guidance, **forcing)
    assert torch.equal(tokens[forcing["forced_mask"]], forcing["forced_tokens"][forcing["forced_mask"]])

    # Elsewhere they are what is drawn after that very history.
    trace = softcfg.trace(short, labels=[1, 4], tokens=tokens, guidance=guidance, temperature=TEMPERATURE)
    probabilities = Sampling(TEMPERATURE).probabilities(trace.guided_logits)
    uniforms = image_uniforms(0, [0, 1], short.num_tokens)
    drawn = draw(probabilities.flatten(0, 1), uniforms.flatten()).view(2, -1)
    free = ~forcing["forced_mask"]
    assert torch.equal(tokens[free], drawn[free])
    assert not torch.equal(tokens[free], sample(short, guidance)[free])


def test_the_probabilities_zero_and_one(short: Generator) -> None:
    guidance = CFG(**GUIDANCE)
    given = torch.randint(short.vocab_size, (2, short.num_tokens))
    mask = torch.rand(given.shape)
    assert torch.equal(sample(short, guidance, forced_tokens=given, forced_mask=mask < 1), given)
    drawn = sample(short, guidance)
    assert torch.equal(sample(short, guidance, forced_tokens=given, forced_mask=mask < 0), drawn)
