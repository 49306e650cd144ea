"""Every system where parameters, inputs and the caller's settings differ.

Errors about dtypes come when a function is traced: nothing is compiled here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import structattn_jax as sa

each_case = pytest.mark.parametrize(
  'case', list(registry.CASES.values()), ids=list(registry.CASES)
)


def traced(case, of_params, of_inputs):
  """Shapes of the outputs, and of the gradients of parameters and inputs."""

  def like(x, dtype):
    return jax.ShapeDtypeStruct(np.shape(x), dtype)

  params = jax.tree.map(lambda x: like(x, of_params), case.params)
  floats = {k: like(x, of_inputs) for k, x in case.float_inputs().items()}

  def loss(params, floats):
    outputs = case.apply(params, {**case.inputs, **floats})
    total = sum(jnp.sum(y, dtype=jnp.float32) for y in jax.tree.leaves(outputs))
    return total, outputs

  gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
  (of_params, of_inputs), outputs = jax.eval_shape(gradient, params, floats)
  return outputs, of_params, of_inputs


def dtypes(tree):
  return {np.dtype(x.dtype) for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
  ('of_params', 'of_inputs'),
  [
    (jnp.bfloat16, jnp.float32),
    (jnp.float64, jnp.float32),
    (jnp.float32, jnp.float64),
  ],
  ids=['bfloat16 parameters', 'float64 parameters', 'float64 inputs'],
)
@each_case
def test_result_has_the_dtype_of_the_activations(case, of_params, of_inputs):
  with jax.enable_x64(True):
    outputs, grad_params, grad_inputs = traced(case, of_params, of_inputs)
  assert dtypes(outputs) == {np.dtype(of_inputs)}
  assert dtypes(grad_params) == {np.dtype(of_params)}
  assert dtypes(grad_inputs) <= {np.dtype(of_inputs)}


@each_case
def test_strict_settings_of_the_caller_change_nothing(case):
  with (
    jax.numpy_rank_promotion('raise'),
    jax.numpy_dtype_promotion('strict'),
  ):
    params = jax.tree.map(np.asarray, case.params)
    outputs = jax.eval_shape(case.apply, params, dict(case.inputs))
  assert dtypes(outputs) == {np.dtype(np.float32)}


@each_case
def test_float16_is_one_clear_error(case):
  low = jax.tree.map(lambda x: np.asarray(x, np.float16), case.params)
  with pytest.raises(TypeError, match=r'params: expected .* got float16 in'):
    jax.eval_shape(case.apply, low, dict(case.inputs))
  inputs = dict(case.inputs)
  for name, value in case.float_inputs().items():
    inputs[name] = np.asarray(value, np.float16)
  with pytest.raises(TypeError, match='float16'):
    jax.eval_shape(case.apply, case.params, inputs)


@each_case
def test_weak_types_are_their_dtypes(case):
  """Arrays that were made of Python numbers."""
  weak = {
    name: jnp.broadcast_to(jnp.asarray(0.25), np.shape(value))
    for name, value in case.float_inputs().items()
    if name not in ('rotation', 'positions')
  }
  assert all(x.weak_type for x in weak.values())
  outputs = jax.eval_shape(case.apply, case.params, {**case.inputs, **weak})
  assert dtypes(outputs) == {np.dtype(np.float32)}


@pytest.mark.parametrize('of_params', [jnp.bfloat16, jnp.float64])
def test_structure_module_takes_parameters_of_other_dtypes(of_params):
  config = sa.alphafold2.StructureModuleConfig(
    num_layer=2, num_channel=8, num_head=2, implementation='blocked'
  )
  init, apply = sa.alphafold2.transform_structure_module(config)
  inputs = (jnp.ones((5, 8)), jnp.ones((5, 5, 4)), jnp.zeros(5, jnp.int32))
  shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
  with jax.enable_x64(True):
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, of_params), shapes
    )

    def loss(params):
      return jnp.sum(apply(params, *inputs).final_atom_positions)

    value, gradient = jax.eval_shape(jax.value_and_grad(loss), params)
  assert value.dtype == np.float32
  assert dtypes(gradient) == {np.dtype(of_params)}
