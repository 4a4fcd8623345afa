"""Gaps in a text that a reply fills: what `mode` and `suffix` of `generate` ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from omniform.errors import OmniformError
from omniform.modeling.config import ModelConfig
from omniform.modeling.denoisers import Denoiser, Middle
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.sequence import Part
from omniform.tokenizers.base import Tokens
from omniform.tokenizers.vocabulary import gap_marker


@dataclass(frozen=True)
class Filling:
    """One gap, after a prefix and before a suffix.

    Attributes:
        mode: of the denoiser that the model learnt it from.
        suffix: what stands after the gap; None where the gap ends the text.
    """

    denoiser: Denoiser
    mode: str
    suffix: str | None
    opening: ClassVar[str] = gap_marker(0)

    def context(self, given: Sequence[Part]) -> list[Part]:
        """Return what the reply's text is generated from, laid out as in training.

        The suffix stands before the prefix only where training never puts it behind.

        Args:
            given: the text before the gap, and the one after it if there is a suffix.
        """
        suffix_first = isinstance(self.denoiser, Middle) and self.denoiser.suffix_first_rate == 1
        pieces = [part.tokens.codes for part in given if isinstance(part.tokens, Tokens)]
        return self.denoiser.context("text", pieces, self.mode, suffix_first=suffix_first)


def parse_filling(
    mode: object,
    suffix: object,
    *,
    config: ModelConfig,
    to: Sequence[str] | None,
    settings: Mapping[str, SamplingSettings],
    prompts: Sequence[Sequence[str]],
) -> Filling | None:
    """Turn what a user gives as `mode` and `suffix` into a gap to fill; None without either.

    Args:
        to: modality of each part of the reply; None where the model chooses.
        settings: by modality that is asked for.
        prompts: of each, the modality of its parts.

    Raises:
        OmniformError: a mode that the model has not learnt, a suffix for a mode that has none or none for one that has,
            a reply or prompt that is not one text, or guidance, which no denoiser has learnt the other branch of.
    """
    if mode is None and suffix is None:
        return None
    named = "suffix" if mode is None else "mode"
    if suffix is not None and not isinstance(suffix, str):
        raise OmniformError(f"suffix is a {type(suffix).__name__}, expected a string")
    known = [(denoiser.mode or name, denoiser) for name, denoiser in config.denoisers.items()]
    found = [(own, d) for own, d in known if (d.suffix if mode is None else own == mode)]
    if not found:
        asked = "to fill in the middle of a text" if mode is None else f"in the mode {mode!r}"
        modes = f"its modes are {', '.join(config.modes)}" if config.modes else "it has no modes"
        raise OmniformError(
            f"{named} asks {asked}, which this model has not learnt; {modes}: leave {named} out, or train one with "
            "such a denoiser (model.denoisers)"
        )
    own, denoiser = next(((own, d) for own, d in found if d.suffix == (suffix is not None)), found[0])
    if denoiser.suffix != (suffix is not None):
        fills = "what stands between prompt and suffix: give a suffix" if denoiser.suffix else "what comes after a text"
        raise OmniformError(f"mode {own} fills {fills}" + ("" if denoiser.suffix else ": leave suffix out"))
    if to is None or [*to] != ["text"]:
        raise OmniformError(f'{named} is for a reply of one text: give to="text"')
    if any([*modalities] not in ([], ["text"]) for modalities in prompts):
        raise OmniformError(f"{named} is for a prompt of one text, or [] for none: what is given stands before the gap")
    if settings["text"].guidance_scale != 1:
        raise OmniformError(f"{named} does not go with guidance: give guidance_scale=1")
    return Filling(denoiser, own, suffix)
