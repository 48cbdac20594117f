"""llama.cpp's importance matrix as a GGUF file: of every linear the sums of its squared inputs, and of how many tokens.

What `llama-quantize --imatrix` reads: ``general.type`` is ``imatrix``; of a weight ``W`` there are ``W.in_sum2``, float32 [1, in], and
``W.counts``, float32 [1, 1], and of a stack of experts a row of each for every expert (llama.cpp, tools/imatrix).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGUFWriter
from torch import Tensor

from models.gguf_header import read_header
from quant.core.errors import InputError
from quant.core.files import check_directory, temporary_name

TYPE, MADE_BY = "imatrix", "llm-quantizer"


def check_importance_file(path: Path) -> None:
    """Raise InputError where something else than such a file of this toolkit is at ``path``, or its directory cannot be made."""
    check_directory(path.parent)
    if not os.path.lexists(path):
        return
    if not path.is_symlink() and path.is_file():
        try:
            facts = read_header(path).facts
        except InputError:
            facts = {}
        if (facts.get("general.type"), facts.get("general.quantized_by")) == (TYPE, MADE_BY):
            return
    raise InputError(
        f"{path} is no importance matrix that this toolkit wrote: move it, or give another file to --imatrix"
    )


def write_importance(
    path: Path, sums: Mapping[str, tuple[Tensor, Tensor]], datasets: Sequence[str], chunks: int, chunk: int
) -> None:
    """Write the file, whole or not at all. sums: by name in the file squared inputs [n, in] and their tokens [n], n being 1
    or the number of experts, of ``chunks`` windows of ``chunk`` tokens. Raises OSError where the disk does not take it."""
    temporary = temporary_name(path)
    try:
        writer = GGUFWriter(temporary, TYPE)
        writer.add_type(TYPE)
        writer.add_quantized_by(MADE_BY)
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", chunk)
        for name, (squares, tokens) in sums.items():
            writer.add_tensor(f"{name}.in_sum2", squares.float().numpy())
            writer.add_tensor(f"{name}.counts", tokens.float().numpy()[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
