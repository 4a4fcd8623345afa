"""Settings of the training of tokenizers."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from omniform.modeling.config import STRICT
from omniform.tokenizers.base import Modality
from omniform.tokenizers.codec_tokenizer import CodecTokenizer
from omniform.tokenizers.codecs.adversarial import Discriminator, PatchDiscriminator
from omniform.tokenizers.codecs.spectrogram_discriminator import SpectrogramDiscriminator
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.image_latents import (
    ImageLatentsConfig,
    ImageLatentsTokenizer,
    ImagePatchesConfig,
    ImagePatchesTokenizer,
)
from omniform.tokenizers.locations import LocationTokenizer, LocationTokenizerConfig
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from omniform.training.config import NAME, FitConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdversarialConfig:
    """A discriminator beside the codec. It shares the codec's learning rate, betas and bound on the gradient's norm.

    No pretrained network is used: the one perceptual term compares features of this discriminator.

    Attributes:
        widths: channels of the discriminator's layers, each of which halves the resolution.
        weight: of the codec's hinge loss, beside a mean squared error of pixels in [-1, 1].
        feature_weight: of the squared distance between discriminator features (arXiv:1512.09300).
        start_step: the first step in which the codec heeds both; the discriminator learns from step 0.
    """

    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (32, 64)
    weight: float = Field(default=0.01, ge=0)
    feature_weight: float = Field(default=0.01, ge=0)
    start_step: int = Field(default=0, ge=0)

    def build(self, channels: int) -> Discriminator:
        """Return the discriminator with random weights from torch's generator."""
        return PatchDiscriminator(channels, self.widths)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpectrogramAdversarialConfig(AdversarialConfig):
    """A discriminator of short-time spectra.

    Attributes:
        widths: channels of the layers, each of which halves the number of frequencies.
        n_ffts: samples per window of the spectra, each with a discriminator of its own.
    """

    n_ffts: Annotated[tuple[Annotated[int, Field(ge=16, multiple_of=4)], ...], Field(min_length=1)] = (256, 512, 1024)

    def build(self, channels: int) -> Discriminator:
        """Return the discriminator with random weights from torch's generator."""
        return SpectrogramDiscriminator(self.n_ffts, self.widths)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CodecTrainConfig(FitConfig):
    """How to train a tokenizer that is a codec; a row is an item. The configuration of each modality extends it.

    Attributes:
        data: folder of indexed shards, such as WORLD/train; every span of the tokenizer's modality is learnt from.
        index_dir: where its indexes are, if not beside the shards.
        more_data: folders to learn from as well, each with its indexes beside the shards.
        tokenizer: what is trained.
        max_items: the first so many of each folder are held in memory, as integers; of a larger one the rest is not
            learnt from.
        adversarial: train against a discriminator, which is not stored with the tokenizer; null: without.
    """

    tokenizer_type: ClassVar[type[CodecTokenizer[Any]]]

    kind: str
    data: Path
    index_dir: Path | None = None
    more_data: tuple[Path, ...] = ()
    tokenizer: Any
    max_items: int = Field(default=200_000, ge=1)
    adversarial: AdversarialConfig | None = None

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term that a codec of this configuration can have."""
        return {"reconstruction": 1.0}

    @model_validator(mode="after")
    def _check_adversarial_stage(self) -> "CodecTrainConfig":
        if self.adversarial is not None and self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage is 3, which scatters the weights that an adversarial loss needs detached: choose "
                "0, 1 or 2"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantizedTrainConfig(CodecTrainConfig):
    """How to train a codec whose tokens are codes.

    Attributes:
        commitment_weight: beta of VQ-VAE (arXiv:1711.00937, equation 3); FSQ has no such term.
        entropy_weight: of the entropy penalty of LFQ (arXiv:2310.05737, section 3.1); the others have no such term.
    """

    commitment_weight: float = Field(default=0.25, gt=0)
    entropy_weight: float = Field(default=0.1, gt=0)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term that a codec of this configuration can have."""
        return {**super().loss_weights, "commitment": self.commitment_weight, "entropy": self.entropy_weight}

    @model_validator(mode="after")
    def _check_precision(self) -> "QuantizedTrainConfig":
        quantizer = self.tokenizer.quantizer
        base = getattr(quantizer, "base", quantizer)
        if self.engine.precision == "bf16" and base.kind == "vq_ema":
            raise ValueError(
                "engine.precision is bf16, in which the moving averages of a vq_ema codebook stand still: choose "
                "bf16_autocast"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageCodecTrainConfig(CodecTrainConfig):
    """How to train a codec of images, whose size bounds how often a discriminator can halve it."""

    @model_validator(mode="after")
    def _check_adversarial(self) -> "ImageCodecTrainConfig":
        halvings = 0 if self.adversarial is None else len(self.adversarial.widths)
        if self.tokenizer.image_size < 2**halvings:
            raise ValueError(
                f"adversarial.widths halve the resolution {halvings} times, expected at most "
                f"{self.tokenizer.image_size.bit_length() - 1} for images of {self.tokenizer.image_size} pixels"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageTokenizerTrainConfig(QuantizedTrainConfig, ImageCodecTrainConfig):
    """How to train an image tokenizer."""

    tokenizer_type = ImageTokenizer

    kind: Literal["conv_vq"]
    tokenizer: ImageTokenizerConfig = ImageTokenizerConfig()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageLatentsTrainConfig(ImageCodecTrainConfig):
    """How to train a variational autoencoder of images.

    Attributes:
        kl_weight: of the divergence from the standard normal, in nats per latent value, beside the mean squared error
            of pixels in [-1, 1].
    """

    tokenizer_type = ImageLatentsTokenizer

    kind: Literal["conv_kl"]
    tokenizer: ImageLatentsConfig = ImageLatentsConfig()
    kl_weight: float = Field(default=1e-4, ge=0)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {**super().loss_weights, "kl": self.kl_weight}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PerturbationConfig:
    """How much a recording changes each time it is learnt from: a few voices stand for many.

    Attributes:
        speed: how much faster, or slower, at most: 0.2 is between 1.2 times and 1 / 1.2 times the speed.
        filter_taps: length of a random filter, an odd number.
        filter_strength: the most that a tap differs from those of a filter that changes nothing.
        gain_db: the least and the most gain.
    """

    speed: float = Field(default=0.18, ge=0, le=1)
    filter_taps: int = Field(default=9, ge=1, le=101)
    filter_strength: float = Field(default=0.14, ge=0, le=1)
    gain_db: tuple[float, float] = (-10.0, 3.0)

    @model_validator(mode="after")
    def _check(self) -> "PerturbationConfig":
        if self.filter_taps % 2 == 0:
            raise ValueError(f"filter_taps is {self.filter_taps}, expected an odd number: a filter has a middle")
        if self.gain_db[0] > self.gain_db[1]:
            raise ValueError(f"gain_db is {list(self.gain_db)}, expected the least gain before the most")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpeechTokenizerTrainConfig(QuantizedTrainConfig):
    """How to train a speech tokenizer; a row is a segment of a recording.

    Attributes:
        segment_samples: samples of a segment, a multiple of those of a frame, and as long as the widest of spectra.
        perturbation: of each recording; null: none.
        log_mel_weight: of the difference of log-mel spectra.
        magnitude_weight: of the difference of magnitudes.
        waveform_weight: of the difference of samples, which asks for their phases too.
    """

    tokenizer_type = SpeechTokenizer

    kind: Literal["speech_codec"]
    tokenizer: SpeechTokenizerConfig = SpeechTokenizerConfig()
    segment_samples: int = Field(default=7680, ge=1024)
    perturbation: PerturbationConfig | None = PerturbationConfig()
    log_mel_weight: float = Field(default=1.0, ge=0)
    magnitude_weight: float = Field(default=0.3, ge=0)
    waveform_weight: float = Field(default=0.0, ge=0)
    adversarial: SpectrogramAdversarialConfig | None = None

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term that a codec of this configuration can have."""
        return {
            **super().loss_weights,
            "log_mel": self.log_mel_weight,
            "magnitude": self.magnitude_weight,
            "waveform": self.waveform_weight,
        }

    @model_validator(mode="after")
    def _check_segment(self) -> "SpeechTokenizerTrainConfig":
        if self.segment_samples % self.tokenizer.frame_samples:
            raise ValueError(
                f"segment_samples is {self.segment_samples}, expected a multiple of tokenizer.frame_samples, "
                f"{self.tokenizer.frame_samples}"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoTokenizerTrainConfig(QuantizedTrainConfig):
    """How to train a video tokenizer. Its discriminator would be one of images: there is none for videos.

    Attributes:
        bright_weight: of the squared error weighed by brightness, beside the squared error itself; for light things
            that move before a dark field.
    """

    tokenizer_type = VideoTokenizer

    kind: Literal["causal_video_vq"]
    tokenizer: VideoTokenizerConfig = VideoTokenizerConfig()
    bright_weight: float = Field(default=0.0, ge=0)
    adversarial: None = None

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term that a codec of this configuration can have."""
        return {**super().loss_weights, "bright": self.bright_weight}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UntrainedTokenizerConfig:
    """A tokenizer of which nothing is learnt. The configuration of each extends it."""

    tokenizer_type: ClassVar[type[Any]]

    kind: str
    name: str = Field(pattern=NAME)
    tokenizer: Any

    def build(self) -> Modality[Any]:
        """Return the tokenizer."""
        tokenizer: Modality[Any] = self.tokenizer_type(self.tokenizer)
        return tokenizer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImagePatchesTrainConfig(UntrainedTokenizerConfig):
    """Raw patches of images."""

    tokenizer_type = ImagePatchesTokenizer

    kind: Literal["patches"]
    tokenizer: ImagePatchesConfig = ImagePatchesConfig()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocationTokenizerTrainConfig(UntrainedTokenizerConfig):
    """Quantised coordinates."""

    tokenizer_type = LocationTokenizer

    kind: Literal["locations"]
    tokenizer: LocationTokenizerConfig = LocationTokenizerConfig()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextTokenizerTrainConfig:
    """How to learn a text tokenizer.

    Attributes:
        data: folders of indexed shards; every text span of them is learnt from.
        index_dirs: where the indexes of each of `data` are, in its order; null: beside the shards. None: all are there.
        corpora: texts that packages ship: "python-topics" is the Python language reference in pydoc_data.
        vocab_size: ids in all, among them 256 bytes and "unknown".
    """

    kind: Literal["sentencepiece"]
    name: str = Field(pattern=NAME)
    data: tuple[Path, ...] = ()
    index_dirs: tuple[Path | None, ...] | None = None
    corpora: tuple[Literal["python-topics"], ...] = ()
    vocab_size: int = Field(default=1024, ge=258)
    algorithm: Literal["bpe", "unigram"] = "bpe"

    @model_validator(mode="after")
    def _check_index_dirs(self) -> "TextTokenizerTrainConfig":
        if self.index_dirs is not None and len(self.index_dirs) != len(self.data):
            raise ValueError(
                f"index_dirs has {len(self.index_dirs)} entries for {len(self.data)} folders in data: give one for "
                "each, null where the indexes are beside the shards"
            )
        return self
