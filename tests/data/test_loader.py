"""All processes share one endless sequence of rows, which each sample enters once per epoch and any step can start."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniform.data.loader import TrainingData
from omniform.data.mixture import WINDOW, DataConfig, DataStage, Mixture, SourceChange, SourceConfig, arrange
from omniform.data.packing import first_fit
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.kernels.keyed_noise import keyed_bits, stream
from omniform.modeling.config import ConfigError, dump_config, parse_config
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Role
from omniform.tokenizers.base import Modality
from omniform.tokenizers.vocabulary import Vocabulary

BOTH = {"text->image": 1.0, "image->text": 1.0}
ROW_LENGTH = 48
Rows = list[list[MultimodalSequence]]


def keys(rows: Rows) -> list[list[int]]:
    """Identify what rows hold."""
    return [[sequence.noise_key for sequence in row] for row in rows]


@pytest.fixture
def make(
    tmp_path: Path,
    tokenizers: dict[str, Modality],
    byte_vocabulary: Vocabulary,
    objectives: dict[str, Any],
    write_pairs: Callable[..., Path],
) -> Callable[..., TrainingData]:
    """Make a loader over two sources of 300 and 70 samples."""
    write_pairs(tmp_path / "large", 300, per_shard=130)
    write_pairs(tmp_path / "small", 70, {5: b"cannot be decoded"})

    def build(seed: int = 0, rows_per_step: int = 8, stages: Sequence[DataStage] = (), **changes: Any) -> TrainingData:
        sources = (
            SourceConfig(path=tmp_path / "large", weight=3.0, tasks=BOTH),
            SourceConfig(path=tmp_path / "small", weight=1.0, tasks={"text->image": 1.0}),
        )
        config = DataConfig(**{"sources": sources, "row_length": ROW_LENGTH, **changes})
        return TrainingData(
            config,
            tokenizers,
            byte_vocabulary,
            objectives,
            seed=seed,
            cache_dir=tmp_path / "cache",
            rows_per_step=rows_per_step,
            stages=stages,
        )

    return build


@pytest.mark.parametrize(("n_ranks", "n_workers"), [(1, 1), (2, 1), (4, 3), (3, 2)])
def test_each_sample_comes_once_per_epoch_over_ranks_and_workers(
    make: Callable[..., TrainingData], n_ranks: int, n_workers: int
) -> None:
    # Worker w of a rank makes steps w, w + n_workers, ...; each has a loader of its own.
    n_steps, seen = 140, Counter[int]()
    for rank in range(n_ranks):
        for worker in range(n_workers):
            data = make()
            for step in range(worker, n_steps, n_workers):
                rows = data.rows(step, slice(rank, None, n_ranks))
                seen.update(sequence.noise_key for row in rows for sequence in row)
    assert set(seen.values()) == {1}
    for source, size, holes in ((0, 300, set()), (1, 70, {5})):
        visits = {e: [int(keyed_bits(0, stream("data/visit"), source, e, s)) for s in range(size)] for e in range(3)}
        found = {e: {s for s, key in enumerate(visit) if key in seen} for e, visit in visits.items()}
        assert found[0] == found[1] == set(range(size)) - holes


def test_a_draw_is_the_sample_and_task_that_it_says(
    make: Callable[..., TrainingData], byte_vocabulary: Vocabulary
) -> None:
    data = make(condition_dropout=0.3)
    draws = data.stage_rows(0).mixture.window(0)
    by_key = {int(key): place for place, key in enumerate(draws.noise_key)}
    found = [sequence for step in range(20) for row in data.rows(step) for sequence in row]
    for sequence in found:
        draw = by_key[sequence.noise_key]
        sample = int(draws.sample[draw])
        to_image = draws.source[draw] == 1 or draws.task[draw] == 0
        text, image = list(f"t{sample}{'x' * (sample % 5)}".encode()), [sample >> s & 15 for s in (12, 8, 4, 0)]
        given, learnt = (("text", text), ("image", image)) if to_image else (("image", image), ("text", text))
        expected = [(*given, Role.CONTEXT), (*learnt, Role.TARGET)][int(draws.unconditional[draw]) :]
        spans = []
        for span in sequence.spans:
            ids = [
                int(i) for i in sequence.token_ids[span.start : span.start + span.length] if i != byte_vocabulary.end
            ]
            codes = byte_vocabulary.to_codes(span.modality, torch.tensor(ids)).tolist()
            spans.append((span.modality, codes, span.role))
        assert spans == expected
    assert 0.2 < np.mean(draws.unconditional) < 0.4


def test_rows_are_a_pure_function_of_seed_and_step(make: Callable[..., TrainingData]) -> None:
    data, again = make(), make()
    forward = {step: keys(data.rows(step)) for step in range(0, 150, 7)}
    backward = {step: keys(again.rows(step)) for step in reversed(range(0, 150, 7))}
    assert forward == backward
    assert keys(make(seed=1).rows(0)) != forward[0]
    all_rows = keys(data.rows(14))
    assert keys(data.rows(14, slice(1, None, 3))) == all_rows[1::3]
    merged = make(rows_per_step=16)
    assert keys(merged.rows(3)) == keys(data.rows(6)) + keys(data.rows(7))


def test_a_position_continues_exactly_without_replay(make: Callable[..., TrainingData]) -> None:
    data = make()
    expected = {step: keys(data.rows(step)) for step in range(200, 400)}
    resumed = make()
    resumed.restore(json.loads(json.dumps(data.position(300))))
    planned: list[int] = []
    mixture = resumed.stage_rows(0).mixture
    window = mixture.window
    mixture.window = lambda number: (planned.append(number), window(number))[1]  # type: ignore[method-assign]
    assert {step: keys(resumed.rows(step)) for step in range(300, 400)} == {s: expected[s] for s in range(300, 400)}
    assert min(planned) == data.position(300)["window"] > 0
    assert resumed.position(300) == data.position(300)
    # What lies before the position is still the same sequence.
    assert keys(resumed.rows(200)) == expected[200]
    assert keys(resumed.rows(399)) == expected[399]


@pytest.fixture
def staged(make: Callable[..., TrainingData]) -> Callable[..., TrainingData]:
    """Make a loader whose data changes at steps 90 and 200: the small source alone, both, and the other way round."""

    def build(**changes: Any) -> TrainingData:
        config = make().config
        alone = config.changed({"large": SourceChange(weight=0.0)})
        turned = config.changed({"small": SourceChange(weight=9.0, tasks={"image->text": 1.0})})
        return make(stages=(DataStage(0, alone), DataStage(90, config), DataStage(200, turned)), **changes)

    return build


def test_one_stage_is_as_none(make: Callable[..., TrainingData]) -> None:
    plain, staged = make(), make(stages=(DataStage(0, make().config),))
    for step in (0, 50, 149):
        assert keys(plain.rows(step)) == keys(staged.rows(step))


def test_each_stage_draws_its_own_mixture(staged: Callable[..., TrainingData]) -> None:
    data = staged()
    for stage, steps, share, tasks in (
        (0, range(90), 1.0, {0}),
        (1, range(90, 200), 0.25, {0}),
        (2, (200,), 0.75, {0}),
    ):
        rows = data.stage_rows(stage)
        draws = [rows.plan(window)[0] for window in {rows.locate(8 * (step - steps[0]))[0] for step in steps}]
        source = np.concatenate([d.source for d in draws])
        assert np.mean(source == 1) == pytest.approx(share, abs=1e-3)
        assert {int(task) for d in draws for task in d.task[d.source == 1]} == tasks
    found = [sequence.spans for step in range(220, 240) for row in data.rows(step) for sequence in row]
    assert np.mean([spans[-1].modality == "text" for spans in found]) > 0.8  # the small source's task was turned round


def test_sources_go_on_over_stages_and_no_visit_comes_twice(staged: Callable[..., TrainingData]) -> None:
    data = staged()
    seen = Counter(sequence.noise_key for step in range(300) for row in data.rows(step) for sequence in row)
    assert set(seen.values()) == {1}
    # A stage starts where the windows begun before it end: nothing of a source is left out but the rest of a window.
    for number in (1, 2):
        before, after = data.stage_rows(number - 1), data.stage_rows(number)
        first, begun = after.mixture.first_window, before.mixture.first_window
        cursors = before.mixture.cursors(begun) + (first - begun) * before.mixture.quotas
        assert after.mixture.cursors(first).tolist() == cursors.tolist()
        n_steps = data.stages[number].first_step - data.stages[number - 1].first_step
        n_rows = [len(before.plan(window)[1]) for window in range(begun, first)]
        assert sum(n_rows[:-1]) < 8 * n_steps <= sum(n_rows)
    draws = data.stage_rows(2).mixture.window(data.stage_rows(2).mixture.first_window)
    here = draws.source == 0
    expected = data.stage_rows(2).mixture.cursors(data.stage_rows(2).mixture.first_window)[0] + np.arange(here.sum())
    assert draws.epoch[here].tolist() == (expected // 300).tolist()


@pytest.mark.parametrize("step", [45, 90, 91, 150, 200, 260])
def test_a_position_in_any_stage_continues_exactly(staged: Callable[..., TrainingData], step: int) -> None:
    data = staged()
    expected = {s: keys(data.rows(s)) for s in (0, 89, 90, 199, 200, 201, 261, *range(step, step + 3))}
    resumed = staged()
    resumed.restore(json.loads(json.dumps(data.position(step))))
    assert {s: keys(resumed.rows(s)) for s in reversed(expected)} == dict(reversed(expected.items()))
    assert resumed.position(step) == data.position(step)
    other = staged(seed=1)
    with pytest.raises(DataError, match="or start a new run"):
        other.restore(data.position(step))


def test_a_position_of_other_data_is_refused(make: Callable[..., TrainingData], tmp_path: Path) -> None:
    position = make().position(3)
    for other in (make(seed=1), make(row_length=64), make(condition_dropout=0.2)):
        with pytest.raises(DataError, match="or start a new run"):
            other.restore(position)
    with pytest.raises(DataError, match="or start a new run"):
        make().restore({})
    (tmp_path / "large").rename(tmp_path / "moved")
    moved = SourceConfig(path=tmp_path / "moved", weight=3.0, tasks=BOTH)
    make(sources=(moved, SourceConfig(path=tmp_path / "small", tasks={"text->image": 1.0}))).restore(position)


def test_a_hole_is_counted_and_shifts_no_other_draw(
    make: Callable[..., TrainingData], tmp_path: Path, write_pairs: Callable[..., Path]
) -> None:
    write_pairs(tmp_path / "intact", 70)
    tasks = {"text->image": 1.0}
    damaged = make(sources=(SourceConfig(path=tmp_path / "small", tasks=tasks),), rows_per_step=512)
    intact = make(sources=(SourceConfig(path=tmp_path / "intact", tasks=tasks),), rows_per_step=512)
    assert [tally.to_json().keys() for tally in damaged.holes.values()] == [{"cannot be used"}]
    assert [len(tally) for data in (damaged, intact) for tally in data.holes.values()] == [1, 0]
    n_steps = 4
    assert damaged.position(n_steps)["window"] == 2
    windows = [damaged.stage_rows(0).mixture.window(number) for number in range(3)]
    left = {int(key) for window in windows for key in window.noise_key[window.sample != 5]}
    found, whole = ([k for s in range(n_steps) for row in keys(d.rows(s)) for k in row] for d in (damaged, intact))
    assert set(found) <= left
    # First-fit may share rows out differently, but a window ends with the same samples.
    in_first_window = {int(key) for key in intact.stage_rows(0).mixture.window(0).noise_key}
    assert in_first_window & left <= set(found)
    assert in_first_window <= set(whole)


def test_samples_that_a_task_cannot_use_are_counted(make: Callable[..., TrainingData], tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "mixed") as writer:
        for n in range(10):
            text, image = RawSpan("text", text="t"), RawSpan("image", payload=n.to_bytes(2), extension="bin")
            writer.write(RawSample(str(n), (text,) if n < 3 else (text, image)))
    data = make(sources=tuple(SourceConfig(path=tmp_path / name, tasks=BOTH) for name in ("small", "mixed")))
    assert list(data.unserved.values()) == [0, 0, 3, 3]  # the damaged sample of the first is a hole already
    assert [len(tally) for tally in data.holes.values()] == [1, 0]


def test_sources_of_one_folder_are_counted_apart(make: Callable[..., TrainingData], tmp_path: Path) -> None:
    small = tmp_path / "small"
    data = make(sources=(SourceConfig(path=small, tasks=BOTH), SourceConfig(path=small, tasks={"text->image": 1.0})))
    assert list(data.holes) == [f"data.sources.{place} ({small})" for place in range(2)]
    assert [len(tally) for tally in data.holes.values()] == [1, 1]
    assert len(data.unserved) == 3


def test_documents_are_learnt_whole_and_take_the_length_that_was_planned(
    make: Callable[..., TrainingData], tmp_path: Path, byte_vocabulary: Vocabulary
) -> None:
    n_pairs = [1 + n % 3 for n in range(60)]
    with ShardWriter(tmp_path / "documents") as writer:
        for n, pairs in enumerate(n_pairs):
            spans = [
                span
                for place in range(pairs)
                for span in (
                    RawSpan("text", text="x" * (n % 4)),
                    RawSpan("image", payload=(16 * n + place).to_bytes(2), extension="bin"),
                )
            ]
            writer.write(RawSample(f"{n:02d}", tuple(spans)))
    source = SourceConfig(path=tmp_path / "documents", tasks={"interleaved": 1.0})
    # There is nothing given that could be dropped.
    data = make(sources=(source,), condition_dropout=1.0, rows_per_step=64)
    window, start = data.stage_rows(0).locate(0)
    draws, planned = data.stage_rows(0).plan(window)
    for row, places in zip(data.rows(0), planned[-start:], strict=False):
        assert sum(map(len, row)) <= ROW_LENGTH
        for sequence, draw in zip(row, places, strict=True):
            n = int(draws.sample[draw])
            # Markers, characters and an end of each text, and each picture noised and clean.
            assert len(sequence) == n_pairs[n] * (1 + n % 4 + 1 + 1 + 2 * 4)
            kinds = [(span.modality, span.role, span.noised) for span in sequence.spans]
            pair = [("text", Role.TARGET, False), ("image", Role.TARGET, True), ("image", Role.CONTEXT, False)]
            assert kinds == pair * n_pairs[n]
            follows = [byte_vocabulary.begin("image"), byte_vocabulary.begin("text")] * n_pairs[n]
            assert [following for _, following in sequence.next_spans] == [*follows[:-1], byte_vocabulary.end]


def test_rows_fit_and_are_full(make: Callable[..., TrainingData], byte_vocabulary: Vocabulary) -> None:
    data = make()
    rows = [row for step in range(50) for row in data.rows(step)]
    lengths = [sum(map(len, row)) for row in rows]
    assert max(lengths) <= ROW_LENGTH
    assert np.mean(lengths) > 0.9 * ROW_LENGTH
    batch = pack(rows, ROW_LENGTH, byte_vocabulary)
    assert int((batch.token_ids != byte_vocabulary.pad).sum()) == sum(lengths)


def test_what_cannot_be_trained_on_is_refused_before_it_starts(
    make: Callable[..., TrainingData], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"large/\d+\.tar, sample \d+ takes \d+ tokens .*raise data.row_length"):
        make(row_length=12)
    for path, tasks, message in (
        ("large", {"text->speech": 1.0}, "needs a tokenizer for 'speech'"),
        ("large", {"text->text": 1.0}, "holds no sample for the task text->text"),
        ("nowhere", BOTH, "nowhere does not exist"),
        ("", BOTH, "holds no .tar shards"),
    ):
        with pytest.raises(DataError, match=message):
            make(sources=(SourceConfig(path=tmp_path / path, tasks=tasks),))
    config = make().config
    rare = config.changed({"small": SourceChange(weight=1e-6)})
    with pytest.raises(DataError, match=r"small has the weight 1e-06 .*less than one draw"):
        make(stages=(DataStage(0, config), DataStage(3, rare)))
    (tmp_path / "large" / "000000.index.json").unlink()
    with pytest.raises(DataError, match=f"omniform data index {tmp_path / 'large'}"):
        make()


SIZES = st.lists(st.tuples(st.integers(1, 9000), st.floats(0.05, 20)), min_size=1, max_size=4)


@settings(max_examples=30)
@given(SIZES, st.integers(0, 2**40), st.integers(0, 3))
def test_windows_go_through_each_source_epoch_by_epoch(
    sources: Sequence[tuple[int, float]], seed: int, first: int
) -> None:
    config = DataConfig(sources=tuple(SourceConfig(path=Path("x"), weight=w, tasks=BOTH) for _, w in sources))
    mixture = Mixture(config, [size for size, _ in sources], seed)
    windows = [mixture.window(first + i) for i in range(3)]
    assert sum(mixture.quotas) == WINDOW
    for place, (size, weight) in enumerate(sources):
        share = weight / sum(w for _, w in sources)
        assert abs(mixture.quotas[place] - share * WINDOW) < 1
        epochs = np.concatenate([w.epoch[w.source == place] for w in windows])
        samples = np.concatenate([w.sample[w.source == place] for w in windows])
        start = first * int(mixture.quotas[place])
        np.testing.assert_array_equal(epochs, (start + np.arange(len(epochs))) // size)
        for epoch in np.unique(epochs):
            visited = samples[epochs == epoch]
            assert len(np.unique(visited)) == len(visited)
            if epochs[0] < epoch < epochs[-1]:
                assert sorted(visited) == list(range(size))


def naive_first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """The definition: look at every row from the first."""
    rows: list[list[int]] = []
    for place, length in enumerate(lengths):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + length <= row_length]
        if length and fitting:
            fitting[0].append(place)
        elif length:
            rows.append([place])
    return rows


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.lists(st.integers(0, n), max_size=60), st.just(n))))
def test_first_fit_is_its_definition(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    rows = first_fit(lengths, row_length)
    assert rows == naive_first_fit(lengths, row_length)
    assert sorted(place for row in rows for place in row) == [i for i, length in enumerate(lengths) if length]


@pytest.mark.parametrize(
    ("task", "modalities", "expected"),
    [
        ("text->image", ["text", "image"], [(0, Role.CONTEXT), (1, Role.TARGET)]),
        ("image->text", ["text", "image"], [(1, Role.CONTEXT), (0, Role.TARGET)]),
        ("text->image", ["image", "text", "image", "text"], [(1, "c"), (3, "c"), (0, "t"), (2, "t")]),
        ("text->text", ["text", "image", "text", "text"], [(0, Role.CONTEXT), (3, Role.TARGET)]),
        ("text->text", ["text", "image"], []),
        ("text->image", ["text", "text"], []),
        ("text->image", [], []),
        ("interleaved", ["text", "image", "text", "image"], [(0, "t"), (1, "t"), (2, "t"), (3, "t")]),
        ("interleaved", ["image", "text"], [(0, "t"), (1, "t")]),
        ("interleaved", ["text"], []),
    ],
)
def test_tasks_take_the_spans_that_they_name(task: str, modalities: list[str], expected: list) -> None:
    roles = {"c": Role.CONTEXT, "t": Role.TARGET}
    assert arrange(task, modalities) == [(place, roles.get(role, role)) for place, role in expected]


CONFIG = """
sources:
  - {path: data/train, weight: 4, tasks: {text->image: 1, image->text: 2.5}}
  - {path: data/train-text, tasks: {text->text: 1}}
