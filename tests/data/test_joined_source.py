"""Samples of two folders come together by equal labels, and reach the model like those of one folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from omniform.data.joined_source import JoinedSource, Partner, Source, check_tasks, open_sources
from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, DataStage, JoinConfig, SourceConfig, arrange
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.data.token_source import TokenSource
from omniform.modeling.config import ConfigError, parse_config
from omniform.modeling.sequence import Role
from omniform.tokenizers.base import Modality
from omniform.tokenizers.vocabulary import Vocabulary

N_TEXTS, N_IMAGES = 60, 23


def write(folder: Path, samples: list[RawSample], per_shard: int = 7) -> Path:
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Texts with the labels 0 to 9 and one without any; pictures with the labels 0 to 8, whose payload says it."""
    texts = [
        RawSample(f"t{n:03d}", (RawSpan("text", text=f"text {n % 10}"),), {"digit": n % 10, "other": [n]})
        for n in range(N_TEXTS)
    ]
    texts.append(RawSample("nameless", (RawSpan("text", text="none"),), {}))
    images = [
        RawSample(
            f"i{n:03d}",
            (
                RawSpan("text", text="not to join"),
                RawSpan("image", payload=bytes([n % 9, n]) if n != 4 else b"damaged", extension="png"),
            ),
            {"digit": n % 9},
        )
        for n in range(N_IMAGES)
    ]
    return write(tmp_path / "texts", texts), write(tmp_path / "images", images)


def config(texts: Path, images: Path, **changes: Any) -> SourceConfig:
    join = JoinConfig(path=images, by=("digit",), modalities=("image",))
    return SourceConfig(**{"path": texts, "join": (join,), "tasks": {"text->image": 1.0}, **changes})


def open_one(configured: SourceConfig, tokenizers: dict[str, Modality], cache: Path) -> Source:
    [source] = open_sources([configured], tokenizers, cache)
    return source


def test_every_sample_is_given_a_counterpart_with_its_label_or_is_a_hole(
    folders: tuple[Path, Path], tokenizers: dict[str, Modality], tmp_path: Path
) -> None:
    source = open_one(config(*folders), tokenizers, tmp_path / "cache")
    assert len(source) == N_TEXTS + 1
    used = set()
    for sample in range(len(source)):
        if sample in source.failures:
            assert source.spans(sample) == []
            assert source.failures[sample].reason == "unpaired"
            continue
        assert [modality for modality, _ in source.spans(sample)] == ["text", "image"]
        label = tokenizers["text"].decode(source.tokens(sample, 0)).removeprefix("text ")
        payload = tokenizers["image"].decode(source.tokens(sample, 1))
        assert payload >> 8 == int(label)
        used.add(payload & 255)
    # Label 9 and the text without one have no counterpart; those that drew the damaged picture are holes.
    holes = [failure.message for failure in source.failures.values()]
    assert sum("has nothing with the labels" in message for message in holes) == N_TEXTS // 10 + 1
    assert all(m.endswith("it has no image from " + f"{folders[1]}/000000.tar, sample i004") for m in holes[N_TEXTS:])
    assert 4 not in used
    assert len(used) > N_IMAGES // 2
    again = open_one(config(*folders), tokenizers, tmp_path / "cache")
    assert again.digest == source.digest
    for sample in set(range(len(source))) - set(source.failures):
        assert torch.equal(again.tokens(sample, 1).codes, source.tokens(sample, 1).codes)


def test_a_joined_source_trains_like_any_other(
    folders: tuple[Path, Path],
    tokenizers: dict[str, Modality],
    byte_vocabulary: Vocabulary,
    objectives: dict[str, Any],
    tmp_path: Path,
) -> None:
    def build(**changes: Any) -> TrainingData:
        data = DataConfig(sources=(config(*folders, **changes),), row_length=48, condition_dropout=0.0)
        return TrainingData(
            data, tokenizers, byte_vocabulary, objectives, seed=0, cache_dir=tmp_path / "cache", rows_per_step=4
        )

    data = build()
    [holes] = data.holes.values()
    assert len(holes) >= N_TEXTS // 10 + 1
    assert holes.to_json().keys() == {"unpaired"}
    for sequence in (sequence for step in range(5) for row in data.rows(step) for sequence in row):
        assert [(span.modality, span.role) for span in sequence.spans] == [
            ("text", Role.CONTEXT),
            ("image", Role.TARGET),
        ]
    assert build(tasks={"image->text": 1.0}).digest != data.digest


