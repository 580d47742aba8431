"""Published files of data sets, loaded and unpacked by a program: `scripts/get_data.py`.

A `Download` stands in the record of a data set (`streams/data/<name>.py`). `get` brings its files
under a folder; what is on its way, and a note on each file that is done, stands in its folder
`.downloads/<set>`. An archive is unpacked there first and moved to its place as a whole, so what
stands at the place of a data set is whole. The same call goes on after any interruption. Needs no
torch.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from driftline.core.errors import UserError, scarce, suggest
from driftline.core.files import Damaged, read_record, write_record
from driftline.core.processes import Lock
from driftline.streams.transfer import Patience, arrived, transfer

STATE = ".downloads"  # under the data folder
RESERVE = 2**28  # bytes that stay free on the disk
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """One published file of a data set.

    Args:
        url: its address; empty: only a person can load it (a form, a login, a drive).
        creates: paths under the data folder that are there once the file has been unpacked.
        size: bytes, from a public record; 0: none was found.
        checksum: `md5:...` or `sha256:...`, from a public record; empty: none is published.
        into: the folder under the data folder that it is unpacked or put into.
        top: a folder around everything in the archive that is left out.
        part: the part of the set it belongs to, for `--parts`.
        optional: loaded only where its part is named.
        name: of the file; empty: the last piece of the address.
    """

    url: str
    creates: tuple[str, ...]
    size: int = 0
    checksum: str = ""
    into: str = "."
    top: str = ""
    part: str = ""
    optional: bool = False
    name: str = ""

    @property
    def file(self) -> str:
        return self.name or PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True)
class Download:
    """How a data set gets to a disk.

    Args:
        files: those that are published; none: see `by_hand`.
        by_hand: what a person has to do, where a program cannot do all of it.
        command: settings of run.py that use the data, `{root}` for the data folder; empty:
            `scenario=<name of the set>`.
        sources: where sizes and checksums were looked up.
    """

    files: tuple[Published, ...] = ()
    by_hand: str = ""
    command: str = ""
    sources: str = ""

    @property
    def by_program(self) -> bool:
        return any(file.url for file in self.files)

    @property
    def size(self) -> str:
        """Of the files that are loaded unless parts are named; `+`: more than that."""
        sizes = [file.size for file in self.files if not file.optional]
        return readable(sum(sizes)) + (" +" if sum(sizes) and not all(sizes) else "")

    def chosen(self, parts: Sequence[str]) -> list[Published]:
        """The files of `parts`; without any, those that are not optional.

        Raises:
            UserError: for a part that does not exist.
        """
        names = list(dict.fromkeys(file.part for file in self.files if file.part))
        for part in parts:
            if part not in names:
                known = f"parts are {', '.join(names)}" if names else "the set has no parts"
                raise UserError(f"--parts {part}: {known}{suggest(part, names)}")
        if parts:
            return [file for file in self.files if file.part in parts]
        return [file for file in self.files if not file.optional]


def readable(size: int) -> str:
    """`2.9 GB`, as publishers count: powers of 1,000."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes" if size else "size unknown"


# ------------------------------------------------------------------------------ a whole set


def get(
    dataset: str,
    download: Download,
    root: Path,
    *,
    parts: Sequence[str] = (),
    origin: str | None = None,
    keep: bool = False,
    say: Say = print,
    patience: Patience | None = None,
) -> None:
    """Bring the files of a data set under `root`.

    Args:
        dataset: its name, for messages and for its folder of notes.
        parts: of the set; none: all that are not optional.
        origin: the address of a folder that holds the files, or a folder of this machine.
        keep: leave the archives in `.downloads` after they were unpacked.
        say: gets one line for each thing that happened.

    Raises:
        UserError: for what only a person can load, a wrong checksum, an unsafe archive, a disk
            without room, or another process at the same set.
        OSError: if something cannot be written.
    """
    files = download.chosen(parts)
    state = root / STATE / dataset
    folder = _folder(origin)
    lacking = [file for file in files if not done(file, root, state)]
    for file in files:
        if file not in lacking:
            noted = _noted(file, state)
            how = f"sha256 {noted['sha256'][:12]}" if noted else "not loaded by this program"
            say(f"{file.file}: there ({how}; move {root / file.creates[0]} away to load it again)")
    if files and not lacking:
        return
    by_hand = [] if origin else [file for file in lacking if not file.url]
    lacking = [file for file in lacking if file not in by_hand]
    if not lacking:
        raise UserError(f"{dataset} cannot be loaded by a program. {download.by_hand}")
    _writable(root, state)
    lock = Lock(state)
    if not lock.acquire():
        holder = lock.holder()
        lock.leave()
        raise UserError(
            f"{dataset} is being loaded to {root} by {holder}: wait until that is done, then give "
            "the same command again"
        )
    try:
        lacking = [file for file in lacking if not done(file, root, state)]  # another was faster
        _room(lacking, root, state, 0 if folder else 2 if keep else 1)
        for file in lacking:
            archive = _arrive(file, state, origin, folder, say, patience)
            sha256 = _verified(archive, file, say, keep=folder is not None)
            _place(archive, file, root, state, sha256, say)
            if folder is None and not keep:
                archive.unlink(missing_ok=True)
    finally:
        lock.release()
    if by_hand:
        names = ", ".join(file.file for file in by_hand)
        raise UserError(f"{dataset}: {names} cannot be loaded by a program. {download.by_hand}")


