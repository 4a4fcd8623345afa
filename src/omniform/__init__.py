"""Omniform: one decoder transformer for every modality.

The public API is `load`, the `Model` that it returns, and the typed parts of a reply. Everything else may change.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ImagePart", "Model", "OmniformError", "Reply", "TextPart", "load"]

if TYPE_CHECKING:
    from omniform.errors import OmniformError
    from omniform.inference.generate import Model, load
    from omniform.inference.protocol import ImagePart, Reply, TextPart

_HOMES = {
    "load": "omniform.inference.generate",
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
