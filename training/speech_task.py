"""Training of speech codecs: segments of recordings, each a little different every time it is shown."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.training.codec_task import CodecTask
from omniform.training.tokenizer_config import PerturbationConfig, SpeechTokenizerTrainConfig


class SpeechTask(CodecTask):
    """Shows a segment of every recording once per epoch."""

    config: SpeechTokenizerTrainConfig

    def example(self, item: Int16[Tensor, "N"], n: int) -> Float[Tensor, "1 L"]:
        """Return a segment of a perturbed recording, from a random place; or all of it, with silence around it, at a
        random place of the segment."""
        keys = (stream("speech/example"), self.config.seed, n)
        samples: Tensor = self.tokenizer.expand(item)
        if self.config.perturbation is not None:
            samples = perturbed(samples, self.config.perturbation, *keys)
        length = self.config.segment_samples
        spare = len(samples) - length
        place = int(keyed_uniform(*keys, stream("place")) * (abs(spare) + 1))
        segment = samples[place : place + length] if spare >= 0 else F.pad(samples, (place, -spare - place))
        return segment[None]


def perturbed(samples: Float[Tensor, "N"], config: PerturbationConfig, *keys: int) -> Float[Tensor, "M"]:
    """Return the samples faster or slower, filtered, and louder or quieter, as `keys` say; levels beyond [-1, 1] are
    clipped.

    Source: speed perturbation, which moves pitch and formants with it, as in Ko et al. (2015), "Audio augmentation for
    speech recognition"; here by linear interpolation.
    """
    draws = torch.from_numpy(2 * keyed_uniform(*keys, np.arange(2 + config.filter_taps)) - 1).float()  # in [-1, 1]
    length = max(1, round(len(samples) / (1 + config.speed) ** draws[0].item()))
    sound = F.interpolate(samples[None, None], length, mode="linear")
    taps = config.filter_strength * draws[2:]
    taps[len(taps) // 2] += 1
    # On a busy machine torch's conv1d, which shares out the samples between threads, takes many times as long.
    padded = np.pad(sound[0, 0].numpy(), len(taps) // 2)
    sound = torch.from_numpy(np.convolve(padded, taps.numpy()[::-1], mode="valid"))
    quietest, loudest = config.gain_db
    gain = quietest + (loudest - quietest) * (draws[1].item() + 1) / 2
    return (sound * 10 ** (gain / 20)).clamp(-1, 1)
