"""Feed-forward experts by modality, against each row sent through its own by itself."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import FOUR_MODALITIES, four_modalities, image_part, speech_part, text_part

from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig, parse_config
from omniform.modeling.corruption import corrupt
from omniform.modeling.experts import ModalityExperts, Routes
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.vocabulary import Vocabulary

N_EXPERTS = 4
CONFIG = DecoderConfig(dim=8, n_heads=2, n_kv_heads=2, ffn_dim=12)
EXPERT_IDS = st.lists(st.lists(st.integers(0, N_EXPERTS - 1), min_size=3, max_size=3), min_size=1, max_size=4)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return four_modalities()


@pytest.fixture
def model_config(model_config: ModelConfig) -> ModelConfig:
    return replace(
        model_config,
        decoder=replace(model_config.decoder, experts="modality"),
        objectives={**model_config.objectives, "speech": NextToken(), "video": Masked(steps=2)},
    )


@settings(max_examples=50)
@given(expert_ids=EXPERT_IDS, seed=st.integers(0, 99), inference=st.booleans())
def test_each_row_goes_through_the_expert_that_it_names(
    expert_ids: list[list[int]], seed: int, inference: bool
) -> None:
    torch.manual_seed(seed)
    layer, ids = ModalityExperts(CONFIG, N_EXPERTS), torch.tensor(expert_ids)
    x = torch.randn(*ids.shape, CONFIG.dim, requires_grad=True)
    slow = torch.stack([layer.experts[i](row) for row, i in zip(x.flatten(0, 1), ids.flatten(), strict=True)])
    with torch.inference_mode(inference):
        fast = layer(x, Routes.of(ids, N_EXPERTS))
    torch.testing.assert_close(fast, slow.view_as(x), atol=1e-6, rtol=1e-5)
    if inference:
        return
    towards = torch.randn_like(x)
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad((slow.view_as(x) * towards).sum(), wanted, allow_unused=True)
    for found, own in zip(torch.autograd.grad((fast * towards).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if own is None else own, atol=1e-5, rtol=1e-4)


def test_an_expert_without_rows_stays_finite_whatever_the_rows_of_others_hold() -> None:
    layer, ids = ModalityExperts(CONFIG, N_EXPERTS), torch.tensor([[0, 2, 2]])
    x = torch.full((1, 3, CONFIG.dim), math.nan, requires_grad=True)
    layer(x, Routes.of(ids, N_EXPERTS)).sum().backward()
    for number, expert in enumerate(layer.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.isnan().all() if number in (0, 2) else (parameter.grad == 0).all())


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=FOUR_MODALITIES)
def test_every_row_of_a_span_belongs_to_its_modality(model: UnifiedModel, parts: list[Part]) -> None:
    """Its begin marker, its noised copy and its end as well as its codes; a masked row's id would not tell."""
    vocabulary, objectives = model.vocabulary, model.config.objectives
    sequence = MultimodalSequence.build(parts, vocabulary, objectives, noise_key=1)
    packed = pack([[sequence]], len(sequence) + 2, vocabulary)
    modality_ids = corrupt(packed, vocabulary, objectives).modality_ids[0].tolist()
    expected: list[int] = []
    for span in sequence.spans:
        expected += [vocabulary.names.index(span.modality)] * (span.start + span.length - len(expected))
    padding = [vocabulary.names.index("text")] * 2
    assert modality_ids == expected + padding


def test_an_expert_learns_from_the_rows_of_its_modality_alone(model: UnifiedModel) -> None:
    """Images are learnt, texts given: nothing of a text's rows reaches the image expert, nor speech or video theirs."""
    vocabulary, objectives = model.vocabulary, model.config.objectives
    parts = [text_part([1, 2], Role.CONTEXT), image_part([0, 1, 2, 3], Role.TARGET)]
    sequence = MultimodalSequence.build(parts, vocabulary, objectives)
    batch = corrupt(pack([[sequence]], len(sequence) + 3, vocabulary), vocabulary, objectives)
    rows_of: dict[int, list[torch.Tensor]] = {number: [] for number in range(N_EXPERTS)}
    for block in model.decoder.blocks:
        for number, expert in enumerate(block.feed_forward.experts):
            expert.register_forward_hook(lambda _, args, __, number=number: rows_of[number].append(args[0]))
    sum(model(batch).values()).backward()
    n_text = 1 + len("12") + 1 + 3  # marker, ids, end, padding
    assert [[len(rows) for rows in found] for found in rows_of.values()] == [[n_text] * 2, [5] * 2, [1] * 2, [1] * 2]
    for block in model.decoder.blocks:
        sizes = [sum(p.grad.abs().sum() for p in expert.parameters()) for expert in block.feed_forward.experts]
        last = block is model.decoder.blocks[-1]
        assert sizes[1] > 0
        assert sizes[2] == sizes[3] == 0
        assert (sizes[0] == 0) == last  # what texts hold reaches the images through the attention of a later block


def test_changing_one_expert_changes_the_rows_of_its_modality_alone_in_the_last_block(model: UnifiedModel) -> None:
    vocabulary, objectives = model.vocabulary, model.config.objectives
    parts = [text_part([1, 2], Role.CONTEXT), speech_part([3], Role.CONTEXT), image_part([0, 1, 2, 3], Role.TARGET)]
    sequence = MultimodalSequence.build(parts, vocabulary, objectives)
    batch = corrupt(pack([[sequence]], len(sequence), vocabulary), vocabulary, objectives)
    given_ids = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids, batch.pattern)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decoder.blocks[-1].feed_forward.experts[2].up.weight.add_(1.0)
        changed = (model.hidden(*given_ids) != other.hidden(*given_ids)).any(-1)
    assert torch.equal(changed, batch.modality_ids == vocabulary.place_of("speech"))


def test_experts_start_as_other_layers_do(vocabulary: Vocabulary) -> None:
    decoder = DecoderConfig(dim=64, n_layers=8, n_heads=2, n_kv_heads=2, ffn_dim=128, experts="modality")
    names = dict.fromkeys(vocabulary.names, NextToken())
    torch.manual_seed(0)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives=names), vocabulary)
    for block in model.decoder.blocks:
        for expert in block.feed_forward.experts:
            assert expert.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert expert.gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert expert.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    firsts = {float(p.detach()[0, 0]) for name, p in model.named_parameters() if name.endswith("up.weight")}
    assert len(firsts) == 8 * 4


def test_a_config_from_before_there_were_experts_has_none(vocabulary: Vocabulary) -> None:
    config = parse_config(ModelConfig, f"objectives: {{{', '.join(f'{n}: next_token' for n in vocabulary.names)}}}")
    assert config.decoder.experts == "shared"
    names = {name for name, _ in UnifiedModel(config, vocabulary).named_parameters()}
    assert "decoder.blocks.0.feed_forward.gate.weight" in names
    assert not any("experts" in name for name in names)


def test_a_kind_of_experts_that_there_is_not_is_refused() -> None:
    text = "objectives: {text: next_token}\ndecoder: {experts: routed}"
    with pytest.raises(ConfigError, match=r"decoder\.experts: given 'routed', expected shared, modality, topk or"):
        parse_config(ModelConfig, text)
