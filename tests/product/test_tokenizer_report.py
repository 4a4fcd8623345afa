"""The report on a tokenizer: whole, self-contained, and saying what the figures say; the command that makes it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from omniform.cli import app
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.tokenizer_report import figures_as_text, tokenizer_section, write_tokenizer_report
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig

PART = {"accuracy_before": 1.0, "accuracy_after": 0.5, "n": 2}
FIGURES: dict[str, Any] = {
    "modality": "speech",
    "kind": "speech_codec",
    "split": "test",
    "folder": "test-<speech>",
    "n": 4,
    "tokens_per_second": 25.0,
    "si_sdr_db": None,
    "log_mel_distance_db": 3.14159,
    "by_codebook": [{"code_use": 0.5, "perplexity": 7.25}],
    "judge": {
        "accuracy_before": 0.875,
        "accuracy_after": 0.8,
        "n": 4,
        "ci95_before": [0.5, 1.0],
        "ci95_after": [0.4, 0.95],
        "ratio": 0.914,
        "ci95_ratio": [0.85, 1.02],
        "n_sources": 2,
        "per_class": {"3": PART},
        "by_voice": {"<voice>": PART},
        "confusions": [{"right": "3", "judged": "none", "n": 2}],
    },
}
SAID = {"right": "3", "before": "3", "after": "none"}
EXAMPLES: list[dict[str, Any]] = [
    {"kind": "lost", "place": 1, "digit": 3, "voice": "<voice>", "judge": SAID, "before": "1.wav", "after": "2.wav"},
    {"kind": "best", "place": 0, "digit": 3, "judge": {**SAID, "after": "3"}, "picture": "0.gif"},
    {"kind": "worst", "place": 2, "before_text": "a <b>", "after_text": "c"},
]


class Balanced(HTMLParser):
    """Fails on a tag that closes another one; notes what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action"}]
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    (tmp_path / "examples").mkdir()
    (tmp_path / "tokenizer.json").write_text(json.dumps(FIGURES))
    (tmp_path / "examples.json").write_text(json.dumps(EXAMPLES))
    for name in ("examples/1.wav", "examples/2.wav", "examples/0.gif", "reconstructions.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_page_is_whole_plays_sound_and_needs_nothing_else(evaluated: Path) -> None:
    content = write_tokenizer_report(evaluated).read_text()
    page = Balanced()
    page.feed(content)
    assert page.open == []
    assert page.tags.count("audio") == 2
    assert page.tags.count("img") == 2
    assert [reference.partition(";")[0] for reference in page.references] == [
        "data:image/png",
        "data:audio/wav",
        "data:audio/wav",
        "data:image/gif",
    ]
    assert not re.search(r"https?://|url\(|@import|<script", content)
    for told in (
        "test-<speech>",
        "87.5% [50.0% - 100.0%] of 4 originals from 2 sources",
        "91.4% [85.0% - 102.0%]",
        "3.142",
        "<voice>",
        "3 as none (2)",
        "a <b>",
    ):
        assert told in page.text
    assert tokenizer_section(evaluated) in content


def test_page_shows_no_pictures_of_others(evaluated: Path) -> None:
    before = tokenizer_section(evaluated)
    (evaluated / "holiday.png").write_bytes(b"private")
    (evaluated / "examples" / "holiday.gif").write_bytes(b"private")
    assert tokenizer_section(evaluated) == before


def test_long_texts_are_shown_about_where_they_part(evaluated: Path) -> None:
    long, other = "x" * 5000 + "here" + "y" * 5000, "x" * 5000 + "there" + "y" * 5000
    entry = {"kind": "worst", "place": 0, "before_text": long, "after_text": other}
    (evaluated / "examples.json").write_text(json.dumps([entry]))
    content = tokenizer_section(evaluated)
    assert len(content) < 5000
    assert "before: " + "x" * 40 + "here" in content
    assert "after: " + "x" * 40 + "there" in content


def test_first_examples_are_said_to_be_of_each_class_where_there_is_a_judge(evaluated: Path) -> None:
    plain = {"kind": "as it came", "place": 0, "digit": 3, "before_text": "a", "after_text": "a"}
    for entry, title in ((plain, "the first"), ({**plain, "judge": SAID}, "the first of each class")):
        (evaluated / "examples.json").write_text(json.dumps([entry]))
        assert f"<h4>As they came: {title}</h4>" in tokenizer_section(evaluated)


def test_text_says_what_the_page_says() -> None:
    text = figures_as_text(FIGURES)
    assert text.splitlines()[0] == "Tokenizer of speech (speech_codec): 4 items of test-<speech>"
    assert "log mel distance dB     3.142" in text
    assert "codebook 0: perplexity  7.25" in text
    assert "voice <voice>  100.0%  50.0%  2" in text
    assert "None" not in text


def test_the_command_prints_tables_or_json_and_writes_a_page(tmp_path: Path) -> None:
    config = SpeechTokenizerConfig(width=8, n_blocks=0)
    SpeechTokenizer(config, config.build()).save(tmp_path / "speech")
    sound = audio_bytes(0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0)), 16_000, "wav")
    with ShardWriter(tmp_path / "world" / "test-speech") as writer:
        writer.write(RawSample("one", (RawSpan("speech", payload=sound, extension="wav"),), {}))
    command = ["tokenizer", "eval", str(tmp_path / "speech"), "--data", str(tmp_path / "world")]
    shown = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert "Tokenizer of speech (speech_codec): 1 items of test-speech" in shown.output
    assert f"report: {tmp_path / 'out' / 'report.html'}" in shown.output
    assert "<audio" in (tmp_path / "out" / "report.html").read_text()
    figures = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).output)
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    changing = "encoding_times_real_time"
    assert {**figures, changing: 0} == {**written, changing: 0}
