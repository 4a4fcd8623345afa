"""The one id space of a model, and the only place where an offset is added to a code.

    [ text ids | 64 special ids | codes of the 1st discrete modality | codes of the 2nd | ... ]

Text ids are the text tokenizer's own. A modality of several codebooks has a range of codes for each, one after the
other. Special ids have fixed places; each modality takes the next free one as its
begin marker. A vocabulary with modes has further markers, from the other end of the special ids down: `N_GAPS` for gaps
in a text, then one for each mode. A modality whose spans are of free length, such as speech, has an id that ends them
after its codes; that of text is the special id `end`, which comes next after its own. A modality of real vectors has a
begin marker and no codes; in its rows stands the id `mask`, until a vector takes its place. Adding a modality or a mode
appends: no id that was ever stored changes its meaning.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from omniform.errors import OmniformError
from omniform.tokenizers.base import Continuous, Discrete

N_SPECIAL = 64
N_GAPS = 32
_FIXED_SPECIALS = ("end", "pad", "mask", "begin:text")


def gap_marker(number: int) -> str:
    """Return the name of the marker of gap `number`, from 0; they come round again after `N_GAPS`."""
    return f"gap:{number % N_GAPS}"


def mode_marker(mode: str) -> str:
    """Return the name of the marker that opens what is given in a mode."""
    return f"mode:{mode}"


class VocabularyError(OmniformError):
    """An id, a code or a vocabulary that does not fit the model's own."""


