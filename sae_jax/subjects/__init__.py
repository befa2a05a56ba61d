"""Subjects: the language models whose activations are read and replaced.

    subject = load_subject()                           # the one in the package
    tokens_bt = subject.encode("import os\\n")[None]
    logits_btv, acts = subject.forward(tokens_bt, capture=["resid_post.3"])
"""

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sae_jax.subjects import folder, gpt2, hub
from sae_jax.subjects.architectures import ARCHITECTURES
from sae_jax.subjects.fields import Fields
from sae_jax.subjects.sites import Site, from_hook_name, parse_site, to_hook_name
from sae_jax.subjects.subject import Subject
from sae_jax.subjects.tokens import read_special_tokens, read_tokenizer
from sae_jax.subjects.weights import list_weight_files, read_weights

if TYPE_CHECKING:
    from sae_jax.subjects.torch_model import TorchSubject

__all__ = [
    "AnySubject",
    "Site",
    "Subject",
    "from_hook_name",
    "load_any_subject",
    "load_subject",
    "next_token_loss",
    "parse_site",
    "to_hook_name",
]

AnySubject: TypeAlias = "Subject | TorchSubject"


_DEFAULT_FOLDER = Path(__file__).parent / "default"


def load_any_subject(
    path: str = "default", dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> "Subject | TorchSubject":
    """`load_subject`, and through torch what it refuses for its architecture: that can
    be harvested from, on one device, and not evaluated on."""
    root, name = _find(path)
    if _get_architecture_name(folder.read_fields(root)) in ARCHITECTURES:
        return load_subject(path, dtype, mesh)
    # Here, for what it imports is an extra.
    from sae_jax.subjects.torch_model import load_torch_subject

    return load_torch_subject(root, name, dtype)


def load_subject(
    path: str = "default", dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Subject:
    """The model in a Hugging Face folder; "default" is the one in the package, and
    `org/name` or `org/name@revision` is fetched from the Hugging Face Hub.

    Weights and matmuls are `dtype`: float32 on a CPU and bfloat16 elsewhere where
    it is None. With a mesh of `sae_jax.mesh` weights are spread over its latent axis,
    each device reading its own part; without one they are on one device. Raises
    FileNotFoundError for a missing file and ValueError for one that is damaged, or
    for a model of no architecture in `ARCHITECTURES`.
    """
    root, shown_name = _find(path)
    fields = folder.read_fields(root)
    name = _get_architecture_name(fields)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{fields.path}: architecture {name!r} does not run in JAX, which "
            f"{', '.join(ARCHITECTURES)} do; sae-jax harvest reads it through torch, "
            "with the extra torch"
        )
    architecture = ARCHITECTURES[name]
    if fields.values.get("quantization_config") is not None:
        raise ValueError(
            f"{fields.path}: the weights are quantized (quantization_config): give "
            "them as they were before"
        )
    config = architecture.read_config(name, fields)
    files = list_weight_files(root)
    tokenizer = read_tokenizer(root, config.vocab_size, architecture is gpt2)
    special = read_special_tokens(
        root, tokenizer, config.vocab_size, architecture.get_default_bos_id(name)
    )
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    weights = read_weights(
        files,
        architecture.list_shapes(config),
        architecture.find_stored,
        architecture.PREFIX,
        dtype,
        architecture.count_units(config),
        mesh,
    )
    return Subject(
        weights=weights,
        config=config,
        tokenizer=tokenizer,
        name=shown_name,
        identity=folder.identify(files, config, special.bos_id),
        bos_id=special.bos_id,
        special_ids=special.special_ids,
        pad_id=special.pad_id,
    )


def next_token_loss(logits_btv: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """Float32 cross-entropy [B, T-1], in nats, of each token after the first."""
    logits_btv = logits_btv[:, :-1].astype(jnp.float32)
    next_bt1 = jnp.asarray(tokens_bt)[:, 1:, None]
    chosen_bt = jnp.take_along_axis(logits_btv, next_bt1, axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_btv, axis=-1) - chosen_bt


def _find(path: str) -> tuple[Path, str]:
    """The folder of a subject, and its name."""
    if path == "default":
        return _DEFAULT_FOLDER, path
    if hub.is_hub_name(path):
        return hub.fetch(path), path  # the folder is named by its commit
    return Path(path), Path(path).resolve().name


def _get_architecture_name(fields: Fields) -> str:
    """The one name in `architectures`; whatever else is there is no architecture."""
    names = fields.values.get("architectures")
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        return names[0]
    return str(names)
