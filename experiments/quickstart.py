"""The quickstart's SAE: 4,096 latents, K = 32, on layer 3 of the default subject.

    sae-jax harvest --site=resid_post.3 --max_rows=1100000 --out=quickstart/store
    sae-jax train --config=experiments/quickstart.py --workdir=quickstart/run
    sae-jax evaluate quickstart/run

`sae-jax quickstart` does the same three steps in one.
"""

from sae_jax.config import TrainConfig
from sae_jax.quickstart import get_config as quickstart_config


def get_config() -> TrainConfig:
    return quickstart_config()
