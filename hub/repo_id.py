"""Names of repositories on the Hub."""

from huggingface_hub.utils import HFValidationError, validate_repo_id


def check_repo_id(name: str, repo_id: str) -> None:
    """Raises ValueError for what is no `ORG/NAME` on the Hub, such as an absolute path, or a name alone; `name` is what
    it was given for."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{name}={repo_id!r} is no id on the Hub: {error}") from error
    if "/" not in repo_id:  # the Hub's client would put the account of this machine before it
        raise ValueError(f"{name}={repo_id!r} is no id on the Hub: give ORG/NAME.")


__all__ = ["check_repo_id"]
