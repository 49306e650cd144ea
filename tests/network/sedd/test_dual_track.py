"""The complete networks: modes, single track, variants, fast program."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import testing
from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.discrete_diffusion import prepared_network as kernel
from structattn_jax.discrete_diffusion import program as program_lib
from structattn_jax.network.sedd import blocks, single_track
from structattn_jax.network.sedd import dual_track as network
from structattn_jax.reference import sedd as reference
from structattn_jax.verification import systems

CONFIGS = pathlib.Path(__file__).parents[3] / 'configs'
CONFIG = network.DualTrackConfig(
  hidden_size=12,
  num_head=3,
  num_block=3,
  cond_dim=6,
  protein_vocab=9,
  ligand_vocab=14,
)
SINGLE = single_track.SeddConfig(
  hidden_size=12, num_head=3, num_block=2, cond_dim=6, vocab=9
)
SIGMA = 0.7
BATCH, N_PROTEIN, N_LIGAND = 3, 7, 5
STACK = f'/{blocks.LAYER_STACK}/'

each_mode = pytest.mark.parametrize('mode', network.MODES)
each_variant = pytest.mark.parametrize('variant', ['sedd', 'v100'])


def randomised(shapes, seed=0):
  """Parameters without any zero left by an initialiser."""
  rng = np.random.default_rng(seed)

  def draw(x):
    scale = 0.6 * x.shape[-2] ** -0.5 if len(x.shape) > 1 else 0.2
    return (scale * rng.standard_normal(x.shape)).astype(np.float32)

  params = jax.tree.map(draw, shapes)
  return {
    path: {name: x + np.float32(name == 'scale') for name, x in values.items()}
    for path, values in params.items()
  }


def shapes_of(config):
  token, sigma = jnp.zeros(2, jnp.int32), jnp.float32(0)
  if isinstance(config, single_track.SeddConfig):
    init, arguments = single_track.transform_sedd(config).init, (token, sigma)
  else:
    init = network.transform_sedd_dual_track(config).init
    arguments = (token, token, sigma)
  return jax.eval_shape(init, jax.random.key(0), *arguments)


@pytest.fixture(scope='module')
def params():
  return randomised(shapes_of(CONFIG))


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(1)
  protein_mask = np.ones((BATCH, N_PROTEIN), bool)
  protein_mask[0, 5:] = protein_mask[1, [0, 3]] = False
  ligand_mask = np.ones((BATCH, N_LIGAND), bool)
  ligand_mask[0, 3:] = False
  # A fully masked row.
  ligand_mask[2] = False
  return {
    'protein': rng.integers(0, 9, (BATCH, N_PROTEIN)).astype(np.int32),
    'ligand': rng.integers(0, 14, (BATCH, N_LIGAND)).astype(np.int32),
    'protein_mask': protein_mask,
    'ligand_mask': ligand_mask,
  }


@functools.cache
def batched(mode, config=CONFIG):
  """The network over a batch, compiled once per mode and dtype."""
  apply = network.transform_sedd_dual_track(config).apply

  def one(params, protein, ligand, sigma, protein_mask, ligand_mask):
    found = apply(
      params, protein, ligand, sigma, protein_mask, ligand_mask, mode=mode
    )
    tracks = network.tracks_of(mode).generated
    return {track: getattr(found, track) for track in tracks}

  return jax.jit(jax.vmap(one, (None, 0, 0, 0, 0, 0)))


def run(mode, params, batch, sigma=SIGMA, config=CONFIG):
  dtype = jax.tree.leaves(params)[0].dtype
  return batched(mode, config)(
    params,
    batch['protein'],
    batch['ligand'],
    np.full(BATCH, sigma, dtype),
    batch['protein_mask'],
    batch['ligand_mask'],
  )


def to_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def worst_error(got, want) -> float:
  errors = jax.tree.map(
    lambda g, w: np.abs(np.asarray(g) - w).max() / np.abs(w).max(), got, want
  )
  return max(jax.tree.leaves(errors))


def layers_of(params, path):
  """Torch's parameters of each layer."""
  stacked = {name: v for name, v in params.items() if path in name}
  count = len(next(iter(next(iter(stacked.values())).values())))
  return [
    systems.torch_names(jax.tree.map(lambda x, i=i: x[i], stacked), path)
    for i in range(count)
  ]


