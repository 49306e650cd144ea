"""The mathematics: one folder per system, one algorithm per file.

No system imports another; what two share is in `structattn_jax.components`.
"""

__all__ = ['alphafold2', 'alphafold3', 'boltz', 'pallatom', 'sedd', 'seeds']
