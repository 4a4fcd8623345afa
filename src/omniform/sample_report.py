"""What a model was given and what it made of it, cell by cell and document by document, for a page."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from omniform.cell_report import anchor, arrow
from omniform.page import medium, shortened

_N_SHOWN, _N_WRONG = 10, 4  # samples per cell, and of these at most so many failures unless successes are fewer
_MOST_CHARACTERS = 8 * 2**20  # of all samples together: what the files of a page's sounds and videos may take
_LONGEST_TEXT = 160
_PLAYED = ("image", "speech", "video")


def samples_section(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return in HTML some samples of each cell of samples.json: failures first, then successes.

    All samples together take at most 8 MiB; where they would take more, cells show fewer.
    """
    parts = [
        "<h2>Samples</h2>",
        '<p class="note">Failures first, then successes, both spread evenly over those that there are: none was chosen '
        "by hand.</p>",
    ]
    room = _MOST_CHARACTERS // max(1, len(samples))
    parts += [_cell(name, entries, room) for name, entries in samples.items()]
    return "".join(parts)


def documents_grid(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return in HTML the documents of documents.json: what was given stands before the bar."""
    return f'<div class="documents">{"".join(map(_document, documents))}</div>'


def chosen(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return at most ten samples: four failures if there are as many, then successes; more of one kind where the
    other has too few."""
    wrong, right = ([entry for entry in entries if bool(entry["right"]) is kind] for kind in (False, True))
    n_wrong = min(len(wrong), max(_N_WRONG, _N_SHOWN - len(right)))
    return _spread(wrong, n_wrong) + _spread(right, _N_SHOWN - n_wrong)


def _spread(entries: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    count = min(count, len(entries))
    return [entries[place * len(entries) // count] for place in range(count)]


def _cell(name: str, entries: Sequence[Mapping[str, Any]], room: int) -> str:
    shown: list[tuple[bool, str]] = []
    for entry in chosen(entries):
        figure = _sample(entry)
        if len(figure) <= room:
            room -= len(figure)
            shown.append((bool(entry["right"]), figure))
    n_right, n_right_shown = sum(bool(entry["right"]) for entry in entries), sum(right for right, _ in shown)
    told = (
        f"{len(shown) - n_right_shown} of {len(entries) - n_right} failures and {n_right_shown} of {n_right} "
        f"successes among the {len(entries)} samples that were kept."
    )
    return (
        f'<section id="{anchor(name)}"><h3>{arrow(name)}</h3><p class="note">{told}</p>'
        f'<div class="grid broad">{"".join(figure for _, figure in shown)}</div></section>'
    )


def _sample(entry: Mapping[str, Any]) -> str:
    expected, judged = entry["expected"], entry["judged"]
    verdict = f"expected {_said(expected, expected)}; judged {_said(judged, expected)}"
    if entry.get("copy"):
        verdict += "; a copy"
    given, reply = _part(entry["prompt"], "given"), _part(entry["reply"], f"reply, {verdict}")
    between = "".join(f"<div><b>&rarr;</b>{_part(part, 'on the way')}</div>" for part in entry.get("through", ()))
    right = bool(entry["right"])
    pair = f'<div class="pair">{given}{between}<div><b>&rarr;</b>{reply}</div></div>'
    return (
        f"<figure{'' if right else ' class=wrong'}>{pair}"
        f"<figcaption><em>{'right' if right else 'wrong'}: {html.escape(verdict)}</em></figcaption></figure>"
    )


def _said(meaning: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> str:
    """Return a digit in words, and a motion where one is expected."""
    known = meaning or {}
    kinds = [kind for kind in ("digit", "motion") if expected.get(kind) is not None]
    return ", ".join(f"no {kind}" if known.get(kind) is None else str(known[kind]) for kind in kinds)


def _part(part: Mapping[str, Any], role: str) -> str:
    """Show one part: a picture, sound or video in its player, text as it is, anything else as JSON."""
    ((modality, content),) = part.items()
    if modality in _PLAYED:
        return medium(content, f"{modality}, {role}")
    text = content if isinstance(content, str) else json.dumps(content)
    return f"<span>{html.escape(shortened(text, _LONGEST_TEXT))}</span>"


def _document(entry: Mapping[str, Any]) -> str:
    given, reply = ("".join(_part(part, role) for part in entry[role]) for role in ("prompt", "reply"))
    verdict = f"{entry['kind']}: {'right' if entry['right'] else 'wrong'}"
    return (
        f"<figure{'' if entry['right'] else ' class=wrong'}><div class=turns>{given}<b>|</b>{reply}</div>"
        f"<figcaption><em>{html.escape(verdict)}</em></figcaption></figure>"
    )
