"""Structure files as programs write them: what a reader gets wrong silently."""

import gzip
import pathlib
import re
import time

import numpy as np
import pytest

from structattn_jax import data
from structattn_jax.data import chemical_components

FILES = pathlib.Path(__file__).parent / 'files'


def load(name):
  return data.load_structure(FILES / name)


def sequences(structure):
  features = data.featurise(structure)
  return [(s.chain_id, s.sequence) for s in features.metadata.sequences]


# Chains and models.


def test_ter_ends_a_chain_whose_name_returns():
  structure = load('blank_restart.pdb')
  assert sequences(structure) == [('', 'GASK'), (':2', 'GLSWF')]
  tokens = data.featurise(structure).tokens
  assert tokens.asym_id.tolist() == [1] * 4 + [2] * 5
  assert tokens.entity_id.tolist() == [1] * 4 + [2] * 5


def test_ligand_behind_ter_stays_in_its_chain(pdb, write):
  pdb.residue('ALA', 1).residue('GLY', 2, names=('N', 'CA', 'C', 'O'))
  pdb.lines.append('TER')
  pdb.residue('ALA', 1, shift=30, chain='B')
  pdb.lines.append('TER')
  pdb.atom('ZN', 'ZN', 101, (9, 9, 9), element='ZN', hetero=True)
  pdb.atom('ZN', 'ZN', 102, (19, 9, 9), element='ZN', hetero=True, chain='B')
  structure = data.load_structure(write(pdb))
  assert structure.chain_ids == ('A', 'B')
  assert structure.residue_chain.tolist() == [0, 0, 1, 0, 1]


def test_chain_of_modified_residues_alone_is_another_chain(pdb, write):
  names = ('N', 'CA', 'C', 'O')
  pdb.residue('GLY', 1, names=names).residue('GLY', 2, names=names)
  pdb.lines.append('TER')
  for number in (1, 2):
    pdb.residue('MSE', number, names=names, hetero=True, shift=50)
  structure = data.load_structure(write(pdb))
  assert sequences(structure) == [('A', 'GG'), ('A:2', 'MM')]


def test_copies_without_ter_are_chains_not_residues(pdb, write):
  for copy in range(3):
    for number, name in enumerate(('GLY', 'ALA', 'SER'), start=1):
      names = ('N', 'CA', 'C', 'O')
      pdb.residue(name, number, names=names, shift=100.0 * copy)
  structure = data.load_structure(write(pdb))
  assert sequences(structure) == [('A', 'GAS'), ('A:2', 'GAS'), ('A:3', 'GAS')]
  tokens = data.featurise(structure).tokens
  assert tokens.entity_id.tolist() == [1] * 9
  assert tokens.sym_id.tolist() == [1] * 3 + [2] * 3 + [3] * 3


def test_end_closes_a_model_in_linear_time(tmp_path):
  frame = (FILES / 'end_frames.pdb').read_text().split('END')[0] + 'END\n'
  assert load('end_frames.pdb').n_models == 2
  assert load('end_frames.pdb').chain_ids == ('A',)
  path = tmp_path / 'many.pdb'
  path.write_text(frame * 400)
  start = time.process_time()
  structure = data.load_structure(path, model=400)
  assert (structure.n_models, structure.n_residue) == (400, 6)
  assert time.process_time() - start < 10


# Residues of mmCIF.


