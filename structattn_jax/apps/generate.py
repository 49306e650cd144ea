"""Proteins and ligands from a trained dual-track model, as text.

  model = load_model('out/small')
  samples = generate(
    model, jax.random.key(0), mode='ligand_given_protein', protein='MKT...'
  )

`structattn sample` is this on the command line.
"""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import numpy as np

from structattn_jax import checkpoint, data, discrete_diffusion, training
from structattn_jax.common import files
from structattn_jax.data import sample_metrics
from structattn_jax.network.sedd import dual_track as sedd_dual_track
from structattn_jax.training import checkpoints, loop, objective, state

# Written in a sequence or SMILES for a position that is to be filled in.
BLANK = '<mask>'
_TRACKS = ('protein', 'ligand')


class GenerateError(ValueError):
  """A model or a request that cannot be sampled from."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A trained model with all that is needed to read and write text.

  Attributes:
    params: parameters.
    config: of the network.
    protein_tokenizer: of the sequences.
    smiles_tokenizer: of the ligands; None if the vocabulary is not known.
    lengths: per track the numbers of training pairs by number of tokens; empty
      if not known.
    settings: of the training run; None for published parameters.
  """

  params: hk.Params
  config: sedd_dual_track.DualTrackConfig
  protein_tokenizer: data.ProteinTokenizer
  smiles_tokenizer: data.SmilesTokenizer | None
  lengths: Mapping[str, Mapping[int, int]]
  settings: training.TrainConfig | None

  def tokenizer(
    self, track: str
  ) -> data.ProteinTokenizer | data.SmilesTokenizer:
    """The tokeniser of 'protein' or 'ligand'."""
    if track == 'protein':
      return self.protein_tokenizer
    if self.smiles_tokenizer is None:
      raise GenerateError(
        'vocabulary: the checkpoint has no SMILES vocabulary; give the one it '
        'was trained with'
      )
    return self.smiles_tokenizer

  @property
  def learns_ligand_length(self) -> bool:
    """Whether ligands end where the model says."""
    return self.settings is not None and self.settings.data.learn_ligand_length


@dataclasses.dataclass(frozen=True)
class Samples:
  """Generated pairs, and what they were generated with.

  Attributes:
    mode: what was generated from what.
    protein: sequences; the given one repeated if it was the context; None in
      the mode 'ligand_only'.
    ligand: SMILES, likewise.
    bound: track -> perplexity bound of the generated tokens under the model; in
      the mode 'joint' the shares of a common bound.
    states: track -> [steps + 1, num, n] int32, tokens that entered each network
      call; empty unless asked for.
  """

  mode: sedd_dual_track.Mode
  protein: tuple[str, ...] | None
  ligand: tuple[str, ...] | None
  bound: Mapping[str, float]
  states: Mapping[str, np.ndarray]

  @property
  def generated(self) -> tuple[str, ...]:
    """The generated tracks."""
    return sedd_dual_track.tracks_of(self.mode).generated


def load_model(
  path: str | pathlib.Path,
  *,
  vocabulary: str | pathlib.Path | None = None,
) -> Model:
  """Reads a model.

  Args:
    path: folder of a training run, finished or not, whose moving average is
      taken; or a file of `structattn train` or `structattn convert`.
    vocabulary: SMILES vocabulary for a file without one, see
      `data.SmilesTokenizer.from_file`.

  Returns:
    The model.

  Raises:
    checkpoint.CheckpointError: if there is nothing readable.
    GenerateError: if it is no dual-track model, or on an unusable vocabulary.
  """
  path = pathlib.Path(path)
  known = (GenerateError, training.RunError)
  with files.guard(path, checkpoint.CheckpointError, passes=known):
    return _load_model(path, vocabulary)


