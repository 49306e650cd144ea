"""Tables of protein-ligand pairs, their tokens, and the bundled set."""

import csv

import numpy as np
import pytest

from structattn_jax import data

ROWS = (
  {'system_id': 'a', 'protein_seq': 'MKT', 'ligand_smiles': 'CCO'},
  {'system_id': 'b', 'protein_seq': 'GG', 'ligand_smiles': ''},
  {'system_id': 'c', 'protein_seq': '', 'ligand_smiles': 'c1ccccc1'},
)
LONE = {'lone_proteins': True, 'lone_ligands': True}


def write_csv(path, rows):
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  return path


def encode(pairs, **limits):
  tokenizer = data.SmilesTokenizer.from_smiles(['CCO', 'c1ccccc1'])
  limits = {'max_protein': 16, 'max_ligand': 16, **limits}
  return data.encode_pairs(pairs, data.ProteinTokenizer(), tokenizer, **limits)


def test_csv_rows_become_pairs(tmp_path):
  pairs = data.read_pairs(write_csv(tmp_path / 'p.csv', ROWS), **LONE)
  assert [(p.name, p.sequence, p.smiles) for p in pairs] == [
    ('a', 'MKT', 'CCO'),
    ('b', 'GG', ''),
    ('c', '', 'c1ccccc1'),
  ]


def test_parquet_gives_the_same_pairs_as_csv(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  rows = [
    {k: v or None for k, v in row.items()} | {'other': i}
    for i, row in enumerate(ROWS)
  ]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'p.parquet')
  expected = data.read_pairs(write_csv(tmp_path / 'p.csv', ROWS), **LONE)
  assert data.read_pairs(tmp_path / 'p.parquet', **LONE) == expected


@pytest.mark.parametrize(
  ('sequence', 'smiles'),
  [
    ('protein_sequence', 'ligand_rdkit_canonical_smiles'),
    ('sequence', 'smiles'),
    ('target_sequence', 'canonical_smiles'),
  ],
)
def test_known_column_names_are_found(tmp_path, sequence, smiles):
  path = write_csv(tmp_path / 'p.csv', [{sequence: 'MK', smiles: 'C'}])
  (pair,) = data.read_pairs(path)
  assert (pair.name, pair.sequence, pair.smiles) == ('row 1', 'MK', 'C')


def test_columns_can_be_named(tmp_path):
  rows = [{'seq1': 'MK', 'smiles': 'C', 'lig': 'N', 'key': 'x'}]
  path = write_csv(tmp_path / 'p.csv', rows)
  (pair,) = data.read_pairs(
    path, sequence_column='seq1', smiles_column='lig', name_column='key'
  )
  assert (pair.name, pair.sequence, pair.smiles) == ('x', 'MK', 'N')
  with pytest.raises(data.PairFileError, match="no column 'seq2'"):
    data.read_pairs(path, sequence_column='seq2')


def test_split_selects_rows(tmp_path):
  rows = [
    {'sequence': 'MK', 'smiles': 'C', 'split': 'train'},
    {'sequence': 'GG', 'smiles': 'N', 'split': 'test'},
  ]
  path = write_csv(tmp_path / 'p.csv', rows)
  assert [p.smiles for p in data.read_pairs(path, split='test')] == ['N']
  with pytest.raises(data.PairFileError, match="no rows of the split 'val'"):
    data.read_pairs(path, split='val')


@pytest.mark.parametrize(
  ('content', 'match'),
  [
    ('a,b\n1,2\n', 'no column of sequences'),
    ('sequence,smiles\n,C\n', "row 1, column 'sequence': the cell is empty"),
    ('sequence,smiles\nM,\n', "row 1, column 'smiles': the cell is empty"),
    ('sequence,smiles\nMK\n', 'row 1 has 1 cells, the header 2'),
    ('sequence,sequence\nMK,GG\n', "2 columns 'sequence' for sequence"),
    ('sequence,smiles\n', 'no rows'),
    ('', 'no column of sequences'),
  ],
)
def test_unusable_tables_are_reported(tmp_path, content, match):
  path = tmp_path / 'p.csv'
  path.write_text(content)
  with pytest.raises(data.PairFileError, match=match):
    data.read_pairs(path)


def table_of(tmp_path, sequence, smiles):
  rows = [
    {'sequence': 'GG', 'smiles': 'CCO'},
    {'sequence': sequence, 'smiles': smiles},
  ]
  return write_csv(tmp_path / 'p.csv', rows)


