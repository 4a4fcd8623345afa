"""Parts and files: what is written is read back as it was, a suffix means one thing, and nothing is half-written."""

import json
import wave
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_sounds import sine, stored
from sample_videos import clip
from small_codecs import small_model, small_tokenizers

import omniform
from omniform.atomic import write_whole
from omniform.errors import OmniformError
from omniform.inference.command import generate_files
from omniform.inference.generate import Model
from omniform.inference.part_files import DEFAULT_SUFFIX, check_suffix, formats, has_files, read_part, write_part
from omniform.inference.part_items import item_of
from omniform.inference.protocol import ContentPart, DataPart, ImagePart, SpeechPart, TextPart, VideoPart, parse_prompt
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.base import Tokens
from omniform.tokenizers.locations import LocationTokenizer, LocationTokenizerConfig
from omniform.tokenizers.speech import SpeechTokenizer

RATE, FPS = 16000, 8.0
PICTURE = Image.fromarray(np.arange(0, 256, dtype=np.uint8).reshape(16, 16))
SOUND = omniform.Audio(torch.from_numpy(sine(0.5, RATE)).mul(2**15).round() / 2**15, RATE)
FILM = omniform.Video(clip(9, 32, 32, channels=1), FPS)
PARTS: dict[str, ContentPart] = {
    "text": TextPart("a seven\nand more"),
    "image": ImagePart(PICTURE),
    "speech": SpeechPart(SOUND),
    "video": VideoPart(FILM),
}


@pytest.fixture(scope="module")
def four() -> Model:
    return small_model(small_tokenizers())


def levels(part: ContentPart) -> np.ndarray:
    """The numbers that a part is made of, in [-1, 1]."""
    if isinstance(part, ImagePart):
        return np.asarray(part.image) / 127.5 - 1
    if isinstance(part, VideoPart):
        return part.video.frames / 127.5 - 1
    assert isinstance(part, SpeechPart)
    return part.audio.samples.numpy()


@pytest.mark.parametrize(
    ("suffix", "modality", "most_off"),
    [
        *((suffix, "image", 0.0) for suffix in (".png", ".bmp", ".tif", ".tiff")),
        *((suffix, "image", 0.2) for suffix in (".jpg", ".jpeg", ".webp")),
        (".wav", "speech", 0.0),
        (".flac", "speech", 0.0),
        (".mp3", "speech", 0.05),
        (".ogg", "speech", 0.05),
        (".gif", "video", 0.0),
        (".mp4", "video", 0.1),
        (".webm", "video", 0.1),
    ],
)
def test_what_is_written_is_read_back(four: Model, tmp_path: Path, suffix: str, modality: str, most_off: float) -> None:
    path = tmp_path / f"part{suffix.upper()}"
    write_part(PARTS[modality], path)
    part = read_part(path, four)
    assert type(part) is type(PARTS[modality])
    found, given = levels(part), levels(PARTS[modality])
    assert found.shape == given.shape
    assert np.abs(found - given).mean() <= most_off
    if isinstance(part, SpeechPart):
        assert part.audio.rate == RATE
    if isinstance(part, VideoPart):
        assert part.video.fps == FPS
    assert list(tmp_path.iterdir()) == [path]


