"""`hub.versions` tries the right releases, each in an environment of its own, and says what came of it. The slow test
makes a real environment, of the oldest transformers the package declares."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import modeling_notellm2
from hub import card, fresh_process, versions
from hub.verify import RECORD, TOLERANCE, VerificationError
from hub.versions import (
    BEGIN,
    END,
    InstallError,
    check_span,
    choose,
    environment,
    install_torch,
    main,
    plan,
    releases,
    supported,
    write_section,
)

DECLARED = ["transformers>=5.6", 'sentence-transformers>=5.4; extra == "baselines"', "torch>=2.6"]
INDEX = {"transformers": "5.24.0, 5.7.0, 5.6.2, 5.6.0, 5.5.4, 4.57.6", "sentence-transformers": "6.2.0, 5.4.0, 5.1.2"}


def read(*texts: str) -> list[Version]:
    return [Version(text) for text in texts]


class StandInPip:
    """What pip is asked for; it answers from `INDEX`, installs nothing, and goes with the bounds of `DECLARED`.

    Attributes:
        asked: the arguments of every call, in order.
        broken: requirements that cannot be installed.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.broken: set[str] = set()

    def __call__(self, *arguments: str) -> str:
        self.asked.append(arguments)
        if arguments[:2] == ("index", "versions"):
            return f"{arguments[2]} (1.0)\nAvailable versions: {INDEX[arguments[2]]}\n  INSTALLED: 1.0\n"
        if "--target" in arguments:
            Path(arguments[arguments.index("--target") + 1]).mkdir()
        if self.broken & set(arguments):
            raise InstallError("`pip install` failed:\nResolutionImpossible")
        return ""

    def installs(self) -> list[set[str]]:
        """The requirements of every environment."""
        return [set(asked[asked.index("--no-compile") + 1 :]) for asked in self.asked if "--python" in asked]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> StandInPip:
    stand_in = StandInPip()
    monkeypatch.setattr(versions, "_pip", stand_in)
    monkeypatch.setattr(card, "requires", lambda package: DECLARED)
    return stand_in


