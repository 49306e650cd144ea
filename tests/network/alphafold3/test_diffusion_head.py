"""AF3's diffusion head: published and cached form, goldens, limits, errors."""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import structattn_jax as sa
from structattn_jax import diffusion
from structattn_jax import verification as replay
from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold3 import cached_diffusion as cdh
from structattn_jax.network.alphafold3 import diffusion_head as dh
from structattn_jax.reference import alphafold3_diffusion_head as reference
from structattn_jax.verification import alphafold3_diffusion_head as head_replay

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens/af3_diffusion_head'
HEADS = ('head_small', 'head_padded')
each_head = pytest.mark.parametrize('case', HEADS)
# What the README of the goldens accepts.
ACCEPTED = {'denoised': 6e-5, 'single_cond': 2e-5, 'pair_cond': 2e-5}

TOY = registry.CASES['af3_diffusion_head']
IDS = [field.name for field in dataclasses.fields(dh.TokenIds)]
CONFIG = dh.DiffusionHeadConfig(
  seq_channel=6,
  pair_channel=4,
  atoms=sa.alphafold3.AtomCrossAttConfig(
    per_token_channels=8,
    per_atom_channels=6,
    per_atom_pair_channels=3,
    atom_transformer=sa.alphafold3.CrossAttTransformerConfig(
      num_blocks=1,
      attention=sa.alphafold3.CrossAttentionConfig(
        num_head=2, key_dim=4, value_dim=6
      ),
    ),
  ),
  transformer=sa.alphafold3.TransformerConfig(
    attention=sa.alphafold3.SelfAttentionConfig(
      num_head=2, key_dim=6, value_dim=4
    ),
    num_blocks=2,
    super_block_size=1,
    block_remat=True,
  ),
)


def read(case, is_float64=False):
  return replay.Golden.read(
    GOLDENS / f'{case}.npz', case, is_float64=is_float64
  )


def make_batch(counts, n_token=None, **options):
  """A batch of one chain with so many atoms per token; 1 of each: a ligand."""
  counts = np.array(counts)
  n_real, n_token = len(counts), n_token or len(counts)
  rng = np.random.default_rng(0)
  ref_pos = rng.standard_normal((64, 4, 3), np.float32)[:n_token]
  chars = rng.integers(0, 64, (64, 4, 4))[:n_token]
  mask = np.zeros((n_token, 4), bool)
  mask[:n_real] = np.arange(4) < counts[:, None]
  is_ligand = counts.max() == 1
  number = np.arange(1, n_token + 1) * (np.arange(n_token) < n_real)
  one = np.minimum(number, 1)
  return dh.DiffusionHeadBatch.from_batch(
    {
      'pred_dense_atom_mask': mask,
      'ref_space_uid': np.repeat((one if is_ligand else number)[:, None], 4, 1),
      'ref_pos': ref_pos,
      'ref_mask': mask,
      'ref_element': 6 * mask.astype(np.int32),
      'ref_charge': np.zeros(mask.shape, np.float32),
      'ref_atom_name_chars': chars,
      'token_index': number,
      'residue_index': one if is_ligand else number,
      'asym_id': one,
      'entity_id': one,
      'sym_id': one,
      'seq_mask': one,
    },
    **{'num_queries': 4, 'num_keys': 8, **options},
  )


def make_inputs(batch, seed=0):
  rng = np.random.default_rng(seed)
  n_token, n_slot = batch.atoms.pred_dense_atom_mask.shape

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  embeddings = dh.TrunkEmbeddings(
    single=normal(n_token, 5),
    pair=normal(n_token, n_token, 3),
    target_feat=normal(n_token, 4),
  )
  return 10 * normal(2, n_token, n_slot, 3), embeddings


@pytest.fixture(scope='module')
def params():
  return TOY.params


def cached(params, batch, embeddings, positions, noise_level, **options):
  head = cdh.cached_diffusion_head(CONFIG, **options)
  conditioning = head.precompute(params, batch, embeddings)
  return head.denoise(params, conditioning, positions, noise_level)


def published(params, batch, embeddings, positions, noise_level):
  apply = sa.alphafold3.transform_diffusion_head(CONFIG).apply
  return jax.vmap(lambda x: apply(params, x, noise_level, batch, embeddings))(
    positions
  )


