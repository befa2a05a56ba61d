"""What a step holds on a device, counted array by array.

    peak = state + rows of the batch + the largest of the phases below

A step lives through phases one after another; what a phase holds is listed in its
function. With own = L / n_latent latents and b = B / n_data rows of a device, of which
m at a time, N = m k_in slots of a code, and c bytes of a factor of a matmul:

    matrix      4 own D     W_enc or W_dec, or the gradient of one
    rounded     c own D     either of them in the compute dtype, unless it is in it
    rows        4 b D       a batch in float32; of a micro-batch part_rows, 4 m D

The state is eight matrices: both weights, their two moments and their average, less
what is spread over the data axis. These are the arrays of `sae_jax.gradients`,
`.saes.topk`, `.sparse`, `.dead_latents` and `.optim`; which of them live at one time
was read from the compiler's live ranges at some shapes, the tests compare at others.
Of architectures with dense codes the count is rougher.
"""

from sae_jax.config import CHOOSE_K, most_chosen
from sae_jax.dead_latents import _FEW, _LEAST_ROWS, _TILE_LATENTS, _TILE_SIZE
from sae_jax.plan.step import Step
from sae_jax.saes.tiles import TILE_SIZE as _DENSE_TILE

_COLUMNS = 4  # of a code that are gathered at once, as in `sae_jax.sparse`
_DENSE_CODES = {"jumprelu": 5}  # of one tile, held at once; of others 3
_RANKED = 8  # values, columns, winners, their places, ranks, and what scatters these
_SORTED = 6  # arrays of slots that sorting them by latent holds

Bytes = dict[str, int]


def state(step: Step) -> Bytes:
    """What lasts from step to step, by what it is for, and the batch's rows."""
    sae, own = step.sae, step.own
    has_bias = sae.use_b_enc or sae.architecture not in (*CHOOSE_K, "relu")
    spread, whole = 4 * (2 * step.matrix + own * has_bias), 4 * step.d_model
    part = spread // step.n_optimizer_shards + whole
    return {
        "parameters": spread + whole,
        "moments": 2 * part,
        "average": part,
        "counters": 4 * own,
        "batch": 2 * step.rows * step.d_model,  # stores give bfloat16
    }


def phases(step: Step) -> dict[str, Bytes]:
    """By phase, what is held beside the state."""
    found = {}
    if step.is_topk:
        found["choose"] = _choose(step)
        found["exchange of candidates"] = _exchange(step)
        found["decode"] = _decode(step)
    else:
        found["dense codes"] = _dense(step)
    found["gradients"] = _gradients(step)
    if step.n_parts > 1:
        for name in found:
            found[name] = found[name] | _kept_over_parts(step)
    if step.has_aux:
        found["AuxK"] = max(_auxk(step), key=lambda held: sum(held.values()))
    if step.has_aux and step.n_data > 1 and step.platform != "cpu":
        found["sum of gradients"] = _sum_of_gradients(step)
    if step.n_optimizer_shards > 1:
        found["shared update"] = _shared_update(step)
    return found


def temporaries(step: Step) -> tuple[str, Bytes]:
    """The phase that holds most, and what it holds."""
    return max(phases(step).items(), key=lambda phase: sum(phase[1].values()))


def peak(step: Step) -> int:
    """The most bytes that a device holds at once."""
    return sum(state(step).values()) + sum(temporaries(step)[1].values())


def _choose(step: Step) -> Bytes:
    """Rounded W_enc, the rows, one tile of pre-activations and its candidates.

    The exact choice sorts tiles: values, and their columns, stand beside them. A CPU
    sorts a row at a time.
    """
    choice = step.choice
    n_tiles = 3 if choice.method == "exact" and step.platform != "cpu" else 1
    tile_rows = min(choice.tile_rows, step.part_rows)
    n_candidates = choice.n_buckets * choice.kept or 2 * choice.k
    return {
        "rounded weights": _rounded(step),
        "rows": 2 * _part(step) + _rounded_part(step),
        "tile of pre-activations": 4 * tile_rows * choice.tile_latents * n_tiles,
        "buckets": 2 * 8 * tile_rows * n_candidates,
        "code": 2 * 8 * step.part_rows * choice.k,
    }


def _exchange(step: Step) -> Bytes:
    """Candidates of all latent shards, and which of them win.

    A CPU copies candidates to sort them, and has zeroed the sums that reconstructions
    will be before it is known what to add.
    """
    is_cpu = step.platform == "cpu"
    return {
        "rounded weights": _rounded(step),
        "rows": (2 + step.n_recons * is_cpu) * _part(step),
        "code": _RANKED * _slots(step),
        "candidates": (1 + is_cpu) * _candidates(step),
    }


def _decode(step: Step) -> Bytes:
    """Rounded W_dec, rows and their targets, a sum, and four gathered rows of each."""
    n_rows = 2 if step.platform == "cpu" else 3  # a CPU makes the targets again
    gathered = _COLUMNS * step.dtype_bytes * step.part_rows * step.d_model
    return {
        "rounded weights": _rounded(step),
        "rows": (n_rows + step.n_recons - 1) * _part(step),
        "gathered rows of weights": gathered,
        "code": _SORTED * _slots(step),
    }


