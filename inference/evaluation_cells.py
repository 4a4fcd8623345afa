"""One cell of the any-to-any suite: prompts, replies, and what judges say of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from omniform.inference.evaluation_copies import Copies
from omniform.inference.evaluation_figures import by_noise, cell_figures, figure, shuffled
from omniform.inference.evaluation_items import CellItems, Concepts, World
from omniform.inference.evaluation_judging import Judges
from omniform.inference.evaluation_noise import noise_like
from omniform.inference.evaluation_samples import told
from omniform.inference.generate import Model
from omniform.inference.part_items import item_of
from omniform.inference.protocol import ContentPart, DataPart, Reply, SpeechPart, TextPart
from omniform.inference.video_judge import gap
from omniform.inference.whisper_judge import whisper_is_installed

# Items of a cell unless the caller limits them: judges of speech are slow, the second by far.
SPEECH_LIMIT, SECOND_JUDGE_LIMIT = 100, 20
N_SHOWN, N_NOISE = 40, 40
# Pixels between where a video ends and where the one that goes on from it begins; the fastest digits move so far in a
# frame.
CONTINUES_WITHIN = 2.0

Found = TypeVar("Found")


class CellScorer:
    """Scores one cell after the other; judges, ceilings and train items are shared, and made when first needed.

    Args:
        limit, second_judge: see `evaluate_any_to_any`.
    """

    def __init__(self, model: Model, world: World, seed: int, limit: int | None, second_judge: bool | None) -> None:
        self.model, self.world, self.seed, self.limit = model, world, seed, limit
        self.judges = Judges(world)
        self.hears_twice = whisper_is_installed() if second_judge is None else second_judge
        self._copies: dict[str, Copies] = {}
        self._found: dict[Any, Any] = {}

    @property
    def copies_about(self) -> dict[str, Any]:
        """What replies were compared with."""
        return {kind: copies.about for kind, copies in self._copies.items()}

    def digits_of(self, images: Sequence[Image.Image]) -> npt.NDArray[np.int64]:
        """Return what the judge of images sees."""
        tokenizer: Any = self.model.tokenizers["image"]
        items = [tokenizer.from_pil(image) for image in images]
        return np.asarray(self.judges["image"].judge(items, motions=False).digits)

    def score(self, cell: str, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the figures of a cell, and what its first replies were."""
        source, _, target = cell.partition("->")
        limit = self.limit if self.limit is not None or target != "speech" else SPEECH_LIMIT
        items = self.world.cell(cell, limit)
        motions = items.concepts.motions is not None
        prompts = [TextPart(item) if source == "text" else DataPart(source, item) for item in items.sources]
        replies = self.model.generate_batch(prompts, target, seed=self.seed, **keywords)
        drawn = [self._item(reply.parts[0]) for reply in replies]
        judged = self.judges[target].judge(drawn, motions=motions)
        copied, copied_source = None, None
        if target != "text":
            copies = self._copies_of(cell)
            copied = copies.find(drawn)
            if source == target and target != "video":
                copied_source = copies.alike(drawn, items.sources)
        real = self._ceiling(cell, items)
        scores = cell_figures(items.concepts, judged, real, copied_source, self.world.held_out_pairs(items.concepts))
        if copied is not None:
            scores["copy_rate"] = float(copied.mean())
            scores["copy_rate_held_out"] = self._copy_rate_held_out(cell, items)
        noise = self._noise(items, target, motions)
        scores["controls"] = {"shuffled": shuffled(items.concepts, judged), "noise": by_noise(items.concepts, noise)}
        if cell == "video->video":
            scores["continues"] = _continues(items.sources, drawn)
            scores["continues_real"] = _continues(items.sources, items.targets)
        if target == "speech":
            scores["second_judge"] = self._second(items, drawn, copied_source) if self.hears_twice else None
        right = items.concepts.agree(judged)
        if copied_source is not None and copied is not None:
            right, copied = right & ~copied_source, copied | copied_source
        return scores, self._shown(items.concepts, prompts, replies, judged, right, copied)

    def _item(self, part: ContentPart) -> Any:
        """Return a reply in the raw form of its tokenizer."""
        if isinstance(part, SpeechPart):  # a sound of no samples is a reply, and no item
            return part.audio.samples
        return item_of(part, self.model.tokenizers[part.modality])

    def _ceiling(self, cell: str, items: CellItems) -> Concepts:
        """Return what judges find in real items: in the targets, or in the sources where text is generated."""
        source, _, target = cell.partition("->")
        if cell == "text->text":
            return items.concepts
        folder, _, ordinal, places = items.key
        judged, real = (source, items.sources) if target == "text" else (target, items.targets)
        return self._once(
            ("ceiling", folder, judged, ordinal, places),
            lambda: self.judges[judged].judge(real, motions=items.concepts.motions is not None),
        )

    def _copies_of(self, cell: str) -> Copies:
        kind = {"video->video": "continued", "video->speech": "phrase"}.get(cell, cell.partition("->")[2])
        if kind not in self._copies:
            self._copies[kind] = Copies(self.world, kind)
        return self._copies[kind]

    def _copy_rate_held_out(self, cell: str, items: CellItems) -> float:
        copies = self._copies_of(cell)
        return self._once(("held out", items.key), lambda: float(copies.find(copies.round_trip(items.targets)).mean()))

    def _noise(self, items: CellItems, target: str, motions: bool) -> Concepts:
        """Return what the judge finds in noise; the same for all cells of one target and question."""

        def judge() -> Concepts:
            noise = noise_like(items.targets[:N_NOISE], self.model.tokenizers[target], self.seed)
            return self.judges[target].judge(noise, motions=motions)

        return self._once(("noise", target, motions), judge)

    def _second(
        self, items: CellItems, drawn: Sequence[Any], copied_source: Bool[np.ndarray, "N"] | None
    ) -> dict[str, Any]:
        """Return what the second judge makes of some replies, spread evenly, and of real items at the same places."""
        judge = self.judges.second_of_speech
        some = np.unique(np.linspace(0, len(drawn) - 1, min(SECOND_JUDGE_LIMIT, len(drawn))).round().astype(int))
        expected = items.concepts[some]
        motions = expected.motions is not None
        right = expected.agree(judge.judge([drawn[place] for place in some], motions=motions))
        if copied_source is not None:
            right = right & ~copied_source[some]
        real = self._once(
            ("second ceiling", items.key),
            lambda: judge.judge([items.targets[place] for place in some], motions=motions),
        )
        told_by = figure(right, None, float(expected.agree(real).mean()))
        return {"name": judge.about["name"], **{key: told_by[key] for key in ("accuracy", "n", "ci95", "ceiling")}}

    def _once(self, key: Any, find: Callable[[], Found]) -> Found:
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def _shown(
        self,
        expected: Concepts,
        prompts: Sequence[ContentPart],
        replies: Sequence[Reply],
        judged: Concepts,
        right: Bool[np.ndarray, "N"],
        copied: Bool[np.ndarray, "N"] | None,
    ) -> list[dict[str, Any]]:
        return [
            {
                "prompt": told(self.model, prompts[place]),
                "reply": told(self.model, replies[place].parts[0]),
                "expected": expected.tell(place),
                "judged": judged.tell(place),
                "right": bool(right[place]),
                "copy": None if copied is None else bool(copied[place]),
            }
            for place in range(min(N_SHOWN, len(prompts)))
        ]


def _continues(given: Sequence[Float[Tensor, "C T H W"]], following: Sequence[Float[Tensor, "C T H W"]]) -> float:
    """Return the fraction of videos that begin where the ones before them end."""
    gaps = [gap(before, after) for before, after in zip(given, following, strict=True)]
    return float(np.mean([distance <= CONTINUES_WITHIN for distance in gaps]))
