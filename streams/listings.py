"""Lists that people write beside their images: tables of labels and lists of file names.

Read as they come out of editors and spreadsheets: UTF-8 with or without a byte order mark, UTF-16;
commas, semicolons or tabs; blanks around cells and empty lines; numbers as `3` or `3.0`; paths
with `/` or `\\`.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from driftline.core.errors import UserError

DELIMITERS = ",;\t"


class Labels(NamedTuple):
    """What a table of labels says."""

    names: list[str]  # of files, relative to the table's folder
    labels: np.ndarray  # int64 [N]
    classes: list[str] | None  # in sorted order, where the table names them; None: by number


def read_text(path: Path) -> str:
    """The text of a file in UTF-8 or UTF-16.

    Raises:
        UserError: if it is in neither.
    """
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8 or UTF-16 ({error}); save it as one") from (
            error
        )


def read_labels(path: Path, classes: int | None = None) -> Labels:
    """A table with the column `filename` and either `class_index`, a number, or `class`, a name.

    Args:
        classes: how many labels there are; None: as many as the table has.

    Raises:
        UserError: naming the line, for a table that lacks a column or cell, labels outside
            0 ... `classes` - 1, or a file with two labels.
    """
    about = f"{path} needs the columns filename and class_index (0, 1, ...)"
    about += "" if classes else " or class (a name)"
    try:
        header, *lines = _cells(read_text(path))
    except (ValueError, csv.Error, UserError) as error:  # no header: nothing in it
        raise UserError(f"{about}: {str(error) or 'it is empty'}") from error
    columns = [cell.lower() for cell in header[1]]
    column = "class" if classes is None and "class_index" not in columns else "class_index"
    if not {"filename", column} <= set(columns):
        raise UserError(f"{about}; its first line is {','.join(header[1])!r}")
    if not lines:
        raise UserError(f"{about}; it lists no image")
    names, values = [], []
    for line, cells in lines:
        row = dict(zip(columns, cells, strict=False))
        empty = [c for c in ("filename", column) if not row.get(c)]
        if empty:
            raise UserError(f"{about}: line {line} has no {empty[0]}; complete it or remove it")
        names.append(spelled(path.parent, row["filename"]))
        value = row[column] if column == "class" else _whole(row[column])
        if value is None or (classes and int(value) >= classes):
            most = f"0 ... {classes - 1}" if classes else "0, 1, ..."
            raise UserError(f"{about}: line {line}: class_index {row[column]!r} is none of {most}")
        values.append(value)
    known = sorted(set(values)) if column == "class" else None
    labels = [known.index(v) for v in values] if known else values
    _one_label_each(path, names, labels)
    return Labels(names, np.asarray(labels, np.int64), known)


def _cells(text: str) -> list[tuple[int, list[str]]]:
    """Number and cells of each line that is not blank.

    Raises:
        ValueError: if there is none.
    """
    first = text.lstrip().partition("\n")[0]
    named = re.fullmatch(r"sep=(.)\s*", first)  # how Excel names the delimiter
    delimiter = named[1] if named else max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    rows = [row for row in rows if any(row[1])][bool(named) :]
    if not rows:
        raise ValueError
    return rows


def _whole(text: str) -> int | None:
    """A number written as 3, 3.0 or 3,0; None for anything else."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return int(number) if number.is_integer() and number >= 0 else None


def _one_label_each(path: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    label: dict[str, int] = {}
    for name, value in zip(names, labels, strict=True):
        if label.setdefault(name, value) != value:
            raise UserError(
                f"{path}: {name} has two labels, {label[name]} and {value}; keep one of the lines"
            )


def spelled(folder: Path, name: str) -> str:
    """A file name out of a list: backslashes separate folders, unless such a file is there."""
    plain = name.replace("\\", "/").removeprefix("./")
    return name if plain != name and (folder / name).is_file() else plain


def read_list(path: Path) -> list[str]:
    """The lines of a list of files that are not blank, without blanks around them.

    Raises:
        UserError: if it is no text.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_labelled(path: Path, classes: int | None = None) -> tuple[list[str], np.ndarray]:
    """A list with a path and a label a line, `real/axe/1.jpg 7`.

    Args:
        classes: labels are below it; None: they may be any.

    Returns:
        the paths, and the labels, int64 [N].

    Raises:
        UserError: naming the line, if it is no such list, and if it is empty.
    """
    names, labels = [], []
    known = "" if classes is None else f" from 0 to {classes - 1}"
    for number, line in enumerate(read_list(path), 1):
        name, _, label = line.rpartition(" ")
        fits = label.isdigit() and (classes is None or int(label) < classes)
        if not fits or "/" not in name:
            raise UserError(f"{path}, line {number}: {line!r} is no path and label{known}")
        names.append(name.strip())
        labels.append(int(label))
    if not names:
        raise UserError(f"{path} lists no image")
    return names, np.asarray(labels, np.int64)


def find_listed(lines: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Positions in `names` of the images of a list, int64 [N], in its order.

    A line is a path relative to the common folder (blanks are part of it), with or without its
    suffix, followed by a label or not; or several paths, separated by blanks. Where only one image
    has that name, its folder may be left out.

    Returns:
        the positions, and the lines that are none of the images.
    """
    whole = {name: row for row, name in enumerate(names)}
    stems = {_stem(name): row for name, row in whole.items()}
    files = [stem.rpartition("/")[2] for stem in stems]
    count = Counter(files)
    alone = {f: row for f, row in zip(files, stems.values(), strict=True) if count[f] == 1}

    def place(text: str) -> int | None:
        for path in (text, text.replace("\\", "/").removeprefix("./")):
            for known in (whole, stems, alone):
                for key in (path, _stem(path)):
                    if key in known:
                        return known[key]
        return None

    rows: list[int] = []
    missing: list[str] = []
    for line in lines:
        for entries in ([line], [re.sub(r"[\s,;]+\d+$", "", line)], line.split()):
            places = [place(entry) for entry in entries]
            if None not in places:
                rows += [row for row in places if row is not None]
                break
        else:
            missing.append(line)
    return np.asarray(rows, np.int64), missing


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
