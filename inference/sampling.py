"""How one token is chosen from logits: pure functions of logits, settings and given noise."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import ValidationError
from torch import Tensor

from omniform.errors import OmniformError
from omniform.kernels.keyed_noise import keyed_gumbel, keyed_normal, keyed_permutation, stream
from omniform.modeling.generation_config import SamplingSettings

NEAR_TIE = 2e-4
"""Two logits closer than this may change places when the same rows are computed in a batch of another shape.

The largest change of one fp32 logit measured so is 1.7e-5, of two twice that (docs/decisions/0006-batch-invariance.md).
"""


def sampling_settings(source: str, **values: object) -> SamplingSettings:
    """Build settings from values that a user gave; `source` says where, for the error.

    Raises:
        OmniformError: an unknown name or a value out of range.
    """
    try:
        return SamplingSettings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(place) for place in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            known = ", ".join(SamplingSettings.__dataclass_fields__)
            raise OmniformError(f"{source}: unknown setting {name!r}, expected one of {known}") from error
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise OmniformError(f"{source}: {name} is {first['input']!r}, expected {expected}") from error


def keep_top_k(logits: Float[Tensor, "*B W"], k: int) -> Float[Tensor, "*B W"]:
    """Set all but the k largest logits to -inf; those that equal the k-th stay too."""
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def keep_top_p(logits: Float[Tensor, "*B W"], p: float) -> Float[Tensor, "*B W"]:
    """Set to -inf all logits outside the smallest set of likeliest tokens whose probability reaches p.

    The likeliest token always stays. Source: nucleus sampling, arXiv:1904.09751.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    likelier = probability.cumsum(dim=-1) - probability
    dropped: Bool[Tensor, "*B W"] = likelier >= p
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)


def truncated_log_probs(logits: Float[Tensor, "*B W"], settings: SamplingSettings) -> Float[Tensor, "*B W"]:
    """Return the log-probabilities that tokens are drawn from: temperature, then top-k, then top-p.

    At temperature 0, where nothing is drawn, they are those of temperature 1.
    """
    logits = logits.float()
    if settings.temperature > 0:
        logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None:
        logits = keep_top_p(logits, settings.top_p)
    return logits.log_softmax(dim=-1)


def choose(log_probs: Float[Tensor, "*B W"], gumbel: Float[Tensor, "*B W"]) -> Int[Tensor, "*B"]:
    """Draw one index per row from exp(`log_probs`): the largest after standard Gumbel noise is added.

    Source: the Gumbel-max trick (arXiv:1611.01144). Zeros for noise give the likeliest.
    """
    return (log_probs.double() + gumbel).argmax(dim=-1)


def lead(scores: Float[Tensor, "*B W"]) -> Float[Tensor, "*B"]:
    """Return how far the largest score of each row is above the next; infinity where there is only one."""
    leaders = scores.topk(min(2, scores.shape[-1]), dim=-1).values
    return leaders[..., 0] - leaders[..., 1] if scores.shape[-1] > 1 else torch.full_like(leaders[..., 0], math.inf)


def near_tie_bound(settings: SamplingSettings) -> float:
    """Return `NEAR_TIE` in units of the log-probabilities that are compared: guidance and temperature magnify it."""
    scale = settings.guidance_scale
    return NEAR_TIE * (abs(scale) + abs(1 - scale)) / (settings.temperature or 1.0)


def unsure_cut(
    logits: Float[Tensor, "*B W"], log_probs: Float[Tensor, "*B W"], settings: SamplingSettings, bound: float
) -> Bool[Tensor, "*B"]:
    """Return in which rows changes of logits within `bound` may alter the set that top-k and top-p keep.

    Args:
        log_probs: `truncated_log_probs` of the logits.
    """
    scaled, kept = logits.float() / (settings.temperature or 1.0), log_probs.isfinite()
    gap = scaled.masked_fill(~kept, math.inf).amin(-1) - scaled.masked_fill(kept, -math.inf).amax(-1)
    unsure = gap < bound
    if settings.top_p is not None:
        candidates = scaled if settings.top_k is None else keep_top_k(scaled, settings.top_k)
        probability = candidates.softmax(dim=-1).sort(dim=-1, descending=True).values
        likelier = probability.cumsum(dim=-1) - probability
        # No change within `bound` moves the probability P of a set by more than bound * P * (1 - P).
        unsure |= ((likelier - settings.top_p).abs() < bound * settings.top_p * (1 - settings.top_p)).any(-1)
    return unsure


