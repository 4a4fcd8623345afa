"""Typed configuration: YAML text over frozen pydantic dataclasses, overridden by dotted key=value.

Precedence: defaults in Python < YAML < overrides. An unknown key or a value out of range is an error that names its
path. `parse_config` serves every configuration of the project, whatever the room.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_origin

import yaml
from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from omniform.errors import OmniformError
from omniform.modeling.denoisers import DENOISERS, MODE, Denoiser
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.registry import OBJECTIVES
from omniform.modeling.subsets import AnySubset, unfit

ConfigT = TypeVar("ConfigT")
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class ConfigError(OmniformError):
    """A configuration that cannot be used; the message names each key's path."""


def _build_kind(value: object, base: type, kinds: Mapping[str, type]) -> object:
    """Build the `base` that `kind` says, one of `kinds`, from a mapping of its settings or from its name alone."""
    if isinstance(value, base):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping with `kind`, one of {sorted(kinds)}, not {value!r}")
    kind = kinds.get(value.get("kind", ""))
    if kind is None:
        what = base.__name__.lower()
        raise ValueError(f"{what} kind is {value.get('kind')!r}, expected one of {sorted(kinds)}")
    try:
        return TypeAdapter(kind).validate_python(dict(value))
    except ValidationError as error:
        raise ValueError("\n".join(f".{line}" for line in _describe(error, kind))) from error


def _dump_kind(value: object) -> dict[str, Any]:
    return TypeAdapter(type(value)).dump_python(value, mode="json")


