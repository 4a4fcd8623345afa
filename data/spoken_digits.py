"""Spoken digits: words and phrases in many synthetic voices, by espeak-ng through espeakng-loader.

espeak-ng keeps state between calls: a text said twice in one process differs in a few samples. A fresh process that
makes the same calls in the same order gives the same bits, so `render_speech` starts one each time, and the same list
of utterances gives the same sound. This is the only file that imports espeakng_loader.
"""

import ctypes
import importlib.util
import io
import json
import subprocess
import sys
import wave
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Int16

from omniform.data.schema import DataError

SAMPLE_RATE = 16000
# "accent+variant". Variants of one family (one stem, or settings copied from each other) stand on one side, so that
# what is held out was never heard. The judge, pocketsphinx, hears most of these voices right, which raises its ceiling.
VOICES = {
    "train": (
        *("gmw/en-US+m1", "gmw/en+m1", "gmw/en-US+m3", "gmw/en+m3", "gmw/en-US+m6", "gmw/en+m6"),
        *("gmw/en-US+m7", "gmw/en+m7", "gmw/en-US+m2", "gmw/en-US+m5", "gmw/en-US+Nguyen"),
        *("gmw/en-US+f1", "gmw/en+f1", "gmw/en-US+f2", "gmw/en+f2", "gmw/en-US+f3", "gmw/en+f3"),
        *("gmw/en-US+f5", "gmw/en+f5", "gmw/en-US+steph2", "gmw/en+steph"),
        *("gmw/en+klatt", "gmw/en-US+klatt3", "gmw/en+klatt3", "gmw/en+klatt5"),
        *("gmw/en-US+edward", "gmw/en+edward", "gmw/en+robosoft", "gmw/en-US+robosoft2"),
        *("gmw/en-US+Alex", "gmw/en-US+Jacky", "gmw/en+croak"),
    ),
    "validation": (
        *("gmw/en-US+Mike", "gmw/en+mike2", "gmw/en+Denis", "gmw/en-US+sandro", "gmw/en+sandro"),
        *("gmw/en-US+pedro", "gmw/en-US+anika", "gmw/en+anika"),
    ),
    "test": (
        *("gmw/en-GB-scotland", "gmw/en-GB-x-rp", "gmw/en-US-nyc", "gmw/en+grandpa"),
        *("gmw/en-US+adam", "gmw/en+announcer", "gmw/en-US+belinda", "gmw/en+linda"),
    ),
}
# Words per minute. A word then lasts 0.21 to 0.72 s; at PHRASE_RATE or faster, a phrase 0.72 to 1.50 s.
RATES = {"train": (130, 150, 170), "validation": (140, 150, 160), "test": (140, 150, 160)}
PITCHES = {"train": (40, 50, 60), "validation": (50,), "test": (50,)}
PHRASE_RATE = 150
PEAK = 0.5
# Sound begins and ends where it is louder than this part of its peak; a margin is kept on both sides.
SILENCE, MARGIN_SECONDS = 0.01, 0.02

_ESPEAK_RATE = 22050
# espeak-ng's speak_lib.h.
_SYNCHRONOUS, _DO_NOT_EXIT, _BY_CHARACTERS, _UTF8, _RATE, _PITCH = 2, 0x8000, 1, 1, 1, 3


@dataclass(frozen=True)
class Utterance:
    """What is said, and how.

    Attributes:
        voice: espeak-ng's name of a voice file, and a variant of it after "+".
        rate: words per minute, 80 to 450.
        pitch: 0 to 99; 50 is the voice's own.
    """

    text: str
    voice: str
    rate: int
    pitch: int = 50


