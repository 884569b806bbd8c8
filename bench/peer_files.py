"""The built-in model's weights in the files that peers read. Invariant: a file is whole or not there."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from blitzjax.engine.locations import packaged_gguf


def as_gguf(target: Path, dtype: str) -> None:
    """Writes the built-in model's GGUF again with matrices in `dtype`; everything else as it is. Once."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = gguf.GGUFReader(packaged_gguf("smollm2-135m"))
    half = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float16": gguf.GGMLQuantizationType.F16}[dtype]
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, source.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bfloat16" else gguf.LlamaFileType.MOSTLY_F16)
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, sub = field.types[0], field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stored = half if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
