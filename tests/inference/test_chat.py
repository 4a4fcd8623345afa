"""A chat, line by line: its replies are those of `generate`, and nothing that is typed ends it but /quit."""

import io
import json
import signal
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.chat import Chat
from omniform.inference.chat_transcript import FiledPart, Turn, as_messages
from omniform.inference.destination import reserve_file
from omniform.inference.generate import Model
from omniform.inference.protocol import ImagePart, SpeechPart, TextPart
from omniform.inference.terminal import Screen
from omniform.inference.terminal_text import harmless
from omniform.modeling.folder import LoadedModel
from omniform.modeling.model import UnifiedModel
from omniform.tokenizers.audio_files import Audio


class Conversation:
    """A chat whose results and notes are kept."""

    def __init__(self, model: Model, out_dir: Path, to: str | None = None, results: io.StringIO | None = None) -> None:
        self.results, self.notes = results or io.StringIO(), io.StringIO()
        self.chat = Chat(model, Screen(self.results, self.notes, {}), to, out_dir, seed=3)

    def say(self, *lines: str) -> tuple[str, str]:
        """Return what was printed for the lines: results, notes."""
        before = len(self.results.getvalue()), len(self.notes.getvalue())
        for line in lines:
            assert self.chat.handle(line)
        return self.results.getvalue()[before[0] :], self.notes.getvalue()[before[1] :]


@pytest.fixture
def talk(omni: Model, tmp_path: Path) -> Conversation:
    return Conversation(omni, tmp_path / "out")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.new("L", (2, 2), 200).save(path)
    return path


def test_text_is_what_generate_says_and_makes_no_folder(omni: Model, talk: Conversation, tmp_path: Path) -> None:
    results, notes = talk.say("a seven")
    assert results == harmless(omni.generate("a seven", seed=3).text) + "\n"
    assert "seed 3, " in notes
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_on_the_way_is_noted(omni: Model, tmp_path: Path, picture: Path) -> None:
    omni.through = {"image": {"image": "text"}}
    results, notes = Conversation(omni, tmp_path / "out", to="image").say(f"/attach '{picture}'", "")
    [written] = omni.generate(Image.open(picture), "image", seed=3).through
    assert f"by way of: {harmless(written.data)}" in notes
    assert written.data not in results


def test_pictures_go_to_numbered_files_that_were_not_there(omni: Model, talk: Conversation, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "002.wav").write_bytes(b"mine")
    results, _ = talk.say("/to text,image", "a seven", "/again")
    expected = omni.generate("a seven", ["text", "image"], seed=3)
    assert [line for line in results.splitlines() if line.startswith(str(folder))] == [
        f"{folder}/{name}.png (image, 2 x 2 pixels)" for name in ("001", "003")
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["001.png", "002.wav", "003.png"]
    for name in ("001", "003"):
        assert Image.open(folder / f"{name}.png").tobytes() == expected.images[0].tobytes()


def test_files_go_before_the_prompt_or_where_they_stand(omni: Model, talk: Conversation, picture: Path) -> None:
    shown = Image.open(picture)
    assert talk.say(f"what is @'{picture}' ?")[0] == harmless(
        omni.generate(["what is", shown, "?"], seed=3).text + "\n"
    )
    talk.say(f"/attach '{picture}'")
    assert talk.chat.prompt_message() == "to text +1 file> "
    assert talk.say("a b")[0] == harmless(omni.generate([shown, "a b"], seed=3).text + "\n")
    assert talk.chat.prompt_message() == "to text> "
    talk.say(f"/attach '{picture}' '{picture}'")
    assert talk.say("")[0] == harmless(omni.generate([shown, shown], seed=3).text + "\n")
    assert talk.say("", "  ") == ("", "")


def test_files_wait_until_a_prompt_could_be_answered(omni: Model, talk: Conversation, picture: Path) -> None:
    talk.say(f"/attach '{picture}'")
    _, notes = talk.say("x" * 100)
    assert "error: prompt too long" in notes
    assert talk.chat.prompt_message() == "to text +1 file> "
    assert talk.say("a")[0] == harmless(omni.generate([Image.open(picture), "a"], seed=3).text + "\n")


def test_earlier_turns_are_read_only_when_kept(omni: Model, talk: Conversation) -> None:
    first = omni.generate("a", seed=3)
    alone = omni.generate("b", seed=3).text
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": list(first.parts)},
        {"role": "user", "content": "b"},
    ]
    after = omni.generate(chat, seed=3).text
    assert alone != after
    assert talk.say("a", "b")[0].endswith(harmless(f"{alone}\n"))
    talk.say("/clear", "/keep on")
    assert talk.say("a", "b")[0].endswith(harmless(f"{after}\n"))
    # Another reply takes the place of the one before.
    assert talk.say("/again")[0] == harmless(f"{after}\n")
    talk.say("/clear")
    assert talk.say("b")[0] == harmless(f"{alone}\n")


