"""What a subject does wherever it runs: text to tokens and back, sites by name."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from sae_jax.subjects.display import display_token
from sae_jax.subjects.sites import KINDS, Site, parse_site


class BaseSubject:
    """A language model of which no more is known than its tokenizer and its blocks."""

    tokenizer: Tokenizer
    name: str

    @property
    def n_layers(self) -> int:
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """The int32 token ids of the text, without the BOS token."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode_tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token; bytes that are no whole character as `\\xe2`."""
        return [display_token(self.tokenizer, int(token)) for token in ids]

    def _find_site(self, name: str) -> Site:
        """The site of this name; ValueError if the layers or the kinds lack it."""
        site = parse_site(name)
        if site.layer >= self.n_layers:
            raise ValueError(
                f"no site {name!r} in subject {self.name!r}: its layers are "
                f"0..{self.n_layers - 1}, its kinds {', '.join(self._list_kinds(0))}"
            )
        return site

    def _list_kinds(self, layer: int) -> list[str]:
        """The kinds of sites that the layer has."""
        return list(KINDS)
