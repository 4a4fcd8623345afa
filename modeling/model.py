"""The unified model: interfaces around the decoder, and the losses of a corrupted batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.kernels.attention import MaskForm, preferred_form
from omniform.modeling.attention_pattern import AttentionPattern
from omniform.modeling.config import ConfigError, ModelConfig
from omniform.modeling.decoder import Decoder
from omniform.modeling.interfaces import DiscreteInterface, PositionEmbedding
from omniform.modeling.layers import KeyValueCache
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.sequence import PackedBatch
from omniform.tokenizers.vocabulary import IdRange, Vocabulary

NEXT_SPAN = "next_span"


@dataclass(frozen=True)
class Predictions:
    """What one head is asked for in a batch, and the answers.

    Attributes:
        rows: flat index, in (B * L), of the rows whose hidden states predict.
        labels: right answers, counted from the first id of the range that is predicted.
        weights: weight per prediction; 0 counts for nothing.
        count: what the loss sum is to be divided by.
    """

    rows: Int[Tensor, "M"]
    labels: Int[Tensor, "M"]
    weights: Float[Tensor, "M"]
    count: float

    def to(self, device: torch.device | str) -> "Predictions":
        """Return the same on `device`."""
        return Predictions(self.rows.to(device), self.labels.to(device), self.weights.to(device), self.count)

    @classmethod
    def dummy(cls) -> "Predictions":
        """Return one prediction of weight 0, so that a head without targets runs on every rank all the same."""
        row = torch.zeros(1, dtype=torch.int64)
        return cls(row, row, torch.zeros(1), 0.0)


@dataclass(frozen=True)
class CorruptedBatch:
    """A packed batch after its objectives' forward process: what the network reads, and what it is asked.

    Attributes:
        predictions: every modality of the vocabulary, in its order, then `NEXT_SPAN`: which span follows. What has no
            targets has one dummy of weight 0, so that all ranks run the same modules in the same order.
    """

    token_ids: Int[Tensor, "B L"]
    modality_ids: Int[Tensor, "B L"]
    span_positions: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "B L 3"]
    pattern: AttentionPattern
    predictions: Mapping[str, Predictions]

    @property
    def counts(self) -> dict[str, float]:
        """What each loss sum is to be divided by."""
        return {term: predictions.count for term, predictions in self.predictions.items()}

    def to(self, device: torch.device | str) -> "CorruptedBatch":
        """Return the batch on `device`."""
        return CorruptedBatch(
            self.token_ids.to(device),
            self.modality_ids.to(device),
            self.span_positions.to(device),
            self.position_ids.to(device),
            self.pattern.to(device),
            {modality: p.to(device) for modality, p in self.predictions.items()},
        )


def corrupt(batch: PackedBatch, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> CorruptedBatch:
    """Run the forward process of every target span of the batch."""
    token_ids = batch.token_ids.clone()
    flat_ids = token_ids.view(-1)
    predictions = {}
    for modality in vocabulary.names:
        targets = batch.targets.get(modality)
        if targets is None:
            predictions[modality] = Predictions.dummy()
            continue
        objective = objectives[modality]
        corrupted = objective.corrupt(targets, vocabulary.mask)
        flat_ids[torch.from_numpy(targets.rows)] = torch.from_numpy(corrupted.token_ids)
        counted = corrupted.loss_weights > 0
        first_id = vocabulary.target_range(modality).start
        predictions[modality] = Predictions(
            torch.from_numpy(targets.rows[counted] + objective.shift),
            torch.from_numpy(targets.token_ids[counted] - first_id),
            torch.from_numpy(corrupted.loss_weights[counted]),
            float(corrupted.loss_weights.sum()) if corrupted.count is None else corrupted.count,
        )
    rows, following = batch.next_spans
    predictions[NEXT_SPAN] = Predictions.dummy()
    if len(rows):
        labels = following - vocabulary.next_span_range.start
        predictions[NEXT_SPAN] = Predictions(rows, labels, torch.ones(len(rows)), float(len(rows)))
    return CorruptedBatch(
        token_ids, batch.modality_ids, batch.span_positions, batch.position_ids, batch.pattern, predictions
    )


class UnifiedModel(nn.Module):
    """One decoder over every modality of a vocabulary.

    Raises:
        ConfigError: a modality of the vocabulary has no objective, or an objective no modality; or an objective with
            blocks is for spans of one length.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
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
            if objective.block_size is not None and vocabulary.end_of(name) is None:
                raise ConfigError(
                    f"model.objectives.{name}.block_size is {objective.block_size}, but all spans of {name} have one "
                    "length: leave it out; blocks are for spans that end themselves"
                )
        self.config, self.vocabulary = config, vocabulary
        self.interface = DiscreteInterface(vocabulary.size, config.decoder.dim)
        sizes = {vocabulary.place_of(name): size for name, size in config.position_embeddings.items()}
        self.position_embedding = PositionEmbedding(sizes, config.decoder.dim) if sizes else None
        n_experts = len(vocabulary.names) if config.decoder.experts == "modality" else None
        self.decoder = Decoder(config.decoder, n_experts)
        self._initialize()

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of each loss term, in the order in which `forward` returns them."""
        objectives, weight = self.config.objectives, self.config.next_span_weight
        weights = {modality: objectives[modality].weight for modality in self.vocabulary.names}
        return {**weights, NEXT_SPAN: weight} if weight else weights

    def forward(self, batch: CorruptedBatch) -> dict[str, Float[Tensor, ""]]:
        """Return the loss SUM of every modality, in the vocabulary's order, then that of `NEXT_SPAN` if it is learnt;
        the counts are `batch.counts`."""
        rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
        hidden = self.hidden(*rows, batch.pattern).flatten(0, 1)
        losses = {}
        for term in self.term_weights:
            asked = batch.predictions[term]
            # Which span follows is one more next-token prediction, over its own few ids.
            objective = NextToken() if term == NEXT_SPAN else self.config.objectives[term]
            logits = self.logits(hidden[asked.rows], self.target_range(term))
            losses[term] = objective.loss(logits, asked.labels, asked.weights, self.config.z_loss)
        return losses

    def target_range(self, term: str) -> IdRange:
        """Return the ids that a loss term predicts."""
        return self.vocabulary.next_span_range if term == NEXT_SPAN else self.vocabulary.target_range(term)

    def hidden(
        self,
        token_ids: Int[Tensor, "B N"],
        modality_ids: Int[Tensor, "B N"],
        span_positions: Int[Tensor, "B N"],
        position_ids: Int[Tensor, "B N 3"],
        pattern: AttentionPattern,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the hidden states of N rows.

        Args:
            modality_ids: place in the vocabulary of each row's modality; that of a masked row no id tells.
            span_positions: of each row in its span: 0 for the begin marker, then 1, 2, ...
            pattern: of the N rows; with a cache, of the cached rows followed by the N rows.
        """
        if cache is None:
            mask = pattern.render(preferred_form(token_ids.device))
        else:
            mask = pattern.render(MaskForm.DENSE, n_queries=token_ids.shape[1])
        embeddings = self.interface.embed(token_ids)
        if self.position_embedding is not None:
            embeddings = embeddings + self.position_embedding(modality_ids, span_positions)
        return self.decoder(embeddings, position_ids, mask, cache, modality_ids)

    def logits(self, hidden: Float[Tensor, "*M D"], ids: IdRange) -> Float[Tensor, "*M W"]:
        """Return the logits of the ids in the range, for the hidden states given."""
        return self.interface.logits(hidden, ids)

    def text_logits(self, token_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Return next-token logits over the text tokenizer's ids, for plain causal text.

        Column j of the result predicts id j + 1 from the begin marker and ids 0 to j.

        Raises:
            VocabularyError: an id is not of the text tokenizer.
            ConfigError: the model's text is not causal.
        """
        objective = self.config.objectives["text"]
        if objective.bidirectional:
            raise ConfigError(
                f"this model learnt text as {objective.kind}, in both directions: it has no next-token logits; "
                "generate text instead, or train with model.objectives.text: next_token"
            )
        text_ids = self.vocabulary.to_ids("text", token_ids)
        begin = torch.full_like(text_ids[:, :1], self.vocabulary.begin("text"))
        rows = torch.cat([begin, text_ids], dim=1)
        same, no = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        positions = torch.arange(rows.shape[1], device=rows.device)[None, :, None].expand(rows.shape[0], -1, 3)
        span_positions = positions[..., 0]
        hidden = self.hidden(rows, same, span_positions, positions, AttentionPattern(same, same, no, no))[:, 1:]
        return self.logits(hidden, IdRange(0, self.vocabulary.text_size))

    def _initialize(self) -> None:
        """Normal weights of deviation 0.02; the layers that write to the residual stream 1 / sqrt(2 n_layers) smaller.

        Source: GPT-2 (Radford et al., 2019), section 2.3.
        """
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.decoder.n_layers))
