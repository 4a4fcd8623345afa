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
from omniform.modeling.interfaces import DiscreteInterface
from omniform.modeling.layers import KeyValueCache
from omniform.modeling.objectives.base import Objective
from omniform.modeling.sequence import PackedBatch
from omniform.tokenizers.vocabulary import IdRange, Vocabulary


@dataclass(frozen=True)
class Predictions:
    """What one modality's head is asked for in a batch, and the answers.

    Attributes:
        rows: flat index, in (B * L), of the rows whose hidden states predict.
        labels: right answers, counted from the modality's first target id.
        weights: weight per prediction; 0 counts for nothing.
    """

    rows: Int[Tensor, "M"]
    labels: Int[Tensor, "M"]
    weights: Float[Tensor, "M"]

    def to(self, device: torch.device | str) -> "Predictions":
        """Return the same on `device`."""
        return Predictions(self.rows.to(device), self.labels.to(device), self.weights.to(device))


@dataclass(frozen=True)
class CorruptedBatch:
    """A packed batch after its objectives' forward process: what the network reads, and what it is asked.

    Attributes:
        predictions: every modality of the vocabulary, in its order; a modality without targets has one dummy of
            weight 0, so that all ranks run the same modules in the same order.
    """

    token_ids: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "B L 3"]
    pattern: AttentionPattern
    predictions: Mapping[str, Predictions]

    @property
    def counts(self) -> dict[str, float]:
        """Sum of the weights of each modality's predictions: what its loss sum is to be divided by."""
        return {modality: float(p.weights.sum()) for modality, p in self.predictions.items()}

    def to(self, device: torch.device | str) -> "CorruptedBatch":
        """Return the batch on `device`."""
        return CorruptedBatch(
            self.token_ids.to(device),
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
            dummy = torch.zeros(1, dtype=torch.int64)
            predictions[modality] = Predictions(dummy, dummy, torch.zeros(1))
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
        )
    return CorruptedBatch(token_ids, batch.position_ids, batch.pattern, predictions)


class UnifiedModel(nn.Module):
    """One decoder over every modality of a vocabulary.

    Raises:
        ConfigError: a modality of the vocabulary has no objective, or an objective no modality.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if set(config.objectives) != set(vocabulary.names):
            raise ConfigError(
                f"model.objectives is for {sorted(config.objectives)}, but the tokenizers are for "
                f"{sorted(vocabulary.names)}: give one objective per modality"
            )
        self.config, self.vocabulary = config, vocabulary
        self.interface = DiscreteInterface(vocabulary.size, config.decoder.dim)
        self.decoder = Decoder(config.decoder)
        self._initialize()

    def forward(self, batch: CorruptedBatch) -> dict[str, Float[Tensor, ""]]:
        """Return the loss SUM of every modality, in the vocabulary's order; the counts are `batch.counts`."""
        hidden = self.hidden(batch.token_ids, batch.position_ids, batch.pattern).flatten(0, 1)
        losses = {}
        for modality, predictions in batch.predictions.items():
            logits = self.logits(hidden[predictions.rows], self.vocabulary.target_range(modality))
            objective = self.config.objectives[modality]
            losses[modality] = objective.loss(logits, predictions.labels, predictions.weights, self.config.z_loss)
        return losses

    def hidden(
        self,
        token_ids: Int[Tensor, "B N"],
        position_ids: Int[Tensor, "B N 3"],
        pattern: AttentionPattern,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the hidden states of N rows.

        Args:
            pattern: of the N rows; with a cache, of the cached rows followed by the N rows.
        """
        if cache is None:
            mask = pattern.render(preferred_form(token_ids.device))
        else:
            mask = pattern.render(MaskForm.DENSE, n_queries=token_ids.shape[1])
        return self.decoder(self.interface.embed(token_ids), position_ids, mask, cache)

    def logits(self, hidden: Float[Tensor, "*M D"], ids: IdRange) -> Float[Tensor, "*M W"]:
        """Return the logits of the ids in the range, for the hidden states given."""
        return self.interface.logits(hidden, ids)

    def text_logits(self, token_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Return next-token logits over the text tokenizer's ids, for plain causal text.

        Column j of the result predicts id j + 1 from the begin marker and ids 0 to j.

        Raises:
            VocabularyError: an id is not of the text tokenizer.
        """
        text_ids = self.vocabulary.to_ids("text", token_ids)
        begin = torch.full_like(text_ids[:, :1], self.vocabulary.begin("text"))
        rows = torch.cat([begin, text_ids], dim=1)
        same, no = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        positions = torch.arange(rows.shape[1], device=rows.device)[None, :, None].expand(rows.shape[0], -1, 3)
        hidden = self.hidden(rows, positions, AttentionPattern(same, same, no, no))[:, 1:]
        return self.logits(hidden, IdRange(0, self.vocabulary.text_size))

    def _initialize(self) -> None:
        """Normal weights of deviation 0.02; the layers that write to the residual stream 1 / sqrt(2 n_layers) smaller.

        Source: GPT-2 (Radford et al., 2019), section 2.3.
        """
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.decoder.n_layers))
