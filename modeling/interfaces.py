"""How a representation enters and leaves the decoder. One interface per representation, never one per modality."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from omniform.tokenizers.vocabulary import IdRange

_N_SINUSOIDS = 256


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

    def embed(self, token_ids: Int[Tensor, "*N"]) -> Float[Tensor, "*N D"]:
        """Return the rows that the decoder reads."""
        return self.embedding(token_ids)

    def logits(self, hidden: Float[Tensor, "*M D"], ids: IdRange) -> Float[Tensor, "*M W"]:
        """Return the logits of the ids in the range."""
        return self.head(hidden, ids)


class ContinuousInterface(nn.Module):
    """Embedding and head of all continuous modalities whose tokens have as many numbers, and need as many to predict.

    A token enters through a linear layer, and its time, from 0 for data to 1 for noise, through sinusoids and two
    layers, as the timesteps of DiT (arXiv:2212.09748) do. Every row has a time of its own; whether it is added to the
    row or modulates the blocks, `DecoderConfig.timestep` says.

    Args:
        channels: numbers per token.
        n_outputs: numbers that the objective needs for each token.
    """

    def __init__(self, channels: int, n_outputs: int, dim: int) -> None:
        super().__init__()
        self.channels = channels
        self.inward = nn.Linear(channels, dim)
        self.time = nn.Sequential(nn.Linear(_N_SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.head = nn.Linear(dim, n_outputs)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(
        self, values: Float[Tensor, "M C"], times: Float[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        """Return vectors and times as the decoder reads them."""
        return self.inward(values), self.time(sinusoids(times))

    def outputs(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M W"]:
        """Return what the objective asks for."""
        return self.head(hidden)


def sinusoids(times: Float[Tensor, "M"]) -> Float[Tensor, "M S"]:
    """Return cosines and sines of 1000 * times at wavelengths from 2 pi to 2 pi * 10,000.

    Source: arXiv:1706.03762, section 3.5, at the timesteps of a diffusion of 1000 steps (arXiv:2006.11239).
    """
    half = _N_SINUSOIDS // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
    angles = 1000 * times[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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
