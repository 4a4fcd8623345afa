"""How a representation enters and leaves the decoder. One interface per representation, never one per modality."""

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
