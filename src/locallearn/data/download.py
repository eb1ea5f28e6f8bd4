"""Archives from the network: fetched (and resumed), verified, unpacked.

What is incomplete never stands under a name that is used: a download is ``NAME.part`` until its
checksum is right, an archive is unpacked beside its place and renamed when whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from locallearn._version import __version__
from locallearn.data.disk import check_space, naming, only_one
from locallearn.data.listening import SILENT, DataListener, Work, readable_size, telling
from locallearn.errors import UserError

_BLOCK = 1 << 18  # what a connection that stalls may lose of what it brought
_TIMEOUT_SECONDS = 30
# Waits before the next try, after tries in a row that brought nothing new.
_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)
_TEMPORARY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Archive:
    """A file on the network.

    Arguments:
        url: http or https.
        num_bytes: its size.
        md5: its checksum, hexadecimal; None where nobody has published one, and the size alone
            is verified.
        folder: what a zip file unpacks to: every member lies below it. None for a plain file.
        unpacked_bytes: about what ``folder`` takes on disk.
    """

    url: str
    num_bytes: int
    md5: str | None
    folder: str | None = None
    unpacked_bytes: int = 0

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


class _BrokenOffError(Exception):
    """The connection ended before the file did; trying again may help.

    Arguments:
        reason: in a few words.
        has_no_network: whether there was no connection at all.
    """

    def __init__(self, reason: str, *, has_no_network: bool = False) -> None:
        super().__init__(reason)
        self.has_no_network = has_no_network


def provide(
    archives: Sequence[Archive], directory: Path, listener: DataListener = SILENT
) -> list[Path]:
    """Each archive's folder (or the file itself) in ``directory``; fetched where it is not there.

    A folder that is there is taken as it is, and its archive not looked for.

    Raises:
        UserError: as :func:`fetch` and :func:`unpack`; too little disk space for all together.
        OSError: as the file system says.
    """
    targets = [directory / (each.folder or each.name) for each in archives]
    missing = [each for each, path in zip(archives, targets, strict=True) if not path.exists()]
    needed = 0
    for each in missing:
        if not (directory / each.name).exists():
            needed += each.num_bytes - _size(_part(directory / each.name))
        needed += each.unpacked_bytes
    if missing:
        names = ", ".join(each.name for each in missing)
        check_space(directory, needed, f"{names} (download and unpacked)")
    for each, target in zip(archives, targets, strict=True):
        if each.folder is None:
            fetch(each, directory, listener)
        elif not target.exists():
            unpack(fetch(each, directory, listener), each.folder, listener)
    return targets


def fetch(archive: Archive, directory: Path, listener: DataListener = SILENT) -> Path:
    """The archive in ``directory``, downloaded if it is not there, and verified.

    A download that was broken off is resumed where the server allows it. A file is hashed once:
    ``NAME.verified`` beside it remembers size and time of what was.

    Raises:
        UserError: no network, another file at the URL, a checksum that is wrong, another process
            at the same download.
        OSError: as the file system says.
    """
    path = directory / archive.name
    if not path.is_file():
        part = _part(path)
        made = _make_directories(directory)
        try:
            with naming(part):
                _download(archive, part, listener)
        except BaseException:
            for each in made:
                with contextlib.suppress(OSError):  # the part is in it
                    each.rmdir()
            raise
        os.replace(part, path)
        _remember(path, archive)
    elif not _is_remembered(path, archive):
        num_bytes = path.stat().st_size
        if num_bytes != archive.num_bytes:
            raise UserError(
                f"{path} has {num_bytes:,} bytes, expected {archive.num_bytes:,}: it is incomplete "
                f"or another file. Remove it, and it is downloaded anew from {archive.url}."
            )
        found = _md5(path, listener) if archive.md5 is not None else None
        if found != archive.md5:
            raise UserError(
                f"{path} has the md5 {found}, expected {archive.md5}: it is damaged or another "
                f"file. Remove it, and it is downloaded anew from {archive.url}."
            )
        _remember(path, archive)
    return path


def unpack(archive: Path, folder: str, listener: DataListener = SILENT) -> Path:
    """The directory ``folder`` of a zip file, unpacked beside it.

    Raises:
        UserError: a broken archive, one without that folder, one with paths that leave it, too
            little disk space, another process at the same work.
        OSError: as the file system says.
    """
    target = archive.parent / folder
    temporary = archive.parent / f".{folder}.unpacking"
    with open(archive, "rb") as file:
        only_one(file, f"{archive} is being unpacked")
        if target.exists():  # by another process, just now
            return target
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        try:
            with zipfile.ZipFile(file) as content:
                members = _safe_members(content, archive, folder)
                num_bytes = sum(member.file_size for member in members)
                check_space(archive.parent, num_bytes, f"{archive.name} unpacked")
                work = Work("unpacking", archive.name, "bytes", num_bytes, target=target)
                with naming(target), telling(listener, work) as tell:
                    _extract(content, members, temporary, tell)
            os.rename(temporary / folder, target)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,  # zipfile's word for an encrypted member
        ) as error:
            raise UserError(
                f"{archive} can't be unpacked ({error}). Remove it, and it is downloaded anew."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


# -- downloading --------------------------------------------------------------------------------


def _download(archive: Archive, part: Path, listener: DataListener) -> None:
    """Leaves the whole, verified file in ``part``."""
    with open(part, "ab") as file:
        only_one(file, f"{part} is being downloaded")
        with _removed_if_empty(part):
            _complete(archive, part, file, listener)


def _complete(archive: Archive, part: Path, file: IO[bytes], listener: DataListener) -> None:
    """Append to ``file`` what it lacks, and verify it."""
    begun = os.fstat(file.fileno()).st_size
    # Without a checksum nothing would tell the beginning of another file.
    if begun > archive.num_bytes or archive.md5 is None:
        file.truncate(0)
        begun = 0
    if begun == 0:
        check_space(part.parent, archive.num_bytes, archive.name)
    while True:
        _receive_all(archive, part, file, listener)
        found = _md5(part, listener) if archive.md5 is not None else None
        if found == archive.md5:
            return
        file.truncate(0)
        if begun == 0:
            raise UserError(
                f"{archive.name} as downloaded from {archive.url} has the md5 {found}, "
                f"expected {archive.md5}: it was changed there or on the way, and was removed. "
                f"Try again, or put the right file into {part.parent} by hand."
            )
        begun = 0  # what was there before may have been another file's beginning: once more


def _receive_all(archive: Archive, part: Path, file: IO[bytes], listener: DataListener) -> None:
    """Append to ``file`` until it has all bytes, over as many connections as it takes."""
    begun = longest = os.fstat(file.fileno()).st_size
    if begun == archive.num_bytes:
        return
    work = Work(
        "downloading",
        archive.name,
        "bytes",
        archive.num_bytes,
        begun,
        archive.url,
        part.parent,
    )
    with telling(listener, work) as tell:
        waits = iter(_WAITS_SECONDS)
        while True:
            try:
                _receive(archive, file, tell)
                break
            except _BrokenOffError as error:
                size = os.fstat(file.fileno()).st_size
                if size > longest:
                    longest, waits = size, iter(_WAITS_SECONDS)
                wait = next(waits, None)
                # A network that is not there from the start is said at once.
                if wait is None or (error.has_no_network and longest == begun):
                    raise _unreachable(archive, part, str(error), size) from error
                time.sleep(wait)
        file.flush()
        os.fsync(file.fileno())


def _receive(archive: Archive, file: IO[bytes], tell: Callable[[int], None]) -> None:
    """One connection: what it brings is appended to ``file``.

    Raises:
        _BrokenOffError: it ended early, or could not be made.
        UserError: the server has another file, or none.
    """
    have = os.fstat(file.fileno()).st_size
    headers = {"User-Agent": f"locallearn/{__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(archive.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
        if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            file.truncate(0)  # the file there is shorter than what we have of it
            raise _BrokenOffError("the server refused to go on") from error
        reason = " ".join(f"HTTP {status} {error.reason}".split())  # of several lines, at times
        if status in _TEMPORARY_STATUS:
            raise _BrokenOffError(reason) from error
        raise _unreachable(archive, Path(file.name), reason, have) from error
    except (OSError, http.client.HTTPException) as error:
        no_network = isinstance(error, urllib.error.URLError)
        raise _BrokenOffError(_reason(error), has_no_network=no_network) from error
    with response:
        goes_on = have > 0 and _range_start(response) == have
        _check_answer(archive, Path(file.name), response, have if goes_on else 0)
        if not goes_on:
            file.truncate(0)
            have = 0
        tell(have)
        while have < archive.num_bytes:
            try:
                block = response.read(min(_BLOCK, archive.num_bytes - have))
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenOffError(_reason(error)) from error
            if not block:
                raise _BrokenOffError(f"the connection ended after {have:,} bytes")
            file.write(block)
            file.flush()  # so that a kill costs nothing of it
            have += len(block)
            tell(have)


def _check_answer(
    archive: Archive, part: Path, response: http.client.HTTPResponse, start: int
) -> None:
    """Raises UserError where what comes, from byte ``start`` on, can't be the file.

    It is called before anything that has come is given up for it.
    """
    length = response.headers.get("Content-Length", "")
    found = ""
    if response.headers.get_content_type() == "text/html":  # mostly of a length that is not told
        found = "a web page"
    elif length.isdecimal() and start + int(length) != archive.num_bytes:
        found = f"{start + int(length):,} bytes"
    if found:
        raise UserError(
            f"{archive.url} has {found}, expected {archive.num_bytes:,} bytes: the file there was "
            f"replaced, or a login page of the network answered. Connect to the network, or put "
            f"{archive.name} into {part.parent} by hand."
        )


def _range_start(response: http.client.HTTPResponse) -> int | None:
    """Where a partial answer begins, None for a whole one: "Content-Range: bytes 7-99/100" is 7."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return None
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    start = span.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def _unreachable(archive: Archive, part: Path, reason: str, size: int) -> UserError:
    kept = (
        f" What has come ({readable_size(size)}) is kept, and the next start goes on."
        if size
        else ""
    )
    total = readable_size(archive.num_bytes)
    return UserError(
        f"{archive.name} ({total}) can't be downloaded from {archive.url} ({reason}). Connect to "
        f"the network, or put the file into {part.parent} by hand.{kept}"
    )


