"""What comes back of items that a tokenizer has encoded: one file of figures for each modality."""
