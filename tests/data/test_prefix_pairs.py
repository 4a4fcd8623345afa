"""Pairs whose given part is read as one block: every row of it sees all of it, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, SourceConfig
from omniform.modeling.config import ConfigError, parse_config
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Role
from omniform.tokenizers.base import Discrete, Modality
from omniform.tokenizers.vocabulary import Vocabulary
from omniform.training.config import TrainConfig

VOCABULARY = Vocabulary(256, {"image": Discrete(16)})
RECIPE = """
name: pairs
steps: 2
tokenizers: {text: text, image: image}
model:
  given: bidirectional
  objectives: {text: {kind: next_token}, image: {kind: masked}}
data:
  sources:
    - {path: train, tasks: {image->text: 1.0}}
"""


@pytest.fixture
def make(
    tmp_path: Path,
    tokenizers: dict[str, Modality],
    objectives: dict[str, Any],
    write_pairs: Callable[..., Path],
) -> Callable[..., TrainingData]:
    """Make a loader of pairs, half of which lose what is given."""
    write_pairs(tmp_path / "pairs", 60)

    def build(*, prefix: bool) -> TrainingData:
        source = SourceConfig(path=tmp_path / "pairs", tasks={"text->image": 1.0, "image->text": 1.0})
        config = DataConfig(sources=(source,), row_length=32, condition_dropout=0.5)
        keywords: dict[str, Any] = {"seed": 0, "cache_dir": tmp_path / "cache", "rows_per_step": 4, "prefix": prefix}
        return TrainingData(config, tokenizers, VOCABULARY, objectives, **keywords)

    return build


def documents(data: TrainingData) -> list[MultimodalSequence]:
    return [sequence for step in range(8) for row in data.rows(step) for sequence in row]


def test_what_is_given_is_one_block_and_the_rest_stays(make: Callable[..., TrainingData]) -> None:
    n_given = 0
    for causal, prefix in zip(documents(make(prefix=False)), documents(make(prefix=True)), strict=True):
        for same in ("token_ids", "modality_ids", "span_positions", "position_ids", "private", "noise_key"):
            np.testing.assert_array_equal(getattr(causal, same), getattr(prefix, same))
        assert causal.spans == prefix.spans
        length = len(prefix)
        before, after = (pack([[one]], length, VOCABULARY).pattern.allowed()[0] for one in (causal, prefix))
        given = [span for span in prefix.spans if span.role is Role.CONTEXT]
        first = given[0].start + given[0].length if given else 0
        assert after[:first, :first].all()
        assert not after[:first, first:].any()
        np.testing.assert_array_equal(before[first:], after[first:])
        n_given += bool(given)
    assert 10 < n_given < len(documents(make(prefix=True)))


def test_the_digest_knows_how_what_is_given_is_read(make: Callable[..., TrainingData]) -> None:
    assert make(prefix=True).digest != make(prefix=False).digest


def test_documents_that_learn_every_part_have_no_prefix() -> None:
    assert parse_config(TrainConfig, RECIPE).model.given == "bidirectional"
    with pytest.raises(ConfigError, match=r"sources\.0 \(train\): the task interleaved learns every part, .*given is"):
        parse_config(TrainConfig, RECIPE.replace("image->text", "interleaved"))
    with pytest.raises(ConfigError, match=r"next_span_weight is 0\.1 with given: bidirectional"):
        parse_config(TrainConfig, RECIPE, ["model.next_span_weight=0.1"])
    with pytest.raises(ConfigError, match=r"model\.given: Input should be 'causal' or 'bidirectional'"):
        parse_config(TrainConfig, RECIPE, ["model.given=both"])