@pytest.mark.parametrize('is_float64', [False, True])
@each_head
def test_published_form_matches_the_golden(case, is_float64):
  golden = read(case, is_float64)
  with jax.enable_x64(is_float64):
    inputs = golden.part('inputs')
    params, batch, embeddings = head_replay.arguments(golden)

    @jax.jit
    def run(use):
      condition = jax.vmap(dh.conditioning, (None, 0, None, None, None))
      levels, positions = inputs['noise_level'], inputs['positions_noisy']
      single, pair = condition(
        params, levels[:2], batch.tokens, embeddings, use
      )
      denoised = jax.vmap(dh.diffusion_head, (None, 0, 0, None, None, None))(
        params, positions, levels, batch, embeddings, use
      )
      return {
        'denoised': denoised,
        'single_cond': single,
        'pair_cond': pair[0],
      }

    for name, use in (('conditioned', True), ('unconditioned', False)):
      for output, got in run(use).items():
        want = golden.truth(f'{name}/{output}')
        error = np.abs(np.asarray(got) - want).max()
        accepted = 1e-9 if is_float64 else ACCEPTED[output]
        assert error < accepted, (name, output)


@each_head
def test_cached_form_matches_the_golden_in_float64(case):
  golden = read(case, is_float64=True)
  rows = replay.run(golden)
  assert {row.output for row in rows} == set(golden.outputs())
  for row in rows:
    if f'outputs64/{row.output}' in golden.arrays:
      assert row.max_error < 1e-9 * max(row.scale, 1), row
    else:  # Gradients of parameters are recorded in float32.
      assert row.ok, row


def test_oracle_matches_the_golden():
  golden = read('head_padded', is_float64=True)
  params, batch, embeddings = head_replay.arguments(golden)
  tokens = {name: getattr(batch.tokens, name) for name in IDS}
  levels = golden.arrays['inputs/noise_level']
  for name, use in (('conditioned', True), ('unconditioned', False)):
    single, pair = reference.conditioning(
      params,
      float(levels[0]),
      tokens,
      {
        field.name: getattr(embeddings, field.name)
        for field in dataclasses.fields(embeddings)
      },
      dh.noise_constants(),
      use,
    )
    for output, got in (('single_cond', single), ('pair_cond', pair)):
      want = golden.truth(f'{name}/{output}')
      want = want[0] if output == 'single_cond' else want
      assert np.abs(got - want).max() < 1e-12


def test_published_form_matches_the_oracle_and_the_cached_gradient():
  case, embeddings = TOY, ('single', 'pair', 'target_feat')
  apply = sa.alphafold3.transform_diffusion_head(CONFIG).apply
  batch = make_batch([2, 3, 1, 4], 5)

  def loss(form, params, floats):
    positions, *given = (floats[x] for x in ('positions_noisy', *embeddings))
    given = dh.TrunkEmbeddings(*given)
    if form == 'published':
      found = apply(params, positions, floats['noise_level'], batch, given)
    else:
      found = cached(
        params, batch, given, positions[None], floats['noise_level']
      )
    return registry.weighted_sum(found.reshape(positions.shape))

  with jax.enable_x64(True):
    batch = wide(batch)
    arguments = wide((case.params, case.float_inputs()))
    got, want = (
      jax.jit(jax.grad(functools.partial(loss, form), (0, 1)))(*arguments)
      for form in ('published', 'cached')
    )
  # Parameters without effect have no gradient in either.
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(g - w).max() < 1e-10 * max(np.abs(w).max(), 1)


def wide(tree):
  return jax.tree.map(
    lambda x: (
      np.asarray(x, np.float64)
      if np.asarray(x).dtype == np.float32
      else np.asarray(x)
    ),
    tree,
  )


LIMITS = {
  'single token': ([3], 1),
  'ligand alone': ([1] * 6, 6),
  'padded': ([2, 4, 1], 6),
  'no atoms': ([0, 0], 3),
}


@pytest.mark.parametrize('form', [published, cached])
@pytest.mark.parametrize('name', LIMITS)
def test_small_and_empty_systems_are_finite(name, form, params):
  batch = make_batch(*LIMITS[name])
  if name == 'no atoms':
    off = np.zeros_like(batch.tokens.mask)
    batch = dataclasses.replace(
      batch, tokens=dataclasses.replace(batch.tokens, mask=off)
    )
  positions, embeddings = make_inputs(batch)

  @jax.jit
  def run(params, embeddings, positions):
    def loss(*x):
      found = form(x[0], batch, *x[1:], jnp.float32(4))
      return jnp.sum(jnp.sin(found)), found

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
      params, embeddings, positions
    )

  (_, found), gradients = run(params, embeddings, positions)
  chex.assert_tree_all_finite((found, gradients))
  empty = ~np.asarray(batch.atoms.pred_dense_atom_mask)
  assert not np.any(np.asarray(found)[:, empty])
  assert np.any(found) == (name != 'no atoms')


