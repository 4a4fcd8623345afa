"""Tasks that cut a text: rows are planned before a cut is drawn, and cuts are a function of the visit alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, SourceConfig, arrange
from omniform.data.schema import DataError
from omniform.modeling.config import ConfigError, parse_config
from omniform.modeling.denoisers import Denoiser, Middle, Prefix, Spans
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.sequence import MultimodalSequence, Role
from omniform.tokenizers.base import Discrete, Modality
from omniform.tokenizers.vocabulary import Vocabulary

DENOISERS: dict[str, Denoiser] = {
    "r": Spans(rate=0.4, mean_length=2),
    "s": Prefix(),
    "fill": Middle(mode="m"),
}
VOCABULARY = Vocabulary(256, {"image": Discrete(16)}, modes=["r", "s", "m"])
TASKS = {"text~r": 1.0, "text~s": 2.0, "text~fill": 1.0}
MARKERS = {VOCABULARY.begin("text", f"mode:{mode}"): name for mode, name in (("r", "r"), ("s", "s"), ("m", "fill"))}


@pytest.fixture
def make(
    tmp_path: Path, tokenizers: dict[str, Modality], objectives: dict[str, Any], write_pairs: Callable[..., Path]
) -> Callable[..., TrainingData]:
    """Make a loader over 90 texts of two to seven letters."""
    write_pairs(tmp_path / "texts", 90)

    def build(**changes: Any) -> TrainingData:
        keywords: dict[str, Any] = {"tasks": TASKS, "row_length": 64, "denoisers": DENOISERS, "seed": 0, "dropout": 0.5}
        given = {**keywords, "objectives": objectives, "rows_per_step": 4, **changes}
        source = SourceConfig(path=tmp_path / "texts", tasks=given["tasks"])
        return TrainingData(
            DataConfig(sources=(source,), row_length=given["row_length"], condition_dropout=given["dropout"]),
            given.get("tokenizers", tokenizers),
            given.get("vocabulary", VOCABULARY),
            given["objectives"],
            seed=given["seed"],
            cache_dir=tmp_path / "cache",
            rows_per_step=given["rows_per_step"],
            denoisers=given["denoisers"],
        )

    return build


def sequences(data: TrainingData, n_steps: int) -> list[MultimodalSequence]:
    return [sequence for step in range(n_steps) for row in data.rows(step) for sequence in row]


def test_every_document_has_the_length_that_was_planned(make: Callable[..., TrainingData]) -> None:
    data = make()
    stage, seen = data.stage_rows(0), 0
    draws, rows = stage.plan(0)
    for number, row in enumerate(rows[: 4 * 60]):
        built = data.rows(number // 4)[number % 4]
        for draw, sequence in zip(row, built, strict=True):
            planned = stage.lengths[0][draws.task[draw], int(draws.unconditional[draw]), draws.sample[draw]]
            assert len(sequence) == planned
            assert sequence.noise_key == draws.noise_key[draw]
            seen += 1
    assert seen > 200


def test_a_document_is_the_whole_text_in_its_tasks_mode(make: Callable[..., TrainingData]) -> None:
    data = make()
    draws = data.stage_rows(0).mixture.window(0)
    by_key = {int(key): place for place, key in enumerate(draws.noise_key)}
    modes = list(TASKS)
    for sequence in sequences(data, 40):
        draw = by_key[sequence.noise_key]
        sample, task = int(draws.sample[draw]), modes[draws.task[draw]]
        text = f"t{sample}{'x' * (sample % 5)}"
        letters = sorted(chr(token) for token in sequence.token_ids if token < 256)
        assert letters == sorted(text)
        (mode,) = [MARKERS[int(token)] for token in sequence.token_ids if int(token) in MARKERS]
        assert task == f"text~{mode}"
        assert sequence.spans[-1].role is Role.TARGET


def test_cuts_are_a_function_of_the_visit_and_differ_between_visits(make: Callable[..., TrainingData]) -> None:
    first = {one.noise_key: one.token_ids.tolist() for one in sequences(make(), 40)}
    again = {one.noise_key: one.token_ids.tolist() for one in sequences(make(rows_per_step=8), 20)}
    assert first == again
    one_text = make(tasks={"text~fill": 1.0})
    draws = one_text.stage_rows(0).mixture.window(0)
    keys = {int(key) for key, sample in zip(draws.noise_key, draws.sample, strict=True) if sample == 9}
    cuts = {tuple(one.token_ids.tolist()) for one in sequences(one_text, 60) if one.noise_key in keys}
    assert len(cuts) > 3


def test_the_digest_knows_the_denoisers(make: Callable[..., TrainingData]) -> None:
    data = make()
    other = make(denoisers={**DENOISERS, "r": Spans(rate=0.5, mean_length=2)})
    assert data.digest == make().digest != other.digest
    with pytest.raises(DataError, match="stands in data"):
        other.restore(data.position(3))


def test_a_text_too_short_for_a_cut_is_a_counted_hole(
    tmp_path: Path, make: Callable[..., TrainingData], write_pairs: Callable[..., Path]
) -> None:
    from omniform.data.schema import RawSample, RawSpan
    from omniform.data.shards import ShardWriter

    (tmp_path / "texts").rename(tmp_path / "others")
    with ShardWriter(tmp_path / "texts") as writer:
        for key, text in (("a", "x"), ("b", "xy"), ("c", "")):
            writer.write(RawSample(key, (RawSpan("text", text=text),)))
    assert [*make().unserved.values()] == [2, 2, 2]


def test_a_task_names_a_modality_and_a_denoiser() -> None:
    assert arrange("text~r", ["image", "text", "text"]) == [(1, Role.TARGET)]
    assert arrange("text~r", ["image"]) == []
    for task in ("text~", "~r", "text~r~s", "a->b~r"):
        with pytest.raises(ConfigError, match=r"expected modalities such as .* or a modality and a denoiser"):
            parse_config(SourceConfig, f"path: x\ntasks: {{{task!r}: 1}}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"text~x": 1.0}}, r"task text~x needs model\.denoisers\.x; there is r, s, fill"),
        ({"denoisers": None}, r"needs model\.denoisers\.r; there is none"),
        ({"tasks": {"image~r": 1.0}}, r"model\.objectives\.image is for spans of one length: expected next_token"),
        ({"tasks": {"speech~r": 1.0}}, "needs a tokenizer for 'speech'"),
        ({"objectives": {"text": Masked(), "image": Masked()}}, r"model\.objectives\.text is for masked: expected"),
        ({"row_length": 12}, "takes .* tokens in the task text~r, a row holds 12"),
    ],
)
def test_a_task_that_cannot_be_learnt_is_refused(
    make: Callable[..., TrainingData], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_codes_of_several_codebooks_are_not_cut(
    make: Callable[..., TrainingData], tokenizers: dict[str, Modality], objectives: dict[str, Any]
) -> None:
    """Refused by what the vocabulary says, before anything is read."""
    changes = {
        "tokenizers": {**tokenizers, "speech": tokenizers["image"]},
        "vocabulary": Vocabulary(256, {"image": Discrete(16), "speech": Discrete(4, 2)}, ["speech"], ["r", "s", "m"]),
        "objectives": {**objectives, "speech": NextToken()},
    }
    with pytest.raises(DataError, match=r"task speech~r cuts .* speech has several codes a frame"):
        make(tasks={"speech~r": 1.0}, **changes)
