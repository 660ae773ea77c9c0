"""The transformers host: an OpenAI-compatible server over continuous batching, with steering."""
