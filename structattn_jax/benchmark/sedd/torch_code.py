"""The published dual track, in PyTorch, for side-by-side measurements.

protein_lig_sedd `transformers_protlig_cross_improved.py` @ b2af3812 with the
repairs that make it run, and the samplers and losses of SEDD @ 0605786d, as
functions of a state dict: the same operations on the same shapes. Attention is
`scaled_dot_product_attention`. Nothing of this runs without torch.

Shapes as in the published code: [B, n] tokens, [B, n, V] scores.
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

State = Mapping[str, Any]

_TRACKS = {'protein': 'prot', 'ligand': 'lig'}


def _torch() -> Any:
  return importlib.import_module('torch')


def logits(
  state: State, tokens: Mapping[str, Any], sigma: Any, mode: str, num_head: int
) -> dict[str, Any]:
  """Log scores of the generated tracks, [B, n, V]."""
  condition = _condition(state, sigma)
  num_block = 1 + max(
    int(name.split('.')[1]) for name in state if name.startswith('blocks_lig.')
  )
  x = {track: _embedded(state, track, ids) for track, ids in tokens.items()}
  if mode == 'joint':
    for i in range(num_block):
      x = {
        track: _block(
          state, f'blocks_{short}.{i}.', x[track], condition, x[other], num_head
        )
        for (track, short), other in zip(
          _TRACKS.items(), ('ligand', 'protein'), strict=True
        )
      }
    generated = tuple(_TRACKS)
  else:
    target, _, context = mode.partition('_given_')
    read = x[context]
    for i in range(num_block // 2):
      name = f'blocks_{_TRACKS[context]}.{i}.'
      read = _block(state, name, read, condition, None, num_head)
    for i in range(num_block):
      name = f'blocks_{_TRACKS[target]}.{i}.'
      x[target] = _block(state, name, x[target], condition, read, num_head)
    generated = (target,)
  return {
    track: _log_score(_output(state, track, x[track], condition), ids, sigma)
    for track, ids in tokens.items()
    if track in generated
  }


def training_step(
  state: dict[str, Any],
  optimizer: Any,
  average: Sequence[Any],
  clean: Mapping[str, Any],
  noised: Mapping[str, Any],
  sigma: Any,
  rate: Any,
  num_head: int,
) -> Any:
  """Joint loss, gradients, clipping, AdamW and moving average."""
  torch = _torch()
  scores = logits(state, noised, sigma, 'joint', num_head)
  losses = [
    (
      rate[:, None]
      * _score_entropy(scores[track], sigma[:, None], noised[track], x0)
    ).mean()
    for track, x0 in clean.items()
  ]
  loss = sum(losses) / 2
  optimizer.zero_grad()
  loss.backward()
  torch.nn.utils.clip_grad_norm_(state.values(), 1.0)
  optimizer.step()
  with torch.no_grad():
    for shadow, value in zip(average, state.values(), strict=True):
      shadow.sub_((1 - 0.9999) * (shadow - value))
  return loss


def sample(
  state: State,
  mode: str,
  sizes: Mapping[str, tuple[int, int]],
  context: Mapping[str, Any],
  schedule: tuple[Any, Any, Any],
  num_samples: int,
  num_head: int,
) -> dict[str, Any]:
  """Analytic (joint) or Euler (conditional) sampler with the denoiser.

  Args:
    state: parameters.
    mode: what is generated from what.
    sizes: (length, vocabulary) of the generated tracks.
    context: [num_samples, m] tokens of the others.
    schedule: sigma [steps + 1], dsigma [steps], dt rate [steps].
    num_samples: batch.
    num_head: heads.
  """
  torch = _torch()
  sigmas, dsigmas, rates = schedule
  tokens = {
    track: torch.full((num_samples, n), vocab - 1, dtype=torch.int64)
    for track, (n, vocab) in sizes.items()
  }
  with torch.no_grad():
    for step in range(len(dsigmas) + 1):
      sigma = torch.full((num_samples,), float(sigmas[step]))
      scores = logits(state, {**tokens, **context}, sigma, mode, num_head)
      for track, ids in tokens.items():
        score = scores[track].exp()
        if step == len(dsigmas):
          probabilities = analytic(score, ids, sigma[:, None])[..., :-1]
        elif mode == 'joint':
          amount = torch.full((num_samples, 1), float(dsigmas[step]))
          probabilities = analytic(score, ids, amount)
        else:
          probabilities = euler(score, ids, float(rates[step]))
        tokens[track] = _draw(probabilities)
  return tokens


def update(log_score: Any, tokens: Any, amount: Any, predictor: str) -> Any:
  """One predictor step from log scores; `amount` is dsigma or dt rate."""
  score = log_score.exp()
  if predictor == 'analytic':
    return _draw(analytic(score, tokens, amount))
  return _draw(euler(score, tokens, amount))


def analytic(score: Any, tokens: Any, dsigma: Any) -> Any:
  """`staggered_score` times `transp_transition`, absorbing."""
  torch = _torch()
  vocab = score.shape[-1]
  score = score.clone()
  extra = (1 - dsigma.exp()) * score.sum(-1)
  score *= dsigma.exp()[..., None]
  score[..., -1] += extra
  edge = (-dsigma)[..., None].exp() * torch.nn.functional.one_hot(tokens, vocab)
  edge += torch.where(
    tokens == vocab - 1, 1 - (-dsigma).exp().expand(tokens.shape), 0.0
  )[..., None]
  return score * edge


def euler(score: Any, tokens: Any, amount: float) -> Any:
  """One-hot plus dt rate times the reverse rate, absorbing."""
  torch = _torch()
  vocab = score.shape[-1]
  one_hot = torch.nn.functional.one_hot(tokens, vocab)
  edge = -one_hot.clone()
  edge[tokens == vocab - 1] += 1
  rate = edge * score
  rate.scatter_(-1, tokens[..., None], torch.zeros_like(rate))
  rate.scatter_(-1, tokens[..., None], -rate.sum(-1, keepdim=True))
  return one_hot + amount * rate


def _draw(probabilities: Any) -> Any:
  torch = _torch()
  exponential = 1e-10 - (torch.rand_like(probabilities) + 1e-10).log()
  return (probabilities / exponential).argmax(-1)


def _score_entropy(log_score: Any, sigma: Any, tokens: Any, clean: Any) -> Any:
  """Absorbing; at masked positions, which are gathered as published."""
  torch = _torch()
  masked = tokens == log_score.shape[-1] - 1
  expm1 = torch.where(sigma < 0.5, torch.expm1(sigma), torch.exp(sigma) - 1)
  ratio = 1 / expm1.expand_as(tokens)[masked]
  chosen = log_score[masked]
  negative = ratio * torch.gather(chosen, -1, clean[masked][..., None])[..., 0]
  positive = chosen[:, :-1].exp().sum(-1)
  entropy = torch.zeros(tokens.shape)
  entropy[masked] += positive - negative + ratio * (ratio.log() - 1)
  return entropy


def _log_score(x: Any, tokens: Any, sigma: Any) -> Any:
  torch = _torch()
  expm1 = torch.where(sigma < 0.5, torch.expm1(sigma), sigma.exp() - 1)
  x = x - expm1.log()[:, None, None] - math.log(x.shape[-1] - 1)
  return torch.scatter(x, -1, tokens[..., None], torch.zeros_like(x[..., :1]))


def _condition(state: State, sigma: Any) -> Any:
  torch = _torch()
  functional = torch.nn.functional
  frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
  angle = sigma[:, None] * frequency
  x = torch.cat([angle.cos(), angle.sin()], -1)
  for name in ('sigma_map.mlp.0', 'sigma_map.mlp.2'):
    x = functional.silu(_linear(state, name, x))
  return x


def _embedded(state: State, track: str, tokens: Any) -> Any:
  functional = _torch().nn.functional
  table = state[f'{track}_embed.embedding.weight']
  x = functional.embedding(tokens, table) * math.sqrt(table.shape[-1])
  return _norm(state, f'{track}_embed.norm', x)


def _output(state: State, track: str, x: Any, condition: Any) -> Any:
  name = f'{track}_output.'
  modulation = _linear(state, f'{name}adaLN_modulation', condition)
  shift, scale = modulation[:, None].chunk(2, -1)
  x = _norm(state, f'{name}norm_final', x) * (1 + scale) + shift
  return _linear(state, f'{name}linear', x)


def _block(
  state: State, name: str, x: Any, condition: Any, read: Any, num_head: int
) -> Any:
  torch = _torch()
  functional = torch.nn.functional
  batch, n, _ = x.shape
  modulation = _linear(state, f'{name}adaLN_modulation', condition)[:, None]
  shift1, scale1, shift2, scale2 = modulation.chunk(4, -1)

  h = _norm(state, f'{name}norm1', x) * (1 + scale1) + shift1
  qkv = _linear(state, f'{name}attn_qkv', h).view(batch, n, 3, num_head, -1)
  query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
  d_head = query.shape[-1]
  frequency = 1 / 10000 ** (torch.arange(0, d_head, 2) / d_head)
  angle = torch.arange(n)[:, None] * frequency
  cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))

  def rotated(x):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin

  out = functional.scaled_dot_product_attention(
    rotated(query), rotated(key), value
  )
  x = x + _linear(state, f'{name}attn_out', _merged(out))

  if read is not None:
    cross = f'{name}cross_attn.'

    def heads(which, y):
      y = _linear(state, f'{cross}{which}', y)
      return y.view(batch, y.shape[1], num_head, -1).transpose(1, 2)

    out = functional.scaled_dot_product_attention(
      heads('q_proj', _norm(state, f'{cross}norm_q', x)),
      heads('k_proj', _norm(state, f'{cross}norm_kv', read)),
      heads('v_proj', read),
    )
    x = x + _linear(state, f'{cross}out_proj', _merged(out))

  h = _norm(state, f'{name}norm2', x) * (1 + scale2) + shift2
  h = functional.gelu(_linear(state, f'{name}mlp.0', h))
  return x + _linear(state, f'{name}mlp.3', h)


def _merged(x: Any) -> Any:
  """[B, n_head, n, d_head] as [B, n, c_hidden]."""
  return x.transpose(1, 2).flatten(2)


def _linear(state: State, name: str, x: Any) -> Any:
  functional = _torch().nn.functional
  return functional.linear(
    x, state[f'{name}.weight'], state.get(f'{name}.bias')
  )


def _norm(state: State, name: str, x: Any) -> Any:
  functional = _torch().nn.functional
  return functional.layer_norm(
    x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias']
  )


def set_threads() -> None:
  """As many threads as cores that this process may use."""
  _torch().set_num_threads(len(os.sched_getaffinity(0)))


def tensor(x: Any) -> Any:
  """A float tensor."""
  return _torch().tensor(np.array(x))


def tensors(tokens: Mapping[str, Any]) -> dict[str, Any]:
  """Tokens as int64 tensors."""
  return {name: tensor(x).long() for name, x in tokens.items()}


def state_dict(params: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Our parameters of the dual track under torch's names."""
  kinds = {
    'weights': 'weight',
    'scale': 'weight',
    'offset': 'bias',
    'bias': 'bias',
    'embedding': 'embedding.weight',
  }
  state = {}
  for path, values in params.items():
    *outer, last = re.sub(r'mlp_(\d)', r'mlp.\1', path).split('/')
    for name, value in values.items():
      value = np.array(value)
      layers = (
        enumerate(value) if outer[:1] == ['dual_track'] else [('', value)]
      )
      for index, own in layers:
        where = (
          [*outer[2:3], str(index), *outer[3:]]
          if outer[:1] == ['dual_track']
          else outer
        )
        key = '.'.join([*where, last, kinds[name]])
        state[key] = tensor(own.T if name == 'weights' else own).contiguous()
  return state


def forward(*arguments: Any) -> dict[str, Any]:
  """`logits` without gradients."""
  with _torch().no_grad():
    return logits(*arguments)


def trainer(
  state: State,
  clean: Mapping[str, Any],
  noised: Mapping[str, Any],
  sigma: Any,
  rate: Any,
  num_head: int,
) -> Callable[[], Any]:
  """A training step to call again and again."""
  torch = _torch()
  own = {name: x.clone().requires_grad_() for name, x in state.items()}
  optimizer = torch.optim.AdamW(list(own.values()), lr=3e-4, weight_decay=0.0)
  average = [x.detach().clone() for x in own.values()]

  def step():
    return training_step(
      own, optimizer, average, clean, noised, sigma, rate, num_head
    )

  return step
