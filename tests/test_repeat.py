"""A run is repeated from its manifest alone."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import main
import model_quantizer
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.run.repeat import repeat
from quant.run.request import Request
from quant.run.stored import Allowed
from tests.helpers import asked, config_for, perform, replace

OWN = Allowed(paths=True)  # what is repeated here was made here


@pytest.mark.parametrize("learned", [False, True])
def test_identical_and_not(learned, model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path, options={})
    if learned:
        config = replace(
            config, learner="omniquant", solver="rtn", learning=asked(abits=4, epochs=1, batch=6), act=ActSpec(4, 8)
        )
    stored = Request.from_json(config.to_json(), "the manifest", OWN)
    assert replace(stored, run_dir=config.output.run_dir, cache_dir=config.session.cache_dir) == config
    perform(config)
    assert repeat(config.output.run_dir, tmp_path / "again", OWN, config.session.cache_dir) == []
    other = replace(config, seed=1, run_dir=tmp_path / "other")
    perform(other)
    file = Path("blocks") / "00001.safetensors"
    shutil.copy(other.output.run_dir / file, config.output.run_dir / file)
    assert repeat(config.output.run_dir, tmp_path / "another", OWN, config.session.cache_dir) == [
        "block 1: other codes"
    ]
    tensors = load_file(config.output.run_dir / file)
    with safe_open(config.output.run_dir / file, "pt") as opened:
        metadata = opened.metadata()
    name = next(n for n in tensors if n.endswith(".codes"))
    tensors[name] = torch.where(tensors[name] == 0, 1, tensors[name])
    save_file(tensors, config.output.run_dir / file, metadata)
    with pytest.raises(InputError, match="00001.safetensors is damaged"):
        repeat(config.output.run_dir, tmp_path / "edited", OWN, config.session.cache_dir)


def test_no_test_reaches_the_network():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as stream:
        for reach in (lambda: stream.connect(("192.0.2.1", 80)), lambda: stream.connect_ex(("192.0.2.1", 80)),
                      lambda: datagrams.sendto(b"x", ("192.0.2.1", 9)), lambda: socket.getaddrinfo("example.org", 80)):  # fmt: skip
            with pytest.raises(OSError, match="tests do not use the network"):
                reach()
        assert socket.getaddrinfo("127.0.0.1", 80) and datagrams.sendto(b"x", ("127.0.0.1", 9)) == 1


def test_a_deterministic_run_is_repeated_as_one(model_dir, text, tmp_path, monkeypatch):
    """The flag is part of the request: sweeps and repetitions follow it, not the two command lines alone."""
    asked_for = []
    monkeypatch.setattr("quant.core.env.be_deterministic", lambda: asked_for.append(True))
    config = replace(config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={}), nsamples=4, limit=4)
    perform(config)
    assert asked_for == []
    config = replace(config, deterministic=True, overwrite=True)
    perform(config)
    assert repeat(config.output.run_dir, tmp_path / "again", OWN, config.session.cache_dir) == [] and asked_for == [
        True,
        True,
    ]
    words = ["--model", str(model_dir("llama")), "--dataset", "demo", "--deterministic"]
    assert model_quantizer.request_from([*words, "--wbits", "3"]).session.deterministic
    learned = ["--model", "x", "--wbits", "3", "--lwc", "--deterministic", "--device", "cpu", "--calib_dataset", "demo"]
    assert main.request_from(learned).session.deterministic


def test_what_cannot_be_repeated(model_dir, text, tmp_path):
    with pytest.raises(InputError, match="no manifest"):
        repeat(tmp_path, tmp_path / "x")
    config = replace(config_for(model_dir("llama"), text, tmp_path), dataset=str(tmp_path / "own.txt"))
    (tmp_path / "own.txt").write_text(text.read_text())
    perform(config)
    (tmp_path / "own.txt").write_text(text.read_text() * 2)
    with pytest.raises(InputError, match="cannot be repeated as it was: calibration"):
        repeat(config.output.run_dir, tmp_path / "x", OWN, config.session.cache_dir)
    (config.output.run_dir / "results.json").unlink()
    with pytest.raises(InputError, match="was not finished"):
        repeat(config.output.run_dir, tmp_path / "x")
    with pytest.raises(InputError, match="another version: unknown entry 'colour'"):
        Request.from_json({"model": "x", "colour": 1}, "the manifest", OWN)
