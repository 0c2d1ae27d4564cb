"""Defines where tensors lie in a safetensors file, and reads such a file without a copy of it.

The format is 8 bytes with the length of a header, the header, and the tensors one behind the other. The header is a
JSON object with dtype, shape and place of each. It is written here because tensors are, piece by piece, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LENGTH = 8  # bytes that have the header's length
_METADATA = "__metadata__"


class Kind(NamedTuple):
    """The dtype and the shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Place(NamedTuple):
    """Bytes of a file: from ``start`` on, so many."""

    start: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """A file before it has its tensors: what stands at its begin, where each tensor lies, and its size."""

    head: bytes
    places: Mapping[str, Place]
    nbytes: int


def unwritable(name: str, t: object) -> str | None:
    """Why a value cannot be in a file under this name; None if it can be."""
    if not isinstance(t, Tensor):
        return f"a {type(t).__module__}.{type(t).__qualname__}, no tensor"
    if t.layout != torch.strided or t.is_meta:
        return f"a tensor whose values cannot be written as they lie ({t.layout} on {t.device})"
    if t.dtype not in _NAMES:
        return f"a tensor of {t.dtype}, which safetensors does not have"
    return f"named as safetensors names what is no tensor ({_METADATA})" if name == _METADATA else None


def layout(kinds: Mapping[str, Kind]) -> Layout:
    """The layout of a file with these tensors, those of wide dtypes first, so that each is aligned."""
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for key in sorted(kinds, key=lambda k: -kinds[k].dtype.itemsize):
        kind = kinds[key]
        offsets[key] = end
        end += kind.nbytes
        header[key] = {"dtype": _NAMES[kind.dtype], "shape": kind.shape, "data_offsets": [offsets[key], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    head = len(text).to_bytes(_LENGTH, "little") + text
    return Layout(head, {k: Place(len(head) + o, kinds[k].nbytes) for k, o in offsets.items()}, len(head) + end)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new file with these tensors, one after another."""
    plan = layout({key: Kind(t.dtype, tuple(t.shape)) for key, t in tensors.items()})
    with open(path, "wb") as file:
        file.write(plan.head)
        file.writelines(as_bytes(tensors[key].detach().cpu()) for key in plan.places)


def as_bytes(t: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, copied only if they are not one run of memory."""
    if not t.numel():
        return memoryview(b"")
    return t.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().data


def places(path: Path) -> dict[str, tuple[Kind, Place]]:
    """What tensors a file holds, and where; raises `CheckpointMismatch` for a file that is none of tensors."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            header = json.loads(file.read(length if length < size else 0))
        found = {
            key: (
                Kind(_DTYPES[entry["dtype"]], tuple(entry["shape"])),
                Place(_LENGTH + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]),
            )
            for key, entry in header.items()
            if key != _METADATA
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"{path} is damaged: its header cannot be read") from error
    if any(kind.nbytes != place.nbytes or place.start + place.nbytes > size for kind, place in found.values()):
        raise CheckpointMismatch(f"{path} is damaged: its tensors do not lie where its header has them")
    return found


def read_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of these files, as the file system holds them: nothing is copied. They must not be written to."""
    found: dict[str, Tensor] = {}
    for path in paths:
        size = path.stat().st_size
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        for key, (kind, place) in places(path).items():
            own = whole[place.start : place.start + place.nbytes]
            is_aligned = own.data_ptr() % kind.dtype.itemsize == 0 or not place.nbytes
            own = own if is_aligned and place.nbytes else own.clone()
            found[key] = own.view(kind.dtype).view(kind.shape)
    return found
