"""One reader of sources: the files of a folder and of the tars in it, packed by gzip or not.

Endings count in lower case. What is no file to read (a link to nowhere, a hidden file, a device in a tar) is counted,
never passed over in silence.
"""

from __future__ import annotations

import gzip
import io
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_pipelines.errors import DataError
from data_pipelines.raw.report import Tally, printable
from data_pipelines.storage.mapped_files import map_file
from data_pipelines.storage.tar_walk import REGULAR, Member, walk_all

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
GZIP_ENDINGS = (".gz", ".tgz")
NOT_UNPACKED = (
    *(".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4", ".br", ".z", ".zip", ".7z", ".rar"),
    *(".tbz", ".tbz2", ".txz", ".tzst"),
)
DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
SPARSE_LIMIT = 2**30
"""Bytes of a sparse member with its holes: a few bytes of a tar can promise any number of them."""
HOPS = 40
"""Links that are followed, one to the next."""
KINDS = {b"3": "a device", b"4": "a device", b"6": "a pipe", b"V": "a volume's label"}


@dataclass(frozen=True)
class Source:
    """The files that a source consists of, in the order of their names.

    root: the folder that keys are counted from.
    """

    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class RawFile:
    """One file, not read yet.

    where: for messages: its path, or the tar's and its name in there.
    folder: what comes before its name, from the source's folder or in the tar; "" or it ends in a slash.
    name: the last part.
    tar: the tar it is in.
    replaced: whether a later member of its tar has the same name: unpacked, this one would be gone.
    """

    where: str
    folder: str
    name: str
    tar: Path | None
    opened: Callable[[], IO[bytes]]
    replaced: bool = False

    @property
    def key(self) -> str:
        """What the files of a sample share: folder and name up to the first dot."""
        return self.folder + self.name.split(".", 1)[0]

    @property
    def extension(self) -> str:
        """What follows the first dot, in lower case."""
        return self.name.partition(".")[2].lower()

    @property
    def ending(self) -> str:
        """What follows the last dot, with it, in lower case; "" for none."""
        return Path(self.name.lower()).suffix

    @property
    def unpacked_ending(self) -> str:
        """The same of what gzip packed."""
        return Path(self.name.lower().removesuffix(".gz")).suffix

    def open(self) -> IO[bytes]:
        """Its bytes as they are stored. Raises DataError that names the file."""
        try:
            return self.opened()
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read ({error.strerror or error}).") from None

    def read(self) -> bytes:
        """All of them."""
        with self.open() as file:
            try:
                return file.read()
            except OSError as error:
                raise DataError(f"{self.where}: cannot be read ({error.strerror or error}).") from None

    def open_unpacked(self) -> IO[bytes]:
        """Its bytes, unpacked where its name ends in .gz; errors of gzip come while reading (DAMAGED_GZIP)."""
        file = self.open()
        return gzip.open(file, "rb") if self.name.lower().endswith(".gz") else file  # type: ignore[return-value]

    def read_unpacked(self) -> bytes:
        """All of them. Raises DataError for a damaged gzip file."""
        with self.open_unpacked() as file:
            try:
                return file.read()
            except DAMAGED_GZIP as error:
                raise damaged_gzip(self.where, error) from None


def damaged_gzip(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: damaged gzip file ({error}). Copy it again, or leave it out.")


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_ENDINGS)


def find_source(source: Path, out: Path | None = None, left_out: Tally | None = None) -> Source:
    """The files of a folder and its subfolders, or the one file.

    Hidden ones (names that begin with a dot), symbolic links to folders, and what is no file are counted; the output
    folder `out` is none of the source where it lies in it.

    Raises:
        DataError: there is no such file or folder, nothing in it, or a folder in it cannot be read.
    """
    left_out = Tally() if left_out is None else left_out
    if source.is_file():
        return Source(source.parent, (source,))
    if source.exists() and not source.is_dir():
        raise DataError(f"{source}: a pipe, a socket or a device. Save what it gives to a file first.")
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder.")
    own = out.resolve() if out else None
    if source.resolve() == own:
        raise DataError(f"{source}: the same folder as the output folder; choose another --out.")
    found: list[Path] = []
    for folder, folders, files in os.walk(source, onerror=_refuse_folder):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if _is_followed(here / name, own, left_out))
        found += [here / name for name in files if _is_file(here / name, left_out)]
    if not found:
        why = "; ".join(left_out.lines("left out"))
        raise DataError(
            f"{source}: the folder holds no files. Give a folder with text files, or a file. {why}".rstrip()
        )
    return Source(source, tuple(sorted(found)))


def find_files(source: Path, out: Path | None = None) -> list[Path]:
    """The files of `find_source`. Raises DataError as it does."""
    return list(find_source(source, out).files)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}).") from None


