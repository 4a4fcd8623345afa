import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniform.tokenizers.base import Discrete
from omniform.tokenizers.vocabulary import N_GAPS, N_SPECIAL, Vocabulary, VocabularyError, gap_marker, mode_marker

NAMES = st.lists(st.sampled_from(["image", "speech", "video", "depth"]), unique=True, max_size=4)
SIZES = st.builds(Discrete, st.integers(1, 40), st.integers(1, 3))
MODES = st.lists(st.sampled_from(["r", "s", "x", "fill"]), unique=True, max_size=4)


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    sizes = {name: draw(SIZES) for name in draw(NAMES)}
    free = [name for name in sizes if draw(st.booleans())]
    return Vocabulary(draw(st.integers(1, 100)), sizes, free, draw(MODES))


def markers(vocabulary: Vocabulary) -> dict[str, int]:
    """Ids of the markers of modes and gaps, by name."""
    gaps = map(gap_marker, range(N_GAPS)) if vocabulary.modes else ()
    return {name: vocabulary.begin("text", name) for name in (*gaps, *map(mode_marker, vocabulary.modes))}


def n_codes(vocabulary: Vocabulary, name: str) -> int:
    """Ids of a modality that are not its end."""
    return len(vocabulary.target_range(name)) - (vocabulary.end_of(name) is not None)


