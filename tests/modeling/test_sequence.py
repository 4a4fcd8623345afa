import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FOUR_MODALITIES, four_modalities, image_part, text_part

from omniform.modeling.config import ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role, SequenceError, document_length, grid_positions

VOCABULARY = four_modalities()
OBJECTIVES = {"text": NextToken(), "image": Masked(), "speech": NextToken(), "video": Masked()}


def build(parts: list[Part], key: int = 0) -> MultimodalSequence:
    return MultimodalSequence.build(parts, VOCABULARY, OBJECTIVES, key)


@given(FOUR_MODALITIES)
def test_spans_hold_the_contents_of_their_parts_and_lengths_are_foretold(parts: list[Part]) -> None:
    sequence = build(parts)
    assert len(sequence) == document_length(
        [(p.modality, len(p.tokens.codes), p.role) for p in parts], VOCABULARY, OBJECTIVES
    )
    clean = [span for span in sequence.spans if not span.noised]
    assert len(clean) == len(parts)
    for span, part in zip(clean, parts, strict=True):
        ids = torch.from_numpy(sequence.token_ids[span.start : span.start + span.length])
        if VOCABULARY.end_of(part.modality) is not None:
            assert ids[-1] == VOCABULARY.end_of(part.modality)
            ids = ids[:-1]
        assert torch.equal(VOCABULARY.to_codes(part.modality, ids), part.tokens.codes)
    covered = sum(span.length for span in sequence.spans) + len(parts)
    assert covered == len(sequence)


def test_an_image_between_texts_is_laid_out_as_documented() -> None:
    sequence = build([text_part([7], Role.CONTEXT), image_part([0, 1, 2, 3], Role.TARGET), text_part([9], Role.TARGET)])
    v = VOCABULARY
    image_ids = [v.to_ids("image", torch.tensor([i])).item() for i in range(4)]
    text = [v.begin("text"), 7, v.end]
    assert sequence.token_ids.tolist() == [*text, v.begin("image"), *image_ids, *image_ids, v.begin("text"), 9, v.end]
    image_positions = [(4, 4, 4), (4, 4, 5), (4, 5, 4), (4, 5, 5)]
    rows = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), *image_positions, *image_positions]
    assert [tuple(p) for p in sequence.position_ids.tolist()] == [*rows, (6, 6, 6), (7, 7, 7), (8, 8, 8)]
    assert sequence.private.tolist() == [False] * 4 + [True] * 4 + [False] * 7
    assert [(s.role, s.noised) for s in sequence.spans[1:3]] == [(Role.TARGET, True), (Role.CONTEXT, False)]


@given(FOUR_MODALITIES)
def test_learning_the_order_gives_every_corrupted_target_a_clean_copy_and_names_what_follows(parts: list[Part]) -> None:
    sequence = MultimodalSequence.build(parts, VOCABULARY, OBJECTIVES, learn_order=True)
    described = [(p.modality, len(p.tokens.codes), p.role) for p in parts]
    assert len(sequence) == document_length(described, VOCABULARY, OBJECTIVES, learn_order=True)
    clean = [span for span in sequence.spans if not span.noised]
    rows, following = zip(*sequence.next_spans, strict=True)
    assert list(rows) == [span.start + span.length - 1 for span in clean]
    assert not sequence.private[list(rows)].any()
    assert list(following) == [*(VOCABULARY.begin(part.modality) for part in parts[1:]), VOCABULARY.end]
    batch = corrupt(pack([[], [sequence, sequence]], 2 * len(sequence), VOCABULARY), VOCABULARY, OBJECTIVES)
    asked = batch.predictions["next_span"]
    offsets = [2 * len(sequence), 3 * len(sequence)]
    assert asked.rows.tolist() == [offset + row for offset in offsets for row in rows]
    assert (asked.labels + VOCABULARY.next_span_range.start).tolist() == list(following) * 2
    assert asked.count == 2 * len(parts)