def test_padding_and_empty_slots_change_nothing(params):
  small, large = make_batch([2, 4, 1]), make_batch([2, 4, 1], 6)
  positions, embeddings = make_inputs(large)
  cut = dh.TrunkEmbeddings(
    embeddings.single[:3], embeddings.pair[:3, :3], embeddings.target_feat[:3]
  )
  # What upstream's rule for keys of padding reads depends on the padding.
  masked = dataclasses.replace(
    CONFIG,
    atoms=dataclasses.replace(
      CONFIG.atoms, uid_rule='corrected', padded_keys='masked'
    ),
  )
  head = cdh.cached_diffusion_head(masked)

  def run(batch, embeddings, positions):
    conditioning = head.precompute(params, batch, embeddings)
    return head.denoise(params, conditioning, positions, jnp.float32(4))

  want = run(small, cut, positions[:, :3])
  mask = np.asarray(large.atoms.pred_dense_atom_mask)
  garbage = np.where(mask[..., None], positions, np.nan)
  got = run(large, embeddings, garbage)
  np.testing.assert_allclose(got[:, :3], want, atol=2e-5)


def test_tokens_far_away_keep_their_precision(params):
  batch = make_batch([2, 4, 1, 3])
  positions, embeddings = make_inputs(batch)
  positions = (positions + 1e4).astype(np.float32)
  run = jax.jit(cached)
  for level in (0.1, 16.0, 2000.0):
    got = run(params, batch, embeddings, positions, jnp.float32(level))
    with jax.enable_x64(True):
      want = run(
        *wide((params, batch, embeddings, positions)), jnp.float64(level)
      )
    # Three roundings of a coordinate, and those of the network.
    scale = np.abs(want).max()
    assert np.abs(got - np.asarray(want)).max() < 2e-7 * scale + 2e-5


def test_bfloat16_is_near_and_coordinates_stay_float32(params):
  batch = make_batch([2, 4, 1, 3])
  positions, embeddings = make_inputs(batch)
  low = dataclasses.replace(
    CONFIG,
    bfloat16=True,
    atoms=dataclasses.replace(CONFIG.atoms, bfloat16=True),
  )
  head = cdh.cached_diffusion_head(low)
  conditioning = head.precompute(params, batch, embeddings)
  level = jnp.float32(16)
  got = head.denoise(params, conditioning, positions, level)
  want = cached(params, batch, embeddings, positions, level)
  error = np.abs(got - want).max() / np.abs(want).max()
  assert got.dtype == jnp.float32
  # At little noise the positions themselves are kept, not rounded.
  assert 1e-5 < error < 2e-2
  level = jnp.float32(1e-3)
  near = head.denoise(params, conditioning, positions, level)
  want = cached(params, batch, embeddings, positions, level)
  assert np.abs(near - want).max() < 1e-4

  apply = sa.alphafold3.transform_diffusion_head(low).apply
  level = jnp.float32(16)
  other = apply(params, positions[0], level, batch, embeddings)
  assert other.dtype == jnp.float32
  want = published(params, batch, embeddings, positions, level)[0]
  assert 1e-5 < np.abs(other - want).max() / np.abs(want).max() < 2e-2


def test_cached_logits_change_nothing(params):
  batch = make_batch([2, 4, 1, 3])
  positions, embeddings = make_inputs(batch)
  arguments = (params, batch, embeddings, positions, jnp.float32(3))
  want = cached(*arguments, cache_pair_logits=True)
  got = cached(*arguments, cache_pair_logits=False)
  np.testing.assert_allclose(got, want, atol=2e-6)
  default = cdh.cached_diffusion_head(CONFIG)
  assert default.precompute(params, batch, embeddings).pair is None


