import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from omniform.data.digits import build_digits
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.training.tokenizer_task import train_tokenizer


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The toy program of toy_run.py as a module: ToyModule, Toy, run_toy."""
    spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny run, beside its small world, a real text tokenizer and a random one of images."""
    folder = tmp_path_factory.mktemp("world")
    build_digits(folder / "data", copies=1, media=False)
    text = {"kind": "sentencepiece", "name": "text", "data": [f"{folder}/data/train-text"], "vocab_size": 300}
    (folder / "text.yaml").write_text(yaml.safe_dump(text))
    text_folder = train_tokenizer(folder / "text.yaml", out=folder / "text")
    torch.manual_seed(0)
    image_config = ImageTokenizerConfig(channels=1, image_size=16, widths=(8, 8))
    ImageTokenizer(image_config, image_config.build()).save(folder / "image")
    config = {
        "name": "tiny",
        "steps": 4,
        "rows_per_step": 4,
        "model": {
            "decoder": {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48},
            "objectives": {"text": "next_token", "image": "masked"},
        },
        "tokenizers": {"text": str(text_folder), "image": f"{folder}/image"},
        "data": {
            "row_length": 96,
            "sources": [
                {"path": f"{folder}/data/train", "tasks": {"text->image": 1.0, "image->text": 1.0}},
                {"path": f"{folder}/data/train-text", "tasks": {"text->text": 1.0}, "weight": 0.2},
            ],
        },
        "generation": {"image": {"guidance_scale": 2.0}},
        "engine": {"precision": "fp32", "micro_batch_rows": 2},
        "cache_dir": f"{folder}/tokens",
        "log": {"every": 1, "samples_every": 2},
        "checkpoint": {"every": 2},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml"
