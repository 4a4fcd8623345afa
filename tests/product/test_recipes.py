"""Recipes: what docs/recipes.json says of them is well-formed, and each trains, is stored and draws at tiny size."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import omniform
from omniform.cli import app
from omniform.data import digits
from omniform.data.mixture import modalities_of
from omniform.inference.protocol import DataPart
from omniform.modeling.config import parse_config
from omniform.tokenizers.audio_files import Audio
from omniform.tokenizers.locations import Location
from omniform.tokenizers.video_files import Video
from omniform.training.config import TrainConfig
from omniform.training.tokenizer_task import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORD: list[dict[str, Any]] = json.loads((ROOT / "docs" / "recipes.json").read_text(encoding="utf-8"))
# Those that were trained for figures, and those that were not.
RECIPES = sorted({entry["recipe"] for entry in RECORD})
BUILT = [
    "beit",
    "chameleon",
    "cogvideo",
    "digits-speech-codebooks",
    "emu3",
    "maskgit",
    "mmada",
    "show-o2",
    "solo",
    "unified-vlp",
    "visorgpt",
    "vl-beit",
    "vl-gpt",
]
# What a prompt is made of.
ITEMS = {
    "text": "a handwritten seven",
    "image": Image.new("L", (16, 16), 90),
    "speech": Audio(torch.linspace(-0.1, 0.1, 3200), 16000),
    "video": Video(np.zeros((9, 16, 16, 1), dtype=np.uint8), 8.0),
    "location": DataPart("location", (Location.box(0.25, 0.25, 0.75, 0.75),)),
}
# Recipes that read the same data with the same tokenizers encode it once.
TINY = (
    "optim.warmup_steps=1",
    "rows_per_step=2",
    "engine.micro_batch_rows=2",
    "log.every=1",
    "cache_dir=tokens",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and tokenizers that the recipes name, made in a few steps."""
    place = tmp_path_factory.mktemp("recipes")
    digits.build_digits(place / "runs" / "demo" / "data", copies=1, limit=20)
    data = place / "runs" / "demo" / "data"
    texts = [str(data / name) for name in ("train", "train-text", "train-documents")]
    short = (f"data={data}/train", "steps=3", "optim.warmup_steps=1", "rows_per_step=4", "engine.micro_batch_rows=4")
    for name, folder, overrides in (
        ("text", "demo/tokenizers/text", (f"data={json.dumps(texts)}",)),
        ("image", "demo/tokenizers/image", short),
        ("image-latents", "digits-image-latents", short),
        ("image-patches", "digits-image-patches", ()),
        ("locations", "digits-location-tokenizer", ()),
        ("scenes", "digits-scenes-tokenizer", (f"data={data}/train-find", *short[1:])),
        ("video", "demo/tokenizers/video", (f"data={data}/train-video", *short[1:])),
        ("speech", "demo/tokenizers/speech", (f"data={data}/train-speech", "more_data=[]", *short[1:])),
        ("speech-residual", "speech-residual", (f"data={data}/train-speech", *short[1:])),
    ):
        config = ROOT / "configs" / "tokenizers" / f"digits-{name}.yaml"
        train_tokenizer(config, overrides, place / "runs" / folder)
    return place


@pytest.mark.parametrize("recipe", [*RECIPES, *BUILT])
def test_a_recipe_trains_is_stored_and_draws(recipe: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    config = parse_config(TrainConfig, (ROOT / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    steps = [f"steps={2 + len(config.stages)}", *(f"stages.{n}.steps=1" for n in range(len(config.stages) - 1))]
    done = CliRunner().invoke(app, ["train", recipe, *steps, *TINY], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    model = omniform.load(workplace / "runs" / recipe / "model")
    subsets = bool(config.model.subsets)
    asked = {modalities_of(task) for source in config.data.sources for task in source.tasks}
    for given, wanted in sorted(asked):
        for one in wanted if subsets else ():
            others = [ITEMS[modality] for modality in wanted if modality != one]
            assert [part.modality for part in model.generate(others, to=one, seed=0).parts] == [one]
        if given:
            reply = model.generate([ITEMS[modality] for modality in given], to=wanted, seed=0)
            assert [part.modality for part in reply.parts] == [*wanted]


@pytest.mark.parametrize("entry", RECORD, ids=lambda entry: f"{entry['recipe']}, {entry['metric']}")
def test_what_is_recorded_of_a_recipe_is_whole(entry: dict[str, Any]) -> None:
    assert set(entry) == {"recipe", "command", "steps", "metric", "value", "n", "chance", "ci95"}
    config = parse_config(TrainConfig, (ROOT / "configs" / f"{entry['recipe']}.yaml").read_text(encoding="utf-8"))
    assert config.steps == entry["steps"]
    low, high = entry["ci95"]
    assert entry["chance"] < low <= entry["value"] <= high <= 1
    train, evaluate = (shlex.split(command) for command in entry["command"].split(" && "))
    assert train == ["omniform", "train", entry["recipe"]]
    assert evaluate[:3] == ["omniform", "eval", f"runs/{entry['recipe']}/model"]
    assert evaluate[evaluate.index("--cells") + 1] == entry["metric"].split()[-1]
