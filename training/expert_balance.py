"""After each step: routers are told how evenly they spread the rows of all ranks over their experts."""

from collections.abc import Callable

from torch import Tensor

from omniform.modeling.model import UnifiedModel


def balance_experts(
    model: UnifiedModel, sum_over_ranks: Callable[[Tensor], Tensor], *, skipped: bool
) -> dict[str, float]:
    """Tell the model's routers what its experts got in the step, over all ranks and micro-batches.

    Every rank must call it after each step, and the routers stay the same on all. Those of a skipped step are not told.

    Returns:
        For the log `router_violation`, by how much the fullest expert of any block was above the mean of its block, as
        a part of that mean: 0 at best, n / k - 1 at worst (MaxVio, arXiv:2408.15664). Without routers nothing, and then
        no message is sent.
    """
    if model.router_loads is None:
        return {}
    loads = sum_over_ranks(model.router_loads.double().cpu())
    model.router_loads = None
    if not skipped:
        model.balance_routers(loads.long())
    means = loads.mean(dim=1).clamp(min=1)
    return {"router_violation": float((loads.amax(dim=1) / means).max() - 1)}
