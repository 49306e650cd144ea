import numpy as np

from structattn_jax import data


def test_boltz_features_of_a_complex_fill_whole_windows():
  path, ligand = data.example('1s3v')
  features = data.featurise(data.load_structure(path, ligand=ligand))
  got = data.boltz_atom_features(features)
  n_atom = features.n_atom
  assert len(got.atom_mask) == -(-n_atom // 32) * 32
  assert got.num_tokens == features.n_token
  assert got.atom_mask[:n_atom].all()
  assert not got.atom_mask[n_atom:].any()
  atoms = features.atoms
  np.testing.assert_array_equal(got.atom_to_token[:n_atom], atoms.token_index)
  assert np.all(got.atom_to_token[n_atom:] == -1)
  np.testing.assert_array_equal(got.ref_space_uid[:n_atom], atoms.ref_space_uid)
  # 'N', the first atom of a protein, is nitrogen: 78 - 32 and no more.
  assert got.ref_element[0] == 7
  np.testing.assert_array_equal(got.ref_atom_name_chars[0], [46, 0, 0, 0])


def test_boltz_features_of_padded_batches_mark_padding():
  path, ligand = data.example('1s3v')
  features = data.featurise(data.load_structure(path, ligand=ligand))
  padded = data.boltz_atom_features(data.pad_features(features))
  plain = data.boltz_atom_features(features)
  n_atom = features.n_atom
  for name in ('ref_pos', 'ref_element', 'atom_to_token', 'atom_mask'):
    want = getattr(plain, name)[:n_atom]
    np.testing.assert_array_equal(getattr(padded, name)[:n_atom], want)
  assert np.all(padded.ref_element[n_atom:] == -1)
  assert not padded.atom_mask[n_atom:].any()
