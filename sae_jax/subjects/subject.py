"""A subject: the weights, config and tokenizer of one language model."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from tokenizers import Tokenizer

from sae_jax.mesh import DATA, put
from sae_jax.subjects.architectures import Architecture, ModelConfig, get_architecture
from sae_jax.subjects.base import BaseSubject
from sae_jax.subjects.sites import Replacement
from sae_jax.subjects.weights import Weights


@dataclasses.dataclass(frozen=True)
class Subject(BaseSubject):
    """A language model: a pytree whose leaves are its weights.

    `identity` is the first 16 hex digits of a SHA-256 of the weight files and of what
    config.json says; the dtype of the matmuls is not in it.
    Two subjects that differ in weights and tokenizer alone share a compiled function.
    A document begins with the token `bos_id`, if it is not None; `special_ids` are
    the tokens that stand for no text; `pad_id` may stand behind the end of a text.
    """

    # Equality decides what is compiled anew: weights and tokenizer take no part in it.
    weights: Weights = dataclasses.field(compare=False)
    config: ModelConfig
    tokenizer: Tokenizer = dataclasses.field(compare=False)
    name: str
    identity: str
    bos_id: int | None
    special_ids: tuple[int, ...] = ()
    pad_id: int = 0

    @property
    def dtype(self) -> str:
        """The name of the dtype of weights and matmuls."""
        return self.weights["embed_vd"].dtype.name

    @property
    def d_model(self) -> int:
        return self.config.d_model

    @property
    def n_layers(self) -> int:
        return self.config.n_layers

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_length(self) -> int:
        return self.config.context_length

    def width(self, site: str) -> int:
        """The width of the activations at the site; ValueError if there is none."""
        return self._architecture.get_width(self.config, self._find_site(site).kind)

    def forward(
        self,
        tokens_bt: ArrayLike,
        capture: Sequence[str] = (),
        replace: Mapping[str, Replacement] | None = None,
        logits: bool = True,
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Float32 logits [B, T, V] and the activations [B, T, D] of captured sites.

        `replace` maps a site to a function of (acts_btd, tokens_bt) whose result
        takes the place of the activations: a `jax.tree_util.Partial`, so that its
        weights are arguments of a compiled function and not constants. A site that
        is replaced and captured is captured after its replacement. Without
        `logits` nothing past the deepest captured layer is run, and the first
        result is None. Inputs hold a BOS token where one is wanted; rows longer
        than the context raise ValueError.
        """
        tokens_bt = jnp.asarray(tokens_bt)
        if tokens_bt.shape[1] > self.context_length:
            raise ValueError(
                f"subject {self.name!r} has a context of {self.context_length} tokens, "
                f"the rows have {tokens_bt.shape[1]}: give shorter rows"
            )
        captured_sites = {name: self._find_site(name) for name in capture}
        replaced = {self._find_site(name): fn for name, fn in (replace or {}).items()}
        deepest = max((site.layer for site in captured_sites.values()), default=-1)
        x_btd, acts = self._architecture.forward(
            self.weights,
            self.config,
            tokens_bt,
            set(captured_sites.values()),
            replaced,
            stop_after=None if logits else deepest,
        )
        logits_btv = None
        if logits:
            logits_btv = self._architecture.compute_logits(
                self.weights, self.config, x_btd
            )
        return logits_btv, {name: acts[site] for name, site in captured_sites.items()}

    def capture(
        self, tokens_bt: np.ndarray, sites: Sequence[str]
    ) -> dict[str, jax.Array]:
        """The bfloat16 activations [B, T, D] of the sites, from a compiled run.

        It runs nothing past the deepest site, and returns before it is done. Where
        the weights are on a mesh, the rows are computed spread over its data axis,
        and stay so if it divides them; else each device has all in the end.
        """
        sharding, n_rows = self.weights["embed_vd"].sharding, len(tokens_bt)
        if not isinstance(sharding, NamedSharding):
            return _capture(self, tokens_bt, tuple(sites), None, n_rows)
        n_missing = -n_rows % sharding.mesh.shape[DATA]
        tokens_bt = np.pad(tokens_bt, ((0, n_missing), (0, 0)), mode="edge")
        spread = NamedSharding(sharding.mesh, PartitionSpec(DATA))
        return _capture(self, put(tokens_bt, spread), tuple(sites), spread, n_rows)

    @property
    def _architecture(self) -> Architecture:
        return get_architecture(self.config)


def _flatten(subject: Subject) -> tuple[tuple[Weights], Subject]:
    """The weights, and the subject without them, which is what is static."""
    return (subject.weights,), dataclasses.replace(subject, weights={})


def _unflatten(without: Subject, children: tuple[Weights]) -> Subject:
    return dataclasses.replace(without, weights=children[0])


jax.tree_util.register_pytree_node(Subject, _flatten, _unflatten)


@functools.partial(jax.jit, static_argnames=("sites", "spread", "n_rows"))
def _capture(
    subject: Subject,
    tokens_bt: jax.Array,
    sites: tuple[str, ...],
    spread: NamedSharding | None,
    n_rows: int,
) -> dict[str, jax.Array]:
    """Of the first `n_rows`; the others fill up what is spread."""
    _, acts = subject.forward(tokens_bt, capture=sites, logits=False)
    acts = {site: acts[site].astype(jnp.bfloat16) for site in sites}
    if spread is None:
        return acts
    acts = jax.lax.with_sharding_constraint(acts, spread)
    if n_rows == len(tokens_bt):
        return acts
    whole = NamedSharding(spread.mesh, PartitionSpec())
    acts = jax.tree.map(lambda acts_btd: acts_btd[:n_rows], acts)
    return jax.lax.with_sharding_constraint(acts, whole)
