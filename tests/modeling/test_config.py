from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig, dump_config, parse_config
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken

MINIMAL = "objectives: {text: next_token, image: {kind: masked}}\n"


@given(
    st.integers(1, 8),
    st.floats(1e-8, 1, allow_nan=False),
    st.one_of(st.builds(Masked, steps=st.integers(1, 99)), st.builds(NextToken, weight=st.floats(0.01, 9))),
)
def test_what_is_dumped_parses_to_the_same(n_layers: int, z_loss: float, image: Masked | NextToken) -> None:
    objectives = {"text": NextToken(), "image": image}
    config = ModelConfig(decoder=DecoderConfig(n_layers=n_layers), objectives=objectives, z_loss=z_loss)
    assert parse_config(ModelConfig, dump_config(config)) == config


def test_precedence_is_python_then_yaml_then_override() -> None:
    assert parse_config(ModelConfig, MINIMAL).z_loss == 0
    assert parse_config(ModelConfig, MINIMAL + "z_loss: 1e-4").z_loss == 1e-4
    config = parse_config(ModelConfig, MINIMAL + "z_loss: 1e-4", ["z_loss=1e-5", "decoder.n_layers=2"])
    assert (config.z_loss, config.decoder.n_layers) == (1e-5, 2)


def test_an_override_reaches_into_lists() -> None:
    @dataclass(frozen=True)
    class Lists:
        pairs: list[dict[str, int]]

    found = parse_config(Lists, "pairs: [{a: 1}, {a: 2, b: 3}]", ["pairs.1.a=5", "pairs.0.b=7"])
    assert found.pairs == [{"a": 1, "b": 7}, {"a": 5, "b": 3}]
    for place in ("2", "-1", "x"):
        with pytest.raises(ConfigError, match=f"pairs has the entries 0 to 1, not {place}"):
            parse_config(Lists, "pairs: [{a: 1}, {}]", [f"pairs.{place}.a=5"])


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (MINIMAL + "decoder: {n_layer: 3}", [], r"decoder\.n_layer: unknown key; did you mean n_layers\?"),
        (MINIMAL + "decoder: {n_heads: 0}", [], r"decoder\.n_heads: .*greater than or equal to 1, not 0"),
        (MINIMAL, ["decoder.dim=abc"], r"decoder\.dim: .*not 'abc'"),
        (MINIMAL, ["decoder.n_kv_heads=4"], r"decoder: n_heads is 6, expected a multiple of n_kv_heads = 4"),
        (MINIMAL, ["decoder.head_dim=7"], r"even number"),
        (MINIMAL, ["z_loss"], r"dotted\.key=value"),
        (MINIMAL, ["z_loss.a=1", "z_loss.a.b=2"], r"z_loss\.a is a value"),
        (MINIMAL, ["z_loss={"], r"not a YAML value"),
        ("objectives: {image: masked}", [], r"lacks text"),
        ("objectives: {text: {kind: next_token, steps: 3}}", [], r"objectives\.text\.steps: unknown key"),
        ("objectives: {text: nexttoken}", [], r"objectives\.text: .*expected one of .*'masked'.*'next_token'"),
        ("objectives: {text: 3}", [], r"objectives\.text: expected a mapping"),
        ("decoder: {}", [], r"objectives: required"),
        ("a: [", [], r"not valid YAML"),
        (MINIMAL + "z_loss: .inf", [], r"z_loss: .*finite number, not inf"),
        (
            "objectives: {text: next_token, image: {kind: masked, weight: .inf}}",
            [],
            r"objectives\.image\.weight: .*finite",
        ),
        (MINIMAL + "z_loss: 0\nz_loss: 1", [], r"(?s)'z_loss' is given twice.*line 3"),
        ("- 1", [], r"holds a list, expected a mapping"),
    ],
)
def test_a_bad_config_names_the_key_and_what_was_expected(text: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_config(ModelConfig, text, overrides, "model.yaml")


@pytest.mark.parametrize(
    ("text", "overrides", "blamed"),
    [
        (MINIMAL + "z_loss: -1", [], "model.yaml"),
        (MINIMAL + "z_loss: -1", ["decoder.dim=24"], "model.yaml"),
        (MINIMAL, ["z_loss=-1", "decoder.dim=24"], "override z_loss=-1"),
        (MINIMAL, ["decoder.n_layer=1", "z_loss=-1"], "override decoder.n_layer=1 z_loss=-1"),
        (MINIMAL, ["decoder={n_layer: 1}"], "override decoder={n_layer: 1}"),
        (MINIMAL + "decoder: {dim: 0}", ["z_loss=-1"], "model.yaml with z_loss=-1"),
        (MINIMAL, ["decoder.n_kv_heads=4", "z_loss=0"], "model.yaml with decoder.n_kv_heads=4"),
    ],
)
def test_an_error_blames_the_file_or_the_override_that_it_is_in(text: str, overrides: list[str], blamed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(ModelConfig, text, overrides, "model.yaml")
    assert str(caught.value).partition(" cannot be used")[0] == blamed
