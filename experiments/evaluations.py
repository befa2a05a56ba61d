"""The whole evaluation over sizes and sparsities, beside four baselines.

    sae-jax harvest --site=resid_post.3 --max_rows=1100000 --out=store/
    python experiments/evaluations.py --store=store/ --out=evaluations/
"""

from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig

SIZES, SPARSITIES = (512, 2048, 8192), (8, 32, 128)


def get_config(
    n_latents: int = 2048, k: int = 32, seed: int = 0, store: str = "store"
) -> TrainConfig:
    """One run of 781 steps of 2,048 rows; the rate falls as 1 / sqrt(L)."""
    rows = 1_600_000
    return TrainConfig(
        sae=SaeConfig(n_latents=n_latents, k=k),
        optimizer=OptimizerConfig(
            learning_rate=3e-3 * (4096 / n_latents) ** 0.5,
            decay_rows=rows // 5,
            ema_decay=0.98,
        ),
        data=DataConfig(store=store, batch_rows=2048, lanes=8, window_chunks=8),
        rows=rows,
        dead_after_rows=40_000,
        seed=seed,
        log_every_steps=20,
        checkpoint_every_steps=400,
        checkpoints_kept=1,
    )
