"""What an evaluation is asked to read, checked before anything is measured."""

from collections.abc import Sequence

from sae_jax.evals import recovery
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.family import read_family
from sae_jax.evals.identity import identify, identify_file
from sae_jax.tasks import LEAST_TASK_ROWS, read_examples


def check_inputs(
    context: Context, config: EvaluateConfig, metrics: Sequence[str]
) -> dict[str, str]:
    """Reads every file that the config names; returns a hash of each.

    Raises ValueError where one cannot be used, or where more is asked for than there
    is. What is at its default asks for no more than there is.
    """
    _check_sizes(context, config, metrics)
    hashes = {}
    if config.family:
        read_family(config.family)
        hashes["family"] = identify_file(config.family)
    if config.tasks:
        read_examples(config.tasks)
        hashes["tasks"] = identify_file(config.tasks)
    if config.directions:
        recovery.read_directions(config.directions, context.sae.d_model)
        hashes["directions"] = identify_file(config.directions)
    if config.against:
        hashes["against"] = identify(recovery.open_other(context, config.against))
    return hashes


def _check_sizes(
    context: Context, config: EvaluateConfig, metrics: Sequence[str]
) -> None:
    store, usual = context.store, EvaluateConfig()
    n_rows, n_contexts = store.rows("heldout"), len(store.sequences("heldout"))
    available = {"rows": n_rows, "sequences": n_contexts, "explanation_rows": n_rows}
    for name, most in available.items():
        asked = getattr(config, name)
        if asked > most and asked != getattr(usual, name):
            raise ValueError(
                f"{name} = {asked}: {store.path} has {most} held-out "
                f"{'contexts' if name == 'sequences' else 'rows'}: ask for no more, or "
                "harvest more text"
            )
    if "explanations" in metrics and n_contexts < 2:
        raise ValueError(
            f"{store.path} has {n_rows} held-out rows, which is one context: "
            "explanations need two, one to explain from and one to test on"
        )
    if "ablation" in metrics and config.ablation_horizon > store.context_length:
        raise ValueError(
            f"ablation_horizon = {config.ablation_horizon}: the contexts of "
            f"{store.path} have {store.context_length} tokens: lower it"
        )
    if config.task_rows < LEAST_TASK_ROWS:
        raise ValueError(
            f"task_rows = {config.task_rows}: too few rows would be held out; make it "
            f"at least {LEAST_TASK_ROWS}"
        )
