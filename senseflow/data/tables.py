"""Parquet files: rows by key beside a tar, and lists of prompts."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from senseflow.config import UserError
from senseflow.data.files import read_range
from senseflow.data.samples import CAPTION_COLUMNS, BadSample


def read_parquet(path: str, data: bytes, wanted: Callable[[Any], bool], named: Sequence[str] = ()) -> Any:
    """A pyarrow table of the columns whose field is `wanted`, and of all of `named`.

    Raises BadSample ("unreadable parquet"), and UserError for a column of `named` that is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        there = file.schema_arrow.names
        if absent := [c for c in named if c not in there]:
            raise UserError(f"data.captions: {path} has no column {absent[0]!r}: it has {', '.join(there)}")
        return file.read(columns=[field.name for field in file.schema_arrow if field.name in named or wanted(field)])
    except (pa.ArrowException, OSError) as error:
        raise BadSample("unreadable parquet", f"{path}: {str(error).splitlines()[0]}") from None


def _row(table: Any, i: int) -> dict[str, Any]:
    try:
        return {name: table.column(name)[i].as_py() for name in table.column_names}
    except UnicodeDecodeError as error:  # a writer is free to put any bytes into a column of strings
        raise BadSample("caption is not UTF-8", f"byte {error.start}") from None


class KeyedTable:
    """Rows of one of img2dataset's parquet files by their key. Plain columns alone: no lists of structs, no bytes."""

    def __init__(self, path: str, columns: Sequence[str]):
        import pyarrow as pa

        def wanted(field: Any) -> bool:
            plain = not pa.types.is_nested(field.type) and not pa.types.is_binary(field.type)
            return plain or field.name in CAPTION_COLUMNS

        data = read_range(path)
        self.digest = hashlib.sha256(data).digest()
        self.table = read_parquet(path, data, wanted, columns)
        if "key" not in self.table.column_names:
            raise BadSample("unreadable parquet", f"{path} has no column 'key'")
        self.row_of = {str(key): i for i, key in enumerate(self.table.column("key").to_pylist())}

    def row(self, key: str) -> dict[str, Any]:
        """Its columns; none where the key is not there. Raises BadSample for text that is no UTF-8."""
        i = self.row_of.get(key)
        return {} if i is None else _row(self.table, i)


def prompt_rows(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any] | BadSample]:
    """The rows of a parquet file's caption columns, or why one cannot be used. Raises BadSample, UserError."""
    table = read_parquet(path, read_range(path), lambda field: not columns and field.name in CAPTION_COLUMNS, columns)
    for batch in table.to_batches():
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for i in range(len(batch)):
                try:
                    yield _row(batch, i)
                except BadSample as error:
                    yield error