def test_one_compilation_serves_a_bucket(params):
  sizes = {'n_atom': 16, 'n_pair': 40}
  batches = [make_batch(x, 6, **sizes) for x in ([2, 4, 1], [1, 1, 1, 2, 3])]
  head = cdh.cached_diffusion_head(CONFIG)
  precompute = jax.jit(chex.assert_max_traces(head.precompute, n=1))
  denoise = jax.jit(chex.assert_max_traces(head.denoise, n=1))
  for batch in batches:
    positions, embeddings = make_inputs(batch)
    conditioning = precompute(params, batch, embeddings)
    for level in (160.0, 1.0):
      found = denoise(params, conditioning, positions, jnp.float32(level))
      assert np.isfinite(found).all()


def test_pairs_times_relative_encoding_do_not_exist(params):
  n_token = 40
  batch = make_batch([2] * n_token)
  _, embeddings = make_inputs(batch)
  head = cdh.cached_diffusion_head(CONFIG)
  jaxpr = jax.make_jaxpr(head.precompute)(params, batch, embeddings)
  largest = max((size for size in shapes_of(jaxpr.jaxpr)), key=lambda x: x[0])
  # The rows in cache with their hidden channels; 4 pair channels.
  assert largest[0] < n_token**2 * dh.REL_CHANNELS, largest
  published_jaxpr = jax.make_jaxpr(
    lambda: dh.conditioning(params, jnp.float32(1), batch.tokens, embeddings)
  )()
  assert any(
    size >= n_token**2 * dh.REL_CHANNELS
    for size, _ in shapes_of(published_jaxpr.jaxpr)
  )


def shapes_of(jaxpr):
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield int(np.prod(variable.aval.shape)), equation.primitive.name
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from shapes_of(inner)


def test_relative_encoding_matches_the_oracle_and_upstreams_quirk():
  ids = np.array(
    [
      [1, 2, 3, 4, 5, 6, 0],  # token_index
      [1, 70, 2, 2, 9, 1, 0],  # residue_index
      [1, 1, 2, 2, 3, 4, 0],  # asym_id
      [1, 1, 1, 1, 1, 2, 0],  # entity_id
      [1, 1, 2, 2, 6, 1, 0],  # sym_id
      [1, 1, 1, 1, 1, 1, 0],  # mask
    ]
  )
  tokens = dict(zip(IDS, ids, strict=True))
  tokens['mask'] = tokens['mask'] > 0
  got = np.asarray(dh.relative_encoding(dh.TokenIds(**tokens)))
  np.testing.assert_array_equal(got, reference.relative_encoding(tokens))
  # Tokens of one chain: the bin of no offset, not one of its own.
  assert got[0, 1, 133 + 2] == 1


def test_sampling_is_differentiable_in_the_embeddings(params):
  batch = make_batch([2, 4, 1, 3])
  _, embeddings = make_inputs(batch)
  head = cdh.cached_diffusion_head(CONFIG)
  config = diffusion.SamplerConfig(steps=3)
  rng = np.random.default_rng(1)
  shape = (2, *batch.atoms.pred_dense_atom_mask.shape, 3)
  draws = diffusion.SamplerDraws(
    start=rng.standard_normal(shape),
    rotation=registry.random_frames(rng, 6)[0].reshape(3, 2, 3, 3),
    translation=rng.standard_normal((3, 2, 3)),
    noise=rng.standard_normal((3, *shape)),
  )

  def loss(step, direction):
    moved = jax.tree.map(lambda x, d: x + step * d, embeddings, direction)
    conditioning = head.precompute(params, batch, moved)
    found = diffusion.sample(
      functools.partial(head.denoise, params, conditioning),
      batch.atoms.pred_dense_atom_mask,
      config,
      draws=draws,
    )
    return jnp.sum(jnp.sin(found.positions / 16))

  with jax.enable_x64(True):
    embeddings, params, batch = wide((embeddings, params, batch))
    direction = wide(make_inputs(batch, seed=5)[1])
    slope = jax.jit(jax.grad(loss))(0.0, direction)
    value = jax.jit(loss)
    step = 1e-4
    difference = value(step, direction) - value(-step, direction)
  assert abs(slope) > 1e-3
  assert abs(slope - difference / (2 * step)) < 1e-5 * abs(slope)


def test_known_noise_level_is_checked_under_jit_too(params):
  batch = make_batch([2, 4, 1])
  positions, embeddings = make_inputs(batch)
  for level in (jnp.float32(3), jnp.float32(-3)):
    run = functools.partial(
      published, params, batch, embeddings, noise_level=level
    )
    if level > 0:
      assert jax.eval_shape(run, positions).shape == positions.shape
    else:
      with pytest.raises(ValueError, match='noise_level: expected a positive'):
        jax.eval_shape(run, positions)


