"""What tests of equivalent models ask for."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.load import load_model


def plain_norm(self, x: torch.Tensor) -> torch.Tensor:
    """The library's RMSNorm, which computes in float32 whatever it is given."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def exact(model_dir, tmp_path, monkeypatch):
    """Opens a tiny model whose tensors and arithmetic are float64, also inside norms and softmax."""

    def open_model(name: str, attention: str | None = None):
        source, copy = Path(model_dir(name)), tmp_path / f"{name}-64"
        if not copy.exists():
            shutil.copytree(source, copy)
            tensors = load_file(source / "model.safetensors")
            save_file({k: t.double() for k, t in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
        model = load_model(str(copy), dtype=torch.float64, cache_dir=tmp_path, attn_implementation=attention)
        for norm in {type(m) for m in model.module.modules() if hasattr(m, "variance_epsilon")}:
            monkeypatch.setattr(norm, "forward", plain_norm)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model

    return open_model