AnyObjective = Annotated[
    Objective, PlainValidator(lambda value: _build_kind(value, Objective, OBJECTIVES)), PlainSerializer(_dump_kind)
]
AnyDenoiser = Annotated[
    Denoiser, PlainValidator(lambda value: _build_kind(value, Denoiser, DENOISERS)), PlainSerializer(_dump_kind)
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopK:
    """Experts of which a router chooses the few that each row goes through; see `TopKExperts`.

    Attributes:
        n: experts of each block.
        k: how many of them a row goes through.
        balance_weight: of the loss that spreads the rows evenly over the experts (arXiv:2101.03961).
        z_weight: of the mean of log(Z)^2 of the router, which keeps its logits small (arXiv:2202.08906; 0.001 there).
        bias_rate: by how much the bias of an expert moves after each step, to spread the rows evenly without a loss
            (arXiv:2408.15664; 0.001 there); 0 for no bias.
    """

    kind: Literal["topk"] = "topk"
    n: int = Field(default=8, ge=2)
    k: int = Field(default=2, ge=1)
    balance_weight: float = Field(default=0.01, ge=0)
    z_weight: float = Field(default=0.0, ge=0)
    bias_rate: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check_choice(self) -> "TopK":
        if self.k > self.n:
            raise ValueError(f"k is {self.k}, expected no more than the experts that there are, n = {self.n}")
        return self


def _build_experts(value: object) -> object:
    if isinstance(value, TopK):
        return value
    given = value if isinstance(value, Mapping) else {"kind": value}
    match given.get("kind"):
        case "shared" | "modality" as kind if len(given) == 1:
            return kind
        case "topk":
            try:
                return TypeAdapter(TopK).validate_python(dict(given))
            except ValidationError as error:
                raise ValueError("\n".join(f".{line}" for line in _describe(error, TopK))) from error
        case "expert_choice":
            raise ValueError(
                "kind is expert_choice, whose experts choose among all rows at once (arXiv:2202.09368), so that what a "
                "row gets depends on rows after it: generation, which has not got these yet, could not repeat it. "
                "Text is read causally, and so is every span that follows another: choose topk"
            )
    raise ValueError(f"given {value!r}, expected shared, modality, topk or a mapping with kind: topk")


def _dump_experts(experts: object) -> object:
    return TypeAdapter(TopK).dump_python(experts, mode="json") if isinstance(experts, TopK) else experts


AnyExperts = Annotated[
    Literal["shared", "modality"] | TopK, PlainValidator(_build_experts), PlainSerializer(_dump_experts)
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
        head_dim: dimension of a head, even; dim / n_heads unless given.
        ffn_dim: inner dimension of the gated feed-forward layer.
        rope_theta: base of the rotary frequencies.
        qk_norm: normalise queries and keys per head (arXiv:2405.09818 shows it essential for mixed modalities).
        norm: where the norms of a block stand; see `Block`.
        init: how weights begin; see `initialise`. "magneto" with norm "sub_ln", else "gpt2", unless given.
        timestep: how rows of vectors know how noisy they are: "input" adds it to the row (as in arXiv:2408.11039),
            "adaln" scales and shifts what every sublayer reads of the row (see `Modulation`).
        experts: "shared": all rows go through the same feed-forward layers; "modality": each modality's rows through
            their own, in every block, while attention stays shared, see `ModalityExperts`; a `TopK`: each row through
            the few that a router chooses.
    """

    dim: int = Field(default=192, ge=2)
    n_layers: int = Field(default=6, ge=1)
    n_heads: int = Field(default=6, ge=1)
    n_kv_heads: int = Field(default=6, ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    ffn_dim: int = Field(default=512, ge=1)
    rope_theta: float = Field(default=10_000.0, gt=1)
    qk_norm: bool = True
    norm: Literal["pre", "post", "sandwich", "sub_ln", "hybrid"] = "pre"
    init: Literal["gpt2", "normal", "ds", "magneto"] | None = None
    timestep: Literal["input", "adaln"] = "input"
    experts: AnyExperts = "shared"
    norm_eps: float = Field(default=1e-5, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def dim_per_head(self) -> int:
        """Dimension of a head, derived from `dim` unless given."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def initialisation(self) -> str:
        """How weights begin, derived from `norm` unless given."""
        return self.init or ("magneto" if self.norm == "sub_ln" else "gpt2")

    @model_validator(mode="after")
    def _check_heads(self) -> "DecoderConfig":
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads is {self.n_heads}, expected a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim is {self.dim}, expected a multiple of n_heads = {self.n_heads}, or give head_dim")
        if self.dim_per_head % 2:
            raise ValueError(f"head_dim is {self.dim_per_head}, expected an even number for rotary positions")
        return self

    @model_validator(mode="after")
    def _check_norm(self) -> "DecoderConfig":
        if self.norm == "hybrid" and not self.qk_norm:
            raise ValueError("norm is hybrid, which normalises queries and keys, with qk_norm: false: leave it true")
        if self.timestep == "adaln" and self.norm in ("post", "hybrid"):
            raise ValueError(
                "timestep is adaln, which modulates the norms that sublayers begin with, with norm: "
                f"{self.norm}: choose norm pre, sandwich or sub_ln, or timestep: input"
            )
        if self.init == "magneto" and self.norm != "sub_ln":
            raise ValueError(
                f"init is magneto, whose gain is derived for norm: sub_ln, with norm: {self.norm}: change one of them"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The decoder and how each modality is learnt.

    Attributes:
        objectives: by modality; text must be among them.
        given: how the given side of a pair (X->Y), and a prompt, is read: "causal" or "bidirectional", as one block
            whose rows see each other (prefix LM, arXiv:1910.10683). Denoisers have a `given` of their own.
        denoisers: by name, ways to cut a text and to fill its gaps, which tasks such as text~NAME learn; see
            `omniform.modeling.denoisers`. One without a mode has its name for that.
        subsets: by name, ways to give some tokens of each modality and learn others, which tasks such as
            text+image~NAME learn; see `omniform.modeling.subsets`. A model with any learns nothing else, and reads
            every prompt as they do.
        position_embeddings: by modality, the most tokens of its spans: each position has a learnt vector beside the
            rotary positions; see `PositionEmbedding`. For modalities of a fixed grid.
        z_loss: weight of log(Z)^2 in every discrete loss.
        next_span_weight: weight of predicting which modality follows a span, learnt from interleaved documents; 0
            learns none of it, and then the order of a reply's parts must always be asked for.
    """

    decoder: DecoderConfig = DecoderConfig()
    objectives: dict[str, AnyObjective]
    given: Literal["causal", "bidirectional"] = "causal"
    denoisers: dict[Annotated[str, Field(pattern=MODE)], AnyDenoiser] = Field(default_factory=dict)
    subsets: dict[Annotated[str, Field(pattern=MODE)], AnySubset] = Field(default_factory=dict)
    position_embeddings: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    z_loss: float = Field(default=0.0, ge=0)
    next_span_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_objectives(self) -> "ModelConfig":
        if "text" not in self.objectives:
            raise ValueError("objectives lacks text: every model reads text, so give it an objective")
        for modality, objective in self.objectives.items():
            if objective.shift < 0 and objective.bidirectional:
                raise ValueError(
                    f"objectives.{modality}: {objective.kind} predicts the next row, which a bidirectional span "
                    "already shows it (label leak): choose a causal span or predict at the row itself"
                )
        return self

    @model_validator(mode="after")
    def _check_denoisers(self) -> "ModelConfig":
        for mode in self.modes:
            ways = {denoiser.given for name, denoiser in self.denoisers.items() if (denoiser.mode or name) == mode}
            if len(ways) > 1:
                raise ValueError(
                    f"denoisers of the mode {mode} have given: {', '.join(sorted(ways))}, expected one for all, by "
                    "which a prompt in this mode is read: change one, or its mode"
                )
        return self

    @model_validator(mode="after")
    def _check_given(self) -> "ModelConfig":
        if self.given == "bidirectional" and self.next_span_weight:
            raise ValueError(
                f"next_span_weight is {self.next_span_weight} with given: bidirectional, but what follows a part is "
                "learnt from interleaved documents, which give nothing: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_subsets(self) -> "ModelConfig":
        if not self.subsets:
            return self
        for modality, objective in self.objectives.items():
            if (problem := unfit(objective)) is not None:
                raise ValueError(f"objectives.{modality}: {problem}, or leave out model.subsets")
        for name, subset in self.subsets.items():
            if unknown := sorted(subset.named - set(self.objectives)):
                raise ValueError(
                    f"subsets.{name} has a concentration for {', '.join(unknown)}, but the objectives are for "
                    f"{', '.join(self.objectives)}: name modalities of the model"
                )
        if self.given != "causal":
            raise ValueError("given is bidirectional with subsets, which read what is given so anyway: leave given out")
        for key, rest in (("denoisers", "cut a text by itself"), ("next_span_weight", "is about an order of parts")):
            if getattr(self, key):
                raise ValueError(
                    f"{key} is given with subsets, beside which nothing else is learnt: leave one of them out; "
                    f"{key} {rest}"
                )
        return self

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes of the denoisers, in the order in which they are first named."""
        return tuple(dict.fromkeys(denoiser.mode or name for name, denoiser in self.denoisers.items()))


def parse_config(cls: type[ConfigT], text: str, overrides: Sequence[str] = (), source: str = "config") -> ConfigT:
    """Build a configuration from YAML text and dotted overrides.

    Args:
        cls: a pydantic dataclass.
        overrides: "a.b=value" each, value read as YAML; a number in the path is a place in a list, as in "a.0.b".
        source: what to call the text in errors, usually its path.

    Raises:
        ConfigError: not YAML, an unknown key, a value out of range or an override of another form.
    """
    try:
        content = yaml.load(text, _UniqueKeysLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{source} holds a {type(content).__name__}, expected a mapping of keys to values")
    for override in overrides:
        _override(content, override)
    try:
        return TypeAdapter(cls).validate_python(content)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _describe(error, cls))
        raise ConfigError(f"{_blamed(error, overrides, source)} cannot be used:\n{lines}") from error


def _blamed(error: ValidationError, overrides: Sequence[str], source: str) -> str:
    """Return what the errors are in: the overrides that they name, the text, or the text as overrides change it."""
    places = [tuple(map(str, entry["loc"])) for entry in error.errors(include_url=False)]
    keys = {override: tuple(override.partition("=")[0].split(".")) for override in overrides}
    named = [o for o, key in keys.items() if any(place[: len(key)] == key for place in places)]
    if not named:
        # An error of a whole group, such as two keys that do not fit together, may be in either.
        inside = [o for o, key in keys.items() if any(key[: len(place)] == place for place in places)]
        return f"{source} with {' '.join(inside)}" if inside else source
    elsewhere = any(all(place[: len(key)] != key for key in keys.values()) for place in places)
    return f"{source} with {' '.join(named)}" if elsewhere else f"override {' '.join(named)}"


def dump_config(config: object) -> str:
    """Return YAML from which `parse_config` rebuilds an equal configuration, every value written out."""
    plain = TypeAdapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a mapping that gives a key twice, of which YAML readers quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} cannot be read, expected dotted.key=value, for example optim.lr=1e-3")
    node: Any = content
    group: Any = content
    place: Any = None
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth])
        if isinstance(node, list) and not (key.isdigit() and int(key) < len(node)):
            raise ConfigError(f"override {path}: {where} has the entries 0 to {len(node) - 1}, not {key}")
        if not isinstance(node, list | dict):
            raise ConfigError(f"override {path}: {where} is a value, not a group of keys")
        group, place = node, (int(key) if isinstance(node, list) else key)
        node = node[place] if isinstance(node, list) else node.setdefault(place, {})
    try:
        group[place] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {path}: {text!r} is not a YAML value: {error}") from error


