"""The tokens of all four modalities through the whole road: data, training, a stored model, generation."""

import itertools
from pathlib import Path

import torch
from small_codecs import small_tokenizers

import omniform
from omniform.data.digits import build_digits
from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, SourceConfig
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.training.config import CheckpointConfig, EngineConfig, FitConfig, OptimConfig
from omniform.training.loop import fit
from omniform.training.model_task import ModelTask
from omniform.training.run_folder import open_run_folder


def test_every_pair_of_modalities_trains_and_every_modality_is_generated(tmp_path: Path) -> None:
    world = build_digits(tmp_path / "world", copies=1, limit=2)
    tokenizers = small_tokenizers()
    objectives = {"text": NextToken(), "image": Masked(steps=2), "speech": NextToken(), "video": Masked(steps=2)}
    decoder = DecoderConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32, rope_theta=100.0)
    config = ModelConfig(decoder=decoder, objectives=objectives, next_span_weight=0.1)
    vocabulary = build_vocabulary(tokenizers)
    assert vocabulary.end_of("speech") == vocabulary.target_range("speech").stop - 1
    pairs = {f"{source}->{target}": 1.0 for source, target in itertools.permutations(tokenizers, 2)}
    sources = (
        SourceConfig(path=world / "train-concepts", tasks=pairs),
        SourceConfig(path=world / "train-stories", tasks={"interleaved": 1.0}),
    )
    data = TrainingData(
        DataConfig(sources=sources, row_length=512),
        tokenizers,
        vocabulary,
        objectives,
        seed=0,
        cache_dir=tmp_path / "tokens",
        rows_per_step=4,
    )
    assert not any(data.holes.values())
    assert not any(data.unserved.values())
    torch.manual_seed(0)
    task = ModelTask(
        UnifiedModel(config, vocabulary), data, tokenizers, micro_batch_rows=4, generation_config={}, card="A toy."
    )
    settings = FitConfig(
        name="toy",
        steps=3,
        rows_per_step=4,
        optim=OptimConfig(lr=1e-3, ema_decay=None),
        engine=EngineConfig(micro_batch_rows=4, precision="fp32"),
        checkpoint=CheckpointConfig(every=3),
    )
    counts = [batch.counts for step in range(3) for batch in task.micro_batches(step, 0, 1)]
    assert all(sum(count[modality] for count in counts) > 0 for modality in tokenizers)
    open_run_folder(tmp_path / "run", settings)
    model = omniform.load(fit(task, settings, tmp_path / "run"))
    for seed in range(4):
        reply = model.generate("one", to=["speech", "video", "image", "text"], seed=seed, max_new_tokens=7)
        [speech], [video] = reply.speech, reply.videos
        assert speech.rate == 16000
        assert len(speech.samples) <= 3 * 1280
        assert len(speech.samples) % 1280 == 0
        assert speech.samples.isfinite().all()
        assert speech.samples.abs().max() <= 1
        assert (video.frames.shape, video.fps) == ((9, 32, 32, 1), 8.0)
        assert len(reply.images) == 1