def done(file: Published, root: Path, state: Path) -> bool:
    """Whether everything of a file stands at its place.

    What was put there by other means counts if the paths are there that the file creates.
    """
    if _marker(file, state).exists():
        return False
    noted = _noted(file, state)
    places = file.creates if noted is None else noted["places"]
    return all((root / place).exists() for place in places)


def _marker(file: Published, state: Path) -> Path:
    """There from the beginning of unpacking until everything is at its place."""
    return state / f"{file.file}.unpacking"


def _noted(file: Published, state: Path) -> dict[str, Any] | None:
    """The note on a file that was unpacked; None if there is none."""
    try:
        return read_record(state / f"{file.file}.done.json", "sha256", "places")
    except (OSError, Damaged):
        return None


def _folder(origin: str | None) -> Path | None:
    """The folder of this machine that `--from` names; None if it names an address.

    Raises:
        UserError: if it is neither.
    """
    if origin is None or origin.startswith(("http://", "https://")):
        return None
    folder = Path(origin.removeprefix("file://"))
    if not folder.is_dir():
        raise UserError(f"--from {origin}: neither a folder of this machine nor an http(s) address")
    return folder


def _writable(root: Path, state: Path) -> None:
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if scarce(error):
            raise
        raise UserError(f"--to {root}: cannot write there ({error.strerror})") from error
    if not os.access(state, os.W_OK):
        raise UserError(f"--to {root}: cannot write to {state}")


def _room(files: Sequence[Published], root: Path, state: Path, archives: int) -> None:
    """Compare the free disk with what the files need at least.

    Args:
        archives: how many are on this disk beside their content: 0: none, 1: one after the other,
            2: all.

    Raises:
        UserError: if there is not enough room.
    """
    sizes = [file.size for file in files] or [0]
    content, packed = sum(sizes), (0, max(sizes), sum(sizes))[archives]
    here = sum(arrived(state / file.file) for file in files)
    need, free = content + packed - here + RESERVE, shutil.disk_usage(root).free
    if need > free:
        raise UserError(
            f"--to {root}: {readable(free)} are free, at least {readable(need)} are needed "
            f"(archives {readable(packed)}, their content {readable(content)} or more); free some, "
            "name another folder, or load part by part (--parts)"
        )


def _arrive(
    file: Published,
    state: Path,
    origin: str | None,
    folder: Path | None,
    say: Say,
    patience: Patience | None,
) -> Path:
    """The file on this machine, loaded if it has to be."""
    if folder is not None:
        archive = folder / file.file
        if not archive.is_file():
            raise UserError(f"--from {folder}: it has no file {file.file}")
        return archive
    archive = state / file.file
    url = f"{origin.rstrip('/')}/{quote(file.file)}" if origin else file.url
    if archive.is_file():
        say(f"{file.file}: loaded before")
        return archive
    here = arrived(archive)
    since = f", from byte {here:,} on" if here else ""
    say(f"{file.file}: {readable(file.size)} from {url}{since}")
    transfer(url, archive, size=file.size, checked=bool(file.checksum), patience=patience)
    return archive


def _verified(archive: Path, file: Published, say: Say, keep: bool) -> str:
    """The SHA-256 sum of an archive that is the published one.

    Args:
        keep: the archive is not ours; else a wrong one is set aside.

    Raises:
        UserError: if its checksum is another one.
    """
    kind, _, published = file.checksum.partition(":")
    sums = {name: hashlib.new(name, usedforsecurity=False) for name in {"sha256", kind or "sha256"}}
    with open(archive, "rb") as content:
        while block := content.read(2**20):
            for one in sums.values():
                one.update(block)
    sha256 = sums["sha256"].hexdigest()
    if not published:
        say(f"{file.file}: no published checksum; its SHA-256 is {sha256}")
        return sha256
    if (sum_ := sums[kind].hexdigest()) != published:
        where = archive
        if not keep:
            where = archive.with_name(f"{archive.name}.wrong")
            os.replace(archive, where)
        raise UserError(
            f"{file.file} is not the published file: {kind} {sum_}, published {published}. It was "
            f"not taken and stands at {where}; the same command loads it anew"
        )
    say(f"{file.file}: {kind} as published")
    return sha256