def oracle(mode, params, batch, config=CONFIG):
  """Logits of a batch in float64 NumPy."""
  condition = reference.timestep_condition(
    systems.torch_names(params, 'sigma_map'),
    SIGMA if config.time_conditioning else 0.0,
  )
  layers = {
    track: layers_of(params, f'dual_track{STACK}blocks_{short}')
    for track, short in (('protein', 'prot'), ('ligand', 'lig'))
  }
  found = []
  for i in range(BATCH):
    x = {
      track: reference.token_embedding(
        systems.torch_names(params, f'{track}_embed'), batch[track][i]
      )
      for track in layers
    }
    masks = {track: batch[f'{track}_mask'][i] for track in layers}
    states = reference.mode_states(
      layers, x, condition, masks, mode, num_head=3, variant=config.variant
    )
    found.append(
      {
        track: reference.final_layer(
          systems.torch_names(params, f'{track}_output'), state, condition
        )
        for track, state in states.items()
      }
    )
  return jax.tree.map(lambda *rows: np.stack(rows), *found)


# Sizes and parameters.


@pytest.mark.parametrize(
  ('preset', 'count'),
  [
    ('sedd_dual_track', 168_430_434),
    ('sedd_v100_protein', 66_724_096),
    ('sedd_small', 169_627_218),
    ('sedd_medium', 424_477_010),
  ],
)
def test_preset_has_the_published_number_of_parameters(preset, count):
  dual = preset == 'sedd_dual_track'
  cls = network.DualTrackConfig if dual else single_track.SeddConfig
  shapes = shapes_of(cls.from_toml(CONFIGS / f'{preset}.toml'))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
  ('options', 'count'),
  [
    ({'variant': 'v100', 'vocab': 2365}, 70_299_904),
    ({'vocab': 37}, 66_724_133),
    ({'vocab': 2365}, 70_302_269),
  ],
)
def test_single_track_counts_follow_variant_and_vocabulary(options, count):
  config = single_track.SeddConfig(num_block=8, cond_dim=256, **options)
  assert sum(x.size for x in jax.tree.leaves(shapes_of(config))) == count


def test_parameters_are_the_same_in_every_mode():
  init = network.transform_sedd_dual_track(CONFIG).init
  token, sigma = jnp.zeros(2, jnp.int32), jnp.float32(0)
  wanted = shapes_of(CONFIG)
  for mode in network.MODES[1:]:
    tracks = network.tracks_of(mode)
    given = [
      token if track in (*tracks.generated, *tracks.context) else None
      for track in ('protein', 'ligand')
    ]
    found = jax.eval_shape(
      functools.partial(init, mode=mode), jax.random.key(0), *given, sigma
    )
    assert found == wanted


def test_fresh_network_has_zero_logits():
  config = single_track.SeddConfig(
    hidden_size=4, num_head=1, num_block=1, cond_dim=2, vocab=5
  )
  transformed = single_track.transform_sedd(config)
  arguments = (jnp.array([1, 2]), jnp.float32(1))
  params = transformed.init(jax.random.key(0), *arguments)
  assert np.any(params['vocab_embed']['embedding'])
  assert not np.any(transformed.apply(params, *arguments))


# Values.


@each_mode
def test_logits_match_the_oracle(mode, params, batch):
  want = oracle(mode, params, batch)
  assert worst_error(run(mode, params, batch), want) < 5e-6
  with jax.enable_x64(True):
    got = run(mode, to_float64(params), batch)
  assert worst_error(got, want) < 1e-9


