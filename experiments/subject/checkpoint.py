"""One file that holds all of a training run: a kill loses minutes, not the run."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

from sae_jax.subjects.llama import Weights

_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class State:
    """A run at one step; `seconds` are those of training, over all its lives."""

    weights: Weights
    optimizer: optax.OptState
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(workdir: Path, state: State) -> None:
    """Put the state in place of the one saved before, whole or not at all."""
    leaves = jax.tree.leaves((state.weights, state.optimizer))
    arrays = {str(index): np.asarray(leaf) for index, leaf in enumerate(leaves)}
    progress = {"step": state.step, "tokens": state.tokens, "seconds": state.seconds}
    half_written = workdir / f"{_FILE}.tmp"
    save_file(arrays, half_written, metadata={"progress": json.dumps(progress)})
    half_written.replace(workdir / _FILE)


def restore(workdir: Path, state: State) -> State:
    """The saved state, in the structure of `state`, which is what nothing gives."""
    path = workdir / _FILE
    if not path.exists():
        return state
    leaves, structure = jax.tree.flatten((state.weights, state.optimizer))
    with safe_open(path, "np") as file:
        saved = [jnp.asarray(file.get_tensor(str(i))) for i in range(len(leaves))]
        progress = json.loads(file.metadata()["progress"])
    weights, opt_state = jax.tree.unflatten(structure, saved)
    return State(weights, opt_state, **progress)
