"""Training: one loop over any Task, on DeepSpeed ZeRO, with checkpoints that any stage and world size can read."""
