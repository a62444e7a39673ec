"""Mesh and strategy where nobody named them: the best plan of `search`, for chips with figures.

Knows `search` and the devices that are here. The rule is `search.rank`, for rows of 4,096 tokens
(or the longest context, if that is shorter). For devices of which `chips` has no figures, such as
CPUs, it is `auto_mesh` with the strategy "ep+tp".
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from qwen_jax import sharding as sharding_lib
from qwen_jax.functional import auto_mesh
from qwen_jax.planner.chips import CHIPS, Topology
from qwen_jax.planner.plan import Load
from qwen_jax.planner.search import search
from qwen_jax.runtime import Runtime
from qwen_jax.sharding import Rules
from qwen_jax.weights.config import ModelConfig

log = logging.getLogger(__name__)

_CONTEXT = 4096


def runtime_for(
    config: ModelConfig,
    *,
    rows: int,
    max_model_len: int | None,
    mesh: str | Mapping[str, int] | Mesh,
    strategy: str | Rules,
    dtype: str,
    kv_cache_dtype: str,
    kernels: str | Mapping[str, str],
    page_size: int,
    dispatch: str,
    quantization: str | None,
) -> Runtime:
    """`Runtime.make`, with mesh and strategy of "auto" from `choose`.

    Args:
        config: the model.
        rows: that will decode together.
        max_model_len: the longest context, None for the model's.
        mesh, strategy, dtype, kv_cache_dtype, kernels, page_size, dispatch, quantization: as
            `Runtime.make` takes them.

    Raises:
        ValueError: as `Runtime.make`, or nothing divides the model on these devices.
    """
    # Numbers out of range are refused by the engine's capacity, under the names they came with.
    longest = max_model_len or config.text.max_position_embeddings
    load = Load(
        batch=max(1, rows),
        context=max(1, min(_CONTEXT, longest)),
        dtype=dtype,
        kv_dtype=kv_cache_dtype,
        quantization=quantization,
        page_size=page_size,
    )
    mesh, strategy = choose(config, load, mesh=mesh, strategy=strategy, dispatch=dispatch)
    return Runtime.make(
        mesh=mesh,
        strategy=strategy,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        kernels=kernels,
        page_size=page_size,
        config=config,
        quantization=quantization,
        dispatch=dispatch,
    )


def choose(
    config: ModelConfig,
    load: Load,
    *,
    mesh: str | Mapping[str, int] | Mesh = "auto",
    strategy: str | Rules = "auto",
    dispatch: str = "auto",
    devices: Sequence[Any] | None = None,
) -> tuple[str | Mapping[str, int] | Mesh, str | Rules]:
    """Mesh and strategy for a load; what is not "auto" stays as it is given.

    Args:
        config, load, dispatch: as for `search`.
        mesh, strategy: as `Runtime.make` takes them.
        devices: default all that are here.

    Raises:
        ValueError: nothing divides the model on these devices.
    """
    free = isinstance(mesh, str) and mesh == "auto"
    if not free and strategy != "auto":
        return mesh, strategy
    devices = list(jax.devices() if devices is None else devices)
    sizes = None
    if not free:
        made = sharding_lib.make_mesh(mesh, devices)
        sizes, devices = dict(made.shape), list(made.devices.flat)
    topology = _topology(devices)
    if topology is None or not set(sizes or ()) <= set(sharding_lib.AXES):
        return auto_mesh(config, len(devices)) if free else mesh, strategy
    best, *others = search(config, topology, load, mesh=sizes, strategy=strategy, dispatch=dispatch)
    log.info(
        "mesh %s, strategy %s: best of %d plans for %d rows, at most %.0f tokens/s in decode%s",
        dict(best.mesh),
        best.strategy,
        1 + len(others),
        load.batch,
        best.decode_tokens_per_s,
        "" if best.fits else "; none has room for them all",
    )
    return best.mesh if free else mesh, strategy if strategy != "auto" else best.strategy


def _topology(devices: Sequence[Any]) -> Topology | None:
    """So many of a kind of chip that `chips` has figures of; None for another kind."""
    kind = devices[0].device_kind
    known = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    if not known or devices[0].platform == "cpu":
        return None
    chip = max(known, key=lambda chip: len(chip.kind))
    return Topology(chip, (-(-len(devices) // chip.devices_per_chip),))
