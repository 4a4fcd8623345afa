"""Omniform: one decoder transformer for every modality.

The public API is `load`, the `Model` that it returns, the typed parts of a reply, and `outpaint`, which prepares a
picture to be continued beyond its edges. Everything else may change.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ImagePart", "Model", "OmniformError", "Reply", "TextPart", "load", "outpaint"]

if TYPE_CHECKING:
    from omniform.errors import OmniformError
    from omniform.inference.editing import outpaint
    from omniform.inference.generate import Model, load
    from omniform.inference.protocol import ImagePart, Reply, TextPart

_HOMES = {
    "load": "omniform.inference.generate",
    "outpaint": "omniform.inference.editing",
    "Model": "omniform.inference.generate",
    "Reply": "omniform.inference.protocol",
    "TextPart": "omniform.inference.protocol",
    "ImagePart": "omniform.inference.protocol",
    "OmniformError": "omniform.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import omniform` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'omniform' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
