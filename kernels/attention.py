"""Scaled dot-product attention over the mask forms that backends take.

A mask arrives already rendered; its form chooses the code path here and nowhere else. GPU backends (block masks,
variable-length kernels) join as further forms.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

WIDEST_PRODUCTS = 512
"""Width of the widest bf16 documents whose attention on CPUs is faster as plain products than by the fused kernel.

Time of the products over the kernel's, forward and backward: bf16 0.17, 0.20, 0.54, 0.62 and 1.13 at widths 48, 64,
256, 512 and 1024; fp32 1.10, 1.45, 1.56 and 1.91 at 48, 64, 256 and 512.
"""


class MaskForm(StrEnum):
    """The forms in which a mask can be given."""

    DENSE = "dense"
    DOCUMENTS = "documents"


@dataclass(frozen=True)
class DenseMask:
    """`allowed[b, 0, q, k]` is True where query row q may attend to key row k."""

    allowed: Bool[Tensor, "B 1 Q L"]


@dataclass(frozen=True)
class DocumentBatch:
    """Documents of similar length, gathered from the flattened (B * L) rows and padded to one width.

    Attributes:
        rows: flat index of each row; beyond the end of a document its first row again, whose result is not used.
    """

    rows: Int[Tensor, "N W"]
    allowed: Bool[Tensor, "N 1 W W"]


@dataclass(frozen=True)
class DocumentMask:
    """All documents of a packed batch: rows outside every document (padding) get zeros.

    Attributes:
        sources: of each of the flattened (B * L) rows among those of all batches, laid end to end and followed by one
            row of zeros, which is the place of padding.
    """

    batches: tuple[DocumentBatch, ...]
    sources: Int[Tensor, "R"]


Mask = DenseMask | DocumentMask


def preferred_form(device: torch.device) -> MaskForm:
    """Return the fastest mask form for training on packed rows: documents are short beside the rows that hold them."""
    del device  # one answer until GPU backends join
    return MaskForm.DOCUMENTS


def attention(
    q: Float[Tensor, "B H Q K"],
    k: Float[Tensor, "B G L K"],
    v: Float[Tensor, "B G L K"],
    mask: Mask,
) -> Float[Tensor, "B H Q K"]:
    """Return softmax(q k^T / sqrt(K)) v over the allowed keys; H query heads share G key-value heads.

    Raises:
        ValueError: H is not a multiple of G.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key-value heads evenly")
    group = q.shape[1] // k.shape[1]
    if isinstance(mask, DenseMask):
        return F.scaled_dot_product_attention(q, _share(k, group), _share(v, group), attn_mask=mask.allowed)
    return _document_attention(q, k, v, mask, group)


def attention_reference(
    q: Float[Tensor, "B H Q K"],
    k: Float[Tensor, "B G L K"],
    v: Float[Tensor, "B G L K"],
    allowed: Bool[Tensor, "B 1 Q L"],
) -> Float[Tensor, "B H Q K"]:
    """The same by the textbook formula, in the inputs' precision: what every path is tested against."""
    group = q.shape[1] // k.shape[1]
    scores = q @ _share(k, group).transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1) @ _share(v, group)


def _share(x: Float[Tensor, "B G L K"], group: int) -> Float[Tensor, "B H L K"]:
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _document_attention(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, group: int) -> Tensor:
    batch, heads, length, head_dim = q.shape
    # Rows are gathered, and put back, once for all batches: both ways forward and backward are plain copies of rows.
    flat = torch.cat([q, k, v], dim=1).transpose(1, 2).reshape(batch * length, -1)
    rows = [documents.rows.flatten() for documents in mask.batches]
    gathered = flat.index_select(0, torch.cat(rows)).split([len(own) for own in rows])
    attended = []
    for documents, own in zip(mask.batches, gathered, strict=True):
        by_head = own.view(*documents.rows.shape, -1, head_dim).transpose(1, 2)  # (N, H + 2 G, W, K)
        doc_q, doc_k, doc_v = by_head.split([heads, k.shape[1], v.shape[1]], dim=1)
        found = _attend(doc_q, _share(doc_k, group), _share(doc_v, group), documents.allowed)
        attended.append(found.transpose(1, 2).reshape(-1, heads * head_dim))
    attended.append(torch.zeros_like(attended[0][:1]))
    out = torch.cat(attended).index_select(0, mask.sources)
    return out.view(batch, length, heads, head_dim).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    on_cpu, width = q.device.type == "cpu", q.shape[-2]
    if on_cpu and torch.is_grad_enabled() and q.dtype == torch.bfloat16 and width <= WIDEST_PRODUCTS:
        # The fused kernel of CPUs goes backward by single rows, in bf16 several times slower than these products.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
