"""Settings of the whole test run."""

import os

# Nearly all of the time goes into compiling toy sizes. Without most of the
# optimisations that takes less than half; the arithmetic is the same program.
# `make run`, `structattn verify` and `make test-slow` compile as users do.
if 'XLA_FLAGS' not in os.environ:
  os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
  'repeatable', derandomize=True, deadline=None, max_examples=15
)
hypothesis.settings.load_profile('repeatable')

# Parity is a statement about the algorithm, not about TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture(autouse=True, scope='module')
def forget_compiled_functions():
  """Gigabytes of them would slow down all that comes later."""
  yield
  jax.clear_caches()
