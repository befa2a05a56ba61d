"""The architectures that run in JAX, by the names that a config.json has for them."""

from collections.abc import Mapping, Set
from typing import Any, Protocol

import jax

from sae_jax.subjects import gpt2, llama
from sae_jax.subjects.fields import Fields
from sae_jax.subjects.sites import Replacement, Site
from sae_jax.subjects.weights import Stored, Weights

ModelConfig = gpt2.GPT2Config | llama.LlamaConfig


class Architecture(Protocol):
    """What the module of an architecture has; configs are of its own class.

    `PREFIX` is the part of tensor names that is missing where the model was saved
    without its head.
    """

    NAMES: tuple[str, ...]
    PREFIX: str

    def forward(
        self,
        weights: Weights,
        config: Any,
        tokens_bt: jax.Array,
        capture: Set[Site],
        replace: Mapping[Site, Replacement],
        stop_after: int | None = None,
    ) -> tuple[jax.Array, dict[Site, jax.Array]]: ...

    def compute_logits(
        self, weights: Weights, config: Any, x_btd: jax.Array
    ) -> jax.Array: ...

    def get_width(self, config: Any, kind: str) -> int: ...

    def list_shapes(self, config: Any) -> Weights: ...

    def count_units(self, config: Any) -> dict[str, int]: ...

    def find_stored(self, name: str, layer: int | None) -> Stored: ...

    def read_config(self, architecture: str, fields: Fields) -> ModelConfig: ...

    def get_default_bos_id(self, architecture: str) -> int | None: ...


ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(gpt2.NAMES, gpt2),
    **dict.fromkeys(llama.NAMES, llama),
}


def get_architecture(config: ModelConfig) -> Architecture:
    """The module whose config this is."""
    return gpt2 if isinstance(config, gpt2.GPT2Config) else llama
