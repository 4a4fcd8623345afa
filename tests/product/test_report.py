"""The report is one well-formed page that needs nothing else, shows and plays what it holds, and says what metrics.json
says."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omniform.errors import OmniformError
from omniform.report import write_report
from omniform.tokenizers.audio_files import audio_bytes, read_audio
from omniform.tokenizers.video_files import read_video
from omniform.tokenizers.video_writing import video_bytes

MODALITIES = ("text", "image", "speech", "video")
CELLS = tuple(f"{source}->{target}" for source in MODALITIES for target in MODALITIES)
VOID = {"meta", "img", "br"}
HOSTILE = "</span><script>alert(1)</script><img src=x onerror=\"alert(2)\"> & 'co'"
STAGES = {"data": {"seconds": 61.2, "peak_mib": 512.0}, "model": {"seconds": 10.0, "peak_mib": 2048.0}}


class Page(HTMLParser):
    """Fails on a tag that closes another one; notes what the page holds and refers to."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take `<line/>`, which opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def attributes(self, *names: str) -> list[str]:
        return [value or "" for _, own in self.tags for name, value in own.items() if name in names]


def media() -> dict[str, dict[str, str]]:
    """Return a part of each modality, as samples.json holds it."""
    picture, frames = io.BytesIO(), np.zeros((3, 32, 32, 1), dtype=np.uint8)
    Image.new("L", (16, 16), 200).save(picture, "PNG")
    sound = audio_bytes(0.1 * torch.randn(800, generator=torch.Generator().manual_seed(0)), 16_000, "flac")
    files = {
        "image": ("image/png", picture.getvalue()),
        "speech": ("audio/flac", sound),
        "video": ("video/mp4", video_bytes(frames, 9, "mp4")),
    }
    urls = {name: {name: f"data:{kind};base64,{base64.b64encode(f).decode()}"} for name, (kind, f) in files.items()}
    return {"text": {"text": "a 'three' of <words>"}, **urls}


def figure(accuracy: float | None, n: int = 40) -> dict[str, Any]:
    bounds = None if accuracy is None else [accuracy / 2, 1.0]
    return {"accuracy": accuracy, "n": n, "ci95": bounds, "chance": 0.1, "ceiling": 0.8}


def cell(accuracy: float, **further: Any) -> dict[str, Any]:
    return {
        **figure(accuracy),
        "of_ceiling": accuracy / 0.8,
        "copy_rate": None,
        "copy_rate_train": None,
        "copy_rate_held_out": None,
        "macro_accuracy": accuracy,
        "per_class": {"3": {"accuracy": 1.0, "n": 2}, "7": {"accuracy": 0.0, "n": 3}},
        "digit": figure(accuracy),
        "motion": None,
        "held_out_pairs": None,
        "controls": {"shuffled": {"accuracy": 0.111, "n": 40}, "noise": {"accuracy": None, "n": 40}},
        "second_judge": None,
        **further,
    }


def metrics_of(cells: Sequence[str]) -> dict[str, Any]:
    """Return metrics in which each cell has an accuracy of its own."""
    scored = {name: cell(0.301 + 0.031 * place) for place, name in enumerate(cells)}
    return {"suite": "any-to-any", "split": "test", "seed": 0, "cells": scored}


def sample(source: str, target: str, right: bool, **further: Any) -> dict[str, Any]:
    parts = media()
    expected = {"digit": 3, "motion": "left" if {source, target} == {"text", "video"} else None}
    judged = expected if right else {"digit": 5, "motion": None}
    told = {"expected": expected, "judged": judged, "right": right, "copy": False}
    return {"prompt": parts[source], "reply": parts[target], **told, **further}


def samples_of(cells: Sequence[str], n_wrong: int = 1, n_right: int = 1) -> dict[str, Any]:
    rights = [False] * n_wrong + [True] * n_right
    sides = {name: name.partition("->") for name in cells}
    return {name: [sample(source, target, right) for right in rights] for name, (source, _, target) in sides.items()}


def report(folder: Path, **records: Any) -> str:
    """Write records into a folder and return the report on it."""
    for name, content in {"stages": STAGES, **records}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return write_report(folder, ["make demo"]).read_text()


def test_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    content = report(tmp_path, metrics=metrics_of(CELLS), samples=samples_of(CELLS))
    page = Page(content)
    assert page.open == []
    assert all(reference.startswith("data:") for reference in page.attributes("src", "srcset", "action", "poster"))
    assert not re.search(r"https?://|url\(|@import|<script|<link", content)
    anchors = page.attributes("id")
    assert len(anchors) == len(set(anchors)) == 16
    assert sorted(page.attributes("href")) == sorted(f"#{anchor}" for anchor in anchors)


