"""What an SAE is: its architecture, shapes, sparsity, and the space it works in."""

import dataclasses
import math

from sae_jax.config.fields import (
    changed,
    check_at_least,
    check_fields,
    setting,
    settings_of,
)

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
SELECTIONS = ("exact", "bucketed", "approx")
EXCHANGES = ("gather", "tree", "count")
COMPUTE_DTYPES = ("float32", "bfloat16")

PENALISED = tuple(name for name in ARCHITECTURES if name not in CHOOSE_K)
_MOST_ACTIVE = 512
# Values around these gave an L0 of 14 to 97 in experiments/frontier.py, which leaves
# relu_decoder_norm out.
_FIRST_TRY = dict.fromkeys(PENALISED, 0.1) | {"jumprelu": 0.004}


@dataclasses.dataclass(unsafe_hash=True)
class SaeConfig:
    """One SAE. Its file in `sae_jax/saes/` has the equations."""

    architecture: str = setting("topk", "what makes codes sparse", ARCHITECTURES)
    d_model: int | None = setting(None, "width of a row; None: the store's")
    n_latents: int = setting(4096, "how many latents")
    normalization: str = setting(
        "center_unit_norm", "of rows, into the SAE's space", NORMALIZATIONS
    )
    use_b_enc: bool = setting(True, "the encoder has a bias")
    subtract_b_dec: bool | None = setting(
        None,
        "the encoder sees rows less b_dec; None: True, but False for relu_decoder_norm",
    )
    rescale_encoder: bool = setting(
        False, "start with reconstructions as long as their inputs"
    )
    firing_threshold: float = setting(
        0.0, "in training, a latent fires where its value is above this"
    )
    compute_dtype: str | None = setting(
        None,
        "of the factors of matmuls; None: float32 on a CPU, bfloat16 elsewhere",
        COMPUTE_DTYPES,
    )

    k: int = setting(
        32, "latents chosen of a row, of batch_topk on average; the others ignore it"
    )
    selection: str = setting(
        "exact",
        "how K latents are chosen; bucketed is exact where buckets do not pay, approx "
        "on all but TPUs",
        SELECTIONS,
        only=("topk",),
    )
    recall_target: float = setting(
        0.99,
        "least expected part of the K largest that is found; exact finds all of a "
        "latent shard's",
        only=("topk",),
    )
    kernels: bool = setting(
        False,
        "use the platform's own kernels (Pallas; TPU and GPU), which have not been "
        "measured, for bucketed selection and for sparse products, whose sums they "
        "take in a fixed order, on a GPU too",
        only=("topk",),
    )
    capacity_factor: float | None = setting(
        None,
        "a latent shard hands over at most K times this / shards candidates; None: K",
        only=("topk",),
    )
    exchange: str = setting(
        "gather",
        "how latent shards find the K best of all; tree, for a power of two of them, "
        "and count move less among many",
        EXCHANGES,
        only=("topk",),
    )
    k_aux: int | None = setting(
        None,
        "dead latents that AuxK chooses; None: the power of two nearest to d_model / 2",
        only=CHOOSE_K,
    )
    aux_coefficient: float = setting(
        1 / 32, "weight of AuxK's loss, which is to revive dead latents", only=CHOOSE_K
    )
    multi_topk: bool = setting(
        False, "add 1/8 of the loss of a code of 4 K latents", only=("topk",)
    )
    norm_weighted: bool = setting(
        False, "decoder rows of any norm; chosen by value x norm", only=("topk",)
    )
    prefixes: tuple[int, ...] = setting(
        (), "Matryoshka's nested sizes: rising, the last is n_latents", only=CHOOSE_K
    )

    sparsity_coefficient: float | None = setting(
        None, "weight of the penalty; to be given", only=PENALISED
    )
    target_l0: float | None = setting(
        None,
        "penalise (L0 / target_l0 - 1)^2: twice the target costs sparsity_coefficient, "
        "where an nmse of 1 costs 1; None: penalise L0 itself",
        only=("jumprelu",),
    )
    initial_threshold: float = setting(
        1e-3, "where thresholds start", only=("jumprelu",)
    )
    bandwidth: float = setting(
        1e-3, "width of the threshold's gradient", only=("jumprelu",)
    )
    max_active: int | None = setting(
        None,
        f"most latents in a code of `encode`; None: {_MOST_ACTIVE}",
        only=tuple(name for name in ARCHITECTURES if name != "topk"),
    )

    def __post_init__(self) -> None:
        check_fields(self, "sae.")
        check_at_least("sae.n_latents", self.n_latents, 1)
        check_at_least("sae.k", self.k, 1)
        for name in ("d_model", "k_aux", "max_active"):
            if getattr(self, name) is not None:
                check_at_least(f"sae.{name}", getattr(self, name), 1)
        for name in ("aux_coefficient", "firing_threshold", "initial_threshold"):
            check_at_least(f"sae.{name}", getattr(self, name), 0)
        if not 0 < self.recall_target <= 1:
            raise ValueError(
                f"sae.recall_target = {self.recall_target}: must be above 0, at most 1"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"sae.capacity_factor = {self.capacity_factor}: must be above 0"
            )
        _check_belongs(self)
        if self.architecture in CHOOSE_K:
            _check_choice_of_k(self)
        else:
            _check_penalty(self)


def k_aux(config: SaeConfig, d_model: int) -> int:
    """The set k_aux, or the power of two nearest to D/2 (Gao et al. 2024, B.1)."""
    rule = 2 ** round(math.log2(max(d_model / 2, 1)))
    return config.k_aux or min(rule, config.n_latents)


def most_chosen(config: SaeConfig) -> int:
    """How many latents of a row training chooses."""
    return 4 * config.k if config.multi_topk else config.k


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


def sparsity(config: SaeConfig) -> dict[str, float]:
    """What says how sparse codes are, by the names of its fields."""
    if config.architecture in CHOOSE_K:
        return {"k": config.k}
    penalty = {
        "sparsity_coefficient": config.sparsity_coefficient,
        "target_l0": config.target_l0,
    }
    return {name: value for name, value in penalty.items() if value is not None}


def _check_belongs(config: SaeConfig) -> None:
    """Refuses a field that the architecture would silently ignore."""
    settings = settings_of(SaeConfig)
    for name, value in changed(config).items():
        readers = settings[name].metadata["only"]
        if readers and config.architecture not in readers:
            raise ValueError(
                f"sae.{name} = {value!r} means nothing for sae.architecture = "
                f"{config.architecture!r}, only for {', '.join(readers)}: leave it at "
                f"{settings[name].default!r}"
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
        first_try = f"begin with {_FIRST_TRY[config.architecture]}"
        if config.target_l0 is not None:
            first_try = (
                "with sae.target_l0, it is what an L0 of twice the target costs, where "
                "an nmse of 1 costs 1"
            )
        raise ValueError(
            "sae.sparsity_coefficient is not set: nothing else makes the codes of "
            f"{config.architecture} sparse; {first_try}"
        )
    check_at_least("sae.sparsity_coefficient", config.sparsity_coefficient, 0)
    if config.architecture == "jumprelu" and config.bandwidth <= 0:
        raise ValueError(f"sae.bandwidth = {config.bandwidth}: must be above 0")
    if config.target_l0 is not None and not 0 < config.target_l0 <= config.n_latents:
        raise ValueError(
            f"sae.target_l0 = {config.target_l0}: must be above 0 and at most "
            f"sae.n_latents = {config.n_latents}"
        )
