"""AF3's atom encoder and decoder, blocked and as published."""

import dataclasses
import functools
import pathlib

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import structattn_jax as sa
from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold3 import atom_cross_attention as af3
from structattn_jax.network.alphafold3 import atom_layout, window_plan
from structattn_jax.network.alphafold3 import cached_atom_attention as aca
from structattn_jax.network.alphafold3.dense_atom_attention import (
  dense_atom_cross_att,
)
from structattn_jax.verification.golden import Golden

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens'
GOLDENS /= 'af3_atom_cross_attention'

FLOATS = (
  'token_atoms_act',
  'trunk_single_cond',
  'trunk_pair_cond',
  'decoder_token_act',
)
CASE = registry.CASES['af3_atom_encoder_decoder']
CACHED = aca.cached_atom_cross_att()

each_implementation = pytest.mark.parametrize(
  'implementation', ['blocked', 'published']
)


@functools.cache
def load(case: str) -> Golden:
  return Golden.read(GOLDENS / f'{case}.npz', case)


def split(case: str, dtype: str = 'float64'):
  """Prefix, parameters, batch and float inputs of a golden."""
  golden = load(case)

  def part(prefix):
    return {
      name.removeprefix(prefix): (
        value.astype(dtype) if value.dtype.kind == 'f' else value
      )
      for name, value in golden.arrays.items()
      if name.startswith(prefix)
    }

  params: dict[str, dict[str, np.ndarray]] = {}
  for key, value in part('params/').items():
    module, _, name = key.rpartition('/')
    params.setdefault(module, {})[name] = value
  name = 'evoformer_conditioning' if case.startswith('evo') else 'diffusion'
  scope = (
    'diffuser/' if case.startswith('evo') else 'diffuser/~/diffusion_head/'
  )
  inputs = part('inputs/')
  batch = atom_layout.DenseBatch.from_batch(inputs)
  floats = {key: inputs[key] for key in FLOATS if key in inputs}
  return name, pm.below(params, scope), batch, floats


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(config, prefix, params, batch, floats):
  encode, decode = dense_atom_cross_att(config, prefix=prefix, return_pair=True)
  encoded = encode(params, batch, *(floats.get(key) for key in FLOATS[:3]))
  found = {
    'token_act': encoded.token_act,
    'skip_connection': encoded.skip_connection,
    'queries_single_cond': encoded.queries_single_cond,
  }
  if FLOATS[3] in floats:
    found['position_update'] = decode(params, batch, floats[FLOATS[3]], encoded)
  return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(config, prefix, params, batch, floats):
  def loss(params, floats):
    found = forward(config, prefix, params, batch, floats)
    return sum(
      jnp.sum(jnp.sin(found[key])) for key in ('token_act', 'position_update')
    )

  return jax.grad(loss, (0, 1))(params, floats)


def atoms_only(found, batch):
  """Windows flattened to the real atoms; the rest as it is."""
  n = int(batch.plan.num_atoms)
  return {
    key: np.asarray(
      x.reshape(-1, x.shape[-1])[:n]
      if key in ('skip_connection', 'queries_single_cond')
      else x
    )
    for key, x in found.items()
  }


def worst(got, want) -> float:
  errors = jax.tree.map(
    lambda x, y: np.abs(x - y).max() / max(np.abs(y).max(), 1e-30), got, want
  )
  return max(jax.tree.leaves(errors))


@each_implementation
@pytest.mark.parametrize(
  'case',
  ['diffusion_mixed', 'evoformer_conditioning', 'tiny_padded', 'tiny_unpadded'],
)
def test_golden_matches_in_float64(case, implementation):
  config = sa.alphafold3.AtomCrossAttConfig(implementation=implementation)
  name, params, batch, floats = split(case)
  with jax.enable_x64(True):
    found = forward(config, name, params, batch, floats)
    found = atoms_only(found, batch)
  golden = load(case)
  kept = golden.arrays['outputs/queries_mask']
  assert set(found) >= {'token_act', 'skip_connection'}
  for key, got in found.items():
    want = golden.arrays[f'outputs64/{key}']
    if key in ('skip_connection', 'queries_single_cond'):
      want = want[kept]
    assert got.dtype == np.float64
    assert worst(got, want) < 1e-12, key


