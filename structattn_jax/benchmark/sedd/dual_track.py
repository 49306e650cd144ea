"""SEDD protein-ligand: forward, training step, sampling, and the update alone.

Default width (768 channels, 12 heads) or 256 channels, vocabularies of 37 and
2365. Candidates:
  program: `prepared_network`, what the samplers use.
  network: the Haiku network, layers in a loop over stacked parameters;
    'network, dots' computes all but products with weights again in the
    backward pass, 'network, full' all of a layer.
  unrolled: the published training step in JAX, layers written out, entropies of
    log scores.
  published: the published formulation in JAX: layers written out; samplers with
    AdaLN in every step, a context per sample, log scores and V uniforms for
    every position.
  torch: the published code with its repairs and `scaled_dot_product_attention`,
    where PyTorch can be imported. The baseline, else 'published' is.

Everything runs on the cores that the process may use; pin it to one, as with
`taskset -c 1`, for numbers like the published ones. The CPU time of a call is
the least of its repeats.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from structattn_jax.benchmark import harness
from structattn_jax.benchmark.sedd import torch_code as sedd_torch
from structattn_jax.discrete_diffusion import (
  absorbing,
  literal,
  losses,
  prepared_network,
  samplers,
  schedule,
)
from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.discrete_diffusion import noise as noise_lib
from structattn_jax.discrete_diffusion import program as program_lib
from structattn_jax.network.sedd import blocks, embeddings
from structattn_jax.network.sedd import dual_track as network


class Case(NamedTuple):
  """Sizes: batch, lengths, channels, blocks, and steps of a sampler."""

  batch: int
  n_protein: int
  n_ligand: int
  hidden_size: int
  num_block: int
  steps: int = 0

  def __str__(self) -> str:
    """Label in the table."""
    label = (
      f'{self.batch}x({self.n_protein}+{self.n_ligand}) '
      f'c={self.hidden_size} blocks={self.num_block}'
    )
    return f'{label} steps={self.steps}' if self.steps else label


FORWARD = (
  Case(1, 128, 64, 768, 2),
  Case(2, 256, 64, 768, 4),
  Case(2, 512, 128, 768, 8),
)
TRAINING = (
  Case(1, 128, 64, 768, 2),
  Case(2, 256, 64, 768, 4),
  Case(4, 512, 128, 768, 4),
)
JOINT = (Case(1, 128, 64, 256, 2, 64), Case(2, 128, 64, 768, 2, 64))
GIVEN = (
  Case(4, 128, 64, 256, 2, 64),
  Case(4, 256, 64, 768, 2, 32),
  Case(8, 512, 64, 768, 4, 8),
)
UPDATE = ((16, 128, 2365),)
_QUICK = (Case(1, 24, 16, 64, 2),)
_QUICK_SAMPLING = (Case(2, 24, 16, 64, 2, 4),)
_QUICK_UPDATE = ((2, 16, 300),)
_REPEATS = 5


def baseline() -> str:
  """What ratios are to: 'torch' where it can be imported."""
  found = importlib.util.find_spec('torch') is not None
  return 'torch' if found else 'published'


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures everything.

  Args:
    quick: small sizes, few repeats.
    rss: not used; see the temporaries.
    report: called with each table as soon as it is there.

  Returns:
    A table each for forward, training, two samplers and the update.
  """
  del rss
  if baseline() == 'torch':
    sedd_torch.set_threads()
  tables = []
  plan: Any = (
    ('joint forward', _QUICK if quick else FORWARD, forward),
    ('training step', _QUICK if quick else TRAINING, training),
    ('joint sampling', _QUICK_SAMPLING if quick else JOINT, joint_sampling),
    (
      'ligand given one shared protein',
      _QUICK_SAMPLING if quick else GIVEN,
      conditional_sampling,
    ),
    ('sampler update alone', _QUICK_UPDATE if quick else UPDATE, update),
  )
  for title, cases, make in plan:
    rows: list[harness.Measurement] = []
    for case in cases:
      rows += _compare(str(case), make(case), 2 if quick else _REPEATS)
    table = harness.Table(
      title=f'SEDD, {title}', baseline=baseline(), rows=tuple(rows)
    )
    tables.append(table)
    report(table)
  return tables


class Candidate(NamedTuple):
  """Something to time: no arguments, returns when it is done."""

  call: Callable[[], Any]
  compile_seconds: float = 0.0
  temp_bytes: int | None = None


