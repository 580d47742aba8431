"""One file over HTTP: goes on where it stopped, and is whole or not there.

What has arrived stands in `<name>.part` beside the target, and `<name>.part.json` says from where
it came. A call goes on with them, whatever ended the one before. Needs no torch.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from driftline.core.errors import UserError
from driftline.core.files import Damaged, read_record, write_record

BLOCK = 2**18  # bytes read at once, at most
AGENT = "driftline (https over Python's urllib)"  # some servers refuse Python's own name
BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may be right a moment later


@dataclass(frozen=True)
class Patience:
    """When a transfer is given up.

    Args:
        tries: in a row that bring no byte beyond what is there.
        stall: seconds without a byte after which a connection counts as broken.
        pause: seconds before the second try; doubled before each further one, up to a minute.
    """

    tries: int = 6
    stall: float = 30.0
    pause: float = 1.0


class Broken(Exception):
    """The transfer ended early; another try may go on.

    Args:
        pause: seconds that the server asks to wait.
    """

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = pause


def part_of(target: Path) -> Path:
    """Where the bytes stand that have arrived."""
    return target.with_name(f"{target.name}.part")


def arrived(target: Path) -> int:
    """How many bytes of a target are on the disk."""
    for path in (target, part_of(target)):
        if path.is_file():
            return path.stat().st_size
    return 0


def transfer(
    url: str, target: Path, *, size: int = 0, checked: bool = True, patience: Patience | None = None
) -> None:
    """Load `url` into `target`.

    Args:
        size: bytes that the file is known to have; 0: not known.
        checked: somebody compares a checksum afterwards. Without, what has arrived from another
            address, or of another version of the file, is loaded anew.

    Raises:
        UserError: if the server has no such file, sends a page instead, or stays out of reach;
            what has arrived stays.
        OSError: if it cannot be written.
    """
    patience = patience or Patience()
    part, failures = part_of(target), 0
    if part.exists() and not checked and _note(part).get("url") != url:
        part.unlink()
    most = arrived(target)
    with tqdm(unit="B", unit_scale=True, desc=target.name, disable=None, leave=False) as bar:
        while True:
            try:
                _attempt(url, part, size, checked, patience.stall, bar)
                break
            except Broken as broken:
                failures = 0 if arrived(target) > most else failures + 1
                most = max(most, arrived(target))
                if failures >= patience.tries:
                    raise UserError(
                        f"{url}: {broken}; {patience.tries} tries in a row brought nothing. "
                        f"{most:,} bytes are here, and the same command goes on from them; "
                        "--from URL loads from another place"
                    ) from broken
                pause = min(patience.pause * 2 ** max(failures - 1, 0), 60.0)
                time.sleep(max(pause, min(broken.pause, 120.0)))
    descriptor = os.open(part, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    os.replace(part, target)
    _note_of(part).unlink(missing_ok=True)


def _note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _note(part: Path) -> dict[str, Any]:
    """Address, version and whole size of what has arrived; empty if that is not known."""
    try:
        return read_record(_note_of(part), "url", "version", "total")
    except (OSError, Damaged):
        return {}


def _attempt(url: str, part: Path, size: int, checked: bool, stall: float, bar: tqdm) -> None:
    """One connection.

    Raises:
        Broken: if the file is not whole afterwards.
        UserError: if another try would end the same way.
    """
    have, note = part.stat().st_size if part.exists() else 0, _note(part)
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.get("url") == url and note.get("version"):
            headers["If-Range"] = note["version"]
    response = _opened(urllib.request.Request(url, headers=headers), part, have, stall)
    if response is None:
        return  # everything was there
    with response:
        begin, total = _extent(response, have)
        before = note.get("total") or total
        if begin and (begin != have or total not in (0, before)):
            part.unlink()  # the next try begins anew
            raise Broken("the server sent another part than asked for, or of another version")
        if size and total and total != size and not checked:
            raise UserError(
                f"{url}: the server announces {total:,} bytes, but the published file has "
                f"{size:,}; it is another file"
            )
        whole = total or size
        first = _read(response)
        _refuse_page(url, response, first, begin)
        if begin == 0:
            part.unlink(missing_ok=True)  # before the note says that it is of this version
            record = {"url": url, "version": _version(response), "total": total}
            write_record(_note_of(part), record)
        bar.total, bar.n = whole or None, begin
        with open(part, "r+b" if begin else "wb", buffering=0) as file:
            file.seek(begin)
            block = first
            while block:
                file.write(block)
                bar.update(len(block))
                block = _read(response)
            count = file.tell()
    if whole and count < whole:
        raise Broken(f"the connection ended after {count:,} of {whole:,} bytes")
    if total and count > total:
        part.unlink()
        raise Broken(f"{count:,} bytes came, {total:,} were announced")


def _opened(
    request: urllib.request.Request, part: Path, have: int, stall: float
) -> http.client.HTTPResponse | None:
    """The answer of the server; None if it says that nothing is left to send."""
    url = request.full_url
    try:
        return urllib.request.urlopen(request, timeout=stall)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                extent = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
                if extent and int(extent[1]) == have:
                    return None
                part.unlink()
                raise Broken("what has arrived is longer than the file") from error
            what = f"the server answers {error.code} {error.reason}"
            if error.code in BUSY:
                asked = error.headers.get("Retry-After") or ""
                raise Broken(what, float(asked) if asked.isdecimal() else 0.0) from error
        raise UserError(f"{url}: {what}; --from URL loads from another place") from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise UserError(
                f"{url}: {cause}; the certificate of the server is not valid"
            ) from error
        raise Broken(f"no answer ({cause or type(error).__name__})") from error
    except ValueError as error:
        raise UserError(f"{url}: no address that can be loaded ({error})") from error


def _extent(response: http.client.HTTPResponse, have: int) -> tuple[int, int]:
    """Which byte of the file comes first, and how many it has; 0: the server does not say."""
    length = response.headers.get("Content-Length") or ""
    if response.status != 206:
        return 0, int(length) if length.isdecimal() else 0
    extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
    if not extent:
        raise Broken("the server sent a part of the file without saying which")
    return int(extent[1]), int(extent[2]) if extent[2] != "*" else 0


def _version(response: http.client.HTTPResponse) -> str:
    """What tells this version of the file from others, for `If-Range`; empty: nothing does."""
    tag = response.headers.get("ETag") or ""
    return tag if tag.startswith('"') else response.headers.get("Last-Modified") or ""


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK)
    except TimeoutError as error:
        raise Broken("the server stopped sending") from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"the connection broke ({error or type(error).__name__})") from error


def _refuse_page(url: str, response: http.client.HTTPResponse, first: bytes, begin: int) -> None:
    """Raise `UserError` if what comes is a page: of a login, a quota, a network's own door."""
    if begin:
        page = response.headers.get_content_type() == "text/html"
    else:
        page = first.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml"))
    if page:
        host = urlsplit(url).hostname
        raise UserError(
            f"{url}: {host} sent a page, not the file (a login, a quota, or the sign-in of your "
            "network); open the address in a browser to see what it says"
        )
