"""Losses of the structure module: goldens, oracle, invariance, memory."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

from structattn_jax import geometry
from structattn_jax.network.alphafold2 import fape
from structattn_jax.reference.alphafold2 import structure_module as reference

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens/af2_ipa'
each_form = pytest.mark.parametrize('form', ['monomer', 'multimer'])


@functools.cache
def load(name):
  with np.load(GOLDENS / f'{name}.npz', allow_pickle=False) as file:
    return dict(file)


def random_case(n_frame=13, n_point=17, seed=0):
  """Arguments of `frame_aligned_point_error`, targets near predictions."""
  rng = np.random.default_rng(seed)
  rotation, translation = registry.random_frames(rng, n_frame, spread=10.0)
  near, _ = registry.random_frames(rng, n_frame)
  near[::2] = rotation[::2]
  points = 10 * rng.standard_normal((n_point, 3), np.float32)
  return {
    'predicted_frames': geometry.Rigid(rotation, translation),
    'target_frames': geometry.Rigid(
      near, translation + rng.standard_normal((n_frame, 3), np.float32)
    ),
    'frame_mask': rng.random(n_frame) < 0.8,
    'predicted_points': points,
    'target_points': points + 3 * rng.standard_normal(points.shape, np.float32),
    'point_mask': rng.random(n_point) < 0.8,
  }


def pair_mask_of(case):
  rng = np.random.default_rng(1)
  shape = len(case['frame_mask']), len(case['point_mask'])
  return rng.random(shape) < 0.5


def oracle(case, **options):
  return reference.frame_aligned_point_error(
    *(
      np.asarray(getattr(case[f'{kind}_frames'], part), np.float64)
      for kind in ('predicted', 'target')
      for part in ('rotation', 'translation')
    ),
    case['frame_mask'],
    np.asarray(case['predicted_points'], np.float64),
    np.asarray(case['target_points'], np.float64),
    case['point_mask'],
    **options,
  )


def golden_frames(dtype, normalised_target):
  """Predicted frames [3, 21], target frames [21] and the mask."""
  own = load('geometry_fape')
  own = {
    name: value.astype(dtype) if value.dtype == np.float32 else value
    for name, value in own.items()
    if name.startswith('inputs/')
  }
  predicted = geometry.Rigid.from_quaternion(
    own['inputs/pred_quat'], own['inputs/pred_translation'], normalise=False
  )
  target = geometry.Rigid.from_quaternion(
    own['inputs/quat'],
    own['inputs/translation'],
    normalise=normalised_target,
  )
  return predicted, target, own['inputs/mask'] > 0


@pytest.mark.parametrize(
  ('dtype', 'bound'), [('float32', 2e-5), ('float64', 1e-11)]
)
def test_golden_errors_match(dtype, bound):
  own = load('geometry_fape')
  intra = own['inputs/pair_mask'] > 0
  with jax.enable_x64(dtype == 'float64'):
    predicted, target, mask = golden_frames(dtype, True)

    def errors(**options):
      def one(frames):
        return fape.frame_aligned_point_error(
          frames,
          target,
          mask,
          frames.translation,
          target.translation,
          mask,
          **options,
        )

      got = jax.lax.map(one, predicted)
      assert got.dtype == dtype
      return np.asarray(got, np.float64)

    multimer = {'parameterisation': 'multimer'}
    for name, options in (
      ('fape_clamped', {}),
      ('fape_unclamped', {'clamp_distance': None}),
      ('multimer_fape_intra', {**multimer, 'pair_mask': intra}),
      (
        'multimer_fape_interface',
        {
          **multimer,
          'pair_mask': ~intra,
          'clamp_distance': 1000.0,
          'length_scale': 20.0,
        },
      ),
    ):
      want = own[f'outputs64/{name}']
      np.testing.assert_allclose(
        errors(**options), want, rtol=0, atol=bound, err_msg=name
      )
    both = fape.multimer_backbone_loss(
      predicted, target, mask, own['inputs/asym_id']
    )
    for name, got in (
      ('intra', both.intra_chain),
      ('interface', both.interface),
    ):
      want = own[f'outputs64/multimer_fape_{name}'].mean()
      assert abs(float(got) - want) < bound
    same = fape.frame_aligned_point_error(
      target, target, mask, target.translation, target.translation, mask
    )
    assert abs(float(same) - own['outputs64/fape_identical']) < bound


@pytest.mark.parametrize(
  ('dtype', 'bound', 'relative'),
  [('float32', 2e-5, 1e-5), ('float64', 1e-11, 1e-11)],
)
def test_golden_backbone_loss_and_gradient_match(dtype, bound, relative):
  """AF2 takes the quaternions as they are, here of norm 1 +- 1e-8."""
  own = load('geometry_fape')
  with jax.enable_x64(dtype == 'float64'):
    predicted, target, mask = golden_frames(dtype, False)
    weight = own['inputs/use_clamped_fape'].astype(dtype)
    got = fape.backbone_loss(predicted, target, mask, clamp_weight=weight)
    assert abs(float(got) - own['outputs64/backbone_loss']) < bound
    last = fape.backbone_loss(predicted[-1:], target, mask, clamp_weight=weight)
    assert abs(float(last) - own['outputs64/backbone_fape_last']) < bound

    def of_trajectory(tensor):
      frames = geometry.Rigid.from_quaternion7(tensor)
      return fape.backbone_loss(frames, target, mask)

    trajectory = np.concatenate(
      [own['inputs/pred_quat'], own['inputs/pred_translation']], -1
    ).astype(dtype)
    gradient = jax.grad(of_trajectory)(jnp.asarray(trajectory))
    want = own['outputs64/grad_backbone_loss_traj']
    error = np.abs(gradient - want).max() / np.abs(want).max()
    assert error < relative


@pytest.mark.parametrize('chunk_size', [None, 4, 13])
@pytest.mark.parametrize(
  'options',
  [
    {},
    {'clamp_distance': None},
    {'clamp_distance': 3.0, 'clamp_weight': 0.7, 'length_scale': 5.0},
    {'parameterisation': 'multimer'},
    {'parameterisation': 'multimer', 'pair_mask': True},
  ],
)
def test_error_is_that_of_the_oracle_for_any_chunk(options, chunk_size):
  case = random_case()
  if 'pair_mask' in options:
    options = {**options, 'pair_mask': pair_mask_of(case)}
  got = fape.frame_aligned_point_error(**case, **options, chunk_size=chunk_size)
  np.testing.assert_allclose(got, oracle(case, **options), rtol=2e-6)


def test_gradient_does_not_depend_on_the_chunk():
  case = random_case()

  def gradient(chunk_size):
    def loss(frames, points):
      own = {**case, 'predicted_frames': frames, 'predicted_points': points}
      return fape.frame_aligned_point_error(**own, chunk_size=chunk_size)

    arguments = case['predicted_frames'], case['predicted_points']
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)

  want = gradient(100)
  for chunk_size in (1, 5):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
      gradient(chunk_size),
      want,
    )


def moved(case, which, parts=('frames', 'points')):
  """The case with one rotation and translation of all that is named."""
  rng = np.random.default_rng(3)
  rotation, translation = registry.random_frames(rng, 1, spread=30.0)
  move = geometry.Rigid(rotation[0], translation[0])
  changes = {}
  if 'frames' in parts:
    changes[f'{which}_frames'] = move @ case[f'{which}_frames']
  if 'points' in parts:
    changes[f'{which}_points'] = move.apply(case[f'{which}_points'])
  return {**case, **changes}


@each_form
@pytest.mark.parametrize('which', ['predicted', 'target'])
def test_error_is_invariant_to_moving_one_structure(which, form):
  case = random_case()
  loss = functools.partial(
    fape.frame_aligned_point_error, parameterisation=form
  )
  want = loss(**case)
  np.testing.assert_allclose(loss(**moved(case, which)), want, rtol=1e-5)
  # Negative control: frames that stay behind are noticed.
  assert abs(loss(**moved(case, which, ['points'])) - want) > 1e-2 * want


def test_error_notices_a_mirror_image():
  case = random_case()
  mirror = np.array([1, 1, -1], np.float32)
  same = {
    **case,
    'target_frames': case['predicted_frames'],
    'target_points': case['predicted_points'],
  }
  mirrored = {**same, 'target_points': case['predicted_points'] * mirror}
  np.testing.assert_allclose(
    fape.frame_aligned_point_error(**same), 1e-3, rtol=1e-3
  )
  assert fape.frame_aligned_point_error(**mirrored) > 0.1


def test_clamp_of_zero_is_none():
  case = random_case()
  got = fape.frame_aligned_point_error(**case, clamp_distance=0)
  want = fape.frame_aligned_point_error(**case, clamp_distance=None)
  assert got == want
  assert got > fape.frame_aligned_point_error(**case, clamp_distance=1)


@each_form
def test_masked_content_reaches_neither_loss_nor_gradient(form):
  case = random_case()

  def spoil(x, mask):
    own = mask.reshape(mask.shape + (1,) * (x.ndim - 1))
    return np.where(own, x, np.nan).astype(np.float32)

  spoiled = dict(case)
  for kind in ('predicted', 'target'):
    spoiled[f'{kind}_frames'] = jax.tree.map(
      lambda x: spoil(x, case['frame_mask']), case[f'{kind}_frames']
    )
    spoiled[f'{kind}_points'] = spoil(
      case[f'{kind}_points'], case['point_mask']
    )
  loss = functools.partial(
    fape.frame_aligned_point_error, parameterisation=form
  )
  np.testing.assert_array_equal(loss(**spoiled), loss(**case))
  gradient = jax.grad(
    lambda points: loss(**{**spoiled, 'predicted_points': points})
  )(spoiled['predicted_points'])
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[~case['point_mask']], 0)


@each_form
def test_nothing_kept_gives_zero_and_finite_gradients(form):
  case = random_case()
  case['point_mask'] = np.zeros_like(case['point_mask'])

  def loss(points):
    return fape.frame_aligned_point_error(
      **{**case, 'predicted_points': points}, parameterisation=form
    )

  value, gradient = jax.value_and_grad(loss)(case['predicted_points'])
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


@each_form
def test_equal_structures_have_finite_gradients(form):
  case = random_case()
  frames = case['predicted_frames']

  def loss(frames):
    return fape.backbone_loss(
      frames[None],
      case['predicted_frames'],
      case['frame_mask'],
      parameterisation=form,
    )

  gradient = jax.grad(loss)(jax.tree.map(jnp.asarray, frames))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def largest_array(jaxpr):
  """Entries of the largest array that a jaxpr makes, at any depth."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [np.prod(variable.aval.shape) for variable in equation.outvars]
    for parameter in equation.params.values():
      inner = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inner, 'eqns'):
        sizes.append(largest_array(inner))
  return max(sizes)


