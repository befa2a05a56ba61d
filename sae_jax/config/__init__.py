"""Every setting of a run, typed, with its default and its check.

A config is a tree of dataclasses. ``experiments/*.py`` return one from
``get_config()``, the command line overrides fields by their dotted names, and the
run folder keeps the result as ``config.json``. Field checks are in ``__post_init__``;
because an override is set after construction, `checked` runs them again. Checks that
need the mesh or the store are in `sae_jax.step.validate`.

A field is a `setting`: default, meaning and choices in one place, which `sae-jax train
--help` shows. Where a field may be None, its meaning says what None stands for. What
lasts is given in rows, so that it does not move with the batch size.
"""

from sae_jax.config.cluster import Cluster
from sae_jax.config.fields import (
    changed,
    checked,
    from_json,
    nearest_name,
    settings_of,
    to_json,
)
from sae_jax.config.sae import (
    ARCHITECTURES,
    CHOOSE_K,
    COMPUTE_DTYPES,
    NORMALIZATIONS,
    SaeConfig,
    k_aux,
    max_active,
    most_chosen,
    sparsity,
    subtracts_b_dec,
)
from sae_jax.config.stream import StreamConfig
from sae_jax.config.train import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    learning_rate,
    shards_optimizer,
)

__all__ = [
    "ARCHITECTURES",
    "CHOOSE_K",
    "COMPUTE_DTYPES",
    "NORMALIZATIONS",
    "Cluster",
    "DataConfig",
    "MeshConfig",
    "OptimizerConfig",
    "SaeConfig",
    "StreamConfig",
    "TrainConfig",
    "changed",
    "checked",
    "from_json",
    "k_aux",
    "learning_rate",
    "max_active",
    "most_chosen",
    "nearest_name",
    "settings_of",
    "shards_optimizer",
    "sparsity",
    "subtracts_b_dec",
    "to_json",
]