def test_every_medium_is_described_and_decodes(tmp_path: Path) -> None:
    page = Page(report(tmp_path, metrics=metrics_of(CELLS), samples=samples_of(CELLS)))
    counts = {}
    for tag, description in (("img", "alt"), ("audio", "aria-label"), ("video", "aria-label")):
        shown = page.all(tag)
        counts[tag] = len(shown)
        assert all(own[description] for own in shown)
        for own in shown:
            payload = base64.b64decode((own["src"] or "").partition(",")[2], validate=True)
            if tag == "img":
                Image.open(io.BytesIO(payload)).verify()
            elif tag == "audio":
                assert len(read_audio(payload, 16_000)) == 800
                assert "controls" in own
            else:
                assert read_video(payload, fps=None, max_frames=9).frames.shape[:3] == (3, 32, 32)
                assert {"controls", "loop", "muted", "autoplay", "playsinline"} <= set(own)
    assert counts == {"img": 16, "audio": 16, "video": 16}  # two samples of 16 cells, as source and as target


def test_page_says_what_the_metrics_say(tmp_path: Path) -> None:
    metrics = metrics_of(CELLS)
    moving = {"motion": figure(0.713), "held_out_pairs": figure(0.691, 8), "copy_rate": 0.25}
    metrics["cells"]["text->video"] |= {**moving, "copy_rate_held_out": 0.125, "copy_rate_train": 1.0}
    metrics["cells"]["video->video"]["continues"] = {**figure(0.573), "shuffled": {"accuracy": 0.234, "n": 40}}
    second = {"name": "the other <one>", **figure(0.717)}
    metrics["cells"]["text->speech"] |= {"second_judge": second, "digit": figure(None, 0)}
    metrics["judges"] = {"video": {"name": "slope of <ink>", "fitted_on": "train: 9 clips"}, "text": {"name": "words"}}
    page = Page(report(tmp_path, metrics=metrics, samples=samples_of(CELLS)))
    assert "video is judged by: slope of <ink>; fitted on train: 9 clips" in page.text
    for own in metrics["cells"].values():
        assert f"{100 * own['accuracy']:.1f}%{100 * own['of_ceiling']:.1f}% of ceiling 80.0%95%: " in page.text
    told = (
        "71.3% of 80.0% (40)",
        "69.1% of 80.0% (8)",
        "25.0% (12.5%; 100.0%)",
        "71.7% of 80.0%",
        "the other <one>",
        "11.1%",
        "57.3% of 40",
        "than the given one: 23.4%",
    )
    for shown in (*told, "100% of 2", "0% of 3", "1 min 11 s", "2.0 GiB"):
        assert shown in page.text
    assert len(page.all("caption")) == len(page.all("table")) - 1  # that of stages follows its heading


def test_a_cell_without_figures_says_why(tmp_path: Path) -> None:
    metrics = metrics_of([name for name in CELLS if name != "video->video"]) | {
        "missing": [{"cell": "video->video", "reason": "the split has no <continued> clips"}]
    }
    page = Page(report(tmp_path, metrics=metrics, samples={}))
    assert "not scoredthe split has no <continued> clips" in page.text
    assert "not scored, the split has no <continued> clips: video \u2192 video" in page.text


def test_a_model_of_texts_and_pictures_has_a_map_of_these(tmp_path: Path) -> None:
    cells = ("text->image", "image->text", "text->text")
    page = Page(report(tmp_path, metrics=metrics_of(cells), samples=samples_of(cells)))
    assert [page.text.count(f"to {name}") > 0 for name in MODALITIES] == [True, True, False, False]
    assert page.text.count("not scored") == 1
    assert "text and pictures that tell of a digit" in page.text


@pytest.mark.parametrize(
    ("n_wrong", "n_right", "shown"),
    [(9, 30, (4, 6)), (2, 30, (2, 8)), (9, 3, (7, 3)), (0, 30, (0, 10)), (9, 0, (9, 0))],
)
def test_failures_stand_before_successes_and_both_are_counted(
    n_wrong: int, n_right: int, shown: tuple[int, int], tmp_path: Path
) -> None:
    name = "video->text"
    content = report(tmp_path, metrics=metrics_of([name]), samples=samples_of([name], n_wrong, n_right))
    verdicts = re.findall(r"<em>(wrong|right): ([^<]*)</em>", content)
    assert (
        verdicts
        == [("wrong", "expected 3, left; judged 5, no motion")] * shown[0]
        + [("right", "expected 3, left; judged 3, left")] * shown[1]
    )
    assert f"{shown[0]} of {n_wrong} failures and {shown[1]} of {n_right} successes" in content


