"""Boltz's diffusion module: both forms, what is cached, memory, gradients."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structattn_jax import diffusion as shared
from structattn_jax import verification
from structattn_jax.network import boltz
from structattn_jax.verification import boltz_diffusion as replay

ATOM_FIELDS = (
  'ref_pos',
  'ref_charge',
  'ref_element',
  'ref_atom_name_chars',
  'ref_space_uid',
  'atom_mask',
  'atom_to_token',
  'atom_backbone_feat',
)
GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens/boltz_diffusion'

both = pytest.mark.parametrize('version', [1, 2])


@functools.cache
def golden(version: int, *, is_float64: bool = False) -> verification.Golden:
  case = f'v{version}_small'
  return verification.Golden.read(
    GOLDENS / f'{case}.npz', case, is_float64=is_float64
  )


@functools.cache
def small(version: int) -> replay.Case:
  """The model of a golden, and its complex."""
  return replay.case_of(golden(version))


@functools.cache
def parts(version: int):
  """`denoise` compiled, parameters and context of the small model."""
  case = small(version)
  _, precompute, denoise = boltz.cached_diffusion(case.config)
  context = jax.jit(precompute)(
    case.params, case.features, case.token_mask, *case.embeddings
  )
  return jax.jit(denoise), case.params, context


def equations(jaxpr):
  """Of a program and all programs inside of it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


@both
def test_published_form_matches_in_float64(version):
  with jax.enable_x64(True):
    stored = golden(version, is_float64=True)
    case, inputs = replay.case_of(stored), stored.part('inputs')
    found = replay.published(case, inputs['noised'], inputs['sigma'])
  is_atom = np.asarray(case.features.atom_mask)
  want = stored.arrays['outputs64/denoised']
  assert found.denoised.dtype == np.float64
  # Padding follows upstream, too: the sampler's mean reads it.
  np.testing.assert_allclose(found.denoised, want, rtol=0, atol=1e-9)
  assert is_atom.sum() < len(is_atom)
  if version == 1:
    want = stored.arrays['outputs64/token_a']
    np.testing.assert_allclose(found.token_act, want, rtol=0, atol=1e-9)


@both
def test_step_trajectory_and_training_hold_in_float64(version):
  """To 1e-9 of upstream's float64 run, where there is one."""
  stored = golden(version, is_float64=True)
  rows = verification.run(stored)
  assert all(row.ok for row in rows)
  compared = {row.output: row for row in rows}
  for name in stored.outputs():
    row = compared[name]
    assert row.tolerance <= 1e-9 * max(row.scale, 1)
  assert {'denoised', 'sample/coords', 'train/loss'} <= set(compared)


@both
def test_samples_of_one_level_equal_samples_of_their_own(version):
  denoise, params, context = parts(version)
  noised = golden(version).part('inputs')['noised']
  together = denoise(params, context, noised, jnp.float32(7.0))
  apart = denoise(params, context, noised, jnp.full(3, 7.0))
  np.testing.assert_allclose(together, apart, rtol=0, atol=2e-5)


@both
def test_conditioning_of_the_level_is_not_computed_per_sample(version):
  """Products with the single have no axis of samples."""
  case = small(version)
  _, params, context = parts(version)
  denoise = boltz.cached_diffusion(case.config).denoise
  n_sample = 7
  jaxpr = jax.make_jaxpr(functools.partial(denoise, params, context))(
    jnp.zeros((n_sample, 80, 3)), jnp.float32(1.0)
  )
  n_token, channels = context.single.shape
  # Of the single with the 6 matrices of the adaptive terms of each layer.
  shared_products = [
    equation
    for equation in equations(jaxpr)
    if equation.primitive.name == 'dot_general'
    and equation.invars[0].aval.shape == (n_token, channels)
    and equation.outvars[0].aval.shape == (n_token, channels)
  ]
  assert len(shared_products) >= 6 * case.config.token_transformer_depth


