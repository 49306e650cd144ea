"""SEDD: ours and the repaired PyTorch code."""
