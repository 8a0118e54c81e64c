"""Tar archives on remote storage: the same clips as on this machine, few requests, errors that name it."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import threading

import pytest
import torch

from sat_train.config.shapes import ClipShape
from sat_train.data.buckets import SampleSpec
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import open_clip, open_part
from sat_train.data.clips.remote import make_path, public_url
from sat_train.data.inspect import inspect_clips
from sat_train.data.prepass import look_at
from sat_train.data.sources.archive_index import index_archives
from sat_train.data.sources.read import read_source
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.key import Origin
from sat_train.encoding.cache.prune import Staleness
from sat_train.encoding.cache.shards import EntryInfo
from sat_train.errors import DataError
from tests.unit.data.sources.test_archives import read_right
from tests.unit.data.sources.web_server import serve
from tests.unit.data.test_dataset import make
from tests.unit.data.test_loader import make_loader, take
from tests.unit.data.videos import write_numbered
from tests.unit.encoding.cache.samples import open_dataset, read

pytest.importorskip("upath")
fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds at 30 frames a second, as bytes."""
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    write_numbered(path, num_frames=60, rate=30)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Gives indices a folder of the test's own, empties the memory file system, and shortens pauses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr("sat_train.data.clips.remote._WAITS_S", (0.01, 0.03, 0.09))
    fsspec.filesystem("memory").store.clear()
    return tmp_path / "caches"


@pytest.fixture
def web():
    pytest.importorskip("aiohttp")
    with serve() as server:
        yield server


def members(clip, *names):
    return {f"{name}{end}": data for name in names for end, data in ((".mp4", clip), (".txt", name.encode()))}