def test_no_array_holds_all_pairs():
  n_point = 300
  case = random_case(n_frame=257, n_point=n_point)

  def of_chunk(chunk_size):
    def loss(frames, points):
      own = {**case, 'predicted_frames': frames, 'predicted_points': points}
      return fape.frame_aligned_point_error(**own, chunk_size=chunk_size)

    gradient = jax.grad(loss, argnums=(0, 1))
    arguments = case['predicted_frames'], case['predicted_points']
    return largest_array(jax.make_jaxpr(gradient)(*arguments).jaxpr)

  assert of_chunk(8) <= 8 * n_point
  assert of_chunk(257) == 257 * n_point


def test_vmap_and_jit_give_the_same():
  cases = [random_case(seed=seed) for seed in range(3)]
  batch = jax.tree.map(lambda *x: np.stack(x), *cases)
  got = jax.jit(
    jax.vmap(lambda case: fape.frame_aligned_point_error(**case, chunk_size=4))
  )(batch)
  want = [fape.frame_aligned_point_error(**case) for case in cases]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sidechain_loss_is_the_error_of_all_groups_and_atoms():
  rng = np.random.default_rng(0)
  n_res = 5
  case = random_case(n_frame=8 * n_res, n_point=14 * n_res)

  def by_residue(name):
    return jax.tree.map(
      lambda x: x.reshape(n_res, -1, *x.shape[1:]), case[name]
    )

  got = fape.sidechain_loss(
    by_residue('predicted_frames'),
    by_residue('target_frames'),
    by_residue('frame_mask'),
    by_residue('predicted_points'),
    by_residue('target_points'),
    by_residue('point_mask'),
    chunk_size=int(rng.integers(3, 20)),
  )
  np.testing.assert_allclose(got, oracle(case), rtol=2e-6)