@each_variant
def test_single_track_matches_the_oracle(variant, batch):
  config = dataclasses.replace(SINGLE, variant=variant)
  params = randomised(shapes_of(config))
  tokens, mask = batch['protein'][0], batch['protein_mask'][0]
  flat = {
    f'{path.replace("mlp_", "mlp.").replace("/", ".")}.{name}': (
      value.T if name == 'weights' else value
    )
    for path, values in params.items()
    if STACK not in path
    for name, value in values.items()
  }
  flat = {
    name.replace('.weights', '.weight').replace('.scale', '.weight'): value
    for name, value in flat.items()
  }
  want = reference.sedd(
    to_float64(flat),
    layers_of(params, f'sedd{STACK}blocks'),
    tokens,
    SIGMA,
    mask,
    num_head=3,
    variant=variant,
  )
  apply = jax.jit(single_track.transform_sedd(config).apply)
  got = apply(params, tokens, np.float32(SIGMA), mask)
  assert worst_error(got, want) < 5e-6
  with jax.enable_x64(True):
    got = apply(to_float64(params), tokens, SIGMA, mask)
  assert worst_error(got, want) < 1e-9


def test_log_score_matches_the_oracle_at_small_and_large_sigma(batch):
  logits = np.random.default_rng(0).standard_normal((N_PROTEIN, 9), np.float32)
  tokens = batch['protein'][0]
  for sigma in (1e-6, 1e-3, 0.5, 20.0, 80.0):
    got = graph_lib.log_score(logits, tokens, np.float32(sigma))
    want = reference.log_score(logits.astype(np.float64), tokens, sigma)
    assert worst_error(got, want) < 1e-6
    assert not np.any(np.asarray(got)[np.arange(N_PROTEIN), tokens])
  unscaled = graph_lib.log_score(
    logits, tokens, np.float32(2), scale_by_sigma=False
  )
  others = np.arange(9) != tokens[:, None]
  np.testing.assert_array_equal(np.asarray(unscaled)[others], logits[others])


# Independence.


@each_mode
def test_batch_elements_do_not_see_each_other(mode, params, batch):
  want = run(mode, params, batch)
  changed = {name: x.copy() for name, x in batch.items()}
  changed['protein'][1] = (changed['protein'][1] + 1) % 9
  changed['ligand'][1] = (changed['ligand'][1] + 1) % 14
  changed['ligand_mask'][1] = ~changed['ligand_mask'][1]
  got = run(mode, params, changed)
  for track, values in want.items():
    np.testing.assert_array_equal(got[track][0], values[0])
    np.testing.assert_array_equal(got[track][2], values[2])
    assert np.any(got[track][1] != values[1])


@pytest.mark.parametrize('mode', ['joint', 'ligand_given_protein'])
def test_padding_changes_no_logits(mode, params, batch):
  def fn(protein, protein_mask, ligand, ligand_mask):
    found = apply(
      params, protein, ligand, np.float32(SIGMA), protein_mask, ligand_mask
    )
    return {'protein': found.protein, 'ligand': found.ligand}

  apply = jax.jit(
    functools.partial(
      network.transform_sedd_dual_track(CONFIG).apply, mode=mode
    )
  )
  inputs = {name: x[0] for name, x in batch.items()}
  rows = {
    track: 0 if track in network.tracks_of(mode).generated else None
    for track in ('protein', 'ligand')
  }
  for track in ('protein', 'ligand'):
    testing.assert_padding_invariant(
      fn,
      inputs,
      axes={track: 0, f'{track}_mask': 0},
      masks=(f'{track}_mask',),
      output_axes={**dict.fromkeys(rows), track: rows[track]},
      key=jax.random.key(0),
      tolerance=2e-6,
    )


def test_fully_masked_context_is_no_context(params, batch):
  empty = {**batch, 'protein_mask': np.zeros_like(batch['protein_mask'])}
  got = run('ligand_given_protein', params, empty)
  want = run('ligand_only', params, empty)
  assert worst_error(got, to_float64(want)) < 1e-6


