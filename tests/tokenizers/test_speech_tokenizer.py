"""Speech in chunks: the codes of the whole whatever the chunks, from windows that show all that a code depends on."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Shaped
from pydantic import ValidationError
from torch import Tensor

from omniform.tokenizers.audio_files import Audio, audio_bytes
from omniform.tokenizers.base import TokenizerError, Tokens
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.codecs.speech_decoder import STFTHeadConfig, WaveformHeadConfig
from omniform.tokenizers.codecs.speech_encoder import MelStemConfig, WaveformStemConfig
from omniform.tokenizers.codecs.vq import VQEMAConfig
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig

FRAME = 40
SPECTRAL = SpeechTokenizerConfig(
    frame_samples=FRAME,
    width=8,
    n_blocks=1,
    encoder=MelStemConfig(hop=8, n_mels=6, width=8, n_blocks=1),
    decoder=STFTHeadConfig(hop=10, width=8, n_blocks=1),
    quantizer=FSQConfig(levels=(5, 5)),
    window=4,
)
SAMPLED = SpeechTokenizerConfig(
    frame_samples=FRAME,
    width=8,
    n_blocks=2,
    encoder=WaveformStemConfig(strides=(2, 5, 4), width=2),
    decoder=WaveformHeadConfig(strides=(4, 5, 2), width=2),
    quantizer=ResidualConfig(depth=3, base=VQEMAConfig(codebook_size=8, dim=4), shared=False),
    window=3,
)
BOTH = pytest.mark.parametrize("config", [SPECTRAL, SAMPLED], ids=["spectral", "sampled"])


def tokenizer_of(config: SpeechTokenizerConfig, seed: int = 0) -> SpeechTokenizer:
    torch.manual_seed(seed)
    codec = config.build()
    codec.train()
    for _ in range(3):  # codebooks and norms follow what they see
        codec(noise(16 * FRAME * 4).view(4, 1, -1))
    return SpeechTokenizer(config, codec)


def noise(n_samples: int, seed: int = 0) -> Tensor:
    return torch.rand(n_samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def chunks_of(whole: Shaped[Tensor, "N *S"], cuts: list[int]) -> Iterator[Shaped[Tensor, "n *S"]]:
    bounds = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    for start, stop in pairwise(bounds):
        yield whole[start:stop]


@pytest.fixture(scope="module", params=[SPECTRAL, SAMPLED], ids=["spectral", "sampled"])
def tokenizer(request: pytest.FixtureRequest) -> SpeechTokenizer:
    return tokenizer_of(request.param)


@given(st.integers(1, 40 * FRAME), st.lists(st.integers(0, 10**6), max_size=12))
def test_chunks_of_any_sizes_have_the_codes_of_the_whole_to_the_bit(
    tokenizer: SpeechTokenizer, n_samples: int, cuts: list[int]
) -> None:
    samples = noise(n_samples)
    tokens = tokenizer.encode(samples)
    assert tokens.grid == tokenizer.grid(samples)
    assert tokens.grid[0] == -(-n_samples // FRAME)
    in_chunks = torch.cat(list(tokenizer.encode_stream(chunks_of(samples, cuts))))
    assert torch.equal(in_chunks.flatten(), tokens.codes)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == (tokens.grid[0] * FRAME,)
    codes = tokens.codes.view(tokens.grid)
    assert torch.equal(torch.cat(list(tokenizer.decode_stream(chunks_of(codes, cuts)))), decoded)


def test_codes_do_not_depend_on_the_batch_nor_on_silence_that_follows(tokenizer: SpeechTokenizer) -> None:
    items = [noise(n_samples, seed) for seed, n_samples in enumerate((1, 39, 400, 777, 41))]
    batch = tokenizer.encode_batch(items)
    for item, tokens in zip(items, batch, strict=True):
        assert torch.equal(tokenizer.encode(item).codes, tokens.codes)
        longer = tokenizer.encode(torch.cat([item, torch.zeros(1000)])).codes
        assert torch.equal(longer[: len(tokens.codes)], tokens.codes)
    decoded = tokenizer.decode_batch(batch)
    for tokens, samples in zip(batch, decoded, strict=True):
        assert torch.equal(tokenizer.decode(tokens), samples)


@BOTH
def test_windows_show_all_that_a_latent_and_a_sample_depend_on(config: SpeechTokenizerConfig) -> None:
    """In double precision, where rounding cannot hide what is missing, against one pass over all."""
    codec = tokenizer_of(config).codec.double()
    for module, one_input in ((codec.encoder, FRAME), (codec.decoder, 1)):
        margin = module.margin
        channels = 1 if module is codec.encoder else codec.quantizer.dim
        inputs = torch.randn(1, channels, (40 + 2 * margin) * one_input, dtype=torch.float64)
        whole = module(inputs)
        per_frame = whole.shape[-1] // (40 + 2 * margin)
        for first in (0, 1, 17, 39):
            window = inputs[..., first * one_input : (first + 1 + 2 * margin) * one_input]
            middle = module(window)[..., margin * per_frame : (margin + 1) * per_frame]
            expected = whole[..., (first + margin) * per_frame : (first + margin + 1) * per_frame]
            torch.testing.assert_close(middle, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_samples", [1, FRAME - 1, FRAME, 5000])
@pytest.mark.parametrize("level", [0.0, 1.0, -1.0])
def test_silence_and_full_scale_of_any_length_pass(tokenizer: SpeechTokenizer, n_samples: int, level: float) -> None:
    samples = torch.full((n_samples,), level)
    decoded = tokenizer.decode(tokenizer.encode(samples))
    assert len(decoded) == -(-n_samples // FRAME) * FRAME
    assert decoded.abs().max() <= 1
    if level == 0:
        codes = tokenizer.encode(samples).codes.view(tokenizer.grid(samples))
        assert (codes == codes[0]).all()


def test_an_hour_takes_the_memory_of_a_window(tokenizer: SpeechTokenizer) -> None:
    """Chunk by chunk: no window waits for more than it shows."""
    margin, window = tokenizer.codec.encoder.margin, tokenizer.config.window
    given = 0

    def second_by_second() -> Iterator[Tensor]:
        nonlocal given
        for second in range(30):
            given += 1000
            yield noise(1000, second)

    n_frames = 0
    for codes in tokenizer.encode_stream(second_by_second()):
        n_frames += len(codes)
        assert given - n_frames * FRAME < (margin + window) * FRAME + 1000
    assert n_frames == 30 * 1000 // FRAME


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (torch.zeros(0), "no samples"),
        (torch.tensor([0.0, torch.nan]), "finite values"),
        (torch.tensor([0.0, 1.5]), "finite values"),
        (torch.zeros(1, 100), r"float32 \(N,\)"),
        (torch.zeros(100, dtype=torch.int16), r"int16.*expected float32"),
        ([0.0, 0.5], "list"),
    ],
)
def test_what_is_no_speech_is_refused(tokenizer: SpeechTokenizer, samples: object, said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        tokenizer.encode(samples)


def test_codes_of_another_grid_or_codebook_are_refused(tokenizer: SpeechTokenizer) -> None:
    good = tokenizer.encode(noise(5 * FRAME))
    with pytest.raises(TokenizerError, match="expected \\(T"):
        tokenizer.decode(Tokens(good.codes, (2, 2, 2)))
    with pytest.raises(TokenizerError, match="expected \\(T"):
        tokenizer.decode(Tokens(good.codes[1:], good.grid))
    with pytest.raises(TokenizerError, match="codes span"):
        tokenizer.decode(Tokens(good.codes + 100, good.grid))
    with pytest.raises(TokenizerError, match="at least one frame"):
        list(tokenizer.decode_stream([]))


@given(st.integers(0, 40))
def test_a_generated_run_is_decoded_as_far_as_its_frames_are_whole(tokenizer: SpeechTokenizer, n_codes: int) -> None:
    codes = tokenizer.encode(noise(20 * FRAME)).codes[:n_codes]
    depth = math.prod(tokenizer.grid(noise(1))[1:])
    n_frames = len(codes) // depth
    whole = Tokens(codes[: n_frames * depth], (n_frames, *tokenizer.grid(noise(1))[1:]))
    decoded = tokenizer.decode(Tokens(codes, (len(codes),)))
    assert decoded.shape == (n_frames * FRAME,)
    assert torch.equal(decoded, tokenizer.decode(whole))


def test_a_stored_tokenizer_is_the_same(tokenizer: SpeechTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "speech")
    loaded = load_modality(tmp_path / "speech")
    samples = noise(3000)
    assert torch.equal(loaded.encode(samples).codes, tokenizer.encode(samples).codes)
    assert torch.equal(loaded.decode(loaded.encode(samples)), tokenizer.decode(tokenizer.encode(samples)))


def test_files_become_items_and_items_keep_their_16_bits(tokenizer: SpeechTokenizer) -> None:
    compact = torch.tensor([-(2**15), -1, 0, 1, 2**15 - 1] * 100, dtype=torch.int16)
    samples = tokenizer.expand(compact)
    assert torch.equal(tokenizer.compact(samples), compact)
    assert torch.equal(tokenizer.compact(tokenizer.read(audio_bytes(samples, 16000, "wav"))), compact)
    assert tokenizer.compact(torch.tensor([1.0])).item() == 2**15 - 1


def test_sound_of_any_rate_becomes_an_item_of_the_same_length_in_time(tokenizer: SpeechTokenizer) -> None:
    item = tokenizer.expand(tokenizer.compact(noise(1600)))
    audio = tokenizer.to_audio(item)
    assert audio.rate == 16000
    assert torch.equal(tokenizer.from_audio(audio), item)
    assert abs(len(tokenizer.from_audio(Audio(noise(4410), 44100))) - 1600) <= 2


def test_a_comparison_is_two_sounds_of_one_length(tokenizer: SpeechTokenizer, tmp_path: Path) -> None:
    original, decoded = tokenizer.write_comparison([noise(1000), noise(333)], tmp_path / "new" / "step-1")
    sounds = [tokenizer.read(path.read_bytes()) for path in (original, decoded)]
    assert len(sounds[0]) == len(sounds[1]) == 1000 + 333 + 2 * 4000


def test_frames_that_stem_and_head_cannot_make_are_refused() -> None:
    with pytest.raises(ValidationError, match="by its hop"):
        SpeechTokenizerConfig(frame_samples=600)
    with pytest.raises(ValidationError, match="product of its strides"):
        SpeechTokenizerConfig(frame_samples=640, decoder=WaveformHeadConfig(strides=(2, 2)))
