"""The evaluation of a tokenizer of each modality, of few weights that have learnt nothing, against sums by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch

from omniform.data.digits import build_digits
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardReader, ShardWriter
from omniform.errors import OmniformError
from omniform.inference.judges import MOTIONS
from omniform.inference.reconstruction.judged import Answers
from omniform.inference.tokenizer_evaluation import _chosen, evaluate_tokenizer
from omniform.tokenizer_report import figures_as_text, write_tokenizer_report
from omniform.tokenizers.audio_files import audio_bytes, read_audio
from omniform.tokenizers.base import Discrete, Modality, TokenizerError, Tokens
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.folder import write_tokenizer_folder
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.image_latents import ImagePatchesConfig, ImagePatchesTokenizer
from omniform.tokenizers.registry import MODALITIES
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig

PIXELS = 32 * 32 * 9


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, limit=1)


def test_evaluating_text_counts_exact_round_trips(world: Path, tmp_path: Path) -> None:
    captions = [span.text or "" for sample in ShardReader(world / "train-text") for span in sample.spans]
    SentencePieceTokenizer.train(captions, vocab_size=300).save(tmp_path / "text")
    figures = evaluate_tokenizer(tmp_path / "text", world, out=tmp_path / "out")
    assert figures["exact"] == 1
    assert (figures["n"], figures["folder"]) == (252, "test")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == figures
    examples = json.loads((tmp_path / "out" / "examples.json").read_text())
    assert all(example["before_text"] == example["after_text"] for example in examples)
    with pytest.raises(OmniformError, match=r"nowhere-\* hold no text"):
        evaluate_tokenizer(tmp_path / "text", world, "nowhere")
    stories = evaluate_tokenizer(tmp_path / "text", world, "validation", subset="stories")
    assert stories["folder"] == "validation-stories"
    with pytest.raises(OmniformError, match="validation-poems holds no text"):
        evaluate_tokenizer(tmp_path / "text", world, "validation", subset="poems")


def test_results_go_into_a_folder_that_can_be_one(tmp_path: Path) -> None:
    """Known before anything is read; only examples of an evaluation before are removed."""
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OmniformError, match="notes cannot be a folder for results"):
        evaluate_tokenizer(tmp_path / "no tokenizer", tmp_path, out=tmp_path / "notes")
    before = {"examples/0007-after.wav", "reconstructions.gif", "examples.json"}
    kept = {"tokenizer.json", "report.html", "holiday.png", "examples/holiday.png"}
    (tmp_path / "out" / "examples").mkdir(parents=True)
    for name in before | kept:
        (tmp_path / "out" / name).touch()
    with pytest.raises(TokenizerError):
        evaluate_tokenizer(tmp_path / "no tokenizer", tmp_path, out=tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == kept


class Bits(Modality[Tokens]):
    """A modality that nothing is known of: bytes of zeros and ones."""

    kind, name = "bits", "bits"
    representation = Discrete(2)
    fixed_grid = None

    def encode_batch(self, items: Sequence[bytes]) -> list[Tokens]:
        return [Tokens(torch.tensor(list(item)), (len(item),)) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[bytes]:
        return [bytes(entry.codes.tolist()) for entry in tokens]

    def read(self, payload: bytes) -> bytes:
        return payload

    def save(self, folder: Path) -> None:
        write_tokenizer_folder(folder, self.kind, {}, ("bits.txt", b"01"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()


def test_of_a_new_modality_the_rates_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODALITIES, "bits", Bits)
    Bits().save(tmp_path / "bits")
    with ShardWriter(tmp_path / "world" / "test") as writer:
        for key, payload in (("a", b"\0\1\1"), ("b", b"\1")):
            writer.write(RawSample(key, (RawSpan("bits", payload=payload, extension="bin"),), {"digit": 1}))
    figures = evaluate_tokenizer(tmp_path / "bits", tmp_path / "world", out=tmp_path / "out")
    assert (figures["tokens_per_item"], figures["bits_per_item"], figures["code_use"]) == (2, 2, 1)
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == figures
    assert "none are known for bits" in figures_as_text(figures)
    assert "none are known for bits" in write_tokenizer_report(tmp_path / "out").read_text()


def test_evaluating_images_judges_the_round_trip(world: Path, tmp_path: Path) -> None:
    config = ImageTokenizerConfig(widths=(8,), patch_size=4)
    tokenizer = ImageTokenizer(config, config.build())
    tokenizer.save(tmp_path / "image")
    figures = evaluate_tokenizer(tmp_path / "image", world, "validation", out=tmp_path / "out")
    samples = list(ShardReader(world / "validation"))
    items = [tokenizer.read(sample.spans[1].payload or b"") for sample in samples]
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(items))
    errors = [float((a - b).square().mean()) for a, b in zip(items, decoded, strict=True)]
    assert figures["psnr_db"] == pytest.approx(np.mean([10 * math.log10(4 / error) for error in errors]), rel=1e-4)
    assert figures["bits_per_pixel"] == pytest.approx(16 * math.log2(figures["codebook_size"]) / 256)
    assert figures["judge"]["accuracy_before"] > 0.95
    assert figures["judge"]["accuracy_after"] < 0.5  # random weights keep nothing
    assert sum(entry["n"] for entry in figures["judge"]["per_class"].values()) == figures["n"] == len(items)
    assert (tmp_path / "out" / "reconstructions.png").stat().st_size > 0


def test_patches_of_pixels_lose_nothing(world: Path, tmp_path: Path) -> None:
    ImagePatchesTokenizer(ImagePatchesConfig(image_size=16, patch_size=4)).save(tmp_path / "patches")
    figures = evaluate_tokenizer(tmp_path / "patches", world, "validation", out=tmp_path / "out")
    assert (figures["channels"], figures["tokens_per_item"], figures["numbers_per_item"]) == (16, 16, 256)
    assert figures["psnr_db"] is None or figures["psnr_db"] > 100
    assert figures["judge"]["ratio"] == 1
    assert "bits_per_pixel" not in figures
    assert {"lost"}.isdisjoint(e["kind"] for e in json.loads((tmp_path / "out" / "examples.json").read_text()))


@pytest.fixture(scope="module")
def ten_words(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of one validation word per digit."""
    folder = tmp_path_factory.mktemp("words")
    with ShardWriter(folder / "validation-speech") as writer:
        for digit in range(10):
            writer.write(next(s for s in ShardReader(world / "validation-speech") if s.metadata["digit"] == digit))
    return folder


