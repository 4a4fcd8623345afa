"""Raw files to shards, and shards to the packed sequences of a training step."""
