"""Boltz-1's diffusion module at its released sizes: one step, and gradients.

24 layers of 16 heads over tokens of 768 channels, 3 + 3 layers over atoms; 8
atoms per token. Candidates:
  cached: `network.boltz.cached_diffusion`: what the noise level gives is
    computed once for all samples.
  published: the released computation with its model cache, in JAX: pair biases
    and the embedding of atoms are given; the conditioned single and all
    adaptive terms are computed for every sample, and keys after windows are
    formed with one-hot matrices.
  boltz: the torch module itself with its model cache and the same weights,
    where the packages `boltz`, `fairscale`, `einops`, `einx`, `scipy` and
    `torch` can be imported. The baseline, else 'published' is.

A 'step' is one call for 5 samples, after what is cached has been computed. The
'gradient' is that of a loss on one structure after 20 steps of the sampler with
respect to the trunk's single and pair, precomputation included, steps
recomputed in the backward pass; upstream's sampler has none, and 'published'
takes the same precomputation. Where a float64 reference would not fit, nothing
is checked.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax import diffusion as shared
from structattn_jax.benchmark import boltz, harness
from structattn_jax.components import functional
from structattn_jax.components import parameters as pm
from structattn_jax.components import preconditioning as pc
from structattn_jax.network.boltz import conditioning, diffusion
from structattn_jax.network.boltz import transformers as bt
from structattn_jax.network.boltz.features import BoltzAtomFeatures

Mode = Literal['step, 5 samples', 'gradient, 20 steps']
MODES: tuple[Mode, ...] = ('step, 5 samples', 'gradient, 20 steps')
SIZES = (1024, 4096)
QUICK_SIZES = (256,)
# Layers over tokens: as released, and for a quick run.
DEPTH, QUICK_DEPTH = 24, 2

_ATOMS_PER_TOKEN = 8
_STEPS = 20
_LARGEST_CHECKED = 256
# What takes more than minutes on CPU is left out there.
_LARGEST_ON_CPU = {'gradient, 20 steps': 1024}
_TOLERANCE = {'gradient, 20 steps': 2e-4}
_PACKAGES = ('torch', 'boltz', 'fairscale', 'einops', 'einx', 'scipy')


def candidates(mode: Mode) -> tuple[str, ...]:
  """Names of what can run here; the last is the baseline."""
  found = all(importlib.util.find_spec(name) is not None for name in _PACKAGES)
  if found and mode == 'step, 5 samples':
    return ('cached', 'published', 'boltz')
  return ('cached', 'published')


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures both modes; arguments as `boltz.run`."""
  on_cpu = jax.default_backend() == 'cpu'
  tables = []
  for mode in MODES:
    names = candidates(mode)
    rows: list[harness.Measurement] = []
    for n_atom in QUICK_SIZES if quick else SIZES:
      if on_cpu and n_atom > _LARGEST_ON_CPU.get(mode, n_atom):
        continue
      depth = QUICK_DEPTH if quick else DEPTH
      args = inputs(mode, n_atom, depth)
      checked = n_atom <= _LARGEST_CHECKED
      measured = harness.compare(
        {name: _candidate(mode, depth, name) for name in names},
        args,
        case=f'{n_atom} atoms',
        want=expected(mode, depth, args) if checked else None,
        repeats=3 if quick else 10,
        budget_seconds=10.0,
        tolerance=_TOLERANCE.get(mode, harness.TOLERANCE),
      )
      del args
      if rss and on_cpu:
        measured = [
          harness.with_peak_rss(row, build, mode, n_atom, depth, row.candidate)
          for row in measured
        ]
      rows += measured
    title = f'Boltz-1 diffusion module, {mode}'
    tables.append(
      harness.Table(title=title, baseline=names[-1], rows=tuple(rows))
    )
    report(tables[-1])
  return tables


def build(
  mode: Mode, n_atom: int, depth: int, candidate: str
) -> tuple[Callable[..., Any] | harness.External, Sequence[Any]]:
  """The function of a candidate and its arguments, for a new process."""
  return _candidate(mode, depth, candidate), inputs(mode, n_atom, depth)


def config(depth: int) -> diffusion.Boltz1DiffusionConfig:
  """The released module with so many layers over tokens."""
  return diffusion.Boltz1DiffusionConfig(token_transformer_depth=depth)


