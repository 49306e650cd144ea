"""Faster paths that a benchmark justifies, each beside its reference."""
