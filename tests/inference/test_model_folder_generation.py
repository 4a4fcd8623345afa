"""A stored model with the shipped tokenizers generates what it generated before it was stored."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sample_sounds import sine
from sample_sounds import stored as stored_sound
from small_codecs import small_model, small_tokenizers
from typer.testing import CliRunner

import omniform
from omniform.cli import app
from omniform.inference.command import generate_files
from omniform.inference.generate import Model, load
from omniform.inference.part_files import read_part
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.denoisers import Middle, Prefix
from omniform.modeling.folder import LoadedModel, build_vocabulary, save_model_folder
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Modality
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video_files import read_video_header

GENERATION_CONFIG = {"max_sequence_length": 90, "modalities": {"image": {"guidance_scale": 1.5, "steps": 3}}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model of random weights, and the folder that it was stored in."""
    torch.manual_seed(0)
    codec = ImageTokenizerConfig(image_size=8, widths=(8, 16), quantizer=FSQConfig(levels=(4, 4)))
    tokenizers: dict[str, Modality] = {
        "text": SentencePieceTokenizer.train(["a seven\nthe digit eight\n"] * 9, vocab_size=280),
        "image": ImageTokenizer(codec, codec.build()),
    }
    decoder = DecoderConfig(dim=24, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32)
    config = ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked()})
    network = UnifiedModel(config, build_vocabulary(tokenizers)).eval()
    folder = tmp_path_factory.mktemp("stored") / "model"
    save_model_folder(
        folder, config, network.state_dict(), tokenizers, generation_config=GENERATION_CONFIG, card="# Random\n"
    )
    return Model(LoadedModel(network, tokenizers, GENERATION_CONFIG)), folder


def test_a_loaded_model_generates_the_same(stored: tuple[Model, Path]) -> None:
    before, folder = stored
    after = omniform.load(folder)
    prompt = ["a seven like", Image.new("RGB", (30, 20), "navy")]
    for seed in range(5):
        ours, theirs = (m.generate(prompt, to=["text", "image"], seed=seed, max_new_tokens=9) for m in (before, after))
        assert ours.text == theirs.text
        assert ours.images[0].size == (8, 8)
        assert ours.images[0].tobytes() == theirs.images[0].tobytes()


def test_every_text_of_random_weights_can_be_streamed(stored: tuple[Model, Path]) -> None:
    for seed in range(20):
        *events, _, done = stored[0].stream("a seven", seed=seed, temperature=3.0, max_new_tokens=20)
        assert "".join(event.text for event in events) == done.reply.text


def test_the_command_loads_the_folder(stored: tuple[Model, Path], tmp_path: Path) -> None:
    [output] = generate_files(stored[1], ["a seven"], ["image"], tmp_path / "seven.png", seed=3)
    assert output.path is not None
    expected = stored[0].generate("a seven", to="image", seed=3).images[0]
    assert Image.open(output.path).tobytes() == expected.tobytes()


def test_the_command_fills_a_gap_and_goes_on_in_a_mode(stored: tuple[Model, Path], tmp_path: Path) -> None:
    model = stored[0]
    config = replace(model.network.config, denoisers={"s": Prefix(), "fill": Middle()})
    folder, weights = tmp_path / "model", model.network.state_dict()
    save_model_folder(folder, config, weights, model.tokenizers, generation_config=GENERATION_CONFIG, card="# Random\n")
    filling = load(folder)
    for options, keywords in (
        (["--suffix", " e"], {"suffix": " e"}),
        (["--mode", "s"], {"mode": "s"}),
        (["--mode", "fill", "--suffix", ""], {"mode": "fill", "suffix": ""}),
    ):
        shown = CliRunner().invoke(app, ["generate", str(folder), "a seven", "--seed=3", "--json", *options])
        [output] = json.loads(shown.stdout)
        assert output["text"] == filling.generate("a seven", seed=3, **keywords).text
    shown = CliRunner().invoke(app, ["generate", str(stored[1]), "a seven", "--mode", "s"])
    assert "which this model has not learnt; it has no modes" in str(shown.exception)


def test_the_command_turns_speech_into_video_and_says_where_it_went(tmp_path: Path) -> None:
    tokenizers = small_tokenizers()
    model = small_model(tokenizers)
    weights = model.network.state_dict()
    folder = tmp_path / "model"
    save_model_folder(folder, model.network.config, weights, tokenizers, generation_config={}, card="# Random\n")
    (tmp_path / "seven.wav").write_bytes(stored_sound(sine(0.3, 8000), 8000))
    prompt, film = f"@{tmp_path / 'seven.wav'}", tmp_path / "seven.mp4"
    shown = CliRunner().invoke(app, ["generate", str(folder), prompt, "--to", "video", "--out", str(film), "--seed=3"])
    assert (shown.exit_code, shown.output) == (0, f"{film} (seed 3)\n")
    assert read_video_header(film).codec == "h264"
    # A word that the model ends at once.
    loaded = load(folder)
    heard = read_part(tmp_path / "seven.wav", loaded)
    replies = loaded.generate_batch([heard] * 99, "speech", seed=[*range(99)], max_new_tokens=2)
    seed = next(reply.seed for reply in replies if not len(reply.speech[0].samples))
    out = ["--out", str(tmp_path / "a"), "--to", "speech", "--to", "text", f"--seed={seed}", "--max-new-tokens=2"]
    shown = CliRunner().invoke(app, ["generate", str(folder), prompt, *out, "--json"])
    assert isinstance(shown.exception, omniform.OmniformError)
    assert f"1 of 2 parts are speech without a sample, for which no file was written (seed {seed})" in str(
        shown.exception
    )
    speech, text = json.loads(shown.stdout)
    assert (speech["modality"], speech["path"], speech["text"]) == ("speech", None, None)
    assert (text["path"], text["text"]) == (str(tmp_path / "a.txt"), (tmp_path / "a.txt").read_text()[:-1])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(omniform.OmniformError, match=r"no model folder at .*nothing"):
        load(tmp_path / "nothing")


def test_a_changed_generation_config_is_found(stored: tuple[Model, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stored[1], folder)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(omniform.OmniformError, match=r"generation_config\.json is damaged"):
        load(folder)
