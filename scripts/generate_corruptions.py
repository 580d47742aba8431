"""Writes ImageNet-C, CIFAR-10-C or CIFAR-100-C in the released layout from clean images.

    python scripts/generate_corruptions.py --data /data --dataset imagenet_c --out /made
    python run.py scenario=imagenet_c data.root=/made          # scenario.corrupt=released, as usual
    python scripts/generate_corruptions.py --dataset imagenet_c --out /made --verify

ImageNet-C: <out>/ImageNet-C/<corruption>/<severity>/<wnid>/<name>.JPEG, the corrupted 224 px crop
as JPEG 85 (4:2:0, optimised Huffman tables); CIFAR: <out>/CIFAR-10-C/<corruption>.npy, uint8
[5 N, 32, 32, 3], and labels.npy. Each image equals what `scenario.corrupt=on_the_fly` makes with
the same seed, whatever the workers, the device and the order. `manifest.json` beside them holds
the settings and SHA-256 hashes, and runs on these files are labelled `[generated]`.

A finished corruption and severity is left as it is; after an interruption the same command goes on
and ends with the same bytes. Other settings are refused: one folder, one set, one process.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from driftline.core.console import program
from driftline.core.errors import UserError
from driftline.core.files import replacing, write_bytes, write_json, write_text
from driftline.core.processes import Lock
from driftline.core.stream import Skipped
from driftline.streams import corruptions as C
from driftline.streams.corrupted import MANIFEST, corrupted, corruption_names, frost_source
from driftline.streams.data.cifar10 import cifar
from driftline.streams.data.imagenet import cropped, imagenet_clean
from driftline.streams.dataset import about, existing_root
from driftline.streams.images import Files, ImageSet, channels_last
from driftline.streams.loading import Reader, Rows
from driftline.streams.pipelines import as_stored

FOLDERS = {"imagenet_c": "ImageNet-C", "cifar10_c": "CIFAR-10-C", "cifar100_c": "CIFAR-100-C"}
BATCH = 64
Unit = tuple[str, int]  # corruption, severity


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Manifest:
    """Settings and hashes of the set in `folder`; the file is rewritten after each unit.

    Raises:
        UserError: if the folder holds other things, or images of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / MANIFEST
        if self.path.exists():
            self.content = read_manifest(folder)
            known = self.content["settings"]
            differ = [f"{k}: {known.get(k)!r} there, {v!r} asked for"
                      for k, v in settings.items() if known.get(k) != v]  # fmt: skip
            if differ:
                raise UserError(
                    f"--out: {folder} holds images of other settings ({'; '.join(differ)}); name "
                    "another folder, or remove that one"
                )
            return
        if any(path.name != ".lock" for path in folder.iterdir()):
            raise UserError(
                f"--out: {folder} holds files, but no {MANIFEST} of this script; name another "
                "folder"
            )
        self.content: dict[str, Any] = {
            "made_by": "scripts/generate_corruptions.py", "settings": settings, "sha256": {}
        }  # fmt: skip
        write_json(self.path, self.content)

    def has(self, name: str) -> bool:
        return name in self.content["sha256"]

    def add(self, name: str, value: str) -> None:
        self.content["sha256"][name] = value
        write_json(self.path, self.content)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError where there is none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        content["settings"], content["sha256"]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--out: {folder / MANIFEST} is missing or damaged; generate into another folder"
        ) from error


