"""The sampler: recorded trajectories, the oracle, keys, hooks, gradients."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import diffusion, geometry
from structattn_jax.reference import diffusion as reference

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/boltz_diffusion'
CONFIGS = {
  'alphafold3': diffusion.SamplerConfig.alphafold3(),
  'boltz1': diffusion.SamplerConfig.boltz1(),
  'boltz2': diffusion.SamplerConfig.boltz2(),
}
MASK = np.array([True, True, False, True, True, True, False])


def with_steps(name, steps, **changes):
  return dataclasses.replace(CONFIGS[name], steps=steps, **changes)


def random_draws(config, mask=MASK, num_samples=2, seed=0):
  rng = np.random.default_rng(seed)
  shape = (config.steps, num_samples)
  quaternion = rng.normal(size=(*shape, 4))
  rotation = jax.vmap(
    jax.vmap(
      functools.partial(diffusion.rotation_from_normal, rotation='quaternion')
    )
  )(quaternion.astype(np.float32))
  return diffusion.SamplerDraws(
    start=rng.normal(size=(num_samples, *mask.shape, 3)),
    rotation=np.asarray(rotation, np.float64),
    translation=rng.normal(size=(*shape, 3)),
    noise=rng.normal(size=(*shape, *mask.shape, 3)),
  )


def assert_close(got, want):
  """Relative to the largest value: few steps end at high noise."""
  want = np.asarray(want)
  assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


def toy(target, positions, sigma, tanh=jnp.tanh):
  """Something between `target` and a curved function of the positions."""
  return target + 0.2 * tanh(positions / (1 + sigma)) * positions / 50


def target_of(mask=MASK, seed=3):
  return 9 * np.random.default_rng(seed).normal(size=(*mask.shape, 3))


# Values.


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('case', ['v1_small', 'v2_small'])
def test_recorded_trajectories_of_boltz_are_followed(case, dtype):
  with np.load(GOLDENS / f'{case}.npz') as file:
    golden = dict(file)
  meta = json.loads(golden['meta'].item())
  numbers = meta['diffusion']
  config = diffusion.SamplerConfig(
    steps=meta['steps'],
    gamma_0=numbers['gamma_0'],
    gamma_min=numbers['gamma_min'],
    noise_scale=numbers['noise_scale'],
    step_scale=numbers['step_scale'],
    alignment=meta['alignment_reverse_diff'],
    centre='padded',
    rotation='quaternion',
    schedule=diffusion.ScheduleConfig(
      sigma_data=numbers['sigma_data'],
      sigma_min=numbers['sigma_min'],
      sigma_max=numbers['sigma_max'],
      rho=float(numbers['rho']),
      last='zero',
    ),
  )

  def recorded(name, first=0):
    prefix = f'draws/sample/{name}/'
    count = sum(key.startswith(prefix) for key in golden)
    return np.stack(
      [golden[f'{prefix}{i}'] for i in range(first, count)]
    ).astype(dtype)

  draws = diffusion.SamplerDraws(
    start=recorded('normal')[0],
    rotation=recorded('rotation'),
    translation=recorded('translation')[:, :, 0],
    noise=recorded('normal', 1),
  )
  mask = golden['inputs/atom_pad_mask'][0].astype(bool)
  outputs = 'outputs64' if dtype == 'float64' else 'outputs'
  want = {
    name: golden[f'{outputs}/sample/{name}']
    for name in ('coords', 'noisy', 'denoised', 'sigma')
  }

  # The network's part, by the hook: what it said in each step.
  def recorded_answer(state, denoised, x_noisy, sigma, step):
    del denoised, x_noisy, sigma
    return state, state[step]

  with jax.enable_x64(dtype == 'float64'):
    out = jax.jit(
      lambda draws, answers: diffusion.sample(
        lambda positions, sigma: jnp.zeros_like(positions),
        mask,
        config,
        draws=draws,
        hook=recorded_answer,
        hook_state=answers,
        return_trajectory=True,
      )
    )(draws, want['denoised'].astype(dtype))
  assert out.positions.dtype == dtype
  got = {
    'coords': out.positions,
    'noisy': out.trajectory.noisy,
    'sigma': out.trajectory.sigma,
  }
  for name, value in got.items():
    # Padding too: the mean reads it.
    scale = np.abs(want[name]).max()
    bound = 1e-12 if dtype == 'float64' else 1e-6
    assert np.abs(np.asarray(value) - want[name]).max() < bound * scale, name


@pytest.mark.parametrize('name', CONFIGS)
def test_sampler_equals_the_oracle_with_the_same_draws(name):
  config = with_steps(name, 4)
  draws, target = random_draws(config), target_of()
  with jax.enable_x64(True):
    out = jax.jit(
      lambda draws: diffusion.sample(
        functools.partial(toy, target), MASK, config, draws=draws
      )
    )(draws)
  numbers = {
    's_min': config.schedule.sigma_min,
    's_max': config.schedule.sigma_max,
    'rho': config.schedule.rho,
    'sigma_data': 16.0,
  }
  boltz = name != 'alphafold3'
  levels = reference.boltz_levels if boltz else reference.alphafold3_levels
  for i in range(2):
    want = reference.sample(
      functools.partial(toy, target, tanh=np.tanh),
      levels(4, **numbers),
      draws.start[i],
      draws.rotation[:, i],
      draws.translation[:, i],
      draws.noise[:, i],
      MASK,
      gamma_0=config.gamma_0,
      gamma_min=config.gamma_min,
      noise_scale=config.noise_scale,
      step_scale=config.step_scale,
      align=boltz,
      centre='padded' if boltz else 'masked',
    )
    error = np.abs(np.asarray(out.positions[i]) - want)
    assert error.max() < 1e-9 * np.abs(want).max()


def alphafold3_draws(key, config, num_samples, shape):
  """AF3's keys, one sample and one step after the other."""
  key, noise_key = jax.random.split(key)
  start = jax.random.normal(noise_key, (num_samples, *shape, 3))
  found = {'rotation': [], 'translation': [], 'noise': []}
  for own in jax.random.split(key, num_samples):
    for values in found.values():
      values.append([])
    for _ in range(config.steps):
      own, key_noise, key_move = jax.random.split(own, 3)
      rotation_key, translation_key = jax.random.split(key_move)
      v = jax.random.normal(rotation_key, (2, 3))
      found['rotation'][-1].append(reference.gram_schmidt(*np.asarray(v)))
      found['translation'][-1].append(jax.random.normal(translation_key, (3,)))
      found['noise'][-1].append(jax.random.normal(key_noise, (*shape, 3)))
  return diffusion.SamplerDraws(
    start=start,
    **{
      name: np.swapaxes(np.array(values, np.float32), 0, 1)
      for name, values in found.items()
    },
  )


