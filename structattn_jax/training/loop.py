"""Training runs: data, steps, metrics, checkpoints, signals.

A run is a folder:

  config.toml       what was asked for
  vocabulary.json   SMILES vocabulary, see `data.SmilesTokenizer.from_file`
  metrics.csv       one row per step
  events/           the same for TensorBoard, if tensorboardX is installed
  checkpoints/      the training state every `checkpoint_every` steps
  model.npz         moving average of the parameters, written at the end

Batches, noise and dropout of a step follow from the seed and the step's number
alone. Therefore a run that was stopped, by a signal or a crash, goes on from
its last checkpoint as if nothing had happened: bit by bit, on the same devices.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from structattn_jax import checkpoint, data
from structattn_jax.common import files
from structattn_jax.network.sedd import dual_track as sedd_dual_track
from structattn_jax.training import checkpoints as checkpoints_lib
from structattn_jax.training import config as config_lib
from structattn_jax.training import metrics as metrics_lib
from structattn_jax.training import objective
from structattn_jax.training import state as state_lib
from structattn_jax.training import step as step_lib

CONFIG_FILE = 'config.toml'
VOCABULARY_FILE = 'vocabulary.json'
CHECKPOINT_FOLDER = 'checkpoints'
MODEL_FILE = 'model.npz'

_COLUMNS = (
  *('mode', 'loss', 'protein_loss', 'ligand_loss', 'gradient_norm'),
  *('learning_rate', 'seconds'),
  *(f'bound_{name}' for name in objective.BOUNDS),
)
# Settings that a run may change when it goes on.
_FREE = ('steps', 'log_every', 'evaluate_every', 'checkpoint_every', 'keep')


class RunError(ValueError):
  """A run cannot start or go on as it was asked to."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """How a call of `train` ended.

  Attributes:
    step: number of optimiser steps that the run has made in all.
    interrupted: whether it was stopped before the last step.
    bounds: perplexity bounds of the moving average, from
      `objective.evaluate`; empty if interrupted.
    params: moving average of the parameters.
  """

  step: int
  interrupted: bool
  bounds: Mapping[str, float]
  params: Any


@dataclasses.dataclass(frozen=True, eq=False)
class RunData:
  """The data of a run.

  Attributes:
    train: encoded training pairs.
    validation: encoded pairs for the bounds.
    protein_tokenizer: of the sequences.
    smiles_tokenizer: of the ligands.
    messages: what the encoding lost.
  """

  train: data.EncodedPairs
  validation: data.EncodedPairs
  protein_tokenizer: data.ProteinTokenizer
  smiles_tokenizer: data.SmilesTokenizer
  messages: tuple[str, ...]


def train(
  config: config_lib.TrainConfig,
  folder: str | pathlib.Path,
  *,
  report: Callable[[str], None] = lambda message: None,
  progress: bool = False,
  devices: list[jax.Device] | None = None,
  after_step: Callable[[int], None] = lambda step: None,
) -> TrainResult:
  """Trains a dual-track model, or goes on with a run that was stopped.

    >>> config = config_lib.TrainConfig(steps=1000, batch_size=8)
    >>> train(config, 'out/small')  # doctest: +SKIP

  SIGTERM and SIGINT end the run after the present step, with a checkpoint. In
  a run of several processes (`jax.distributed`) every process makes this call;
  the first one writes the metrics.

  Args:
    config: data, model and optimiser.
    folder: of the run; made if it is not there.
    report: gets messages about data and checkpoints.
    progress: whether to show a bar on the standard error (needs tqdm).
    devices: that the batch is split over; None takes all.
    after_step: called with the number of steps made after each; an exception
      from it ends the run as a crash would.

  Returns:
    How it ended.

  Raises:
    RunError: if the data do not fit the model, the devices or, in a folder
      with checkpoints, the run that made them.
    checkpoint.CheckpointError: if all checkpoints are damaged.
    ImportError: if orbax is not installed, naming the extra.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  first = jax.process_index() == 0
  run_data = load_data(config)
  if first:
    for message in run_data.messages:
      report(message)
  mesh = step_lib.make_mesh(devices)
  if config.batch_size % (mesh.devices.size * config.accumulate):
    raise RunError(
      f'batch_size: {config.batch_size} rows in {config.accumulate} parts '
      f'cannot be split over {mesh.devices.size} devices; give a multiple of '
      f'{mesh.devices.size * config.accumulate}'
    )
  batches = make_batches(config, run_data.train)
  optimizer = state_lib.make_optimizer(config.optimizer)
  like = state_lib.init_state(objective.init_params(config), optimizer)
  like = step_lib.replicate(like, mesh)
  record = {
    'config': json.loads(json.dumps(config.to_dict())),
    'data': batches.fingerprint,
    'vocabulary': run_data.smiles_tokenizer.vocabulary,
  }
  fixed = _of_step(config)
  steps: dict[str, step_lib.StepFn] = {
    mode: _step(fixed, mode, mesh) for mode in config.modes
  }
  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(
      checkpoints_lib.Checkpoints(folder / CHECKPOINT_FOLDER, keep=config.keep)
    )
    found = saved.restore_latest(
      like,
      check=lambda old: _check_same_run(old, record),
      report=report if first else lambda message: None,
    )
    step, state = (0, like) if found is None else found[:2]
    if found is not None and first:
      report(f'going on from step {step} of {folder}')
    if first:
      _write_settings(folder, config, run_data.smiles_tokenizer)
    rows = _Rows(folder, config, step) if first else None
    if rows is not None:
      stack.callback(rows.close)
    stop = stack.enter_context(_stop_signal())
    bar = stack.enter_context(_progress_bar(progress and first, config, step))

    def flush():
      if rows is not None:
        loss = rows.flush()
        if loss is not None:
          bar.set_postfix(loss=f'{loss:.3f}', refresh=False)

    bounds = None
    while step < config.steps:
      mode = batches.mode(step)
      batch = step_lib.shard_batch(batches.batch(step), mesh)
      state, values = steps[mode](state, batch)
      step += 1
      if rows is not None:
        rows.add(step, mode, values)
      last = step == config.steps
      if last or (config.evaluate_every and step % config.evaluate_every == 0):
        bounds = objective.evaluate(config, state.ema, run_data.validation)
        if rows is not None:
          rows.add_bounds(bounds)
      logging = step % config.log_every == 0
      if logging:
        flush()
      # Processes ask each other only now and then.
      asked = jax.process_count() == 1 or logging
      stopping = asked and _agreed(stop.is_set())
      if last or stopping or step % config.checkpoint_every == 0:
        flush()  # Rows up to a checkpoint are on disk before it.
        saved.save(step, state, record)
      bar.update()
      after_step(step)
      if stopping and not last:
        return TrainResult(step, True, {}, state.ema)
    if bounds is None:  # There was nothing left to do.
      bounds = objective.evaluate(config, state.ema, run_data.validation)
    params = jax.tree.map(np.asarray, state.ema)
    if first:
      checkpoint.save(
        folder / MODEL_FILE,
        params,
        config.model,
        provenance=provenance(config, step, run_data),
      )
    return TrainResult(step, False, bounds, params)


