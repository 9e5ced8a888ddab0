"""Commands say what is wrong, or what an interruption leaves, in one line."""

import os
import signal
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from pairs.command import CommandParser, interruption_said
from pairs.engines import connect


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background command starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_error_is_said_alone(capsys: pytest.CaptureFixture[str]):
    parser = CommandParser(prog="python -m this")
    for number in range(100):
        parser.add_argument(f"--option-{number}")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--other"])
    assert ended.value.code == 2
    expected = "python -m this: error: unrecognized arguments: --other (--help explains all options)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("command", "works_in", "arguments", "said"),
    [
        ("pairs.build", "opened_engine", "--views v.csv --output p.parquet", "the pairs were not written"),
        ("pairs.split", "opened_engine", "--notes n.csv --views v.csv --output s", "the splits are not whole"),
        ("pairs.scan", "read_notes", "--notes n.csv --output s", "nothing was written"),
        ("pairs.simulate", "simulate", "--output w", "the world is not whole"),
        ("evaluation.run", "load_inputs", "--notes n.csv --pairs p.csv --output r", "no report was written"),
        ("hub.encode", "encode_corpus", "model n.csv --output e", "what is encoded is kept; give the same command"),
        ("train.run", "train", "--use_cpu --output_dir r", "--resume_from_checkpoint auto goes on from the last one"),
    ],
)
def test_an_interrupted_command_says_what_is_kept(
    command: str,
    works_in: str,
    arguments: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module = import_module(command)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "n.csv").write_text("note_id,title\na,A\n")
    monkeypatch.setattr(module, works_in, interrupt)
    with pytest.raises(SystemExit) as ended:
        module.main(arguments.split())
    assert ended.value.code == 130
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("Interrupted: ") and said in lines[-1] and "Traceback" not in "\n".join(lines)


ENDLESS = "SELECT sum(a.range * b.range % 7) FROM range(1000000) a, range(1000000) b"


def test_an_interrupted_query_ends_the_command(interruptible: None, capsys: pytest.CaptureFixture[str]):
    """DuckDB makes an error of its own of it."""

    @interruption_said("nothing")
    def ask() -> None:
        with connect(memory_gb=1) as engine:
            engine.backend.raw_sql(ENDLESS)

    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(SystemExit) as ended:
        ask()
    timer.join()
    assert ended.value.code == 130 and capsys.readouterr().err.endswith("\nInterrupted: nothing\n")


def test_an_engine_that_is_at_work_closes():
    """One interrupt in five left the query at work, and `close` waited for its end."""
    engine = connect(memory_gb=1)
    connection = engine.backend.con
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            connection.execute(ENDLESS)
        except Exception as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    closing = threading.Thread(target=engine.close, daemon=True)
    asking.start()
    asking.join(0.5)
    assert asking.is_alive()
    closing.start()
    closing.join(60)
    hung = closing.is_alive()
    if hung:
        connection.interrupt()
    asking.join(60)
    assert not hung and failed


def test_other_errors_go_on():
    @interruption_said("nothing")
    def fail() -> None:
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        fail()


def test_one_of_several_processes_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), interruption_said("nothing"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