def test_keys_follow_the_rule_of_alphafold3():
  config = with_steps('alphafold3', 3)
  mask = np.ones((3, 2), bool)
  mask[1, 1] = False
  denoise = functools.partial(toy, target_of(mask))
  run = jax.jit(
    functools.partial(diffusion.sample, denoise, mask, config, num_samples=2)
  )
  key = jax.random.PRNGKey(5)
  got = run(key=key).positions
  draws = alphafold3_draws(key, config, 2, (3, 2))
  want = diffusion.sample(denoise, mask, config, draws=draws).positions
  assert_close(got, want)
  # Typed keys are the same keys.
  typed = jax.random.wrap_key_data(key, impl='threefry2x32')
  np.testing.assert_array_equal(run(key=typed).positions, got)


def test_samples_do_not_depend_on_how_many_there_are():
  config = with_steps('boltz2', 3)
  denoise = functools.partial(toy, target_of())
  one, three = (
    diffusion.sample(
      denoise, MASK, config, num_samples=n, key=jax.random.key(1)
    ).positions
    for n in (1, 3)
  )
  assert_close(three[:1], one)
  assert np.abs(three[1] - three[0]).max() > 1


@pytest.mark.parametrize('name', CONFIGS)
def test_a_perfect_denoiser_is_followed_to_its_structure(name):
  target = target_of().astype(np.float32)

  def denoise(positions, sigma):
    del sigma
    return jax.vmap(
      lambda x: geometry.weighted_rigid_align(target, x, mask=MASK)
    )(positions)

  out = diffusion.sample(
    denoise,
    MASK,
    with_steps(name, 30),
    num_samples=1,
    key=jax.random.key(0),
  )
  back = geometry.weighted_rigid_align(out.positions[0], target, mask=MASK)
  assert np.abs(back - target)[MASK].max() < 0.05


