"""Parquet files: rows by key beside a tar, and lists of prompts."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from senseflow.config import UserError
from senseflow.data.files import read_range
from senseflow.data.samples import CAPTION_COLUMNS, BadSample


def read_parquet(path: str, wanted: Sequence[str], named: Sequence[str] = ()) -> Any:
    """A pyarrow table of those columns of `wanted` that are there, and of all of `named`.

    Raises BadSample ("unreadable parquet", "missing file"), and UserError for a column of `named` that is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_range(path)
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        there = file.schema_arrow.names
        if absent := [c for c in named if c not in there]:
            raise UserError(f"data.captions: {path} has no column {absent[0]!r}: it has {', '.join(there)}")
        return file.read(columns=[c for c in there if c in wanted or c in named])
    except (pa.ArrowException, OSError) as error:
        raise BadSample("unreadable parquet", f"{path}: {str(error).splitlines()[0]}") from None


class KeyedTable:
    """Rows of one of img2dataset's parquet files by their key. Plain columns alone: no lists of structs, no bytes."""

    def __init__(self, path: str, columns: Sequence[str]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(io.BytesIO(read_range(path)))
        except (pa.ArrowException, OSError) as error:
            raise BadSample("unreadable parquet", f"{path}: {str(error).splitlines()[0]}") from None
        plain = [f.name for f in schema if not pa.types.is_nested(f.type) and not pa.types.is_binary(f.type)]
        self.table = read_parquet(path, [*plain, *CAPTION_COLUMNS], columns)
        if "key" not in plain:
            raise BadSample("unreadable parquet", f"{path} has no column 'key'")
        self.row_of = {str(key): i for i, key in enumerate(self.table.column("key").to_pylist())}

    def row(self, key: str) -> dict[str, Any]:
        """Its columns; none where the key is not there."""
        i = self.row_of.get(key)
        if i is None:
            return {}
        return {name: self.table.column(name)[i].as_py() for name in self.table.column_names}


def prompt_rows(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file's caption columns. Raises BadSample, UserError."""
    table = read_parquet(path, () if columns else CAPTION_COLUMNS, columns)
    for batch in table.to_batches():
        yield from batch.to_pylist()
