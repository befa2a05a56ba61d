"""The sites of a torch model, found by running it once on a few tokens.

The names of modules differ between architectures, and no name says whether a norm or
a factor stands between a module and the residual stream. So two modules of a block
are taken, the attention's a before the MLP's m, whose outputs are what the block adds
to the residual stream x, bit for bit:

    x + a + m = the output of the block

`resid_mid` is there where a later module reads x + a, and `mlp_act` where m is the
output of one matrix, or of a norm over it. A site that is not found is refused: a
block in parallel has no `resid_mid`, one with norms over its sums has x alone.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_jax.subjects.torch_hooks import (
    Block,
    Module,
    Tensor,
    get_input,
    place_input,
)

_PROBE_TOKENS = 8


def find_blocks(model: Module, vocab_size: int, longest: int) -> tuple[Block, ...]:
    """The blocks of a language model, in order.

    Raises:
        ValueError: there are none, or a block reads tokens that come later.
    """
    import torch

    t = min(_PROBE_TOKENS, longest)
    generator = torch.Generator().manual_seed(0)
    tokens_bt = torch.randint(vocab_size, (1, t), generator=generator).repeat(2, 1)
    tokens_bt[1, -1] = (tokens_bt[1, -1] + 1) % vocab_size
    for modules in _list_stacks(model):
        found: list[Block] = []
        ends: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for module in modules:
                _probe(module, found, ends, stack)
            model(input_ids=tokens_bt.to(model.device), use_cache=False)
        if [block.module for block in found] == modules:
            _check_causal(ends[-1])
            return tuple(found)
    raise ValueError("it has no list of blocks of one kind that each run once")


def tell_missing(block: Block, kind: str) -> str:
    """Why the block has no site of this kind."""
    if block.attn is None:
        return "its blocks are no sums of x, an attention and an MLP output"
    if kind == "resid_mid":
        return "its MLP does not read the sum of x and the attention's output"
    return "its MLP's output is that of no single matrix"


def _list_stacks(model: Module) -> list[list[Module]]:
    """The lists of modules of one type that are in no other list, longest first."""
    from torch.nn import ModuleList

    stacks = []
    nested: set[Module] = set()
    for module in model.modules():
        if isinstance(module, ModuleList) and len(module) and module not in nested:
            nested |= set(module.modules())
            if len({type(block) for block in module}) == 1:
                stacks.append(list(module))
    return sorted(stacks, key=len, reverse=True)


@dataclass(eq=False)
class _Call:
    """One call of a module: when, with which first tensor, and what came out."""

    module: Module
    start: int
    input: Tensor
    end: int = 0
    output: Tensor = None


def _probe(
    module: Module,
    found: list[Block],
    ends: list[Tensor],
    stack: contextlib.ExitStack,
) -> None:
    """Has the block append itself to `found`, and its output to `ends`, when run."""
    import torch

    clock = itertools.count()
    calls: list[_Call] = []
    running: list[_Call] = []

    def begin(called: Module, args: tuple, kwargs: dict) -> None:
        if running or called is module:
            place = place_input(args, kwargs)
            # Copies: some models add to a tensor in place.
            value = None if place is None else get_input(args, kwargs, place).clone()
            running.append(_Call(called, next(clock), value))
            calls.append(running[-1])

    def finish(called: Module, args: tuple, output: Any) -> None:
        if not running:
            return
        first = output[0] if isinstance(output, tuple) else output
        call = running.pop()
        call.end = next(clock)
        call.output = first.clone() if torch.is_tensor(first) else None
        if not running:
            found.append(_locate(calls))
            ends[:] = [call.output]
            calls.clear()

    for part in module.modules():
        stack.enter_context(part.register_forward_pre_hook(begin, with_kwargs=True))
        stack.enter_context(part.register_forward_hook(finish))


def _locate(calls: Sequence[_Call]) -> Block:
    whole, *parts = calls
    x, post = whole.input, whole.output
    if x is None or x.ndim != 3 or post is None or post.shape != x.shape:
        raise ValueError("its blocks do not map [B, T, D] to [B, T, D]")
    d_model = x.shape[-1]
    widths = {"resid_pre": d_model, "resid_post": d_model}
    n_calls = Counter(call.module for call in parts)
    parts = [call for call in parts if n_calls[call.module] == 1]
    pair = _find_sum(sorted(parts, key=lambda call: call.end), x, post)
    if pair is None:
        return Block(whole.module, widths)
    attn, mlp = pair
    widths |= {"attn_out": d_model, "mlp_out": d_model}
    readers = _find_mid_readers(parts, x, attn, mlp, post)
    if readers:
        widths["resid_mid"] = d_model
    matrix = _find_matrix(parts, attn, mlp)
    if matrix is not None:
        widths["mlp_act"] = matrix.input.shape[-1]
    return Block(
        module=whole.module,
        widths=widths,
        attn=attn.module,
        mlp=mlp.module,
        matrix=None if matrix is None else matrix.module,
        mid_readers=tuple(call.module for call in readers),
    )


def _find_sum(
    parts: Sequence[_Call], x: Tensor, post: Tensor
) -> tuple[_Call, _Call] | None:
    """The two calls whose outputs a block adds, the outermost of equal ones."""
    outputs = [
        (call, call.output.reshape(x.shape))
        for call in parts
        if call.output is not None and _is_shaped(call.output, x)
    ]
    pairs = [
        (first, second)
        for (first, a), (second, m) in itertools.combinations(outputs, 2)
        if _is_same(x + a + m, post) or _is_same(a + m + x, post)
    ]
    if not pairs:
        return None
    attn, mlp = pairs[-1]
    is_unique = all(
        _is_same(first.output, attn.output) and _is_same(second.output, mlp.output)
        for first, second in pairs
    )
    return (attn, mlp) if is_unique else None


def _find_mid_readers(
    parts: Sequence[_Call], x: Tensor, attn: _Call, mlp: _Call, post: Tensor
) -> list[_Call]:
    """The calls, within no other of them, that read x + a."""
    mid = x + attn.output.reshape(x.shape)
    if _is_same(mid, x) or not _is_same(mid + mlp.output.reshape(x.shape), post):
        return []
    readers: list[_Call] = []
    for call in sorted(parts, key=lambda call: call.start):
        is_inside = bool(readers) and call.start < readers[-1].end
        if call.start > attn.end and not is_inside and _is_same(call.input, mid):
            readers.append(call)
    return readers


def _find_matrix(parts: Sequence[_Call], attn: _Call, mlp: _Call) -> _Call | None:
    """The matrix whose output is m, or what the module that gives m reads."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    for call in reversed(parts):
        if isinstance(call.module, Linear | Conv1D) and attn.end < call.start:
            if any(_is_same(call.output, value) for value in (mlp.output, mlp.input)):
                return call
    return None


def _is_shaped(value: Tensor, x: Tensor) -> bool:
    return value.numel() == x.numel() and value.shape[-1] == x.shape[-1]


def _is_same(value: Tensor, x: Tensor) -> bool:
    """Whether both hold the same numbers, whether the rows are flat or not."""
    if value is None or x is None or value.dtype != x.dtype or not _is_shaped(value, x):
        return False
    return bool((value.reshape(x.shape) == x).all())


def _check_causal(last_btd: Tensor) -> None:
    """The two rows of the probe differ in their last token alone."""
    import torch

    first_td, second_td = last_btd[:, :-1].float()
    slack = 8 * torch.finfo(last_btd.dtype).eps * first_td.abs().max()
    if not bool(((first_td - second_td).abs() <= slack).all()):
        raise ValueError("its activations depend on later tokens, or are not finite")
