"""Models on the Hugging Face hub: which commit a revision is, and the files of that commit.

Everything is answered by the hub, or by its local cache if the hub cannot be reached. An error is never taken for a
missing file: a rater whose rater.json cannot be fetched would rate with the wrong prompt and scale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lmm_qa.errors import ModelError, first_line
from lmm_qa.files.atomic import replacing

TIMEOUT = 10.0
"""Seconds that the hub has to answer."""

COMMIT = re.compile(r"[0-9a-f]{40}")

_found: dict[tuple[str, str | None], HubModel] = {}
"""Models found in this process, by name and commit. Loading a model asks for its commit several times, and each time
would wait for a hub that cannot be reached."""


@dataclass(frozen=True)
class HubModel:
    """One commit of a model on the hub."""

    name: str
    commit: str
    unreachable: str | None
    """Why the hub could not be reached, if the commit was read from the local cache."""
    parameters: int | None = None
    """Number of weights in its safetensors files, as the hub counts them; None if it does not say."""

    @property
    def cached_folder(self) -> Path:
        """Where the local cache has the files of this commit; need not exist."""
        return _cache(self.name) / "snapshots" / self.commit

    def file(self, name: str) -> Path | None:
        """Fetch a file.

        Returns:
            Its path in the local cache, or None if the commit does not contain it.

        Raises:
            ModelError: it cannot be fetched, so it is unknown whether it exists.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        cached = try_to_load_from_cache(self.name, name, revision=self.commit)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None or is_offline():  # known not to exist; or the user declared the cache to be complete
            return None
        if self.unreachable:
            raise ModelError(
                f"cannot fetch {name} of {self.name!r} from the Hugging Face hub: {self.unreachable}. Connect to the "
                "network, or set HF_HUB_OFFLINE=1 to use the local cache as it is"
            )
        try:
            return Path(hf_hub_download(self.name, name, revision=self.commit))
        except Exception as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise ModelError(
                f"cannot fetch {name} of {self.name!r} from the Hugging Face hub: {first_line(error)}. Try again later"
            ) from error

    def snapshot(self, patterns: Sequence[str] | None = None) -> Path:
        """Fetch all files, or those whose names match a pattern; returns their directory.

        Raises:
            ModelError: they cannot be fetched.
        """
        from huggingface_hub import snapshot_download

        offline = self.unreachable is not None
        try:
            return Path(
                snapshot_download(
                    self.name, revision=self.commit, local_files_only=offline, allow_patterns=list(patterns or ["*"])
                )
            )
        except Exception as error:
            raise ModelError(f"cannot fetch {self.name!r} from the Hugging Face hub: {first_line(error)}") from error


def find_model(name: str, revision: str | None = None) -> HubModel:
    """Resolve a revision of a model to its commit.

    Args:
        name: hub id.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        ModelError: the hub does not have it, or cannot be reached and the cache does not have it either.
    """
    if (name, revision) in _found:
        return _found[name, revision]
    found = _look_up(name, revision)
    _found[name, found.commit] = found
    return found


def _look_up(name: str, revision: str | None) -> HubModel:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        commit = info.sha
        assert commit is not None
        if not (revision and COMMIT.fullmatch(revision)):
            _remember_commit(name, revision, commit)
        return HubModel(name, commit, None, getattr(getattr(info, "safetensors", None), "total", None))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a directory nor a hub id: {first_line(error)}") from None
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name!r} is neither a directory nor a model that you can access on the Hugging Face hub: "
            f"{first_line(error)}"
        ) from None
    except Exception as error:  # the HTTP client of huggingface_hub has its own classes
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            at = f" at revision {revision!r}" if revision else ""
            raise ModelError(f"the Hugging Face hub refuses {name!r}{at}: {first_line(error)}") from None
        reason = first_line(error)
    commit = _cached_commit(name, revision)
    if commit is None:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"cannot reach the Hugging Face hub for {name!r}{at} ({reason}), and the local cache does not have it: "
            "connect to the network, or give the directory of a model"
        )
    return HubModel(name, commit, reason)


def is_offline() -> bool:
    """Whether the user set HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cached_commit(name: str, revision: str | None) -> str | None:
    if revision and COMMIT.fullmatch(revision):
        return revision if HubModel(name, revision, None).cached_folder.is_dir() else None
    ref = _cache(name) / "refs" / (revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def _remember_commit(name: str, revision: str | None, commit: str) -> None:
    """Store which commit a branch or tag is, as huggingface_hub does for files fetched by branch or tag."""
    ref = _cache(name) / "refs" / (revision or "main")
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        with replacing(ref) as temporary:
            temporary.write_text(commit)


def _cache(name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
