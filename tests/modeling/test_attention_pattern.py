import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DOCUMENTS

from omniform.kernels.attention import MaskForm, attention
from omniform.modeling.attention_pattern import PADDING, AttentionPattern
from omniform.modeling.corruption import corrupt
from omniform.modeling.model import UnifiedModel
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence
from omniform.tokenizers.vocabulary import Vocabulary


@st.composite
def patterns(draw: st.DrawFn) -> AttentionPattern:
    """Two rows of random documents, blocks and flags, padding at the end."""
    rows = []
    for _ in range(2):
        row: list[tuple[int, int, bool, bool]] = []
        for document in range(draw(st.integers(0, 3))):
            for block in range(draw(st.integers(1, 3))):
                flags = (draw(st.booleans()), draw(st.booleans()))
                row += [(document, block, *flags)] * draw(st.integers(1, 4))
        rows.append(row)
    length = max(map(len, rows)) + draw(st.integers(1, 3))
    padded = [row + [(PADDING, 0, False, False)] * (length - len(row)) for row in rows]
    document_ids, block_ids, bidirectional, private = (
        torch.tensor([[entry[i] for entry in row] for row in padded]) for i in range(4)
    )
    return AttentionPattern(document_ids, block_ids, bidirectional.bool(), private.bool())


@given(patterns())
def test_predicate_equals_a_triple_loop(pattern: AttentionPattern) -> None:
    allowed = pattern.allowed()
    batch, length = pattern.document_ids.shape
    for b in range(batch):
        for q in range(length):
            for k in range(length):
                same_document = bool(pattern.document_ids[b, q] == pattern.document_ids[b, k])
                same_block = same_document and bool(pattern.block_ids[b, q] == pattern.block_ids[b, k])
                visible = k <= q or (same_block and bool(pattern.bidirectional[b, k]))
                hidden = bool(pattern.private[b, k]) and not same_block
                assert bool(allowed[b, q, k]) == (same_document and visible and not hidden)


@given(patterns(), st.integers(1, 3))
def test_last_queries_are_the_last_rows_of_the_whole(pattern: AttentionPattern, n: int) -> None:
    assert torch.equal(pattern.allowed(n), pattern.allowed()[:, -n:])


@given(patterns(), st.integers(0, 2**31))
def test_document_form_attends_as_the_dense_form_does(pattern: AttentionPattern, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = pattern.document_ids.shape[1]
    real = pattern.document_ids != PADDING
    inputs = [torch.randn(2, heads, length, 4, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    upstream = torch.randn(2, 4, length, 4, generator=generator) * real[:, None, :, None]
    results = []
    for form in MaskForm:
        out = attention(*inputs, pattern.render(form))
        results.append((out * real[:, None, :, None], *torch.autograd.grad(out, inputs, upstream)))
    for dense, documents in zip(*results, strict=True):
        torch.testing.assert_close(dense, documents, atol=2e-6, rtol=0)


def test_published_masks_are_special_cases() -> None:
    """Causal; prefix-LM by PaliGemma's cumulative-sum rule (arXiv:2407.07726); Transfusion's (arXiv:2408.11039)."""
    length = 9
    zeros, no = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.bool)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(AttentionPattern(zeros, zeros, no, no).allowed()[0], causal)
    prefix = torch.arange(length) < 4
    autoregressive = (~prefix).long().cumsum(0)
    pattern = AttentionPattern(zeros, (~prefix).long()[None], prefix[None], no)
    assert torch.equal(pattern.allowed()[0], autoregressive[None, :] <= autoregressive[:, None])
    image = (torch.arange(length) >= 3) & (torch.arange(length) < 6)
    pattern = AttentionPattern(zeros, image.long()[None] + 2 * (torch.arange(length) >= 6), image[None], no)
    assert torch.equal(pattern.allowed()[0], causal | (image[:, None] & image[None, :]))


def test_document_form_refuses_a_subset_of_queries() -> None:
    zeros, no = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="dense form"):
        AttentionPattern(zeros, zeros, no, no).render(MaskForm.DOCUMENTS, n_queries=1)


@given(st.lists(DOCUMENTS, min_size=1, max_size=3))
def test_gradient_is_zero_exactly_where_the_pattern_forbids(documents: list) -> None:
    """Through one layer, d output_q / d embedding_k is not zero iff q may attend to k (or is k)."""
    torch.manual_seed(0)
    vocabulary, model = _one_layer()
    sequences = [MultimodalSequence.build(parts, vocabulary, model.config.objectives) for parts in documents]
    length = sum(map(len, sequences)) + 2
    batch = corrupt(pack([sequences], length, vocabulary), vocabulary, model.config.objectives)
    allowed = batch.pattern.allowed()[0]
    real = batch.pattern.document_ids[0] != PADDING
    for form in MaskForm:
        embeddings = model.interface.embed(batch.token_ids).detach().requires_grad_()
        hidden = model.decoder(embeddings, batch.position_ids, batch.pattern.render(form))
        for q in torch.nonzero(real)[:, 0].tolist():
            (gradient,) = torch.autograd.grad(hidden[0, q].square().sum(), embeddings, retain_graph=True)
            reached = gradient[0].abs().sum(-1) > 0
            expected = allowed[q].clone()
            expected[q] = True
            assert torch.equal(reached, expected), f"row {q} in the {form} form"


def _one_layer() -> tuple[Vocabulary, UnifiedModel]:
    from strategies import CODEBOOK, TEXT_SIZE

    from omniform.modeling.config import DecoderConfig, ModelConfig
    from omniform.modeling.objectives.masked import Masked
    from omniform.modeling.objectives.next_token import NextToken
    from omniform.tokenizers.base import Discrete

    vocabulary = Vocabulary(TEXT_SIZE, {"image": Discrete(CODEBOOK)})
    decoder = DecoderConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=8)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked()}), vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5)
    return vocabulary, model


def test_patterns_append_row_by_row() -> None:
    zeros, no = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)
    first = AttentionPattern(zeros, zeros, no, no)
    both = first.append(dataclasses.replace(first, block_ids=zeros + 1))
    assert both.block_ids.tolist() == [[0, 0, 1, 1]]
