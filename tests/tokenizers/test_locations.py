"""Locations come back within half a bin, and every sequence of codes is some list of locations."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniform.tokenizers.base import TokenizerError, Tokens
from omniform.tokenizers.locations import (
    KINDS,
    MAX_LOCATION_BYTES,
    Location,
    LocationTokenizer,
    LocationTokenizerConfig,
    locations_as_json,
    read_locations,
)
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.vocabulary import Vocabulary
from omniform.training.tokenizer_task import train_tokenizer

FRACTIONS = st.floats(0, 1)
RANGES = st.tuples(FRACTIONS, FRACTIONS).map(sorted)
LOCATIONS = st.one_of(
    st.builds(lambda x, y: Location.box(x[0], y[0], x[1], y[1]), RANGES, RANGES),
    st.builds(Location.keypoint, FRACTIONS, FRACTIONS),
    st.lists(st.tuples(FRACTIONS, FRACTIONS), min_size=3, max_size=6).map(
        lambda corners: Location.polygon(*itertools.chain(*corners))
    ),
)
ITEMS = st.lists(LOCATIONS, max_size=4)
N_BINS = st.sampled_from([2, 3, 33, 257, 2**16])


def tokenizer(n_bins: int = 33) -> LocationTokenizer:
    """A tokenizer of so many values per coordinate."""
    return LocationTokenizer(LocationTokenizerConfig(n_bins=n_bins))


def tokens(codes: list[int]) -> Tokens:
    """The codes of one item."""
    return Tokens(torch.tensor(codes, dtype=torch.int64), (len(codes),))


@given(items=st.lists(ITEMS, max_size=3), n_bins=N_BINS)
def test_locations_come_back_in_order_within_half_a_bin(items: list[list[Location]], n_bins: int) -> None:
    coder = tokenizer(n_bins)
    encoded = coder.encode_batch(items)
    for item, entry, decoded in zip(items, encoded, coder.decode_batch(encoded), strict=True):
        assert entry.grid == (len(entry.codes),) == (sum(1 + len(location.coordinates) for location in item),)
        assert [location.kind for location in decoded] == [location.kind for location in item]
        pairs = zip(item, decoded, strict=True)
        far = [abs(a - b) for one, other in pairs for a, b in zip(one.coordinates, other.coordinates, strict=True)]
        assert max(far, default=0.0) <= 0.5 / (n_bins - 1) + 1e-12
        # What came back once comes back as it is.
        assert coder.decode(coder.encode(decoded)) == decoded
        assert coder.encode(decoded).codes.equal(entry.codes)


@pytest.mark.parametrize("side", [1, 8, 32, 100])
def test_edges_of_pixels_lose_nothing_in_one_bin_more_than_pixels(side: int) -> None:
    edges = [Location.keypoint(edge / side, (side - edge) / side) for edge in range(side + 1)]
    assert tokenizer(side + 1).decode(tokenizer(side + 1).encode(edges)) == tuple(edges)


def parsed(codes: list[int]) -> list[tuple[str, list[int]]]:
    """Read codes of a tokenizer one at a time, as its description says: the oracle of the next test."""
    found: list[tuple[str, list[int]]] = []
    for code in codes:
        if code < 3:
            found.append((("box", "keypoint", "polygon")[code], []))
        elif found:
            found[-1][1].append(code - 3)
    whole = []
    for kind, bins in found:
        if kind == "keypoint" and len(bins) >= 2:
            whole.append((kind, bins[:2]))
        elif kind == "box" and len(bins) >= 4:
            x0, y0, x1, y1 = bins[:4]
            whole.append((kind, [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]))
        elif kind == "polygon" and len(bins) >= 6:
            whole.append((kind, bins if len(bins) % 2 == 0 else bins[:-1]))
    return whole


@given(codes=st.lists(st.integers(0, 2) | st.integers(3, 7), max_size=40))
def test_every_sequence_of_codes_decodes_to_what_is_whole_in_it(codes: list[int]) -> None:
    decoded = tokenizer(5).decode(tokens(codes))
    expected = [Location(kind, tuple(value / 4 for value in bins)) for kind, bins in parsed(codes)]
    assert list(decoded) == expected
    for location in decoded:
        if location.kind == "box":
            left, upper, right, lower = location.coordinates
            assert left <= right
            assert upper <= lower
    assert tokenizer(5).decode(tokenizer(5).encode(decoded)) == decoded


def test_the_codes_are_those_of_the_example() -> None:
    item = [Location.box(0.25, 0, 0.75, 0.5), Location.keypoint(1, 1)]
    assert tokenizer(33).encode(item).codes.tolist() == [0, 11, 3, 27, 19, 1, 35, 35]


@given(item=ITEMS)
def test_json_holds_locations_without_loss(item: list[Location]) -> None:
    assert read_locations(locations_as_json(item).encode()) == tuple(item)
    assert tokenizer().read(tokenizer().to_json(item).encode()) == tuple(item)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\xff", "are not JSON"),
        (b"[" * 100_000, "are not JSON"),
        (b'{"box": [0, 0, 1, 1]}', "a dict, expected a list"),
        (b"[[0, 0, 1, 1]]", "location 0 is"),
        (b'[{"box": [0, 0, 1, 1], "keypoint": [0, 0]}]', "location 0 is"),
        (b'[{"keypoint": [0, 0]}, {"circle": [0, 0, 1]}]', "location 1: .*'circle', expected one of box, keypoint"),
        (b'[{"box": [0, 0, 1]}]', "a box of 3 coordinates, expected 4"),
        (b'[{"keypoint": [0, 0, 1, 1]}]', "a keypoint of 4 coordinates, expected 2"),
        (b'[{"polygon": [0, 0, 1, 1]}]', "a polygon of 4 coordinates, expected 6 or more"),
        (b'[{"polygon": [0, 0, 1, 1, 1, 0, 1]}]', "a polygon of 7 coordinates"),
        (b'[{"box": [0, 0, 32, 32]}]', "the coordinate 32, expected numbers in .0, 1.: divide pixels"),
        (b'[{"box": [0, 0, NaN, 1]}]', "the coordinate nan"),
        (b'[{"keypoint": [true, 0]}]', "the coordinate True"),
        (b'[{"keypoint": ["0", 0]}]', "the coordinate '0'"),
        (b'[{"box": [0.5, 0, 0.25, 1]}]', "ends before it begins"),
        (b" " * (MAX_LOCATION_BYTES + 1), "expected at most"),
    ],
)
def test_what_is_no_list_of_locations_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer().read(payload)


def test_items_and_codes_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(TokenizerError, match="expected a list of Location"):
        tokenizer().encode([[0, 0, 1, 1]])
    for code in (-1, 36):
        with pytest.raises(TokenizerError, match=r"expected \[0, 35\]"):
            tokenizer().decode(tokens([code]))


def test_the_command_makes_a_folder_that_says_the_number_of_bins(tmp_path: Path) -> None:
    config = tmp_path / "locations.yaml"
    config.write_text("kind: locations\nname: places\ntokenizer: {n_bins: 65}\n")
    loaded = load_modality(train_tokenizer(config, out=tmp_path / "run"))
    assert isinstance(loaded, LocationTokenizer)
    assert (loaded.name, loaded.fixed_grid, loaded.config.n_bins) == ("location", None, 65)
    vocabulary = Vocabulary(10, {"location": loaded.representation}, ["location"])
    assert len(vocabulary.target_range("location")) == len(KINDS) + 65 + 1
    record = json.loads((tmp_path / "run/tokenizer/config.json").read_text())
    record["config"]["n_bins"] = 66
    (tmp_path / "run/tokenizer/config.json").write_text(json.dumps(record))
    with pytest.raises(TokenizerError, match="is damaged"):
        load_modality(tmp_path / "run")
