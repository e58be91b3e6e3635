"""Fetching a model's files from the Hugging Face Hub, when a user asks for it."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from scratchlm.errors import UserError
from scratchlm.interop.tokenizer_files import CARRIED

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def fetch(model_id: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """Download what an import reads into the Hub's own cache; files that are there already are not fetched again.

    Pickles are only fetched where they are allowed and there is no safetensors file.

    Args:
        model_id: ``ORG/NAME``.
        revision: branch, tag or commit; None: the main branch.
        allow_pickle: see above.

    Returns:
        The folder.

    Raises:
        UserError: huggingface_hub is not installed, there is no such model or revision, access is refused, or the network
            cannot be reached.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            "downloading needs the package huggingface_hub: pip install 'scratchlm[huggingface]', or give a folder"
        ) from error
    try:
        there = HfApi().list_repo_files(model_id, revision=revision)
        safe = any(fnmatch.fnmatch(name, pattern) for name in there for pattern in WEIGHTS)
        weights = WEIGHTS if safe or not allow_pickle else PICKLES
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=[*CARRIED, *weights],
                ignore_patterns=["*/*"],  # copies in other formats
            )
        )
    except HFValidationError as error:
        raise UserError(f"{model_id!r} is no id of the Hub; it looks like ORG/NAME") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:160]
        raise UserError(
            f"cannot fetch {model_id} from the Hub ({first}); check the id, your access and the network, or give a folder"
        ) from error
