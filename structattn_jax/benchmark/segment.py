"""Pooling atoms into tokens, and broadcasting back.

128 float32 channels; n / 8 tokens of 1 to 15 atoms. Candidates:
  segment, dense, matmul: the implementations of `components.segment`, told
    whether the ids are sorted.
  one-hot: products with the whole one-hot matrix, atoms x tokens.
  jax.ops: `jax.ops.segment_sum` of the values and of ones, and plain indexing,
    as one would write them without a library. The baseline.

Backward passes take a given cotangent; 'forward+backward' returns the result
and the gradient. Ids are arguments of the compiled program, not constants.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.benchmark import harness
from structattn_jax.components import segment

Operation = Literal['mean', 'mean_gradient', 'broadcast_gradient']
OPERATIONS: dict[Operation, str] = {
  'mean': 'atoms to tokens, mean, forward',
  'mean_gradient': 'atoms to tokens, mean, forward+backward',
  'broadcast_gradient': 'tokens to atoms, broadcast, forward+backward',
}
BASELINE = 'jax.ops'
CANDIDATES = (*segment.IMPLEMENTATIONS, 'one-hot', BASELINE)

_CHANNELS = 128
_ATOMS_PER_TOKEN = 8
_MAX_ATOMS_PER_TOKEN = 15


class Case(NamedTuple):
  """Size and order of the atoms."""

  n_atom: int
  is_sorted: bool = True

  @property
  def n_token(self) -> int:
    """Number of tokens."""
    return self.n_atom // _ATOMS_PER_TOKEN

  def __str__(self) -> str:
    """Label in the table."""
    return f'{self.n_atom:,} {"sorted" if self.is_sorted else "unsorted"}'


CASES = (Case(1_000), Case(10_000), Case(10_000, False), Case(100_000))
QUICK_CASES = (Case(200), Case(2_000), Case(2_000, False))


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures all operations.

  Args:
    quick: small sizes, few repeats.
    rss: also measure the peak resident set, a new process for each row.
      Skipped off CPU, where arrays are not in host memory.
    report: called with each table as soon as it is there.

  Returns:
    One table per operation.
  """
  rss = rss and jax.default_backend() == 'cpu'
  _compare('mean', QUICK_CASES[0], repeats=1)  # The first compiles are slower.
  tables = []
  for operation, title in OPERATIONS.items():
    rows: list[harness.Measurement] = []
    for case in QUICK_CASES if quick else CASES:
      measured = _compare(operation, case, repeats=5 if quick else 60)
      if rss:
        measured = [
          harness.with_peak_rss(row, build, operation, case, row.candidate)
          for row in measured
        ]
      rows += measured
    tables.append(
      harness.Table(title=title, baseline=BASELINE, rows=tuple(rows))
    )
    report(tables[-1])
  return tables


def _compare(
  operation: Operation, case: Case, repeats: int
) -> list[harness.Measurement]:
  args = inputs(operation, case)
  return harness.compare(
    {name: function(operation, case, name) for name in CANDIDATES},
    args,
    case=str(case),
    want=expected(operation, case, args),
    repeats=repeats,
  )


def build(
  operation: Operation, case: Case, candidate: str
) -> tuple[Callable[..., Any], Sequence[jax.Array]]:
  """The function of a candidate and its arguments, for a new process."""
  return function(operation, case, candidate), inputs(operation, case)


def inputs(operation: Operation, case: Case) -> tuple[jax.Array, ...]:
  """The same arrays for all candidates.

  Args:
    operation: key of `OPERATIONS`.
    case: size and order.

  Returns:
    The operand, [n_atom, 128] or [n_token, 128]; ids [n_atom] int32; and, for
    gradients, the cotangent of the result.
  """
  rng = np.random.default_rng(0)
  # Pairs of k and 16 - k atoms: 1 to 15 in each token, 8 on average.
  first = rng.integers(1, _MAX_ATOMS_PER_TOKEN + 1, case.n_token // 2)
  sizes = np.concatenate([first, 2 * _ATOMS_PER_TOKEN - first])
  if case.n_token % 2:
    sizes = np.append(sizes, _ATOMS_PER_TOKEN)
  ids = np.repeat(np.arange(case.n_token), rng.permutation(sizes))
  if not case.is_sorted:
    ids = rng.permutation(ids)
  ids = ids.astype(np.int32)
  atoms = rng.standard_normal((case.n_atom, _CHANNELS), np.float32)
  tokens = rng.standard_normal((case.n_token, _CHANNELS), np.float32)
  given = {
    'mean': (atoms, ids),
    'mean_gradient': (atoms, ids, tokens),
    'broadcast_gradient': (tokens, ids, atoms),
  }[operation]
  return tuple(jnp.asarray(x) for x in given)


def expected(
  operation: Operation, case: Case, args: Sequence[jax.Array]
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
  """The results in float64 NumPy, of the float32 arguments."""
  operand, ids, *cotangents = (np.asarray(x) for x in args)
  operand = operand.astype(np.float64)

  def total(rows):
    out = np.zeros((case.n_token, *rows.shape[1:]))
    np.add.at(out, ids, rows)
    return out

  if operation == 'broadcast_gradient':
    return operand[ids], total(cotangents[0].astype(np.float64))
  count = total(np.ones(case.n_atom))[:, None]
  mean = total(operand) / count
  if operation == 'mean':
    return mean
  return mean, (cotangents[0] / count)[ids]


def function(
  operation: Operation, case: Case, candidate: str
) -> Callable[..., Any]:
  """The operation by a candidate, as a function of `inputs`."""
  forward = _FORWARD.get((operation == 'broadcast_gradient', candidate))
  if forward is not None:
    forward = functools.partial(forward, n_token=case.n_token)
  else:
    forward = functools.partial(
      _ours_broadcast if operation == 'broadcast_gradient' else _ours_mean,
      n_token=case.n_token,
      implementation=candidate,
      indices_are_sorted=case.is_sorted,
      max_per_segment=_MAX_ATOMS_PER_TOKEN,
    )
  if operation == 'mean':
    return forward

  def forward_backward(operand, ids, cotangent):
    out, pullback = jax.vjp(lambda x: forward(x, ids), operand)
    return out, pullback(cotangent)[0]

  return forward_backward


def _ours_mean(atoms, ids, *, n_token, **options):
  return segment.segment_mean(atoms, ids, n_token, **options)


def _ours_broadcast(tokens, ids, *, n_token, **options):
  del n_token
  return segment.segment_broadcast(tokens, ids, **options)


def _one_hot_mean(atoms, ids, *, n_token):
  one_hot = jax.nn.one_hot(ids, n_token)
  return one_hot.T @ atoms / jnp.maximum(one_hot.sum(0), 1)[:, None]


def _one_hot_broadcast(tokens, ids, *, n_token):
  return jax.nn.one_hot(ids, n_token) @ tokens


def _plain_mean(atoms, ids, *, n_token):
  total = jax.ops.segment_sum(atoms, ids, n_token)
  count = jax.ops.segment_sum(jnp.ones(len(atoms)), ids, n_token)
  return total / jnp.maximum(count, 1)[:, None]


def _plain_broadcast(tokens, ids, *, n_token):
  del n_token
  return tokens[ids]


# By whether it is the broadcast, and candidate.
_FORWARD = {
  (False, 'one-hot'): _one_hot_mean,
  (False, BASELINE): _plain_mean,
  (True, 'one-hot'): _one_hot_broadcast,
  (True, BASELINE): _plain_broadcast,
}