@pytest.mark.parametrize(
  ('sequence', 'smiles', 'expected'),
  [
    ('mktXbzuo', 'C', ('MKTXBZUO', 'C')),
    (' MKT \n', ' C\t', ('MKT', 'C')),
    ('MKT', 'CCO ethanol', ('MKT', 'CCO')),
    ('MKT', 'CCO\tethanol 2', ('MKT', 'CCO')),
    ('MKT', 'C[C@H](N)C(=O)O', ('MKT', 'C[C@H](N)C(=O)O')),
  ],
)
def test_text_of_a_row_is_made_plain(tmp_path, sequence, smiles, expected):
  path = table_of(tmp_path, sequence, smiles)
  pair = data.read_pairs(path)[1]
  assert (pair.sequence, pair.smiles) == expected


@pytest.mark.parametrize(
  ('sequence', 'smiles', 'message'),
  [
    ('MKT:GG', 'C', "'sequence': ':' at position 4 .* one chain a row"),
    ('MKT\nGG', 'C', r"'sequence': '\\n' at position 4 is no residue"),
    ('MKT\0', 'C', r"'sequence': '\\x00' at position 4 is no residue"),
    ('MK GG', 'C', "'sequence': ' ' at position 3"),
    ('MKJ', 'C', "'sequence': 'J' at position 3"),
    ('MKT*', 'C', r"'sequence': '\*' at position 4"),
    ('M-T', 'C', "'sequence': '-' at position 2"),
    ('M<mask>T', 'C', "'sequence': '<' at position 2"),
    ('M\u0131T', 'C', "'sequence': '\u0131' at position 2"),
    ('M' * 200_000, 'C', r'field larger|200,000 residues'),
    ('', 'C', "'sequence': the cell is empty"),
    ('MKT', '', "'smiles': the cell is empty"),
    ('MKT', '   ', "'smiles': the cell is empty"),
    ('MKT', 'C1CC(', "'smiles': RDKit rejects the SMILES 'C1CC\\('"),
    ('MKT', 'CN(C)(C)(C)C', "'smiles': RDKit rejects"),
    ('MKT', 'C!', "'smiles': smiles: no token at position 1"),
    ('MKT', 'CC\nO', "'smiles': smiles: no token at position 2"),
    ('MKT', 'C' * 5000, "'smiles': 5,000 characters, of 4,000"),
  ],
)
def test_what_is_no_pair_is_an_error_or_left_out(
  tmp_path, sequence, smiles, message
):
  pytest.importorskip('rdkit')
  path = table_of(tmp_path, sequence, smiles)
  with pytest.raises(data.PairFileError, match=message) as error:
    data.read_pairs(path)
  assert str(error.value).startswith(f'{path}: ')
  if 'field larger' in message:
    return
  assert ': row 2, column ' in str(error.value)
  reports = []
  (pair,) = data.read_pairs(path, skip_bad_rows=True, report=reports.append)
  assert pair.sequence == 'GG'
  assert len(reports) == 1
  assert f'{path}: 1 bad rows left out: row 2, column ' in reports[0]


def test_rows_of_other_splits_are_not_looked_at(tmp_path):
  rows = [
    {'sequence': 'MK', 'smiles': 'C', 'split': 'train'},
    {'sequence': '??', 'smiles': '', 'split': 'test'},
  ]
  path = write_csv(tmp_path / 'p.csv', rows)
  assert len(data.read_pairs(path, split='train')) == 1


@pytest.mark.parametrize('mark', [',', '\t', ';'])
@pytest.mark.parametrize('start', ['', '\ufeff'])
def test_commas_tabs_and_semicolons_separate(tmp_path, mark, start):
  path = tmp_path / 'p.tsv'
  lines = [('name', 'sequence', 'smiles'), ('a;b\tc,d', 'MK', 'CCO')]
  with path.open('w', newline='', encoding='utf-8') as file:
    file.write(start)
    csv.writer(file, delimiter=mark).writerows(lines)
  expected = data.ProteinLigandPair('a;b\tc,d', 'MK', 'CCO')
  assert data.read_pairs(path) == (expected,)