def _load_model(
  path: pathlib.Path, vocabulary: str | pathlib.Path | None
) -> Model:
  if path.is_dir() and not (path / loop.MODEL_FILE).exists():
    content = _running(path)
  else:
    file = path / loop.MODEL_FILE if path.is_dir() else path
    content = checkpoint.load(file)
  if not isinstance(content.config, sedd_dual_track.DualTrackConfig):
    raise GenerateError(
      f'{path}: holds {type(content.config).__name__}, not a dual-track model'
    )
  stored = content.provenance
  tokenizer = None
  try:
    if vocabulary is not None:
      tokenizer = data.SmilesTokenizer.from_file(vocabulary)
    elif 'smiles_vocabulary' in stored:
      tokenizer = data.SmilesTokenizer(json.loads(stored['smiles_vocabulary']))
  except ValueError as error:
    raise GenerateError(str(error)) from None
  settings = None
  if 'train_config' in stored:
    settings = training.TrainConfig.from_dict(
      json.loads(stored['train_config'])
    )
  lengths = {
    track: {
      _size(n): _size(count)
      for n, count in json.loads(stored.get(f'{track}_lengths', '{}')).items()
    }
    for track in _TRACKS
  }
  return Model(
    params=content.params,
    config=content.config,
    protein_tokenizer=data.ProteinTokenizer(),
    smiles_tokenizer=tokenizer,
    lengths=lengths,
    settings=settings,
  )


def _size(value: Any) -> int:
  """A length in tokens, or a number of pairs."""
  if not 0 < int(value) < 2**31:
    raise ValueError(f'no length or number of pairs: {files.shown(value)}')
  return int(value)


def _running(folder: pathlib.Path) -> checkpoint.Checkpoint:
  """The moving average in the last checkpoint of a run without `model.npz`."""
  inner = folder / loop.CHECKPOINT_FOLDER
  if not inner.is_dir():
    raise checkpoint.CheckpointError(
      f'{folder}: neither {loop.MODEL_FILE} nor {loop.CHECKPOINT_FOLDER}; give '
      'the folder of a training run'
    )
  with checkpoints.Checkpoints(inner) as saved:
    steps = saved.steps()
    if not steps:
      raise checkpoint.CheckpointError(f'{inner}: no checkpoint')
    record = saved.record(steps[0])
    config = training.TrainConfig.from_dict(record['config'])
    optimizer = training.make_optimizer(config.optimizer)
    like = jax.eval_shape(
      lambda: state.init_state(objective.init_params(config), optimizer)
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like
    )
    restored, _ = saved.restore(steps[0], like)
  return checkpoint.Checkpoint(
    restored.ema, config.model, loop.provenance(config, steps[0])
  )


