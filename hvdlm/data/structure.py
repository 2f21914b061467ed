"""What a shard file says of itself through HDF5, and the refusal of whatever a shard may not be.

HDF5 follows external links and external storage into any file of the system, reads missing
sources of virtual data sets as zeros, and believes any shape: nothing is opened before its link
and layout were looked at.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from hvdlm.data.entries import Extent, MalformedError, ShardEntry, TokenizerInfo
from hvdlm.data.shards import VERSION, attributes_of

_LONGEST_STRING = 1024


def check_structure(path: Path, entry: ShardEntry, tokenizer: TokenizerInfo) -> None:
    """Check that HDF5 finds in a file exactly what the manifest says, and nothing else.

    Args:
        path: A file whose digest was compared before: libhdf5 trusts what it reads.
        entry: Its row of the manifest.
        tokenizer: The data set's.

    Raises:
        MalformedError: It is no HDF5 file, no shard of this version, or differs from `entry`.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_attributes(file, entry, tokenizer)
            names = {"tokens", "doc_offsets", "block_xxh3"}
            if len(file) != len(names) or set(file) != names:
                raise MalformedError(f"must hold exactly {', '.join(sorted(names))}")
            for name in names:
                _check_data_set(file, name, getattr(entry.extents, name))
    except MalformedError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise MalformedError(f"HDF5 cannot read it ({reason:.200})") from error


def _check_attributes(file: h5py.File, entry: ShardEntry, tokenizer: TokenizerInfo) -> None:
    counts = {"tokens": entry.tokens, "documents": entry.documents, "text_bytes": entry.text_bytes}
    expected = attributes_of(tokenizer, entry.split, **counts)
    if h5py.h5a.get_num_attrs(file.id) > len(expected) or set(file.attrs) != expected.keys():
        raise MalformedError(f"must have exactly the attributes {', '.join(expected)}")
    version = _attribute(file, "version")
    if version != VERSION:
        raise MalformedError(f"version is {version!r}, this hvdlm reads {VERSION}: update hvdlm")
    for name, value in expected.items():
        found = _attribute(file, name)
        if found != value:
            raise MalformedError(f"attribute {name} is {found!r}, the manifest says {value!r}")


def _attribute(file: h5py.File, name: str) -> str | int:
    attribute = h5py.h5a.open(file.id, name.encode())
    kind = attribute.get_type()
    if attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
        raise MalformedError(f"attribute {name} must be one value")
    if kind.equal(h5py.h5t.STD_U64LE):
        return int(file.attrs[name])
    is_text = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str()
    if not is_text or kind.get_size() > _LONGEST_STRING:
        raise MalformedError(f"attribute {name} must be a short string or an unsigned 64-bit integer")
    return bytes(file.attrs[name]).decode("ascii", "backslashreplace")


def _check_data_set(file: h5py.File, name: str, extent: Extent) -> None:
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise MalformedError(f"{name} is a link to somewhere else")
    if file.get(name, getclass=True) is not h5py.Dataset:
        raise MalformedError(f"{name} is not a data set")
    data_set = h5py.h5d.open(file.id, name.encode())
    create = data_set.get_create_plist()
    if create.get_layout() != h5py.h5d.CONTIGUOUS:
        raise MalformedError(f"{name} is not contiguous (chunked, compact or virtual)")
    if create.get_external_count() or create.get_nfilters():
        raise MalformedError(f"{name} has external storage or filters")
    if not data_set.get_type().equal(h5py.h5t.py_create(np.dtype(extent.dtype))):
        raise MalformedError(f"{name} is not of type {extent.dtype}")
    space = data_set.get_space()
    if not space.is_simple() or space.get_simple_extent_dims(maxdims=True) != (extent.size,):
        raise MalformedError(f"{name} is not of shape [{extent.size}]")
    if data_set.get_offset() != extent.offset or h5py.h5a.get_num_attrs(data_set):
        raise MalformedError(f"{name} does not lie where the manifest says, or has attributes")
