"""Published files arrive whole or not at all, whatever server, disk, archive and user do."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import socket
import stat
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from driftline.core.errors import UserError
from driftline.core.processes import Lock
from driftline.streams import downloads, transfer
from driftline.streams.downloads import STATE, Download, Published, get
from driftline.streams.transfer import Patience

CONTENT = np.random.default_rng(0).bytes(3 * transfer.BLOCK + 1234)
QUICK = Patience(tries=3, stall=20.0, pause=0.0)


class Server(ThreadingHTTPServer):
    """Serves `files`; what it does wrong stands in `faults`, one a request, then nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.ranges: list[str] = []  # what the requests asked for
        self.version = '"1"'
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients that leave early are part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        fault, _, at = (self.server.faults.pop(0) if self.server.faults else "").partition(" ")
        asked = self.headers.get("Range") or ""
        self.server.ranges.append(asked)
        content = self.server.files.get(self.path.removeprefix("/").partition("?")[0])
        if fault.isdecimal() or content is None:
            self.send_response(int(fault) if fault else 404)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "page":
            content, asked = b"\n<!DOCTYPE html><html>Please log in</html>", ""
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if fault == "whole" or self.headers.get("If-Range", self.server.version) != (
            self.server.version
        ):
            begin = 0
        if begin >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = 7 if fault == "shifted" else begin
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if fault != "nolength":
            self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("ETag", self.server.version)
        self.end_headers()
        self.wfile.write(content[begin : int(at) if at else None])
        self.wfile.flush()
        if fault == "stall":
            self.server.ended.wait()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.01,))
        thread.start()
        yield one
        one.ended.set()
        one.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


