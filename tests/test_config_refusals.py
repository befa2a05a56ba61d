"""Every config that is refused, with its reason, and what lies just inside."""

import pytest

from sae_jax.config import (
    ARCHITECTURES,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    SaeConfig,
    TrainConfig,
)

PENALISED = ("relu", "relu_decoder_norm", "prolu", "gated", "jumprelu")


def _sae(architecture: str, **fields) -> SaeConfig:
    """A good config of each architecture, 64 latents, but for `fields`."""
    own = {"sparsity_coefficient": 0.1} if architecture in PENALISED else {"k": 4}
    return SaeConfig(architecture=architecture, **({"n_latents": 64} | own | fields))


def _run(architecture: str, **fields) -> TrainConfig:
    """A good config of 100 steps of 64 rows, but for `fields`."""
    good = dict(sae=_sae(architecture), data=DataConfig(batch_rows=64))
    return TrainConfig(**(good | dict(rows=6400, dead_after_rows=640) | fields))


def _schedules(**fields) -> TrainConfig:
    return _run("relu", optimizer=OptimizerConfig(**fields))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_configs_that_these_tests_spoil_are_good(architecture):
    _run(architecture)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SaeConfig(k=65, n_latents=64), "sae.k = 65 is more than .* = 64"),
        (lambda: SaeConfig(k=0), "sae.k = 0: must be at least 1"),
        (lambda: SaeConfig(n_latents=0), "sae.n_latents = 0: must be at least 1"),
        (lambda: SaeConfig(d_model=0), "sae.d_model = 0: must be at least 1"),
        (lambda: SaeConfig(k_aux=0), "sae.k_aux = 0: must be at least 1"),
        (lambda: SaeConfig(aux_coefficient=-1.0), "aux_coefficient = -1.0: must be at"),
        (lambda: SaeConfig(firing_threshold=-1.0), "firing_threshold = -1.0: must be"),
        (lambda: SaeConfig(normalization="layernorm"), "did you mean 'layer_norm'"),
        (lambda: SaeConfig(architecture="tpok"), "did you mean 'topk'"),
        (lambda: SaeConfig(kernels="tpu"), "sae.kernels = 'tpu'"),
        (lambda: _sae("batch_topk", kernels=True), "sae.kernels = True means nothing"),
        (lambda: SaeConfig(compute_dtype="bf16"), "compute_dtype = 'bf16': did you"),
        (lambda: DataConfig(batch_rows=10, lanes=4), "10 is not a multiple .* = 4"),
        (lambda: DataConfig(lanes=0), "data.lanes = 0: must be at least 1"),
        (
            lambda: DataConfig(batch_rows=8, lanes=1, microbatch_rows=3),
            "8 is not a multiple of data.microbatch_rows = 3",
        ),
        (
            lambda: DataConfig(microbatch_rows=0),
            "data.microbatch_rows = 0: must be at least 1",
        ),
        (
            lambda: _micro(architecture="batch_topk"),
            "microbatch_rows = 8, but .* 'batch_topk' chooses among all rows",
        ),
        (
            lambda: _micro(
                architecture="jumprelu", sparsity_coefficient=1.0, target_l0=4.0
            ),
            "microbatch_rows = 8, but sae.target_l0 is compared with the mean",
        ),
        (lambda: MeshConfig(data=0), "mesh.data = 0: must be at least 1"),
        (lambda: MeshConfig(latent=0), "mesh.latent = 0: must be at least 1"),
        (lambda: OptimizerConfig(learning_rate=-1.0), "must be above 0"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate = 0.0: must be ab"),
        (lambda: OptimizerConfig(ema_decay=1.0), r"must be in \[0, 1\)"),
        (lambda: OptimizerConfig(b1=-0.1), r"optimizer.b1 = -0.1: must be in \[0, 1\)"),
        (lambda: OptimizerConfig(eps=-1.0), "optimizer.eps = -1.0: must be at least"),
        (lambda: OptimizerConfig(clip_norm=0), "optimizer.clip_norm = 0.0: must be ab"),
        (lambda: OptimizerConfig(clip_norm=-1.0), "clip_norm = -1.0: must be above 0"),
        (lambda: OptimizerConfig(warmup_rows=-1), "warmup_rows = -1: must be at least"),
        (lambda: OptimizerConfig(decay_rows=-1), "decay_rows = -1: must be at least 0"),
        (lambda: TrainConfig(rows=5), "rows = 5 is less than one batch .* = 2048"),
        (lambda: TrainConfig(seed=-1), "seed = -1: must be at least 0"),
        (lambda: TrainConfig(dead_after_rows=0), "dead_after_rows = 0: must be at l"),
        (lambda: TrainConfig(n_resamples=-1), "n_resamples = -1: must be at least 0"),
        (lambda: TrainConfig(rows=1e6), "rows = 1000000.0 is not of type int"),
        (lambda: SaeConfig(k="32"), "sae.k = '32' is not of type int"),
        (lambda: SaeConfig(multi_topk=1), "sae.multi_topk = 1 is not of type bool"),
        (lambda: SaeConfig(prefixes=(1.5, 64)), "is not a tuple of whole numbers"),
        (lambda: SaeConfig(prefixes="16"), "'16' is not a tuple of whole numbers, su"),
        (lambda: SaeConfig(normalization=1), "sae.normalization = 1 is not of type st"),
        (lambda: TrainConfig(sae=None), "sae = None is not of type SaeConfig"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "must be finite"),
        (lambda: OptimizerConfig(clip_norm=float("inf")), "clip_norm = inf: must be f"),
    ],
)
def test_bad_fields_are_refused_with_their_values(make, message):
    _refuses(make, message)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: _sae("topk", k_aux=65), "sae.k_aux = 65 is more than .* = 64: choose"),
        (lambda: _sae("batch_topk", k=65), "sae.k = 65 is more than sae.n_latents"),
        (
            lambda: _sae("topk", multi_topk=True, k=17),
            "4 x sae.k = 68 latents, more than sae.n_latents = 64: lower k",
        ),
        (
            lambda: _sae("topk", multi_topk=True, prefixes=(16, 64)),
            "sae.multi_topk and sae.prefixes are two losses .* give one",
        ),
        (lambda: _sae("topk", prefixes=(16, 16, 64)), "must rise from above 0 and end"),
        (lambda: _sae("topk", prefixes=(32, 16, 64)), r"\(32, 16, 64\): must rise"),
        (lambda: _sae("topk", prefixes=(0, 64)), "must rise from above 0"),
        (lambda: _sae("batch_topk", prefixes=(16, 32)), "end at sae.n_latents = 64"),
        (lambda: _sae("topk", prefixes=(16, 128)), "end at sae.n_latents = 64"),
        (lambda: _sae("gated", use_b_enc=False), "biases of gated are its thresholds"),
        (lambda: _sae("prolu", use_b_enc=False), "biases of prolu are its thresholds"),
        (lambda: _sae("jumprelu", bandwidth=0), "sae.bandwidth = 0.0: must be above 0"),
        (lambda: _sae("jumprelu", initial_threshold=-1), "_threshold = -1.0: must be"),
        (lambda: _sae("jumprelu", target_l0=0), "target_l0 = 0.0: must be above 0 and"),
        (lambda: _sae("jumprelu", target_l0=65), "at most sae.n_latents = 64"),
        (lambda: _sae("relu", max_active=0), "sae.max_active = 0: must be at least 1"),
    ],
)
def test_an_sae_that_cannot_be_is_refused(make, message):
    _refuses(make, message)


