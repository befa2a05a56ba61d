"""Every setting of a run, typed, with its default and its check.

A config is a tree of dataclasses. ``experiments/*.py`` return one from
``get_config()``, the command line overrides fields by their dotted names, and the
run folder keeps the result as ``config.json``. Field checks are in ``__post_init__``;
because an override is set after construction, `checked` runs them again. Checks that
need the mesh or the store are in `sae_jax.step.validate`.

A field that is ``None`` is derived; its comment says from what.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

ARCHITECTURES = ("topk",)
NORMALIZATIONS = (
    "none",
    "center_unit_norm",
    "layer_norm",
    "scale_to_sqrt_d",
    "unit_mean_square",
)
COMPUTE_DTYPES = ("float32", "bfloat16")

_Config = TypeVar("_Config")


@dataclasses.dataclass(unsafe_hash=True)
class SaeConfig:
    """What the SAE is: shapes, sparsity and the space it works in."""

    architecture: str = "topk"
    d_model: int | None = None  # the width of the store's site
    n_latents: int = 4096
    k: int = 32
    k_aux: int | None = None  # the power of two nearest to d_model / 2
    aux_coefficient: float = 1 / 32
    normalization: str = "center_unit_norm"
    use_b_enc: bool = True
    subtract_b_dec: bool = True
    compute_dtype: str | None = None  # float32 on a CPU, bfloat16 elsewhere

    def __post_init__(self) -> None:
        _check_types(self, "sae.")
        _check_choice("sae.architecture", self.architecture, ARCHITECTURES)
        _check_choice("sae.normalization", self.normalization, NORMALIZATIONS)
        if self.compute_dtype is not None:
            _check_choice("sae.compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _check_at_least("sae.n_latents", self.n_latents, 1)
        _check_at_least("sae.k", self.k, 1)
        if self.k > self.n_latents:
            raise ValueError(
                f"sae.k = {self.k} is more than sae.n_latents = {self.n_latents}: "
                "choose at most as many latents as there are"
            )
        for name in ("d_model", "k_aux"):
            if getattr(self, name) is not None:
                _check_at_least(f"sae.{name}", getattr(self, name), 1)
        _check_at_least("sae.aux_coefficient", self.aux_coefficient, 0)


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
    """Adam as the paper sets it (Gao et al. 2024, appendix A), and weight averaging."""

    learning_rate: float | None = None  # 2e-4 / sqrt(n_latents / 2**14)
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 6.25e-10
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        _check_types(self, "optimizer.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(
                f"optimizer.learning_rate = {self.learning_rate}: must be above 0"
            )
        _check_at_least("optimizer.eps", self.eps, 0)
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name} = {getattr(self, name)}: must be in [0, 1)"
                )


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
    """Which rows, and in what order.

    A batch is woven from `lanes` streams of rows; each stream mixes `window_chunks`
    chunks at a time (see `sae_jax.loader`).
    """

    store: str = ""
    site: str | None = None  # the store's only site
    batch_rows: int = 2048
    lanes: int = 8
    window_chunks: int = 8

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        for name in ("batch_rows", "lanes", "window_chunks"):
            _check_at_least(f"data.{name}", getattr(self, name), 1)
        if self.batch_rows % self.lanes:
            raise ValueError(
                f"data.batch_rows = {self.batch_rows} is not a multiple of "
                f"data.lanes = {self.lanes}: every lane gives the same number of rows"
            )


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """How many devices share the batch (`data`) and the latents (`latent`)."""

    data: int = 1
    latent: int | None = None  # all devices that are left

    def __post_init__(self) -> None:
        _check_types(self, "mesh.")
        _check_at_least("mesh.data", self.data, 1)
        if self.latent is not None:
            _check_at_least("mesh.latent", self.latent, 1)


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig:
    """One training run."""

    sae: SaeConfig = dataclasses.field(default_factory=SaeConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rows: int = 100_000_000
    dead_after_rows: int = 10_000_000  # the paper's
    seed: int = 0
    log_every_steps: int = 20
    checkpoint_every_steps: int = 500
    checkpoints_kept: int = 2

    def __post_init__(self) -> None:
        _check_types(self, "")
        for name in (
            "rows",
            "dead_after_rows",
            "log_every_steps",
            "checkpoint_every_steps",
            "checkpoints_kept",
        ):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("seed", self.seed, 0)
        if self.rows < self.data.batch_rows:
            raise ValueError(
                f"rows = {self.rows} is less than one batch "
                f"(data.batch_rows = {self.data.batch_rows})"
            )

    @property
    def n_steps(self) -> int:
        return self.rows // self.data.batch_rows

    @property
    def dead_after_steps(self) -> int:
        return max(1, self.dead_after_rows // self.data.batch_rows)


def checked(config: _Config) -> _Config:
    """A copy of `config` whose field checks have run, at every depth."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fields[field.name] = (
            checked(value) if dataclasses.is_dataclass(value) else value
        )
    return type(config)(**fields)


def to_json(config: Any) -> str:
    """The config as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(config_type: type[_Config], text: str, source: str | Path) -> _Config:
    """The config that `to_json` wrote. `source` names the file in errors."""
    try:
        return _from_dict(config_type, json.loads(text), prefix="")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def nearest_name(name: str, names: typing.Iterable[str]) -> str:
    """A hint for a misspelt `name`: the nearest of `names`, or all of them."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a config or a config type."""
    names = []
    for name, hint in typing.get_type_hints(
        config if isinstance(config, type) else type(config)
    ).items():
        if dataclasses.is_dataclass(hint):
            names += field_names(hint, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def learning_rate(config: TrainConfig) -> float:
    """The set learning rate, or the paper's rule 2e-4 / sqrt(L / 2**14)."""
    if config.optimizer.learning_rate is not None:
        return config.optimizer.learning_rate
    return 2e-4 / math.sqrt(config.sae.n_latents / 2**14)


def k_aux(config: SaeConfig, d_model: int) -> int:
    """The set k_aux, or the power of two nearest to D/2 (Gao et al. 2024, B.1)."""
    chosen = config.k_aux or 2 ** round(math.log2(max(d_model / 2, 1)))
    return min(chosen, config.n_latents)


def _from_dict(config_type: Any, values: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(config_type)
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'the file'} is not a JSON object")
    for name in values:
        if name not in hints:
            raise ValueError(
                f"unknown field {prefix + name!r}: {nearest_name(name, hints)}"
            )
    fields = {}
    for name, value in values.items():
        is_group = dataclasses.is_dataclass(hints[name])
        fields[name] = (
            _from_dict(hints[name], value, f"{prefix}{name}.") if is_group else value
        )
    return config_type(**fields)


def _check_types(config: Any, prefix: str) -> None:
    """Refuses a field that is not of its declared type, or not finite.

    An int where a float is declared becomes one.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        allowed = typing.get_args(hint) if type(hint) is types.UnionType else (hint,)
        if float in allowed and type(value) is int:
            setattr(config, name, float(value))
        elif type(value) not in allowed:
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{prefix}{name} = {value!r} is not of type {wanted}")
        elif type(value) is float and not math.isfinite(value):
            raise ValueError(f"{prefix}{name} = {value}: must be finite")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: {nearest_name(str(value), choices)}")


def _check_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} = {value}: must be at least {least}")
