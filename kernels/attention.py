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
        rows: flat index of each row; where `present` is False it repeats the document's first row.
    """

    rows: Int[Tensor, "N W"]
    present: Bool[Tensor, "N W"]
    allowed: Bool[Tensor, "N 1 W W"]


@dataclass(frozen=True)
class DocumentMask:
    """All documents of a packed batch: rows outside every document (padding) get zeros."""

    batches: tuple[DocumentBatch, ...]


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
    flat_q, flat_k, flat_v = (x.transpose(1, 2).reshape(batch * length, x.shape[1], head_dim) for x in (q, k, v))
    out = torch.zeros_like(flat_q)
    for documents in mask.batches:
        gathered = (x[documents.rows].transpose(1, 2) for x in (flat_q, flat_k, flat_v))  # (N, H or G, W, K)
        doc_q, doc_k, doc_v = gathered
        attended = F.scaled_dot_product_attention(
            doc_q, _share(doc_k, group), _share(doc_v, group), attn_mask=documents.allowed
        )
        present = documents.present
        out = out.index_put((documents.rows[present],), attended.transpose(1, 2)[present].to(out.dtype))
    return out.view(batch, length, heads, head_dim).transpose(1, 2)
