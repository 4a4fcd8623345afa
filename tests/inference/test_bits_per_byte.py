"""What benchmarks/objectives_text.py says that a text costs, against other ways to the same number."""

import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omniform.inference.generate import Model
from omniform.modeling.attention_pattern import AttentionPattern
from omniform.modeling.folder import LoadedModel
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import EARLIEST_TIME, Masked
from omniform.modeling.objectives.next_token import NextToken

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "objectives_text.py"))
TEXTS = ["a seven", "8", "the digit one moving up"]


def with_text(omni: Model, objective: Any) -> Model:
    """The same weights under another objective of text."""
    network = omni.network
    config = replace(network.config, objectives={**network.config.objectives, "text": objective})
    other = UnifiedModel(config, network.vocabulary)
    other.load_state_dict(network.state_dict())
    return Model(LoadedModel(other, omni.tokenizers, {"max_sequence_length": 64}))


def test_next_token_costs_what_each_token_costs_after_those_before_it(omni: Model) -> None:
    model = with_text(omni, NextToken())
    network = model.network.eval()
    begin, ids = network.vocabulary.begin("text"), network.vocabulary.target_range("text")
    for text, cost in zip(TEXTS, BENCH["bits"](model, TEXTS), strict=True):
        read, expected = [begin], 0.0
        for token in [*text.encode(), network.vocabulary.end_of("text")]:
            rows = torch.tensor([read])
            same, no, places = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool), torch.arange(len(read))
            positions = places[None, :, None].expand(1, -1, 3)
            with torch.no_grad():
                hidden = network.hidden(rows, same, places[None], positions, AttentionPattern(same, same, no, no))
                expected -= float(network.logits(hidden[0, -1], ids).log_softmax(-1)[token]) / math.log(2)
            read.append(token)
        assert cost == pytest.approx(expected, rel=1e-5)


def test_the_bound_of_a_model_that_knows_nothing_is_what_all_contents_cost(
    omni: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Masked(schedule="linear", masking="independent", weighting="elbo", block_size=12)
    model = with_text(omni, objective)
    monkeypatch.setitem(BENCH["bits"].__globals__, "N_DRAWS", 512)
    with torch.no_grad():
        model.network.interface.head.weight.zero_()
    n_ids = len(model.network.vocabulary.target_range("text"))
    for text, cost in zip(TEXTS, BENCH["bits"](model, TEXTS), strict=True):
        n_blocks = -(-(len(text) + 1) // 12)
        # A weight 1 / t on a content hidden with probability t has the variance ln(1 / EARLIEST_TIME) - 1 or so.
        tolerance = 5 * math.sqrt(math.log(1 / EARLIEST_TIME) / 512)
        assert cost == pytest.approx(12 * n_blocks * math.log2(n_ids) * (1 - EARLIEST_TIME), rel=tolerance)


def test_bits_per_byte_weigh_texts_by_their_bytes() -> None:
    found = BENCH["per_byte"](np.array([8.0, 8.0] * 20), np.array([2, 6] * 20))
    assert found["value"] == 2.0
    low, high = found["ci95"]
    assert 8 / 6 < low < 2 < high < 4
    alike = BENCH["per_byte"](np.full(9, 3.0), np.full(9, 6))
    assert alike == {"value": 0.5, "ci95": [0.5, 0.5]}
