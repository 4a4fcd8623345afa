"""Training of the video tokenizer: the shipped configuration runs from video files, and what its losses weigh."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.modeling.config import ConfigError
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.video import VideoTokenizerConfig
from omniform.tokenizers.video_writing import video_bytes
from omniform.training.tokenizer_task import train_tokenizer

CODEC = VideoTokenizerConfig(frame_size=(8, 8), widths=(8,), time_strides=()).build()
SHIPPED = Path(__file__).parents[2] / "configs" / "tokenizers" / "digits-video.yaml"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four films of noise, the last too short, and a sample without one."""
    folder = tmp_path_factory.mktemp("clips")
    frames = np.random.default_rng(0).integers(0, 256, (4, 9, 32, 32, 1), dtype=np.uint8)
    with ShardWriter(folder) as writer:
        for place, film in enumerate(frames):
            payload = video_bytes(film[: 9 if place < 3 else 5], 8, "mp4", lossless=True)
            writer.write(RawSample(str(place), (RawSpan("video", payload=payload, extension="mp4"),), {}))
        writer.write(RawSample("text", (RawSpan("text", text="nothing moves"),), {}))
    return folder


def test_the_shipped_configuration_trains_from_files(clips: Path, tmp_path: Path) -> None:
    overrides = [f"data={clips}", "steps=2", "rows_per_step=4", "log.samples_every=2", "optim.warmup_steps=0"]
    folder = train_tokenizer(SHIPPED, overrides, tmp_path / "run")
    tokenizer = load_modality(folder)
    assert tokenizer.name == "video"
    assert tokenizer.fixed_grid is not None
    assert np.prod(tokenizer.fixed_grid) <= 48
    assert tokenizer.representation.vocab_size <= 512
    assert (tmp_path / "run" / "samples" / "step-2.gif").exists()
    with pytest.raises(ConfigError, match="adversarial"):
        train_tokenizer(SHIPPED, [*overrides, "adversarial={}"], tmp_path / "other")


@given(level=st.floats(-1, 1, width=32), error=st.floats(-1, 1, width=32))
def test_bright_errors_count_by_brightness(level: float, error: float) -> None:
    items = torch.full((3, 1, 9, 8, 8), level)
    losses = CODEC.reconstruction_losses(items + error, items)
    assert tuple(losses) == CODEC.loss_terms
    squared = F.mse_loss(items + error, items) * 3
    assert torch.allclose(losses["reconstruction"], squared)
    assert torch.allclose(losses["bright"], squared * (level + 1) / 2, atol=1e-6)