def _place(archive: Path, file: Published, root: Path, state: Path, sha256: str, say: Say) -> None:
    """Unpack beside, then move to the place."""
    fresh = state / f"{file.file}.unpacked"
    shutil.rmtree(fresh, ignore_errors=True)  # of an interrupted call
    _marker(file, state).touch()
    try:
        count = unpack(archive, fresh)
        content = fresh / file.top if file.top and (fresh / file.top).is_dir() else fresh
        goal = root / file.into
        goal.mkdir(parents=True, exist_ok=True)
        places = sorted(str((goal / name.name).relative_to(root)) for name in content.iterdir())
        _settle(content, goal)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    absent = [place for place in file.creates if not (root / place).exists()]
    if absent:
        raise UserError(
            f"{archive} did not bring {root / absent[0]}, but {', '.join(places[:5])}: it is "
            "packed in another way than its publisher's"
        )
    note = {"url": file.url, "sha256": sha256, "places": places, "files": count}
    write_record(state / f"{file.file}.done.json", note)
    _marker(file, state).unlink()
    (state / f"{file.file}.wrong").unlink(missing_ok=True)
    say(f"{file.file}: {count:,} files in {root / file.into}")


def _settle(fresh: Path, goal: Path) -> None:
    """Move what is in `fresh` into `goal`, where folders may be there already.

    Raises:
        UserError: for a file that is there with other content; it is left alone.
    """
    for entry in sorted(fresh.iterdir()):
        place = goal / entry.name
        if not os.path.lexists(place):
            shutil.move(entry, place)
        elif entry.is_dir() and place.is_dir():
            _settle(entry, place)
        elif not (entry.is_file() and place.is_file() and filecmp.cmp(entry, place, False)):
            raise UserError(
                f"{place} is there already with other content and was left as it is; move it away, "
                "then give the same command again"
            )


# ------------------------------------------------------------------------------ archives


class _Unsafe(Exception):
    """A member of an archive that would not stay in the folder, or is no plain file."""


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a tar or zip archive into a new folder; another file is copied there.

    Finder's and Windows' own files (`__MACOSX`, `._*`, `.DS_Store`, `Thumbs.db`) are left out.

    Returns:
        The number of files.

    Raises:
        UserError: for an archive that is damaged, locked, or has members that would leave the
            folder or are links or devices; and if the disk would be full.
    """
    folder.mkdir(parents=True)
    name = archive.name.lower()
    try:
        if name.endswith(TARS):
            return _untar(archive, folder)
        if name.endswith(".zip"):
            return _unzip(archive, folder)
        _check_room(archive.stat().st_size, folder)
        shutil.copyfile(archive, folder / archive.name)
        return 1
    except _Unsafe as error:
        raise UserError(f"{archive} is not unpacked: {error}") from error
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise UserError(f"{archive} is damaged or no archive: {error}") from error


def _untar(archive: Path, folder: Path) -> int:
    if not hasattr(tarfile, "data_filter"):
        raise UserError("unpacking safely needs Python 3.11.4 or newer")
    count = 0
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            if _litter(member.name):
                continue
            if not (member.isfile() or member.isdir()):
                raise _Unsafe(f"{member.name!r} is a link or a device")
            if escapes(member.name):
                raise _Unsafe(f"{member.name!r} would leave the folder")
            _check_room(member.size, folder)
            tar.extract(member, folder, filter="data")
            count += member.isfile()
    return count


def _unzip(archive: Path, folder: Path) -> int:
    count = 0
    with zipfile.ZipFile(archive) as content:
        _check_room(sum(member.file_size for member in content.infolist()), folder)
        for member in content.infolist():
            if _litter(member.filename):
                continue
            if escapes(member.filename):
                raise _Unsafe(f"{member.filename!r} would leave the folder")
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _Unsafe(f"{member.filename!r} is a link or a device")
            if member.flag_bits & 1:
                raise _Unsafe("it is locked with a password; unpack it by hand")
            content.extract(member, folder)
            count += not member.is_dir()
    return count


def escapes(name: str) -> bool:
    """Whether a member of an archive names a place outside the folder it is unpacked in."""
    pieces = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in pieces or ":" in pieces[0] or "\0" in name


def _litter(name: str) -> bool:
    pieces = name.rstrip("/").split("/")
    return (
        "__MACOSX" in pieces or pieces[-1] in (".DS_Store", "Thumbs.db") or pieces[-1][:2] == "._"
    )


def _check_room(size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size + RESERVE > free:
        raise UserError(
            f"{folder}: {readable(free)} are free, which is too little to unpack; free some, then "
            "give the same command again"
        )
