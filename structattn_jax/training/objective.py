"""What the protein-ligand model minimises, and how well it does.

The loss is the denoising score entropy of `discrete_diffusion.losses`, per
complex divided by its number of real tokens, so that it is a mean over rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax import data, discrete_diffusion
from structattn_jax.network.sedd import dual_track as sedd_dual_track
from structattn_jax.training import config as config_lib
from structattn_jax.training import step as step_lib

# Modes with a bound, in the order of `evaluate`.
BOUNDS: tuple[sedd_dual_track.Mode, ...] = sedd_dual_track.MODES
# How much smaller than uniform the first times of a noise curriculum are:
# t = u^3 (protein_lig_sedd, branch sedd-v100xlian: u^(1 + 2 k), k from 1 to 0).
_CURRICULUM_POWER = 2.0
_NUM_TIMES = 16
# Per track how many tokens stay clean: 0, the start, or start and end.
Ends = tuple[tuple[str, int], ...]


def init_params(config: config_lib.TrainConfig) -> hk.Params:
  """Initial parameters, from the seed of the run."""
  return _init(config.model)(jax.random.key(config.seed))


@functools.cache
def _init(
  model: sedd_dual_track.DualTrackConfig,
) -> Callable[[jax.Array], hk.Params]:
  init, _ = sedd_dual_track.transform_sedd_dual_track(model)
  token = jnp.zeros(1, jnp.int32)
  return jax.jit(lambda key: init(key, token, token, jnp.zeros(())))


def make_loss(
  config: config_lib.TrainConfig, mode: sedd_dual_track.Mode
) -> step_lib.LossFn:
  """The loss of one mode for `step.make_step`.

  Args:
    config: of the run.
    mode: what is generated from what.

  Returns:
    `loss_fn(params, key, batch, step)` of a `sedd.ProteinLigand`. Its metrics
    are `protein_loss` and `ligand_loss`, in nats per token, where generated.
  """
  noise = discrete_diffusion.make_noise(config.noise)

  def loss_fn(params, key, batch, step):
    time_key, noise_key, dropout_key = jax.random.split(key, 3)
    size = jax.tree.leaves(batch)[0].shape[0]
    t = discrete_diffusion.sample_times(
      time_key, size, power=_power(config, step), stratified=True
    )
    noised = discrete_diffusion.corrupt(
      config.model,
      noise_key,
      batch,
      t,
      mode=mode,
      noise=noise,
      fixed=fixed_ends(num_ends(config.data), batch),
    )
    found = discrete_diffusion.dual_track_loss(
      config.model,
      params,
      batch,
      noised,
      t,
      mode=mode,
      noise=noise,
      dropout_key=dropout_key if config.model.dropout else None,
    )
    losses = {}
    for track in sedd_dual_track.tracks_of(mode).generated:
      mask = getattr(batch, f'{track}_mask')
      kept = jnp.where(mask, getattr(found, f'{track}_weighted'), 0)
      rows = jnp.sum(kept, -1) / jnp.maximum(jnp.sum(mask, -1), 1)
      losses[f'{track}_loss'] = jnp.mean(rows)
    return sum(losses.values()) / len(losses), losses

  return loss_fn


def evaluate(
  config: config_lib.TrainConfig,
  params: hk.Params,
  pairs: data.EncodedPairs,
  *,
  num_times: int = _NUM_TIMES,
) -> dict[str, float]:
  """Perplexity bounds of every mode that the run trains.

  If a mode needs both tracks, all modes are measured on the pairs with both,
  so that the numbers can be compared. The noise is the same in every call.

  Args:
    config: of the run.
    params: of the model.
    pairs: what the bounds are of.
    num_times: noise levels per pair; more of them lower the variance.

  Returns:
    Mode -> perplexity bound, exp of nats per token. Padding that is data (see
    `learn_ligand_length`) counts as nats, not as tokens; tokens that stay clean
    count as neither. In the mode 'joint' over the tokens of both tracks.
  """
  modes = [mode for mode in BOUNDS if mode in config.modes]
  needed = {
    track
    for mode in modes
    for track in (
      *sedd_dual_track.tracks_of(mode).generated,
      *sedd_dual_track.tracks_of(mode).context,
    )
  }
  chosen = pairs.select(
    [
      i
      for i in range(len(pairs))
      if all(len(getattr(pairs, track)[i]) for track in needed)
    ]
  )
  ends = num_ends(config.data)
  found = {}
  for mode in modes:
    tracks = sedd_dual_track.tracks_of(mode).generated
    bound = _bound(config.model, ends, mode, config.noise, num_times)
    nats = 0.0
    for index, batch in enumerate(
      data.cover_pairs(
        chosen,
        mode,
        batch_size=config.batch_size,
        protein_buckets=config.data.protein_buckets,
        ligand_buckets=config.data.ligand_buckets,
        learn_ligand_length=config.data.learn_ligand_length,
      )
    ):
      result = bound(params, jax.random.key(index), batch)
      nats += sum(float(getattr(result, f'{track}_nats')) for track in tracks)
    tokens = sum(
      len(ids) - dict(ends)[track]
      for track in tracks
      for ids in getattr(chosen, track)
    )
    found[mode] = float(jnp.exp(nats / tokens)) if tokens else float('nan')
  return found


@functools.lru_cache(maxsize=16)
def _bound(
  model: sedd_dual_track.DualTrackConfig,
  ends: Ends,
  mode: sedd_dual_track.Mode,
  noise: str,
  num_times: int,
) -> Callable[..., discrete_diffusion.PerplexityBound]:
  @jax.jit
  def bound(params, key, batch):
    return discrete_diffusion.perplexity_bound(
      model,
      params,
      key,
      batch,
      mode=mode,
      noise=discrete_diffusion.make_noise(noise),
      fixed=fixed_ends(ends, batch),
      num_times=num_times,
    )

  return bound


def num_ends(settings: config_lib.DataConfig) -> Ends:
  """How many tokens of each track stay clean, see `keep_ends`."""
  known = 2 if settings.keep_ends else 0
  learned = min(known, 1) if settings.learn_ligand_length else known
  return (('protein', known), ('ligand', learned))


def fixed_ends(
  ends: Ends, batch: sedd_dual_track.ProteinLigand
) -> dict[str, jax.Array]:
  """Which tokens stay clean: [n_batch, n] bool by track."""
  fixed = {}
  for track, count in ends:
    mask = getattr(batch, f'{track}_mask')
    if mask is None or not count:
      continue
    fixed[track] = jnp.broadcast_to(jnp.arange(mask.shape[1]) == 0, mask.shape)
    if count == 2:
      following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
      fixed[track] = fixed[track] | (mask & ~following)
  return fixed


def _power(config: config_lib.TrainConfig, step: jax.Array) -> Any:
  if not config.noise_curriculum:
    return 1.0
  left = jnp.maximum(1 - step / config.noise_curriculum, 0)
  return 1 + _CURRICULUM_POWER * left
