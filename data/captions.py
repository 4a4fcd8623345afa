"""The captions of a folder of images, as people keep them: beside each image, in one table, or as names of folders."""

import csv
import json
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from omniform.data.folder_tree import FileError, FolderTree
from omniform.data.schema import DataError

Source = Literal["files", "metadata", "folder"]
TABLES = ("metadata.csv", "metadata.jsonl")
DEFAULT_KEYS = ("caption", "text")
MAX_CAPTION_BYTES = 2**20


class Captions:
    """Finds the caption of an image.

    Args:
        source: "files": NAME.txt beside NAME.jpg, or else a string in NAME.json; "metadata": a row of metadata.csv or
            metadata.jsonl at the top, whose `file_name` is the image's path (Hugging Face's imagefolder; the table is
            held in memory); "folder": the name of the folder that the image is in, with spaces for underscores; None:
            "metadata" where there is such a table, "files" otherwise.
        key: of the caption in JSON or of its column; None: "caption", or else "text".

    Raises:
        DataError: a table that is missing or cannot be read, names an image twice, or has no such column.
    """

    def __init__(self, tree: FolderTree, source: Source | None = None, key: str | None = None) -> None:
        tables = [tree.root / name for name in TABLES if (tree.root / name).is_file()]
        self.source = source or ("metadata" if tables else "files")
        self._tree, self._keys = tree, DEFAULT_KEYS if key is None else (key,)
        self.rows: dict[str, Any] = {}
        if self.source == "metadata":
            if len(tables) != 1:
                found = " and ".join(path.name for path in tables) or "neither"
                raise DataError(f"{tree.root} holds {found}: expected either {' or '.join(TABLES)}")
            self.rows = self._read_table(tables[0])

    def find(self, path: str) -> str | None:
        """Return the caption of the image at `path`, without space around it; None if it has none, or a blank one.

        With a table, each row can be found once: `rows` keeps those that no image asked for.

        Raises:
            FileError: there is one that is not text, or longer than MAX_CAPTION_BYTES.
        """
        found = self._find(path)
        if found is None:
            return None
        if not isinstance(found, str):
            raise FileError("caption is not text", path, f"a {type(found).__name__}")
        try:
            size = len(found.encode())
        except UnicodeEncodeError as error:
            raise FileError("caption is not text", path, f"no character at position {error.start}") from error
        if size > MAX_CAPTION_BYTES:
            raise FileError("caption too long", path, f"{size} bytes, expected at most {MAX_CAPTION_BYTES}")
        return found.strip() or None

    def _find(self, path: str) -> object:
        if self.source == "folder":
            return posixpath.basename(posixpath.dirname(path)).replace("_", " ")
        if self.source == "metadata":
            return self.rows.pop(path, None)
        stem = posixpath.splitext(path)[0]
        # os.path.exists is False where a name with this ending is too long; Path.exists raises.
        for name in (f"{stem}.txt", f"{stem}.TXT"):
            if os.path.exists(self._tree.root / name):
                text = self._read(name)
                if text.strip():
                    return text
        for name in (f"{stem}.json", f"{stem}.JSON"):
            if os.path.exists(self._tree.root / name):
                try:
                    record = json.loads(self._read(name))
                except (ValueError, RecursionError) as error:
                    if isinstance(error, FileError):
                        raise
                    raise FileError("caption file is not JSON", name, str(error)) from error
                if not isinstance(record, dict):
                    raise FileError("caption file is not JSON", name, f"a {type(record).__name__}, expected an object")
                return next((record[key] for key in self._keys if record.get(key) is not None), None)
        return None

    def _read(self, name: str) -> str:
        try:
            return self._tree.read(name, MAX_CAPTION_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise FileError("caption is not UTF-8", name, str(error)) from error
        except FileError as error:
            raise FileError(f"caption: {error.reason}", name) from error

    def _read_table(self, table: Path) -> dict[str, Any]:
        self._tree.check(table.name)
        rows: dict[str, Any] = {}
        read = _csv_rows if table.suffix == ".csv" else _json_rows
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                for number, row in read(file, self._keys):
                    name = row.get("file_name")
                    if not isinstance(name, str) or not name:
                        raise DataError(f"{table}, line {number}: no `file_name`, expected the path of an image")
                    path = posixpath.normpath(name)
                    if path in rows:
                        raise DataError(f"{table}, line {number}: {name!r} stands there twice: keep one row per image")
                    rows[path] = next((row[key] for key in self._keys if row.get(key) is not None), None)
        except DataError:
            raise
        except (csv.Error, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, endless digits
            raise DataError(f"{table} cannot be read: {error}") from error
        return rows


def _csv_rows(file: Any, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    columns = reader.fieldnames or []
    if "file_name" not in columns or not set(keys) & set(columns):
        raise DataError(
            f"{file.name} has the columns {', '.join(columns) or 'none'}: expected file_name and "
            f"{' or '.join(keys)} (--caption-key names another)"
        )
    for row in reader:
        yield reader.line_num, row


def _json_rows(file: Any, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{file.name}, line {number}: a {type(row).__name__}, expected an object")
            yield number, row
