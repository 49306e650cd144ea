"""Boltz's atom attention: both public forms, the modules, what they refuse.

`test_systems.py` compares both versions with the oracle, values and gradients.
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax.components import parameters as pm
from structattn_jax.network.boltz import parameters as boltz_parameters
from structattn_jax.network.boltz import transformers as boltz_transformers

SIZES = {
  'atom_s': 8,
  'atom_z': 4,
  'token_s': 5,
  'token_z': 3,
  'atoms_per_window_queries': 4,
  'atoms_per_window_keys': 8,
  'atom_encoder_depth': 2,
  'atom_encoder_heads': 2,
  'atom_decoder_depth': 1,
  'atom_decoder_heads': 2,
}
BOLTZ1 = sa.boltz.Boltz1AtomAttentionConfig(**SIZES)
BOLTZ2 = sa.boltz.Boltz2AtomAttentionConfig(
  **SIZES, token_transformer_depth=2, token_transformer_heads=1
)
N_ATOM, N_TOKEN = 12, 5


def features(**changes):
  rng = np.random.default_rng(0)
  values = {
    'ref_pos': rng.standard_normal((N_ATOM, 3), np.float32),
    'ref_charge': np.zeros(N_ATOM, np.float32),
    'ref_element': rng.integers(1, 20, N_ATOM),
    'ref_atom_name_chars': rng.integers(0, 64, (N_ATOM, 4)),
    'ref_space_uid': np.arange(N_ATOM) // 4,
    'atom_mask': np.arange(N_ATOM) < 11,
    'atom_to_token': np.append(np.arange(11) // 3, -1),
    'num_tokens': N_TOKEN,
  }
  return sa.boltz.BoltzAtomFeatures(**{**values, **changes})


def normal(*shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


SINGLE, PAIR = normal(N_TOKEN, 5), normal(N_TOKEN, N_TOKEN, 3)
POSITIONS, TOKEN_ACT = normal(3, N_ATOM, 3), normal(3, N_TOKEN, 10)


def random_params(table):
  """Parameters without any zero left by an initialiser."""
  params = pm.init_parameters(table, jax.random.key(0))
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), params
  )


@pytest.fixture(scope='module')
def boltz1():
  """The functions, parameters, a context and what samples give, vmapped."""
  functions = sa.boltz.cached_atom_attention(BOLTZ1)
  params = random_params(boltz_parameters.atom_attention_parameters(BOLTZ1))
  context = jax.jit(functions.precompute)(params, features(), SINGLE, PAIR)

  @jax.jit
  def run(params, context, positions, token_act):
    def one(positions, token_act):
      encoded = functions.encode(params, context, positions)
      update = functions.decode(params, context, token_act, encoded.atoms)
      return encoded, update

    return jax.vmap(one)(positions, token_act)

  return functions, params, context, run


def apply_modules(function, params):
  transformed = hk.without_apply_rng(hk.transform(function))
  made = jax.eval_shape(transformed.init, jax.random.key(0))
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
  return jax.jit(transformed.apply)(params)


def assert_close(got, want):
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(g - w).max() < 3e-6 * np.abs(w).max()


def test_boltz1_modules_equal_the_functions(boltz1):
  _, params, context, run = boltz1

  def published():
    encoder = sa.boltz.Boltz1AtomAttentionEncoder(BOLTZ1)
    encoded, embedding = encoder(features(), SINGLE, PAIR, POSITIONS[0])
    decoder = sa.boltz.Boltz1AtomAttentionDecoder(BOLTZ1)
    return encoded, decoder(TOKEN_ACT[0], encoded.atoms, embedding, features())

  want = run(params, context, POSITIONS[:1], TOKEN_ACT[:1])
  got = apply_modules(published, params)
  assert_close(got, jax.tree.map(lambda x: x[0], want))


def test_boltz2_modules_equal_the_functions():
  table = boltz_parameters.atom_attention_parameters(BOLTZ2)
  params = random_params(table)
  relative = normal(N_TOKEN, N_TOKEN, 3, seed=5)

  def published():
    shared = sa.boltz.Boltz2DiffusionConditioning(BOLTZ2)(
      features(), SINGLE, PAIR, relative
    )
    encoded = sa.boltz.Boltz2AtomAttentionEncoder(BOLTZ2)(
      features(), shared.embedding, shared.encoder_bias, POSITIONS[0]
    )
    update = sa.boltz.Boltz2AtomAttentionDecoder(BOLTZ2)(
      TOKEN_ACT[0],
      encoded.atoms,
      shared.embedding,
      shared.decoder_bias,
      features(),
    )
    return shared, encoded, update

  shared, *got = apply_modules(published, params)
  assert shared.token_bias.shape == (N_TOKEN, N_TOKEN, 2)
  functions = sa.boltz.cached_atom_attention(BOLTZ2)
  context = functions.precompute(params, features(), SINGLE, shared.pair)
  encoded = functions.encode(params, context, POSITIONS[0])
  update = functions.decode(params, context, TOKEN_ACT[0], encoded.atoms)
  assert_close(got, [encoded, update])


def test_boltz2_input_embedder_needs_no_trunk():
  config = dataclasses.replace(BOLTZ2, structure_prediction=False)
  functions = sa.boltz.cached_atom_attention(config)
  params = random_params(boltz_parameters.atom_attention_parameters(config))
  context = functions.precompute(params, features())
  encoded = functions.encode(params, context)
  assert encoded.tokens.shape == (N_TOKEN, 5)
  assert context.decoder is None
  with pytest.raises(ValueError, match='no decoder'):
    functions.decode(params, context, TOKEN_ACT[0], encoded.atoms)


def test_samples_share_a_context_and_equal_single_calls(boltz1):
  functions, params, context, run = boltz1
  encoded, update = run(params, context, POSITIONS, TOKEN_ACT)
  for i in range(3):
    alone = functions.encode(params, context, POSITIONS[i])
    assert_close(jax.tree.map(lambda x, i=i: x[i], encoded), alone)
    got = functions.decode(params, context, TOKEN_ACT[i], alone.atoms)
    assert_close(update[i], got)
  # Nothing in the context has an axis of samples.
  assert all(x.shape[0] in (3, N_ATOM) for x in jax.tree.leaves(context))


def test_one_call_equals_the_cached_functions(boltz1):
  functions, params, context, _ = boltz1
  init, apply = sa.boltz.transform_atom_attention(BOLTZ1)
  arguments = (features(), SINGLE, PAIR, POSITIONS[0], TOKEN_ACT[0])
  fresh = jax.jit(init)(jax.random.key(3), *arguments)
  want = functions.init(jax.random.key(3))
  for g, w in zip(jax.tree.leaves(fresh), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(g, w)
  out = jax.jit(apply)(params, *arguments)
  encoded = functions.encode(params, context, POSITIONS[0])
  update = functions.decode(params, context, TOKEN_ACT[0], encoded.atoms)
  assert_close(out, (encoded, update))
  assert apply(params, *arguments[:4]).update is None


def test_tokens_are_means_of_their_atoms_alone(boltz1):
  _, params, context, run = boltz1
  encoded, _ = run(params, context, POSITIONS, TOKEN_ACT)
  assert not np.any(encoded.tokens[:, 4])  # A token without atoms.
  assert np.all(np.any(encoded.tokens[:, :4], -1))


def test_windows_end_where_the_atoms_end(boltz1):
  """The keys of window 2 are atoms 6 to 13: atom 5 does not reach it."""
  _, params, _, _ = boltz1
  config = dataclasses.replace(BOLTZ1, atom_encoder_depth=1)
  one_layer = sa.boltz.cached_atom_attention(config)
  kept = {k: v for k, v in params.items() if 'layers_1' not in k}
  own = one_layer.precompute(kept, features(), SINGLE, PAIR)
  encode = jax.jit(one_layer.encode)
  want = encode(kept, own, POSITIONS[0]).atoms
  moved = POSITIONS[0].copy()
  moved[5] += 10
  changed = np.abs(encode(kept, own, moved).atoms - want).max(-1) > 0
  np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(8))


def test_ids_beyond_float32_stay_apart(boltz1):
  functions, params, context, _ = boltz1
  uid = features().ref_space_uid + 2**24
  own = functions.precompute(params, features(ref_space_uid=uid), SINGLE, PAIR)
  assert_close(own.encoder.biases, context.encoder.biases)
  merged = functions.precompute(
    params, features(ref_space_uid=0 * uid), SINGLE, PAIR
  )
  difference = merged.encoder.biases[0] - context.encoder.biases[0]
  assert np.abs(difference).max() > 1e-3


def test_published_and_blocked_biases_agree(boltz1):
  _, params, context, _ = boltz1
  config = dataclasses.replace(BOLTZ1, implementation='published')
  functions = sa.boltz.cached_atom_attention(config)
  own = functions.precompute(params, features(), SINGLE, PAIR)
  assert_close(own.encoder.biases, context.encoder.biases)
  assert_close(own.decoder.biases, context.decoder.biases)


def test_chunks_of_atoms_change_neither_values_nor_gradients(
  boltz1, monkeypatch
):
  functions, params, context, _ = boltz1

  def loss(params, context, positions):
    encoded = functions.encode(params, context, positions)
    update = functions.decode(params, context, TOKEN_ACT[0], encoded.atoms)
    return jnp.sum(jnp.sin(update)) + jnp.sum(jnp.sin(encoded.tokens))

  def run():
    gradient = jax.value_and_grad(loss, (0, 1, 2), allow_int=True)
    value, gradients = jax.jit(gradient)(params, context, POSITIONS[0])
    leaves = jax.tree.leaves(gradients)
    return [value, *(x for x in leaves if x.dtype == np.float32)]

  want = run()
  monkeypatch.setattr(boltz_transformers, '_CPU_WINDOWS', 1)
  jax.clear_caches()
  scale = max(np.abs(w).max() for w in want)
  for g, w in zip(run(), want, strict=True):
    assert np.abs(g - w).max() < 1e-5 * max(np.abs(w).max(), 1e-3 * scale)


def test_features_from_one_hot_equal_indices():
  one_hot = np.eye(64, dtype=np.int64)
  given = features()
  elements = np.zeros((N_ATOM, 128), np.int64)
  elements[np.arange(N_ATOM), given.ref_element] = 1
  elements[11] = 0
  tokens = (given.atom_to_token[:, None] == np.arange(N_TOKEN)).astype(float)
  got = sa.boltz.BoltzAtomFeatures.from_upstream(
    {
      'ref_pos': given.ref_pos,
      'ref_charge': given.ref_charge.astype(np.int8),
      'ref_element': elements,
      'ref_atom_name_chars': one_hot[given.ref_atom_name_chars],
      'ref_space_uid': given.ref_space_uid,
      'atom_pad_mask': given.atom_mask.astype(np.float32),
      'atom_to_token': tokens,
    }
  )
  element = given.ref_element.copy()
  element[11] = -1
  want = dataclasses.replace(given, ref_element=element)
  assert got.num_tokens == N_TOKEN
  for name in ('ref_element', 'ref_atom_name_chars', 'atom_to_token'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  assert got.ref_charge.dtype == np.float32
  assert got.atom_mask.dtype == bool


def test_padded_features_change_no_real_atom(boltz1):
  functions, params, _, _ = boltz1
  short = jax.tree.map(lambda x: x[:10], features())
  with pytest.raises(ValueError, match=r'multiple .*=4.*got 10.*pad\(12\)'):
    functions.precompute(params, short, SINGLE, PAIR)
  outputs = []
  for n_atom in (12, 20):
    padded = short.pad(n_atom)
    positions = np.resize(POSITIONS[0], (n_atom, 3))
    context = functions.precompute(params, padded, SINGLE, PAIR)
    encoded = functions.encode(params, context, positions)
    outputs.append((encoded.tokens, encoded.atoms[:10]))
  assert_close(*outputs)
  with pytest.raises(ValueError, match='at least 10, got 4'):
    short.pad(4)


BAD = {
  'not_one_hot': (
    lambda: sa.boltz.BoltzAtomFeatures.from_upstream(
      dict.fromkeys(
        (
          *('ref_pos', 'ref_charge', 'ref_space_uid', 'atom_pad_mask'),
          *('ref_element', 'ref_atom_name_chars', 'atom_to_token'),
        ),
        np.full((4, 4), 2),
      )
    ),
    'ref_element: expected one-hot rows',
  ),
  'missing': (
    lambda: sa.boltz.BoltzAtomFeatures.from_upstream({'ref_pos': 0}),
    "expected 'ref_charge', got",
  ),
  'windows': (
    lambda: dataclasses.replace(BOLTZ1, atoms_per_window_keys=10),
    'multiple of an even atoms_per_window_queries=4, got 10',
  ),
  'heads': (
    lambda: dataclasses.replace(BOLTZ1, atom_decoder_heads=3),
    'atom_s=8 must be divisible by atom_decoder_heads=3',
  ),
  'depth': (
    lambda: dataclasses.replace(BOLTZ1, atom_encoder_depth=0),
    'atom_encoder_depth: expected at least 1, got 0',
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_raises_and_says_what_was_expected(case):
  make, message = BAD[case]
  with pytest.raises(ValueError, match=message):
    make()


def test_missing_trunk_or_positions_raise(boltz1):
  functions, params, context, _ = boltz1
  with pytest.raises(ValueError, match=r'^single: expected an array'):
    functions.precompute(params, features())
  with pytest.raises(ValueError, match=r'^positions: expected an array'):
    functions.encode(params, context)
  config = dataclasses.replace(BOLTZ2, use_residue_feats_atoms=True)
  other = sa.boltz.cached_atom_attention(config)
  with pytest.raises(ValueError, match=r'^res_type: expected an array'):
    other.precompute(params, features(), SINGLE, PAIR)


def test_decode_without_a_decoder_raises():
  config = dataclasses.replace(BOLTZ1, atom_decoder_depth=0)
  functions = sa.boltz.cached_atom_attention(config)
  params = random_params(boltz_parameters.atom_attention_parameters(config))
  context = functions.precompute(params, features(), SINGLE, PAIR)
  with pytest.raises(ValueError, match=r'^context: .* no decoder$'):
    functions.decode(params, context, normal(N_TOKEN, 10), normal(N_ATOM, 8))


# The transformer by itself.


def test_token_transformer_attends_to_all_tokens_of_the_mask():
  n, channels = 6, 8
  a, s = normal(n, channels, seed=3), normal(n, 4, seed=4)
  biases = normal(2, 1, 2, n, n, seed=5)
  mask = np.arange(n) < 5
  params = random_params(
    boltz_transformers.diffusion_transformer_parameters(2, 2, channels, 4)
  )

  @jax.jit
  def run(a):
    masked = [boltz_transformers.masked_bias(x, mask) for x in biases]
    return boltz_transformers.diffusion_transformer(params, a, s, masked, mask)

  want = run(a)
  other = a.copy()
  other[5, 0] += 1
  np.testing.assert_array_equal(run(other)[:5], want[:5])
  other[4, 0] += 1
  moved = np.abs(run(other) - want).max(-1)
  assert np.all(moved[:5] > 0)


def test_terms_computed_before_equal_those_of_each_layer():
  n, channels = 8, 8
  q, c = normal(n, channels, seed=3), normal(n, channels, seed=4)
  biases = normal(2, 2, 2, 4, 8, seed=5)
  mask = np.ones(n, bool)
  params = random_params(
    boltz_transformers.diffusion_transformer_parameters(2, 2, channels, 8)
  )

  def run(s, terms):
    return boltz_transformers.diffusion_transformer(
      params, q, s, biases, mask, terms
    )

  terms = boltz_transformers.transformer_terms(params, c)
  assert_close(run(None, terms), run(c, None))


def test_functions_of_one_layer_equal_their_formulas():
  a, s = normal(4, 6, seed=3), normal(4, 5, seed=4)
  params = random_params(boltz_transformers.ada_ln_parameters(6, 5))
  own = {k: {n: np.float64(x) for n, x in v.items()} for k, v in params.items()}

  def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

  c = norm(s) * own['s_norm']['scale']
  gate = c @ own['s_scale']['weights'] + own['s_scale']['bias']
  want = norm(a) / (1 + np.exp(-gate)) + c @ own['s_bias']['weights']
  assert_close(boltz_transformers.ada_ln(params, a, s), want)
  table = boltz_transformers.transition_parameters(6, 5)
  gate = pm.init_parameters(table, jax.random.key(0))['output_projection_0']
  assert np.all(gate['weights'] == 0)
  assert np.all(gate['bias'] == -2)