class ImageNet:
    """The released layout of ImageNet-C."""

    def __init__(self, folder: Path, files: Files, quality: int) -> None:
        self.folder, self.quality = folder, quality
        self.names = [
            f"{files.class_names[label]}/{Path(name).stem}.JPEG"
            for name, label in zip(files.names, files.labels.tolist(), strict=True)
        ]
        if len(set(self.names)) < len(self.names):
            raise UserError(
                f"--data: two images of one class under {files.root} differ in their extension "
                "alone; rename one"
            )

    def place(self, unit: Unit) -> Path:
        return self.folder / unit[0] / str(unit[1])

    def _part(self, unit: Unit) -> Path:
        return self.folder / unit[0] / f".{unit[1]}.part"

    def _sums(self, unit: Unit) -> Path:
        return self.folder / "checksums" / f"{unit[0]}.{unit[1]}.txt"

    def there(self, unit: Unit) -> bool:
        return self.place(unit).is_dir()

    def missing(self, unit: Unit) -> np.ndarray:
        """Rows that an interrupted call has not written yet."""
        part = self._part(unit)
        return np.flatnonzero([not (part / name).exists() for name in self.names])

    def write(self, unit: Unit, pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        part = self._part(unit)
        for folder in {Path(name).parent for name in self.names}:
            (part / folder).mkdir(parents=True, exist_ok=True)
        for rows, pixels in pairs:
            for row, image in zip(rows.tolist(), pixels, strict=True):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "JPEG", quality=self.quality, optimize=True)
                write_bytes(part / self.names[row], buffer.getvalue())

    def finish(self, unit: Unit, manifest: Manifest) -> None:
        text = self._digests(self._part(unit))
        self._sums(unit).parent.mkdir(exist_ok=True)
        write_text(self._sums(unit), text)
        manifest.add(f"{unit[0]}/{unit[1]}", digest(text.encode()))
        os.replace(self._part(unit), self.place(unit))

    def _digests(self, folder: Path) -> str:
        """As sha256sum prints them."""
        lines = [f"{digest((folder / n).read_bytes())}  {n}\n" for n in sorted(self.names)]
        return "".join(lines)

    def damaged(self, unit: Unit, value: str) -> str | None:
        """What differs from the manifest."""
        try:
            sums = self._sums(unit).read_text()
            known = dict(reversed(line.split("  ", 1)) for line in sums.splitlines())
        except (OSError, ValueError):
            sums, known = "", {}
        if digest(sums.encode()) != value:
            return f"{self._sums(unit)} is missing or was changed"
        for name, wanted in known.items():
            path = self.place(unit) / name
            if not path.is_file() or digest(path.read_bytes()) != wanted:
                return f"{path} is missing or was changed"
        return None


