"""Omniform: one decoder transformer for every modality.

The public API is `load`, the `Model` that it returns, the typed parts of prompts and replies with the sounds (`Audio`)
and moving pictures (`Video`) that they hold, `read_part` and `write_part` for their files, and `outpaint`, which
prepares a picture to be continued beyond its edges. Everything else may change.
"""

import os
from typing import TYPE_CHECKING, Any

# PyTorch and oneDNN keep the matrix products that they have compiled on a CPU, one per shape, each with memory of its
# own. Packed rows give new shapes in every step: with the default of 1024 a training run grows by gigabytes, and spends
# its time on fresh pages. They are read at the first product; what is set already stands.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "256")

__version__ = "0.1.0"
__all__ = [
    "Audio",
    "DataPart",
    "ImagePart",
    "Model",
    "OmniformError",
    "Reply",
    "SpeechPart",
    "TextPart",
    "Video",
    "VideoPart",
    "load",
    "outpaint",
    "read_part",
    "write_part",
]

if TYPE_CHECKING:
    from omniform.errors import OmniformError
    from omniform.inference.editing import outpaint
    from omniform.inference.generate import Model, load
    from omniform.inference.part_files import read_part, write_part
    from omniform.inference.protocol import DataPart, ImagePart, Reply, SpeechPart, TextPart, VideoPart
    from omniform.tokenizers.audio_files import Audio
    from omniform.tokenizers.video_files import Video

_HOMES = {
    "load": "omniform.inference.generate",
    "outpaint": "omniform.inference.editing",
    "read_part": "omniform.inference.part_files",
    "write_part": "omniform.inference.part_files",
    "Model": "omniform.inference.generate",
    "Reply": "omniform.inference.protocol",
    "TextPart": "omniform.inference.protocol",
    "ImagePart": "omniform.inference.protocol",
    "SpeechPart": "omniform.inference.protocol",
    "VideoPart": "omniform.inference.protocol",
    "DataPart": "omniform.inference.protocol",
    "Audio": "omniform.tokenizers.audio_files",
    "Video": "omniform.tokenizers.video_files",
    "OmniformError": "omniform.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import omniform` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'omniform' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
