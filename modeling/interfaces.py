"""How a representation enters and leaves the decoder. One interface per representation, never one per modality."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from omniform.tokenizers.vocabulary import IdRange


class DiscreteHead(nn.Module):
    """Logits over one range of ids: only the rows of the weight that a span can produce are multiplied."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, hidden: Float[Tensor, "*M D"], ids: IdRange) -> Float[Tensor, "*M W"]:
        return F.linear(hidden, self.weight[ids.start : ids.stop])


class DiscreteInterface(nn.Module):
    """Embedding and head of all discrete modalities, over the one id space of the vocabulary."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.head = DiscreteHead(vocab_size, dim)

    def embed(self, token_ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """Return the rows that the decoder reads."""
        return self.embedding(token_ids)

    def logits(self, hidden: Float[Tensor, "*M D"], ids: IdRange) -> Float[Tensor, "*M W"]:
        """Return the logits of the ids in the range."""
        return self.head(hidden, ids)


class PositionEmbedding(nn.Module):
    """A learnt vector for each place of a span, of the modalities that have one; zero for rows of all others.

    Rotary positions tell rows how they lie to each other. Masked rows, whose ids are all the same, and codes that mean
    one thing at one place of a grid and another at the next, also need to know where they are: MaskGIT
    (arXiv:2202.04200) learns such vectors, and here they stand beside rotary positions.

    Args:
        sizes: by place of a modality in the vocabulary, the most contents of its spans.
    """

    def __init__(self, sizes: Mapping[int, int], dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({str(modality): nn.Embedding(1 + size, dim) for modality, size in sizes.items()})

    def forward(self, modality_ids: Int[Tensor, "B N"], span_positions: Int[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """Return the vector of each row.

        Args:
            span_positions: 0 for the begin marker, then 1, 2, ...

        Raises:
            IndexError: a span is longer than its modality's table (on a CPU; an assertion of the device elsewhere).
        """
        found = []
        for modality, table in self.tables.items():
            own = modality_ids == int(modality)
            found.append(table(span_positions.masked_fill(~own, 0)) * own[..., None])
        return torch.stack(found).sum(dim=0)
