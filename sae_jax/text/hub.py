"""Datasets of the Hugging Face Hub, streamed: `hf:NAME`, `hf:NAME:SPLIT:CONFIG`.

Without a SPLIT it is `train`; many datasets want a CONFIG, as hf:allenai/c4:train:en.
The revision of the first look is part of the identity, and the one that is read. No
code of a dataset is run: `datasets` since 4 has no way to.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator

from sae_jax.text.source import Document, Source, import_extra, take_text

PREFIX = "hf:"


def open_hub(address: str, text_field: str) -> Source:
    """The documents of a dataset on the Hub, named by their row."""
    name, split, config = (*address.removeprefix(PREFIX).split(":", 2), "", "")[:3]
    import_extra("datasets")
    hub = import_extra("huggingface_hub")
    with _in_one_line(name):
        revision = hub.HfApi().dataset_info(name).sha
    arguments = {
        "path": name,
        "name": config or None,
        "split": split or "train",
        "revision": revision,
    }
    named = ":".join(filter(None, (name, split or "train", config)))
    return Source(
        named,
        f"{text_field} {revision}",
        functools.partial(_read, named, arguments, text_field),
    )


def _read(
    named: str, arguments: dict[str, str | None], text_field: str
) -> Iterator[Document]:
    datasets = import_extra("datasets")
    with _in_one_line(named):
        records = iter(datasets.load_dataset(**arguments, streaming=True))
    for number in itertools.count(1):
        with _in_one_line(named):
            record = next(records, None)
        if record is None:
            return
        text = take_text(record, text_field, f"{PREFIX}{named}, row {number}")
        yield Document(f"{named}:{number}", text)


@contextlib.contextmanager
def _in_one_line(named: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any of the libraries that take part
        said = str(error).strip().partition("\n")[0]
        raise OSError(
            f"cannot read {PREFIX}{named} from the Hugging Face Hub "
            f"({type(error).__name__}: {said}): look at the name, the split, the "
            "config and the network, or give a folder that save_to_disk wrote"
        ) from error
