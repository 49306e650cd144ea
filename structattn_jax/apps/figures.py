"""Pictures of the systems at work on a complex; needs matplotlib."""

import functools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import haiku as hk
import jax
import numpy as np

from structattn_jax import data
from structattn_jax.apps import demo
from structattn_jax.network.seeds import token_atom_attention as taa

if TYPE_CHECKING:
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure

# One hue for magnitude everywhere, so that dark always means more.
_MAGNITUDE = 'Blues'
_DIVERGING = 'RdBu'
_INK, _MUTED, _ACCENT = '#1f2430', '#8a8f98', '#c4501b'


def draw_all(
  features: data.ComplexFeatures,
  chosen: Mapping[str, demo.Experiment],
  params: Mapping[str, hk.Params],
  folder: pathlib.Path,
) -> list[pathlib.Path]:
  """Draws every figure of `structattn run` as PNG files.

  Args:
    features: the complex that was run.
    chosen: its experiments, from `demo.experiments`.
    params: of each, from `demo.init_params`.
    folder: where the files go; must exist.

  Returns:
    The files written.
  """
  written = []
  for name, figure in (
    ('ipa_attention', ipa_attention(features, chosen, params)),
    ('cross_attention', cross_attention(features, chosen, params)),
    ('sparse_pairs', sparse_pairs(features, chosen)),
    ('window_layout', window_layout(features, chosen)),
  ):
    path = folder / f'{name}.png'
    figure.savefig(path, dpi=130)
    written.append(path)
  return written


def ipa_attention(
  features: data.ComplexFeatures,
  chosen: Mapping[str, demo.Experiment],
  params: Mapping[str, hk.Params],
) -> 'mpl_figure.Figure':
  """IPA weights of the real residues beside their distances in space."""
  experiment = chosen['af2_ipa']
  inputs = dict(experiment.inputs)
  apply = functools.partial(
    experiment.system.transformed.apply, return_attention=True
  )
  result = jax.jit(apply)(params['af2_ipa'], **inputs)
  real = np.asarray(inputs['mask'])
  attention = np.asarray(result.attention)[:, real][:, :, real]
  ca = inputs['translation'][real]
  distance = np.linalg.norm(ca[:, None] - ca, axis=-1)

  figure, axes = _subplots(1, 3, (13.5, 4.4), width_ratios=(1, 1, 1.05))
  image = axes[0].imshow(
    distance, cmap=f'{_MAGNITUDE}_r', vmax=40, interpolation='nearest'
  )
  axes[0].set_title('distance between CA atoms')
  _colour_bar(figure, image, axes[0], 'angstrom')
  image = axes[1].imshow(
    np.log10(attention.mean(0) + 1e-6),
    cmap=_MAGNITUDE,
    vmin=-5,
    vmax=0,
    interpolation='nearest',
  )
  axes[1].set_title('IPA attention, mean of heads')
  _colour_bar(figure, image, axes[1], 'log10 weight')
  for ax in axes[:2]:
    ax.set_xlabel('key residue')
  axes[0].set_ylabel('query residue')
  bins = np.arange(0, 42, 2)
  which = np.digitize(distance.ravel(), bins)
  for head in attention:
    mean = [
      head.ravel()[which == b].mean() if (which == b).any() else np.nan
      for b in range(1, len(bins))
    ]
    axes[2].semilogy(bins[:-1] + 1, mean, color=_ACCENT, alpha=0.5, lw=1)
  axes[2].set_title('each head: weight by distance')
  axes[2].set_xlabel('CA distance, angstrom')
  axes[2].set_ylabel('mean weight')
  axes[2].set_ylim(1e-9, 2)
  axes[2].set_xlim(0, 20)
  _title(
    figure,
    f'{_name(features)}: with unit head weights IPA looks at near residues',
  )
  return figure


