"""Eight devices, two processes, and killed processes against one that lives."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from structattn_jax import checkpoint, training

# AdamW divides by the size of the gradient: where that is rounding noise alone,
# a small eps makes steps of it.
ROBUST = training.OptimizerConfig(learning_rate=1e-1, warmup=1, eps=1e-3)

# Prints differences to one device after three steps, relative to how far the
# parameters went: of the real loss on eight devices; of a loss without noise in
# two parts on one device, and in two parts on eight.
EIGHT_DEVICES = """
import dataclasses, jax, jax.numpy as jnp, numpy as np
jax.config.update('jax_default_matmul_precision', 'highest')
from structattn_jax import training
from structattn_jax.training import objective

config = training.TrainConfig.from_toml({config!r})
pairs = training.load_data(config).train
batches = training.make_batches(config, pairs)
optimizer = training.make_optimizer(config.optimizer)
assert len(jax.devices()) == 8

def run(loss_fn, params, batch_of, devices, accumulate=1):
  mesh = training.make_mesh(jax.devices()[:devices])
  step = training.make_step(
    loss_fn, optimizer, mesh=mesh, seed=0, ema_decay=0.9, accumulate=accumulate
  )
  state = training.init_state(params, optimizer)
  state = training.replicate(state, mesh)
  for i in range(3):
    batch = training.shard_batch(batch_of(i), mesh)
    state, metrics = step(state, batch)
  for leaf in jax.tree.leaves(batch):
    assert len(leaf.sharding.device_set) == devices
  for leaf in jax.tree.leaves(state):
    assert leaf.sharding.is_fully_replicated
  return jax.tree.map(np.asarray, (state.params, state.ema, metrics))

def largest(a, b):
  return max(
    np.abs(x - y).max()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )

def difference(params, one, other):
  np.testing.assert_allclose(one[2]['loss'], other[2]['loss'], rtol=1e-5)
  far = largest(params, one[0])
  assert far > 1e-3
  return largest(one[:2], other[:2]) / far

params = objective.init_params(config)
real = objective.make_loss(config, 'joint'), params, batches.batch
print(difference(params, run(*real, 1), run(*real, 8)))

def squares(params, key, batch, step):
  x, y = batch
  return jnp.mean((jnp.tanh(x @ params['m']['w']) - y) ** 2), {{}}

rng = np.random.default_rng(0)
rows = [
  (rng.normal(size=(16, 5)), rng.normal(size=(16, 3))) for _ in range(3)
]
rows = jax.tree.map(np.float32, rows)
params = {{'m': {{'w': jnp.ones((5, 3))}}}}
toy = squares, params, rows.__getitem__
one = run(*toy, 1)
for devices in (1, 8):
  print(difference(params, one, run(*toy, devices, accumulate=2)))
"""


def run_python(*arguments, devices=1, wait=True):
  environment = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    XLA_FLAGS='--xla_backend_optimization_level=0 '
    f'--xla_force_host_platform_device_count={devices}',
  )
  process = subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  return finish(process) if wait else process


def finish(process):
  out, error = process.communicate(timeout=540)
  assert process.returncode == 0, error[-3000:]
  return out


def test_eight_devices_give_the_steps_of_one(tiny, change, tmp_path):
  pytest.importorskip('orbax.checkpoint')
  config = tmp_path / 'config.toml'
  # The lone ligand of the table serves no mode here.
  pairs = dataclasses.replace(tiny.data, skip_bad_rows=True)
  settings = change(
    data=pairs, batch_size=16, modes=('joint',), optimizer=ROBUST
  )
  config.write_text(settings.to_toml(), encoding='utf-8')
  out = run_python('-c', EIGHT_DEVICES.format(config=str(config)), devices=8)
  differences = [float(line) for line in out.split()]
  assert len(differences) == 3
  assert max(differences) < 1e-4


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(change, tmp_path):
  pytest.importorskip('orbax.checkpoint')
  config = tmp_path / 'config.toml'
  settings = change(steps=3, optimizer=ROBUST)
  config.write_text(settings.to_toml(), encoding='utf-8')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = ('-m', 'structattn_jax.cli', 'train', config, '--quiet', '--out')
  processes = [
    run_python(
      *command,
      tmp_path / 'two',
      *('--coordinator', f'localhost:{port}'),
      *('--num-processes', 2, '--process-id', i),
      wait=False,
    )
    for i in range(2)
  ]
  for process in processes:
    finish(process)
  run_python(*command, tmp_path / 'one')
  one, two = (
    checkpoint.load(tmp_path / name / 'model.npz').params
    for name in ('one', 'two')
  )
  for module, values in one.items():
    for name, value in values.items():
      np.testing.assert_allclose(two[module][name], value, atol=1e-5)
  assert len(training.read_metrics(tmp_path / 'two' / 'metrics.csv')) == 3


@pytest.mark.slow
def test_killed_processes_give_the_run_of_one_that_lives(change, tmp_path):
  pytest.importorskip('orbax.checkpoint')
  config = tmp_path / 'config.toml'
  # Most of the time goes into writing checkpoints: kills hit that, too.
  settings = change(
    steps=60,
    modes=('ligand_only',),
    checkpoint_every=1,
    log_every=1,
    evaluate_every=0,
  )
  config.write_text(settings.to_toml(), encoding='utf-8')
  command = ('-m', 'structattn_jax.cli', 'train', config, '--quiet', '--out')
  killed, whole = tmp_path / 'killed', tmp_path / 'whole'
  metrics = killed / 'metrics.csv'
  for wanted in (7, 23, 41):
    process = run_python(*command, killed, wait=False)
    while process.poll() is None:
      rows = training.read_metrics(metrics)
      if rows and rows[-1]['step'] >= wanted:
        process.kill()
      time.sleep(0.003)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  run_python(*command, killed)
  run_python(*command, whole)
  same = [(f / 'model.npz').read_bytes() for f in (killed, whole)]
  assert same[0] == same[1]
  losses = [
    [(row['step'], row['loss']) for row in training.read_metrics(path)]
    for path in (metrics, whole / 'metrics.csv')
  ]
  assert losses[0] == losses[1]
  assert len(losses[0]) == 60
