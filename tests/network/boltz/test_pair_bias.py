"""The blocked pair biases against their definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.network.boltz import pair_bias

C_PAIR, C_Z, HEADS = 4, 5, (2, 1)

# name: queries, keys, tokens of atoms, number of tokens.
LAYOUTS = {
  'residues': (8, 32, np.repeat(np.arange(9), 7)[:56], 10),
  'atom_tokens': (8, 16, np.arange(40), 40),
  'any_order': (8, 24, np.random.default_rng(0).integers(-1, 6, 48), 6),
  'one_window': (6, 6, np.array([3, 3, -1, 0, 0, 5]), 6),
}


def problem(layout, with_tokens=True):
  n_query, n_key, token, n_token = LAYOUTS[layout]
  rng = np.random.default_rng(1)
  n_atom = len(token)
  normal = rng.standard_normal
  weights = pair_bias.Weights(
    normal((5, C_PAIR)),
    tuple(normal((3, C_PAIR, C_PAIR))),
    normal((C_PAIR, sum(HEADS))),
    normal(sum(HEADS)),
  )
  atoms = pair_bias.Atoms(
    normal((n_atom, C_PAIR)),
    normal((n_atom, C_PAIR)),
    normal((n_atom, 3)),
    np.maximum(token, 0) // 2,
    rng.random(n_atom) > 0.2,
  )
  tokens = None
  if with_tokens:
    tokens = pair_bias.Tokens(
      normal((n_token, n_token, C_Z)),
      normal((C_Z, C_PAIR)),
      normal(C_PAIR),
      token,
    )
  sizes = pair_bias.Sizes(n_query, n_key, HEADS, -7.0)
  return sizes, jax.tree.map(jnp.asarray, (weights, atoms, tokens))


def biases_and_gradients(fn, sizes, arguments):
  def loss(*arguments):
    biases = fn(sizes, *arguments)
    return sum(jnp.sum(jnp.sin(x * (i + 1))) for i, x in enumerate(biases)), (
      biases
    )

  run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)
  (_, biases), gradients = jax.jit(run)(*arguments)
  floats = [x for x in jax.tree.leaves(gradients) if x.dtype == np.float64]
  return biases, floats


@pytest.mark.parametrize('layout', LAYOUTS)
def test_blocked_biases_equal_published_with_gradients(layout):
  with jax.enable_x64(True):
    sizes, arguments = problem(layout)
    want = biases_and_gradients(pair_bias.published_biases, sizes, arguments)
    got = biases_and_gradients(pair_bias.blocked_biases, sizes, arguments)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert g.shape == w.shape
    assert np.abs(g - w).max() < 1e-12 * max(np.abs(w).max(), 1)


def test_blocked_biases_without_tokens_equal_published():
  with jax.enable_x64(True):
    sizes, arguments = problem('residues', with_tokens=False)
    want = biases_and_gradients(pair_bias.published_biases, sizes, arguments)
    got = biases_and_gradients(pair_bias.blocked_biases, sizes, arguments)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(g - w).max() < 1e-12 * max(np.abs(w).max(), 1)


def largest_array(jaxpr) -> int:
  """Entries of the largest result anywhere in a jaxpr."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, 'size')]
    for value in equation.params.values():
      for item in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(item, 'jaxpr', item)
        if hasattr(inner, 'eqns'):
          sizes.append(largest_array(inner))
  return max(sizes)


def test_blocked_biases_memory_grows_with_atoms_not_with_pairs():
  def largest(n_atom):
    n_token = n_atom // 2
    float32 = jnp.float32

    def array(*shape, dtype=float32):
      return jax.ShapeDtypeStruct(shape, dtype)

    weights = pair_bias.Weights(
      array(5, 2), (array(2, 2),) * 3, array(2, 3), array(3)
    )
    atoms = pair_bias.Atoms(
      array(n_atom, 2),
      array(n_atom, 2),
      array(n_atom, 3),
      array(n_atom, dtype=jnp.int32),
      array(n_atom, dtype=jnp.bool_),
    )
    tokens = pair_bias.Tokens(
      array(n_token, n_token, 1),
      array(1, 2),
      array(2),
      array(n_atom, dtype=jnp.int32),
    )
    sizes = pair_bias.Sizes(8, 32, (2, 1), -7.0)
    jaxpr = jax.make_jaxpr(pair_bias.blocked_biases, static_argnums=0)(
      sizes, weights, atoms, tokens
    )
    return largest_array(jaxpr.jaxpr)

  # The pair of tokens itself, which is given, is not projected as a whole.
  n_atom = 64
  assert largest(n_atom) == max(n_atom * 32 * 2, (n_atom // 2) ** 2)
  assert largest(4 * n_atom) < 2 * (4 * n_atom // 2) ** 2