def test_settings_and_seeds_hold_until_they_are_taken_back(omni: Model, talk: Conversation) -> None:
    talk.say("/set temperature=0 max_new_tokens=5", "/seed 8")
    assert talk.say("a")[0] == harmless(omni.generate("a", seed=8, temperature=0, max_new_tokens=5).text + "\n")
    talk.say("/set temperature= max_new_tokens=")
    assert talk.say("a")[0] == harmless(omni.generate("a", seed=8).text + "\n")
    talk.say("/seed")
    _, notes = talk.say("a", "/again")
    seeds = [line.split(",")[0] for line in notes.splitlines() if line.startswith("seed ")]
    assert len(set(seeds)) == 2


def test_a_transcript_says_how_each_reply_can_be_had_again(
    omni: Model, talk: Conversation, tmp_path: Path, picture: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    talk.say("/to text,image", "/set temperature=0.5", f"a @'{picture}'", f"/save {path}")
    prompt, reply = [json.loads(line) for line in path.read_text().splitlines()]
    assert prompt == {
        "role": "user",
        "parts": [{"modality": "text", "text": "a"}, {"modality": "image", "path": str(picture)}],
    }
    text, image = reply["parts"]
    again = omni.generate(["a", Image.open(picture)], reply["to"], seed=reply["seed"], **reply["settings"])
    assert text == {"modality": "text", "text": again.text}
    assert Image.open(image["path"]).tobytes() == again.images[0].tobytes()
    talk.say("b", f"/save {path}")
    assert len(path.read_text().splitlines()) == 4
    _, notes = talk.say(f"/save '{picture}'")
    assert "exists already" in notes
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a picture.png", "chat.jsonl", "out"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tow image", "did you mean /to?"),
        ("/to speech", "cannot answer with 'speech', expected some of text, image, any"),
        ("@missing.png", "missing.png: cannot be read: No such file"),
        ("/attach missing.png", "missing.png: cannot be read: No such file"),
        ("/attach", "no file is named after /attach"),
        ("@sound.wav", "sound.wav: .wav is no kind of file that this model takes"),
        ("x" * 100, "prompt too long"),
        ("/again", "there is none yet"),
        ("/set temprature=1", "did you mean temperature?"),
        ("/set temperature=-1", "temperature is -1, expected greater than or equal to 0"),
        ("/set temperature=hot", "temperature is 'hot'"),
        ("/seed x", "'x', expected an integer"),
        ("/keep", "expected on or off"),
        ("/save", "no file is named after /save"),
        ("/save nowhere/at/all.jsonl", "nowhere/at/all.jsonl: cannot be written: No such file"),
    ],
)
def test_mistakes_are_answered_and_the_chat_goes_on(
    omni: Model, talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    results, notes = talk.say(line)
    assert results == ""
    assert notes.startswith("error: ")
    assert message in notes
    assert talk.chat.n_errors == 1
    assert list(tmp_path.iterdir()) == []
    assert talk.say("a seven")[0] == harmless(omni.generate("a seven", seed=3).text + "\n")


def test_a_chat_starts_with_what_the_model_has(omni: Model, tmp_path: Path) -> None:
    with pytest.raises(OmniformError, match="cannot answer with 'smell', expected some of text, image"):
        Conversation(omni, tmp_path, "smell")


def test_a_setting_that_does_not_apply_is_taken_back_by_the_command_that_is_named(talk: Conversation) -> None:
    _, notes = talk.say("/set steps=3", "a")
    assert "error: steps does not apply to text" in notes
    assert "/set steps= takes steps back" in notes
    results, notes = talk.say("/set steps=", "/again")
    assert results
    assert "error" not in notes


def test_a_part_that_cannot_be_written_does_not_cost_the_others(omni: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    talk = Conversation(omni, tmp_path / "file", "image,text")
    results, notes = talk.say("a")
    assert f"error: cannot make a file in {tmp_path / 'file'}: " in notes
    assert results == harmless(omni.generate("a", ["image", "text"], seed=3).text + "\n")


def test_a_picture_that_could_not_be_written_is_still_read_later(omni: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    talk = Conversation(omni, tmp_path / "file", "image")
    talk.say("/keep on", "a", "/to text")
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": omni.generate("a", "image", seed=3).images[0]},
        {"role": "user", "content": "b"},
    ]
    assert omni.generate(chat, seed=3).text != omni.generate("ab", seed=3).text
    assert talk.say("b")[0] == harmless(omni.generate(chat, seed=3).text + "\n")


def test_what_says_nothing_is_not_read_later() -> None:
    parts = [
        TextPart(""),
        SpeechPart(Audio(torch.zeros(0), 16000)),
        SpeechPart(Audio(torch.zeros(1), 16000)),
        ImagePart(Image.new("L", (2, 2))),
    ]
    turn = Turn([FiledPart(TextPart("a"))], ["text"], 3, {}, [FiledPart(part) for part in parts])
    _, answer, _ = as_messages([turn], turn.prompt)
    assert answer == {"role": "assistant", "content": parts[2:]}


def test_several_chats_can_share_a_folder_and_replace_no_file(tmp_path: Path) -> None:
    suffixes = [".png", ".wav"] * 50
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda suffix: reserve_file(tmp_path / "out", suffix), suffixes))
    assert len(set(paths)) == len(suffixes)
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert [path.suffix for path in paths] == suffixes


