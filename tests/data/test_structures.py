"""What `load_structure` keeps of a file."""

import gzip

import numpy as np
import pytest

from structattn_jax import data

SDF_ETHANOL = """ethanol
     RDKit          3D

  3  2  0  0  0  0  0  0  0  0999 V2000
   20.0000    0.0000    0.0000 C   0  0
   21.5000    0.0000    0.0000 C   0  0
   22.0000    1.3000    0.0000 O   0  0
  1  2  1  0
  2  3  1  0
M  END
$$$$
"""


def _names(structure):
  return structure.residue_name.tolist()


def _position(structure, atom_name):
  rows = structure.atom_name == atom_name
  assert rows.sum() == 1
  return structure.position[rows][0]


def test_altloc_different_occupancies_keeps_highest(pdb, write):
  pdb.residue('SER', 1, names=('N', 'CA', 'C', 'O'))
  for alt, occupancy, z in (('A', 0.3, 5.0), ('B', 0.7, 6.0)):
    pdb.atom('CB', 'SER', 1, (0, 0, z), alt=alt, occupancy=occupancy)
    pdb.atom('OG', 'SER', 1, (1, 0, z), alt=alt, occupancy=occupancy)
  structure = data.load_structure(write(pdb))
  assert structure.atom_name.tolist() == ['N', 'CA', 'C', 'O', 'CB', 'OG']
  assert _position(structure, 'CB')[2] == 6.0
  assert _position(structure, 'OG')[2] == 6.0


def test_altloc_equal_occupancies_keeps_first_in_file(pdb, write):
  pdb.residue('SER', 1, names=('N', 'CA', 'C', 'O'))
  for alt, z in (('B', 5.0), ('A', 6.0)):
    pdb.atom('CB', 'SER', 1, (0, 0, z), alt=alt, occupancy=0.5)
  structure = data.load_structure(write(pdb))
  assert _position(structure, 'CB')[2] == 5.0


def test_altloc_mixed_winners_is_consistent_per_residue(pdb, write):
  pdb.residue('SER', 1, names=('N', 'CA', 'C', 'O'))
  # A wins on CB, B wins on OG and on the mean: all of B is kept.
  pdb.atom('CB', 'SER', 1, (0, 0, 1), alt='A', occupancy=0.55)
  pdb.atom('CB', 'SER', 1, (0, 0, 2), alt='B', occupancy=0.45)
  pdb.atom('OG', 'SER', 1, (0, 0, 1), alt='A', occupancy=0.1)
  pdb.atom('OG', 'SER', 1, (0, 0, 2), alt='B', occupancy=0.9)
  structure = data.load_structure(write(pdb))
  assert _position(structure, 'CB')[2] == 2
  assert _position(structure, 'OG')[2] == 2


def test_altloc_labels_without_common_atoms_are_all_kept(pdb, write):
  pdb.residue('ALA', 1, names=('N', 'CA', 'C', 'O'), alt='A')
  pdb.atom('CB', 'ALA', 1, (0, 0, 1), alt='B', occupancy=0.4)
  structure = data.load_structure(write(pdb))
  assert structure.n_atom == 5


@pytest.mark.parametrize('interleaved', [False, True])
def test_microheterogeneity_keeps_the_more_occupied_name(
  pdb, write, interleaved
):
  pdb.residue('ALA', 1)
  variants = (('SER', 'A', 0.4), ('THR', 'B', 0.6))
  names = ('N', 'CA', 'C', 'O', 'CB')
  groups = [(n,) for n in names] if interleaved else [names]
  for group in groups:
    for name, alt, occupancy in variants:
      pdb.residue(name, 2, names=group, alt=alt, occupancy=occupancy)
  pdb.residue('GLY', 3, names=('N', 'CA', 'C', 'O'))
  structure = data.load_structure(write(pdb))
  assert _names(structure) == ['ALA', 'THR', 'GLY']
  assert structure.n_atom == 14


def test_microheterogeneity_equal_occupancy_keeps_first(pdb, write):
  pdb.residue('SER', 1, alt='A', occupancy=0.5)
  pdb.residue('THR', 1, alt='B', occupancy=0.5)
  assert _names(data.load_structure(write(pdb))) == ['SER']


