"""Downloads: resumed, verified, unpacked, and said in one line where they fail."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from locallearn import UserError
from locallearn.cli import main
from locallearn.cli.console import PlainObserver, TerminalObserver
from locallearn.data import disk, download, tiny_imagenet
from locallearn.data.disk import check_space
from locallearn.data.download import Archive, fetch, provide, unpack
from locallearn.data.listening import Work, readable_size

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(download, "_BLOCK", 10_000)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- fetching -----------------------------------------------------------------------------------


def test_a_file_is_fetched_verified_and_then_left_alone(server, listener, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    directory = tmp_path / "new" / "place"
    path = fetch(archive, directory, listener)
    assert path.read_bytes() == CONTENT
    assert names(directory) == ["a.zip", "a.zip.verified"]
    assert listener.verbs == ["downloading", "checking"]
    assert listener.errors == [None, None]
    work = listener.works[0]
    assert (work.origin, work.target, work.total) == (archive.url, directory, 300_000)
    assert listener.done[0] == list(range(0, 300_001, 10_000))
    assert fetch(archive, directory, listener) == path
    assert len(listener.works) == 2  # not hashed again
    assert server.asked == [("/a.zip", None)]
    os.utime(path, ns=(1, 1))
    fetch(archive, directory, listener)  # but a file that was touched is
    assert listener.verbs == ["downloading", "checking", "checking"]


def test_ctrl_c_leaves_a_part_that_is_resumed(server, listener, interrupting, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    interrupted = interrupting("downloading", 100_000)
    with pytest.raises(KeyboardInterrupt):
        fetch(archive, tmp_path, interrupted)
    assert [type(error) for error in interrupted.errors] == [KeyboardInterrupt]
    assert names(tmp_path) == ["a.zip.part"]
    assert (tmp_path / "a.zip.part").stat().st_size == 100_000
    assert fetch(archive, tmp_path, listener).read_bytes() == CONTENT
    assert server.asked == [("/a.zip", None), ("/a.zip", "bytes=100000-")]
    assert listener.works[0].begun == listener.done[0][0] == 100_000


def test_a_connection_that_breaks_is_made_again(server, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    server.breaks = [70_000, 0, 0, 100_000, 5, 0]
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    starts = [wanted and int(wanted[6:-1]) for _, wanted in server.asked]
    assert starts == [None, 70_000, 70_000, 70_000, 170_000, 170_005, 170_005]


def test_a_server_without_ranges_is_asked_for_all_of_it_again(server, tmp_path, listener) -> None:
    archive = server.archive("a.zip", CONTENT)
    server.has_ranges = False
    server.breaks = [70_000]
    assert fetch(archive, tmp_path, listener).read_bytes() == CONTENT
    assert len(server.asked) == 2
    assert listener.done[0][6:10] == [60_000, 70_000, 0, 10_000]


def test_temporary_errors_are_waited_for(server, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    server.statuses = [503, 429]
    assert fetch(archive, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("part", "num_requests"),
    [
        (CONTENT + b"more", 1),  # longer than the file
        (b"x" * 1000, 2),  # of another file: known when all of it is there
        (b"x" * len(CONTENT), 1),
        (CONTENT, 0),  # stopped just before the check
    ],
    ids=["longer", "other beginning", "other whole", "whole"],
)
def test_a_part_of_whatever_kind(server, tmp_path, part: bytes, num_requests: int) -> None:
    archive = server.archive("a.zip", CONTENT)
    (tmp_path / "a.zip.part").write_bytes(part)
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == num_requests
    assert names(tmp_path) == ["a.zip", "a.zip.verified"]


def test_a_part_longer_than_what_the_server_has(server, tmp_path) -> None:
    archive = Archive(server.archive("a.zip", CONTENT).url, 400_000, "0" * 32)
    (tmp_path / "a.zip.part").write_bytes(b"x" * 350_000)
    with pytest.raises(UserError, match=r"has 300,000 bytes, expected 400,000"):
        fetch(archive, tmp_path)


def test_other_bytes_are_not_kept(server, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    server.files["/a.zip"] = b"x" * len(CONTENT)
    with pytest.raises(UserError, match=r"has the md5") as error:
        fetch(archive, tmp_path / "new")
    line = one_line(error)
    assert re.search(
        r"^a.zip as downloaded from http://\S+/a.zip has the md5 \w{32}, expected \w{32}: it was "
        r"changed there or on the way, and was removed. Try again, or put the right file into "
        r"\S+/new by hand.$",
        line,
    )
    assert archive.md5 in line
    assert names(tmp_path) == []


def test_a_login_page_destroys_nothing(server, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:1000])
    server.files["/a.zip"] = b"<html>Please log in</html>" * 100
    server.has_ranges = False
    with pytest.raises(UserError, match=r"has 2,600 bytes, expected 300,000 bytes: .*login"):
        fetch(archive, tmp_path)
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:1000]


def test_a_login_page_of_unknown_length_destroys_nothing(server, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:1000])
    server.login_page = b"<html>Please log in</html>" * 100
    with pytest.raises(UserError, match=r"has a web page, expected 300,000 .*login page") as error:
        fetch(archive, tmp_path)
    one_line(error)
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:1000]
    with pytest.raises(UserError, match="a web page"):
        fetch(archive, tmp_path / "new")
    assert names(tmp_path) == ["a.zip.part"]
    server.login_page = b""
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("/a.zip", "bytes=1000-")


def test_a_server_that_stalls_is_left(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.2)
    archive = server.archive("a.zip", CONTENT)
    server.stalls = 1
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/a.zip", None), ("/a.zip", "bytes=150000-")]
    server.stalls = 100
    with pytest.raises(UserError, match=r"can't be downloaded from \S+ \(timed out\)\. Connect to"):
        fetch(archive, tmp_path / "new")
    assert (tmp_path / "new" / "a.zip.part").stat().st_size == 150_000


def test_a_redirection_that_leads_nowhere_is_one_line(server, tmp_path) -> None:
    server.statuses = [302] * 20
    archive = server.archive("a.zip", CONTENT)
    with pytest.raises(UserError, match=r"\(HTTP 302 ") as error:
        fetch(archive, tmp_path)
    one_line(error)


def test_without_a_checksum_nothing_is_resumed(server, tmp_path) -> None:
    archive = server.archive("a.txt", CONTENT, md5=None)
    for part in (b"x" * 1000, b"x" * len(CONTENT)):
        (tmp_path / "a.txt.part").write_bytes(part)
        assert fetch(archive, tmp_path).read_bytes() == CONTENT
        (tmp_path / "a.txt").unlink()
    assert server.asked == [("/a.txt", None)] * 2


def test_a_damaged_stamp_is_made_anew(server, tmp_path, listener) -> None:
    archive = server.archive("a.zip", CONTENT)
    fetch(archive, tmp_path)
    (tmp_path / "a.zip.verified").write_bytes(b"\xff\xfe\x80")
    for _ in range(2):
        fetch(archive, tmp_path, listener)
    assert listener.verbs == ["checking"]


def test_no_network_is_one_line_and_leaves_nothing(server, tmp_path, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    archive = Archive(f"http://127.0.0.1:{port}/a.zip", 300_000_000, "0" * 32)
    monkeypatch.setattr(download, "_WAITS_SECONDS", (100.0,))  # it is said at once
    with pytest.raises(UserError) as error:
        fetch(archive, tmp_path / "new" / "place")
    assert re.fullmatch(
        rf"a.zip \(286.1 MiB\) can't be downloaded from http://127.0.0.1:{port}/a.zip \(Connection "
        rf"refused\). Connect to the network, or put the file into \S+/new/place by hand.",
        one_line(error),
    )
    assert names(tmp_path) == []


def test_a_file_that_is_gone(server, tmp_path) -> None:
    archive = Archive(f"{server.url}/gone.zip", 10, "0" * 32)
    with pytest.raises(UserError, match=r"can't be downloaded from .*gone.zip \(HTTP 404 Not Fou"):
        fetch(archive, tmp_path)
    assert len(server.asked) == 1
    assert names(tmp_path) == []


def test_a_network_that_fails_for_good_keeps_what_came(server, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    server.breaks = [70_000, *[0] * 20]
    with pytest.raises(UserError, match=r"ended after 70,000 bytes.* What has come \(68 KiB\) is"):
        fetch(archive, tmp_path)
    assert len(server.asked) == 4
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:70_000]


def test_a_file_put_there_by_hand_is_verified_once(server, tmp_path, listener) -> None:
    archive = server.archive("a.zip", CONTENT)
    path = tmp_path / "a.zip"
    path.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(UserError, match=rf"a.zip has the md5 \w+, expected {archive.md5}: .*Remov"):
        fetch(archive, tmp_path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"has 299,999 bytes, expected 300,000: .*Remove it"):
        fetch(archive, tmp_path)
    path.write_bytes(CONTENT)
    for _ in range(2):
        assert fetch(archive, tmp_path, listener) == path
    assert listener.verbs == ["checking"]
    assert server.asked == []


def test_two_processes_at_one_download(server, tmp_path) -> None:
    archive = server.archive("a.zip", CONTENT)
    with open(tmp_path / "a.zip.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"a.zip.part is being downloaded by another process"):
            fetch(archive, tmp_path)
        assert names(tmp_path) == ["a.zip.part"]  # the other's, though it is empty still


def test_a_disk_that_fills_up_is_named(server, tmp_path, make_zip, make_listener) -> None:
    def fill(work: Work, done: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = server.archive("a.zip", make_zip(FILES))
    with pytest.raises(OSError, match=r"No space left on device: '.*/a.zip.part'"):
        fetch(archive, tmp_path, make_listener(fill))
    fetch(archive, tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        unpack(tmp_path / "a.zip", "a", make_listener(fill))
    assert names(tmp_path) == ["a.zip", "a.zip.verified"]


def test_disk_space_is_looked_at_first(server, tmp_path, monkeypatch) -> None:
    archive = server.archive("a.zip", CONTENT, folder="a", unpacked_bytes=2**31)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError) as error:
        provide([archive], tmp_path / "new")
    assert re.fullmatch(
        r"a.zip \(download and unpacked\) needs 2.0 GiB in \S+/new, where 1.0 MiB are free. Free "
        r"some space, or choose a directory on another disk.",
        one_line(error),
    )
    assert server.asked == []
    assert names(tmp_path) == []
    check_space(tmp_path / "new", 2**20, "what just fits")


def test_a_drive_that_is_not_there_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as below Z: on Windows
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.stat(path / "gone"))
    with pytest.raises(FileNotFoundError):
        check_space(tmp_path, 1, "anything")


def test_sizes_for_people() -> None:
    sizes = [readable_size(n) for n in (0, 54_864, 248_100_043, 13_510_573_713)]
    assert sizes == ["0 KiB", "54 KiB", "236.6 MiB", "12.6 GiB"]


# -- unpacking ----------------------------------------------------------------------------------


FILES = {"a/one.txt": b"1" * 1000, "a/b/two.txt": b"2" * 5000, "else/three.txt": b"3"}


def test_a_folder_is_provided_once(server, tmp_path, listener, make_zip) -> None:
    archive = server.archive("a.zip", make_zip(FILES), folder="a")
    plain = server.archive("ids.txt", b"1\n2\n", md5=None)
    for _ in range(2):
        folder, ids = provide([archive, plain], tmp_path, listener)
        assert (folder / "b" / "two.txt").read_bytes() == FILES["a/b/two.txt"]
        assert ids.read_bytes() == b"1\n2\n"
    assert names(tmp_path) == ["a", "a.zip", "a.zip.verified", "ids.txt", "ids.txt.verified"]
    assert listener.verbs == ["downloading", "checking", "unpacking", "downloading"]
    assert listener.done[2] == [1000, 6000]
    (tmp_path / "a.zip").unlink()
    provide([archive], tmp_path)  # the archive may go once it is unpacked
    assert len(server.asked) == 2


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a\\..\\evil", "C:/evil"])
def test_paths_that_leave_the_directory(tmp_path, make_zip, name: str) -> None:
    place = tmp_path / "inner" / "place"
    place.mkdir(parents=True)
    (place / "a.zip").write_bytes(make_zip({"a/good": b"1", name: b"evil"}))
    with pytest.raises(UserError, match=r"a.zip holds '.*', which leads out of the directory"):
        unpack(place / "a.zip", "a")
    assert names(place) == ["a.zip"]
    assert names(tmp_path) == ["inner"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no zip", "empty"])
def test_broken_archives(tmp_path, make_zip, damage: str) -> None:
    content = bytearray(make_zip({"a/noise": CONTENT}))
    if damage == "flipped":
        content[100_000] ^= 0xFF
    content = {"truncated": content[:-100], "no zip": b"hello", "empty": b""}.get(damage, content)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"a.zip can't be unpacked \(.*\). Remove it, and") as error:
        unpack(tmp_path / "a.zip", "a")
    one_line(error)
    assert names(tmp_path) == ["a.zip"]


def test_an_archive_of_something_else(tmp_path, make_zip) -> None:
    (tmp_path / "a.zip").write_bytes(make_zip({"b/one": b"1"}))
    with pytest.raises(UserError, match=r"a.zip holds no a/; it is not the published file"):
        unpack(tmp_path / "a.zip", "a")


def test_unpacking_that_is_interrupted_leaves_nothing(tmp_path, make_zip, interrupting) -> None:
    (tmp_path / "a.zip").write_bytes(make_zip(FILES))
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "a.zip", "a", interrupting("unpacking", 1000))
    assert names(tmp_path) == ["a.zip"]
    (tmp_path / ".a.unpacking" / "a").mkdir(parents=True)  # as a kill leaves it
    (tmp_path / ".a.unpacking" / "a" / "stale").write_text("old")
    unpack(tmp_path / "a.zip", "a")
    assert names(tmp_path) == ["a", "a.zip"]
    assert names(tmp_path / "a") == ["b", "one.txt"]


def test_two_processes_at_one_archive(tmp_path, make_zip) -> None:
    (tmp_path / "a.zip").write_bytes(make_zip(FILES))
    with open(tmp_path / "a.zip", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"a.zip is being unpacked by another process"):
            unpack(tmp_path / "a.zip", "a")


@pytest.mark.parametrize("has_module", [False, True], ids=["Windows", "network file system"])
def test_where_there_are_no_locks(server, tmp_path, make_zip, monkeypatch, has_module) -> None:
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    if not has_module:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    archive = server.archive("a.zip", make_zip(FILES), folder="a")
    (folder,) = provide([archive], tmp_path)
    assert names(folder) == ["b", "one.txt"]
    with open(tmp_path / "a.zip", "rb") as file:
        assert disk.lock(file) is None


# -- what the user sees -------------------------------------------------------------------------


def test_the_command_line_says_what_it_downloads(
    server, tmp_path, capsys, monkeypatch, make_zip, tiny_files
) -> None:
    content = make_zip(tiny_files)
    archive = server.archive("tiny-imagenet-200.zip", content, folder="tiny-imagenet-200")
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE", archive)
    monkeypatch.chdir(tmp_path)
    common = ["train", "--dataset", "tiny-imagenet", "--epochs", "1", "--batch-size", "4"]
    assert main([*common, "--data-dir", "data", "--cache", "cache", "--out", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = tmp_path / "data"
    size = readable_size(len(content))
    assert lines[:4] == [
        f"downloading tiny-imagenet-200.zip ({size}) from {archive.url} to {place}",
        f"checking tiny-imagenet-200.zip ({size})",
        f"unpacking tiny-imagenet-200.zip ({readable_size(sum(map(len, tiny_files.values())))}) "
        f"to {place}/tiny-imagenet-200",
        f"decoding 15 images (180 KiB) to {tmp_path}/cache",
    ]
    assert lines[4].startswith("data     tiny-imagenet: 12 training images, 3 test images")
    assert main(["evaluate", "run"]) == 0
    assert capsys.readouterr().out.startswith("run/model.safetensors: accuracy ")

    server.files.clear()
    code = main([*common, "--data-dir", "elsewhere", "--quiet"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert re.fullmatch(
        rf"Error: tiny-imagenet-200.zip \({size}\) can't be downloaded from \S+ \(HTTP 404 Not "
        rf"Found\). Connect to the network, or put the file into \S+/elsewhere by hand.\n",
        captured.err,
    )
    assert not Path("elsewhere").exists()


def test_ctrl_c_says_that_the_download_goes_on(tmp_path, capsys) -> None:
    observer = PlainObserver()
    for verb in ("downloading", "unpacking"):
        observer.on_work(Work(verb, "a.zip", "bytes", 10))
        observer.on_work_end(KeyboardInterrupt())
    assert capsys.readouterr().out.splitlines() == [
        "downloading a.zip (0 KiB)",
        "stopped: what has come is kept, and the next start goes on from there",
        "unpacking a.zip (0 KiB)",
    ]


def test_the_terminal_shows_a_bar(tmp_path) -> None:
    text = io.StringIO()
    observer = TerminalObserver(Console(file=text, force_terminal=True, width=120))
    work = Work("downloading", "a.zip", "bytes", 2**20, 2**19, "http://x/a.zip", tmp_path)
    observer.on_work(work)
    observer._last = 0.0
    observer.on_work_progress(2**20)
    observer.on_work_end(None)
    shown = text.getvalue()
    assert "downloading a.zip (1.0 MiB) from http://x/a.zip to " in shown
    assert ", 512 KiB of it there already" in shown
    assert "1.0/1.0 MiB" in shown
    observer.on_work(Work("decoding", "10 images", "images", 10))
    observer.on_work_end(KeyboardInterrupt())
    assert "decoding 10 images" in text.getvalue()