def test_a_model_that_has_not_learnt_to_choose_is_not_asked_to(omni: Model, tmp_path: Path) -> None:
    config = replace(omni.network.config, next_span_weight=0.0)
    network = UnifiedModel(config, omni.network.vocabulary)
    told = Model(LoadedModel(network, omni.tokenizers, {"max_sequence_length": 60}))
    talk = Conversation(told, tmp_path)
    _, notes = talk.say("/to any")
    assert 'error: to is "any", but this model has not learnt what follows a part' in notes
    assert talk.chat.to == ["text"]
    with pytest.raises(OmniformError, match="has not learnt what follows a part"):
        Conversation(told, tmp_path, "any")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_shown_has_no_control_character(text: str) -> None:
    shown = harmless(text)
    assert len(shown) == len(text)
    assert harmless(shown) == shown
    for old, new in zip(text, shown, strict=True):
        obeyed = unicodedata.category(old) in ("Cc", "Cf", "Zl", "Zp") and old not in "\n\t\u200c\u200d"
        assert new == ("\ufffd" if obeyed else old)


def test_text_that_turns_a_line_around_is_shown_as_it_stands() -> None:
    assert harmless("a\u202ebc\u2069 \ufeff\u200b\u2028d\x9b2J") == "a\ufffdbc\ufffd \ufffd\ufffd\ufffdd\ufffd2J"
    assert harmless("می\u200cخواهم 👩\u200d🔬\n\t") == "می\u200cخواهم 👩\u200d🔬\n\t"


class Impatient(io.StringIO):
    """A terminal whose user presses Ctrl-C when the `moment`-th piece is printed."""

    def __init__(self, moment: int) -> None:
        super().__init__()
        self.n_left = moment

    def write(self, text: str) -> int:
        self.n_left -= 1
        if self.n_left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.mark.parametrize("moment", range(1, 6))
def test_ctrl_c_keeps_whole_parts_and_no_other(omni: Model, tmp_path: Path, moment: int) -> None:
    talk = Conversation(omni, tmp_path / "out", "image,text,image", Impatient(moment))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        talk.say("a")
    assert signal.getsignal(signal.SIGINT) is before
    [turn] = talk.chat.turns
    assert turn.stopped
    assert len(turn.reply) < 3
    whole = omni.generate("a", ["image", "text", "image"], seed=3)
    assert [filed.part.data for filed in turn.reply] == [part.data for part in whole.parts[: len(turn.reply)]]
    files = [filed.path for filed in turn.reply if filed.path]
    assert sorted((tmp_path / "out").iterdir()) == files
    assert [Image.open(path).tobytes() for path in files] == [whole.images[0].tobytes()] * len(files)
    talk.say("/keep on", "/to text")
    after = len(talk.results.getvalue())
    talk.say("b")
    assert talk.results.getvalue()[after:].strip("\n") == harmless(omni.generate("b", seed=3).text).strip("\n")


def test_help_lists_what_there_is_and_quit_leaves(talk: Conversation) -> None:
    results, notes = talk.say("/help", "/settings")
    assert results == ""
    assert all(word in notes for word in ("/attach FILE", "guidance_scale", "Ctrl-C", "temperature=1.0", "seed=3"))
    assert not talk.chat.handle("/quit")