def test_context_given_by_vmap_axes_none_equals_a_batch_of_copies(
  params, batch
):
  apply = network.transform_sedd_dual_track(CONFIG).apply
  shared = jax.vmap(
    lambda ligand: (
      apply(
        params,
        batch['protein'][0],
        ligand,
        np.float32(SIGMA),
        mode='ligand_given_protein',
      ).ligand
    )
  )
  copies = {
    'ligand': batch['ligand'],
    'protein': np.tile(batch['protein'][:1], (BATCH, 1)),
    'protein_mask': np.ones((BATCH, N_PROTEIN), bool),
    'ligand_mask': np.ones((BATCH, N_LIGAND), bool),
  }
  want = run('ligand_given_protein', params, copies)['ligand']
  got = jax.jit(shared)(batch['ligand'])
  assert worst_error(got, np.asarray(want)) < 2e-6


def test_network_without_time_conditioning_ignores_sigma(params, batch):
  config = dataclasses.replace(CONFIG, time_conditioning=False)
  first, second = (
    run('joint', params, batch, sigma, config) for sigma in (0.1, 5.0)
  )
  for track, values in first.items():
    np.testing.assert_array_equal(values, second[track])
  want = oracle('joint', params, batch, config)
  assert worst_error(first, want) < 5e-6


# Training options.