def cross_attention(
  features: data.ComplexFeatures,
  chosen: Mapping[str, demo.Experiment],
  params: Mapping[str, hk.Params],
) -> 'mpl_figure.Figure':
  """Atom -> token weights: around the ligand, and over the whole complex."""
  experiment = chosen['af3_atom_cross_attention']
  config = taa.TokenAtomAttentionConfig()
  attend = hk.without_apply_rng(
    hk.transform(
      lambda **inputs: taa.AtomToTokenAttention(config).attend(**inputs)
    )
  )
  weights, _ = jax.jit(attend.apply)(
    params['af3_atom_cross_attention'], **experiment.inputs
  )
  weights = np.asarray(weights)
  atoms, tokens = features.atoms, features.tokens
  residues = _pocket(features)
  size = max(int((atoms.token_index == t).sum()) for t in residues)
  grid = np.full((len(residues), size), np.nan)
  names = [[''] * size for _ in residues]
  for row, token in enumerate(residues):
    for slot, atom in enumerate(np.flatnonzero(atoms.token_index == token)):
      grid[row, slot] = weights[atom, 0]
      names[row][slot] = _atom_name(atoms.ref_atom_name_chars[atom])

  figure, axes = _subplots(1, 2, (13.5, 5), width_ratios=(1.25, 1))
  image = axes[0].imshow(
    grid, cmap=_MAGNITUDE, vmin=0, aspect='auto', interpolation='nearest'
  )
  limit = np.nanmax(grid) / 2
  for row, texts in enumerate(names):
    for slot, text in enumerate(texts):
      colour = 'white' if grid[row, slot] > limit else _INK
      axes[0].text(
        slot, row, text, ha='center', va='center', fontsize=7, color=colour
      )
  axes[0].set_yticks(
    range(len(residues)), [_label(features, t) for t in residues]
  )
  axes[0].set_xlabel('atom of the token')
  where = 'the ligand' if tokens.is_ligand.any() else 'the first residue'
  axes[0].set_title(f'head 0: residues nearest to {where}')
  _colour_bar(figure, image, axes[0], 'weight; a row sums to 1')

  # Weight over the uniform weight, averaged over all atoms of one name.
  count = np.bincount(atoms.token_index, minlength=features.n_token)
  relative = weights * count[atoms.token_index][:, None]
  labels = np.array([_atom_name(c) for c in atoms.ref_atom_name_chars])
  several = tokens.is_protein[atoms.token_index]
  common, times = np.unique(labels[several], return_counts=True)
  common = common[np.argsort(-times, kind='stable')][:16]
  means = np.stack([relative[several & (labels == n)].mean(0) for n in common])
  image = axes[1].imshow(
    np.log2(means.T), cmap=f'{_DIVERGING}_r', vmin=-2, vmax=2, aspect='auto'
  )
  axes[1].set_xticks(range(len(common)), common, rotation=90)
  axes[1].set_yticks(range(weights.shape[1]))
  axes[1].set_ylabel('head')
  axes[1].set_title('whole protein: each head prefers its own atoms')
  _colour_bar(figure, image, axes[1], 'log2 of weight over uniform weight')
  _title(figure, f'{_name(features)}: tokens attend to their own atoms')
  return figure


def sparse_pairs(
  features: data.ComplexFeatures, chosen: Mapping[str, demo.Experiment]
) -> 'mpl_figure.Figure':
  """Which atoms see which in Pallatom's residue window."""
  inputs = chosen['pallatom_atom_transformer'].inputs
  neighbours, valid = inputs['neighbor_idx'], inputs['valid_mask']
  n_atom = len(neighbours)
  pattern = np.zeros((n_atom, n_atom), bool)
  rows = np.repeat(np.arange(n_atom), valid.sum(1))
  pattern[rows, neighbours[valid]] = True

  figure, axes = _subplots(1, 2, (11.5, 5), width_ratios=(1, 1))
  axes[0].imshow(
    pattern, cmap=_MAGNITUDE, vmin=0, vmax=1.4, interpolation='nearest'
  )
  axes[0].set_title(f'all atoms: {pattern.mean():.0%} of pairs')
  axes[0].set_ylabel('query atom')
  # The border of two chains, where there is one: the ligand sees no protein.
  chain = features.tokens.chain_index[features.atoms.token_index]
  borders = np.flatnonzero(np.diff(chain))
  middle = int(borders[-1]) if borders.size else n_atom // 2
  low, high = max(middle - 150, 0), min(middle + 150, n_atom)
  axes[1].imshow(
    pattern[low:high, low:high],
    cmap=_MAGNITUDE,
    vmin=0,
    vmax=1.4,
    extent=(low, high, high, low),
  )
  axes[1].set_title(
    'where a chain ends' if borders.size else f'{high - low} atoms'
  )
  for ax in axes:
    ax.set_xlabel('key atom')
  _title(
    figure,
    f'{_name(features)}: window of 32 residues, atoms of one chain',
  )
  return figure


