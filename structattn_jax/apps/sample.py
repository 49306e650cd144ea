"""Samples structures from a diffusion module and embeddings of a trunk.

`structattn sample --system boltz2` reads weights that `structattn convert`
took from a checkpoint, a structure file, which says what atoms there are, and
the embeddings of a trunk that ran elsewhere; it writes mmCIF files with the
chains, names and B-factors of the structure file, and a picture of how the
first sample comes out of the noise.

Embeddings are arrays in an npz or safetensors file, with the names that they
have in Boltz, for one complex, with or without a batch axis of 1:

  s_inputs  [n_token, token_s_inputs], of the input embedder
  s         [n_token, token_s], of the trunk
  z         [n_token, n_token, token_z], of the trunk
  rel_pos   [n_token, n_token, token_z], of `rel_pos`

Tokens are those of `data.featurise`: residues in the order of the file, one
token for each, atom by atom for ligands and modified residues.
"""

import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax import checkpoint, data, diffusion
from structattn_jax.geometry import alignment
from structattn_jax.network import boltz
from structattn_jax.network.boltz.diffusion import DiffusionConfig

System = Literal['boltz1', 'boltz2']
Progress = Callable[[int, int], None]

SYSTEMS: tuple[System, ...] = ('boltz1', 'boltz2')
NAMES = ('s_inputs', 's', 'z', 'rel_pos')
_CONFIGS: Mapping[str, type[Any]] = {
  'boltz1': boltz.Boltz1DiffusionConfig,
  'boltz2': boltz.Boltz2DiffusionConfig,
}
_SAMPLERS: Mapping[str, Callable[[], diffusion.SamplerConfig]] = {
  'boltz1': diffusion.SamplerConfig.boltz1,
  'boltz2': diffusion.SamplerConfig.boltz2,
}
# Of the picture: steps that are shown, and colours of chains.
_SHOWN = 5


class SampleError(ValueError):
  """Weights, embeddings or a request that cannot be sampled from."""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
  """Sampled structures of one complex.

  Attributes:
    structure: what was sampled, in the order of the positions.
    positions: [num_samples, n_atom, 3] float32, angstrom.
    sigma: [steps] float, noise levels at which the module was called.
    denoised: [steps, num_samples, n_atom, 3] float32, what it said.
  """

  structure: data.Structure
  positions: np.ndarray
  sigma: np.ndarray
  denoised: np.ndarray


def load_weights(
  path: checkpoint.Path, system: System
) -> tuple[DiffusionConfig, hk.Params]:
  """Reads what `structattn convert ... --part diffusion` wrote.

  Raises:
    CheckpointError: if the file cannot be read.
    SampleError: if it holds something else.
  """
  content = checkpoint.load(path)
  if not isinstance(content.config, _CONFIGS[system]):
    raise SampleError(
      f'{path}: expected the diffusion module of {system}, got a '
      f'{type(content.config).__name__}; `structattn convert CHECKPOINT OUTPUT '
      '--part diffusion` writes it'
    )
  return content.config, content.params


def sampler_of(
  system: System, steps: int | None = None
) -> diffusion.SamplerConfig:
  """The sampler of a release, perhaps with another number of steps.

  Raises:
    SampleError: if the number is below 1.
  """
  config = _SAMPLERS[system]()
  if steps is None:
    return config
  try:
    return dataclasses.replace(config, steps=steps)
  except ValueError as error:
    raise SampleError(str(error)) from None


def load_embeddings(path: checkpoint.Path) -> dict[str, np.ndarray]:
  """Reads embeddings from an npz or safetensors file.

  Returns:
    The arrays by name, float32, without the batch axis.

  Raises:
    CheckpointError: if the file cannot be read.
    SampleError: if there are other arrays than `NAMES`, or others than finite
      numbers in them.
    ImportError: if it is a safetensors file and the package is not installed.
  """
  if checkpoint.is_zip(path):
    arrays = checkpoint.read_npz(path)
  else:
    arrays, _ = checkpoint.read_safetensors(path)
  try:
    return embeddings_from_arrays(arrays)
  except SampleError as error:
    raise SampleError(f'{path}: {error}') from None