@each_implementation
def test_golden_matches_in_float32(implementation):
  config = sa.alphafold3.AtomCrossAttConfig(implementation=implementation)
  name, params, batch, floats = split('tiny_padded', 'float32')
  found = atoms_only(forward(config, name, params, batch, floats), batch)
  for key in ('token_act', 'position_update'):
    want = load('tiny_padded').arrays[f'outputs64/{key}']
    assert found[key].dtype == np.float32
    assert worst(found[key], want) < 2e-6


@pytest.mark.parametrize(
  ('case', 'quirks'),
  [
    ('diffusion_mixed', {}),
    ('tiny_padded', {'uid_rule': 'corrected', 'padded_keys': 'masked'}),
  ],
)
def test_blocked_gradients_equal_the_published_ones(case, quirks):
  name, params, batch, floats = split(case)
  blocked, published = (
    sa.alphafold3.AtomCrossAttConfig(implementation=implementation, **quirks)
    for implementation in ('blocked', 'published')
  )
  with jax.enable_x64(True):
    got = gradient(blocked, name, params, batch, floats)
    want = gradient(published, name, params, batch, floats)
    got, want = jax.tree.map(np.asarray, (got, want))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(x - y).max() <= 1e-9 * np.abs(y).max()
  unused = {
    module
    for module, arrays in got[0].items()
    if not any(np.any(x) for x in arrays.values())
  }
  assert unused - {'diffusion_embed_ref_charge'} == {
    f'diffusion_{leaf}'
    for leaf in (
      'single_to_pair_cond_row',
      'single_to_pair_cond_col',
      'embed_pair_offsets',
      'embed_pair_distances',
    )
  }


# Largest change of position update and token activations against the released
# rules, in float64, as measured with upstream's own code.
@pytest.mark.parametrize(
  ('case', 'quirks', 'change'),
  [
    ('diffusion_mixed', {'uid_rule': 'corrected'}, (0.10297, 0.28191)),
    ('diffusion_mixed', {'padded_keys': 'masked'}, (0.0, 0.0)),
    ('tiny_padded', {'padded_keys': 'masked'}, (0.12987, 0.27012)),
    (
      'tiny_padded',
      {'uid_rule': 'corrected', 'padded_keys': 'masked'},
      (0.20206, 0.74045),
    ),
    (
      'tiny_unpadded',
      {'uid_rule': 'corrected', 'padded_keys': 'masked'},
      (0.22785, 0.22009),
    ),
  ],
)
def test_quirk_switches_change_what_they_did_upstream(case, quirks, change):
  name, params, batch, floats = split(case)
  config = sa.alphafold3.AtomCrossAttConfig(**quirks)
  with jax.enable_x64(True):
    found = forward(config, name, params, batch, floats)
    found = jax.tree.map(np.asarray, found)
  for key, want in zip(('position_update', 'token_act'), change, strict=True):
    official = load(case).arrays[f'outputs64/{key}']
    assert abs(np.abs(found[key] - official).max() - want) < 6e-6


@pytest.fixture(scope='module')
def native():
  """Parameters, plan, conformer and floats of 'diffusion_mixed', flat."""
  name, params, batch, floats = split('diffusion_mixed', 'float32')
  assert name == 'diffusion'
  plan = batch.plan
  ref = jax.tree.map(lambda x: atom_layout.atoms_from_dense(plan, x), batch.ref)
  positions = atom_layout.atoms_from_dense(plan, floats['token_atoms_act'])
  return params, plan, ref, positions, floats


