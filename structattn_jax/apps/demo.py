"""The five systems on one real complex: what `structattn run` does.

Inputs are fixed random projections of real features (residue types, frames,
reference atoms, sequence and SMILES tokens) and weights are freshly initialised
from a seed: the run shows that everything works and how exactly, not what a
trained model would predict.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax import data, testing
from structattn_jax.network import pallatom
from structattn_jax.network.alphafold2 import invariant_point_attention as ipa
from structattn_jax.network.sedd import dual_track as sedd
from structattn_jax.network.seeds import token_atom_attention as taa
from structattn_jax.network.seeds import token_attention_pool as boltz
from structattn_jax.verification import systems

# Larger complexes are cut to this many tokens, so that any file runs within
# minutes on two cores; the oracles are loops.
MAX_TOKENS = 512

# Channels of the activations; the seeds' sizes where they name any.
_C_SINGLE, _C_PAIR, _C_ATOM, _C_TOKEN = 128, 64, 64, 128
# Pallatom keeps [n_atom, n_nbr, ...] lists: its training configuration's size.
_C_SPARSE_ATOM, _C_SPARSE_PAIR = 16, 4
# Residues further apart than this look the same to the pair features (AF2).
_MAX_RELATIVE_POSITION = 32

# Output trees with axes in place of arrays: rows follow the input, or not.
_ROWS: Any = 0
_WHOLE: Any = None


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One system with inputs from a complex and the checks that apply to it.

  Attributes:
    system: the system.
    inputs: arguments of its `apply`.
    frames: names of its frame inputs, (rotation, translation), if it has any:
      the output must not change when all frames move together.
    permutation: arguments of `testing.assert_permutation_equivariant`; None if
      the system depends on the order of its rows.
    padding: arguments of `testing.assert_padding_invariant`.
  """

  system: systems.System
  inputs: Mapping[str, Any]
  padding: Mapping[str, Any]
  frames: tuple[str, str] | None = None
  permutation: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Check:
  """One symmetry or padding check.

  Attributes:
    error: measured, relative to the largest output; infinite if the content
      of masked rows changed an output.
    tolerance: what the library promises.
  """

  error: float
  tolerance: float

  @classmethod
  def of(
    cls,
    tolerance: float,
    check: Callable[..., float],
    *args: Any,
    **options: Any,
  ) -> 'Check':
    """Runs one of the assertions of `testing` and keeps its figure."""
    try:
      error = check(*args, **options, tolerance=float('inf'))
    except AssertionError:
      error = float('inf')
    return cls(error, tolerance)

  @property
  def ok(self) -> bool:
    """Whether the error is within tolerance."""
    return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Report:
  """What was measured for one system.

  Attributes:
    name: short identifier of the system.
    title: what it is.
    algorithm: where the formula stands.
    inputs: shape of every array input.
    num_parameters: number of parameter values.
    compile_ms: milliseconds to trace, lower and compile.
    run_ms: milliseconds of one call, median of five.
    oracle_error: largest difference from the float64 oracle, relative to the
      largest output.
    checks: each symmetry or padding check by name.
  """

  name: str
  title: str
  algorithm: str
  inputs: dict[str, tuple[int, ...]]
  num_parameters: int
  compile_ms: float
  run_ms: float
  oracle_error: float
  checks: dict[str, Check]


