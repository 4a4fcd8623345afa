"""What comes back of videos."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from omniform.inference.judges import MOTIONS, at_judged_size
from omniform.inference.reconstruction.base import Reconstruction, TrainPictures, mean_figure
from omniform.inference.reconstruction.judged import JUDGE, Answers
from omniform.inference.reconstruction.pictures import psnr, ssim
from omniform.inference.video_judge import VideoJudge
from omniform.tokenizers.image_files import read_picture


class VideoReconstruction(Reconstruction):
    """Videos, compared in grey: the mean over channels."""

    groups = ("motion",)
    distortion_name = "negative_psnr_db"

    def figures(self) -> dict[str, Any]:
        """Return rates per second and pixel, and means over items, in dB: PSNR, of all frames and of first ones; SSIM
        of frames; and the PSNR of differences between frames, which says how well motion is kept and what flickers."""
        tokenizer: Any = self.tokenizer
        n_frames = sum(item.shape[1] for item in self.before)
        seconds = n_frames / tokenizer.config.fps
        n_tokens = self.rates["tokens_per_item"] * len(self.before)
        bits = self.rates["bits_per_item"] * len(self.before)
        return {
            "fps": tokenizer.config.fps,
            "frames_per_item": n_frames / len(self.before),
            "tokens_per_second": n_tokens / seconds,
            "bits_per_second": bits / seconds,
            "bits_per_pixel": bits / sum(frames.size for frames, _ in self._pairs),
            **mean_figure("psnr_db", -self.distortions()),
            **mean_figure("psnr_first_frame_db", [psnr(a[0], b[0]) for a, b in self._pairs]),
            **mean_figure(
                "psnr_differences_db",
                [psnr(np.diff(a, axis=0), np.diff(b, axis=0), 4.0) for a, b in self._pairs if len(a) > 1],
            ),
            "ssim": float(np.mean([ssim(*frames) for pair in self._pairs for frames in zip(*pair, strict=True)])),
        }

    def distortions(self) -> npt.NDArray[np.float64]:
        """Return the PSNR of each item, over all of its pixels, with its sign turned."""
        return np.array([-psnr(a, b) for a, b in self._pairs])

    @staticmethod
    def source(about: Mapping[str, Any]) -> Any:
        """Return the row of the drawing that moves; a picture beside the video may be another."""
        return about.get("clip", about).get("row")

    def answers(self, train_pictures: TrainPictures) -> dict[str, Answers]:
        """Return the digits, and the motions where all samples say one, of a judge fitted on the train pictures."""
        pictures, digits = train_pictures(lambda payload: np.asarray(read_picture(payload, "L")) / 127.5 - 1, False)
        judge = VideoJudge.fit(at_judged_size(np.stack(pictures)), digits)
        (before, moves_before), (after, moves_after) = (judge.predict(items) for items in (self.before, self.after))
        answers = {JUDGE: Answers(before, after, self.digits)}
        motions = [entry.get("motion") for entry in self.about]
        if all(motion in MOTIONS for motion in motions):
            right = np.array([MOTIONS.index(motion) for motion in motions])
            answers["motion_judge"] = Answers(moves_before, moves_after, right, MOTIONS)
        return answers

    def write_example(self, place: int, stem: Path) -> dict[str, str]:
        """Write one film, with the item to the left of what came back."""
        (path,) = self.write_comparison([place], stem)
        return {"picture": path.name}

    @cached_property
    def _pairs(self) -> list[tuple[Float[np.ndarray, "T H W"], Float[np.ndarray, "T H W"]]]:
        return [(a.mean(0).numpy(), b.mean(0).numpy()) for a, b in zip(self.before, self.after, strict=True)]