def generate(
  model: Model,
  key: jax.Array,
  *,
  mode: sedd_dual_track.Mode = 'joint',
  num: int = 16,
  protein: str | None = None,
  ligand: str | None = None,
  protein_length: int | None = None,
  ligand_length: int | None = None,
  sampler: discrete_diffusion.SamplerConfig | None = None,
  return_states: bool = False,
) -> Samples:
  """Samples proteins, ligands, or one given the other.

  Args:
    model: from `load_model`.
    key: PRNG key.
    mode: what is generated from what.
    num: number of samples.
    protein: the context of 'ligand_given_protein'; in modes that generate it, a
      template: `<mask>` for each residue to be filled in, the rest stays.
    ligand: likewise, SMILES tokens.
    protein_length: residues to generate; None draws from the training set.
    ligand_length: SMILES tokens to generate; None leaves it to the model if it
      has learned lengths, else draws from the training set.
    sampler: number of steps and so on.
    return_states: whether to keep the tokens of all steps.

  Returns:
    The samples as text, with perplexity bounds.

  Raises:
    GenerateError: if a context is missing or unreadable, or no length is known.
  """
  tracks = sedd_dual_track.tracks_of(mode)
  given = {'protein': protein, 'ligand': ligand}
  lengths = {'protein': protein_length, 'ligand': ligand_length}
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
  inputs: dict[str, Any] = {}
  for track in _TRACKS:
    text = given[track]
    if track in tracks.context:
      if not text or BLANK in text:
        raise GenerateError(
          f'{track}: the mode {mode!r} needs a whole {track}, got {text!r}'
        )
      inputs[track] = _encode(model, track, text)
    elif track in tracks.generated:
      ids, mask, fixed = _template(model, track, text, lengths[track], num, rng)
      inputs |= {
        track: ids,
        f'{track}_mask': mask,
        f'{track}_fixed': fixed,
      }
    elif text is not None:
      raise GenerateError(f'{track}: not used in the mode {mode!r}')
  sample_key, bound_key = jax.random.split(key)
  noise = discrete_diffusion.make_noise(
    model.settings.noise if model.settings else 'loglinear'
  )
  found = discrete_diffusion.sample(
    model.config,
    model.params,
    sample_key,
    num_samples=num,
    mode=mode,
    sampler=sampler or discrete_diffusion.SamplerConfig(),
    noise=noise,
    return_states=return_states,
    **inputs,
  )
  texts: dict[str, tuple[str, ...] | None] = dict.fromkeys(_TRACKS)
  for track in tracks.context:
    texts[track] = (str(given[track]),) * num
  complexes: dict[str, Any] = {}
  fixed: dict[str, Any] = {}
  for track in (*tracks.generated, *tracks.context):
    if track in tracks.generated:
      ids = np.asarray(found.tokens[track])
      mask = inputs[f'{track}_mask']
      texts[track] = tuple(
        decode(model.tokenizer(track), row[keep])
        for row, keep in zip(ids, mask, strict=True)
      )
      complexes |= {track: ids, f'{track}_mask': mask}
      fixed[track] = inputs[f'{track}_fixed']
    else:
      complexes[track] = np.tile(inputs[track], (num, 1))
  result = jax.jit(
    lambda params, key, clean, fixed: discrete_diffusion.perplexity_bound(
      model.config, params, key, clean, mode=mode, noise=noise, fixed=fixed
    )
  )(
    model.params,
    bound_key,
    sedd_dual_track.ProteinLigand(**complexes),
    fixed,
  )
  return Samples(
    mode=mode,
    protein=texts['protein'],
    ligand=texts['ligand'],
    bound={
      track: float(result.perplexity(track)) for track in tracks.generated
    },
    states={
      track: np.asarray(tokens)
      for track, tokens in (found.states or {}).items()
    },
  )


def decode(
  tokenizer: data.ProteinTokenizer | data.SmilesTokenizer, ids: np.ndarray
) -> str:
  """Generated ids as text, up to the first <eos>.

  Args:
    tokenizer: of the track.
    ids: [n] int, any of the model's ids.

  Returns:
    The tokens without start and padding; ids without a token are <unk>.
  """
  ids = np.asarray(ids)
  ends = np.flatnonzero(ids == tokenizer.eos_id)
  ids = ids[: ends[0]] if len(ends) else ids
  known = set(tokenizer.vocabulary.values())
  return tokenizer.decode(
    [i if i in known else tokenizer.unk_id for i in ids.tolist()]
  )


def measure(
  samples: Samples,
  training_pairs: Sequence[data.ProteinLigandPair] | None = None,
) -> dict[str, Any]:
  """Metrics of samples as JSON values, by generated track.

  Args:
    samples: from `generate`.
    training_pairs: for the novelty; None gives none.

  Returns:
    Per track validity, uniqueness, novelty and perplexity bound; composition
    and mean length for proteins. Ligands without RDKit have the bound alone.
  """
  found: dict[str, Any] = {'mode': samples.mode}
  known = training_pairs
  if samples.protein is not None and 'protein' in samples.generated:
    metrics = sample_metrics.protein_metrics(
      samples.protein, None if known is None else [p.sequence for p in known]
    )
    found['protein'] = dataclasses.asdict(metrics)
  if samples.ligand is not None and 'ligand' in samples.generated:
    try:
      metrics = sample_metrics.ligand_metrics(
        samples.ligand, None if known is None else [p.smiles for p in known]
      )
      found['ligand'] = dataclasses.asdict(metrics)
    except ImportError as error:
      found['ligand'] = {'not measured': str(error)}
  for track in samples.generated:
    found[track]['perplexity_bound'] = samples.bound[track]
  return found


