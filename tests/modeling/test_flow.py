"""Flow matching: what is learnt is the velocity of straight paths, and solving with it recovers what was learnt."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from strategies import vector_spans

from omniform.inference.sampling import KeyedDraw
from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.flow import Flow, shifted
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role, SequenceError
from omniform.tokenizers.base import Continuous, Discrete, Latents, Tokens
from omniform.tokenizers.vocabulary import Vocabulary, VocabularyError

MASK = 999
FLOWS = st.builds(
    Flow,
    times=st.sampled_from(["uniform", "logit_normal"]),
    time_shift=st.floats(0.2, 5),
    solver=st.sampled_from(["euler", "heun"]),
    steps=st.integers(1, 9),
)


@given(FLOWS, st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_values_lie_on_the_line_from_data_to_noise_that_the_labels_follow(flow: Flow, lengths: list[int]) -> None:
    targets = vector_spans(lengths)
    assert targets.values is not None
    found = flow.corrupt(targets, MASK)
    assert found.values is not None
    assert found.times is not None
    assert found.labels is not None
    torch.testing.assert_close(found.values - found.times[:, None] * found.labels, targets.values)
    assert (found.loss_weights == 1).all()
    for place, first in enumerate(np.cumsum([0, *lengths[:-1]]).tolist()):
        here = slice(first, first + lengths[place])
        assert len(set(found.times[here].tolist())) == 1
        # Batch mates change nothing of it.
        own = replace(vector_spans([lengths[place]], first_key=place), values=targets.values[here])
        alone = flow.corrupt(own, MASK)
        assert torch.equal(alone.values, found.values[here])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flow", "reference"),
    [
        (Flow(times="uniform"), stats.uniform()),
        (Flow(mean=0.5, std=0.7), stats.norm(0.5, 0.7)),
        (Flow(times="uniform", time_shift=3.0), stats.uniform()),
    ],
)
def test_times_have_the_distribution_that_is_asked_for(flow: Flow, reference: stats.rv_continuous) -> None:
    found = flow.corrupt(vector_spans([1] * 4000), MASK)
    assert found.times is not None
    times = found.times.double().numpy()
    if flow.time_shift != 1:
        times = shifted(times, 1 / flow.time_shift)  # its own inverse
    if flow.times == "logit_normal":
        times = np.log(times / (1 - times))
    assert stats.kstest(times, reference.cdf).pvalue > 0.01


def test_the_noise_is_standard_normal_and_differs_everywhere() -> None:
    targets = vector_spans([10] * 400)
    found = Flow().corrupt(targets, MASK)
    noise = (found.labels + targets.values).flatten().double().numpy()  # type: ignore[operator]
    assert stats.kstest(noise, stats.norm().cdf).pvalue > 0.01
    assert len(set(noise.tolist())) > 0.99 * len(noise)  # single precision repeats a few


@given(FLOWS, st.integers(1, 6), st.integers(0, 2**31))
def test_a_perfect_model_recovers_the_span_in_any_number_of_steps(flow: Flow, length: int, seed: int) -> None:
    truth = torch.randn(length, 3, generator=torch.Generator().manual_seed(seed))
    draw = KeyedDraw(seed, 0, 0, SamplingSettings())
    state = flow.begin(length, None, MASK)
    assert state.n_steps == (flow.steps if flow.solver == "euler" else 2 * flow.steps - 1)
    n_passes = 0
    while not state.done:
        seen = flow.vectors(state, 3, draw)
        # On the straight path to the truth, x_t = truth + t * velocity.
        velocity = (seen.values - truth) / seen.times[:, None]
        state = flow.step(state, velocity, 0, None, MASK, draw)
        n_passes += 1
    assert n_passes == state.n_steps
    assert state.values is not None
    torch.testing.assert_close(state.values, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver: str, order: int) -> None:
    """dx/dt = x from t = 1 to 0 has the solution x(0) = x(1) / e."""
    errors = []
    for steps in (20, 40):
        flow = Flow(solver=solver)  # type: ignore[arg-type]
        draw = KeyedDraw(3, 0, 0, SamplingSettings())
        state = flow.begin(2, steps, MASK)
        start = flow.vectors(state, 2, draw).values
        while not state.done:
            state = flow.step(state, flow.vectors(state, 2, draw).values, 0, None, MASK, draw)
        assert state.values is not None
        errors.append(float((state.values - start / np.e).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@given(st.integers(1, 30), st.floats(0.2, 5))
def test_shifted_times_are_those_of_diffusers(steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    state = Flow(time_shift=shift).begin(1, steps, MASK)
    np.testing.assert_allclose(state.solver.sigmas.numpy(), theirs.sigmas.numpy(), atol=1e-6)  # type: ignore[attr-defined]


def test_noise_to_begin_with_depends_on_the_seed_alone() -> None:
    flow = Flow()
    for temperature in (0.0, 1.0):
        one, same, other = (
            flow.vectors(flow.begin(4, 2, MASK), 3, KeyedDraw(seed, 0, 0, SamplingSettings(temperature=temperature)))
            for seed in (1, 1, 2)
        )
        assert torch.equal(one.values, same.values)
        assert not torch.equal(one.values, other.values)


@pytest.mark.parametrize(
    "settings",
    [{"time_shift": 0}, {"std": 0}, {"steps": 0}, {"solver": "rk4"}, {"times": "beta"}, {"attention": "none"}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Flow(**settings)  # type: ignore[arg-type]


# In a model


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(50, {"image": Continuous(3), "speech": Discrete(6), "depth": Continuous(3)}, ["speech"])


@pytest.fixture
def model_config() -> ModelConfig:
    decoder = DecoderConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=32, rope_theta=100.0)
    objectives = {"text": NextToken(), "image": Flow(weight=2.0), "speech": NextToken(), "depth": Flow()}
    return ModelConfig(decoder=decoder, objectives=objectives)


def text(codes: list[int], role: Role) -> Part:
    return Part("text", Tokens(torch.tensor(codes), (len(codes),)), role)


def latents(seed: int, role: Role, modality: str = "image") -> Part:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    return Part(modality, Latents(values, (2, 2)), role)


def documents() -> list[list[Part]]:
    return [
        [text([1, 2], Role.CONTEXT), latents(0, Role.TARGET)],
        [latents(1, Role.CONTEXT), text([3], Role.TARGET)],
        [text([4], Role.CONTEXT), latents(2, Role.TARGET), text([5], Role.TARGET), latents(3, Role.TARGET, "depth")],
    ]


def sequences(model: UnifiedModel) -> list[MultimodalSequence]:
    objectives = model.config.objectives
    return [
        MultimodalSequence.build(parts, model.vocabulary, objectives, noise_key=key)
        for key, parts in enumerate(documents())
    ]


def losses(model: UnifiedModel, rows: list[list[MultimodalSequence]], length: int) -> dict[str, torch.Tensor]:
    return model(corrupt(pack(rows, length, model.vocabulary), model.vocabulary, model.config.objectives))


def test_packed_documents_have_the_losses_that_they_have_alone(model: UnifiedModel) -> None:
    one, two, three = sequences(model)
    together = losses(model, [[one, two], [three]], len(one) + len(two) + len(three))
    apart = [losses(model, [[sequence]], len(sequence)) for sequence in (one, two, three)]
    assert set(together) == {"text", "image", "speech", "depth"}
    for term, loss in together.items():
        torch.testing.assert_close(loss, torch.stack([alone[term] for alone in apart]).sum())


def test_what_follows_reads_the_clean_vectors_and_nothing_reads_the_noised_ones(model: UnifiedModel) -> None:
    before, after = (
        [text([4], Role.CONTEXT), latents(2, Role.TARGET), text([5, 6], Role.TARGET)],
        [text([4], Role.CONTEXT), latents(3, Role.TARGET), text([5, 6], Role.TARGET)],
    )
    found = []
    for parts, key in ((before, 0), (before, 1), (after, 0)):  # another key is other noise
        sequence = MultimodalSequence.build(parts, model.vocabulary, model.config.objectives, noise_key=key)
        assert [span.noised for span in sequence.spans] == [False, True, False, False]
        found.append(float(losses(model, [[sequence]], len(sequence))["text"].detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-4)


def test_gradients_reach_every_weight_whatever_a_batch_lacks(model: UnifiedModel) -> None:
    model.train()
    only_text = MultimodalSequence.build([text([1, 2], Role.TARGET)], model.vocabulary, model.config.objectives)
    for rows, reached in (([sequences(model)], True), ([[only_text]], False)):
        model.zero_grad()
        sum(losses(model, rows, sum(map(len, rows[0]))).values(), torch.zeros(())).backward()
        for name, parameter in model.continuous.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == reached, name


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_rows_of_a_span_see_the_whole_of_it_or_those_before(model: UnifiedModel, attention: str) -> None:
    objectives = {**model.config.objectives, "image": Flow(attention=attention)}  # type: ignore[arg-type]
    parts = [text([1, 2], Role.CONTEXT), latents(0, Role.TARGET)]
    sequence = MultimodalSequence.build(parts, model.vocabulary, objectives)
    batch = corrupt(pack([[sequence]], len(sequence), model.vocabulary), model.vocabulary, objectives)
    held = batch.vectors["image"]
    values = held.values.clone().requires_grad_()
    rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
    hidden = model.hidden(*rows, batch.pattern, vectors={"image": replace(held, values=values)})[0]
    for place, row in enumerate(held.rows.tolist()):
        (found,) = torch.autograd.grad(hidden[row].square().sum(), values, retain_graph=True)
        seen = range(place + 1) if attention == "causal" else range(4)
        assert found.any(1).nonzero().flatten().tolist() == [*seen]


def test_modalities_of_one_representation_share_its_interface(model: UnifiedModel) -> None:
    assert [*model.continuous] == ["flow_3_to_3"]


def test_objectives_and_tokens_of_another_kind_are_refused(model_config: ModelConfig, vocabulary: Vocabulary) -> None:
    objectives = {**model_config.objectives, "image": Masked()}
    with pytest.raises(ConfigError, match=r"objectives\.image is masked, but its tokenizer makes vectors of 3 numbers"):
        UnifiedModel(replace(model_config, objectives=objectives), vocabulary)
    objectives = {**model_config.objectives, "speech": Flow()}
    with pytest.raises(ConfigError, match=r"objectives\.speech is flow, but its tokenizer makes codes"):
        UnifiedModel(replace(model_config, objectives=objectives), vocabulary)
    wrong = (
        Part("image", Tokens(torch.zeros(4, dtype=torch.int64), (2, 2)), Role.TARGET),
        Part("image", Latents(torch.zeros(4, 2), (2, 2)), Role.TARGET),
        Part("speech", Latents(torch.zeros(4, 2), (4,)), Role.TARGET),
    )
    for part in wrong:
        with pytest.raises(SequenceError, match=r"vectors of \d numbers"):
            MultimodalSequence.build([part], vocabulary, model_config.objectives)
    with pytest.raises(VocabularyError, match="expected vectors on a fixed grid"):
        Vocabulary(10, {"image": Continuous(3)}, ["image"])


def test_continuous_modalities_take_no_ids_and_records_bring_them_back(vocabulary: Vocabulary) -> None:
    assert vocabulary.size == Vocabulary(50, {"speech": Discrete(6)}, ["speech"]).size
    assert len(vocabulary.target_range("image")) == 0
    assert [vocabulary.channels_of(name) for name in vocabulary.names] == [None, 3, None, 3]
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_times_modulate_their_own_rows_alone_and_nothing_at_first(
    model_config: ModelConfig, vocabulary: Vocabulary
) -> None:
    config = replace(model_config, decoder=replace(model_config.decoder, timestep="adaln"))
    model = UnifiedModel(config, vocabulary).eval()

    def found(time: float) -> torch.Tensor:
        parts = [text([1, 2], Role.CONTEXT), latents(0, Role.CONTEXT), text([3], Role.CONTEXT)]
        batch = pack([[MultimodalSequence.build(parts, vocabulary, config.objectives)]], 13, vocabulary)
        held = replace(batch.vectors["image"], times=torch.full((4,), time))
        rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
        with torch.no_grad():
            return model.hidden(*rows, batch.pattern, vectors={"image": held})[0]

    assert torch.equal(found(0.0), found(1.0))
    before = found(0.5)
    for block in model.decoder.blocks:
        torch.nn.init.normal_(block.modulation.project.weight, std=0.5)  # type: ignore[union-attr]
    changed = (found(0.5) != before).any(-1)
    # The text before reads nothing of it, the vectors are modulated, and the text after reads them.
    assert changed.tolist() == [False] * 5 + [True] * 4 + [True] * 3 + [False]
    assert (found(0.0) != found(1.0)).any(-1).tolist() == changed.tolist()


def test_modulation_needs_times_and_norms_to_modulate(model_config: ModelConfig, vocabulary: Vocabulary) -> None:
    with pytest.raises(ValidationError, match=r"timestep is adaln, which modulates the norms .* with norm: hybrid"):
        DecoderConfig(timestep="adaln", norm="hybrid")
    config = ModelConfig(decoder=DecoderConfig(timestep="adaln"), objectives={"text": NextToken()})
    with pytest.raises(ConfigError, match="no modality is made of vectors"):
        UnifiedModel(config, Vocabulary(50, {}))
