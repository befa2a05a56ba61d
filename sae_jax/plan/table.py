"""A plan as text."""

from collections.abc import Iterable

from sae_jax.plan import memory, traffic
from sae_jax.plan.estimate import DEAD
from sae_jax.plan.plan import Plan
from sae_jax.plan.rule import Option

_GIB, _MIB = 2**30, 2**20
_MOST_OTHERS = 4


def format_plan(plan: Plan) -> str:
    """What will run where, whether it fits, what it holds, moves and takes."""
    sections = (
        _title(plan),
        _verdict(plan),
        _memory(plan),
        _costs(plan),
        _collectives(plan),
        _run(plan),
        _meshes(plan),
    )
    return "\n\n".join("\n".join(section) for section in sections if section)


def _title(plan: Plan) -> list[str]:
    config, where = plan.config, plan.topology
    sae, chip = config.sae, where.chip
    torus = f" as {'x'.join(map(str, where.shape))}" if where.shape else ""
    n_data, n_latent = plan.best.shape
    n_used, parts = n_data * n_latent, config.data.microbatch_rows
    idle = f", {where.n_devices - n_used} devices idle" * (n_used < where.n_devices)
    count = f"{where.n_chips} {chip.name} chips{torus}, {where.n_devices} devices"
    if chip.platform == "cpu":
        count = f"{where.n_devices} virtual devices of this machine"
    return [
        f"{sae.architecture}, {sae.n_latents:,} latents of width {sae.d_model:,}, "
        f"K = {sae.k}, batches of {config.data.batch_rows:,} rows"
        + (f" in parts of {parts:,}" if parts else ""),
        f"{where.name}: {count}, {where.n_hosts} host(s)",
        f"mesh {n_data} x {n_latent} (data x latent){idle}: {plan.why}",
    ]


def _verdict(plan: Plan) -> list[str]:
    available = f"{plan.available_bytes / _GIB:.1f} GiB of a device"
    compiled = plan.compiled
    if compiled:
        peak, source = compiled.peak_bytes, f"by {compiled.compiler}, "
        source += f"which compiled the step in {compiled.seconds:.0f} s"
    else:
        peak = plan.best.peak_bytes
        source = f"by the analytic model alone: {plan.why_not_compiled}"
    verb = "fits" if plan.fits else "does NOT fit"
    needed = f"{peak / _GIB:.2f}" if peak else "more than"
    lines = [f"{verb}: {needed} of {available}, {source}"]
    if not plan.fits:
        lines.append(_cure(plan))
    return lines


def _cure(plan: Plan) -> str:
    batch, part = plan.config.data.batch_rows, plan.largest_microbatch
    if part and part < batch:
        return f"it would with data.microbatch_rows = {part:,} (analytic model)"
    if plan.largest_batch and plan.largest_batch < batch:
        return f"it would with data.batch_rows = {plan.largest_batch:,} (analytic)"
    if plan.smallest:
        chips = f"{plan.smallest.n_chips} chips"
        return f"the smallest topology that does: {plan.smallest.name}, {chips}"
    return f"nor does any topology of {plan.topology.chip.name} that is known here"


def _memory(plan: Plan) -> list[str]:
    step, compiled = plan.best.step, plan.compiled
    kept = memory.state(step)
    phase, held = memory.temporaries(step)
    has_figures = compiled is not None and compiled.argument_bytes is not None
    rows: list[tuple[str, int, int | None]]
    rows = [(name, n_bytes, None) for name, n_bytes in kept.items()]
    arguments = compiled.argument_bytes if compiled else None
    peak = compiled.peak_bytes if compiled and has_figures else None
    rows.append(("state and batch", sum(kept.values()), arguments))
    rows += [(f"  {name}", n_bytes, None) for name, n_bytes in held.items() if n_bytes]
    beside = peak - arguments if peak and arguments else None
    rows.append((f"beside them, most in {phase!r}", sum(held.values()), beside))
    rows.append(("peak", plan.best.peak_bytes, peak))
    unit, size = ("GiB", _GIB) if plan.best.peak_bytes > _GIB else ("MiB", _MIB)
    header = f"{unit + ' of a device':40}{'model':>10}"
    lines = [header + (f"{'compiler':>10}" if has_figures else "")]
    for name, model, told in rows:
        line = f"{name:40}{model / size:10.2f}"
        lines.append(line + (f"{told / size:10.2f}" if told else ""))
    return lines