@both
def test_gradients_are_finite_at_extreme_levels(version):
  case = small(version)
  noised = golden(version).part('inputs')['noised']

  @jax.jit
  def gradient(params, embeddings, noised, sigma):
    def loss(*arguments):
      params, embeddings, noised, sigma = arguments
      found = replay.denoiser(case, params, embeddings)(noised, sigma)
      return jnp.sum(jnp.square(found[:, case.features.atom_mask]))

    return jax.grad(loss, (0, 1, 2, 3))(params, embeddings, noised, sigma)

  for sigma in (1e-3, 2560.0):
    found = gradient(
      case.params, case.embeddings, sigma * noised, jnp.float32(sigma)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert np.any(found[2])


def test_optimiser_leaves_the_fourier_buffers_alone():
  params = small(1).params
  labels = boltz.parameter_labels(params)
  fixed = {module for module, own in labels.items() if 'fixed' in own.values()}
  assert fixed == {'single_conditioner/fourier_embed/proj'}
  optimizer = optax.multi_transform(
    {
      'trained': optax.adamw(1e-2, weight_decay=0.1),
      'fixed': optax.set_to_zero(),
    },
    boltz.parameter_labels,
  )
  params = {
    module: own
    for module, own in params.items()
    if module.startswith('single_conditioner/')
  }
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  moved = {
    module for module, own in updates.items() if any(map(np.any, own.values()))
  }
  # The decay of weights moves all others.
  assert moved == set(params) - fixed


@both
def test_one_trace_for_complexes_of_one_bucket(version):
  case = small(version)
  _, precompute, denoise = boltz.cached_diffusion(case.config)
  traces = []

  @jax.jit
  def step(params, features, token_mask, embeddings, noised, sigma):
    traces.append(1)
    context = precompute(params, features, token_mask, *embeddings)
    return denoise(params, context, noised, sigma)

  noised = golden(version).part('inputs')['noised']
  features, token_mask = case.features, np.asarray(case.token_mask)
  first = step(
    case.params, features, token_mask, case.embeddings, noised, np.float32(3)
  )
  n_atom, n_token = len(features.atom_mask), len(token_mask)
  fewer = dataclasses.replace(
    features,
    atom_mask=features.atom_mask & (np.arange(n_atom) < 40),
    ref_charge=np.asarray(features.ref_charge),
  )
  second = step(
    case.params,
    fewer,
    token_mask & (np.arange(n_token) < 9),
    case.embeddings,
    noised,
    np.float32(30),
  )
  assert len(traces) == 1
  assert not np.allclose(first, second)


@both
def test_memory_is_linear_in_atoms(version):
  """No array of a step and its gradient has atoms x atoms or x tokens."""
  case = small(version)
  config = dataclasses.replace(case.config, implementation='blocked')

  def largest(copies: int) -> int:
    atoms = {
      name: np.concatenate([np.asarray(getattr(case.features, name))] * copies)
      for name in ATOM_FIELDS
      if getattr(case.features, name) is not None
    }
    features = dataclasses.replace(case.features, **atoms)
    _, precompute, denoise = boltz.cached_diffusion(config)

    def loss(params, embeddings, noised):
      context = precompute(params, features, case.token_mask, *embeddings)
      return jnp.sum(denoise(params, context, noised, jnp.float32(1)))

    noised = jnp.zeros((2, len(features.atom_mask), 3))
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(
      case.params, case.embeddings, noised
    )
    return max(
      int(np.prod(x.aval.shape))
      for equation in equations(jaxpr)
      for x in equation.outvars
    )

  small_size, large_size = largest(4), largest(16)
  assert large_size <= 4.1 * small_size


def test_wrong_embeddings_are_named():
  case = small(1)
  _, precompute, _ = boltz.cached_diffusion(case.config)
  s_inputs, single, pair, relative = case.embeddings
  for name, embeddings in {
    'single_inputs': (s_inputs[:, :-1], single, pair, relative),
    'single': (s_inputs, single[1:], pair, relative),
    'pair': (s_inputs, single, pair[..., 1:], relative),
    'relative_position': (s_inputs, single, pair, relative[1:]),
  }.items():
    with pytest.raises(ValueError, match=rf'^{name}: expected shape .* got'):
      jax.eval_shape(
        lambda embeddings: precompute(
          case.params, case.features, case.token_mask, *embeddings
        ),
        embeddings,
      )
  with pytest.raises(ValueError, match='token_transformer_heads=5'):
    dataclasses.replace(case.config, token_transformer_heads=5)
  with pytest.raises(ValueError, match='structure_prediction=True'):
    dataclasses.replace(case.config, structure_prediction=False)


# Steering: a function of the user's acts on the denoised coordinates.


def restraint(first, second, distance, strength=0.5):
  """Moves two atoms toward a distance; its state is what it last saw."""

  def hook(state, denoised, x_noisy, sigma, step):
    del x_noisy, sigma
    apart = denoised[:, first] - denoised[:, second]
    length = jnp.linalg.norm(apart, axis=-1, keepdims=True)
    move = strength * (length - distance) * apart / jnp.maximum(length, 1e-6)
    denoised = denoised.at[:, first].add(-move).at[:, second].add(move)
    seen = {
      'distance': state['distance'].at[step].set(length[:, 0]),
      'calls': state['calls'] + 1,
    }
    return seen, denoised

  return hook


@both
def test_distance_restraint_pulls_two_atoms_together(version):
  case, config = small(version), replay.sampler_config(golden(version))
  mask = jnp.asarray(case.features.atom_mask)
  denoise, params, context = parts(version)
  first, second = 3, 60

  def run(hook, state=None):
    return shared.sample(
      functools.partial(denoise, params, context),
      mask,
      config,
      draws=replay.sampler_draws(golden(version)),
      hook=hook,
      hook_state=state,
      return_trajectory=True,
    )

  state = {
    'distance': jnp.zeros((5, 2)),
    'calls': jnp.zeros((), jnp.int32),
  }
  free = run(None)
  steered = jax.jit(lambda state: run(restraint(first, second, 4.0), state))(
    state
  )

  def distance(x):
    return np.linalg.norm(x[..., first, :] - x[..., second, :], axis=-1)

  assert steered.hook_state['calls'] == 5
  np.testing.assert_allclose(
    distance(steered.trajectory.denoised), 4.0, atol=2e-2
  )
  # What the hook saw first is what the sampler saw without it.
  np.testing.assert_allclose(
    steered.hook_state['distance'][0],
    distance(free.trajectory.denoised)[0],
    rtol=1e-4,
  )
  assert (distance(steered.positions) < distance(free.positions)).all()


def test_gradient_through_a_trajectory_follows_differences():
  """Of a loss on the final structure with respect to the trunk's single."""
  version = 1
  with jax.enable_x64(True):
    stored = golden(version, is_float64=True)
    case = replay.case_of(stored)
    config = dataclasses.replace(replay.sampler_config(stored), steps=5)
    mask = np.asarray(case.features.atom_mask)
    draws = replay.sampler_draws(stored)

    @jax.jit
    def loss(single):
      embeddings = (case.embeddings[0], single, *case.embeddings[2:])
      found = shared.sample(
        replay.denoiser(case, case.params, embeddings),
        mask,
        config,
        draws=draws,
      )
      x = found.positions
      return jnp.sum(jnp.square(x[:, 3] - x[:, 60])) / 1e4

    single = case.embeddings[1]
    direction = np.random.default_rng(0).standard_normal(single.shape)
    slope = np.sum(np.asarray(jax.jit(jax.grad(loss))(single)) * direction)
    h = 1e-5
    ends = [float(loss(single + x * direction)) for x in (h, -h)]
  want = (ends[0] - ends[1]) / (2 * h)
  assert abs(slope - want) < 1e-5 * abs(want)
