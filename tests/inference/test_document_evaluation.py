"""Figures of continued documents, known in advance for models that follow a rule."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omniform.data.digits import build_digits
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.data.templates import TEST_DOCUMENTS
from omniform.errors import OmniformError
from omniform.inference.document_evaluation import evaluate_documents
from omniform.inference.generate import Model
from omniform.inference.judges import digit_of_text
from omniform.inference.protocol import ContentPart, ImagePart, Reply, SpeechPart, TextPart
from omniform.tokenizers.audio_files import Audio

SOUND = Audio(torch.zeros(10), 16000)
Rule = Callable[[list[ContentPart], Any], Sequence[int | str | Audio]]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out documents of the real world."""
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, media=False) / "test-documents"


def digits_of(images: Sequence[Image.Image]) -> np.ndarray:
    """Read pictures that say what they show with their first pixel; real ones show 3 to this judge."""
    assert len(images) > 0
    return np.array([value if (value := image.getpixel((0, 0))) in range(1, 10) else 3 for image in images])


class Ruled(Model):
    """A model whose replies follow a rule: texts, and numbers for pictures that show them."""

    def __init__(self, omni: Model, rule: Rule) -> None:
        self.tokenizers, self.rule = omni.tokenizers, rule
        self.prompts: list[list[ContentPart]] = []

    def generate_batch(  # type: ignore[override]
        self,
        prompts: Sequence[Any],
        to: Any = "text",
        *,
        seed: int = 0,
        max_parts: int | None = None,
        direct: bool = False,
    ) -> list[Reply]:
        assert direct or max_parts
        listed = [prompt if isinstance(prompt, list) else [prompt] for prompt in prompts]
        self.prompts += listed
        return [Reply(tuple(map(self._part, self.rule(prompt, to))), seed) for prompt in listed]

    @staticmethod
    def _part(content: int | str | Audio) -> ContentPart:
        if isinstance(content, Audio):
            return SpeechPart(content)
        return TextPart(content) if isinstance(content, str) else ImagePart(Image.new("L", (2, 2), content))


def counted_to(prompt: list[ContentPart]) -> int:
    """The digit that the first text of a prompt names."""
    assert isinstance(prompt[0], TextPart)
    found = digit_of_text(prompt[0].text)
    assert found is not None
    return found


def perfect(prompt: list[ContentPart], to: Any) -> Sequence[int | str]:
    """Go on as the documents do; 10 stands for a picture of 0, which the judge reads as 3."""
    if to == ["image", "text"]:
        return [7, "that is seven"]
    if to == "text":
        return ["it is six"]
    after = (counted_to(prompt) + 1) % 10
    return (
        [f"next is {after}", after or 10] if to == ["text", "image"] else [counted_to(prompt), f"then {after}", after]
    )


def test_a_model_that_goes_on_as_documents_do_scores_what_the_judge_allows(omni: Model, documents: Path) -> None:
    model = Ruled(omni, perfect)
    figures, shown = evaluate_documents(model, documents, digits_of)
    n = figures["counting"]["named"]["n"]
    assert n == figures["naming"]["agree"]["n"] == figures["free"]["right"]["n"] == 252
    assert figures["counting"]["named"]["accuracy"] == figures["naming"]["agree"]["accuracy"] == 1.0
    # Only where 0 is to be drawn does this judge disagree.
    digits = [counted_to(prompt) for prompt in model.prompts[:n]]
    assert figures["counting"]["drawn"]["accuracy"] == pytest.approx(1 - np.mean(np.array(digits) == 9))
    assert figures["counting"]["agree"] == figures["counting"]["drawn"]
    assert 0 < figures["counting"]["drawn"]["ceiling"] < 0.2  # it reads every real picture as 3
    assert figures["free"]["turns"]["accuracy"] == 1.0
    assert figures["free"]["right"]["accuracy"] == pytest.approx(1 - np.mean(np.isin(digits, (0, 9))))
    assert [document.kind for document in shown] == ["counting"] * 8 + ["naming"] * 8 + ["free"] * 8
    firsts = {template.first for template in TEST_DOCUMENTS}
    assert figures["naming"]["read"]["n"] == 252
    assert 0 < figures["naming"]["read"]["accuracy"] < 0.2  # whatever is shown is six to this model
    naming = [prompt for prompt in model.prompts if digit_of_text(prompt[0].data) is None]
    assert {prompt[0].data for prompt in naming} == firsts & {"any number"}
    assert [[part.modality for part in prompt] for prompt in model.prompts[:n]] == [["text", "image"]] * n


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda prompt, to: ["two", 5] if to == ["text", "image"] else [5, "two"], (0.1, 0.1, 0, 0)),
        (lambda prompt, to: ["four", 4] if to == ["text", "image"] else [4, "four"], (0.1, 0.1, 1, 1)),
        (lambda prompt, to: ["nothing", 4] if to == ["text", "image"] else [4, ""], (0, 0.1, 0, 0)),
    ],
)
def test_naming_drawing_and_agreeing_are_told_apart(
    omni: Model, documents: Path, rule: Rule, expected: tuple[float, ...]
) -> None:
    figures, _ = evaluate_documents(Ruled(omni, rule), documents, digits_of, limit=100)
    found = [figures["counting"][key]["accuracy"] for key in ("named", "drawn", "agree")]
    assert [*found, figures["naming"]["agree"]["accuracy"]] == pytest.approx(expected, abs=0.06)
    assert figures["free"]["turns"]["accuracy"] == 0.0  # two parts are no document


@pytest.mark.parametrize(
    "free", [[], ["one"], [1, 2, 3], [1, "one", SOUND], [1, "one", 1, "one"], [1, "one"] * 4 + [1]]
)
def test_only_pictures_and_texts_in_turns_that_end_in_time_are_documents(
    omni: Model, documents: Path, free: list[int | str | Audio]
) -> None:
    def rule(prompt: list[ContentPart], to: Any) -> Sequence[int | str | Audio]:
        return free if to == "any" else perfect(prompt, to)

    figures, shown = evaluate_documents(Ruled(omni, rule), documents, digits_of, limit=5)
    assert figures["free"]["turns"]["accuracy"] == figures["free"]["right"]["accuracy"] == 0.0
    assert not any(document.right for document in shown if document.kind == "free")


def test_other_data_is_refused(omni: Model, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(RawSample("a", (RawSpan("text", text="a"),)))
    with pytest.raises(OmniformError, match="no documents of the kind counting or naming"):
        evaluate_documents(omni, tmp_path, digits_of)
