"""Draw docs/images/demo.png from a finished demo: python docs/images/draw_demo.py runs/demo

Above, what the model draws: a column per digit, a row per held-out caption template and seed. Below, held-out drawings
with what the model says of them, right or wrong, the first ten of the test split.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

import omniform
from omniform.data.shards import ShardReader
from omniform.data.templates import TEST_TEMPLATES, render

SCALE, GAP, LINE = 3, 6, 14


def draw(demo: Path, target: Path) -> None:
    """Write the picture of the demo's model."""
    model = omniform.load(demo / "model")
    prompts = [render(template, digit) for template in TEST_TEMPLATES for digit in range(10)]
    drawn = [reply.images[0] for reply in model.generate_batch(prompts, "image", seed=list(range(30)))]
    tokenizer = model.tokenizers["image"]
    samples = ShardReader(demo / "data" / "test")[:10]
    held_out = [tokenizer.to_pil(tokenizer.read(s.spans[1].payload or b"")) for s in samples]
    said = [reply.text for reply in model.generate_batch(held_out, "text", seed=0)]
    side = held_out[0].width * SCALE
    width = 10 * (side + GAP) + GAP
    sheet = Image.new("L", (width, 3 * (side + GAP) + 4 * LINE + 2 * (side + GAP + 2 * LINE) + GAP), 255)
    pen = ImageDraw.Draw(sheet)
    y = GAP
    for row, template in enumerate(TEST_TEMPLATES):
        pen.text((GAP, y), template.format(word="...", a_numeral="a ..."), fill=0)
        y += LINE
        for column in range(10):
            sheet.paste(_enlarged(drawn[10 * row + column], side), (GAP + column * (side + GAP), y))
        y += side + GAP
    for first in (0, 5):
        for column in range(5):
            x = GAP + 2 * column * (side + GAP)
            sheet.paste(_enlarged(held_out[first + column], side), (x, y + LINE))
            words = said[first + column].split()
            for line in range(0, len(words), 2):
                pen.text((x + side + 2, y + LINE + 6 * line), " ".join(words[line : line + 2])[:9], fill=0)
        y += side + GAP + LINE
    sheet.save(target)


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    return image.convert("L").resize((side, side), Image.Resampling.NEAREST)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).with_name("demo.png"))
