"""Upload an export to the Hub: exactly this folder, after verification, in one commit.

    python -m hub.push DIR ORG/NAME [--private] [--create-pr] [--revision BRANCH] [--dry-run]

What goes are the files that the export's list of checksums names, and that list: each is compared with it after
verification, as it is handed to the Hub's client. An upload that was cut off is begun again with the same command:
nothing is seen on the Hub before the commit, and what the Hub has already of the large files is not sent twice.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from hub.repo_id import check_repo_id
from hub.verify import CHECKSUMS, VerificationError, available_loaders, is_export, listed_files, sha256, verify
from pairs.command import CommandParser, interruption_said

# What the client's HTTP library raises where the Hub cannot be reached: that of httpx or httpx2, by its release.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


class UploadError(RuntimeError):
    """The upload was cut off; the same call goes on with it."""


class PlannedFile(NamedTuple):
    """A file that goes to the Hub.

    Attributes:
        path: relative to the folder, and in the repository.
        size: bytes.
        sha256: its checksum in hexadecimal.
    """

    path: str
    size: int
    sha256: str


def plan(folder: str | os.PathLike) -> list[PlannedFile]:
    """What `push` would upload of an export, in order: what its list of checksums names, and the list.

    Raises:
        VerificationError: the list cannot be read, or a file that it names is missing.
    """
    root = Path(folder)
    checksums = {**listed_files(root), CHECKSUMS: sha256(root / CHECKSUMS)}
    try:
        return [PlannedFile(name, (root / name).stat().st_size, checksums[name]) for name in sorted(checksums)]
    except FileNotFoundError as error:
        raise VerificationError(f"{folder} lacks {error.filename}. Export again.") from error


def format_plan(files: Sequence[PlannedFile]) -> str:
    """A plan as aligned lines, and its sum."""
    width = max(len(file.path) for file in files)
    lines = [f"{file.path:{width}}  {file.size:>14,}  {file.sha256}\n" for file in files]
    return "".join(lines) + f"{len(files)} files, {sum(file.size for file in files):,} bytes\n"


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    delete_others: bool = False,
    message: str | None = None,
    files: Sequence[PlannedFile] | None = None,
    api: HfApi | None = None,
) -> CommitInfo:
    """Verify an export, and upload its files in one commit.

    Args:
        folder: the export.
        repo_id: `org/name`; created if it is not there, except with `create_pr`.
        private: create it as a private repository; one that is there must be private.
        create_pr: open a pull request instead of committing.
        revision: the branch to commit to, created if need be; default `main`.
        delete_others: delete, in the same commit, what the repository holds and the folder does not.
        message: the commit's message.
        files: the plan that was shown to somebody, which then is what goes; default: `plan(folder)`.
        api: the Hub's client; by default the one of this machine's login.

    Returns:
        What the Hub says of the commit.

    Raises:
        VerificationError: the folder is not as it was exported or planned, does not work in a fresh process, or cannot
            be tried in one, as sentence-transformers is not installed here.
        ValueError: `repo_id` is no id, the folder is no export, `create_pr` comes with `private` or `revision`, the
            repository is to be private and is public, or it holds other files and `delete_others` does not say that
            they may go.
        UploadError: the connection broke, or the Hub did not take a file.
        HfHubHTTPError: the Hub refuses.
    """
    _check(folder, repo_id, private, create_pr, revision)
    files = files if files is not None else plan(folder)
    _verify(folder)
    additions = [_addition(Path(folder), file) for file in files]
    api = api if api is not None else HfApi()
    if not create_pr:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private:
            _check_private(api, repo_id)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    others = other_files(api, repo_id, files, revision)
    if others and not delete_others:
        raise ValueError(
            f"{repo_id} holds files that {folder} lacks, and would be a mixture of two exports: {', '.join(others)}. "
            "Give --delete-others to delete them in the same commit, or another repository or --revision."
        )
    try:
        # Not upload_folder: where hf_xet is installed it may commit a folder in parts, and a part does not load.
        return api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in others)],
            commit_message=message or "Upload a NoteLLM-2 model",
            revision=revision,
            create_pr=create_pr,
        )
    except HfHubHTTPError:
        raise
    except (_HTTPError, RuntimeError) as error:  # the client wraps what ended an upload in a RuntimeError
        raise UploadError(f"The upload to {repo_id} was cut off ({error}): call again, and it goes on.") from error


def rehearse(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    delete_others: bool = False,
    files: Sequence[PlannedFile] | None = None,
    api: HfApi | None = None,
) -> tuple[float, list[str]]:
    """All that `push` does before it changes anything on the Hub, which is asked only where the repository must be
    private, or files would be deleted.

    Args: as of `push`.

    Returns:
        The largest difference of embeddings that the verification found, and the names of the files that
        `delete_others` would delete.

    Raises: what `push` raises, except for what only an upload can tell.
    """
    _check(folder, repo_id, private, create_pr, revision)
    files = files if files is not None else plan(folder)
    difference = _verify(folder)
    if not (private or delete_others):
        return difference, []
    api = api if api is not None else HfApi()
    if not api.repo_exists(repo_id):  # push would create it, empty
        return difference, []
    if private:
        _check_private(api, repo_id)
    # A branch that is not there would begin as main is.
    branch = revision if revision is not None and api.revision_exists(repo_id, revision) else None
    return difference, other_files(api, repo_id, files, branch) if delete_others else []


def other_files(api: HfApi, repo_id: str, files: Sequence[PlannedFile], revision: str | None = None) -> list[str]:
    """Names of what a repository holds beside a plan, in order, without the Hub's own `.gitattributes`."""
    held = set(api.list_repo_files(repo_id, revision=revision))
    return sorted(held - {file.path for file in files} - {".gitattributes"})


