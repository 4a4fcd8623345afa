"""The folders of digits-world with speech and video: deterministic, held out, and true to what they say."""

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from omniform.data.digit_media import COUNTS, MEDIA
from omniform.data.digits import build_digits
from omniform.data.handwritten_digits import SPLIT_ROWS, altered, load_digit_images
from omniform.data.moving_digits import FPS, N_FRAMES, Clip, draw_clip, following, pairs_of
from omniform.data.schema import DataError, RawSample
from omniform.data.shards import ShardReader
from omniform.data.spoken_digits import SAMPLE_RATE, VOICES
from omniform.data.templates import CAPTIONS, MOTIONS, SPOKEN, TEST_DOCUMENTS, TRAIN_DOCUMENTS, WORDS, render
from omniform.data.verify import verify
from omniform.tokenizers.video_files import read_video

SEED, LIMIT = 3, 2  # of the world
SPLITS = ("train", "validation", "test")
FOUR = ["text", "image", "speech", "video"]


def named(text: str | None) -> tuple[set[int], set[str]]:
    """Return the digits and motions that a text names."""
    words = re.findall(r"\w+", text or "")
    digits = {WORDS.index(w) if w in WORDS else int(w) for w in words if w in WORDS or w.isdigit()}
    return digits, set(words) & set(MOTIONS)


def payloads(samples: list[RawSample], modality: str) -> dict[bytes, RawSample]:
    """Return samples by the content of their span of a modality."""
    return {s.payload: sample for sample in samples for s in sample.spans if s.modality == modality and s.payload}


def test_everything_verifies_and_a_limit_below_one_is_refused(world: Path, tmp_path: Path) -> None:
    assert verify(world).ok
    with pytest.raises(DataError, match="limit is 0, expected at least 1"):
        build_digits(tmp_path / "none", limit=0)


@pytest.mark.parametrize("split", SPLITS)
def test_words_are_said_by_every_voice_of_their_split_alone_in_its_own_wordings(world: Path, split: str) -> None:
    samples = list(ShardReader(world / f"{split}-speech"))
    said = Counter((s.metadata["digit"], s.metadata["voice"]) for s in samples)
    assert said == dict.fromkeys(((digit, voice) for digit in range(10) for voice in VOICES[split]), LIMIT)
    elsewhere = [voice for other in SPLITS if other != split for voice in VOICES[other]]
    assert not {voice for _, voice in said} & set(elsewhere)
    for sample in samples:
        text, speech = sample.spans
        assert sample.metadata["template"] in CAPTIONS["speech"][split == "test"]
        assert text.text == render(sample.metadata["template"], sample.metadata["digit"])
        rate, sound = wavfile.read(io.BytesIO(speech.payload or b""))
        assert (speech.modality, speech.extension, rate, sound.dtype) == ("speech", "wav", SAMPLE_RATE, np.int16)
        assert 0.2 < len(sound) / SAMPLE_RATE < 0.75


@pytest.mark.parametrize("split", SPLITS)
def test_clips_show_drawings_of_their_split_as_their_metadata_say(world: Path, split: str) -> None:
    images, labels = load_digit_images()
    samples = list(ShardReader(world / f"{split}-video"))
    shown = Counter((s.metadata["digit"], s.metadata["motion"]) for s in samples)
    assert shown == dict.fromkeys(pairs_of(split), LIMIT)
    for sample in samples:
        text, video = sample.spans
        metadata = dict(sample.metadata)
        template = metadata.pop("template")
        clip = Clip(**{**metadata, "start": tuple(metadata["start"])})
        assert clip.row in SPLIT_ROWS[split]
        assert labels[clip.row] == clip.digit
        assert template in CAPTIONS["video"][split == "test"]
        assert text.text == render(template, clip.digit, clip.motion)
        assert (video.modality, video.extension) == ("video", "mp4")
        found = read_video(video.payload or b"", fps=None, max_frames=100, mode="L")
        assert (len(found.frames), found.fps) == (N_FRAMES, FPS)
        expected = draw_clip(altered(images, clip.row, clip.copy, SEED)[0], clip)
        np.testing.assert_array_equal(found.frames, expected)


