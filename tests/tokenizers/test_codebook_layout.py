"""Codebook layouts against a slow reference: lists of (frame, codebook) per step, as the MusicGen paper draws them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniform.tokenizers.base import TokenizerError
from omniform.tokenizers.codebook_layout import CodebookLayout, LayoutKind

KINDS: tuple[LayoutKind, ...] = ("flattened", "delayed", "parallel")
kinds = st.sampled_from(KINDS)


def reference(kind: str, n_frames: int, n_codebooks: int) -> list[list[tuple[int, int]]]:
    """Which (frame, codebook) each step holds, built one step after the other."""
    pairs = [(frame, codebook) for frame in range(n_frames) for codebook in range(n_codebooks)]
    if kind == "flattened":
        return [[pair] for pair in pairs]
    if kind == "parallel":
        return [[pair for pair in pairs if pair[0] == frame] for frame in range(n_frames)]
    last = max((frame + codebook for frame, codebook in pairs), default=-1)
    return [[pair for pair in pairs if sum(pair) == step] for step in range(last + 1)]


@given(kinds, st.integers(0, 12), st.integers(1, 6), st.integers(0, 2))
def test_every_layout_is_the_reference_and_is_undone(
    kind: LayoutKind, n_frames: int, n_codebooks: int, batch: int
) -> None:
    layout = CodebookLayout.of(kind, n_codebooks)
    shape = (*(2,) * batch, n_frames, n_codebooks)
    codes = torch.arange(100, 100 + int(torch.tensor(shape).prod())).view(shape)
    arranged = layout.arrange(codes, fill=-7)
    steps = reference(kind, n_frames, n_codebooks)
    assert arranged.shape == (*shape[:-2], len(steps), n_codebooks)
    assert layout.n_steps(n_frames) == len(steps)
    expected = torch.full_like(arranged, -7)
    for step, pairs in enumerate(steps):
        for frame, codebook in pairs:
            expected[..., step, codebook] = codes[..., frame, codebook]
    assert torch.equal(arranged, expected)
    for place in torch.cartesian_prod(torch.arange(len(steps)), torch.arange(n_codebooks)).tolist():
        assert bool(layout.filled(n_frames)[*place]) == (place[1] in [codebook for _, codebook in steps[place[0]]])
    assert torch.equal(layout.restore(arranged), codes)


@given(kinds, st.integers(1, 12), st.integers(1, 6), st.data())
def test_a_sequence_that_was_cut_gives_its_whole_frames(
    kind: LayoutKind, n_frames: int, n_codebooks: int, data: st.DataObject
) -> None:
    layout = CodebookLayout.of(kind, n_codebooks)
    codes = torch.arange(n_frames * n_codebooks).view(n_frames, n_codebooks)
    kept = data.draw(st.integers(0, layout.n_steps(n_frames)))
    present = {pair for pairs in reference(kind, n_frames, n_codebooks)[:kept] for pair in pairs}
    whole = sum(all((frame, q) in present for q in range(n_codebooks)) for frame in range(n_frames))
    assert layout.n_frames(kept) == whole
    assert torch.equal(layout.restore(layout.arrange(codes, fill=-1)[:kept]), codes[:whole])


def test_the_delays_of_musicgen() -> None:
    arranged = CodebookLayout.of("delayed", 4).arrange(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), fill=0)
    assert arranged.tolist() == [[1, 0, 0, 0], [5, 2, 0, 0], [0, 6, 3, 0], [0, 0, 7, 4], [0, 0, 0, 8]]


@pytest.mark.parametrize(("stride", "offsets"), [(0, (0,)), (1, ()), (1, (1, 2)), (1, (-1, 0))])
def test_layouts_that_are_none_are_refused(stride: int, offsets: tuple[int, ...]) -> None:
    with pytest.raises(TokenizerError, match="expected a stride of at least 1"):
        CodebookLayout(stride, offsets)


def test_unknown_names_and_other_codebooks_are_refused() -> None:
    with pytest.raises(TokenizerError, match="expected one of flattened, delayed, parallel"):
        CodebookLayout.of("spiral", 2)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=r"expected \(..., 2\) codebooks"):
        CodebookLayout.of("delayed", 2).arrange(torch.zeros(3, 4, dtype=torch.int64), fill=0)
