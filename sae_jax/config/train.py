"""One training run: its SAE, optimizer, data, mesh and schedules."""

import dataclasses
import math

from sae_jax.config.fields import check_at_least, check_fields, setting
from sae_jax.config.sae import CHOOSE_K, PENALISED, SaeConfig
from sae_jax.config.stream import StreamConfig

_CAN_RESAMPLE = ("relu", "prolu", "gated")


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
    """Adam as the paper sets it (Gao et al. 2024, appendix A), and weight averaging."""

    learning_rate: float | None = setting(
        None, "of Adam; None: 2e-4 / sqrt(n_latents / 2**14)"
    )
    warmup_rows: int = setting(0, "rows over which the rate rises to its value")
    decay_rows: int = setting(0, "last rows, over which the rate falls to zero")
    clip_norm: float | None = setting(
        None, "largest norm of the whole gradient; None: any norm"
    )
    b1: float = setting(0.9, "Adam's decay of the mean of gradients")
    b2: float = setting(0.999, "Adam's decay of the mean of their squares")
    eps: float = setting(6.25e-10, "Adam's, added to the root of that mean")
    ema_decay: float = setting(
        0.999,
        "of the average of the weights: it goes back some 1 / (1 - ema_decay) steps, "
        "and in a run of not many more it lags behind",
    )

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(
                f"optimizer.learning_rate = {self.learning_rate}: must be above 0"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm = {self.clip_norm}: must be above 0")
        for name in ("eps", "warmup_rows", "decay_rows"):
            check_at_least(f"optimizer.{name}", getattr(self, name), 0)
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

    store: str = setting(
        "", "folder of the activation store, or several, with commas; '': a stream"
    )
    site: str | None = setting(
        None, "which of its sites, or one for each store, with commas; None: the only"
    )
    heldout_every: int | None = setting(
        None, "one document in so many is held out; None: as in the store, 5 if none"
    )
    weights: tuple[float, ...] = setting(
        (), "how much of a batch each store or site gives; (): all as much"
    )
    batch_rows: int = setting(2048, "rows of one step")
    microbatch_rows: int | None = setting(
        None,
        "rows whose gradients are computed at a time, for batches that do not fit: a "
        "divisor of batch_rows, and not with batch_topk or target_l0; None: all",
    )
    lanes: int = setting(8, "streams of rows that a batch is woven from")
    window_chunks: int | None = setting(
        None,
        "chunks of the store that a stream mixes at a time; None: as few as give a "
        "batch 90 % of the sequences that a uniform draw has",
    )

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        for name in ("batch_rows", "lanes"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
        if self.heldout_every is not None:
            check_at_least("data.heldout_every", self.heldout_every, 2)
        if self.window_chunks is not None:
            check_at_least("data.window_chunks", self.window_chunks, 1)
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(f"data.weights = {self.weights}: must be above 0")
        if self.batch_rows % self.lanes:
            raise ValueError(
                f"data.batch_rows = {self.batch_rows} is not a multiple of "
                f"data.lanes = {self.lanes}: every lane gives the same number of rows"
            )
        if self.microbatch_rows is not None:
            check_at_least("data.microbatch_rows", self.microbatch_rows, 1)
            if self.batch_rows % self.microbatch_rows:
                raise ValueError(
                    f"data.batch_rows = {self.batch_rows} is not a multiple of "
                    f"data.microbatch_rows = {self.microbatch_rows}: a batch is a "
                    "whole number of micro-batches"
                )


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """How many devices share the batch (`data`) and the latents (`latent`)."""

    data: int | None = setting(
        None,
        "devices that share a batch; None: chosen with latent, by the time and memory "
        "that a step is estimated to take (sae-jax plan)",
    )
    latent: int | None = setting(
        None, "devices that share the latents; None: as many of the rest as divide them"
    )
    shard_optimizer: bool | None = setting(
        None,
        "share the moments and the average of the weights among the devices that share "
        "a batch, too; None: where they divide",
    )

    def __post_init__(self) -> None:
        check_fields(self, "mesh.")
        if self.data is not None:
            check_at_least("mesh.data", self.data, 1)
        if self.latent is not None:
            check_at_least("mesh.latent", self.latent, 1)


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig:
    """One training run."""

    sae: SaeConfig = dataclasses.field(default_factory=SaeConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rows: int = setting(100_000_000, "rows to train on")
    dead_after_rows: int = setting(
        10_000_000, "a latent is dead that has not fired for so many rows"
    )
    k_start: int | None = setting(
        None, "K to begin with, above sae.k, and to halve; None: sae.k", only=CHOOSE_K
    )
    k_anneal_rows: int = setting(
        0, "rows over which K comes down from k_start to sae.k", only=CHOOSE_K
    )
    sparsity_warmup_rows: int = setting(
        0, "rows over which the penalty rises to its coefficient", only=PENALISED
    )
    resample_every_rows: int | None = setting(
        None, "give dead latents a new start; None: never", only=_CAN_RESAMPLE
    )
    n_resamples: int = setting(4, "how often, at most", only=_CAN_RESAMPLE)
    seed: int = setting(0, "of the first weights and of the order of rows")
    log_every_steps: int = setting(20, "steps from one line of metrics to the next")
    checkpoint_every_steps: int = setting(500, "steps from one checkpoint to the next")
    checkpoints_kept: int = setting(2, "how many of the last are kept")

    def __post_init__(self) -> None:
        check_fields(self, "")
        for name in (
            "rows",
            "dead_after_rows",
            "log_every_steps",
            "checkpoint_every_steps",
            "checkpoints_kept",
        ):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        for name in ("k_anneal_rows", "sparsity_warmup_rows", "n_resamples"):
            check_at_least(name, getattr(self, name), 0)
        if self.data.store and self.stream.subject:
            raise ValueError(
                f"data.store = {self.data.store!r} and stream.subject = "
                f"{self.stream.subject!r}: give one of them"
            )
        if self.data.weights and self.stream.subject:
            raise ValueError(
                f"data.weights = {self.data.weights} with stream.subject = "
                f"{self.stream.subject!r}: a stream is one source; leave them out"
            )
        if self.rows < self.data.batch_rows:
            raise ValueError(
                f"rows = {self.rows} is less than one batch "
                f"(data.batch_rows = {self.data.batch_rows})"
            )
        _check_durations(self)
        if self.sae.architecture in CHOOSE_K:
            _check_aux_can_act(self)
        _check_annealing(self)
        _check_resampling(self)
        _check_micro_batches(self)

    @property
    def n_steps(self) -> int:
        return self.rows // self.data.batch_rows

    @property
    def dead_after_steps(self) -> int:
        return max(1, self.steps(self.dead_after_rows))

    @property
    def sparsity_warmup_steps(self) -> int:
        return max(1, self.steps(self.sparsity_warmup_rows))

    def k_at(self, step: int) -> int:
        """K in a step, the first being 0: k_start, then halves of it, then sae.k.

        Each K is compiled once; the halves above sae.k share k_anneal_rows evenly.
        """
        stages: list[int] = []
        while self.k_start is not None and self.k_start >> len(stages) > self.sae.k:
            stages.append(self.k_start >> len(stages))
        done = step / max(1, self.steps(self.k_anneal_rows))
        return [*stages, self.sae.k][min(int(done * len(stages)), len(stages))]

    def steps(self, rows: int) -> int:
        """How many whole steps these rows are."""
        return rows // self.data.batch_rows


def learning_rate(config: TrainConfig) -> float:
    """The set learning rate, or the paper's rule 2e-4 / sqrt(L / 2**14)."""
    if config.optimizer.learning_rate is not None:
        return config.optimizer.learning_rate
    return 2e-4 / math.sqrt(config.sae.n_latents / 2**14)


def shards_optimizer(config: TrainConfig, n_data: int, n_latent: int) -> bool:
    """Whether moments and average are spread over both axes of such a mesh."""
    is_wanted = config.mesh.shard_optimizer is not False
    divides = config.sae.n_latents % (n_data * n_latent) == 0
    return is_wanted and divides and n_data > 1


def _check_durations(config: TrainConfig) -> None:
    optimizer = config.optimizer
    if optimizer.warmup_rows + optimizer.decay_rows > config.rows:
        raise ValueError(
            f"optimizer.warmup_rows = {optimizer.warmup_rows} and decay_rows = "
            f"{optimizer.decay_rows} are together more than rows = {config.rows}"
        )
    if config.sparsity_warmup_rows and config.sae.architecture in CHOOSE_K:
        raise ValueError(
            f"sparsity_warmup_rows = {config.sparsity_warmup_rows}, but "
            f"{config.sae.architecture} has no penalty to warm up: leave it out"
        )


def _check_aux_can_act(config: TrainConfig) -> None:
    if config.sae.aux_coefficient and config.dead_after_steps >= config.n_steps:
        raise ValueError(
            f"AuxK trains dead latents, but with dead_after_rows = "
            f"{config.dead_after_rows} none can be dead before the end of rows = "
            f"{config.rows}: lower dead_after_rows, or set sae.aux_coefficient to 0"
        )


def _check_annealing(config: TrainConfig) -> None:
    k_start, sae = config.k_start, config.sae
    if k_start is None and not config.k_anneal_rows:
        return
    if sae.architecture not in CHOOSE_K:
        raise ValueError(
            f"k_start = {k_start} and k_anneal_rows = {config.k_anneal_rows} mean "
            f"nothing for {sae.architecture}: it chooses no K; leave them out"
        )
    if k_start is None or not 0 < config.k_anneal_rows <= config.rows:
        raise ValueError(
            f"k_start = {k_start} and k_anneal_rows = {config.k_anneal_rows}: give "
            f"both, and at most rows = {config.rows} to anneal over"
        )
    most, limit = sae.n_latents, "sae.n_latents"
    if sae.multi_topk:
        most, limit = most // 4, "sae.n_latents / 4, as sae.multi_topk chooses 4 K"
    if not sae.k < k_start <= most:
        raise ValueError(
            f"k_start = {k_start}: must be above sae.k = {sae.k} and at most {most}, "
            f"which is {limit}"
        )


def _check_resampling(config: TrainConfig) -> None:
    every = config.resample_every_rows
    if every is None:
        return
    if config.sae.architecture not in _CAN_RESAMPLE:
        raise ValueError(
            f"resample_every_rows = {every}: only {', '.join(_CAN_RESAMPLE)} are "
            f"resampled, not {config.sae.architecture}; leave it out"
        )
    least = max(config.dead_after_rows, config.data.batch_rows)
    if not least <= every <= config.rows:
        raise ValueError(
            f"resample_every_rows = {every}: must be at least dead_after_rows = "
            f"{config.dead_after_rows}, so that latents can be dead by then, and "
            f"data.batch_rows = {config.data.batch_rows}, and at most rows = "
            f"{config.rows}"
        )


def _check_micro_batches(config: TrainConfig) -> None:
    if config.data.microbatch_rows in (None, config.data.batch_rows):
        return
    reason = None
    if config.sae.architecture == "batch_topk":
        reason = "sae.architecture = 'batch_topk' chooses among all rows of a batch"
    elif config.sae.target_l0 is not None:
        reason = "sae.target_l0 is compared with the mean of all rows of a batch"
    if reason:
        raise ValueError(
            f"data.microbatch_rows = {config.data.microbatch_rows}, but {reason}: "
            "leave it out"
        )
