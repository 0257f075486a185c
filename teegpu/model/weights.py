"""The weights of a model folder, read one by one, straight to where they are needed.

Opening a store reads the headers of its files only, and checks that every weight of ``ModelSpec.weights`` is there in
the right shape. A weight's bytes are read when it is asked for, in blocks, into the tensor that will keep them.
Matrices that the files hold in fewer bits (``quantised``) are unpacked then, to the values that they stand for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from teegpu import ring
from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.kernels import Int8Matrix, Matrix
from teegpu.model import quantised
from teegpu.model.arch import adjustment_of, joined, stored_name
from teegpu.model.caches import DigestCache
from teegpu.model.folder import ModelFolder, is_lfs_pointer, lfs_pointer
from teegpu.model.reader import read_quantisation
from teegpu.model.safetensors_file import MAX_HEADER_BYTES, DamagedFileError, SafetensorsFile
from teegpu.model.spec import ModelSpec

BLOCK_BYTES = 8 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


_QUANTISED = (*(f".{name}" for name in quantised.NEVER_PLAIN), ".absmax", ".quant_map", "_blocks", "_scales")
_MOST_SHARDS = 4096
_HASHING_THREADS = 8

_Place = tuple[str, int]
"""File name and offset of a tensor."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of each matrix that is the share of ``rank``, one of ``ranks``: neighbouring rows, at most one more or
    less than others have."""

    rank: int = 0
    ranks: int = 1

    def of(self, rows: int) -> slice:
        return slice(self.rank * rows // self.ranks, (self.rank + 1) * rows // self.ranks)

    def rows(self, rows: int) -> int:
        """How many of ``rows`` are in this part."""
        part = self.of(rows)
        return part.stop - part.start

    def others(self) -> list[Cut]:
        """Those of all ranks, in their order."""
        return [replace(self, rank=rank) for rank in range(self.ranks)]


WHOLE = Cut()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A weight in the files: ``tensor`` is its name there, ``offset`` is from the first byte of ``file``."""

    file: SafetensorsFile
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def place(self) -> _Place:
        return self.file.path.name, self.offset


@dataclass(frozen=True, slots=True)
class _PackedEntry:
    """A matrix that the files hold in fewer bits: its tensors as ``quantised.parts`` has them. ``shape``: of the
    weight, which is the rows of ``packed`` from ``first`` on."""

    packed: quantised.Packed
    parts: Mapping[str, _Entry]
    shape: tuple[int, ...]
    first: int = 0

    @property
    def size_bytes(self) -> int:
        stored = sum(part.size_bytes for part in self.parts.values())
        return stored * self.shape[0] // self.packed.shape[0]

    @property
    def place(self) -> _Place:
        return self.parts["codes"].place

    @property
    def dtype(self) -> str:
        """What it is computed from, for the digest: the same tensors read in another way are another weight."""
        kinds = ",".join(f"{part}:{entry.dtype}:{entry.shape}" for part, entry in sorted(self.parts.items()))
        return f"{self.packed.scheme}:{kinds}:{self.first}"


def checkpoint_name(name: str) -> str:
    """The name in the checkpoint of a weight of ``ModelSpec.weights``.

    ``layers.3.q_proj`` → ``model.layers.3.self_attn.q_proj.weight``, ``layers.3.q_proj.bias`` → ``….q_proj.bias``.
    """
    if name == "lm_head":
        return "lm_head.weight"
    parts = name.split(".")
    kind = parts.pop() if parts[-1] == "bias" else "weight"
    if parts[-1] in _ATTENTION:
        parts.insert(-1, "self_attn")
    elif parts[-1] in _MLP:
        parts.insert(-1, "mlp")
    return ".".join(["model", *parts, kind])