@functools.partial(jax.jit, static_argnames=('config', 'cache_terms'))
def precompute(params, plan, ref, floats, config=None, cache_terms=True):
  return aca.cached_atom_cross_att(config).precompute(
    params,
    plan,
    ref,
    floats['trunk_single_cond'],
    floats['trunk_pair_cond'],
    cache_terms=cache_terms,
  )


@functools.partial(jax.jit, static_argnames='config')
def step(params, conditioning, positions, token_act, config=None):
  cached = aca.cached_atom_cross_att(config)
  encoding = cached.encode(params, conditioning, positions)
  skip = encoding.skip_connection
  update = cached.decode(params, conditioning, token_act, skip)
  return encoding.token_act, update


@pytest.mark.parametrize('cache_terms', [True, False])
def test_cached_steps_equal_one_call(native, cache_terms):
  params, plan, ref, positions, floats = native
  conditioning = precompute(params, plan, ref, floats, cache_terms=cache_terms)
  assert (conditioning.encoder.terms is None) == (not cache_terms)
  token_act, update = step(
    params, conditioning, positions, floats['decoder_token_act']
  )
  arrays = load('diffusion_mixed').arrays
  assert worst(token_act, arrays['outputs64/token_act']) < 2e-6
  dense = atom_layout.atoms_to_dense(plan, update)
  assert worst(dense, arrays['outputs64/position_update']) < 2e-6


def test_functions_are_those_of_the_config_they_were_made_with(native):
  params, plan, ref, _, floats = native
  corrected = sa.alphafold3.AtomCrossAttConfig(uid_rule='corrected')
  first, second = (
    precompute(params, plan, ref, floats, config=config)
    for config in (None, corrected)
  )
  assert not np.allclose(first.encoder.biases[0], second.encoder.biases[0])
  published = sa.alphafold3.AtomCrossAttConfig(implementation='published')
  for form in (aca.cached_atom_cross_att, aca.transform_atom_cross_att):
    with pytest.raises(ValueError, match=r"implementation: .* got 'published'"):
      form(published)


def test_samples_share_an_unbatched_conditioning(native):
  params, plan, ref, positions, floats = native
  conditioning = precompute(params, plan, ref, floats)
  samples = positions * jnp.arange(1.0, 4)[:, None, None]
  config = sa.alphafold3.AtomCrossAttConfig(window_chunk=1)

  def one(positions):
    token_act = floats['decoder_token_act']
    return step(params, conditioning, positions, token_act, config=config)

  got = jax.vmap(one)(samples)
  want = [one(x) for x in samples]
  for i, example in enumerate(want):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=i: x[i], got), example, rtol=1e-4, atol=1e-5
    )
  # No array of a batched program has one pair logit per sample.
  bias = conditioning.encoder.biases[0]
  text = str(jax.make_jaxpr(jax.vmap(one))(samples))
  assert ','.join(map(str, bias.shape)) in text
  assert ','.join(map(str, (3, *bias.shape))) not in text


def test_remat_choice_changes_no_gradient(native):
  params, plan, ref, positions, floats = native

  def loss(params, remat):
    config = sa.alphafold3.AtomCrossAttConfig(remat=remat)
    conditioning = precompute(params, plan, ref, floats, config=config)
    token_act = floats['decoder_token_act']
    found = step(params, conditioning, positions, token_act, config=config)
    return sum(jnp.sum(jnp.sin(x)) for x in found)

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  got, want = grad(params, False), grad(params, True)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(x - y).max() <= 1e-4 * max(np.abs(y).max(), 1e-3)


