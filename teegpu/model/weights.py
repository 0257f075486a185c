"""The weights of a model folder, read one by one, straight to where they are needed.

Opening a store reads the headers of its files only, and checks that every weight of ``ModelSpec.weights`` is there in
the right shape. A weight's bytes are read when it is asked for, in blocks, into the tensor that will keep them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch

from teegpu.errors import ModelError
from teegpu.model.digests import DigestCache
from teegpu.model.folder import ModelFolder
from teegpu.model.safetensors_file import DamagedFileError, SafetensorsFile, TensorEntry
from teegpu.model.spec import ModelSpec

BLOCK_BYTES = 8 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def checkpoint_name(name: str, *, tied_embeddings: bool = False) -> str:
    """The name in the checkpoint of a weight of ``ModelSpec.weights``.

    ``layers.3.q_proj`` → ``model.layers.3.self_attn.q_proj.weight``, ``layers.3.q_proj.bias`` → ``….q_proj.bias``.
    A tied ``lm_head`` is the embedding.
    """
    if name == "lm_head":
        return "model.embed_tokens.weight" if tied_embeddings else "lm_head.weight"
    parts = name.split(".")
    kind = parts.pop() if parts[-1] == "bias" else "weight"
    if parts[-1] in _ATTENTION:
        parts.insert(-1, "self_attn")
    elif parts[-1] in _MLP:
        parts.insert(-1, "mlp")
    return ".".join(["model", *parts, kind])


class WeightStore:
    """A model's weights by their teegpu names. Holds open files, no weights; close it, or use it with ``with``.

    Reading is by position, so several threads may load at once.

    Raises ``ModelError``, naming file and tensor, when a file is missing or damaged or a weight has another shape than
    ``spec`` says: most on opening, and on reading when the file changed since.
    """

    def __init__(self, folder: ModelFolder, spec: ModelSpec) -> None:
        self._folder = folder
        self._spec = spec
        self._files: dict[str, SafetensorsFile] = {}
        self._entries: dict[str, tuple[SafetensorsFile, TensorEntry]] = {}
        try:
            places = self._places()
            for name, shape in spec.weights.items():
                self._entries[name] = self._find(name, shape, places)
        except BaseException:
            self.close()
            raise

    def reopen(self) -> WeightStore:
        """Another store of the same weights: this one may be closed by then."""
        return WeightStore(self._folder, self._spec)

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
        return sum(self._entries[name][1].size_bytes for name in self._distinct())

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that the weight has in its file."""
        return DTYPES[self._entry(name)[1].dtype]

    def load(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """The weight as a new tensor of ``spec.weights[name]``'s shape, in ``dtype`` (None: as stored)."""
        _, entry = self._entry(name)
        out = torch.empty(entry.shape, dtype=dtype or DTYPES[entry.dtype], device=device)
        self.load_into(name, out)
        return out

    def load_into(self, name: str, out: torch.Tensor) -> None:
        """Copy the weight into ``out``, which has its shape, and any float dtype and device (it may be a slice)."""
        file, entry = self._entry(name)
        if tuple(out.shape) != entry.shape:
            raise ValueError(f"weight '{name}' has shape {entry.shape}, the destination {tuple(out.shape)}")
        stored = DTYPES[entry.dtype]
        with self._reading(name, file), torch.no_grad():
            if out.device.type == "cpu" and out.dtype == stored and out.is_contiguous():
                file.read_into(entry, 0, bytes_of(out))
                return
            # Rows in blocks: a destination of another dtype, device or stride never needs the whole tensor twice.
            rows = out if out.dim() > 1 else out.unsqueeze(0)
            row_bytes = entry.size_bytes // rows.shape[0]
            step = max(1, BLOCK_BYTES // row_bytes)
            block = torch.empty((min(step, rows.shape[0]), *rows.shape[1:]), dtype=stored)
            for first in range(0, rows.shape[0], step):
                part = block[: min(step, rows.shape[0] - first)]
                file.read_into(entry, first * row_bytes, bytes_of(part))
                rows[first : first + step].copy_(part)

    def digest(self) -> str:
        """Hex SHA-256 over the dimensions and every weight's name, dtype, shape and bytes.

        It does not depend on the model's name or on how the weights are cut into files, so two machines that hold the
        same weights agree. Kept in the user's cache for as long as no file changes.
        """
        dimensions = self._dimensions()
        cache = DigestCache(self._folder.path, self.files, dimensions)
        known = cache.get()
        if known is not None:
            return known
        value = self._hash(dimensions)
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
        return (name for name in self._spec.weights if not (name == "lm_head" and self._spec.tied_embeddings))

    def _dimensions(self) -> str:
        """Everything of the spec that changes what the model computes, as canonical JSON."""
        values = asdict(self._spec)
        for key in ("name", "eos_token_ids"):
            del values[key]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def _hash(self, dimensions: str) -> str:
        hasher = hashlib.sha256(dimensions.encode())
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for name in self._distinct():
            file, entry = self._entries[name]
            hasher.update(f"\0{name}:{entry.dtype}:{entry.shape}\0".encode())
            with self._reading(name, file):
                for start in range(0, entry.size_bytes, BLOCK_BYTES):
                    part = buffer[: min(BLOCK_BYTES, entry.size_bytes - start)]
                    file.read_into(entry, start, part)
                    hasher.update(part)
        return hasher.hexdigest()

    def _entry(self, name: str) -> tuple[SafetensorsFile, TensorEntry]:
        try:
            return self._entries[name]
        except KeyError:
            raise ValueError(f"model '{self._folder.name}' has no weight '{name}'") from None

    def _places(self) -> dict[str, str] | None:
        """Tensor name → file name of a sharded checkpoint, or None where all is in one file."""
        root = self._folder.path
        if (root / SINGLE).is_file():
            return None
        index = root / INDEX
        if not index.is_file():
            raise ModelError(
                f"{root} has no safetensors weights ({SINGLE} or {INDEX}; other formats are not read): "
                f"{self._folder.repair}"
            )
        try:
            document = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            document = None
        places = document.get("weight_map") if isinstance(document, dict) else None
        # A shard is a file of this folder: an index from elsewhere must not point outside of it.
        if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
            raise ModelError(f"{index} is damaged: {self._folder.repair}")
        return places

    def _find(
        self, name: str, shape: tuple[int, ...], places: dict[str, str] | None
    ) -> tuple[SafetensorsFile, TensorEntry]:
        tensor = checkpoint_name(name, tied_embeddings=self._spec.tied_embeddings)
        file_name = SINGLE if places is None else places.get(tensor)
        if file_name is None:
            raise ModelError(f"{self._folder.path / INDEX} lists no tensor '{tensor}': {self._folder.repair}")
        file = self._open(file_name, tensor)
        entry = file.tensors.get(tensor)
        if entry is None:
            raise ModelError(f"{file.path} holds no tensor '{tensor}': {self._folder.repair}")
        if entry.shape != shape:
            raise ModelError(
                f"{file.path}: tensor '{tensor}' has shape {entry.shape}, and config.json asks for {shape}: "
                f"{self._folder.repair}"
            )
        if entry.dtype not in DTYPES:
            raise ModelError(
                f"{file.path}: tensor '{tensor}' is of dtype {entry.dtype}, which is not supported; "
                f"supported are: {', '.join(DTYPES)}"
            )
        return file, entry

    def _open(self, file_name: str, tensor: str) -> SafetensorsFile:
        if file_name not in self._files:
            with self._explaining(self._folder.path / file_name, tensor):
                self._files[file_name] = SafetensorsFile(self._folder.path / file_name)
        return self._files[file_name]

    @contextmanager
    def _reading(self, name: str, file: SafetensorsFile) -> Iterator[None]:
        with self._explaining(file.path, checkpoint_name(name, tied_embeddings=self._spec.tied_embeddings)):
            yield

    @contextmanager
    def _explaining(self, path: Path, tensor: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise ModelError(f"{path} is missing (it holds '{tensor}'): {self._folder.repair}") from None
        except OSError as error:
            raise ModelError(
                f"{path} can't be read for '{tensor}' ({error.strerror}): {self._folder.repair}"
            ) from error
        except DamagedFileError as error:
            raise ModelError(f"{path} is damaged, read for '{tensor}': {error}; {self._folder.repair}") from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
