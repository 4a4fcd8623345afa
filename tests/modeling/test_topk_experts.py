"""Experts that a router chooses, against a loop over rows, transformers' Mixtral and the papers' closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import TEXT_SIZE, image_part, text_part
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig, TopK, dump_config, parse_config
from omniform.modeling.corruption import CorruptedBatch, corrupt
from omniform.modeling.experts import RoutingTally, TopKExperts
from omniform.modeling.model import UnifiedModel
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Role

N_EXPERTS = 4
CONFIG = DecoderConfig(dim=8, n_heads=2, n_kv_heads=2, ffn_dim=12)


def layer_of(k: int, seed: int = 0, **settings: float) -> TopKExperts:
    torch.manual_seed(seed)
    layer = TopKExperts(CONFIG, TopK(n=N_EXPERTS, k=k, **settings))
    torch.nn.init.normal_(layer.router.weight)
    return layer


def by_rows(layer: TopKExperts, rows: torch.Tensor) -> torch.Tensor:
    """The slow way: one row and one expert at a time, weights made to sum to 1 by division."""
    results = []
    for row in rows:
        scores = torch.softmax(layer.router.weight @ row, 0)
        ranked = (scores + 0.1 * layer.bias_steps if layer.bias_rate else scores).tolist()
        best = sorted(range(N_EXPERTS), key=lambda e: -ranked[e])[: layer.n_active]
        total = sum(scores[e] for e in best) if layer.n_active > 1 else 1.0
        results.append(sum(scores[e] / total * layer.experts[e](row) for e in best))
    return torch.stack(results)


@settings(max_examples=50)
@given(
    k=st.integers(1, N_EXPERTS),
    n_rows=st.integers(1, 12),
    biases=st.lists(st.integers(-9, 9), min_size=N_EXPERTS, max_size=N_EXPERTS),
    seed=st.integers(0, 99),
    inference=st.booleans(),
)
def test_each_row_goes_through_its_best_experts_and_is_weighed_without_their_biases(
    k: int, n_rows: int, biases: list[int], seed: int, inference: bool
) -> None:
    layer = layer_of(k, seed, bias_rate=0.1)
    layer.bias_steps.copy_(torch.tensor(biases))
    x = torch.randn(n_rows, CONFIG.dim, requires_grad=True)
    slow = by_rows(layer, x)
    with torch.inference_mode(inference):
        fast = layer(x[None])[0]
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    if inference:
        return
    towards = torch.randn_like(x)
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad((slow * towards).sum(), wanted, allow_unused=True)
    for found, own in zip(torch.autograd.grad((fast * towards).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if own is None else own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_equals_mixtral(k: int) -> None:
    config = MixtralConfig(
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.ffn_dim,
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=k,
        experts_implementation="eager",
    )
    ours, theirs = layer_of(k), MixtralSparseMoeBlock(config)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        for number, expert in enumerate(ours.experts):
            theirs.experts.gate_up_proj[number] = torch.cat([expert.gate.weight, expert.up.weight])
            theirs.experts.down_proj[number] = expert.down.weight
    x = torch.randn(2, 9, CONFIG.dim)
    (found, expected), towards = (ours(x), theirs(x)), torch.randn_like(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    (found * towards).sum().backward()
    (expected * towards).sum().backward()
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, atol=1e-5, rtol=1e-4)
    downs = torch.stack([expert.down.weight.grad for expert in ours.experts])
    torch.testing.assert_close(downs, theirs.experts.down_proj.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_on_the_same_rows_again_is_that_of_transformers(k: int) -> None:
    """Theirs sums the fractions to k, ours to 1; padding counts in neither, and gradients agree too."""
    layer, x = layer_of(k), torch.randn(2, 7, CONFIG.dim)
    counted = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    tally = RoutingTally(counted)
    layer(x, tally)
    layer.balance(tally.loads[0])
    assert int(layer.load.sum()) == 11 * k
    tally = RoutingTally(counted)
    layer(x, tally)
    theirs = load_balancing_loss_func((layer.router(x.flatten(0, 1)),), N_EXPERTS, k, counted.long())
    torch.testing.assert_close(tally.balance / 11, theirs / k)
    [found] = torch.autograd.grad(tally.balance / 11, layer.router.weight)
    [expected] = torch.autograd.grad(theirs / k, layer.router.weight)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_router_losses_of_even_and_of_one_sided_scores() -> None:
    """Even scores cost 1, whatever the load; all on one expert, the only one loaded, cost n. log(Z) of 0s is log(n)."""
    layer, x = layer_of(1), torch.ones(1, 6, CONFIG.dim)
    for weight, load, balance, z in (
        (0.0, [9, 0, 0, 3], 1.0, math.log(N_EXPERTS)),
        (100.0, [0, 0, 0, 0], 1.0, 100.0 * CONFIG.dim),
        (100.0, [6, 0, 0, 0], N_EXPERTS, 100.0 * CONFIG.dim),
    ):
        with torch.no_grad():
            layer.router.weight.zero_()[0] = weight
        layer.load.copy_(torch.tensor(load))
        tally = RoutingTally(torch.ones(1, 6, dtype=torch.bool))
        layer(x, tally)
        assert tally.balance.item() == pytest.approx(6 * balance)
        assert tally.z.item() == pytest.approx(6 * z**2)


def test_biases_move_by_the_sign_of_the_load_error() -> None:
    layer = layer_of(2, bias_rate=0.001)
    layer.balance(torch.tensor([3, 1, 0, 4]))
    assert layer.bias_steps.tolist() == [-1, 1, 1, -1]
    layer.balance(torch.tensor([2, 2, 1, 3]))
    assert layer.bias_steps.tolist() == [-1, 1, 2, -2]
    layer.balance(torch.tensor([2, 2, 2, 2]))
    assert layer.bias_steps.tolist() == [-1, 1, 2, -2]


def test_biases_spread_rows_that_all_wanted_the_same_experts() -> None:
    layer, counted = layer_of(2, bias_rate=0.003), torch.ones(1, 400, dtype=torch.bool)
    with torch.no_grad():
        layer.router.weight.mul_(0.5)
        x = torch.randn(1, 400, CONFIG.dim) + 2 * layer.router.weight[0] / layer.router.weight[0].norm()
    fullest = []
    for _ in range(300):
        tally = RoutingTally(counted)
        with torch.no_grad():
            layer(x, tally)
        layer.balance(tally.loads[0])
        fullest.append(float(tally.loads[0].max() / tally.loads[0].double().mean()) - 1)
    assert fullest[0] > 0.8
    assert fullest[-1] < 0.1


def test_biases_stay_exact_in_a_half_precision_model() -> None:
    layer = layer_of(2, bias_rate=0.001).bfloat16()
    for _ in range(300):
        layer.balance(torch.tensor([3, 1, 0, 4]))
    assert layer.bias_steps.tolist() == [-300, 300, 300, -300]


def test_the_router_is_not_rounded_by_autocast() -> None:
    layer, rows = layer_of(2), torch.randn(64, CONFIG.dim)
    with torch.autocast("cpu", torch.bfloat16):
        logits, out = layer.router(rows), layer(rows[None])
    assert torch.equal(logits, layer.router(rows))
    assert out.dtype == torch.bfloat16  # as of a layer without experts


def model_of(model_config: ModelConfig, choice: TopK, vocabulary) -> UnifiedModel:
    torch.manual_seed(0)
    model = UnifiedModel(replace(model_config, decoder=replace(model_config.decoder, experts=choice)), vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def batch_of(model: UnifiedModel, rows: list[list], length: int = 16) -> CorruptedBatch:
    vocabulary, objectives = model.vocabulary, model.config.objectives
    sequences = [
        [MultimodalSequence.build(parts, vocabulary, objectives, key)] if parts else []
        for key, parts in enumerate(rows)
    ]
    return corrupt(pack(sequences, length, vocabulary), vocabulary, objectives)


TEXT, IMAGE = [text_part([1, 2], Role.TARGET)], [image_part([0, 1, 2, 3], Role.TARGET)]


def test_losses_of_routers_add_up_over_micro_batches(model_config: ModelConfig, vocabulary) -> None:
    """Rows of one pass cost as much as the same rows in a pass each, with the load of the step before them all."""
    model = model_of(model_config, TopK(n=4, k=2, balance_weight=0.5, z_weight=0.1), vocabulary)
    assert list(model.term_weights.items())[-2:] == [("router_balance", 0.5), ("router_z", 0.1)]
    model.balance_routers(torch.tensor([[5, 1, 2, 0], [0, 0, 3, 5]]))
    together = batch_of(model, [TEXT, IMAGE])
    apart = [replace_rows(together, row) for row in range(2)]
    whole, parts = model(together), [model(batch) for batch in apart]
    for term in ("router_balance", "router_z"):
        assert together.counts[term] == sum(batch.counts[term] for batch in apart) == (1 + 2 + 1) + (1 + 4)
        torch.testing.assert_close(whole[term], parts[0][term] + parts[1][term])
    loads = model.router_loads
    assert loads is not None
    assert loads.sum(1).tolist() == [2 * 2 * 9] * 2  # twice 9 rows that are no padding, 2 experts each


def replace_rows(batch: CorruptedBatch, row: int) -> CorruptedBatch:
    """Return one row of a batch as a batch of its own, which asks for no prediction."""
    pattern = type(batch.pattern)(*(getattr(batch.pattern, n)[row, None] for n in batch.pattern.__dataclass_fields__))
    arrays = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
    nothing = {term: type(p).dummy() for term, p in batch.predictions.items()}
    return CorruptedBatch(*(array[row, None] for array in arrays), pattern, nothing)


@pytest.mark.parametrize("rows", [[TEXT], [[]]], ids=["one modality", "padding alone"])
def test_every_parameter_takes_part_whatever_is_absent(model_config: ModelConfig, vocabulary, rows: list) -> None:
    model = model_of(model_config, TopK(n=9, k=2, z_weight=0.1), vocabulary)
    sum(model(batch_of(model, rows)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert rows != [[]] or (parameter.grad == 0).all(), name


def test_no_row_is_routed_by_what_follows_it(model_config: ModelConfig, vocabulary) -> None:
    model = model_of(model_config, TopK(n=4, k=2), vocabulary)
    before = torch.randint(0, TEXT_SIZE, (3, 8))
    after = before.clone()
    after[:, 5:] = (after[:, 5:] + 1) % TEXT_SIZE
    with torch.no_grad():
        torch.testing.assert_close(model.text_logits(before)[:, :5], model.text_logits(after)[:, :5])
        torch.testing.assert_close(model.text_logits(before)[1:2], model.text_logits(before[1:2]))


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ("expert_choice", r"decoder\.experts: kind is expert_choice, .*depends on rows after it.*choose topk"),
        ("{kind: expert_choice, n: 4}", r"choose among all rows at once .*choose topk"),
        ("{kind: topk, n: 4, k: 5}", r"decoder\.experts\.k is 5, expected no more than .* n = 4"),
        ("{kind: topk, k: 0}", r"decoder\.experts\.k: .*greater than or equal to 1, not 0"),
        ("{kind: topk, kk: 2}", r"decoder\.experts\.kk: unknown key; did you mean k\?"),
        ("{kind: topk, bias_rate: .inf}", r"decoder\.experts\.bias_rate: .*finite"),
        ("{kind: shared, n: 2}", r"decoder\.experts: given \{'kind': 'shared', 'n': 2\}, expected shared, modality"),
        ("{n: 2}", r"decoder\.experts: given \{'n': 2\}, expected .*kind: topk"),
    ],
)
def test_experts_that_cannot_be_are_refused(experts: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_config(ModelConfig, f"objectives: {{text: next_token}}\ndecoder: {{experts: {experts}}}")


def test_experts_are_read_back_as_they_were_written() -> None:
    text = "objectives: {text: next_token}\ndecoder: {experts: topk}"
    config = parse_config(ModelConfig, text, ["decoder.experts={kind: topk, bias_rate: 0.001, balance_weight: 0}"])
    assert config.decoder.experts == TopK(bias_rate=0.001, balance_weight=0)
    assert parse_config(ModelConfig, dump_config(config)) == config
    assert parse_config(ModelConfig, text).decoder.experts == TopK()
