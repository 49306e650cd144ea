"""The sampler that AlphaFold 3 and Boltz share: noise, denoise, step.

AF3 Suppl. Alg. 18 (SampleDiffusion). Mirrors alphafold3
model/network/diffusion_head.py @ c0f97ed and boltz
model/modules/{diffusion,diffusionv2}.py @ 832486d. From x = c_0 normal, for
each pair of levels p, l of the schedule:

   3  x = CentreRandomAugmentation(x)
   4  gamma = gamma_0 if l > gamma_min else 0
   5  t = p (gamma + 1)
   6  noise = noise_scale sqrt(t² - p²) normal
   7  x_noisy = x + noise
   8  denoised = denoise(x_noisy, t)
      hook, the user's
      x_noisy = weighted_rigid_align(x_noisy onto denoised)     Boltz only
   9  delta = (x_noisy - denoised) / t
  10  dt = l - t
  11  x = x_noisy + step_scale dt delta

Line numbers are the paper's. What differs between the systems is in
`SamplerConfig`, whose class methods are the published settings.

The keys: `key, noise_key = split(key)`; the start is one normal array from
`noise_key`; each sample gets one of `split(key, num_samples)`, and in every
step `key, key_noise, key_move = split(key, 3)`. That is AF3's rule, used for
all configs; Boltz' draws come from PyTorch and are replayed as `SamplerDraws`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks
from structattn_jax.diffusion import augmentation, schedules
from structattn_jax.geometry import alignment

# denoise(positions [num_samples, ..., 3], sigma []) -> [num_samples, ..., 3]
Denoise = Callable[[jax.Array, jax.Array], jax.Array]
# hook(state, denoised, x_noisy, sigma, step) -> (state, denoised)
Hook = Callable[
  [Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]
]
Checkpointing = Literal['step', 'two_level']


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig(base_config.BaseConfig):
  """How to sample; the defaults are AlphaFold 3's.

  Attributes:
    steps: number of steps, each with one call of the denoiser.
    gamma_0: how much noise is added, relative to the level.
    gamma_min: level in angstrom above which it is added; the level that is
      stepped to counts.
    noise_scale: of the added noise.
    step_scale: of the step, 1 for an Euler step.
    alignment: whether the noisy positions are aligned to the denoised ones
      before the step (Boltz).
    centre: 'masked' or 'padded', see `centre_random_augmentation`.
    rotation: kind of random rotation, see `random_move`.
    schedule: the noise levels.
  """

  steps: int = 200
  gamma_0: float = 0.8
  gamma_min: float = 1.0
  noise_scale: float = 1.003
  step_scale: float = 1.5
  alignment: bool = False
  centre: augmentation.Centre = 'masked'
  rotation: augmentation.RotationKind = 'gram_schmidt'
  schedule: schedules.ScheduleConfig = schedules.DEFAULT

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'steps')
    self.check_at_least(0, 'gamma_0', 'noise_scale')
    for name in ('gamma_0', 'noise_scale', 'step_scale'):
      if not math.isfinite(getattr(self, name)):
        raise ValueError(
          f'SamplerConfig.{name}: expected a finite number, got '
          f'{getattr(self, name)}'
        )

  @classmethod
  def alphafold3(cls) -> 'SamplerConfig':
    """The sampler of AlphaFold 3 as released."""
    return cls()

  @classmethod
  def boltz1(cls) -> 'SamplerConfig':
    """The sampler of Boltz-1 as released."""
    return cls(
      gamma_0=0.605,
      gamma_min=1.107,
      noise_scale=0.901,
      step_scale=1.638,
      alignment=True,
      centre='padded',
      rotation='quaternion',
      schedule=schedules.ScheduleConfig(rho=8.0, last='zero'),
    )

  @classmethod
  def boltz2(cls) -> 'SamplerConfig':
    """The sampler of Boltz-2 as released."""
    return cls(
      alignment=True,
      centre='padded',
      rotation='quaternion',
      schedule=schedules.ScheduleConfig(sigma_min=1e-4, last='zero'),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerDraws:
  """All random numbers of a run, to replay one of any framework.

  Attributes:
    start: [num_samples, ..., 3] float, normal.
    rotation: [steps, num_samples, 3, 3] float, R of x R.
    translation: [steps, num_samples, 3] float, in angstrom.
    noise: [steps, num_samples, ..., 3] float, normal.
  """

  start: jax.Array
  rotation: jax.Array
  translation: jax.Array
  noise: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
  """What went into the denoiser and came out of it, step by step.

  Attributes:
    sigma: [steps] float, noise level t of each call, in angstrom.
    noisy: [steps, num_samples, ..., 3] float, in angstrom, before alignment.
    denoised: [steps, num_samples, ..., 3] float, in angstrom, after the hook.
  """

  sigma: jax.Array
  noisy: jax.Array
  denoised: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleOutput:
  """Samples.

  Attributes:
    positions: [num_samples, ..., 3] float, in angstrom; rows of padding hold
      nothing of meaning.
    hook_state: what the hook returned last; None without a hook.
    trajectory: None unless asked for.
  """

  positions: jax.Array
  hook_state: Any
  trajectory: Trajectory | None


class Steps(NamedTuple):
  """Numbers of all steps, float64 in NumPy, [steps] each.

  Attributes:
    sigma: t, the level at which the denoiser is called.
    noise: factor of the normal noise that is added.
    step: factor of x_noisy - denoised.
  """

  sigma: np.ndarray
  noise: np.ndarray
  step: np.ndarray


def sampler_steps(config: SamplerConfig) -> Steps:
  """Lines 4 to 6 and the factors of 9 to 11 for all steps, on the host.

  >>> sampler_steps(SamplerConfig(steps=2)).sigma.round(3)
  array([4608.   ,   55.975])
  """
  levels = schedules.noise_levels(config.schedule, config.steps)
  before, after = levels[:-1], levels[1:]
  gamma = np.where(after > config.gamma_min, config.gamma_0, 0)
  sigma = before * (1 + gamma)
  added = np.sqrt(np.maximum(sigma**2 - before**2, 0))
  return Steps(
    sigma=sigma,
    noise=config.noise_scale * added,
    step=config.step_scale * (after - sigma) / sigma,
  )


def sample(
  denoise: Denoise,
  mask: jax.Array,
  config: SamplerConfig,
  *,
  num_samples: int | None = None,
  key: jax.Array | None = None,
  draws: SamplerDraws | None = None,
  hook: Hook | None = None,
  hook_state: Any = None,
  return_trajectory: bool = False,
  checkpointing: Checkpointing = 'step',
  progress: Callable[[int, int], None] | None = None,
  progress_every: int = 10,
) -> SampleOutput:
  """Draws structures from noise; AF3 Suppl. Alg. 18.

    >>> mask = jnp.ones(4, bool)
    >>> shrink = lambda positions, sigma: positions / (1 + sigma**2)
    >>> config = SamplerConfig(steps=5)
    >>> key = jax.random.key(0)
    >>> sample(shrink, mask, config, num_samples=2, key=key).positions.shape
    (2, 4, 3)

  The steps are one `jax.lax.scan` and can be compiled, mapped and
  differentiated. Each step is computed again in the backward pass, so that it
  keeps the positions of all steps (12 bytes per atom, sample and step) and the
  activations of one. 'two_level' keeps the positions of about 2 sqrt(steps)
  steps instead, if the number of steps has a divisor near its square root, and
  calls the denoiser once more per step.

  Give `denoise` (and `hook`) as `jax.tree_util.Partial(function, params, ...)`
  with arrays alone as arguments, and what was compiled is kept for later calls.
  Other callables are compiled in each call, with the parameters that they hold
  as constants, unless `sample` is called inside of a function under `jax.jit`.

  With `progress`, steps run in equal chunks from the host, outside of `jax.jit`
  and `jax.grad`, with one compiled function for all chunks.

  Args:
    denoise: called once per step for all samples: positions
      [num_samples, ..., 3] and the noise level [], both in angstrom, to the
      denoised positions [num_samples, ..., 3].
    mask: [...] bool, True = real atom; [n_token, n_dense] or [n_atom].
    config: how to sample.
    num_samples: number of samples; needed with `key`.
    key: PRNG key; None if `draws` is given.
    draws: recorded draws.
    hook: called with (state, denoised, x_noisy, sigma, step) after each call of
      the denoiser, returns the next state and the denoised positions to go on
      with. Here steering acts. The structure of the state must not change.
      Positions in the state stay where they were, while the next step turns and
      shifts the samples.
    hook_state: pytree of arrays, the hook's first state.
    return_trajectory: whether to return what each step saw.
    checkpointing: 'step' or 'two_level', see above.
    progress: called with (steps done, steps) after each chunk.
    progress_every: steps between two calls at most; the largest divisor of the
      number of steps is taken.

  Returns:
    The samples.

  Raises:
    ValueError: on missing or contradictory arguments, on a wrong shape, or if
      `progress` is given under a transformation.
    TypeError: if `mask` is not bool.
  """
  checks.check_dtypes('bool', mask=mask)
  mask = jnp.asarray(mask)
  if checkpointing not in ('step', 'two_level'):
    raise ValueError(
      f"checkpointing: expected 'step' or 'two_level', got {checkpointing!r}"
    )
  if progress_every < 1:
    raise ValueError(
      f'progress_every: expected at least 1, got {progress_every}'
    )
  carry, moves = _start(mask, config, num_samples, key, draws)
  carry = (*carry, hook_state)
  dtype = carry[0].dtype
  numbers = [np.asarray(x).astype(dtype) for x in sampler_steps(config)]
  steps = (np.arange(config.steps, dtype=np.int32), *numbers, moves)
  run = _runner(
    denoise,
    hook,
    mask,
    config=config,
    checkpointing=checkpointing,
    return_trajectory=return_trajectory,
  )
  if progress is None:
    carry, seen = run(carry, steps)
  else:
    carry, seen = _run_in_chunks(run, carry, steps, progress, progress_every)
  positions, _, hook_state = carry
  trajectory = None
  if return_trajectory:
    trajectory = Trajectory(jnp.asarray(numbers[0]), *seen)
  return SampleOutput(positions, hook_state, trajectory)


def _start(
  mask: jax.Array,
  config: SamplerConfig,
  num_samples: int | None,
  key: jax.Array | None,
  draws: SamplerDraws | None,
) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
  """Positions and keys of the samples, and the recorded draws by step."""
  level = float(schedules.noise_levels(config.schedule, config.steps)[0])
  if draws is not None and key is None:
    if num_samples is None:
      num_samples = draws.start.shape[0]
    atoms = ' '.join(map(str, mask.shape))
    checks.check_shapes(
      {
        'num_samples': num_samples,
        'steps': (config.steps, 'the config'),
      },
      start=(draws.start, f'num_samples {atoms} 3'),
      rotation=(draws.rotation, 'steps num_samples 3 3'),
      translation=(draws.translation, 'steps num_samples 3'),
      noise=(draws.noise, f'steps num_samples {atoms} 3'),
    )
    dtype = jnp.promote_types(jnp.result_type(draws.start), jnp.float32)
    draws = jax.tree.map(lambda x: jnp.asarray(x, dtype), draws)
    moves = augmentation.RigidMove(draws.rotation, draws.translation)
    return (draws.start * level, None), (moves, draws.noise)
  if key is None or draws is not None:
    raise ValueError('key, draws: expected exactly one of the two')
  if num_samples is None or num_samples < 1:
    raise ValueError(
      f'num_samples: expected at least 1 with a key, got {num_samples}'
    )
  key, noise_key = jax.random.split(key)
  start = jax.random.normal(
    noise_key, (num_samples, *mask.shape, 3), jnp.float32
  )
  return (start * level, jax.random.split(key, num_samples)), None


def _draw(
  config: SamplerConfig, shape: tuple[int, ...], key: jax.Array
) -> tuple[jax.Array, tuple[augmentation.RigidMove, jax.Array]]:
  """The next key of one sample, and its draws of one step."""
  key, key_noise, key_move = jax.random.split(key, 3)
  move = augmentation.random_move(key_move, config.rotation)
  return key, (move, jax.random.normal(key_noise, shape, jnp.float32))


def _advance(
  denoise: Denoise,
  hook: Hook | None,
  mask: jax.Array,
  carry: Any,
  steps: Any,
  *,
  config: SamplerConfig,
  checkpointing: Checkpointing,
  return_trajectory: bool,
) -> tuple[Any, Any]:
  """Some or all steps."""
  augment = functools.partial(
    augmentation.centre_random_augmentation, centre=config.centre
  )

  # Inside a scan nothing can be merged with the forward pass anyway.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(carry: Any, numbers: Any) -> tuple[Any, Any]:
    x, keys, state = carry
    index, sigma, noise_factor, step_factor, drawn = numbers
    if keys is not None:
      keys, drawn = jax.vmap(
        functools.partial(_draw, config, (*mask.shape, 3))
      )(keys)
    move, normal = drawn
    x = jax.vmap(augment, (0, None, 0))(x, mask, move)
    x_noisy = x + noise_factor * normal
    denoised = denoise(x_noisy, sigma)
    if jnp.shape(denoised) != x.shape:
      raise ValueError(
        f'denoise: expected to return shape {x.shape}, got '
        f'{jnp.shape(denoised)}'
      )
    denoised = denoised.astype(x.dtype)
    if hook is not None:
      state, denoised = hook(state, denoised, x_noisy, sigma, index)
    seen = (x_noisy, denoised) if return_trajectory else None
    if config.alignment:
      align = functools.partial(
        alignment.weighted_rigid_align, mask=mask, differentiate=True
      )
      x_noisy = jax.vmap(align)(x_noisy, denoised)
    x = x_noisy + step_factor * (x_noisy - denoised)
    return (x, keys, state), seen

  if checkpointing == 'step':
    return jax.lax.scan(step, carry, steps)
  count = steps[0].shape[0]
  inner = _divisor(count, math.isqrt(count))
  several = jax.checkpoint(
    lambda carry, numbers: jax.lax.scan(step, carry, numbers),
    prevent_cse=False,
  )
  split = jax.tree.map(
    lambda x: x.reshape(count // inner, inner, *x.shape[1:]), steps
  )
  carry, seen = jax.lax.scan(several, carry, split)
  return carry, jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), seen)


_advance_compiled = jax.jit(
  _advance, static_argnames=('config', 'checkpointing', 'return_trajectory')
)


def _runner(
  denoise: Denoise, hook: Hook | None, mask: jax.Array, **static: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """`_advance`, compiled, as a function of the carry and some steps."""
  partial = jax.tree_util.Partial
  if all(isinstance(x, partial) or x is None for x in (denoise, hook)):
    return functools.partial(_advance_compiled, denoise, hook, mask, **static)
  # A function of its own: what a closure holds may have changed since the last
  # call, so nothing may be kept for the next one.
  return jax.jit(functools.partial(_advance, denoise, hook, mask, **static))


def _run_in_chunks(
  run: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  steps: Any,
  progress: Callable[[int, int], None],
  progress_every: int,
) -> tuple[Any, Any]:
  """All steps, some at a time, from the host."""
  count = steps[0].shape[0]
  chunk = _divisor(count, progress_every)
  found = []
  for i in range(count // chunk):
    own = slice(i * chunk, (i + 1) * chunk)
    carry, seen = run(carry, jax.tree.map(operator.itemgetter(own), steps))
    if not checks.is_concrete(carry[0]):
      raise ValueError(
        'progress: expected to run outside of jax.jit, jax.vmap and jax.grad'
      )
    jax.block_until_ready(carry)
    found.append(seen)
    progress((i + 1) * chunk, count)
  return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def _divisor(count: int, most: int) -> int:
  """Largest divisor of `count` that is at most `most`."""
  return next(i for i in range(min(count, most), 0, -1) if count % i == 0)