@given(st.text(min_size=1))
def test_every_text_is_read_back(tmp_path_factory: pytest.TempPathFactory, four: Model, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    write_part(TextPart(text), path)
    assert read_part(path, four) == TextPart(text)


def test_other_programs_read_what_is_written(tmp_path: Path) -> None:
    for modality, part in PARTS.items():
        write_part(part, tmp_path / f"{modality}{DEFAULT_SUFFIX[modality]}")
    with wave.open(str(tmp_path / "speech.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, len(SOUND.samples))
    assert soundfile.read(tmp_path / "speech.wav", dtype="float32")[0].tolist() == SOUND.samples.tolist()
    assert Image.open(tmp_path / "image.png").tobytes() == PICTURE.tobytes()
    assert (tmp_path / "text.txt").read_text() == "a seven\nand more\n"
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"


def test_the_public_names_read_and_write(four: Model, tmp_path: Path) -> None:
    assert all(getattr(omniform, name) is not None for name in omniform.__all__)
    omniform.write_part(PARTS["speech"], str(tmp_path / "a.flac"))
    [part] = four.generate(omniform.read_part(str(tmp_path / "a.flac"), four), to="video", seed=1).parts
    omniform.write_part(part, str(tmp_path / "a.gif"))
    assert isinstance(part, omniform.VideoPart)
    found = omniform.read_part(tmp_path / "a.gif", four)
    assert np.array_equal(levels(found), levels(part))


def test_sound_and_video_of_any_rate_and_size_prompt_as_their_files_do(four: Model, tmp_path: Path) -> None:
    stereo = np.stack([sine(0.4, 44100), sine(0.4, 44100)], axis=1)
    (tmp_path / "a.wav").write_bytes(stored(stereo, 44100))
    samples = torch.from_numpy(soundfile.read(tmp_path / "a.wav", dtype="float32")[0]).mean(1)
    film = omniform.Video(clip(20, 40, 56, channels=3)[:, :, :, :1], 16.0)
    write_part(VideoPart(film), tmp_path / "b.gif")
    for name, held in (("a.wav", omniform.Audio(samples, 44100)), ("b.gif", film)):
        part = read_part(tmp_path / name, four)
        [same] = parse_prompt(held)
        tokenizer = four.tokenizers[part.modality]
        of_file, of_object = (tokenizer.encode(item_of(entry, tokenizer)) for entry in (part, same))
        assert of_file.grid == of_object.grid
        assert torch.equal(of_file.codes, of_object.codes)
        assert four.generate(part, seed=3) == four.generate(held, seed=3)


def test_files_of_a_modality_that_the_model_lacks(four: Model, omni: Model, tmp_path: Path) -> None:
    """A GIF is a video, or else a picture; a film is a video, or else its sound."""
    write_part(VideoPart(FILM), tmp_path / "a.gif")
    write_part(VideoPart(FILM), tmp_path / "a.mp4")
    write_part(SpeechPart(SOUND), tmp_path / "a.wav")
    assert isinstance(read_part(tmp_path / "a.gif", four), VideoPart)
    tokenizers = small_tokenizers()
    still = small_model({name: tokenizers[name] for name in ("text", "image", "speech")})
    part = read_part(tmp_path / "a.gif", still)
    assert isinstance(part, ImagePart)
    assert part.image.size == (16, 16)
    with pytest.raises(OmniformError, match=r"a\.mp4: the file holds no sound"):
        read_part(tmp_path / "a.mp4", still)
    for name in ("a.wav", "a.mp4", "a.json"):
        with pytest.raises(OmniformError, match=rf"{name}: .* is no kind of file that this model takes"):
            read_part(tmp_path / name, omni)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.wav", b"", "a.wav: "),
        ("a.wav", b"RIFF", "a.wav: "),
        ("a.mp4", b"xyz", "a.mp4: "),
        ("a.wav", stored(np.zeros(0, np.float32), RATE), r"a\.wav: a sound file holds no samples"),
        ("a.mp4", stored(sine(0.1, RATE), RATE), "a.mp4: "),
        ("a.png", stored(sine(0.1, RATE), RATE), "a.png: "),
        ("a.txt", b"\n", r"a\.txt: .* empty text"),
        ("a.txt", b"\xff", r"a\.txt: a text of 1 bytes is not UTF-8"),
        ("a.xyz", b"", r"a\.xyz: \.xyz is no kind of file that this model takes"),
        ("a", b"", "a name without suffix is no kind of file"),
        ("a.json", b"[]", r"\.json is no kind of file that this model takes"),
    ],
)
def test_files_that_hold_nothing_usable(four: Model, tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(OmniformError, match=message):
        read_part(tmp_path / name, four)
    with pytest.raises(OmniformError, match=r"missing\.wav: cannot be read: No such file"):
        read_part(tmp_path / "missing.wav", four)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: omniform.Audio(torch.zeros(0), RATE), r"samples of shape \(0,\), expected \(N,\) with N >= 1"),
        (lambda: omniform.Audio(torch.full((9,), torch.nan), RATE), "not finite numbers"),
        (lambda: omniform.Audio(torch.zeros(9), 0), "a rate of 0 Hz, expected 1000 to"),
        (lambda: omniform.Audio(np.zeros(9), RATE), r"a ndarray float64 \(9,\), expected a float tensor \(N,\)"),
        (lambda: omniform.Audio(torch.zeros(9, 2), RATE), r"float32 \(9, 2\), .* one of two channels"),
        (lambda: omniform.Audio([0.0], RATE), "a list, expected a float tensor"),
        (lambda: omniform.Audio(torch.zeros(9), 16000.5), "rate of an Audio is 16000.5, expected a whole number"),
        (lambda: omniform.Video(FILM.frames[:0], FPS), r"uint8 frames \(0, 32, 32, 1\) .* T >= 1"),
        (lambda: omniform.Video(FILM.frames, 0.0), "a finite rate above 0"),
        (lambda: omniform.Video(FILM.frames / 255, FPS), "a video of float64 frames"),
        (lambda: omniform.Video(torch.zeros(9, 4, 4, 1), FPS), "a Video of a Tensor at 8.0 .* expected a NumPy array"),
        (lambda: omniform.Video(FILM.frames, "8"), "at '8' frames per second"),
    ],
)
def test_sound_and_video_that_hold_nothing_usable(four: Model, make: Callable[[], object], message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        four.generate(make())


def test_a_suffix_is_of_one_modality() -> None:
    every = [suffix for modality in (*PARTS, "location") for suffix in formats(modality)]
    assert len(every) == len(set(every))
    for modality, suffix in DEFAULT_SUFFIX.items():
        check_suffix(Path(f"a{suffix}"), modality)
        for other in every:
            if other not in formats(modality):
                with pytest.raises(OmniformError, match=rf"\{other} is no format of {modality}, use \."):
                    check_suffix(Path(f"a{other}"), modality)


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        (PARTS["speech"], "a.png", r"\.png is no format of speech, use \.wav"),
        (PARTS["video"], "a", "no suffix is no format of video"),
        (SpeechPart(omniform.Audio(torch.zeros(0), RATE)), "a.wav", "speech without a sample"),
        (ImagePart(Image.new("RGBA", (4, 4))), "a.jpg", "a picture of mode RGBA is not written as .jpg"),
        (VideoPart(omniform.Video(FILM.frames, 200.0)), "a.gif", "200.0 frames per second"),
        (DataPart("image", torch.zeros(1, 2, 2)), "a.png", "in the raw form of its tokenizer has no form in files"),
        (DataPart("location", [1]), "a.json", "has no form in files"),
        (PARTS["image"], "folder.png", "cannot be written: Is a directory"),
        (PARTS["image"], "nowhere/a.png", "cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_written_leaves_everything_as_it_was(
    tmp_path: Path, part: ContentPart, name: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    if "folder" not in name and "nowhere" not in name:
        (tmp_path / name).write_bytes(b"before")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OmniformError, match=message):
        write_part(part, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    assert all(path.is_dir() or path.read_bytes() == b"before" for path in before)


def test_a_file_is_written_beside_no_file_of_anyone_else(tmp_path: Path) -> None:
    """Neither is what a link points to written to, and nothing is left beside the file."""
    (tmp_path / "mine").write_bytes(b"mine")
    for name in (".a.png.draft", "a.png.partial", "a.png"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    before = {path.name for path in tmp_path.iterdir()}
    write_part(PARTS["image"], tmp_path / "a.png")
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert Image.open(tmp_path / "a.png").tobytes() == PICTURE.tobytes()
    assert not (tmp_path / "a.png").is_symlink()


def test_the_file_of_several_writers_at_once_is_that_of_one_of_them(tmp_path: Path) -> None:
    contents = [bytes([writer]) * 2**16 for writer in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: write_whole(tmp_path / "a", content), contents * 4))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() in contents


class Unencoding(SpeechTokenizer):
    """Knows how long speech is, and encodes none."""

    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        raise AssertionError("encoded")


@pytest.fixture(scope="module")
def short() -> Model:
    """A model of 64 tokens, which are 2.56 seconds of speech: two codes for each 0.08."""
    tokenizers = small_tokenizers()
    speech = tokenizers["speech"]
    assert isinstance(speech, SpeechTokenizer)
    tokenizers["speech"] = Unencoding(speech.config, speech.codec)
    model = small_model(tokenizers)
    model.max_sequence_length = 64
    return model


def test_a_sound_that_is_too_long_is_refused_before_it_is_encoded(short: Model, tmp_path: Path) -> None:
    silence = torch.zeros(10 * RATE)
    (tmp_path / "a.wav").write_bytes(audio_bytes(silence, RATE, "wav"))
    with pytest.raises(OmniformError, match=r"a\.wav: a sound of 10\.0 seconds, expected at most 2\.56: cut it first"):
        read_part(tmp_path / "a.wav", short)
    held = omniform.Audio(silence, RATE)
    with pytest.raises(
        OmniformError, match=r"a sound of 10\.00 seconds, .* 2\.56, which take all of this model's tokens"
    ):
        short.generate(held)
    with pytest.raises(OmniformError, match=r"a sound of 10\.00 seconds"):
        short.generate("one", negative_prompt=held, guidance_scale=2)
    with pytest.raises(OmniformError, match=r"takes 251 or more of this model's 64 tokens \(speech 251\)"):
        short.generate(DataPart("speech", silence))
    with pytest.raises(OmniformError, match=r"takes 78 or more of this model's 64 tokens \(speech 39, speech 39\)"):
        short.generate([omniform.Audio(silence[: RATE * 3 // 2], RATE)] * 2)


def test_a_video_in_the_form_of_its_tokenizer_is_bounded_too(short: Model) -> None:
    with pytest.raises(OmniformError, match=r"takes 68 or more of this model's 64 tokens \(video 68\)"):
        short.generate(DataPart("video", torch.zeros(1, 129, 32, 32)))
    with pytest.raises(OmniformError, match="expected float32"):
        short.generate(DataPart("video", "no video"))


def test_the_longest_sound_is_read_whole(short: Model, tmp_path: Path) -> None:
    whole = torch.zeros(round(2.56 * RATE))
    (tmp_path / "a.wav").write_bytes(audio_bytes(whole, RATE, "wav"))
    part = read_part(tmp_path / "a.wav", short)
    assert isinstance(part, SpeechPart)
    assert len(part.audio.samples) == len(whole)
    assert short.tokenizers["speech"].n_tokens(part.audio.samples) == short.max_sequence_length


def test_a_modality_without_files_of_its_own_has_json(tmp_path: Path) -> None:
    tokenizers = {"text": small_tokenizers()["text"], "location": LocationTokenizer(LocationTokenizerConfig(n_bins=9))}
    model = small_model(tokenizers)
    assert has_files("location", model)
    for seed in range(5):
        [part] = model.generate("one", to="location", seed=seed).parts
        assert isinstance(part, DataPart)
        write_part(part, tmp_path / "a.json")
        stored_entries = [{place.kind: list(place.coordinates)} for place in part.data]
        assert json.loads((tmp_path / "a.json").read_bytes()) == stored_entries
        assert read_part(tmp_path / "a.json", model) == part
        [output] = generate_files(model, [f"@{tmp_path / 'a.json'}"], ["location"], seed=seed)
        assert output.path is None
        assert output.text == model.generate(part, to="location", seed=seed).parts[0].json
    (tmp_path / "b.json").write_bytes(b"{")
    with pytest.raises(OmniformError, match=r"b\.json: 1 bytes of locations are not JSON"):
        read_part(tmp_path / "b.json", model)