def _dense(step: Step) -> Bytes:
    """Rounded weights, rows, and a tile of dense codes with those of its backward."""
    size = step.part_rows * step.own
    tile = size if step.sae.architecture == "batch_topk" else min(size, _DENSE_TILE)
    return {
        "rounded weights": 2 * _rounded(step),
        "rows": 3 * _part(step),
        "tile of codes": _DENSE_CODES.get(step.sae.architecture, 3) * 4 * tile,
        "gradients": 2 * 4 * step.matrix,
    }


def _gradients(step: Step) -> Bytes:
    """The gradients, the rows that they are sums of, and the slots sorted by latent."""
    chunk = 0 if not step.is_topk else min(2**21, step.part_rows * step.d_model) * 4
    n_gradients = _n_gradients(step) + (step.n_recons > 1)  # two of W_dec
    return {
        "gradients": n_gradients * 4 * step.matrix,
        "rows": 2 * (_rounded_part(step) or _part(step)),
        "code": _SORTED * _slots(step),
        "chunk of products": chunk,
    }


def _kept_over_parts(step: Step) -> Bytes:
    """What the loop over micro-batches holds in every phase of one."""
    return {
        "gradients": 3 * 4 * step.matrix,  # both sums, and one of the part's own
        "rounded weights": 2 * _rounded(step),
        "all rows": (2 if step.has_aux else 1) * _all_rows(step),
    }


def _auxk(step: Step) -> list[Bytes]:
    """Gradients, rounded weights, rows and residual, and a tile of dead latents' z.

    One for each of the two sizes that tiles have.
    """
    held = []
    for part in (-(-step.own // _FEW), step.own):
        capacity = -(-part // _TILE_LATENTS) * _TILE_LATENTS
        tile_rows = min(step.rows, max(_LEAST_ROWS, _TILE_SIZE // capacity))
        held.append(
            {
                "gradients": _n_gradients(step) * 4 * step.matrix,
                "rounded weights": 2 * _rounded(step),
                "rows": 2 * _all_rows(step),
                "pre-activations of dead latents": 4 * tile_rows * capacity,
                "tiles": 4 * tile_rows * (4 * step.d_model + 2 * _TILE_LATENTS),
                "parts of parameters": _early_parts(step),
            }
        )
    return held


def _sum_of_gradients(step: Step) -> Bytes:
    """Both gradients and the sum of one over data, W_dec that AuxK is to read, rows."""
    return {
        "gradients": 3 * 4 * step.matrix,
        "rounded weights": _rounded(step),
        "rows": 2 * _all_rows(step),
    }


def _shared_update(step: Step) -> Bytes:
    """Gradients, and the parts of them and of parameters that a data shard updates.

    AuxK gives both gradients at one time: all parts are cut before any is used.
    """
    n_parts = 4 if step.has_aux else 1
    return {
        "gradients": 2 * 4 * step.matrix,
        "rows": 2 * _all_rows(step) * step.has_aux,
        "parts": n_parts * 4 * step.matrix // step.n_optimizer_shards,
    }


def _early_parts(step: Step) -> int:
    """A CPU's compiler cuts the parts of parameters before AuxK has begun."""
    is_early = step.platform == "cpu" and step.n_optimizer_shards > 1
    return 2 * 4 * step.matrix // step.n_optimizer_shards if is_early else 0


def _n_gradients(step: Step) -> int:
    """A TPU's compiler uses each gradient up before it makes the next, if it may.

    A CPU's does not, and it adds gradients of data shards up in another matrix.
    """
    if step.platform == "cpu":
        return 3 if step.n_data > 1 else 2
    return 2 if step.n_data > 1 or _is_joint(step) else 1


def _is_joint(step: Step) -> bool:
    """Whether an update waits for both gradients."""
    has_norm = step.config.optimizer.clip_norm is not None
    return step.has_aux or has_norm or not step.is_topk


def _rounded(step: Step) -> int:
    """A TPU multiplies float32 in bfloat16 too, where no more precision is asked."""
    if step.platform == "tpu":
        return 2 * step.matrix
    return step.dtype_bytes * step.matrix if step.dtype_bytes < 4 else 0


def _all_rows(step: Step) -> int:
    return 4 * step.rows * step.d_model


def _part(step: Step) -> int:
    return 4 * step.part_rows * step.d_model


def _rounded_part(step: Step) -> int:
    is_rounded = step.dtype_bytes < 4
    return step.dtype_bytes * step.part_rows * step.d_model if is_rounded else 0


def _slots(step: Step) -> int:
    return 4 * step.part_rows * step.choice.k if step.is_topk else 0


def _candidates(step: Step) -> int:
    """Of all latent shards, where they are gathered; those of two, where merged."""
    if step.n_latent == 1:
        return 0
    n_shards = {"gather": step.n_latent, "tree": 2, "count": 0}[step.sae.exchange]
    return 4 * step.part_rows * n_shards * min(most_chosen(step.sae), step.choice.k)
