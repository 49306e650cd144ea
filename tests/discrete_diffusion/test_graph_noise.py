"""Graphs against their rate matrices; schedules against their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import discrete_diffusion as dd
from structattn_jax.discrete_diffusion import literal
from structattn_jax.reference import discrete_diffusion as reference

DIM = 6
KINDS = ('absorbing', 'uniform')
each_kind = pytest.mark.parametrize('kind', KINDS)
NOISES = {
  'loglinear': dd.LogLinearNoise(),
  'loglinear_wide': dd.LogLinearNoise(eps=0.1),
  'geometric': dd.GeometricNoise(),
  'cosine': dd.CosineNoise(sigma_min=1e-3, sigma_max=4.0),
}
each_noise = pytest.mark.parametrize('noise', NOISES.values(), ids=NOISES)
TOKENS = np.arange(DIM)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def chi_square_is_plausible(counts, expected) -> bool:
  """Within five standard deviations; counts per category on the last axis."""
  counts, expected = np.asarray(counts), np.asarray(expected)
  used = expected > 0
  assert not np.any(counts[~used])
  statistic = np.sum((counts - expected)[used] ** 2 / expected[used])
  freedom = used.sum() - 1
  return abs(statistic - freedom) <= 5 * np.sqrt(2 * freedom)


@each_kind
def test_rates_are_rows_and_columns_of_the_rate_matrix(kind):
  graph = dd.make_graph(kind, DIM)
  want = reference.rate_matrix(kind, DIM)
  np.testing.assert_allclose(graph.rate(TOKENS), want, atol=1e-7)
  np.testing.assert_allclose(graph.transp_rate(TOKENS), want.T, atol=1e-7)


@each_kind
@pytest.mark.parametrize('sigma', [1e-6, 0.02, 0.7, 6.0, 30.0])
def test_transition_is_the_matrix_exponential_of_the_rate(kind, sigma):
  graph = dd.make_graph(kind, DIM)
  want = reference.matrix_exponential(sigma * reference.rate_matrix(kind, DIM))
  sigma = jnp.float64(sigma)
  np.testing.assert_allclose(
    graph.transition(TOKENS, sigma), want, rtol=1e-9, atol=1e-14
  )
  np.testing.assert_allclose(
    graph.transp_transition(TOKENS, sigma), want.T, rtol=1e-9, atol=1e-14
  )


@each_kind
def test_sampled_transitions_and_limits_follow_their_distribution(kind):
  graph, count, sigma = dd.make_graph(kind, DIM), 20_000, 0.8
  tokens = jnp.full(count, 2, jnp.int32)
  drawn = graph.sample_transition(jax.random.key(0), tokens, sigma)
  assert drawn.dtype == jnp.int32
  expected = count * np.asarray(graph.transition(jnp.array(2), sigma))
  assert chi_square_is_plausible(
    np.bincount(drawn, minlength=DIM), expected.astype(np.float64)
  )
  limit = graph.sample_limit(jax.random.key(1), (count,))
  far = np.asarray(graph.transition(jnp.array(2), 80.0), np.float64)
  far = np.where(far < 1e-30, 0, far)
  assert chi_square_is_plausible(np.bincount(limit, minlength=DIM), count * far)


def distribution(seed, dim=DIM, absorbing=False):
  clean = np.random.default_rng(seed).dirichlet(np.ones(dim))
  if absorbing:  # Clean data has no absorbed tokens.
    clean[-1] = 0
    clean /= clean.sum()
  return clean


@each_kind
def test_reverse_probabilities_of_true_scores_sum_to_one_and_are_bayes(kind):
  graph = dd.make_graph(kind, DIM)
  clean = distribution(0, absorbing=kind == 'absorbing')
  rates = reference.rate_matrix(kind, DIM)
  for sigma, dsigma in ((0.9, 0.3), (0.9, 0.9), (2.0, 0.05)):
    earlier = clean @ reference.matrix_exponential((sigma - dsigma) * rates)
    step = reference.matrix_exponential(dsigma * rates)
    now = earlier @ step
    for token in TOKENS:
      score = reference.true_score(kind, clean, token, sigma)
      got = literal.step_probabilities(
        graph,
        jnp.log(np.maximum(score, 1e-300)),
        jnp.asarray(token),
        jnp.float64(dsigma),
      )
      bayes = earlier * step[:, token] / now[token]
      np.testing.assert_allclose(got, bayes, atol=1e-12)
      assert abs(np.sum(got) - 1) < 1e-12


@each_kind
def test_probabilities_match_the_oracle_for_any_score(kind):
  graph = dd.make_graph(kind, DIM)
  log_score = np.random.default_rng(1).standard_normal((DIM, DIM))
  log_score[TOKENS, TOKENS] = 0
  options = {'log_score': log_score, 'tokens': TOKENS}
  for predictor, oracle in (
    ('analytic', reference.reverse_step),
    ('euler', reference.euler_step),
  ):
    got = literal.step_probabilities(
      graph, **options, amount=jnp.float64(0.04), predictor=predictor
    )
    want = [
      oracle(kind, np.exp(log_score[token]), token, 0.04) for token in TOKENS
    ]
    np.testing.assert_allclose(got, want, atol=1e-12)
  reverse = graph.reverse_rate(TOKENS, jnp.exp(log_score))
  np.testing.assert_allclose(np.sum(reverse, -1), 0, atol=1e-12)


@each_kind
def test_score_entropy_matches_its_definition(kind):
  graph = dd.make_graph(kind, DIM)
  log_score = np.random.default_rng(2).standard_normal((DIM, DIM, DIM))
  tokens, clean = np.meshgrid(TOKENS, TOKENS, indexing='ij')
  log_score[tokens, clean, tokens] = 0
  last = DIM - (kind == 'absorbing')
  for sigma in (0.02, 0.7, 5.0):
    got = graph.score_entropy(log_score, jnp.float64(sigma), tokens, clean)
    for token in TOKENS:
      for x0 in range(last):
        if kind == 'absorbing' and token not in (x0, DIM - 1):
          continue  # Cannot happen.
        want = reference.score_entropy(
          kind, log_score[token, x0], sigma, token, x0
        )
        assert abs(got[token, x0] - want) < 1e-10 * max(1, abs(want))


@each_noise
def test_rate_is_the_derivative_of_the_noise(noise):
  t = jnp.linspace(0.01, 0.99, 23)
  slope = jax.vmap(jax.grad(noise.total))(t)
  np.testing.assert_allclose(noise.rate(t), slope, rtol=1e-9)
  # In NumPy and in JAX, in float32 and float64.
  np.testing.assert_allclose(noise.total(np.asarray(t)), noise.total(t), 1e-13)
  single = noise.total(np.asarray(t, np.float32))
  assert single.dtype == np.float32
  np.testing.assert_allclose(single, noise.total(t), rtol=2e-6)


def test_noise_at_the_ends():
  t = np.array([0.0, 1.0])
  np.testing.assert_allclose(
    NOISES['loglinear'].total(t), [0, -np.log(1e-3)], rtol=1e-12
  )
  assert NOISES['loglinear'].rate(np.float32(1)) == pytest.approx(999, rel=1e-6)
  np.testing.assert_allclose(NOISES['geometric'].total(t), [1e-4, 20])
  np.testing.assert_allclose(NOISES['cosine'].total(t), [1e-3, 4])
  np.testing.assert_array_equal(NOISES['cosine'].rate(t), 0)
  # No cancellation near zero.
  small = NOISES['loglinear'].total(np.float32(1e-6))
  assert small == pytest.approx(0.999e-6, rel=1e-6)


def test_wrong_options_raise_and_say_what_is_expected():
  with pytest.raises(ValueError, match='kind: expected one of absorbing'):
    dd.make_graph('gaussian', 3)
  with pytest.raises(ValueError, match='at least 2 states, got 1'):
    dd.Uniform(1)
  with pytest.raises(ValueError, match='kind: expected one of loglinear'):
    dd.make_noise('linear')
  with pytest.raises(ValueError, match='did you mean'):
    dd.make_noise('geometric', sigma_mim=1.0)
  with pytest.raises(ValueError, match=r'eps: expected a number in \(0, 1\)'):
    dd.LogLinearNoise(eps=0.0)
  with pytest.raises(ValueError, match='expected 0 < sigma_min < sigma_max'):
    dd.GeometricNoise(sigma_min=3.0, sigma_max=2.0)
