"""Weights from safetensors files, one or several, straight to where they live.

With a mesh each device is given its part of a tensor, read from the file as that
part: no process ever holds a whole model. Nothing in a file is ever executed.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from sae_jax.mesh import LATENT
from sae_jax.subjects.fields import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"

Weights = dict[str, Any]

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Stored:
    """A weight in a file: a tensor, its transpose, or a block of its columns."""

    name: str
    is_transposed: bool = False
    part: int = 0
    n_parts: int = 1


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by name.

    Raises FileNotFoundError where one is missing, ValueError for an index that names
    files elsewhere.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        _refuse_pickle(folder)
        raise FileNotFoundError(
            f"no {WEIGHTS_FILE} in {str(folder)!r}: give a Hugging Face model folder "
            "with config.json, model.safetensors and tokenizer.json"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is {weight_map!r}, not an object")
    names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {name!r} is not the name of a safetensors file beside it"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {str(folder)!r}, which {INDEX_FILE} names: fetch it "
                "again"
            )
    return [folder / name for name in sorted(names)]


def hash_files(files: list[Path]) -> Any:
    """A SHA-256 (of hashlib) that has taken in the files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest


def read_weights(
    files: list[Path],
    shapes: Weights,
    find_stored: Callable[[str, int | None], Stored],
    prefix: str,
    dtype: DTypeLike,
    units: dict[str, int],
    mesh: Mesh | None,
) -> Weights:
    """The tree of `shapes` as arrays of `dtype`, on the mesh where there is one.

    `prefix` is what the names in files without a head may lack. `units` are those of
    `place_weight`.
    """
    tensors = _open_tensors(files)
    # The file to name where a tensor is missing.
    source = files[0] if len(files) == 1 else files[0].with_name(INDEX_FILE)
    arrays = []
    for name, layer, shape in name_leaves(shapes):
        stored = find_stored(name, layer)
        read = _Reader(tensors, source, stored, prefix, shape, np.dtype(dtype)).read
        if mesh is None:
            arrays.append(jnp.asarray(read(None)))
            continue
        spec = place_weight(name, shape, units, mesh.shape[LATENT])
        sharding = NamedSharding(mesh, spec)
        arrays.append(jax.make_array_from_callback(shape, sharding, read))
    return jax.tree.unflatten(jax.tree.structure(shapes, is_leaf=_is_shape), arrays)


def place_weight(
    name: str, shape: tuple[int, ...], units: dict[str, int], n_shards: int
) -> PartitionSpec:
    """Where the weight of this name lives, whose last part names its axes.

    Spread over the axis that comes apart into units (of heads, the MLP, the
    vocabulary) where the shards divide their number; else over the other axis of a
    matrix where they divide that; else on every device.
    """
    axes = name.rpartition("_")[2]
    chosen = [axis for axis in axes if axis in units]
    if not chosen:
        return PartitionSpec()
    if units[chosen[0]] % n_shards:
        chosen = [a for a, n in zip(axes, shape) if a not in units and not n % n_shards]
    return PartitionSpec(*(LATENT if axis in chosen else None for axis in axes))


def name_leaves(tree: Weights) -> Iterator[tuple[str, int | None, Any]]:
    """(name, layer or None, leaf) of each weight, in the order of the flat tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_shape):
        layer = path[1].idx if len(path) == 3 else None
        yield path[-1].key, layer, leaf


class _Reader:
    """Reads parts of one weight."""

    def __init__(
        self,
        tensors: dict[str, tuple[Path, Any]],
        source: Path,
        stored: Stored,
        prefix: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        name = stored.name
        if name not in tensors:
            name = name.removeprefix(prefix)
        if name not in tensors:
            raise ValueError(
                f"{source}: no tensor {stored.name!r}, which config.json implies"
            )
        path, file = tensors[name]
        self._tensor = file.get_slice(name)
        if self._tensor.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{path}: {name} is {self._tensor.get_dtype()}; give the weights as "
                "they were before they were quantized"
            )
        expected = [*shape[:-1], stored.n_parts * shape[-1]]
        expected = expected[::-1] if stored.is_transposed else expected
        if self._tensor.get_shape() != expected:
            raise ValueError(
                f"{path}: {name} has shape {tuple(self._tensor.get_shape())}, "
                f"config.json gives {tuple(expected)}"
            )
        self._stored, self._shape, self._dtype = stored, shape, dtype
        self._parts: dict[tuple, np.ndarray] = {}

    def read(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """The part of the weight at this index, for `make_array_from_callback`."""
        index = index or (slice(None),) * len(self._shape)
        spans = tuple(
            part.indices(n)[:2] for part, n in zip(index, self._shape)
        )
        # Devices along the data axis ask for the same part.
        if spans not in self._parts:
            self._parts[spans] = self._read(spans)
        return self._parts[spans]

    def _read(self, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
        start = self._stored.part * self._shape[-1]
        parts = [slice(*span) for span in spans[:-1]]
        parts.append(slice(start + spans[-1][0], start + spans[-1][1]))
        if self._stored.is_transposed:
            array = self._tensor[tuple(parts[::-1])].T
        else:
            array = self._tensor[tuple(parts)]
        return np.ascontiguousarray(array, dtype=self._dtype)


def _refuse_pickle(folder: Path) -> None:
    for name in (PICKLE_FILE, f"{PICKLE_FILE}.index.json"):
        if (folder / name).is_file():
            raise ValueError(
                f"{folder / name} is a pickle, which may run any code when it is read: "
                "save the model as safetensors (`save_pretrained` of transformers does)"
            )


def _open_tensors(files: list[Path]) -> dict[str, tuple[Path, Any]]:
    """The file of each tensor, open: its data are read when they are asked for."""
    tensors = {}
    for path in files:
        try:
            file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{path} is damaged ({reason}): fetch it again"
            ) from error
        tensors.update({name: (path, file) for name in file.keys()})
    return tensors


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)
