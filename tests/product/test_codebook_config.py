"""The config of speech of several codes a frame: every layout that its head names makes a model."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from omniform.modeling.config import parse_config
from omniform.modeling.model import UnifiedModel
from omniform.tokenizers.base import Discrete
from omniform.tokenizers.vocabulary import Vocabulary
from omniform.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "configs" / "digits-speech-codebooks.yaml").read_text(encoding="utf-8")
OVERRIDES = [shlex.split(line) for line in re.findall(r"^#   ('model\.objectives.*)$", TEXT, re.MULTILINE)]


@pytest.mark.parametrize(
    ("overrides", "layout"), [([], "delayed"), (OVERRIDES[0], "flattened"), (OVERRIDES[1], "parallel")]
)
def test_every_layout_of_the_config_fits_its_tokenizer(overrides: list[str], layout: str) -> None:
    config = parse_config(TrainConfig, TEXT, overrides)
    assert config.model.objectives["speech"].layout == layout
    with torch.device("meta"):
        model = UnifiedModel(config.model, Vocabulary(512, {"speech": Discrete(256, 4)}, ["speech"]))
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sizes["interface.head.weight"] == (512 + 64 + 4 * 256 + 1, 192)