def pairs(source: Source, tokenizers: dict[str, Modality]) -> dict[int, list[Any]]:
    """Return by sample what its spans hold; nothing of holes."""
    return {
        sample: [
            tokenizers[modality].decode(source.tokens(sample, place))
            for place, (modality, _) in enumerate(source.spans(sample))
        ]
        for sample in range(len(source))
        if sample not in source.failures
    }


@pytest.mark.parametrize("damaged", [{0}, {1, 4, 7}, {*range(0, N_IMAGES, 2)}, {*range(N_IMAGES - 1)}], ids=len)
def test_partners_that_cannot_be_read_change_no_other_pair(
    tokenizers: dict[str, Modality], tmp_path: Path, damaged: set[int]
) -> None:
    texts = [RawSample(f"{n}", (RawSpan("text", text=f"{n}"),), {"digit": n % 3}) for n in range(40)]
    write(tmp_path / "texts", texts)
    found = []
    for name, broken in (("whole", set[int]()), ("damaged", damaged)):
        write(tmp_path / name, [picture(n, {"digit": n % 3}, damaged=n in broken) for n in range(N_IMAGES)])
        source = open_one(config(tmp_path / "texts", tmp_path / name), tokenizers, tmp_path / "cache")
        found.append(pairs(source, tokenizers))
    whole, left = found
    assert len(whole) == len(texts)
    assert left == {sample: pair for sample, pair in whole.items() if pair[1] not in damaged}


def picture(number: int, metadata: dict[str, Any], *, damaged: bool = False) -> RawSample:
    """A picture that says its number."""
    payload = b"damaged" if damaged else number.to_bytes(2)
    return RawSample(f"{number:03d}", (RawSpan("image", payload=payload, extension="png"),), metadata)


def test_no_sample_is_paired_with_itself_where_there_is_another(
    tokenizers: dict[str, Modality], tmp_path: Path
) -> None:
    images = write(tmp_path / "images", [picture(n, {"digit": n % 5 if n < 20 else n}) for n in range(21)])
    source = open_one(config(images, images, tasks={"image->image": 1.0}), tokenizers, tmp_path / "cache")
    found = pairs(source, tokenizers)
    assert found.pop(20) == [20, 20]  # the only one of its label
    assert len(found) == 20
    assert all(own == sample != other and own % 5 == other % 5 for sample, (own, other) in found.items())


def test_samples_that_one_of_two_partners_has_no_label_of_are_holes(
    tokenizers: dict[str, Modality], tmp_path: Path
) -> None:
    texts = [RawSample(f"{n}", (RawSpan("text", text=f"{n}"),), {"digit": n % 4, "hue": n % 3}) for n in range(24)]
    write(tmp_path / "texts", texts)
    images = write(tmp_path / "images", [picture(n, {"digit": n % 4}) for n in range(8)])
    words = [RawSample(f"{n}", (RawSpan("text", text=f"w{n}"),), {"hue": n % 2}) for n in range(6)]
    write(tmp_path / "words", words)
    join = (
        JoinConfig(path=images, by=("digit",), modalities=("image",)),
        JoinConfig(path=tmp_path / "words", by=("hue",), modalities=("text",)),
    )
    configured = config(tmp_path / "texts", images, join=join, tasks={"text->text": 1.0})
    source = open_one(configured, tokenizers, tmp_path / "cache")
    found = pairs(source, tokenizers)
    assert sorted(source.failures) == [n for n in range(24) if n % 3 == 2]
    assert {failure.reason for failure in source.failures.values()} == {"unpaired"}
    for sample, (text, image, word) in found.items():
        assert (text, image % 4, int(word[1:]) % 2) == (str(sample), sample % 4, sample % 3)


def test_a_folder_that_is_named_several_times_is_opened_once(
    folders: tuple[Path, Path], tokenizers: dict[str, Modality], tmp_path: Path
) -> None:
    texts, images = folders
    by_other = JoinConfig(path=texts, by=("other",), modalities=("text",))
    configs = [
        config(texts, images),
        config(texts, images, join=()),
        config(texts, images, join=(by_other,), tasks={"text->text": 1.0}),
    ]
    joined, plain, by_itself = open_sources(configs, tokenizers, tmp_path / "cache")
    assert isinstance(joined, JoinedSource)
    assert isinstance(by_itself, JoinedSource)
    assert joined.base is by_itself.base is plain
    for configured, source in zip(configs, (joined, plain, by_itself), strict=True):
        alone = open_one(configured, tokenizers, tmp_path / "cache")
        assert alone.digest == source.digest
        assert pairs(alone, tokenizers) == pairs(source, tokenizers)


