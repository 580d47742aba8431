"""What the files of a data set hold: a digest a file, the same wherever the files lie.

A digest is a hash of a file's size and bytes: all of them up to 64 KiB, which is every file of
ImageNet-C, and of formats without compression. Of a larger file the first, the middle and the last
8 KiB count: another picture in the same number of compressed bytes differs there (a PNG even ends
with a checksum of all its pixels). Neither paths nor times enter a digest.

Opening 75,000 files takes seconds, so digests are kept in `$DRIFTLINE_CACHE`, or else in
`$XDG_CACHE_HOME/driftline` or `~/.cache/driftline`, one file for each folder of images. A kept
digest counts as long as size, inode, modification time and change time of its file are what they
were. The change time cannot be set by a program, so a file replaced by another of the same size
and modification time is read again. It has the steps of a clock, though: the digest of a file that
changed in the last two seconds is not kept, because a second change in the same step would not
show. A cache that is damaged, lost or not writable costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from driftline.core.errors import UserError, scarce
from driftline.core.files import read_checked, sweep_away, write_checked

WHOLE = 2**16  # bytes; larger files are sampled
PIECE = 2**13
UNCOMPRESSED = (".bmp", ".ppm")  # another picture may differ anywhere
SIZE = 16  # bytes of a digest
SETTLED = 2 * 10**9  # ns since the last change of a file whose digest is kept
THREADS = 8  # files opened at once: on a cold disk opening is waiting
CHUNK = 256  # files a thread opens in turn
KIND = "digests-1"


def file_digests(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Digests of the files `names` under `folder`, uint8 [N, 16]; zeros where none can be read."""
    return _digests(folder, names, names, _sampled)


def rows_digest(path: Path, start: int, stop: int) -> bytes:
    """Digest of the rows start ... stop - 1 of a .npy file, all their bytes, with their shape."""

    def read(_: str) -> bytes:
        rows = np.ascontiguousarray(np.load(path, mmap_mode="r")[start:stop])
        return array_digest(rows)

    name = f"{path.name}[{start}:{stop}]"
    return _digests(path.parent, [name], [path.name], read)[0].tobytes()


def array_digest(array: np.ndarray) -> bytes:
    """Digest of type, shape and all bytes of a contiguous array."""
    digest = hashlib.blake2b(f"{array.dtype.str} {array.shape}".encode(), digest_size=SIZE)
    digest.update(array.data)
    return digest.digest()


def _sampled(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(f"{size} ".encode(), digest_size=SIZE)
        if size <= WHOLE or path.lower().endswith(UNCOMPRESSED):
            while block := file.read(2**20):
                digest.update(block)
        else:
            for start in (0, (size - PIECE) // 2, size - PIECE):
                digest.update(os.pread(file.fileno(), PIECE, start))
    return digest.digest()


def _digests(
    folder: Path, names: Sequence[str], files: Sequence[str], read: Callable[[str], bytes]
) -> np.ndarray:
    """Digests under `names` of what `read` makes of `files`: kept ones, or read and kept now."""
    started = time.time_ns()
    paths = [os.path.join(folder, file) for file in files]
    stats = np.asarray([_stat(path) for path in paths], np.int64).reshape(-1, 4)
    kept = Kept.load(folder)
    digests, same = kept.find(names, stats)
    missing = np.flatnonzero(~same)
    if not len(missing):
        return digests

    def several(rows: np.ndarray) -> list[bytes | None]:
        return [_read(read, paths[row]) for row in rows.tolist()]

    parts = np.split(missing, range(CHUNK, len(missing), CHUNK))
    readable = []
    with (
        ThreadPoolExecutor(min(THREADS, len(parts))) as pool,
        tqdm(
            total=len(missing),
            desc="reading images once, to recognise this data set",
            unit="file",
            delay=3,
            disable=None,
            leave=False,
        ) as bar,
    ):
        for rows, results in zip(parts, pool.map(several, parts), strict=True):
            for row, digest in zip(rows.tolist(), results, strict=True):
                if digest is not None:
                    digests[row] = np.frombuffer(digest, np.uint8)
                    readable.append(row)
            bar.update(len(rows))
    rows = np.asarray(readable, np.int64)
    rows = rows[stats[rows, 3] < started - SETTLED]
    if len(rows):
        kept.put([names[row] for row in rows.tolist()], stats[rows], digests[rows])
    return digests


def _stat(path: str) -> tuple[int, int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0, 0)
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _read(read: Callable[[str], bytes], path: str) -> bytes | None:
    try:
        return read(path)
    except OSError as error:
        if scarce(error):
            raise
        return None  # whoever wants the image says so


def cache_folder() -> Path:
    """Where digests are kept between runs."""
    own = os.environ.get("DRIFTLINE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "driftline"


class Kept:
    """The digests kept of the files of one folder.

    Args:
        stats: size, inode, modification and change time (ns), int64 [N, 4].
        digests: uint8 [N, 16].
    """

    def __init__(
        self, folder: Path, names: list[str], stats: np.ndarray, digests: np.ndarray
    ) -> None:
        self.folder, self.names, self.stats, self.digests = folder, names, stats, digests

    @staticmethod
    def place(folder: Path) -> tuple[Path, str]:
        """The file about `folder`, and its key."""
        key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]
        return cache_folder() / "digests" / key, key

    @staticmethod
    def load(folder: Path) -> Kept:
        """What is known about `folder`; nothing, if the file is damaged or not there."""
        path, key = Kept.place(folder)
        try:
            with read_checked(path, KIND, key) as file:
                names, stats, digests = (np.load(file, allow_pickle=False) for _ in range(3))
            return Kept(folder, os.fsdecode(names.tobytes()).split("\0"), stats, digests)
        except (UserError, OSError, ValueError, EOFError):
            return Kept(folder, [], np.zeros((0, 4), np.int64), np.zeros((0, SIZE), np.uint8))

    def find(self, names: Sequence[str], stats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Digests uint8 [N, 16], and where they are known for these `stats`: bool [N]."""
        digests, same = np.zeros((len(names), SIZE), np.uint8), np.zeros(len(names), bool)
        if self.names:
            position = dict(zip(self.names, range(len(self.names)), strict=True))
            at = np.asarray([position.get(name, -1) for name in names], np.int64)
            same = (at >= 0) & (self.stats[at] == stats).all(1)
            digests[same] = self.digests[at[same]]
        return digests, same

    def put(self, names: Sequence[str], stats: np.ndarray, digests: np.ndarray) -> None:
        """Add or replace entries, and write the file; without a word where that is impossible."""
        new = set(names)
        old = [row for row, name in enumerate(self.names) if name not in new]
        every = [*(self.names[row] for row in old), *names]
        path, key = Kept.place(self.folder)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep_away(path.parent)
            with write_checked(path, KIND, key, shared=True) as file:
                text = np.frombuffer(os.fsencode("\0".join(every)), np.uint8)
                for array in (
                    text,
                    np.concatenate([self.stats[old], stats]),
                    np.concatenate([self.digests[old], digests]),
                ):
                    np.save(file, array)
        except OSError:
            pass
