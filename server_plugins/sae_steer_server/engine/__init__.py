"""Completions from one model in one running batch, over transformers' continuous batching."""
