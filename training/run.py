"""Training of the unified model, from a YAML file to a model folder."""

import difflib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import nn

from omniform.data.loader import TrainingData
from omniform.data.mixture import SourceConfig
from omniform.data.token_source import count_samples
from omniform.errors import OmniformError
from omniform.modeling.config import parse_config
from omniform.modeling.folder import LoadedModel, build_vocabulary, check_position_embeddings
from omniform.modeling.generation_config import GenerationConfig
from omniform.modeling.model import UnifiedModel
from omniform.tokenizers.base import Modality
from omniform.tokenizers.registry import load_modality
from omniform.training.config import TrainConfig
from omniform.training.forecast import describe_stages, forecast
from omniform.training.loop import fit
from omniform.training.model_task import ModelTask
from omniform.training.run_folder import is_first_process, open_run_folder

_CONFIGS = Path(__file__).parents[1] / "configs"
ModelPreview = Callable[[LoadedModel, Path], None]


def train(
    config_path: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    *,
    dry_run: bool = False,
    fresh: bool = False,
    preview: ModelPreview | None = None,
) -> Path:
    """Train the model that a YAML file describes, or go on with it, and return its folder, `out`/model.

    Args:
        overrides: dotted key=value.
        out: run folder; runs/NAME unless given.
        dry_run: only print what the run will take; nothing is written, and the folder returned need not exist.
        fresh: delete what an earlier run left in `out` first.
        preview: writes samples of a model into a folder, `out`/samples/step-N, every `log.samples_every` steps.

    Raises:
        OmniformError: the configuration, a tokenizer, the data or the run folder cannot be used.
        SystemExit: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    config = parse_config(TrainConfig, _read(config_path), overrides, source=str(config_path))
    out = out or Path("runs") / config.name
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.accumulation(world_size)
    tokenizers = {name: _load_tokenizer(name, folder) for name, folder in config.tokenizers.items()}
    vocabulary = build_vocabulary(tokenizers, config.model.modes)
    check_position_embeddings(config.model, tokenizers)
    n_samples = _count_samples(config)
    if dry_run:
        with torch.device("meta"):
            model = UnifiedModel(config.model, vocabulary)
        config.check_loss_terms(model.term_weights)
        figures = forecast(model, config, world_size, free_disk=_free_disk(out))
        if is_first_process():
            print(figures.text(n_samples))
        return out / "model"

    torch.manual_seed(config.seed)
    model = UnifiedModel(config.model, vocabulary)
    config.check_loss_terms(model.term_weights)
    open_run_folder(out, config, fresh=fresh)
    data = TrainingData(
        config.data,
        tokenizers,
        vocabulary,
        config.model.objectives,
        seed=config.seed,
        cache_dir=config.cache_dir or out / "tokens",
        encoding_workers=config.encoding_workers,
        rows_per_step=config.rows_per_step,
        stages=config.data_stages,
        denoisers=config.model.denoisers,
        prefix=config.model.given == "bidirectional",
        subsets=config.model.subsets,
    )
    generation = GenerationConfig(
        max_sequence_length=config.data.row_length, modalities=config.generation, through=config.through
    )
    task = ModelTask(
        model,
        data,
        tokenizers,
        micro_batch_rows=config.engine.micro_batch_rows,
        generation_config=TypeAdapter(GenerationConfig).dump_python(generation, mode="json"),
        card=model_card(config, model),
    )
    for source, holes in data.holes.items():
        if holes and is_first_process():
            print(f"{len(holes)} samples of {source} leave holes and are not learnt: {holes}", flush=True)
    for task_of_source, n in data.unserved.items():
        if n and is_first_process():
            print(f"{n} samples of {task_of_source} lack a span that it needs; each leaves a hole", flush=True)

    def sample(module: nn.Module, step: int) -> None:
        assert preview is not None
        assert isinstance(module, UnifiedModel)
        preview(LoadedModel(module, tokenizers, task.generation_config), out / "samples" / f"step-{step}")

    return fit(task, config, out, preview=sample if preview else None)


def model_card(config: TrainConfig, model: UnifiedModel) -> str:
    """Return README.md of the model folder."""
    n_parameters = sum(p.numel() for p in model.parameters())
    modalities = ", ".join(model.vocabulary.names)
    sources = [f"- {_describe(source)}: {', '.join(source.tasks)}" for source in config.data.sources]
    decoder = config.model.decoder
    objectives = ", ".join(f"{name}: {o.kind}" for name, o in config.model.objectives.items())
    return "\n".join(
        [
            f"# {config.name}",
            "",
            f"A unified multimodal model ({modalities}) trained with Omniform. Load it with",
            '`omniform.load("THIS FOLDER")`, or try `omniform generate THIS_FOLDER "a prompt" --to image`.',
            "",
            f"- {n_parameters:,} parameters: {decoder.n_layers} layers of dimension {decoder.dim}",
            f"- objectives: {objectives}",
            f"- {config.steps:,} steps of {config.rows_per_step} rows of {config.data.row_length} tokens, "
            f"seed {config.seed}",
            *(f"- stage {line}" for line in describe_stages(config)),
            "",
            "Data:",
            *sources,
            "",
            "It knows what this data shows and nothing else; its output carries that data's biases and licences.",
            "",
        ]
    )


def _count_samples(config: TrainConfig) -> int:
    """Return how many samples the sources hold; folders that are joined have to be readable too."""
    n_samples = 0
    for source in config.data.sources:
        n_samples += count_samples(source.path, source.index_dir)
        for other in source.join:
            count_samples(other.path, other.index_dir)
    return n_samples


def _describe(source: SourceConfig) -> str:
    joined = (f"{' and '.join(other.modalities)} of `{other.path}`" for other in source.join)
    return ", with ".join([f"`{source.path}`", *joined])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OmniformError(f"{path} cannot be read as a YAML file: {error}; expected a training config") from error


def _load_tokenizer(name: str, folder: Path) -> Modality:
    if not folder.exists():
        raise OmniformError(f"tokenizers.{name} is {folder}, which does not exist: {_instead(name, folder)}")
    tokenizer = load_modality(folder)
    if tokenizer.name != name:
        raise OmniformError(
            f"tokenizers.{name} is {folder}, which holds a tokenizer for {tokenizer.name}: expected one for {name}"
        )
    return tokenizer


def _instead(name: str, folder: Path) -> str:
    """Return what to do where a tokenizer's folder does not exist: give one of nearly that name, or make it."""
    missing = next(path for path in (*reversed(folder.parents), folder) if not path.exists())
    beside = [path.name for path in missing.parent.glob("*") if path.is_dir()]
    if close := difflib.get_close_matches(missing.name, beside, n=1):
        found = missing.with_name(close[0])
        inner = found / folder.relative_to(missing)
        return f"did you mean {inner if inner.exists() else found}?"
    run = folder.parent if folder.name == "tokenizer" else folder
    shipped = f"tokenizers/digits-{name}"
    config = shipped if (_CONFIGS / f"{shipped}.yaml").exists() else "CONFIG"
    return (
        f"give one that does, such as runs/demo/tokenizers/{name} of `omniform demo`, or make it first, with "
        f"`omniform tokenizer train {config} --out {run}`"
    )


def _free_disk(out: Path) -> int:
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
