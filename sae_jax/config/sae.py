"""What an SAE is: its architecture, shapes, sparsity, and the space it works in."""

import dataclasses
import math

from sae_jax.config.fields import check_at_least, check_choice, check_types

ARCHITECTURES = (
    "topk",
    "batch_topk",
    "relu",
    "relu_decoder_norm",
    "prolu",
    "gated",
    "jumprelu",
)
CHOOSE_K = ("topk", "batch_topk")
NORMALIZATIONS = (
    "none",
    "center_unit_norm",
    "layer_norm",
    "scale_to_sqrt_d",
    "unit_mean_square",
)
COMPUTE_DTYPES = ("float32", "bfloat16")

_PENALISED = tuple(name for name in ARCHITECTURES if name not in CHOOSE_K)
# Fields that only some architectures read; others must leave them at their default.
_READ_BY = {
    "norm_weighted": ("topk",),
    "multi_topk": ("topk",),
    "prefixes": CHOOSE_K,
    "k_aux": CHOOSE_K,
    "aux_coefficient": CHOOSE_K,
    "sparsity_coefficient": _PENALISED,
    "target_l0": ("jumprelu",),
    "initial_threshold": ("jumprelu",),
    "bandwidth": ("jumprelu",),
    "max_active": tuple(name for name in ARCHITECTURES if name != "topk"),
}
_MOST_ACTIVE = 512
# Gave an L0 of 10 to 70 in experiments/frontier.py.
_FIRST_TRY = dict.fromkeys(_PENALISED, 0.1) | {"jumprelu": 0.004}


@dataclasses.dataclass(unsafe_hash=True)
class SaeConfig:
    """One SAE. Its file in `sae_jax/saes/` has the equations."""

    architecture: str = "topk"
    d_model: int | None = None  # the width of the store's site
    n_latents: int = 4096
    normalization: str = "center_unit_norm"
    use_b_enc: bool = True
    subtract_b_dec: bool | None = None  # True; False for relu_decoder_norm
    rescale_encoder: bool = False  # start with reconstructions as long as their inputs
    firing_threshold: float = 0.0  # a latent fires where its value is above this
    compute_dtype: str | None = None  # float32 on a CPU, bfloat16 elsewhere

    # topk and batch_topk
    k: int = 32  # latents chosen of a row; of batch_topk, on average
    k_aux: int | None = None  # the power of two nearest to d_model / 2
    aux_coefficient: float = 1 / 32
    multi_topk: bool = False  # adds 1/8 of the loss at 4 K (topk)
    norm_weighted: bool = False  # free decoder rows, chosen by value x norm (topk)
    prefixes: tuple[int, ...] = ()  # Matryoshka: rising, the last is n_latents

    # the others
    sparsity_coefficient: float | None = None  # of the penalty; must be given
    target_l0: float | None = None  # penalise the distance to it (jumprelu)
    initial_threshold: float = 1e-3  # jumprelu
    bandwidth: float = 1e-3  # of the threshold's gradient (jumprelu)
    max_active: int | None = None  # most latents in a code of `encode`: 512

    def __post_init__(self) -> None:
        check_types(self, "sae.")
        check_choice("sae.architecture", self.architecture, ARCHITECTURES)
        check_choice("sae.normalization", self.normalization, NORMALIZATIONS)
        if self.compute_dtype is not None:
            check_choice("sae.compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        check_at_least("sae.n_latents", self.n_latents, 1)
        check_at_least("sae.k", self.k, 1)
        for name in ("d_model", "k_aux", "max_active"):
            if getattr(self, name) is not None:
                check_at_least(f"sae.{name}", getattr(self, name), 1)
        for name in ("aux_coefficient", "firing_threshold", "initial_threshold"):
            check_at_least(f"sae.{name}", getattr(self, name), 0)
        _check_belongs(self)
        if self.architecture in CHOOSE_K:
            _check_choice_of_k(self)
        else:
            _check_penalty(self)


def k_aux(config: SaeConfig, d_model: int) -> int:
    """The set k_aux, or the power of two nearest to D/2 (Gao et al. 2024, B.1)."""
    rule = 2 ** round(math.log2(max(d_model / 2, 1)))
    return config.k_aux or min(rule, config.n_latents)


def max_active(config: SaeConfig) -> int:
    """The width of a code: K of topk, elsewhere the most latents that are kept."""
    if config.architecture == "topk":
        return config.k
    return min(config.max_active or _MOST_ACTIVE, config.n_latents)


def subtracts_b_dec(config: SaeConfig) -> bool:
    """Whether the encoder sees rows less b_dec: as set, or as the recipe has it."""
    if config.subtract_b_dec is None:
        return config.architecture != "relu_decoder_norm"
    return config.subtract_b_dec


def _check_belongs(config: SaeConfig) -> None:
    """Refuses a field that the architecture would silently ignore."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, readers in _READ_BY.items():
        value = getattr(config, name)
        if value != defaults[name] and config.architecture not in readers:
            raise ValueError(
                f"sae.{name} = {value!r} means nothing for sae.architecture = "
                f"{config.architecture!r}, only for {', '.join(readers)}: leave it at "
                f"{defaults[name]!r}"
            )
    if not config.use_b_enc and config.architecture in ("prolu", "gated"):
        raise ValueError(
            f"sae.use_b_enc = False, but the biases of {config.architecture} are its "
            "thresholds: leave it out"
        )


def _check_choice_of_k(config: SaeConfig) -> None:
    n_latents = config.n_latents
    for name in ("k", "k_aux"):
        if (getattr(config, name) or 0) > n_latents:
            raise ValueError(
                f"sae.{name} = {getattr(config, name)} is more than sae.n_latents = "
                f"{n_latents}: choose at most as many latents as there are"
            )
    if config.multi_topk and 4 * config.k > n_latents:
        raise ValueError(
            f"sae.multi_topk chooses 4 x sae.k = {4 * config.k} latents, more than "
            f"sae.n_latents = {n_latents}: lower k or raise n_latents"
        )
    if config.multi_topk and config.prefixes:
        raise ValueError(
            "sae.multi_topk and sae.prefixes are two losses of one reconstruction: "
            "give one of them"
        )
    if config.prefixes:
        _check_prefixes(config.prefixes, n_latents)


def _check_prefixes(prefixes: tuple[int, ...], n_latents: int) -> None:
    is_rising = all(a < b for a, b in zip((0, *prefixes), prefixes))
    if not is_rising or prefixes[-1] != n_latents:
        raise ValueError(
            f"sae.prefixes = {prefixes}: must rise from above 0 and end at "
            f"sae.n_latents = {n_latents}, so that every latent is trained"
        )


def _check_penalty(config: SaeConfig) -> None:
    if config.sparsity_coefficient is None:
        raise ValueError(
            f"sae.sparsity_coefficient is not set: nothing else makes the codes of "
            f"{config.architecture} sparse; begin with "
            f"{_FIRST_TRY[config.architecture]}"
        )
    check_at_least("sae.sparsity_coefficient", config.sparsity_coefficient, 0)
    if config.architecture == "jumprelu" and config.bandwidth <= 0:
        raise ValueError(f"sae.bandwidth = {config.bandwidth}: must be above 0")
    if config.target_l0 is not None and not 0 < config.target_l0 <= config.n_latents:
        raise ValueError(
            f"sae.target_l0 = {config.target_l0}: must be above 0 and at most "
            f"sae.n_latents = {config.n_latents}"
        )
