"""Settings of the whole test run."""

import os
from importlib import metadata

# Nearly all of the time goes into compiling toy sizes. Without most of the
# optimisations that takes a third; the arithmetic is the same program.
# `make run`, `structattn verify` and `make test-slow` compile as users do.
if 'XLA_FLAGS' not in os.environ:
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  # Another release may not know it, and would abort.
  if metadata.version('jaxlib').startswith('0.10.'):
    os.environ['XLA_FLAGS'] = '--xla_cpu_use_fusion_emitters=false'

import hypothesis
import jax
import pytest

# A tiny training run, for the tests of training and of the command line.
pytest_plugins = ['tiny_run']

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