def test_larger_padding_and_garbage_in_it_change_nothing(native):
  params, plan, ref, positions, floats = native
  token_act = floats['decoder_token_act']
  want = step(
    params, precompute(params, plan, ref, floats), positions, token_act
  )
  n = int(plan.num_atoms)
  token = np.asarray(plan.token_index[:n])
  uid = np.zeros(plan.num_tokens, np.int32)
  uid[token] = np.asarray(plan.space_uid[:n])
  larger = window_plan.build_window_plan(
    token, uid, dense_slot=np.asarray(plan.dense_index[:n]) % 24, n_atom=256
  )
  assert larger.n_atom > plan.n_atom

  def padded(x):
    garbage = np.full((256, *x.shape[1:]), 5, x.dtype)
    garbage[:n] = x[:n]
    return garbage

  got = step(
    params,
    precompute(params, larger, jax.tree.map(padded, ref), floats),
    padded(positions),
    token_act,
  )
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got[1][:n], want[1][:n], rtol=1e-4, atol=1e-5)
  assert not np.any(got[1][n:])


def test_atoms_of_one_bucket_share_one_compilation():
  config = sa.alphafold3.AtomCrossAttConfig(
    per_token_channels=4,
    per_atom_channels=4,
    per_atom_pair_channels=2,
    atom_transformer=sa.alphafold3.CrossAttTransformerConfig(
      num_blocks=1,
      attention=sa.alphafold3.CrossAttentionConfig(
        num_head=1, key_dim=2, value_dim=2
      ),
    ),
  )
  init, apply = sa.alphafold3.transform_atom_cross_att(
    config, prefix='evoformer_conditioning'
  )
  apply = jax.jit(chex.assert_max_traces(apply, n=1))
  params = None
  for n in (3, 100, 130):
    plan = sa.alphafold3.build_window_plan(
      np.zeros(n, int),
      [0, 0],
      num_slots=200,
      n_atom=160,
      token_pairs=False,
    )
    ref = sa.alphafold3.RefStructure(
      ref_pos=np.ones((160, 3), np.float32),
      ref_mask=np.asarray(plan.atom_mask),
      ref_element=np.ones(160, np.int32),
      ref_charge=np.ones(160, np.float32),
      ref_atom_name_chars=np.ones((160, 4), np.int32),
    )
    params = params or init(jax.random.key(0), plan, ref)
    found = apply(params, plan, ref)
    assert found.position_update is None
    assert np.any(found.token_act[0])
    assert not np.any(found.token_act[1])


def test_parameters_are_those_of_the_released_model():
  head = af3.atom_cross_att_parameters(sa.alphafold3.AtomCrossAttConfig())
  trunk = af3.atom_cross_att_parameters(
    sa.alphafold3.AtomCrossAttConfig(per_token_channels=384),
    'evoformer_conditioning',
    positions=False,
    single_channels=None,
    pair_channels=None,
    decoder=False,
  )
  arrays = [p for t in (head, trunk) for m in t.values() for p in m.values()]
  assert len(arrays) == 122
  assert sum(int(np.prod(p.shape)) for p in arrays) == 3_228_816
  for case in ('tiny_padded', 'evoformer_conditioning'):
    name, params, _, _ = split(case)
    table = head if name == 'diffusion' else trunk
    assert set(table) == set(params)


def test_haiku_head_has_the_parameters_below_its_name():
  init = jax.eval_shape(CASE.system.init, jax.random.key(0), dict(CASE.inputs))
  assert any(name.startswith('diffusion_embed_ref_pos') for name in init)
  config = sa.alphafold3.AtomCrossAttConfig(per_token_channels=8)
  plan = sa.alphafold3.build_window_plan([0, 0, 1], [0, 1])
  inputs = {
    'ref_pos': np.zeros((128, 3), np.float32),
    'ref_mask': np.asarray(plan.atom_mask),
    'ref_element': np.zeros(128, np.int32),
    'ref_charge': np.zeros(128, np.float32),
    'ref_atom_name_chars': np.zeros((128, 4), np.int32),
  }

  def run(plan, ref, positions, token_act):
    return sa.alphafold3.AtomCrossAttHead(config)(
      plan, ref, positions, token_act=token_act
    )

  made = jax.eval_shape(
    hk.transform(run).init,
    jax.random.key(0),
    plan,
    sa.alphafold3.RefStructure(**inputs),
    np.zeros((128, 3), np.float32),
    np.zeros((2, 8), np.float32),
  )
  table = af3.atom_cross_att_parameters(
    config, single_channels=None, pair_channels=None
  )
  assert set(made) == {f'diffusion_head/{name}' for name in table}


