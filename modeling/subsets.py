"""Any-subset masking: of every modality of a sample some tokens are given, and some of the rest are learnt.

    text   a b <end>        given:  <begin:image> c0 c3  <begin:text> a            one block, read in both directions
    image  c0 c1 c2 c3      learnt: <begin:image> ?1 ?2  |  <begin:text> b <end>   a private block for each modality

How many tokens of each modality are given, and how many learnt, are two budgets that two Dirichlet draws divide, so one
model learns to make any modality from any subset of the others, and of itself. A modality learnt by `masked` is asked
at rows that hold the mask, at the coordinates of what is hidden. One learnt by `next_token` is given up to a place and
learnt from there on; its begin marker stands where the last token that is given does. Coordinates are those of the
whole item and begin at the same origin for every modality, so neither the order of the modalities nor what is left out
moves anything.

Source: 4M (arXiv:2312.06647, 4M-21 arXiv:2406.09406). Deviations: one decoder in place of an encoder and a decoder, so
what is given is read by the same layers and never sees what is asked; a sequence is cut into a prefix and what follows
it, in place of T5's spans; what rounding leaves of a budget, or a modality cannot use, goes to no other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from omniform.kernels.keyed_noise import keyed_bits, keyed_permutation, stream
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.sequence import MultimodalSequence, Role, Span, grid_positions
from omniform.tokenizers.base import Tokens
from omniform.tokenizers.vocabulary import Vocabulary

Concentration = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**31)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class AnySubset:
    """How many tokens of each modality of a sample are given and learnt.

    A budget is divided by proportions from a Dirichlet distribution, rounded down, and capped by what there is. What is
    learnt is never what is given, and is one token at least: where the draws leave none, the modality with the largest
    share of `target_budget` that has one to spare, or else the one with the largest share, which takes it back from
    what is given.

    Attributes:
        input_budget, target_budget: tokens, their ends included; of (low, high) a whole number between, both included.
        input_alpha, target_alpha: concentration of the Dirichlet distribution, of all modalities or by modality; those
            that are not named have 0, and 0 is never drawn. Well below 1 most of a budget goes to one modality, well
            above 1 all have the same.
    """

    input_budget: Count | tuple[Count, Count]
    target_budget: Count | tuple[Count, Count]
    input_alpha: Concentration | dict[str, Concentration] = 1.0
    target_alpha: Concentration | dict[str, Concentration] = 1.0

    @model_validator(mode="after")
    def _check_budgets(self) -> "AnySubset":
        for name in ("input_budget", "target_budget"):
            low, high = _range(getattr(self, name))
            if low > high:
                raise ValueError(f"{name} is [{low}, {high}], expected the lower number first")
        if _range(self.target_budget)[0] < 1:
            raise ValueError(f"target_budget is {self.target_budget}, expected at least 1: a document learns something")
        alphas = self.target_alpha
        if not any(alphas.values() if isinstance(alphas, dict) else [alphas]):
            raise ValueError(f"target_alpha is {alphas}, expected one above 0: a document learns something")
        return self

    @property
    def named(self) -> frozenset[str]:
        """Modalities that have a concentration of their own."""
        return frozenset(name for a in (self.input_alpha, self.target_alpha) if isinstance(a, dict) for name in a)

    def learns(self, modalities: Iterable[str]) -> bool:
        """Return whether one of the modalities can be learnt."""
        return any(_concentration(self.target_alpha, name) for name in modalities)

    def leaves_conditions_out(self, modality: str) -> bool:
        """Return whether a draw may learn of a modality without giving anything of the others."""
        given = _range(self.input_budget)[0] == 0 or _concentration(self.input_alpha, modality) > 0
        return given and _concentration(self.target_alpha, modality) > 0

    def counts(self, sizes: Mapping[str, int], key: int) -> dict[str, tuple[int, int]]:
        """Return how many tokens of each modality are given and learnt.

        Args:
            sizes: tokens of each modality, an end included; at least 1.
            key: 64 bits that decide the draw.
        """
        random = np.random.Generator(np.random.Philox(key=keyed_bits(key, stream("subset/counts")).item()))
        inputs, _ = _divide(self.input_budget, self.input_alpha, sizes, random)
        left = {name: size - inputs[name] for name, size in sizes.items()}
        targets, shares = _divide(self.target_budget, self.target_alpha, left, random)
        if not any(targets.values()):
            learnt = [name for name in sizes if _concentration(self.target_alpha, name)]
            chosen = max([name for name in learnt if left[name]] or learnt, key=lambda name: shares[name])
            inputs[chosen] = min(inputs[chosen], sizes[chosen] - 1)
            targets[chosen] = 1
        return {name: (inputs[name], targets[name]) for name in sizes}

    def document(
        self,
        items: Mapping[str, Tokens],
        vocabulary: Vocabulary,
        objectives: Mapping[str, Objective],
        key: int,
    ) -> MultimodalSequence:
        """Return what a draw gives and learns of a sample, of which each modality is one item."""
        whole = [Contents.whole(modality, tokens, vocabulary) for modality, tokens in items.items()]
        counts = self.counts({item.modality: len(item.token_ids) for item in whole}, key)
        cut = [item.cut(*counts[item.modality], objectives[item.modality], key) for item in whole]
        return lay_out(cut, vocabulary, objectives, key)

    def longest(self, sizes: Mapping[str, int]) -> int:
        """Return the most rows that a document of these sizes can take."""
        n_rows, n_tokens = 0, 0
        for budget, alpha in ((self.input_budget, self.input_alpha), (self.target_budget, self.target_alpha)):
            own = {name: size for name, size in sizes.items() if _concentration(alpha, name)}
            most = min(_range(budget)[1], sum(own.values()))
            n_rows, n_tokens = n_rows + min(len(own), most), n_tokens + most
        return n_rows + min(n_tokens, sum(sizes.values()))


def n_rows_of(counts: Mapping[str, tuple[int, int]]) -> int:
    """Return the rows of a document, from the tokens given and learnt of each modality: these and begin markers."""
    return sum(n + (n > 0) for of_modality in counts.values() for n in of_modality)


@plain_dataclass(frozen=True)
class Contents:
    """A modality of a document as ids of the model, and which of them are rows.

    Attributes:
        token_ids: of the whole item, its end included.
        grid: of these.
        given, asked: places among them, ascending; none in both.
    """

    modality: str
    token_ids: npt.NDArray[np.int64]
    grid: tuple[int, ...]
    given: npt.NDArray[np.int64]
    asked: npt.NDArray[np.int64]

    @classmethod
    def whole(cls, modality: str, tokens: Tokens, vocabulary: Vocabulary) -> "Contents":
        """Return an item of which everything is given."""
        token_ids, grid = vocabulary.to_ids(modality, tokens.codes).numpy(), tokens.grid
        if (end_id := vocabulary.end_of(modality)) is not None:
            token_ids = np.append(token_ids, end_id)
            grid = (len(token_ids),)
        return cls(modality, token_ids, grid, np.arange(len(token_ids)), np.arange(0))

    def cut(self, n_given: int, n_asked: int, objective: Objective, key: int) -> "Contents":
        """Return the item with so many tokens given and asked: anywhere, or of a causal objective a prefix and what
        follows it."""
        size = len(self.token_ids)
        if objective.bidirectional:
            order = keyed_permutation(size, key, stream("subset/places"), stream(self.modality))
        else:
            order = np.arange(size)
        given, asked = np.sort(order[:n_given]), np.sort(order[n_given : n_given + n_asked])
        return Contents(self.modality, self.token_ids, self.grid, given, asked)


def lay_out(
    items: Sequence[Contents], vocabulary: Vocabulary, objectives: Mapping[str, Objective], noise_key: int = 0
) -> MultimodalSequence:
    """Lay out a document: one block of all that is given, then a private block of what is asked of each modality.

    A begin marker stands at the origin; before what follows a prefix, at the place of the prefix's last token.

    Args:
        items: each modality once.
    """
    token_ids, span_positions, position_ids, rows_of_blocks = [], [], [], []
    spans: list[Span] = []
    row = 0
    given = [(item, item.given, Role.CONTEXT) for item in items if len(item.given)]
    asked = [(item, item.asked, Role.TARGET) for item in items if len(item.asked)]
    for number, (item, places, role) in enumerate([*given, *asked]):
        objective, learnt, n_rows = objectives[item.modality], role is Role.TARGET, 1 + len(places)
        # What follows a prefix begins where its last token stands.
        before = int(places[0]) - 1 if learnt and not objective.bidirectional else -1
        token_ids.append(np.append(vocabulary.begin(item.modality), item.token_ids[places]))
        span_positions.append(np.append(1 + before, 1 + places))
        coordinates = grid_positions(item.grid, len(item.token_ids), 1)
        marker = coordinates[before : before + 1] if before >= 0 else np.zeros((1, 3), dtype=np.int64)
        position_ids.append(np.concatenate([marker, coordinates[places]]))
        # Rows, number, modality, bidirectional and private of a block; what is given is all of block 0.
        block = number - len(given) + 1 if learnt else 0
        flags = (objective.bidirectional or not learnt, learnt)
        rows_of_blocks.append((n_rows, block, vocabulary.place_of(item.modality), *flags))
        hidden = learnt and objective.bidirectional
        spans.append(Span(item.modality, row + 1, len(places), (len(places),), role, False, hidden))
        row += n_rows
    n_rows_each, *of_blocks = zip(*rows_of_blocks, strict=True)
    block_ids, modality_ids, bidirectional, private = (np.repeat(values, n_rows_each) for values in of_blocks)
    return MultimodalSequence(
        np.concatenate(token_ids),
        modality_ids,
        np.concatenate(span_positions),
        np.concatenate(position_ids),
        block_ids,
        bidirectional,
        private,
        tuple(spans),
        noise_key=noise_key,
    )


def unfit(objective: Objective) -> str | None:
    """Return what of an objective does not go with any-subset masking, and what would; None if all of it does."""
    match objective:
        case NextToken():
            return None
        case Masked() if objective.block_size is not None:
            return f"block_size is {objective.block_size}, expected none: what is asked is one block"
        case Masked() if objective.masking != "count" or objective.weighting != "uniform":
            return (
                f"masking is {objective.masking} and weighting {objective.weighting}, expected count and uniform: all "
                "that is asked is hidden, whatever the time"
            )
        case Masked():
            return None
    return f"kind is {objective.kind}, expected masked or next_token"


def _range(budget: int | tuple[int, int]) -> tuple[int, int]:
    return (budget, budget) if isinstance(budget, int) else budget


def _concentration(alpha: float | dict[str, float], modality: str) -> float:
    return alpha.get(modality, 0.0) if isinstance(alpha, dict) else alpha


def _divide(
    budget: int | tuple[int, int],
    alpha: float | dict[str, float],
    sizes: Mapping[str, int],
    random: np.random.Generator,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return tokens of each modality, and the proportions that they come from."""
    low, high = _range(budget)
    total = int(random.integers(low, high + 1))
    alphas = {name: _concentration(alpha, name) for name in sizes}
    drawn = [name for name, concentration in alphas.items() if concentration]
    shares = dict.fromkeys(sizes, 0.0)
    if drawn:
        shares |= dict(zip(drawn, random.dirichlet([alphas[name] for name in drawn]).tolist(), strict=True))
    # A share of 1 may have been rounded to a little less.
    return {name: min(int(shares[name] * total + 1e-6), size) for name, size in sizes.items()}, shares
