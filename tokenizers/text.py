"""Text <-> ids of a SentencePiece model, without loss for any text."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from omniform.tokenizers.base import Discrete, Modality, TokenizerError, Tokens
from omniform.tokenizers.folder import read_tokenizer_folder, write_tokenizer_folder

MAX_TEXT_BYTES = 2**20
_ESCAPED_SPACE = "▁"  # SentencePiece writes a space so, and so cannot tell it from this very character
_PAYLOAD = "sentencepiece.model"


class SentencePieceTokenizer(Modality):
    """Subwords learnt from text, and the 256 bytes for everything else.

    Text is not normalised, and nothing is added to it: decode(encode(text)) == text for every string that UTF-8 can
    hold. The model has no control symbols, so no text makes an id that means more than text. Id 0, "unknown", is never
    made from text, because every byte has an id; it decodes to U+FFFD, as do bytes that are not UTF-8.

    Source: SentencePiece (Kudo and Richardson 2018), arXiv:1808.06226; byte fallback as in its 0.1.9 and later.

    Args:
        model: a serialised SentencePiece model.

    Raises:
        TokenizerError: the model cannot be read, lacks byte pieces, or has control or user-defined symbols.
    """

    kind = "sentencepiece"
    name = "text"

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"{len(model)} bytes are not a SentencePiece model: {error}") from error
        self._model, self._processor = model, processor
        self._bytes_of_id: list[bytes] = []
        for token_id in range(processor.get_piece_size()):
            piece = processor.id_to_piece(token_id)
            if processor.is_control(token_id):
                raise TokenizerError(f"the SentencePiece model has the control symbol {piece!r}, expected none")
            if processor.is_byte(token_id):
                self._bytes_of_id.append(bytes([int(piece[1:-1], 16)]))
            elif processor.is_unknown(token_id):
                self._bytes_of_id.append("\ufffd".encode())
            else:
                self._bytes_of_id.append(piece.replace(_ESCAPED_SPACE, " ").encode())
        byte_ids = [processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        if not all(processor.is_byte(token_id) for token_id in byte_ids):
            raise TokenizerError("the SentencePiece model lacks byte pieces: train it with byte_fallback")
        self._escaped_space_ids = [byte_ids[value] for value in _ESCAPED_SPACE.encode()]
        self.representation = Discrete(len(self._bytes_of_id))

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int, algorithm: Literal["bpe", "unigram"] = "bpe"
    ) -> "SentencePieceTokenizer":
        """Learn a vocabulary; the same texts and versions give the same model to the bit.

        Args:
            texts: each is learnt from line by line.
            vocab_size: with the 256 bytes and "unknown".

        Raises:
            TokenizerError: there is too little text for so many ids, or too few ids for the characters of the text.
        """
        from sentencepiece import SentencePieceTrainer

        lines = [line for text in texts for line in text.splitlines() if line.strip()]
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=algorithm,
                character_coverage=1.0,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                unk_id=0,
                max_sentence_length=MAX_TEXT_BYTES,
                num_threads=1,  # more would make the result depend on their timing
                minloglevel=2,
            )
        except RuntimeError as error:
            raise TokenizerError(
                f"SentencePiece cannot learn {vocab_size} ids from {len(lines)} lines of text: {error}; "
                "change vocab_size or give other text"
            ) from error
        return cls(model.getvalue())

    @property
    def fixed_grid(self) -> None:
        """Text ends itself."""
        return None

    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Turn strings into ids.

        Raises:
            TokenizerError: an item is no string, or holds half of a surrogate pair, which is no text.
        """
        return [self._encode(item) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[str]:
        """Turn ids into strings.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        return [self._decode(entry.codes.tolist()) for entry in tokens]

    def read(self, payload: bytes) -> str:
        """Decode UTF-8.

        Raises:
            TokenizerError: it is not UTF-8, or longer than MAX_TEXT_BYTES.
        """
        if len(payload) > MAX_TEXT_BYTES:
            raise TokenizerError(f"a text of {len(payload)} bytes is too long, expected at most {MAX_TEXT_BYTES}")
        try:
            return payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"a text of {len(payload)} bytes is not UTF-8: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the SentencePiece model and config.json."""
        write_tokenizer_folder(folder, self.kind, {}, (_PAYLOAD, self._model))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        _, model = read_tokenizer_folder(folder, cls.kind)
        return cls(model)

    def _encode(self, text: object) -> Tokens:
        if not isinstance(text, str):
            raise TokenizerError(f"text is a {type(text).__name__}, expected a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text at position {error.start} is no character: {error.reason}") from error
        first, *others = self._processor.encode(text.split(_ESCAPED_SPACE))
        ids = list(first)
        for segment in others:
            ids += self._escaped_space_ids
            ids += segment
        return Tokens(torch.tensor(ids, dtype=torch.int64), (len(ids),))

    def _decode(self, ids: list[int]) -> str:
        size = len(self._bytes_of_id)
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise TokenizerError(f"ids of text span [{min(ids)}, {max(ids)}], expected [0, {size - 1}]")
        return b"".join(self._bytes_of_id[token_id] for token_id in ids).decode("utf-8", errors="replace")
