"""Oracles of AlphaFold 2: attention and structure module."""
