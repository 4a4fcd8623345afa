"""The judge of speech: which digit, and which motion, a recording says. The one file that imports pocketsphinx.

It was trained by somebody else on other people's speech, so nothing that Omniform makes can have taught it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from omniform.errors import OmniformError
from omniform.inference.judges import DIGIT_WORDS, MOTIONS, NO_ANSWER
from omniform.kernels.keyed_noise import keyed_uniform, stream

SAMPLE_RATE = 16_000
# On the scale of [-1, 1]. Without it the recognizer takes exact zeros for anything but silence.
NOISE_STD = 100 / 32768
MARGIN = 4800  # samples of noise before and after the item, 0.3 s
N_DRAWS = 3
# There is silence before and after every word, so it costs next to nothing.
_SILENCE_PROBABILITY = 0.9
_DIGITS = " | ".join(DIGIT_WORDS)
_GRAMMARS = {
    "digit": f"#JSGF V1.0; grammar digit; public <said> = {_DIGITS};",
    "phrase": (
        f"#JSGF V1.0; grammar phrase; <digit> = {_DIGITS};"
        " <motion> = standing still | moving ( left | right | up | down );"
        " public <said> = <digit> <motion>;"
    ),
}


class SpeechJudge:
    """What an item of speech says: the answer of pocketsphinx with a grammar, the majority of N_DRAWS hearings.

    Each hearing lays other white noise over the item and MARGIN before and after it. The noise depends on the hearing
    and on the place in the item alone, and the recognizer forgets each item before the next, so an item has one answer,
    whatever else is judged with it. The grammar is nearly a forced choice: what is heard in sound without speech stands
    in the tests. Noise, margin and the cost of silence were chosen on validation voices.

    Raises:
        OmniformError: pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise OmniformError("the speech judge needs pocketsphinx: install omniform[demo]") from error
        self._recognizer: Any = Decoder(lm=None, samprate=SAMPLE_RATE, silprob=_SILENCE_PROBABILITY, loglevel="FATAL")
        for name, grammar in _GRAMMARS.items():
            self._recognizer.add_jsgf_string(name, grammar)

    def predict(self, items: Sequence[Float[Tensor, "N"]]) -> npt.NDArray[np.int64]:
        """Return the digit that each item, one of the ten words at SAMPLE_RATE, says best.

        NO_ANSWER where most hearings find no path through the grammar, as in an item of no samples. Of three different
        answers the first hearing's counts. Values beyond [-1, 1] are clipped.

        Raises:
            OmniformError: an item is not one row of finite numbers.
        """
        return np.array([_digit(said) for said in self._hear(items, "digit")], dtype=np.int64)

    def predict_phrases(
        self, items: Sequence[Float[Tensor, "N"]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the digit and the place in MOTIONS of the motion that each item says, as in "seven moving left".

        As `predict`, and the majority is of whole phrases. A phrase that breaks off says no motion.
        """
        said = self._hear(items, "phrase")
        motions = [MOTIONS.index(words[-1]) if words and words[-1] in MOTIONS else NO_ANSWER for words in said]
        return np.array([_digit(words) for words in said], dtype=np.int64), np.array(motions, dtype=np.int64)

    def _hear(self, items: Sequence[Float[Tensor, "N"]], grammar: str) -> list[tuple[str, ...]]:
        self._recognizer.activate_search(grammar)
        answers = []
        for item in items:
            samples = np.asarray(item, dtype=np.float64)
            if samples.ndim != 1 or not np.isfinite(samples).all():
                raise OmniformError(f"an item of speech is {samples.shape}, expected one row of finite samples")
            padded = np.pad(samples, MARGIN)
            heard = list[tuple[str, ...]]()
            for noise in _noise(len(padded)):
                heard.append(self._hear_once(padded + noise))
                if max(Counter(heard).values()) > N_DRAWS // 2:
                    break  # the others cannot change the majority
            answers.append(Counter(heard).most_common(1)[0][0])
        return answers

    def _hear_once(self, samples: Float[np.ndarray, "N"]) -> tuple[str, ...]:
        levels = np.rint(samples.clip(-1, 1) * 32767).astype(np.int16)
        self._recognizer.reinit_feat()  # or its picture of the noise stays that of the item before
        self._recognizer.start_utt()
        self._recognizer.process_raw(levels.tobytes(), full_utt=True)
        self._recognizer.end_utt()
        found = self._recognizer.hyp()
        return tuple(found.hypstr.split()) if found is not None else ()


def _noise(length: int) -> Float[np.ndarray, "D N"]:
    """Return white Gaussian noise for each hearing, by the Box-Muller transform."""
    hearing, place = np.arange(N_DRAWS)[:, None], np.arange(length)
    radius, angle = (keyed_uniform(stream(f"speech judge/{name}"), hearing, place) for name in ("radius", "angle"))
    return NOISE_STD * np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)


def _digit(words: Sequence[str]) -> int:
    return DIGIT_WORDS.index(words[0]) if words else NO_ANSWER
