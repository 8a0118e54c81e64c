"""What a stranger's data can do: be refused by name, quickly, without crash, link or memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile

import pytest

from sat_train.data.sources.read import read_source
from sat_train.data.sources.records import SourceOptions
from sat_train.errors import DataError
from tests.unit.data.sources.test_archives import pack, save_dataset
from tests.unit.data.sources.test_sources import place

pytestmark = pytest.mark.timeout(300)
HUGE = 20 << 30


def sparse(path, size=HUGE, head=b""):
    """Makes a file that takes no place and claims 20 GB."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def pipe(path):
    os.mkfifo(path)
    return path


def refused(path, match, options=None):
    with pytest.raises(DataError, match=match) as caught:
        read_source(path, options or SourceOptions())
    assert str(path) in str(caught.value)
    return caught.value


def test_captions_are_regular_files_of_a_limited_size(tmp_path):
    place(tmp_path, "videos/a.mp4", "videos/b.mp4", "videos/c.mp4")
    (tmp_path / "labels").mkdir()
    pipe(tmp_path / "labels/a.txt")
    sparse(tmp_path / "labels/b.txt")
    (tmp_path / "labels/c.txt").symlink_to("/dev/zero")
    text = str(refused(tmp_path, "links lead out of this folder"))
    assert "labels/c.txt: leads to /dev/zero" in text
    text = str(refused(tmp_path, "3 of 3 clips", SourceOptions(follow_links=True)))
    assert text.count("is not a regular file") == 2
    assert "labels/b.txt has more than 1,048,576 bytes" in text


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv", "m.tsv", "m.parquet", "m.tar"])
def test_tables_and_archives_are_regular_files_of_a_limited_size(tmp_path, name):
    refused(sparse(tmp_path / name), ".")
    (tmp_path / "folder").mkdir()
    pipe(tmp_path / "folder" / name)
    with pytest.raises(DataError):
        read_source(tmp_path / "folder" / name)


DEEP = "[" * 100_000
LONG = "9" * 5000


ODD_ROWS = [
    ({"video": "a\0.mp4"}, "its name holds a NUL character"),
    ({"video": "x" * 5000}, "its name has 5000 letters"),
    ({"video": "\ud800.mp4"}, "its name is not a line of text"),
    ({"video": "a\n.mp4"}, "its name is not a line of text"),
    ({"video": 5}, "column `video` is not a text"),
    ({"video": ["a.mp4"]}, "column `video` is not a text"),
    ({"caption": {"a": 1}}, "column `caption` is missing or not a text"),
    ({"caption": "\udfff"}, "half a surrogate pair"),
    ({"image": 7}, "column `image` is not a text"),
    ({"image": "i\0.png"}, "its name holds a NUL character"),
    ({"start": True}, "`start` = True is not a number"),
    ({"start": 10**400}, "is not a number"),
    ({"end": float("nan")}, "`end` = nan is not a finite number"),
    ({"weight": -1}, "`weight` = -1 is not a finite number"),
    ({"weight": float("nan")}, "`weight` = nan is not a finite number"),
    ({"weight": float("inf")}, "`weight` = inf is not a finite number"),
    ({"weight": [1]}, "is not a number"),
    (DEEP, "nested too deeply"),
    ('{"video": "a.mp4", "caption": "x", "start": ' + LONG + "}", "digit"),
    ("[]", "expected an object"),
    (b'{"video": "caf\xe9.mp4", "caption": "x"}', "its name is not a line of text in UTF-8"),
]


@pytest.mark.parametrize(("row", "message"), ODD_ROWS)
def test_one_odd_row_is_named_and_left_out_where_that_is_allowed(tmp_path, row, message):
    """As a clip that cannot be decoded: a run of many clips does not end because of one."""
    good = json.dumps({"video": "ok.mp4", "caption": "fine"})
    line = json.dumps({"video": "a.mp4", "caption": "x", **row}) if isinstance(row, dict) else row
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "m.jsonl"
    path.write_bytes(good.encode() + b"\n" + line + b"\n")
    text = str(refused(path, "1 of 2 rows cannot be used"))
    assert f"{path}:2: " in text
    assert message in text
    source = read_source(path, SourceOptions(max_bad_fraction=0.5))
    assert [record.clip_id for record in source.records] == ["ok.mp4"]
    ((name, why),) = source.faults
    assert name == f"{path}:2"
    assert message in why
    assert name in source.left_out()


