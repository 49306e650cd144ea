"""AlphaFold 3: atom encoder and decoder, diffusion transformers, windows."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold3 import (
  atom_layout,
  dense_atom_attention,
  window_plan,
)
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification.golden import Comparison, Golden

_ARGUMENTS = ('token_atoms_act', 'trunk_single_cond', 'trunk_pair_cond')
_TOKEN_ACT = 'decoder_token_act'


def encoder_decoder(golden: Golden) -> Iterator[Comparison]:
  """All outputs and gradients of the encoder and, where there, the decoder."""
  inputs: dict[str, Any] = golden.part('inputs')
  scope, prefix, params = _scope(golden)
  batch = atom_layout.DenseBatch.from_batch(inputs)
  floats = {x: inputs[x] for x in (*_ARGUMENTS, _TOKEN_ACT) if x in inputs}
  weights = {
    key.removeprefix('loss_w_'): value
    for key, value in inputs.items()
    if key.startswith('loss_w_')
  }

  encode, decode = dense_atom_attention.dense_atom_cross_att(
    prefix=prefix, return_pair='pair_cond_rows' in golden.outputs()
  )

  def run(params: Any, floats: Any, batch: Any) -> dict[str, Any]:
    arguments = (floats.get(x) for x in _ARGUMENTS)
    encoded = encode(params, batch, *arguments)
    found = {
      'token_act': encoded.token_act,
      'skip_connection': encoded.skip_connection,
      'queries_single_cond': encoded.queries_single_cond,
      'queries_mask': encoded.queries_mask,
      'pair_cond_rows': encoded.pair_cond,
    }
    if _TOKEN_ACT in floats:
      token_act = floats[_TOKEN_ACT]
      found['position_update'] = decode(params, batch, token_act, encoded)
    return found

  def loss(params: Any, floats: Any, batch: Any) -> jax.Array:
    found = run(params, floats, batch)
    return sum(
      (jnp.sum(found[key] * w) for key, w in weights.items()), jnp.zeros(())
    )

  found = jax.jit(run)(params, floats, batch)
  shape = inputs['tokens_to_queries:gather_mask'].shape
  is_atom = np.arange(np.prod(shape)) < int(batch.plan.num_atoms)
  is_atom = is_atom.reshape(shape)
  for output in golden.outputs():
    if output in ('token_act', 'position_update'):
      yield golden.value(output, found[output])
    elif output in ('skip_connection', 'queries_single_cond'):
      got = _in_upstream_rows(found[output], is_atom)
      yield golden.value(output, got, rows=lambda x: x[is_atom])
    elif output == 'queries_mask':
      yield golden.exact(output, _in_upstream_rows(found[output], is_atom))
    elif output == 'keys_mask':
      yield golden.exact(output, _keys_mask(batch, is_atom))
    elif output == 'pair_cond_rows':
      rows = golden.meta['pair_cond_rows']
      got = _pair_rows(found[output], batch.plan, rows, is_atom.size)
      kept = is_atom[rows]
      yield golden.value(output, got, rows=lambda x, kept=kept: x[kept])
  gradients = [x for x in golden.arrays if x.startswith('grads/')]
  if gradients:
    by_param, by_input = jax.jit(jax.grad(loss, (0, 1)))(params, floats, batch)
    for output in gradients:
      kind, _, path = output.removeprefix('grads/').partition('/')
      if kind == 'inputs':
        got = by_input[path]
      else:
        module, _, array = path.removeprefix(scope).rpartition('/')
        got = by_param[module][array]
      yield golden.gradient(output, got)


def token_transformer(golden: Golden) -> Iterator[Comparison]:
  """The transformer over tokens, with or without a pair."""
  inputs: dict[str, Any] = golden.part('inputs')
  params = golden_lib.haiku_params(golden.part('params'))
  path = next(iter(params)).partition('/__layer_stack')[0]
  path = path.removesuffix('/pair_input_layer_norm')
  scope, _, name = path.rpartition('/')
  own = pm.below(params, f'{scope}/{name}/'.lstrip('/'))

  def run(params: Any, floats: Any) -> jax.Array:
    return dt.transformer(
      params,
      floats['act'],
      inputs['mask'] > 0,
      floats['single_cond'],
      floats.get('pair_cond'),
      name=name,
    )

  floats = {key: value for key, value in inputs.items() if key != 'mask'}
  yield golden.value('act', jax.jit(run)(own, floats))


def blocks(golden: Golden) -> Iterator[Comparison]:
  """The parts of the transformers one by one."""
  inputs: dict[str, Any] = golden.part('inputs')
  params = golden_lib.haiku_params(golden.part('params'))
  x_q, x_k = inputs['x_q'], inputs['x_k']
  cond_q, cond_k = inputs['cond_q'], inputs['cond_k']
  mask_q, mask_k = inputs['mask_q'], inputs['mask_k']

  def cross(name: str, *rest: Any) -> jax.Array:
    found = dt.cross_attention(params, x_q, x_k, mask_q, mask_k, *rest, name)
    return found * mask_q[..., None]

  def own(name: str, *rest: Any) -> jax.Array:
    return dt.self_attention(params, x_q[0], mask_q[0], *rest, name)

  def run(output: str) -> jax.Array:
    match output:
      case 'adaln_cond':
        return dt.adaptive_layernorm(params, x_q, cond_q, 'a1_')
      case 'adaln_uncond':
        return dt.adaptive_layernorm(params, x_q, None, 'a2_')
      case 'azi_cond':
        return dt.adaptive_zero_init(params, x_q, cond_q, 'z1_')
      case 'azi_uncond':
        return dt.adaptive_zero_init(params, x_q, None, 'z2_')
      case 'transition_cond':
        return dt.transition_block(params, x_q, cond_q, 't1_')
      case 'transition_uncond':
        return dt.transition_block(params, x_q, None, 't2_')
      case 'transition_noglu':
        return dt.transition_block(params, x_q, cond_q, 't3_')
      case 'cross_cond':
        return cross('c1_', inputs['pair_logits'], cond_q, cond_k)
      case 'cross_uncond':
        return cross('c2_', None, None, None)
      case 'self_cond':
        return own('s1_', inputs['self_logits'], cond_q[0])
      case 'self_uncond':
        return own('s2_', None, None)
    raise golden_lib.GoldenError(f'unknown output {output!r}')

  for output in golden.outputs():
    yield golden.value(output, jax.jit(run, static_argnums=0)(output))


def windows(golden: Golden) -> Iterator[Comparison]:
  """Gathers to the keys: one atom per token and three padded tokens."""
  for i, case in enumerate(golden.arrays['inputs/cases'].tolist()):
    num_queries, num_keys, num_atoms, padded = case
    mask = np.arange(num_atoms + 3)[:, None] < num_atoms
    gathers = atom_layout.AtomCrossAtt.build(
      np.pad(mask, ((0, 0), (0, window_plan.NUM_SLOTS - 1))),
      num_real_tokens=num_atoms,
      padded_num_atoms=padded,
      num_queries=num_queries,
      num_keys=num_keys,
    )
    found = {
      'starts': window_plan.key_starts(
        num_atoms, padded // num_queries, num_queries, num_keys
      ),
      'queries_to_keys_idxs': gathers.queries_to_keys.gather_idxs,
      'queries_to_keys_mask': gathers.queries_to_keys.gather_mask,
      'tokens_to_keys_idxs': gathers.tokens_to_keys.gather_idxs,
      'tokens_to_keys_mask': gathers.tokens_to_keys.gather_mask,
    }
    for output in golden.outputs(f'{i}/'):
      yield golden.exact(output, found[output.removeprefix(f'{i}/')])


def _scope(golden: Golden) -> tuple[str, str, dict[str, Any]]:
  """Outer scope of the parameters, prefix of their names, and themselves."""
  params = golden_lib.haiku_params(golden.part('params'))
  leaf = '_embed_ref_pos'
  path = next(path for path in params if path.endswith(leaf))
  outer, slash, name = path.removesuffix(leaf).rpartition('/')
  return outer + slash, name, dict(pm.below(params, outer + slash))


def _in_upstream_rows(found: Any, is_atom: np.ndarray) -> np.ndarray:
  """Our atoms in as many windows as upstream has."""
  found = np.asarray(found)
  channels = found.shape[2:]
  out = np.zeros((*is_atom.shape, *channels), found.dtype)
  out[is_atom] = found.reshape(-1, *channels)[: is_atom.sum()]
  return out


def _keys_mask(
  batch: atom_layout.DenseBatch, is_atom: np.ndarray
) -> np.ndarray:
  """Masks of the keys by our own gathers, of upstream's size."""
  gathers = atom_layout.AtomCrossAtt.build(
    batch.pred_dense_atom_mask,
    padded_num_atoms=is_atom.size,
    num_queries=batch.plan.num_queries,
    num_keys=batch.plan.num_keys,
  )
  found = atom_layout.convert(
    gathers.queries_to_keys,
    atom_layout.Arranged(jnp.asarray(is_atom), 'queries'),
  )
  return np.asarray(found.values)


def _pair_rows(
  pair: Any, plan: window_plan.WindowPlan, rows: list[int], n_flat: int
) -> np.ndarray:
  """Windows of pairs with the keys in upstream's order.

  With fewer atoms than keys upstream's padding may come first.
  """
  num_atoms, num_keys = int(plan.num_atoms), plan.num_keys
  starts = window_plan.key_starts(
    num_atoms, n_flat // plan.num_queries, plan.num_queries, num_keys
  )
  found = []
  for row in rows:
    position = (starts[row] + np.arange(num_keys)) % n_flat
    own = position - plan.key_start[row]
    found.append(pair[row][:, np.where(position < num_atoms, own, num_atoms)])
  return np.stack(found)
