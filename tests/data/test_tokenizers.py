"""Round trips and errors of the tokenisers."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from structattn_jax import data

SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=25)
LETTERS = 'LAGVSERTIDPKQNFYMHWCXBUZO'
SMILES_PIECES = (
  *('C', 'c', 'N', 'n', 'O', 'o', 'S', 's', 'P', 'F', 'I', 'Br', 'Cl', 'B'),
  *('[C@@H]', '[NH3+]', '[O-]', '(', ')', '=', '#', '/', '\\', '.', '-'),
  *('1', '2', '%10', '%42', '@', '~', ':', '?', '>', '*', '$', '+'),
)


def test_protein_alphabet_has_the_ids_of_esm2():
  vocabulary = data.ProteinTokenizer().vocabulary
  assert len(vocabulary) == 33
  for token, i in (
    *(('<cls>', 0), ('<pad>', 1), ('<eos>', 2), ('<unk>', 3), ('L', 4)),
    *(('C', 23), ('X', 24), ('-', 30), ('<null_1>', 31), ('<mask>', 32)),
  ):
    assert vocabulary[token] == i


@SETTINGS
@hypothesis.given(
  st.lists(st.sampled_from([*LETTERS, '<mask>', '.', '-']), max_size=40),
  st.integers(0, 10),
)
def test_protein_round_trip(letters, extra):
  tokenizer = data.ProteinTokenizer()
  text = ''.join(letters)
  ids = tokenizer.encode(text, length=len(letters) + 2 + extra)
  assert ids.dtype == np.int32
  assert ids[0] == 0
  assert ids[len(letters) + 1] == 2
  assert (ids[len(letters) + 2 :] == tokenizer.pad_id).all()
  assert tokenizer.decode(ids) == text
  assert tokenizer.unknown(text) == []


def test_protein_unknown_letters_are_reported():
  tokenizer = data.ProteinTokenizer()
  assert tokenizer.encode('AjA?', add_special=False).tolist() == [5, 3, 5, 3]
  assert tokenizer.unknown('AjA?j') == ['j', '?']
  assert tokenizer.decode([0, 5, 3, 2]) == 'A<unk>'


def test_protein_length_and_ids_are_checked():
  tokenizer = data.ProteinTokenizer()
  with pytest.raises(ValueError, match='length >= 5'):
    tokenizer.encode('AAA', length=4)
  with pytest.raises(ValueError, match=r'\[36\]'):
    tokenizer.decode([0, 36, 2])


@SETTINGS
@hypothesis.given(st.lists(st.sampled_from(SMILES_PIECES), max_size=30))
def test_smiles_round_trip(pieces):
  text = ''.join(pieces)
  tokenizer = data.SmilesTokenizer.from_smiles([text])
  ids = tokenizer.encode(text)
  assert (ids[0], ids[-1]) == (0, 1)
  assert tokenizer.unk_id not in ids
  assert tokenizer.decode(ids) == text
  assert ''.join(tokenizer.split(text)) == text


def test_smiles_splits_atoms_brackets_and_rings():
  tokenizer = data.SmilesTokenizer.from_smiles(['CCl'])
  assert tokenizer.split('C[C@@H](Br)Clc%12B') == [
    *('C', '[C@@H]', '(', 'Br', ')', 'Cl', 'c', '%12', 'B'),
  ]


def test_smiles_vocabulary_has_specials_first_and_unknown_last():
  tokenizer = data.SmilesTokenizer.from_smiles(['CO', 'N'])
  assert tokenizer.vocabulary == {
    '<bos>': 0,
    '<eos>': 1,
    '<pad>': 2,
    '<mask>': 3,
    'C': 4,
    'N': 5,
    'O': 6,
    '<unk>': 7,
  }
  assert tokenizer.encode('CS', length=6).tolist() == [0, 4, 7, 1, 2, 2]
  assert tokenizer.unknown('CSS') == ['S']


def test_smiles_uncovered_text_shows_the_position():
  tokenizer = data.SmilesTokenizer.from_smiles(['C'])
  with pytest.raises(ValueError, match=r'position 2 \(.{3}\)[^^]*\n    \^'):
    tokenizer.encode('CCXC')


def test_smiles_vocabulary_files(tmp_path):
  tokenizer = data.SmilesTokenizer.from_smiles(['c1ccccc1O'])
  tokenizer.save(tmp_path / 'vocab.json')
  loaded = data.SmilesTokenizer.from_file(tmp_path / 'vocab.json')
  assert loaded.vocabulary == tokenizer.vocabulary
  lines = tmp_path / 'vocab.txt'
  lines.write_text('\n'.join(tokenizer.vocabulary) + '\n')
  loaded = data.SmilesTokenizer.from_file(lines)
  assert loaded.vocabulary == tokenizer.vocabulary


@pytest.mark.parametrize(
  ('content', 'match'),
  [
    ('C\nN\n', 'has no <bos>'),
    ('{broken', 'not a vocabulary'),
    (
      json.dumps({'<bos>': 0, '<eos>': 0, '<pad>': 2, '<unk>': 3}),
      'share one id',
    ),
  ],
)
def test_smiles_bad_vocabulary_file_is_reported(tmp_path, content, match):
  path = tmp_path / 'vocab'
  path.write_text(content)
  with pytest.raises(ValueError, match=match):
    data.SmilesTokenizer.from_file(path)
  with pytest.raises(ValueError, match='cannot be read'):
    data.SmilesTokenizer.from_file(tmp_path / 'none')
