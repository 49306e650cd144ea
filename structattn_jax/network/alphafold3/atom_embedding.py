"""From a conformer to flat atoms and from flat atoms to tokens.

Abramson et al. (2024) Suppl. Alg. 5, lines 1 and 16, for
`cached_atom_attention`: lookups instead of products with one-hot vectors, and
sums over sorted atoms.

Shapes and units: see `window_plan`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from structattn_jax.components import (
  functional,
  mapping,
  segment,
  windowed_attention,
)
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import window_plan


def embed_atoms(
  params: Params,
  plan: window_plan.WindowPlan,
  ref: window_plan.RefStructure,
  prefix: str,
  chunk: int | None,
) -> jax.Array:
  """Line 1: [n_atom, c_atom], zero for atoms that the conformer lacks."""
  leaves = ('pos', 'mask', 'element', 'charge', 'atom_name')
  dtype = jnp.asarray(ref.ref_pos).dtype
  weights = {
    leaf: params[f'{prefix}_embed_ref_{leaf}']['weights'].astype(dtype)
    for leaf in leaves
  }
  floats = (ref.ref_pos, ref.ref_charge)
  constants = (ref.ref_mask, ref.ref_element, ref.ref_atom_name_chars)
  floats, constants = jax.tree.map(
    lambda x: window_plan.query_blocks(plan, jnp.asarray(x)),
    (floats, constants),
  )
  found = mapping.chunked_map(
    _embed_window,
    functional.chunk_size(
      plan.n_window, chunk, on_cpu=windowed_attention.CPU_WINDOWS
    ),
    None,
    weights,
    None,
    None,
    floats,
    constants,
  )
  return found.reshape(plan.n_atom, -1)


def _embed_window(
  weights: dict[str, jax.Array], taken: None, floats: Any, constants: Any
) -> jax.Array:
  """Features of the atoms of some windows.

  The products with one-hot vectors are lookups; an index outside of the table
  finds zeros.
  """
  del taken
  position, charge = floats
  mask, element, chars = constants
  # What is masked may hold anything.
  position = jnp.where(mask[..., None], position, 0)
  charge = jnp.where(mask, charge, 0)

  def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    # Negative ones would count from the end.
    index = jnp.where(index < 0, table.shape[0], index)
    return jnp.asarray(table).at[index].get(mode='fill', fill_value=0)

  act = jnp.dot(position, weights['pos'], precision='highest')
  act += weights['mask'] + jnp.arcsinh(charge)[..., None] * weights['charge']
  act += lookup(weights['element'], element)
  n_char = chars.shape[-1]
  names = weights['atom_name'].reshape(n_char, -1, act.shape[-1])
  for i in range(n_char):
    act += lookup(names[i], chars[..., i])
  return jnp.where(mask[..., None], act, 0)


def token_mean(
  plan: window_plan.WindowPlan, act: jax.Array, weights: jax.Array
) -> jax.Array:
  """Line 16: mean of relu(act @ weights) over the atoms of each token.

  Some columns at a time: the projected atoms are several times larger than the
  activations of atoms or tokens.
  """
  channels, c_token = weights.shape
  width = functional.largest_divisor(c_token, channels)
  columns = weights.astype(act.dtype).reshape(channels, -1, width)

  @jax.checkpoint
  def mean(own: jax.Array) -> jax.Array:
    return segment.segment_mean(
      jax.nn.relu(act @ own),
      plan.token_index,
      plan.num_tokens,
      mask=plan.atom_mask,
    )

  found = jax.lax.map(mean, jnp.swapaxes(columns, 0, 1))
  return jnp.swapaxes(found, 0, 1).reshape(plan.num_tokens, c_token)