def _reason(error: Exception) -> str:
    """What a failed connection has to say."""
    cause: Any = error.reason if isinstance(error, urllib.error.URLError) else error
    text = getattr(cause, "strerror", None) or str(cause)
    return text or type(cause).__name__


# -- verifying ----------------------------------------------------------------------------------


def _md5(path: Path, listener: DataListener) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    work = Work("checking", path.name.removesuffix(".part"), "bytes", path.stat().st_size)
    with telling(listener, work) as tell, open(path, "rb") as file:
        done = 0
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            tell(done)
    return digest.hexdigest()


def _stamp(path: Path, archive: Archive) -> str:
    state = path.stat()
    return f"{state.st_size} bytes, mtime {state.st_mtime_ns} ns, md5 {archive.md5}\n"


def _is_remembered(path: Path, archive: Archive) -> bool:
    try:
        return path.with_name(path.name + ".verified").read_text() == _stamp(path, archive)
    except (OSError, ValueError):  # missing, or damaged
        return False


def _remember(path: Path, archive: Archive) -> None:
    # Where it can't be written (a directory of others), the file is hashed each time it is used.
    with contextlib.suppress(OSError):
        path.with_name(path.name + ".verified").write_text(_stamp(path, archive))


# -- unpacking ----------------------------------------------------------------------------------


