"""Look into an activation store: what it is, how its rows lie, whether it is whole.

    sae-jax inspect store/
    sae-jax inspect store/ --verify --out=store.html
    sae-jax inspect s3://bucket/store --json

Prints what the store is and what its rows are like, site by site: lengths, the mean,
dimensions, positions and sampled rows that stick out. A store that is still being
written is looked into, too. --verify reads every file, with its checksums, and sees
that all agree. What is damaged or missing is listed, and then the exit status is 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sae_jax.cli.errors import Misuse
from sae_jax.inspection import inspect
from sae_jax.inspection.describe import count_faults, format_inspection
from sae_jax.inspection.page import write_page
from sae_jax.store.layout import is_made_anew
from sae_jax.subjects import load_subject

_VERIFY = flags.DEFINE_bool("verify", False, "read every file of the store")
_OUT = flags.DEFINE_string("out", None, "an HTML file to write, with pictures")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object, and no table")
_SEED = flags.DEFINE_integer("seed", 0, "draws the sample of rows")
_SUBJECT = flags.DEFINE_string(
    "subject", None, "the store's subject, to show the text of outlier rows"
)


def main(argv: Sequence[str]) -> None:
    """Inspects the store that is the one argument."""
    if len(argv) != 2:
        raise Misuse("give one store: sae-jax inspect STORE [--flag=value]")
    if _OUT.value and not Path(_OUT.value).absolute().parent.is_dir():
        raise Misuse(f"--out={_OUT.value}: there is no such folder; make it first")
    subject = load_subject(_SUBJECT.value) if _SUBJECT.value else None
    found = inspect(argv[1], _VERIFY.value, _SEED.value, subject, progress=True)
    if _JSON.value:
        print(json.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        print(format_inspection(found))
    if _OUT.value:
        write_page(_OUT.value, found)
        if not _JSON.value:
            print(f"\n{_OUT.value}")
    if found.faults:
        one = "" if len(found.faults) == 1 else "one of them "
        # First what cannot be made anew.
        first = min(found.faults, key=lambda file: (is_made_anew(file), file))
        cure = "restore what is damaged, or delete the store and harvest again"
        if is_made_anew(first):
            cure = (
                "delete what is damaged and run the same sae-jax harvest again, which "
                "makes it anew"
            )
        raise ValueError(
            f"{found.path!r} has {count_faults(found)}, {one}{first}: {cure}"
        )
