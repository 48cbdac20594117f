"""Writing quantized models as checkpoints that other software loads."""
