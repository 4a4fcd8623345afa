"""The tokenizers that Omniform knows. A new one is a file beside this one and an entry here."""

from pathlib import Path
from typing import Any

from omniform.tokenizers.base import Modality, TokenizerError
from omniform.tokenizers.folder import read_kind
from omniform.tokenizers.image import ImageTokenizer
from omniform.tokenizers.image_latents import ImageLatentsTokenizer, ImagePatchesTokenizer
from omniform.tokenizers.locations import LocationTokenizer
from omniform.tokenizers.speech import SpeechTokenizer
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video import VideoTokenizer

_KNOWN: tuple[type[Modality[Any]], ...] = (
    SentencePieceTokenizer,
    ImageTokenizer,
    ImageLatentsTokenizer,
    ImagePatchesTokenizer,
    SpeechTokenizer,
    VideoTokenizer,
    LocationTokenizer,
)
MODALITIES = {cls.kind: cls for cls in _KNOWN}


def load_modality(folder: str | Path) -> Modality[Any]:
    """Read the tokenizer in `folder`, or in the `tokenizer` folder of the run that trained it, whichever kind it is.

    Raises:
        TokenizerError: no tokenizer there, an unknown kind, or a damaged file.
    """
    folder = Path(folder)
    if (folder / "tokenizer").is_dir():
        folder /= "tokenizer"
    kind = read_kind(folder)
    if kind not in MODALITIES:
        raise TokenizerError(f"{folder} holds a tokenizer of kind {kind!r}, expected one of {sorted(MODALITIES)}")
    return MODALITIES[kind].load(folder)