def test_insertion_codes_and_negative_numbers_are_separate_residues(pdb, write):
  pdb.residue('ALA', -1, index=0)
  pdb.residue('SER', 0, index=1)
  pdb.residue('GLY', 52, index=2)
  pdb.residue('THR', 52, index=3, icode='A')
  pdb.residue('VAL', 52, index=4, icode='B')
  structure = data.load_structure(write(pdb))
  assert structure.residue_id.tolist() == [-1, 0, 52, 52, 52]
  assert structure.insertion_code.tolist() == ['', '', '', 'A', 'B']
  assert structure.residue_label(3) == 'A:THR52A'
  features = data.featurise(structure)
  assert features.metadata.sequences[0].sequence == 'ASGTV'
  assert features.tokens.author_index.tolist() == [-1, 0, 52, 52, 52]
  assert features.tokens.residue_index.tolist() == [1, 2, 54, 55, 56]
  assert features.tokens.residue_uid.tolist() == [0, 1, 2, 3, 4]


def test_models_first_by_default_selectable_and_checked(pdb, write):
  for model, shift in ((1, 0.0), (2, 7.0)):
    pdb.record(f'MODEL     {model:4d}')
    pdb.residue('ALA', 1, shift=shift)
    pdb.record('ENDMDL')
  path = write(pdb)
  assert _position(data.load_structure(path), 'N')[2] == 0.0
  second = data.load_structure(path, model=2)
  assert (_position(second, 'N')[2], second.n_models) == (7.0, 2)
  for model in (0, 3, -1):
    with pytest.raises(ValueError, match=r'has 2 model\(s\)'):
      data.load_structure(path, model=model)


def test_chains_keep_author_names(pdb, write):
  pdb.residue('ALA', 1, chain='B').record('TER')
  pdb.residue('ALA', 1, chain='X', shift=20.0).record('TER')
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.metadata.chain_ids == ('B', 'X')
  assert features.tokens.chain_index.tolist() == [0, 1]
  assert features.tokens.residue_uid.tolist() == [0, 1]


def test_repeated_chain_name_keeps_copies_apart(pdb, write):
  for shift in (0.0, 30.0, 60.0):
    pdb.residue('ALA', 1, shift=shift).residue('GLY', 2, shift=shift)
    pdb.record('TER')
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.metadata.chain_ids == ('A', 'A:2', 'A:3')
  assert features.tokens.chain_index.tolist() == [0, 0, 1, 1, 2, 2]
  assert [s.sequence for s in features.metadata.sequences] == ['AG'] * 3


def test_ligand_with_the_number_of_a_residue_is_kept(pdb, write):
  pdb.residue('ALA', 1).residue('GLY', 2)
  pdb.atom('ZN', 'ZN', 1, (9, 9, 9), element='ZN', hetero=True)
  structure = data.load_structure(write(pdb))
  assert _names(structure) == ['ALA', 'GLY', 'ZN']
  assert structure.chain_ids == ('A',)


def test_waters_and_hydrogens_are_removed_ions_kept(pdb, write):
  pdb.residue('ALA', 1)
  pdb.atom('HA', 'ALA', 1, element='H').atom('D', 'ALA', 1, element='D')
  for i, water in enumerate(('HOH', 'DOD', 'WAT')):
    pdb.atom('O', water, 100 + i, hetero=True)
  pdb.atom('CA', 'CA', 200, (9, 9, 9), element='CA', hetero=True)
  features = data.featurise(data.load_structure(write(pdb)))
  assert features.n_atom == 6
  assert features.tokens.is_ligand.tolist() == [False, True]
  assert features.atoms.ref_element[-1] == 20
  assert features.atoms.ref_charge[-1] == 2
  entry = features.metadata.ligands[0]
  assert (entry.residue_name, entry.token_start, entry.n_token) == ('CA', 1, 1)


def test_elements_missing_in_old_file_are_inferred(pdb, write):
  pdb.residue('ALA', 1)
  pdb.atom('CA', 'CA', 2, (9, 9, 9), element='CA', hetero=True)
  pdb.atom('HB1', 'ALA', 1, element='H')
  # As in the 1990s: entry code and line number instead of the element.
  old = [line[:66] + '      1ABC 123' for line in pdb.lines]
  structure = data.load_structure(write('\n'.join(old)))
  assert structure.element.tolist() == ['N', 'C', 'C', 'O', 'C', 'CA']


def test_short_lines_without_occupancy_are_read(pdb, write):
  pdb.residue('ALA', 1)
  text = '\n'.join(line[:54] for line in pdb.lines)
  structure = data.load_structure(write(text))
  assert structure.n_atom == 5
  np.testing.assert_array_equal(structure.occupancy, 1.0)


