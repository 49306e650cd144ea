"""Gradients of every system where parameters and inputs differ in dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import registry

_MODES = {
  'bfloat16_params': (jnp.bfloat16, jnp.float32),
  'float64_params': (jnp.float64, jnp.float32),
  'float64_inputs': (jnp.float32, jnp.float64),
}


@pytest.mark.parametrize('mode', _MODES)
@pytest.mark.parametrize('name', registry.CASES)
def test_gradients_have_the_dtypes_of_what_they_are_of(name, mode):
  case = registry.CASES[name]
  shapes = jax.eval_shape(
    lambda: case.system.init(jax.random.key(0), dict(case.inputs))
  )
  of_params, of_inputs = _MODES[mode]
  with jax.enable_x64('float64' in mode):
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, of_params), shapes
    )
    floats = {
      key: jax.ShapeDtypeStruct(np.shape(x), of_inputs)
      for key, x in case.float_inputs().items()
    }

    def loss(params, floats):
      outputs = case.apply(params, {**case.inputs, **floats})
      return sum(y.astype(jnp.float32).sum() for y in jax.tree.leaves(outputs))

    found = jax.eval_shape(jax.grad(loss, (0, 1)), params, floats)
  assert {x.dtype for x in jax.tree.leaves(found[0])} == {np.dtype(of_params)}
  assert {x.dtype for x in jax.tree.leaves(found[1])} <= {np.dtype(of_inputs)}
