"""How the rows of a site lie: their lengths, their mean, and what sticks out.

Of the statistics, over all train rows that are written:

    explained by the mean  ||mean||^2 / E ||x||^2
    outlier dimension      second moment at least 25 times the median over dimensions
    outlier position       mean norm at least 4 times the median over positions, or at
                           most a quarter; an attention sink at position 0 is one

Of a sample of rows, in chunks drawn by the seed:

    outlier row            norm at least 4 times the sample's median, or a quarter

Medians leave out dimensions and positions that are zero.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_jax.store import statistics
from sae_jax.store.checked import CheckedFiles, Piece
from sae_jax.store.records import merge_records, read_site_statistics
from sae_jax.store.statistics import Statistics
from sae_jax.subjects import Subject

OUTLIER_DIMENSION = 25.0
OUTLIER_NORM = 4.0
SAMPLE_ROWS = 8192
MOST_LISTED = 5  # of outlier rows, and of dimensions by variance

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class OutlierRow:
    """A row of the sample: its place (-1 where it cannot be read), its token, and its
    norm over the median."""

    sequence: int
    position: int
    token: int | None  # None where the text cannot be read
    text: str | None  # None without a subject
    ratio: float


@dataclasses.dataclass(frozen=True)
class SiteFigures:
    """A site's figures; `statistics` is None where no train row is, or can be read.

    Dimensions and positions come with their variance, or with their second moment or
    norm over the median; the most outlying first. `sample_norms` are of sampled rows.
    """

    width: int
    statistics: Statistics | None
    norm_of_mean: float
    explained_by_mean: float
    largest_variances: list[tuple[int, float]]
    smallest_variances: list[tuple[int, float]]
    n_constant: int  # dimensions that are the same in all rows
    outlier_dimensions: list[tuple[int, float]]
    outlier_positions: list[tuple[int, float]]
    sample_norms: Array
    n_outlier_rows: int
    outlier_rows: list[OutlierRow]

    @property
    def root_mean_square_norm(self) -> float:
        found = self.statistics
        return math.sqrt(found.mean_square_norm) if found else math.nan

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["root_mean_square_norm"] = self.root_mean_square_norm
        if self.statistics:
            values["statistics"]["variance_d"] = self.statistics.variance_d
        return values


def measure_sites(
    files: CheckedFiles, seed: int, subject: Subject | None
) -> dict[str, SiteFigures]:
    """The figures of each site of a store, as far as it is written."""
    chunks = _draw_chunks(files, seed)
    return {
        site: _measure_site(files, site, chunks, subject)
        for site in files.manifest.sites
    }


def _measure_site(
    files: CheckedFiles,
    site: str,
    chunks: Sequence[tuple[int, int]],
    subject: Subject | None,
) -> SiteFigures:
    found = _read_statistics(files, site)
    norms, places = _measure_norms(files, site, chunks)
    ratios = _over_median(norms)
    outliers = list_outliers(norms)
    variances: list[tuple[int, float]] = []
    if found:
        variance_d = found.variance_d
        variances = [(int(d), float(variance_d[d])) for d in np.argsort(-variance_d)]
    square_of_mean = float(np.square(found.mean_d).sum()) if found else math.nan
    mean_square = found.mean_square_norm if found else math.nan
    return SiteFigures(
        width=files.manifest.sites[site],
        statistics=found,
        norm_of_mean=math.sqrt(square_of_mean),
        explained_by_mean=square_of_mean / mean_square if mean_square else math.nan,
        largest_variances=variances[:MOST_LISTED],
        smallest_variances=variances[::-1][:MOST_LISTED],
        n_constant=sum(variance == 0 for _, variance in variances),
        outlier_dimensions=list_large(found.second_moment_d) if found else [],
        outlier_positions=list_outliers(found.norm_t) if found else [],
        sample_norms=norms,
        n_outlier_rows=len(outliers),
        outlier_rows=[
            _tell_row(files, *places[row], float(ratios[row]), subject)
            for row, _ in outliers[:MOST_LISTED]
        ],
    )


def list_large(values_d: Array) -> list[tuple[int, float]]:
    """Dimensions of outlying second moment, and how many times the median it is."""
    ratios = _over_median(values_d)
    chosen = np.flatnonzero(ratios >= OUTLIER_DIMENSION)
    order = chosen[np.argsort(-ratios[chosen], kind="stable")]
    return [(int(d), float(ratios[d])) for d in order]


def list_outliers(norms: Array) -> list[tuple[int, float]]:
    """The indices of outlying norms, the most outlying first, with their ratios to the
    median; NaN is none."""
    ratios = _over_median(norms)
    with np.errstate(divide="ignore"):
        sizes = np.abs(np.log(ratios))
    chosen = np.flatnonzero(sizes >= math.log(OUTLIER_NORM))
    order = chosen[np.argsort(-sizes[chosen], kind="stable")]
    return [(int(i), float(ratios[i])) for i in order]


def _over_median(values: Array) -> Array:
    known = values[np.nan_to_num(values) > 0]
    return values / np.median(known) if len(known) else np.full(values.shape, math.nan)


def _read_statistics(files: CheckedFiles, site: str) -> Statistics | None:
    """Of a complete store those it has, else of the shards that are written."""
    try:
        if files.manifest.complete:
            found = read_site_statistics(files.folder, site)
        else:
            sums = merge_records(files.folder, files.manifest, site, files.written)
            found = statistics.finish(sums)
    except ValueError as error:
        files.note_error(error)
        return None
    return found if found.rows else None


def _draw_chunks(files: CheckedFiles, seed: int) -> list[tuple[int, int]]:
    """(shard, first row in it) of the sampled chunks, ascending; of train rows, if any
    are written."""
    per_chunk, shards = files.manifest.rows_per_chunk, files.row_shards
    train = [index for index in files.written if shards[index].split == "train"]
    chosen = train or files.written
    counts = [shards[index].rows // per_chunk for index in chosen]
    n = max(1, SAMPLE_ROWS // per_chunk)
    total, ends = sum(counts), np.cumsum(counts)
    drawn = np.random.default_rng(seed).choice(total, min(n, total), replace=False)
    chunks = []
    for chunk in np.sort(drawn):
        place = int(np.searchsorted(ends, chunk, side="right"))
        offset = int(chunk - (ends[place] - counts[place]))
        chunks.append((chosen[place], offset * per_chunk))
    return chunks


def _measure_norms(
    files: CheckedFiles, site: str, chunks: Sequence[tuple[int, int]]
) -> tuple[Array, list[tuple[int, int]]]:
    """The norms of the rows of these chunks, and (shard, row in it) of each."""
    n = files.manifest.rows_per_chunk
    values = files.read(
        piece
        for shard, start in chunks
        for piece in files.split_rows(site, shard, start, start + n)
    )
    norms, places = [np.empty(0)], []
    for shard, start in chunks:
        rows_nd = files.take_rows(values)
        if rows_nd is not None:
            norms.append(np.linalg.norm(rows_nd.astype(np.float64), axis=1))
            places += [(shard, start + row) for row in range(n)]
    return np.concatenate(norms), places


def _tell_row(
    files: CheckedFiles, shard: int, row: int, ratio: float, subject: Subject | None
) -> OutlierRow:
    rows, per_shard = files.row_shards[shard].rows, files.manifest.contexts_per_shard
    (positions,) = files.read([Piece("positions", shard, 0, rows)])
    sequence, position = (-1, -1) if positions is None else positions[row].tolist()
    token = text = None
    if 0 <= sequence < len(files.manifest.text_shards) * per_shard:
        place = sequence % per_shard
        piece = Piece("tokens", sequence // per_shard, place, place + 1)
        (tokens,) = files.read([piece])
        if tokens is not None and 0 <= position < tokens.shape[1]:
            token = int(tokens[0, position])
            text = subject.decode_tokens([token])[0] if subject else None
    return OutlierRow(sequence, position, token, text, ratio)
