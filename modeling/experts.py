"""Feed-forward layers of which each row goes through some: that of its modality, or the few that a router chooses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from omniform.modeling.config import DecoderConfig, TopK
from omniform.modeling.layers import FeedForward


@dataclass(frozen=True)
class Routes:
    """Which experts each row of a forward pass goes through.

    Attributes:
        order: rows, flat, those of the first expert first; each row once for every expert that it goes through.
        counts: number of rows of each expert.
        calls: number of rows with which each expert is called; while training a row of zeros stands in for none.
        sources: where each row's results lie among those of all calls.
    """

    order: Int[Tensor, "M"]
    counts: Sequence[int]
    calls: Sequence[int]
    sources: Int[Tensor, "M"]

    @classmethod
    def of(cls, expert_ids: Int[Tensor, "*M"], n_experts: int, per_row: int = 1) -> "Routes":
        """Sort the rows by the experts that they name.

        Args:
            expert_ids: `per_row` for each row, those of a row side by side.
        """
        flat_ids = expert_ids.flatten()
        counts = flat_ids.bincount(minlength=n_experts)
        # Under ZeRO-3 all ranks gather an expert's weights together, so one without rows for it calls it all the same.
        calls = counts if torch.is_inference_mode_enabled() else counts.clamp(min=1)
        order = flat_ids.argsort(stable=True)
        added = (calls - counts).cumsum(0)
        sources = torch.empty_like(order)
        sources[order] = torch.arange(len(order), device=order.device) + added[flat_ids[order]]
        return cls(order // per_row, counts.tolist(), calls.tolist(), sources)

    def through(self, experts: nn.ModuleList, rows: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
        """Return what the experts make of the rows, in the order of the ids that were given."""
        # Part of the graph, so that backward passes agree between ranks too; exactly 0 whatever the row holds.
        nothing = rows[:1].masked_fill(torch.ones_like(rows[:1], dtype=torch.bool), 0.0)
        results = [
            expert(own if len(own) else nothing)
            for expert, own, n in zip(experts, rows[self.order].split(self.counts), self.calls, strict=True)
            if n
        ]
        return torch.cat(results)[self.sources]


class ModalityExperts(nn.Module):
    """One feed-forward layer per modality, and each row through that of its own.

    Sources: the modality experts of VLMo (arXiv:2111.02358) and BAGEL (arXiv:2505.14683). Deviations: every layer has
    them, with none that VLMo's upper layers share between modalities; BAGEL has attention weights per expert too, here
    they are shared; so is the norm before the experts, whose scale each expert's own weights can undo.

    Attributes:
        n_active: experts that a row goes through.
    """

    def __init__(self, config: DecoderConfig, n_experts: int) -> None:
        super().__init__()
        self.n_active = 1
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(n_experts))

    def forward(self, x: Float[Tensor, "B L D"], routes: Routes) -> Float[Tensor, "B L D"]:
        return routes.through(self.experts, x.flatten(0, 1)).view_as(x)


class RoutingTally:
    """What the routers of one forward pass chose; made for the pass, and told by every router in turn.

    Args:
        counted: rows to count; False for padding.

    Attributes:
        loads: of each router, how many of the rows counted each of its experts got.
    """

    def __init__(self, counted: Bool[Tensor, "B L"]) -> None:
        self.counted = counted.flatten()
        self.loads: list[Tensor] = []
        self._balance: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, logits: Float[Tensor, "N E"], chosen: Int[Tensor, "N k"], load_before: Int[Tensor, "E"]) -> None:
        """Take in what one router chose for the N = B * L rows.

        Args:
            load_before: how many rows its experts got in the step before.
        """
        n_experts, logits = logits.shape[1], logits[self.counted]
        total = load_before.sum()
        shares = torch.where(total > 0, n_experts * load_before / total.clamp(min=1), 1.0)
        self.loads.append(chosen[self.counted].flatten().bincount(minlength=n_experts))
        self._balance.append((shares * logits.softmax(-1)).sum())
        self._squares.append(logits.logsumexp(-1).square().sum())

    @property
    def balance(self) -> Float[Tensor, ""]:
        """The SUM of the balance loss over the rows counted, see `TopKExperts`; the mean over routers."""
        return torch.stack(self._balance).mean()

    @property
    def z(self) -> Float[Tensor, ""]:
        """The SUM over the rows counted of log(Z)^2, Z the normaliser of a row's scores; the mean over routers."""
        return torch.stack(self._squares).mean()


