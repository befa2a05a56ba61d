"""Sites: the places of a transformer where activations are read and replaced.

A block adds twice to the residual stream:

    resid_mid = resid_pre + attn_out,    resid_post = resid_mid + mlp_out

and `mlp_act` is what the MLP's output matrix reads.
"""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import jax

Replacement = Callable[[jax.Array, jax.Array], jax.Array]

_HOOK_OF_KIND = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_KIND_OF_HOOK = {hook: kind for kind, hook in _HOOK_OF_KIND.items()}

# In the order in which a block computes them.
KINDS = tuple(_HOOK_OF_KIND)


@dataclass(frozen=True)
class Site:
    """One place of one layer; `str` gives its name back, as `resid_post.3`."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


class Visitor:
    """Reads and replaces activations on their way through a forward pass.

    A site that is replaced and captured is captured after its replacement.
    """

    def __init__(
        self,
        tokens_bt: jax.Array,
        capture: Set[Site],
        replace: Mapping[Site, Replacement],
    ) -> None:
        self.captured: dict[Site, jax.Array] = {}
        self._tokens_bt, self._capture, self._replace = tokens_bt, capture, replace

    def visit(self, kind: str, layer: int, acts: jax.Array) -> jax.Array:
        """The activations that the forward pass goes on with."""
        site = Site(kind, layer)
        if site in self._replace:
            acts = self._replace[site](acts, self._tokens_bt).astype(acts.dtype)
        if site in self._capture:
            self.captured[site] = acts
        return acts


def parse_site(text: str) -> Site:
    """The site named `kind.layer`; ValueError lists the kinds for any other text."""
    match = re.fullmatch(r"([a-z_]+)\.(0|[1-9][0-9]*)", text, flags=re.ASCII)
    if match is None or match[1] not in KINDS:
        names = ", ".join(f"{kind}.L" for kind in KINDS)
        raise ValueError(f"no site {text!r}: give one of {names}, with L a layer")
    return Site(match[1], int(match[2]))


def to_hook_name(site: Site) -> str:
    """The TransformerLens name of the site."""
    return f"blocks.{site.layer}.{_HOOK_OF_KIND[site.kind]}"


def from_hook_name(hook_name: str) -> Site:
    """The site with this TransformerLens name; ValueError lists those that exist."""
    match = re.fullmatch(r"blocks\.([0-9]+)\.(.+)", hook_name, flags=re.ASCII)
    if match is None or match[2] not in _KIND_OF_HOOK:
        names = ", ".join(f"blocks.L.{hook}" for hook in _KIND_OF_HOOK)
        raise ValueError(f"no site for hook {hook_name!r}: give one of {names}")
    return Site(_KIND_OF_HOOK[match[2]], int(match[1]))