def load_data(config: config_lib.TrainConfig) -> RunData:
  """Reads and encodes the pairs of a run.

  Args:
    config: of the run.

  Returns:
    Training and validation pairs with their tokenisers.

  Raises:
    RunError: if the model's vocabularies are too small, or nothing is left.
    data.PairFileError: if a table cannot be read.
  """
  if not config.modes:
    raise RunError('modes: expected at least one value')
  settings = config.data
  messages: list[str] = []
  pairs = read_pairs(config, report=messages.append)
  protein_tokenizer = data.ProteinTokenizer()
  if settings.vocabulary is None:
    smiles_tokenizer = data.SmilesTokenizer.from_smiles(
      _readable(pair.smiles for pair in pairs)
    )
  else:
    smiles_tokenizer = data.SmilesTokenizer.from_file(settings.vocabulary)
  for name, tokenizer in (
    ('protein_vocab', protein_tokenizer),
    ('ligand_vocab', smiles_tokenizer),
  ):
    needed = tokenizer.vocabulary_size + 1
    if getattr(config.model, name) < needed:
      raise RunError(
        f'model.{name}: {getattr(config.model, name)} ids are too few for '
        f'{needed - 1} tokens and the absorbing state; give at least {needed}'
      )

  def encode(rows):
    try:
      return data.encode_pairs(
        rows,
        protein_tokenizer,
        smiles_tokenizer,
        max_protein=max(settings.protein_buckets),
        max_ligand=max(settings.ligand_buckets),
      )
    except ValueError as error:
      raise RunError(f'{settings.path}: {error}') from None

  encoded, found = encode(pairs)
  messages += found.lines()
  validation = encoded
  if settings.validation_split is not None:
    rows = read_pairs(config, validation=True, report=messages.append)
    validation, found = encode(rows)
    messages += [f'validation: {line}' for line in found.lines()]
  return RunData(
    train=encoded,
    validation=validation,
    protein_tokenizer=protein_tokenizer,
    smiles_tokenizer=smiles_tokenizer,
    messages=tuple(messages),
  )


