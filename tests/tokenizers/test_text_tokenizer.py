"""The text tokenizer loses nothing, means nothing but text, and is the same each time it is learnt."""

import io
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from omniform.tokenizers.base import TokenizerError, Tokens
from omniform.tokenizers.text import MAX_TEXT_BYTES, SentencePieceTokenizer

CORPUS = ["a handwritten seven", "the digit 3", *topics["integers"].splitlines(), *topics["strings"].splitlines()]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(CORPUS, vocab_size=400, algorithm=request.param)


@given(text=st.text(max_size=60))
@example(text="")
@example(text="  two  spaces,\n\na tab\t and one at the end ")
@example(text="▁ and ▁▁ are characters, not spaces▁")
@example(text="<unk> <s> </s> <pad> <0x41> <|end|>")
@example(text="\0\ufeff\ufffd\u2028e\u0301 é 日本語 \U0001f600")
def test_every_text_comes_back_exactly(tokenizer: SentencePieceTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.grid == (len(tokens.codes),)
    assert tokenizer.decode(tokens) == text


@given(text=st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=40))
def test_ids_are_those_of_sentencepiece(tokenizer: SentencePieceTokenizer, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._model)
    assert tokenizer.encode(text).codes.tolist() == processor.encode(text)


@given(text=st.text(max_size=60) | st.sampled_from(["<unk>", "<s>", "</s>", "<0x00>", "▁"]))
def test_text_makes_only_ids_that_mean_text(tokenizer: SentencePieceTokenizer, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._model)
    for token_id in tokenizer.encode(text).codes.tolist():
        assert not processor.is_control(token_id)
        assert not processor.is_unknown(token_id)


def test_learning_twice_gives_the_same_model(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        SentencePieceTokenizer.train(CORPUS, vocab_size=400).save(tmp_path / name)
    for file in ("config.json", "sentencepiece.model"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saved_and_loaded_it_is_the_same(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = SentencePieceTokenizer.load(tmp_path)
    assert loaded.representation == tokenizer.representation
    assert loaded.encode(topics["strings"]).codes.equal(tokenizer.encode(topics["strings"]).codes)


def test_ids_that_are_no_text_decode_to_the_replacement_character(tokenizer: SentencePieceTokenizer) -> None:
    half = tokenizer.encode("日").codes[:1]
    assert tokenizer.decode(Tokens(half, (1,))) == "\ufffd"
    assert tokenizer.decode(Tokens(torch.tensor([0]), (1,))) == "\ufffd"


def test_ids_outside_the_vocabulary_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    for token_id in (-1, 400):
        with pytest.raises(TokenizerError, match=r"expected \[0, 399\]"):
            tokenizer.decode(Tokens(torch.tensor([token_id]), (1,)))


def test_what_is_no_text_is_refused(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(TokenizerError, match="position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TokenizerError, match="int, expected a string"):
        tokenizer.encode(7)
    with pytest.raises(TokenizerError, match="not UTF-8"):
        tokenizer.read(b"\xff")
    with pytest.raises(TokenizerError, match="too long"):
        tokenizer.read(b"a" * (MAX_TEXT_BYTES + 1))
    assert tokenizer.read("é".encode()) == "é"


def test_a_model_with_control_symbols_or_without_bytes_is_refused() -> None:
    for settings, message in (({"byte_fallback": True}, "control symbol"), ({"bos_id": -1, "eos_id": -1}, "byte")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=400, minloglevel=2, **settings
        )
        with pytest.raises(TokenizerError, match=message):
            SentencePieceTokenizer(model.getvalue())


def test_too_little_text_for_the_vocabulary_is_an_error_that_says_so() -> None:
    with pytest.raises(TokenizerError, match="cannot learn 5000 ids from 2 lines"):
        SentencePieceTokenizer.train(["one\ntwo"], vocab_size=5000)
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"nothing of the kind")