def test_remat_with_dropout_changes_no_gradient(params, batch):
  def gradient(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    apply = network.transform_sedd_dual_track(config).apply

    def loss(params):
      found = apply(
        params,
        batch['protein'][0],
        None,
        np.float32(SIGMA),
        batch['protein_mask'][0],
        mode='protein_only',
        dropout_key=jax.random.key(3),
      )
      return jnp.sum(jnp.sin(found.protein))

    return jax.jit(jax.grad(loss))(params)

  want = gradient('none')
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
  for remat in ('dots', 'full'):
    difference = jax.tree.map(
      lambda g, w: np.abs(g - w).max(), gradient(remat), want
    )
    assert max(jax.tree.leaves(difference)) < 1e-5 * largest


def test_dropout_follows_its_key_and_rate(params, batch):
  def of_rate(rate):
    config = dataclasses.replace(CONFIG, dropout=rate)
    apply = network.transform_sedd_dual_track(config).apply
    return jax.jit(
      lambda key: (
        apply(
          params,
          None,
          batch['ligand'][0],
          np.float32(SIGMA),
          mode='ligand_only',
          dropout_key=key,
        ).ligand
      )
    )

  some, none = of_rate(0.3), of_rate(0.0)
  first, again, other = (some(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)
  np.testing.assert_allclose(
    none(jax.random.key(0)), some(None), rtol=1e-5, atol=1e-6
  )


def test_bfloat16_activations_give_close_float32_logits(params, batch):
  config = dataclasses.replace(CONFIG, bfloat16=True)
  want = run('joint', params, batch)
  got = run('joint', params, batch, config=config)
  assert all(x.dtype == jnp.float32 for x in got.values())
  assert 1e-4 < worst_error(got, to_float64(want)) < 5e-2


def test_large_attention_takes_one_head_at_a_time_with_the_same_result():
  rng = np.random.default_rng(0)
  q, k, v, cotangent = (
    rng.standard_normal((n, 2, 4), np.float32) for n in (160, 120, 120, 160)
  )
  mask = rng.random(120) < 0.8
  assert blocks._LARGE <= 160 * 120

  def loss(q, k, v):
    return jnp.sum(blocks._attend(q, k, v, mask) * cotangent)

  def dense(q, k, v):
    logits = jnp.einsum('nhd,mhd->hnm', q, k) / 2
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
    return jnp.sum(jnp.einsum('hnm,mhd->nhd', weights, v) * cotangent)

  got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (loss, dense))
  assert worst_error(got, to_float64(want)) < 1e-5


# The program of the samplers.


def program_logits(program, mode, sigma, batch, positions=None, shared=False):
  """All that samplers use of a program; `shared` has a context of batch 1."""
  modulation = kernel.modulations(program, sigma)
  tracks = network.tracks_of(mode)
  tokens = {track: batch[track] for track in tracks.generated}
  masks = {track: batch[f'{track}_mask'] for track in tracks.generated}
  context = None
  for other in tracks.context:
    rows = slice(1) if shared else slice(None)
    context = kernel.encode_context(
      program,
      modulation,
      other,
      batch[other][rows],
      batch[f'{other}_mask'][rows],
    )
  begun = kernel.begin(program, modulation, tokens, masks, context)
  return begun.logits(positions)


@each_mode
def test_program_equals_the_network(mode, params, batch):
  with jax.enable_x64(True):
    params = to_float64(params)
    want = to_float64(run(mode, params, batch))

    @jax.jit
    def all_of_it(params):
      program = kernel.cached_sedd(CONFIG, absorbing=False).precompute(params)
      padded = kernel.cached_sedd(CONFIG).precompute(params)
      positions = {track: np.array([[1, 0], [2, 3], [4, 1]]) for track in want}
      return (
        program_logits(program, mode, SIGMA, batch),
        program_logits(program, mode, np.full(BATCH, SIGMA), batch),
        program_logits(padded, mode, SIGMA, batch, positions),
        positions,
      )

    one_sigma, sigmas, padded, positions = all_of_it(params)
  assert worst_error(one_sigma, want) < 1e-10
  assert worst_error(sigmas, want) < 1e-10
  for track, values in want.items():
    rows = np.take_along_axis(
      values, np.asarray(positions[track])[..., None], 1
    )
    dim = values.shape[-1]
    got = np.asarray(padded[track])
    assert got.shape[-1] % program_lib.BLOCK == 0
    assert worst_error(got[..., : dim - 1], rows[..., :-1]) < 1e-10
    assert np.all(got[..., dim - 1 :] == -1e30)


def test_program_shares_one_context(params, batch):
  mode = 'ligand_given_protein'
  copies = {
    **batch,
    'protein': np.tile(batch['protein'][:1], (BATCH, 1)),
    'protein_mask': np.tile(batch['protein_mask'][:1], (BATCH, 1)),
  }
  want = to_float64(run(mode, params, copies))

  @jax.jit
  def shared(params):
    program = kernel.cached_sedd(CONFIG, absorbing=False).precompute(params)
    return program_logits(program, mode, np.float32(SIGMA), copies, shared=True)

  assert worst_error(shared(params), want) < 5e-6


@each_variant
def test_program_equals_the_single_track(variant, batch):
  config = dataclasses.replace(SINGLE, variant=variant)
  params = randomised(shapes_of(config))
  apply = jax.vmap(
    single_track.transform_sedd(config).apply, (None, 0, None, 0)
  )

  @jax.jit
  def both(params, tokens, mask):
    cached = kernel.cached_sedd(config, absorbing=False)
    program = cached.precompute(params)
    sigma = np.float32(SIGMA)
    begun = cached.begin(
      program,
      cached.modulations(program, sigma),
      {program_lib.ONLY: tokens},
      {program_lib.ONLY: mask},
    )
    return begun.logits()[program_lib.ONLY], apply(params, tokens, sigma, mask)

  got, want = both(params, batch['protein'], batch['protein_mask'])
  assert worst_error(got, np.asarray(want)) < 5e-6


# Errors.


def test_wrong_inputs_raise_and_name_what_is_wrong(params, batch):
  apply = network.transform_sedd_dual_track(CONFIG).apply
  protein, ligand = batch['protein'][0], batch['ligand'][0]
  sigma = np.float32(SIGMA)
  with pytest.raises(ValueError, match=r'mode: expected one of joint, .*both'):
    apply(params, protein, ligand, sigma, mode='both')
  with pytest.raises(ValueError, match=r"ligand_tokens: needed in .*'joint'"):
    apply(params, protein, None, sigma)
  with pytest.raises(ValueError, match='protein_embed: expected tokens in'):
    apply(params, protein + 9, ligand, sigma)
  with pytest.raises(ValueError, match='ligand_mask: expected shape'):
    apply(params, protein, ligand, sigma, None, np.ones(3, bool))
  with pytest.raises(ValueError, match='dropout: expected a rate'):
    single_track.SeddConfig(dropout=1.0)
  seed = dataclasses.replace(CONFIG, variant='seed')
  with pytest.raises(ValueError, match=r"variant: 'seed' cannot be sampled"):
    kernel.cached_sedd(seed).precompute(params)
