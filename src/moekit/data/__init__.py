"""Text in: sources, splits, tokenizer, packed token streams and the loaders that feed a model."""