def read_pairs(
  config: config_lib.TrainConfig,
  *,
  validation: bool = False,
  report: Callable[[str], None] = warnings.warn,
) -> tuple[data.ProteinLigandPair, ...]:
  """The pairs of a run as text.

  Args:
    config: of the run.
    validation: whether to read the rows of `validation_split`.
    report: gets one sentence about rows that are left out.

  Returns:
    The pairs.

  Raises:
    RunError: if a split of the bundled set is asked for, which has none.
    data.PairFileError: if the table cannot be read.
  """
  settings = config.data
  split = settings.validation_split if validation else settings.split
  if settings.path != config_lib.BUNDLED:
    return data.read_pairs(
      settings.path,
      split=split,
      lone_proteins='protein_only' in config.modes,
      lone_ligands='ligand_only' in config.modes,
      skip_bad_rows=settings.skip_bad_rows,
      report=report,
    )
  if split is not None:
    raise RunError(f'data: no split {split!r}; the bundled set has no splits')
  return data.bundled_pairs()


def make_batches(
  config: config_lib.TrainConfig, pairs: data.EncodedPairs
) -> data.PairBatches:
  """The batches of a run.

  Raises:
    RunError: if they cannot be made.
  """
  try:
    return data.PairBatches(
      pairs,
      batch_size=config.batch_size,
      modes=config.modes,
      protein_buckets=config.data.protein_buckets,
      ligand_buckets=config.data.ligand_buckets,
      seed=config.seed,
      length_stages=config.data.length_stages,
      learn_ligand_length=config.data.learn_ligand_length,
    )
  except ValueError as error:
    raise RunError(str(error)) from None


def _of_step(config: config_lib.TrainConfig) -> config_lib.TrainConfig:
  """The settings that a step depends on, all others at their defaults."""
  return config_lib.TrainConfig(
    data=config_lib.DataConfig(
      learn_ligand_length=config.data.learn_ligand_length,
      keep_ends=config.data.keep_ends,
    ),
    model=config.model,
    optimizer=config.optimizer,
    noise=config.noise,
    noise_curriculum=config.noise_curriculum,
    batch_size=config.batch_size,
    accumulate=config.accumulate,
    seed=config.seed,
  )


@functools.lru_cache(maxsize=16)
def _step(
  config: config_lib.TrainConfig,
  mode: sedd_dual_track.Mode,
  mesh: jax.sharding.Mesh,
) -> step_lib.StepFn:
  """The step of a mode; runs of one process share what they compile."""
  return step_lib.make_step(
    objective.make_loss(config, mode),
    state_lib.make_optimizer(config.optimizer),
    mesh=mesh,
    seed=config.seed,
    ema_decay=config.optimizer.ema_decay,
    accumulate=config.accumulate,
  )


class _Rows:
  """Rows of the metrics, kept on the device until they are written."""

  def __init__(
    self, folder: pathlib.Path, config: config_lib.TrainConfig, step: int
  ):
    self._writer = metrics_lib.MetricsWriter(folder, _COLUMNS, step=step)
    self._optimizer = config.optimizer
    self._waiting: list[tuple[int, dict[str, Any]]] = []
    self._time = time.perf_counter()

  def add(self, step: int, mode: str, values: Mapping[str, Any]) -> None:
    self._waiting.append((step, {'mode': mode, **values}))

  def add_bounds(self, bounds: Mapping[str, float]) -> None:
    if self._waiting:
      self._waiting[-1][1].update(
        {f'bound_{name}': value for name, value in bounds.items()}
      )

  def flush(self) -> float | None:
    """Writes the rows; returns their mean loss."""
    if not self._waiting:
      return None
    rows = jax.device_get(self._waiting)
    now = time.perf_counter()
    seconds = (now - self._time) / len(rows)
    for step, values in rows:
      rate = self._optimizer.learning_rate * float(
        state_lib.warmup_factor(self._optimizer, step)
      )
      self._writer.write(
        step, {**values, 'learning_rate': rate, 'seconds': seconds}
      )
    self._waiting, self._time = [], now
    return float(np.mean([values['loss'] for _, values in rows]))

  def close(self) -> None:
    self._writer.close()


