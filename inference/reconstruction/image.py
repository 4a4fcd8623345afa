"""What comes back of images."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from omniform.inference.judges import DigitImageJudge
from omniform.inference.reconstruction.base import Reconstruction, TrainPictures, mean_figure
from omniform.inference.reconstruction.judged import JUDGE, Answers
from omniform.inference.reconstruction.pictures import psnr, ssim


class ImageReconstruction(Reconstruction):
    """Images, compared in grey: the mean over channels."""

    distortion_name = "negative_psnr_db"

    def figures(self) -> dict[str, Any]:
        """Return bits per pixel of codes, and mean PSNR in dB and mean SSIM over items."""
        pairs = list(zip(*self._gray, strict=True))
        bits = self.rates.get("bits_per_item")
        rate = {} if bits is None else {"bits_per_pixel": bits / self._gray[0][0].size}
        return {
            **rate,
            **mean_figure("psnr_db", -self.distortions()),
            "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
        }

    def distortions(self) -> npt.NDArray[np.float64]:
        """Return the PSNR of each item with its sign turned."""
        return np.array([-psnr(a, b) for a, b in zip(*self._gray, strict=True)])

    @staticmethod
    def source(about: Mapping[str, Any]) -> Any:
        """Return the row of the drawing."""
        return about.get("row")

    def answers(self, train_pictures: TrainPictures) -> dict[str, Answers]:
        """Return the answers of a judge that is fitted on the train images, as the tokenizer reads them."""
        images, digits = train_pictures(self.tokenizer.read, True)
        judge = DigitImageJudge.fit(_gray(images), digits)
        before, after = self._gray
        return {JUDGE: Answers(judge.predict(before), judge.predict(after), self.digits)}

    def write_example(self, place: int, stem: Path) -> dict[str, str]:
        """Write one picture, with the item above what came back."""
        (path,) = self.write_comparison([place], stem)
        return {"picture": path.name}

    @cached_property
    def _gray(self) -> tuple[Float[np.ndarray, "N H W"], Float[np.ndarray, "N H W"]]:
        return _gray(self.before), _gray(self.after)


def _gray(images: Sequence[Tensor]) -> Float[np.ndarray, "N H W"]:
    return torch.stack(list(images)).mean(1).numpy()
