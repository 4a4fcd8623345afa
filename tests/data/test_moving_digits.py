"""Moving digits stay on their field and go where their motion says; some pairs are kept from training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniform.data.moving_digits import (
    FIELD_SIZE,
    HELD_OUT_PAIRS,
    N_FRAMES,
    SPEEDS,
    START_STEP,
    draw_clip,
    following,
    pairs_of,
    plan_clips,
)
from omniform.data.templates import MOTIONS

ROWS = [[3 * digit, 3 * digit + 1, 3 * digit + 2] for digit in range(10)]
# What a motion does to the centre, right and down.
SIGNS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@given(st.sampled_from(["train", "validation", "test"]), st.integers(0, 2**63 - 1), st.integers(1, 16))
def test_every_clip_moves_as_it_says_and_stays_on_the_field(split: str, seed: int, copies: int) -> None:
    drawing = np.random.default_rng(seed).integers(1, 256, (16, 16)).astype(np.uint8)
    clips = plan_clips(ROWS, split, seed, copies, 1)
    assert [(clip.digit, clip.motion) for clip in clips] == pairs_of(split)
    for clip in clips:
        assert clip.row in ROWS[clip.digit]
        assert 0 <= clip.copy < copies
        frames = draw_clip(drawing, clip)[..., 0].astype(np.float64)
        assert frames.shape == (N_FRAMES, FIELD_SIZE, FIELD_SIZE)
        # Nothing of the drawing is ever cut off.
        assert (frames.sum((1, 2)) == drawing.sum(dtype=np.int64)).all()
        down, right = np.indices(frames.shape[1:])
        path = np.stack([(frames * right).sum((1, 2)), (frames * down).sum((1, 2))], 1) / frames.sum((1, 2))[:, None]
        assert clip.speed in ((0,) if clip.motion == "still" else SPEEDS)
        expected = clip.speed * np.array(SIGNS[clip.motion])
        np.testing.assert_allclose(np.diff(path, axis=0), np.broadcast_to(expected, (N_FRAMES - 1, 2)), atol=1e-9)


def test_starts_and_speeds_differ_and_are_a_function_of_the_seed() -> None:
    clips = plan_clips(ROWS, "train", 0, 4, 30)
    assert clips == plan_clips(ROWS, "train", 0, 4, 30)
    assert clips != plan_clips(ROWS, "train", 1, 4, 30)
    # More clips leave the first ones as they are.
    assert [clip for place, clip in enumerate(clips) if place % 30 < 10] == plan_clips(ROWS, "train", 0, 4, 10)
    for motion in MOTIONS:
        moved = [clip for clip in clips if clip.motion == motion]
        assert {clip.speed for clip in moved} == ({0} if motion == "still" else set(SPEEDS))
        assert {clip.copy for clip in moved} == set(range(4))
        # In the middle, or at the edge that leaves room for the way.
        assert len({clip.start for clip in moved}) == (1 if motion == "still" else 2)
        assert not any(place % START_STEP for clip in moved for place in clip.start)


@given(st.integers(0, 2**63 - 1))
def test_a_following_clip_begins_with_the_last_frame_and_stays_on_the_field(seed: int) -> None:
    drawing = np.random.default_rng(seed).integers(1, 256, (16, 16)).astype(np.uint8)
    for clip in plan_clips(ROWS, "train", seed, 2, 1, in_a_row=2):
        first, second = draw_clip(drawing, clip), draw_clip(drawing, following(clip))
        np.testing.assert_array_equal(second[0], first[-1])
        assert (second.sum((1, 2, 3)) == drawing.sum(dtype=np.int64)).all()
        assert following(clip).speed == clip.speed == (clip.motion != "still")


def test_pairs_that_are_held_out_are_seen_by_their_split_alone() -> None:
    splits = {split: set(pairs_of(split)) for split in ("train", "validation", "test")}
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 40, "validation": 45, "test": 45}
    assert splits["validation"] - splits["train"] == set(HELD_OUT_PAIRS["validation"])
    assert splits["test"] - splits["train"] == set(HELD_OUT_PAIRS["test"])
    assert not set(HELD_OUT_PAIRS["validation"]) & splits["test"]
    assert not set(HELD_OUT_PAIRS["test"]) & splits["validation"]
    # Every digit and every motion is learnt in other company.
    assert {digit for digit, _ in splits["train"]} == set(range(10))
    assert {motion for _, motion in splits["train"]} == set(MOTIONS)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_each_motion_is_held_out_once(split: str) -> None:
    assert sorted(motion for _, motion in HELD_OUT_PAIRS[split]) == sorted(MOTIONS)