@pytest.mark.parametrize(
    ("tasks", "refused"),
    [
        (["text->text"], None),
        (["text->image"], "text->image"),
        (["text->text", "image->text"], "image->text"),
        (["interleaved"], "interleaved"),
        (["image->image"], None),
        (["text->image+text"], None),
        (["image->text+image"], "image->text.image"),
    ],
)
def test_tasks_that_would_take_spans_of_one_modality_from_two_folders_are_refused(
    folders: tuple[Path, Path],
    tokenizers: dict[str, Modality],
    byte_vocabulary: Vocabulary,
    objectives: dict[str, Any],
    tmp_path: Path,
    tasks: list[str],
    refused: str | None,
) -> None:
    join = (JoinConfig(path=folders[1], by=("digit",), modalities=("image", "text")),)
    source = open_one(config(*folders, join=join), tokenizers, tmp_path / "cache")
    assert isinstance(source, JoinedSource)
    assert source.repeated == {"text"}
    plain = config(*folders, join=())
    check_tasks(open_one(plain, tokenizers, tmp_path / "cache"), tasks)
    if refused is None:
        check_tasks(source, tasks)
        return
    with pytest.raises(DataError, match=f"the task {refused} would take text of several folders"):
        check_tasks(source, tasks)
    # A stage's tasks are looked at too.
    sources = tuple(config(*folders, join=join, tasks=dict.fromkeys(own, 1.0)) for own in (["text->text"], tasks))
    stages = [DataStage(n, DataConfig(sources=(own,), row_length=64)) for n, own in enumerate(sources)]
    with pytest.raises(DataError, match=f"the task {refused} would take"):
        TrainingData(
            stages[0].config,
            tokenizers,
            byte_vocabulary,
            objectives,
            seed=0,
            cache_dir=tmp_path / "cache",
            rows_per_step=4,
            stages=stages,
        )


def test_what_cannot_be_joined_is_refused(
    folders: tuple[Path, Path], tokenizers: dict[str, Modality], tmp_path: Path
) -> None:
    bases = [TokenSource(folder, tokenizers, tmp_path / "cache", labels=["digit"]) for folder in folders]
    nothing = Partner(bases[1], [None] * len(bases[0]), bases[1].labels_by(["digit"]), ("image",))
    with pytest.raises(DataError, match="has a counterpart with image"):
        JoinedSource(bases[0], [nothing])
    for override, message in (
        ("join=[{path: x, by: [], modalities: [image]}]", "join.0.by"),
        ("join=[{path: x, by: [digit], modalities: []}]", "join.0.modalities"),
        ("tasks={text+image->image: 1}", "both gives and learns"),
        ("tasks={text->text+image: 1}", "both gives and learns"),
        ("tasks={image+text->speech+text: 1}", "both gives and learns"),
        ("tasks={text+text->image: 1}", "names a modality twice"),
        ("tasks={text+->image: 1}", "expected modalities"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(SourceConfig, "path: x\ntasks: {text->image: 1}", [override])


def test_several_modalities_are_given_and_learnt_in_the_order_named() -> None:
    modalities = ["text", "image", "speech", "video", "text"]
    context, target = Role.CONTEXT, Role.TARGET
    assert arrange("speech+image->video", modalities) == [(2, context), (1, context), (3, target)]
    assert arrange("image->speech+text", modalities) == [(1, context), (2, target), (0, target), (4, target)]
    assert arrange("text->text", modalities) == [(0, context), (4, target)]
    assert arrange("image+speech->sound", modalities) == []
    assert arrange("image->image", modalities) == []
    assert arrange("text->image+text", modalities) == [(0, context), (1, target), (4, target)]
    assert arrange("text->speech+image+text", modalities) == [(0, context), (2, target), (1, target), (4, target)]
    assert arrange("image->text+image", modalities) == []
    assert arrange("text->sound+text", modalities) == []