class WeightStore:
    """A model's weights by their teegpu names. Holds open files, no weights; close it, or use it with ``with``.

    Reading is by position, so several threads may load at once. ``checked``: each weight is hashed as it is read, and
    has to be the same whenever it is read again, so that what was computed with is what ``digest`` says.

    Raises ``ModelError``, naming file and tensor, when a file is missing or damaged or a weight has another shape than
    ``spec`` says: most on opening, and on reading when the file changed since.
    """

    def __init__(self, folder: ModelFolder, spec: ModelSpec, *, checked: bool = False) -> None:
        self._folder = folder
        self._spec = spec
        self._checked = checked
        self._read: dict[_Place, bytes] = {}
        self._files: dict[str, SafetensorsFile] = {}
        self._entries: dict[str, _Entry | _PackedEntry] = {}
        try:
            self.quantisation = read_quantisation(folder)
            """How matrices are quantised; None: none is."""
            self._open()
            for name, shape in spec.weights.items():
                self._entries[name] = self._find(name, shape)
        except BaseException:
            self.close()
            raise

    def reopen(self) -> WeightStore:
        """Another store of the same weights: this one may be closed by then."""
        other = WeightStore(self._folder, self._spec, checked=self._checked)
        other._read = self._read
        return other

    @property
    def folder(self) -> ModelFolder:
        """Where the model is."""
        return self._folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the weights."""
        return tuple(file.path for file in self._files.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights as stored, a tied lm_head counted once."""
        return sum(self._entries[name].size_bytes for name in self._distinct())

    @property
    def tied(self) -> bool:
        """Whether lm_head is the embedding: config.json says so, and the files hold no other one."""
        return self._entries["lm_head"].place == self._entries["embed_tokens"].place

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that the weight has in its file; fp32 where it has to be unpacked."""
        entry = self._entry(name)
        return torch.float32 if isinstance(entry, _PackedEntry) else DTYPES[entry.dtype]

    def load(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """The weight as a new tensor of ``spec.weights[name]``'s shape, in ``dtype`` (None: as stored)."""
        out = torch.empty(self._entry(name).shape, dtype=dtype or self.stored_dtype(name), device=device)
        self.load_into(name, out)
        return out

    def load_into(self, name: str, out: torch.Tensor, first: int | None = None) -> None:
        """Copy the weight into ``out``, which has its shape, and any float dtype and device (it may be a slice).

        ``first``: only as many rows as ``out`` has, from this one on; a ``checked`` store reads weights whole."""
        entry = self._part(name, first, out.shape[0])
        if tuple(out.shape) != entry.shape:
            raise ValueError(f"weight '{name}' has shape {entry.shape}, the destination {tuple(out.shape)}")
        offset, scale = adjustment_of(self._spec, name)
        as_stored = (offset, scale) == (0.0, 1.0)
        if isinstance(entry, _PackedEntry):
            for first, stop, values in self._unpacked(entry):
                out[first:stop].copy_(values if as_stored else (values + offset) * scale)
            return
        stored = DTYPES[entry.dtype]
        hasher = hashlib.sha256() if self._checked else None
        with self._explaining(entry.file.path, entry.tensor), torch.no_grad():
            # Rows in blocks: a destination of another dtype, device or stride never needs the whole tensor twice.
            rows = out if out.dim() > 1 else out.unsqueeze(0)
            row_bytes = entry.size_bytes // rows.shape[0]
            direct = as_stored and out.device.type == "cpu" and out.dtype == stored and out.is_contiguous()
            step = max(1, BLOCK_BYTES // row_bytes) if hasher or not direct else rows.shape[0]
            block = rows if direct else torch.empty((min(step, rows.shape[0]), *rows.shape[1:]), dtype=stored)
            for first in range(0, rows.shape[0], step):
                part = rows[first : first + step] if direct else block[: min(step, rows.shape[0] - first)]
                content = bytes_of(part)
                entry.file.read_into(entry.offset + first * row_bytes, content)
                if hasher is not None:
                    hasher.update(content)
                if not direct:
                    rows[first : first + step].copy_(part if as_stored else (part.float() + offset) * scale)
        if hasher is not None:
            self._note(entry, hasher.digest())

    def load_whole(self, name: str, weight: torch.Tensor, scale: torch.Tensor, first: int | None = None) -> None:
        """The matrix as whole numbers, into ``weight``, int8 (out, in), and ``scale``, fp32 (out,): as the files have
        it where they hold int8 with a scale for each row, else as ``ring.quantise`` makes it. Equal on all machines.
        ``first``: as in ``load_into``."""
        entry = self._part(name, first, weight.shape[0])
        if not (isinstance(entry, _PackedEntry) and entry.packed.whole_numbers):
            values = torch.empty(entry.shape, dtype=self.stored_dtype(name))
            self.load_into(name, values, first)
            ring.quantise_into(values, weight, scale)
            return
        tensors = self._tensors(entry)
        codes, scales = entry.packed.integers(tensors, entry.first, entry.first + entry.shape[0])
        weight.copy_(codes)
        scale.copy_(scales * adjustment_of(self._spec, name)[1])

    def _unpacked(self, entry: _PackedEntry) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, the one after the last, their values in fp32) in blocks."""
        tensors = self._tensors(entry)
        rows, columns = entry.shape
        step = max(1, BLOCK_BYTES // (4 * columns))
        for first in range(0, rows, step):
            stop = min(first + step, rows)
            yield first, stop, entry.packed.values(tensors, entry.first + first, entry.first + stop)

    def _tensors(self, entry: _PackedEntry) -> dict[str, torch.Tensor]:
        """The tensors that a quantised matrix is made of, checked."""
        found = {part: self._whole_tensor(each) for part, each in entry.parts.items()}
        try:
            entry.packed.check(found)
        except quantised.NotReadError as error:
            where = entry.parts["codes"]
            raise ModelError(f"{where.file.path}: tensor '{where.tensor}': {error}; {self._folder.repair}") from None
        return found

    def _whole_tensor(self, entry: _Entry) -> torch.Tensor:
        dtype = DTYPES.get(entry.dtype) or quantised.CODES[entry.dtype]
        found = torch.empty(entry.shape, dtype=dtype)
        with self._explaining(entry.file.path, entry.tensor):
            entry.file.read_into(entry.offset, bytes_of(found))
        if self._checked:
            self._note(entry, hashlib.sha256(bytes_of(found)).digest())
        return found

    def digest(self) -> str:
        """Hex SHA-256 over the dimensions and every weight's name, dtype, shape and SHA-256.

        It does not depend on the model's name or on how the weights are cut into files, so two machines that hold the
        same weights agree. ``checked``: of what was read, and what was not yet is read for it. Else it is kept in the
        user's cache for as long as no file changes its size or time.
        """
        dimensions = self._spec.canonical("eos_token_ids")
        cache = DigestCache(self._folder.path, self.files, dimensions)
        known = None if self._checked else cache.get()
        if known is not None:
            return known
        value = self._hash(dimensions)
        if not self._checked:
            cache.put(value)
        return value

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _distinct(self) -> Iterator[str]:
        return (name for name in self._spec.weights if not (name == "lm_head" and self.tied))

    def _hash(self, dimensions: str) -> str:
        names = list(self._distinct())
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _HASHING_THREADS)) as pool:
            digests = list(pool.map(lambda name: self._hash_one(self._entries[name]), names))
        hasher = hashlib.sha256(dimensions.encode())
        for name, digest in zip(names, digests, strict=True):
            entry = self._entries[name]
            hasher.update(f"\0{name}:{entry.dtype}:{entry.shape}:{digest.hex()}".encode())
        return hasher.hexdigest()

    def _hash_one(self, entry: _Entry | _PackedEntry) -> bytes:
        if isinstance(entry, _PackedEntry):
            return hashlib.sha256(b"".join(self._hash_one(part) for _, part in sorted(entry.parts.items()))).digest()
        known = self._read.get(entry.place)
        if known is not None:
            return known
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(min(BLOCK_BYTES, entry.size_bytes)))
        with self._explaining(entry.file.path, entry.tensor):
            for start in range(0, entry.size_bytes, BLOCK_BYTES):
                part = buffer[: min(BLOCK_BYTES, entry.size_bytes - start)]
                entry.file.read_into(entry.offset + start, part)
                hasher.update(part)
        self._note(entry, hasher.digest())
        return hasher.digest()

    def _note(self, entry: _Entry, digest: bytes) -> None:
        if self._read.setdefault(entry.place, digest) != digest:
            raise ModelError(
                f"{entry.file.path} has changed since it was first read: tensor '{entry.tensor}' is another one now; "
                "nothing is computed with it"
            )

    def _entry(self, name: str) -> _Entry | _PackedEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise ValueError(f"model '{self._folder.name}' has no weight '{name}'") from None

    def _part(self, name: str, first: int | None, rows: int) -> _Entry | _PackedEntry:
        entry = self._entry(name)
        if first is None or (first, rows) == (0, entry.shape[0]):
            return entry
        if self._checked or not 0 <= first <= first + rows <= entry.shape[0]:
            raise ValueError(f"rows {first} to {first + rows} of '{name}', {entry.shape}, can't be read alone")
        shape = (rows, *entry.shape[1:])
        if isinstance(entry, _PackedEntry):
            return replace(entry, shape=shape, first=entry.first + first)
        row_bytes = entry.size_bytes // entry.shape[0]
        return replace(entry, shape=shape, offset=entry.offset + first * row_bytes, size_bytes=rows * row_bytes)

    def _open(self) -> None:
        """Opens the model's one file, or the shards that its index names, which says no more than that."""
        root = self._folder.path
        if (root / SINGLE).exists():
            names = [SINGLE]
        elif (root / INDEX).exists():
            names = sorted(set(self._shards().values()))
        else:
            raise ModelError(
                f"{root} has no safetensors weights ({SINGLE} or {INDEX}; other formats are not read): "
                f"{self._folder.repair}"
            )
        for name in names:
            path = root / name
            with self._explaining(path, ""):
                descriptor = self._folder.open(name)
                if is_lfs_pointer(os.pread(descriptor, 64, 0)):
                    os.close(descriptor)
                    raise lfs_pointer(path)
                self._files[name] = SafetensorsFile(path, descriptor)

    def _shards(self) -> dict[str, str]:
        """Tensor name → file name, of a sharded checkpoint."""
        index = self._folder.path / INDEX
        try:
            with os.fdopen(self._folder.open(INDEX), "rb") as file:
                document = json.loads(file.read(MAX_HEADER_BYTES))
            places = {tensor: os.path.normpath(name) for tensor, name in document["weight_map"].items()}
        except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
            places = {}
        # A shard is a file of this folder: an index from elsewhere must not point outside of it.
        if not places or not all(Path(name).name == name != ".." for name in places.values()):
            raise ModelError(f"{index} is damaged: {self._folder.repair}")
        if len(set(places.values())) > _MOST_SHARDS:
            raise ModelError(f"{index} names more than {_MOST_SHARDS} files: {self._folder.repair}")
        return places

    def _find(self, name: str, shape: tuple[int, ...]) -> _Entry | _PackedEntry:
        part = joined(self._spec, name)
        tensor = checkpoint_name(stored_name(self._spec, name) if part is None else part[0])
        rows = sum(self._spec.weights[other][0] for other in self._spec.weights if part and self._joins(other, part[0]))
        wanted = (rows, *shape[1:]) if part else shape
        found = self._stored(tensor, wanted)
        if self._spec.tied_embeddings and name in ("embed_tokens", "lm_head"):
            other = self._stored(checkpoint_name("lm_head" if name == "embed_tokens" else "embed_tokens"), wanted)
            if found is None or (name == "lm_head" and other is not None and self._same(found, other)):
                found = other
        if found is None:
            raise self._explained(self._why_missing(tensor))
        first = part[1] if part else 0
        if isinstance(found, _PackedEntry):
            return replace(found, shape=shape, first=first)
        if found.dtype not in DTYPES:
            raise self._explained(
                f"{found.file.path}: tensor '{tensor}' is of dtype {found.dtype}, which is not supported; "
                f"supported are: {', '.join(DTYPES)}"
            )
        if found.shape != wanted:
            raise self._explained(
                f"{found.file.path}: tensor '{tensor}' has shape {found.shape}, and config.json asks for {wanted}: "
                f"{self._both()}{self._folder.repair}"
            )
        if part is None:
            return found
        row_bytes = found.size_bytes // rows
        return replace(found, shape=shape, offset=found.offset + first * row_bytes, size_bytes=shape[0] * row_bytes)

    def _stored(self, tensor: str, shape: tuple[int, ...]) -> _Entry | _PackedEntry | None:
        """The tensor, or what stands for it in a model that is quantised: in the way that it is said to be, whole, and
        never beside another one that says something else."""
        plain = self._named(tensor)
        base, _, kind = tensor.rpartition(".")
        if self.quantisation is None or len(shape) != 2 or kind != "weight":
            return plain
        beside = {name: entry for name in quantised.NEVER_PLAIN if (entry := self._named(f"{base}.{name}"))}
        if not beside and (plain is None or plain.dtype in DTYPES):
            return plain
        if plain is not None and plain.dtype in DTYPES:
            name, other = next(iter(beside.items()))
            raise ModelError(
                f"{other.file.path}: tensor '{tensor}' is there in full, of {plain.dtype}, and quantised as well "
                f"('{base}.{name}'): {self._folder.repair}"
            )
        rows, columns = shape
        problems = []
        for scheme in self.quantisation.schemes:
            parts: dict[str, _Entry] = {}
            problem = self._gather(base, quantised.parts(scheme, (rows, columns)), parts)
            if not problem:
                return _PackedEntry(quantised.Packed(scheme, (rows, columns)), parts, shape)
            problems.append(problem)
        where = next(iter([*beside.values(), *([plain] if plain else [])])).file.path
        raise ModelError(
            f"{where}: {problems[0]}, and config.json says {self.quantisation.about}: {self._both()}"
            f"{self._folder.repair}"
        )

    def _gather(self, base: str, wanted: Mapping[str, quantised.Part], found: dict[str, _Entry]) -> str:
        """Collects the tensors of the matrix ``base``; returns what is wrong with one of them, or nothing."""
        for part, asked in wanted.items():
            entry = next(filter(None, (self._named(f"{base}.{name}") for name in asked.names)), None)
            name = f"{base}.{asked.names[0]}"
            if entry is None:
                if asked.optional:
                    continue
                return f"tensor '{name}' is missing"
            if entry.dtype not in asked.dtypes:
                return f"tensor '{entry.tensor}' is of dtype {entry.dtype}"
            if entry.shape not in asked.shapes:
                return f"tensor '{entry.tensor}' has shape {entry.shape}, not {asked.shapes[0]}"
            found[part] = entry
        return ""

    def _joins(self, name: str, whole: str) -> bool:
        part = joined(self._spec, name)
        return part is not None and part[0] == whole

    def _named(self, tensor: str) -> _Entry | None:
        """The tensor, also where the checkpoint is of the model without its head, whose names lack the prefix, or of
        one of images too, in which it is a part."""
        bare = tensor.removeprefix("model.")
        for name in (tensor, bare, f"language_model.{tensor}", f"model.language_model.{bare}"):
            for file in self._files.values():
                if name in file.tensors:
                    entry = file.tensors[name]
                    return _Entry(file, name, entry.dtype, entry.shape, entry.offset, entry.size_bytes)
        return None

    def _same(self, one: _Entry | _PackedEntry, other: _Entry | _PackedEntry) -> bool:
        """Whether two weights hold the same bytes: a tied head that is stored once more."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return self._hash_one(one) == self._hash_one(other)

    def _why_missing(self, tensor: str) -> str:
        single = SINGLE in self._files
        where = f"{self._files[SINGLE].path} holds" if single else f"no shard of {self._folder.path / INDEX} holds"
        untied = ", and config.json does not tie it to the embedding" if tensor == checkpoint_name("lm_head") else ""
        return f"{where} {'no ' if single else ''}tensor '{tensor}'{untied}: {self._both()}{self._folder.repair}"

    def _both(self) -> str:
        """What to say where one file is read though there is an index of others."""
        if SINGLE not in self._files or not (self._folder.path / INDEX).exists():
            return ""
        return f"{INDEX} is there as well, and {SINGLE} goes first: remove it if the shards are the model; or "

    def _explained(self, reason: str) -> ModelError:
        """The error for ``reason``; or, of weights that are packed in fewer bits, that they are: by the names of what
        lies beside them."""
        for file in self._files.values():
            for name, entry in file.tensors.items():
                if name.endswith(_QUANTISED) or entry.dtype.startswith(("F8", "F4")):
                    return UnsupportedModelError(
                        f"{file.path} holds quantised weights ({name[:100]!r}), and config.json does not say how: use "
                        "the model's original weights (fp32, fp16 or bf16 safetensors) or a .gguf file"
                    )
        return ModelError(reason)

    @contextmanager
    def _explaining(self, path: Path, tensor: str) -> Iterator[None]:
        holds = f" (it holds '{tensor}')" if tensor else ""
        reading = f" for '{tensor}'" if tensor else ""
        try:
            yield
        except FileNotFoundError:
            raise ModelError(f"{path} is missing{holds}: {self._folder.repair}") from None
        except OSError as error:
            raise ModelError(f"{path} can't be read{reading} ({error.strerror}): {self._folder.repair}") from error
        except DamagedFileError as error:
            raise ModelError(
                f"{path} is damaged{', read' + reading if reading else ''}: {error}; {self._folder.repair}"
            ) from error


def load_matrix(
    store: WeightStore,
    spec: ModelSpec,
    names: tuple[str, ...],
    dtype: torch.dtype,
    *,
    int8: bool = False,
    device: torch.device | str = "cpu",
    cut: Cut = WHOLE,
) -> Matrix:
    """The matrices ``names``, which share an input, as one, one after the other, for products in ``dtype`` on
    ``device``; ``int8``: of int8 weights, on a CPU. Of each its part by ``cut``."""
    parts = [cut.of(spec.weights[name][0]) for name in names]
    rows, columns = sum(part.stop - part.start for part in parts), spec.weights[names[0]][1]
    whole = torch.empty((rows, columns), dtype=torch.int8 if int8 else dtype, device=device)
    scale = torch.empty(rows if int8 else 0)
    start = 0
    for name, part in zip(names, parts, strict=True):
        place = slice(start, start + part.stop - part.start)
        if int8:
            store.load_whole(name, whole[place], scale[place], part.start)
        else:
            store.load_into(name, whole[place], part.start)
        start = place.stop
    return Int8Matrix(whole, scale, dtype) if int8 else Matrix(whole)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
