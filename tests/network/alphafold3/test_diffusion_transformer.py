"""AF3's transformers over tokens and over windows of atoms."""

import dataclasses
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax import verification as replay
from structattn_jax.components import functional
from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold3 import atom_layout, window_plan
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3 import transformer_parameters as tp
from structattn_jax.network.alphafold3 import window_transformer as wt
from structattn_jax.verification.golden import Golden

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens'
GOLDENS /= 'af3_atom_cross_attention'

SIZES = tp.TransformerConfig(
  attention=tp.SelfAttentionConfig(num_head=2, key_dim=6, value_dim=4),
  num_blocks=4,
  super_block_size=2,
)
N_TOKEN, CHANNELS, C_COND, C_PAIR = 7, 8, 5, 3


class WideGolden(Golden):
  """A golden whose arrays are not narrowed to float32."""

  def part(self, prefix):
    return {
      name.removeprefix(f'{prefix}/'): (
        value.astype(np.float64) if value.dtype == np.float32 else value
      )
      for name, value in self.arrays.items()
      if name.startswith(f'{prefix}/')
    }


@pytest.mark.parametrize(
  'case', ['blocks', 'token_transformer', 'token_transformer_nopair']
)
def test_golden_is_replayed(case):
  golden = Golden.read(GOLDENS / f'{case}.npz', case)
  rows = replay.run(golden)
  assert len(rows) == len(golden.outputs())
  for row in rows:
    assert row.max_error <= 2e-6 * row.scale, row
  wide = WideGolden(golden.case, golden.meta, golden.arrays)
  with jax.enable_x64(True):
    rows = replay.run(wide)
  for row in rows:
    assert row.max_error <= 1e-12 * row.scale, row


@pytest.fixture(scope='module')
def token_case():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  inputs = (
    normal(N_TOKEN, CHANNELS),
    np.arange(N_TOKEN) < N_TOKEN - 2,
    normal(N_TOKEN, C_COND),
    normal(N_TOKEN, N_TOKEN, C_PAIR),
  )
  table = tp.transformer_parameters(SIZES, CHANNELS, C_COND, C_PAIR)
  params = jax.tree.map(
    lambda x: x + 0.3 * normal(*x.shape),
    pm.init_parameters(table, jax.random.key(0)),
  )
  return params, inputs


def test_transformer_module_has_upstreams_parameters(token_case):
  params, inputs = token_case
  init, apply = hk.without_apply_rng(
    hk.transform(lambda *x: sa.alphafold3.Transformer(SIZES)(*x))
  )
  made = init(jax.random.key(0), *inputs)
  stack = '__layer_stack_with_per_layer'
  own = {f'transformer/{key}': value for key, value in params.items()}
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, own)
  block = f'transformer/{stack}/{stack}/transformer'
  assert made[f'{block}q_projection']['weights'].shape == (2, 2, 8, 2, 3)
  assert made[f'{block}ffw_transition1']['weights'].shape == (2, 2, 8, 32)
  projection = f'transformer/{stack}/pair_logits_projection'
  assert made[projection]['weights'].shape == (2, C_PAIR, 2, 2)
  np.testing.assert_array_equal(
    made[f'{block}adaptive_zero_cond']['bias'], np.full((2, 2, 8), -2)
  )
  np.testing.assert_allclose(
    apply(own, *inputs), dt.transformer(params, *inputs), rtol=1e-6
  )


def test_transformer_masked_tokens_change_no_other(token_case):
  params, (act, mask, cond, pair) = token_case
  run = jax.jit(dt.transformer)
  want = run(params, act, mask, cond, pair)
  garbage = np.where(mask[:, None], 0, 1e3).astype(np.float32)
  columns = pair + garbage[None]
  got = run(params, act + garbage, mask, cond - garbage, columns)
  np.testing.assert_array_equal(got[mask], want[mask])


def test_transformer_without_any_key_is_finite(token_case):
  params, (act, mask, cond, pair) = token_case

  def loss(act, mask):
    return jnp.sum(dt.transformer(params, act, mask, cond, pair) ** 2)

  gradient = jax.jit(jax.grad(loss))(act, np.zeros_like(mask))
  assert np.all(np.isfinite(gradient))
  assert np.any(gradient != 0)


def test_transformer_remat_changes_nothing(token_case):
  params, inputs = token_case

  def loss(params, block_remat):
    return jnp.sum(
      jnp.sin(dt.transformer(params, *inputs, block_remat=block_remat))
    )

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    grad(params, False),
    grad(params, True),
  )


def test_transformer_of_wrong_shape_names_the_argument(token_case):
  params, (act, mask, cond, pair) = token_case
  with pytest.raises(ValueError, match='single_cond: expected shape'):
    dt.transformer(params, act, mask, cond[1:], pair)
  with pytest.raises(ValueError, match='pair_cond: expected shape'):
    dt.transformer(params, act, mask, cond, pair[1:])
  with pytest.raises(TypeError, match='mask: expected bool'):
    dt.transformer(params, act, mask.astype(np.float32), cond, pair)
  with pytest.raises(TypeError, match='single_cond: expected the dtype of act'):
    dt.transformer(params, act, mask, cond.astype(jnp.bfloat16), pair)


