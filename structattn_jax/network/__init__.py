"""The mathematics: one folder per system, one algorithm per file.

No system imports another; what two share is in `structattn_jax.components`.
"""
