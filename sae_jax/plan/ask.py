"""A config from the few figures that a plan needs."""

import dataclasses
import math
from typing import Any

from sae_jax.config import TrainConfig, checked

_GROUPS = {
    "sae": ("n_latents", "d_model", "k", "compute_dtype"),
    "data": ("batch_rows", "microbatch_rows"),
    "mesh": ("data", "latent"),
}


def with_flags(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The config with what is given (not None), checked.

    What has to do with the order of rows alone, or with the end of a short run, is set
    so that it is in nobody's way.

    Raises:
        ValueError: a figure that no run could have; one line.
    """
    values = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config) if not values else _replaced(config, values)
    return checked(config)


def _replaced(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    changes: dict[str, Any] = {}
    for group, names in _GROUPS.items():
        own = {name: values[name] for name in names if name in values}
        if group == "data" and "batch_rows" in own:
            lanes = config.data.lanes
            own["lanes"] = lanes if own["batch_rows"] % lanes == 0 else 1
        changes[group] = dataclasses.replace(getattr(config, group), **own)
    batch_rows = changes["data"].batch_rows
    rows = values.get("rows", config.rows)
    if not 1 <= rows < math.inf:
        raise ValueError(f"rows = {rows}: must be at least 1")
    changes["rows"] = max(int(rows), batch_rows)
    most = max(1, (changes["rows"] // batch_rows - 1) * batch_rows)
    changes["dead_after_rows"] = min(config.dead_after_rows, most)
    return dataclasses.replace(config, **changes)
