"""Sound and video in shards are counted by their headers, verified by decoding them, and drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omniform.data.inspect import info, preview
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.data.verify import verify
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.video_writing import video_bytes

SQUARE = torch.ones(8000) * torch.tensor([0.5, -0.5]).repeat(4000)
COLOURS = np.array([[255, 0, 0]] * 2 + [[0, 255, 0]] * 3 + [[0, 0, 255]] * 2, np.uint8)
CLIP = np.broadcast_to(COLOURS[:, None, None], (7, 20, 20, 3))


def sample(key: str, *payloads: bytes) -> RawSample:
    """Text, a sound and a video."""
    sound, video = payloads
    spans = (
        RawSpan("text", text="hum"),
        RawSpan("speech", payload=sound, extension="wav"),
        RawSpan("video", payload=video, extension="webm"),
    )
    return RawSample(key, spans)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three samples; the sound of the second and the video of the third are cut short."""
    sound, video = audio_bytes(SQUARE, 16000, "wav"), video_bytes(CLIP, 10, "mp4", lossless=True)
    with ShardWriter(tmp_path / "data") as writer:
        writer.write(sample("whole", sound, video))
        writer.write(sample("mute", sound[:3000], video))
        writer.write(sample("blind", sound, video[:-700]))
    return tmp_path / "data"


def test_info_adds_up_what_headers_state(shards: Path, tmp_path: Path) -> None:
    split = info(shards)["splits"]["data"]
    assert split["unreadable"]["cut short"]["count"] == 2
    assert split["spans"] == {"speech": 1, "text": 1, "video": 1}
    assert (split["speech_rates"], split["speech_seconds"]) == ({"16000 Hz": 1}, 0.5)
    assert (split["video_sizes"], split["video_frames"], split["video_seconds"]) == ({"20x20": 1}, 7, 0.7)


def test_verify_decodes_sound_and_video(shards: Path) -> None:
    problems = {problem.sample: problem.message for problem in verify(shards).problems}
    assert set(problems) == {"mute", "blind"}
    assert "sound" in problems["mute"]
    assert "video" in problems["blind"]


def test_preview_draws_waveforms_and_frames(shards: Path, tmp_path: Path) -> None:
    with Image.open(preview(shards, tmp_path / "sheet.png", n=3)) as sheet:
        levels = np.asarray(sheet.convert("RGB")).astype(int)
    cells = {key: levels[:, 8 + 136 * place :][:, :128] for place, key in enumerate(("whole", "mute", "blind"))}

    def count(key: str, colour: tuple[int, int, int]) -> int:
        return int((np.abs(cells[key] - colour).max(axis=-1) == 0).sum())

    red, green, blue, steel = (255, 0, 0), (0, 255, 0), (0, 0, 255), (70, 130, 180)
    assert count("whole", red) == count("whole", green) == count("whole", blue) > 1000
    # 128 columns from half of full scale to minus half of it, in a strip of 42 rows.
    assert count("whole", steel) == pytest.approx(128 * 42 / 2, rel=0.05)
    assert count("mute", steel) == 0
    assert count("mute", green) == count("whole", green)
    assert count("blind", green) == count("blind", blue) == 0
    assert 40 < count("blind", red) < 300  # a cross
