"""The settings of a model's parts as JSON: what a record of a run compares."""

import inspect
import json
import zlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_ebft.configurable import Shown


def part_settings(model: Any) -> dict[str, Any]:
    """What decides how a model learns, beside its weights, optimizer and data.

    Functions stand as their names, and arrays as a checksum. What changes no number,
    `rematerialize` and `micro_batches`, is left out.

    Args:
        model: `EBFTModel`.

    Returns:
        nested dict as it comes out of a JSON file.
    """
    settings = model.objective.get_config()
    if model.objective.needs_rollouts:
        names = ("sampler", "feature_network", "reward", "advantage", "critic")
        settings |= {name: getattr(model, name) for name in names}
    return json.loads(json.dumps(_described(settings)))


def optimizer_settings(config: Any) -> Any:
    """An optimizer's configuration without names and numbers that training changes."""
    left_out = ("name", "build_config", "shared_object_id", "learning_rate")
    if not isinstance(config, dict):
        return config
    kept = {
        key: optimizer_settings(value)
        for key, value in config.items()
        if key not in left_out or (key == "learning_rate" and isinstance(value, dict))
    }
    # Tuples and other numbers as they come out of a file.
    return json.loads(json.dumps(kept, default=float))


def _described(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _described(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(part) for part in value]
    if isinstance(value, (np.ndarray, np.generic)):
        values = np.ascontiguousarray(value)
        content = values.reshape(-1).view("uint8")
        return [str(values.dtype), list(values.shape), zlib.crc32(content)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Shown, keras.optimizers.Optimizer)):
        if isinstance(value, Shown):
            settings = _described(value._shown_settings())
        else:
            settings = optimizer_settings(value.get_config())
        return {"class": type(value).__name__, **settings}
    named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return f"{named.__module__}.{named.__qualname__}"
