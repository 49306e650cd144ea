"""Checkpoints of PyTorch models: converted, and compared with what is known.

Every part of a file is converted, which uses each of its tensors exactly once.
What may lie beside it says more:

  <name>_expected.npz  inputs and outputs of the model; for a file in the
                       Hugging Face layout also in the folder above
  *.npz                goldens recorded with the same parameters
"""

import json
import math
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from structattn_jax import checkpoint, convert
from structattn_jax.convert import state_dicts, torch_file
from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.network.sedd import dual_track, single_track
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification.golden import (
  Comparison,
  Golden,
  GoldenError,
  NotAGoldenError,
  Row,
)

_EXPECTED = '_expected.npz'
_SUFFIXES = ('.ckpt', '.pt', '.pth', '.bin', '.safetensors')


def find(folder: pathlib.Path) -> list[pathlib.Path]:
  """Checkpoints below a folder."""
  files = filter(pathlib.Path.is_file, folder.rglob('*'))
  return sorted(path for path in files if is_checkpoint(path))


def is_checkpoint(path: pathlib.Path) -> bool:
  """Whether a file, by its name and content, is of this kind."""
  if path.suffix not in _SUFFIXES or not path.is_file():
    return False
  try:
    is_safe = checkpoint.first_bytes(path, 9)[8:] == b'{'
    return is_safe or torch_file.is_torch_file(path)
  except checkpoint.CheckpointError:
    return path.suffix != '.bin'  # Running it says what is wrong.


def described(path: pathlib.Path) -> pathlib.Path | None:
  """The checkpoint whose outputs a file holds, if that is what it holds."""
  if path.name.endswith(_EXPECTED):
    stem = path.name.removesuffix(_EXPECTED)
    for suffix in _SUFFIXES:
      if path.with_name(f'{stem}{suffix}').is_file():
        return path.with_name(f'{stem}{suffix}')
  return None


def run(path: pathlib.Path) -> list[Row]:
  """Converts a checkpoint and compares it with what lies beside it.

  Raises:
    CheckpointError: if it is damaged, or does not fit its name table.
    NotAGoldenError: if it is of a model that is not known.
  """
  tree = state_dicts.model_of(state_dicts.read(path))
  try:
    kind = convert.detect_format(path)
  except checkpoint.CheckpointError as error:
    raise NotAGoldenError(str(error)) from None
  case = path.stem if path.stem != 'model' else f'{path.parent.name}/model'
  rows = []
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', convert.DeadParametersWarning)
    for part in _parts(kind, tree):
      try:
        params = convert.FORMATS[kind].read(path, part, None).params
      except state_dicts.MissingPartError:
        continue  # Not every file has every part.
      count = sum(map(len, params.values()))
      rows.append(
        Row(case, f'{part}: {count} arrays', 0.0, float(count), 0.0, ok=True)
      )
    rows += _same_parameters(case, path, tree)
    rows += _expected(case, path, kind)
  return rows


def _parts(kind: str, tree: Any) -> Iterator[str]:
  """Parts of a format, those with a number as often as the file has them."""
  for part in convert.FORMATS[kind].parts:
    if part.endswith('.N'):
      name = part.removesuffix('.N')
      for i in range(state_dicts.num_layers(tree, name)):
        yield f'{name}.{i}'
    else:
      yield part


def _same_parameters(
  case: str, path: pathlib.Path, tree: Mapping[str, Any]
) -> Iterator[Row]:
  """Largest difference from each golden with the same parameters."""
  for other in sorted(path.parent.glob('*.npz')):
    try:
      names = {
        name.removeprefix('params/')
        for name in checkpoint.npz_names(other)
        if name.startswith('params/')
      }
      common = sorted(
        name
        for name in names & tree.keys()
        if isinstance(tree[name], state_dicts.Value)
      )
      golden = checkpoint.read_npz(other, [f'params/{n}' for n in common])
    except checkpoint.CheckpointError:
      continue
    pairs = [
      (state_dicts.array(tree[name]), golden[f'params/{name}'])
      for name in common
    ]
    errors = [_difference(got, want) for got, want in pairs]
    # Goldens with other parameters have the same names.
    if 2 * errors.count(0.0) > len(errors):
      scale = max(float(np.abs(want).max(initial=0.0)) for _, want in pairs)
      error = max(errors)
      output = f'{len(common)} arrays of {other.stem}'
      yield Row(case, output, error, scale, 0.0, ok=error == 0.0)


