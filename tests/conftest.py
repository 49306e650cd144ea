"""Settings of the whole test run."""

import hypothesis
import jax

hypothesis.settings.register_profile(
  'repeatable', derandomize=True, deadline=None, max_examples=15
)
hypothesis.settings.load_profile('repeatable')

# Parity is a statement about the algorithm, not about TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')
