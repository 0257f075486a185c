"""What runs in the child process of a download or conversion: ``python -m teegpu.model.worker JOB …``.

    gguf FILE OUT                 a .gguf file → a safetensors folder, with its tokenizer
    hub REPOSITORY OUT TOTAL      a Hugging Face repository → a folder; the size to expect goes to the file TOTAL

A failure that the user can do something about is printed as one line ``ERROR_MARK`` + kind + ": " + text.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

ERROR_MARK = "teegpu-worker-error "
"""Begins the line that says what went wrong; then the kind (one of the words below), a colon and the reason."""

UNREACHABLE, REFUSED, MISSING, DAMAGED, UNSUPPORTED, DISK, PACKAGE = (
    "unreachable",
    "refused",
    "missing",
    "damaged",
    "unsupported",
    "disk",
    "package",
)

HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]
# Other formats of the same weights lie in subfolders or under this name: they would double the download.
HUB_LEFT_OUT = ["*/*", "consolidated*"]

GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


class JobError(Exception):
    def __init__(self, kind: str, reason: object) -> None:
        super().__init__(" ".join(str(reason).split())[:400] or type(reason).__name__)
        self.kind = kind


def convert_gguf(source: Path, out: Path) -> None:
    """Write the de-quantised model of ``source`` and its tokenizer to ``out``, in fp32: nothing of what the quantised
    values stand for is lost, whatever dtype they are computed in later."""
    _check_gguf(source)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(source.parent), source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, local_files_only=True)
    except ImportError as error:
        raise JobError(PACKAGE, error) from error
    except Exception as error:  # a damaged file surfaces as whatever the reader stumbles over
        raise JobError(DAMAGED, error) from error
    # What is saved is an ordinary fp32 model: these are the marks by which it would call itself quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).update(is_quantized=False, hf_quantizer=None)
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise JobError(DISK, error) from error


def _check_gguf(source: Path) -> None:
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise JobError(DAMAGED, "it does not begin with the bytes 'GGUF'")
    import gguf

    try:
        reader = gguf.GGUFReader(str(source))
        field = reader.get_field("general.architecture")
        architecture = None if field is None else str(field.contents())
        end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    except Exception as error:  # as above
        raise JobError(DAMAGED, error) from error
    if architecture not in GGUF_ARCHITECTURES:
        raise JobError(UNSUPPORTED, architecture)
    size = source.stat().st_size
    if end > size:
        raise JobError(DAMAGED, f"it is truncated: its tensors end at byte {end} of {size}")


def fetch_hub(repository: str, out: Path, total: Path) -> None:
    """Download what is needed of a Hugging Face repository into ``out``, and nothing into the user's own hub cache."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    selection: dict[str, Any] = {
        "cache_dir": out.parent / "hub",
        "allow_patterns": HUB_FILES,
        "ignore_patterns": HUB_LEFT_OUT,
    }
    try:
        files = snapshot_download(repository, dry_run=True, **selection)
        total.write_text(str(sum(file.file_size or 0 for file in files)))
        snapshot_download(repository, local_dir=out, **selection)
    except (hub.DryRunError, hub.LocalEntryNotFoundError) as error:
        raise _hub_error(error.__cause__ or error) from error
    except (hub.HfHubHTTPError, hub.HFValidationError, hub.OfflineModeIsEnabled, OSError) as error:
        raise _hub_error(error) from error


def _hub_error(error: BaseException) -> JobError:
    from huggingface_hub import errors as hub

    if isinstance(error, (hub.GatedRepoError, hub.DisabledRepoError)):
        return JobError(REFUSED, error)
    if isinstance(error, (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError)):
        return JobError(MISSING, error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return JobError(DISK, error)
    return JobError(UNREACHABLE, error)


def main(arguments: list[str]) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        match arguments:
            case ["gguf", source, out]:
                convert_gguf(Path(source), Path(out))
            case ["hub", repository, out, total]:
                fetch_hub(repository, Path(out), Path(total))
            case _:
                raise JobError(MISSING, f"no such job: {arguments}")
    except JobError as error:
        sys.stderr.write(f"\n{ERROR_MARK}{error.kind}: {error}\n")
        return 3
    return 0


def _end_with_parent() -> None:
    """Standard input is a pipe that nobody writes to: it ends when the parent has died, even of SIGKILL."""
    while os.read(0, 1):
        pass
    os._exit(4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