def embeddings_from_arrays(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Embeddings from the arrays of any framework.

    >>> arrays = dict.fromkeys(NAMES, np.zeros((1, 4, 4, 2)))
    >>> embeddings_from_arrays(arrays)['z'].shape
    (4, 4, 2)

  Of PyTorch's tensors, `tensor.float().numpy(force=True)` are such arrays.

  Args:
    arrays: by `NAMES`; a batch axis of 1 may come first.

  Returns:
    The arrays, float32, without the batch axis.

  Raises:
    SampleError: as `load_embeddings`.
  """
  wrong = sorted(set(NAMES) ^ set(arrays))
  if wrong:
    raise SampleError(
      f'expected the arrays {", ".join(NAMES)}; missing or unknown: '
      f'{", ".join(wrong)}'
    )
  found = {}
  for name in NAMES:
    value = np.asarray(arrays[name])
    rank = 2 if name in ('s_inputs', 's') else 3
    if value.ndim == rank + 1 and value.shape[0] == 1:
      value = value[0]
    # bfloat16 of safetensors files is no kind of NumPy's own.
    if value.dtype.kind != 'f' and value.dtype.name != 'bfloat16':
      raise SampleError(f'{name}: expected floating numbers, got {value.dtype}')
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
      raise SampleError(f'{name}: expected finite numbers')
    found[name] = value
  return found


def sample_structures(
  config: DiffusionConfig,
  params: hk.Params,
  structure: data.Structure,
  embeddings: Mapping[str, np.ndarray],
  *,
  num_samples: int = 5,
  sampler: diffusion.SamplerConfig | None = None,
  key: jax.Array,
  hook: diffusion.samplers.Hook | None = None,
  hook_state: Any = None,
  progress: Progress | None = None,
) -> Samples:
  """Samples a complex.

  Args:
    config: of the diffusion module.
    params: its parameters.
    structure: which atoms there are; its positions are not used.
    embeddings: of `load_embeddings`.
    num_samples: number of samples.
    sampler: how to sample; None takes that of the release.
    key: PRNG key.
    hook: steers, see `diffusion.sample`; atoms are in the order of
      `data.featurise`, padded to whole windows.
    hook_state: its first state.
    progress: called with (steps done, steps).

  Returns:
    The samples, in the order of the component dictionary within residues.

  Raises:
    SampleError: if the embeddings do not fit the module or the structure,
      saying all that does not, or there are no samples to draw.
  """
  if num_samples < 1:
    raise SampleError(f'num_samples: expected at least 1, got {num_samples}')
  features = data.featurise(structure, require_protein=False)
  _check_sizes(config, features.n_token, structure.name, embeddings)
  atoms = data.boltz_atom_features(
    features, atoms_per_window=config.atoms_per_window_queries
  )
  if sampler is None:
    is_second = isinstance(config, boltz.Boltz2DiffusionConfig)
    sampler = sampler_of('boltz2' if is_second else 'boltz1')
  _, precompute, denoise = boltz.cached_diffusion(config)
  try:
    context = jax.jit(precompute)(
      params,
      atoms,
      np.ones(features.n_token, bool),
      *(embeddings[name] for name in NAMES),
    )
  except ValueError as error:  # Features that this module wants and we lack.
    raise SampleError(str(error)) from None
  found = diffusion.sample(
    jax.tree_util.Partial(denoise, params, context),
    jnp.asarray(atoms.atom_mask),
    sampler,
    num_samples=num_samples,
    key=key,
    hook=hook,
    hook_state=hook_state,
    return_trajectory=True,
    progress=progress or (lambda done, steps: None),
  )
  if found.trajectory is None:
    raise RuntimeError('the sampler returned no trajectory')
  n_atom = features.n_atom
  order = data.atom_order(structure)
  ordered = dataclasses.replace(
    structure,
    **{
      name: getattr(structure, name)[order]
      for name in (
        'atom_residue',
        'atom_name',
        'element',
        'charge',
        'occupancy',
        'b_factor',
        'position',
      )
    },
  )
  return Samples(
    ordered,
    np.asarray(found.positions)[:, :n_atom],
    np.asarray(found.trajectory.sigma),
    np.asarray(found.trajectory.denoised)[:, :, :n_atom],
  )


def _check_sizes(
  config: DiffusionConfig,
  n_token: int,
  structure: str,
  embeddings: Mapping[str, np.ndarray],
) -> None:
  """One error for everything that does not fit."""
  wants = {
    's_inputs': (n_token, config.token_s_inputs),
    's': (n_token, config.token_s),
    'z': (n_token, n_token, config.token_z),
    'rel_pos': (n_token, n_token, config.token_z),
  }
  wrong = [
    f'{name}: expected {want}, got {embeddings[name].shape}'
    for name, want in wants.items()
    if embeddings[name].shape != want
  ]
  if wrong:
    raise SampleError(
      f'the embeddings do not fit {n_token} tokens of {structure!r} and the '
      f"weights' {type(config).__name__}: {'; '.join(wrong)}"
    )


def write(folder: pathlib.Path, samples: Samples) -> list[pathlib.Path]:
  """Writes all files, or none of them.

  Args:
    folder: is made if it is not there.
    samples: what to write.

  Returns:
    `sample_1.cif`, ... and `trajectory.png`.

  Raises:
    SampleError: if positions are not finite.
    OSError: if the folder or a file cannot be written.
    ImportError: if matplotlib or biotite is not installed, naming the extra.
  """
  if not np.isfinite(samples.positions).all():
    raise SampleError('the sampled positions are not finite')
  files = {
    folder / f'sample_{i + 1}.cif': data.mmcif_text(
      samples.structure, position
    ).encode('utf-8')
    for i, position in enumerate(samples.positions)
  }
  picture = io.BytesIO()
  trajectory_figure(samples).savefig(picture, dpi=130, format='png')
  files[folder / 'trajectory.png'] = picture.getvalue()
  folder.mkdir(parents=True, exist_ok=True)
  checkpoint.write_all_atomically(files)
  return list(files)


def trajectory_figure(samples: Samples) -> Any:
  """How the first sample comes out of the noise, and all samples by step.

  Args:
    samples: with their trajectory.

  Returns:
    A matplotlib figure: denoised positions of the first sample at some steps,
    coloured by chain; noise level, and distance of the denoised positions to
    the last ones after alignment, of every sample.

  Raises:
    ImportError: if matplotlib is not installed, naming the extra.
  """
  try:
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure
  except ImportError:
    raise ImportError(
      'figures need matplotlib: pip install "structattn-jax[run]"'
    ) from None
  # Not pyplot: a library must not touch the caller's figures or backend.
  figure = Figure(figsize=(13.5, 6.0), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  steps = len(samples.sigma)
  shown = np.unique(np.linspace(0, steps - 1, min(steps, _SHOWN)).astype(int))
  grid = figure.add_gridspec(2, len(shown), height_ratios=(1.5, 1))
  last = samples.denoised[-1, 0]
  centre = last.mean(0)
  _, _, axes = np.linalg.svd(last - centre, full_matrices=False)
  chain = samples.structure.residue_chain[samples.structure.atom_residue]
  moved = _onto_last(samples.denoised)
  for column, step in enumerate(shown):
    ax = figure.add_subplot(grid[0, column])
    flat = (moved[step, 0] - centre) @ axes[:2].T
    ax.scatter(*flat.T, c=chain, cmap='tab10', vmin=0, vmax=9, s=2)
    ax.set_aspect('equal')
    ax.set_title(f'step {step + 1}, noise {samples.sigma[step]:.3g} Å')
    ax.tick_params(labelsize=8)
  noise = figure.add_subplot(grid[1, : max(len(shown) // 2, 1)])
  noise.semilogy(np.arange(1, steps + 1), samples.sigma, color='#3b6ea5')
  noise.set_xlabel('step')
  noise.set_ylabel('noise level, Å')
  if len(shown) > 1:
    change = figure.add_subplot(grid[1, len(shown) // 2 :])
    distance = np.sqrt(np.mean(np.sum((moved - moved[-1:]) ** 2, -1), -1))
    change.semilogy(np.arange(1, steps), np.maximum(distance[:-1], 1e-4))
    change.set_xlabel('step')
    change.set_ylabel('RMSD to the last step, Å')
  figure.suptitle(
    f'{samples.structure.name}: denoised positions, '
    f'{len(samples.positions)} samples, {len(chain)} atoms',
    x=0.01,
    ha='left',
    fontsize=12,
  )
  return figure


def _onto_last(denoised: np.ndarray) -> np.ndarray:
  """All steps of every sample moved onto its last one."""
  align = jax.vmap(jax.vmap(alignment.weighted_rigid_align), (0, None))
  return np.asarray(jax.jit(align)(denoised, denoised[-1]))
