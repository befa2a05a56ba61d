"""An inspection as text: tables, and norms by position as a row of blocks."""

from collections.abc import Iterator, Sequence

import numpy as np

from sae_jax.evals import format_value
from sae_jax.inspection import Inspection
from sae_jax.inspection.figures import (
    MOST_LISTED,
    OUTLIER_DIMENSION,
    OUTLIER_NORM,
    OutlierRow,
    SiteFigures,
)

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 48  # of a row of blocks
_SHORT = 12  # digits of a hash
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def format_inspection(inspection: Inspection) -> str:
    """What the store is, its splits, its sites, and its faults."""
    lines = [inspection.path, *_describe_store(inspection), ""]
    lines += _describe_splits(inspection)
    for name, site in inspection.sites.items():
        lines += ["", f"{name}, width {site.width:,}", *_describe_site(site)]
    lines += ["", *_describe_faults(inspection)]
    return "\n".join(lines)


def describe_state(inspection: Inspection) -> str:
    """Whether the store is complete, what is missing, and how to finish it."""
    if inspection.manifest.complete:
        return "complete"
    cure = "run the same sae-jax harvest again to finish it"
    if not inspection.manifest.is_packed:
        return f"incomplete: its text is not packed; {cure}"
    n_shards, missing = len(inspection.manifest.row_shards), inspection.missing_shards
    if not missing:
        return f"incomplete: only its statistics are missing; {cure}"
    return (
        f"incomplete: {n_shards - len(missing):,} of {n_shards:,} shards are written, "
        f"missing is {_enumerate(missing)}; {cure}"
    )


def count_faults(inspection: Inspection) -> str:
    """How many files are at fault, in words."""
    n = len(inspection.faults)
    return "1 file at fault" if n == 1 else f"{n:,} files at fault"


def list_settings(inspection: Inspection) -> dict[str, str]:
    """What the store is, by name."""
    manifest, subject = inspection.manifest, inspection.manifest.subject
    bos = f"BOS {manifest.bos}"
    if manifest.bos_id is not None:
        bos += f" (id {manifest.bos_id})"
    excluded = _enumerate(manifest.excluded_ids) if manifest.excluded_ids else "none"
    size = format_bytes(sum(inspection.bytes.values()))
    if inspection.bytes_per_row is not None:
        size += f", {inspection.bytes_per_row:,.0f} bytes a row"
    limit = "" if manifest.max_rows is None else f", at most {manifest.max_rows:,} rows"
    limit += "" if manifest.max_gb is None else f", at most {manifest.max_gb:g} GB"
    return {
        "state": f"version {manifest.version}, {describe_state(inspection)}",
        "subject": f"{subject['name']}, identity {subject['identity'][:_SHORT]}, "
        f"computed in {subject['dtype']}",
        "tokenizer": manifest.tokenizer[:_SHORT],
        "corpus": f"{manifest.corpus[:_SHORT]}, {manifest.n_documents:,} documents, "
        f"1 in {manifest.heldout_every} held out{limit}, seed {manifest.seed}",
        "contexts": f"{manifest.context_length:,} tokens, packing {manifest.packing}, "
        f"{bos}, excluded tokens: {excluded}",
        "text": f"files of {manifest.contexts_per_shard:,} contexts",
        "rows": f"{manifest.dtype}, files of {manifest.rows_per_shard:,} rows, chunks "
        f"of {manifest.rows_per_chunk:,}",
        "size": size,
    }


def format_bytes(n_bytes: float) -> str:
    """In units of 1,000."""
    power = 0
    while n_bytes >= 1000 and power + 1 < len(_UNITS):
        n_bytes, power = n_bytes / 1000, power + 1
    return f"{n_bytes:.3g} {_UNITS[power]}" if power else f"{n_bytes:.0f} B"


def draw_blocks(values: np.ndarray) -> str:
    """Values from zero to the largest as blocks, each the largest of its part; a blank
    where there is none."""
    parts = np.array_split(values, min(_WIDTH, len(values))) if len(values) else []
    tops = [float(np.nanmax(p)) if np.isfinite(p).any() else None for p in parts]
    most = max((top for top in tops if top is not None), default=0.0) or 1.0
    last = len(_BLOCKS) - 1
    return "".join(
        " " if top is None else _BLOCKS[min(last, int(top / most * len(_BLOCKS)))]
        for top in tops
    )


