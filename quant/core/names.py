"""Names that command lines offer: checkpoint formats and the software that loads them, told before either is imported."""

DEQUANTIZED = "dequantized"
FORMATS = (DEQUANTIZED, "gptq", "gptq_v2", "compressed-tensors", "bitplane")
RUNTIMES = ("transformers", "gptqmodel", "vllm", "llama.cpp", "auto-gptq", "this toolkit")
DTYPES = ("float32", "bfloat16", "float16")
