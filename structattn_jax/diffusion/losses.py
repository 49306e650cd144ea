"""Training losses of structure diffusion, AlphaFold 3's and Boltz'.

Abramson et al. (2024) Suppl. 3.7.1 and Alg. 27 (SmoothLDDTLoss); boltz
model/loss/{diffusion,diffusionv2}.py @ 832486d. AF3's training code is not
published; its column is the paper's. Per sample, with d = sigma_data:

                    alphafold3          boltz1              boltz2
  weight of sigma   (sigma² + d²)       (sigma² + d²)       as boltz1
                    / (sigma + d)²      / (sigma d)²
  mean squared      sum w m |x - y|²    sum w m |x - y|²    boltz1's with
  error             / (3 sum m)         / (3 sum w m)       3 sum w m + 1e-5
  smooth LDDT:
    over samples    each on its own     terms averaged      each on its own
                                        first (a quirk)
    distances       |x_i - x_j|         |x_i - x_j|         of the predicted:
                                                            |x_i - x_j + 1e-6|
    number of pairs max(n, 1)           max(n, 1)           n + 1e-5

The quirk shows only if the true coordinates differ between the samples. Terms
of all pairs are computed for some rows at a time and again in the backward
pass, so that memory is linear in the atoms. Everything is finite when nothing
is resolved: the squared errors are zero, and smooth LDDT is one.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.geometry import alignment

Version = Literal['alphafold3', 'boltz1', 'boltz2']
_VERSIONS = ('alphafold3', 'boltz1', 'boltz2')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(base_config.BaseConfig):
  """Weights of the losses.

  Attributes:
    version: whose formulas, see above.
    sigma_data: standard deviation of the data in angstrom.
    nucleotide_weight: added to the weight of atoms of DNA and RNA.
    ligand_weight: added to the weight of atoms of ligands.
    smooth_lddt_weight: of the smooth LDDT loss; 0 leaves it out.
    bond_weight: of the bond loss, 1 when AF3 is fine-tuned; 0 leaves it out.
    row_block: rows of the atom pairs that are computed at a time.
  """

  version: Version = 'alphafold3'
  sigma_data: float = 16.0
  nucleotide_weight: float = 5.0
  ligand_weight: float = 10.0
  smooth_lddt_weight: float = 1.0
  bond_weight: float = 0.0
  row_block: int = 64

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'row_block')
    self.check_at_least(
      0,
      'nucleotide_weight',
      'ligand_weight',
      'smooth_lddt_weight',
      'bond_weight',
    )
    if not 0 < self.sigma_data < np.inf:
      raise ValueError(
        'LossConfig.sigma_data: expected a finite number above 0, got '
        f'{self.sigma_data}'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffusionLoss:
  """Losses, means over samples; [] float each.

  Attributes:
    total: what is minimised.
    mse: mean squared error after alignment, weighted by the noise level, in
      square angstrom times that weight.
    smooth_lddt: 1 - smooth LDDT, in [0, 1].
    bond: error of bond lengths, weighted as `mse`; 0 without bonds.
  """

  total: jax.Array
  mse: jax.Array
  smooth_lddt: jax.Array
  bond: jax.Array


def diffusion_loss(
  denoised: jax.Array,
  true: jax.Array,
  sigma: jax.Array,
  mask: jax.Array,
  config: LossConfig,
  *,
  is_nucleotide: jax.Array,
  is_ligand: jax.Array,
  true_unmoved: jax.Array | None = None,
  bonds: jax.Array | None = None,
  bond_mask: jax.Array | None = None,
) -> DiffusionLoss:
  """All terms of the loss on denoised structures; AF3 Suppl. eq. 6.

  total = mean_s weight(sigma_s) (mse_s + bond_weight bond_s)
          + smooth_lddt_weight smooth_lddt

  The true coordinates are aligned to the denoised ones; no gradient flows
  through the alignment.

  Args:
    denoised: [num_samples, n_atom, 3] float, in angstrom.
    true: [num_samples, n_atom, 3] or [n_atom, 3] float, in angstrom, moved in
      whatever way.
    sigma: [num_samples] float, noise levels in angstrom.
    mask: [n_atom] bool, True = real and resolved.
    config: version and weights.
    is_nucleotide: [n_atom] bool, True for atoms of DNA and RNA.
    is_ligand: [n_atom] bool, True for atoms of what is no polymer.
    true_unmoved: coordinates in the shape of `true` from which smooth LDDT
      takes the true distances, as Boltz does; None = `true`.
    bonds: [n_bond, 2] int32, pairs of atoms whose bond length counts; in AF3
      the bonds between polymers and ligands. None leaves the term out.
    bond_mask: [n_bond] bool; None = all real.

  Returns:
    The losses, at least float32.

  Raises:
    ValueError: on a wrong shape, or if `config.bond_weight` is set but no bonds
      are given.
    TypeError: on a wrong dtype.
  """
  dims = checks.check_shapes(
    denoised=(denoised, 'num_samples n_atom 3'),
    sigma=(sigma, 'num_samples'),
    mask=(mask, 'n_atom'),
    is_nucleotide=(is_nucleotide, 'n_atom'),
    is_ligand=(is_ligand, 'n_atom'),
  )
  if config.bond_weight and bonds is None:
    raise ValueError(
      f'bonds: expected [n_bond, 2] with bond_weight={config.bond_weight}, got '
      'None'
    )
  denoised = numerics.at_least_float32(denoised)
  true = _per_sample('true', true, denoised)
  weights = alignment_weights(is_nucleotide, is_ligand, config=config)
  target = jax.vmap(
    lambda x, y: alignment.weighted_rigid_align(x, y, weights, mask)
  )(true, denoised)
  of_sigma = sigma_weight(sigma, config)
  mse = jax.vmap(
    lambda x, y: weighted_mse(x, y, weights, mask, version=config.version)
  )(denoised, target)
  mse = jnp.mean(of_sigma * mse)
  bond = smooth = jnp.zeros((), mse.dtype)
  if bonds is not None:
    terms = jax.vmap(lambda x, y: bond_loss(x, y, bonds, mask, bond_mask))
    bond = jnp.mean(of_sigma * terms(denoised, true))
  if config.smooth_lddt_weight and dims['n_atom']:
    smooth = smooth_lddt_loss(
      denoised,
      true if true_unmoved is None else true_unmoved,
      mask,
      is_nucleotide,
      version=config.version,
      row_block=config.row_block,
    )
  total = mse + config.bond_weight * bond + config.smooth_lddt_weight * smooth
  return DiffusionLoss(total=total, mse=mse, smooth_lddt=smooth, bond=bond)


def alignment_weights(
  is_nucleotide: jax.Array, is_ligand: jax.Array, *, config: LossConfig
) -> jax.Array:
  """1 + 5 [nucleotide] + 10 [ligand]; AF3 Suppl. eq. 4.

  Args:
    is_nucleotide: [...] bool, per atom.
    is_ligand: [...] bool.
    config: has the two numbers.

  Returns:
    [...] float32.

  Raises:
    TypeError: if an argument is not bool.
  """
  checks.check_dtypes('bool', is_nucleotide=is_nucleotide, is_ligand=is_ligand)
  return (
    1
    + config.nucleotide_weight * jnp.asarray(is_nucleotide, jnp.float32)
    + config.ligand_weight * jnp.asarray(is_ligand, jnp.float32)
  )


def sigma_weight(sigma: jax.typing.ArrayLike, config: LossConfig) -> jax.Array:
  """Weight of a noise level in the loss, see above.

    >>> print(sigma_weight(16.0, LossConfig()))
    0.5
    >>> print(sigma_weight(16.0, LossConfig(version='boltz1')))
    0.0078125

  Args:
    sigma: noise level in angstrom, any shape, above 0.
    config: version and sigma_data.

  Returns:
    The shape of `sigma`, at least float32.
  """
  sigma = numerics.at_least_float32(sigma)
  data = config.sigma_data
  scale = sigma + data if config.version == 'alphafold3' else sigma * data
  return (jnp.square(sigma) + data**2) / jnp.square(scale)


def weighted_mse(
  denoised: jax.Array,
  target: jax.Array,
  weights: jax.Array,
  mask: jax.Array,
  *,
  version: Version = 'alphafold3',
) -> jax.Array:
  """Mean squared error of one structure, see above; AF3 Suppl. eq. 3.

  Args:
    denoised: [n_atom, 3] float, in angstrom.
    target: [n_atom, 3] float, in angstrom.
    weights: [n_atom] float, see `alignment_weights`.
    mask: [n_atom] bool, True = real and resolved.
    version: what it is divided by.

  Returns:
    [] in square angstrom; 0 if nothing is resolved.

  Raises:
    ValueError: on a wrong shape or an unknown version.
    TypeError: if `mask` is not bool.
  """
  checks.check_shapes(
    denoised=(denoised, 'n_atom 3'),
    target=(target, 'n_atom 3'),
    weights=(weights, 'n_atom'),
    mask=(mask, 'n_atom'),
  )
  checks.check_dtypes('bool', mask=mask)
  _check_version(version)
  denoised, target = map(numerics.at_least_float32, (denoised, target))
  weights = jnp.where(mask, weights, 0)
  difference = jnp.where(mask[:, None], denoised - target, 0)
  squares = jnp.sum(weights * jnp.sum(jnp.square(difference), -1))
  if version == 'alphafold3':
    total = jnp.sum(mask, dtype=squares.dtype)
  else:
    total = jnp.sum(weights)
  total = 3 * total + (1e-5 if version == 'boltz2' else 0)
  return squares / jnp.where(total > 0, total, 1)


def smooth_lddt_loss(
  denoised: jax.Array,
  true: jax.Array,
  mask: jax.Array,
  is_nucleotide: jax.Array,
  *,
  version: Version = 'alphafold3',
  cutoff: float = 15.0,
  nucleotide_cutoff: float = 30.0,
  row_block: int = 64,
) -> jax.Array:
  """1 - smooth LDDT, mean over samples; AF3 Suppl. Alg. 27.

  eps_ij = mean of sigmoid(k - | |x_i - x_j| - |y_i - y_j| |), k = 0.5, 1, 2, 4
  lddt = sum_ij eps_ij m_ij / sum_ij m_ij

  over pairs of different resolved atoms whose true distance is below the
  cutoff, which depends on what the row atom i is. Memory is
  [num_samples, row_block, n_atom], in the backward pass too.

  Args:
    denoised: [num_samples, n_atom, 3] float, in angstrom.
    true: [num_samples, n_atom, 3] or [n_atom, 3] float, in angstrom.
    mask: [n_atom] bool, True = real and resolved.
    is_nucleotide: [n_atom] bool, True for atoms of DNA and RNA.
    version: see above.
    cutoff: of the true distance, in angstrom.
    nucleotide_cutoff: the same for rows that are nucleotides.
    row_block: rows at a time.

  Returns:
    [] float; 1 if there are no pairs.

  Raises:
    ValueError: on a wrong shape or an unknown version.
    TypeError: if a mask is not bool.
  """
  checks.check_shapes(
    denoised=(denoised, 'num_samples n_atom 3'),
    mask=(mask, 'n_atom'),
    is_nucleotide=(is_nucleotide, 'n_atom'),
  )
  checks.check_dtypes('bool', mask=mask, is_nucleotide=is_nucleotide)
  _check_version(version)
  denoised = numerics.at_least_float32(denoised)
  num_samples, n_atom = denoised.shape[:2]
  true = _per_sample('true', true, denoised)
  # Padding may hold anything.
  denoised, true = (jnp.where(mask[:, None], x, 0) for x in (denoised, true))
  shift = 1e-6 if version == 'boltz2' else 0.0
  limits = jnp.where(is_nucleotide, nucleotide_cutoff, cutoff)
  row_block = min(row_block, n_atom)
  n_block = -(-n_atom // row_block)
  padding = n_block * row_block - n_atom

  def blocks(x: jax.Array, axis: int) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, padding)
    shape = (*x.shape[:axis], n_block, row_block, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)

  def rows(sums, block):
    own, own_true, own_mask, own_limit, own_index = block
    d_true = _distances(own_true, true, 0.0)
    pairs = (
      own_mask[:, None] & mask & (own_index[:, None] != jnp.arange(n_atom))
    )
    pairs = pairs & (d_true < own_limit[:, None])
    error = jnp.abs(d_true - _distances(own, denoised, shift))
    terms = sum(jax.nn.sigmoid(k - error) for k in (0.5, 1.0, 2.0, 4.0)) / 4
    if version == 'boltz1':
      terms = jnp.mean(terms, 0)
    found = jnp.sum(jnp.where(pairs, terms, 0), (1, 2))
    count = jnp.sum(pairs, (1, 2), dtype=found.dtype)
    return (sums[0] + found, sums[1] + count), None

  zeros = jnp.zeros(num_samples, denoised.dtype)
  (found, count), _ = jax.lax.scan(
    jax.checkpoint(rows, prevent_cse=False),
    (zeros, zeros),
    (
      blocks(denoised, 1),
      blocks(true, 1),
      blocks(mask, 0),
      blocks(limits, 0),
      blocks(jnp.arange(n_atom), 0),
    ),
  )
  if version == 'boltz2':
    lddt = found / (count + 1e-5)
  else:
    lddt = found / jnp.maximum(count, 1)
  return 1 - jnp.mean(lddt)


def bond_loss(
  denoised: jax.Array,
  true: jax.Array,
  bonds: jax.Array,
  mask: jax.Array,
  bond_mask: jax.Array | None = None,
) -> jax.Array:
  """Mean of (|x_i - x_j| - |y_i - y_j|)² over bonds; AF3 Suppl. eq. 5.

  Args:
    denoised: [n_atom, 3] float, in angstrom.
    true: [n_atom, 3] float, in angstrom.
    bonds: [n_bond, 2] int32, atoms in [0, n_atom).
    mask: [n_atom] bool, True = real and resolved; both atoms must be.
    bond_mask: [n_bond] bool, True = real bond; None = all real.

  Returns:
    [] in square angstrom; 0 without bonds.

  Raises:
    ValueError: on a wrong shape.
    TypeError: on a wrong dtype.
  """
  checks.check_shapes(
    denoised=(denoised, 'n_atom 3'),
    true=(true, 'n_atom 3'),
    bonds=(bonds, 'n_bond 2'),
    mask=(mask, 'n_atom'),
    bond_mask=(bond_mask, 'n_bond'),
  )
  checks.check_dtypes('bool', mask=mask, bond_mask=bond_mask)
  checks.check_dtypes('integer', bonds=bonds)
  first, second = bonds[:, 0], bonds[:, 1]
  keep = mask[first] & mask[second]
  if bond_mask is not None:
    keep = keep & bond_mask

  def length(x: jax.Array) -> jax.Array:
    x = numerics.at_least_float32(x)
    return _norm(jnp.where(keep[:, None], x[first] - x[second], 0))

  squares = jnp.square(length(denoised) - length(true))
  return jnp.sum(squares) / jnp.maximum(jnp.sum(keep), 1)


def _check_version(version: str) -> None:
  if version not in _VERSIONS:
    raise ValueError(f'version: expected one of {_VERSIONS}, got {version!r}')


def _per_sample(name: str, x: jax.Array, like: jax.Array) -> jax.Array:
  """[n_atom, 3] or [num_samples, n_atom, 3] as the latter."""
  if jnp.shape(x) not in (like.shape, like.shape[1:]):
    raise ValueError(
      f'{name}: expected shape {like.shape} or {like.shape[1:]} from '
      f"'denoised', got {jnp.shape(x)}"
    )
  return jnp.broadcast_to(numerics.at_least_float32(x), like.shape)


def _distances(rows: jax.Array, points: jax.Array, shift: float) -> jax.Array:
  """[m, r, 3] and [m, n, 3] to [m, r, n]; differences, as accuracy wants."""
  return _norm(rows[:, :, None] - points[:, None] + shift)


def _norm(x: jax.Array) -> jax.Array:
  """Length along the last axis; its gradient at zero is zero."""
  square = jnp.sum(jnp.square(x), -1)
  is_zero = square == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