def test_garbage_in_padding_changes_no_real_atom_of_alphafold3():
  config = with_steps('alphafold3', 3)
  draws = random_draws(config)
  dirty = dataclasses.replace(draws, start=draws.start.copy())
  dirty.start[:, ~MASK] = 1e6
  denoise = functools.partial(toy, target_of())
  clean, changed = (
    diffusion.sample(denoise, MASK, config, draws=x).positions[:, MASK]
    for x in (draws, dirty)
  )
  np.testing.assert_array_equal(clean, changed)


@pytest.mark.parametrize('name', ['alphafold3', 'boltz1'])
@pytest.mark.parametrize('kept', [0, 1])
def test_without_atoms_or_with_one_all_is_finite(name, kept):
  mask = np.arange(4) < kept
  config = with_steps(name, 3)
  target, draws = target_of(mask), random_draws(config, mask)

  def total(target):
    out = diffusion.sample(
      functools.partial(toy, target), mask, config, draws=draws
    )
    return jnp.sum(out.positions**2)

  value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(target))
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


# Hooks, progress, intermediate structures.


def pull_together(state, denoised, x_noisy, sigma, step):
  """A restraint: atoms 0 and 1 are moved to a distance of 3."""
  del x_noisy, sigma
  first, second = denoised[:, 0], denoised[:, 1]
  apart = second - first
  length = jnp.linalg.norm(apart, axis=-1, keepdims=True)
  shift = 0.5 * (1 - 3 / length) * apart
  denoised = denoised.at[:, 0].add(shift).at[:, 1].add(-shift)
  return {'calls': state['calls'] + 1, 'last': step}, denoised


def test_hook_with_state_pulls_two_atoms_together():
  config = with_steps('boltz2', 20)
  target = target_of()

  def distance(hook, state):
    out = diffusion.sample(
      lambda positions, sigma: jnp.broadcast_to(target, positions.shape),
      MASK,
      config,
      num_samples=3,
      key=jax.random.key(2),
      hook=hook,
      hook_state=state,
    )
    apart = out.positions[:, 0] - out.positions[:, 1]
    return np.linalg.norm(apart, axis=-1), out.hook_state

  free, state = distance(None, None)
  assert state is None
  assert np.abs(free - np.linalg.norm(target[0] - target[1])).max() < 0.1
  assert free.min() > 5
  pulled, state = distance(
    pull_together, {'calls': jnp.int32(0), 'last': jnp.int32(-1)}
  )
  assert np.abs(pulled - 3).max() < 0.1
  assert (int(state['calls']), int(state['last'])) == (20, 19)


@pytest.mark.parametrize('as_partial', [True, False])
def test_progress_is_told_and_changes_nothing(as_partial):
  config = with_steps('alphafold3', 6)
  traces = []

  def denoise(target, positions, sigma):
    traces.append(positions.shape)
    return toy(target, positions, sigma)

  wrap = jax.tree_util.Partial if as_partial else functools.partial
  run = functools.partial(
    diffusion.sample,
    wrap(denoise, jnp.asarray(target_of(), jnp.float32)),
    MASK,
    config,
    num_samples=2,
    key=jax.random.key(0),
    return_trajectory=True,
  )
  want = run()
  del traces[:]
  told = []
  got = run(progress=lambda *x: told.append(x), progress_every=4)
  assert told == [(3, 6), (6, 6)]
  # One program for both chunks, and with a Partial for later calls.
  assert len(traces) == 1
  run(progress=lambda *x: None, progress_every=4)
  assert len(traces) == (1 if as_partial else 2)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4),
    got,
    want,
  )