def tarred(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as content:
        for name, text in members.items():
            content.writestr(name, text)
    return packed.getvalue()


BIRDS = tarred({"birds/a/1.png": b"one", "birds/b/2.png": b"two", "birds/._b": b"Finder's"})


@pytest.fixture
def birds(server) -> Published:
    """An archive on the server, with its published sum."""
    server.files["birds.tar.gz"] = BIRDS
    return Published(f"{server.url}/birds.tar.gz", ("birds",), len(BIRDS), md5(BIRDS))


# ------------------------------------------------------------------------------ servers

HALF = len(CONTENT) // 2
FAULTS = {
    "truncated": (["cut 1000", f"cut {HALF}"], f"bytes={HALF}-"),
    "reset": ([f"reset {HALF}"], None),  # a reset may take bytes away that were under way
    "busy": (["503", "429", f"cut {HALF}", "500"], f"bytes={HALF}-"),
    "ignores ranges": ([f"cut {HALF}", "whole"], f"bytes={HALF}-"),
    "another range": ([f"cut {HALF}", "shifted"], ""),
    "no length": ([f"nolength {HALF}", "nolength"], f"bytes={HALF}-"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_connection_ends_with_the_whole_file(name, server, tmp_path):
    faults, last = FAULTS[name]
    server.files["f"], server.faults = CONTENT, list(faults)
    target = tmp_path / "f"
    transfer.transfer(f"{server.url}/f", target, size=len(CONTENT), patience=QUICK)
    assert target.read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["f"]
    assert not server.faults and last in (None, server.ranges[-1])


def test_a_server_that_stops_sending_is_left(server, tmp_path):
    server.files["f"], server.faults = CONTENT, [f"stall {HALF}"]
    transfer.transfer(f"{server.url}/f", tmp_path / "f", patience=replace(QUICK, stall=0.4))
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_no_progress_is_an_error_that_keeps_what_is_there(server, tmp_path):
    server.files["f"], server.faults = CONTENT, [f"cut {HALF}", *["503"] * QUICK.tries]
    with pytest.raises(UserError, match=rf"503.*3 tries in a row.*{HALF:,} bytes are here"):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert transfer.arrived(tmp_path / "f") == HALF
    transfer.transfer(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert server.ranges[-1] == f"bytes={HALF}-" and (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_out_of_reach_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/f"
        with pytest.raises(UserError, match="no answer.*refused"):
            transfer.transfer(url, tmp_path / "f", patience=QUICK)


@pytest.mark.parametrize("before", [0, HALF])
def test_a_page_instead_of_the_file_is_refused_and_spoils_nothing(before, server, tmp_path):
    server.files["f"] = CONTENT
    server.faults = [f"cut {before}", "page"] if before else ["page"]
    with pytest.raises(UserError, match=r"sent a page, not the file \(a login"):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert transfer.arrived(tmp_path / "f") == before and not (tmp_path / "f").exists()


def test_what_is_not_there_is_not_asked_for_twice(server, tmp_path):
    with pytest.raises(UserError, match=r"404.*--from URL"):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert len(server.ranges) == 1


def test_a_file_that_was_exchanged_meanwhile_is_loaded_anew(server, tmp_path):
    server.files["f"], server.faults = bytes(len(CONTENT)), ["cut 999", "503", "503", "503"]
    with pytest.raises(UserError):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", checked=False, patience=QUICK)
    server.files["f"], server.version = CONTENT, '"2"'
    transfer.transfer(f"{server.url}/f", tmp_path / "f", checked=False, patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_kill_while_a_file_begins_anew_mixes_nothing(server, tmp_path, monkeypatch):
    server.files["f"], server.faults = bytes(len(CONTENT)), ["cut 999", "503", "503", "503"]
    with pytest.raises(UserError):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", checked=False, patience=QUICK)
    server.files["f"], server.version = CONTENT, '"2"'
    write = transfer.write_record

    def killed(*args: object) -> None:
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            transfer.transfer(f"{server.url}/f", tmp_path / "f", checked=False, patience=QUICK)
    transfer.transfer(f"{server.url}/f", tmp_path / "f", checked=False, patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("checked", [True, False])
def test_another_mirror_goes_on_only_where_a_checksum_is_compared(checked, server, tmp_path):
    server.files = {"f": CONTENT, "mirror/f": CONTENT}
    server.faults = [f"cut {HALF}", "404"]
    with pytest.raises(UserError):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", checked=checked, patience=QUICK)
    url = f"{server.url}/mirror/f"
    transfer.transfer(url, tmp_path / "f", checked=checked, patience=QUICK)
    assert server.ranges[-1] == (f"bytes={HALF}-" if checked else "")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_more_than_the_file_is_thrown_away(server, tmp_path):
    server.files["f"] = CONTENT
    transfer.part_of(tmp_path / "f").write_bytes(CONTENT + b"more")
    transfer.transfer(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    transfer.part_of(tmp_path / "g").write_bytes(CONTENT)  # killed before it was renamed
    server.files["g"] = CONTENT
    server.ranges.clear()
    transfer.transfer(f"{server.url}/g", tmp_path / "g", patience=QUICK)
    assert (tmp_path / "g").read_bytes() == CONTENT and len(server.ranges) == 1


def test_another_size_is_refused_where_no_checksum_would_notice(server, tmp_path):
    server.files["f"] = CONTENT
    with pytest.raises(UserError, match="it is another file"):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", size=7, checked=False, patience=QUICK)


def test_a_full_disk_is_no_fault_of_the_connection(server, tmp_path, monkeypatch):
    server.files["f"] = CONTENT

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(transfer, "write_record", full)
    with pytest.raises(OSError, match="no space left"):
        transfer.transfer(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert len(server.ranges) == 1


# ------------------------------------------------------------------------------ whole sets


def load(file: Published, root: Path, **options: object) -> list[str]:
    """What `get` said."""
    lines: list[str] = []
    get("birds", Download((file,)), root, say=lines.append, patience=QUICK, **options)
    return lines


def test_a_set_is_loaded_checked_unpacked_and_not_loaded_again(birds, server, tmp_path):
    lines = load(birds, tmp_path)
    assert (tmp_path / "birds/a/1.png").read_bytes() == b"one" and "md5 as published" in lines[1]
    assert sorted(p.name for p in (tmp_path / "birds").iterdir()) == ["a", "b"]
    assert not list((tmp_path / STATE / "birds").glob("*.gz*[!n]"))  # the archive is gone
    requests = len(server.ranges)
    assert "there" in load(birds, tmp_path)[0] and len(server.ranges) == requests
    shutil.rmtree(tmp_path / "birds")
    load(birds, tmp_path, keep=True)
    assert (tmp_path / "birds/b/2.png").exists()
    assert (tmp_path / STATE / "birds/birds.tar.gz").read_bytes() == BIRDS


def test_what_was_put_there_by_other_means_is_left_alone(birds, server, tmp_path):
    (tmp_path / "birds").mkdir()
    assert "not loaded by this program" in load(birds, tmp_path)[0] and not server.ranges


def test_a_wrong_checksum_is_said_and_the_file_not_taken(birds, server, tmp_path):
    server.files["birds.tar.gz"] = tarred({"birds/evil": b"evil"})
    with pytest.raises(UserError, match=rf"not the published file.*{birds.checksum[4:]}"):
        load(birds, tmp_path)
    assert not (tmp_path / "birds").exists()
    server.files["birds.tar.gz"] = BIRDS
    load(birds, tmp_path)
    assert (tmp_path / "birds/a/1.png").exists()
    assert not list((tmp_path / STATE / "birds").glob("*.wrong"))


def test_without_a_published_checksum_the_sum_is_printed(birds, tmp_path):
    lines = load(replace(birds, checksum=""), tmp_path)
    assert f"no published checksum; its SHA-256 is {hashlib.sha256(BIRDS).hexdigest()}" in lines[1]


def test_ctrl_c_leaves_what_the_next_call_goes_on_from(server, tmp_path, monkeypatch):
    packed = tarred({"birds/a.bin": CONTENT}, "w")
    server.files["b.tar"] = packed
    file = Published(f"{server.url}/b.tar", ("birds",), len(packed), md5(packed))
    read, blocks = transfer._read, iter([True, True])

    def stop(*args):
        if next(blocks, None) is None:
            raise KeyboardInterrupt
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_read", stop)
        with pytest.raises(KeyboardInterrupt):
            load(file, tmp_path)
    have = transfer.arrived(tmp_path / STATE / "birds/b.tar")
    assert 0 < have < len(packed)
    with monkeypatch.context() as patch:  # and while it is put to its place
        patch.setattr(downloads, "_settle", stop)
        with pytest.raises(KeyboardInterrupt):
            load(file, tmp_path)
    assert server.ranges == ["", f"bytes={have}-"]
    (tmp_path / "birds").mkdir()  # a killed call had put a part of it there
    assert "loaded before" in load(file, tmp_path)[0] and len(server.ranges) == 2
    assert (tmp_path / "birds/a.bin").read_bytes() == CONTENT


def test_two_at_once_do_not_meet(birds, server, tmp_path):
    lock = Lock(tmp_path / STATE / "birds")
    assert lock.acquire()
    with pytest.raises(UserError, match=r"is being loaded to .* by .* pid \d+: wait"):
        load(birds, tmp_path)
    assert not server.ranges and "pid" in lock.holder()
    lock.release()
    load(birds, tmp_path)


def test_a_disk_without_room_is_seen_before_anything_is_loaded(
    birds, server, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(UserError, match=r"1.0 GB are free, at least 4.3 GB are needed"):
        load(replace(birds, size=2 * 10**9), tmp_path)
    assert not server.ranges
    load(birds, tmp_path)


def test_a_file_of_the_user_is_never_overwritten(birds, server, tmp_path):
    packed = tarred({"sets/a/1.png": b"one", "sets/b/2.png": b"two"})
    server.files["birds.tar.gz"] = packed
    file = replace(birds, creates=("sets/b",), checksum=md5(packed), size=len(packed))
    mine = tmp_path / "sets/a/1.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"a/1.png is there already with other content"):
        load(file, tmp_path)
    assert mine.read_bytes() == b"mine"
    mine.write_bytes(b"one")
    load(file, tmp_path)
    assert (tmp_path / "sets/b/2.png").read_bytes() == b"two"


def test_a_mirror_and_a_folder_stand_in_for_the_publisher(birds, server, tmp_path):
    server.files = {"m/birds.tar.gz": BIRDS}
    load(birds, tmp_path / "a", origin=f"{server.url}/m/")
    assert (tmp_path / "a/birds/a").is_dir()
    folder = tmp_path / "by hand"
    folder.mkdir()
    (folder / "birds.tar.gz").write_bytes(BIRDS)
    by_hand = replace(birds, url="", name="birds.tar.gz")
    with pytest.raises(UserError, match=r"cannot be loaded by a program. Ask them"):
        get("birds", Download((by_hand,), "Ask them"), tmp_path / "b")
    load(by_hand, tmp_path / "b", origin=str(folder))
    assert (tmp_path / "b/birds/a").is_dir() and (folder / "birds.tar.gz").exists()
    with pytest.raises(UserError, match="has no file other.tar"):
        load(replace(by_hand, name="other.tar"), tmp_path / "c", origin=str(folder))
    with pytest.raises(UserError, match="neither a folder"):
        load(birds, tmp_path / "c", origin="ftp://mirror/m")


def test_what_a_program_can_load_comes_before_what_a_person_has_to(birds, server, tmp_path):
    rest = replace(birds, url="", name="names.zip", creates=("names.txt",))
    with pytest.raises(UserError, match=r"names.zip cannot be loaded by a program. Ask them"):
        get("birds", Download((rest, birds), "Ask them"), tmp_path, say=list)
    assert (tmp_path / "birds/a").is_dir()
    (tmp_path / "names.txt").touch()
    get("birds", Download((rest, birds)), tmp_path, say=list)


def test_parts_are_loaded_alone_and_optional_ones_on_demand():
    files = tuple(
        Published(f"https://x.org/{name}.tar", (name,), part=name, optional=name == "extra")
        for name in ("noise", "blur", "extra")
    )
    download = Download(files)
    assert [f.part for f in download.chosen(())] == ["noise", "blur"]
    assert [f.part for f in download.chosen(["extra"])] == ["extra"]
    with pytest.raises(UserError, match="parts are noise, blur, extra; did you mean 'noise'"):
        download.chosen(["nois"])


# ------------------------------------------------------------------------------ archives


def with_member(kind: bytes, name: str = "link") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    return packed.getvalue()


def zip_link() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as content:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        content.writestr(info, "/etc/passwd")
    return packed.getvalue()


def locked() -> bytes:
    packed = bytearray(zipped({"a": b"secret"}))
    packed[6] |= 1  # the flag in both headers
    packed[packed.index(b"PK\1\2") + 8] |= 1
    return bytes(packed)


UNSAFE = {
    "up.tar": (tarred({"../out": b"x"}, "w"), "would leave"),
    "up_later.tar": (tarred({"a/../../out": b"x"}, "w"), "would leave"),
    "root.tar.gz": (tarred({"/out": b"x"}), "would leave"),
    "symlink.tar": (with_member(tarfile.SYMTYPE), "link or a device"),
    "hard_link.tar": (with_member(tarfile.LNKTYPE), "link or a device"),
    "device.tar": (with_member(tarfile.CHRTYPE), "link or a device"),
    "up.zip": (zipped({"../out": b"x"}), "would leave"),
    "root.zip": (zipped({"/out": b"x"}), "would leave"),
    "backslash.zip": (zipped({"a\\..\\..\\out": b"x"}), "would leave"),
    "drive.zip": (zipped({"C:/out": b"x"}), "would leave"),
    "link.zip": (zip_link(), "link or a device"),
    "locked.zip": (locked(), "password"),
    "cut.tar.gz": (tarred({"a": CONTENT})[:5000], "damaged"),
    "cut.tar": (tarred({"a": CONTENT}, "w")[:5000], "damaged"),
    "cut.zip": (zipped({"a": CONTENT})[:5000], "damaged"),
    "bit.zip": (zipped({"a": CONTENT}).replace(CONTENT[50:60], b"0123456789"), "damaged"),
    "text.tgz": (b"no archive", "damaged"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_or_damaged_archive_leaves_nothing(name, tmp_path):
    content, words = UNSAFE[name]
    folder = tmp_path / "by hand"
    folder.mkdir()
    (folder / name).write_bytes(content)
    root = tmp_path / "deep/down/root"
    file = Published("", ("a",), name=name)
    with pytest.raises(UserError, match=words):
        load(file, root, origin=str(folder))
    assert [p.name for p in root.iterdir()] == [STATE]
    assert not list(root.rglob("*.unpacked")) and not list(tmp_path.rglob("out"))
    assert not list(root.rglob("*.done.json"))


def test_an_archive_larger_than_the_disk_stops_in_time(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=downloads.RESERVE + 1000)
    )
    for name, content in (
        ("a.tar.gz", tarred({"a": bytes(2000)})),
        ("a.zip", zipped({"a": bytes(2000)})),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="too little to unpack"):
            downloads.unpack(tmp_path / name, tmp_path / f"{name} out")


def test_a_folder_around_everything_can_be_left_out(birds, server, tmp_path):
    file = replace(birds, creates=("Birds/a", "Birds/b"), into="Birds", top="birds")
    load(file, tmp_path)
    assert (tmp_path / "Birds/a/1.png").exists() and not (tmp_path / "Birds/birds").exists()
    shutil.rmtree(tmp_path / "Birds/b")
    load(file, tmp_path)
    assert (tmp_path / "Birds/b/2.png").exists()


def test_an_archive_of_another_layout_is_named(birds, server, tmp_path):
    packed = tarred({"other/1.png": b"one"})
    server.files["birds.tar.gz"] = packed
    with pytest.raises(UserError, match=r"did not bring .*birds, but other"):
        load(replace(birds, checksum="", size=len(packed)), tmp_path)