def test_sugars_and_ions_without_author_numbers_are_several():
  with_numbers, without = load('glycan_ok.cif'), load('glycan_noauth.cif')
  assert without.residue_name.tolist() == with_numbers.residue_name.tolist()
  assert without.residue_name.tolist()[3:] == ['NAG', 'NAG', 'BMA']
  ions = load('ions_noauth.cif')
  assert ions.residue_name.tolist()[3:] == ['ZN', 'ZN']
  tokens = data.featurise(ions).tokens
  assert tokens.asym_id.tolist() == [1, 1, 1, 2, 3]
  assert tokens.sym_id.tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
  ('name', 'letters', 'kind'),
  [('gfp.cif', 'VTLXVQ', 'CRO'), ('sepgap.cif', 'GSG', 'SEP')],
)
def test_what_lies_in_the_polymer_is_a_residue_of_it(name, letters, kind):
  structure = load(name)
  (residue,) = np.flatnonzero(structure.residue_name == kind)
  assert structure.residue_kind[residue] == 'modified'
  ((_, sequence),) = sequences(structure)
  assert len(sequence) == len(letters)
  assert re.fullmatch(letters.replace('X', '.'), sequence)


def test_modified_residue_between_gaps_of_a_pdb_file_is_in_the_chain(
  pdb, write
):
  names = ('N', 'CA', 'C', 'O')
  pdb.residue('GLY', 1, names=names).residue('SEP', 5, names=names, hetero=True)
  pdb.residue('GLY', 9, names=names)
  structure = data.load_structure(write(pdb))
  assert structure.residue_kind.tolist() == ['protein', 'modified', 'protein']
  assert structure.sequence_index.tolist() == [1, 5, 9]


def test_seqres_names_a_modified_end(pdb, write):
  names = ('N', 'CA', 'C', 'O')
  pdb.residue('GLY', 1, names=names).residue('SEP', 5, names=names, hetero=True)
  alone = data.load_structure(write(pdb))
  assert alone.residue_kind.tolist() == ['protein', 'ligand']
  pdb.lines.insert(0, 'SEQRES   1 A    5  GLY ALA ALA ALA SEP')
  listed = data.load_structure(write(pdb, 'listed.pdb'))
  assert listed.residue_kind.tolist() == ['protein', 'modified']


