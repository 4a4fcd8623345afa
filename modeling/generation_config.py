"""What a model folder's generation_config.json holds: how to sample where a call does not say."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingSettings:
    """How the spans of one modality are sampled.

    Attributes:
        max_new_tokens: most tokens of a span of free length, its end included; of several codebooks most rows, of
            which the whole frames count; spans of fixed length ignore it.
        temperature: logits are divided by it; 0 takes the likeliest token and draws no noise at all. Between 0 and
            1e-6, as above 1e6, quotients may leave the range of fp32.
        top_k: only the k likeliest tokens may be chosen; None for all.
        top_p: only the smallest set of likeliest tokens that holds this much probability; None for all.
        guidance_scale: classifier-free guidance, `uncond + scale * (cond - uncond)` on logits; 1 for none.
        steps: forward passes for a span that is filled in place, or for each of its blocks; None for the objective's
            own number.
    """

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    guidance_scale: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)
    steps: int | None = Field(default=None, ge=1, le=10_000)

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if 0 < value < 1e-6:
            raise ValueError("0, which takes the likeliest token, or at least 1e-6")
        return value


def _check_ways(value: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    for given, ways in value.items():
        for wanted, between in ways.items():
            if between in (given, wanted):
                raise ValueError(f"{given}.{wanted} is {between}, expected a modality other than these two")
    return value


Ways = Annotated[dict[str, dict[str, str]], AfterValidator(_check_ways)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerationConfig:
    """Defaults of generation.

    Attributes:
        max_sequence_length: most rows of prompt and reply together, markers included; as long as in training.
        modalities: settings by modality; what is not named has the defaults of `SamplingSettings`.
        through: by modality of the prompt and of the reply, one that is generated between the two: with {"speech":
            {"video": "text"}} speech is written down before a video is made of it. The one between is neither of the
            other two. Source: chain of modality, arXiv:2305.11000, where spoken questions are answered by way of
            their text.
    """

    max_sequence_length: int = Field(default=1024, ge=1)
    modalities: dict[str, SamplingSettings] = Field(default_factory=dict)
    through: Ways = Field(default_factory=dict)
