"""`omniform tokenizer train`: codecs by the training loop, the others in one go."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from torch import nn

from omniform.data.schema import SampleError
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.errors import OmniformError
from omniform.modeling.config import ConfigError, dump_config, parse_config
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.training.codec_task import CodecTask
from omniform.training.loop import fit
from omniform.training.run_folder import CONFIG_FILE, lock_folder, open_run_folder
from omniform.training.speech_task import SpeechTask
from omniform.training.tokenizer_config import (
    CodecTrainConfig,
    ImageLatentsTrainConfig,
    ImagePatchesTrainConfig,
    ImageTokenizerTrainConfig,
    LocationTokenizerTrainConfig,
    SpeechTokenizerTrainConfig,
    TextTokenizerTrainConfig,
    UntrainedTokenizerConfig,
    VideoTokenizerTrainConfig,
)

RESULT = "tokenizer"

# A new codec is an entry: its configuration, and the task that shows it its items.
_CODECS: dict[str, tuple[type[CodecTrainConfig], type[CodecTask]]] = {
    "conv_vq": (ImageTokenizerTrainConfig, CodecTask),
    "conv_kl": (ImageLatentsTrainConfig, CodecTask),
    "speech_codec": (SpeechTokenizerTrainConfig, SpeechTask),
    "causal_video_vq": (VideoTokenizerTrainConfig, CodecTask),
}
TokenizerTrainConfig = CodecTrainConfig | TextTokenizerTrainConfig | UntrainedTokenizerConfig
_CONFIGS: dict[str, type[TokenizerTrainConfig]] = {
    "sentencepiece": TextTokenizerTrainConfig,
    "patches": ImagePatchesTrainConfig,
    "locations": LocationTokenizerTrainConfig,
    **{kind: config for kind, (config, _) in _CODECS.items()},
}


def train_tokenizer(
    config_path: Path, overrides: Sequence[str] = (), out: Path | None = None, *, fresh: bool = False
) -> Path:
    """Train the tokenizer that a YAML file describes, or go on with it, and return its folder, `out`/tokenizer.

    Args:
        overrides: dotted key=value.
        out: run folder; runs/NAME unless given.
        fresh: delete what an earlier run left in `out` first.

    Raises:
        OmniformError: the configuration, the data or the run folder cannot be used.
    """
    config = load_config(config_path, overrides)
    out = out or Path("runs") / config.name
    if not isinstance(config, CodecTrainConfig):
        return _make_at_once(config, out, fresh=fresh)
    task = _CODECS[config.kind][1](config)
    config.accumulation(int(os.environ.get("WORLD_SIZE", "1")))  # both fail here rather than with the folder made
    config.check_loss_terms(task.term_weights)
    open_run_folder(out, config, fresh=fresh, result=RESULT)
    for folder, unreadable in task.unreadable:
        print(f"{task.tokenizer.name} items of {folder} that cannot be read are left out: {unreadable}", flush=True)

    def preview(module: nn.Module, step: int) -> None:
        task.write_samples(out / "samples" / f"step-{step}", module)

    return fit(task, config, out, result=RESULT, preview=preview)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TokenizerTrainConfig:
    """Read a YAML file of any kind, with dotted key=value overrides.

    Raises:
        ConfigError: it cannot be read, or is not such a configuration.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    kind = content.get("kind") if isinstance(content, Mapping) else None
    if kind not in _CONFIGS:
        raise ConfigError(
            f"{path}: kind is {kind!r}, expected a mapping whose kind is one of {', '.join(sorted(_CONFIGS))}"
        )
    return parse_config(_CONFIGS[kind], text, overrides, source=str(path))


def _make_at_once(config: TextTokenizerTrainConfig | UntrainedTokenizerConfig, out: Path, *, fresh: bool) -> Path:
    """Make a tokenizer in seconds, with the same bits each time; a run that was stopped starts again."""
    lock_folder(out)
    record, text = out / CONFIG_FILE, dump_config(config)
    if record.exists() and not fresh:
        stored = record.read_text(encoding="utf-8")
        if stored != text:
            changes = difflib.unified_diff(stored.splitlines(), text.splitlines(), str(record), "given", "", "", 0, "")
            raise OmniformError(
                f"{out} holds a tokenizer of another configuration:\n" + "\n".join(changes) + "\n"
                "Choose another --out, or replace that tokenizer with --fresh"
            )
    tokenizer = _learn_text(config) if isinstance(config, TextTokenizerTrainConfig) else config.build()
    record.write_text(text, encoding="utf-8")
    tokenizer.save(out / RESULT)
    return out / RESULT


def _learn_text(config: TextTokenizerTrainConfig) -> SentencePieceTokenizer:
    texts, unreadable = _read_texts(config)
    if unreadable:
        print(f"samples that cannot be read are left out: {unreadable}", flush=True)
    return SentencePieceTokenizer.train(texts, vocab_size=config.vocab_size, algorithm=config.algorithm)


def _read_texts(config: TextTokenizerTrainConfig) -> tuple[list[str], Tally]:
    """Return the texts, and which samples could not be read."""
    texts: list[str] = []
    unreadable = Tally()
    for folder, index_dir in zip(config.data, config.index_dirs or [None] * len(config.data), strict=True):
        reader = ShardReader(folder, index_dir)
        for place in range(len(reader)):
            try:
                texts += [span.text for span in reader[place].spans if span.text is not None]
            except SampleError as error:
                unreadable.add(error.reason, reader.describe(place))
    if "python-topics" in config.corpora:
        from pydoc_data.topics import topics

        texts += topics.values()
    return texts, unreadable