def _readable(smiles: Iterable[str]) -> Iterable[str]:
  tokenizer = data.SmilesTokenizer.from_smiles(())
  for text in smiles:
    with contextlib.suppress(ValueError):  # Reported when it is encoded.
      tokenizer.split(text)
      yield text


def _write_settings(
  folder: pathlib.Path,
  config: config_lib.TrainConfig,
  tokenizer: data.SmilesTokenizer,
) -> None:
  checkpoint.write_atomically(folder / CONFIG_FILE, config.to_toml().encode())
  checkpoint.write_atomically(
    folder / VOCABULARY_FILE,
    json.dumps(tokenizer.vocabulary, ensure_ascii=False, indent=0).encode(),
  )


def _check_same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
  with files.guard('the record', checkpoint.CheckpointError):
    # Settings that are younger than the record have their defaults.
    config = config_lib.TrainConfig.from_dict(old['config'])
    old = {**old, 'config': json.loads(json.dumps(config.to_dict()))}
  for name in sorted(new['config']):
    was, now = old['config'].get(name), new['config'][name]
    if name not in _FREE and was != now:
      if isinstance(now, dict):
        changed = [k for k in now if (was or {}).get(k) != now[k]]
        name = f'{name}.{changed[0]}'
        was, now = (was or {}).get(changed[0]), now[changed[0]]
      raise RunError(
        f'{name}: {now!r}, but the checkpoints in this folder were made with '
        f'{was!r}; take another folder, or the old value to go on'
      )
  if old['data'] != new['data'] or old['vocabulary'] != new['vocabulary']:
    raise RunError(
      'data: the pairs are not those that the checkpoints in this folder were '
      'made with; take another folder'
    )


def provenance(
  config: config_lib.TrainConfig, step: int, run_data: RunData | None = None
) -> dict[str, str]:
  """What a model file says about its origin, and samplers need.

  Args:
    config: of the run.
    step: number of optimiser steps.
    run_data: of the run; None reads it again.

  Returns:
    Settings, SMILES vocabulary, and per track {tokens: pairs}, as JSON.
  """
  run_data = run_data or load_data(config)

  def lengths(tokens):
    counted = collections.Counter(len(t) for t in tokens if len(t))
    return json.dumps(dict(sorted(counted.items())))

  return {
    'source': f'structattn train, {step} steps, moving average',
    'train_config': json.dumps(config.to_dict()),
    'smiles_vocabulary': json.dumps(run_data.smiles_tokenizer.vocabulary),
    'protein_lengths': lengths(run_data.train.protein),
    'ligand_lengths': lengths(run_data.train.ligand),
  }


@contextlib.contextmanager
def _stop_signal() -> Generator[threading.Event]:
  """An event that SIGTERM and SIGINT set; a second signal interrupts."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event  # Only the main thread may handle signals.
    return

  def stop(*_: object) -> None:
    if event.is_set():
      raise KeyboardInterrupt
    event.set()

  kinds = (signal.SIGTERM, signal.SIGINT)
  old = {kind: signal.getsignal(kind) for kind in kinds}
  try:
    for kind in kinds:
      signal.signal(kind, stop)
    yield event
  finally:
    for kind, handler in old.items():
      signal.signal(kind, handler)


def _agreed(stop: bool) -> bool:
  """Whether any process was asked to stop."""
  if jax.process_count() == 1:
    return stop
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.array(stop)).any())


class _NoBar:
  """Takes the calls of a progress bar and shows nothing."""

  def update(self) -> None:
    pass

  def set_postfix(self, **values: Any) -> None:
    pass


@contextlib.contextmanager
def _progress_bar(
  show: bool, config: config_lib.TrainConfig, step: int
) -> Generator[Any]:
  if not show:
    yield _NoBar()
    return
  try:
    import tqdm
  except ImportError:
    raise ImportError(
      "the progress bar needs tqdm: pip install 'structattn-jax[train]'"
    ) from None
  with tqdm.tqdm(total=config.steps, initial=step, unit='step') as bar:
    yield bar
