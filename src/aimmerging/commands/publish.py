"""Upload an export to the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from aimmerging.errors import ConfigError, ModelError


def check_before(repo: str) -> None:
    """Refuse an upload that cannot succeed, before the export takes its time.

    Raises:
        ConfigError: the name is none, there is no token, or the hub is switched off.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {error} Give the name as OWNER/NAME") from None
    if huggingface_hub.is_offline_mode():
        raise ConfigError("--push-to-hub needs the network, but HF_HUB_OFFLINE is set; unset it or leave the option")
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            "--push-to-hub needs a token that may write: give `hf auth login` once, or set HF_TOKEN to one from "
            "https://huggingface.co/settings/tokens"
        )


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload every file of an export, into a repository that is made if it is not there.

    Args:
        folder: of the export.
        repo: OWNER/NAME.
        private: whether a repository that is made here is.
        message: of the commit.

    Returns:
        where it is to be seen.

    Raises:
        ModelError: the hub refused or could not be reached; the export stays where it is.
    """
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # a hub that refuses and a network that fails surface as errors of many types
        said = " ".join(str(error).split())
        raise ModelError(
            f"the upload to {repo} failed: {said}. The export lies in {folder}; check name and token, then upload it "
            f"with `hf upload {repo} {folder}`"
        ) from None
    return str(made)