def _describe(error: ValidationError, cls: type) -> list[str]:
    lines = []
    for entry in error.errors(include_url=False):
        # Of an annotation with alternatives the place also says which of them was tried, in pydantic's words.
        path = ".".join(str(key) for key in entry["loc"] if not re.search(r"constrained-|\[", str(key)))
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "unexpected_keyword_argument":
            known = _fields_at(cls, entry["loc"][:-1])
            close = difflib.get_close_matches(str(entry["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            lines.append(f"{path}: unknown key; {hint}")
        elif entry["type"] == "missing":
            lines.append(f"{path}: required, but not given")
        elif entry["type"] == "value_error" and message.startswith("."):
            lines += [f"{path}{line}" for line in message.splitlines()]  # errors of an objective, paths below this one
        elif entry["type"] == "value_error":
            lines += (f"{path}: {message}" if path else message).splitlines()
        else:
            lines.append(f"{path}: {message}, not {entry['input']!r}")
    return lines


def _fields_at(cls: Any, path: Sequence[int | str]) -> list[str]:
    """Return the field names of the dataclass at `path` below `cls`, as far as plain annotations tell."""
    in_mapping = False
    for key in path:
        if in_mapping or isinstance(key, int):  # a name, or a place in a list, whose entries `cls` is
            in_mapping = False
            continue
        found = (
            {f.name: f.type for f in dataclasses.fields(cls)}.get(str(key)) if dataclasses.is_dataclass(cls) else None
        )
        if found is None:
            return []
        in_mapping = get_origin(found) is dict
        if not dataclasses.is_dataclass(found):
            # Optional and container fields: the one dataclass named in the annotation, if any.
            arguments = getattr(found, "__args__", ())
            inner = [a for a in arguments if dataclasses.is_dataclass(a)]
            found = inner[0] if inner else None
        if found is None:
            return []
        cls = found
    return sorted(f.name for f in dataclasses.fields(cls))