@dataclass(frozen=True)
class IdRange:
    """Ids start <= id < stop."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Vocabulary:
    """Bijection between (modality, code) and the ids of one model.

    Args:
        text_size: number of ids of the text tokenizer.
        modalities: the other modalities, in the order in which they were added to the model.
        free_length: those of them whose spans end themselves, as those of text do.
        modes: ways to learn a text with gaps, in the order in which they were added; see `omniform.modeling.denoisers`.
            Without any there are no markers of gaps either.

    Raises:
        VocabularyError: more modalities and modes than markers, a mode that is named twice, an empty codebook, vectors
            of no numbers, text among `modalities`, or a name in `free_length` that is not among them or is of a
            continuous modality.
    """

    def __init__(
        self,
        text_size: int,
        modalities: Mapping[str, Discrete | Continuous],
        free_length: Collection[str] = (),
        modes: Collection[str] = (),
    ) -> None:
        if text_size < 1:
            raise VocabularyError(f"text_size is {text_size}, expected at least 1")
        if "text" in modalities:
            raise VocabularyError("text is the first range by itself: leave it out of `modalities`")
        if not set(free_length) <= set(modalities):
            raise VocabularyError(f"free_length names {sorted(free_length)}, expected some of {sorted(modalities)}")
        if len(set(modes)) < len(modes):
            raise VocabularyError(f"modes are {', '.join(modes)}, expected each once")
        specials = [*_FIXED_SPECIALS, *(f"begin:{name}" for name in modalities)]
        markers = [*map(gap_marker, range(N_GAPS)), *map(mode_marker, modes)] if modes else []
        if len(specials) + len(markers) > N_SPECIAL:
            most = N_SPECIAL - len(_FIXED_SPECIALS) - (N_GAPS if modes else 0)
            raise VocabularyError(
                f"{len(modalities)} modalities and {len(modes)} modes, expected at most {most} in all"
            )
        self.text_size = text_size
        self.modalities, self.modes = dict(modalities), tuple(modes)
        self._next_spans = IdRange(text_size, text_size + len(specials))
        self._specials = {name: text_size + place for place, name in enumerate(specials)}
        self._specials |= {name: text_size + N_SPECIAL - 1 - place for place, name in enumerate(markers)}
        self._ends = {"text": self._specials["end"]}
        self._codes: dict[str, IdRange] = {"text": IdRange(0, text_size)}
        next_id = text_size + N_SPECIAL
        for name, representation in modalities.items():
            if isinstance(representation, Continuous):
                if representation.channels < 1 or name in free_length:
                    raise VocabularyError(f"modality {name} is {representation}, expected vectors on a fixed grid")
                self._codes[name] = IdRange(next_id, next_id)
                continue
            width = representation.vocab_size * representation.n_codebooks
            if width < 1:
                raise VocabularyError(f"modality {name} has an empty codebook: {representation}")
            self._codes[name] = IdRange(next_id, next_id + width)
            next_id += width
            if name in free_length:
                self._ends[name] = next_id
                next_id += 1
        self.size = next_id

    @property
    def names(self) -> tuple[str, ...]:
        """All modalities, text first, in the order of their ids."""
        return tuple(self._codes)

    def place_of(self, modality: str) -> int:
        """Place of `modality` among `names`, by which rows say whose they are; adding a modality moves none."""
        self._require(modality)
        return self.names.index(modality)

    @property
    def end(self) -> int:
        """Id that ends a text, and stands for the end of a document where the next span is predicted."""
        return self._specials["end"]

    @property
    def pad(self) -> int:
        """Id of rows that hold nothing; never seen by a loss or by another row."""
        return self._specials["pad"]

    @property
    def mask(self) -> int:
        """Id that stands for a token not yet known, in masked objectives, or for one that is a vector."""
        return self._specials["mask"]

    def channels_of(self, modality: str) -> int | None:
        """Numbers in each token of `modality`; None where tokens are codes."""
        self._require(modality)
        representation = self.modalities.get(modality)
        return representation.channels if isinstance(representation, Continuous) else None

    def begin(self, modality: str, opening: str | None = None) -> int:
        """Id of the marker row before every span of `modality`.

        Args:
            opening: the marker of a mode or gap that stands in its place; see `mode_marker` and `gap_marker`.

        Raises:
            VocabularyError: this vocabulary has no such modality or marker.
        """
        self._require(modality)
        name = f"begin:{modality}" if opening is None else opening
        if name not in self._specials:
            raise VocabularyError(
                f"no marker {opening!r} in this model, whose modes are {', '.join(self.modes) or '-'}"
            )
        return self._specials[name]

    def end_of(self, modality: str) -> int | None:
        """Id that ends a span of `modality`, the last of `target_range`; None where all spans have one length."""
        self._require(modality)
        return self._ends.get(modality)

    @property
    def next_span_range(self) -> IdRange:
        """Ids among which lies what may follow a span: the begin markers, and `end` where nothing does."""
        return self._next_spans

    def target_range(self, modality: str) -> IdRange:
        """Ids that a generated span of `modality` may hold: its codes, and the id that ends it if one does."""
        codes, end = self._require(modality), self.end_of(modality)
        return codes if end is None else IdRange(codes.start, end + 1)

    def n_codebooks(self, modality: str) -> int:
        """Codebooks of `modality`, each with a range of its own; 1 for text and for vectors."""
        self._require(modality)
        representation = self.modalities.get(modality)
        return representation.n_codebooks if isinstance(representation, Discrete) else 1

    def codebook_range(self, modality: str, codebook: int) -> IdRange:
        """Ids of the codes of one codebook, 0 the first."""
        own, size = self._require(modality), self._codebook_size(modality)
        return IdRange(own.start + codebook * size, own.start + (codebook + 1) * size)

    def to_ids(self, modality: str, codes: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Turn a modality's own codes into ids of the model.

        Args:
            codes: of a modality of several codebooks one of each along the last axis.

        Raises:
            VocabularyError: a code is outside the modality's range, or the last axis is not of its codebooks.
        """
        starts, size = self._starts(modality, codes), self._codebook_size(modality)
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < size):
            raise VocabularyError(
                f"codes of {modality} span [{int(codes.min())}, {int(codes.max())}], expected [0, {size - 1}]: "
                "they were made by another tokenizer"
            )
        return codes.to(torch.int64) + starts

    def to_codes(self, modality: str, ids: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Turn ids of the model into a modality's own codes.

        Args:
            ids: as `to_ids` returns them.

        Raises:
            VocabularyError: an id belongs to something else, or to another codebook; or see `to_ids`.
        """
        own, starts, size = self._require(modality), self._starts(modality, ids), self._codebook_size(modality)
        codes = ids.to(torch.int64) - starts
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < size):
            raise VocabularyError(
                f"ids span [{int(ids.min())}, {int(ids.max())}], expected those of {modality}: "
                f"[{own.start}, {own.stop - 1}], each of its codebook"
            )
        return codes

    def to_choices(
        self, modality: str, ids: Int[Tensor, "N"], codebooks: Int[Tensor, "N"] | None = None
    ) -> Int[Tensor, "N"]:
        """Return the place of each id among those that may stand where it does: the codes of its codebook, then the id
        that ends a span.

        Args:
            codebooks: of each id; the first unless given.
        """
        codes = ids - self._first_of(modality, ids, codebooks)
        end = self.end_of(modality)
        return codes if end is None else torch.where(ids == end, self._codebook_size(modality), codes)

    def to_chosen(
        self, modality: str, choices: Int[Tensor, "N"], codebooks: Int[Tensor, "N"] | None = None
    ) -> Int[Tensor, "N"]:
        """Return the ids that `to_choices` turned into places."""
        ids = choices + self._first_of(modality, choices, codebooks)
        end = self.end_of(modality)
        return ids if end is None else torch.where(choices == self._codebook_size(modality), end, ids)

    def describe(self, token_id: int) -> str:
        """Return a readable name of an id, for errors and previews."""
        for name, place in self._specials.items():
            if token_id == place:
                return f"<{name}>"
        for name, ids in self._codes.items():
            if ids.start <= token_id < ids.stop:
                return f"{name}[{token_id - ids.start}]"
        for name, end in self._ends.items():
            if token_id == end:
                return f"<end:{name}>"
        return f"unused[{token_id}]"

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads: sizes, the derived ranges for human readers, and the hash."""
        content = self._content()
        return {**content, "size": self.size, "specials": self._specials, "sha256": self.digest()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Vocabulary":
        """Rebuild a vocabulary and check it against the stored hash.

        Raises:
            VocabularyError: a key is missing, or the hash does not match the content.
        """
        try:
            stored = {
                name: Continuous(**entry) if "channels" in entry else Discrete(**entry)
                for name, entry in content["modalities"].items()
            }
            vocabulary = cls(content["text_size"], stored, content.get("free_length", ()), content.get("modes", ()))
            expected = content["sha256"]
        except (KeyError, TypeError, AttributeError) as error:
            raise VocabularyError(
                f"a vocabulary record lacks or misnames a key: {error!r}; expected text_size, modalities and sha256"
            ) from error
        if vocabulary.digest() != expected:
            raise VocabularyError(
                f"the vocabulary's content hashes to {vocabulary.digest()[:12]}, but its record says "
                f"{str(expected)[:12]}: the file was edited or damaged; take it again from where the model was saved"
            )
        return vocabulary

    def digest(self) -> str:
        """Return the sha256 over everything that decides what an id means."""
        content = {**self._content(), "n_special": N_SPECIAL, "specials": self._specials}
        return hashlib.sha256(json.dumps(content, sort_keys=False).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def _content(self) -> dict[str, Any]:
        entries = {name: dict(vars(representation)) for name, representation in self.modalities.items()}
        free = [name for name in self.modalities if name in self._ends]
        content: dict[str, Any] = {"text_size": self.text_size, "modalities": entries}
        # Left out where there are none: records from before there were any keep their hash.
        if free:
            content["free_length"] = free
        if self.modes:
            content["modes"] = [*self.modes]
        return content

    def _codebook_size(self, modality: str) -> int:
        return len(self._require(modality)) // self.n_codebooks(modality)

    def _first_of(self, modality: str, like: Int[Tensor, "N"], codebooks: Int[Tensor, "N"] | None) -> Int[Tensor, "N"]:
        """Return the first id of each codebook."""
        codebooks = torch.zeros_like(like) if codebooks is None else codebooks
        return self._require(modality).start + codebooks * self._codebook_size(modality)

    def _starts(self, modality: str, values: Int[Tensor, "*N"]) -> Int[Tensor, "*Q"]:
        """Return what separates ids from codes along the last axis of `values`."""
        n_codebooks = self.n_codebooks(modality)
        if n_codebooks > 1 and (not values.ndim or values.shape[-1] != n_codebooks):
            raise VocabularyError(
                f"{modality} of shape {tuple(values.shape)}, expected one of each of its {n_codebooks} codebooks along "
                "the last axis"
            )
        codebooks = torch.arange(n_codebooks, device=values.device)
        starts = self._require(modality).start + self._codebook_size(modality) * codebooks
        return starts if n_codebooks > 1 else starts[0]

    def _require(self, modality: str) -> IdRange:
        if modality not in self._codes:
            raise VocabularyError(f"no modality {modality!r} in this model; it has {', '.join(self._codes)}")
        return self._codes[modality]
