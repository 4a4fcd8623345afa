"""The network and its nouns: sequences, attention pattern, objectives, decoder. Nothing distributed."""
