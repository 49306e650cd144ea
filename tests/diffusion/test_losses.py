"""Training losses: recorded values, oracles, quirks, memory, masks."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import diffusion
from structattn_jax.reference import diffusion as reference

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/boltz_diffusion'
VERSIONS = ['alphafold3', 'boltz1', 'boltz2']
each_version = pytest.mark.parametrize('version', VERSIONS)


def example(n=23, num_samples=3, seed=0):
  """Denoised and true structures with nucleotides, ligands and padding."""
  rng = np.random.default_rng(seed)
  true = 9 * rng.normal(size=(n, 3))
  kind = rng.integers(0, 4, n)
  return {
    'denoised': true + 2 * rng.normal(size=(num_samples, n, 3)),
    'true': true @ np.linalg.qr(rng.normal(size=(3, 3)))[0],
    'sigma': np.array([0.3, 16.0, 200.0])[:num_samples],
    'mask': rng.random(n) < 0.8,
    'is_nucleotide': (kind == 1) | (kind == 2),
    'is_ligand': kind == 3,
  }


def loss_of(config, inputs, **changes):
  inputs = inputs | changes
  names = ('denoised', 'true', 'sigma', 'mask')
  rest = {k: v for k, v in inputs.items() if k not in names}
  return diffusion.diffusion_loss(*(inputs[k] for k in names), config, **rest)


# Values.


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(
  ('case', 'version'), [('v1_small', 'boltz1'), ('v2_small', 'boltz2')]
)
def test_losses_of_boltz_are_those_recorded(case, version, dtype):
  with np.load(GOLDENS / f'{case}.npz') as file:
    golden = dict(file)
  outputs = 'outputs64' if dtype == 'float64' else 'outputs'
  of_token = golden['inputs/atom_to_token'][0].astype(np.int32)
  kind = of_token @ golden['inputs/mol_type'][0]
  inputs = {
    'denoised': golden[f'{outputs}/train/denoised'].astype(dtype),
    'true': golden[f'{outputs}/train/true'].astype(dtype),
    'sigma': golden[f'{outputs}/train/sigmas'].astype(dtype),
    'mask': golden['inputs/atom_resolved_mask'][0].astype(bool),
    'is_nucleotide': (kind == 1) | (kind == 2),
    'is_ligand': kind == 3,
    'true_unmoved': golden['inputs/coords'].reshape(-1, 3).astype(dtype),
  }
  config = diffusion.LossConfig(version=version, row_block=32)
  with jax.enable_x64(dtype == 'float64'):
    got = jax.jit(functools.partial(loss_of, config))(inputs)
    got = jax.tree.map(np.asarray, got)
  bound = 1e-12 if dtype == 'float64' else 1e-6
  for name, value in (
    ('loss', got.total),
    ('mse_loss', got.mse),
    ('smooth_lddt_loss', got.smooth_lddt),
  ):
    want = golden[f'{outputs}/train/{name}']
    assert value.dtype == dtype
    np.testing.assert_allclose(value, want, rtol=bound, err_msg=name)


@each_version
@pytest.mark.parametrize('row_block', [1, 5, 64])
def test_losses_equal_the_oracle(version, row_block):
  inputs = example()
  config = diffusion.LossConfig(version=version, row_block=row_block)
  with jax.enable_x64(True):
    got = jax.jit(functools.partial(loss_of, config))(inputs)
    got = jax.tree.map(np.asarray, got)
  weights = 1 + 5.0 * inputs['is_nucleotide'] + 10.0 * inputs['is_ligand']
  mse = np.mean(
    [
      reference.mean_squared_error(
        x, inputs['true'], weights, inputs['mask'], sigma, 16.0, version
      )
      for x, sigma in zip(inputs['denoised'], inputs['sigma'], strict=True)
    ]
  )
  smooth = reference.smooth_lddt(
    inputs['denoised'],
    np.broadcast_to(inputs['true'], inputs['denoised'].shape),
    inputs['mask'],
    inputs['is_nucleotide'],
    version,
  )
  np.testing.assert_allclose(got.mse, mse, rtol=1e-12)
  np.testing.assert_allclose(got.smooth_lddt, smooth, rtol=1e-12)
  np.testing.assert_allclose(got.total, mse + smooth, rtol=1e-12)
  assert got.bond == 0


def test_quirk_of_boltz1_shows_when_the_truth_differs_between_samples():
  inputs = example()
  rng = np.random.default_rng(1)
  true = 12 * rng.normal(size=inputs['denoised'].shape)
  arguments = inputs['denoised'], true, inputs['mask'], inputs['is_nucleotide']
  found = {}
  for version in VERSIONS:
    with jax.enable_x64(True):
      loss = diffusion.smooth_lddt_loss(*arguments, version=version)
    found[version] = float(loss)
    want = reference.smooth_lddt(*arguments, version)
    np.testing.assert_allclose(found[version], want, rtol=1e-12)
  assert abs(found['boltz1'] - found['alphafold3']) > 1e-3
  # 1e-6 in the distances is the rest.
  assert abs(found['boltz2'] - found['alphafold3']) < 1e-5


def test_cutoff_depends_on_the_row_atom():
  # Two atoms 20 apart: only the nucleotide's row counts the pair.
  true = np.array([[0, 0, 0], [20, 0, 0]], np.float32)
  denoised = np.array([[[0, 0, 0], [20.5, 0, 0]]], np.float32)
  mask = np.ones(2, bool)
  want = 1 - np.mean(1 / (1 + np.exp(0.5 - np.array([0.5, 1, 2, 4]))))
  for first, expected in ((True, want), (False, 1.0)):
    got = diffusion.smooth_lddt_loss(
      denoised, true, mask, np.array([first, False])
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@each_version
def test_sigma_weight_is_the_published_one(version):
  config = diffusion.LossConfig(version=version)
  sigma = np.array([1e-3, 4.0, 2560.0])
  got = diffusion.sigma_weight(sigma, config)
  scale = sigma + 16 if version == 'alphafold3' else sigma * 16
  np.testing.assert_allclose(got, (sigma**2 + 256) / scale**2, rtol=1e-6)
  slopes = jax.vmap(jax.grad(lambda x: diffusion.sigma_weight(x, config)))(
    sigma.astype(np.float32)
  )
  assert np.isfinite(slopes).all()


def test_bond_loss_is_the_mean_of_squared_length_errors():
  inputs = example()
  x, y = inputs['denoised'][0], inputs['true']
  mask = np.ones(len(y), bool)
  mask[4] = False
  bonds = np.array([[0, 1], [2, 3], [3, 4], [5, 6]], np.int32)
  bond_mask = np.array([True, True, True, False])
  got = diffusion.bond_loss(x, y, bonds, mask, bond_mask)
  errors = [
    np.linalg.norm(x[i] - x[j]) - np.linalg.norm(y[i] - y[j])
    for i, j in bonds[:2]
  ]
  np.testing.assert_allclose(got, np.mean(np.square(errors)), rtol=1e-5)


def test_bond_loss_is_weighted_like_the_squared_error():
  inputs = example()
  bonds = np.array([[0, 1], [2, 3]], np.int32)
  config = diffusion.LossConfig(bond_weight=0.5)
  got = jax.jit(functools.partial(loss_of, config))(inputs | {'bonds': bonds})
  factors = diffusion.sigma_weight(inputs['sigma'], config)
  want = np.mean(
    [
      factor * diffusion.bond_loss(x, inputs['true'], bonds, inputs['mask'])
      for factor, x in zip(factors, inputs['denoised'], strict=True)
    ]
  )
  np.testing.assert_allclose(got.bond, want, rtol=1e-5)
  np.testing.assert_allclose(
    got.total, got.mse + 0.5 * got.bond + got.smooth_lddt, rtol=1e-6
  )


# Invariance, masks, gradients.


@each_version
def test_loss_does_not_depend_on_how_the_truth_is_placed(version):
  inputs = example()
  rng = np.random.default_rng(5)
  turn = reference.gram_schmidt(*rng.normal(size=(2, 3)))
  config = diffusion.LossConfig(version=version)
  run = jax.jit(functools.partial(loss_of, config))
  want = run(inputs).total
  moved = inputs['true'] @ turn + 30
  np.testing.assert_allclose(
    run(inputs | {'true': moved}).total, want, rtol=1e-5
  )
  # A mirror image is another structure.
  other = run(inputs | {'true': inputs['true'] * [1, 1, -1]}).total
  assert abs(other - want) > 0.05 * want


@each_version
def test_what_is_not_resolved_changes_nothing(version):
  inputs = example()
  config = diffusion.LossConfig(version=version)
  run = jax.jit(
    jax.value_and_grad(
      lambda x, inputs: loss_of(config, inputs, denoised=x).total
    )
  )
  want, gradient = run(inputs['denoised'], inputs)
  denoised, true = inputs['denoised'].copy(), inputs['true'].copy()
  denoised[:, ~inputs['mask']] = 1e4
  true[~inputs['mask']] = np.nan
  got, other = run(denoised, inputs | {'true': true})
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(other, gradient, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(other[:, ~inputs['mask']], 0)


@each_version
@pytest.mark.parametrize('kept', [0, 1])
def test_without_pairs_all_is_finite(version, kept):
  inputs = example()
  mask = np.arange(len(inputs['mask'])) < kept
  config = diffusion.LossConfig(version=version, bond_weight=1.0)
  inputs |= {'mask': mask, 'bonds': np.array([[0, 1]], np.int32)}

  def run(x):
    loss = loss_of(config, inputs, denoised=x)
    return loss.total, loss

  (_, loss), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(
    inputs['denoised'].astype(np.float32)
  )
  assert (loss.bond, loss.smooth_lddt) == (0, 1)
  assert loss.mse < 1e-9
  assert np.abs(gradient).max() < 1e-4


@each_version
def test_atoms_in_one_place_have_finite_gradients(version):
  inputs = example()
  config = diffusion.LossConfig(version=version, bond_weight=1.0)
  inputs['bonds'] = np.array([[0, 1]], np.int32)
  gradient = jax.jit(
    jax.grad(lambda x: loss_of(config, inputs, denoised=x).total)
  )(np.zeros_like(inputs['denoised'], np.float32))
  assert np.isfinite(gradient).all()


@each_version
def test_gradient_equals_finite_differences(version):
  inputs = example(n=9)
  config = diffusion.LossConfig(version=version, bond_weight=1.0, row_block=4)
  inputs['bonds'] = np.array([[0, 1], [3, 4]], np.int32)
  along = np.random.default_rng(2).normal(size=inputs['denoised'].shape)
  with jax.enable_x64(True):
    x = jnp.asarray(inputs['denoised'])
    # With a fixed target: the alignment has no gradient, as published.
    weights = diffusion.alignment_weights(
      inputs['is_nucleotide'], inputs['is_ligand'], config=config
    )
    target = jnp.stack(
      [
        jnp.asarray(
          reference.rigid_align(
            inputs['true'], y, np.asarray(weights), inputs['mask']
          )
        )
        for y in inputs['denoised']
      ]
    )

    def parts(x):
      mse = jax.vmap(
        lambda x, y: diffusion.weighted_mse(
          x, y, weights, inputs['mask'], version=version
        )
      )(x, target)
      loss = loss_of(config, inputs, denoised=x)
      mean = jnp.mean(diffusion.sigma_weight(inputs['sigma'], config) * mse)
      return mean + loss.bond + loss.smooth_lddt

    parts = jax.jit(parts)
    step = 1e-6
    found = (parts(x + step * along) - parts(x - step * along)) / (2 * step)
    gradient = jax.jit(
      jax.grad(lambda x: loss_of(config, inputs, denoised=x).total)
    )(x)
  gradient = np.asarray(gradient)
  found = float(found)
  assert abs(found - np.sum(gradient * along)) < 1e-7 * (1 + abs(found))


@each_version
def test_no_array_of_all_pairs_is_made(version):
  n, num_samples, row_block = 512, 2, 32
  inputs = example(n=n, num_samples=num_samples)
  config = diffusion.LossConfig(version=version, row_block=row_block)

  def largest(jaxpr) -> int:
    sizes = [
      np.prod(v.aval.shape, dtype=int)
      for equation in jaxpr.eqns
      for v in equation.outvars
    ]
    inner = [
      largest(getattr(value, 'jaxpr', value))
      for equation in jaxpr.eqns
      for value in equation.params.values()
      if hasattr(value, 'eqns') or hasattr(value, 'jaxpr')
    ]
    return max([0, *sizes, *inner])

  found = largest(
    jax.make_jaxpr(
      jax.grad(lambda x: loss_of(config, inputs, denoised=x).total)
    )(inputs['denoised'].astype(np.float32)).jaxpr
  )
  # Differences of a block's rows; all pairs would be 16 times as many.
  assert found == num_samples * row_block * n * 3


# Mistakes.


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'sigma': np.ones(2)}, ValueError, r'sigma: .*num_samples=3 from'),
    ({'true': np.zeros((5, 3))}, ValueError, r'true: expected shape'),
    ({'mask': np.ones(23)}, TypeError, 'mask: expected bool'),
    ({'is_ligand': np.ones(23)}, TypeError, 'is_ligand: expected bool'),
    (
      {'bonds': np.zeros((2, 3), int)},
      ValueError,
      r'bonds: expected shape \[n_bond, 2\]',
    ),
  ],
)
def test_wrong_arguments_are_named(changes, error, message):
  with pytest.raises(error, match=message):
    loss_of(diffusion.LossConfig(), example(), **changes)


def test_configs_and_versions_that_mean_nothing_are_refused():
  with pytest.raises(ValueError, match=r'bonds: expected .* bond_weight=1\.0'):
    loss_of(diffusion.LossConfig(bond_weight=1.0), example())
  with pytest.raises(ValueError, match=r'LossConfig\.version'):
    diffusion.LossConfig(version='boltz3')
  with pytest.raises(ValueError, match='row_block: expected at least 1'):
    diffusion.LossConfig(row_block=0)
  with pytest.raises(ValueError, match='sigma_data: expected a finite'):
    dataclasses.replace(diffusion.LossConfig(), sigma_data=0.0)
  x = np.zeros((1, 2, 3))
  mask = np.ones(2, bool)
  with pytest.raises(ValueError, match='version: expected one of'):
    diffusion.smooth_lddt_loss(x, x, mask, mask, version='v1')
