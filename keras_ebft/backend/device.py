"""Where tensors live, asked of the running backend alone."""

import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_ebft.backend.runtime import backend_name
from keras_ebft.typing import Tensor

# Where Triton kernels run besides GPUs: its interpreter, if it was asked for.
TRITON_INTERPRETED_ON = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


class Device(NamedTuple):
    """The processor that an operation runs on.

    Attributes:
        platform: `"cpu"`, `"cuda"`, `"rocm"`, `"tpu"` or what the backend calls
            anything else.
        capability: `(major, minor)` of a CUDA device, otherwise `None`.
        maker: what a CPU calls its maker, such as `"AuthenticAMD"`, asked on PyTorch
            alone; otherwise `None`.
    """

    platform: str
    capability: tuple[int, int] | None = None
    maker: str | None = None


def device_of(tensor: Tensor) -> Device:
    """The `Device` that operations on a tensor run on.

    A traced tensor has no place yet; it will run where the backend puts things
    by default.

    Args:
        tensor: tensor or `keras.Variable`.
    """
    if isinstance(tensor, keras.Variable):
        tensor = tensor.value
    return _FINDERS[backend_name()](tensor)


def device_name(tensor: Tensor) -> str:
    """The model of the device that operations on a tensor run on, as it is sold.

    Args:
        tensor: tensor or `keras.Variable`.
    """
    if isinstance(tensor, keras.Variable):
        tensor = tensor.value
    platform = device_of(tensor).platform
    if backend_name() == "jax":
        return _jax_processor(tensor).device_kind
    if backend_name() == "torch" and platform in ("cuda", "rocm"):
        import torch

        return torch.cuda.get_device_name(tensor.device)
    return platform


def current_device_alone() -> dict[str, str]:
    """Environment of a process that finds the current device and no other.

    Of several GPUs PyTorch uses the one that `torch.cuda.set_device` names, which a
    new process does not know. On other backends it is the first, or all of them.
    """
    if backend_name() != "torch":
        return {}
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else range(torch.cuda.device_count())
    return {"CUDA_VISIBLE_DEVICES": str(names[torch.cuda.current_device()]).strip()}


@functools.cache
def _cpu_maker() -> str | None:
    """As Linux tells it; `None` elsewhere."""
    processors = Path("/proc/cpuinfo")
    if not processors.exists():
        return None
    found = re.search(r"^vendor_id\s*:\s*(\S+)", processors.read_text(), re.M)
    return found and found[1]


def _torch_device(tensor: Tensor) -> Device:
    import torch

    if tensor.device.type == "cpu":
        return Device("cpu", maker=_cpu_maker())
    if tensor.device.type != "cuda":
        return Device(tensor.device.type)
    if torch.version.hip is not None:
        return Device("rocm")
    return Device("cuda", torch.cuda.get_device_capability(tensor.device))


def _jax_processor(tensor: Tensor) -> Any:
    import jax

    if isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer):
        device = min(tensor.devices(), key=lambda device: device.id)
    else:
        device = jax.config.jax_default_device or jax.local_devices()[0]
    # `jax_default_device` may also be the name of a platform.
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device


def _jax_device(tensor: Tensor) -> Device:
    device = _jax_processor(tensor)
    if device.platform != "gpu":
        return Device(device.platform)
    if "rocm" in device.client.platform_version.lower():
        return Device("rocm")
    major, minor = str(device.compute_capability).split(".")
    return Device("cuda", (int(major), int(minor)))


def _tensorflow_device(tensor: Tensor) -> Device:
    import tensorflow as tf

    name = getattr(tensor, "device", None)
    kind = name.rsplit(":", 2)[-2] if name else None
    if kind is None:
        found = {device.device_type for device in tf.config.list_logical_devices()}
        kind = next((k for k in ("TPU", "GPU") if k in found), "CPU")
    if kind == "GPU":
        return Device("rocm" if tf.test.is_built_with_rocm() else "cuda")
    return Device(kind.lower())


_FINDERS = {
    "torch": _torch_device,
    "jax": _jax_device,
    "tensorflow": _tensorflow_device,
}
