"""`omniform generate`: what its arguments mean, which files it writes, and what it says of those it cannot use."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from sample_sounds import sine, stored
from small_codecs import small_model, small_tokenizers

from omniform.errors import OmniformError
from omniform.inference.command import generate_files, read_argument
from omniform.inference.generate import Model
from omniform.inference.part_files import read_part
from omniform.inference.protocol import ImagePart, TextPart
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video_files import read_video


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "seven.png"
    Image.new("L", (2, 2), 200).save(path)
    return path


def test_text_at_signs_and_files(omni: Model, tmp_path: Path, picture: Path) -> None:
    (tmp_path / "note.txt").write_text("a seven")
    assert read_argument("a seven", omni) == TextPart("a seven")
    assert read_argument("@@home", omni) == TextPart("@home")
    assert read_argument(f"@{tmp_path / 'note.txt'}", omni) == TextPart("a seven")
    part = read_argument(f"@{picture}", omni)
    assert isinstance(part, ImagePart)
    assert part.image.tobytes() == Image.open(picture).tobytes()


def test_text_that_names_a_file_is_said_to_be_text(
    omni: Model, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_argument(str(picture), omni) == TextPart(str(picture))
    assert capsys.readouterr().err == f"{picture} is taken as text; for the file write @{picture}\n"
    for argument in (f"@{picture}", "a seven", "x" * 5000, "a\0b"):
        read_argument(argument, omni)
    assert capsys.readouterr().err == ""


def test_names_can_stand_in_one_text_with_commas(four: Model, tmp_path: Path) -> None:
    found = [
        [(output.modality, output.text) for output in generate_files(four, ["a"], to, tmp_path / "a", seed=1)]
        for to in (["image,text"], ["image", "text"])
    ]
    assert found[0] == found[1]


def test_a_file_prompts_as_its_picture_does(omni: Model, picture: Path) -> None:
    [output] = generate_files(omni, ["what is", f"@{picture}"], seed=4)
    assert output.text == omni.generate(["what is", Image.open(picture)], seed=4).text
    assert (output.modality, output.path, output.sample, output.seed) == ("text", None, 0, 4)


def test_pictures_go_to_out_and_text_does_not(omni: Model, tmp_path: Path) -> None:
    out = tmp_path / "drawn.png"
    text, image = generate_files(omni, ["seven"], ["text", "image"], out, seed=1)
    assert (text.path, image.path) == (None, out)
    assert Image.open(out).tobytes() == omni.generate("seven", ["text", "image"], seed=1).images[0].tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


def test_what_was_written_on_the_way_is_told(omni: Model, tmp_path: Path, picture: Path) -> None:
    omni.through = {"image": {"image": "text"}}
    [output] = generate_files(omni, [f"@{picture}"], ["image"], tmp_path / "a.png", seed=1)
    assert output.through == (omni.generate(Image.open(picture), ["text", "image"], seed=1).text,)
    [output] = generate_files(omni, [f"@{picture}"], ["image"], tmp_path / "a.png", seed=1, direct=True)
    assert output.through == ()


def test_several_pictures_are_numbered(omni: Model, tmp_path: Path) -> None:
    outputs = generate_files(omni, ["seven"], ["image"], tmp_path / "a.png", seed=1, n=3)
    assert [output.path for output in outputs] == [tmp_path / f"a-{number}.png" for number in range(3)]
    replies = omni.generate_batch([["seven"]] * 3, "image", seed=1)
    assert [Image.open(o.path).tobytes() for o in outputs if o.path] == [r.images[0].tobytes() for r in replies]


def test_text_alone_goes_to_out_if_it_is_given(omni: Model, tmp_path: Path) -> None:
    [output] = generate_files(omni, ["seven"], out=tmp_path / "a.txt", seed=1)
    assert (tmp_path / "a.txt").read_text() == f"{output.text}\n"


def test_without_out_a_picture_goes_to_the_current_folder(
    omni: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generate_files(omni, ["seven"], ["image"], seed=12)
    assert [path.name for path in tmp_path.iterdir()] == ["omniform-12.png"]


@pytest.fixture(scope="module")
def four() -> Model:
    return small_model(small_tokenizers())


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "seven.flac"
    path.write_bytes(stored(sine(0.3, 22050), 22050, "FLAC"))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_speech_in_video_out_in_one_call(four: Model, tmp_path: Path, sound: Path, suffix: str) -> None:
    out = tmp_path / f"seven{suffix}"
    [output] = generate_files(four, [f"@{sound}"], ["video"], out, seed=2)
    assert (output.modality, output.path, output.text) == ("video", out, None)
    reply = four.generate([read_part(sound, four)], "video", seed=2)
    written = read_video(out, fps=None, max_frames=99, mode="L").frames
    assert written.shape == reply.videos[0].frames.shape == (9, 32, 32, 1)
    assert np.abs(written.astype(float) - reply.videos[0].frames).mean() < 16


@pytest.mark.parametrize(
    ("out", "names"),
    [
        ("a.wav", ["a.wav", "a.png", None]),
        ("a.jpg", ["a.wav", "a.jpg", None]),
        ("a.txt", ["a.wav", "a.png", "a.txt"]),
        ("a", ["a.wav", "a.png", "a.txt"]),
        (".", ["omniform-7.wav", "omniform-7.png", "omniform-7.txt"]),
    ],
)
def test_parts_of_several_modalities_go_beside_each_other(
    four: Model, tmp_path: Path, out: str, names: list[str | None]
) -> None:
    to = ["speech", "image", "text"]
    outputs = generate_files(four, ["seven"], to, tmp_path / out, seed=7, max_new_tokens=9)
    assert [output.modality for output in outputs] == to
    assert [output.path and output.path.name for output in outputs] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name for name in names if name)
    assert outputs[2].text == four.generate("seven", to, seed=7, max_new_tokens=9).text


def test_only_names_that_several_parts_would_have_get_numbers(four: Model, tmp_path: Path) -> None:
    to = ["image", "video", "image"]
    outputs = generate_files(four, ["seven"], to, tmp_path / "a.gif", seed=7)
    assert [output.path and output.path.name for output in outputs] == ["a-0.png", "a.gif", "a-1.png"]
    outputs = generate_files(four, ["seven"], ["video", "image"], tmp_path / "b", seed=7, n=2)
    assert [output.path and output.path.name for output in outputs] == ["b-0.mp4", "b-0.png", "b-1.mp4", "b-1.png"]
    assert [output.sample for output in outputs] == [0, 0, 1, 1]


def test_speech_without_a_sample_has_no_file(four: Model, tmp_path: Path) -> None:
    # One that the model ends at once.
    replies = four.generate_batch(["seven"] * 99, "speech", seed=[*range(99)], max_new_tokens=2)
    seed = next(reply.seed for reply in replies if not len(reply.speech[0].samples))
    outputs = generate_files(four, ["seven"], ["speech", "image"], tmp_path / "a", seed=seed, max_new_tokens=2)
    assert [output.path for output in outputs] == [None, tmp_path / "a.png"]
    [audio] = four.generate("seven", "speech", seed=seed, max_new_tokens=2).speech
    assert (len(audio.samples), audio.rate) == (0, 16000)
    with pytest.raises(OmniformError, match="max_new_tokens is 1, but speech takes 2 for one frame of its codes"):
        four.generate("seven", "speech", seed=seed, max_new_tokens=1)


def test_a_modality_without_form_outside_of_python_is_refused(tmp_path: Path) -> None:
    class Bare(SentencePieceTokenizer):
        name: ClassVar[str] = "bare"

    model = small_model({"text": small_tokenizers()["text"], "bare": Bare.train(["one digit"], vocab_size=265)})
    with pytest.raises(OmniformError, match="a bare part can neither be printed nor written"):
        generate_files(model, ["a"], ["bare"], tmp_path / "a.json")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("@missing.png", r"@missing\.png: cannot be read: No such file.*write @@ for text"),
        ("@folder.png", "cannot be read: Is a directory"),
        ("@broken.png", r"@broken\.png: 3 bytes are not a PNG"),
        ("@sound.wav", r"\.wav is no kind of file that this model takes, which has text, image"),
        ("@noname", "a name without suffix is no kind of file"),
        ("", "empty text"),
        ("@empty.txt", r"@empty\.txt: .*empty text"),
        ("@huge.png", r"@huge\.png: the file is too large, expected at most"),
        ("@", "no kind of file.*write @@ for text"),
    ],
)
def test_unusable_files_are_named(
    omni: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").write_bytes(b"xyz")
    (tmp_path / "empty.txt").write_bytes(b"")
    with (tmp_path / "huge.png").open("wb") as sparse:
        sparse.truncate(2**30)
    (tmp_path / "sound.wav").write_bytes(b"RIFF")
    with pytest.raises(OmniformError, match=message):
        generate_files(omni, ["a", argument])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"to": ["image"], "out": "nowhere/a.png"}, "there is no folder"),
        ({"to": ["image"], "out": "a.sevn"}, r"\.sevn does not fit the reply, use \.png \.jpg"),
        ({"to": ["image"], "out": "a.psd"}, r"\.psd does not fit"),  # Pillow reads it, but cannot write it
        ({"out": "a.png"}, r"\.png does not fit the reply, use \.txt \.md for text"),
        ({"to": ["image", "text"], "out": "a.wav"}, r"\.wav does not fit the reply, use \.png .* or \.txt"),
        ({"to": ["any"], "out": "a.wav"}, r"\.wav does not fit the reply, use \.txt"),
        ({"to": ["any", "text"]}, r"to is \['any', 'text'\], but .any. lets the model choose all parts"),
        ({"to": ["image"], "steps": 5}, "steps is 5, but image has 4 tokens: give at most 4"),
        ({"mask": Path("a.png")}, "--mask .* give the picture, with --image"),
        ({"to": ["image"], "temperature": -1}, "temperature is -1"),
    ],
)
def test_bad_options_write_nothing(omni: Model, tmp_path: Path, keywords: dict[str, Any], message: str) -> None:
    if "out" in keywords:
        keywords = {**keywords, "out": tmp_path / keywords["out"]}
    with pytest.raises(OmniformError, match=message):
        generate_files(omni, ["a"], **keywords)
    assert list(tmp_path.iterdir()) == []