def inputs(mode: Mode, n_atom: int, depth: int) -> tuple[Any, ...]:
  """params, features, embeddings, positions, level and, of a step, context."""
  rng = np.random.default_rng(0)
  own = config(depth)
  n_token = n_atom // _ATOMS_PER_TOKEN

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  params = {
    module: {
      name: (
        normal(*p.shape) * p.shape[0] ** -0.5
        if len(p.shape) > 1
        else normal(*p.shape) * 0.1 + (name == 'scale')
      )
      for name, p in arrays.items()
    }
    for module, arrays in diffusion.diffusion_parameters(own).items()
  }
  token = np.arange(n_atom) // _ATOMS_PER_TOKEN
  features = BoltzAtomFeatures(
    ref_pos=3 * normal(n_atom, 3),
    ref_charge=jnp.zeros(n_atom),
    ref_element=jnp.asarray(rng.integers(1, 20, n_atom)),
    ref_atom_name_chars=jnp.asarray(rng.integers(0, 64, (n_atom, 4))),
    ref_space_uid=jnp.asarray(token),
    atom_mask=jnp.ones(n_atom, bool),
    atom_to_token=jnp.asarray(token),
    num_tokens=n_token,
  )
  embeddings = (
    normal(n_token, own.token_s_inputs),
    normal(n_token, own.token_s),
    normal(n_token, n_token, own.token_z),
    normal(n_token, n_token, own.token_z),
  )
  if mode == 'gradient, 20 steps':
    return params, features, embeddings
  precompute = jax.jit(diffusion.cached_diffusion(own).precompute)
  context = precompute(params, features, jnp.ones(n_token, bool), *embeddings)
  sigma = jnp.float32(8.0)
  return params, features, embeddings, 18 * normal(5, n_atom, 3), sigma, context


def expected(mode: Mode, depth: int, args: Sequence[Any]) -> Any:
  """The result of 'published' in float64, of the float32 arguments."""
  return harness.in_float64(function(mode, depth, 'published'), args)


def _candidate(
  mode: Mode, depth: int, name: str
) -> Callable[..., Any] | harness.External:
  if name == 'boltz':
    return harness.External(functools.partial(_boltz, depth))
  return function(mode, depth, name)