def _compiled(
  fn: Callable[..., Any], *args: Any, donate: bool = False
) -> Candidate:
  """A JAX function; with `donate` its first result replaces its argument."""
  start = time.perf_counter()
  program = (
    jax.jit(fn, donate_argnums=0 if donate else ()).lower(*args).compile()
  )
  seconds = time.perf_counter() - start
  state = [jax.tree.map(jnp.array, args[0])] if donate else []

  def call():
    if not donate:
      return jax.block_until_ready(program(*args))
    state[0], result = jax.block_until_ready(program(state[0], *args[1:]))
    return result

  memory = program.memory_analysis()
  temp = getattr(memory, 'temp_size_in_bytes', None)
  return Candidate(call, seconds, temp)


def _compare(
  case: str, candidates: Mapping[str, Candidate], repeats: int
) -> list[harness.Measurement]:
  """Calls in turns; CPU time is the least, wall time the median."""
  wall: dict[str, list[float]] = {name: [] for name in candidates}
  cpu: dict[str, list[float]] = {name: [] for name in candidates}
  for repeat in range(repeats + 1):
    for name, candidate in candidates.items():
      wall_start, cpu_start = time.perf_counter(), time.process_time()
      candidate.call()
      if repeat:  # The first warms up.
        wall[name].append(time.perf_counter() - wall_start)
        cpu[name].append(time.process_time() - cpu_start)
  return [
    harness.Measurement(
      case=case,
      candidate=name,
      lower_seconds=0.0,
      compile_seconds=candidate.compile_seconds,
      median_seconds=float(np.median(wall[name])),
      min_seconds=min(wall[name]),
      cpu_seconds=min(cpu[name]),
      calls=repeats,
      temp_bytes=candidate.temp_bytes,
    )
    for name, candidate in candidates.items()
  ]


def model(
  case: Case,
) -> tuple[network.DualTrackConfig, hk.Params]:
  """Random parameters of a case."""
  config = network.DualTrackConfig(
    hidden_size=case.hidden_size,
    num_head=case.hidden_size // 64 or 1,
    num_block=case.num_block,
  )
  token = jnp.zeros(1, jnp.int32)
  shapes = jax.eval_shape(
    network.transform_sedd_dual_track(config).init,
    jax.random.key(0),
    token,
    token,
    jnp.float32(1),
  )
  rng = np.random.default_rng(0)

  def draw(name, x):
    if x.ndim > 1 and name == 'weights':
      scale = 0.5 * x.shape[-2] ** -0.5
    else:
      scale = 0.1
    value = scale * rng.standard_normal(x.shape, np.float32)
    return jnp.asarray(value + np.float32(name == 'scale'))

  return config, {
    path: {name: draw(name, x) for name, x in values.items()}
    for path, values in shapes.items()
  }


def batch_of(config: network.DualTrackConfig, case: Case) -> dict[str, Any]:
  """Random clean tokens."""
  rng = np.random.default_rng(1)
  return {
    'protein': rng.integers(
      0, config.protein_vocab - 1, (case.batch, case.n_protein), np.int32
    ),
    'ligand': rng.integers(
      0, config.ligand_vocab - 1, (case.batch, case.n_ligand), np.int32
    ),
  }


_NO_MASKS = {'protein': None, 'ligand': None}


def forward(case: Case) -> dict[str, Candidate]:
  """Log scores of both tracks, each sample at its own noise."""
  config, params = model(case)
  tokens = batch_of(config, case)
  sigma = np.linspace(0.3, 3, case.batch, dtype=np.float32)
  program = jax.jit(
    lambda params: program_lib.prepare(config, params, absorbing=False)
  )(params)

  def scores(logits, tokens, sigma):
    return {
      track: graph_lib.log_score(logits[track], ids, sigma[:, None])
      for track, ids in tokens.items()
    }

  def by_program(program, tokens, sigma):
    modulation = prepared_network.modulations(program, sigma)
    begun = prepared_network.begin(program, modulation, tokens, _NO_MASKS)
    return scores(begun.logits(), tokens, sigma)

  def by_network(params, tokens, sigma):
    found = losses.batched_logits(
      config, params, network.ProteinLigand(**tokens), sigma
    )
    return scores(vars(found), tokens, sigma)

  def published(params, tokens, sigma):
    found = _unrolled(config, params, network.ProteinLigand(**tokens), sigma)
    return scores(found, tokens, sigma)

  found = {
    'program': _compiled(by_program, program, tokens, sigma),
    'network': _compiled(by_network, params, tokens, sigma),
    'published': _compiled(published, params, tokens, sigma),
  }
  if baseline() == 'torch':
    state = sedd_torch.state_dict(params)
    given = sedd_torch.tensors(tokens)
    found['torch'] = Candidate(
      lambda: sedd_torch.forward(
        state, given, sedd_torch.tensor(sigma), 'joint', config.num_head
      )
    )
  return found


