"""Reading results back from the ``.npz`` files they were saved to, with everything in them checked."""

from __future__ import annotations

import json
import os
import types
import typing
import zipfile
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is what a field of this type was saved as."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(x, parts[1]) for x in value.values())
    if kind in (tuple, list):
        return isinstance(value, list) and all(_fits(x, parts[0]) for x in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool)))


def read(path: str | os.PathLike[str], result: type[T], name: str) -> T:
    """A result of the dataclass `result`, called `name` in messages, from ``values`` and ``metadata`` in a file.

    Raises:
        ValueError: if the file is something else or its contents do not go together. OSError: if it cannot be read.
    """
    import numpy as np

    refusal = f"path must be a file written by {name}.save, got {os.fspath(path)!r}"
    try:
        with np.load(path, allow_pickle=False) as file:
            values, metadata = file["values"], json.loads(str(file["metadata"]))
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError, AttributeError, NotImplementedError) as error:
        raise ValueError(refusal) from error
    if not isinstance(metadata, dict) or metadata.pop("format", f"pyrepr.{name}") != f"pyrepr.{name}":
        raise ValueError(f"{refusal}, whose metadata are of something else")
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ValueError(f"{refusal}, whose values are {values.dtype} of shape {list(values.shape)}")
    hints, given = typing.get_type_hints(result), {}
    for field in fields(result):  # type: ignore[arg-type]
        if field.name == "values":
            continue
        value = metadata.pop(field.name, MISSING)
        if value is MISSING and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{refusal}, without {field.name}")
        if value is not MISSING and not _fits(value, hints[field.name]):
            raise ValueError(f"{refusal}, whose {field.name} is {value!r:.60}")
        if value is not MISSING:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    if metadata:
        raise ValueError(f"{refusal}, with {', '.join(sorted(map(repr, metadata)))}, which this version does not know")
    try:
        return result(values=torch.from_numpy(values.astype(np.float64)), **given)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from error
