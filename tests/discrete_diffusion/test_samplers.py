"""Samplers: exact distributions, replays, conditions, and what they skip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import discrete_diffusion as dd
from structattn_jax.discrete_diffusion import (
  absorbing,
  literal,
  samplers,
  schedule,
)
from structattn_jax.discrete_diffusion.prepared_network import cached_sedd
from structattn_jax.discrete_diffusion.program import ONLY
from structattn_jax.network.sedd import dual_track as network
from structattn_jax.network.sedd import single_track

PROTEIN_VOCAB, LIGAND_VOCAB = 9, 80
CONFIG = network.DualTrackConfig(
  hidden_size=8,
  num_head=2,
  num_block=2,
  cond_dim=4,
  protein_vocab=PROTEIN_VOCAB,
  ligand_vocab=LIGAND_VOCAB,
)
SAMPLER = dd.SamplerConfig(steps=12)
VOCAB = {'protein': PROTEIN_VOCAB, 'ligand': LIGAND_VOCAB}


def chi_square_is_plausible(counts, expected) -> bool:
  """Within five standard deviations."""
  counts, expected = np.ravel(counts), np.ravel(expected)
  used = expected > 0
  assert not np.any(counts[~used])
  statistic = np.sum((counts - expected)[used] ** 2 / expected[used])
  freedom = used.sum() - 1
  return abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@functools.cache
def params_of(config=CONFIG, scale=0.15):
  if isinstance(config, single_track.SeddConfig):
    init, count = single_track.transform_sedd(config).init, 1
  else:
    init, count = network.transform_sedd_dual_track(config).init, 2
  token = jnp.zeros(2, jnp.int32)
  shapes = jax.eval_shape(
    init, jax.random.key(0), *[token] * count, jnp.float32(1)
  )
  rng = np.random.default_rng(0)
  return {
    path: {
      name: scale * rng.standard_normal(x.shape).astype(np.float32)
      + np.float32(name == 'scale')
      for name, x in values.items()
    }
    for path, values in shapes.items()
  }


# One update.


@pytest.mark.parametrize('dim', [5, 65, 200])
def test_replacement_follows_chance_and_softmax(dim):
  """Over one block, exactly one, and several; padded and not."""
  count = 60_000
  rng = np.random.default_rng(dim)
  logits = rng.standard_normal(dim - 1).astype(np.float32)
  logits[1] = -np.inf
  uniform = rng.random((count, 2), np.float32)
  tokens = np.full(count, dim - 1, np.int32)
  tokens[:100] = 0
  mass = np.exp(logits.astype(np.float64)).sum() / (dim - 1)
  chance = 0.3 / mass
  extra = np.zeros(1) if dim % 64 == 1 else rng.standard_normal(3)
  given = np.concatenate([logits, extra]).astype(np.float32)
  if dim % 64 == 1:
    given = given[:-1]
  drawn = np.asarray(
    jax.jit(
      lambda logits, uniform: absorbing.replace_from_uniform(
        jnp.broadcast_to(logits, (count, logits.size)),
        tokens,
        np.log(chance),
        uniform,
        dim=dim,
      )
    )(given, uniform)
  )
  assert np.all(drawn[:100] == 0)
  drawn = drawn[100:]
  expected = 0.3 * np.exp(logits.astype(np.float64)) / (mass * (dim - 1))
  expected = (count - 100) * np.append(expected, 0.7)
  assert chi_square_is_plausible(np.bincount(drawn, minlength=dim), expected)


def test_replacement_at_the_ends_of_the_uniforms_is_a_real_token():
  logits = np.full((3, 100), -80.0, np.float32)
  logits[0, 17], logits[1, 99], logits[2, 0] = 3, 3, 3
  ends = np.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
  for last in ends:
    uniform = np.stack([np.zeros(3), np.full(3, last)], -1).astype(np.float32)
    drawn = absorbing.replace_from_uniform(
      logits, np.full(3, 100, np.int32), np.inf, uniform, dim=101
    )
    assert np.all((np.asarray(drawn) >= 0) & (np.asarray(drawn) < 100))
    if last:
      np.testing.assert_array_equal(drawn, [17, 99, 0])


@pytest.mark.parametrize('predictor', ['analytic', 'euler'])
def test_closed_form_chances_are_the_literal_probabilities(predictor):
  """Of a network's logits at absorbed tokens, at the steps of a schedule."""
  sampler = dd.SamplerConfig(steps=6, predictor=predictor)
  for noise in (dd.LogLinearNoise(), dd.GeometricNoise()):
    plan = schedule.make_schedule(noise, sampler)
    graph = dd.Absorbing(7)
    logits = np.random.default_rng(0).standard_normal(7)
    with jax.enable_x64(True):
      for i in range(sampler.steps):
        sigma, dsigma, rate = (
          np.float64(x[i]) for x in (plan.sigma, plan.dsigma, plan.rate)
        )
        amount = dsigma if predictor == 'analytic' else rate
        got = literal.step_probabilities(
          graph,
          graph.log_score(logits, jnp.array(6), sigma),
          jnp.array(6),
          amount,
          predictor=predictor,
        )
        chance = np.expm1(dsigma) if predictor == 'analytic' else rate
        chance /= np.expm1(sigma)
        want = chance * np.exp(logits[:-1]) / 6
        np.testing.assert_allclose(got[:-1], want, rtol=1e-9)
        assert got[-1] == pytest.approx(1 - want.sum(), rel=1e-5)