@pytest.mark.parametrize('code', ['HEM', 'HEA', 'CLA', 'B12', 'SRM'])
def test_bonds_of_metals_are_tokens(code):
  # Whether they are dative, and whether RDKit takes them, depends on the
  # release of the dictionary.
  smiles = chemical_components.component_smiles(code)
  for text in (smiles or 'C', 'C[N]1=CC=C[N]1->[Fe+2]<-[NH3]'):
    tokenizer = data.SmilesTokenizer.from_smiles([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Columns of PDB.


@pytest.mark.parametrize(
  'name',
  [
    'bom.pdb',
    'bom.cif',
    'serial6.pdb',
    'chain2.pdb',
    'vmdhex.pdb',
    'stars.pdb',
  ],
)
def test_odd_columns_lose_nothing(name):
  structure = load(name)
  ((chain, sequence),) = sequences(structure)
  assert sequence == 'MKTAYI'
  assert structure.n_atom == 49
  assert chain == ('AB' if name == 'chain2.pdb' else 'A')


def test_number_that_is_none_is_refused_outside_of_water(tmp_path):
  text = (FILES / 'bom.pdb').read_text(encoding='utf-8-sig')
  path = tmp_path / 'x.pdb'
  path.write_text(text.replace('MET A   1', 'MET A****', 1))
  with pytest.raises(data.StructureFileError, match='line 1: residue number'):
    data.load_structure(path)


def test_lower_case_is_read_and_utf16_says_so(tmp_path):
  text = (FILES / 'bom.pdb').read_text(encoding='utf-8-sig')
  path = tmp_path / 'lower.pdb'
  path.write_text(text.lower())
  ((_, sequence),) = sequences(data.load_structure(path))
  assert sequence == 'MKTAYI'
  for encoding in ('utf-16', 'utf-16-le', 'utf-32'):
    path.write_text(text, encoding=encoding)
    with pytest.raises(data.StructureFileError, match='UTF-16'):
      data.load_structure(path)


def test_atoms_without_names_are_refused(tmp_path):
  text = (FILES / 'esd.cif').read_text()
  path = tmp_path / 'x.cif'
  for column in ('atom_id', 'comp_id'):
    path.write_text(text.replace(f'_{column}', f'_other_{column}'))
    with pytest.raises(data.StructureFileError, match=f'label_{column}'):
      data.load_structure(path)


def test_names_of_simulation_packages_are_standard_residues(pdb, write):
  structure = load('dna_amber.pdb')
  assert structure.residue_kind.tolist() == ['nucleic'] * 4
  assert structure.component_name.tolist()[0] == 'DA'
  alias = chemical_components.long_residue_alias
  assert [alias(x) for x in ('DCYT', 'RADE', 'TIP3', 'ALA')] == [
    'DC',
    'A',
    'HOH',
    None,
  ]
  for number, name in enumerate(('NGLY', 'LYSH', 'CALA'), start=1):
    pdb.residue('GLY', number, names=('N', 'CA', 'C', 'O'))
    pdb.lines[-4:] = [
      f'{line[:17]}{name}{line[21:]}' for line in pdb.lines[-4:]
    ]
  structure = data.load_structure(write(pdb))
  assert sequences(structure) == [('A', 'GKA')]


# Numbers.


def cif_with(tmp_path, column, value):
  lines = (FILES / 'esd.cif').read_text().splitlines()
  tags = [line.strip() for line in lines if line.startswith('_atom_site.')]
  row = next(i for i, line in enumerate(lines) if line.startswith('ATOM'))
  words = lines[row].split()
  words[tags.index(f'_atom_site.{column}')] = value
  lines[row] = ' '.join(words)
  path = tmp_path / 'x.cif'
  path.write_text('\n'.join(lines) + '\n')
  return path


@pytest.mark.parametrize(
  ('column', 'value'),
  [
    ('auth_seq_id', '1.7'),
    ('label_seq_id', '1.7'),
    ('pdbx_formal_charge', 'nan'),
    ('occupancy', 'nan'),
    ('occupancy', 'inf'),
    ('occupancy', '1e300'),
    ('Cartn_x', '1e30'),
    ('Cartn_y', 'inf'),
    ('Cartn_z', 'nan'),
    ('Cartn_z', 'abc'),
    ('label_atom_id', 'C' * 100_000),
  ],
)
def test_bad_values_name_file_row_and_column(tmp_path, column, value):
  path = cif_with(tmp_path, column, value)
  with pytest.raises(data.StructureFileError) as caught:
    data.load_structure(path)
  message = str(caught.value)
  assert message.startswith(str(path))
  assert column.lower() in message.lower()
  assert len(message) < 500


@pytest.mark.parametrize('value', ['?', '.'])
def test_unknown_values_are_not_there(tmp_path, value):
  whole = load('esd.cif')
  changed = data.load_structure(cif_with(tmp_path, 'Cartn_x', value))
  assert changed.n_atom == whole.n_atom - 1
  changed = data.load_structure(cif_with(tmp_path, 'occupancy', value))
  assert changed.occupancy[0] == 1


@pytest.mark.parametrize('value', ['     inf', '     nan', '    1e30'])
def test_bad_coordinates_of_pdb_are_refused(tmp_path, value):
  text = (FILES / 'bom.pdb').read_text(encoding='utf-8-sig')
  lines = text.splitlines(keepends=True)
  lines[1] = lines[1][:30] + value + lines[1][38:]
  path = tmp_path / 'x.pdb'
  path.write_text(''.join(lines))
  with pytest.raises(data.StructureFileError, match=r'line 2 \(x\)'):
    data.load_structure(path)


# Positions along the chain.


def test_insertion_codes_do_not_share_an_index():
  structure = load('inscode.cif')
  features = data.featurise(structure)
  assert features.tokens.residue_index.tolist() == list(range(1, 13))
  assert features.tokens.author_index.tolist()[:3] == [1, 1, 1]
  assert structure.insertion_code.tolist()[:4] == ['H', 'G', 'F', '']
  assert features.tokens.token_index.tolist() == list(range(1, 13))


def test_gaps_are_kept_and_other_numberings_are_none(pdb, write):
  for index, number in enumerate((5, 6, 9, 9, 2009, 2010)):
    icode = 'A' if index == 3 else ''
    pdb.residue('ALA', number, index=index, icode=icode)
  structure = data.load_structure(write(pdb))
  assert structure.sequence_index.tolist() == [1, 2, 5, 6, 7, 8]


# Bounded work.


def test_zipped_nothing_is_refused_before_it_is_unfolded(tmp_path):
  path = tmp_path / 'x.pdb.gz'
  path.write_bytes(gzip.compress(bytes(100_000_000)))
  with pytest.raises(data.StructureFileError, match='unfold'):
    data.load_structure(path)


def binary(tmp_path, change):
  import msgpack

  content = msgpack.unpackb((FILES / 'small.bcif').read_bytes())
  (table,) = [
    table
    for table in content['dataBlocks'][0]['categories']
    if table['name'] == '_atom_site'
  ]
  columns = {column['name']: column for column in table['columns']}
  change(table, columns['occupancy'])
  path = tmp_path / 'x.bcif'
  path.write_bytes(msgpack.packb(content))
  return path


def run_lengths(table, column):
  del table
  encoding = [
    {'kind': 'RunLength', 'srcType': 3, 'srcSize': 5 * 10**8},
    {'kind': 'ByteArray', 'type': 3},
  ]
  runs = np.array([1, 5 * 10**8], np.int32).tobytes()
  column.update(mask=None, data={'data': runs, 'encoding': encoding})


def too_short(table, column):
  del table
  values = np.ones(5).tobytes()
  encoding = [{'kind': 'ByteArray', 'type': 33}]
  column.update(mask=None, data={'data': values, 'encoding': encoding})


@pytest.mark.parametrize(
  'change', [run_lengths, too_short, lambda t, c: t.update(rowCount=10**9)]
)
def test_declared_sizes_of_binary_cif_are_checked(tmp_path, change):
  path = binary(tmp_path, change)
  with pytest.raises(data.StructureFileError, match=r'x\.bcif: not a readable'):
    data.load_structure(path)


def test_binary_cif_is_its_text(tmp_path):
  del tmp_path
  left, right = load('small.bcif'), load('small.cif')
  np.testing.assert_array_equal(left.position, right.position)
  assert left.residue_name.tolist() == right.residue_name.tolist()


def test_component_that_cannot_be_embedded_costs_one_search(pdb, write):
  start = time.process_time()
  features = data.featurise_alphafold3(load('cla3.cif'), seed=0)
  assert (np.asarray(features.tokens.is_ligand).sum()) > 100
  assert time.process_time() - start < 20


def test_long_chains_take_linear_time(pdb, write):
  for number in range(1, 2001):
    pdb.residue('ALA', number)
  structure = data.load_structure(write(pdb))
  data.featurise_alphafold3(structure, seed=0)  # Reads the dictionary.
  start = time.process_time()
  data.featurise_alphafold3(structure, seed=0)
  assert time.process_time() - start < 15


def test_second_byte_order_mark_loses_no_atom(pdb, tmp_path):
  path = tmp_path / 'x.pdb'
  text = pdb.residue('ALA', 1).text().encode()
  path.write_bytes(b'\xef\xbb\xbf' * 2 + text)
  assert data.load_structure(path).n_atom == 5


def test_model_number_that_is_none_is_refused(tmp_path):
  path = tmp_path / 'x.cif'
  text = (pathlib.Path(__file__).parent / 'files/ions_noauth.cif').read_text()
  assert '20.00 ? 1\n' in text
  path.write_text(text.replace('20.00 ? 1\n', '20.00 ? nan\n', 1))
  with pytest.raises(data.StructureFileError, match='row 1, pdbx_pdb_model'):
    data.load_structure(path)
