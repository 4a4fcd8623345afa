"""What the judges of speech and video answer to validation originals, and to what says or shows nothing.

    omniform bench judges

Reads runs/demo/data. What a judge is right on must be little where there is nothing to be right about: such are sounds
without words, words backwards, frames in disorder, and the answers to other items.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omniform.data.handwritten_digits import SPLIT_ROWS, load_digit_images
from omniform.data.shards import ShardReader
from omniform.inference.judges import DIGIT_WORDS, MOTIONS, NO_ANSWER
from omniform.inference.speech_judge import SAMPLE_RATE, SpeechJudge
from omniform.inference.video_judge import VideoJudge
from omniform.page import percent, text_columns
from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.video_files import read_video

WORLD = Path("runs/demo/data")
N_SOUNDS = 60
NOISES = (0.01, 0.03, 0.1, 0.3)
N_DEALS = 100
Answers = npt.NDArray[np.int64]


def run() -> dict[str, Any]:
    """Return {"rows": what each judge answers to each kind of item}, and `text` that shows it as a table."""
    torch.set_num_threads(1)
    rows = [*speech_rows(), *video_rows()]
    head = ("judge", "items", "n", "right", "no answer", "most frequent answers")
    shown = [
        (
            row["judge"],
            row["items"],
            str(row["n"]),
            "-" if row["right"] is None else f"{row['right']:.0f} ({percent(row['right'] / row['n'], 0)})",
            str(row["none"]),
            ", ".join(f"{name} {count}" for name, count in row["frequent"]),
        )
        for row in rows
    ]
    return {"rows": rows, "text": "\n".join(line.rstrip() for line in text_columns([head, *shown]))}


def speech_rows() -> list[dict[str, Any]]:
    """Return the answers to words and phrases, to what is made of N_SOUNDS words, and to sounds without words."""
    judge, random = SpeechJudge(), torch.Generator().manual_seed(0)
    words, right = speech("validation-speech")
    phrases, said = speech("validation-moving-concepts")
    moved = np.array([MOTIONS.index(sample["motion"]) for sample in said])
    digits = np.array([sample["digit"] for sample in right])
    answers = judge.predict(words)
    some = np.linspace(0, len(words) - 1, N_SOUNDS).round().astype(int)
    disorder = [words[n][torch.randperm(len(words[n]), generator=random)] for n in some]
    named, motions = judge.predict_phrases(phrases)
    noise = {f"noise of {level}": [level * white(len(words[n]), random) for n in some] for level in NOISES}
    return [
        answered("speech", "words", answers, digits, DIGIT_WORDS),
        answered("speech", "phrases", named, np.array([sample["digit"] for sample in said]), DIGIT_WORDS),
        answered("speech, motion", "phrases", motions, moved, MOTIONS),
        dealt("speech", answers, digits, DIGIT_WORDS),
        answered("speech", "words backwards", judge.predict([words[n].flip(0) for n in some]), digits[some]),
        answered("speech", "samples in disorder", judge.predict(disorder), digits[some]),
        answered("speech", "silence", judge.predict([torch.zeros(len(words[n])) for n in some])),
        *(answered("speech", name, judge.predict(sounds)) for name, sounds in noise.items()),
    ]


def video_rows() -> list[dict[str, Any]]:
    """Return the answers to videos, and to those of black, of noise, and with their frames in disorder."""
    images, labels = load_digit_images()
    train = SPLIT_ROWS["train"]
    judge, random = VideoJudge.fit(images[train] / 127.5 - 1, labels[train]), torch.Generator().manual_seed(0)
    samples = list(ShardReader(WORLD / "validation-video"))
    videos = [
        torch.from_numpy(read_video(span.payload, fps=None, max_frames=64).frames).permute(3, 0, 1, 2) / 127.5 - 1
        for sample in samples
        for span in sample.spans
        if span.modality == "video" and span.payload is not None
    ]
    digits = np.array([sample.metadata["digit"] for sample in samples])
    motions = np.array([MOTIONS.index(sample.metadata["motion"]) for sample in samples])
    kinds = {
        "videos": videos,
        "frames in disorder": [item[:, torch.randperm(item.shape[1], generator=random)] for item in videos],
        "black": [torch.full_like(item, -1) for item in videos[:N_SOUNDS]],
        "noise": [torch.randn(item.shape, generator=random).clamp(-1, 1) for item in videos[:N_SOUNDS]],
    }
    rows = []
    for name, items in kinds.items():
        shown, moves = judge.predict(items)
        known = name in ("videos", "frames in disorder")
        rows += [
            answered("video", name, shown, digits if known else None, DIGIT_WORDS),
            answered("video, motion", name, moves, motions if known else None, MOTIONS),
        ]
        if name == "videos":
            rows += [dealt("video", shown, digits, DIGIT_WORDS), dealt("video, motion", moves, motions, MOTIONS)]
    return rows


def speech(folder: str) -> tuple[list[Tensor], list[Any]]:
    """Return the sounds of a folder of the world, and what their samples say of them."""
    samples = list(ShardReader(WORLD / folder))
    sounds = [
        read_audio(span.payload, SAMPLE_RATE)
        for sample in samples
        for span in sample.spans
        if span.modality == "speech" and span.payload is not None
    ]
    return sounds, [sample.metadata for sample in samples]


def white(length: int, random: torch.Generator) -> Tensor:
    """Return Gaussian noise of variance 1."""
    return torch.randn(length, generator=random)


def answered(
    judge: str, items: str, answers: Answers, right: Answers | None = None, names: Sequence[str] = DIGIT_WORDS
) -> dict[str, Any]:
    """Return how many answers are right, where there is a right one, how many items have none, and the frequent."""
    given = Counter(answers[answers != NO_ANSWER].tolist()).most_common(3)
    return {
        "judge": judge,
        "items": items,
        "n": len(answers),
        "right": None if right is None else int((answers == right).sum()),
        "none": int((answers == NO_ANSWER).sum()),
        "frequent": [(names[answer], count) for answer, count in given],
    }


def dealt(judge: str, answers: Answers, right: Answers, names: Sequence[str]) -> dict[str, Any]:
    """Return the same with the answers dealt out to other items, the mean of N_DEALS deals."""
    random = np.random.default_rng(0)
    hits = np.mean([(random.permutation(answers) == right).sum() for _ in range(N_DEALS)])
    return {**answered(judge, "answers to others", answers, None, names), "right": float(hits)}


if __name__ == "__main__":
    print(run()["text"])
