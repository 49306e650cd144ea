"""Recorded outputs of the published SEDD code, in float64 too.

`tests/test_verify.py` replays the same files in float32.
"""

import pathlib

import jax
import numpy as np
import pytest

from structattn_jax import verification as replay
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification import sedd

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens/sedd_protein_ligand'
FILES = (
  'dual_components',
  'dual_modes',
  'graph_noise',
  'single_absorb',
  'single_uniform',
  'single_v100',
)


class Wide(golden_lib.Golden):
  """A golden whose inputs and parameters are float64."""

  def part(self, prefix):
    return {
      name: value.astype(np.float64) if value.dtype.kind == 'f' else value
      for name, value in super().part(prefix).items()
    }


def read(name: str) -> golden_lib.Golden:
  return golden_lib.Golden.read(GOLDENS / f'{name}.npz', name)


@pytest.mark.parametrize('name', FILES)
def test_golden_in_float64_matches_to_its_last_digits(name):
  """Every output that was recorded in float64, gradients included."""
  golden = read(name)
  wide = Wide(golden.case, golden.meta, golden.arrays)
  run = replay.REPLAYS[golden.meta['system'], golden.meta['kind']]
  with jax.enable_x64(True):
    found = {row.output: row for row in run(wide)}
  recorded = {
    key.removeprefix('outputs64/')
    for key in golden.arrays
    if key.startswith('outputs64/')
  }
  assert recorded - set(found) <= {'rotary/qkv_in'}
  # Its input is the recorded float32 one.
  for output in (recorded & set(found)) - {'rotary/qkv_out'}:
    row = found[output]
    assert row.max_error <= 1e-9 * max(row.scale, 1), output


@pytest.mark.parametrize('name', ['single_absorb', 'single_uniform'])
def test_recorded_corruption_is_reproduced(name):
  golden = read(name)
  inputs = golden.part('inputs')
  config = sedd.single_config(golden)
  graph = sedd.graph_of(golden, config.vocab)
  got = sedd.transition_from_uniform(
    graph,
    inputs['transition_uniform'],
    inputs['x0'],
    sedd.noise_of(golden).total(inputs['t'])[:, None],
    lambda: inputs['transition_randint'],
  )
  np.testing.assert_array_equal(got, inputs['xt'])


def test_recipe_gives_the_recorded_parameters_or_says_so():
  golden = read('dual_full_width')
  name = 'transformer.blocks_lig.0.adaLN_modulation.bias'
  meta = {
    **golden.meta,
    'param_shapes': {name: golden.meta['param_shapes'][name]},
  }
  # First in order, so it does not depend on the others.
  small = golden_lib.Golden(golden.case, meta, golden.arrays)
  assert sedd.dual_params(small)[name].shape == (3072,)
  wrong = golden_lib.Golden(golden.case, {**meta, 'seed': 1}, golden.arrays)
  with pytest.raises(replay.GoldenError, match='recipe gives another'):
    sedd.dual_params(wrong)