def test_bfloat16_blocks_keep_coordinates_in_float32(native):
  params, plan, ref, positions, floats = native
  config = sa.alphafold3.AtomCrossAttConfig(bfloat16=True)
  conditioning = precompute(params, plan, ref, floats, config=config)
  token_act, update = step(
    params,
    conditioning,
    positions,
    floats['decoder_token_act'],
    config=config,
  )
  assert token_act.dtype == jnp.bfloat16
  assert update.dtype == jnp.float32
  assert conditioning.encoder.biases[0].dtype == jnp.float32
  want = load('diffusion_mixed').arrays['outputs64/token_act']
  error = worst(np.asarray(token_act, np.float64), want)
  assert 1e-4 < error < 5e-2


def test_wrong_use_says_what_to_do(native):
  params, plan, ref, positions, floats = native
  bare = dataclasses.replace(plan, has_pairs=False)
  with pytest.raises(ValueError, match='token_pairs=True'):
    CACHED.precompute(params, bare, ref, None, floats['trunk_pair_cond'])
  with pytest.raises(ValueError, match='trunk_single_cond: expected shape'):
    CACHED.precompute(params, plan, ref, floats['trunk_single_cond'][1:])
  conditioning = jax.eval_shape(
    lambda: CACHED.precompute(params, plan, ref, decoder=False)
  )
  assert conditioning.decoder is None
  with pytest.raises(ValueError, match='decoder=True'):
    CACHED.decode(params, conditioning, floats['decoder_token_act'], positions)
  with pytest.raises(ValueError, match='positions: expected shape'):
    CACHED.encode(params, conditioning, positions[1:])
  with pytest.raises(TypeError, match='positions: expected floating'):
    CACHED.encode(params, conditioning, plan.atom_mask[:, None].repeat(3, 1))


def test_arguments_that_do_not_fit_the_parameters_say_so(native):
  params, plan, ref, positions, floats = native
  for name in ('trunk_single_cond', 'trunk_pair_cond'):
    with pytest.raises(
      ValueError, match=f'{name}: .* from the parameters diffusion_lnorm_{name}'
    ):
      CACHED.precompute(params, plan, ref, **{name: floats[name][..., 1:]})
    lacking = {k: v for k, v in params.items() if f'lnorm_{name}' not in k}
    with pytest.raises(ValueError, match=f'params: .* which {name} needs'):
      CACHED.precompute(lacking, plan, ref, **{name: floats[name]})
  with pytest.raises(ValueError, match="params: expected the module 'difus"):
    aca.cached_atom_cross_att(prefix='difusion').precompute(params, plan, ref)
  lacking = {k: v for k, v in params.items() if 'decoder' not in k}
  with pytest.raises(ValueError, match='decoder: expected False'):
    CACHED.precompute(lacking, plan, ref, decoder=True)
  conditioning = jax.jit(CACHED.precompute)(params, plan, ref)
  lacking = {k: v for k, v in params.items() if 'positions_to' not in k}
  with pytest.raises(ValueError, match=r'params: .* which positions needs'):
    CACHED.encode(lacking, conditioning, positions)
  token_act = floats['decoder_token_act']
  skip = np.zeros((plan.n_atom, 5), np.float32)
  with pytest.raises(ValueError, match=r'token_act: .* from the parameters'):
    CACHED.decode(params, conditioning, token_act[:, 1:], skip)
  with pytest.raises(ValueError, match=r'skip_connection: .* from the param'):
    CACHED.decode(params, conditioning, token_act, skip)
  with pytest.raises(ValueError, match=r'positions: .* from the plan'):
    CACHED.encode(params, conditioning, positions[1:])