def test_grids_of_one_to_three_axes() -> None:
    assert grid_positions((3,), 3, 5).tolist() == [[5, 5, 5], [6, 6, 6], [7, 7, 7]]
    assert grid_positions((2, 1, 2), 4, 1).tolist() == [[1, 1, 1], [1, 1, 2], [2, 1, 1], [2, 1, 2]]
    with pytest.raises(SequenceError, match="grid"):
        grid_positions((2, 2), 5, 0)


@given(st.lists(st.tuples(st.lists(FOUR_MODALITIES, max_size=3)), min_size=1, max_size=3))
def test_packing_keeps_every_sequence_and_names_the_rows_of_its_targets(nested: list) -> None:
    rows = [[build(parts, key) for key, parts in enumerate(row)] for (row,) in nested]
    length = max(1, *(sum(map(len, row)) for row in rows))
    batch = pack(rows, length, VOCABULARY)
    for index, row in enumerate(rows):
        start = 0
        for document, sequence in enumerate(row):
            here = (index, slice(start, start + len(sequence)))
            assert batch.token_ids[here].tolist() == sequence.token_ids.tolist()
            assert (batch.pattern.document_ids[here] == document).all()
            start += len(sequence)
        assert (batch.token_ids[index, start:] == VOCABULARY.pad).all()
    flat = batch.token_ids.view(-1)
    targets = [s for row in rows for q in row for s in q.spans if s.role is Role.TARGET]
    for modality in VOCABULARY.names:
        expected = [s for s in targets if s.modality == modality]
        if not expected:
            assert modality not in batch.targets
            continue
        found = batch.targets[modality]
        assert found.lengths.tolist() == [s.length for s in expected]
        assert torch.equal(flat[torch.from_numpy(found.rows)], torch.from_numpy(found.token_ids))


def test_a_row_that_is_too_long_is_refused() -> None:
    with pytest.raises(SequenceError, match="row_length"):
        pack([[build([text_part([1, 2], Role.TARGET)])]], 3, VOCABULARY)


def test_empty_documents_and_unknown_modalities_are_refused() -> None:
    with pytest.raises(SequenceError, match="at least one part"):
        build([])
    with pytest.raises(SequenceError, match="no objective"):
        MultimodalSequence.build([image_part([0] * 4, Role.TARGET)], VOCABULARY, {"text": NextToken()})


@given(st.lists(FOUR_MODALITIES, min_size=2, max_size=4))
def test_packed_losses_are_the_sums_of_separate_losses(documents: list) -> None:
    torch.manual_seed(0)
    model = _model()
    sequences = [build(parts, key) for key, parts in enumerate(documents)]
    half = len(sequences) // 2
    length = sum(map(len, sequences)) + 3
    together = corrupt(pack([sequences[:half], sequences[half:]], length, VOCABULARY), VOCABULARY, OBJECTIVES)
    alone = [corrupt(pack([[s]], len(s), VOCABULARY), VOCABULARY, OBJECTIVES) for s in sequences]
    packed, separate = model(together), [model(batch) for batch in alone]
    for modality in VOCABULARY.names:
        expected = sum(losses[modality] for losses in separate)
        torch.testing.assert_close(packed[modality], expected, atol=2e-4, rtol=1e-5)
        assert together.counts[modality] == sum(batch.counts[modality] for batch in alone)


def test_what_follows_a_target_reads_its_clean_copy_alone() -> None:
    """The text after a generated image gets the same hidden states as if the image had been given."""
    model = _model()
    image, caption = image_part([0, 1, 2, 3], Role.TARGET), text_part([5, 6], Role.TARGET)
    given_image = image_part([0, 1, 2, 3], Role.CONTEXT)
    hidden = []
    for parts in ([image, caption], [given_image, caption]):
        sequence = build(parts)
        batch = corrupt(pack([[sequence]], len(sequence), VOCABULARY), VOCABULARY, OBJECTIVES)
        hidden.append(
            model.hidden(batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids, batch.pattern)[
                0, -4:
            ]
        )
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=0)


def _model() -> UnifiedModel:
    from omniform.modeling.config import DecoderConfig

    decoder = DecoderConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=16)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives=OBJECTIVES, z_loss=1e-4), VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model
