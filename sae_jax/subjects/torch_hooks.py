"""The blocks of a torch model, with hooks that read and replace their sites."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from sae_jax.subjects.sites import Site

# Torch's types, which are there with an extra only.
Module = Any
Tensor = Any


@dataclass(frozen=True, eq=False)
class Block:
    """One block and its sites: `widths` has those kinds that it has."""

    module: Module
    widths: Mapping[str, int]
    attn: Module = None  # its output is attn_out
    mlp: Module = None  # its output is mlp_out
    matrix: Module = None  # its input is mlp_act
    mid_readers: tuple[Module, ...] = ()  # their input is resid_mid


@contextlib.contextmanager
def hook_sites(
    blocks: Sequence[Block],
    sites: Set[Site],
    shape_bt: tuple[int, int],
    visit: Callable[[Site, Tensor], Tensor],
) -> Iterator[None]:
    """Within it, a run of the model puts `visit(site, acts_btd)` in place of the
    activations of each of the sites, which must be there."""

    def change(site: Site) -> Callable[[Tensor], Tensor]:
        def apply(acts: Tensor) -> Tensor:
            # Some blocks flatten [B, T, D] to [B T, D].
            acts_btd = acts if acts.ndim == 3 else acts.reshape(*shape_bt, -1)
            new_btd = visit(site, acts_btd)
            return acts if new_btd is acts_btd else new_btd.reshape(acts.shape)

        return apply

    with contextlib.ExitStack() as stack:
        # The hooks of one module run in the order of this list.
        for layer, block in enumerate(blocks):
            for kind, hook, module in (
                ("resid_pre", _hook_input, block.module),
                ("attn_out", _hook_output, block.attn),
                ("mlp_act", _hook_input, block.matrix),
                ("mlp_out", _hook_output, block.mlp),
            ):
                if Site(kind, layer) in sites:
                    stack.enter_context(hook(module, change(Site(kind, layer))))
            if Site("resid_mid", layer) in sites:
                _hook_mid(block, change(Site("resid_mid", layer)), stack)
            if Site("resid_post", layer) in sites:
                visit_post = change(Site("resid_post", layer))
                stack.enter_context(_hook_output(block.module, visit_post))
        yield


def place_input(args: tuple, kwargs: dict) -> int | str | None:
    """The index or the name of the first tensor of a call."""
    import torch

    for place, value in itertools.chain(enumerate(args), kwargs.items()):
        if torch.is_tensor(value):
            return place
    return None


def get_input(args: tuple, kwargs: dict, place: int | str) -> Tensor:
    """The tensor at a place that `place_input` gave."""
    return kwargs[place] if isinstance(place, str) else args[place]


def _hook_mid(
    block: Block, change: Callable[[Tensor], Tensor], stack: contextlib.ExitStack
) -> None:
    """Hooks resid_mid, which is no module's output: those that read it get the new
    one, and where there is a new one the block's output is that plus mlp_out."""
    new_mid: Tensor = None
    mlp_out: Tensor = None

    def read(acts: Tensor) -> Tensor:
        nonlocal new_mid
        if new_mid is None:
            new_mid = change(acts)
        return acts if new_mid is acts else new_mid.reshape(acts.shape)

    def keep(acts: Tensor) -> Tensor:
        nonlocal mlp_out
        mlp_out = acts
        return acts

    def add(acts: Tensor) -> Tensor:
        return new_mid.reshape(acts.shape) + mlp_out.reshape(acts.shape)

    for module in block.mid_readers:
        stack.enter_context(_hook_input(module, read))
    stack.enter_context(_hook_output(block.mlp, keep))
    stack.enter_context(_hook_output(block.module, add))


def _hook_input(module: Module, change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        place = place_input(args, kwargs)
        if place is None:
            return None
        old = get_input(args, kwargs, place)
        new = change(old)
        if new is old:
            return None
        if isinstance(place, str):
            return args, kwargs | {place: new}
        return (*args[:place], new, *args[place + 1 :]), kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_output(module: Module, change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: Module, args: tuple, output: Any) -> Any:
        old = output[0] if isinstance(output, tuple) else output
        new = change(old)
        if new is old:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(hook)