def _unrolled(
  config: network.DualTrackConfig,
  params: hk.Params,
  tokens: network.ProteinLigand,
  sigma: Any,
) -> dict[str, jax.Array]:
  """Joint logits of a batch with the layers written out."""

  def apply(fn, params, *arguments):
    transformed = hk.without_apply_rng(hk.transform(fn))
    return transformed.apply(params, *arguments)

  scope = f'dual_track/{blocks.LAYER_STACK}/'
  stacked = {
    path.removeprefix(scope): values
    for path, values in params.items()
    if path.startswith(scope)
  }

  def layer(*states, condition, index):
    own = jax.tree.map(lambda x: x[index], stacked)
    return [
      apply(
        lambda x, y, name=name: blocks.DDiTBlock(config, name=name)(
          x, condition, None, y
        ),
        own,
        states[i],
        states[1 - i],
      )
      for i, name in enumerate(('blocks_prot', 'blocks_lig'))
    ]

  def one(protein, ligand, sigma):
    condition = apply(
      lambda sigma: embeddings.TimestepEmbedder(config.cond_dim)(sigma),
      params,
      sigma,
    )
    states = [
      apply(
        lambda ids, track=track: network.embedding(config, track)(ids),
        params,
        ids,
      )
      for track, ids in (('protein', protein), ('ligand', ligand))
    ]
    for index in range(config.num_block):
      states = layer(*states, condition=condition, index=index)
    return {
      track: apply(
        lambda x, track=track, vocab=vocab: blocks.FinalLayer(
          config, vocab, name=f'{track}_output'
        )(x, condition),
        params,
        x,
      )
      for (track, vocab), x in zip(
        (
          ('protein', config.protein_vocab),
          ('ligand', config.ligand_vocab),
        ),
        states,
        strict=True,
      )
    }

  return jax.vmap(one)(tokens.protein, tokens.ligand, sigma)


def training(case: Case) -> dict[str, Candidate]:
  """Joint loss, gradient, clipping, AdamW, and moving average."""
  config, params = model(case)
  clean = network.ProteinLigand(**batch_of(config, case))
  t = jnp.linspace(0.2, 0.9, case.batch)
  noised = losses.corrupt(config, jax.random.key(0), clean, t)
  # Clipping and decay as published.
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.0)
  )

  def step_of(loss):
    def step(state, clean, noised, t):
      params, average, moments = state
      value, gradient = jax.value_and_grad(loss)(params, clean, noised, t)
      updates, moments = optimizer.update(gradient, moments, params)
      params = optax.apply_updates(params, updates)
      average = jax.tree.map(
        lambda s, p: s - (1 - 0.9999) * (s - p), average, params
      )
      return (params, average, moments), value

    return step

  def looped(remat):
    chosen = dataclasses.replace(config, remat=remat)
    return lambda params, clean, noised, t: (
      losses.dual_track_loss(
        chosen, params, clean, noised, t, reduction='positions'
      ).loss
    )

  def unrolled(params, clean, noised, t):
    noise = noise_lib.DEFAULT
    sigma, rate = noise.total(t), noise.rate(t)
    logits = _unrolled(config, params, noised, sigma)
    parts = []
    for track, graph in losses.graphs_of(config).items():
      ids = getattr(noised, track)
      log_score = graph.log_score(logits[track], ids, sigma[:, None])
      entropy = graph.score_entropy(
        log_score, sigma[:, None], ids, getattr(clean, track)
      )
      parts.append(jnp.mean(rate[:, None] * entropy))
    return (parts[0] + parts[1]) / 2

  state = (params, params, optimizer.init(params))
  found = {
    name: _compiled(step_of(loss), state, clean, noised, t, donate=True)
    for name, loss in (
      ('network', looped('none')),
      ('network, dots', looped('dots')),
      ('network, full', looped('full')),
      ('unrolled', unrolled),
    )
  }
  if baseline() == 'torch':
    noise = noise_lib.DEFAULT
    found['torch'] = Candidate(
      sedd_torch.trainer(
        sedd_torch.state_dict(params),
        *(
          sedd_torch.tensors({'protein': x.protein, 'ligand': x.ligand})
          for x in (clean, noised)
        ),
        sedd_torch.tensor(noise.total(t)),
        sedd_torch.tensor(noise.rate(t)),
        config.num_head,
      )
    )
  return found


def joint_sampling(case: Case) -> dict[str, Candidate]:
  """Protein and ligand from nothing, analytic predictor."""
  return _sampling(case, 'joint', 'analytic')


def conditional_sampling(case: Case) -> dict[str, Candidate]:
  """Ligands of one protein, Euler predictor, as published."""
  return _sampling(case, 'ligand_given_protein', 'euler')


