"""The unified model: interfaces around the decoder, and the losses of a corrupted batch."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.kernels.attention import MaskForm, preferred_form
from omniform.modeling.agreement import check_agreement
from omniform.modeling.attention_pattern import AttentionPattern
from omniform.modeling.codebooks import NOTHING, CodedRows
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
        ConfigError: see `check_agreement`.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        check_agreement(config, vocabulary)
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
        hidden = self.hidden(*rows, batch.pattern, vectors=batch.vectors, coded=batch.coded, tally=tally).flatten(0, 1)
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
            outputs = self.outputs(hidden[asked.rows], term, asked.codebooks)
            losses[term] = objective.loss(outputs, asked.labels, asked.weights, self.config.z_loss)
        return {term: losses[term] for term in self.term_weights}

    def outputs(
        self, hidden: Float[Tensor, "M D"], term: str, codebooks: Int[Tensor, "M"] | None = None
    ) -> Float[Tensor, "M W"]:
        """Return what a loss term, or the objective of a modality, reads of some hidden states: logits over its ids, or
        its numbers for each vector.

        Args:
            codebooks: of what each predicts, where there are several: logits are over the codes of that one, then the
                end, which only the first has; see `Vocabulary.to_choices`.
        """
        if term != NEXT_SPAN and (key := self._representation(term)) is not None:
            interface = self.continuous[key]
            assert isinstance(interface, ContinuousInterface)
            return interface.outputs(hidden)
        if codebooks is not None:
            return self._codebook_logits(hidden, term, codebooks)
        return self.logits(hidden, self.target_range(term))

    def _codebook_logits(
        self, hidden: Float[Tensor, "M D"], modality: str, codebooks: Int[Tensor, "M"]
    ) -> Float[Tensor, "M W"]:
        """Return logits over what each codebook offers. The head runs once for each, whatever is asked: under ZeRO-3
        all ranks gather its weights together."""
        order = codebooks.argsort(stable=True)
        groups = hidden[order].split(codebooks.bincount(minlength=self.vocabulary.n_codebooks(modality)).tolist())
        ranges = [self.vocabulary.codebook_range(modality, codebook) for codebook in range(len(groups))]
        codes = torch.cat([self.logits(group, ids) for group, ids in zip(groups, ranges, strict=True)])
        end_id = self.vocabulary.end_of(modality)
        assert end_id is not None, "refused by check_agreement"
        end = self.logits(hidden[order], IdRange(end_id, end_id + 1))
        # Finite, so that guidance may subtract it from itself.
        end = end.masked_fill(codebooks[order, None] > 0, torch.finfo(end.dtype).min)
        return torch.cat([codes, end], dim=-1)[order.argsort()]

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
        coded: Mapping[str, CodedRows] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the hidden states of N rows.

        Args:
            modality_ids: place in the vocabulary of each row's modality; that of a masked row no id tells.
            span_positions: of each row in its span: 0 for the begin marker, then 1, 2, ...
            pattern: of the N rows; with a cache, of the cached rows followed by the N rows.
            vectors: by modality, the rows, flat in (B * N), that hold vectors in place of their ids.
            tally: is told what routers choose; only where there are routers.
            coded: by modality, the rows, flat in (B * N), that hold several ids in place of their one.
        """
        if cache is None:
            mask = pattern.render(preferred_form(token_ids.device))
        else:
            mask = pattern.render(MaskForm.DENSE, n_queries=token_ids.shape[1])
        embeddings = self._embed(token_ids, list((coded or {}).values()))
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

    def _embed(self, token_ids: Int[Tensor, "B N"], coded: Sequence[CodedRows]) -> Float[Tensor, "B N D"]:
        """Return the embedding of each row: that of its id, or the sum of those that it holds."""
        if not coded:
            return self.interface.embed(token_ids)
        # One look-up for all, as of batches without such rows: under ZeRO-3 all ranks gather the table together.
        ids = [token_ids.flatten(), *(held.ids.flatten().clamp(min=0) for held in coded)]
        rows, *of_ids = self.interface.embed(torch.cat(ids)).split([len(one) for one in ids])
        for held, found in zip(coded, of_ids, strict=True):
            there = (held.ids != NOTHING)[..., None]
            rows = rows.index_copy(0, held.rows, (found.unflatten(0, held.ids.shape) * there).sum(1))
        return rows.view(*token_ids.shape, -1)

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
