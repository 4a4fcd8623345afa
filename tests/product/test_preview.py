"""Samples on the way: a file per modality that the model has, each readable and with its prompt, and the same for the
same model."""

import json
from pathlib import Path

import pytest
from PIL import Image
from small_codecs import small_model, small_tokenizers

from omniform.modeling.folder import LoadedModel
from omniform.preview import PROMPTS, UNCONDITIONAL, draw_samples, image_grid
from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.video_files import read_video


def model_of(*modalities: str) -> LoadedModel:
    tokenizers = {name: tokenizer for name, tokenizer in small_tokenizers().items() if name in modalities}
    return LoadedModel(small_model(tokenizers).network, tokenizers, {"max_sequence_length": 128})


def test_every_modality_is_drawn_and_can_be_read(tmp_path: Path) -> None:
    loaded = model_of("text", "image", "speech", "video")
    for name in ("first", "second"):
        draw_samples(loaded, tmp_path / name, ["one", "two", "three"])
    found = {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    assert found == {file.name: file.read_bytes() for file in (tmp_path / "second").iterdir()}
    videos = {name for name in found if name.startswith("video")}
    sounds = {name for name in found if name.startswith("speech")}
    assert videos == {"video-0.mp4", "video-1.mp4"}
    assert sounds <= {"speech-0.wav", "speech-1.wav"}
    assert set(found) == videos | sounds | {"images.png", "text.txt", "prompts.json"}
    assert all(read_video(found[name], fps=None, max_frames=99).frames.shape[1:3] == (32, 32) for name in videos)
    assert all(len(read_audio(found[name], 16_000)) % 1280 == 0 for name in sounds)
    assert len(found["text.txt"].splitlines()) == 3
    prompts = json.loads(found["prompts.json"])
    assert prompts == {"images.png": [["one", "two", "three"]]} | {
        name: ["one", "two"][int(name[-5])] for name in videos | sounds
    }
    with Image.open(tmp_path / "first" / "images.png") as grid:
        assert grid.size == (3 * 17 * 4 + 4, 17 * 4 + 4)


@pytest.mark.parametrize("modalities", [("text",), ("text", "image"), ("text", "speech")])
def test_a_model_of_fewer_modalities_draws_these(modalities: tuple[str, ...], tmp_path: Path) -> None:
    draw_samples(model_of(*modalities), tmp_path, UNCONDITIONAL[:2])
    kinds = {"images.png": "image", "text.txt": "text"}
    prompts = json.loads((tmp_path / PROMPTS).read_text())
    (tmp_path / PROMPTS).unlink()
    assert prompts.keys() == {file.name for file in tmp_path.iterdir()} - {"text.txt"}
    assert prompts.get("images.png", [["", ""]]) == [["", ""]]
    drawn = {kinds.get(file.name, file.name.partition("-")[0]) for file in tmp_path.iterdir()}
    assert drawn <= set(modalities)
    assert drawn >= set(modalities) - {"speech"}  # random weights may end it before its first sample


def test_a_grid_holds_every_picture_in_its_place() -> None:
    pictures = [Image.new("L", (3, 2), 10 * place) for place in range(5)]
    grid = image_grid(pictures, columns=2, scale=2)
    assert grid.size == (2 * 8 + 2, 3 * 6 + 2)
    assert [grid.getpixel((2 + 8 * (k % 2), 2 + 6 * (k // 2))) for k in range(5)] == [0, 10, 20, 30, 40]
    assert grid.getpixel((0, 0)) == 128
