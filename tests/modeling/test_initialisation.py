"""The deviations of fresh weights against each paper's closed form, every matrix by its name."""

import math

import pytest
import torch

from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig, TopK, parse_config
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Discrete
from omniform.tokenizers.vocabulary import Vocabulary

N_LAYERS, DIM, FFN, KEYS = 3, 96, 160, 48
FAN = {"query": 2 * DIM, "key": DIM + KEYS, "value": DIM + KEYS, "out": 2 * DIM} | dict.fromkeys(
    ("gate", "up", "down"), DIM + FFN
)
GAIN = math.sqrt(math.log(2 * N_LAYERS))


def expected(init: str, layer: int, matrix: str) -> float:
    """The deviation of a matrix of block `layer`, from 0."""
    match init:
        case "gpt2":
            return 0.02 / math.sqrt(2 * N_LAYERS) if matrix in ("out", "down") else 0.02
        case "normal":
            return 0.02
        case "ds":
            return 0.02 / math.sqrt(layer + 1)
        case _:
            gain = GAIN if matrix in ("value", "out", "up", "down") else 1.0
            return gain * math.sqrt(2 / FAN[matrix])


@pytest.mark.parametrize("experts", ["shared", TopK(n=2, k=1)], ids=["shared", "topk"])
@pytest.mark.parametrize(
    ("norm", "init"), [("pre", None), ("pre", "gpt2"), ("post", "normal"), ("pre", "ds"), ("sub_ln", None)]
)
def test_every_matrix_has_the_deviation_that_its_name_asks_for(norm: str, init: str | None, experts: object) -> None:
    decoder = DecoderConfig(
        dim=DIM, n_layers=N_LAYERS, n_heads=4, n_kv_heads=2, ffn_dim=FFN, norm=norm, init=init, experts=experts
    )
    torch.manual_seed(0)
    config = ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked()})
    model = UnifiedModel(config, Vocabulary(200, {"image": Discrete(8)}))
    kind = init or ("magneto" if norm == "sub_ln" else "gpt2")
    found = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        *_, matrix, _ = name.split(".")
        in_block = name.startswith("decoder.blocks.") and matrix != "router"
        wanted = expected(kind, int(name.split(".")[2]), matrix) if in_block else 0.02
        if matrix == "router" and kind == "ds":
            wanted = expected("ds", int(name.split(".")[2]), matrix)
        # Of n numbers from a normal distribution the deviation is off by 1 / sqrt(2 n); five of these.
        assert parameter.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * parameter.numel())), name
        assert abs(parameter.mean().item()) < 5 * wanted / math.sqrt(parameter.numel()), name
        found += in_block
    assert found == N_LAYERS * (4 + 3 * (1 if experts == "shared" else 2))


def test_magneto_is_for_sub_ln_alone() -> None:
    with pytest.raises(ConfigError, match=r"decoder: init is magneto, .* norm: post: change one of them"):
        parse_config(ModelConfig, "objectives: {text: next_token}\ndecoder: {norm: post, init: magneto}")
