"""Subjects: the language models whose activations are read and replaced.

    subject = load_subject()                           # the one in the package
    tokens_bt = subject.encode("import os\\n")[None]
    logits_btv, acts = subject.forward(tokens_bt, capture=["resid_post.3"])
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from tokenizers import Tokenizer

from sae_jax.subjects import folder, llama
from sae_jax.subjects.display import display_token
from sae_jax.subjects.sites import KINDS, Site, parse_site

__all__ = ["Site", "Subject", "load_subject", "next_token_loss", "parse_site"]

_DEFAULT_FOLDER = Path(__file__).parent / "default"


@dataclass(frozen=True)
class Subject:
    """A language model: a pytree whose leaves are its weights.

    `identity` is the first 16 hex digits of a SHA-256 of the weight file and of what
    config.json says; the dtype of the matmuls is not in it.
    Two subjects of one name, identity and shape share a compiled function.
    """

    weights: llama.Weights
    config: llama.LlamaConfig
    tokenizer: Tokenizer
    name: str
    identity: str
    bos_id: int

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
        return llama.get_width(self.config, self._find_site(site).kind)

    def encode(self, text: str) -> np.ndarray:
        """The int32 token ids of the text, without the BOS token."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode_tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token; bytes that are no whole character as `\\xe2`."""
        return [display_token(self.tokenizer, int(token)) for token in ids]

    def forward(
        self,
        tokens_bt: ArrayLike,
        capture: Sequence[str] = (),
        replace: Mapping[str, llama.Replacement] | None = None,
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
        x_btd, acts = llama.forward(
            self.weights,
            self.config,
            tokens_bt,
            set(captured_sites.values()),
            replaced,
            stop_after=None if logits else deepest,
        )
        logits_btv = None
        if logits:
            logits_btv = llama.compute_logits(self.weights, self.config, x_btd)
        return logits_btv, {name: acts[site] for name, site in captured_sites.items()}

    def _find_site(self, name: str) -> Site:
        site = parse_site(name)
        if site.layer >= self.n_layers:
            raise ValueError(
                f"no site {name!r} in subject {self.name!r}: its layers are "
                f"0..{self.n_layers - 1}, its kinds {', '.join(KINDS)}"
            )
        return site


def load_subject(path: str = "default", dtype: DTypeLike | None = None) -> Subject:
    """The model in a Hugging Face folder; "default" is the one in the package.

    Weights and matmuls are `dtype`: float32 on a CPU and bfloat16 elsewhere where
    it is None. Raises FileNotFoundError for a missing file and ValueError for one
    that is damaged, or for a model that is not of the Llama family.
    """
    root = _DEFAULT_FOLDER if path == "default" else Path(path)
    for file in (folder.CONFIG_FILE, folder.WEIGHTS_FILE, folder.TOKENIZER_FILE):
        if not (root / file).is_file():
            raise FileNotFoundError(
                f"no {file} in {str(root)!r}: give a Hugging Face model folder with "
                "config.json, model.safetensors and tokenizer.json"
            )
    config = folder.read_config(root)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    bos_id = folder.read_bos_id(root, config)
    tokenizer = folder.read_tokenizer(root, config)
    weights = folder.read_weights(root, config, dtype)
    return Subject(
        weights=jax.tree.map(jnp.asarray, weights),
        config=config,
        tokenizer=tokenizer,
        name="default" if path == "default" else root.resolve().name,
        identity=_identify(root / folder.WEIGHTS_FILE, config, bos_id),
        bos_id=bos_id,
    )


def next_token_loss(logits_btv: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """Float32 cross-entropy [B, T-1], in nats, of each token after the first."""
    logits_btv = logits_btv[:, :-1].astype(jnp.float32)
    next_bt1 = jnp.asarray(tokens_bt)[:, 1:, None]
    chosen_bt = jnp.take_along_axis(logits_btv, next_bt1, axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_btv, axis=-1) - chosen_bt


@dataclass(frozen=True)
class _Static:
    """What of a subject is no array. Equality decides what is compiled anew, so
    the tokenizer, which no forward pass reads, takes no part in it."""

    config: llama.LlamaConfig
    name: str
    identity: str
    bos_id: int
    tokenizer: Tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple:
        return self.config, self.name, self.identity, self.bos_id


def _flatten(subject: Subject) -> tuple[tuple[llama.Weights], _Static]:
    static = _Static(
        subject.config,
        subject.name,
        subject.identity,
        subject.bos_id,
        subject.tokenizer,
    )
    return (subject.weights,), static


def _unflatten(static: _Static, children: tuple[llama.Weights]) -> Subject:
    return Subject(
        children[0],
        static.config,
        static.tokenizer,
        static.name,
        static.identity,
        static.bos_id,
    )


jax.tree_util.register_pytree_node(Subject, _flatten, _unflatten)


def _identify(weights: Path, config: llama.LlamaConfig, bos_id: int) -> str:
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(repr((dataclasses.asdict(config), bos_id)).encode())
    return digest.hexdigest()[:16]