def test_loglinear_chances_of_both_predictors_are_equal():
  plan = schedule.make_schedule(dd.LogLinearNoise(), dd.SamplerConfig(steps=9))
  np.testing.assert_allclose(np.expm1(plan.dsigma), plan.rate, rtol=1e-5)


def test_temperature_and_nucleus_change_the_choice_not_the_chance():
  probabilities = np.array([[0.05, 0.1, 0.25, 0.6], [0.2, 0.1, 0.3, 0.4]])
  tokens = np.array([3, 0])
  cold = literal._reshaped(probabilities, tokens, 0.5, 1.0)
  np.testing.assert_allclose(cold[np.arange(2), tokens], [0.6, 0.2])
  np.testing.assert_allclose(np.sum(cold, -1), 1, rtol=1e-6)
  want = np.array([0.05, 0.1, 0.25]) ** 2
  np.testing.assert_allclose(cold[0, :3], 0.4 * want / want.sum(), rtol=1e-6)
  top = literal._reshaped(probabilities, tokens, 1.0, 0.6)
  np.testing.assert_allclose(top[0], [0, 0, 0.4, 0.6], atol=1e-7)
  np.testing.assert_allclose(top[1], [0.2, 0, 0.8 * 3 / 7, 0.8 * 4 / 7], 1e-6)
  # The closed form: the same chance, and only tokens of the nucleus.
  uniform = np.random.default_rng(0).random((20_000, 2), np.float32)
  drawn = absorbing.replace_from_uniform(
    jnp.log(jnp.broadcast_to(probabilities[0], (20_000, 4))),
    np.full(20_000, 4, np.int32),
    np.log(4 * 0.5),
    uniform,
    dim=5,
    top_p=0.7,
  )
  counts = np.bincount(np.asarray(drawn), minlength=5)
  want = 20_000 * np.array([0, 0, 0.5 * 0.25 / 0.85, 0.5 * 0.6 / 0.85, 0.5])
  assert chi_square_is_plausible(counts, want)


# Exact scores of a toy joint distribution of two protein tokens and one of the
# ligand.

TOY = np.random.default_rng(11).dirichlet(np.ones(12)).reshape(2, 3, 2)
TOY_VOCAB = {'protein': 4, 'ligand': 3}


