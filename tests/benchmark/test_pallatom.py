"""Candidates of the Pallatom benchmark compute the same."""

import jax
import numpy as np
import pytest

from structattn_jax.benchmark import harness
from structattn_jax.benchmark.pallatom import atom_transformers as pallatom

CASE = pallatom.Case(40, 5, 2)


def test_cases_cover_what_is_published():
  sizes = {(len(case.tok_idx), case.n_batch) for case in pallatom.CASES}
  for n_atom in (255, 1025, 2050, 252, 1022, 2044):
    assert {(n_atom, 1), (n_atom, 4)} <= sizes
  assert {(8190, 1), (8190, 4), (20_912, 1)} <= sizes


@pytest.mark.parametrize('mode', pallatom.MODES[:2])
def test_candidates_match_float64(mode):
  args = pallatom.inputs(mode, CASE)
  want = pallatom.expected(mode, CASE, args)
  for name in ('blocked', 'published'):
    got = jax.jit(pallatom.function(mode, CASE, name))(*args)
    assert harness.max_relative_error(got, want) < 5e-6, name


def test_gradients_of_candidates_agree():
  mode = 'decoder, forward+backward'
  args = pallatom.inputs(mode, CASE)
  blocked, published = (
    jax.jit(pallatom.function(mode, CASE, name))(*args)
    for name in ('blocked', 'published')
  )
  assert jax.tree.structure(blocked) == jax.tree.structure(published)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(published))
  for got, want in zip(
    jax.tree.leaves(blocked), jax.tree.leaves(published), strict=True
  ):
    assert np.abs(got - want).max() < 1e-4 * max(
      np.abs(want).max(), largest / 1e3
    )


def test_index_candidates_agree():
  case = pallatom.Case(60, 5)
  found = pallatom.index_candidates(case)
  lists, compared = (
    jax.jit(found[name])(case.tok_idx) for name in ('lists, jit', 'published')
  )
  for got, want in zip(lists, compared, strict=True):
    np.testing.assert_array_equal(got, want)
