"""Which tokens are image codes: by their ids, or by the steps that draw them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from plug_models import SHORT, llama, with_large_weights  # noqa: E402
from softcfg import CFG  # noqa: E402
from softcfg.guidance import PERTURBATIONS  # noqa: E402
from softcfg.integrations import transformers as plug  # noqa: E402

T, PROMPTS = 12, torch.tensor([[10, 11, 12, 13, 14], [15, 21, 22, 23, 24]])
CODES, LINE_END = range(20, 60), 15
LINES = (3, 4)  # tokens of a line in each row, with the end
OWN = [name for name, kind in PERTURBATIONS.items() if kind.__module__.startswith("softcfg.") and name != "none"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return with_large_weights(llama())


def is_code(row: int) -> Tensor:
    """Bool [T], the steps of a row that draw a code."""
    return (torch.arange(T) + 1) % LINES[row] != 0


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("name", OWN)
def test_ids_and_steps_draw_the_same(model: Any, name: str, scale: float) -> None:
    """Also where the lines of one row end at other steps than those of the next."""
    perturbation = PERTURBATIONS[name](**({"size": 3} if name == "window" else {}))  # type: ignore[call-arg]
    guidance = CFG(4.0, schedule="constant", perturbation=perturbation, perturbation_scale=scale)
    kinds = torch.stack([is_code(0), is_code(1)])

    def drawn(rows: list[int], codes: Any) -> tuple[Tensor, Tensor]:
        """The tokens, and the guided logits that they are drawn from."""
        seen = []

        def lines(ids: Tensor, logits: Tensor) -> Tensor:
            seen.append(logits)
            end = ~kinds[rows, ids.shape[1] - 5, None]
            token = torch.arange(60)
            return logits.masked_fill(torch.where(end, token != LINE_END, token < CODES[0]), -torch.inf)

        settings = {"num_tokens": T, "unconditional_ids": SHORT, "indices": rows, "logits_processor": [lines]}
        tokens = plug.decode(model, PROMPTS[rows], guidance, image_codes=codes, **settings)
        return tokens, torch.stack(seen, dim=1)

    alone = [drawn([row], is_code(row)) for row in (0, 1)]
    expected, logits = (torch.cat(parts) for parts in zip(*alone, strict=True))
    assert torch.equal(expected == LINE_END, ~kinds)
    by_id = drawn([0, 1], CODES)
    assert torch.equal(by_id[0], expected)
    torch.testing.assert_close(by_id[1], logits, rtol=0, atol=1e-3)
    assert (drawn([0, 1], None)[1] - logits).abs().max() > 0.01  # it matters what is a code