def test_samples_that_are_large_leave_the_page_bounded_and_are_counted(tmp_path: Path) -> None:
    noise = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    url = f"data:audio/wav;base64,{base64.b64encode(audio_bytes(noise, 16_000, 'wav')).decode()}"
    large = [sample("text", "speech", right=False, reply={"speech": url})] * 5
    content = report(tmp_path, metrics=metrics_of(["text->speech"]), samples={"text->speech": large})
    assert 4 * 2**20 < len(content) < 10 * 2**20
    assert "1 of 5 failures and 0 of 0 successes" in content


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    name = "text->text"
    entry = sample("text", "text", right=False, prompt={"text": HOSTILE}, reply={"odd": {HOSTILE: 1}})
    entry["judged"] = {"digit": HOSTILE, "motion": None}
    metrics = metrics_of([name])
    metrics["cells"][f"{name}{HOSTILE}"] = cell(0.5)
    metrics["split"] = HOSTILE
    samples = {name: [entry], f"{name}{HOSTILE}": [entry]}
    page = Page(report(tmp_path, metrics=metrics, samples=samples))
    assert page.open == []
    assert not page.all("script")
    assert not page.all("img")
    assert HOSTILE in page.text
    assert all(re.fullmatch(r"[a-zA-Z0-9-]+", anchor) for anchor in page.attributes("id"))


@pytest.mark.parametrize("url", ["https://example.org/a.png", "a.png", "data:text/html;base64,AAAA", "javascript:1"])
def test_a_medium_outside_of_the_page_is_refused(url: str, tmp_path: Path) -> None:
    entry = sample("text", "image", right=True, reply={"image": url})
    with pytest.raises(OmniformError, match="expected a data URL"):
        report(tmp_path, metrics=metrics_of(["text->image"]), samples={"text->image": [entry]})


def test_training_is_shown_per_modality_with_stages_and_learning_rate(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    records: list[dict[str, Any]] = [
        {"step": step, "stage": "pairs" if step < 3 else "<all>", "lr": 0.1 / step, "loss/video": 4.0, "loss/text": 3.0}
        for step in (1, 2, 3, 4)
    ]
    records[3] |= {"loss/next_span": 1.0, "loss/speech": None}
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    page = Page(report(tmp_path, metrics=metrics_of(CELLS), samples={}))
    labels = [str(own["aria-label"]).partition(":")[0] for own in page.all("svg")]
    assert labels == ["text", "video", "next_span", "learning rate"]
    assert "Dashed lines part the stages: pairs to step 2, <all> to step 4." in page.text
    assert page.text.count("<all>") == page.text.count("pairs") - page.text.count("held-out pairs") == 5


def test_what_the_model_made_of_words_stands_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    prompts: dict[str, Any] = {"images.png": [["one", "two", "three"], [HOSTILE]]}
    for modality, name in {"image": "images.png", "speech": "speech-0.flac", "video": "video-0.mp4"}.items():
        (folder / name).write_bytes(base64.b64decode(media()[modality][modality].partition(",")[2]))
        prompts.setdefault(name, f"{modality} of <words>")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    page = Page(report(tmp_path, metrics=metrics_of(CELLS), samples={}))
    assert not page.open
    for told in ("one to three", HOSTILE[:80], "speech of <words>", "video of <words>"):
        assert told in page.text


def test_what_the_model_made_on_the_way_plays(tmp_path: Path) -> None:
    parts, suffixes = media(), {"speech": "wav", "video": "mp4"}
    for step in (20, 100):
        folder = tmp_path / "run" / "samples" / f"step-{step}"
        folder.mkdir(parents=True)
        for name, suffix in suffixes.items():
            payload = base64.b64decode(parts[name][name].partition(",")[2])
            (folder / f"{name}-0.{suffix}").write_bytes(payload)
    page = Page(report(tmp_path, metrics=metrics_of(CELLS), samples={}))
    assert len(page.all("audio")) == len(page.all("video")) == 2
    assert page.text.index("step 20") < page.text.index("step 100")


def test_documents_are_shown_with_their_figures(tmp_path: Path) -> None:
    own = figure(0.25)
    free = {"right": {**own, "chance": None, "ceiling": None}}
    metrics = metrics_of(CELLS) | {"documents": {"counting": {"named": own, "drawn": own}, "free": free}}
    prompt, reply = [{"text": HOSTILE}, media()["image"]], [{"text": "next is four"}, media()["image"]]
    entries = [{"kind": "counting", "prompt": prompt, "reply": reply, "right": right} for right in (1, 0)]
    page = Page(report(tmp_path, metrics=metrics, samples={}, documents=entries))
    assert not page.open
    assert not page.all("script")
    for expected in ("counting: named", "free: right", "counting: right", "counting: wrong", "12.5% - 100.0%"):
        assert expected in page.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_reads_the_page_as_it_is_meant(tmp_path: Path) -> None:
    report(tmp_path, metrics=metrics_of(CELLS), samples=samples_of(CELLS))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    profile, url = f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "report.html").as_uri()
    done = subprocess.run(
        ["chromium", *options, profile, "--dump-dom", url], capture_output=True, text=True, check=True
    )
    page = Page(done.stdout)
    assert [len(page.all(tag)) for tag in ("img", "audio", "video", "script")] == [16, 16, 16, 0]
