"""What .ci/run, .ci/lowest and .ci/audit do where an index, a network or a program is not as they would have it. They
run as they are, on stand-ins of the programs that they start."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]
STEPS = ("ruff", "mypy", "pytest")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script of .ci/ in a folder of its own, with stand-ins: name ─► shell script; None: not installed."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (tmp_path / ".ci").mkdir()

    def write(file: Path, text: str) -> None:
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def call(script: str, stand_ins: dict[str, str | None]) -> subprocess.CompletedProcess[str]:
        shutil.copy(REPOSITORY / ".ci" / script, tmp_path / ".ci" / script)
        for other in {"lowest", "audit"} - {script}:
            write(tmp_path / ".ci" / other, f"echo step {other}")
        steps = {step: f"echo step {step}" for step in STEPS}
        # All that can be found is here: none of this machine's own programs but these.
        for name in ("bash", "cat", "dirname", "env", "grep", "id", "ln", "mkdir", "mktemp", "rm", "timeout"):
            (bin_folder / name).symlink_to(str(shutil.which(name)))
        for name, text in {"java": 'echo version \\"17.0\\" >&2', "python3": ":", **steps, **stand_ins}.items():
            if text is not None:
                write(bin_folder / name, text)
        command = [str(shutil.which("bash")), str(tmp_path / ".ci" / script)]
        return subprocess.run(command, env={"PATH": str(bin_folder)}, capture_output=True, text=True)

    return call


LACKING = (
    "ERROR: Could not find a version that satisfies the requirement x==9\nERROR: No matching distribution found for x"
)


def pip(error: str) -> str:
    """Fails with the lock, with this error and status 3; without it, it installs."""
    return f'case "$*" in *--constraint*) echo "{error}" >&2; exit 3;; esac; echo installed without a lock'


def test_an_index_that_lacks_a_locked_release_does_not_stop_the_tests(run: Run) -> None:
    finished = run("run", {"pip": pip(LACKING)})
    assert finished.returncode == 0, finished.stderr
    assert "NOT LOCKED" in finished.stdout and "installed without a lock" in finished.stdout
    assert "No matching distribution found for x" in finished.stderr
    assert [line for line in finished.stdout.splitlines() if line.startswith("step")] == [
        *("step ruff", "step ruff", "step mypy", "step pytest", "step lowest", "step audit")
    ]


def test_another_error_of_pip_is_one(run: Run) -> None:
    finished = run("run", {"pip": pip("ERROR: ResolutionImpossible")})
    assert finished.returncode == 3 and "ResolutionImpossible" in finished.stderr
    assert "NOT LOCKED" not in finished.stdout and "step" not in finished.stdout


def test_what_pip_can_install_is_locked(run: Run) -> None:
    finished = run("run", {"pip": 'echo "pip $*"'})
    assert finished.returncode == 0 and finished.stdout.count("pip install") == 1
    assert "--constraint requirements/tests.txt" in finished.stdout and "NOT LOCKED" not in finished.stdout


# It answers more than a pipe holds, behind what is looked for; python3 makes an environment of stand-ins.
LONG_ANSWER = """echo '{"vulns": ['; for i in {1..20000}; do echo '"0123456789"'; done"""
TOOLS = """mkdir -p "$3/bin"; for tool in pip pip-audit; do
    printf '#!/bin/bash\\necho %s ran' "$tool" >"$3/bin/$tool"; chmod +x "$3/bin/$tool"