def test_parquet_of_one_value_cannot_become_a_billion_rows(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  column = pyarrow.DictionaryArray.from_arrays(
    pyarrow.array(np.zeros(20_000_000, np.int8)), pyarrow.array(['CCO'])
  )
  path = tmp_path / 'p.parquet'
  parquet.write_table(pyarrow.table({'smiles': column}), path)
  assert path.stat().st_size < 100_000
  with pytest.raises(data.PairFileError, match='which no file of this kind'):
    data.read_pairs(path)


def test_missing_and_foreign_files_are_reported(tmp_path):
  with pytest.raises(data.PairFileError, match='cannot be read'):
    data.read_pairs(tmp_path / 'none.csv')
  pytest.importorskip('pyarrow')
  (tmp_path / 'p.parquet').write_bytes(b'no table')
  with pytest.raises(data.PairFileError, match='not a Parquet file'):
    data.read_pairs(tmp_path / 'p.parquet')


def test_encoding_keeps_order_and_adds_ends():
  pairs = [data.ProteinLigandPair('a', 'LA', 'CO')]
  encoded, report = encode(pairs)
  assert encoded.protein[0].tolist() == [0, 4, 5, 2]
  assert encoded.ligand[0][[0, -1]].tolist() == [0, 1]
  assert report.lines() == []


def test_encoding_leaves_a_missing_track_empty():
  encoded, _ = encode([data.ProteinLigandPair('a', 'LA', '')])
  assert len(encoded.ligand[0]) == 0


def test_encoding_reports_what_it_loses():
  pairs = [
    data.ProteinLigandPair('fine', 'MK', 'CCO'),
    data.ProteinLigandPair('odd', 'MJJ', 'CCS'),
    data.ProteinLigandPair('long', 'M' * 15, 'C'),
    data.ProteinLigandPair('broken', 'MK', 'C!'),
  ]
  encoded, report = encode(pairs)
  assert encoded.names == ('fine', 'odd')
  assert report.n_pair == 2
  assert report.unknown_protein == {'J': 2}
  assert report.unknown_ligand == {'S': 1}
  assert report.too_long == ('long',)
  assert list(report.unreadable) == ['broken']
  text = '\n'.join(report.lines())
  for part in ("'J' (2)", "'S' (1)", '1 too long: long', 'position 1'):
    assert part in text


def test_encoding_of_nothing_is_an_error():
  with pytest.raises(ValueError, match='none is left; 1 too long: a'):
    encode([data.ProteinLigandPair('a', 'M' * 40, 'C')])


def test_bundled_set_holds_pairs_and_lone_ligands():
  pairs = data.bundled_pairs()
  paired = [p for p in pairs if p.sequence]
  assert (len(paired), len(pairs)) == (10, 256)
  assert len({p.sequence for p in paired}) == 6
  assert len({p.smiles for p in pairs}) == 256
  tokenizer = data.SmilesTokenizer.from_smiles(p.smiles for p in pairs)
  encoded, report = data.encode_pairs(
    pairs, data.ProteinTokenizer(), tokenizer, max_protein=448, max_ligand=64
  )
  assert report.lines() == ['1 too long: 1ia1_A_NDP']
  assert all(len(tokens) for tokens in encoded.ligand)


def test_bundled_sequences_are_those_of_the_bundled_structures():
  pytest.importorskip('biotite')
  sequences = {p.name: p.sequence for p in data.bundled_pairs()}
  for entry, name in (('1s3v', '1s3v_A_TQD'), ('1tqh', '1tqh_A_4PA')):
    structure = data.load_structure(data.example(entry).structure)
    found = data.featurise(structure).metadata.sequences
    assert sequences[name] == found[0].sequence


def test_bundled_smiles_are_those_of_the_dictionary():
  pytest.importorskip('biotite')
  chem = pytest.importorskip('rdkit.Chem')
  from structattn_jax.data import chemical_components

  pairs = data.bundled_pairs()
  with_code = [p for p in pairs if p.name != '1c4q_A_BGC-GAL-GLA']
  for pair in with_code[:9] + with_code[9::16]:
    code = pair.name.removeprefix('CCD:').split('_')[-1]
    expected = chemical_components.component_smiles(code)
    assert chem.CanonSmiles(pair.smiles) == chem.CanonSmiles(expected)


def test_padding_keeps_tokens_and_marks_them():
  rows = [np.array([3, 4], np.int32), np.array([5], np.int32)]
  ids, mask = data.pad_tokens(rows, 3, 9)
  assert ids.tolist() == [[3, 4, 9], [5, 9, 9]]
  assert mask.tolist() == [[True, True, False], [True, False, False]]
  with pytest.raises(ValueError, match='expected at least 2'):
    data.pad_tokens(rows, 1, 9)
