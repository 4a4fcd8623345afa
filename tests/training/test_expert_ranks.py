"""Experts on two ranks that meet different modalities, against one process that meets them all in one pass.

The file is also the program of those ranks: python test_expert_ranks.py OUT STAGE ... writes the weights of each ZeRO
stage, with experts by modality and with experts that routers choose. Even rows of a step hold texts, pictures and
depths, which are vectors, odd ones speech, so that each rank lacks what the other one meets; nobody meets videos and
motion.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniform.modeling.config import DecoderConfig, ModelConfig, TopK
from omniform.modeling.corruption import corrupt
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.coarse_to_fine import CoarseToFine
from omniform.modeling.objectives.flow import Flow
from omniform.modeling.objectives.gmm import Gmm
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Continuous, Discrete, Latents, Tokens
from omniform.tokenizers.vocabulary import Vocabulary
from omniform.training.config import EngineConfig, FitConfig, OptimConfig
from omniform.training.engine import Engine
from omniform.training.expert_balance import balance_experts
from omniform.training.step import train_step
from omniform.training.task import MicroBatch

ROWS, ROW_LENGTH, STEPS = 4, 36, 3
CODES = {
    "image": Discrete(8),
    "speech": Discrete(6),
    "video": Discrete(8),
    "song": Discrete(5, 3),
    "hum": Discrete(4, 2),
}
VOCABULARY = Vocabulary(20, {**CODES, "depth": Continuous(3), "motion": Continuous(2)}, ["speech", "song", "hum"])
OBJECTIVES = {
    "text": NextToken(),
    "image": Masked(),
    "speech": NextToken(),
    "video": Masked(),
    "song": NextToken(codebooks="delayed"),
    "hum": CoarseToFine(block_size=3),
    "depth": Flow(),
    "motion": Gmm(components=2),
}
KINDS = {"modality": "modality", "topk": TopK(n=5, k=2, balance_weight=0.5, z_weight=0.1, bias_rate=0.01)}

TIMES: dict[str, Literal["adaln", "input"]] = {"modality": "adaln", "topk": "input"}


def part(modality: str, codes: Sequence[int]) -> Part:
    return Part(modality, Tokens(torch.tensor(codes), (len(codes),)), Role.TARGET)


def coded_part(modality: str, frames: Sequence[Sequence[int]]) -> Part:
    codes = torch.tensor(frames)
    return Part(modality, Tokens(codes.flatten(), tuple(codes.shape)), Role.TARGET)


def row(step: int, place: int) -> MultimodalSequence:
    """The document of one row, a function of its place alone."""
    first, key = (step + place) % 5, 100 * step + place
    parts = [part("speech", [first, 1, 2])]
    if place % 2 == 0:
        depth = Latents(torch.linspace(-1, first, 6).view(2, 3), (2,))
        parts = [part("text", [first, 7, 9]), part("image", [first, 2, 4, 6]), Part("depth", depth, Role.TARGET)]
        parts += [coded_part("song", [[first, 1, 2], [3, 4, 0]]), coded_part("hum", [[place, 1]])]
    return MultimodalSequence.build(parts, VOCABULARY, OBJECTIVES, key)


def fresh_model(kind: str) -> UnifiedModel:
    decoder = DecoderConfig(
        dim=12, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=10, experts=KINDS[kind], timestep=TIMES[kind]
    )
    torch.manual_seed(0)
    return UnifiedModel(ModelConfig(decoder=decoder, objectives=OBJECTIVES), VOCABULARY)


def train(kind: str, stage: int, micro_batch_rows: int) -> dict[str, torch.Tensor]:
    """Return the weights, buffers and figures of a few steps on this process's share of the rows."""
    config = FitConfig(
        name="experts",
        steps=STEPS,
        rows_per_step=ROWS,
        optim=OptimConfig(lr=0.05, ema_decay=None),
        engine=EngineConfig(zero_stage=stage, precision="fp32", micro_batch_rows=micro_batch_rows),
    )
    model = fresh_model(kind)
    engine = Engine(model, config)
    norms, violations = [], []
    for step in range(STEPS):
        batches = []
        own = [[row(step, place)] for place in range(engine.rank, ROWS, engine.world_size)]
        for first in range(0, len(own), micro_batch_rows):
            rows = pack(own[first : first + micro_batch_rows], ROW_LENGTH, VOCABULARY)
            batch = corrupt(rows, VOCABULARY, OBJECTIVES)
            batches.append(MicroBatch(batch, batch.counts, ROW_LENGTH))
        update = train_step(engine, model.term_weights, batches, 0.05).update
        norms.append(update.grad_norm)
        figures = balance_experts(model, engine.sum_over_ranks, skipped=update.skipped)
        violations.append(figures.get("router_violation", 0.0))
    assert len(set(engine.gather_objects(str(engine.buffers())))) == 1  # the same on every rank
    weights = {**dict(engine.read()), **{name: buffer.clone() for name, buffer in engine.buffers().items()}}
    engine.close()
    return {**weights, "norms": torch.tensor(norms), "violations": torch.tensor(violations)}


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
def one() -> dict[str, dict[str, torch.Tensor]]:
    """By kind, what one process ends with that takes all rows of a step in one pass."""
    return {kind: train(kind, 0, ROWS) for kind in KINDS}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_different_modalities_equal_one_process(
    two: Path, one: dict[str, dict[str, torch.Tensor]], kind: str, stage: int
) -> None:
    both, expected = load_file(two / f"{kind}-z{stage}.safetensors"), one[kind]
    assert both.keys() == expected.keys()
    for name, weight in expected.items():
        # AdamW steps as far for the smallest gradients, which rounding decides; of a rank left out it would be 0.05.
        atol = 1e-3 if name.startswith("continuous.") or "modulation" in name else 1e-5
        torch.testing.assert_close(both[name], weight, rtol=1e-4, atol=atol, msg=name)


def test_routers_were_told_of_all_ranks(one: dict[str, dict[str, torch.Tensor]]) -> None:
    """The last step's rows, each through two experts, and biases that moved at most once a step."""
    rows = sum(len(row(STEPS - 1, place)) for place in range(ROWS))
    for block in range(2):
        assert int(one["topk"][f"decoder.blocks.{block}.feed_forward.load"].sum()) == 2 * rows
        moves = one["topk"][f"decoder.blocks.{block}.feed_forward.bias_steps"].abs()
        assert 0 < int(moves.max()) <= STEPS
    assert (one["topk"]["violations"] > 0).all()
    assert (one["topk"]["violations"] <= 5 / 2 - 1).all()


def test_the_expert_of_a_modality_that_nobody_meets_only_decays(one: dict[str, dict[str, torch.Tensor]]) -> None:
    before = dict(fresh_model("modality").named_parameters())
    for name, weight in one["modality"].items():
        if "feed_forward" in name:
            ratio = weight / before[name].detach()
            absent = any(f"experts.{VOCABULARY.place_of(unmet)}." in name for unmet in ("video", "motion"))
            decayed = torch.full_like(ratio, (1 - 0.05 * 0.1) ** 3)  # AdamW: weight decay of 0.1 at lr 0.05
            assert torch.allclose(ratio, decayed) == absent, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    for stage, kind in itertools.product(map(int, sys.argv[2:]), KINDS):
        state = train(kind, stage, 1)
        if torch.distributed.get_rank() == 0:
            save_file(state, Path(sys.argv[1]) / f"{kind}-z{stage}.safetensors")
