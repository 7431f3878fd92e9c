"""Writes a trained model for transformers, with its tokenizer and a model card."""
