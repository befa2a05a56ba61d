"""Steps of one trainer, timed: ours, or a peer's in an environment of its own.

    python experiments/peer_step.py sparsify SHAPE

`bench_peers.py` calls this, with SHAPE as JSON; the last line is one JSON object. No
environment has all libraries, so each is imported where it is used. A peer's step is
what its trainer does with a batch, by the calls of that trainer, in float32 or under
torch's autocast to bfloat16. AuxK is off, and nothing is logged.
"""

import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

STEPS = 2  # that are timed, after one that compiles and makes Adam's moments
SEVERAL = 1_000_000  # steps: no schedule ends

Step = Callable[[], Any]


def run(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    """The seconds of each step, and of which version."""
    build, *packages = CONTENDERS[name]
    step = build(shape)
    step()
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {"versions": ", ".join(versions), "seconds": seconds}


def build_sae_jax(selection: str, shape: dict[str, Any]) -> Step:
    """As it comes: rows are normalised too, and the average of the weights is kept."""
    import jax
    from timing import Shape, make_rows, make_setup

    from sae_jax import state as states
    from sae_jax.step import make_step

    setup = make_setup(Shape(**shape), selection=selection)
    rows_bd = make_rows(Shape(**shape))
    make_next = make_step(setup)
    state = states.create(setup, rows_bd)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(make_next(state, rows_bd))

    return step


def build_sparsify(shape: dict[str, Any]) -> Step:
    """`sparsify.Trainer.fit` less the language model, with optimizer="adam"."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    x_bd = _rows(shape)
    config = SparseCoderConfig(num_latents=shape["latents"], k=shape["k"])
    sae = SparseCoder(shape["d_model"], config, x_bd.device, torch.float32)
    sae.b_dec.data = x_bd.mean(0)
    optimizer = torch.optim.Adam(sae.parameters())
    since_l = torch.zeros(shape["latents"], dtype=torch.long, device=x_bd.device)
    fired_l = torch.zeros(shape["latents"], dtype=torch.bool, device=x_bd.device)

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        variance = (x_bd - x_bd.mean(0)).pow(2).sum()
        out = sae(x=x_bd, y=x_bd, dead_mask=None, total_variance=variance)
        fired_l[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_l.add_(shape["rows"])
        since_l[fired_l] = 0
        fired_l.zero_()

    return _finish(step, shape)


def build_dictionary_learning(shape: dict[str, Any]) -> Step:
    """`TopKTrainer.update`; it also clips the gradient's norm."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    x_bd = _rows(shape)
    trainer = TopKTrainer(
        steps=SEVERAL,
        activation_dim=shape["d_model"],
        dict_size=shape["latents"],
        k=shape["k"],
        layer=0,
        lm_name="none",
        auxk_alpha=0,
        device=str(x_bd.device),
    )
    # Step 0 would also fit a geometric median.
    return _finish(lambda: trainer.update(1, x_bd), shape)


def build_sae_lens(is_sparse: bool, shape: dict[str, Any]) -> Step:
    """`SAETrainer.step`; it clips too, and decoder rows are of any norm.

    As it comes, latents are chosen by value times norm; with sparse activations torch
    has no gradient of that, so they are chosen by value.
    """
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    x_bd = _rows(shape)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=shape["d_model"],
            d_sae=shape["latents"],
            k=shape["k"],
            device=str(x_bd.device),
            use_sparse_activations=is_sparse,
            rescale_acts_by_decoder_norm=not is_sparse,
        )
    )
    config = SAETrainerConfig(
        total_training_samples=SEVERAL * shape["rows"],
        train_batch_size_samples=shape["rows"],
        lr_end=0.0,  # has to be given; a constant schedule ignores it
        device=str(x_bd.device),
    )
    trainer = SAETrainer(config, sae, iter(()))
    return _finish(lambda: trainer.step(x_bd), shape)


CONTENDERS: dict[str, tuple[Any, ...]] = {
    "sae_jax exact": (functools.partial(build_sae_jax, "exact"), "sae_jax", "jax"),
    "sae_jax bucketed": (
        functools.partial(build_sae_jax, "bucketed"),
        "sae_jax",
        "jax",
    ),
    "sparsify": (build_sparsify, "eai-sparsify", "torch"),
    "dictionary_learning": (build_dictionary_learning, "dictionary-learning", "torch"),
    "sae_lens": (functools.partial(build_sae_lens, False), "sae-lens", "torch"),
    "sae_lens sparse": (functools.partial(build_sae_lens, True), "sae-lens", "torch"),
}


def _rows(shape: dict[str, Any]) -> Any:
    """The rows that `timing.make_rows` makes."""
    import torch

    size = (shape["rows"], shape["d_model"])
    rows_bd = np.random.default_rng(0).standard_normal(size, np.float32)
    return torch.from_numpy(rows_bd).to("cuda" if torch.cuda.is_available() else "cpu")


def _finish(step: Step, shape: dict[str, Any]) -> Step:
    """The step in the dtype of the shape, waited for."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_bfloat16 = shape["dtype"] == "bfloat16"

    def finished() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=is_bfloat16):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return finished


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))))
