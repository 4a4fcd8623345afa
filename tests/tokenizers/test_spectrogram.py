"""Spectra and mel filters against torch's and transformers' own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.audio_utils import mel_filter_bank

from omniform.tokenizers.codecs.spectral_loss import SpectralDistance
from omniform.tokenizers.codecs.spectrogram import inverse_stft, mel_filters, stft


@given(st.integers(3, 6), st.integers(2, 16), st.integers(1, 9))
def test_spectra_are_those_of_torch(overlap: int, half_hop: int, n_windows: int) -> None:
    hop = 2 * half_hop
    n_fft, n_samples = overlap * hop, n_windows * hop
    samples = torch.randn(2, n_samples, dtype=torch.float64)
    margin = n_fft - hop
    padded = torch.nn.functional.pad(samples, (margin // 2, margin - margin // 2))
    window = torch.hann_window(n_fft, dtype=torch.float64)
    expected = torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True).transpose(1, 2)
    torch.testing.assert_close(stft(samples, n_fft, hop), expected)


@given(st.integers(3, 6), st.integers(2, 16), st.integers(1, 9))
def test_the_way_back_gives_the_samples_where_no_window_is_missing(overlap: int, half_hop: int, n_windows: int) -> None:
    hop = 2 * half_hop
    inside = slice(overlap * hop, (overlap + n_windows) * hop)
    samples = torch.randn(2, (2 * overlap + n_windows) * hop, dtype=torch.float64)
    back = inverse_stft(stft(samples, overlap * hop, hop), hop)
    assert back.shape == samples.shape
    torch.testing.assert_close(back[:, inside], samples[:, inside])


@pytest.mark.parametrize(("n_fft", "n_mels", "rate"), [(256, 40, 16000), (512, 80, 16000), (1024, 64, 22050)])
def test_mel_filters_are_those_of_transformers(n_fft: int, n_mels: int, rate: int) -> None:
    expected = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_filters(n_fft, n_mels, rate), expected, atol=1e-5)


def test_a_sound_is_nowhere_apart_from_itself_and_silence_has_a_gradient() -> None:
    distance = SpectralDistance(16000)
    sounds = torch.randn(3, 2048).clamp(-1, 1)
    assert all((value == 0).all() for value in distance(sounds, sounds).values())
    silence = torch.zeros(3, 2048, requires_grad=True)
    terms = distance(silence, sounds)
    assert tuple(terms) == SpectralDistance.terms
    assert all(value.shape == (3,) and (value > 0).all() for value in terms.values())
    sum(value.sum() for value in terms.values()).backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()