def _sampling(
  case: Case, mode: network.Mode, predictor: schedule.Predictor
) -> dict[str, Candidate]:
  config, params = model(case)
  sampler = schedule.SamplerConfig(steps=case.steps, predictor=predictor)
  lengths = {'protein': case.n_protein, 'ligand': case.n_ligand}
  tracks = network.tracks_of(mode)
  protein = batch_of(config, case)['protein'][:1]
  context = dict.fromkeys(tracks.context, protein)
  sizes = {
    track: (lengths[track], getattr(config, f'{track}_vocab'))
    for track in tracks.generated
  }
  program = jax.jit(lambda params: program_lib.prepare(config, params))(params)

  def ours(program, key, context):
    return samplers.sample(
      config,
      program,
      key,
      num_samples=case.batch,
      mode=mode,
      sampler=sampler,
      **context,
      **{track: n for track, (n, _) in sizes.items()},
    ).tokens

  def published(params, key, context):
    # A context per sample, and a draw per state.
    context = {
      track: jnp.repeat(x, case.batch, 0) for track, x in context.items()
    }

    def of_tokens(tokens, sigma):
      found = losses.batched_logits(
        config,
        params,
        network.ProteinLigand(**tokens, **context),
        jnp.full(case.batch, sigma),
        mode=mode,
      )
      return {track: getattr(found, track) for track in tokens}

    plan = schedule.make_schedule(noise_lib.DEFAULT, sampler)
    keys = jax.random.split(key, case.steps + 1)

    def draw(probabilities, key):
      uniform = jax.random.uniform(key, probabilities.shape)
      return literal.categorical_from_uniform(probabilities, uniform)

    return literal.run_literal(
      of_tokens,
      {track: graph_lib.Absorbing(dim) for track, (_, dim) in sizes.items()},
      {
        track: jnp.full((case.batch, n), dim - 1, jnp.int32)
        for track, (n, dim) in sizes.items()
      },
      dict.fromkeys(sizes, keys[:-1]),
      dict.fromkeys(sizes, keys[-1]),
      jnp.asarray(plan.sigma),
      draw,
      noise_lib.DEFAULT,
      sampler,
      {},
      with_probabilities=False,
    ).tokens

  key = jax.random.key(0)
  found = {'program': _compiled(ours, program, key, context)}
  found['published'] = _compiled(published, params, key, context)
  if baseline() == 'torch':
    state = sedd_torch.state_dict(params)
    copies = {
      track: np.repeat(x, case.batch, 0) for track, x in context.items()
    }
    given = sedd_torch.tensors(copies)
    plan = schedule.make_schedule(noise_lib.DEFAULT, sampler)
    found['torch'] = Candidate(
      lambda: sedd_torch.sample(
        state, mode, sizes, given, plan, case.batch, config.num_head
      )
    )
  return found


def update(shape: tuple[int, int, int]) -> dict[str, Candidate]:
  """New tokens from logits [B, n, V], all of them absorbed."""
  batch, n, dim = shape
  rng = np.random.default_rng(0)
  logits: Any = rng.standard_normal(shape, np.float32)
  tokens: Any = np.full((batch, n), dim - 1, np.int32)
  sigma: Any = np.float32(1.2)
  dsigma = np.float32(0.03)
  extra = -(dim - 1) % program_lib.BLOCK
  # The samplers' output layer writes them like this.
  padded = np.pad(
    logits[..., :-1], ((0, 0), (0, 0), (0, extra)), constant_values=-1e30
  )
  log_chance = float(np.log(np.expm1(dsigma) / np.expm1(sigma)))
  key = jax.random.key(0)

  def ours(logits, tokens, key):
    uniform = jax.random.uniform(key, (batch, n, 2))
    return absorbing.replace_from_uniform(
      logits, tokens, log_chance, uniform, dim=dim
    )

  def published(log_score, tokens, key):
    probabilities = literal.step_probabilities(
      graph_lib.Absorbing(dim), log_score, tokens, jnp.asarray(dsigma)
    )
    uniform = jax.random.uniform(key, probabilities.shape)
    return literal.categorical_from_uniform(probabilities, uniform)

  log_score = np.array(graph_lib.log_score(logits, tokens, sigma))
  # On the device before, as torch's tensors are.
  found = {
    'program': _compiled(ours, *map(jnp.asarray, (padded, tokens)), key),
    'published': _compiled(
      published, *map(jnp.asarray, (log_score, tokens)), key
    ),
  }
  if baseline() == 'torch':
    given = sedd_torch.tensors({'tokens': tokens})['tokens']
    score = sedd_torch.tensor(log_score)
    amount = sedd_torch.tensor(np.full((batch, 1), dsigma))
    found['torch'] = Candidate(
      lambda: sedd_torch.update(score, given, amount, 'analytic')
    )
  return found
