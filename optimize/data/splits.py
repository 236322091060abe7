"""Which rows belong to which split: shares, repeats and overlap. Rows are numbers here, their content a hash each."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimize.artifact import canonical_json
from optimize.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa


def contents(rows: pa.Table, passage: int = 0) -> list[bytes | None]:
    """For every row a hash of what a model is given: all columns but `label`, blind to Unicode form and white space.

    With `passage` the hash is of the row and as many of those that follow as make up so many characters of text, and
    None where they don't or the row is blank: in a running text a heading or an empty line may be repeated anywhere,
    and what must not be is a passage.
    """
    inputs = rows.drop_columns([name for name in rows.column_names if name == "label"])
    normal = [{name: _normal(value) for name, value in row.items()} for row in _one_by_one(inputs)]
    if not passage:
        return [hashlib.sha256(canonical_json(row)).digest() for row in normal]
    texts = [" ".join(value for value in row.values() if isinstance(value, str)) for row in normal]
    hashes: list[bytes | None] = []
    end = size = 0
    for start, text in enumerate(texts):
        while size < passage and end < len(texts):
            size += len(texts[end])
            end += 1
        joined = " ".join(filter(None, texts[start:end]))
        hashes.append(hashlib.sha256(joined.encode()).digest() if text and size >= passage else None)
        size -= len(text)
    return hashes


def _normal(value: Any) -> Any:
    if isinstance(value, bytes):
        return _hashed(value)
    return " ".join(unicodedata.normalize("NFC", value).split()) if isinstance(value, str) else value


def _hashed(value: Any) -> Any:
    """What JSON can hold: the bytes of an image by their hash."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value


def digest(rows: pa.Table) -> str:
    """Of the rows' values in order; no library's file format has a say in it."""
    hasher = hashlib.sha256()
    for row in _one_by_one(rows):
        hasher.update(canonical_json({name: _hashed(value) for name, value in row.items()}) + b"\n")
    return f"sha256:{hasher.hexdigest()}"


def _one_by_one(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """A part of the rows at a time as Python's objects: they may be images."""
    for batch in rows.to_batches(max_chunksize=1_000):
        yield from batch.to_pylist()


def class_labels(rows: pa.Table) -> list[Any] | None:
    """The labels to stratify by, or None where the rows have no classes."""
    import pyarrow as pa

    if "label" not in rows.column_names:
        return None
    if pa.types.is_floating(rows["label"].type) or pa.types.is_nested(rows["label"].type):
        return None
    labels: list[Any] = rows["label"].to_pylist()
    return labels


def without_repeats(
    groups: Mapping[str, Sequence[int]], contents: Sequence[bytes | None], *, whole: str
) -> dict[str, list[int]]:
    """Keep the first of the rows that are the same, in the order of the groups. The group `whole` keeps every row."""
    seen: set[bytes | None] = set()
    kept: dict[str, list[int]] = {}
    for name, rows in groups.items():
        kept[name] = []
        for row in rows:
            content = contents[row]
            if name == whole or content is None or content not in seen:
                kept[name].append(row)
            seen.add(content)
    return kept


def shared_out(
    rows: Sequence[int], shares: Mapping[str, float], labels: Sequence[Any] | None, *, seed: int | None
) -> dict[str, list[int]]:
    """Shuffle, spread every label evenly over the whole order, and cut: each split has its share of each label.

    Without a seed nothing is shuffled: each split is a run of consecutive rows, in the order of `shares`.
    """
    order = list(rows)
    if seed is not None:
        random.Random(seed).shuffle(order)
    if labels is not None:
        totals = Counter(labels[row] for row in order)
        seen: Counter[Any] = Counter()
        position = {}
        for row in order:
            position[row] = (seen[labels[row]] + 0.5) / totals[labels[row]]
            seen[labels[row]] += 1
        order.sort(key=position.__getitem__)
    splits, start, share = {}, 0, 0.0
    for split in sorted(shares) if seed is not None else shares:
        share += shares[split]
        end = round(share * len(order))
        splits[split] = order[start:end]
        start = end
    return splits


def overlap(splits: Mapping[str, Iterable[int]], contents: Sequence[bytes | None]) -> list[tuple[str, int, str, int]]:
    """Rows that an earlier split has too: (that split, its row, this split, this row)."""
    first: dict[bytes, tuple[str, int]] = {}
    repeats = []
    for split, rows in splits.items():
        for row in rows:
            content = contents[row]
            if content is None:
                continue
            other, twin = first.setdefault(content, (split, row))
            if other != split:
                repeats.append((other, twin, split, row))
    return repeats


def overlap_error(
    repeats: Sequence[tuple[str, int, str, int]], places: Sequence[tuple[object, int]], rows: pa.Table
) -> SourceError:
    """Names some of the rows that `overlap` found; `places` has for every row its file and its number there."""
    told = []
    for other, twin, split, row in repeats[:3]:
        texts = [value for value in rows.slice(row, 1).to_pylist()[0].values() if isinstance(value, str)]
        named = [f"row {number} of {file}" for file, number in (places[twin], places[row])]
        told.append(f"{named[0]} ({other}) is {named[1]} ({split}): {' '.join(texts)[:60]!r}")
    if len(repeats) > len(told):
        told.append(f"and {len(repeats) - len(told)} more")
    count = "1 row is" if len(repeats) == 1 else f"{len(repeats)} rows are"
    return SourceError(
        f"{count} in more than one split, so that scores would flatter: {'; '.join(told)}",
        hint="set data.deduplicate: true to drop repeated rows, or clean the data",
    )
