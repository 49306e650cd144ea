"""Boltz's diffusion modules: one step, trajectories, training, alignment.

Trajectories and training take the recorded draws. Random weights do not
denoise: positions grow with the steps, and so does the error of rounding, of
which upstream's own is the measure.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax import diffusion as shared
from structattn_jax.geometry import alignment
from structattn_jax.network.boltz import diffusion
from structattn_jax.network.boltz.features import BoltzAtomFeatures
from structattn_jax.verification import boltz
from structattn_jax.verification.golden import Comparison, Golden

# What a trunk hands over, by upstream's names and in our order.
EMBEDDINGS = (
  's_inputs',
  's_trunk',
  'z_trunk',
  'relative_position_encoding',
)

# Upstream's `mol_type`: DNA and RNA, and what is no polymer.
NUCLEOTIDES, LIGAND = (1, 2), 3


@dataclasses.dataclass(frozen=True)
class Case:
  """A golden's model and complex.

  Attributes:
    config: of the model.
    params: its parameters.
    features: of the complex.
    token_mask: [n_token] bool.
    embeddings: of `EMBEDDINGS`, without the batch axis.
  """

  config: diffusion.DiffusionConfig
  params: Any
  features: BoltzAtomFeatures
  token_mask: np.ndarray
  embeddings: tuple[np.ndarray, ...]


def case_of(golden: Golden) -> Case:
  """The model and the only complex of a golden."""
  inputs = golden.part('inputs')
  kinds: Mapping[str, Any] = {
    'boltz1': diffusion.Boltz1DiffusionConfig,
    'boltz2': diffusion.Boltz2DiffusionConfig,
  }
  config = kinds[golden.meta['kind']](
    **golden.meta['config'],
    token_s_inputs=inputs['s_inputs'].shape[-1],
    sigma_data=golden.meta['diffusion']['sigma_data'],
  )
  features = boltz.stacked_features(inputs)
  return Case(
    config,
    boltz.haiku_params(golden.part('params')),
    jax.tree.map(lambda x: x[0], features),
    inputs['token_pad_mask'][0] > 0,
    tuple(inputs[name][0] for name in EMBEDDINGS),
  )


def denoiser(case: Case, params: Any, embeddings: Any) -> Any:
  """`denoise(positions, sigma)` by the cached form."""
  _, precompute, denoise = diffusion.cached_diffusion(case.config)
  context = precompute(params, case.features, case.token_mask, *embeddings)
  return functools.partial(denoise, params, context)


def published(case: Case, positions: Any, sigma: Any) -> Any:
  """What the published form gives for samples and their noise levels."""
  apply = diffusion.transform_diffusion(case.config).apply
  one = jax.vmap(
    lambda x, t: apply(
      case.params, case.features, case.token_mask, *case.embeddings, x, t
    )
  )
  return jax.jit(one)(positions, sigma)


def module(golden: Golden) -> Iterator[Comparison]:
  """All that a golden has."""
  yield from score_model(golden)
  yield from trajectory(golden)
  yield from training(golden)
  inputs = golden.part('inputs')
  names = ('true', 'pred', 'weights', 'mask')
  true, pred, weights, mask = (inputs[f'align/{name}'] for name in names)
  align = jax.vmap(alignment.weighted_rigid_align)
  yield golden.value('align/aligned', align(true, pred, weights, mask > 0))


def score_model(golden: Golden) -> Iterator[Comparison]:
  """Both forms at the recorded noise levels, and all gradients."""
  case, inputs = case_of(golden), golden.part('inputs')
  positions, sigma = inputs['noised'], inputs['sigma']
  is_atom = np.asarray(case.features.atom_mask)
  weights = inputs['loss_w'] * is_atom[:, None]

  def loss(
    params: Any, embeddings: Any, positions: Any
  ) -> tuple[jax.Array, jax.Array]:
    found = denoiser(case, params, embeddings)(positions, sigma)
    return jnp.sum(found * weights), found

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (_, found), gradients = run(case.params, case.embeddings, positions)

  def atoms(x: np.ndarray) -> np.ndarray:
    return x[:, is_atom]

  yield golden.value('denoised', found, rows=atoms)
  if 'outputs/token_a' in golden.arrays:
    got = published(case, positions, sigma)
    yield golden.value('token_a', got.token_act)
  by_name = dict(zip(EMBEDDINGS, gradients[1], strict=True))
  by_name = {name: x[None] for name, x in by_name.items()}
  by_name['noised'] = gradients[2]
  for name in golden.arrays:
    if name.startswith('grads/inputs/'):
      got = by_name[name.removeprefix('grads/inputs/')]
      yield golden.gradient(name, got)
    elif name.startswith('grads/params/'):
      own = name.removeprefix('grads/params/')
      value = boltz.torch_array(gradients[0], own)
      width = golden.arrays[name].shape[-1]
      if name.endswith('r_to_q_trans.weight'):
        # Boltz-1's has columns that only ever meet zeros.
        value = np.pad(value, ((0, 0), (0, width - value.shape[-1])))
      yield golden.gradient(name, value)


def sampler_config(golden: Golden) -> shared.SamplerConfig:
  """The recorded sampler."""
  numbers = golden.meta['diffusion']
  names = ('gamma_0', 'gamma_min', 'noise_scale', 'step_scale')
  levels = ('sigma_data', 'sigma_min', 'sigma_max', 'rho')
  return dataclasses.replace(
    shared.SamplerConfig.boltz2(),
    steps=golden.meta['steps'],
    alignment=golden.meta['alignment_reverse_diff'],
    **{name: float(numbers[name]) for name in names},
    schedule=shared.ScheduleConfig(
      **{name: float(numbers[name]) for name in levels}, last='zero'
    ),
  )


def sampler_draws(golden: Golden) -> shared.SamplerDraws:
  """The recorded draws."""
  draws, steps = golden.part('draws/sample'), range(golden.meta['steps'])
  return shared.SamplerDraws(
    jnp.asarray(draws['normal/0']),
    jnp.stack([draws[f'rotation/{i}'] for i in steps]),
    jnp.stack([draws[f'translation/{i}'][:, 0] for i in steps]),
    jnp.stack([draws[f'normal/{i + 1}'] for i in steps]),
  )


def trajectory(golden: Golden) -> Iterator[Comparison]:
  """All steps of the sampler."""
  case = case_of(golden)
  is_atom = np.asarray(case.features.atom_mask)

  @jax.jit
  def run(draws: shared.SamplerDraws) -> shared.SampleOutput:
    return shared.sample(
      denoiser(case, case.params, case.embeddings),
      jnp.asarray(is_atom),
      sampler_config(golden),
      draws=draws,
      return_trajectory=True,
    )

  found = run(sampler_draws(golden))
  values = {
    'coords': found.positions,
    'noisy': found.trajectory.noisy,
    'denoised': found.trajectory.denoised,
  }

  def atoms(x: np.ndarray) -> np.ndarray:
    return x[..., is_atom, :]

  yield golden.value('sample/sigma', found.trajectory.sigma)
  for name, value in values.items():
    yield golden.value(f'sample/{name}', value, rows=atoms)


def training(golden: Golden) -> Iterator[Comparison]:
  """The training loss and the norm of its gradient."""
  case, inputs = case_of(golden), golden.part('inputs')
  draws = golden.part('draws/train')
  true = jnp.asarray(draws['augmented/0'])
  is_atom = np.asarray(case.features.atom_mask)
  mol_type = inputs['mol_type'][0][np.maximum(case.features.atom_to_token, 0)]

  def loss(params: Any) -> tuple[jax.Array, Any]:
    sigma = shared.training_noise_levels(
      shared.TrainingNoiseConfig(sigma_data=case.config.sigma_data),
      normal=jnp.asarray(draws['normal/0']),
    )
    noised = true + sigma[:, None, None] * draws['normal_like/0']
    denoised = denoiser(case, params, case.embeddings)(noised, sigma)
    losses = shared.diffusion_loss(
      denoised,
      true,
      sigma,
      (inputs['atom_resolved_mask'][0] > 0) & is_atom,
      shared.LossConfig(
        version=golden.meta['kind'], sigma_data=case.config.sigma_data
      ),
      is_nucleotide=is_atom & np.isin(mol_type, NUCLEOTIDES),
      is_ligand=is_atom & (mol_type == LIGAND),
      true_unmoved=jnp.asarray(inputs['coords']).reshape(true.shape[1:]),
    )
    return losses.total, (sigma, denoised, losses)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, (sigma, denoised, losses)), gradient = run(case.params)
  yield golden.value('train/sigmas', sigma)
  yield golden.value('train/true', true)
  yield golden.value('train/denoised', denoised, rows=lambda x: x[:, is_atom])
  for name, value in (
    ('loss', losses.total),
    ('mse_loss', losses.mse),
    ('smooth_lddt_loss', losses.smooth_lddt),
  ):
    yield golden.value(f'train/{name}', value)
  squares = [
    np.sum(np.square(np.asarray(x, np.float64)))
    for module, arrays in gradient.items()
    if not module.startswith('diffusion_conditioning/')
    for x in arrays.values()
  ]
  yield golden.gradient('grads/train/params_norm', np.sqrt(np.sum(squares)))
