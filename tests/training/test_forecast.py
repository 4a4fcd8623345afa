"""What a dry run counts, against the weights that are built and the FLOPs that torch counts."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from omniform.modeling.config import parse_config
from omniform.modeling.folder import build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.vocabulary import Vocabulary
from omniform.training.config import TrainConfig
from omniform.training.forecast import forecast


@pytest.fixture
def vocabulary(config_file: Path) -> Vocabulary:
    config = parse_config(TrainConfig, config_file.read_text())
    return build_vocabulary({name: load_modality(folder) for name, folder in config.tokenizers.items()})


@pytest.mark.parametrize(
    "decoder", ["norm: pre", "norm: sandwich", "experts: {kind: topk, n: 8, k: 3}"], ids=["pre", "sandwich", "topk"]
)
def test_forecast_flops_are_those_that_torch_counts(config_file: Path, vocabulary: Vocabulary, decoder: str) -> None:
    key, _, value = decoder.partition(": ")
    config = parse_config(TrainConfig, config_file.read_text(), [f"model.decoder.{key}={value}"])
    network = UnifiedModel(config.model, vocabulary)
    tokens = config.data.row_length - 1  # text_logits adds the begin marker
    # The counter knows matrix products, so attention must be made of them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.text_logits(torch.zeros(1, tokens, dtype=torch.int64)).sum().backward()
    counted = counter.get_total_flops()
    # Heads of other modalities are not run here, and the forecast counts every id of the vocabulary in its head.
    unused = 6 * 32 * (network.vocabulary.size - network.vocabulary.text_size) * config.data.row_length
    figures = forecast(network, config, 1, free_disk=10**12)
    per_row = figures.flops_per_step / config.rows_per_step
    assert per_row - unused == pytest.approx(counted, rel=0.05)


def test_forecast_holds_the_experts_of_every_modality_and_runs_one_per_row(
    config_file: Path, vocabulary: Vocabulary
) -> None:
    figures = []
    for kind in ("shared", "modality"):
        config = parse_config(TrainConfig, config_file.read_text(), [f"model.decoder.experts={kind}"])
        with torch.device("meta"):
            model = UnifiedModel(config.model, vocabulary)
        figures.append(forecast(model, config, 1, free_disk=10**12))
    shared, experts = figures
    decoder = config.model.decoder
    feed_forward = 3 * decoder.dim * decoder.ffn_dim * decoder.n_layers
    n_shared = sum(shared.parameters.values())
    assert sum(experts.parameters.values()) == n_shared + (len(vocabulary.names) - 1) * feed_forward
    assert experts.active_parameters == shared.active_parameters == n_shared
    assert experts.flops_per_step == shared.flops_per_step
    assert experts.checkpoint_bytes > shared.checkpoint_bytes
    assert f"{n_shared:,} of them active in a row" in experts.text(1)
    assert "active" not in shared.text(1)


def test_forecast_holds_every_expert_and_runs_those_that_a_row_chooses(
    config_file: Path, vocabulary: Vocabulary
) -> None:
    figures = []
    for experts in ("shared", "{kind: topk, n: 8, k: 2}"):
        config = parse_config(TrainConfig, config_file.read_text(), [f"model.decoder.experts={experts}"])
        with torch.device("meta"):
            model = UnifiedModel(config.model, vocabulary)
        figures.append(forecast(model, config, 1, free_disk=10**12))
    shared, routed = figures
    decoder = config.model.decoder
    feed_forward, router = 3 * decoder.dim * decoder.ffn_dim * decoder.n_layers, 8 * decoder.dim * decoder.n_layers
    n_shared = sum(shared.parameters.values())
    assert sum(routed.parameters.values()) == n_shared + 7 * feed_forward + router
    assert routed.active_parameters == n_shared + feed_forward + router
    tokens = routed.tokens_per_step
    assert routed.flops_per_step - shared.flops_per_step == 6 * (feed_forward + router) * tokens
    assert routed.activation_bytes == pytest.approx(shared.activation_bytes * (15 + 2 * 19) / 34)
    assert f"{n_shared + feed_forward + router:,} of them active in a row" in routed.text(1)