def function(mode: Mode, depth: int, candidate: str) -> Callable[..., Any]:
  """A JAX candidate as a function of `inputs`."""
  own = config(depth)
  _, precompute, cached = diffusion.cached_diffusion(own)

  def denoise(params, features, context, positions, sigma):
    if candidate == 'cached':
      return cached(params, context, positions, sigma)
    return _published(own, params, features, context, positions, sigma)

  if mode == 'step, 5 samples':

    def step(params, features, embeddings, positions, sigma, context):
      del embeddings  # In the context.
      return denoise(params, features, context, positions, sigma)

    return step

  sampler = dataclasses.replace(shared.SamplerConfig.boltz1(), steps=_STEPS)

  def gradient(params, features, embeddings):
    inputs, single, pair, relative = embeddings
    mask = jnp.ones(len(single), bool)
    rng = np.random.default_rng(1)
    atoms = len(features.ref_pos)

    def normal(*shape: int) -> jax.Array:
      return jnp.asarray(rng.standard_normal(shape), single.dtype)

    draws = shared.SamplerDraws(
      start=normal(1, atoms, 3),
      rotation=jnp.broadcast_to(
        jnp.eye(3, dtype=single.dtype), (_STEPS, 1, 3, 3)
      ),
      translation=normal(_STEPS, 1, 3),
      noise=normal(_STEPS, 1, atoms, 3),
    )

    def loss(single, pair):
      context = precompute(
        params, features, mask, inputs, single, pair, relative
      )
      found = shared.sample(
        lambda x, sigma: denoise(params, features, context, x, sigma),
        features.atom_mask,
        sampler,
        draws=draws,
      )
      # The distance between the two halves.
      x = found.positions[0]
      return jnp.mean(jnp.square(x[: atoms // 2] - x[atoms // 2 :]))

    return jax.value_and_grad(loss, (0, 1))(single, pair)

  return gradient


def _published(own, params, features, context, positions, sigma):
  """All samples by themselves, given what the model cache holds."""
  factors = pc.preconditioning(sigma, own.sigma_data)
  atoms = context.atoms

  def one(x: jax.Array, time: jax.Array) -> jax.Array:
    single, _ = conditioning.condition_single(
      pm.below(params, 'single_conditioner/'), context.single, time
    )
    given = (atoms.queries, atoms.conditioning, atoms.encoder.biases)
    tokens, skip = boltz.published_encode(
      params, features, given, factors.c_in * x
    )
    s = functional.layer_norm(params, 's_to_a_linear_0', single)
    a = tokens + functional.linear(params, 's_to_a_linear_1', s)
    a = bt.diffusion_transformer(
      pm.below(params, 'token_transformer/'),
      a,
      single,
      context.token_biases,
      context.token_mask,
    )
    a = functional.layer_norm(params, 'a_norm', a)
    given = (skip, atoms.conditioning, atoms.decoder.biases)
    update = boltz.published_decode(params, features, given, a)
    return factors.c_skip * x + factors.c_out * update

  # A level for each sample, as upstream repeats it.
  times = jnp.broadcast_to(factors.c_noise, len(positions))
  return jax.vmap(one)(positions, times)


def torch_module(
  own: diffusion.Boltz1DiffusionConfig, params: pm.Params
) -> Any:
  """The published torch module with our parameters."""
  torch: Any = importlib.import_module('torch')
  module: Any = importlib.import_module('boltz.model.modules.diffusion')
  model = module.DiffusionModule(
    token_s=own.token_s,
    token_z=own.token_z,
    atom_s=own.atom_s,
    atom_z=own.atom_z,
    atoms_per_window_queries=own.atoms_per_window_queries,
    atoms_per_window_keys=own.atoms_per_window_keys,
    sigma_data=own.sigma_data,
    dim_fourier=own.dim_fourier,
    atom_encoder_depth=own.atom_encoder_depth,
    atom_encoder_heads=own.atom_encoder_heads,
    token_transformer_depth=own.token_transformer_depth,
    token_transformer_heads=own.token_transformer_heads,
    atom_decoder_depth=own.atom_decoder_depth,
    atom_decoder_heads=own.atom_decoder_heads,
    atom_feature_dim=389,
    conditioning_transition_layers=own.conditioning_transition_layers,
  )
  boltz.load_torch(torch, model, params)
  return model.eval()


def torch_features(features: BoltzAtomFeatures) -> dict[str, Any]:
  """Upstream's features of a batch of one, as torch tensors."""
  torch: Any = importlib.import_module('torch')
  one_hot = torch.nn.functional.one_hot

  def tensor(x: Any) -> Any:
    return torch.from_numpy(np.array(x))[None]

  def hot(x: Any, size: int) -> Any:
    # Negative: a row of zeros.
    return one_hot(tensor(x).long() + 1, size + 1)[..., 1:]

  return {
    'ref_pos': tensor(features.ref_pos),
    'ref_charge': tensor(features.ref_charge),
    'atom_pad_mask': tensor(features.atom_mask).float(),
    'ref_element': hot(features.ref_element, 128),
    'ref_atom_name_chars': hot(features.ref_atom_name_chars, 64),
    'ref_space_uid': tensor(features.ref_space_uid).long(),
    'atom_to_token': hot(features.atom_to_token, features.num_tokens),
    'token_pad_mask': torch.ones(1, features.num_tokens),
  }


def _boltz(depth: int, *args: Any) -> Callable[[], Any]:
  """The module of the package, with our parameters and inputs."""
  torch: Any = importlib.import_module('torch')
  params, features, embeddings, positions, sigma, _ = args
  own = config(depth)
  model = torch_module(own, params)
  feats = torch_features(features)
  factors = pc.preconditioning(sigma, own.sigma_data)
  c_in, c_skip, c_out = map(
    float, (factors.c_in, factors.c_skip, factors.c_out)
  )
  tensors = [torch.from_numpy(np.array(x))[None] for x in embeddings]
  s_inputs, single, pair, relative = tensors
  x = torch.from_numpy(np.array(positions))
  times = torch.full((len(x),), float(factors.c_noise))
  cache: dict[str, Any] = {}

  def step() -> Any:
    with torch.no_grad():
      found = model(
        s_inputs=s_inputs,
        s_trunk=single,
        z_trunk=pair,
        relative_position_encoding=relative,
        feats=feats,
        r_noisy=c_in * x,
        times=times,
        multiplicity=len(x),
        model_cache=cache,
      )
      return (c_skip * x + c_out * found['r_update']).numpy()

  step()  # Fills the cache.
  return step
