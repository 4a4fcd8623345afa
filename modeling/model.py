"""The unified model: interfaces around the decoder, and the losses of a corrupted batch."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.kernels.attention import MaskForm, preferred_form
from omniform.modeling.attention_pattern import AttentionPattern
from omniform.modeling.config import ConfigError, ModelConfig, TopK
from omniform.modeling.corruption import NEXT_SPAN, ROUTER_BALANCE, ROUTER_Z, CorruptedBatch
from omniform.modeling.decoder import Decoder
from omniform.modeling.experts import RoutingTally, TopKExperts
from omniform.modeling.initialisation import initialise
from omniform.modeling.interfaces import ContinuousInterface, DiscreteInterface, PositionEmbedding
from omniform.modeling.layers import KeyValueCache
from omniform.modeling.objectives.base import ContinuousRows
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.vocabulary import IdRange, Vocabulary


class UnifiedModel(nn.Module):
    """One decoder over every modality of a vocabulary.

    Attributes:
        router_loads: of each block's router, how many rows its experts got in the `forward` calls since this was last
            set to None; None before the first, and without routers.

    Raises:
        ConfigError: a modality of the vocabulary has no objective, or an objective no modality; one that is for vectors
            where the modality has codes, or the other way round; one with blocks is for spans of one length, or with
            subsets one that fills in place for spans that end themselves.
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
            channels = vocabulary.channels_of(name)
            if objective.continuous != (channels is not None):
                made = "codes" if channels is None else f"vectors of {channels} numbers"
                raise ConfigError(
                    f"model.objectives.{name} is {objective.kind}, but its tokenizer makes {made}: choose an objective "
                    "for these, or another tokenizer"
                )
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
        if config.decoder.timestep == "adaln" and not any(o.continuous for o in config.objectives.values()):
            raise ConfigError(
                "model.decoder.timestep is adaln, but no modality is made of vectors, which alone have times: leave it "
                "out"
            )
        self.config, self.vocabulary = config, vocabulary
        self.interface = DiscreteInterface(vocabulary.size, config.decoder.dim)
        self.continuous = nn.ModuleDict()
        for name in vocabulary.names:
            if (key := self._representation(name)) is not None and key not in self.continuous:
                channels = vocabulary.channels_of(name)
                assert channels is not None
                n_outputs = config.objectives[name].n_outputs(channels)
                self.continuous[key] = ContinuousInterface(channels, n_outputs, config.decoder.dim)
        sizes = {vocabulary.place_of(name): size for name, size in config.position_embeddings.items()}
        self.position_embedding = PositionEmbedding(sizes, config.decoder.dim) if sizes else None
        n_experts = len(vocabulary.names) if config.decoder.experts == "modality" else None
        self.decoder = Decoder(config.decoder, n_experts)
        self.router_loads: Int[Tensor, "blocks E"] | None = None
        initialise(self, config.decoder)

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of each loss term, in the order in which `forward` returns them."""
        objectives, experts = self.config.objectives, self.config.decoder.experts
        weights = {modality: objectives[modality].weight for modality in self.vocabulary.names}
        weights[NEXT_SPAN] = self.config.next_span_weight
        if isinstance(experts, TopK):
            weights |= {ROUTER_BALANCE: experts.balance_weight, ROUTER_Z: experts.z_weight}
        return {term: weight for term, weight in weights.items() if weight}

    def forward(self, batch: CorruptedBatch) -> dict[str, Float[Tensor, ""]]:
        """Return the loss SUM of every modality, in the vocabulary's order, then those of `NEXT_SPAN`, `ROUTER_BALANCE`
        and `ROUTER_Z` that have a weight; the counts are `batch.counts`."""
        rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
        tally = RoutingTally(batch.routed) if isinstance(self.config.decoder.experts, TopK) else None
        hidden = self.hidden(*rows, batch.pattern, vectors=batch.vectors, tally=tally).flatten(0, 1)
        losses = {}
        if tally is not None:
            losses = {ROUTER_BALANCE: tally.balance, ROUTER_Z: tally.z}
            loads = torch.stack(tally.loads)
            self.router_loads = loads if self.router_loads is None else self.router_loads + loads
        for term in self.term_weights:
            if term in losses:
                continue
            asked = batch.predictions[term]
            # Which span follows is one more next-token prediction, over its own few ids.
            objective = NextToken() if term == NEXT_SPAN else self.config.objectives[term]
            outputs = self.outputs(hidden[asked.rows], term)
            losses[term] = objective.loss(outputs, asked.labels, asked.weights, self.config.z_loss)
        return {term: losses[term] for term in self.term_weights}

    def outputs(self, hidden: Float[Tensor, "*M D"], term: str) -> Float[Tensor, "*M W"]:
        """Return what a loss term, or the objective of a modality, reads of some hidden states: logits over its ids, or
        its numbers for each vector."""
        if term != NEXT_SPAN and (key := self._representation(term)) is not None:
            interface = self.continuous[key]
            assert isinstance(interface, ContinuousInterface)
            return interface.outputs(hidden)
        return self.logits(hidden, self.target_range(term))

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
        vectors: Mapping[str, ContinuousRows] | None = None,
        tally: RoutingTally | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the hidden states of N rows.

        Args:
            modality_ids: place in the vocabulary of each row's modality; that of a masked row no id tells.
            span_positions: of each row in its span: 0 for the begin marker, then 1, 2, ...
            pattern: of the N rows; with a cache, of the cached rows followed by the N rows.
            vectors: by modality, the rows, flat in (B * N), that hold vectors in place of their ids.
            tally: is told what routers choose; only where there are routers.
        """
        if cache is None:
            mask = pattern.render(preferred_form(token_ids.device))
        else:
            mask = pattern.render(MaskForm.DENSE, n_queries=token_ids.shape[1])
        embeddings = self.interface.embed(token_ids)
        embeddings, conditions = self._read_vectors(embeddings, vectors or {})
        if self.position_embedding is not None:
            embeddings = embeddings + self.position_embedding(modality_ids, span_positions)
        return self.decoder(embeddings, position_ids, mask, cache, modality_ids, tally, conditions)

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

    def balance_routers(self, loads: Int[Tensor, "blocks E"]) -> None:
        """Tell every block's router how many rows its experts got in the step that was made, over all ranks."""
        for block, load in zip(self.decoder.blocks, loads, strict=True):
            assert isinstance(block.feed_forward, TopKExperts)
            block.feed_forward.balance(load)

    def _read_vectors(
        self, embeddings: Float[Tensor, "B N D"], vectors: Mapping[str, ContinuousRows]
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"] | None]:
        """Put vectors in place of the embeddings of their rows, and return what modulates each row too, if anything
        does."""
        conditions = torch.zeros_like(embeddings) if self.config.decoder.timestep == "adaln" else None
        for name in self.vocabulary.names:
            if (key := self._representation(name)) is None:
                continue
            held, interface = vectors.get(name), self.continuous[key]
            assert isinstance(interface, ContinuousInterface)
            if held is None or not len(held):
                if torch.is_inference_mode_enabled():
                    continue
                # Under ZeRO-3 all ranks gather its weights together; what this gives adds exactly 0.
                nothing = torch.zeros(1, interface.channels + 1, device=embeddings.device)
                value, time = interface.embed(nothing[:, 1:], nothing[:, 0])
            else:
                value, time = interface.embed(held.values, held.times)
            embeddings = _placed(embeddings, value if conditions is not None else value + time, held)
            if conditions is not None:
                conditions = _placed(conditions, time, held)
        return embeddings, conditions

    def _representation(self, modality: str) -> str | None:
        """Return the name of the interface of a continuous modality; None for one of codes."""
        channels = self.vocabulary.channels_of(modality)
        if channels is None:
            return None
        objective = self.config.objectives[modality]
        return f"{objective.kind}_{channels}_to_{objective.n_outputs(channels)}"


def _placed(
    rows: Float[Tensor, "B N D"], found: Float[Tensor, "M D"], vectors: ContinuousRows | None
) -> Float[Tensor, "B N D"]:
    """Put what was found of vectors in the place of their rows; without any, what a dummy gave adds exactly 0."""
    found = found.to(rows.dtype)
    if vectors is None or not len(vectors):
        return rows + found[0].masked_fill(torch.ones_like(found[0], dtype=torch.bool), 0.0)
    return rows.flatten(0, 1).index_copy(0, vectors.rows, found).view_as(rows)
