"""The scan names every bad row of a table that `load_notes` would refuse, and nothing of a good one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from pairs.scan import FINDINGS, main, scan_notes
from pairs.tables import load_notes, load_pairs, read_notes, write_table


def picture(seed, size=(64, 48)):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return PILImage.fromarray(coarse).resize(size, PILImage.Resampling.BICUBIC)


@pytest.fixture
def bad(tmp_path):
    """A folder with a table of notes that has every fault, and pairs."""
    for name, seed in (("one.png", 1), ("two.png", 2)):
        picture(seed).save(tmp_path / name)
    picture(1).resize((16, 12)).save(tmp_path / "one-again.jpg", quality=60)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "one-again.jpg").read_bytes()[:300])
    lines = [
        "note_id,title,topics,content,image",
        "a,A,,,one.png",
        "b,B,,,two.png",
        ",C,,,",
        "a,D,,,missing.png",
        "e,,,,one-again.jpg",
        "f,\u3000 ,,,",
        "g,G,,,https://host/g.png",
        "h,,topic,,broken.jpg",
        "a,,,content,two.png",
    ]
    (tmp_path / "notes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["note_id,related_note_id,score,rank", "a,b,1,1", "a,x,1,2", "y,a,1,1", "x,y,1,1"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def rows_of(scan):
    return [tuple(row.values()) for row in scan.offenders]


def test_every_fault_is_found_once(bad):
    scan = scan_notes(read_notes(bad / "notes.csv"), load_pairs(bad / "pairs.csv"), workers=2)
    rows = rows_of(scan)
    assert [row[:3] for row in rows] == [
        (3, "", "empty_id"),
        (4, "a", "duplicate_id"),
        (9, "a", "duplicate_id"),
        (5, "e", "no_text"),
        (6, "f", "no_text"),
        (6, "f", "no_text_no_image"),
        (7, "g", "url_image"),
        (4, "a", "missing_image"),
        (8, "h", "unreadable_image"),
        (5, "e", "near_duplicate_image"),
        (9, "a", "near_duplicate_image"),
        (2, "a", "unknown_note"),
        (3, "y", "unknown_note"),
        (4, "x", "unknown_note"),
    ]
    details = {row[:1] + row[2:3]: row[3] for row in rows}
    assert details[9, "duplicate_id"] == "first in row 1"
    assert details[7, "url_image"].startswith("'https://host/g.png' is an address, and nothing is fetched: ")
    assert details[4, "missing_image"].startswith(f"no file {str(bad / 'missing.png')!r}. ")
    assert details[8, "unreadable_image"].startswith(f"{str(bad / 'broken.jpg')!r} cannot be read (")
    assert details[5, "near_duplicate_image"] == "like 'a' of row 1, 2 of 64 bits differ"
    assert details[9, "near_duplicate_image"] == "like 'b' of row 2, 0 of 64 bits differ"
    assert details[2, "unknown_note"] == "no note related_note_id 'x'"
    assert details[4, "unknown_note"] == "no note note_id 'x' and related_note_id 'y'"
    assert scan.totals == {"notes": 9, "images": 7, "pairs": 4}
    assert list(scan.counts) == list(FINDINGS)
    assert sum(scan.counts.values()) == len(rows)
    assert scan.share("near_duplicate_image") == 2 / 7 and scan.share("unknown_note") == 3 / 4


def test_images_elsewhere_come_with_the_remedy(bad, capsys):
    """The same that `load_notes` gives, of an option that the scan has, too."""
    (bad / "inside").mkdir()
    (bad / "inside" / "notes.csv").write_text("note_id,title,image\na,A,../one.png\n")
    command = ["--notes", str(bad / "inside" / "notes.csv"), "--output", str(bad / "scan")]
    main(command)
    assert "'../one.png' leads out of the notes' folder: " in (said := capsys.readouterr().out)
    assert "--image-root DIR" in said and "1 findings" in said
    with pytest.raises(ValueError, match="--image-root DIR"):
        load_notes(bad / "inside" / "notes.csv")
    main([*command, "--image-root", str(bad)])
    assert "0 findings" in capsys.readouterr().out


def test_load_notes_refuses_what_the_scan_counts(bad):
    with pytest.raises(ValueError, match="row 3: 'note_id' is empty"):
        load_notes(bad / "notes.csv")


def test_distance_decides_what_is_alike(bad):
    notes = read_notes(bad / "notes.csv")
    near = [scan_notes(notes, max_distance=distance, workers=1).counts["near_duplicate_image"] for distance in (0, 4)]
    assert near == [1, 2]


def test_without_pairs_none_are_looked_for(bad):
    scan = scan_notes(read_notes(bad / "notes.csv"), workers=1)
    assert "unknown_note" not in scan.counts and "pairs" not in scan.totals


def test_images_inside_the_table_are_scanned(tmp_path):
    picture(1).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    images = [
        {"bytes": content, "path": None},
        {"bytes": content[:200], "path": None},
        None,
        {"bytes": None, "path": str(tmp_path / "one.png")},
        {"bytes": None, "path": str(tmp_path / "missing.png")},
    ]
    table = {"note_id": list("abcde"), "topics": [["x"], ["x"], ["", " "], [], None], "image": images}
    features = Features({"note_id": Value("string"), "topics": [Value("string")], "image": Image()})
    write_table(Dataset.from_dict(table, features=features), tmp_path / "notes.parquet")
    scan = scan_notes(read_notes(tmp_path / "notes.parquet"), workers=1)
    assert scan.totals["images"] == 4
    assert [row[:3] for row in rows_of(scan)] == [
        (3, "c", "no_text"),
        (4, "d", "no_text"),
        (5, "e", "no_text"),
        (3, "c", "no_text_no_image"),
        (5, "e", "missing_image"),
        (2, "b", "unreadable_image"),
        (4, "d", "near_duplicate_image"),
    ]
    assert rows_of(scan)[-1][3].startswith("like 'a' of row 1, 0 of 64")


@pytest.mark.parametrize("setting", [{"max_distance": 11}, {"workers": 0}])
def test_bad_settings_are_refused(bad, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.*give"):
        scan_notes(read_notes(bad / "notes.csv"), **setting)


def test_command_writes_and_prints_what_it_found(bad, capsys):
    arguments = ["--notes", str(bad / "notes.csv"), "--pairs", str(bad / "pairs.csv"), "--output", str(bad / "scan")]
    main([*arguments, "--workers", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["finding", *FINDINGS, "14"]
    assert printed[2].split(maxsplit=5) == [
        "duplicate_id", "2", "22.22%", "of", "notes", "row 4, 'a': first in row 1"
    ]  # fmt: skip
    offenders = load_dataset("parquet", data_files=str(bad / "scan" / "offenders.parquet"), split="train")
    assert offenders.features == Features(
        row=Value("int64"), note_id=Value("string"), finding=Value("string"), detail=Value("string")
    )
    assert len(offenders) == 14
    record = json.loads((bad / "scan" / "scan.json").read_text())
    assert (record["notes"], record["images"], record["pairs"], record["max_distance"]) == (9, 7, 4, 4)
    assert record["findings"]["unknown_note"] == {"count": 3, "share": 0.75}
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--workers", "1", "--strict"])
    assert stopped.value.code == 1


def test_good_notes_pass_the_strict_scan(tmp_path, capsys):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "notes.csv").write_text("note_id,title,image\na,A,a.png\nb,B,\n", encoding="utf-8")
    main(["--notes", str(tmp_path / "notes.csv"), "--output", str(tmp_path / "scan"), "--strict", "--workers", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert all(line.split()[1] == "0" and line.endswith("-") for line in printed[1:-1])
    assert json.loads((tmp_path / "scan" / "scan.json").read_text())["findings"]["no_text"] == {"count": 0, "share": 0}


def test_a_table_without_rows_is_scanned(tmp_path):
    (tmp_path / "notes.csv").write_text("note_id,title\n", encoding="utf-8")
    scan = scan_notes(read_notes(tmp_path / "notes.csv"), workers=1)
    assert scan.totals == {"notes": 0, "images": 0}
    assert not any(scan.counts.values()) and scan.share("no_text") is None


def test_a_table_that_cannot_be_read_ends_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--notes", str(tmp_path / "notes.csv"), "--output", str(tmp_path / "scan")])
    assert stopped.value.code == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_without_imagehash_the_command_says_what_to_install(bad):
    """In a process of its own: the absence must not show before the command has a parser to say it with."""
    code = "import sys; sys.modules['imagehash'] = None; from pairs.scan import main; main()"
    arguments = ["--notes", str(bad / "notes.csv"), "--output", str(bad / "scan"), "--workers", "1"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and not (bad / "scan").exists()
    assert ended.stderr.splitlines()[-1].startswith(
        "python -m pairs.scan: error: perceptual hashes need imagehash: pip install 'notellm2[scan]'"
    )