def test_bad_input_is_one_clear_error(params):
  batch = make_batch([2, 4, 1])
  positions, embeddings = make_inputs(batch)
  head = cdh.cached_diffusion_head(CONFIG)
  level = jnp.float32(1)
  conditioning = head.precompute(params, batch, embeddings)
  apply = sa.alphafold3.transform_diffusion_head(CONFIG).apply
  for error, message, run in (
    (
      ValueError,
      r'positions_noisy: expected shape \[n_sample, n_token, n_slot, 3\]',
      lambda: head.denoise(params, conditioning, positions[0], level),
    ),
    (
      ValueError,
      'noise_level: expected a positive number of angstrom, got 0',
      lambda: head.denoise(params, conditioning, positions, jnp.float32(0)),
    ),
    (
      ValueError,
      'noise_level: expected a positive number of angstrom, got nan',
      lambda: apply(params, positions[0], np.nan, batch, embeddings),
    ),
    (
      TypeError,
      'embeddings: expected TrunkEmbeddings, got dict',
      lambda: head.precompute(params, batch, {}),
    ),
    (
      TypeError,
      'batch: expected DiffusionHeadBatch, got DenseBatch',
      lambda: head.precompute(params, batch.atoms, embeddings),
    ),
    (
      TypeError,
      'use_conditioning: expected bool',
      lambda: head.precompute(params, batch, embeddings, 1),
    ),
    (
      ValueError,
      "params: 'pair_cond_initial_norm' is for 142 channels",
      lambda: head.precompute(
        params,
        batch,
        dataclasses.replace(embeddings, pair=np.zeros((3, 3, 7), np.float32)),
      ),
    ),
    (
      ValueError,
      "params: expected the module 'pair_cond_initial_norm'",
      lambda: head.precompute({}, batch, embeddings),
    ),
    (
      ValueError,
      'batch: expected the features asym_id',
      lambda: dh.DiffusionHeadBatch.from_batch(
        {x: np.zeros(3, int) for x in IDS if x != 'asym_id'}
        | {'seq_mask': np.ones(3, bool)}
      ),
    ),
  ):
    with pytest.raises(error, match=message):
      run()


def test_parameters_are_those_of_the_released_names():
  golden = read('head_small')
  params, batch, embeddings = head_replay.arguments(golden)
  sizes = golden.meta['config']
  config = dh.DiffusionHeadConfig(
    seq_channel=sizes['cseq'],
    pair_channel=sizes['cpair'],
    atoms=sa.alphafold3.AtomCrossAttConfig(
      per_token_channels=sizes['token'],
      per_atom_channels=sizes['atom'],
      per_atom_pair_channels=sizes['pair'],
      atom_transformer=sa.alphafold3.CrossAttTransformerConfig(
        num_blocks=sizes['ablocks'],
        num_intermediate_factor=sizes['afac'],
        attention=sa.alphafold3.CrossAttentionConfig(
          num_head=sizes['aheads'],
          key_dim=sizes['akey'],
          value_dim=sizes['aval'],
        ),
      ),
    ),
    transformer=sa.alphafold3.TransformerConfig(
      attention=sa.alphafold3.SelfAttentionConfig(num_head=sizes['theads']),
      num_blocks=sizes['tblocks'],
      super_block_size=sizes['sb'],
      num_intermediate_factor=sizes['tfac'],
    ),
  )
  want = jax.tree.map(np.shape, params)
  key = jax.random.key(0)
  made = jax.eval_shape(
    cdh.cached_diffusion_head(config).init, key, batch, embeddings
  )
  assert jax.tree.map(np.shape, made) == want
  inputs = golden.part('inputs')
  made = jax.eval_shape(
    sa.alphafold3.transform_diffusion_head(config).init,
    key,
    inputs['positions_noisy'][0],
    inputs['noise_level'][0],
    batch,
    embeddings,
  )
  assert jax.tree.map(np.shape, made) == want
  table = dh.diffusion_head_parameters(
    config,
    single_channels=embeddings.single.shape[-1],
    pair_channels=embeddings.pair.shape[-1],
    target_channels=embeddings.target_feat.shape[-1],
  )
  assert table.keys() == pm.init_parameters(table, key).keys() == want.keys()
