"""What comes back of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omniform.inference.reconstruction.base import Reconstruction


class TextReconstruction(Reconstruction):
    """Texts, which should come back as they were."""

    distortion_name = "changed"

    def figures(self) -> dict[str, Any]:
        """Return characters per token, and the fraction of texts that come back exactly."""
        n_tokens = sum(entry.grid[0] for entry in self.tokens)
        return {
            "characters_per_token": sum(map(len, self.before)) / max(1, n_tokens),
            "exact": float(1 - self.distortions().mean()),
        }

    def distortions(self) -> npt.NDArray[np.float64]:
        """Return 1 for each text that has changed."""
        return np.array([a != b for a, b in zip(self.before, self.after, strict=True)], dtype=np.float64)

    def write_example(self, place: int, stem: Path) -> dict[str, str]:
        """Return both texts; nothing is written."""
        return {"before_text": self.before[place], "after_text": self.after[place]}

    def write_comparison(self, places: Sequence[int], stem: Path) -> list[Path]:
        """Write nothing: examples show texts whole."""
        return []
