"""A model of four modalities, of random weights and small codecs: its replies are poor, and replies all the same."""

import torch

from omniform.inference.generate import Model
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Modality
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig

# Of each frame of speech: a generated span can end within one.
TWO_CODES = ResidualConfig(depth=2, base=FSQConfig(levels=(3, 3)))


def small_tokenizers() -> dict[str, Modality]:
    """Small codecs with random weights: their codes are poor, and codes all the same."""
    torch.manual_seed(0)
    image = ImageTokenizerConfig(patch_size=4, widths=(8,), quantizer=FSQConfig(levels=(4, 3)))
    speech = SpeechTokenizerConfig(width=8, n_blocks=1, frame_samples=1280, quantizer=TWO_CODES)
    video = VideoTokenizerConfig(patch_size=16, widths=(8,), time_strides=(), quantizer=FSQConfig(levels=(3, 5)))
    return {
        "text": SentencePieceTokenizer.train(["one digit"], vocab_size=265),
        "image": ImageTokenizer(image, image.build()),
        "speech": SpeechTokenizer(speech, speech.build()),
        "video": VideoTokenizer(video, video.build()),
    }


def small_model(tokenizers: dict[str, Modality]) -> Model:
    """A model of these modalities: pictures and videos are filled in place, all else is generated in order."""
    objectives = {name: Masked(steps=2) if name in ("image", "video") else NextToken() for name in tokenizers}
    decoder = DecoderConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32, rope_theta=100.0)
    config = ModelConfig(decoder=decoder, objectives=objectives, next_span_weight=0.1)
    torch.manual_seed(0)
    return Model(LoadedModel(UnifiedModel(config, build_vocabulary(tokenizers)), tokenizers, {}))
