"""Boltz's atom features and configurations of its atom attention.

Mirrors the features of boltz `data/feature/featurizer.py` and
`featurizerv2.py` @ 832486d, with indices for upstream's one-hot vectors.

Shapes: n_atom atoms; n_token tokens.
Units: positions in angstrom, charges in elementary charges.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks

Implementation = Literal['published', 'blocked']

NUM_ELEMENTS, NUM_NAME_CHARS, NUM_BACKBONE = 128, 64, 17
NUM_RES_TYPES, NUM_MOL_TYPES = 33, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boltz1AtomAttentionConfig(base_config.BaseConfig):
  """Atom attention of Boltz-1; names are those of upstream's configuration.

  Attributes:
    atom_s: channels of atoms.
    atom_z: channels of pairs of atoms.
    token_s: channels of the trunk's single.
    token_z: channels of the trunk's pair.
    atoms_per_window_queries: n_query, even.
    atoms_per_window_keys: n_key, a multiple of n_query.
    atom_encoder_depth: layers of the encoder.
    atom_encoder_heads: heads of the encoder.
    atom_decoder_depth: layers of the decoder; 0: no decoder.
    atom_decoder_heads: heads of the decoder.
    bfloat16: whether activations of atoms are bfloat16; the pair of atoms,
      logits, norms and coordinates stay float32.
    structure_prediction: whether the trunk and noisy positions come in and
      there may be a decoder; False is the input embedder.
    implementation: how pair biases are computed: 'published' holds the pair of
      all windows, 'blocked' that of one and recomputes it in the backward pass
      (reverse mode only). None: 'blocked' on CPU, else 'published'. The choice
      changes rounding only.
  """

  atom_s: int = 128
  atom_z: int = 16
  token_s: int = 384
  token_z: int = 128
  atoms_per_window_queries: int = 32
  atoms_per_window_keys: int = 128
  atom_encoder_depth: int = 3
  atom_encoder_heads: int = 4
  atom_decoder_depth: int = 3
  atom_decoder_heads: int = 4
  structure_prediction: bool = True
  bfloat16: bool = False
  implementation: Implementation | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    name = type(self).__name__
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = 0 if field.name == 'atom_decoder_depth' else 1
      if type(value) is int and value < least:
        raise ValueError(
          f'{name}.{field.name}: expected at least {least}, got {value}'
        )
    n_query, n_key = self.atoms_per_window_queries, self.atoms_per_window_keys
    if n_query % 2 or n_key % n_query:
      raise ValueError(
        f'{name}.atoms_per_window_keys: expected a multiple of an even '
        f'atoms_per_window_queries={n_query}, got {n_key}'
      )
    for part in ('encoder', 'decoder'):
      heads = getattr(self, f'atom_{part}_heads')
      if self.atom_s % heads:
        raise ValueError(
          f'{name}.atom_s={self.atom_s} must be divisible by '
          f'atom_{part}_heads={heads}'
        )

  @property
  def has_decoder(self) -> bool:
    """Whether there is a decoder."""
    return self.structure_prediction and self.atom_decoder_depth > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boltz2AtomAttentionConfig(Boltz1AtomAttentionConfig):
  """As `Boltz1AtomAttentionConfig`, and what Boltz-2 adds.

  Attributes:
    use_no_atom_char: whether atom names are left out.
    use_atom_backbone_feat: whether the kind of backbone atom is embedded.
    use_residue_feats_atoms: whether features of the token are embedded.
    transformer_post_layer_norm: whether layers of the encoder end with a layer
      norm.
    decoder_post_layer_norm: the same for the decoder, which then has none
      before its output; upstream never sets it.
    token_transformer_depth: layers of the token transformer, for its biases.
    token_transformer_heads: heads of the token transformer.
    conditioning_transition_layers: transitions of the pair conditioning.
  """

  use_no_atom_char: bool = False
  use_atom_backbone_feat: bool = False
  use_residue_feats_atoms: bool = False
  transformer_post_layer_norm: bool = False
  decoder_post_layer_norm: bool = False
  token_transformer_depth: int = 24
  token_transformer_heads: int = 16
  conditioning_transition_layers: int = 2


Config = Boltz1AtomAttentionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoltzAtomFeatures:
  """Atoms of one complex as Boltz's featuriser describes them.

  Attributes:
    ref_pos: [n_atom, 3] float, reference conformers in angstrom.
    ref_charge: [n_atom] float, formal charge.
    ref_element: [n_atom] integer, atomic number below 128; negative: none.
    ref_atom_name_chars: [n_atom, 4] integer, ord(c) - 32 below 64, 0 for
      missing characters; negative: none.
    ref_space_uid: [n_atom] integer, which atoms share a reference conformer.
    atom_mask: [n_atom] bool, True for real atoms.
    atom_to_token: [n_atom] integer below num_tokens, in any order, though
      atoms of a token should stand together; negative: none.
    atom_backbone_feat: [n_atom] integer below 17, or None; Boltz-2's
      `use_atom_backbone_feat`; negative: none.
    res_type: [n_token] integer below 33, or None; Boltz-2's
      `use_residue_feats_atoms`, as the next two.
    modified: [n_token] bool, whether the residue is modified, or None.
    mol_type: [n_token] integer below 4, or None.
    num_tokens: static, n_token.
  """

  ref_pos: jax.Array
  ref_charge: jax.Array
  ref_element: jax.Array
  ref_atom_name_chars: jax.Array
  ref_space_uid: jax.Array
  atom_mask: jax.Array
  atom_to_token: jax.Array
  atom_backbone_feat: jax.Array | None = None
  res_type: jax.Array | None = None
  modified: jax.Array | None = None
  mol_type: jax.Array | None = None
  num_tokens: int = dataclasses.field(
    default=0, kw_only=True, metadata={'static': True}
  )

  @classmethod
  def from_upstream(cls, feats: Mapping[str, Any]) -> 'BoltzAtomFeatures':
    """Converts upstream's features of one complex on the host.

    Args:
      feats: upstream's names, without the batch axis; one-hot arrays become
        indices, all-zero rows -1.

    Returns:
      The features, as NumPy arrays.

    Raises:
      ValueError: on a missing name or a row that is not one-hot.
    """
    names = ('ref_pos', 'ref_charge', 'ref_space_uid', 'atom_pad_mask')
    one_hot = ('ref_element', 'ref_atom_name_chars', 'atom_to_token')
    for name in (*names, *one_hot):
      if name not in feats:
        raise ValueError(f'feats: expected {name!r}, got {sorted(feats)}')
    arrays: dict[str, Any] = {
      name: _index_of_one_hot(name, feats[name])
      for name in (*one_hot, 'atom_backbone_feat', 'res_type')
      if feats.get(name) is not None
    }
    for name, dtype in (('modified', bool), ('mol_type', np.int32)):
      if feats.get(name) is not None:
        arrays[name] = np.asarray(feats[name]).astype(dtype)
    arrays |= {
      'ref_pos': _floating(feats['ref_pos']),
      'ref_charge': _floating(feats['ref_charge']),
      'ref_space_uid': np.asarray(feats['ref_space_uid']).astype(np.int32),
      'atom_mask': np.asarray(feats['atom_pad_mask']) > 0,
    }
    return cls(**arrays, num_tokens=np.shape(feats['atom_to_token'])[-1])

  def pad(self, n_atom: int) -> 'BoltzAtomFeatures':
    """Adds padding atoms on the host, to make n_atom a multiple of n_query.

    Raises:
      ValueError: if there are more atoms than that.
    """
    rest = n_atom - self.atom_mask.shape[0]
    if rest < 0:
      raise ValueError(
        f'n_atom: expected at least {self.atom_mask.shape[0]}, got {n_atom}'
      )
    fill = {
      'ref_element': -1,
      'ref_atom_name_chars': -1,
      'atom_to_token': -1,
      'atom_backbone_feat': -1,
    }
    padded = {}
    for name in _ATOM_SHAPES:
      x = getattr(self, name)
      if x is not None:
        pad = ((0, rest), *[(0, 0)] * (np.ndim(x) - 1))
        padded[name] = np.pad(x, pad, constant_values=fill.get(name, 0))
    return dataclasses.replace(self, **padded)


_ATOM_SHAPES = {
  'ref_pos': 'n_atom 3',
  'ref_charge': 'n_atom',
  'ref_element': 'n_atom',
  'ref_atom_name_chars': 'n_atom 4',
  'ref_space_uid': 'n_atom',
  'atom_mask': 'n_atom',
  'atom_to_token': 'n_atom',
  'atom_backbone_feat': 'n_atom',
}
_TOKEN_SHAPES = {'res_type': 'n_token', 'modified': 'n_token'}
_TOKEN_SHAPES['mol_type'] = 'n_token'


def without_padding(features: BoltzAtomFeatures) -> BoltzAtomFeatures:
  """Takes padding atoms, whatever they hold, out of all tokens."""
  index = jnp.asarray(features.atom_to_token)
  return dataclasses.replace(
    features, atom_to_token=jnp.where(features.atom_mask, index, -1)
  )


# Checks.


def check_inputs(
  config: Config,
  features: BoltzAtomFeatures,
  single: jax.Array | None,
  pair: jax.Array | None,
) -> None:
  """Shapes and dtypes of what does not depend on samples.

  Raises:
    ValueError: on a wrong shape, something missing, or a number of atoms that
      is not a multiple of n_query.
    TypeError: on a wrong dtype.
  """
  arrays = {
    name: (getattr(features, name), shape)
    for name, shape in (_ATOM_SHAPES | _TOKEN_SHAPES).items()
  }
  sizes = checks.check_shapes(
    {
      'n_token': features.num_tokens,
      'token_s': config.token_s,
      'token_z': config.token_z,
    },
    **arrays,
    single=(single, 'n_token token_s'),
    pair=(pair, 'n_token n_token token_z'),
  )
  kinds = dict.fromkeys(arrays, 'integer')
  for name in ('ref_pos', 'ref_charge'):
    kinds[name] = 'floating'
  for name in ('atom_mask', 'modified'):
    kinds[name] = 'bool'
  for name, kind in kinds.items():
    checks.check_dtypes(kind, **{name: arrays[name][0]})
  checks.check_dtypes('floating', single=single, pair=pair)
  for name, x in (('single', single), ('pair', pair)):
    if (x is None) == config.structure_prediction:
      raise ValueError(
        f'{name}: expected {"an array" if x is None else "None"} with '
        f'structure_prediction={config.structure_prediction}'
      )
  n_atom, n_query = sizes['n_atom'], config.atoms_per_window_queries
  if n_atom % n_query:
    more = -(-n_atom // n_query) * n_query
    raise ValueError(
      f'ref_pos: expected a multiple of atoms_per_window_queries={n_query} '
      f'atoms, got {n_atom}; use features.pad({more})'
    )
  needed = []
  if isinstance(config, Boltz2AtomAttentionConfig):
    needed += ['atom_backbone_feat'] * config.use_atom_backbone_feat
    needed += [*_TOKEN_SHAPES] * config.use_residue_feats_atoms
  for name in needed:
    if getattr(features, name) is None:
      raise ValueError(f'{name}: expected an array, got None')


def check_positions(
  config: Config, positions: jax.Array | None, queries: jax.Array
) -> None:
  """Shape and dtype of noisy positions, and whether there should be any."""
  if (positions is None) == config.structure_prediction:
    raise ValueError(
      f'positions: expected {"an array" if positions is None else "None"} with '
      f'structure_prediction={config.structure_prediction}'
    )
  checks.check_shapes(
    {'n_atom': queries.shape[0]}, positions=(positions, 'n_atom 3')
  )
  checks.check_dtypes('floating', positions=positions)


def check_decoder_inputs(
  config: Config, token_act: jax.Array, atoms: jax.Array, num_tokens: int
) -> None:
  """Shapes and dtypes of what is decoded."""
  checks.check_shapes(
    {
      'n_token': num_tokens,
      'c_token': 2 * config.token_s,
      'atom_s': config.atom_s,
    },
    token_act=(token_act, 'n_token c_token'),
    atoms=(atoms, 'n_atom atom_s'),
  )
  checks.check_dtypes('floating', token_act=token_act, atoms=atoms)


def _index_of_one_hot(name: str, x: Any) -> np.ndarray:
  """Index of the one in each row; -1 for rows of zeros."""
  x = np.asarray(x)
  if not np.isin(x, (0, 1)).all() or (x.sum(-1, dtype=np.int64) > 1).any():
    raise ValueError(f'{name}: expected one-hot rows or rows of zeros')
  return np.where(x.any(-1), x.argmax(-1), -1).astype(np.int32)


def _floating(x: Any) -> np.ndarray:
  x = np.asarray(x)
  return x if x.dtype.kind == 'f' else x.astype(np.float32)
