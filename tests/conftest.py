"""Settings of the whole test run."""

import os

# Nearly all of the time goes into compiling toy sizes. Without LLVM's
# optimisations that takes a third less; the arithmetic is the same program.
# `make run`, `structattn verify` and `make test-slow` compile as users do.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')

import hypothesis
import jax

hypothesis.settings.register_profile(
  'repeatable', derandomize=True, deadline=None, max_examples=15
)
hypothesis.settings.load_profile('repeatable')

# Parity is a statement about the algorithm, not about TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')
