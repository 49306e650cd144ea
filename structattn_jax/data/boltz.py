"""Inputs of Boltz's atom attention from the features of a complex."""

from __future__ import annotations

from typing import Any

import numpy as np

from structattn_jax.data.feature_types import ComplexFeatures
from structattn_jax.network.boltz.features import BoltzAtomFeatures

_NUM_ELEMENTS = 128


def boltz_atom_features(
  features: ComplexFeatures, *, atoms_per_window: int = 32
) -> BoltzAtomFeatures:
  """The atoms of a complex, padded to a whole number of windows.

  Mirrors boltz `data/feature/featurizer.py` `process_atom_features` @ 832486d,
  with these differences: only heavy atoms that the file has are listed;
  conformers are the component dictionary's ideal coordinates, centred and not
  turned at random; backbone and residue features of Boltz-2, which the released
  model does not use, are left out.

  Args:
    features: of `featurise`; padding must come after all real atoms.
    atoms_per_window: query atoms per window.

  Returns:
    The features, as NumPy arrays. Reference positions and charges are zero for
    atoms that the component dictionary does not have.
  """
  atoms = features.atoms
  known = atoms.ref_mask & atoms.mask
  arrays: dict[str, Any] = {
    'ref_pos': np.where(known[:, None], atoms.ref_pos, 0).astype(np.float32),
    'ref_charge': np.where(atoms.mask, atoms.ref_charge, 0).astype(np.float32),
    'ref_element': np.where(
      atoms.mask, np.minimum(atoms.ref_element, _NUM_ELEMENTS - 1), -1
    ).astype(np.int32),
    'ref_atom_name_chars': np.where(
      atoms.mask[:, None], atoms.ref_atom_name_chars, -1
    ).astype(np.int32),
    'ref_space_uid': np.where(atoms.mask, atoms.ref_space_uid, 0),
    'atom_mask': atoms.mask,
    'atom_to_token': np.where(atoms.mask, atoms.token_index, -1),
  }
  own = BoltzAtomFeatures(**arrays, num_tokens=features.n_token)
  n_window = -(-len(atoms.mask) // atoms_per_window)
  return own.pad(n_window * atoms_per_window)