def test_gzip_and_upper_case_suffix_are_read(pdb, tmp_path):
  path = tmp_path / 'entry.PDB.gz'
  path.write_bytes(gzip.compress(pdb.residue('ALA', 1).text().encode()))
  structure = data.load_structure(path)
  assert (structure.name, structure.n_atom) == ('entry', 5)


def test_minimal_mmcif_without_author_columns_is_read(write):
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
ATOM N N ALA A 7 0.0 0.0 0.0
ATOM C CA ALA A 7 1.2 0.8 0.0
ATOM C C ALA A 7 2.4 0.0 0.0
ATOM O O ALA A 7 ? ? ?
"""
  structure = data.load_structure(write(text, 'x.cif'))
  assert structure.atom_name.tolist() == ['N', 'CA', 'C']
  assert structure.residue_id.tolist() == [7]


def test_protonation_state_names_are_the_amino_acid_only_if_atoms_fit(
  pdb, write
):
  pdb.residue('CYX', 1).residue('HIE', 2)
  pdb.residue('GLY', 3, names=('N', 'CA', 'C', 'O'))
  # In the CCD, CYX is a phosphonic acid; this one is no amino acid.
  pdb.atom('P', 'CYX', 9, (50, 0, 0), hetero=True)
  structure = data.load_structure(write(pdb))
  assert structure.component_name.tolist()[:3] == ['CYS', 'HIS', 'GLY']
  assert structure.residue_kind.tolist() == ['protein'] * 3 + ['ligand']


def test_free_amino_acid_is_a_ligand(pdb, write):
  pdb.residue('ALA', 1).residue('GLY', 2)
  pdb.residue('GLY', 900, index=30, hetero=True)
  structure = data.load_structure(write(pdb))
  assert structure.residue_kind.tolist() == ['protein', 'protein', 'ligand']


def test_sdf_unknown_title_gives_own_chain_and_generic_names(pdb, write):
  path = write(pdb.residue('ALA', 1))
  ligand = write(SDF_ETHANOL, 'ligand.sdf')
  structure = data.load_structure(path, ligand=ligand)
  assert structure.chain_ids == ('A', 'L1')
  assert structure.atom_name[-3:].tolist() == ['C1', 'C2', 'O1']
  features = data.featurise(structure)
  assert not features.atoms.ref_mask[-3:].any()
  np.testing.assert_array_equal(features.atoms.ref_pos[-3:], 0.0)
  assert features.atoms.ref_element[-3:].tolist() == [6, 6, 8]


def test_sdf_with_code_takes_names_and_conformer_from_the_ccd(pdb, write):
  path = write(pdb.residue('ALA', 1))
  second = SDF_ETHANOL.replace(' 0.0000 C', ' 9.0000 C')
  second = second.replace(' 0.0000 O', ' 9.0000 O')
  ligand = write(SDF_ETHANOL + second, 'ligand.sdf')
  structure = data.load_structure(
    path, ligand=ligand, ligand_names=['EOH', 'EOH']
  )
  assert structure.chain_ids == ('A', 'L1', 'L2')
  assert set(structure.atom_name[-3:]) == {'C1', 'C2', 'O'}
  assert data.featurise(structure).atoms.ref_mask.all()
  with pytest.raises(ValueError, match='2 record'):
    data.load_structure(path, ligand=ligand, ligand_names=['EOH'])


def test_sdf_on_a_ligand_in_the_file_is_not_added_twice(pdb, write):
  pdb.residue('ALA', 1)
  for name, xyz in (('C1', (20, 0, 0)), ('C2', (21.5, 0, 0))):
    pdb.atom(name, 'LIG', 5, xyz, hetero=True)
  pdb.atom('O1', 'LIG', 5, (22, 1.3, 0), hetero=True)
  structure = data.load_structure(
    write(pdb), ligand=write(SDF_ETHANOL, 'ligand.sdf')
  )
  assert _names(structure) == ['ALA', 'LIG']
  assert data.ligand_smiles(structure)[0].smiles == 'CCO'


def test_ligand_code_of_another_molecule_does_not_lend_its_conformer(
  pdb, write
):
  pdb.residue('ALA', 1)
  # LIG is a four-ring system in the CCD.
  for i in range(4):
    pdb.atom(f'C{i + 1}', 'LIG', 5, (9 * i, 9, 9), hetero=True)
  structure = data.load_structure(write(pdb))
  assert structure.component_name.tolist() == ['ALA', '']
  assert not data.featurise(structure).atoms.ref_mask[-4:].any()


def test_ligand_with_renumbered_atoms_is_recognised_by_its_bonds(pdb, write):
  pdb.residue('ALA', 1)
  for i, xyz in enumerate(((20, 0, 0), (21.5, 0, 0), (22, 1.3, 0))):
    element = 'CCO'[i]
    pdb.atom(f'{element}{i + 7}', 'EOH', 5, xyz, element=element, hetero=True)
  structure = data.load_structure(write(pdb))
  assert structure.component_name[1] == 'EOH'
  assert structure.atom_name[-1] == 'O'
  assert data.featurise(structure).atoms.ref_mask.all()


def test_same_atom_names_in_a_docked_ligand_are_all_kept(pdb, write):
  pdb.residue('ALA', 1)
  for i in range(5):
    pdb.atom('C', 'UNL', 2, (1.5 * i, 9, 9), hetero=True)
  assert data.load_structure(write(pdb)).n_atom == 10


def test_unknown_atom_has_element_zero_and_no_smiles(pdb, write):
  pdb.residue('ALA', 1)
  pdb.atom('UNK', 'UNX', 2, (9, 9, 9), element='X', hetero=True)
  structure = data.load_structure(write(pdb))
  assert data.featurise(structure).atoms.ref_element[-1] == 0
  assert data.ligand_smiles(structure)[0].smiles is None


class TestErrors:
  def _raises(self, path, match, **options):
    with pytest.raises(data.StructureFileError, match=match) as caught:
      data.load_structure(path, **options)
    assert path.name in str(caught.value) or options
    assert '\n' not in str(caught.value)

  def test_missing_file_says_so(self, tmp_path):
    self._raises(tmp_path / 'no.pdb', 'no such file')

  def test_folder_says_so(self, tmp_path):
    folder = tmp_path / 'x.pdb'
    folder.mkdir()
    self._raises(folder, 'folder')

  @pytest.mark.parametrize('suffix', ['pdb', 'cif', 'bcif'])
  def test_empty_file_says_so(self, write, suffix):
    self._raises(write('  \n', f'x.{suffix}'), 'empty')

  @pytest.mark.parametrize('suffix', ['pdb', 'cif', 'bcif', 'cif.gz'])
  def test_garbage_is_reported(self, tmp_path, suffix):
    path = tmp_path / f'x.{suffix}'
    path.write_bytes(bytes(range(256)) * 20)
    self._raises(path, 'not a|no atoms|no ATOM')

  def test_truncated_gzip_is_reported(self, tmp_path, pdb):
    path = tmp_path / 'x.pdb.gz'
    content = gzip.compress(pdb.residue('ALA', 1).text().encode())
    path.write_bytes(content[: len(content) // 2])
    self._raises(path, 'cannot be read')

  @pytest.mark.parametrize('name', ['x.xyz', 'x', 'x.sdf'])
  def test_unsupported_suffix_says_what_to_use(self, write, name):
    self._raises(write('hello', name), 'use .pdb|`ligand`')

  def test_mmcif_named_pdb_says_rename(self, write):
    self._raises(write('data_1ABC\n_entry.id 1ABC\n'), 'rename it to .cif')

  def test_mmcif_without_atoms_says_so(self, write):
    self._raises(write('data_x\n_entry.id x\n', 'x.cif'), 'no atom')

  def test_broken_coordinates_name_the_line(self, write, pdb):
    text = pdb.residue('ALA', 1).text().replace('0.800', '*.**0', 1)
    self._raises(write(text), 'line 2 ')

  def test_waters_only_says_nothing_is_left(self, write, pdb):
    pdb.atom('O', 'HOH', 1, hetero=True)
    self._raises(write(pdb), 'no atoms left')

  def test_ligand_of_wrong_kind_says_sdf(self, write, pdb):
    path = write(pdb.residue('ALA', 1))
    for name, text, match in (
      ('x.mol2', 'hello', 'SDF or MOL'),
      ('x.sdf', 'hello', 'no molecule'),
      ('y.sdf', SDF_ETHANOL.replace('  3  2', '  9  9'), 'not a readable'),
      ('z.sdf', SDF_ETHANOL.replace('3D', '2D'), '2D drawing'),
    ):
      self._raises(path, match, ligand=write(text, name))

  def test_no_protein_is_an_error_unless_allowed(self, write, pdb):
    pdb.atom('ZN', 'ZN', 1, element='ZN', hetero=True)
    structure = data.load_structure(write(pdb))
    with pytest.raises(data.StructureFileError, match='no protein residues'):
      data.featurise(structure)
    assert data.featurise(structure, require_protein=False).n_token == 1

  def test_error_is_a_value_error(self):
    assert issubclass(data.StructureFileError, ValueError)
