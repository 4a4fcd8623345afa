"""Tasks about subsets: rows are planned by what each visit draws, and cuts are a function of the visit alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, SourceConfig, arrange
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.modeling.config import ConfigError, parse_config
from omniform.modeling.sequence import MultimodalSequence, Role
from omniform.modeling.subsets import AnySubset
from omniform.tokenizers.base import Discrete, Modality
from omniform.tokenizers.vocabulary import Vocabulary

SUBSETS = {
    "whole": AnySubset(input_budget=8, target_budget=8, input_alpha=0.05),
    "parts": AnySubset(input_budget=(0, 9), target_budget=(1, 6)),
}
VOCABULARY = Vocabulary(256, {"image": Discrete(16)})
TASKS = {"text+image~whole": 1.0, "image+text~parts": 2.0}


@pytest.fixture
def make(
    tmp_path: Path, tokenizers: dict[str, Modality], objectives: dict[str, Any], write_pairs: Callable[..., Path]
) -> Callable[..., TrainingData]:
    """Make a loader over 90 pairs of a text of two to seven letters and four codes."""
    write_pairs(tmp_path / "pairs", 90)

    def build(**changes: Any) -> TrainingData:
        keywords: dict[str, Any] = {"tasks": TASKS, "row_length": 48, "subsets": SUBSETS, "rows_per_step": 4}
        given = {**keywords, **changes}
        source = SourceConfig(path=tmp_path / "pairs", tasks=given["tasks"])
        return TrainingData(
            DataConfig(sources=(source,), row_length=given["row_length"], condition_dropout=0.5),
            tokenizers,
            VOCABULARY,
            objectives,
            seed=0,
            cache_dir=tmp_path / "cache",
            rows_per_step=given["rows_per_step"],
            subsets=given["subsets"],
        )

    return build


def sequences(data: TrainingData, n_steps: int) -> list[MultimodalSequence]:
    return [sequence for step in range(n_steps) for row in data.rows(step) for sequence in row]


def test_rows_are_filled_by_what_is_drawn(make: Callable[..., TrainingData]) -> None:
    """The most that a document can take is 17 rows; had rows been planned by that, none would hold more than two."""
    data = make()
    rows = [row for step in range(40) for row in data.rows(step)]
    assert all(sum(map(len, row)) <= 48 for row in rows)
    filled = sum(len(sequence) for row in rows for sequence in row) / (48 * len(rows))
    assert filled > 0.9
    assert max(map(len, rows)) > 4


def test_a_document_holds_tokens_of_its_sample_and_learns_some(make: Callable[..., TrainingData]) -> None:
    data = make()
    draws = data.stage_rows(0).mixture.window(0)
    by_key = {int(key): place for place, key in enumerate(draws.noise_key)}
    for sequence in sequences(data, 40):
        draw = by_key[sequence.noise_key]
        sample = int(draws.sample[draw])
        text = f"t{sample}{'x' * (sample % 5)}"
        order = {"text": 0, "image": 1} if draws.task[draw] == 0 else {"image": 0, "text": 1}
        for role in Role:
            names = [span.modality for span in sequence.spans if span.role is role]
            assert names == sorted(names, key=order.__getitem__)
            for span in sequence.spans:
                ids = sequence.token_ids[span.start : span.start + span.length]
                places = sequence.span_positions[span.start : span.start + span.length] - 1
                if span.modality == "text":
                    whole = [*map(ord, text), VOCABULARY.end]
                else:
                    whole = [VOCABULARY.target_range("image").start + (sample >> shift & 15) for shift in (12, 8, 4, 0)]
                assert ids.tolist() == [whole[place] for place in places]
        assert any(span.role is Role.TARGET for span in sequence.spans)


def test_cuts_are_a_function_of_the_visit_and_differ_between_visits(make: Callable[..., TrainingData]) -> None:
    data = make()
    first = {one.noise_key: one.token_ids.tolist() for one in sequences(data, 40)}
    again = {one.noise_key: one.token_ids.tolist() for one in sequences(make(rows_per_step=8), 20)}
    assert first == again
    draws = data.stage_rows(0).mixture.window(0)
    visits = zip(draws.noise_key, draws.sample, strict=True)
    cuts = {tuple(first[int(key)]) for key, sample in visits if sample == 9 and int(key) in first}
    assert len(cuts) > 3


def test_the_digest_knows_the_subsets(make: Callable[..., TrainingData]) -> None:
    data = make()
    other = make(subsets={**SUBSETS, "whole": AnySubset(input_budget=7, target_budget=8, input_alpha=0.05)})
    assert data.digest == make().digest != other.digest
    with pytest.raises(DataError, match="stands in data"):
        other.restore(data.position(3))


def test_a_sample_without_one_of_the_modalities_is_a_counted_hole(
    tmp_path: Path, make: Callable[..., TrainingData]
) -> None:
    (tmp_path / "pairs").rename(tmp_path / "others")
    with ShardWriter(tmp_path / "pairs") as writer:
        for key, payload in (("a", b"\x01\x02"), ("b", None), ("c", b"\x03\x04")):
            image = (RawSpan("image", payload=payload, extension="bin"),) if payload else ()
            writer.write(RawSample(key, (RawSpan("text", text=key), *image)))
    assert [*make().unserved.values()] == [1, 1]


def test_a_task_names_modalities_and_a_subset() -> None:
    assert arrange("text+image~any", ["image", "text", "text"]) == [(1, Role.TARGET), (0, Role.TARGET)]
    assert arrange("text+image~any", ["image"]) == []
    for task, message in (
        ("text+~any", "or modalities and a subset"),
        ("text+image~", "or modalities and a subset"),
        ("text+text~any", "names a modality twice, of which a subset has each once"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(SourceConfig, f"path: x\ntasks: {{{task!r}: 1}}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"text+image~x": 1.0}}, r"task text\+image~x needs model\.subsets\.x; there is whole, parts"),
        ({"subsets": None}, r"needs model\.subsets\.whole; there is none"),
        ({"tasks": {"text->image": 1.0}}, "text->image is about no subset, beside which a model with model.subsets"),
        (
            {"subsets": {**SUBSETS, "whole": AnySubset(input_budget=8, target_budget=8, target_alpha={"speech": 1})}},
            r"has no modality with a concentration above 0 in model\.subsets\.whole\.target_alpha",
        ),
        ({"row_length": 12}, r"takes 16 tokens in the task text\+image~whole, a row holds 12"),
    ],
)
def test_a_task_that_cannot_be_learnt_is_refused(
    make: Callable[..., TrainingData], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)