def test_trajectory_holds_what_the_denoiser_saw_and_said():
  config = with_steps('alphafold3', 3)
  denoise = functools.partial(toy, target_of().astype(np.float32))
  out = diffusion.sample(
    denoise,
    MASK,
    config,
    num_samples=2,
    key=jax.random.key(0),
    return_trajectory=True,
  )
  sigma = diffusion.sampler_steps(config).sigma
  np.testing.assert_allclose(out.trajectory.sigma, sigma, rtol=1e-6)
  for step in range(3):
    want = denoise(out.trajectory.noisy[step], out.trajectory.sigma[step])
    np.testing.assert_allclose(
      out.trajectory.denoised[step], want, rtol=1e-5, atol=1e-5
    )


def test_denoiser_is_called_once_per_step_for_all_samples():
  calls = []

  def denoise(positions, sigma):
    jax.debug.callback(lambda x: calls.append(float(x)), sigma)
    assert positions.shape == (5, 7, 3)
    assert sigma.shape == ()
    return positions / (1 + sigma)

  config = with_steps('boltz1', 4)
  out = diffusion.sample(
    denoise, MASK, config, num_samples=5, key=jax.random.key(0)
  )
  jax.block_until_ready(out)
  jax.effects_barrier()
  np.testing.assert_allclose(
    calls, diffusion.sampler_steps(config).sigma, rtol=1e-6
  )


# Transformations.


def test_vmap_over_complexes_equals_a_loop():
  config = with_steps('boltz2', 2)
  masks = np.stack([MASK, MASK[::-1]])
  keys = jax.random.split(jax.random.key(0), 2)

  def run(mask, key):
    return diffusion.sample(
      functools.partial(toy, target_of()), mask, config, num_samples=2, key=key
    ).positions

  together = jax.jit(jax.vmap(run))(masks, keys)
  for i in range(2):
    assert_close(together[i], run(masks[i], keys[i]))


@pytest.mark.parametrize('checkpointing', ['step', 'two_level'])
@pytest.mark.parametrize('name', ['alphafold3', 'boltz1'])
def test_gradient_equals_finite_differences(name, checkpointing):
  config = with_steps(name, 4)
  with jax.enable_x64(True):
    draws = jax.tree.map(jnp.asarray, random_draws(config))
    target = jnp.asarray(target_of())
    weights = np.random.default_rng(8).normal(size=(2, *MASK.shape, 3))

    def loss(target, draws):
      out = diffusion.sample(
        functools.partial(toy, target),
        MASK,
        config,
        draws=draws,
        checkpointing=checkpointing,
      )
      return jnp.sum(jnp.sin(out.positions / 10) * weights)

    value = jax.jit(loss)
    gradients = jax.jit(jax.grad(loss, (0, 1)))(target, draws)
    rng = np.random.default_rng(1)
    # Along one direction of everything, draws and structure.
    along = jax.tree.map(lambda x: rng.normal(size=x.shape), (target, draws))
    want = sum(
      jnp.sum(x * y)
      for x, y in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(along), strict=True
      )
    )
    step = 1e-6

    def moved(sign):
      return value(
        *jax.tree.map(lambda x, y: x + sign * step * y, (target, draws), along)
      )

    found = (moved(1) - moved(-1)) / (2 * step)
    assert abs(found - want) < 2e-6 * abs(want)
    assert abs(want) > 1e-2


