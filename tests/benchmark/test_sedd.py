"""The candidates of the SEDD section do the same job."""

import numpy as np

from structattn_jax.benchmark import harness
from structattn_jax.benchmark.sedd import dual_track as sedd

CASE = sedd.Case(2, 6, 5, 64, 1, 3)


def jax_candidates(found):
  return {name: x for name, x in found.items() if name != 'torch'}


def test_forward_candidates_give_the_same_log_scores():
  found = jax_candidates(sedd.forward(CASE))
  assert list(found) == ['program', 'network', 'published']
  program, *others = (candidate.call() for candidate in found.values())
  assert program['ligand'].shape == (2, 5, 2365)
  for other in others:
    assert harness.max_relative_error(program, other) < 1e-5


def test_training_candidates_have_the_same_losses_step_by_step():
  found = jax_candidates(sedd.training(CASE))
  first = [float(candidate.call()) for candidate in found.values()]
  second = [float(candidate.call()) for candidate in found.values()]
  np.testing.assert_allclose(first, first[0], rtol=1e-5)
  np.testing.assert_allclose(second, second[0], rtol=1e-4)
  assert second[0] != first[0]


def test_sampling_and_update_candidates_give_clean_tokens():
  for found in (
    sedd.conditional_sampling(CASE),
    {'update': sedd.update((2, 6, 70))['published']},
  ):
    for name, candidate in jax_candidates(found).items():
      tokens = candidate.call()
      tokens = tokens['ligand'] if isinstance(tokens, dict) else tokens
      dim = 70 if name == 'update' else 2365
      assert np.all((np.asarray(tokens) >= 0) & (np.asarray(tokens) < dim))


def test_comparison_has_a_row_per_candidate():
  found = sedd.update((2, 6, 70))
  rows = sedd._compare('case', found, 2)
  assert [row.candidate for row in rows] == list(found)
  assert all(row.calls == 2 and row.cpu_seconds >= 0 for row in rows)
  assert rows[0].temp_bytes >= 0
