"""Settings of a training run: what every task shares, and what training the model adds."""

import bisect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from omniform.data.mixture import (
    INTERLEAVED,
    DataConfig,
    DataStage,
    SourceChange,
    denoised,
    modalities_of,
    subset_of,
    subset_problem,
)
from omniform.errors import OmniformError
from omniform.modeling.config import STRICT, ModelConfig
from omniform.modeling.generation_config import SamplingSettings, Ways

# A run's name is a folder's: not hidden, and never ".." or a path.
NAME = r"^\w[\w.-]*$"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """The learning rate over a number of steps.

    Attributes:
        lr: peak learning rate.
        schedule: "cosine" (arXiv:1608.03983, one period), "constant", or "wsd": constant, then a linear decay
            (arXiv:2404.06395).
        warmup_steps: steps of linear rise from 0 to `lr`.
        decay_fraction: last fraction of the steps in which "wsd" decays.
        final_lr_fraction: fraction of `lr` at which "cosine" and "wsd" end.
    """

    lr: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig(ScheduleConfig):
    """AdamW (arXiv:1711.05101), its learning rate over all steps, and the average of the weights.

    Attributes:
        kind: "adamw", or "muon": the weights of linear layers follow Muon (see `AveragingMuon`), all others AdamW.
        momentum: of Muon.
        weight_decay: applied to parameters of two or more axes only.
        clip_grad_norm: L2 norm over all parameters to which gradients are clipped; null clips nothing.
        ema_decay: decay per step of the exponential moving average of the weights, which starts as a copy of them,
            so it needs no bias correction; null keeps none.
        skip_limit: steps in a row with a gradient that is not finite after which training stops.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=0.999, ge=0, lt=1)
    skip_limit: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _check_betas(self) -> "OptimConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected two numbers in [0, 1)")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """How a step is carried out; apart from `precision`, it may change when a run is resumed.

    Attributes:
        zero_stage: what DeepSpeed ZeRO (arXiv:1910.02054) shards over ranks: 0 nothing, 1 optimizer state,
            2 gradients too, 3 weights too.
        precision: "fp32"; "bf16_autocast": fp32 weights, bf16 matrix products; "bf16": bf16 weights with an fp32
            master copy; "auto": bf16_autocast where the hardware multiplies bf16, else fp32.
        micro_batch_rows: most rows of one forward pass of one rank.
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "fp32", "bf16_autocast", "bf16"] = "auto"
    micro_batch_rows: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check_stage(self) -> "EngineConfig":
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision is bf16 at zero_stage 0, which keeps no fp32 master weights and does not converge as fp32 "
                "does: choose precision bf16_autocast, or zero_stage 1, 2 or 3"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written, in steps, and how many of the newest are kept."""

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """What is written, and how often, in steps.

    Attributes:
        samples_every: 0 writes no samples.
        gradient_norms: with metrics also the norm of each loss term's own gradient, at the last of their steps; such a
            step takes one more backward pass, and room for one more gradient in fp32, for each term. Not with ZeRO-3,
            where no rank holds whole gradients.
    """

    every: int = Field(default=10, ge=1)
    samples_every: int = Field(default=0, ge=0)
    gradient_norms: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageConfig:
    """A part of a run: which steps, and what is different in them. Weights, optimizer and average go on through all.

    Attributes:
        name: shown in the log.
        steps: how many; the last stage may leave it out and takes those that remain.
        learning_rate: a schedule of the stage's own, over its steps; without one it follows that of `optim`, which
            runs over all steps.
        loss_weights: by loss term, in place of its weight in the model's objectives.
    """

    name: str = Field(pattern=NAME)
    steps: int | None = Field(default=None, ge=1)
    learning_rate: ScheduleConfig | None = None
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FitConfig:
    """What the training loop needs to know of any run; the configuration of each task extends it.

    Attributes:
        name: of the run; its folder is runs/NAME unless given.
        seed: of the initial weights and of everything random.
        steps: optimizer steps of the whole run.
        rows_per_step: rows of one optimizer step over all ranks and micro-batches.
        stages: parts of the run, in order; every step belongs to one. None unless given.
    """

    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    rows_per_step: int = Field(default=8, ge=1)
    stages: tuple[StageConfig, ...] = ()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check_steps(self) -> "FitConfig":
        if self.log.gradient_norms and self.engine.zero_stage == 3:
            raise ValueError(
                "log.gradient_norms is true at engine.zero_stage 3, where no rank holds whole gradients: choose a "
                "lower stage, or log.gradient_norms false"
            )
        if self.optim.kind == "muon" and self.engine.zero_stage:
            raise ValueError(
                f"optim.kind is muon at engine.zero_stage {self.engine.zero_stage}, where no rank holds whole "
                "matrices: choose engine.zero_stage 0, or optim.kind adamw"
            )
        names = [stage.name for stage in self.stages]
        for place, stage in enumerate(self.stages):
            if stage.name in names[:place]:
                raise ValueError(f"stages.{place}.name is {stage.name!r}, as of a stage before it: choose another")
            if stage.steps is None and place < len(self.stages) - 1:
                raise ValueError(f"stages.{place}.steps: required, but not given; only the last stage may leave it out")
        taken = sum(stage.steps or 0 for stage in self.stages)
        # Both at once: a short run of a long recipe meets both.
        wrong = _warmup_problems("optim", self.optim, "steps", self.steps)
        if self.stages and self.stages[-1].steps is None and taken >= self.steps:
            share = self.steps // len(names)
            shares = " ".join(f"stages.{place}.steps={share}" for place in range(len(names) - 1))
            wrong.append(
                f"stages.{len(names) - 1}.steps: no steps are left for {names[-1]}; the stages before it take {taken} "
                f"of steps = {self.steps}: raise steps, or lower theirs" + (f", such as {shares}" if share else "")
            )
        elif self.stages and self.stages[-1].steps is not None and taken != self.steps:
            wrong.append(
                f"stages take {taken} steps in all, expected steps = {self.steps}: change one of them, or leave out "
                f"stages.{len(names) - 1}.steps"
            )
        else:
            for place, stage in enumerate(self.stages):
                if stage.learning_rate is None:
                    continue
                where = f"stages.{place}.learning_rate"
                wrong += _warmup_problems(where, stage.learning_rate, "the stage's steps", self.stage_steps(place))
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def stage_starts(self) -> tuple[int, ...]:
        """Return the first step of each stage."""
        return tuple(itertools.accumulate((stage.steps or 0 for stage in self.stages[:-1]), initial=0))[
            : len(self.stages)
        ]

    def stage_steps(self, place: int) -> int:
        """Return the number of steps of a stage."""
        return (*self.stage_starts, self.steps)[place + 1] - self.stage_starts[place]

    def stage_at(self, step: int) -> int | None:
        """Return the place of the stage that `step` belongs to; None in a run without stages."""
        return bisect.bisect_right(self.stage_starts, step) - 1 if self.stages else None

    def check_loss_terms(self, terms: Mapping[str, float]) -> None:
        """Check that what is trained has every loss term that a stage weighs, and that each stage weighs one.

        Args:
            terms: their weights where a stage says nothing of them.

        Raises:
            OmniformError: it has not, or a stage learns nothing.
        """
        for place, stage in enumerate(self.stages):
            for term in stage.loss_weights:
                if term not in terms:
                    raise OmniformError(
                        f"stages.{place}.loss_weights.{term}: no such loss term; there are {', '.join(terms)}"
                    )
            if not any({**terms, **stage.loss_weights}.values()):
                raise OmniformError(
                    f"stages.{place}.loss_weights: every loss has the weight 0, so that nothing is learnt: raise one"
                )

    def accumulation(self, world_size: int) -> int:
        """Return the number of micro-batches of each rank in a step.

        Raises:
            OmniformError: the rows of a step do not divide evenly.
        """
        if self.rows_per_step % world_size:
            raise OmniformError(
                f"rows_per_step is {self.rows_per_step}, expected a multiple of the number of processes, {world_size}: "
                "change one of them"
            )
        return -(-self.rows_per_step // (world_size * self.engine.micro_batch_rows))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelStageConfig(StageConfig):
    """A part of the training of the model.

    Attributes:
        mixture: what changes of the data, by the name of a source in `data.sources`; other sources stay as they are
            there.
    """

    mixture: dict[str, SourceChange] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig(FitConfig):
    """Training of the unified model; a row holds `data.row_length` tokens.

    Attributes:
        tokenizers: folder of the trained tokenizer of each modality, text among them.
        generation: default sampling settings by modality, stored with the model.
        through: by modality of the prompt and of the reply, what is generated between the two; see `GenerationConfig`.
        cache_dir: where the tokens of the data are kept; "tokens" in the run folder unless given.
        encoding_workers: processes that encode at the same time what the cache lacks, each on one thread; what they
            write does not depend on their number.
    """

    stages: tuple[ModelStageConfig, ...] = ()
    model: ModelConfig
    tokenizers: dict[str, Path]
    data: DataConfig
    generation: dict[str, SamplingSettings] = Field(default_factory=dict)
    through: Ways = Field(default_factory=dict)
    cache_dir: Path | None = None
    encoding_workers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check_mixtures(self) -> "TrainConfig":
        used = set() if self.stages else {number for number, source in enumerate(self.data.sources) if source.weight}
        for place, stage in enumerate(self.stages):
            try:
                data = self.data.changed(stage.mixture)
            except ValueError as error:
                raise ValueError(f"stages.{place}.mixture: {error}") from error
            used |= {number for number, source in enumerate(data.sources) if source.weight}
        for number, source in enumerate(self.data.sources):
            if number not in used:
                raise ValueError(
                    f"data.sources.{number}: {source.label} has the weight 0 in the whole run: raise it or remove the "
                    "source"
                )
        return self

    @property
    def _tasks_drawn(self) -> set[str]:
        stages = [self.data.changed(stage.mixture) for stage in self.stages] or [self.data]
        return {task for data in stages for source in data.sources if source.weight for task in source.tasks}

    @model_validator(mode="after")
    def _check_guidance(self) -> "TrainConfig":
        tasks, subsets = self._tasks_drawn, self.model.subsets
        for modality, settings in self.generation.items():
            if subsets:
                drawn = [subset for task in tasks if (subset := subset_of(task)) and modality in subset[0]]
                learnt = any(subsets[name].leaves_conditions_out(modality) for _, name in drawn if name in subsets)
                why = "no budget of model.subsets leaves all else out: let the input_budget of one begin at 0"
            else:
                # What an interleaved document begins with has no condition.
                learnt = self.data.condition_dropout > 0 or INTERLEAVED in tasks
                why = "data.condition_dropout is 0: raise it, such as data.condition_dropout=0.1"
            if settings.guidance_scale != 1 and not learnt:
                raise ValueError(
                    f"generation.{modality}.guidance_scale is {settings.guidance_scale}, which leads away from what is "
                    f"generated without a condition, but nothing is learnt without one, since {why}, or leave "
                    "guidance_scale out"
                )
        return self

    @model_validator(mode="after")
    def _check_through(self) -> "TrainConfig":
        learnt = self._tasks_drawn
        for given, routes in self.through.items():
            for wanted, between in routes.items():
                task = f"{given}->{between}+{wanted}"
                if task not in learnt:
                    raise ValueError(
                        f"through.{given}.{wanted} is {between}, but no source that is drawn has the task {task}: add "
                        "it to the tasks of one, or leave this out"
                    )
        return self

    @model_validator(mode="after")
    def _check_tasks(self) -> "TrainConfig":
        stages = {f"stages.{place}.mixture: ": stage.mixture for place, stage in enumerate(self.stages)}
        for where, mixture in {"": {}, **stages}.items():
            for number, source in enumerate(self.data.changed(mixture).sources):
                for task in source.tasks:
                    if problem := self._task_problem(task):
                        raise ValueError(f"{where}data.sources.{number} ({source.label}): the task {task} {problem}")
        return self

    @model_validator(mode="after")
    def _check_stage_losses(self) -> "TrainConfig":
        for place, stage in enumerate(self.stages):
            sources = [source for source in self.data.changed(stage.mixture).sources if source.weight]
            tasks = {task for source in sources for task in source.tasks}
            learnt = {name for task in tasks for name in modalities_of(task)[1]}
            # Interleaved documents learn what they hold, whatever that is.
            if INTERLEAVED not in tasks and all(stage.loss_weights.get(name) == 0 for name in learnt):
                raise ValueError(
                    f"stages.{place}.loss_weights: every loss of {', '.join(sorted(tasks))} has the weight 0, so that "
                    "nothing is learnt: raise one"
                )
        return self

    def _task_problem(self, task: str) -> str | None:
        cut, denoisers = denoised(task), self.model.denoisers
        if unknown := sorted({*itertools.chain(*modalities_of(task))} - set(self.model.objectives)):
            return f"is about {', '.join(unknown)}, but model.objectives is for {', '.join(self.model.objectives)}"
        if cut and cut[1] in self.model.subsets:
            return f"is about {cut[0]} alone: a task of model.subsets.{cut[1]} is about two or more, such as a+b~c"
        if cut and cut[1] not in denoisers:
            return f"needs model.denoisers.{cut[1]}; there is {', '.join(denoisers) or 'none'}: name one, or add it"
        if self.model.given == "bidirectional" and task == INTERLEAVED:
            return (
                "learns every part, so that none may see what follows it, but model.given is bidirectional: leave "
                "given out, or the task"
            )
        return subset_problem(task, self.model.subsets)

    @property
    def data_stages(self) -> tuple[DataStage, ...]:
        """Return from which step on which data is drawn; stages in a row that draw alike are one. Else empty."""
        found: list[DataStage] = []
        for stage, first_step in zip(self.stages, self.stage_starts, strict=True):
            data = self.data.changed(stage.mixture)
            if not found or data != found[-1].config:
                found.append(DataStage(first_step, data))
        return tuple(found)


def _warmup_problems(where: str, schedule: ScheduleConfig, what: str, steps: int) -> list[str]:
    if schedule.warmup_steps < steps:
        return []
    return [
        f"{where}.warmup_steps is {schedule.warmup_steps}, expected fewer than {what} = {steps}: "
        f"lower the one, such as {where}.warmup_steps={steps // 10}, or raise the other"
    ]