def packed(files):
    """Returns a tar archive as bytes."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def two_archives(clip):
    long_name = "folder/" + "n" * 150  # needs a PAX header
    caption = json.dumps({"caption": "of b"}).encode()
    return {
        "0.tar": packed({**members(clip, "a", long_name), "readme.md": b"x"}),
        "1.tar": packed({"b.mp4": clip, "b.json": caption}),
    }


def put(place, files):
    """Writes archives to a folder of this machine or of the memory file system."""
    for name, data in files.items():
        if str(place).startswith("memory://"):
            fsspec.filesystem("memory").pipe(f"{place}/{name}", data)
        else:
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(data)


def told(source):
    return [(record.clip_id, record.captions, record.span) for record in source.records]


def test_a_set_is_the_same_wherever_it_is_stored(tmp_path, clip, web):
    archives = two_archives(clip)
    put(tmp_path / "set", archives)
    put("memory://set", archives)
    web.files = {f"set/{name}": data for name, data in archives.items()}
    local = read_source(tmp_path / "set")
    assert len(local) == 3
    entries = ["memory://set", f"{web.url}/set", f"{web.url}/set/{{0..1}}.tar", f"file://{tmp_path}/set"]
    for entry in (*entries, "memory://set/*.tar", f"{web.url}/set/*.tar"):
        source = read_source(entry)
        assert told(source) == told(local)
        assert (source.fingerprint, source.ignored) == (local.fingerprint, local.ignored)
        read_right(source)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_files_on_a_server(tmp_path, clip, web, workers):
    """The parent has used its connection before it forks; workers must not wait for it or break it."""
    archives = {"0.tar": packed(members(clip, *"abcdef"))}
    put(tmp_path / "set", archives)
    web.files = archives
    batches = {}
    for entry in (f"{web.url}/0.tar", str(tmp_path / "set")):
        source = read_source(entry)
        loader = make_loader(
            make(pickle.loads(pickle.dumps(source.records))), num_workers=workers, batch_size=2
        )
        batches[entry] = take(loader, 6)
        assert loader.failures.by_clip == {}
        assert read_source(entry).fingerprint == source.fingerprint
    for remote, local in zip(*batches.values(), strict=True):
        assert remote.clip_ids == local.clip_ids
        for ours, theirs in zip(remote.samples, local.samples, strict=True):
            assert torch.equal(ours.video_tchw, theirs.video_tchw)


def test_indexing_reads_headers_and_captions_only(web):
    large = os.urandom(1 << 20)
    web.files = {"a.tar": packed(members(large, *(f"{i:02d}" for i in range(20))))}
    source = read_source(f"{web.url}/a.tar")
    assert [record.captions for record in source.records] == [(f"{i:02d}",) for i in range(20)]
    requests, num_bytes = web.take()
    assert requests <= 2 * 20 + 2
    assert num_bytes <= 0.07 * len(web.files["a.tar"])


def test_a_clip_is_read_without_its_neighbours(clip, web):
    web.files = {"a.tar": packed(members(clip, *"abc"))}
    record = read_source(f"{web.url}/a.tar").clip(1)
    web.take()
    with open_clip(record.path, span=record.span) as (container, stream):
        assert sum(1 for _ in container.decode(stream)) == 60
    assert web.take() == (1, len(clip))


def test_the_index_of_a_remote_archive_is_remembered_until_it_changes(clip, web, home):
    web.files = {"a.tar": packed(members(clip, "a", "b"))}
    first = read_source(f"{web.url}/a.tar")
    web.take()
    again = read_source(f"{web.url}/a.tar")
    assert web.take() == (0, 0)
    assert (told(again), again.fingerprint) == (told(first), first.fingerprint)
    web.files = {"a.tar": packed(members(clip, "a", "c"))}  # of the same size
    assert [record.captions for record in read_source(f"{web.url}/a.tar").records] == [("a",), ("c",)]
    assert len(list(home.rglob("*.json"))) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "text"])
def test_a_damaged_index_is_rebuilt(clip, web, home, damage):
    web.files = {"a.tar": packed(members(clip, "a", "b"))}
    first = read_source(f"{web.url}/a.tar")
    (remembered,) = home.rglob("*.json")
    whole = remembered.read_text()
    remembered.write_text(
        {"cut": whole[:200], "other": "[]", "text": whole.replace('"caption": "b"', '"caption": "x"')}[damage]
    )
    assert told(read_source(f"{web.url}/a.tar")) == told(first)
    assert remembered.read_text() == whole


def test_several_may_remember_at_once(clip, home):
    put("memory://set", {"a.tar": packed(members(clip, *"abc"))})
    result = []
    threads = [
        threading.Thread(target=lambda: result.append(index_archives([make_path("memory://set/a.tar")])))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(result) == 8
    assert all(index == result[0] for index in result)
    assert len(list(home.rglob("*.*"))) == 1


def test_no_index_is_kept_if_changes_are_not_reported(clip, web, home):
    web.files, web.tells_changes = {"a.tar": packed(members(clip, "a"))}, False
    read_source(f"{web.url}/a.tar")
    assert not list(home.rglob("*.json"))


def test_a_home_that_cannot_be_written_stops_nothing(clip, home):
    home.write_text("a file where the folder should be")
    put("memory://set", {"a.tar": packed(members(clip, "a"))})
    assert len(read_source("memory://set/a.tar")) == 1


def test_ranges_lists_and_wildcards_name_archives(tmp_path, clip):
    archives = {f"shard-{i:03d}.tar": packed(members(clip, f"{i}")) for i in range(8, 12)}
    put(tmp_path / "set", archives)
    put("memory://set", archives)
    for root in (tmp_path / "set", "memory://set"):
        assert len(read_source(f"{root}/shard-{{008..011}}.tar")) == 4
        assert len(read_source(f"{root}/shard-{{008,011}}.tar")) == 2
        assert len(read_source(f"{root}/shard-01*.tar")) == 2
        assert len(read_source(f"{root}/shard-{{008..009}}*")) == 2
        with pytest.raises(DataError, match=r"shard-012\.tar: there is no such"):
            read_source(f"{root}/shard-{{008..012}}.tar")
    with pytest.raises(DataError, match="there is no such folder or file"):
        read_source(tmp_path / "set" / "none-*.tar")
    with pytest.raises(DataError, match=r"there is no \.tar archive at this place"):
        read_source("memory://set/none-*.tar")
    (tmp_path / "set" / "list.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"list\.jsonl is neither a \.tar archive"):
        read_source(tmp_path / "set" / "*")


def test_archives_of_one_name_keep_their_clips_apart(tmp_path, clip):
    for root in (tmp_path / "set", "memory://set"):
        for folder in "xy":
            if root != "memory://set":
                (root / folder).mkdir(parents=True)
            put(
                root / folder if root != "memory://set" else f"{root}/{folder}",
                {"0.tar": packed(members(clip, "a"))},
            )
        names = [record.clip_id for record in read_source(f"{root}/*/0.tar").records]
        assert names == ["x/0.tar/a.mp4", "y/0.tar/a.mp4"]


def test_errors_of_a_server_pass_or_are_counted(clip, web):
    web.files = {"a.tar": packed(members(clip, *"abcdefgh"))}
    web.num_failures = 2
    source = read_source(f"{web.url}/a.tar")
    bad = source.clip(3)
    web.broken = {"a.tar": range(bad.span.offset, bad.span.offset + bad.span.size)}
    with pytest.raises(BadClip, match=r"unreadable: .*500"), open_clip(bad.path, span=bad.span):
        pass
    loader = make_loader(make(source.records), num_workers=1, batch_size=1, allowed=0.5)
    batches = take(loader, 8)
    assert list(loader.failures.by_clip) == ["a.tar/d.mp4"]
    assert [failure.cause for failure in loader.failures.by_clip.values()] == ["unreadable"]
    assert len(batches) == 8
    web.files.clear()
    with pytest.raises(BadClip, match="missing: "), open_clip(bad.path, span=bad.span):
        pass


def test_an_error_in_the_middle_of_a_clip_is_no_damage(tmp_path, web):
    path = tmp_path / "long.mov"
    write_numbered(path, side=256, codec="rawvideo", pix_fmt="rgb24", index_first=True)
    data = path.read_bytes()
    assert len(data) > 8 << 20
    web.files = {"a.tar": packed({"a.mov": data, "a.txt": b"x", "b.mov": data, "b.txt": b"x"})}
    source = read_source(f"{web.url}/a.tar")
    begin = source.clip(0).span.offset
    web.broken = {"a.tar": range(begin + (2 << 20), begin + len(data))}
    options = {"identity": "stat", "window": "center", "max_num_frames": 13}
    dataset = open_dataset(tmp_path / "cache", source.records, **options)
    failures = {(f.clip_id, f.cause, f.may_pass) for index in range(2) for f in read(dataset, index).failures}
    # What may pass is not kept in the cache as a clip that cannot be decoded.
    assert failures == {("a.tar/a.mov", "unreadable", True)}
    with (
        pytest.raises(BadClip, match=r"unreadable: .*500"),
        open_clip(source.clip(0).path, span=source.clip(0).span) as (container, stream),
    ):
        list(container.demux(stream))


def test_archives_that_cannot_be_indexed_are_named(clip, web):
    whole = packed(members(clip, "a", "b"))
    web.files = {"cut.tar": whole[: len(clip) // 2], "small.tar.gz": b"x", "packed.tar": b"\x1f\x8b" * 600}
    for name in ("cut.tar", "packed.tar"):
        with pytest.raises(DataError, match=rf"{name}: this archive cannot be read"):
            read_source(f"{web.url}/{name}")
    for name in ("small.tar.gz", "clips.jsonl"):
        with pytest.raises(DataError, match=r"remote files are read from \.tar archives only"):
            read_source(f"{web.url}/{name}")
    with pytest.raises(DataError, match=r"gone\.tar: there is no such archive"):
        read_source(f"{web.url}/gone.tar")
    web.num_failures = 1000
    with pytest.raises(DataError, match=r"cut\.tar: this archive cannot be read: .*503"):
        read_source(f"{web.url}/cut.tar")


def test_a_server_without_parts_is_refused_before_it_sends_everything(web):
    web.files, web.serves_parts = {"a.tar": packed(members(os.urandom(1 << 20), *"abcd"))}, False
    with pytest.raises(DataError, match=r"a\.tar: this archive cannot be read: .*support range"):
        read_source(f"{web.url}/a.tar")


def test_only_plain_protocols_are_read(tmp_path):
    with pytest.raises(DataError, match="chained protocols"):
        read_source("simplecache::https://127.0.0.1/a.tar")
    with pytest.raises(DataError, match="chained protocols"):
        read_source("zip://a.tar::file:///a.zip")
    with pytest.raises(DataError, match="there is no protocol `nonsense`"):
        read_source("nonsense://a.tar")
    table = tmp_path / "clips.jsonl"
    rows = [
        {"video": "s3://b/a.mp4", "caption": "x"},
        {"video": "a.mp4", "image": "s3://b/a.png", "caption": "x"},
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        read_source(table)
    text = str(caught.value)
    assert "2 of 2 rows cannot be used" in text
    assert "clips.jsonl:1: column `video`: remote files are read from .tar archives only" in text
    assert "clips.jsonl:2: column `image`: remote files are read from .tar archives only" in text


@pytest.mark.skipif(bool(__import__("importlib.util").util.find_spec("s3fs")), reason="s3fs is installed")
def test_a_missing_package_is_named():
    with pytest.raises(DataError, match="pip install s3fs"):
        read_source("s3://bucket/a.tar")


@pytest.mark.parametrize("identity", ["content", "stat"])
def test_the_cache_knows_a_remote_file_that_changed(tmp_path, clip, web, identity):
    other = clip[:-1] + bytes([clip[-1] ^ 1])
    web.files = {"a.tar": packed(members(clip, "a", "b"))}
    record = read_source(f"{web.url}/a.tar").clip(0)
    file_metadata = FileMetadata(tmp_path / "cache", identity=identity)
    before = file_metadata.origin(record.path, record.span)
    info = file_metadata.info(record.path, record.span)
    web.take()
    assert file_metadata.origin(record.path, record.span) == before
    assert file_metadata.info(record.path, record.span) == info
    assert web.take() == (0, 0)
    file_metadata.publish()
    assert FileMetadata(tmp_path / "cache", identity=identity).origin(record.path, record.span) == before
    assert web.take() == (0, 0)
    web.files = {"a.tar": packed({**members(other, "a"), **members(clip, "b")})}
    assert file_metadata.origin(record.path, record.span).identity != before.identity


def test_what_was_made_of_a_remote_file_is_stale_when_that_changes(tmp_path, clip, web):
    web.files = {"a.tar": packed(members(clip, "a"))}
    record = read_source(f"{web.url}/a.tar").clip(0)
    file_metadata = FileMetadata(tmp_path / "cache")
    origin = file_metadata.origin(record.path, record.span)
    assert isinstance(origin, Origin)

    def reason():
        info = EntryInfo("clip", "a", "", origin)
        return Staleness(file_metadata, drop_gone=True, asks_remote=True).reason("key", info)

    assert reason() == ""
    web.num_failures = 1000
    assert reason() == ""  # a server that does not answer has lost nothing
    web.num_failures = 0
    web.files = {"a.tar": packed(members(clip, "b"))}
    assert reason() == "file changed"
    web.files = {}
    assert reason() == "file gone"


def test_remote_clips_are_inspected(tmp_path, clip, web):
    web.files = {"a.tar": packed(members(clip, "a", "b"))}
    wanted = SampleSpec((ClipShape(5, 32, 32),), fps=8, max_upscale=4)
    put(tmp_path / "set", web.files)
    remote = inspect_clips(read_source(f"{web.url}/a.tar").records, wanted, num_processes=2)
    local = inspect_clips(read_source(tmp_path / "set").records, wanted, num_processes=1)
    assert [(c.info, c.content_key, c.thumbnail) for c in remote] == [
        (c.info, c.content_key, c.thumbnail) for c in local
    ]
    assert remote[0].problem is None


def test_an_archive_is_asked_about_once_for_all_its_clips(tmp_path, clip, web):
    web.files = {"a.tar": packed(members(clip, "a", "b", "c"))}
    records = read_source(f"{web.url}/a.tar").records
    file_metadata = FileMetadata(tmp_path / "cache")
    first = look_at(records, file_metadata, with_turn=False, timeout_s=60)
    web.requests.clear()
    assert look_at(records, file_metadata, with_turn=False, timeout_s=60) == first
    assert [method for method, _, _ in web.requests] == ["HEAD"]


def test_a_part_of_a_remote_file_is_a_file(web):
    web.files = {"a.bin": os.urandom(100_000)}
    data = web.files["a.bin"]
    from sat_train.data.clips.clip_file import Span

    with open_part(make_path(f"{web.url}/a.bin"), Span(10_000, 70_000), block_bytes=4096) as file:
        for begin, count in ((0, 10), (4090, 20), (69_990, 100), (5, 20_000), (0, -1), (80_000, 5)):
            file.seek(begin)
            expected = data[10_000:80_000][begin:]
            assert file.read(count) == (expected if count < 0 else expected[:count])


SECRETS = ("hunter2", "AKIA1", "s1gnature")


@pytest.mark.parametrize(
    "text",
    [
        "https://me:hunter2@host/set/a.tar",
        "https://host/a.tar?key=AKIA1&sig=s1gnature",
        "ClientResponseError: 403, url=URL('https://me:hunter2@host/a.tar?sig=s1gnature')",
        "ftp://me:hunter2@host/a.tar and https://AKIA1@host/b.tar?x=s1gnature",
    ],
)
def test_passwords_and_signatures_are_not_shown(text):
    url = public_url(text)
    assert not any(secret in url for secret in SECRETS)
    assert "host/" in url
    assert public_url("s3://bucket/shard-?.tar") == "s3://bucket/shard-?.tar"


def test_a_remote_set_is_named_without_its_secrets(clip, web, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    web.files = {"a.tar?sig=s1gnature": packed(members(clip, "a"))}
    source = read_source(f"{web.url}/a.tar?sig=s1gnature")
    assert source.name == f"{web.url}/a.tar?***"
    with pytest.raises(DataError) as caught:
        read_source(f"{web.url}/gone.tar?sig=s1gnature")
    assert "s1gnature" not in str(caught.value)
    kept = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    assert "s1gnature" not in kept
