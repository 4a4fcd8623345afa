"""How one token is chosen from logits: pure functions of logits, settings and given noise."""

import math

import torch
from jaxtyping import Bool, Float, Int
from pydantic import ValidationError
from torch import Tensor

from omniform.errors import OmniformError
from omniform.kernels.keyed_noise import keyed_gumbel, stream
from omniform.modeling.generation_config import SamplingSettings


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
        expected = first["msg"].removeprefix("Input should be ")
        raise OmniformError(f"{source}: {name} is {first['input']!r}, expected {expected}") from error


def guide(
    conditional: Float[Tensor, "*B W"], unconditional: Float[Tensor, "*B W"], scale: float
) -> Float[Tensor, "*B W"]:
    """Push logits away from what the model says without its condition: `uncond + scale * (cond - uncond)`.

    Scale 1 gives the conditional logits. Source: classifier-free guidance, arXiv:2207.12598, whose 1 + w is our scale.
    """
    return unconditional + scale * (conditional - unconditional)


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


class KeyedDraw:
    """The `Draw` of one generated span: every number is a function of (seed, sample, span, step, position, token).

    Args:
        seed: what the user gave, in [0, 2**63).
        sample: place of the sample among those that share the seed.
        span: place of the span among the generated ones of the sample.
    """

    def __init__(self, seed: int, sample: int, span: int, settings: SamplingSettings) -> None:
        self._keys = (sample, span)
        self._seed, self._settings = seed, settings

    def tokens(
        self, logits: Float[Tensor, "N W"], step: int, positions: Int[Tensor, "N"]
    ) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
        """Return one choice per row, an index into W, and its log-probability under the truncated softmax."""
        log_probs = truncated_log_probs(logits, self._settings)
        noise = self._gumbel("token", step, positions[:, None], torch.arange(logits.shape[-1])[None, :])
        choice = choose(log_probs, noise)
        return choice, log_probs.gather(-1, choice[:, None])[:, 0]

    def gumbel(self, step: int, positions: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Return standard Gumbel noise for each position; zeros at temperature 0, whose result no seed changes."""
        return self._gumbel("order", step, positions)

    def _gumbel(self, use: str, step: int, *places: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self._settings.temperature == 0:
            return torch.zeros(torch.broadcast_shapes(*(p.shape for p in places)), dtype=torch.float64)
        keys = (self._seed, stream(f"generate/{use}"), *self._keys, step)
        return torch.from_numpy(keyed_gumbel(*keys, *(p.numpy() for p in places)))
