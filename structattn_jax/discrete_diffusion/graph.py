"""Forward processes on tokens: absorbing and uniform.

Lou, Meng, Ermon 2024, section 3; SEDD `graph_lib.py` @ 0605786d. A token jumps
with rate matrix Q, so that after total noise sigma it is distributed as a row
of exp(sigma Q). `score` is the ratio p_sigma(v) / p_sigma(x) for each v.

Everything acts on single tokens: `tokens` may have any shape [...], and `sigma`
any shape that broadcasts against it (a scalar for one sequence, [batch, 1] for
[batch, n] tokens). V = `dim` is the number of states.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics

GraphKind = Literal['absorbing', 'uniform']


@dataclasses.dataclass(frozen=True)
class Absorbing:
  """Every token jumps to the last state with rate 1 and stays there.

  Attributes:
    dim: number of states, the absorbing one included.
    scale_by_sigma: whether networks leave it to `log_score` to subtract
      log(e^sigma - 1) + log(dim - 1), as published.
  """

  dim: int
  scale_by_sigma: bool = True

  def __post_init__(self) -> None:
    _check_dim(self)

  @property
  def absorbing(self) -> int:
    """The absorbing state, dim - 1."""
    return self.dim - 1

  def rate(self, tokens: jax.Array) -> jax.Array:
    """[..., dim] float32 rows of Q: -1 on the token, +1 on the last state."""
    return self._one_hot(self.absorbing) - self._one_hot(tokens)

  def transp_rate(self, tokens: jax.Array) -> jax.Array:
    """[..., dim] float32 columns of Q."""
    inflow = (tokens == self.absorbing)[..., None]
    return jnp.where(inflow, 1.0, 0.0) - self._one_hot(tokens)

  def transition(self, tokens: jax.Array, sigma: jax.Array) -> jax.Array:
    """[..., dim] rows of exp(sigma Q): where a token goes."""
    kept, moved = _kept_and_moved(sigma)
    return kept * self._one_hot(tokens) + moved * self._one_hot(self.absorbing)

  def transp_transition(self, tokens: jax.Array, sigma: jax.Array) -> jax.Array:
    """[..., dim] columns of exp(sigma Q): where a token may have come from."""
    kept, moved = _kept_and_moved(sigma)
    inflow = (tokens == self.absorbing)[..., None]
    return kept * self._one_hot(tokens) + jnp.where(inflow, moved, 0)

  def sample_transition(
    self, key: jax.Array, tokens: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """Draws tokens after noise sigma, in the shape of `tokens`."""
    uniform = jax.random.uniform(key, tokens.shape)
    return self.sample_transition_from_uniform(uniform, tokens, sigma)

  def sample_transition_from_uniform(
    self, uniform: jax.Array, tokens: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """As `sample_transition`, of given uniforms in the shape of `tokens`."""
    moves = uniform < -jnp.expm1(-jnp.asarray(sigma))
    return jnp.where(moves, self.absorbing, tokens).astype(tokens.dtype)

  def sample_limit(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws int32 tokens at infinite noise: the absorbing state everywhere."""
    del key
    return jnp.full(shape, self.absorbing, jnp.int32)

  def staggered_score(self, score: jax.Array, dsigma: jax.Array) -> jax.Array:
    """p_{sigma - dsigma}(v) / p_sigma(x) from p_sigma(v) / p_sigma(x).

    Args:
      score: [..., dim] float, positive.
      dsigma: [...] float, noise to take away.
    """
    dsigma = jnp.asarray(dsigma)[..., None]
    total = jnp.sum(score, -1, keepdims=True)
    taken = -jnp.expm1(dsigma) * total * self._one_hot(self.absorbing)
    return jnp.exp(dsigma) * score + taken

  def log_score(
    self, logits: jax.Array, tokens: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """[..., dim] log score from the logits [..., dim] of a network."""
    return log_score(logits, tokens, sigma, scale_by_sigma=self.scale_by_sigma)

  def score_entropy(
    self,
    log_score: jax.Array,
    sigma: jax.Array,
    tokens: jax.Array,
    clean: jax.Array,
  ) -> jax.Array:
    """Score entropy of each token given the clean one; see `reverse_rate`.

    At absorbed tokens, with the true score r = 1 / (e^sigma - 1) of the clean
    token and 0 elsewhere:

      sum_{v < dim-1} e^{s_v} - r s_clean + r (log r - 1)

    and 0 at all others.

    Args:
      log_score: [..., dim] float.
      sigma: [...] float.
      tokens: [...] integer, noised.
      clean: [...] integer.

    Returns:
      [...], at least 0 up to rounding.
    """
    log_score = numerics.at_least_float32(log_score)
    r = 1 / jnp.expm1(jnp.asarray(sigma, log_score.dtype))
    positive = jnp.sum(jnp.exp(log_score[..., :-1]), -1)
    negative = r * _pick(log_score, clean)
    entropy = positive - negative + r * (jnp.log(r) - 1)
    return jnp.where(tokens == self.absorbing, entropy, 0)

  def reverse_rate(self, tokens: jax.Array, score: jax.Array) -> jax.Array:
    """[..., dim] rates of the reverse process; each row sums to zero."""
    return _reverse_rate(self, tokens, score)

  def _one_hot(self, tokens: Any) -> jax.Array:
    return jax.nn.one_hot(tokens, self.dim, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Every token jumps to each state with rate 1 / dim.

  Attributes:
    dim: number of states.
  """

  dim: int

  def __post_init__(self) -> None:
    _check_dim(self)

  def rate(self, tokens: jax.Array) -> jax.Array:
    """[..., dim] float32 rows of Q: 1 / dim, minus 1 on the token."""
    return 1 / self.dim - jax.nn.one_hot(tokens, self.dim, dtype=jnp.float32)

  def transp_rate(self, tokens: jax.Array) -> jax.Array:
    """[..., dim] float32 columns of Q, which is symmetric."""
    return self.rate(tokens)

  def transition(self, tokens: jax.Array, sigma: jax.Array) -> jax.Array:
    """[..., dim] rows of exp(sigma Q): where a token goes."""
    kept, moved = _kept_and_moved(sigma)
    return (
      kept * jax.nn.one_hot(tokens, self.dim, dtype=jnp.float32)
      + moved / self.dim
    )

  def transp_transition(self, tokens: jax.Array, sigma: jax.Array) -> jax.Array:
    """[..., dim] columns of exp(sigma Q), which is symmetric."""
    return self.transition(tokens, sigma)

  def sample_transition(
    self, key: jax.Array, tokens: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """Draws tokens after noise sigma, in the shape of `tokens`."""
    move_key, token_key = jax.random.split(key)
    return self.sample_transition_from_uniform(
      jax.random.uniform(move_key, tokens.shape),
      tokens,
      sigma,
      jax.random.randint(token_key, tokens.shape, 0, self.dim),
    )

  def sample_transition_from_uniform(
    self,
    uniform: jax.Array,
    tokens: jax.Array,
    sigma: jax.Array,
    replacement: jax.Array,
  ) -> jax.Array:
    """As `sample_transition`, of given draws in the shape of `tokens`.

    Args:
      uniform: in [0, 1), decide who moves.
      tokens: integer.
      sigma: float.
      replacement: integer in [0, dim), where to.
    """
    moves = uniform < -jnp.expm1(-jnp.asarray(sigma))
    return jnp.where(moves, replacement, tokens).astype(tokens.dtype)

  def sample_limit(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws int32 tokens at infinite noise: uniform."""
    return jax.random.randint(key, shape, 0, self.dim)

  def staggered_score(self, score: jax.Array, dsigma: jax.Array) -> jax.Array:
    """p_{sigma - dsigma}(v) / p_sigma(x); see `Absorbing.staggered_score`."""
    dsigma = jnp.asarray(dsigma)[..., None]
    total = jnp.sum(score, -1, keepdims=True)
    return jnp.exp(dsigma) * score - jnp.expm1(dsigma) / self.dim * total

  def log_score(
    self, logits: jax.Array, tokens: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """[..., dim] logits of a network, with zero at the token itself."""
    return log_score(logits, tokens, sigma, scale_by_sigma=False)

  def score_entropy(
    self,
    log_score: jax.Array,
    sigma: jax.Array,
    tokens: jax.Array,
    clean: jax.Array,
  ) -> jax.Array:
    """Score entropy of each token given the clean one.

    The true score towards the clean token is 1 / r where it differs, and r
    away from it, r = (e^sigma - 1) / (e^sigma - 1 + dim); 1 between others.

    Args:
      log_score: [..., dim] float, zero at the token itself.
      sigma: [...] float.
      tokens: [...] integer, noised.
      clean: [...] integer.

    Returns:
      [...], at least 0 up to rounding.
    """
    log_score = numerics.at_least_float32(log_score)
    dim = self.dim
    expm1 = jnp.expm1(jnp.asarray(sigma, log_score.dtype))
    # Not 1 - dim / (e^sigma - 1 + dim), which cancels.
    r = expm1 / (expm1 + dim)
    own = _pick(log_score, tokens)
    other = jnp.mean(log_score, -1) - own / dim
    moved = tokens != clean
    negative = jnp.where(
      moved, _pick(log_score, clean) / expm1 + other, r * other
    )
    constant = jnp.where(
      moved,
      ((-jnp.log(r) - 1) / r - (dim - 2)) / dim,
      (dim - 1) / dim * r * (jnp.log(r) - 1),
    )
    positive = jnp.mean(jnp.exp(log_score), -1) - jnp.exp(own) / dim
    return positive - negative + constant

  def reverse_rate(self, tokens: jax.Array, score: jax.Array) -> jax.Array:
    """[..., dim] rates of the reverse process; each row sums to zero."""
    return _reverse_rate(self, tokens, score)


Graph = Absorbing | Uniform


def make_graph(kind: GraphKind, dim: int) -> Graph:
  """The graph called `kind` with `dim` states.

  Raises:
    ValueError: on an unknown name, or fewer than two states.
  """
  kinds = {'absorbing': Absorbing, 'uniform': Uniform}
  if kind not in kinds:
    raise ValueError(f'kind: expected one of {", ".join(kinds)}, got {kind!r}')
  return kinds[kind](dim)


def log_score(
  logits: jax.Array,
  tokens: jax.Array,
  sigma: jax.Array,
  *,
  scale_by_sigma: bool = True,
) -> jax.Array:
  """SEDD's output: log p_sigma(v) / p_sigma(x) for one changed token.

    s_v = logit_v - log(e^sigma - 1) - log(n_vocab - 1),    s_x = 0

  These are not probabilities. For the uniform graph the subtraction is left
  out.

  Args:
    logits: [..., n, n_vocab] float.
    tokens: [..., n] integer, the input of the network.
    sigma: float that broadcasts against `tokens`, total noise: [] for one
      sequence, [batch, 1] for a batch.
    scale_by_sigma: whether to subtract; True for absorbing graphs.

  Returns:
    [..., n, n_vocab], at least float32.
  """
  logits = numerics.at_least_float32(logits)
  n_vocab = logits.shape[-1]
  if scale_by_sigma:
    offset = log_expm1(jnp.asarray(sigma, logits.dtype))
    logits -= offset[..., None] + np.log(n_vocab - 1)
  # A comparison with the index, so that no one-hot array is made.
  index = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
  return jnp.where(index == tokens[..., None], 0, logits)


def log_expm1(x: jax.Array) -> jax.Array:
  """log(e^x - 1) for x >= 0, accurate near 0 and without overflow."""
  return x + jnp.log(-jnp.expm1(-x))


def _check_dim(graph: Any) -> None:
  if graph.dim < 2:
    raise ValueError(
      f'{type(graph).__name__}.dim: expected at least 2 states, got {graph.dim}'
    )


def _kept_and_moved(sigma: Any) -> tuple[jax.Array, jax.Array]:
  """e^-sigma and 1 - e^-sigma with an axis for the states."""
  sigma = jnp.asarray(sigma)[..., None]
  return jnp.exp(-sigma), -jnp.expm1(-sigma)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
  index = jnp.broadcast_to(index, values.shape[:-1])
  return jnp.take_along_axis(values, index[..., None], -1)[..., 0]


def _reverse_rate(
  graph: Graph, tokens: jax.Array, score: jax.Array
) -> jax.Array:
  """Column of Q times the score; minus the sum of the others on the token."""
  rate = graph.transp_rate(tokens).astype(score.dtype) * score
  own = jax.lax.broadcasted_iota(tokens.dtype, rate.shape, rate.ndim - 1)
  own = own == tokens[..., None]
  rate = jnp.where(own, 0, rate)
  return jnp.where(own, -jnp.sum(rate, -1, keepdims=True), rate)
