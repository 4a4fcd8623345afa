"""From a folder of captioned images to a model that draws, with the configs that docs/data.md names."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import omniform
from omniform.data.from_folder import FolderOptions, from_folder
from omniform.data.inspect import info, preview
from omniform.data.verify import verify
from omniform.training.run import train
from omniform.training.tokenizer_task import train_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["steps=2", "optim.warmup_steps=1", "rows_per_step=2", "engine.micro_batch_rows=2", "engine.precision=fp32"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The engine asks for a fixed number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_what_comes_out_trains_at_once(tmp_path: Path) -> None:
    photos, generator = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for n, colour in enumerate(["red", "green", "blue"] * 8):
        noise = Image.fromarray(generator.integers(0, 60, (20, 30, 3), dtype=np.uint8))
        file = io.BytesIO()
        Image.blend(noise, Image.new("RGB", noise.size, colour), 0.7).save(file, ("PNG", "JPEG", "GIF", "BMP")[n % 4])
        (photos / f"{n}.{('png', 'jpg', 'gif', 'bmp')[n % 4]}").write_bytes(file.getvalue())
        (photos / f"{n}.txt").write_text(f"a {colour} picture")
    data = tmp_path / "data"
    from_folder(photos, data, FolderOptions(validation=0.2))
    assert verify(data).ok
    splits = info(data)["splits"]
    assert splits["train"]["samples"] + splits["validation"]["samples"] == 24
    assert splits["train"]["image_sizes"] == {"30x20": splits["train"]["samples"]}
    with Image.open(preview(data, tmp_path / "sheet.png")) as sheet:
        assert sheet.getextrema()[0] == (0, 255)
    text, image = (tmp_path / "text", tmp_path / "image")
    train_tokenizer(CONFIGS / "tokenizers" / "photos-text.yaml", [f"data=[{data}/train]"], out=text)
    train_tokenizer(CONFIGS / "tokenizers" / "photos-image.yaml", [f"data={data}/train", *SMALL], out=image)
    sources = [f"tokenizers.{name}={tmp_path}/{name}/tokenizer" for name in ("text", "image")]
    sources += [f"data.sources.0.path={data}/train", f"cache_dir={tmp_path}/tokens", "model.decoder.n_layers=1"]
    model = omniform.load(str(train(CONFIGS / "photos.yaml", [*sources, *SMALL], out=tmp_path / "run")))
    assert model.generate("a red picture", to="image", seed=0, steps=1).images[0].size == (64, 64)
