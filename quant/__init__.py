"""Post-training quantization of large language models: one file a solver, the equations in sight."""

__version__ = "0.1.0"
