"""Small stores whose rows tell their number."""

import ml_dtypes
import numpy as np
import stores

from sae_jax.store import Contexts, Folder, StoreWriter, open_store

T, PER_SHARD, PER_CHUNK = 8, 64, 16
NAMES = ["b", "d", "c"]  # by its hash the last is held out
SITES = {"resid_post.0": 4, "mlp_act.1": 6}
ROWS = {"train": 2 * PER_SHARD + 32, "heldout": PER_SHARD + 16}


def make_manifest(sites, **fields):
    return stores.make_manifest(sites, T, PER_SHARD, PER_CHUNK, **fields)


def make_blocks(rows, sites):
    """Blocks of contexts of each split, whose rows tell their number in the split:
    columns 0 to 2 are its base-256 digits. Held-out blocks come in between."""
    blocks = []
    for split, n_rows in rows.items():
        row = np.arange(n_rows)
        rng = np.random.default_rng(len(split))
        digits = np.stack([row % 256, row // 256 % 256, row // 65536], 1)
        acts = {}
        for site, width in sites.items():
            acts[site] = rng.standard_normal((n_rows, width)).astype(ml_dtypes.bfloat16)
            acts[site][:, :3] = digits.astype(ml_dtypes.bfloat16)
        tokens = (row + 1000 * (split == "heldout")).reshape(-1, T).astype(np.int32)
        for start in range(0, n_rows, PER_SHARD):
            part = slice(start, start + PER_SHARD)
            context = slice(start // T, (start + PER_SHARD) // T)
            shard = {site: values[part] for site, values in acts.items()}
            block = split, shard, tokens[context], tokens[context] % 3
            blocks.append((start, block))
    return [block for _, block in sorted(blocks, key=lambda pair: pair[0])]


def row_ids(acts):
    """The rows that `make_blocks` numbered."""
    digits = np.asarray(acts)[..., :3].astype(np.int64)
    return digits @ np.array([1, 256, 65536])


def write_store(path, rows, sites=None, **fields):
    sites = sites or {"resid_post.0": 4}
    manifest = make_manifest(sites, **fields)
    return open_store(stores.write(path, manifest, make_blocks(rows, sites), NAMES))


def begin(path, process=0, n_processes=1):
    """A writer of a store whose text is packed."""
    writer = StoreWriter(Folder(path), make_manifest(SITES), process, n_processes)
    if not writer.manifest.is_packed:
        blocks = [Contexts(s, t, d) for s, _, t, d in make_blocks(ROWS, SITES)]
        writer.write_text(stores.Blocks(blocks, NAMES))
    return writer


def gather_rows():
    blocks = make_blocks(ROWS, SITES)
    return {
        split: {
            site: np.concatenate([acts[site] for s, acts, *_ in blocks if s == split])
            for site in SITES
        }
        for split in ROWS
    }


def read_folder(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(".lock")
    }


def list_shard_files(path):
    return sorted(
        file for file in path.rglob("*") if "/c/" in str(file) and file.is_file()
    )