def toy_logits(tokens):
  """log p(v | clean tokens) + log(V - 1) at absorbed positions."""
  table = jnp.asarray(np.pad(TOY, ((0, 1), (0, 0), (0, 0))))

  def one(protein, ligand):
    given = (*protein, *ligand)
    kept = [
      (jnp.arange(size) == token) | (token == absorbing)
      for size, token, absorbing in zip(
        (3, 3, 2), given, (3, 3, 2), strict=True
      )
    ]
    weights = table * kept[0][:, None, None] * kept[1][:, None] * kept[2]
    found = [jnp.sum(weights, (1, 2)), jnp.sum(weights, (0, 2))]
    last = jnp.sum(weights, (0, 1))
    found = [x / jnp.sum(x) for x in (*found, last)]
    logits = [
      jnp.log(jnp.append(x, 1.0)) + np.log(dim - 1)
      for x, dim in zip(found, (4, 4, 3), strict=True)
    ]
    return {
      'protein': jnp.stack(logits[:2]),
      'ligand': jnp.stack(logits[2:]),
    }

  return jax.vmap(one)(tokens['protein'], tokens['ligand'])


def joint_counts(tokens):
  index = np.concatenate([tokens['protein'], tokens['ligand']], -1)
  counts = np.zeros((3, 3, 2))
  np.add.at(counts, tuple(np.asarray(index).T), 1)
  return counts


def test_literal_sampler_with_exact_scores_draws_the_joint_distribution():
  count, steps = 2000, 80
  shapes = {'protein': (2, 4), 'ligand': (1, 3)}

  @jax.jit
  def run(key):
    keys = dict(zip(shapes, jax.random.split(key), strict=True))
    uniforms = {
      track: jax.random.uniform(keys[track], (steps + 1, count, n, dim))
      for track, (n, dim) in shapes.items()
    }
    return dd.sample_from_uniform(
      lambda tokens, sigma: toy_logits(tokens),
      {track: dd.Absorbing(dim) for track, dim in TOY_VOCAB.items()},
      {
        track: jnp.full((count, n), dim - 1, jnp.int32)
        for track, (n, dim) in shapes.items()
      },
      {track: x[:-1] for track, x in uniforms.items()},
      {track: x[-1, ..., :-1] for track, x in uniforms.items()},
      sampler=dd.SamplerConfig(steps=steps),
    ).tokens

  counts = joint_counts(run(jax.random.key(0)))
  expected = count * np.pad(TOY, ((0, 1), (0, 0), (0, 0)))
  assert chi_square_is_plausible(counts, expected)


def closed_form(key, count, steps, **options):
  """The fast loop with exact scores."""
  keys = jax.random.split(key)
  uniforms = {
    'protein': jax.random.uniform(keys[0], (steps + 1, count, 2, 2)),
    'ligand': jax.random.uniform(keys[1], (steps + 1, count, 1, 2)),
  }

  def network(tokens, condition):
    del condition
    logits = toy_logits(tokens)
    return lambda positions: logits

  return absorbing.sample_absorbing_from_uniform(
    network,
    TOY_VOCAB,
    uniforms,
    jnp.zeros(steps + 1),
    sampler=dd.SamplerConfig(steps=steps),
    **options,
  )


@pytest.mark.parametrize('time_free', [False, True])
def test_sampler_with_exact_scores_draws_the_joint_distribution(time_free):
  count, steps = 2500, 80
  run = jax.jit(
    lambda key: closed_form(key, count, steps, time_free=time_free).tokens
  )
  counts = joint_counts(run(jax.random.key(1)))
  expected = count * np.pad(TOY, ((0, 1), (0, 0), (0, 0)))
  assert chi_square_is_plausible(counts, expected)
  # The test can tell: independent tokens fail it.
  marginals = (TOY.sum((1, 2)), TOY.sum((0, 2)), TOY.sum((0, 1)))
  product = np.einsum('i,j,k->ijk', *marginals)
  assert not chi_square_is_plausible(counts[:2], count * product)


