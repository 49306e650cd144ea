"""Score entropy of logits, losses of batches, and the perplexity bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import discrete_diffusion as dd
from structattn_jax.discrete_diffusion import losses
from structattn_jax.network.sedd import dual_track as network
from structattn_jax.network.sedd import single_track
from structattn_jax.reference import discrete_diffusion as reference

KINDS = ('absorbing', 'uniform')
each_kind = pytest.mark.parametrize('kind', KINDS)
CONFIG = network.DualTrackConfig(
  hidden_size=8,
  num_head=2,
  num_block=2,
  cond_dim=4,
  protein_vocab=7,
  ligand_vocab=12,
)
BATCH, N_PROTEIN, N_LIGAND = 4, 6, 5


@pytest.fixture(scope='module')
def clean():
  rng = np.random.default_rng(0)
  mask = np.ones((BATCH, N_PROTEIN), bool)
  mask[1, 4:] = False
  return network.ProteinLigand(
    protein=jnp.asarray(rng.integers(0, 6, (BATCH, N_PROTEIN)), jnp.int32),
    ligand=jnp.asarray(rng.integers(0, 11, (BATCH, N_LIGAND)), jnp.int32),
    protein_mask=jnp.asarray(mask),
    ligand_mask=jnp.ones((BATCH, N_LIGAND), bool),
  )


@pytest.fixture(scope='module')
def params(clean):
  transformed = network.transform_sedd_dual_track(CONFIG)
  made = jax.jit(transformed.init)(
    jax.random.key(0), clean.protein[0], clean.ligand[0], jnp.float32(1)
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), made
  )


@each_kind
def test_entropy_of_logits_is_that_of_the_log_score(kind):
  rng = np.random.default_rng(0)
  graph = dd.make_graph(kind, 9)
  logits = rng.standard_normal((3, 20, 9))
  tokens, x0 = rng.integers(0, 9, (3, 20)), rng.integers(0, 8, (3, 20))
  sigma = np.array([[0.05], [0.9], [6.0]])
  with jax.enable_x64(True):
    got = dd.score_entropy(graph, logits, sigma, tokens, x0)
    log_score = graph.log_score(logits, tokens, sigma)
    want = graph.score_entropy(log_score, sigma, tokens, x0)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_entropy_without_sigma_scaling_takes_logits_as_log_scores():
  rng = np.random.default_rng(0)
  graph = dd.Absorbing(9, scale_by_sigma=False)
  log_score = rng.standard_normal((20, 9))
  tokens, x0 = np.full(20, 8), rng.integers(0, 8, 20)
  with jax.enable_x64(True):
    got = dd.score_entropy(graph, log_score, 0.7, tokens, x0)
    want = [
      reference.score_entropy('absorbing', s, 0.7, 8, c)
      for s, c in zip(log_score, x0, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_entropy_is_computed_at_absorbed_tokens_only():
  graph = dd.Absorbing(5)
  logits = np.zeros((2, 5), np.float32)
  # Would overflow, and must not spoil anything.
  logits[0] = 1e4
  tokens, x0 = np.array([2, 4]), np.array([2, 1])

  def total(logits):
    return jnp.sum(dd.score_entropy(graph, logits, 0.7, tokens, x0))

  value, gradient = jax.value_and_grad(total)(logits)
  assert np.isfinite(value)
  assert not np.any(gradient[0])
  # The output of the absorbing state itself is never used.
  assert np.all(np.asarray(gradient[1, :4]) != 0)
  assert gradient[1, 4] == 0


@each_kind
def test_backward_pass_keeps_no_second_array_of_the_logits_size(kind):
  graph = dd.make_graph(kind, 300)
  logits = jnp.ones((4, 50, 300))
  tokens = jnp.full((4, 50), 299)
  _, pullback = jax.vjp(
    lambda x: dd.score_entropy(graph, x, 0.7, tokens, tokens % 7), logits
  )
  kept = [x for x in jax.tree.leaves(pullback) if x.size >= logits.size]
  assert len(kept) <= 1


@each_kind
def test_gradient_is_zero_at_the_true_ratio_of_a_toy_distribution(kind):
  """Expected over clean and noised tokens of a distribution of one token."""
  dim, sigma = 6, 0.8
  prior = np.random.default_rng(3).dirichlet(np.ones(dim))
  if kind == 'absorbing':
    prior[-1] = 0
    prior /= prior.sum()
  graph = dd.make_graph(kind, dim)
  moves = reference.matrix_exponential(sigma * reference.rate_matrix(kind, dim))
  joint = prior[:, None] * moves  # [clean, noised]
  x0, tokens = np.meshgrid(np.arange(dim), np.arange(dim), indexing='ij')
  true = np.stack(
    [reference.true_score(kind, prior, token, sigma) for token in range(dim)]
  )
  true = np.log(np.maximum(true, 1e-300))
  if kind == 'absorbing':
    # Logits whose log score is the true one.
    true += np.log(np.expm1(sigma)) + np.log(dim - 1)

  def expected(logits):
    entropy = dd.score_entropy(graph, logits[tokens], sigma, tokens, x0)
    return jnp.sum(joint * entropy)

  with jax.enable_x64(True):
    gradient = np.asarray(jax.grad(expected)(true))
    elsewhere = np.asarray(jax.grad(expected)(true + 0.1))
    assert np.abs(gradient).max() < 1e-12
    assert np.abs(elsewhere).max() > 1e-3
    # It is a minimum, and zero entropy belongs to a known clean token.
    direction = np.random.default_rng(4).standard_normal(true.shape)
    assert expected(true + 0.05 * direction) > expected(true)


def test_times_cover_their_range():
  uniform = np.array([0.0, 0.5, 1.0])
  np.testing.assert_allclose(
    dd.times_from_uniform(uniform, minimum=1e-3), [1e-3, 0.5005, 1.0]
  )
  key = jax.random.key(0)
  late, early = (dd.sample_times(key, 1000, power=p) for p in (1.0, 3.0))
  assert 0.45 < np.mean(late) < 0.55
  assert 0.2 < np.mean(early) < 0.3
  grid = np.sort(dd.sample_times(key, 10, minimum=0.0, stratified=True))
  np.testing.assert_allclose(np.diff(grid), 0.1, atol=1e-6)


def test_corruption_leaves_contexts_and_clean_tokens_alone(clean):
  t = jnp.array([0.1, 0.5, 0.9, 1.0])
  for mode in network.MODES:
    noised = dd.corrupt(CONFIG, jax.random.key(0), clean, t, mode=mode)
    for track, last in (('protein', 6), ('ligand', 11)):
      before, after = getattr(clean, track), getattr(noised, track)
      if track not in network.tracks_of(mode).generated:
        assert after is before
      else:
        assert np.any(after == last)
        assert np.all((after == last) | (after == before))


@functools.cache
def loss_of(mode, reduction='tokens'):
  return jax.jit(
    lambda params, clean, noised, t, key=None: dd.dual_track_loss(
      CONFIG,
      params,
      clean,
      noised,
      t,
      mode=mode,
      reduction=reduction,
      dropout_key=key,
    )
  )


@pytest.fixture(scope='module')
def noised(clean):
  t = jnp.array([0.2, 0.5, 0.7, 1.0])
  return dd.corrupt(CONFIG, jax.random.key(5), clean, t), t


def test_joint_loss_is_the_mean_of_both_tracks(params, clean, noised):
  tokens, t = noised
  found = loss_of('joint')(params, clean, tokens, t)
  assert found.loss == pytest.approx((found.protein + found.ligand) / 2)
  mask = np.asarray(clean.protein_mask)
  weighted = np.asarray(found.protein_weighted)
  assert found.protein == pytest.approx(weighted[mask].sum() / mask.sum())
  positions = loss_of('joint', 'positions')(params, clean, tokens, t)
  assert positions.protein == pytest.approx(weighted.mean(), rel=1e-5)
  sequences = loss_of('joint', 'sequences')(params, clean, tokens, t)
  total = np.where(mask, weighted, 0).sum(1).mean()
  assert sequences.protein == pytest.approx(total, rel=1e-5)


def test_conditional_loss_has_the_generated_track_only(params, clean, noised):
  tokens, t = noised
  tokens = network.ProteinLigand(
    clean.protein, tokens.ligand, clean.protein_mask, clean.ligand_mask
  )
  found = loss_of('ligand_given_protein')(params, clean, tokens, t)
  assert found.protein is None
  assert found.protein_weighted is None
  assert found.loss == found.ligand


def test_loss_ignores_what_is_masked_out(params, clean, noised):
  tokens, t = noised
  garbage = jnp.where(clean.protein_mask, tokens.protein, 3)
  other = jnp.where(clean.protein_mask, clean.protein, 1)
  want = loss_of('joint')(params, clean, tokens, t).loss
  got = loss_of('joint')(
    params,
    network.ProteinLigand(
      other, clean.ligand, *(clean.protein_mask, clean.ligand_mask)
    ),
    network.ProteinLigand(
      garbage, tokens.ligand, tokens.protein_mask, tokens.ligand_mask
    ),
    t,
  ).loss
  assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_dropout_of_the_loss_needs_a_key(params, clean, noised):
  tokens, t = noised
  run = loss_of('joint')
  first, again, other = (
    float(run(params, clean, tokens, t, jax.random.key(i)).loss)
    for i in (0, 0, 1)
  )
  assert first == again
  assert first != other


def test_single_track_loss_sums_over_positions():
  config = single_track.SeddConfig(
    hidden_size=8, num_head=2, num_block=1, cond_dim=4, vocab=7
  )
  tokens = jnp.array([[0, 6, 6], [6, 2, 3]])
  x0 = jnp.array([[0, 1, 2], [1, 2, 3]])
  shapes = jax.eval_shape(
    single_track.transform_sedd(config).init,
    jax.random.key(0),
    tokens[0],
    jnp.float32(1),
  )
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
  t = jnp.array([0.3, 0.8])
  loss, weighted = jax.jit(
    lambda params: dd.sedd_loss(config, params, x0, tokens, t)
  )(zeros)
  assert loss == pytest.approx(weighted.sum(1).mean())
  # Zero logits: log(V - 1) / t at each absorbed token.
  want = np.log(6) / np.array([[0, 0.3, 0.3], [0.8, 0, 0]])
  want[~np.isfinite(want)] = 0
  np.testing.assert_allclose(weighted, want, rtol=1e-5)


@each_kind
def test_bound_of_a_uniform_model_is_the_log_of_its_vocabulary(kind, clean):
  """Zero logits are the exact scores of uniformly distributed tokens."""
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape),
    jax.eval_shape(
      network.transform_sedd_dual_track(CONFIG).init,
      jax.random.key(0),
      clean.protein[0],
      clean.ligand[0],
      jnp.float32(1),
    ),
  )
  many = jax.tree.map(lambda x: jnp.tile(x, (20, 1)), clean)
  bound = jax.jit(
    lambda key, batch: dd.perplexity_bound(
      CONFIG,
      zeros,
      key,
      batch,
      num_times=16,
      graphs=losses.graphs_of(CONFIG, kind),
      noise=dd.GeometricNoise() if kind == 'uniform' else dd.LogLinearNoise(),
    )
  )(jax.random.key(0), many)
  taken = kind == 'absorbing'
  # Few tokens change at small noise, and these count much.
  close = functools.partial(pytest.approx, rel=0.05 if taken else 0.12)
  assert bound.perplexity('protein') == close(7 - taken)
  assert bound.perplexity('ligand') == close(12 - taken)
  assert bound.protein_tokens == 20 * np.sum(clean.protein_mask)


def test_bound_of_a_conditional_mode_has_no_other_track(params, clean):
  bound = jax.jit(
    lambda params, key: dd.perplexity_bound(
      CONFIG, params, key, clean, mode='ligand_given_protein', num_times=2
    )
  )(params, jax.random.key(0))
  assert bound.protein_nats is None
  assert np.isfinite(bound.perplexity('ligand'))
  with pytest.raises(ValueError, match="'protein' is not generated"):
    bound.perplexity('protein')


def test_wrong_inputs_raise_and_name_what_is_wrong():
  with pytest.raises(ValueError, match=r'logits: expected 5 states .* got 4'):
    dd.score_entropy(
      dd.Absorbing(5), jnp.zeros((2, 4)), 0.5, jnp.zeros(2, int), jnp.zeros(2)
    )
  with pytest.raises(ValueError, match=r"reduction: expected .* got 'sum'"):
    losses.reduce(jnp.zeros((2, 3)), None, 'sum')