def torsion_case():
  rng = np.random.default_rng(0)
  n_iter, n_res = 3, 21
  raw = rng.standard_normal((n_iter, n_res, 7, 2), np.float32)
  chi_mask = rng.random((n_res, 4)) < 0.7
  return {
    'angles_sin_cos': raw / np.linalg.norm(raw, axis=-1, keepdims=True),
    'unnormalized_angles_sin_cos': raw,
    'chi_angles': rng.uniform(-np.pi, np.pi, (n_res, 4)).astype(np.float32),
    'chi_mask': chi_mask,
    'aatype': np.arange(n_res),
    'mask': rng.random(n_res) < 0.8,
  }


def test_torsion_angle_loss_is_that_of_the_oracle():
  case = torsion_case()
  got = fape.torsion_angle_loss(**case)
  want = reference.torsion_angle_loss(**case, tables=load('residue_tables'))
  np.testing.assert_allclose((got.chi, got.angle_norm), want, rtol=1e-6)


def test_torsion_angle_loss_forgives_half_turns_of_symmetric_groups_only():
  case = torsion_case()
  case['chi_mask'] = np.ones_like(case['chi_mask'])
  turned = {**case, 'chi_angles': case['chi_angles'] + np.float32(np.pi)}

  def chi(case, residue):
    mask = np.zeros_like(case['chi_mask'])
    mask[residue, 1] = True
    return float(fape.torsion_angle_loss(**{**case, 'chi_mask': mask}).chi)

  phenylalanine, leucine = 13, 10
  np.testing.assert_allclose(
    chi(turned, phenylalanine), chi(case, phenylalanine), atol=1e-5
  )
  assert abs(chi(turned, leucine) - chi(case, leucine)) > 0.1


