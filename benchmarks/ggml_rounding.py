"""Run by the Python of another environment: weights rounded to types of blocks by llama.cpp's own quantizer.

python benchmarks/ggml_rounding.py TYPES WEIGHTS IMPORTANCE OUT    (JSON of types by name; npz of float32: [out, in] by name, [in]
by name, and what came)

The library of xllamacpp exports ggml's functions. IMPORTANCE "-": none is given, which the types here do not ask for.
"""

import ctypes
import json
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

FLOATS = ctypes.POINTER(ctypes.c_float)


def library() -> ctypes.CDLL:
    """ggml as it is inside xllamacpp."""
    place = find_spec("xllamacpp")
    (file,) = Path(place.submodule_search_locations[0]).glob("xllamacpp*.so")
    ggml = ctypes.CDLL(str(file))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS,
    ]  # fmt: skip
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    return ggml


def rounded(ggml: ctypes.CDLL, kind: int, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The blocks of a weight, uint8 [out, bytes]."""
    rows, columns = weight.shape
    out = np.empty((rows, ggml.ggml_row_size(kind, columns)), np.uint8)
    weight = np.ascontiguousarray(weight, np.float32)
    given = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data_as(FLOATS)
    written = ggml.ggml_quantize_chunk(kind, weight.ctypes.data_as(FLOATS), out.ctypes.data, 0, rows, columns, given)
    if written != out.nbytes:
        raise SystemExit(f"{written} bytes written, {out.nbytes} expected")
    return out


def main(types: str, weights: str, importance: str, out: str) -> None:
    """Round everything."""
    ggml, given = library(), None if importance == "-" else np.load(importance)
    kinds = json.loads(Path(types).read_bytes())
    started = time.perf_counter()
    answers = {
        name: rounded(ggml, kinds[name], weight, None if given is None else given[name])
        for name, weight in np.load(weights).items()
    }
    said = {"seconds": time.perf_counter() - started, "version": version("xllamacpp")}
    np.savez(out, **answers)
    sys.stdout.write(f"{json.dumps(said)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
