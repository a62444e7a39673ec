"""A device as the kernels see it: platform, kind, and the figures that tile sizes follow.

Knows the names of TPU chips; knows no kernel. The figures are JAX's own (`pltpu.TpuInfo`) and per
TensorCore; this module finds them for a device that is not here, for compiling ahead of time.
"""

import dataclasses
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

# Device kind, as JAX names it: chip, and TensorCores that one device has.
_CHIPS = {
    "TPU v4": (pltpu.ChipVersion.TPU_V4, 2),
    "TPU v5 lite": (pltpu.ChipVersion.TPU_V5E, 1),
    "TPU v5e": (pltpu.ChipVersion.TPU_V5E, 1),
    "TPU v5": (pltpu.ChipVersion.TPU_V5P, 2),
    "TPU v5p": (pltpu.ChipVersion.TPU_V5P, 2),
    "TPU v6 lite": (pltpu.ChipVersion.TPU_V6E, 1),
    "TPU v6e": (pltpu.ChipVersion.TPU_V6E, 1),
    "TPU7x": (pltpu.ChipVersion.TPU_7X, 1),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a choice of implementation and its tile sizes depend on.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: JAX's ``device_kind``, e.g. "TPU v6 lite" or "NVIDIA H200".
    """

    platform: str
    kind: str

    @classmethod
    def of(cls, device: Any) -> "Device":
        """The platform and kind of a device of JAX, or of a topology to compile for."""
        return cls(device.platform, device.device_kind)

    @classmethod
    def current(cls) -> "Device":
        """The device that is traced for: the mesh's, if a mesh is set, or else the first one here.

        A mesh of a topology's devices is how programs for absent devices are traced:
        ``jax.set_mesh(mesh)``, or ``jax.sharding.use_abstract_mesh`` with an abstract device.
        """
        abstract = jax.sharding.get_abstract_mesh().abstract_device
        if abstract is None:
            return cls.of(jax.devices()[0])
        return cls(abstract.platform, abstract.device_kind)


def tpu_info(kind: str) -> pltpu.TpuInfo:
    """The figures of one TensorCore of a TPU of this kind.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in _CHIPS:
        raise ValueError(f"device kind {kind!r} is unknown; known TPUs: {', '.join(_CHIPS)}")
    return pltpu.get_tpu_info_for_chip(*_CHIPS[kind])