def test_torsion_angle_loss_of_masked_nan_is_finite():
  case = torsion_case()
  case['chi_angles'][~case['chi_mask']] = np.nan
  got = fape.torsion_angle_loss(**case)
  assert np.isfinite([got.chi, got.angle_norm]).all()
  empty = {
    **case,
    'chi_mask': np.zeros_like(case['chi_mask']),
    'mask': np.zeros_like(case['mask']),
  }
  got = fape.torsion_angle_loss(**empty)
  assert (got.chi, got.angle_norm) == (0, 0)


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'frame_mask': np.ones(3, bool)}, ValueError, 'frame_mask: expected'),
    ({'point_mask': np.ones(17)}, TypeError, 'point_mask: expected bool'),
    ({'target_points': np.ones((3, 3))}, ValueError, 'target_points: expected'),
    ({'target_frames': np.ones((13, 7))}, TypeError, 'target_frames: expected'),
    ({'pair_mask': np.ones((13, 17), bool)}, ValueError, 'pair_mask: '),
    ({'chunk_size': 0}, ValueError, 'chunk_size: expected'),
    ({'length_scale': 0.0}, ValueError, 'length_scale: expected a positive'),
    ({'clamp_distance': -1.0}, ValueError, 'clamp_distance: expected a pos'),
    ({'parameterisation': 'seed'}, ValueError, 'parameterisation: expected'),
  ],
)
def test_wrong_argument_is_named(change, error, message):
  with pytest.raises(error, match=message):
    fape.frame_aligned_point_error(**{**random_case(), **change})
