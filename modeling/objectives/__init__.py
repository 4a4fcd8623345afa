"""One file per objective: how a span is corrupted, scored and produced."""
