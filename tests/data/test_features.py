"""Feature batches: tokens, frames, reference conformers, examples."""

import dataclasses
import gzip
import hashlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from structattn_jax import data


def _assert_same(left, right):
  leaves = zip(
    jax.tree_util.tree_leaves_with_path(left),
    jax.tree.leaves(right),
    strict=True,
  )
  for (path, a), b in leaves:
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope='module')
def dhfr():
  files = data.example('1s3v')
  structure = data.load_structure(files.structure, ligand=files.ligand)
  return structure, data.featurise(structure)


def _check_invariants(features):
  tokens, atoms = features.tokens, features.atoms
  assert (np.diff(atoms.token_index) >= 0).all()
  np.testing.assert_array_equal(
    np.unique(atoms.token_index), np.arange(features.n_token)
  )
  flags = np.stack(
    [tokens.is_protein, tokens.is_nucleic, tokens.is_ligand, tokens.is_modified]
  )
  np.testing.assert_array_equal(flags.sum(axis=0), 1)
  gram = np.einsum('nij,nik->njk', tokens.rotation, tokens.rotation)
  np.testing.assert_allclose(gram, np.eye(3)[None] + 0 * gram, atol=3e-7)
  np.testing.assert_allclose(np.linalg.det(tokens.rotation), 1.0, atol=5e-7)
  no_frame = tokens.rotation[~tokens.frame_mask]
  np.testing.assert_array_equal(no_frame, np.eye(3)[None] + 0 * no_frame)
  np.testing.assert_array_equal(
    atoms.ref_space_uid, tokens.residue_uid[atoms.token_index]
  )
  for uid in np.unique(atoms.ref_space_uid):
    rows = (atoms.ref_space_uid == uid) & atoms.ref_mask
    if rows.any():
      np.testing.assert_allclose(atoms.ref_pos[rows].mean(0), 0.0, atol=1e-5)
  np.testing.assert_array_equal(atoms.ref_pos[~atoms.ref_mask], 0.0)
  for leaf in jax.tree.leaves(features):
    assert leaf.dtype in (np.int32, np.float32, np.bool_)


def test_example_1s3v_has_the_counts_of_the_files(dhfr):
  _, features = dhfr
  tokens, atoms = features.tokens, features.atoms
  assert tokens.is_protein.sum() == 186
  assert tokens.is_protein[atoms.token_index].sum() == 1502
  assert tokens.is_ligand.sum() == 27
  assert (features.n_token, features.n_atom) == (213, 1529)
  assert tokens.frame_mask.sum() == 186
  assert atoms.ref_mask.all()
  assert features.metadata.chain_ids == ('A', 'L1')
  (sequence,) = features.metadata.sequences
  assert sequence.sequence.startswith('VGSLNCIVAVSQNMGIGKNGDLPWPPLRNEF')
  assert sequence.token_ids[[0, 1, 2, -1]].tolist() == [0, 7, 6, 2]
  (ligand,) = features.metadata.ligands
  assert (ligand.residue_name, ligand.token_start, ligand.n_token) == (
    'TQD',
    186,
    27,
  )
  _check_invariants(features)


def test_example_1tqh_has_the_counts_of_the_entry():
  structure = data.load_structure(data.example('1tqh').structure)
  features = data.featurise(structure)
  assert features.tokens.is_protein.sum() == 242
  assert features.n_atom == 2129 - 153  # All atoms but the waters.
  assert [(x.residue_name, x.n_token) for x in features.metadata.ligands] == [
    ('SO4', 5),
    ('SO4', 5),
    ('4PA', 7),
  ]
  assert features.atoms.ref_charge[features.atoms.ref_element == 8].sum() == -4
  _check_invariants(features)