class KeyedDraw:
    """The `Draw` of one generated span: every number is a function of (seed, sample, span, step, position, token).

    Args:
        seed: what the user gave, in [0, 2**63).
        sample: place of the sample among those that share the seed.
        span: place of the span among the generated ones of the sample.

    Attributes:
        n_near_ties: choices so far that rounding could turn: their lead is below `near_tie_bound`. With none, the
            span is the same in any batch.
    """

    def __init__(self, seed: int, sample: int, span: int, settings: SamplingSettings) -> None:
        self._keys = (sample, span)
        self._seed, self._settings = seed, settings
        self.temperature, self.guidance_scale = settings.temperature, settings.guidance_scale
        self._bound = near_tie_bound(settings)
        self.n_near_ties = 0

    def tokens(
        self, logits: Float[Tensor, "N W"], step: int, positions: Int[Tensor, "N"]
    ) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
        """Return one choice per row, an index into W, and its log-probability under the truncated softmax."""
        log_probs = truncated_log_probs(logits, self._settings)
        noise = self._gumbel("token", step, positions[:, None], torch.arange(logits.shape[-1])[None, :])
        choice = choose(log_probs, noise)
        near = lead(log_probs.double() + noise) < self._bound
        self.n_near_ties += int((near | unsure_cut(logits, log_probs, self._settings, self._bound)).sum())
        return choice, log_probs.gather(-1, choice[:, None])[:, 0]

    def gumbel(self, step: int, positions: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Return standard Gumbel noise for each position; zeros at temperature 0, whose result no seed changes."""
        return self._gumbel("order", step, positions)

    def normal(self, step: int, positions: Int[Tensor, "N"], channels: int) -> Float[Tensor, "N C"]:
        """Return standard normal noise for each position and channel, whatever the temperature."""
        keys = (self._seed, stream("generate/normal"), *self._keys, step)
        places = positions.numpy()[:, None], np.arange(channels)[None]
        return torch.from_numpy(keyed_normal(*keys, *places)).float()

    def smallest(self, scores: Float[Tensor, "N"], count: int) -> Bool[Tensor, "N"]:
        """Return which `count` scores are the smallest; of equal ones the first."""
        order = torch.argsort(scores, stable=True)
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[order[:count]] = True
        if 0 < count < len(scores):
            # Each of two log-probabilities changes by as much as two logits do.
            margin = scores[order[count]] - scores[order[count - 1]]
            self.n_near_ties += int(margin < 2 * self._bound)
        return chosen

    def above(self, scores: Float[Tensor, "N"], bound: float) -> Bool[Tensor, "N"]:
        """Return which scores, log-probabilities, are larger than `bound`."""
        self.n_near_ties += int(((scores - bound).abs() < self._bound).sum())
        return scores > bound

    def subset(self, candidates: Bool[Tensor, "N"], count: int, step: int) -> Bool[Tensor, "N"]:
        """Return a random subset of `count` of the candidates; at temperature 0 the same for every seed."""
        seed = self._seed if self._settings.temperature else 0
        order = torch.from_numpy(keyed_permutation(len(candidates), seed, stream("generate/subset"), *self._keys, step))
        chosen = torch.zeros_like(candidates)
        chosen[order[candidates[order]][:count]] = True
        return chosen

    def _gumbel(self, use: str, step: int, *places: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self._settings.temperature == 0:
            return torch.zeros(torch.broadcast_shapes(*(p.shape for p in places)), dtype=torch.float64)
        keys = (self._seed, stream(f"generate/{use}"), *self._keys, step)
        return torch.from_numpy(keyed_gumbel(*keys, *(p.numpy() for p in places)))