@pytest.fixture
def differences(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """(folder's name, loader) ─► the difference that its fresh process shows, or by default 2e-7; every environment
    is this one, with both loaders."""
    found: dict[tuple[str, str], float] = {}

    def stand_in(folder: Path, python: str, loader: str) -> float:
        assert (folder / RECORD).is_file() and python == sys.executable
        difference = found.get((folder.name, loader), 2e-7)
        if difference > TOLERANCE:
            raise VerificationError(f"{folder}: trace\nembeddings differ by {difference:.2e}")
        return difference

    @contextmanager
    def this_one(*arguments: object) -> Iterator[str]:
        with environment(*arguments):  # type: ignore[arg-type]
            yield sys.executable

    monkeypatch.setattr(versions, "recorded_difference", stand_in)
    monkeypatch.setattr(versions, "available_loaders", lambda python: ["transformers", "sentence-transformers"])
    monkeypatch.setattr(versions, "environment", this_one)
    return found


def test_releases_come_from_the_index_in_order(pip: StandInPip) -> None:
    assert releases("transformers") == read("4.57.6", "5.5.4", "5.6.0", "5.6.2", "5.7.0", "5.24.0")
    assert supported("transformers", releases("transformers")) == read("5.6.0", "5.6.2", "5.7.0", "5.24.0")
    with pytest.raises(ValueError, match=r"transformers>=5.6: no such release"):
        supported("transformers", read("4.57.6"))


def test_a_checkout_that_is_not_installed_is_named(
    tiny_export: Path, pip: StandInPip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(card, "requires", missing)
    with pytest.raises(SystemExit) as stopped:
        main([str(tiny_export)])
    assert stopped.value.code == 2 and "notellm2 is not installed here" in capsys.readouterr().err


def test_the_oldest_the_newest_and_every_minor() -> None:
    found = read("5.6.0", "5.6.1", "5.6.2", "5.7.0", "5.10.1", "5.10.4", "6.0.0")
    assert choose(found) == read("5.6.0", "6.0.0")
    assert choose(found, every_minor=True) == read("5.6.0", "5.6.2", "5.7.0", "5.10.4", "6.0.0")
    assert choose(found[:1]) == choose(found[:1], every_minor=True) == found[:1]


def test_a_plan_holds_both_ends_of_both_libraries() -> None:
    old, new = read("5.6.0", "5.24.0")
    first, last = read("5.4.0", "6.2.0")
    assert plan([old, new], [first, last]) == [
        {"transformers": old},
        {"transformers": new},
        {"transformers": old, "sentence-transformers": first},
        {"transformers": new, "sentence-transformers": first},
        {"transformers": new, "sentence-transformers": last},
    ]
    assert plan([new], [last]) == [{"transformers": new}, {"transformers": new, "sentence-transformers": last}]


def test_an_environment_sees_its_own_packages_then_the_shared_ones(pip: StandInPip, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("both", "shared_alone"):
        (shared / f"{name}.py").write_text("place = 'shared'")
    with environment({"transformers": Version("5.6.0")}, ["peft"], shared, tmp_path / "made") as python:
        (own,) = (tmp_path / "made").rglob("site-packages")
        (own / "both.py").write_text("place = 'own'")
        script = "import both, shared_alone, importlib.util as util\n"
        script += "print(both.place, shared_alone.place, util.find_spec('torch'))"
        answer = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["own", "shared", "None"]  # nothing of the environment that made it
    assert pip.asked == [("--python", python, "install", "--no-compile", "transformers==5.6.0", "pillow", "peft")]
    assert not (tmp_path / "made").exists()


def test_torch_is_installed_once(pip: StandInPip, tmp_path: Path) -> None:
    (tmp_path / "torch.partial").mkdir()  # of a run that was killed
    for _ in range(2):
        assert install_torch("torch==2.13.0", tmp_path / "torch").is_dir()
    assert pip.asked == [("install", "--no-compile", "--target", str(tmp_path / "torch.partial"), "torch==2.13.0")]


def test_the_command_writes_what_it_found(
    tiny_export: Path,
    pip: StandInPip,
    differences: dict[tuple[str, str], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = tmp_path / "COMPAT.md"
    document.write_text(f"before\n{BEGIN}\nthe last table\n{END}\nafter\n")
    differences["shelf-notes", "sentence-transformers"] = 9e-6
    main([str(tiny_export), "--markdown", str(document), "--also", "peft", "--work", str(tmp_path / "work")])
    assert pip.installs() == [
        {"transformers==5.6.0", "pillow", "peft"},
        {"transformers==5.24.0", "pillow", "peft"},
        {"transformers==5.6.0", "sentence-transformers==5.4.0", "pillow", "peft"},
        {"transformers==5.24.0", "sentence-transformers==5.4.0", "pillow", "peft"},
        {"transformers==5.24.0", "sentence-transformers==6.2.0", "pillow", "peft"},
    ]
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "the last table" not in text
    assert "`shelf-notes`" in text and "| 2.0e-07 | 9.0e-06 |" in text and "by hand" not in text
    output = capsys.readouterr()
    assert output.out.splitlines()[0].split()[:2] == ["transformers", "sentence-transformers"]
    assert len(output.out.splitlines()) == 7 and "5 environments give the recorded embeddings" in output.out
    assert "5/5" in output.err  # the progress


def test_failures_are_told_and_do_not_end_it(
    tiny_export: Path,
    pip: StandInPip,
    differences: dict[tuple[str, str], float],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    document = tmp_path / "COMPAT.md"
    document.write_text(f"{BEGIN}{END}")
    other = shutil.copytree(tiny_export, tmp_path / "other")
    differences["other", "transformers"] = 0.25
    pip.broken = {"transformers==4.57.6"}
    options = ["--transformers", "5.7.0", "4.57.6", "--sentence-transformers", "6.2.0", "--markdown", str(document)]
    with pytest.raises(SystemExit, match="4 of 4 environments"):
        main([str(tiny_export), str(other), *options])
    assert "The releases of transformers and sentence-transformers were named by hand." in document.read_text()
    lines = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 4
    assert "| 4.57.6 | - | - | not installed: ResolutionImpossible | - |" in lines
    assert sum("fails: embeddings differ by 2.50e-01 | 2.0e-07 |" in line for line in lines) == 2
    assert "ResolutionImpossible" in caplog.text and "trace" in caplog.text  # all of it, for whoever has to repair it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "README.md").write_text("changed"), "other content than it was exported with"),
        (lambda folder: (folder / "checksums.sha256").unlink(), "checksums.sha256 cannot be read"),
        (
            lambda folder: [
                (folder / name).unlink() for name in ("checksums.sha256", "provenance.json", "verification.json")
            ],
            "is no export",
        ),
    ],
)
def test_a_folder_that_is_not_as_exported_is_refused_first(
    tiny_export: Path,
    pip: StandInPip,
    tmp_path: Path,
    change: Callable[[Path], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(tiny_export, tmp_path / "exported")
    change(folder)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder)])
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not any("install" in asked for asked in pip.asked)


def test_a_document_without_marks_is_refused_before_anything_runs(
    tiny_export: Path, pip: StandInPip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "COMPAT.md"
    document.write_text("no marks")
    with pytest.raises(SystemExit):
        main([str(tiny_export), "--markdown", str(document)])
    assert "lacks the lines" in capsys.readouterr().err and not pip.asked
    document.write_text(f"{END}{BEGIN}")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_section(document, "text")


def test_the_fresh_process_has_no_network(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("[]")
    script = f"""
import socket, sys
sys.path.insert(0, {str(Path(fresh_process.__file__).parent)!r})
import fresh_process
def load(folder, loader):
    try:
        socket.CALL
    except BaseException:
        pass
    raise SystemExit("it went on")
fresh_process.load = load
fresh_process.main("folder", {str(tmp_path / "notes.json")!r}, "embeddings.npy")
"""
    for call, message in (
        ("getaddrinfo('localhost', 9)", "the network is off"),
        ("create_connection(('127.0.0.1', 9))", "the network is off"),
        ("socket(socket.AF_UNIX).connect('/no/such/socket')", "the network is off"),  # whatever is behind it
        ("socketpair()", "it went on"),  # the control: with itself
    ):
        command = [sys.executable, "-I", "-c", script.replace("CALL", call)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert message in ended.stderr and ended.returncode == 1


def test_older_releases_are_refused_by_the_published_code(tiny_export: Path) -> None:
    declared = card.supported_releases()
    for library, file in (
        ("transformers", "configuration_notellm2.py"),
        ("sentence-transformers", "sentence_transformer_notellm2.py"),
    ):
        assert f'require_version("{library}{declared[library]}"' in (tiny_export / file).read_text()


@pytest.mark.parametrize("entry", ["configuration", "modeling", "onnx", "processing", "sentence_transformer"])
def test_what_a_config_names_names_all_files_that_it_needs(entry: str) -> None:
    """transformers 5.6 to 5.9 takes those alone out of a local folder; the newest follows the files that these name."""
    code = Path(modeling_notellm2.__file__).with_name(f"{entry}_notellm2.py")
    assert {f"{name}.py" for name in get_relative_imports(code)} == {
        Path(file).name for file in get_relative_import_files(code)
    }


@pytest.mark.slow
def test_oldest_transformers_gives_the_same_embeddings(tiny_export: Path, tmp_path: Path) -> None:
    oldest = choose(supported("transformers", releases("transformers")))[0]
    span = plan([oldest], choose(supported("sentence-transformers", releases("sentence-transformers")))[:1])
    outcomes: Sequence[versions.Outcome] = list(check_span([tiny_export], span, [], "torch", tmp_path / "work"))
    assert [outcome.passed for outcome in outcomes] == [True, True], json.dumps([it.cells() for it in outcomes])
    assert outcomes[0].installed["transformers"] == str(oldest) and "torchvision" not in outcomes[0].installed
    assert set(outcomes[1].found) == {"transformers", "sentence-transformers"}
