"""An upload: exactly the folder, after verification, in one commit; against a stand-in of the Hub."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo, HfApi, constants

from hub.push import UploadError, format_plan, main, plan, push
from hub.verify import CHECKSUMS, VerificationError, folder_files, sha256, write_checksums
from tests.hub.conftest import StandInHub

REPO = "some-org/shelf-notes"


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands for the verification, which tests of its own measure: the folders it was asked for."""
    asked: list[Path] = []

    def verify(folder: Path) -> float:
        asked.append(folder)
        return 0.0

    monkeypatch.setattr("hub.push.verify", verify)
    return asked


def change(path: Path) -> None:
    """Other bytes, as many."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def export_again(folder: Path) -> None:
    """Another whole export in the same place."""
    change(folder / "README.md")
    write_checksums(folder)


def api_of(hub: StandInHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_stand_in")


def test_exactly_the_folder_goes_in_one_commit(tiny_export: Path, hub: StandInHub, verified: list[Path]) -> None:
    commit = push(tiny_export, REPO, private=True, api=api_of(hub))
    assert verified == [tiny_export] and commit.commit_url.startswith(hub.url)
    assert hub.created[0]["name"] == "shelf-notes" and hub.created[0]["organization"] == "some-org"
    assert hub.private
    sent = hub.files()
    assert sent == {name: (tiny_export / name).read_bytes() for name in folder_files(tiny_export)}
    assert hub.commits[0]["revision"] == "main" and hub.commits[0]["query"] == ""
    assert len(hub.blobs) == 1  # the weights, apart from the commit
    assert any("validate-yaml" in request for request in hub.requests)


def test_the_plan_is_what_goes(tiny_export: Path, hub: StandInHub, verified: list[Path]) -> None:
    files = plan(tiny_export)
    push(tiny_export, REPO, api=api_of(hub))
    assert {file.path for file in files} == set(hub.files())
    text = format_plan(files)
    for file in files:
        assert file.sha256 == sha256(tiny_export / file.path) and file.sha256 in text
        assert file.size == len(hub.files()[file.path]) and f"{file.size:,}" in text
    assert text.endswith(f"{len(files)} files, {sum(file.size for file in files):,} bytes\n")


def test_nothing_private_goes_into_a_public_repository(
    tiny_export: Path, hub: StandInHub, verified: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private = False
    with pytest.raises(ValueError, match="exists and is public: make it private first"):
        push(tiny_export, REPO, private=True, revision="next", api=api_of(hub))
    with pytest.raises(SystemExit):
        main([str(tiny_export), REPO, "--private", "--dry-run"])
    assert "exists and is public" in capsys.readouterr().err
    assert hub.commits == [] and hub.blobs == {} and not any("/branch/" in request for request in hub.requests)
    hub.private = True
    push(tiny_export, REPO, private=True, api=api_of(hub))
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: change(folder / "README.md"),
        lambda folder: change(folder / "model.safetensors"),
        lambda folder: change(folder / CHECKSUMS),
        export_again,
    ],
)
def test_what_changes_while_it_is_verified_is_not_sent(
    tiny_export: Path,
    hub: StandInHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
) -> None:
    folder = shutil.copytree(tiny_export, tmp_path / "folder")
    monkeypatch.setattr("hub.push.verify", lambda folder: spoil(Path(folder)))
    with pytest.raises(VerificationError, match="was changed since it was planned"):
        push(folder, REPO, api=api_of(hub))
    with pytest.raises(SystemExit, match="nothing was sent"):  # also against the plan that the command has shown
        main([str(shutil.copytree(tiny_export, tmp_path / "again")), REPO])
    assert hub.requests == []


def test_what_is_added_while_it_is_verified_stays(
    tiny_export: Path, hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_export, tmp_path / "folder")
    monkeypatch.setattr("hub.push.verify", lambda folder: (folder / "password.txt").write_text("hunter2"))
    push(folder, REPO, api=api_of(hub))
    assert (folder / "password.txt").is_file() and set(hub.files()) == set(folder_files(tiny_export))


def test_no_file_changes_between_its_checksum_and_its_upload(
    tiny_export: Path, hub: StandInHub, verified: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_export, tmp_path / "folder")
    api = api_of(hub)
    commit = api.create_commit

    def slow_commit(*args: Any, **settings: Any) -> CommitInfo:
        change(folder / "README.md")
        return commit(*args, **settings)

    monkeypatch.setattr(api, "create_commit", slow_commit)
    push(folder, REPO, api=api)
    assert hub.files()["README.md"] == (tiny_export / "README.md").read_bytes() != (folder / "README.md").read_bytes()


def test_both_libraries_must_have_tried_the_folder(
    tiny_export: Path, hub: StandInHub, verified: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.push.available_loaders", lambda: ["transformers"])
    with pytest.raises(VerificationError, match=r"sentence-transformers is not installed.*notellm2\[baselines\]"):
        push(tiny_export, REPO, api=api_of(hub))
    with pytest.raises(SystemExit, match="sentence-transformers is not installed"):
        main([str(tiny_export), REPO, "--dry-run"])
    assert hub.requests == [] and verified == []


def test_only_an_upload_that_was_cut_off_is_called_so(
    tiny_export: Path, hub: StandInHub, verified: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut_off = 1
    with pytest.raises(SystemExit, match="was cut off .*call again"):
        main([str(tiny_export), REPO])

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hub.push.verify", fail)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        main([str(tiny_export), REPO])
    monkeypatch.undo()
    monkeypatch.setattr("hub.push.verify", lambda folder: 0.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SystemExit, match="The Hub cannot be reached"):
        main([str(tiny_export), REPO])


def test_an_upload_that_was_cut_off_goes_on(tiny_export: Path, hub: StandInHub, verified: list[Path]) -> None:
    hub.cut_off = 1
    with pytest.raises(UploadError, match="model.safetensors"):
        push(tiny_export, REPO, api=api_of(hub))
    assert hub.commits == [] and hub.blobs == {}
    push(tiny_export, REPO, api=api_of(hub))
    assert len(hub.commits) == 1
    uploads = sum(request.startswith("PUT") for request in hub.requests)
    push(tiny_export, REPO, revision="next", api=api_of(hub))  # the large file is on the Hub already
    assert sum(request.startswith("PUT") for request in hub.requests) == uploads
    assert [commit["revision"] for commit in hub.commits] == ["main", "next"]


def test_a_pull_request_creates_no_repository(tiny_export: Path, hub: StandInHub, verified: list[Path]) -> None:
    commit = push(tiny_export, REPO, create_pr=True, api=api_of(hub))
    assert hub.created == [] and "create_pr=1" in hub.commits[0]["query"]
    assert commit.pr_url is not None and commit.pr_url.endswith("/discussions/1")


def test_files_of_an_earlier_export_are_not_mixed_in(tiny_export: Path, hub: StandInHub, verified: list[Path]) -> None:
    hub.others = [".gitattributes", "README.md", "model-00001-of-00002.safetensors"]
    with pytest.raises(ValueError, match="mixture of two exports: model-00001-of-00002.safetensors"):
        push(tiny_export, REPO, api=api_of(hub))
    assert hub.commits == []
    push(tiny_export, REPO, delete_others=True, api=api_of(hub))
    deleted = [line["value"]["path"] for line in hub.commits[0]["lines"] if line["key"] == "deletedFile"]
    assert deleted == ["model-00001-of-00002.safetensors"] and set(hub.files()) == set(folder_files(tiny_export))


def test_nothing_is_sent_of_a_folder_that_fails(tiny_export: Path, hub: StandInHub, tmp_path: Path) -> None:
    spoiled = shutil.copytree(tiny_export, tmp_path / "spoiled")
    (spoiled / "more.txt").write_text("not exported")
    with pytest.raises(VerificationError, match="more.txt"):
        push(spoiled, REPO, api=api_of(hub))
    with pytest.raises(SystemExit, match="nothing was sent"):
        main([str(spoiled), REPO, "--dry-run"])
    assert hub.requests == []


def test_a_dry_run_lists_and_sends_nothing(
    tiny_export: Path, hub: StandInHub, verified: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tiny_export), REPO, "--dry-run"])
    out = capsys.readouterr().out
    assert format_plan(plan(tiny_export)) in out and "Nothing was sent" in out
    assert hub.requests == [] and verified == [str(tiny_export)] and "name another place" not in out
    main([str(tiny_export), "other-org/notes", "--dry-run"])
    assert "export with --repo-id other-org/notes" in capsys.readouterr().out


def test_a_dry_run_names_what_would_be_deleted(
    tiny_export: Path, hub: StandInHub, verified: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.others = [".gitattributes", "README.md", "model-00001-of-00002.safetensors"]
    command = [str(tiny_export), REPO, "--dry-run", "--delete-others"]
    main(command)
    assert "would be deleted" not in capsys.readouterr().out  # there is no such repository yet
    hub.private = False
    for more in ([], ["--revision", "next"]):
        main([*command, *more])
        out = capsys.readouterr().out
        assert "would be deleted: model-00001-of-00002.safetensors\n" in out and "deleted: README.md" not in out
    assert {request.partition(" ")[0] for request in hub.requests} == {"GET"}


def test_bad_arguments_are_named(tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path), REPO], "is no export"),
        ([str(tiny_export), "a/b/c"], "repo_id='a/b/c' is no id"),
        ([str(tiny_export), "me", "--dry-run"], "repo_id='me' is no id on the Hub: give ORG/NAME"),
        ([str(tiny_export), REPO, "--create-pr", "--private"], "create_pr=True with private=True"),
        ([str(tiny_export), REPO, "--create-pr", "--private", "--dry-run"], "create_pr=True with private=True"),
        ([str(tiny_export), REPO, "--create-pr", "--revision", "x", "--dry-run"], "revision='x'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tiny_export: Path, hub: StandInHub) -> None:
    """With nothing replaced: verification in fresh processes, and the Hub's address from the environment."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_stand_in", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "hub.push", str(tiny_export), REPO]
    finished = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    assert finished.stdout.rstrip().endswith(f"{hub.url}/{REPO}/commit/{'0' * 40}")
    assert set(hub.files()) == set(folder_files(tiny_export))