def test_examples_match_their_provenance_note():
  folder = data.example('1s3v').structure.parent
  note = (folder / 'PROVENANCE.md').read_text()
  recorded = re.findall(r'^([0-9a-f]{64})  (\S+)$', note, flags=re.MULTILINE)
  assert len(recorded) == 3
  for digest, name in recorded:
    content = (folder / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest, name
  with pytest.raises(ValueError, match='1s3v, 1tqh'):
    data.example('2abc')


def test_smiles_of_examples(dhfr):
  from rdkit import Chem as chem

  (ligand,) = data.ligand_smiles(dhfr[0])
  # Flat formula: the deposited centres are nearly planar.
  flat = chem.MolFromSmiles(ligand.smiles)
  assert flat.GetNumHeavyAtoms() == 27
  assert (
    chem.MolToSmiles(flat, isomericSmiles=False)
    == 'COc1cc(N(C)CC2CCC3=C(C2)C(N)=NC(N)N3)cc(OC)c1OC'
  )
  structure = data.load_structure(data.example('1tqh').structure)
  assert [entry.smiles for entry in data.ligand_smiles(structure)] == [
    'O=S(=O)([O-])[O-]',
    'O=S(=O)([O-])[O-]',
    'CCCOC(C)=O',
  ]


def test_frame_axes_by_hand(pdb, write):
  # C on +x of CA, N in the upper half of the xy plane: the identity.
  pdb.atom('N', 'ALA', 1, (4.5, 6.3, 6.0))
  pdb.atom('CA', 'ALA', 1, (5.0, 5.0, 6.0))
  pdb.atom('C', 'ALA', 1, (6.5, 5.0, 6.0))
  # The same turned by 90 degrees about z: x -> y, y -> -x.
  pdb.atom('N', 'ALA', 2, (-1.3, -0.5, 1.0), chain='B')
  pdb.atom('CA', 'ALA', 2, (0.0, 0.0, 1.0), chain='B')
  pdb.atom('C', 'ALA', 2, (0.0, 1.5, 1.0), chain='B')
  tokens = data.featurise(data.load_structure(write(pdb))).tokens
  turned = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
  np.testing.assert_allclose(tokens.rotation, [np.eye(3), turned], atol=1e-7)
  np.testing.assert_array_equal(tokens.translation, [[5, 5, 6], [0, 0, 1]])


def test_frame_maps_ideal_backbone_onto_the_residue(dhfr):
  structure, features = dhfr
  token = 10
  rows = structure.atom_residue == token
  xyz = dict(
    zip(structure.atom_name[rows], structure.position[rows], strict=True)
  )
  rotation = features.tokens.rotation[token].astype(np.float64)
  local = {name: rotation.T @ (x - xyz['CA']) for name, x in xyz.items()}
  assert local['C'][0] == pytest.approx(1.52, abs=0.04)
  np.testing.assert_allclose(local['C'][1:], 0.0, atol=1e-5)
  assert local['N'][1] > 1.3
  assert local['N'][2] == pytest.approx(0.0, abs=1e-5)
  # L amino acids have CB on the negative side of the plane.
  assert local['CB'][2] < -1.0


@pytest.mark.parametrize('missing', ['N', 'CA', 'C'])
def test_missing_backbone_atom_clears_the_frame_mask(pdb, write, missing):
  pdb.residue('ALA', 1)
  names = tuple(n for n in ('N', 'CA', 'C', 'O') if n != missing)
  pdb.residue('ALA', 2, names=names)
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.tokens.frame_mask.tolist() == [True, False]
  np.testing.assert_array_equal(features.tokens.translation[1], 0.0)
  _check_invariants(features)


def test_collinear_backbone_clears_the_frame_mask(pdb, write):
  for i, name in enumerate(('N', 'CA', 'C')):
    pdb.atom(name, 'ALA', 1, (1.4 * i, 0, 0))
  features = data.featurise(data.load_structure(write(pdb)))
  assert not features.tokens.frame_mask.any()
  _check_invariants(features)


def test_selenomethionine_is_methionine(pdb, write):
  pdb.residue('ALA', 1)
  pdb.residue('MSE', 2, hetero=True)
  pdb.atom('SE', 'MSE', 2, (9, 9, 9), element='SE', hetero=True)
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.metadata.sequences[0].sequence == 'AM'
  assert features.tokens.is_protein.all()
  assert features.tokens.frame_mask.all()
  assert data.RESIDUE_TYPES[features.tokens.residue_type[1]] == 'MET'
  assert features.atoms.ref_element[-1] != 34
  assert 16 in features.atoms.ref_element
  assert features.atoms.ref_mask.all()


def test_selenomethionine_between_gaps_is_protein(pdb, write):
  pdb.residue('ALA', 1).residue('MSE', 20, hetero=True)
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.tokens.is_protein.tolist() == [True, True]


def test_phosphoserine_is_one_token_per_atom(pdb, write):
  pdb.residue('ALA', 1)
  pdb.residue('SEP', 2, hetero=True)
  pdb.atom('OG', 'SEP', 2, (9, 1, 1), hetero=True)
  pdb.atom('P', 'SEP', 2, (9, 2, 2), hetero=True)
  pdb.residue('GLY', 3, names=('N', 'CA', 'C', 'O'))
  features = data.featurise(data.load_structure(write(pdb)))
  tokens = features.tokens
  assert tokens.is_modified.tolist() == [False, *[True] * 7, False]
  assert not tokens.frame_mask[1:8].any()
  assert features.atoms.ref_element[features.atoms.token_index == 7] == 15
  (sequence,) = features.metadata.sequences
  assert sequence.sequence == 'ASG'
  assert sequence.token_index.tolist() == [0, 1, 8]
  assert features.metadata.ligands == ()
  np.testing.assert_array_equal(
    tokens.translation[1:8], features.atoms.position[5:12]
  )
  _check_invariants(features)


def test_nucleotides_are_one_token_each(pdb, write):
  names = ('P', 'OP1', "O5'", "C5'", "C1'", 'N9')
  for number, name in enumerate(('DA', 'G', 'DC'), start=1):
    for i, atom in enumerate(names[: 6 if name != 'DC' else 5]):
      pdb.atom(atom, name, number, (1.4 * i, 9.0 * number, 0), chain='N')
  pdb.residue('ALA', 1)
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.tokens.is_nucleic.tolist() == [True, True, True, False]
  types = [data.RESIDUE_TYPES[i] for i in features.tokens.residue_type]
  assert types == ['DA', 'G', 'DC', 'ALA']
  assert features.atoms.ref_mask.all()
  _check_invariants(features)


def test_glycan_atoms_are_tokens(pdb, write):
  pdb.residue('ASN', 1)
  for i, name in enumerate(('C1', 'C2', 'O5')):
    pdb.atom(name, 'NAG', 900, (1.5 * i, 9, 9), chain='B', hetero=True)
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.tokens.is_ligand.sum() == 3
  assert features.metadata.ligands[0].residue_name == 'NAG'


def test_unknown_residues_fall_back_on_the_file(pdb, write):
  pdb.residue('UNK', 1).residue('ALA', 2)
  pdb.atom('XX1', 'Q~Q', 3, (9, 9, 9), element='BR', hetero=True)
  pdb.atom('C2', 'Q~Q', 3, (9, 9, 11), hetero=True)
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.metadata.sequences[0].sequence == 'XA'
  assert features.tokens.frame_mask.tolist() == [True, True, False, False]
  assert features.atoms.ref_element[-2:].tolist() == [35, 6]
  assert not features.atoms.ref_mask[-2:].any()
  chars = features.atoms.ref_atom_name_chars[-2]
  assert ''.join(chr(c + 32) for c in chars) == 'XX1 '
  _check_invariants(features)


def test_atoms_follow_the_component_unknown_ones_last(pdb, write):
  pdb.atom('ZZZ', 'ALA', 1, (3, 3, 3), element='C')
  for name in ('CB', 'O', 'C', 'CA', 'N'):
    pdb.residue('ALA', 1, names=(name,))
  atoms = data.featurise(data.load_structure(write(pdb))).atoms
  names = [
    ''.join(chr(c + 32) for c in row).strip()
    for row in atoms.ref_atom_name_chars
  ]
  assert names == ['N', 'CA', 'C', 'O', 'CB', 'ZZZ']
  assert atoms.ref_mask.tolist() == [True] * 5 + [False]
  np.testing.assert_array_equal(atoms.position[-1], [3, 3, 3])


def test_long_atom_names_are_cut(write):
  text = """data_x
loop_
_atom_site.group_PDB
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
HETATM C CABCDE Q~Q A . 0.0 0.0 0.0
"""
  structure = data.load_structure(write(text, 'x.cif'))
  atoms = data.featurise(structure, require_protein=False).atoms
  assert atoms.ref_atom_name_chars[0].tolist() == [35, 33, 34, 35]


@pytest.mark.parametrize('suffix', ['cif', 'bcif', 'pdb'])
def test_formats_written_from_one_structure_give_the_same_features(
  tmp_path, suffix
):
  from biotite.structure.io import pdb as pdb_io
  from biotite.structure.io import pdbx

  source = data.example('1tqh').structure
  with gzip.open(source, 'rt') as handle:
    array = pdbx.get_structure(
      pdbx.CIFFile.read(handle),
      model=1,
      altloc='occupancy',
      extra_fields=['charge'],
      use_author_fields=True,
    )
  path = tmp_path / f'copy.{suffix}'
  if suffix == 'pdb':
    file = pdb_io.PDBFile()
    file.set_structure(array)
  else:
    file = pdbx.CIFFile() if suffix == 'cif' else pdbx.BinaryCIFFile()
    pdbx.set_structure(file, array)
  file.write(path)
  expected = data.featurise(data.load_structure(source))
  actual = data.featurise(data.load_structure(path))
  if suffix == 'pdb':
    # Without SEQRES records nothing tells of five residues before the first.
    index = actual.tokens.residue_index
    polymer = ~np.asarray(actual.tokens.is_ligand)
    counted = np.where(polymer, index + 5, index)
    tokens = dataclasses.replace(actual.tokens, residue_index=counted)
    actual = dataclasses.replace(actual, tokens=tokens)
  _assert_same(expected, actual)
  assert expected.metadata.residue_labels == actual.metadata.residue_labels


def test_protein_only_gives_frames_and_sequence(dhfr):
  _, features = dhfr
  protein = data.protein_only(data.pad_features(features))
  assert protein.rotation.shape == (186, 3, 3)
  assert protein.sequence == features.metadata.sequences[0].sequence
  assert protein.token_index.tolist() == list(range(186))
  np.testing.assert_array_equal(
    protein.translation, features.tokens.translation[:186]
  )


def test_features_are_a_pytree_that_compiles_once_per_size(dhfr):
  _, features = dhfr
  other = data.featurise(data.load_structure(data.example('1tqh').structure))
  traces = []

  @jax.jit
  def centre(batch):
    traces.append(1)
    return jax.tree.map(lambda x: x, batch)

  results = [
    centre(data.pad_features(x, n_token=384, n_atom=2048))
    for x in (features, other)
  ]
  assert len(traces) == 1
  assert all(result.metadata is None for result in results)
  assert results[0].tokens.rotation.shape == (384, 3, 3)


def test_large_file_is_fast(pdb, write):
  for chain in 'ABCDEFGH':
    for number in range(1, 501):
      pdb.residue('ALA', number, chain=chain, shift=50.0 * ord(chain))
  path = write(pdb)
  start = time.perf_counter()
  features = data.featurise(data.load_structure(path))
  assert features.n_atom == 20000
  assert time.perf_counter() - start < 20.0


def test_import_needs_neither_biotite_nor_rdkit():
  code = (
    'import sys; sys.modules["biotite"] = None; sys.modules["rdkit"] = None\n'
    'from structattn_jax import data\n'
    'data.ProteinTokenizer().encode("ACD")\n'
    'for call, extra in ((lambda: data.load_structure("x.pdb"), "[data]"),'
    ' (lambda: data.ligand_smiles(None), "[chem]")):\n'
    '  try: call()\n'
    '  except ImportError as error: assert extra in str(error), error\n'
    '  else: raise SystemExit("no ImportError")\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