class Router(nn.Module):
    """The logits by which a row chooses experts, in fp32 whatever surrounds it (arXiv:2101.03961, section 2.4)."""

    def __init__(self, dim: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))

    def forward(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.float(), self.weight.float())


class TopKExperts(nn.Module):
    """Each row through the k feed-forward layers to which its router gives the highest scores, weighed by them.

    The choice depends on the row alone and no row is dropped, so that it is causal, and the same with a cache, in a
    batch or alone. Scores are the softmax of the router's logits; weights are the scores of the chosen, made to sum to
    1 (Mixtral, arXiv:2401.04088), but for k = 1 the score itself (arXiv:2101.03961), or the router would learn nothing.

    The balance loss of a router is n * sum over experts of (fraction of the choices) * (mean score), 1 where experts
    share rows evenly (arXiv:2101.03961, equations 4 to 6; fractions of choices for k > 1 as in arXiv:2408.15664).
    Deviations: the fractions are those of the step before over all ranks, even ones in the first step, so that it is a
    sum over rows as every other loss is, and no division into micro-batches and ranks changes it
    (docs/decisions/0013-routed-experts.md); routers are averaged, where Switch adds them up.

    With a `bias_rate` u each expert has a bias that is added to its scores for the choice alone, and after each step
    moves by u up where the expert got fewer rows of that step than the mean, down where more (arXiv:2408.15664,
    algorithm 1). Deviations: scores are a softmax, where the paper's are mostly sigmoid; the weights sum to 1. The bias
    is kept as the whole number of its moves, which no precision rounds and all ranks know to the bit.

    Attributes:
        n_active: experts that a row goes through.
        load: how many rows each expert got in the step before, over all ranks.
        bias_steps: moves up less moves down of each expert's bias.
    """

    load: Int[Tensor, "E"]
    bias_steps: Int[Tensor, "E"]

    def __init__(self, config: DecoderConfig, choice: TopK) -> None:
        super().__init__()
        self.n_active, self.bias_rate = choice.k, choice.bias_rate
        self.router = Router(config.dim, choice.n)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(choice.n))
        self.register_buffer("load", torch.zeros(choice.n, dtype=torch.int64))
        self.register_buffer("bias_steps", torch.zeros(choice.n, dtype=torch.int64))

    def forward(self, x: Float[Tensor, "B L D"], tally: RoutingTally | None = None) -> Float[Tensor, "B L D"]:
        """Return the weighted sum of what the chosen experts make of each row.

        Args:
            tally: is told what was chosen.
        """
        rows = x.flatten(0, 1)
        logits = self.router(rows)
        scores = logits.softmax(-1)
        chosen = (scores + self.bias_rate * self.bias_steps).topk(self.n_active).indices
        # The softmax of the chosen logits is what makes the chosen scores sum to 1, also where these underflow.
        weights = logits.gather(1, chosen).softmax(-1) if self.n_active > 1 else scores.gather(1, chosen)
        if tally is not None:
            tally.add(logits, chosen, self.load)
        results = Routes.of(chosen, len(self.experts), self.n_active).through(self.experts, rows)
        weighed = results.unflatten(0, (-1, self.n_active)) * weights[..., None]
        return weighed.sum(1).to(results.dtype).view_as(x)

    def balance(self, load: Int[Tensor, "E"]) -> None:
        """Move the biases after a step in which the experts got these numbers of rows, and remember these."""
        self.load.copy_(load)
        if self.bias_rate:
            self.bias_steps += torch.sign(load.sum() - len(load) * load).to(self.bias_steps)
