"""Attention over packed documents: one small dense mask per group of documents, against one dense mask of the row.

B 1, H 8, K 64, L 2048, fp32, forward and backward, one thread. Documents of 40 to 320 rows, each a causal text with a
bidirectional image of 64 rows in it. Both give the same numbers within rounding, which is checked first.
"""

from typing import Any

import numpy as np
import torch
from paired import compare, control

from omniform.kernels.attention import MaskForm, attention
from omniform.modeling.attention_pattern import AttentionPattern

LENGTH, HEADS, HEAD_DIM, IMAGE = 2048, 8, 64, 64


def packed_pattern(seed: int) -> AttentionPattern:
    """Return a row full of documents, text with an image in its middle."""
    random = np.random.default_rng(seed)
    document_ids, block_ids, bidirectional = [], [], []
    while len(document_ids) < LENGTH:
        size = min(int(random.integers(40, 321)), LENGTH - len(document_ids))
        image = range((size - IMAGE) // 2, (size + IMAGE) // 2) if size > IMAGE else range(0)
        number, first = len(set(document_ids)), len(block_ids)
        document_ids += [number] * size
        block_ids += [first if row in image else first + 1 + row for row in range(size)]
        bidirectional += [row in image for row in range(size)]
    return AttentionPattern(
        torch.tensor([document_ids]),
        torch.tensor([block_ids]),
        torch.tensor([bidirectional]),
        torch.zeros(1, LENGTH, dtype=torch.bool),
    )


def run() -> dict[str, Any]:
    """Return the ratio, and `text` that says it all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pattern = packed_pattern(0)
    masks = {form: pattern.render(form) for form in (MaskForm.DOCUMENTS, MaskForm.DENSE)}
    q, k, v, direction = (torch.randn(1, HEADS, LENGTH, HEAD_DIM) for _ in range(4))

    def step(form: MaskForm) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(inputs[0], inputs[1], inputs[2], masks[form])
        return [out.detach(), *torch.autograd.grad(out, inputs, direction)]

    error = max(float((a - b).abs().max()) for a, b in zip(step(MaskForm.DOCUMENTS), step(MaskForm.DENSE), strict=True))
    if error > 1e-4:
        raise RuntimeError(f"the two ways differ by {error:.1e}, expected at most 1e-4: nothing was timed")
    calm, verdict = control(lambda: step(MaskForm.DOCUMENTS))
    ratio = compare(lambda: step(MaskForm.DOCUMENTS), lambda: step(MaskForm.DENSE))
    density = float(pattern.allowed().float().mean())
    text = (
        f"attention: B 1 H {HEADS} K {HEAD_DIM} L {LENGTH} fp32, forward and backward, 1 thread, "
        f"{len(pattern.document_ids.unique())} documents, {100 * density:.1f} % of all pairs allowed\n"
        f"  equal work: largest difference {error:.1e}\n"
        f"  dense mask / per document: {ratio}\n"
        f"  rows per second: {LENGTH / ratio.seconds[0]:,.0f} per document, {LENGTH / ratio.seconds[1]:,.0f} dense\n"
        f"  control (against itself): {calm} -> {verdict}"
    )
    return {"ratio": ratio.ratio, "interval": [ratio.low, ratio.high], "control": calm.ratio, "text": text}


if __name__ == "__main__":
    print(run()["text"])
