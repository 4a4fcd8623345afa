"""The evaluation of a tokenizer of each modality, of few weights that have learnt nothing, against sums by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from omniform.data.digits import build_digits
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardReader, ShardWriter
from omniform.errors import OmniformError
from omniform.inference.reconstruction.judged import Answers
from omniform.inference.tokenizer_evaluation import _chosen, evaluate_tokenizer
from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.image_latents import ImagePatchesConfig, ImagePatchesTokenizer
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