def _difference(x: np.ndarray, y: np.ndarray) -> float:
  if x.shape != y.shape:
    return math.inf
  error = np.abs(x.astype(np.float64) - y).max(initial=0.0)
  return float(error) if math.isfinite(error) else math.inf


def _expected(case: str, path: pathlib.Path, kind: str) -> list[Row]:
  """Outputs recorded from the model."""
  file = path.with_name(f'{path.stem}{_EXPECTED}')
  candidates = [file]
  if path.stem == 'model':  # Hugging Face.
    candidates = sorted(path.parent.parent.glob(f'*{_EXPECTED}'))
  for file in filter(pathlib.Path.is_file, candidates):
    arrays = checkpoint.read_npz(file)
    meta = arrays.pop('meta', np.array('{}'))
    try:
      golden = Golden(case, json.loads(meta.item()), arrays)
    except (TypeError, ValueError, RecursionError):
      raise GoldenError(f'{file}: `meta` is not JSON') from None
    replay = {'sedd': _sedd, 'sedd_protein_ligand': _dual_track}.get(kind)
    wanted = {'sedd': 'inputs/indices'}.get(kind, 'inputs/protein_indices')
    if replay is not None and wanted in arrays:
      with jax.default_matmul_precision('highest'):
        return golden_lib.judge(case, list(replay(golden, path)))
  return []


def _recorded(
  golden: Golden, load: Any, path: pathlib.Path
) -> Iterator[tuple[str, str, Any]]:
  """Each output that the file has weights for: name, base name, model."""
  for output in golden.outputs():
    base = re.sub(r'_ema$', '', output)
    weights = 'model' if base == output else 'ema'
    try:
      yield output, base, load(path, weights=weights)
    except checkpoint.CheckpointError:
      # Exported files have one set of weights, the first one.
      if weights == 'model':
        raise


def _scores(golden: Golden, logits: Any, tokens: Any, sigma: Any) -> Any:
  model = golden.meta.get('config', {}).get('model', {})
  return jax.vmap(
    lambda *x: graph_lib.log_score(
      *x, scale_by_sigma=model.get('scale_by_sigma', True)
    )
  )(logits, tokens, sigma)


def _sedd(golden: Golden, path: pathlib.Path) -> Iterator[Comparison]:
  inputs = golden.part('inputs')
  tokens, sigma = inputs['indices'], inputs['sigma']
  for output, _, model in _recorded(golden, convert.load_sedd, path):
    config, params = model
    apply = jax.vmap(single_track.transform_sedd(config).apply, (None, 0, 0))
    logits = jax.jit(apply)(params, tokens, sigma)
    yield golden.value(output, _scores(golden, logits, tokens, sigma))


def _dual_track(golden: Golden, path: pathlib.Path) -> Iterator[Comparison]:
  inputs = golden.part('inputs')
  sigma = inputs['sigma']
  arguments: list[Any] = [
    inputs['protein_indices'],
    inputs['ligand_indices'],
    sigma,
  ]
  arguments += [inputs.get(f'{track}_mask') for track in ('protein', 'ligand')]
  axes = [None, *(None if x is None else 0 for x in arguments)]
  load = convert.load_sedd_dual_track
  for output, base, model in _recorded(golden, load, path):
    config, params = model
    apply = dual_track.transform_sedd_dual_track(config).apply
    found = jax.jit(jax.vmap(apply, axes))(params, *arguments)
    track = base.partition('_')[0]
    tokens = inputs[f'{track}_indices']
    logits = getattr(found, track)
    yield golden.value(output, _scores(golden, logits, tokens, sigma))
