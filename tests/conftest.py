"""Fixtures that several rooms share: a tiny vocabulary and model."""

import pytest
import torch
from hypothesis import settings
from strategies import CODEBOOK, TEXT_SIZE

from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Discrete
from omniform.tokenizers.vocabulary import Vocabulary

settings.register_profile("omniform", deadline=None, derandomize=True)
settings.load_profile("omniform")
torch.set_num_threads(1)


@pytest.fixture
def vocabulary() -> Vocabulary:
    """50 text ids and an image codebook of 8."""
    return Vocabulary(TEXT_SIZE, {"image": Discrete(CODEBOOK)})


@pytest.fixture
def model_config() -> ModelConfig:
    """Two layers, grouped heads, one objective of each kind."""
    decoder = DecoderConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=32, rope_theta=100.0)
    return ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked(steps=3)})


@pytest.fixture
def model(model_config: ModelConfig, vocabulary: Vocabulary) -> UnifiedModel:
    """Random weights, large enough for attention to matter."""
    torch.manual_seed(0)
    model = UnifiedModel(model_config, vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model.eval()
