"""Boltz's published modules, replayed: float32, float64 and gradients.

The README of the goldens accepts atol 2e-5 + rtol 1e-5 in float32 and 1e-10 in
float64 on real atoms; `replay.golden` asks for less than the first.
"""

import functools
import pathlib

import jax
import numpy as np
import pytest

from structattn_jax import verification as replay
from structattn_jax.verification import boltz as boltz_atom_encoder

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens' / 'boltz_atom_encoder'
CASES = (
  'conditioning',
  'v1_input_embedder',
  'v1_multiplicity_windows',
  'v1_structure',
  'v2_input_embedder_postln',
  'v2_structure',
)


@functools.cache
def golden(case):
  return replay.Golden.read(GOLDENS / f'{case}.npz', case)


def wide(arrays):
  return jax.tree.map(
    lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, arrays
  )


@pytest.mark.parametrize('case', [x for x in CASES if x != 'conditioning'])
def test_boltz_golden_matches_in_float64(case):
  stored = golden(case)
  config = boltz_atom_encoder.config_of(stored)
  inputs = stored.part('inputs')
  features = boltz_atom_encoder.stacked_features(inputs)
  params = boltz_atom_encoder.haiku_params(stored.part('params'))
  floats = {
    name: inputs[name] for name in boltz_atom_encoder.FLOATS if name in inputs
  }
  with jax.enable_x64(True):
    run = jax.jit(functools.partial(boltz_atom_encoder.outputs, config))
    found = run(wide(params), wide(features), wide(floats))
  is_atom = np.asarray(features.atom_mask)
  compared = set()
  for name in stored.outputs():
    base, _, strides = name.partition('__s')
    if base not in found:
      continue
    got, want = np.asarray(found[base]), stored.arrays[f'outputs64/{name}']
    if strides:
      q, k = map(int, strides.split('x'))
      got = got[:, :, ::q, ::k]
    if base in ('q', 'r_update'):
      mask = np.repeat(is_atom, len(got) // len(is_atom), 0)
      got, want = got[mask], want[mask]
    assert got.dtype == np.float64
    assert np.abs(got - want).max() < 1e-9, name
    compared.add(base)
  assert {'a', 'q'} <= compared


def test_boltz_golden_float64_sees_the_epsilon_of_the_mean():
  """Without the 1e-6 in the divisor the comparison above would fail."""
  stored = golden('v1_structure')
  counts = np.bincount(stored.arrays['inputs/atom_to_token_index'][0] + 1)[1:]
  scale = np.abs(stored.arrays['outputs64/a']).max()
  assert scale * 1e-6 / counts.max() > 1e-8