def test_skipped_network_calls_change_nothing():
  run = jax.jit(
    lambda key, time_free: closed_form(
      key, 2, 60, time_free=time_free, return_states=True
    ),
    static_argnums=1,
  )
  skipped, full = run(jax.random.key(2), True), run(jax.random.key(2), False)
  for track, states in full.states.items():
    np.testing.assert_array_equal(skipped.states[track], states)
    np.testing.assert_array_equal(skipped.tokens[track], full.tokens[track])
  # The first call, and one after each step that changed something.
  changed = np.zeros(60, bool)
  for states in full.states.values():
    changed |= np.any(np.diff(states, axis=0), axis=(1, 2))
  assert skipped.network_calls == 1 + changed.sum()
  assert full.network_calls < 61


# The network's samplers.

CONTEXT = np.array([3, 1, 4, 1, 5, 2], np.int32)


def draw(mode, config=CONFIG, num_samples=3, sampler=SAMPLER, **inputs):
  return dd.sample(
    config,
    params_of(config),
    jax.random.key(0),
    num_samples=num_samples,
    mode=mode,
    sampler=sampler,
    **inputs,
  )


@pytest.fixture(scope='module')
def joint():
  return draw('joint', protein=20, ligand=6, return_states=True)


def test_joint_samples_are_clean_and_start_absorbed(joint):
  for track, n in (('protein', 20), ('ligand', 6)):
    tokens, states = joint.tokens[track], np.asarray(joint.states[track])
    last = VOCAB[track] - 1
    assert tokens.shape == (3, n)
    assert states.shape == (13, 3, n)
    assert np.all((tokens >= 0) & (np.asarray(tokens) < last))
    assert np.all(states[0] == last)
    # Once replaced, a token stays.
    kept = states[:-1] != last
    np.testing.assert_array_equal(states[1:][kept], states[:-1][kept])
    assert 0 < np.mean(states[6] == last) < 1
  assert len({tuple(row) for row in np.asarray(joint.tokens['protein'])}) == 3
  np.testing.assert_array_equal(joint.protein, joint.tokens['protein'])


def test_gathered_positions_give_the_same_samples(joint, monkeypatch):
  """The end of the network at absorbed positions only, or everywhere."""
  monkeypatch.setattr(absorbing, '_MOST_LEVELS', 1)
  samplers._run.clear_cache()
  got = draw('joint', protein=20, ligand=6, return_states=True)
  samplers._run.clear_cache()
  for track, states in joint.states.items():
    np.testing.assert_array_equal(got.states[track], states)


def test_sample_depends_on_its_index_alone(joint):
  got = draw('joint', protein=20, ligand=6, num_samples=2)
  for track, tokens in joint.tokens.items():
    np.testing.assert_array_equal(got.tokens[track], tokens[:2])


def test_sample_does_not_see_padding_or_other_contexts():
  """More hidden positions, and a context per sample instead of one."""
  mode = 'ligand_given_protein'
  want = draw(mode, protein=CONTEXT, ligand=6).ligand
  contexts = np.stack([np.pad(CONTEXT, (0, 2))] * 3)
  contexts[2] = contexts[2][::-1]
  got = draw(
    mode,
    protein=contexts,
    protein_mask=np.arange(8) < 6,
    ligand=9,
    ligand_mask=np.arange(9) < 6,
  ).ligand
  np.testing.assert_array_equal(got[:2, :6], want[:2])


def test_fixed_tokens_are_kept_in_all_states():
  template = np.full((3, 6), 7, np.int32)
  template[1] = 11
  fixed = np.array([True, False, False, True, False, False])
  found = draw(
    'ligand_given_protein',
    protein=CONTEXT,
    ligand=template,
    ligand_fixed=fixed,
    return_states=True,
  )
  states = np.asarray(found.states['ligand'])
  np.testing.assert_array_equal(
    states[..., fixed], np.broadcast_to(template[:, fixed], (13, 3, 2))
  )
  np.testing.assert_array_equal(found.ligand[:, fixed], template[:, fixed])
  assert np.all(states[0][:, ~fixed] == LIGAND_VOCAB - 1)


