"""How much an evaluation measures, and on what.

What a metric is sampled on is set here and stated beside each of its figures. Every
field is a flag of `sae-jax evaluate`.
"""

import dataclasses

from sae_jax.config.fields import setting


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Rows come in whole contexts; batches are rounded up to what the mesh divides."""

    rows: int = setting(
        262_144, "held-out rows for errors and densities; all there are if fewer"
    )
    batch_rows: int = setting(2048, "rows at a time")
    sequences: int = setting(128, "held-out contexts for downstream figures")
    batch_sequences: int = setting(16, "contexts at a time")
    family: str = setting(
        "", "CSV file of `compute,loss` of a family of models, for equivalent compute"
    )
    tasks: str = setting(
        "", "JSON lines of binary tasks; generated ones about Python source if empty"
    )
    task_rows: int = setting(1000, "rows of a task at most, half of each class")
    explained_latents: int = setting(1000, "latents to explain by n-gram patterns")
    explanation_rows: int = setting(
        131_072, "held-out rows for that: half to explain from, half to test on"
    )
    ablated_tokens: int = setting(128, "tokens whose latents are ablated one by one")
    ablation_horizon: int = setting(
        16, "tokens whose predictions are compared: the ablated one and those after it"
    )
    directions: str = setting(
        "", ".npy file [N, D] of directions that the dictionary should have"
    )
    against: str = setting(
        "", "run folder of another SAE, as of another seed, to match dictionaries with"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} = {value}: must be at least 1")
