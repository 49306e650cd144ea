"""Oracle of discrete diffusion: rate matrices, their exponentials, scores.

Everything follows from the rate matrix Q alone (Lou, Meng, Ermon 2024, section
3): transitions are rows of exp(sigma Q), reverse steps are Bayes' rule, and the
score entropy is its definition, a sum over jumps.
"""

import numpy as np


def rate_matrix(kind: str, dim: int) -> np.ndarray:
  """[dim, dim], row = from, column = to; rows sum to zero.

  'absorbing': rate 1 to the last state. 'uniform': rate 1 / dim to each.
  """
  if kind == 'absorbing':
    rates = np.zeros((dim, dim))
    rates[:, -1] = 1
  else:
    rates = np.full((dim, dim), 1 / dim)
  return rates - np.diag(rates.sum(1))


def matrix_exponential(matrix: np.ndarray) -> np.ndarray:
  """exp(matrix) by its series, after halving the matrix until it is small."""
  halvings = 0
  while np.abs(matrix).sum(1).max() > 0.5:
    matrix, halvings = matrix / 2, halvings + 1
  term = total = np.eye(len(matrix))
  for order in range(1, 20):
    term = term @ matrix / order
    total = total + term
  for _ in range(halvings):
    total = total @ total
  return total


def true_score(
  kind: str, clean: np.ndarray, token: int, sigma: float
) -> np.ndarray:
  """[dim] p_sigma(v) / p_sigma(token) of a token with distribution `clean`."""
  later = clean @ matrix_exponential(sigma * rate_matrix(kind, len(clean)))
  return later / later[token]


def score_entropy(
  kind: str, log_score: np.ndarray, sigma: float, token: int, clean: int
) -> float:
  """sum_{y != x} Q(y, x) (s_y - r_y log s_y + r_y (log r_y - 1)).

  x is the noised token; r_y = p(y | clean) / p(x | clean) at noise sigma; terms
  with r_y = 0 are s_y.
  """
  dim = len(log_score)
  rates = rate_matrix(kind, dim)
  now = matrix_exponential(sigma * rates)[clean]
  total = 0.0
  for other in range(dim):
    if other != token and rates[other, token] > 0:
      ratio = now[other] / now[token]
      loss = np.exp(log_score[other])
      if ratio > 0:
        loss += ratio * (np.log(ratio) - 1 - log_score[other])
      total += rates[other, token] * loss
  return total


def reverse_step(
  kind: str, score: np.ndarray, token: int, dsigma: float
) -> np.ndarray:
  """[dim] where a token was at noise dsigma less, given its score.

  p(y, earlier | x, now) = (score exp(-dsigma Q))_y exp(dsigma Q)_{y, x}; the
  analytic predictor.
  """
  rates = rate_matrix(kind, len(score))
  earlier = score @ matrix_exponential(-dsigma * rates)
  return earlier * matrix_exponential(dsigma * rates)[:, token]


def euler_step(
  kind: str, score: np.ndarray, token: int, amount: float
) -> np.ndarray:
  """[dim] onehot + amount * reverse rate out of a token."""
  rate = rate_matrix(kind, len(score))[:, token] * score
  rate[token] = 0
  rate[token] = -rate.sum()
  return np.eye(len(score))[token] + amount * rate
