"""Models by their name on the Hugging Face hub, fetched into its cache on this disk.

    fetch("org/model")          # what its main branch holds
    fetch("org/model@v1.0")     # a branch, a tag or a commit

Only what describes a model, its safetensors and its tokenizer are fetched: no code
and nothing that would have to be unpickled.
"""

import re
from pathlib import Path
from typing import NoReturn

_CONFIG_FILE = "config.json"
_WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
_FETCHED = (
    _CONFIG_FILE,
    "generation_config.json",
    *_WEIGHTS_FILES,
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_NAME = re.compile(
    r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[^@\s]+)?", flags=re.ASCII
)


def is_hub_name(text: str) -> bool:
    """Whether the text names a model of the hub and not a path.

    A folder that is there always wins; then `model`, `org/model` and either with
    `@revision` are names, and all else (`./x`, `/x`, `~/x`, `x/`, `a/b/c`) is a path.
    """
    return not Path(text).exists() and _NAME.fullmatch(text) is not None


def fetch(name: str) -> Path:
    """The folder of the model, fetched where it is not in the cache already.

    Where the hub cannot be reached, the cache is all there is. HF_ENDPOINT, HF_HOME,
    HF_TOKEN, HF_HUB_OFFLINE and HF_HUB_ETAG_TIMEOUT (seconds) are obeyed.

    Raises:
        FileNotFoundError: there is no such model or revision.
        PermissionError: the model is gated.
        ConnectionError: the hub cannot be reached, and the model is not in the cache.
        ValueError: the model has no weights as safetensors.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    repo, _, tag = name.partition("@")
    revision = tag or None
    seconds = constants.HF_HUB_ETAG_TIMEOUT
    try:
        # snapshot_download asks for the same, but would wait for ever.
        info = HfApi().model_info(repo, revision=revision, timeout=seconds)
        _check_files({file.rfilename for file in info.siblings or ()}, name)
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(_FETCHED),
            etag_timeout=seconds,
        )
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a name that a model of the hub can "
            "have: give one such as 'org/model'"
        ) from None
    except errors.GatedRepoError:
        raise PermissionError(
            f"model {name!r} is gated: ask for access on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"model {repo!r} has no revision {revision!r}: give one of its branches, "
            "tags or commits"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no folder {name!r} here and no such model at {constants.ENDPOINT}: check "
            "the spelling, and for a private model log in with `hf auth login`"
        ) from None
    except Exception as error:  # those of a connection differ with the hub's client
        if _is_ours(error):
            raise
        folder = _find_cached(repo, revision, name, error)
    return Path(folder)


def _check_files(files: set[str], name: str) -> None:
    if not files & set(_WEIGHTS_FILES):
        raise ValueError(
            f"model {name!r} has no {' and no '.join(_WEIGHTS_FILES)}, and weights in "
            "another form are not read: give one that has, or convert it"
        )
    if _CONFIG_FILE not in files:
        raise ValueError(
            f"model {name!r} has no {_CONFIG_FILE}: give one that transformers can load"
        )


def _is_ours(error: Exception) -> bool:
    """Whether it tells of our files, or of this disk, and not of the connection."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return error.errno is not None
    return type(error) is ValueError


def _find_cached(repo: str, revision: str | None, name: str, cause: Exception) -> str:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(_FETCHED),
            local_files_only=True,
        )
        _check_files({path.name for path in Path(folder).iterdir()}, name)
    except (errors.LocalEntryNotFoundError, ValueError):
        _refuse_unreachable(name, cause)
    return folder


def _refuse_unreachable(name: str, cause: Exception) -> NoReturn:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            f"no folder {name!r} here, and it is not whole in the cache of the hub, "
            "which HF_HUB_OFFLINE keeps from being asked: unset it, or give a folder"
        ) from None
    reason = str(cause).partition("\n")[0] or type(cause).__name__
    raise ConnectionError(
        f"no folder {name!r} here, and the hub at {constants.ENDPOINT} cannot be "
        f"reached ({reason}): try again, or give a folder"
    ) from None
