"""Experts by modality on two ranks that meet different modalities, against one process that meets them all.

The file is also the program of those ranks: python test_expert_ranks.py OUT STAGE ... writes the weights of each ZeRO
stage. Even rows of a step hold texts and pictures, odd ones speech, so that each rank lacks what the other one meets,
and nobody meets videos.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.model import UnifiedModel, corrupt
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.sequence import MultimodalSequence, Part, Role, pack
from omniform.tokenizers.base import Discrete, Tokens
from omniform.tokenizers.vocabulary import Vocabulary
from omniform.training.config import EngineConfig, FitConfig, OptimConfig
from omniform.training.engine import Engine
from omniform.training.step import train_step
from omniform.training.task import MicroBatch

ROWS, ROW_LENGTH, STEPS = 4, 16, 3
VOCABULARY = Vocabulary(20, {"image": Discrete(8), "speech": Discrete(6), "video": Discrete(8)}, ["speech"])
MODEL = ModelConfig(
    decoder=DecoderConfig(dim=12, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=10, experts="modality"),
    objectives={"text": NextToken(), "image": Masked(), "speech": NextToken(), "video": Masked()},
)


def part(modality: str, codes: Sequence[int]) -> Part:
    return Part(modality, Tokens(torch.tensor(codes), (len(codes),)), Role.TARGET)


def row(step: int, place: int) -> MultimodalSequence:
    """The document of one row, a function of its place alone."""
    first, key = (step + place) % 5, 100 * step + place
    parts = [part("speech", [first, 1, 2])]
    if place % 2 == 0:
        parts = [part("text", [first, 7, 9]), part("image", [first, 2, 4, 6])]
    return MultimodalSequence.build(parts, VOCABULARY, MODEL.objectives, key)


def train(stage: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the weights and the gradients' norms of a few steps on this process's share of the rows."""
    config = FitConfig(
        name="experts",
        steps=STEPS,
        rows_per_step=ROWS,
        optim=OptimConfig(lr=0.05, ema_decay=None),
        engine=EngineConfig(zero_stage=stage, precision="fp32", micro_batch_rows=1),
    )
    torch.manual_seed(0)
    model = UnifiedModel(MODEL, VOCABULARY)
    engine = Engine(model, config)
    norms = []
    for step in range(STEPS):
        batches = []
        for place in range(engine.rank, ROWS, engine.world_size):
            batch = corrupt(pack([[row(step, place)]], ROW_LENGTH, VOCABULARY), VOCABULARY, MODEL.objectives)
            batches.append(MicroBatch(batch, batch.counts, ROW_LENGTH))
        norms.append(train_step(engine, model.term_weights, batches, 0.05).update.grad_norm)
    weights = dict(engine.read())
    engine.close()
    return weights, norms


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights after steps of two ranks at every ZeRO stage."""
    out = tmp_path_factory.mktemp("two")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, out, *"0123"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def one() -> tuple[dict[str, torch.Tensor], list[float]]:
    return train(0)


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_of_different_modalities_equal_one_process(
    two: Path, one: tuple[dict[str, torch.Tensor], list[float]], stage: int
) -> None:
    both, (expected, norms) = load_file(two / f"z{stage}.safetensors"), one
    torch.testing.assert_close(both.pop("norms"), torch.tensor(norms), rtol=1e-4, atol=0)
    assert both.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(both[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_the_expert_of_a_modality_that_nobody_meets_only_decays(
    one: tuple[dict[str, torch.Tensor], list[float]],
) -> None:
    torch.manual_seed(0)
    before = dict(UnifiedModel(MODEL, VOCABULARY).named_parameters())
    for name, weight in one[0].items():
        if "feed_forward" in name:
            ratio = weight / before[name].detach()
            absent = f"experts.{VOCABULARY.place_of('video')}" in name
            decayed = torch.full_like(ratio, (1 - 0.05 * 0.1) ** 3)  # AdamW: weight decay of 0.1 at lr 0.05
            assert torch.allclose(ratio, decayed) == absent, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    for stage in map(int, sys.argv[2:]):
        weights, norms = train(stage)
        if torch.distributed.get_rank() == 0:
            save_file({**weights, "norms": torch.tensor(norms)}, Path(sys.argv[1]) / f"z{stage}.safetensors")