def render_speech(utterances: Sequence[Utterance]) -> list[Int16[np.ndarray, "N"]]:
    """Return the sound of each utterance at SAMPLE_RATE, mono, without silence around it, its peak at PEAK.

    The same list gives the same bits on one machine; a part of it, or another order, gives others.

    Raises:
        DataError: espeakng-loader is not installed, or espeak-ng failed.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise DataError("spoken digits need espeakng-loader: install omniform[demo]")
    command = [sys.executable, "-m", "omniform.data.spoken_digits"]
    calls = json.dumps([astuple(utterance) for utterance in utterances]).encode()
    child = subprocess.run(command, input=calls, capture_output=True, check=False)
    if child.returncode:
        said = child.stderr.decode(errors="replace").strip() or f"status {child.returncode}, no message"
        raise DataError(f"espeak-ng could not render {len(utterances)} utterances: {said[-2000:]}")
    sounds, place = [], 0
    while place < len(child.stdout):
        size = int.from_bytes(child.stdout[place : place + 4], "little")
        sounds.append(np.frombuffer(child.stdout, "<i2", size, place + 4))
        place += 4 + 2 * size
    filter_taps = _anti_alias()
    return [_finished(sound, filter_taps) for sound in sounds]


def wav_bytes(samples: Int16[np.ndarray, "N"], rate: int = SAMPLE_RATE) -> bytes:
    """Return a WAV file of 16-bit mono sound."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def _anti_alias() -> npt.NDArray[np.float64]:
    """Return scipy's own default filter for this change of rate, made once: making it takes longer than using it."""
    from scipy.signal import firwin

    divisor = np.gcd(_ESPEAK_RATE, SAMPLE_RATE)
    widest = max(_ESPEAK_RATE, SAMPLE_RATE) // divisor
    return firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0))


def _finished(sound: Int16[np.ndarray, "N"], filter_taps: npt.NDArray[np.float64]) -> Int16[np.ndarray, "M"]:
    from scipy.signal import resample_poly

    samples = resample_poly(sound.astype(np.float64), SAMPLE_RATE, _ESPEAK_RATE, window=filter_taps)
    level = np.abs(samples)
    loud = np.flatnonzero(level > SILENCE * level.max())
    margin = round(MARGIN_SECONDS * SAMPLE_RATE)
    first, last = max(int(loud[0]) - margin, 0), int(loud[-1]) + margin + 1
    return np.rint(samples[first:last] * (PEAK * 32768 / level.max())).astype(np.int16)


def _synthesise(utterances: Sequence[Utterance]) -> list[npt.NDArray[np.int16]]:
    """Return what espeak-ng gives, 22050 Hz. Once per process."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    parts: list[npt.NDArray[np.int16]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples: Any, count: int, _events: int) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    integer, text, pointer = ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p
    library.espeak_Initialize.argtypes = [integer, integer, text, integer]
    unsigned = ctypes.c_uint
    library.espeak_Synth.argtypes = [text, ctypes.c_size_t, unsigned, integer, unsigned, unsigned, pointer, pointer]
    data = str(espeakng_loader.get_data_path()).encode()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DO_NOT_EXIT)
    if rate != _ESPEAK_RATE:
        raise DataError(f"espeak-ng answers {rate} to a start with {data!r}, expected {_ESPEAK_RATE} (Hz)")
    library.espeak_SetSynthCallback(receive)
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # breath is noise, seeded by the clock otherwise
    sounds = []
    for utterance in utterances:
        parts.clear()
        if library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {utterance.voice!r}")
        library.espeak_SetParameter(_RATE, utterance.rate, 0)
        library.espeak_SetParameter(_PITCH, utterance.pitch, 0)
        said = utterance.text.encode() + b"\0"
        status = library.espeak_Synth(said, len(said), 0, _BY_CHARACTERS, 0, _UTF8, None, None)
        library.espeak_Synchronize()
        if status != 0 or not parts or not any(part.any() for part in parts):
            raise DataError(f"espeak-ng gives no sound for {utterance} (status {status})")
        sounds.append(np.concatenate(parts))
    return sounds


def _main() -> None:
    calls = [Utterance(*call) for call in json.load(sys.stdin)]
    try:
        sounds = _synthesise(calls)
    except (DataError, OSError) as error:
        sys.exit(str(error))
    for sound in sounds:
        sys.stdout.buffer.write(len(sound).to_bytes(4, "little") + sound.astype("<i2").tobytes())


if __name__ == "__main__":
    _main()
