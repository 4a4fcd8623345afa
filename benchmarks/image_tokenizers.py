"""Image tokenizers side by side: rate, distortion, use of codes, how predictable they are, and a judge's word.

    python benchmarks/image_tokenizers.py [ARM or CONFIG.yaml ...] [--steps N] [--data WORLD] [--out DIR] [--write]

Trains every arm for the same number of steps on the train split, and measures it on validation. What is trained in DIR
already is kept. --write stores the table in benchmarks/results/image_tokenizers.json and the picture in docs/images/.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from omniform.data.digits import build_digits
from omniform.data.shards import ShardReader
from omniform.inference.tokenizer_evaluation import evaluate_tokenizer
from omniform.tokenizers.image import ImageTokenizer
from omniform.training.tokenizer_task import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "tokenizers"
RESULTS, PICTURE = (
    ROOT / "benchmarks" / "results" / "image_tokenizers.json",
    ROOT / "docs" / "images" / "tokenizers.png",
)
OUT = Path("runs/image_tokenizers")
STEPS = 300
CONTEXT_TOKENS = 2**18  # of the train split, from which the context model counts
LFQ_WEIGHTS = ["commitment_weight=0.02", "entropy_weight=0.02"]
ADVERSARIAL = f"adversarial={{start_step: {STEPS // 3}}}"


def quantizer(kind: str, **settings: object) -> str:
    """Return the override that chooses a quantizer."""
    return "tokenizer.quantizer=" + json.dumps({"kind": kind, **settings})


# Shipped config and what is changed in it. 16 codes of 64 in 4 x 4 places, and 64 codes of 16 in 8 x 8 places.
ARMS: dict[str, tuple[str, list[str]]] = {
    "4x4 fsq": ("digits-image", []),
    "4x4 vq_ema": ("digits-image", [quantizer("vq_ema", codebook_size=64, dim=8)]),
    "4x4 lfq": ("digits-image", [quantizer("lfq", bits=6), *LFQ_WEIGHTS]),
    "4x4 residual vq_ema, 2 x 8": (
        "digits-image",
        [quantizer("residual", depth=2, base={"kind": "vq_ema", "codebook_size": 8, "dim": 8})],
    ),
    "4x4 fsq, adversarial": ("digits-image", [ADVERSARIAL]),
    "4x4 fsq, margin 0": ("digits-image", ["tokenizer.margin=0"]),
    "4x4 fsq, margin 4": ("digits-image", ["tokenizer.margin=4"]),
    "8x8 fsq, whole image": ("digits-image-64", ["tokenizer.margin=null"]),
    "8x8 fsq, margin 0": ("digits-image-64", []),
    "8x8 fsq, margin 2": ("digits-image-64", ["tokenizer.margin=2"]),
    "8x8 vq_ema, margin 0": ("digits-image-64", [quantizer("vq_ema", codebook_size=16, dim=8)]),
    "8x8 lfq, margin 0": ("digits-image-64", [quantizer("lfq", bits=4), *LFQ_WEIGHTS]),
    "8x8 fsq, margin 0, adversarial": ("digits-image-64", [ADVERSARIAL]),
}


def measure(name: str, data: Path, out: Path, steps: int) -> tuple[dict[str, Any], ImageTokenizer]:
    """Train one arm, or take the one that is there, and return its figures on validation and the tokenizer."""
    base, overrides = ARMS.get(name, (name, []))
    config = CONFIGS / f"{base}.yaml" if name in ARMS else Path(base)
    folder = out / name.replace(",", "").replace(" ", "-").replace("/", "-")
    always = [f"data={data / 'train'}", f"steps={steps}", "log.samples_every=0", "log.every=50"]
    trained = train_tokenizer(config, [*always, *overrides], folder)
    tokenizer = ImageTokenizer.load(trained)
    figures = evaluate_tokenizer(trained, data, "validation")
    judge = figures["judge"]
    kept = ("n", "codebook_size", "tokens_per_item", "bits_per_item", "bits_per_pixel", "psnr_db", "ssim")
    return {
        "arm": name,
        "config": base,
        "overrides": overrides,
        "steps": steps,
        **{key: figures[key] for key in (*kept, "code_use", "perplexity")},
        "bits_in_context": context_bits(
            _codes(tokenizer, data / "train", CONTEXT_TOKENS // math.prod(tokenizer.fixed_grid)),
            _codes(tokenizer, data / "validation", None),
            figures["codebook_size"],
        ),
        "accuracy_before": judge["accuracy_before"],
        "accuracy_after": judge["accuracy_after"],
    }, tokenizer


def context_bits(train: Tensor, held_out: Tensor, size: int) -> float:
    """Return the bits per held-out image that codes (N, *grid) of [0, size) cost when each is predicted from its
    predecessors along the last two axes: left and upper; with several codes in a place, the one before it and that of
    the place to the left.

    The prediction is counted on train images and smoothed towards that from one neighbour, from none, and uniform, each
    with the weight of one token per code: an upper bound on the entropy.
    """
    known, rows = _contexts(train, size), _contexts(held_out, size)
    probability = torch.full((len(rows),), 1 / size, dtype=torch.float64)
    for n_neighbours in range(3):
        radix = (size + 1) ** torch.arange(n_neighbours + 1)
        given, asked = ((each[:, : n_neighbours + 1] * radix).sum(1) for each in (known, rows))
        together, alone = _count(given, asked), _count(given - known[:, 0], asked - rows[:, 0])
        probability = (together + size * probability) / (alone + size)
    return float(-probability.log2().sum() / len(held_out))


def _contexts(codes: Tensor, size: int) -> Tensor:
    """Codes (N, *grid) -> rows of (code, predecessor on the last axis, on the one before it); `size` where none is."""
    columns = [codes]
    for axis in (-1, -2):
        shifted = codes.roll(1, axis)
        shifted.select(axis, 0).fill_(size)
        columns.append(shifted)
    return torch.stack(columns, -1).flatten(0, -2)


def _count(given: Tensor, asked: Tensor) -> Tensor:
    """How often each of `asked` occurs in `given`."""
    values, counts = given.unique(return_counts=True)
    place = torch.searchsorted(values, asked).clamp(max=len(values) - 1)
    return torch.where(values[place] == asked, counts[place], 0).double()


def _codes(tokenizer: ImageTokenizer, folder: Path, limit: int | None) -> Tensor:
    items = _items(tokenizer, folder, limit)
    codes = torch.stack([tokens.codes.view(tokens.grid) for tokens in tokenizer.encode_batch(items)])
    return codes if codes.ndim == 3 else codes.movedim(1, -1)  # several codes of one place lie side by side


def _items(tokenizer: ImageTokenizer, folder: Path, limit: int | None) -> list[Tensor]:
    reader = ShardReader(folder)
    samples = (reader[place] for place in range(len(reader) if limit is None else min(limit, len(reader))))
    payloads = [span.payload for sample in samples for span in sample.spans if span.modality == "image"]
    return [tokenizer.read(payload) for payload in payloads if payload is not None]


def draw(tokenizers: dict[str, ImageTokenizer], data: Path, n: int = 16, size: int = 48) -> Image.Image:
    """Return a picture: the first `n` validation images, and below them what each tokenizer makes of them."""
    rows = {"original": next(iter(tokenizers.values())), **tokenizers}
    gutter = 6 * max(map(len, rows)) + 12
    sheet = Image.new("L", (gutter + n * size, len(rows) * size), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, tokenizer) in enumerate(rows.items()):
        pen.text((4, row * size + size // 2 - 6), name, fill=0)
        items = _items(tokenizer, data / "validation", n)
        shown = items if name == "original" else tokenizer.decode_batch(tokenizer.encode_batch(items))
        for column, item in enumerate(shown):
            sheet.paste(tokenizer.to_pil(item).resize((size, size)), (gutter + column * size, row * size))
    return sheet


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    heads = ("tokenizer", "codes", "bits", "bits/pixel", "PSNR dB", "SSIM", "code use", "perplexity")
    lines = [(*heads, "bits in context", "judge before -> after")]
    lines += [
        (
            row["arm"],
            f"{row['tokens_per_item']:.0f} of {row['codebook_size']}",
            f"{row['bits_per_item']:.0f}",
            f"{row['bits_per_pixel']:.3f}",
            f"{row['psnr_db']:.1f}",
            f"{row['ssim']:.3f}",
            f"{row['code_use']:.0%}",
            f"{row['perplexity']:.1f}",
            f"{row['bits_in_context']:.0f}",
            f"{row['accuracy_before']:.1%} -> {row['accuracy_after']:.1%}",
        )
        for row in rows
    ]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(
    names: Sequence[str] = tuple(ARMS), data: Path | None = None, out: Path = OUT, steps: int = STEPS
) -> dict[str, Any]:
    """Return the rows of every arm, and `text`, their table.

    Args:
        names: arms, or files of image tokenizer configs.
        data: a digits-world; built in `out` unless given.
    """
    data = data or build_digits(out / "data", media=False)
    measured = {name: measure(name, data, out, steps) for name in names}
    draw({name: tokenizer for name, (_, tokenizer) in measured.items()}, data).save(out / "tokenizers.png")
    rows = [figures for figures, _ in measured.values()]
    return {"split": "validation", "rows": rows, "text": table(rows)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ARMS), metavar="ARM or CONFIG.yaml")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    result = run(given.names, given.data, given.out, given.steps)
    print(result.pop("text"))
    if given.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        PICTURE.write_bytes((given.out / "tokenizers.png").read_bytes())