def crop(features: data.ComplexFeatures) -> data.ComplexFeatures:
  """Cuts a complex to `MAX_TOKENS`: protein and ligands before all else.

  Args:
    features: a complex of any size.

  Returns:
    The same complex, or its first ligand tokens (at most a quarter of the
    total), its first protein residues, and then whatever comes first.
  """
  if features.n_token <= MAX_TOKENS:
    return features
  is_ligand, is_protein = features.tokens.is_ligand, features.tokens.is_protein
  num_ligand = min(int(is_ligand.sum()), MAX_TOKENS // 4)
  kept_ligand = is_ligand & (np.cumsum(is_ligand) <= num_ligand)
  num_protein = min(int(is_protein.sum()), MAX_TOKENS - num_ligand)
  kept_protein = is_protein & (np.cumsum(is_protein) <= num_protein)
  other = ~is_ligand & ~is_protein
  num_other = MAX_TOKENS - num_ligand - num_protein
  keep = kept_ligand | kept_protein | (other & (np.cumsum(other) <= num_other))
  new_index = np.cumsum(keep, dtype=np.int32) - 1
  atoms = jax.tree.map(
    lambda x: x[keep[features.atoms.token_index]], features.atoms
  )
  return dataclasses.replace(
    features,
    tokens=jax.tree.map(lambda x: x[keep], features.tokens),
    atoms=dataclasses.replace(atoms, token_index=new_index[atoms.token_index]),
  )


def experiments(
  features: data.ComplexFeatures, smiles: str, *, seed: int = 0
) -> dict[str, Experiment]:
  """Builds the inputs of all five systems.

  Args:
    features: a complex with protein, unpadded.
    smiles: SMILES of the ligand; may be empty.
    seed: of the random projections.

  Returns:
    {system name: experiment}.
  """
  embed = _Projector(seed)
  protein = data.protein_only(features)
  made = (
    _ipa_experiment(protein, embed),
    _cross_attention_experiment(features, embed),
    _token_attention_experiment(features, embed),
    _atom_transformer_experiment(features, embed),
    _dual_track_experiment(features, smiles),
  )
  return {experiment.system.name: experiment for experiment in made}


def init_params(
  chosen: Mapping[str, Experiment], seed: int
) -> dict[str, hk.Params]:
  """Fresh parameters of every experiment from a key of this seed."""
  # The default generator takes seconds to compile for every layer.
  key = jax.random.key(seed, impl='unsafe_rbg')
  params = {}
  for name, experiment in chosen.items():
    init = experiment.system.transformed.init
    params[name] = jax.jit(lambda key, inputs, init=init: init(key, **inputs))(
      key, dict(experiment.inputs)
    )
  return params


def run(
  chosen: Mapping[str, Experiment],
  params: Mapping[str, hk.Params],
  *,
  seed: int = 0,
  progress: Callable[[str], None] = lambda message: None,
) -> Iterator[Report]:
  """Runs experiments under `jax.jit` and measures them.

  Args:
    chosen: from `experiments`.
    params: of each, from `init_params`.
    seed: of the checks.
    progress: called with a message before each longer step.

  Yields:
    A report per system. A check over its tolerance is in it, not an error.
  """
  # TF32 units would hide the errors that this run is meant to show.
  with jax.default_matmul_precision('highest'):
    for name, experiment in chosen.items():
      progress(experiment.system.title)
      yield _measure(experiment, params[name], seed)


def _measure(experiment: Experiment, params: hk.Params, seed: int) -> Report:
  system, inputs = experiment.system, dict(experiment.inputs)

  def call(params: Any, inputs: Mapping[str, Any]) -> Any:
    return system.transformed.apply(params, **inputs)

  apply = jax.jit(call)
  start = time.perf_counter()
  compiled = apply.lower(params, inputs).compile()
  compile_ms = 1e3 * (time.perf_counter() - start)
  output = jax.block_until_ready(compiled(params, inputs))
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(compiled(params, inputs))
    seconds.append(time.perf_counter() - start)

  return Report(
    name=system.name,
    title=system.title,
    algorithm=system.algorithm,
    inputs={
      name: np.shape(value)
      for name, value in inputs.items()
      if value is not None
    },
    num_parameters=sum(x.size for x in jax.tree.leaves(params)),
    compile_ms=compile_ms,
    run_ms=1e3 * statistics.median(seconds),
    oracle_error=_relative_error(output, system.oracle(params, inputs)),
    checks=_checks(experiment, lambda **inputs: apply(params, inputs), seed),
  )


def _checks(
  experiment: Experiment, fn: Callable[..., Any], seed: int
) -> dict[str, Check]:
  """Measured errors of all checks that apply."""
  key, checks = jax.random.key(seed), {}
  if experiment.frames:
    names = experiment.frames
    others = {k: v for k, v in experiment.inputs.items() if k not in names}

    def of_frames(rotation: jax.Array, translation: jax.Array) -> Any:
      moved = dict(zip(names, (rotation, translation), strict=True))
      return fn(**others, **moved)

    rotation, translation = (experiment.inputs[name] for name in names)
    # Wherever the file has its origin: the check moves the complex itself, and
    # float32 rounds what is far away.
    translation = translation - translation.mean(0)
    # Rounding the moved coordinates to float32 costs 1e-5 A at 100 A and
    # 1e-3 A at 10,000 A; the tolerances are the library's promise.
    for shift, tolerance in ((100.0, 1e-5), (10_000.0, 1e-3)):
      checks[f'SE(3), {shift:.0f} A'] = Check.of(
        tolerance,
        testing.assert_se3_invariant,
        of_frames,
        rotation,
        translation,
        key=key,
        shift=shift,
      )
  inputs = experiment.inputs
  if experiment.permutation:
    axes = experiment.permutation['axes']
    # One row has no other order.
    if all(len(inputs[name]) > 1 for name in axes):
      checks['permutation'] = Check.of(
        1e-5,
        testing.assert_permutation_equivariant,
        fn,
        inputs,
        key=key,
        num_samples=1,
        **experiment.permutation,
      )
  checks['padding'] = Check.of(
    1e-5,
    testing.assert_padding_invariant,
    fn,
    inputs,
    key=key,
    **experiment.padding,
  )
  return checks


def _relative_error(got: Any, want: Any) -> float:
  """Largest difference over the largest value, of the worst output."""
  errors = jax.tree.map(
    lambda g, w: np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max(),
    got,
    want,
  )
  return max(map(float, jax.tree.leaves(errors)))


class _Projector:
  """Fixed random linear maps from features to activations of unit variance."""

  def __init__(self, seed: int):
    self._rng = np.random.default_rng(seed)

  def __call__(self, *features: np.ndarray, size: int) -> np.ndarray:
    stacked = np.concatenate(features, -1)
    weights = self._rng.standard_normal((stacked.shape[-1], size))
    projected = stacked @ weights
    return (projected / projected.std()).astype(np.float32)


def _one_hot(index: np.ndarray, size: int) -> np.ndarray:
  return np.eye(size)[np.clip(index, 0, size - 1)]


def _ipa_experiment(
  protein: data.ProteinFeatures, embed: _Projector
) -> Experiment:
  # AF2 Suppl. Alg. 4: pairs know their distance along the chain.
  offset = protein.residue_index[:, None] - protein.residue_index
  limit = _MAX_RELATIVE_POSITION
  relative = np.where(
    protein.chain_index[:, None] == protein.chain_index,
    np.clip(offset, -limit, limit) + limit,
    2 * limit + 1,
  )
  residue = _one_hot(protein.residue_type, len(data.AMINO_ACID_LETTERS) + 1)
  names = ('single', 'pair', 'rotation', 'translation', 'mask')
  values = (
    embed(residue, size=_C_SINGLE),
    embed(_one_hot(relative, 2 * limit + 2), size=_C_PAIR),
    protein.rotation,
    protein.translation,
    protein.mask & protein.frame_mask,
  )
  axes = dict(zip(names, (0, (0, 1), 0, 0, 0), strict=True))
  return Experiment(
    systems.invariant_point_attention(ipa.InvariantPointAttentionConfig.seed()),
    dict(zip(names, values, strict=True)),
    frames=('rotation', 'translation'),
    permutation={'axes': axes, 'output_axes': 0},
    padding={
      'axes': axes,
      'masks': ('mask',),
      'output_axes': 0,
      'fill': {'rotation': np.eye(3)},
    },
  )


def _atom_features(features: data.ComplexFeatures) -> tuple[np.ndarray, ...]:
  """What AF3 Suppl. Alg. 5, line 1 concatenates."""
  atoms = features.atoms
  names = _one_hot(atoms.ref_atom_name_chars, 64)
  return (
    atoms.ref_pos,
    np.arcsinh(atoms.ref_charge)[:, None],
    atoms.ref_mask[:, None],
    _one_hot(atoms.ref_element, 128),
    names.reshape(features.n_atom, -1),
  )


def _cross_attention_experiment(
  features: data.ComplexFeatures, embed: _Projector
) -> Experiment:
  atoms, tokens = features.atoms, features.tokens
  atom_axes = {'atoms': 0, 'atom_to_token': 0, 'atom_mask': 0}
  output_axes = taa.TokenAtomAttentionOutput(atoms=_ROWS, tokens=_WHOLE)
  return Experiment(
    systems.token_atom_attention(
      taa.TokenAtomAttentionConfig(
        max_atoms_per_token=_max_atoms_per_token(features)
      )
    ),
    {
      'atoms': embed(*_atom_features(features), size=_C_ATOM),
      'tokens': embed(
        _one_hot(tokens.residue_type, len(data.RESIDUE_TYPES)),
        tokens.is_ligand[:, None],
        size=_C_TOKEN,
      ),
      'atom_to_token': atoms.token_index,
      'atom_mask': atoms.mask,
    },
    permutation={'axes': atom_axes, 'output_axes': output_axes},
    padding={
      'axes': atom_axes,
      'masks': ('atom_mask',),
      'output_axes': output_axes,
    },
  )


def _token_attention_experiment(
  features: data.ComplexFeatures, embed: _Projector
) -> Experiment:
  axes = {'atom_features': 0, 'atom_to_token': 0, 'atom_mask': 0}
  return Experiment(
    systems.token_attention_pool(
      boltz.TokenAttentionPoolConfig(
        max_atoms_per_token=_max_atoms_per_token(features)
      ),
      features.n_token,
    ),
    {
      'atom_features': embed(*_atom_features(features), size=_C_ATOM),
      'atom_to_token': features.atoms.token_index,
      'atom_mask': features.atoms.mask,
    },
    permutation={'axes': axes, 'output_axes': None},
    padding={'axes': axes, 'masks': ('atom_mask',), 'output_axes': None},
  )


def _max_atoms_per_token(features: data.ComplexFeatures) -> int:
  return int(np.bincount(features.atoms.token_index).max())


def _atom_transformer_experiment(
  features: data.ComplexFeatures, embed: _Projector
) -> Experiment:
  atoms = features.atoms
  neighbours, valid = map(
    np.asarray, pallatom.build_sparse_pairs(atoms.token_index)
  )
  chain = features.tokens.chain_index[atoms.token_index]
  # The encoder's rule: only atoms of one chain see each other.
  valid = valid & (chain[:, None] == chain[neighbours])
  offset = atoms.position[:, None] - atoms.position[neighbours]
  closeness = 1 / (1 + np.sum(offset**2, -1, keepdims=True))
  axes = {'q': 0, 'c': 0, 'p': 0, 'neighbor_idx': 0, 'valid_mask': 0}
  return Experiment(
    systems.atom_transformer(pallatom.AtomTransformerConfig()),
    {
      'q': embed(atoms.position, size=_C_SPARSE_ATOM),
      'c': embed(*_atom_features(features), size=_C_SPARSE_ATOM),
      'p': embed(offset, closeness, size=_C_SPARSE_PAIR),
      'neighbor_idx': neighbours,
      'valid_mask': valid,
    },
    permutation={
      'axes': axes,
      'index_of': ('neighbor_idx',),
      'output_axes': 0,
    },
    padding={'axes': axes, 'masks': ('valid_mask',), 'output_axes': 0},
  )


def _dual_track_experiment(
  features: data.ComplexFeatures, smiles: str
) -> Experiment:
  if features.metadata is None:
    raise ValueError('features: expected metadata, as `data.featurise` gives')
  protein = features.metadata.sequences[0].token_ids[:MAX_TOKENS]
  ligand = data.SmilesTokenizer.from_smiles([smiles]).encode(smiles)
  config = sedd.DualTrackConfig(
    hidden_size=256, num_head=4, num_block=4, cond_dim=128
  )
  return Experiment(
    systems.dual_track(config),
    {
      'protein_tokens': protein,
      'ligand_tokens': ligand[:MAX_TOKENS],
      'sigma': jnp.float32(0.5),
      'protein_mask': np.ones(protein.shape, bool),
      'ligand_mask': np.ones(ligand[:MAX_TOKENS].shape, bool),
    },
    padding={
      'axes': {'protein_tokens': 0, 'protein_mask': 0},
      'masks': ('protein_mask',),
      'output_axes': sedd.DualTrackOutput(protein=_ROWS, ligand=_WHOLE),
    },
  )
