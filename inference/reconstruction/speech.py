"""What comes back of speech."""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float

from omniform.errors import OmniformError
from omniform.inference.judges import MOTIONS, NO_ANSWER
from omniform.inference.reconstruction.base import Reconstruction, TrainPictures, code_use, mean_figure
from omniform.inference.reconstruction.judged import JUDGE, Answers
from omniform.inference.reconstruction.sounds import (
    log_mel_distance,
    si_sdr,
    spectral_convergence,
    spectrogram_picture,
)
from omniform.inference.speech_judge import SAMPLE_RATE, SpeechJudge
from omniform.tokenizers.audio_files import write_audio
from omniform.tokenizers.base import Tokens

_TIMED = 100  # items whose encoding is timed
_PLAYED_SECONDS = 10.0  # of an example: a report holds its sounds


class SpeechReconstruction(Reconstruction):
    """Speech of any lengths. What comes back is cut, or filled with silence, to the length of its item."""

    groups = ("voice",)
    distortion_name = "log_mel_distance_db"

    @property
    def rate(self) -> int:
        """Samples per second (Hz)."""
        tokenizer: Any = self.tokenizer
        return int(tokenizer.config.sample_rate)

    def figures(self) -> dict[str, Any]:
        """Return rates per second, distances (means over items), and how fast encoding is.

        SI-SDR, the distance of wave forms, says little of decoders that make up phases, such as those of spectra.
        """
        seconds = sum(map(len, self.before)) / self.rate
        return {
            "sample_rate": self.rate,
            "seconds": seconds,
            "tokens_per_second": self.rates["tokens_per_item"] * len(self.before) / seconds,
            "bits_per_second": self.rates["bits_per_item"] * len(self.before) / seconds,
            **self._by_codebook(),
            "log_mel_distance_db": float(self.distortions().mean()),
            **mean_figure("spectral_convergence", [spectral_convergence(a, b) for a, b in self._pairs]),
            **mean_figure("si_sdr_db", [si_sdr(a, b) for a, b in self._pairs]),
            "encoding_times_real_time": self._encoding_speed(),
        }

    def distortions(self) -> npt.NDArray[np.float64]:
        """Return the log-mel distance of each item in dB."""
        return self._distances

    @staticmethod
    def source(about: Mapping[str, Any]) -> Any:
        """Return the voice."""
        return about.get("voice")

    def answers(self, train_pictures: TrainPictures) -> dict[str, Answers]:
        """Return the digits that the speech judge hears, and the motions where all samples say one.

        Raises:
            OmniformError: another sample rate than the judge's.
        """
        if self.rate != SAMPLE_RATE:
            raise OmniformError(
                f"this speech tokenizer has {self.rate} Hz, but the judge hears {SAMPLE_RATE}: choose that sample_rate"
            )
        judge = SpeechJudge()
        (after, moves_after), (before, moves_before) = (
            self._heard(judge, [pair[side] for pair in self._pairs]) for side in (0, 1)
        )
        answers = {JUDGE: Answers(before, after, self.digits)}
        if self._phrases.all():
            right = np.array([MOTIONS.index(entry["motion"]) for entry in self.about])
            answers["motion_judge"] = Answers(moves_before, moves_after, right, MOTIONS)
        return answers

    def write_example(self, place: int, stem: Path) -> dict[str, str]:
        """Write the first seconds of both sounds as WAV files, and one picture of their spectra."""
        after, before = (samples[: round(_PLAYED_SECONDS * self.rate)] for samples in self._pairs[place])
        paths = {"before": f"{stem.name}-before.wav", "after": f"{stem.name}-after.wav", "picture": f"{stem.name}.png"}
        for side, samples in (("before", before), ("after", after)):
            write_audio(stem.with_name(paths[side]), torch.from_numpy(samples), self.rate)
        spectrogram_picture([before, after], self.rate).save(stem.with_name(paths["picture"]))
        return paths

    @cached_property
    def _pairs(self) -> list[tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]]:
        """What came back, and the item."""
        pairs = []
        for item, decoded in zip(self.before, self.after, strict=True):
            samples = decoded[: len(item)].clamp(-1, 1).numpy()
            pairs.append((np.pad(samples, (0, len(item) - len(samples))), item.numpy()))
        return pairs

    @cached_property
    def _distances(self) -> npt.NDArray[np.float64]:
        return np.array([log_mel_distance(after, before, self.rate) for after, before in self._pairs])

    @property
    def _phrases(self) -> npt.NDArray[np.bool_]:
        """Whether each item says a motion after its digit."""
        return np.array([entry.get("says") == "digit and motion" for entry in self.about])

    def _heard(
        self, judge: SpeechJudge, sounds: Sequence[Float[np.ndarray, "N"]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return digits and motions, heard with the grammar of what each sample says; words say no motion."""
        digits, motions = np.full((2, len(sounds)), NO_ANSWER)
        words, phrases = (
            [torch.from_numpy(sounds[place]) for place in np.flatnonzero(of).tolist()]
            for of in (~self._phrases, self._phrases)
        )
        digits[~self._phrases] = judge.predict(words)
        digits[self._phrases], motions[self._phrases] = judge.predict_phrases(phrases)
        return digits, motions

    def _by_codebook(self) -> dict[str, Any]:
        """Return how each codebook is used, where frames have codes of several."""
        codes = [entry.codes.view(entry.grid) for entry in self.tokens if isinstance(entry, Tokens)]
        if codes[0].ndim == 1:
            return {}
        size = self.rates["codebook_size"]
        return {"by_codebook": [code_use(column, size) for column in torch.cat(codes).unbind(1)]}

    def _encoding_speed(self) -> float:
        """Return seconds of sound over seconds of processor time, items encoded one at a time on one thread."""
        timed = self.before[:_TIMED]
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.tokenizer.encode(timed[0])
            started = time.process_time()
            for item in timed:
                self.tokenizer.encode(item)
            spent = time.process_time() - started
        finally:
            torch.set_num_threads(n_threads)
        return sum(map(len, timed)) / self.rate / spent
