"""Samples of digits-world with sound or motion: spoken and moving digits, concepts in four modalities, and stories."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from tqdm import tqdm

from omniform.data.handwritten_digits import altered, png_bytes, rows_by_digit
from omniform.data.moving_digits import FPS, Clip, draw_clip, following, pairs_of, plan_clips
from omniform.data.schema import RawSample, RawSpan
from omniform.data.spoken_digits import PHRASE_RATE, PITCHES, RATES, VOICES, Utterance, render_speech, wav_bytes
from omniform.data.templates import CAPTIONS, MOTIONS, SPOKEN, TEST_DOCUMENTS, TRAIN_DOCUMENTS, WORDS, render
from omniform.kernels.keyed_noise import keyed_bits, keyed_permutation, stream
from omniform.tokenizers.video_writing import video_bytes

# Texts of a story, each followed by a picture, a sound or a clip: all three come up in each.
FEWEST_TURNS, MOST_TURNS = 3, 4
MEDIA = ("image", "speech", "video")


@dataclass(frozen=True)
class Counts:
    """How many samples a split has.

    Attributes:
        takes: of each word in each voice, at different rates and pitches.
        clips: of each digit and motion.
        concepts: of each digit.
        moving_concepts: of each digit and motion.
        continued: of each digit and motion, two clips of which one goes on where the other ends.
        stories: of each kind and first digit.
    """

    takes: int
    clips: int
    concepts: int
    moving_concepts: int
    continued: int
    stories: int

    def at_most(self, limit: int | None) -> "Counts":
        """Return counts of which none is above `limit`."""
        return self if limit is None else Counts(**{name: min(count, limit) for name, count in vars(self).items()})


COUNTS = {
    "train": Counts(takes=9, clips=200, concepts=80, moving_concepts=32, continued=40, stories=12),
    "validation": Counts(takes=3, clips=6, concepts=10, moving_concepts=2, continued=3, stories=3),
    "test": Counts(takes=3, clips=11, concepts=25, moving_concepts=4, continued=4, stories=5),
}


@dataclass(frozen=True)
class Spoken:
    """A word, or a phrase that also says a motion, as a WAV file."""

    digit: int
    motion: str | None
    utterance: Utterance
    file: bytes

    def metadata(self) -> dict[str, Any]:
        """Return what a sample says of it."""
        said = self.utterance
        return {"voice": said.voice, "rate": said.rate, "pitch": said.pitch}


class SplitMedia:
    """Words, phrases and clips of one split, from which its samples are put together.

    The constructor renders all of them, for what a split says has to come from one process of espeak-ng; the methods
    only put together.

    Args:
        images, labels: all drawings, and their digits.
        copies: of each drawing of this split that there are; see `altered`.

    Raises:
        DataError: speech cannot be rendered.
    """

    def __init__(
        self,
        split: str,
        seed: int,
        images: UInt8[np.ndarray, "R H W"],
        labels: npt.NDArray[np.int64],
        copies: int,
        counts: Counts,
    ) -> None:
        self.split, self.seed, self.images, self.copies, self.counts = split, seed, images, copies, counts
        self.rows = rows_by_digit(labels, split)
        plans = [*self._plan_words(), *self._plan_phrases()]
        sounds = render_speech([utterance for _, _, utterance in plans])
        spoken = [Spoken(*plan, wav_bytes(sound)) for plan, sound in zip(plans, sounds, strict=True)]
        self.words = [one for one in spoken if one.motion is None]
        self.phrases = [one for one in spoken if one.motion is not None]
        clips = plan_clips(self.rows, split, seed, copies, counts.clips)
        shown = tqdm(clips, desc=f"{split} clips", unit="clip", disable=None, leave=False)
        self.clips = [(clip, self._file(clip)) for clip in shown]

    def speech_samples(self) -> Iterator[RawSample]:
        """Yield words with captions."""
        for number, word in enumerate(self.words):
            template = self._template("speech", number)
            metadata = {"digit": word.digit, **word.metadata(), "template": template}
            spans = (RawSpan("text", text=render(template, word.digit)), _sound(word))
            yield RawSample(f"{word.digit}-{number:04d}", spans, metadata)

    def video_samples(self) -> Iterator[RawSample]:
        """Yield clips with captions that say digit and motion."""
        for number, (clip, file) in enumerate(self.clips):
            template = self._template("video", number)
            spans = (RawSpan("text", text=render(template, clip.digit, clip.motion)), _moving(file))
            metadata = {**clip.metadata(), "template": template}
            yield RawSample(f"{clip.digit}-{clip.motion}-{number:04d}", spans, metadata)

    def concept_samples(self) -> Iterator[RawSample]:
        """Yield a text, a drawing, a word and a clip of one digit; text and word say nothing of the clip's motion."""
        for digit in range(10):
            words = [word for word in self.words if word.digit == digit]
            clips = [clip for clip in self.clips if clip[0].digit == digit]
            for number in range(self.counts.concepts):
                chosen = self._bits("digits/concept", digit, number)
                word, clip = words[int(chosen[2] % len(words))], clips[int(chosen[3] % len(clips))]
                yield self._concept(f"{digit}-{number:03d}", "concept", word, clip, chosen)

    def moving_concept_samples(self) -> Iterator[RawSample]:
        """Yield a text, a drawing, a phrase and a clip of one digit and motion, which text and phrase say."""
        for number, phrase in enumerate(self.phrases):
            pair = (phrase.digit, phrase.motion)
            clips = [clip for clip in self.clips if (clip[0].digit, clip[0].motion) == pair]
            chosen = self._bits("digits/moving-concept", phrase.digit, number)
            clip = clips[int(chosen[3] % len(clips))]
            key = f"{phrase.digit}-{phrase.motion}-{number:03d}"
            yield self._concept(key, "moving concept", phrase, clip, chosen)

    def continued_samples(self) -> Iterator[RawSample]:
        """Yield two clips, of which the second begins with the last frame of the first and goes on as it did."""
        counts, copies = self.counts, self.copies
        clips = plan_clips(self.rows, self.split, self.seed, copies, counts.continued, in_a_row=2)
        for number, clip in enumerate(clips):
            spans = (_moving(self._file(clip)), _moving(self._file(following(clip))))
            yield RawSample(f"{clip.digit}-{clip.motion}-{number:04d}", spans, clip.metadata())

    def story_samples(self) -> Iterator[RawSample]:
        """Yield documents in which texts take turns with drawings, words and clips, that count up or name a digit."""
        for kind in ("counting", "naming"):
            templates = [t for t in (TEST_DOCUMENTS if self.split == "test" else TRAIN_DOCUMENTS) if t.kind == kind]
            for first in range(10):
                for number in range(self.counts.stories):
                    chosen = self._bits(f"digits/{kind}-story", first, number)
                    template = templates[int(chosen[0] % len(templates))]
                    n_turns = FEWEST_TURNS + int(chosen[1] % (MOST_TURNS - FEWEST_TURNS + 1))
                    digits = [(first + place * (kind == "counting")) % 10 for place in range(n_turns)]
                    order = np.argsort(chosen[2 : 2 + len(MEDIA)]).tolist()
                    media = [MEDIA[place] for place in (*order, *order)][:n_turns]
                    spans, turns = list[RawSpan](), list[dict[str, Any]]()
                    for place, (digit, medium) in enumerate(zip(digits, media, strict=True)):
                        shown, about = self._turn(medium, digit, chosen[5 + 2 * place :])
                        wording = template.following if place else template.first
                        spans += [RawSpan("text", text=render(wording, digit)), shown]
                        turns.append({"modality": medium, **about})
                    metadata = {
                        "kind": kind,
                        "digits": digits,
                        "turns": turns,
                        "templates": [template.first, template.following],
                    }
                    yield RawSample(f"{kind}-{first}-{number:03d}", tuple(spans), metadata)

    def _plan_words(self) -> Iterator[tuple[int, str | None, Utterance]]:
        ways = [(rate, pitch) for rate in RATES[self.split] for pitch in PITCHES[self.split]][: self.counts.takes]
        for voice in VOICES[self.split]:
            for digit, word in enumerate(WORDS):
                for rate, pitch in ways:
                    yield digit, None, Utterance(word, voice, rate, pitch)

    def _plan_phrases(self) -> Iterator[tuple[int, str | None, Utterance]]:
        voices = VOICES[self.split]
        ways = [(r, pitch) for r in RATES[self.split] if r >= PHRASE_RATE for pitch in PITCHES[self.split]]
        for digit, motion in pairs_of(self.split):
            key = (self.seed, stream("digits/phrase"), stream(self.split), digit, MOTIONS.index(motion))
            order = keyed_permutation(len(voices), *key).tolist()
            for number in range(self.counts.moving_concepts):
                rate, pitch = ways[int(keyed_bits(*key, number) % len(ways))]
                voice = voices[order[number % len(voices)]]
                yield digit, motion, Utterance(render(SPOKEN, digit, motion), voice, rate, pitch)

    def _concept(
        self, key: str, kind: str, spoken: Spoken, clip: tuple[Clip, bytes], chosen: npt.NDArray[np.uint64]
    ) -> RawSample:
        templates = CAPTIONS[kind][self.split == "test"]
        template = templates[int(chosen[4] % len(templates))]
        drawing, about = self._turn("image", spoken.digit, chosen)
        caption = RawSpan("text", text=render(template, spoken.digit, spoken.motion))
        metadata = {
            "digit": spoken.digit,
            "motion": clip[0].motion,
            "says": "digit" if spoken.motion is None else "digit and motion",
            "template": template,
            **about,
            **spoken.metadata(),
            "clip": clip[0].metadata(),
        }
        return RawSample(key, (caption, drawing, _sound(spoken), _moving(clip[1])), metadata)

    def _turn(self, medium: str, digit: int, chosen: npt.NDArray[np.uint64]) -> tuple[RawSpan, dict[str, Any]]:
        """Return a digit in a medium, by the first two random words, and what a sample says of it."""
        if medium == "speech":
            words = [word for word in self.words if word.digit == digit]
            word = words[int(chosen[0] % len(words))]
            return _sound(word), word.metadata()
        if medium == "video":
            clips = [clip for clip in self.clips if clip[0].digit == digit]
            clip, file = clips[int(chosen[0] % len(clips))]
            return _moving(file), clip.metadata()
        rows = self.rows[digit]
        row, copy = rows[int(chosen[0] % len(rows))], int(chosen[1] % self.copies)
        image, _ = altered(self.images, row, copy, self.seed)
        return RawSpan("image", payload=png_bytes(image), extension="png"), {"row": row, "copy": copy}

    def _bits(self, purpose: str, *key: int) -> npt.NDArray[np.uint64]:
        return keyed_bits(self.seed, stream(purpose), stream(self.split), *key, np.arange(5 + 2 * MOST_TURNS))

    def _template(self, kind: str, number: int) -> str:
        templates = CAPTIONS[kind][self.split == "test"]
        return templates[int(keyed_bits(self.seed, stream(f"digits/{kind}-caption"), number) % len(templates))]

    def _file(self, clip: Clip) -> bytes:
        drawing, _ = altered(self.images, clip.row, clip.copy, self.seed)
        return video_bytes(draw_clip(drawing, clip), FPS, "mp4", lossless=True)


def _sound(spoken: Spoken) -> RawSpan:
    return RawSpan("speech", payload=spoken.file, extension="wav")


def _moving(file: bytes) -> RawSpan:
    return RawSpan("video", payload=file, extension="mp4")