def _check(folder: str | os.PathLike, repo_id: str, private: bool, create_pr: bool, revision: str | None) -> None:
    check_repo_id("repo_id", repo_id)
    if not is_export(folder):
        raise ValueError(f"folder={str(folder)!r} is no export: write it with python -m hub.export first.")
    if create_pr and (private or revision is not None):
        raise ValueError(
            f"create_pr=True with private={private}, revision={revision!r}: a pull request goes to the main branch of "
            "a repository that exists; leave both out."
        )


def _verify(folder: str | os.PathLike) -> float:
    if "sentence-transformers" not in available_loaders():  # which the card promises will load the folder
        raise VerificationError(
            "sentence-transformers is not installed, so that nobody can say whether it loads the folder: "
            "pip install 'notellm2[baselines]', or -e '.[baselines]' in a checkout."
        )
    return verify(folder)


def _check_private(api: HfApi, repo_id: str) -> None:
    """The Hub takes the wish for a private repository, and leaves one that is there as it is."""
    if not api.model_info(repo_id).private:
        raise ValueError(
            f"private=True, and {repo_id} exists and is public: make it private first (hf repos settings {repo_id} "
            "--private), name another, or leave --private out."
        )


def _addition(root: Path, file: PlannedFile) -> CommitOperationAdd:
    path = root / file.path
    # In memory, so that what was compared is what goes; weights, too large for that, go by their checksum.
    content = path if path.suffix == ".safetensors" else path.read_bytes()
    addition = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=content)
    if addition.upload_info.sha256.hex() != file.sha256:
        raise VerificationError(
            f"{path} was changed since it was planned. Nothing was sent: look at it, or export again."
        )
    return addition


@interruption_said("nothing was published, unless the commit had been sent; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m hub.push",
        description="Upload an export to the Hub, after verification, in one commit. Log in with `hf auth login`.",
    )
    parser.add_argument("folder", help="what hub.export wrote")
    parser.add_argument("repo_id", help="ORG/NAME on the Hub; created if it is not there")
    parser.add_argument(
        "--private",
        action="store_true",
        help="create the repository as a private one (an error if there is a public one)",
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument(
        "--delete-others",
        action="store_true",
        help="delete, in the same commit, what the repository holds and the folder does not (otherwise an error)",
    )
    parser.add_argument("--message", help="the commit's message")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="verify, list what would go, and send nothing; --private and --delete-others ask the Hub what it has",
    )
    arguments = parser.parse_args(argv)
    where: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("private", "create_pr", "revision", "delete_others")
    }
    folder, repo_id = arguments.folder, arguments.repo_id
    try:
        _check(folder, repo_id, arguments.private, arguments.create_pr, arguments.revision)
        where["files"] = plan(folder)
        sys.stdout.write(format_plan(where["files"]))
        if f'"{repo_id}"' not in (Path(folder) / "README.md").read_text(encoding="utf-8"):
            sys.stdout.write(f"The card's examples name another place: export with --repo-id {repo_id}.\n")
        if arguments.dry_run:
            difference, others = rehearse(folder, repo_id, **where)
            sys.stdout.write("".join(f"would be deleted: {name}\n" for name in others))
            sys.stdout.write(
                f"verified (largest difference {difference:.1e}). Nothing was sent; without --dry-run these files go "
                f"to {repo_id}.\n"
            )
            return
        commit = push(folder, repo_id, message=arguments.message, **where)
    except VerificationError as error:
        sys.exit(f"FAILED, and nothing was sent: {error}")
    except ValueError as error:
        parser.error(str(error))
    except HfHubHTTPError as error:
        sys.exit(f"The Hub refused: {error}")
    except UploadError as error:
        sys.exit(str(error))
    except _HTTPError as error:
        sys.exit(f"The Hub cannot be reached ({error}), and nothing was sent.")
    sys.stdout.write(f"{commit.pr_url or commit.commit_url}\n")


if __name__ == "__main__":
    main()
