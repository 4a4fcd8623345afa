"""What a line typed in a chat means."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from omniform.errors import OmniformError
from omniform.inference.chat_commands import (
    COMMANDS,
    parse_assignments,
    parse_command,
    parse_names,
    parse_seed,
    parse_switch,
    split_prompt,
    split_words,
)
from omniform.inference.chat_input import ChatCompleter, plain_lines

WORDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a seven", ["a seven"]),
        ("  a seven ", ["a seven"]),
        ("what is @a.png ?", ["what is", Path("a.png"), "?"]),
        ("@a.png @b.wav", [Path("a.png"), Path("b.wav")]),
        ("@'my file.png' and @\"your's.png\"", [Path("my file.png"), "and", Path("your's.png")]),
        ("@@home is @@ here", ["@home is @ here"]),
        ("me@home.org", ["me@home.org"]),
        ("@~/a.png", [Path.home() / "a.png"]),
        ("//usr is a folder", ["/usr is a folder"]),
        ("two\nlines @a.png", ["two\nlines", Path("a.png")]),
        ("", []),
        ("   ", []),
    ],
)
def test_prompts(line: str, parts: list[str | Path]) -> None:
    assert parse_command(line) is None
    assert split_prompt(line) == parts


@given(st.lists(st.one_of(WORDS, WORDS.map(Path)), max_size=6))
def test_texts_and_files_come_back_in_order(given_parts: list[str | Path]) -> None:
    joined: list[str | Path] = []
    for part in given_parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += f" {part}"
        else:
            joined.append(part)
    line = " ".join(f"@{part}" if isinstance(part, Path) else part for part in given_parts)
    assert split_prompt(line) == joined


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/to text,image", ("to", "text,image")),
        ("/quit", ("quit", "")),
        ("/exit", ("quit", "")),
        ("/?", ("help", "")),
        ("/save  a b.jsonl ", ("save", "a b.jsonl")),
    ],
)
def test_commands(line: str, command: tuple[str, str]) -> None:
    assert parse_command(line) == command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tow image", r"unknown command /tow: did you mean /to\?"),
        ("/settngs", r"did you mean /settings\?"),
        ("/", "unknown command /: /help lists"),
        ("/xyzzy", "write // for text that starts with a slash"),
    ],
)
def test_unknown_commands_are_answered_with_what_may_be_meant(line: str, message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        parse_command(line)


def test_a_file_dropped_on_the_line_is_told_from_a_command(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(OmniformError, match="that is a file: write @ before it"):
        parse_command(str(tmp_path / "a.png"))


def test_names_settings_seeds_and_switches() -> None:
    known = ["text", "image"]
    assert parse_names("text, image text", known, "any") == ["text", "image", "text"]
    assert parse_names("any", known, "any") == ["any"]
    assert parse_assignments("a=1 b=0.5 c=", "abc") == {"a": 1, "b": 0.5, "c": None}
    assert parse_assignments("negative_prompt='a 7' a=hot", ["a", "negative_prompt"]) == {
        "negative_prompt": "a 7",
        "a": "hot",
    }
    assert (parse_seed(""), parse_seed("12")) == (None, 12)
    assert (parse_switch("on"), parse_switch("off")) == (True, False)
    assert split_words("a 'b c'") == ["a", "b c"]


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (lambda: parse_names("speech", ["text"], "any"), "cannot answer with 'speech', expected some of text, any"),
        (lambda: parse_names("", ["text"], "any"), "no modality is named"),
        (lambda: parse_names("any,text", ["text"], "any"), "with any the model chooses"),
        (lambda: parse_assignments("", ["steps"]), "nothing to set"),
        (lambda: parse_assignments("step=3", ["steps"]), r"unknown setting 'step': did you mean steps\?"),
        (lambda: parse_assignments("steps", ["steps"]), "steps has no value"),
        (lambda: parse_seed("-1"), "'-1', expected an integer in"),
        (lambda: parse_seed(str(2**63)), "expected an integer in"),
        (lambda: parse_switch("maybe"), "'maybe', expected on or off"),
        (lambda: split_words("it's"), "a quote has no other half"),
        (lambda: split_prompt("what is @ this"), "no file is named after @"),
    ],
)
def test_what_cannot_be_meant_is_named(parse: object, message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        parse()  # type: ignore[operator]


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "seven.png").touch()
    (tmp_path / "with space.png").touch()
    completer = ChatCompleter(["text", "image", "any"], ["steps", "top_k", "top_p"])

    def completed(line: str) -> set[str]:
        found = completer.get_completions(Document(line), CompleteEvent(completion_requested=True))
        return {line[: len(line) + one.start_position] + one.text for one in found}

    assert completed("/se") == {"/set", "/settings", "/seed"}
    assert completed("/") == {f"/{name}" for name in COMMANDS}
    assert completed("/to text,im") == {"/to text,image"}
    assert completed("/set top_") == {"/set top_k=", "/set top_p="}
    assert completed("/keep o") == {"/keep on", "/keep off"}
    assert completed(f"what is @{tmp_path}/") == {f"what is @{tmp_path}/seven.png"}
    assert completed(f"/attach {tmp_path}/se") == {f"/attach {tmp_path}/seven.png"}
    assert completed("a seven") == completed("@@a") == completed("//se") == set()


def test_plain_lines_lose_their_ends_only() -> None:
    assert list(plain_lines(io.StringIO("a \r\n\n b"))) == ["a ", "", " b"]