def write(
  folder: pathlib.Path, samples: Samples, metrics: Mapping[str, Any]
) -> list[pathlib.Path]:
  """Writes samples and metrics, each file atomically.

  Args:
    folder: made if it is not there.
    samples: from `generate`.
    metrics: from `measure`.

  Returns:
    The files: `samples.csv`, `proteins.fasta` and `ligands.smi` for the tracks
    there are, `metrics.json`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  number = len(samples.ligand or samples.protein or ())
  names = [f'sample_{i}' for i in range(number)]
  table: dict[str, Sequence[Any]] = {'name': names}
  files: dict[str, str] = {}
  if samples.protein is not None:
    table['protein_sequence'] = samples.protein
    files['proteins.fasta'] = ''.join(
      f'>{name}\n{text}\n'
      for name, text in zip(names, samples.protein, strict=True)
    )
  if samples.ligand is not None:
    table['ligand_smiles'] = samples.ligand
    canonical = metrics.get('ligand', {}).get('canonical')
    if canonical is not None:
      table['canonical_smiles'] = [text or '' for text in canonical]
    files['ligands.smi'] = ''.join(
      f'{text}\t{name}\n'
      for name, text in zip(names, samples.ligand, strict=True)
    )
  text = io.StringIO()
  rows = csv.writer(text, lineterminator='\n')
  rows.writerow(table)
  rows.writerows(zip(*table.values(), strict=True))
  files = {
    'samples.csv': text.getvalue(),
    **files,
    'metrics.json': json.dumps(metrics, indent=2) + '\n',
  }
  for name, content in files.items():
    checkpoint.write_atomically(folder / name, content.encode())
  return [folder / name for name in files]


def _encode(model: Model, track: str, text: str) -> np.ndarray:
  tokenizer = model.tokenizer(track)
  try:
    unknown = [t for t in tokenizer.unknown(text) if t != BLANK]
    ids = tokenizer.encode(text)
  except ValueError as error:
    raise GenerateError(f'{track}: {error}') from None
  if unknown:
    raise GenerateError(
      f'{track}: tokens that the model does not know: {", ".join(unknown)}'
    )
  return ids


def _template(
  model: Model,
  track: str,
  text: str | None,
  length: int | None,
  num: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Start of a generated track: ids, mask and what stays, all [num, n]."""
  tokenizer = model.tokenizer(track)
  if text is not None:
    if length is not None:
      raise GenerateError(
        f'{track}_length: the template says how long the {track} is'
      )
    ids = np.tile(_encode(model, track, text), (num, 1))
    blank = tokenizer.vocabulary.get(BLANK)
    return ids, np.ones_like(ids, bool), ids != blank
  start, end = tokenizer.encode('')
  if length is None and track == 'ligand' and model.learns_ligand_length:
    size = max(model.settings.data.ligand_buckets) if model.settings else 0
    ids = np.full((num, size), start, np.int32)
    fixed = np.zeros_like(ids, bool)
    fixed[:, 0] = True
    return ids, np.ones_like(fixed), fixed
  if length is not None:
    if length < 1:
      raise GenerateError(f'{track}_length: expected at least 1, got {length}')
    sizes = np.full(num, length + 2)
  elif model.lengths[track]:
    known, counts = zip(*sorted(model.lengths[track].items()), strict=True)
    sizes = rng.choice(known, num, p=np.array(counts) / sum(counts))
  else:
    raise GenerateError(
      f'{track}_length: the checkpoint does not say how long {track}s are; '
      'give a length'
    )
  position = np.arange(max(sizes))
  mask = position < sizes[:, None]
  first, last = position == 0, position == sizes[:, None] - 1
  ids = np.where(last, end, np.full(mask.shape, start)).astype(np.int32)
  return ids, mask, mask & (first | last)
