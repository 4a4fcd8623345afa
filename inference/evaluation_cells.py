"""One cell of the any-to-any suite: prompts, replies, and what judges say of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool
from PIL import Image

from omniform.inference.evaluation_copies import Copies, repeats
from omniform.inference.evaluation_figures import by_noise, cell_figures, crossed, figure, shuffled
from omniform.inference.evaluation_items import CellItems, Concepts, World
from omniform.inference.evaluation_judging import SECOND_OF_SPEECH, Judges
from omniform.inference.evaluation_noise import noise_like
from omniform.inference.evaluation_samples import told
from omniform.inference.generate import Model
from omniform.inference.judges import MOTIONS
from omniform.inference.part_items import item_of
from omniform.inference.protocol import ContentPart, DataPart, Reply, SpeechPart, TextPart
from omniform.inference.video_judge import gaps
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
        self.hears_twice = limit is None and whisper_is_installed() if second_judge is None else second_judge
        self._copies: dict[str, Copies] = {}
        self._found: dict[tuple[str, Any], Any] = {}

    @property
    def copies_about(self) -> dict[str, Any]:
        """What replies were compared with."""
        return {kind: copies.about for kind, copies in self._copies.items()}

    def digits_of(self, images: Sequence[Image.Image]) -> npt.NDArray[np.int64]:
        """Return what the judge of images sees."""
        tokenizer: Any = self.model.tokenizers["image"]
        items = [tokenizer.from_pil(image) for image in images]
        return np.asarray(self.judges["image"].judge(items, motions=False).digits)

    def prepare(self, cells: Sequence[str], *, only_foreign: bool = False) -> None:
        """Make the judges of some cells, so that one which cannot be made is known before anything is generated.

        Args:
            only_foreign: only those that others have trained, which may not be installed, and take no fitting.

        Raises:
            OmniformError: see `Judges`.
        """
        for cell in cells:
            source, _, target = cell.partition("->")
            needed = [target, *([source] if target == "text" else [])]
            if target == "speech" and self.hears_twice:
                needed.append(SECOND_OF_SPEECH)
            for name in needed:
                if not only_foreign or name in ("speech", SECOND_OF_SPEECH):
                    self.judges[name]

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
        copied_source = self._copied_source(cell, items, drawn)
        also, also_real = np.ones((2, len(items)), dtype=bool)
        right_crossed = crossed(judged, items.concepts)
        goes_on = None
        if cell == "video->video":  # what repeats a moving clip does not go on from it; what repeats one at rest does
            goes_on, goes_on_really = (
                gaps(items.sources, videos) <= CONTINUES_WITHIN for videos in (drawn, items.targets)
            )
            also, also_real = goes_on.diagonal(), goes_on_really.diagonal()
            right_crossed = right_crossed & goes_on.T
        elif copied_source is not None:
            also = ~copied_source
        real = self._ceiling(cell, items)
        scores = cell_figures(items.concepts, judged, real, self.world.held_out_pairs(items.concepts), also, also_real)
        scores["through"] = [part.modality for part in replies[0].through]
        copied = copied_source
        if target != "text":
            copies = self._copies_of(cell)
            found = copies.find(drawn)
            copied = found if copied_source is None else found | copied_source
            scores["copy_rate"], scores["copy_rate_train"] = float(found.mean()), copies.rate_of_train
            scores["copy_rate_held_out"] = self._copy_rate_held_out(cell, items)
        if copied_source is not None:
            may_not = _moving(items.concepts)
            scores["copy_of_source_rate"] = float(copied_source[may_not].mean()) if may_not.any() else None
        noise = by_noise(items.concepts, self._noise(items, target, motions))
        scores["controls"] = {"shuffled": shuffled(right_crossed), "noise": noise}
        if goes_on is not None:
            of_real = float(also_real.mean())
            scores["continues"] = {**figure(also, None, of_real), "shuffled": shuffled(goes_on.T)}
        if target == "speech":
            scores["second_judge"] = self._second(items, drawn, also) if self.hears_twice else None
        right = items.concepts.agree(judged) & also
        return scores, self._shown(items.concepts, prompts, replies, judged, right, copied)

    def _item(self, part: ContentPart) -> Any:
        """Return a reply in the raw form of its tokenizer."""
        if isinstance(part, SpeechPart):  # a sound of no samples is a reply, and no item
            return part.audio.samples
        return item_of(part, self.model.tokenizers[part.modality])

    def _ceiling(self, cell: str, items: CellItems) -> Concepts:
        """Return what judges find in real items: in the targets, or in the sources where text is made of another."""
        source, _, target = cell.partition("->")
        judged, real = (source, items.sources) if target == "text" != source else (target, items.targets)
        motions = items.concepts.motions is not None
        return self._once(f"ceiling of {judged}", items, lambda: self.judges[judged].judge(real, motions=motions))

    def _copied_source(self, cell: str, items: CellItems, drawn: Sequence[Any]) -> Bool[np.ndarray, "N"] | None:
        """Return which replies repeat their source; None where the two are of different modalities."""
        source, _, target = cell.partition("->")
        if source != target:
            return None
        return repeats(drawn, items.sources) if target == "text" else self._copies_of(cell).alike(drawn, items.sources)

    def _copies_of(self, cell: str) -> Copies:
        kind = {"video->video": "continued", "video->speech": "phrase"}.get(cell, cell.partition("->")[2])
        if kind not in self._copies:
            self._copies[kind] = Copies(self.world, kind)
        return self._copies[kind]

    def _copy_rate_held_out(self, cell: str, items: CellItems) -> float:
        copies = self._copies_of(cell)
        return self._once("held out", items, lambda: float(copies.find(copies.round_trip(items.targets)).mean()))

    def _noise(self, items: CellItems, target: str, motions: bool) -> Concepts:
        """Return what the judge finds in noise."""

        def judge() -> Concepts:
            noise = noise_like(items.targets[:N_NOISE], self.model.tokenizers[target], self.seed)
            return self.judges[target].judge(noise, motions=motions)

        return self._once("noise", items, judge)

    def _second(self, items: CellItems, drawn: Sequence[Any], also: Bool[np.ndarray, "N"]) -> dict[str, Any]:
        """Return what the second judge makes of the first replies, and of real items at the same places."""
        judge, expected = self.judges[SECOND_OF_SPEECH], items.concepts[np.arange(min(SECOND_JUDGE_LIMIT, len(items)))]
        n, motions = len(expected), expected.motions is not None
        right = expected.agree(judge.judge(drawn[:n], motions=motions)) & also[:n]
        real = self._once("second ceiling", items, lambda: judge.judge(items.targets[:n], motions=motions))
        told_by = figure(right, None, float(expected.agree(real).mean()))
        return {"name": judge.about["name"], **{key: told_by[key] for key in ("accuracy", "n", "ci95", "ceiling")}}

    def _once(self, what: str, items: CellItems, find: Callable[[], Found]) -> Found:
        """Return what is the same for all cells with these targets."""
        if (what, items.key) not in self._found:
            self._found[what, items.key] = find()
        return self._found[what, items.key]

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
                "through": [told(self.model, part) for part in replies[place].through],
                "reply": told(self.model, replies[place].parts[0]),
                "expected": expected.tell(place),
                "judged": judged.tell(place),
                "right": bool(right[place]),
                "copy": None if copied is None else bool(copied[place]),
            }
            for place in range(min(N_SHOWN, len(prompts)))
        ]


def _moving(concepts: Concepts) -> Bool[np.ndarray, "N"]:
    """Return of which items a repetition is no answer: of all but clips that stand still."""
    if concepts.motions is None:
        return np.ones(len(concepts), dtype=bool)
    return concepts.motions != MOTIONS.index("still")