def all_codes(vocabulary: Vocabulary, name: str) -> torch.Tensor:
    """Every code; of several codebooks one of each in a row."""
    n_codebooks = vocabulary.n_codebooks(name)
    codes = torch.arange(n_codes(vocabulary, name) // n_codebooks)
    return codes if n_codebooks == 1 else codes[:, None].expand(-1, n_codebooks)


@given(vocabularies())
def test_codes_and_ids_are_a_bijection_and_ranges_are_disjoint(vocabulary: Vocabulary) -> None:
    seen: set[int] = {vocabulary.end, vocabulary.pad, vocabulary.mask}
    seen |= {vocabulary.begin(name) for name in vocabulary.names}
    assert len(seen) == 3 + len(vocabulary.names)
    seen |= set(markers(vocabulary).values())
    assert len(seen) == 3 + len(vocabulary.names) + len(markers(vocabulary))
    for name in vocabulary.names:
        codes = all_codes(vocabulary, name)
        ids = vocabulary.to_ids(name, codes)
        assert torch.equal(vocabulary.to_codes(name, ids), codes)
        found = set(ids.flatten().tolist())
        assert len(found) == codes.numel() == n_codes(vocabulary, name)
        assert not seen & found
        seen |= found
        end = vocabulary.end_of(name)
        if end is not None and name != "text":
            assert end not in seen
            assert vocabulary.target_range(name).stop - 1 == end
            assert vocabulary.describe(end) == f"<end:{name}>"
            with pytest.raises(VocabularyError, match="expected those of"):
                vocabulary.to_codes(name, torch.full((vocabulary.n_codebooks(name),), end))
            seen.add(end)
    assert max(seen) < vocabulary.size
    assert vocabulary.size == sum(len(vocabulary.target_range(n)) for n in vocabulary.names) + N_SPECIAL - 1


@given(vocabularies())
def test_text_keeps_its_own_ids_and_may_only_end_besides(vocabulary: Vocabulary) -> None:
    codes = torch.arange(vocabulary.text_size)
    assert torch.equal(vocabulary.to_ids("text", codes), codes)
    assert vocabulary.target_range("text").stop - 1 == vocabulary.end == vocabulary.text_size


@given(vocabularies(), st.sampled_from(["image", "text"]), st.integers(-5, 5000))
def test_foreign_codes_and_ids_are_refused(vocabulary: Vocabulary, name: str, number: int) -> None:
    if name not in vocabulary.names:
        with pytest.raises(VocabularyError, match="no modality"):
            vocabulary.to_ids(name, torch.tensor([0]))
        return
    n_codebooks = vocabulary.n_codebooks(name)
    size = n_codes(vocabulary, name) // n_codebooks
    if not 0 <= number < size:
        with pytest.raises(VocabularyError, match="expected"):
            vocabulary.to_ids(name, torch.full((n_codebooks,), number))
    first = vocabulary.to_ids(name, torch.zeros(n_codebooks, dtype=torch.int64))
    for codebook in range(n_codebooks):
        if not first[codebook] <= number < first[codebook] + size:
            with pytest.raises(VocabularyError, match="expected those of"):
                vocabulary.to_codes(name, first.index_fill(0, torch.tensor(codebook), number))
    if n_codebooks > 1:
        with pytest.raises(VocabularyError, match=f"one of each of its {n_codebooks} codebooks"):
            vocabulary.to_ids(name, torch.zeros(n_codebooks + 1, dtype=torch.int64))


@given(vocabularies())
def test_choices_are_the_codes_of_a_codebook_and_then_the_end(vocabulary: Vocabulary) -> None:
    for name in vocabulary.names:
        end, n_codebooks = vocabulary.end_of(name), vocabulary.n_codebooks(name)
        size = n_codes(vocabulary, name) // n_codebooks
        rows = vocabulary.to_ids(name, all_codes(vocabulary, name)).view(-1, n_codebooks)
        for codebook in range(n_codebooks):
            ids, of = rows[:, codebook], vocabulary.codebook_range(name, codebook)
            assert ids.tolist() == list(range(of.start, of.stop))
            ids = ids if end is None else torch.cat([ids, torch.tensor([end])])
            books = torch.full_like(ids, codebook)
            assert vocabulary.to_choices(name, ids, books).tolist() == list(range(size + (end is not None)))
            assert torch.equal(vocabulary.to_chosen(name, torch.arange(len(ids)), books), ids)
        of_first = torch.arange(size)
        assert torch.equal(vocabulary.to_chosen(name, of_first), rows[:, 0])


@given(vocabularies(), vocabularies())
def test_records_round_trip_and_hashes_tell_vocabularies_apart(a: Vocabulary, b: Vocabulary) -> None:
    assert Vocabulary.from_json(json.loads(json.dumps(a.to_json()))) == a
    same = a.text_size == b.text_size and list(a.modalities.items()) == list(b.modalities.items())
    same &= a.modes == b.modes
    same &= all((a.end_of(name) is None) == (b.end_of(name) is None) for name in a.names if name in b.names)
    assert (a == b) == same
    assert (a.digest() == b.digest()) == same


@pytest.mark.parametrize("change", ["text_size", "modalities", "sha256", "missing"])
def test_an_edited_record_is_refused(change: str) -> None:
    record = Vocabulary(50, {"image": Discrete(8)}).to_json()
    if change == "missing":
        del record["text_size"]
    else:
        record[change] = {"text_size": 51, "modalities": {"image": {"vocab_size": 9}}, "sha256": "0" * 64}[change]
    with pytest.raises(VocabularyError, match=r"lacks or misnames|hashes to"):
        Vocabulary.from_json(record)


def test_the_hash_of_a_given_layout_never_changes() -> None:
    """Stored models carry this hash: a change of layout must be a new format version, not a silent one."""
    digest = Vocabulary(1000, {"image": Discrete(64)}).digest()
    assert digest == "350d2d5f79fb90dc5188a596638f66af32c988a84a6cd3b4069c6463ff7841f5"


@given(vocabularies(), st.sampled_from(["z", "y"]))
def test_a_mode_more_moves_no_id_and_one_less_marker_is_refused(vocabulary: Vocabulary, mode: str) -> None:
    free = [name for name in vocabulary.modalities if vocabulary.end_of(name) is not None]
    more = Vocabulary(vocabulary.text_size, vocabulary.modalities, free, [*vocabulary.modes, mode])
    assert more.size == vocabulary.size
    assert more.next_span_range == vocabulary.next_span_range
    assert markers(vocabulary).items() <= markers(more).items()
    assert all(more.begin(name) == vocabulary.begin(name) for name in vocabulary.names)
    assert all(more.target_range(name) == vocabulary.target_range(name) for name in vocabulary.names)
    assert more.begin("text", gap_marker(N_GAPS + 3)) == more.begin("text", gap_marker(3))
    with pytest.raises(VocabularyError, match=f"no marker 'mode:{mode}'"):
        vocabulary.begin("text", mode_marker(mode))


@pytest.mark.parametrize("modes", [["r", "r"], [f"m{number}" for number in range(28)]])
def test_modes_are_named_once_and_fit_their_places(modes: list[str]) -> None:
    with pytest.raises(VocabularyError, match="expected"):
        Vocabulary(10, {"image": Discrete(4)}, modes=modes)


def test_a_vocabulary_without_modes_keeps_the_hash_of_its_first_records() -> None:
    assert "modes" not in Vocabulary(1000, {"image": Discrete(64)}).to_json()
    record = Vocabulary(1000, {"image": Discrete(64)}, modes=["r"]).to_json()
    del record["modes"]
    with pytest.raises(VocabularyError, match="hashes to"):
        Vocabulary.from_json(record)


def test_every_id_has_a_readable_name() -> None:
    vocabulary = Vocabulary(10, {"image": Discrete(4)}, modes=["r"])
    names = [vocabulary.describe(i) for i in range(vocabulary.size)]
    assert len(set(names)) == vocabulary.size
    assert names[3] == "text[3]"
    assert names[10] == "<end>"
    assert names[-1] == "image[3]"


@pytest.mark.parametrize(
    "modalities", [{"text": Discrete(3)}, {"image": Discrete(0)}, {f"m{i}": Discrete(1) for i in range(61)}]
)
def test_impossible_vocabularies_are_refused(modalities: dict[str, Discrete]) -> None:
    with pytest.raises(VocabularyError):
        Vocabulary(10, modalities)
    with pytest.raises(VocabularyError, match="at least 1"):
        Vocabulary(0, {})


def test_a_vocabulary_without_spans_of_free_length_keeps_the_hash_of_its_first_records() -> None:
    record = Vocabulary(1000, {"image": Discrete(64)}).to_json()
    assert "free_length" not in record
    with pytest.raises(VocabularyError, match="expected some of"):
        Vocabulary(10, {"image": Discrete(4)}, ["speech"])