BROKEN_TABLES = {
    "cell.csv": (b"video,caption\na.mp4,x\nb.mp4," + b"y" * 200_000, r"cell.csv:\d+: field larger"),
    "quote.csv": (b'video,caption\na.mp4,"' + b"y\n" * 100_000, r"quote.csv:\d+: field larger"),
    "utf16.csv": ("video,caption\na.mp4,x\n".encode("utf-16"), "is UTF-16"),
    "latin.csv": (b"video,caption\na.mp4,caf\xe9\n", "half a surrogate pair|is not UTF-8"),
    "long.jsonl": (b" " * (17 << 20), "a line of more than 16 MiB"),
    "deep.json": (DEEP.encode(), "nested too deeply"),
    "digits.json": (LONG.encode(), "digit"),
    "latin.json": (b'[{"video": "a", "caption": "caf\xe9"}]', "UnicodeDecodeError"),
    "noise.parquet": (b"PAR1" + os.urandom(500) + b"PAR1", "parquet table of clips"),
    "empty.parquet": (b"", "parquet table of clips"),
    "empty.json": (b"", "not JSON"),
    "empty.csv": (b"", "no rows"),
}


def test_broken_tables_are_named(tmp_path):
    for name, (content, match) in BROKEN_TABLES.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, match)


def test_parquet_columns_of_other_types_are_refused_by_name(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"video": [b"bytes"], "caption": ["x"], "other": [{"deep": [1]}]})
    parquet.write_table(table, tmp_path / "m.parquet")
    refused(tmp_path / "m.parquet", "column `video` has the type binary")


def arrow_file(tmp_path):
    folder = save_dataset(
        tmp_path / "set", [{"video": f"{i}.mp4", "caption": f"caption {i}"} for i in range(3)]
    )
    return folder, sorted(folder.glob("*.arrow"))[0]