def _costs(plan: Plan) -> list[str]:
    columns = [("no latent dead", plan.none_dead)]
    if plan.best.step.has_aux:
        columns.append((f"{DEAD:.0%} dead", plan.some_dead))
    fields = (
        ("TFLOP", lambda cost: cost.flops / 1e12),
        ("GB read and written", lambda cost: cost.memory_bytes / 1e9),
        ("GB sent to other devices", lambda cost: cost.sent_bytes / 1e9),
        ("seconds, compute-bound", lambda cost: cost.compute_seconds),
        ("seconds, memory-bound", lambda cost: cost.memory_seconds),
        ("seconds, network-bound", lambda cost: cost.network_seconds),
        ("seconds in all", lambda cost: cost.seconds),
    )
    lines = [f"{'a step, of a device':40}" + "".join(f"{n:>16}" for n, _ in columns)]
    for name, get in fields:
        values = "".join(f"{get(cost):16.4g}" for _, cost in columns)
        lines.append(f"{name:40}{values}")
    bound = "".join(f"{cost.bound:>16}" for _, cost in columns)
    lines.append(f"{'bound by':40}{bound}")
    lines.append(
        f"estimated at {plan.efficiency:.0%} of the published figures, not measured: "
        "the longer of\ncompute and memory, and the network's time"
    )
    return lines


def _collectives(plan: Plan) -> list[str]:
    found = traffic.collectives(plan.best.step)
    if not found:
        return []
    header = f"{'collectives of a step':54}{'MB':>12}{'times':>7}{'GB sent':>10}"
    lines = [header]
    for moved in found:
        what = f"{moved.kind} over {moved.n_devices} of {moved.axis}"
        note = "  if any is dead" if moved.is_auxks else ""
        lines.append(
            f"{moved.name:24}{what:30}{moved.n_bytes / 1e6:12,.1f}{moved.times:7}"
            f"{moved.sent / 1e9:10.3f}{note}"
        )
    compiled = plan.compiled
    if compiled and compiled.moved:
        in_loops = [one for one in compiled.moved if one["times"] is None]
        outside = [one for one in compiled.moved if one["times"] is not None]
        lines.append(
            f"compiled: {_megabytes(outside)}; {_megabytes(in_loops)} in loops of "
            "unknown length, counted once"
        )
    return lines


def _run(plan: Plan) -> list[str]:
    config = plan.config
    batch, part = plan.largest_batch, plan.largest_microbatch
    is_cpu = plan.topology.platform == "cpu"
    unit = "hours of this machine" if is_cpu else "chip-hours"
    return [
        ("" if plan.fits else "if it did fit: ")
        + f"{plan.rows_per_day:.3g} rows (tokens) a day; {config.rows:,} rows in "
        f"{_days(plan.days)}, {plan.chip_hours:,.0f} {unit}",
        f"largest batch that fits: {_rows(batch)}; micro-batch of this one: "
        f"{_rows(part)} (analytic model, powers of two)",
    ]


def _meshes(plan: Plan) -> list[str]:
    if not plan.others:
        return []
    dead = f", {DEAD:.0%} dead" if plan.best.step.has_aux else ""
    lines = [f"{'meshes':>14}{'GiB':>12}{'seconds':>12}  (of a device and step{dead})"]
    for option in (plan.best, *plan.others[:_MOST_OTHERS]):
        lines.append(_mesh(option, plan.efficiency))
    return lines


def _mesh(option: Option, efficiency: float) -> str:
    shape = " x ".join(map(str, option.shape))
    verdict = "" if option.fits else "  does not fit"
    peak = option.peak_bytes / _GIB
    return f"{shape:>14}{peak:12.2f}{option.cost.seconds / efficiency:12.4g}{verdict}"


def _megabytes(moved: Iterable[dict]) -> str:
    moved = list(moved)
    total = sum(one["n_bytes"] * (one["times"] or 1) for one in moved) / 1e6
    return f"{len(moved)} collectives of {total:,.1f} MB"


def _rows(rows: int | None) -> str:
    return f"{rows:,}" if rows else "none"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    hours = 24 * days
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