@pytest.mark.parametrize("depth", [1, 2])
def test_evaluating_speech(ten_words: Path, tmp_path: Path, depth: int) -> None:
    quantizer = FSQConfig() if depth == 1 else ResidualConfig(depth=depth)
    config = SpeechTokenizerConfig(width=8, n_blocks=0, quantizer=quantizer)
    tokenizer = SpeechTokenizer(config, config.build())
    tokenizer.save(tmp_path / "speech")
    out = tmp_path / "out"
    figures = evaluate_tokenizer(tmp_path / "speech", ten_words, "validation", out=out)
    items = [tokenizer.read(sample.spans[1].payload or b"") for sample in ShardReader(ten_words / "validation-speech")]
    frames = sum(-(-len(item) // config.frame_samples) for item in items)
    seconds = sum(map(len, items)) / 16_000
    assert (figures["folder"], figures["n"], figures["sample_rate"]) == ("validation-speech", len(items), 16_000)
    assert figures["tokens_per_second"] == pytest.approx(depth * frames / seconds)
    bits = depth * frames * math.log2(figures["codebook_size"]) / seconds
    assert figures["bits_per_second"] == pytest.approx(bits)
    assert len(figures.get("by_codebook", [0])) == depth
    assert figures["log_mel_distance_db"] > 1
    assert figures["encoding_times_real_time"] > 0
    judge = figures["judge"]
    assert judge["accuracy_before"] >= 0.8
    assert judge["accuracy_after"] < 0.5
    assert sum(entry["n"] for entry in judge["by_voice"].values()) == judge["n"] == len(items)
    for example in json.loads((out / "examples.json").read_text()):
        before = read_audio(out / "examples" / example["before"], 16_000)
        assert torch.allclose(before, items[example["place"]], atol=2**-15)
        assert len(read_audio(out / "examples" / example["after"], 16_000)) == len(before)
        assert (out / "examples" / example["picture"]).read_bytes().startswith(b"\x89PNG")
        assert example["voice"] in judge["by_voice"]


def test_phrases_are_judged_for_digit_and_motion(world: Path, tmp_path: Path) -> None:
    config = SpeechTokenizerConfig(width=8, n_blocks=0)
    SpeechTokenizer(config, config.build()).save(tmp_path / "speech")
    figures = evaluate_tokenizer(tmp_path / "speech", world, "validation", subset="moving-concepts", limit=20)
    assert set(figures["motion_judge"]["per_class"]) == set(MOTIONS)
    assert figures["motion_judge"]["accuracy_before"] > 0.8
    assert figures["motion_judge"]["n_sources"] == len(figures["judge"]["by_voice"]) < 20


def test_reports_play_the_first_seconds_of_a_recording(tmp_path: Path) -> None:
    config = SpeechTokenizerConfig(width=8, n_blocks=0)
    SpeechTokenizer(config, config.build()).save(tmp_path / "speech")
    sound = audio_bytes(0.1 * torch.randn(16_000 * 15, generator=torch.Generator().manual_seed(0)), 16_000, "wav")
    with ShardWriter(tmp_path / "world" / "test") as writer:
        writer.write(RawSample("long", (RawSpan("speech", payload=sound, extension="wav"),), {}))
    evaluate_tokenizer(tmp_path / "speech", tmp_path / "world", out=tmp_path / "out")
    (example,) = json.loads((tmp_path / "out" / "examples.json").read_text())
    for side in ("before", "after"):
        assert len(read_audio(tmp_path / "out" / "examples" / example[side], 16_000)) == 160_000


def test_evaluating_video(world: Path, tmp_path: Path) -> None:
    config = VideoTokenizerConfig(widths=(8, 8))
    tokenizer = VideoTokenizer(config, config.build())
    tokenizer.save(tmp_path / "video")
    out = tmp_path / "out"
    figures = evaluate_tokenizer(tmp_path / "video", world, "validation", out=out)
    items = [tokenizer.read(sample.spans[1].payload or b"") for sample in ShardReader(world / "validation-video")]
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(items))
    errors = [float((a - b).square().mean()) for a, b in zip(items, decoded, strict=True)]
    moves = [float((a.diff(dim=1) - b.diff(dim=1)).square().mean()) for a, b in zip(items, decoded, strict=True)]
    assert figures["psnr_db"] == pytest.approx(np.mean([10 * math.log10(4 / error) for error in errors]), rel=1e-4)
    mean = np.mean([10 * math.log10(16 / move) for move in moves])
    assert figures["psnr_differences_db"] == pytest.approx(mean, rel=1e-4)
    n_tokens = math.prod(tokenizer.fixed_grid)
    assert (figures["tokens_per_item"], figures["frames_per_item"]) == (n_tokens, 9)
    assert figures["tokens_per_second"] == pytest.approx(n_tokens * 8 / 9)
    assert figures["bits_per_pixel"] == pytest.approx(figures["bits_per_item"] / PIXELS)
    for judge in ("judge", "motion_judge"):
        assert figures[judge]["accuracy_before"] > 0.95
        assert figures[judge]["accuracy_after"] < 0.5
    assert set(figures["judge"]["by_motion"]) == set(figures["motion_judge"]["per_class"])
    assert (out / "reconstructions.gif").read_bytes().startswith(b"GIF89a")
    for example in json.loads((out / "examples.json").read_text()):
        assert (out / "examples" / example["picture"]).read_bytes().startswith(b"GIF89a")


def test_a_world_without_the_dedicated_folder_is_read_from_another(world: Path, tmp_path: Path) -> None:
    """Of documents, which say no one digit: figures, but no judge."""
    config = SpeechTokenizerConfig(width=8, n_blocks=0)
    SpeechTokenizer(config, config.build()).save(tmp_path / "speech")
    with ShardWriter(tmp_path / "world" / "test-talk") as writer:
        for sample in ShardReader(world / "test-speech")[:3]:
            payload = sample.spans[1].payload
            writer.write(RawSample(sample.key, (RawSpan("speech", payload=payload, extension="wav"),), {}))
    figures = evaluate_tokenizer(tmp_path / "speech", tmp_path / "world")
    assert (figures["folder"], figures["n"]) == ("test-talk", 3)
    assert "judge" not in figures


def test_examples_are_of_every_class_and_the_extremes() -> None:
    right = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    after = right.copy()
    after[3] = 0
    answers = {"judge": Answers(right, after, right)}
    chosen = _chosen(np.array([5, 1, 5, 5, 9, 8, 7, 6, 0, 2, 3, 4.0]), answers)
    assert chosen == [
        ("as it came", 0),
        ("as it came", 2),
        ("lost", 3),
        *(("worst", place) for place in (4, 5, 6, 7)),
        *(("best", place) for place in (8, 1, 9, 10)),
    ]