def test_wrong_offsets_in_an_arrow_file_end_no_process(tmp_path):
    """Arrow trusts offsets: read without a check, two changed numbers crash the process."""
    wrong = [[0, 0x7FFFFFF0, 18], [0, -2_000_000_000, 18], [0, 9, 300_000], [9, 0, 18]]
    right = struct.pack("<3i", 0, 9, 18)
    paths = []
    for number, offsets in enumerate(wrong):
        (tmp_path / str(number)).mkdir()
        _, path = arrow_file(tmp_path / str(number))
        content = path.read_bytes()
        assert content.count(right) == 1
        path.write_bytes(content.replace(right, struct.pack("<3i", *offsets)))
        paths.append(path)
    code = (
        "import sys; from sat_train.data.sources.read import read_source\n"
        "from sat_train.errors import DataError\n"
        "for folder in sys.argv[1:]:\n"
        "  try: read_source(folder)\n"
        "  except DataError as error: print(error.problem)"
    )
    command = [sys.executable, "-c", code, *(str(path.parent) for path in paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == list(map(str, paths))


def test_offsets_of_clips_inside_an_arrow_file_are_checked(tmp_path):
    pa = pytest.importorskip("pyarrow")
    schema = pa.schema([("video", pa.binary()), ("caption", pa.string())])
    folder = save_dataset(tmp_path / "set", [{"video": b"x" * 777, "caption": "abc"}] * 2, schema)
    path = sorted(folder.glob("*.arrow"))[0]
    content = path.read_bytes()
    right, wrong = struct.pack("<2i", 0, 777), struct.pack("<2i", 0, 3000)
    head, _, tail = content.rpartition(right)  # the same numbers are a buffer's place in the header
    path.write_bytes(head + wrong + tail)
    refused(folder, "ArrowInvalid")


def test_arrow_files_that_are_no_such_thing_are_named(tmp_path):
    folder, path = arrow_file(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"noise" * 99, whole[: len(whole) // 2], whole[:8] + b"\xff" * 99):
        path.write_bytes(content)
        refused(folder, path.name)
    path.unlink()
    pipe(path)
    refused(folder, "is not a regular file")


STATES = (
    DEEP,
    "[]",
    "{}",
    '{"_data_files": [3]}',
    '{"_data_files": [{"filename": "../x.arrow"}]}',
    "\x00",
    '{"_data_files": [{"filename": "/etc/passwd"}]}',
    '{"_data_files": [{"filename": 5}]}',
)


@pytest.mark.parametrize("state", STATES)
def test_a_damaged_state_of_a_dataset_is_named(tmp_path, state):
    folder, _ = arrow_file(tmp_path)
    (folder / "state.json").write_text(state)
    refused(folder, r"state.json")


def tar_header(name, size, kind):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_headers_of_archives_that_claim_too_much_are_refused(tmp_path):
    sparse(tmp_path / "name.tar", head=tar_header("././@LongLink", HUGE - 4096, tarfile.GNUTYPE_LONGNAME))
    refused(tmp_path / "name.tar", "a header claims a name or text of")
    sparse(tmp_path / "pax.tar", head=tar_header("x", HUGE - 4096, tarfile.XHDTYPE))
    refused(tmp_path / "pax.tar", "a header claims a name or text of")


def pax(path, headers, *, chained=1):
    """Writes an archive whose member has these PAX headers, without a check of their values."""
    records = b""
    for key, value in headers.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + len(str(len(body) + 2))
        records += f"{length}".encode() + body
    block = tar_header("x", len(records), tarfile.XHDTYPE) + records.ljust(512, b"\0")
    path.write_bytes(block * chained + tar_header("a.mp4", 0, tarfile.REGTYPE) + bytes(10240))
    return path


def test_pax_headers_lead_nowhere(tmp_path):
    refused(pax(tmp_path / "chain.tar", {"comment": "x"}, chained=3000), "nested too deeply")
    refused(pax(tmp_path / "back.tar", {"size": "-1536"}), "leads back|cannot be read")
    refused(pax(tmp_path / "sparse.tar", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), ".")
    refused(pax(tmp_path / "map.tar", {"GNU.sparse.map": "0,x", "GNU.sparse.size": "9"}), "cannot be read")


def test_members_that_are_not_read_are_counted(tmp_path):
    pack(tmp_path / "a.tar", {"a.mp4": b"x", "a.txt": b"x", "a.png": b"x", "a.json": b"{}", ".b.mp4": b"x"})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        link = tarfile.TarInfo("l.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = read_source(tmp_path / "a.tar")
    assert source.ignored == ((".json", 1), (".png", 1))
    assert source.notes == (
        "members that are not read: hidden file (1)",
        "members that are not read: link or device (1)",
    )


def test_nothing_outside_a_folder_is_read_through_a_link(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    disk = tmp_path / "disk"
    place(disk, "a.mp4", "folder/b.mp4", "set.tar")
    for number, (link, target) in enumerate(
        {"labels/a.txt": secret, "videos/a.mp4": disk / "a.mp4", "videos/more": disk / "folder",
         "images/a.png": secret, "videos.txt": secret}.items()
    ):  # fmt: skip
        root = tmp_path / f"set{number}"
        place(root, *({"videos/a.mp4", "labels/a.txt"} - {link}))
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(target)
        if link == "videos.txt":
            (root / "labels/a.txt").rename(root / "prompt.txt")
        error = refused(root, "1 links lead out of this folder")
        assert f"{root / link}: leads to {target}" in str(error)
        assert "data.follow_links=true" in error.remedy
    assert len(read_source(tmp_path / "set1", SourceOptions(follow_links=True))) == 1
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/0.tar").symlink_to(disk / "set.tar")
    refused(tmp_path / "tars", "1 links lead out of this folder")
    folder, path = arrow_file(tmp_path / "tars")
    path.rename(disk / "0.arrow")
    path.symlink_to(disk / "0.arrow")
    refused(folder, "1 links lead out of this folder")


def test_links_inside_a_folder_and_the_folder_itself_are_followed(tmp_path):
    place(tmp_path / "real", "store/a.mp4", "store/a.txt", "videos/b.mp4", "labels/b.txt")
    (tmp_path / "real/videos/c.mp4").symlink_to("../store/a.mp4")
    (tmp_path / "real/labels/c.txt").symlink_to("../store/a.txt")
    (tmp_path / "set").symlink_to(tmp_path / "real")
    assert [record.clip_id for record in read_source(tmp_path / "set").records] == [
        "store/a.mp4",
        "videos/b.mp4",
        "videos/c.mp4",
    ]
    place(tmp_path / "own", "videos/b.mp4", "labels/b.txt")
    (record,) = read_source(tmp_path / "own" / "videos").records
    assert record.captions == ("a caption",)  # from labels/, beside the folder that was given
    (tmp_path / "own/labels/b.txt").unlink()
    (tmp_path / "own/labels/b.txt").symlink_to(tmp_path / "real/store/a.txt")
    refused(tmp_path / "own" / "videos", "1 links lead out of this folder")
