"""The unified model as a Task of the training loop."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from omniform.data.loader import TrainingData
from omniform.modeling.corruption import corrupt
from omniform.modeling.folder import save_model_folder
from omniform.modeling.model import UnifiedModel
from omniform.modeling.packed_batch import pack
from omniform.tokenizers.base import Modality
from omniform.training.expert_balance import balance_experts
from omniform.training.task import MicroBatch


class ModelTask:
    """Packs the rows of each step, corrupts them and hands them to the model.

    Args:
        model: the network, in fp32.
        data: every row of every step.
        tokenizers: by modality, stored with the trained model.
        micro_batch_rows: rows of one forward pass.
        generation_config: default sampling settings per modality, stored with the trained model.
        card: README.md of the model folder.
    """

    def __init__(
        self,
        model: UnifiedModel,
        data: TrainingData,
        tokenizers: Mapping[str, Modality],
        *,
        micro_batch_rows: int,
        generation_config: Mapping[str, Any],
        card: str,
    ) -> None:
        self.module: nn.Module = model
        self.model, self.data, self.tokenizers = model, data, tokenizers
        self.micro_batch_rows, self.generation_config, self.card = micro_batch_rows, generation_config, card
        self.term_weights = model.term_weights

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """Return this rank's rows of the step, every world_size-th, in forward passes of `micro_batch_rows`."""
        rows = self.data.rows(step, slice(rank, None, world_size))
        objectives, vocabulary = self.model.config.objectives, self.model.vocabulary
        batches = []
        for first in range(0, len(rows), self.micro_batch_rows):
            chunk = rows[first : first + self.micro_batch_rows]
            batch = corrupt(pack(chunk, self.data.config.row_length, vocabulary), vocabulary, objectives)
            n_tokens = sum(len(sequence) for row in chunk for sequence in row)
            batches.append(MicroBatch(batch, batch.counts, n_tokens))
        return batches

    def after_step(self, sum_over_ranks: Callable[[Tensor], Tensor], *, skipped: bool) -> dict[str, float]:
        """Even out what the experts of routers get."""
        return balance_experts(self.model, sum_over_ranks, skipped=skipped)

    def position(self, step: int) -> dict[str, Any]:
        """Return where the data stands before `step`."""
        return self.data.position(step)

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a stored position."""
        self.data.restore(position)

    def save(self, folder: Path, module: nn.Module) -> None:
        """Write the model folder."""
        save_model_folder(
            folder,
            self.model.config,
            module.state_dict(),
            self.tokenizers,
            generation_config=self.generation_config,
            card=self.card,
        )
