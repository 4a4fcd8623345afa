"""The video judge on moving drawings of held-out writers, and on what shows nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniform.data.handwritten_digits import SPLIT_ROWS, load_digit_images, rows_by_digit
from omniform.data.moving_digits import Clip, draw_clip, plan_clips
from omniform.errors import OmniformError
from omniform.inference.judges import MOTIONS, NO_ANSWER
from omniform.inference.video_judge import STILL_BELOW, VideoJudge, _centroid, _cut, _motion

IMAGES, LABELS = load_digit_images()
BLACK = torch.full((1, 9, 32, 32), -1.0)


@pytest.fixture(scope="module")
def judge() -> VideoJudge:
    rows = SPLIT_ROWS["train"]
    return VideoJudge.fit(IMAGES[rows] / np.float32(127.5) - 1, LABELS[rows])


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return plan_clips(rows_by_digit(LABELS, "validation"), "validation", 0, 1, 2)


def moving(clip: Clip) -> Tensor:
    return torch.from_numpy(draw_clip(IMAGES[clip.row], clip)).permute(3, 0, 1, 2) / 127.5 - 1


def shares(judge: VideoJudge, items: list[Tensor], clips: list[Clip]) -> tuple[float, float]:
    digits, motions = judge.predict(items)
    return (
        float(np.mean(digits == [clip.digit for clip in clips])),
        float(np.mean(motions == [MOTIONS.index(clip.motion) for clip in clips])),
    )


def test_digits_and_motions_of_held_out_writers(judge: VideoJudge, clips: list[Clip]) -> None:
    items = [moving(clip) for clip in clips]
    assert shares(judge, items, clips) == (1, 1)
    random = torch.Generator().manual_seed(0)
    noisy = [item + 0.3 * torch.randn(item.shape, generator=random) for item in items]
    assert min(shares(judge, noisy, clips)) > 0.98
    disordered = [item[:, torch.randperm(9, generator=random)] for item in items]
    digit, motion = shares(judge, disordered, clips)
    assert digit == 1
    assert motion < 0.5
    digit, motion = shares(judge, items[7:] + items[:7], clips)  # each with another's label
    assert max(digit, motion) < 0.4


def test_what_shows_nothing_has_no_answer(judge: VideoJudge) -> None:
    digits, motions = judge.predict([BLACK, BLACK[:, :0], BLACK + 0.4])
    assert digits.tolist() == motions.tolist() == [NO_ANSWER] * 3


def test_noise_stands_still_and_is_always_the_same_digit(judge: VideoJudge) -> None:
    random = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 9, 32, 32, generator=random).clamp(-1, 1) for _ in range(8)]
    digits, motions = judge.predict(noise)
    assert len(set(digits.tolist())) == 1
    assert set(motions.tolist()) == {MOTIONS.index("still")}


def test_frames_without_ink_have_no_say(judge: VideoJudge, clips: list[Clip]) -> None:
    item = moving(clips[-1])
    item[:, 2:8] = -1
    assert shares(judge, [item], clips[-1:]) == (1, 1)
    alone = BLACK.clone()
    alone[:, 4] = item[:, 0]
    digits, motions = judge.predict([alone, item[:, :1]])
    assert digits.tolist() == [clips[-1].digit] * 2
    assert motions.tolist() == [NO_ANSWER, MOTIONS.index("still")]


def test_of_tied_digits_the_first_seen_counts(judge: VideoJudge) -> None:
    a, b = (int(rows_by_digit(LABELS, "train")[digit][0]) for digit in (7, 3))
    item = BLACK[:, :4].clone()
    for time, row in enumerate((a, b, b, a)):
        item[0, time, 8:24, 8:24] = torch.from_numpy(IMAGES[row] / np.float32(127.5) - 1)
    assert judge.predict([item])[0].tolist() == [7]


@given(
    velocity=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    start=st.tuples(st.floats(0, 31), st.floats(0, 31)),
    times=st.sets(st.integers(0, 20), min_size=2),
)
def test_the_motion_is_that_of_a_straight_path(
    velocity: tuple[float, float], start: tuple[float, float], times: set[int]
) -> None:
    down, right = velocity
    if abs(abs(down) - abs(right)) < 1e-6 or abs(max(abs(down), abs(right)) - STILL_BELOW) < 1e-6:
        return
    path = {time: np.array(start) + time * np.array(velocity) for time in times}
    expected = "still"
    if max(abs(down), abs(right)) > STILL_BELOW:
        expected = ("down" if down > 0 else "up") if abs(down) > abs(right) else "right" if right > 0 else "left"
    assert MOTIONS[_motion(path, 21)] == expected


@given(row=st.sampled_from(SPLIT_ROWS["test"]), top=st.integers(0, 32), left=st.integers(0, 32))
def test_a_drawing_is_cut_out_alike_wherever_it_lies(row: int, top: int, left: int) -> None:
    field = np.full((48, 48), -1.0)
    field[top : top + 16, left : left + 16] = IMAGES[row] / 127.5 - 1
    centroid = _centroid(field)
    assert centroid is not None
    drawing = IMAGES[row] / 127.5 - 1
    at_home = _centroid(drawing)
    assert at_home is not None
    assert centroid == pytest.approx(at_home + np.array([top, left]))
    if np.abs(centroid + 0.5 - np.round(centroid + 0.5)).max() < 0.49:  # no tie between two centres
        assert np.array_equal(_cut(field, centroid), _cut(drawing, at_home))


def test_other_shapes_are_refused(judge: VideoJudge) -> None:
    with pytest.raises(OmniformError, match=r"expected \(C, T, H, W\)"):
        judge.predict([BLACK[0]])
    with pytest.raises(OmniformError, match="picture 1 shows no ink"):
        VideoJudge.fit(np.stack([IMAGES[0] / 127.5 - 1, np.full((16, 16), -1.0)]), np.array([0, 1]))
