"""Whether a store may begin in a folder, or one that was begun there go on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.files import LOCK_FILE, make_writable
from sae_jax.store.folder import Folder
from sae_jax.store.layout import Manifest, find_manifest

# What is found out while the text is packed, or later; all the rest are settings, and
# a harvest goes on with a store only if they are the same.
_FOUND = (
    "n_documents",
    "rows",
    "dropped_tokens",
    "text_shards",
    "is_packed",
    "complete",
    "statistics",
)


def choose_manifest(folder: Folder, planned: Manifest) -> Manifest:
    """The manifest to go on with: that of the store begun there, or the planned.

    Where the text was not packed nothing is lost by beginning again.
    """
    begun = _read_begun(folder)
    if begun is None or not begun.is_packed:
        return planned
    _check_same_settings(folder, begun, dataclasses.asdict(planned))
    return begun


def check_place(folder: Folder, planned: Manifest) -> None:
    """ValueError or OSError if no store with these settings, of whatever text, can
    begin or go on there; nothing is made."""
    begun = find_manifest(folder)
    corpus = planned.corpus if begun is None else begun.corpus
    choose_manifest(folder, dataclasses.replace(planned, corpus=corpus))
    if begun is None and folder.is_local:
        path = folder.path.absolute()
        make_writable(next(each for each in (path, *path.parents) if each.exists()))


def _read_begun(folder: Folder) -> Manifest | None:
    """The manifest of the store begun there; None where a new one may begin.

    Raises ValueError if anything else is there.
    """
    manifest = find_manifest(folder)
    if manifest is not None:
        return manifest
    if folder.is_local and folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"{str(folder)!r} is a file: give a new folder")
    others = [name for name in folder.list() if not name.startswith(LOCK_FILE)]
    if folder.is_local and folder.path.is_dir():
        others += [file.name for file in folder.path.iterdir() if file.is_dir()]
    if others:
        # Another process may have begun it since: what is there comes after a manifest.
        manifest = find_manifest(folder)
    if others and manifest is None:
        raise ValueError(
            f"{str(folder)!r} is not a store and not empty (it has {min(others)!r}): "
            "give a new folder"
        )
    return manifest


def _check_same_settings(
    folder: Folder, begun: Manifest, settings: Mapping[str, Any]
) -> None:
    """ValueError, naming the field, if the store was begun with another setting."""
    for name, value in settings.items():
        old, new = getattr(begun, name), value
        if name == "subject":
            old, new = _drop_name(old), _drop_name(new)
        if name == "corpus" and old != new:
            raise ValueError(
                f"the store at {str(folder)!r} was begun with another text: give the "
                "same --text and --text_field and files that have not changed, or "
                "another --out, or delete the folder"
            )
        if name not in _FOUND and old != new:
            raise ValueError(
                f"the store at {str(folder)!r} was begun with {name} = {old!r}, this "
                f"harvest has {new!r}: give another --out, or delete the folder"
            )


def _drop_name(subject: Mapping[str, str]) -> dict[str, str]:
    """What a subject is; its name may be a path."""
    return {key: value for key, value in subject.items() if key != "name"}
