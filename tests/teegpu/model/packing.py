"""Quantised matrices as tools write them: random ones, packed value by value as each format's description says, and the
values that they stand for. Written for being read: nothing here is shared with what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from teegpu.model.folder import ModelFolder
from teegpu.model.weights import SINGLE

Made = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The tensors of a matrix by what stands after its name, and its values in fp32."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns the values of a word are of, the lowest bits first."""


@dataclass(frozen=True)
class Format:
    """``settings``: what config.json says. ``make`` takes the shape of a matrix and random numbers."""

    settings: Mapping[str, Any]
    make: Callable[[int, int, np.random.Generator], Made]


def words(values: np.ndarray, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Whole numbers (rows, n) → int32 (rows, n · bits / 32): each word has the next values, the first in its lowest
    bits; with ``order`` the one that it says."""
    count = 32 // bits
    packed = np.zeros((values.shape[0], -(-values.shape[1] // count)), dtype=np.uint64)
    for column in range(values.shape[1]):
        word, place = divmod(column, count)
        bit = bits * (order.index(place) if order else place)
        packed[:, word] |= (values[:, column].astype(np.uint64) & np.uint64(2**bits - 1)) << np.uint64(bit)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def scales(shape: tuple[int, ...], columns: int, most: int, random: np.random.Generator) -> np.ndarray:
    """fp16 values that make a matrix whose rows are about of the length one."""
    return (random.uniform(0.5, 1.5, shape) / most / np.sqrt(columns)).astype(np.float16)


def gptq(bits: int, group: int, *, ordered: bool = False, version: int = 1) -> Format:
    def make(out: int, columns: int, random: np.random.Generator) -> Made:
        size = columns if group == -1 else group
        groups = -(-columns // size)
        codes = random.integers(0, 2**bits, (columns, out))
        zeros = random.integers(0, 2**bits, (groups, out))
        scale = scales((groups, out), columns, 2**bits, random)
        index = np.arange(columns) // size
        if ordered:
            random.shuffle(index)
        values = np.array([(codes[i] - zeros[g]) * scale[g].astype(np.float32) for i, g in enumerate(index)])
        tensors = {
            "qweight": words(codes.T, bits).T.contiguous(),
            "qzeros": words(zeros - 1 if version == 1 else zeros, bits),
            "scales": torch.from_numpy(scale),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return tensors, torch.from_numpy(values.T.astype(np.float32))

    kind = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return Format({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, **kind}, make)


def awq(group: int) -> Format:
    def make(out: int, columns: int, random: np.random.Generator) -> Made:
        codes = random.integers(0, 16, (columns, out))
        zeros = random.integers(0, 16, (columns // group, out))
        scale = scales((columns // group, out), columns, 16, random)
        values = np.array(
            [(codes[i] - zeros[i // group]) * scale[i // group].astype(np.float32) for i in range(columns)]
        )
        tensors = {
            "qweight": words(codes, 4, AWQ_ORDER),
            "qzeros": words(zeros, 4, AWQ_ORDER),
            "scales": torch.from_numpy(scale),
        }
        return tensors, torch.from_numpy(values.T.astype(np.float32))

    return Format({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, make)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None} | weights
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


def packed(bits: int, group: int, *, symmetric: bool = True, ordered: bool = False) -> Format:
    def make(out: int, columns: int, random: np.random.Generator) -> Made:
        groups, half = columns // group, 2 ** (bits - 1)
        codes = random.integers(-half, half, (out, columns))
        zeros = np.zeros((out, groups), dtype=int) if symmetric else random.integers(-half, half, (out, groups))
        scale = scales((out, groups), columns, half, random)
        index = np.arange(columns) // group
        if ordered:
            random.shuffle(index)
        values = np.array([(codes[:, i] - zeros[:, g]) * scale[:, g].astype(np.float32) for i, g in enumerate(index)])
        tensors = {
            "weight_packed": words(codes + half, bits),
            "weight_scale": torch.from_numpy(scale),
            "weight_shape": torch.tensor([out, columns]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words((zeros + half).T, bits).T.contiguous()
        if ordered:
            tensors["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        return tensors, torch.from_numpy(values.T.astype(np.float32))

    args = {"num_bits": bits, "strategy": "group", "group_size": group, "symmetric": symmetric}
    return Format(compressed("pack-quantized", **args, **({"actorder": "group"} if ordered else {})), make)


def int8(strategy: str, *, symmetric: bool = True) -> Format:
    """compressed-tensors: int8 with a scale for each row, or for all; bf16 scales, as its models have them."""

    def make(out: int, columns: int, random: np.random.Generator) -> Made:
        rows = out if strategy == "channel" else 1
        codes = random.integers(-128, 128, (out, columns))
        zeros = np.zeros((rows, 1), dtype=int) if symmetric else random.integers(-128, 128, (rows, 1))
        scale = torch.from_numpy(scales((rows, 1), columns, 128, random)).to(torch.bfloat16)
        values = torch.from_numpy(codes - zeros).to(torch.float32) * scale.to(torch.float32)
        tensors = {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scale}
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
        return tensors, values

    return Format(compressed("int-quantized", strategy=strategy, symmetric=symmetric), make)


def fp8(
    settings: Mapping[str, Any], rows: int, columns: int, name: str, dtype: torch.dtype = torch.float8_e4m3fn
) -> Format:
    """FP8 with a scale for each block of ``rows`` and ``columns``, 0: all of them, under ``name``."""

    def make(out: int, width: int, random: np.random.Generator) -> Made:
        high, wide = rows or out, columns or width
        codes = torch.from_numpy(random.normal(0, 40, (out, width))).to(dtype)
        scale = torch.from_numpy(scales((-(-out // high), -(-width // wide)), width, 40, random)).to(torch.float32)
        values = codes.to(torch.float32)
        for row in range(0, out, high):
            for column in range(0, width, wide):
                values[row : row + high, column : column + wide] *= scale[row // high, column // wide]
        return {"weight": codes, name: scale.reshape(()) if not (rows or columns) else scale}, values

    return Format(settings, make)


FORMATS: dict[str, Format] = {
    "int8-channel": int8("channel"),
    "int8-tensor": int8("tensor"),
    "int8-zeros": int8("channel", symmetric=False),
    "packed-4": packed(4, 16),
    "packed-4-zeros": packed(4, 16, symmetric=False),
    "packed-8-ordered": packed(8, 16, ordered=True),
    "compressed-fp8": fp8(compressed("float-quantized", type="float"), 1, 0, "weight_scale"),
    "compressed-fp8-blocks": fp8(
        compressed("float-quantized", type="float", strategy="block", block_structure=[16, 24]), 16, 24, "weight_scale"
    ),
    "fp8-blocks": fp8(
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 24], "activation_scheme": "dynamic"},
        *(16, 24, "weight_scale_inv"),
    ),
    "fp8-tensor": fp8({"quant_method": "fp8", "activation_scheme": "static"}, 0, 0, "weight_scale"),
    "fp8-e5m2": fp8({"quant_method": "fp8", "fmt": "e5m2"}, 0, 0, "weight_scale_inv", torch.float8_e5m2),
    "fbgemm": fp8({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, 1, 0, "weight_scale"),
    "gptq-4": gptq(4, 16),
    "gptq-4-ordered": gptq(4, 16, ordered=True),
    "gptq-8-v2": gptq(8, 16, version=2),
    "gptq-2-whole": gptq(2, -1),
    "awq": awq(16),
}


Change = Callable[[dict[str, torch.Tensor]], None]


def rewritten(
    folder: ModelFolder, form: Format, *, head: bool = False, change: Change | None = None
) -> tuple[ModelFolder, ModelFolder]:
    """The model of ``folder`` with quantised matrices (in its place) and the same one with their values in fp32
    (beside it). ``head``: lm_head is quantised too. ``change``: something else is done to the quantised tensors."""
    random = np.random.default_rng(11)
    whole = load_file(folder.path / SINGLE)
    quantised, plain = {}, {}
    for name, tensor in whole.items():
        base, _, kind = name.rpartition(".")
        if tensor.dim() != 2 or kind != "weight" or "embed" in name or (name.startswith("lm_head") and not head):
            quantised[name] = plain[name] = tensor
            continue
        made, values = form.make(*tensor.shape, random)
        plain[name] = values.contiguous()
        quantised |= {f"{base}.{part}": value for part, value in made.items()}
    if change is not None:
        change(quantised)
    other = replace(folder, path=folder.path.with_name(f"{folder.path.name}-plain"))
    other.path.mkdir()
    for file in folder.path.iterdir():
        (other.path / file.name).write_bytes(file.read_bytes())
    save_file(plain, other.path / SINGLE, metadata={"format": "pt"})
    save_file(quantised, folder.path / SINGLE, metadata={"format": "pt"})
    declare(folder, form.settings)
    return folder, other


def declare(folder: ModelFolder, settings: Mapping[str, Any] | None) -> None:
    """Puts ``settings`` into config.json as how the model is quantised; None: nothing is said of that."""
    path = folder.path / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    if settings is None:
        del config["quantization_config"]
    path.write_text(json.dumps(config))