@pytest.mark.parametrize("split", SPLITS)
def test_continued_clips_go_on_from_the_frame_where_the_first_ends(world: Path, split: str) -> None:
    images, labels = load_digit_images()
    samples = list(ShardReader(world / f"{split}-continued"))
    assert Counter((s.metadata["digit"], s.metadata["motion"]) for s in samples) == dict.fromkeys(
        pairs_of(split), LIMIT
    )
    for sample in samples:
        clip = Clip(**{**sample.metadata, "start": tuple(sample.metadata["start"])})
        assert clip.row in SPLIT_ROWS[split]
        assert labels[clip.row] == clip.digit
        first, second = (read_video(s.payload or b"", fps=None, max_frames=100, mode="L").frames for s in sample.spans)
        drawing = altered(images, clip.row, clip.copy, SEED)[0]
        np.testing.assert_array_equal(first, draw_clip(drawing, clip))
        np.testing.assert_array_equal(second, draw_clip(drawing, following(clip)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("moving", [False, True])
def test_concepts_bring_together_what_their_split_has_of_one_digit(world: Path, split: str, moving: bool) -> None:
    words = payloads(list(ShardReader(world / f"{split}-speech")), "speech")
    clips = payloads(list(ShardReader(world / f"{split}-video")), "video")
    drawings = payloads(list(ShardReader(world / split)), "image")
    samples = list(ShardReader(world / f"{split}-{'moving-' if moving else ''}concepts"))
    for sample in samples:
        metadata, (text, image, speech, video) = sample.metadata, sample.spans
        digit, motion = metadata["digit"], metadata["motion"]
        assert [span.modality for span in sample.spans] == FOUR
        assert metadata["says"] == ("digit and motion" if moving else "digit")
        assert named(text.text) == ({digit}, {motion} if moving else set())
        assert metadata["template"] in CAPTIONS["moving concept" if moving else "concept"][split == "test"]
        assert metadata["voice"] in VOICES[split]
        shown = drawings[image.payload or b""].metadata
        assert (shown["digit"], shown["row"], shown["copy"]) == (digit, metadata["row"], metadata["copy"])
        clip = clips[video.payload or b""].metadata
        assert metadata["clip"] == {key: value for key, value in clip.items() if key != "template"}
        assert (clip["digit"], clip["motion"]) == (digit, motion)
        if moving:
            assert speech.payload not in words
            assert 0.7 < len(wavfile.read(io.BytesIO(speech.payload or b""))[1]) / SAMPLE_RATE < 1.55
        else:
            word = words[speech.payload or b""].metadata
            assert {key: metadata[key] for key in ("digit", "voice", "rate", "pitch")} == {
                key: word[key] for key in ("digit", "voice", "rate", "pitch")
            }
    if moving:
        pairs = Counter((s.metadata["digit"], s.metadata["motion"]) for s in samples)
        assert pairs == dict.fromkeys(pairs_of(split), LIMIT)
    else:
        assert Counter(s.metadata["digit"] for s in samples) == dict.fromkeys(range(10), LIMIT)


@pytest.mark.parametrize("split", SPLITS)
def test_stories_show_and_say_what_their_texts_say(world: Path, split: str) -> None:
    of = {
        "image": payloads(list(ShardReader(world / split)), "image"),
        "speech": payloads(list(ShardReader(world / f"{split}-speech")), "speech"),
        "video": payloads(list(ShardReader(world / f"{split}-video")), "video"),
    }
    templates = {(t.kind, t.first, t.following) for t in (TEST_DOCUMENTS if split == "test" else TRAIN_DOCUMENTS)}
    stories = list(ShardReader(world / f"{split}-stories"))
    for story in stories:
        kind, digits, (first, following) = (story.metadata[key] for key in ("kind", "digits", "templates"))
        assert (kind, first, following) in templates
        assert digits == [(digits[0] + place * (kind == "counting")) % 10 for place in range(len(digits))]
        texts, turns = story.spans[::2], story.spans[1::2]
        media = [turn["modality"] for turn in story.metadata["turns"]]
        assert [span.modality for span in turns] == media
        assert set(media) == set(MEDIA)
        expected = [render(following if place else first, digit) for place, digit in enumerate(digits)]
        assert [text.text for text in texts] == expected
        assert [of[t.modality][t.payload or b""].metadata["digit"] for t in turns] == digits
    begun = Counter((s.metadata["kind"], s.metadata["digits"][0]) for s in stories)
    assert begun == dict.fromkeys(((k, d) for k in ("counting", "naming") for d in range(10)), LIMIT)


def test_held_out_splits_are_large_enough_to_score() -> None:
    for split, fewest in (("validation", 100), ("test", 240)):
        counts = COUNTS[split]
        assert counts.takes * 10 * len(VOICES[split]) >= fewest
        assert counts.clips * len(pairs_of(split)) >= fewest
        assert counts.concepts * 10 >= fewest


def test_no_text_of_the_test_split_is_one_of_train_in_any_folder() -> None:
    documents = [
        {wording for t in side for wording in (t.first, t.following)} for side in (TRAIN_DOCUMENTS, TEST_DOCUMENTS)
    ]
    train, test = (
        {
            render(template, digit, motion)
            for template in documents[side].union(*(sides[side] for sides in CAPTIONS.values()))
            for digit in range(10)
            for motion in MOTIONS
        }
        for side in (0, 1)
    )
    assert not train & test
    assert not test & {render(SPOKEN, digit, motion) for digit in range(10) for motion in MOTIONS}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_every_caption_names_its_digit_and_its_motion_where_it_says_one(kind: str) -> None:
    train, test = CAPTIONS[kind]
    assert not set(train) & set(test)
    moving = kind in ("video", "moving concept")
    for template in (*train, *test):
        for digit in range(10):
            for motion in MOTIONS:
                text = render(template, digit, motion)
                assert named(text) == ({digit}, {motion} if moving else set())
                assert not re.search(r"\ba (eight|8)", text)
    # Test wordings put together what was learnt.
    assert {word for template in test for word in template.split()} <= {
        word for templates, _ in CAPTIONS.values() for template in templates for word in template.split()
    } | {"{a_numeral}"}
    assert named(render(SPOKEN, 8, "left")) == ({8}, {"left"})
    if moving:
        with pytest.raises(KeyError, match="moving"):
            render(train[0], 8)
