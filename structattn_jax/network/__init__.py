"""The attention systems, one algorithm per file, next to its paper."""
