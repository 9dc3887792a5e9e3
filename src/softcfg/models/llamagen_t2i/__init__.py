"""LlamaGen's text-to-image models."""