@pytest.mark.parametrize("architecture", PENALISED)
def test_a_penalised_architecture_needs_its_coefficient(architecture):
    message = f"_coefficient is not set: .* codes of {architecture} sparse; begin with"
    _refuses(lambda: _sae(architecture, sparsity_coefficient=None), message)
    if architecture == "jumprelu":
        fields = dict(sparsity_coefficient=None, target_l0=4.0)
        _refuses(lambda: _sae(architecture, **fields), "sparse; with sae.target_l0")
    message = "sparsity_coefficient = -0.1: must be at least 0"
    _refuses(lambda: _sae(architecture, sparsity_coefficient=-0.1), message)


@pytest.mark.parametrize(
    "field, value, readers",
    [
        ("norm_weighted", True, {"topk"}),
        ("multi_topk", True, {"topk"}),
        ("prefixes", (16, 64), {"topk", "batch_topk"}),
        ("k_aux", 8, {"topk", "batch_topk"}),
        ("sparsity_coefficient", 0.2, set(PENALISED)),
        ("aux_coefficient", 0.5, {"topk", "batch_topk"}),
        ("target_l0", 4.0, {"jumprelu"}),
        ("initial_threshold", 0.5, {"jumprelu"}),
        ("bandwidth", 0.5, {"jumprelu"}),
        ("max_active", 32, set(ARCHITECTURES) - {"topk"}),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_field_is_refused_where_it_means_nothing(architecture, field, value, readers):
    if architecture in readers:
        assert getattr(_sae(architecture, **{field: value}), field) == value
    else:
        message = f"sae.{field} = .* means nothing for .* = '{architecture}', only for"
        _refuses(lambda: _sae(architecture, **{field: value}), message)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: _run("topk", dead_after_rows=6400),
            "dead_after_rows = 6400 none can be dead before .* rows = 6400: lower",
        ),
        (
            lambda: _schedules(warmup_rows=3200, decay_rows=3201),
            "warmup_rows = 3200 and decay_rows = 3201 are together more .* = 6400",
        ),
        (
            lambda: _run("topk", sparsity_warmup_rows=64),
            "sparsity_warmup_rows = 64, but topk has no penalty to warm up",
        ),
        (
            lambda: _run("jumprelu", k_start=8, k_anneal_rows=64),
            "k_start = 8 and k_anneal_rows = 64 mean nothing for jumprelu",
        ),
        (lambda: _run("topk", k_start=8), "k_start = 8 and k_anneal_rows = 0: give bo"),
        (lambda: _run("topk", k_anneal_rows=64), "k_start = None and k_anneal_rows = "),
        (
            lambda: _run("batch_topk", k_start=8, k_anneal_rows=6401),
            "k_anneal_rows = 6401: give both, and at most rows = 6400",
        ),
        (
            lambda: _run("topk", k_start=4, k_anneal_rows=64),
            "k_start = 4: must be above sae.k = 4 and at most 64, which is sae.n_lat",
        ),
        (
            lambda: _run("topk", k_start=65, k_anneal_rows=64),
            "k_start = 65: must be above sae.k = 4 and at most 64",
        ),
        (
            lambda: _run(
                "topk",
                sae=_sae("topk", multi_topk=True),
                k_start=17,
                k_anneal_rows=64,
            ),
            "at most 16, which is sae.n_latents / 4, as sae.multi_topk chooses 4 K",
        ),
        *(
            (
                lambda name=name: _run(name, resample_every_rows=640),
                f"only relu, prolu, gated are resampled, not {name}; leave it out",
            )
            for name in ("topk", "batch_topk", "jumprelu", "relu_decoder_norm")
        ),
        (
            lambda: _run("relu", resample_every_rows=639),
            "resample_every_rows = 639: must be at least dead_after_rows = 640",
        ),
        (
            lambda: _run("gated", resample_every_rows=6401),
            "resample_every_rows = 6401: .* at most rows = 6400",
        ),
        (
            lambda: _run("relu", resample_every_rows=63, dead_after_rows=1),
            "resample_every_rows = 63: .* data.batch_rows = 64",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused(make, message):
    _refuses(make, message)


def test_what_lies_just_inside_the_limits_is_taken():
    _sae("topk", k=64, k_aux=64)
    _sae("topk", multi_topk=True, k=16)
    _sae("jumprelu", target_l0=64, sparsity_coefficient=0, initial_threshold=0)
    _run("topk", dead_after_rows=6399)
    _run("topk", dead_after_rows=6400, sae=_sae("topk", aux_coefficient=0))
    _run("relu", dead_after_rows=10**9)  # without AuxK nothing needs dead latents
    _run("topk", k_start=64, k_anneal_rows=6400)
    _run("prolu", resample_every_rows=640, sparsity_warmup_rows=64)
    _run("relu", resample_every_rows=64, dead_after_rows=1)
    _schedules(warmup_rows=3200, decay_rows=3200, clip_norm=1e-9)


def _micro(**sae) -> TrainConfig:
    data = DataConfig(batch_rows=64, lanes=1, microbatch_rows=8)
    return TrainConfig(sae=SaeConfig(**sae), data=data)


def _refuses(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
