"""Which row may attend to which: four per-row arrays and one predicate, rendered for every attention backend."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from omniform.kernels.attention import DenseMask, DocumentBatch, DocumentMask, Mask, MaskForm

PADDING = -1


@dataclass(frozen=True)
class AttentionPattern:
    """Row q may attend to row k of the same batch entry iff

        same_document & (k <= q | (same_block & bidirectional[k])) & (same_block | ~private[k])

    where q and k are row indices. Padding rows form the document `PADDING`: they see only each other.

    Attributes:
        document_ids: which sample a row belongs to.
        block_ids: which block of its document a row belongs to; unique within the document.
        bidirectional: rows that the whole of their block may see, earlier rows too.
        private: rows of a noised span, which no other block may see.
    """

    document_ids: Int[Tensor, "B L"]
    block_ids: Int[Tensor, "B L"]
    bidirectional: Bool[Tensor, "B L"]
    private: Bool[Tensor, "B L"]

    def allowed(self, n_queries: int | None = None) -> Bool[Tensor, "B Q L"]:
        """Return the predicate for the last `n_queries` rows (default: all) against all rows."""
        length = self.document_ids.shape[1]
        first = 0 if n_queries is None else length - n_queries
        rows = torch.arange(length, device=self.document_ids.device)
        not_later = rows[None, :] <= rows[first:, None]  # (Q, L)
        same_document = self.document_ids[:, first:, None] == self.document_ids[:, None, :]
        same_block = (self.block_ids[:, first:, None] == self.block_ids[:, None, :]) & same_document
        visible = not_later | (same_block & self.bidirectional[:, None, :])
        return same_document & visible & (same_block | ~self.private[:, None, :])

    def to(self, device: torch.device | str) -> "AttentionPattern":
        """Return the pattern with its arrays on `device`."""
        return AttentionPattern(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def append(self, new: "AttentionPattern") -> "AttentionPattern":
        """Return the pattern of this one's rows followed by those of `new`, in each batch entry."""
        return AttentionPattern(
            *(torch.cat([getattr(self, name), getattr(new, name)], dim=1) for name in self.__dataclass_fields__)
        )

    def render(self, form: MaskForm, n_queries: int | None = None) -> Mask:
        """Return the mask in the form that a backend takes.

        Args:
            form: dense boolean, or one small dense batch per group of similarly long documents.
            n_queries: render only the last rows as queries (decoding against a cache); the dense form alone can.

        Raises:
            ValueError: the document form is asked for a subset of the queries.
        """
        if form is MaskForm.DENSE:
            return DenseMask(self.allowed(n_queries)[:, None])
        if n_queries is not None:
            raise ValueError("the document form renders whole sequences; decode against a cache with the dense form")
        return self._render_documents()

    def _render_documents(self) -> DocumentMask:
        batch, length = self.document_ids.shape
        device = self.document_ids.device
        flat = torch.arange(batch * length, device=device).view(batch, length)
        document_ids = self.document_ids
        if bool((document_ids == PADDING).all()):
            # One row stands for a document, so that every projection takes part in the backward pass of every rank.
            document_ids = document_ids.clone()
            document_ids[0, 0] = 0
        real = document_ids != PADDING
        # Rows of one document are contiguous, so a new document starts wherever the id differs from its left neighbour.
        left = torch.full_like(document_ids, PADDING)
        left[:, 1:] = document_ids[:, :-1]
        starts = flat[real & (document_ids != left)]
        right = torch.full_like(document_ids, PADDING)
        right[:, :-1] = document_ids[:, 1:]
        stops = flat[real & (document_ids != right)] + 1
        lengths = stops - starts
        batches: list[DocumentBatch] = []
        n_laid = 0
        sources = torch.full((batch * length,), -1, device=device)
        widths = 16 * torch.ceil(lengths / 16).to(torch.int64)
        for width in torch.unique(widths).tolist():
            chosen = widths == width
            offsets = torch.arange(width, device=device)
            present = offsets[None, :] < lengths[chosen, None]  # (N, W)
            rows = torch.where(present, starts[chosen, None] + offsets[None, :], starts[chosen, None])
            documents = AttentionPattern(
                torch.where(present, torch.zeros_like(rows), PADDING),
                self.block_ids.reshape(-1)[rows],
                self.bidirectional.reshape(-1)[rows],
                self.private.reshape(-1)[rows],
            )
            batches.append(DocumentBatch(rows, documents.allowed()[:, None]))
            laid = n_laid + torch.arange(rows.numel(), device=device).view_as(rows)
            sources[rows[present]] = laid[present]
            n_laid += rows.numel()
        return DocumentMask(tuple(batches), torch.where(sources < 0, n_laid, sources))