@pytest.mark.parametrize('implementation', ['blocked', 'published'])
def test_both_implementations_check_the_same(implementation):
  _, params, batch, floats = split('tiny_unpadded', 'float32')
  config = sa.alphafold3.AtomCrossAttConfig(implementation=implementation)

  dense = dense_atom_cross_att(config)
  encode = functools.partial(dense.encode, params)
  shape = batch.pred_dense_atom_mask.shape
  with pytest.raises(TypeError, match='batch: expected a DenseBatch, got dict'):
    encode(batch.to_batch())
  with pytest.raises(TypeError, match='token_atoms_act: expected floating'):
    encode(batch, np.zeros((*shape, 3), np.int32))
  with pytest.raises(ValueError, match='token_atoms_act: expected shape'):
    encode(batch, np.zeros((shape[0] * shape[1], 3), np.float32))
  with pytest.raises(ValueError, match='trunk_single_cond: expected shape'):
    encode(batch, None, np.zeros((shape[0] + 1, 10), np.float32))

  def decode(token_act):
    return dense.decode(params, batch, token_act, encode(batch))

  with pytest.raises(ValueError, match='token_act: expected shape'):
    jax.eval_shape(lambda: decode(floats['decoder_token_act'][1:]))


def test_masked_conformer_reaches_neither_values_nor_gradients(native):
  params, plan, ref, positions, _ = native

  @jax.jit
  @jax.value_and_grad
  def run(params, ref_pos):
    own = dataclasses.replace(ref, ref_pos=ref_pos)
    conditioning = CACHED.precompute(params, plan, own)
    found = CACHED.encode(params, conditioning, positions)
    return jnp.sum(jnp.sin(found.token_act))

  masked = ~np.asarray(plan.atom_mask)[:, None]
  assert masked.any()
  got = run(params, np.where(masked, np.nan, ref.ref_pos).astype(np.float32))
  want = run(params, np.asarray(ref.ref_pos))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('first', ['blocked', 'published'])
def test_encoder_and_decoder_of_different_implementations_are_an_error(first):
  _, params, batch, floats = split('tiny_unpadded', 'float32')
  second = {'blocked': 'published', 'published': 'blocked'}[first]

  def run():
    one, other = (
      dense_atom_cross_att(
        sa.alphafold3.AtomCrossAttConfig(implementation=implementation)
      )
      for implementation in (first, second)
    )
    encoded = one.encode(params, batch)
    return other.decode(params, batch, floats['decoder_token_act'], encoded)

  with pytest.raises(ValueError, match='use the same implementation'):
    jax.eval_shape(run)


def test_no_array_of_the_encoder_is_larger_than_the_logits():
  """Memory grows with the atoms: nothing has more than 128 keys per atom."""
  config = sa.alphafold3.AtomCrossAttConfig(window_chunk=4)
  for n_window in (16, 32):
    n = 32 * n_window
    plan = sa.alphafold3.build_window_plan(
      np.arange(n) // 8, np.arange(n // 8), token_pairs=False
    )
    ref = jax.tree.map(
      lambda x, n=n: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype),
      sa.alphafold3.RefStructure(
        **{
          field.name: CASE.inputs[field.name]
          for field in dataclasses.fields(sa.alphafold3.RefStructure)
        }
      ),
    )
    cached = aca.cached_atom_cross_att(config)
    params = jax.eval_shape(
      functools.partial(
        cached.init, single_channels=None, pair_channels=None, decoder=False
      ),
      jax.random.key(0),
    )
    jaxpr = jax.make_jaxpr(
      lambda params, ref, plan=plan, cached=cached: cached.encode(
        params, cached.precompute(params, plan, ref)
      )
    )(params, ref)
    assert largest(jaxpr.jaxpr) <= n * 128 * 4


def largest(jaxpr) -> int:
  """Entries of the largest array that a program makes, loops included."""
  sizes = [
    int(np.prod(getattr(var.aval, 'shape', ())))
    for equation in jaxpr.eqns
    for var in equation.outvars
  ]
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        sizes.append(largest(inner))
  return max(sizes, default=0)