def test_what_does_not_fit_the_parameters_names_them(token_case):
  params, (act, mask, cond, pair) = token_case
  with pytest.raises(
    ValueError, match=r"'pair_input_layer_norm' is for \d+ ch"
  ):
    dt.transformer(params, act, mask, cond, pair[..., 1:])
  with pytest.raises(ValueError, match=r"'single_cond_layer_norm' is for \d+"):
    dt.transformer(params, act, mask, cond[:, 1:], pair)
  with pytest.raises(ValueError, match="expected the module 'single_cond"):
    dt.transformer(params, act, mask, cond, pair, name='foo')


def test_cross_attention_masks_keys_only_if_asked():
  """Upstream's product of masks: real queries see masked keys."""
  rng = np.random.default_rng(1)
  x_q = rng.standard_normal((4, 6), np.float32)
  x_k = rng.standard_normal((5, 6), np.float32)
  config = tp.CrossAttentionConfig(num_head=2, key_dim=4, value_dim=6)
  params = {
    module: {
      name: rng.standard_normal(parameter.shape, np.float32)
      for name, parameter in arrays.items()
    }
    for module, arrays in tp.cross_attention_parameters(config, 6, None).items()
  }
  mask_q, mask_k = np.ones(4, bool), np.arange(5) < 3

  def run(x_k, mask_k, padded_keys):
    return dt.cross_attention(
      params, x_q, x_k, mask_q, mask_k, padded_keys=padded_keys
    )

  with pytest.raises(ValueError, match=r"padded_keys: .* got 'maskd'"):
    run(x_k, mask_k, 'maskd')
  assert np.any(run(x_k, mask_k, 'official') != run(x_k, mask_k, 'masked'))
  np.testing.assert_allclose(
    run(x_k, mask_k, 'official'), run(x_k, np.ones(5, bool), 'masked')
  )
  np.testing.assert_allclose(
    run(x_k, mask_k, 'masked'), run(x_k[:3], mask_k[:3], 'masked'), rtol=1e-5
  )


@pytest.mark.parametrize('remat', [True, False])
def test_window_transformer_equals_the_published_one(remat):
  """Values and all gradients in float64; 3 blocks, windows of 8 x 24."""
  rng = np.random.default_rng(2)
  n, c, c_pair, scope = 75, 6, 3, 'transformer'
  plan = window_plan.build_window_plan(
    np.arange(n), np.arange(n), num_queries=8, num_keys=24, n_atom=80
  )
  gathers = atom_layout.AtomCrossAtt.build(
    np.ones((n, 1), bool), padded_num_atoms=80, num_queries=8, num_keys=24
  )
  config = tp.CrossAttTransformerConfig(
    attention=tp.CrossAttentionConfig(num_head=2, key_dim=4, value_dim=8)
  )
  table = tp.cross_att_transformer_parameters(config, c, c, c_pair)
  params = pm.init_parameters(table, jax.random.key(0))
  params = jax.tree.map(
    lambda x: np.asarray(x) + 0.3 * rng.standard_normal(x.shape), params
  )
  mask = np.asarray(plan.atom_mask)
  act = rng.standard_normal((80, c)) * mask[:, None]
  single = rng.standard_normal((80, c)) * mask[:, None]
  pair = rng.standard_normal((10, 8, 24, c_pair))
  weight = rng.standard_normal((80, c)) * mask[:, None]

  def published(act, single, pair):
    blocks = [x.reshape(10, 8, c) for x in (act, single)]
    keys = atom_layout.convert(
      gathers.queries_to_keys, atom_layout.Arranged(blocks[1], 'queries')
    )
    return dt.CrossAttTransformer(config)(
      atom_layout.Arranged(blocks[0], 'queries'),
      mask.reshape(10, 8),
      gathers.queries_to_keys,
      window_plan.atom_windows(plan, jnp.asarray(mask)),
      blocks[1],
      keys.values,
      pair,
    ).values.reshape(80, c)

  def blocked(params, act, single, pair):
    own = pm.below(params, f'{scope}/')
    normalised = functional.layer_norm(own, 'pair_input_layer_norm', pair)
    logits = functional.linear(own, 'pair_logits_projection', normalised)
    return wt.window_transformer(
      wt.block_weights(own, scope),
      act,
      list(jnp.transpose(logits, (3, 0, 4, 1, 2))),
      plan.key_start,
      plan.atom_mask,
      single,
      chunk=2,
      remat=remat,
    )

  apply = hk.without_apply_rng(hk.transform(published)).apply
  own = {f'{scope}/{key}': value for key, value in params.items()}
  with jax.enable_x64(True):
    want, got = (
      jax.jit(
        jax.value_and_grad(
          lambda *x, fn=fn: jnp.sum(weight * fn(*x)), (0, 1, 2, 3)
        )
      )(own, act, single, pair)
      for fn in (apply, blocked)
    )
    got, want = jax.tree.map(np.asarray, (got, want))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(x - y).max() <= 1e-11 * max(np.abs(y).max(), 1)
  assert all(np.any(y != 0) for y in jax.tree.leaves(want))


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: tp.CrossAttentionConfig(num_head=3),
      'key_dim=128 must be divisible by num_head=3',
    ),
    (
      lambda: tp.SelfAttentionConfig(num_head=4, value_dim=6),
      'value_dim=6 must be divisible by num_head=4',
    ),
    (
      lambda: dataclasses.replace(SIZES, super_block_size=3),
      'num_blocks=4 must be divisible by super_block_size=3',
    ),
    (
      lambda: tp.self_attention_parameters(tp.SelfAttentionConfig(), 24, None),
      'key_dim=24 must be divisible by num_head=16',
    ),
  ],
)
def test_sizes_that_do_not_divide_are_an_error(make, message):
  with pytest.raises(ValueError, match=message):
    make()