def list_figures(site: SiteFigures) -> dict[str, str]:
    """The figures of a site that has statistics, by name."""
    found = site.statistics
    assert found is not None
    return {
        "train rows": f"{found.rows:,}",
        "mean norm": format_value(found.mean_norm),
        "root mean square norm": format_value(site.root_mean_square_norm),
        "norm of the mean": format_value(site.norm_of_mean),
        "explained by the mean": f"{site.explained_by_mean:.2%}",
        "largest variances": _pair(site.largest_variances, "{}: {:.2g}"),
        "smallest variances": _pair(site.smallest_variances, "{}: {:.2g}"),
        "constant dimensions": f"{site.n_constant:,}",
        "outlier dimensions": _pair(site.outlier_dimensions, "{} (x {:.3g})")
        + f"; from {OUTLIER_DIMENSION:g} x the median second moment",
        "outlier positions": _pair(site.outlier_positions, "{} (x {:.3g})")
        + f"; from {OUTLIER_NORM:g} x the median, or 1/{OUTLIER_NORM:g}",
        "outlier rows": f"{site.n_outlier_rows:,} of {len(site.sample_norms):,} "
        f"sampled; from {OUTLIER_NORM:g} x the median, or 1/{OUTLIER_NORM:g}",
    }


def describe_row(row: OutlierRow) -> str:
    text = "" if row.text is None else f" {row.text!r}"
    return (
        f"context {row.sequence}, position {row.position}, token {row.token}{text} "
        f"(x {row.ratio:.3g})"
    )


def _describe_store(inspection: Inspection) -> Iterator[str]:
    for name, text in list_settings(inspection).items():
        yield f"  {name:<11}{text}"
    if len(inspection.bytes) > 1:
        for name, n_bytes in inspection.bytes.items():
            yield f"    {name:<24}{format_bytes(n_bytes):>9}"


def _describe_splits(inspection: Inspection) -> Iterator[str]:
    columns = ("rows", "contexts", "documents", "dropped tokens", "shards")
    widths = (16, 13, 12, 16, 14)
    head = (f"{column:>{width}}" for column, width in zip(columns, widths))
    yield f"{'split':<10}" + "".join(head)
    for name, split in inspection.splits.items():
        documents = "?" if split.documents is None else f"{split.documents:,}"
        shards = f"{split.shards:,}"
        if split.written < split.shards:
            shards = f"{split.written:,} of {shards}"
        cells = (
            f"{split.rows:,}",
            f"{split.contexts:,}",
            documents,
            f"{split.dropped_tokens:,}",
            shards,
        )
        yield f"{name:<10}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths))


def _describe_site(site: SiteFigures) -> Iterator[str]:
    if site.statistics is None:
        yield "  no statistics: there are no train rows, or they cannot be read"
        return
    for name, text in list_figures(site).items():
        yield f"  {name:<24}{text}"
    for row in site.outlier_rows:
        yield f"    {describe_row(row)}"
    for name, norm_t in (
        ("norm by position, mean", site.statistics.norm_t),
        ("norm by position, largest", site.statistics.largest_norm_t),
    ):
        is_known = site.statistics.norm_t == site.statistics.norm_t  # no row, no norm
        norms = np.where(is_known, norm_t, np.nan)
        most = format_value(float(np.nanmax(norms)))
        yield f"  {name:<26}{draw_blocks(norms)} {most}"


def _describe_faults(inspection: Inspection) -> Iterator[str]:
    n_bytes = inspection.bytes_verified
    read = "not verified (--verify reads every file)"
    if n_bytes is not None:
        read = f"verified: {format_bytes(n_bytes)} read"
    if not inspection.faults:
        yield f"{read}; no fault found"
        return
    yield f"{read}; {count_faults(inspection)}:"
    for file, fault in inspection.faults.items():
        yield f"  {file} {fault}"


def _pair(pairs: Sequence[tuple[int, float]], form: str) -> str:
    texts = [form.format(*pair) for pair in pairs[:MOST_LISTED]]
    more = len(pairs) - len(texts)
    return ", ".join(texts) + (f" and {more:,} more" if more else "") or "none"


def _enumerate(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_LISTED]))
    more = len(numbers) - MOST_LISTED
    return f"{shown} and {more:,} more" if more > 0 else shown