def window_layout(
  features: data.ComplexFeatures, chosen: Mapping[str, demo.Experiment]
) -> 'mpl_figure.Figure':
  """How the sparse pairs lie in memory: slots used and padding."""
  inputs = chosen['pallatom_atom_transformer'].inputs
  neighbours, valid = inputs['neighbor_idx'], inputs['valid_mask']
  token = features.atoms.token_index
  offset = token[neighbours] - token[:, None]
  offset = np.ma.masked_where(~valid, offset)

  figure, axes = _subplots(1, 2, (11.5, 5), width_ratios=(1.15, 1))
  axes[0].set_facecolor('#e6e7ea')
  image = axes[0].imshow(
    offset, cmap=_DIVERGING, aspect='auto', interpolation='nearest'
  )
  axes[0].set_title(
    f'slots [{valid.shape[0]}, {valid.shape[1]}]: {valid.mean():.0%} live, '
    'grey is padding'
  )
  axes[0].set_xlabel('neighbour slot')
  axes[0].set_ylabel('query atom')
  _colour_bar(figure, image, axes[0], 'key token minus query token')
  live = valid.any(1)
  rows = np.flatnonzero(live)
  low = np.where(valid, neighbours, len(token)).min(1)[live]
  high = np.where(valid, neighbours, -1).max(1)[live]
  axes[1].fill_betweenx(rows, low, high + 1, color=_ACCENT, alpha=0.35, lw=0)
  axes[1].plot(rows, rows, color=_INK, lw=0.8)
  axes[1].invert_yaxis()
  axes[1].set_title('keys of each query: one contiguous range')
  axes[1].set_xlabel('key atom')
  _title(figure, f'{_name(features)}: layout of the residue windows')
  return figure


def _subplots(
  rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple['mpl_figure.Figure', np.ndarray]:
  try:
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure
  except ImportError:
    raise ImportError(
      'figures need matplotlib: pip install "structattn-jax[run]"'
    ) from None
  # Not pyplot: a library must not touch the caller's figures or backend.
  figure = Figure(figsize=size, layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, **{'gridspec_kw': options})
  for ax in np.ravel(axes):
    ax.tick_params(colors=_MUTED, labelsize=8)
    for spine in ax.spines.values():
      spine.set_color('#cfd2d7')
  return figure, axes


def _title(figure: 'mpl_figure.Figure', text: str) -> None:
  figure.suptitle(text, x=0.01, ha='left', fontsize=12, color=_INK)
  for ax in figure.axes:
    ax.title.set_fontsize(10)
    ax.title.set_color(_INK)


def _colour_bar(
  figure: 'mpl_figure.Figure', image: Any, ax: 'mpl_axes.Axes', label: str
) -> None:
  bar = figure.colorbar(image, ax=ax, shrink=0.85)
  bar.set_label(label, color=_MUTED, fontsize=8)
  bar.ax.tick_params(colors=_MUTED, labelsize=8)
  bar.outline.set_visible(False)


def _name(features: data.ComplexFeatures) -> str:
  return features.metadata.name.upper() if features.metadata else 'complex'


def _label(features: data.ComplexFeatures, token: int) -> str:
  uid = features.tokens.residue_uid[token]
  if features.metadata is None:
    return str(token)
  return features.metadata.residue_labels[uid]


def _atom_name(chars: np.ndarray) -> str:
  return ''.join(chr(c + 32) for c in chars.tolist()).strip()


def _pocket(features: data.ComplexFeatures, size: int = 12) -> list[int]:
  """Protein tokens nearest to the ligand, or to the first one without any."""
  atoms, tokens = features.atoms, features.tokens
  is_ligand = tokens.is_ligand[atoms.token_index]
  centre = is_ligand if is_ligand.any() else atoms.token_index == 0
  offsets = atoms.position[:, None] - atoms.position[centre]
  nearest = np.linalg.norm(offsets, axis=-1).min(1)
  distance = np.full(features.n_token, np.inf)
  np.minimum.at(distance, atoms.token_index, nearest)
  distance[~tokens.is_protein] = np.inf
  chosen = np.argsort(distance, kind='stable')[:size]
  return sorted(int(t) for t in chosen if np.isfinite(distance[t]))