def test_network_without_time_conditioning_is_called_less():
  config = network.DualTrackConfig(
    **{**CONFIG.to_dict(), 'time_conditioning': False}
  )
  found = draw(
    'ligand_given_protein',
    config,
    num_samples=1,
    sampler=dd.SamplerConfig(steps=40),
    protein=CONTEXT,
    ligand=5,
  )
  assert found.network_calls <= 6
  assert np.all(np.asarray(found.ligand) < LIGAND_VOCAB - 1)


def test_single_track_and_uniform_graph():
  config = single_track.SeddConfig(
    hidden_size=8, num_head=2, num_block=1, cond_dim=4, vocab=7
  )
  run = functools.partial(
    dd.sample_sedd,
    config,
    params_of(config),
    jax.random.key(0),
    num_samples=4,
    tokens=5,
    sampler=dd.SamplerConfig(steps=5),
  )
  found = run()
  assert found.tokens[ONLY].shape == (4, 5)
  assert np.all(np.asarray(found.tokens[ONLY]) < 6)
  uniform = run(graph='uniform', noise=dd.GeometricNoise(), return_states=True)
  states = np.asarray(uniform.states[ONLY])
  assert states.shape == (6, 4, 5)
  assert len(np.unique(states[0])) > 4
  assert np.any(states[0] != states[-1])


def test_prepared_parameters_give_the_same_samples():
  program = cached_sedd(CONFIG).precompute(params_of())
  arguments = {
    'num_samples': 3,
    'mode': 'ligand_given_protein',
    'protein': CONTEXT,
    'ligand': 6,
    'sampler': SAMPLER,
  }
  got = dd.sample(CONFIG, program, jax.random.key(0), **arguments)
  other = dataclasses.replace(CONFIG, num_head=1)
  with pytest.raises(ValueError, match=r'params: prepared for .*num_head=2'):
    dd.sample(other, program, jax.random.key(0), **arguments)
  want = draw('ligand_given_protein', protein=CONTEXT, ligand=6)
  np.testing.assert_array_equal(got.ligand, want.ligand)


@pytest.mark.parametrize(
  ('mode', 'inputs', 'message'),
  [
    ('joint', {'protein': 3}, 'ligand: expected a length or tokens'),
    ('ligand_only', {'ligand': 3, 'protein': 3}, 'protein: not used in'),
    ('ligand_given_protein', {'ligand': 3}, 'protein: the mode needs its'),
    (
      'ligand_given_protein',
      {'ligand': 3, 'protein': np.zeros((2, 4), int)},
      r'protein: expected shape .*\[3, n\], got \(2, 4\)',
    ),
    (
      'ligand_given_protein',
      {'ligand': 3, 'protein': CONTEXT, 'protein_mask': np.ones(4, bool)},
      'protein_mask: expected shape',
    ),
    (
      'ligand_only',
      {'ligand': 3, 'ligand_fixed': np.ones(3, bool)},
      'ligand_fixed: needs tokens, got a length',
    ),
    ('ligand_only', {'ligand': np.array([80])}, 'ligand: expected tokens in'),
  ],
)
def test_wrong_inputs_raise_and_name_what_is_wrong(mode, inputs, message):
  with pytest.raises(ValueError, match=message):
    draw(mode, **inputs)


def test_seed_variant_says_that_it_cannot_be_sampled():
  config = dataclasses.replace(CONFIG, variant='seed')
  with pytest.raises(ValueError, match="'seed' cannot be sampled"):
    draw('joint', config, protein=3, ligand=2)


def test_unknown_graph_raises():
  with pytest.raises(ValueError, match=r"kind: expected one of .* got 'blue'"):
    draw('joint', protein=3, ligand=2, graph='blue')


def test_wrong_sampler_options_raise():
  for options in ({'steps': 0}, {'top_p': 0.0}, {'temperature': 0.0}):
    (name,) = options
    with pytest.raises(ValueError, match=f'SamplerConfig.{name}: expected'):
      dd.SamplerConfig(**options)
