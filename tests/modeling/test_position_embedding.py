"""Learnt positions: each row of a span of a named modality has its own vector, and no other row has any."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_codecs import small_tokenizers
from strategies import FOUR_MODALITIES, four_modalities

from omniform.modeling.config import ConfigError, ModelConfig
from omniform.modeling.folder import ModelFolderError, check_position_embeddings
from omniform.modeling.interfaces import PositionEmbedding
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence
from omniform.tokenizers.vocabulary import Vocabulary


@pytest.fixture
def vocabulary() -> Vocabulary:
    return four_modalities()


@pytest.fixture
def model_config(model_config: ModelConfig) -> ModelConfig:
    return replace(
        model_config, objectives={**model_config.objectives, "speech": NextToken(), "video": Masked(steps=2)}
    )


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=20))
def test_each_row_has_the_vector_of_its_modality_and_position(rows: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    embedding = PositionEmbedding({1: 5, 3: 7}, dim=4)
    modality_ids, span_positions = (torch.tensor([values]) for values in zip(*rows, strict=True))
    found = embedding(modality_ids, span_positions)[0]
    for (modality, place), vector in zip(rows, found, strict=True):
        table = dict(embedding.tables.named_parameters())
        expected = table[f"{modality}.weight"][place] if modality in (1, 3) else torch.zeros(4)
        assert torch.equal(vector, expected)


def test_a_span_that_is_too_long_is_an_error() -> None:
    with pytest.raises(IndexError):
        PositionEmbedding({1: 5}, dim=4)(torch.tensor([[1]]), torch.tensor([[6]]))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=FOUR_MODALITIES)
def test_span_positions_count_the_rows_of_each_span_and_of_both_its_copies(model: UnifiedModel, parts: list) -> None:
    sequence = MultimodalSequence.build(parts, model.vocabulary, model.config.objectives)
    expected = np.zeros(len(sequence), dtype=np.int64)
    for span in sequence.spans:
        expected[span.start : span.start + span.length] = np.arange(1, span.length + 1)
    np.testing.assert_array_equal(sequence.span_positions, expected)
    packed = pack([[sequence, sequence]], 2 * len(sequence) + 3, model.vocabulary)
    np.testing.assert_array_equal(packed.span_positions[0], [*expected, *expected, 0, 0, 0])


def test_positions_of_unknown_modalities_and_other_lengths_are_refused(
    model_config: ModelConfig, vocabulary: Vocabulary
) -> None:
    with pytest.raises(ConfigError, match="smell"):
        UnifiedModel(replace(model_config, position_embeddings={"smell": 4}), vocabulary)
    tokenizers = small_tokenizers()
    check_position_embeddings(replace(model_config, position_embeddings={"image": 16}), tokenizers)
    with pytest.raises(ModelFolderError, match=r"position_embeddings\.image is 15, but its tokenizer makes 16 tokens"):
        check_position_embeddings(replace(model_config, position_embeddings={"image": 15}), tokenizers)
    with pytest.raises(ModelFolderError, match="speech is 9, but its tokenizer makes spans of free length"):
        check_position_embeddings(replace(model_config, position_embeddings={"speech": 9}), tokenizers)