def temporary_bytes(steps, checkpointing, n_atom=64, hidden=256):
  mask = np.ones(n_atom, bool)
  config = with_steps('alphafold3', steps)

  def denoise(weights, positions, sigma):
    x = jnp.tanh(positions @ weights[0] / (1 + sigma))
    for _ in range(3):
      x = jnp.tanh(x @ weights[1])
    return x @ weights[2]

  def loss(weights, draws):
    out = diffusion.sample(
      functools.partial(denoise, weights),
      mask,
      config,
      draws=draws,
      checkpointing=checkpointing,
    )
    return jnp.sum(out.positions**2)

  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  weights = shape(3, hidden), shape(hidden, hidden), shape(hidden, 3)
  draws = diffusion.SamplerDraws(
    start=shape(2, n_atom, 3),
    rotation=shape(steps, 2, 3, 3),
    translation=shape(steps, 2, 3),
    noise=shape(steps, 2, n_atom, 3),
  )
  compiled = jax.jit(jax.grad(loss)).lower(weights, draws).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('checkpointing', ['step', 'two_level'])
def test_memory_of_the_gradient_does_not_grow_with_the_steps(checkpointing):
  few, many = (temporary_bytes(steps, checkpointing) for steps in (8, 64))
  positions = 2 * 64 * 3 * 4
  # Activations of one step, not of 64.
  assert few > 4 * 2 * 64 * 256 * 4
  # Positions of 56 steps more, or of 8 + 8 instead of 4 + 2, and with them the
  # noise of 8 steps instead of 2.
  kept = 56 if checkpointing == 'step' else 10 + 6
  assert many - few <= 1.1 * kept * positions + 4096
  assert many < 1.2 * few


# Mistakes.


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'key': None}, 'key, draws: expected exactly one'),
    ({'num_samples': None}, 'num_samples: expected at least 1'),
    ({'num_samples': 0}, 'num_samples: expected at least 1'),
    ({'checkpointing': 'none'}, "checkpointing: expected 'step' or"),
    ({'progress_every': 0}, 'progress_every: expected at least 1'),
    (
      {'denoise': lambda positions, sigma: positions[0]},
      r'denoise: expected to return shape \(2, 7, 3\), got \(7, 3\)',
    ),
  ],
)
def test_wrong_arguments_get_one_clear_error(changes, message):
  arguments = {
    'denoise': lambda positions, sigma: positions,
    'mask': MASK,
    'config': with_steps('alphafold3', 2),
    'num_samples': 2,
    'key': jax.random.key(0),
  }
  with pytest.raises(ValueError, match=message):
    diffusion.sample(**(arguments | changes))


def test_draws_of_other_sizes_are_refused():
  config = with_steps('alphafold3', 2)
  draws = random_draws(with_steps('alphafold3', 3))
  run = functools.partial(diffusion.sample, lambda x, t: x)
  with pytest.raises(ValueError, match=r'rotation: .* steps=2 from the config'):
    run(MASK, config, draws=draws)
  with pytest.raises(
    ValueError, match=r'start: expected shape \[num_samples, 6'
  ):
    run(MASK[:6], config, draws=draws)
  with pytest.raises(ValueError, match='key, draws: expected exactly one'):
    run(MASK, config, draws=draws, key=jax.random.key(0), num_samples=2)
  with pytest.raises(TypeError, match='mask: expected bool'):
    run(MASK.astype(np.float32), config, draws=draws)


def test_progress_inside_a_transformation_is_refused():
  config = with_steps('alphafold3', 2)

  @jax.jit
  def run(key):
    return diffusion.sample(
      lambda x, t: x,
      MASK,
      config,
      num_samples=1,
      key=key,
      progress=lambda *x: None,
    )

  with pytest.raises(ValueError, match='progress: expected to run outside'):
    run(jax.random.key(0))


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'steps': 0}, 'SamplerConfig.steps: expected at least 1'),
    ({'gamma_0': -0.1}, 'SamplerConfig.gamma_0: expected at least 0'),
    ({'step_scale': float('nan')}, 'SamplerConfig.step_scale: expected a fin'),
    ({'centre': 'all'}, 'SamplerConfig.centre'),
  ],
)
def test_config_refuses_what_has_no_meaning(values, message):
  with pytest.raises(ValueError, match=message):
    diffusion.SamplerConfig(**values)
