"""Subjects of any architecture: causal language models that transformers can load.

    subject = load_torch_subject(Path("pythia-70m"))   # needs sae_jax[torch]
    acts = subject.capture(tokens_bt, ("resid_post.3",))

The model runs in torch, on a GPU if torch has one; its sites are those that
`torch_sites` finds. Nothing in a folder is ever executed or unpickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from tokenizers import Tokenizer

from sae_jax.subjects import torch_folder
from sae_jax.subjects.base import BaseSubject
from sae_jax.subjects.sites import KINDS, Replacement, Site
from sae_jax.subjects.tokens import read_special_tokens
from sae_jax.subjects.torch_hooks import Block, hook_sites
from sae_jax.subjects.torch_sites import find_blocks, tell_missing

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class TorchSubject(BaseSubject):
    """A language model in torch; what it says of itself is what a Subject says.

    `identity` is the first 16 hex digits of a SHA-256 of the weight files and of
    config.json; the dtype of the matmuls is not in it.
    """

    model: Any  # a transformers.PreTrainedModel
    blocks: tuple[Block, ...]
    tokenizer: Tokenizer
    name: str
    identity: str
    bos_id: int | None
    pad_id: int
    special_ids: tuple[int, ...]
    context_length: int
    vocab_size: int

    @property
    def dtype(self) -> str:
        """The name of the dtype of weights and matmuls."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def d_model(self) -> int:
        return self.blocks[0].widths["resid_pre"]

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def width(self, site: str) -> int:
        """The width of the activations at the site; ValueError if there is none."""
        found = self._find_site(site)
        return self.blocks[found.layer].widths[found.kind]

    def capture(
        self, tokens_bt: ArrayLike, sites: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The bfloat16 activations [B, T, D] of the sites, and nothing past the last
        of them is run."""
        import torch

        _, acts = self._run(tokens_bt, sites, {}, is_whole=False)
        return {name: _to_numpy(acts[name].to(torch.bfloat16)) for name in sites}

    def forward(
        self,
        tokens_bt: ArrayLike,
        capture: Sequence[str] = (),
        replace: Mapping[str, Replacement] | None = None,
        logits: bool = True,
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Float32 logits [B, T, V] and the activations [B, T, D] of captured sites.

        As `Subject.forward`, but never part of a compiled function. Activations are
        of the model's dtype, in `capture`, in `replace` and in the result.
        """
        logits_btv, acts = self._run(tokens_bt, capture, replace or {}, logits)
        return (
            None if logits_btv is None else jnp.asarray(_to_numpy(logits_btv.float())),
            {name: jnp.asarray(_to_numpy(acts[name])) for name in capture},
        )

    def _run(
        self,
        tokens_bt: ArrayLike,
        capture: Sequence[str],
        replace: Mapping[str, Replacement],
        is_whole: bool,
    ) -> tuple[Any, dict[str, Any]]:
        """The logits, if the run is whole, and captured activations, in torch."""
        import torch

        tokens_bt = np.asarray(tokens_bt, np.int32)
        self._check_tokens(tokens_bt)
        captured = {self._find_site(name): name for name in capture}
        replaced = {self._find_site(name): fn for name, fn in replace.items()}
        acts: dict[str, Any] = {}
        if not captured and not is_whole:
            return None, acts

        def visit(site: Site, acts_btd: Any) -> Any:
            if site in replaced:
                new_btd = replaced[site](
                    jnp.asarray(_to_numpy(acts_btd)), jnp.asarray(tokens_bt)
                )
                acts_btd = _to_torch(new_btd, acts_btd)
            if site in captured:
                # A copy: some models add to a tensor in place.
                acts[captured[site]] = acts_btd.clone()
                if not is_whole and len(acts) == len(captured):
                    raise _Stop
            return acts_btd

        sites = captured.keys() | replaced.keys()
        b, t = tokens_bt.shape
        with torch.inference_mode(), hook_sites(self.blocks, sites, (b, t), visit):
            ids = torch.from_numpy(tokens_bt.astype(np.int64)).to(self.model.device)
            try:
                output = self.model(input_ids=ids, use_cache=False)
            except _Stop:
                return None, acts
        return output.logits, acts

    def _check_tokens(self, tokens_bt: np.ndarray) -> None:
        if tokens_bt.shape[1] > self.context_length:
            raise ValueError(
                f"subject {self.name!r} has a context of {self.context_length} tokens, "
                f"the rows have {tokens_bt.shape[1]}: give shorter rows"
            )
        least, most = tokens_bt.min(initial=0), tokens_bt.max(initial=0)
        if least < 0 or most >= self.vocab_size:
            raise ValueError(
                f"subject {self.name!r} has tokens 0..{self.vocab_size - 1}, the rows "
                f"{least}..{most}: encode with its tokenizer"
            )

    def _find_site(self, name: str) -> Site:
        site = super()._find_site(name)
        block = self.blocks[site.layer]
        if site.kind not in block.widths:
            raise ValueError(
                f"no site {name!r} in subject {self.name!r}: "
                f"{tell_missing(block, site.kind)}; "
                f"give one of {', '.join(self._list_kinds(site.layer))}"
            )
        return site

    def _list_kinds(self, layer: int) -> list[str]:
        return [kind for kind in KINDS if kind in self.blocks[layer].widths]


def load_torch_subject(
    root: Path, name: str | None = None, dtype: DTypeLike | None = None
) -> TorchSubject:
    """The model in a Hugging Face folder, whose name is the folder's unless given.

    Weights and matmuls are `dtype`: bfloat16 on a GPU and float32 on a CPU where it
    is None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds code or pickled weights, or the model is
            none that transformers can load as a causal language model; or torch or
            transformers is not installed.
    """
    fields = torch_folder.read_fields(root)
    try:
        import torch
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{root}: a model of type {fields.get('model_type')!r} needs torch and "
            f"transformers, and {error.name} is not there: "
            "pip install 'sae_jax[torch]'"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = jnp.float32 if device == "cpu" else jnp.bfloat16
    dtype_name = np.dtype(dtype).name
    if dtype_name not in _DTYPES:
        raise ValueError(f"dtype {dtype_name} is not one of {', '.join(_DTYPES)}")
    model = torch_folder.load_model(root, getattr(torch, dtype_name), device)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    context_length = torch_folder.find_context_length(root, model.config)
    try:
        with torch.inference_mode():
            blocks = find_blocks(model, vocab_size, context_length)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{root}: no sites are found in a model of type "
            f"{fields.get('model_type')!r} ({reason}): give another model"
        ) from error
    tokenizer = torch_folder.read_tokenizer(root, vocab_size)
    special = read_special_tokens(root, tokenizer, vocab_size, default_bos_id=None)
    return TorchSubject(
        model=model,
        blocks=blocks,
        tokenizer=tokenizer,
        name=root.resolve().name if name is None else name,
        identity=torch_folder.identify(root, fields),
        bos_id=special.bos_id,
        pad_id=special.pad_id,
        special_ids=special.special_ids,
        context_length=context_length,
        vocab_size=vocab_size,
    )


class _Stop(Exception):
    """All that is wanted was captured."""


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: jax.Array, like: Any) -> Any:
    """The array, of the shape, dtype and device of `like`."""
    import torch

    # Every bfloat16 and float16 is a float32.
    host = np.array(array, np.float32)
    return torch.from_numpy(host).to(like.device, like.dtype).expand_as(like)