def _safe_members(content: zipfile.ZipFile, archive: Path, folder: str) -> list[zipfile.ZipInfo]:
    """The members below ``folder``. Raises UserError where one would be written elsewhere."""
    members = []
    for member in content.infolist():
        parts = PurePosixPath(member.filename).parts
        leaves = member.filename.startswith("/") or ".." in parts
        if leaves or any("\\" in part or ":" in part for part in parts):
            raise UserError(
                f"{archive} holds {member.filename!r}, which leads out of the directory it is "
                f"unpacked to; it is not the published file. Remove it."
            )
        if parts[:1] == (folder,) and not member.is_dir():
            members.append(member)
    if not members:
        raise UserError(
            f"{archive} holds no {folder}/; it is not the published file. Remove it, and it is "
            f"downloaded anew."
        )
    return members


def _extract(
    content: zipfile.ZipFile,
    members: Sequence[zipfile.ZipInfo],
    directory: Path,
    tell: Callable[[int], None],
) -> None:
    made: set[Path] = set()
    done = 0
    for member in members:
        path = directory / member.filename
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        with content.open(member) as source, open(path, "wb") as target:
            while block := source.read(_BLOCK):
                target.write(block)
                done += len(block)
                tell(done)


# -- files --------------------------------------------------------------------------------------


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _make_directories(directory: Path) -> list[Path]:
    """Make it and its parents; those that were not there, the deepest first."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


@contextlib.contextmanager
def _removed_if_empty(path: Path) -> Iterator[None]:
    """Within: what fails before it wrote anything leaves no file."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()
        raise
