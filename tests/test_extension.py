"""What adding a modality and an objective costs: the two classes below and an entry each. No library file changes."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

import omniform
from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, SourceConfig
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.modeling.config import DecoderConfig, ModelConfig, parse_config
from omniform.modeling.folder import build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Corrupted, Draw, Objective, SpanState, TargetSpans
from omniform.modeling.objectives.registry import OBJECTIVES
from omniform.tokenizers.base import Discrete, Modality, TokenizerError, Tokens
from omniform.tokenizers.folder import read_tokenizer_folder, write_tokenizer_folder
from omniform.tokenizers.registry import MODALITIES
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.training.config import CheckpointConfig, EngineConfig, FitConfig, OptimConfig
from omniform.training.loop import fit
from omniform.training.model_task import ModelTask
from omniform.training.run_folder import open_run_folder

NOTES = "cdefga"


class Chime(Modality):
    """Three notes, written as letters."""

    kind: ClassVar[str] = "chime"
    name: ClassVar[str] = "chime"
    representation = Discrete(len(NOTES))
    fixed_grid = (3,)

    def encode_batch(self, items: Sequence[str]) -> list[Tokens]:
        return [Tokens(torch.tensor([NOTES.index(note) for note in item]), (3,)) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[str]:
        return ["".join(NOTES[code] for code in item.codes.tolist()) for item in tokens]

    def read(self, payload: bytes) -> str:
        notes = payload.decode(errors="replace")
        if len(notes) != 3 or set(notes) - set(NOTES):
            raise TokenizerError(f"chime {notes!r}, expected three letters of {NOTES}")
        return notes

    def save(self, folder: Path) -> None:
        write_tokenizer_folder(folder, self.kind, {}, ("notes.txt", NOTES.encode()))

    @classmethod
    def load(cls, folder: Path) -> Self:
        read_tokenizer_folder(folder, cls.kind)
        return cls()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AllAtOnce(Objective):
    """Every content is hidden and predicted in one step."""

    kind: Literal["all_at_once"] = "all_at_once"
    weight: float = 1.0
    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        return Corrupted(np.full_like(targets.token_ids, mask_id), np.ones(len(targets.token_ids), dtype=np.float32))

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Tensor | None = None) -> SpanState:
        return SpanState(torch.full((length,), mask_id), 0, 1)

    def inputs(self, state: SpanState, begin_id: int) -> Tensor:
        return state.token_ids

    def step(
        self, state: SpanState, logits: Tensor, first_id: int, end_id: int | None, mask_id: int, draw: Draw
    ) -> SpanState:
        choice, _ = draw.tokens(logits, 0, torch.arange(len(state.token_ids)))
        return SpanState(choice + first_id, 1, 1, done=True)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODALITIES, "chime", Chime)
    monkeypatch.setitem(OBJECTIVES, "all_at_once", AllAtOnce)


SONGS = {"rise": "ceg", "fall": "gec", "rest": "aaa"}


@pytest.mark.usefixtures("registered")
def test_a_modality_and_an_objective_defined_here_train_are_stored_and_sample(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        for name, notes in SONGS.items():
            spans = (RawSpan("text", text=name), RawSpan("chime", payload=notes.encode(), extension="notes"))
            writer.write(RawSample(name, spans))
    text = SentencePieceTokenizer.train([*SONGS], vocab_size=270)
    tokenizers = {"text": text, "chime": Chime()}
    config = parse_config(ModelConfig, "objectives: {text: next_token, chime: all_at_once}", ["decoder.n_layers=1"])
    assert config.objectives["chime"] == AllAtOnce()
    decoder = DecoderConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32, rope_theta=100.0)
    config = ModelConfig(decoder=decoder, objectives=config.objectives)
    vocabulary = build_vocabulary(tokenizers)
    source = SourceConfig(path=tmp_path / "data", tasks={"text->chime": 1, "chime->text": 1})
    data = TrainingData(
        DataConfig(sources=(source,), row_length=32, condition_dropout=0.1),
        tokenizers,
        vocabulary,
        config.objectives,
        seed=0,
        cache_dir=tmp_path / "tokens",
        rows_per_step=4,
    )
    torch.manual_seed(0)
    task = ModelTask(
        UnifiedModel(config, vocabulary), data, tokenizers, micro_batch_rows=4, generation_config={}, card="A toy."
    )
    settings = FitConfig(
        name="toy",
        steps=120,
        rows_per_step=4,
        optim=OptimConfig(lr=1e-2, weight_decay=0.0, ema_decay=None),
        engine=EngineConfig(micro_batch_rows=4, precision="fp32"),
        checkpoint=CheckpointConfig(every=120),
    )
    open_run_folder(tmp_path / "run", settings)
    model = omniform.load(fit(task, settings, tmp_path / "run"))
    for name, notes in SONGS.items():
        assert model.generate(name, to="chime", temperature=0).parts[0].data == notes
    chimes = [Chime().encode(notes) for notes in SONGS.values()]
    assert [Chime().decode(tokens) for tokens in chimes] == [*SONGS.values()]
