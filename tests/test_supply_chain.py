"""What is installed for tests, what the wheel holds, and that nothing runs when it is installed."""

import configparser
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]


def requirements(*extras: str) -> Iterator[Requirement]:
    """Those of setup.cfg and of extras, with what `%(name)s` in them stands for."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += config["options.extras_require"][extra].splitlines()
    return (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))


def locked(name: str) -> dict[str, Version]:
    """Package ─► the release that a file of requirements/ names; every line names exactly one."""
    lines = (REPOSITORY / "requirements" / name).read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            package, version = line.split(";")[0].split("==")
            found[canonicalize_name(package)] = Version(version.strip())
    return found


def lower_bound(requirement: Requirement) -> Version | None:
    bounds = [Version(it.version) for it in requirement.specifier if it.operator == ">="]
    return max(bounds, default=None)


def unlocked(requirement: Requirement, releases: dict[str, Version]) -> str | None:
    """What is wrong with the lock of a requirement, or None."""
    release = releases.get(canonicalize_name(requirement.name))
    if release is None:
        return f"{requirement.name} is not locked"
    if not requirement.specifier.contains(release, prereleases=True):
        return f"{requirement.name}=={release} is not {requirement.specifier}"
    return None


@pytest.mark.parametrize("name", ["tests.txt", "lowest.txt"])
def test_every_requirement_of_the_tests_is_locked_within_its_bounds(name: str) -> None:
    releases = locked(name)
    assert len(releases) > 100 and not any(release.local for release in releases.values())
    assert not list(filter(None, (unlocked(it, releases) for it in requirements("test"))))


def test_a_lock_out_of_bounds_is_noticed() -> None:
    assert unlocked(Requirement("torch>=2.6"), {"torch": Version("2.5")}) == "torch==2.5 is not >=2.6"
    assert unlocked(Requirement("Sqlglot<30"), {"sqlglot": Version("30.1")}) == "Sqlglot==30.1 is not <30"
    assert unlocked(Requirement("ruff"), {}) == "ruff is not locked"


def test_the_oldest_releases_are_those_of_the_bounds() -> None:
    """A bound that other requirements push up is not tested, and has to be raised."""
    releases = locked("lowest.txt")
    for requirement in requirements("test"):
        bound, release = lower_bound(requirement), releases[canonicalize_name(requirement.name)]
        if bound is not None:  # of a release, the first two numbers: a third may have been withdrawn
            assert (release.major, release.minor) == (bound.major, bound.minor), requirement


def test_every_requirement_has_a_lower_bound() -> None:
    assert [it.name for it in requirements("test") if lower_bound(it) is None] == []


@pytest.mark.parametrize("package", ["transformers", "sentence-transformers"])
def test_what_is_installed_is_within_what_is_known_to_work(package: str) -> None:
    """docs/COMPAT.md has a table of releases in which published folders gave their recorded embeddings."""
    text = (REPOSITORY / "docs" / "COMPAT.md").read_text(encoding="utf-8").partition("<!-- hub.versions")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    column = rows[0].index(package)
    tried = [Version(row[column]) for row in rows[1:] if re.fullmatch(r"[\d.]+", row[column])]
    installed = Version(importlib.metadata.version(package))
    assert min(tried) <= installed <= max(tried), "run hub.versions with this release, and write its line"
    (bound,) = (lower_bound(it) for it in requirements("baselines") if it.name == package)
    assert bound is not None and min(tried).release[:2] == bound.release[:2]


def test_installing_runs_no_code_of_the_repository() -> None:
    assert not list(REPOSITORY.glob("setup.py")) and not list(REPOSITORY.glob("modeling_notellm2/**/*.pth"))
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    build = text.partition("[build-system]")[2].partition("\n[")[0]
    assert re.findall(r"^\w[\w-]*", build, re.MULTILINE) == ["requires", "build-backend"]  # no backend-path
    (requires,) = re.findall(r'^requires = \["([^"]+)"\]$', build, re.MULTILINE)
    assert Requirement(requires).name == "setuptools" and '"setuptools.build_meta"' in build
    assert Requirement(requires).specifier.contains(locked("tests.txt")["setuptools"])
    assert not Requirement(requires).specifier.contains("1000")
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    assert not {"options.entry_points", "options.data_files", "options.package_data"} & set(config.sections())
    assert not {"cmdclass", "setup_requires", "scripts", "include_package_data"} & set(config["options"])


def test_the_wheel_holds_the_model_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves folders beside what it builds
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    for folder in ("modeling_notellm2", "pairs", "tests", "configs"):
        (source / folder).mkdir()
        for file in (REPOSITORY / folder).glob("*.*"):
            (source / folder / file.name).write_bytes(file.read_bytes())
    (source / "modeling_notellm2" / "weights.bin").write_bytes(b"data")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"modeling_notellm2/{file.name}" for file in (REPOSITORY / "modeling_notellm2").glob("*.py")}
    added = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    assert added <= {"METADATA", "WHEEL", "RECORD", "top_level.txt", "LICENSE"}  # no entry points
