"""Pictures of several codes per place: whatever a model of random weights draws, they decode."""

import pytest
import torch
from PIL import Image

from omniform.inference.generate import Model
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Modality
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer


@pytest.mark.parametrize("objective", [Masked(), NextToken()])
def test_any_drawn_codes_decode_and_can_be_read_again(objective: Objective) -> None:
    torch.manual_seed(0)
    quantizer = ResidualConfig(depth=3, base=FSQConfig(levels=(3, 3)))
    config = ImageTokenizerConfig(image_size=8, widths=(8, 16), margin=1, quantizer=quantizer)
    tokenizers: dict[str, Modality] = {
        "text": SentencePieceTokenizer.train(["a seven\nthe digit eight\n"] * 9, vocab_size=280),
        "image": ImageTokenizer(config, config.build()),
    }
    assert tokenizers["image"].fixed_grid == (3, 2, 2)
    decoder = DecoderConfig(dim=24, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32)
    model_config = ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": objective})
    network = UnifiedModel(model_config, build_vocabulary(tokenizers)).eval()
    model = Model(LoadedModel(network, tokenizers, {"max_sequence_length": 90}))
    prompt = ["a seven like", Image.new("L", (8, 8), "white")]
    images = {model.generate(prompt, to="image", seed=seed).images[0].tobytes() for seed in range(8)}
    assert len(images) > 1