done"""


def test_a_long_answer_is_an_answer(run: Run) -> None:
    finished = run("audit", {"curl": LONG_ANSWER, "python3": f"PATH=/usr/bin:/bin\n{TOOLS}"})
    assert finished.returncode == 0, finished.stderr
    assert "pip-audit ran" in finished.stdout and "NOT AUDITED" not in finished.stdout


@pytest.mark.parametrize(
    ("curl", "said"),
    [
        (None, "NOT AUDITED: curl, which asks https://api.osv.dev, is not installed"),
        ("exit 6", "NOT AUDITED: https://api.osv.dev cannot be reached"),
        ("echo a login page", "NOT AUDITED: https://api.osv.dev cannot be reached"),
    ],
)
def test_what_is_not_audited_is_said(run: Run, curl: str | None, said: str) -> None:
    finished = run("audit", {"curl": curl, "python3": "echo it went on; exit 9"})
    assert finished.returncode == 0 and "it went on" not in finished.stdout
    assert said in finished.stdout


def lowest(run: Run, tmp_path: Path, error: str, status: int = 1) -> subprocess.CompletedProcess[str]:
    """.ci/lowest, where pip has this error when it installs torch; none if it is empty."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "lowest.txt").write_text("# oldest\nruff==1\ntorch==2\nnvidia-x-cu1==3\npeft==4\n")
    # Of the oldest torch its uninstallation leaves something.
    its = ("made", "its packages/nvidia/left")
    for folder in (*its, "at hand/torch", "at hand/torch-2.14.dist-info", "at hand/nvidia", "at hand/peft"):
        (tmp_path / folder).mkdir(parents=True)
    fails = f'echo "{error}" >&2; exit {status}' if error else ":"
    sources = {
        "pip": f'case "$*" in *install*torch.txt) {fails};; esac; echo "pip $*"',
        "python": f'case "$*" in *sysconfig*) echo "{tmp_path}/its packages";; *) echo "python $*";; esac',
    }
    for name, source in sources.items():
        (tmp_path / "made" / name).write_text(f"#!/bin/bash\n{source}\n")
        (tmp_path / "made" / name).chmod(0o755)
    make = f'PATH=/usr/bin:/bin; mkdir -p "$3/bin"; cp {tmp_path}/made/* "$3/bin"'
    return run("lowest", {"python3": make, "python": f'echo "{tmp_path}/at hand"'})


def names(folder: Path) -> set[str]:
    """Of what links lead to."""
    return {path.name for path in folder.iterdir() if path.is_symlink()}


def test_the_oldest_releases_are_tested_with_the_oldest_torch(run: Run, tmp_path: Path) -> None:
    finished = lowest(run, tmp_path, "")
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout
    assert "NOT THE OLDEST" not in said
    # ONNX alone is tested with the newer torch, once the oldest is gone.
    assert (
        said.index("pytest -n auto tests/modeling")
        < said.index("pip uninstall")
        < said.index("tests/hub/test_hub_onnx")
    )
    assert names(tmp_path / "its packages") == {"torch", "torch-2.14.dist-info", "nvidia"}


@pytest.mark.parametrize(
    "error", [LACKING, "ERROR: Connection broken: IncompleteRead", "ERROR: HTTPSPool: Read timed out."]
)
def test_a_torch_that_an_index_does_not_give_is_said(run: Run, tmp_path: Path, error: str) -> None:
    finished = lowest(run, tmp_path, error)
    assert finished.returncode == 0, finished.stderr
    assert "NOT THE OLDEST TORCH" in finished.stdout and "pytest -n auto tests/modeling" in finished.stdout
    assert error.splitlines()[0] in finished.stderr and "uninstall" not in finished.stdout
    # Nothing else of the active environment stands in for an oldest release.
    assert names(tmp_path / "its packages") == {"torch", "torch-2.14.dist-info", "nvidia"}


def test_a_torch_that_takes_too_long_is_given_up(run: Run, tmp_path: Path) -> None:
    finished = lowest(run, tmp_path, "killed", status=124)  # of `timeout`
    assert finished.returncode == 0, finished.stderr
    assert "NOT THE OLDEST TORCH" in finished.stdout and "pytest -n auto tests/modeling" in finished.stdout


@pytest.mark.parametrize("error", ["ERROR: hash mismatch", "WARNING: Connection broken, retrying\nERROR: disk full"])
def test_another_error_for_torch_ends_it(run: Run, tmp_path: Path, error: str) -> None:
    finished = lowest(run, tmp_path, error)
    assert finished.returncode == 1 and error.splitlines()[-1] in finished.stderr
    assert "NOT THE OLDEST TORCH" not in finished.stdout and "pytest" not in finished.stdout
