"""A short exam while training: held-out samples in the shape of a batch, one program for all.

An answer whose every token is the likeliest after the right ones is what greedy generation gives,
so this counts the same as `exam`, without generating.
"""

import functools
import random
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from demo import exam, packing, tools, training
from demo.encode import Encoder
from demo.sample import Sample
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

SUBJECTS: Mapping[str, Callable[[random.Random], Sample]] = {
    **exam.CHATS,
    "tools": lambda rng: tools.lesson(rng, held_out=True),
    **{name: exam.CODE[name] for name in ("holes", "gaps")},
}


class Quiz:
    """The questions, packed once.

    count: of each subject.
    """

    def __init__(self, encoder: Encoder, shape: packing.Shape, *, count: int, seed: int = 1):
        self._batches: dict[str, list[packing.Batch]] = {}
        for subject, make in SUBJECTS.items():
            rng = random.Random(f"quiz {seed} {subject}")
            samples = [encoder.encode(make(rng)) for _ in range(count)]
            self._batches[subject] = _packed(encoder.config, shape, samples)

    def shares(self, params: Weights, config: ModelConfig, machine: Runtime) -> dict[str, float]:
        """Shares of samples answered correctly from their first token to their last."""
        found = {}
        for subject, batches in self._batches.items():
            right = [each for b in batches for each in _right(params, config, machine, b)]
            found[subject] = sum(right) / len(right)
        return found

    def busiest(
        self, params: Weights, config: ModelConfig, machine: Runtime
    ) -> tuple[float, float]:
        """The smallest and the largest share of a layer's tokens that any expert gets."""
        counts = sum(
            _tokens_of_experts(params, batches[0], config=config, machine=machine)
            for batches in self._batches.values()
        )
        shares = counts / counts.sum(axis=1, keepdims=True)
        return float(shares.min()), float(shares.max())


def _packed(config: ModelConfig, shape: packing.Shape, samples: list) -> list[packing.Batch]:
    batches, packer = [], packing.Packer(config, shape, None)
    for sample in samples:
        if not packer.put(sample):
            batches.append(packer.batch())
            packer = packing.Packer(config, shape, None)
            packer.put(sample)  # one that no batch has room for is left out
    return [*batches, packer.batch()]


def _right(params: Weights, config: ModelConfig, machine: Runtime, batch: packing.Batch) -> list:
    likeliest = np.asarray(_likeliest(params, batch, config=config, machine=machine))
    same = likeliest == np.asarray(batch.targets)
    return [bool(same[batch.sample == i].all()) for i in range(int(batch.sample.max()) + 1)]


@functools.partial(jax.jit, static_argnames=("config", "machine"))
def _likeliest(params: Weights, batch: packing.Batch, *, config: ModelConfig, machine: Runtime):
    return jnp.argmax(training.logits_of(params, config, machine, batch), axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "machine"))
def _tokens_of_experts(params: Weights, batch: packing.Batch, *, config, machine) -> jax.Array:
    """int32 [layers, E]."""
    _, out = training.run(params, config, machine, batch)
    chosen = out.routing(config.text).reshape(config.text.num_hidden_layers, -1)
    return jax.vmap(lambda x: jnp.bincount(x, length=config.text.num_experts))(chosen)