class Cifar:
    """The released layout of CIFAR-10-C and CIFAR-100-C: five severities in one file.

    Severities are kept one by one under .parts until all five are there.
    """

    def __init__(self, folder: Path, images: ImageSet) -> None:
        self.folder, self.count = folder, len(images.labels)
        self.labels = np.tile(images.labels, 5)

    def _file(self, unit: Unit) -> Path:
        return self.folder / f"{unit[0]}.npy"

    def _part(self, unit: Unit) -> Path:
        return self.folder / ".parts" / f"{unit[0]}.{unit[1]}.npy"

    def there(self, unit: Unit) -> bool:
        return self._file(unit).is_file() or self._part(unit).is_file()

    def missing(self, unit: Unit) -> np.ndarray:
        return np.arange(self.count)

    def write(self, unit: Unit, pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        block = np.concatenate([pixels for _, pixels in pairs])
        self._part(unit).parent.mkdir(exist_ok=True)
        self._save(self._part(unit), block)

    def _save(self, path: Path, array: np.ndarray) -> None:
        with replacing(path) as part, open(part, "wb") as file:
            np.save(file, array)

    def finish(self, unit: Unit, manifest: Manifest) -> None:
        manifest.add(f"{unit[0]}/{unit[1]}", self._digest(np.load(self._part(unit))))
        self.join(unit[0])

    def join(self, name: str) -> None:
        """One file of five severities that are all there."""
        if not (self.folder / "labels.npy").exists():
            self._save(self.folder / "labels.npy", self.labels)
        parts = [self._part((name, severity)) for severity in range(1, 6)]
        if all(part.is_file() for part in parts):
            self._save(self._file((name, 1)), np.concatenate([np.load(part) for part in parts]))
        if self._file((name, 1)).is_file():
            for part in parts:
                part.unlink(missing_ok=True)
            if (self.folder / ".parts").is_dir() and not any((self.folder / ".parts").iterdir()):
                shutil.rmtree(self.folder / ".parts")

    @staticmethod
    def _digest(block: np.ndarray) -> str:
        return digest(np.ascontiguousarray(block).tobytes())

    def damaged(self, unit: Unit, value: str) -> str | None:
        """What differs from the manifest."""
        path, start = self._file(unit), (unit[1] - 1) * self.count
        if not path.is_file():
            path, start = self._part(unit), 0
        try:
            block = np.load(path, mmap_mode="r")[start : start + self.count]
            if self._digest(block) == value:
                return None
        except (OSError, ValueError):
            pass
        return f"severity {unit[1]} in {path} is missing or was changed"


def generate(args: argparse.Namespace) -> None:
    """Write what is missing.

    Raises:
        UserError: for wrong arguments, missing data, or a folder of other settings.
    """
    dataset, out = args.dataset, Path(args.out)
    if args.data is None:
        raise UserError("--data is missing: the folder of the clean images")
    names = args.corruptions.split(",") if "," in args.corruptions else args.corruptions
    names = corruption_names(names)
    if not set(args.severities) <= set(range(1, 6)):
        raise UserError(f"--severities must be from 1 to 5, got {args.severities}")
    if not 1 <= args.jpeg_quality <= 95:
        raise UserError(f"--jpeg-quality must be from 1 to 95, got {args.jpeg_quality}")
    if args.seed < 0 or args.workers < 0:
        raise UserError("--seed and --workers must be at least 0")
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={args.device} is no device here; use cpu or cuda[:n]") from error
    frost = frost_source(args.frost) if "frost" in names else C.frost_source(args.frost)

    folder = out / FOLDERS[dataset]
    clean: ImageSet
    layout: ImageNet | Cifar
    if dataset == "imagenet_c":
        files = imagenet_clean(existing_root(args.data, about("imagenet")))
        clean = cropped(files)
        layout = ImageNet(folder, files, args.jpeg_quality)
    else:
        which = "cifar10" if dataset == "cifar10_c" else "cifar100"
        clean = cifar(existing_root(args.data, about(which)), which, train=False)
        layout = Cifar(folder, clean)
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    if not lock.acquire():
        raise UserError(f"--out: another process ({lock.holder()}) writes into {folder}")
    try:
        manifest = Manifest(
            folder,
            {
                "dataset": dataset,
                "seed": args.seed,
                "jpeg_quality": args.jpeg_quality if dataset == "imagenet_c" else None,
                "frost": frost,
                "version": C.VERSION,
                "images": len(clean.labels),
                "source": clean.content(),
            },
        )
        preset = "imagenet" if dataset == "imagenet_c" else "cifar"
        units = [(name, severity) for name in names for severity in sorted(set(args.severities))]
        sets = corrupted(
            clean, units, None, preset=preset, seed=args.seed, jpeg_quality=None,
            frost_dir=args.frost,
        )  # fmt: skip
        for unit in units:
            text = f"{unit[0]}/{unit[1]}"
            if manifest.has(text) and layout.there(unit):
                if isinstance(layout, Cifar):
                    layout.join(unit[0])
                print(f"{text}: there", flush=True)
                continue
            rows = layout.missing(unit)
            reader = Reader([sets[unit]], Skipped(), args.workers, "raise", device)
            layout.write(unit, batches(reader, rows, clean))
            layout.finish(unit, manifest)
            print(f"{text}: {len(rows)} images written", flush=True)
    finally:
        lock.release()


def batches(
    reader: Reader, rows: np.ndarray, clean: ImageSet
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and their images, uint8 [B, H, W, 3]."""
    for found in reader.pixels(Rows.of(clean, rows), BATCH, as_stored):
        assert found is not None  # an unreadable image is an error here
        levels, at = found
        yield rows[at], channels_last(levels)


def verify(args: argparse.Namespace) -> None:
    """Compare the files with the hashes of the manifest.

    Raises:
        UserError: naming what is missing or was changed.
    """
    folder = Path(args.out) / FOLDERS[args.dataset]
    content = read_manifest(folder)
    layout: ImageNet | Cifar
    bare = Files(folder, [], np.zeros(0, np.int64), [])
    layout = ImageNet(folder, bare, 1) if args.dataset == "imagenet_c" else Cifar(folder, bare)
    if isinstance(layout, Cifar):
        layout.count = content["settings"]["images"]
    bad = []
    for text, value in content["sha256"].items():
        name, severity = text.split("/")
        wrong = layout.damaged((name, int(severity)), value)
        print(f"{text}: {wrong or 'as written'}", flush=True)
        bad += [wrong] if wrong else []
    if bad:
        raise UserError(
            f"{len(bad)} of {len(content['sha256'])} differ from {folder / MANIFEST} (first: "
            f"{bad[0]}); remove what differs and its line of the manifest, and generate again"
        )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=os.path.expanduser, help="folder of the clean images, as data.root"
    )
    parser.add_argument("--dataset", choices=FOLDERS, required=True)
    parser.add_argument("--out", type=os.path.expanduser, required=True, help="a later data.root")
    parser.add_argument(
        "--corruptions", default="standard", help="standard | extra | all | names with commas"
    )
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--seed", type=int, default=0, help="as scenario.corruption_seed")
    parser.add_argument("--jpeg-quality", type=int, default=85, help="of ImageNet-C files")
    parser.add_argument(
        "--frost", type=os.path.expanduser, help="folder of the frost photographs; else a texture"
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verify", action="store_true", help="check the hashes, write nothing")
    args = parser.parse_args(words)
    try:
        verify(args) if args.verify else generate(args)
    except OSError as error:
        raise UserError(f"--out={args.out}: cannot write there: {error}") from error


if __name__ == "__main__":
    try:
        sys.exit(program(main))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
