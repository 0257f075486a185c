"""What runs in the child process of a download or conversion: ``python -m teegpu.model.worker JOB …``.

    gguf FILE OUT                 a .gguf file → a safetensors folder, with its tokenizer
    hub REPOSITORY CACHE TOTAL [again | configuration]   what is needed of a Hugging Face repository → the hub's cache
                                  CACHE; the bytes to come go to the file TOTAL; again: also what is there;
                                  configuration: no more than that

A failure that the user can do something about is printed as one line ``ERROR_MARK`` + kind + ": " + text.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import sys
import threading
from pathlib import Path
from typing import Any, Final

from teegpu.children import address_space, limit
from teegpu.model import gguf_file
from teegpu.model.folder import TEXT_FILES, is_lfs_pointer

ERROR_MARK = "teegpu-worker-error "
"""Begins the line that says what went wrong; then the kind (one of the words below), a colon and the reason."""

UNREACHABLE, REFUSED, MISSING, DAMAGED, UNSUPPORTED, UNFAITHFUL, DISK, PACKAGE = (
    "unreachable",
    "refused",
    "missing",
    "damaged",
    "unsupported",
    "unfaithful",
    "disk",
    "package",
)

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", *TEXT_FILES]
# Other formats of the same weights lie in subfolders or under this name: they would double the download.
HUB_LEFT_OUT = ["*/*", "consolidated*"]

_BYTES_FOR_EACH: Final = 16  # of a value: in fp32, while it is unpacked, and once more
_BYTES_BESIDE: Final = 4 << 30
_VALUES_PER_SECOND: Final = 1_000_000
_SECONDS_BESIDE: Final = 300


class JobError(Exception):
    def __init__(self, kind: str, reason: object) -> None:
        told = re.sub(r"//[^/@\s]*@", "//", " ".join(str(reason).split()))  # an address may have a password in it
        super().__init__(told[:400] or type(reason).__name__)
        self.kind = kind


def convert_gguf(source: Path, out: Path) -> None:
    """Write the de-quantised model of ``source`` and its tokenizer to ``out``, in fp32: nothing of what the quantised
    values stand for is lost, whatever dtype they are computed in later. A file that says what the conversion would drop
    or make up is refused."""
    header = _check_gguf(source)
    try:
        import torch
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        # Its table lacks this one, whose keys are Qwen3's; it is to be there before its reader is imported.
        GGUF_CONFIG_MAPPING["olmo2"] = GGUF_CONFIG_MAPPING["qwen3"]
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        gguf_file.check(header, tuple(GGUF_PRE_TOKENIZER_SPLITS))
        rope = gguf_file.rope_parameters(header, source)
    except gguf_file.GgufError as error:
        raise JobError(UNFAITHFUL, error) from error
    except ImportError as error:
        raise JobError(PACKAGE, error) from error
    _limit(header.values)
    folder, file = str(source.parent), source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
        loader: Any = AutoModelForCausalLM
        model, told = loader.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except ImportError as error:
        raise JobError(PACKAGE, error) from error
    except BaseException as error:  # a damaged file surfaces as whatever the reader stumbles over
        raise JobError(DAMAGED, f"{type(error).__name__}: {error}") from error
    if missing := set(told["missing_keys"]) - {"lm_head.weight"}:
        raise JobError(UNFAITHFUL, f"its weights are not found for '{min(missing)}'")
    if header.keys.get("tokenizer.ggml.pre") in gguf_file.SMOLLM_SPLITS:
        _split_digits(tokenizer)
    if rope is not None:
        model.config.rope_parameters = rope
    for name, value in gguf_file.settings(header).items():
        setattr(model.config, name, value)
    ends = [header.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(index for index in ends if isinstance(index, int)))
    if known:
        model.generation_config.eos_token_id = known if len(known) > 1 else known[0]
    # What is saved is an ordinary fp32 model: these are the marks by which it would call itself quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).update(is_quantized=False, hf_quantizer=None)
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise JobError(DISK, error) from error


def _check_gguf(source: Path) -> gguf_file.GgufHeader:
    """The header of a file that can be read, and whose architecture is known."""
    with source.open("rb") as file:
        if is_lfs_pointer(file.read(64)):
            raise JobError(DAMAGED, "it is a Git LFS pointer, not the file itself")
    try:
        from gguf.constants import GGML_QUANT_SIZES

        header = gguf_file.read_header(source, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    except ImportError as error:
        raise JobError(PACKAGE, error) from error
    except gguf_file.GgufError as error:
        raise JobError(DAMAGED, error) from error
    if header.architecture not in gguf_file.ARCHITECTURES:
        raise JobError(UNSUPPORTED, header.architecture[:100])
    return header


def _limit(values: int) -> None:
    """Bounds what the libraries may take for a model of ``values`` values, whatever the file makes them do."""
    limit(resource.RLIMIT_AS, address_space() + values * _BYTES_FOR_EACH + _BYTES_BESIDE)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + _SECONDS_BESIDE + values / _VALUES_PER_SECOND
    limit(resource.RLIMIT_CPU, int(seconds))


def _split_digits(tokenizer: Any) -> None:
    """SmolLM's way to cut text, which transformers does not know by name."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def fetch_hub(repository: str, cache: Path, total: Path, *wishes: str) -> None:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    selection: dict[str, Any] = {
        "cache_dir": cache,
        "force_download": "again" in wishes,
        "allow_patterns": ["config.json"] if "configuration" in wishes else HUB_FILES,
        "ignore_patterns": HUB_LEFT_OUT,
    }
    try:
        files = snapshot_download(repository, dry_run=True, **selection)
        total.write_text(str(sum(file.file_size or 0 for file in files if file.will_download)))
        snapshot_download(repository, **selection)
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
            case ["hub", repository, cache, total, *wishes]:
                fetch_hub(repository, Path(cache), Path(total), *wishes)
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
