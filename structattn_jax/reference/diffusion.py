"""Oracle of structure diffusion: schedules, alignment, sampler, losses.

Abramson et al. (2024) Suppl. Algs. 18, 19, 27, 28 and 3.7.1, and what Boltz
does differently, one sample and one pair of atoms at a time. Masks are bool,
True = keep; rotations are those of row vectors, x R.
"""

from collections.abc import Callable

import numpy as np


def alphafold3_levels(
  steps: int, s_min: float, s_max: float, rho: float, sigma_data: float
) -> list[float]:
  """[steps + 1] levels, the last of them sigma_data s_min."""
  levels = []
  for i in range(steps + 1):
    root = s_max ** (1 / rho)
    root += i / steps * (s_min ** (1 / rho) - s_max ** (1 / rho))
    levels.append(sigma_data * root**rho)
  return levels


def boltz_levels(
  steps: int, s_min: float, s_max: float, rho: float, sigma_data: float
) -> list[float]:
  """[steps + 1] levels, the last of them zero."""
  levels = []
  for i in range(steps):
    root = s_max ** (1 / rho)
    if i:
      root += i / (steps - 1) * (s_min ** (1 / rho) - s_max ** (1 / rho))
    levels.append(sigma_data * root**rho)
  return [*levels, 0.0]


def precondition(
  network: Callable[[np.ndarray, float], np.ndarray],
  positions: np.ndarray,
  sigma: float,
  sigma_data: float,
) -> np.ndarray:
  """Denoised positions of a network of (scaled positions, log level / 4)."""
  variance = sigma**2 + sigma_data**2
  update = network(
    positions / np.sqrt(variance), np.log(sigma / sigma_data) / 4
  )
  return (
    sigma_data**2 / variance * positions
    + sigma * sigma_data / np.sqrt(variance) * update
  )


def gram_schmidt(v0: np.ndarray, v1: np.ndarray) -> np.ndarray:
  """[3, 3] with rows e0, e1, e0 x e1."""
  e0 = v0 / np.linalg.norm(v0)
  v1 = v1 - e0 * (v1 @ e0)
  e1 = v1 / np.linalg.norm(v1)
  return np.stack([e0, e1, np.cross(e0, e1)])


def rigid_align(
  moving: np.ndarray,
  target: np.ndarray,
  weights: np.ndarray,
  mask: np.ndarray,
) -> np.ndarray:
  """`moving` [n, 3] on `target`, by singular values; Suppl. Alg. 28."""
  w = np.where(mask, weights, 0.0)
  if w.sum() == 0:
    return moving
  mean_moving = sum(w[i] * moving[i] for i in range(len(w))) / w.sum()
  mean_target = sum(w[i] * target[i] for i in range(len(w))) / w.sum()
  covariance = np.zeros((3, 3))
  for i in range(len(w)):
    covariance += w[i] * np.outer(
      target[i] - mean_target, moving[i] - mean_moving
    )
  u, _, vt = np.linalg.svd(covariance)
  rotation = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
  return (moving - mean_moving) @ rotation.T + mean_target


def sample(
  denoise: Callable[[np.ndarray, float], np.ndarray],
  levels: list[float],
  start: np.ndarray,
  rotation: np.ndarray,
  translation: np.ndarray,
  noise: np.ndarray,
  mask: np.ndarray,
  *,
  gamma_0: float,
  gamma_min: float,
  noise_scale: float,
  step_scale: float,
  align: bool,
  centre: str,
) -> np.ndarray:
  """One sample [n, 3]; Suppl. Alg. 18 with recorded draws [steps, ...]."""
  x = levels[0] * start
  for i in range(len(levels) - 1):
    before, after = levels[i], levels[i + 1]
    if centre == 'masked':
      middle = x[mask].mean(0) if mask.any() else np.zeros(3)
    else:
      middle = x.mean(0)
    x = (x - middle) @ rotation[i] + translation[i]
    if centre == 'masked':
      x[~mask] = 0
    t = before * (1 + (gamma_0 if after > gamma_min else 0))
    noisy = x + noise_scale * np.sqrt(t**2 - before**2) * noise[i]
    denoised = denoise(noisy, t)
    if align:
      noisy = rigid_align(noisy, denoised, np.ones(len(mask)), mask)
    x = noisy + step_scale * (after - t) * (noisy - denoised) / t
  return x


def smooth_lddt(
  denoised: np.ndarray,
  true: np.ndarray,
  mask: np.ndarray,
  is_nucleotide: np.ndarray,
  version: str,
) -> float:
  """1 - lddt of [m, n, 3] against [m, n, 3]; Suppl. Alg. 27."""
  m, n = denoised.shape[:2]
  terms, pairs = np.zeros((m, n, n)), np.zeros((m, n, n), bool)
  for s in range(m):
    for i in range(n):
      for j in range(n):
        d_true = np.linalg.norm(true[s, i] - true[s, j])
        shift = 1e-6 if version == 'boltz2' else 0.0
        d = np.linalg.norm(denoised[s, i] - denoised[s, j] + shift)
        for threshold in (0.5, 1.0, 2.0, 4.0):
          terms[s, i, j] += 0.25 / (1 + np.exp(abs(d_true - d) - threshold))
        limit = 30.0 if is_nucleotide[i] else 15.0
        pairs[s, i, j] = i != j and mask[i] and mask[j] and d_true < limit
  if version == 'boltz1':
    terms[:] = terms.mean(0)
  scores = []
  for s in range(m):
    count = pairs[s].sum()
    count = count + 1e-5 if version == 'boltz2' else max(count, 1)
    scores.append((terms[s] * pairs[s]).sum() / count)
  return float(1 - np.mean(scores))


def mean_squared_error(
  denoised: np.ndarray,
  true: np.ndarray,
  weights: np.ndarray,
  mask: np.ndarray,
  sigma: float,
  sigma_data: float,
  version: str,
) -> float:
  """Aligned, weighted by atom and noise level, of one sample [n, 3]."""
  target = rigid_align(true, denoised, weights, mask)
  squares = total = 0.0
  for i in np.flatnonzero(mask):
    squares += weights[i] * np.sum((denoised[i] - target[i]) ** 2)
    total += 3 * (1.0 if version == 'alphafold3' else weights[i])
  if version == 'boltz2':
    total += 1e-5
  if version == 'alphafold3':
    factor = (sigma**2 + sigma_data**2) / (sigma + sigma_data) ** 2
  else:
    factor = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
  return factor * squares / total if total else 0.0