row_length: 128
"""


def test_the_configuration_round_trips_and_refuses_nonsense() -> None:
    config = parse_config(DataConfig, CONFIG)
    assert parse_config(DataConfig, dump_config(config)) == config
    assert (config.sources[1].weight, config.condition_dropout) == (1.0, 0.1)
    for override, message in (
        ("condition_dropout=1.5", "condition_dropout"),
        ("row_length=1", "row_length"),
        ("sources=[]", "sources"),
        ("sources=[{path: x, tasks: {}}]", "tasks"),
        ("sources=[{path: x, tasks: {text: 1}}]", "expected modalities such as"),
        ("sources=[{path: x, tasks: {text->image: 0}}]", "expected more than 0"),
        ("sources=[{path: x, weight: -1, tasks: {text->image: 1}}]", "weight"),
        ("rowlength=3", "row_length"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(DataConfig, CONFIG, [override])


def test_sources_without_draws_are_refused() -> None:
    def mixture(weight: float, sizes: Sequence[int]) -> Mixture:
        sources = (SourceConfig(path=Path("a"), weight=weight, tasks=BOTH), SourceConfig(path=Path("b"), tasks=BOTH))
        return Mixture(DataConfig(sources=sources), sizes, 0)

    with pytest.raises(DataError, match="less than one draw"):
        mixture(1e-6, [1, 1])
    with pytest.raises(DataError, match="holds no samples"):
        mixture(1.0, [0, 1])
