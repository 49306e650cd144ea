"""A trajectory of the installed package `boltz` with injected noise.

Runs where `make peers` has put the package; elsewhere the recorded goldens are
the comparison.
"""

import dataclasses
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import diffusion as shared
from structattn_jax import verification
from structattn_jax.benchmark import boltz as torch_boltz
from structattn_jax.benchmark import boltz_diffusion as torch_diffusion
from structattn_jax.components import parameters as pm
from structattn_jax.verification import boltz_diffusion as replay

for package in ('torch', 'boltz', 'einops', 'einx', 'fairscale'):
  pytest.importorskip(package)

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens/boltz_diffusion'
SAMPLES, STEPS = 2, 6
NO_STEERING = {
  'fk_steering': False,
  'physical_guidance_update': False,
  'contact_guidance_update': False,
}


def draws(n_atom: int) -> shared.SamplerDraws:
  keys = jax.random.split(jax.random.key(3), 4)
  moves = jax.vmap(jax.vmap(lambda key: shared.random_move(key, 'quaternion')))(
    jax.random.split(keys[0], (STEPS, SAMPLES))
  )
  return shared.SamplerDraws(
    jax.random.normal(keys[1], (SAMPLES, n_atom, 3)),
    moves.rotation,
    moves.translation,
    jax.random.normal(keys[2], (STEPS, SAMPLES, n_atom, 3)),
  )


def package_sampler(version, case, sampler):
  """`AtomDiffusion` of the package with our parameters, and its inputs."""
  torch = importlib.import_module('torch')
  name = 'diffusion' if version == 1 else 'diffusionv2'
  module = importlib.import_module(f'boltz.model.modules.{name}')
  config = case.config
  names = (
    'token_s',
    'atom_s',
    'atoms_per_window_queries',
    'atoms_per_window_keys',
    'dim_fourier',
    'atom_encoder_depth',
    'atom_encoder_heads',
    'token_transformer_depth',
    'token_transformer_heads',
    'atom_decoder_depth',
    'atom_decoder_heads',
    'conditioning_transition_layers',
  )
  sizes = {name: getattr(config, name) for name in names}
  pair = {
    'token_z': config.token_z,
    'atom_z': config.atom_z,
    'atom_feature_dim': 389 if version == 1 else 388,
  }
  options = {'use_inference_model_cache': True} if version == 1 else {}
  model = module.AtomDiffusion(
    {**sizes, **(pair if version == 1 else {})},
    num_sampling_steps=sampler.steps,
    sigma_min=sampler.schedule.sigma_min,
    rho=sampler.schedule.rho,
    gamma_0=sampler.gamma_0,
    gamma_min=sampler.gamma_min,
    noise_scale=sampler.noise_scale,
    step_scale=sampler.step_scale,
    alignment_reverse_diff=sampler.alignment,
    **options,
  ).eval()
  torch_boltz.load_torch(torch, model.score_model, case.params)
  feats = torch_diffusion.torch_features(case.features)
  feats['token_pad_mask'] = torch.from_numpy(case.token_mask)[None].float()
  feats['token_index'] = torch.arange(len(case.token_mask))[None]
  s_inputs, single, z, relative = (
    torch.from_numpy(np.array(x))[None] for x in case.embeddings
  )
  arguments = {'s_inputs': s_inputs, 's_trunk': single, 'feats': feats}
  if version == 1:
    arguments |= {'z_trunk': z, 'relative_position_encoding': relative}
  else:
    outside = importlib.import_module(
      'boltz.model.modules.diffusion_conditioning'
    )
    del sizes['dim_fourier']
    conditioning = outside.DiffusionConditioning(**sizes, **pair).eval()
    own = pm.below(case.params, 'diffusion_conditioning/')
    torch_boltz.load_torch(torch, conditioning, own)
    with torch.no_grad():
      found = conditioning(single, z, relative, feats)
    keys = ('q', 'c', 'to_keys', 'atom_enc_bias', 'atom_dec_bias')
    arguments['diffusion_conditioning'] = dict(
      zip((*keys, 'token_trans_bias'), found, strict=True)
    )
  return torch, module, model, arguments


@pytest.mark.parametrize('version', [1, 2])
def test_trajectory_is_that_of_the_package(version, monkeypatch):
  case_name = f'v{version}_small'
  golden = verification.Golden.read(GOLDENS / f'{case_name}.npz', case_name)
  case = replay.case_of(golden)
  released = getattr(shared.SamplerConfig, f'boltz{version}')()
  sampler = dataclasses.replace(released, steps=STEPS)
  given = draws(len(case.features.atom_mask))
  torch, module, model, arguments = package_sampler(version, case, sampler)

  def tensors(x):
    return iter([torch.from_numpy(np.array(y)) for y in x])

  normals = tensors([given.start, *given.noise])
  rotations = tensors(given.rotation)
  translations = tensors(given.translation[:, :, None])
  monkeypatch.setattr(torch, 'randn', lambda *_, **__: next(normals))
  monkeypatch.setattr(
    module,
    'compute_random_augmentation',
    lambda *_, **__: (next(rotations), next(translations)),
  )
  with torch.no_grad():
    want = model.sample(
      arguments['feats']['atom_pad_mask'],
      multiplicity=SAMPLES,
      max_parallel_samples=SAMPLES,
      steering_args=NO_STEERING,
      **arguments,
    )['sample_atom_coords'].numpy()
  mask = np.asarray(case.features.atom_mask)

  @jax.jit
  def run(given):
    return shared.sample(
      replay.denoiser(case, case.params, case.embeddings),
      jnp.asarray(mask),
      sampler,
      draws=given,
    ).positions

  got = np.asarray(run(given))
  # As for the goldens: random weights do not denoise, errors grow with steps.
  scale = np.abs(want[:, mask]).max()
  assert np.abs(got - want)[:, mask].max() < 1e-5 * scale
