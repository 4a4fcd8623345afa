"""Whether a configuration and a vocabulary are those of one model."""

from omniform.modeling.config import ConfigError, ModelConfig
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.vocabulary import Vocabulary


def check_agreement(config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Refuse a configuration that does not fit the modalities of a vocabulary.

    Raises:
        ConfigError: a modality of the vocabulary has no objective, or an objective no modality; an objective for
            vectors is for codes, or the other way round; one with blocks is for spans of one length, or with subsets
            one that fills in place for spans that end themselves; or one does not take as many codebooks as there are.
    """
    if set(config.objectives) != set(vocabulary.names):
        raise ConfigError(
            f"model.objectives is for {sorted(config.objectives)}, but the tokenizers are for "
            f"{sorted(vocabulary.names)}: give one objective per modality"
        )
    if unknown := set(config.position_embeddings) - set(vocabulary.names):
        raise ConfigError(
            f"model.position_embeddings is for {sorted(unknown)} too, but the tokenizers are for "
            f"{sorted(vocabulary.names)}: name modalities of the model"
        )
    for name, objective in config.objectives.items():
        channels = vocabulary.channels_of(name)
        if objective.continuous != (channels is not None):
            made = "codes" if channels is None else f"vectors of {channels} numbers"
            raise ConfigError(
                f"model.objectives.{name} is {objective.kind}, but its tokenizer makes {made}: choose an objective "
                "for these, or another tokenizer"
            )
        _check_codebooks(name, objective, vocabulary)
        if objective.block_size is not None and vocabulary.end_of(name) is None:
            raise ConfigError(
                f"model.objectives.{name}.block_size is {objective.block_size}, but all spans of {name} have one "
                "length: leave it out; blocks are for spans that end themselves"
            )
        if config.subsets and not objective.commits and vocabulary.end_of(name) is not None:
            raise ConfigError(
                f"model.objectives.{name} is {objective.kind} beside model.subsets, but spans of {name} end "
                "themselves, and rows that are asked all at once do not say where: choose next_token"
            )
        if config.subsets and vocabulary.n_codebooks(name) > 1:
            raise ConfigError(
                f"model.subsets is given, but {name} has {vocabulary.n_codebooks(name)} codebooks: choose a tokenizer "
                f"of one code per place for tokenizers.{name}"
            )
    if config.decoder.timestep == "adaln" and not any(o.continuous for o in config.objectives.values()):
        raise ConfigError(
            "model.decoder.timestep is adaln, but no modality is made of vectors, which alone have times: leave it out"
        )


def _check_codebooks(modality: str, objective: Objective, vocabulary: Vocabulary) -> None:
    """Refuse an objective that does not take as many codebooks as a modality has.

    Raises:
        ConfigError: it does not.
    """
    n_codebooks, path = vocabulary.n_codebooks(modality), f"model.objectives.{modality}"
    if n_codebooks == 1 and isinstance(objective, NextToken) and objective.codebooks is not None:
        raise ConfigError(f"{path}.codebooks is {objective.codebooks}, but {modality} has one codebook: leave it out")
    if n_codebooks == 1 and objective.layout == "parallel":
        raise ConfigError(
            f"{path} is {objective.kind}, but {modality} has one codebook: choose next_token or masked, or a tokenizer "
            "of several codes per frame"
        )
    if n_codebooks > 1 and objective.layout is None:
        raise ConfigError(
            f"{path} is {objective.kind}, but {modality} has {n_codebooks} codebooks, which next_token and "
            "coarse_to_fine take: choose one of these"
        )
    if n_codebooks > 1 and vocabulary.end_of(modality) is None:
        raise ConfigError(
            f"{path}: {modality} has {n_codebooks} codebooks and spans of one length: spans of several codebooks end "
            "themselves; let its tokenizer have no fixed_grid"
        )