def _is_followed(path: Path, own: Path | None, left_out: Tally) -> bool:
    if path.name.startswith("."):
        left_out.add(str(path), "hidden (a name that begins with a dot)")
    elif path.is_symlink():
        if own is None or path.resolve() != own:
            left_out.add(str(path), "links to a folder (not followed)")
    else:
        return own is None or path.resolve() != own
    return False


def _is_file(path: Path, left_out: Tally) -> bool:
    if path.name.startswith("."):
        left_out.add(str(path), "hidden (a name that begins with a dot)")
    elif path.is_file():
        return True
    elif path.is_symlink():
        left_out.add(str(path), "links to nothing, or to no file")
    else:
        left_out.add(str(path), "not a file (a pipe, a socket or a device)")
    return False


def raw_files(path: Path, root: Path, left_out: Tally) -> Iterator[RawFile]:
    """The file itself, or the files in it where it is a tar.

    Raises:
        DataError: a damaged tar or gzip file.
    """
    if is_tar(path):
        yield from _tar_files(path, left_out)
    else:
        folder = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        yield RawFile(
            str(path), "" if folder in ("", ".") else f"{folder}/", path.name, None, lambda: path.open("rb")
        )


def tar_view(path: Path) -> memoryview:
    """All of a tar: a memory map, or in memory where it was packed. Raises DataError."""
    if not path.name.lower().endswith(GZIP_ENDINGS):
        try:
            view = memoryview(map_file(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None
        if view[:2] == b"\x1f\x8b":
            raise DataError(f"{path}: a tar that gzip packed; call it .tar.gz.")
        return view
    try:
        with gzip.open(path, "rb") as file:
            return memoryview(file.read())
    except DAMAGED_GZIP as error:
        raise damaged_gzip(str(path), error) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _tar_files(path: Path, left_out: Tally) -> Iterator[RawFile]:
    view = tar_view(path)
    members = list(walk_all(path, view))
    # By name; of equal names the last one, which is what unpacking leaves.
    table = {posixpath.normpath(member.name): member for member in members}
    if not table:
        left_out.add(str(path), "tars with nothing in them")
    for member in members:
        where = printable(f"{path}:{member.name}")
        if member.kind == b"5" or member.name.endswith("/"):
            continue
        if _is_hidden(member.name):
            left_out.add(where, "hidden (a name that begins with a dot)")
            continue
        target: Member | None = member
        if member.kind in b"12":
            target = _followed(member, table)
            if target is None:
                left_out.add(where, "links to no file in their tar")
                continue
        elif member.kind not in REGULAR + b"S":
            left_out.add(
                where, f"no file but {KINDS.get(member.kind, f'a tar member of kind {member.kind!r}')}"
            )
            continue
        folder, slash, name = member.name.rpartition("/")
        folder = folder.removeprefix("./") if folder != "." else ""
        assert target is not None
        replaced = table[posixpath.normpath(member.name)].header_offset != member.header_offset
        yield RawFile(
            where, f"{folder}/" if slash and folder else "", name, path, _reader(path, view, target), replaced
        )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _followed(member: Member, table: dict[str, Member]) -> Member | None:
    """What a link points to, or None."""
    for _ in range(HOPS):
        if member.kind not in b"12":
            return member if member.kind in REGULAR + b"S" else None
        near = posixpath.dirname(member.name) if member.kind == b"2" else ""
        found = table.get(posixpath.normpath(posixpath.join(near, member.link)))
        if found is None or found == member:
            return None
        member = found
    return None


def _reader(path: Path, view: memoryview, member: Member) -> Callable[[], IO[bytes]]:
    if member.sparse:
        return lambda: io.BytesIO(_unsparse(path, view, member))
    return lambda: io.BytesIO(view[member.data_offset : member.data_offset + member.size])


def _unsparse(path: Path, view: memoryview, member: Member) -> bytes:
    """The bytes of a sparse member with its holes, by the standard library, which knows all forms of them."""
    where = printable(f"{path}:{member.name}")
    alone = bytes(view[member.header_offset : member.end]) + bytes(1024)
    try:
        with tarfile.open(fileobj=io.BytesIO(alone)) as tar:
            item = tar.next()
            size = -1 if item is None else item.size
            if item is not None and 0 <= size <= SPARSE_LIMIT:
                file = tar.extractfile(item)
                data = b"" if file is None else file.read()
                if len(data) == size:
                    return data
    except Exception as error:  # whatever a damaged map makes of the library
        raise DataError(
            f"{where}: a sparse member that cannot be read ({error}). Pack the tar again."
        ) from None
    raise DataError(
        f"{where}: a sparse member of {size:,} bytes that cannot be read (at most {SPARSE_LIMIT:,}, and all its parts "
        "must be there). Pack the tar again without --sparse."
    )
