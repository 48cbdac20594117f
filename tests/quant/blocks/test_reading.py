"""Blocks that a thread reads ahead: the same tensors, errors and order as without it."""

import threading

import pytest
import torch

from models.load import _Placing, load_model
from quant.blocks.linears import LinearRef
from quant.blocks.reading import BlockReader
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.learn.config import Rotation
from quant.learn.rotation import rotated

CPU = torch.device("cpu")


@pytest.fixture
def model(model_dir, tmp_path):
    return load_model(str(model_dir("llama")), dtype=torch.bfloat16, cache_dir=tmp_path)


def watched(model, monkeypatch, fail: str = ""):
    """Every tensor that is read of the checkpoint, and whether a thread beside the main one did; ``fail`` cannot be read."""
    seen, read = [], model.checkpoint.read

    def reading(key):
        seen.append((key, threading.current_thread() is not threading.main_thread()))
        if key == fail:
            raise InputError(f"{key} is on a disk that is gone")
        return read(key)

    monkeypatch.setattr(model.checkpoint, "read", reading)
    return seen


@pytest.mark.parametrize("packed", [False, True])
def test_reading_ahead_gives_the_same_blocks_in_the_same_order(packed, model, monkeypatch):
    n = len(model.blocks)

    def without(index):
        return list(model.linear_shapes(index)) if packed else ()

    expected = [BlockWeights.read(model, index, CPU, without=without(index)) for index in range(n)]
    seen = watched(model, monkeypatch)
    plain = BlockReader(model, CPU, n, without)
    with plain:
        for index in range(n):
            plain.read(index)
    assert not plain.ahead and not any(beside for _, beside in seen), "a CPU reads when it is asked"
    in_order = [key for key, _ in seen]
    seen.clear()
    with BlockReader(model, CPU, n, without, ahead=True) as reader:
        for index in range(n):
            block = reader.read(index)
            assert block.parameters.keys() == expected[index].parameters.keys()
            assert all(torch.equal(t, expected[index].parameters[name]) for name, t in block.parameters.items())
            assert {t.dtype for t in block.parameters.values()} == {torch.bfloat16}
    first = len(model.block_keys(0, [LinearRef.of_module(linear).parameter for linear in without(0)]))
    assert sorted(key for key, _ in seen) == sorted(in_order), (
        "nothing is read twice, and nothing beyond the last block"
    )
    assert [key for key, beside in seen if beside] == in_order[first:]


def test_an_error_is_told_when_its_block_is_asked_for(model, monkeypatch):
    prefix, n = f"{model.family.blocks}.1.", len(model.blocks)
    watched(model, monkeypatch, fail=model.key(prefix + "mlp.down_proj.weight"))
    with BlockReader(model, CPU, n, ahead=True) as reader:
        reader.read(0)
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight is on a disk that is gone"):
            reader.read(1)


def test_the_first_error_of_a_block_is_the_one_that_is_told(model, monkeypatch):
    """A tensor that is not finite stands before one that cannot be read."""
    prefix, read = f"{model.family.blocks}.1.", model.checkpoint.read
    damaged, gone = model.block_keys(1)[0], model.block_keys(1)[3]

    def reading(key):
        if key == gone:
            raise InputError("gone")
        return torch.full_like(read(key), torch.nan) if key == damaged else read(key)

    monkeypatch.setattr(model.checkpoint, "read", reading)
    with BlockReader(model, CPU, len(model.blocks), ahead=True) as reader:
        reader.read(0)
        with pytest.raises(InputError, match=rf"{prefix}.* holds NaN or infinite values"):
            reader.read(1)


def test_an_interrupt_ends_the_thread_with_the_tensor_at_hand(model, monkeypatch):
    held, go, read = [], threading.Event(), model.checkpoint.read

    def slowly(key):
        if threading.current_thread() is not threading.main_thread():
            held.append(key)
            go.wait(10)
        return read(key)

    monkeypatch.setattr(model.checkpoint, "read", slowly)
    with pytest.raises(KeyboardInterrupt), BlockReader(model, CPU, 3, ahead=True) as reader:
        reader.read(0)
        threading.Timer(0.2, go.set).start()
        raise KeyboardInterrupt
    assert len(held) == 1 and not [t for t in threading.enumerate() if t.name.startswith("block ")]


def test_a_block_that_was_not_expected_is_read_all_the_same(model):
    with BlockReader(model, CPU, 3, ahead=True) as reader:
        reader.read(0)
        block, expected = reader.read(2), BlockWeights.read(model, 2, CPU)
    assert all(torch.equal(tensor, expected.parameters[name]) for name, tensor in block.parameters.items())


def test_the_thread_is_on_the_device_that_is_asked_for_and_pins(model, monkeypatch):
    """CUDA is not there: what is asked of it."""
    placed, pinned = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", placed.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(BlockWeights, "read", classmethod(lambda cls, *args, **kwargs: cls()))
    for name in ("cuda:1", "cuda"):
        with BlockReader(model, torch.device(name), 2) as reader:
            assert reader.ahead
            reader.read(0)
            reader.read(1)
    assert placed == [1, 3] and len(pinned) == 2 * len(model.block_keys(1))


def test_what_takes_products_is_not_read_beside_a_solver(model):
    """Their precision is set for the whole process, as a solver's is."""
    turned = rotated(model, Rotation(("vo",)), CPU)
    assert not BlockReader(turned, torch.device("cuda"), 2).ahead and BlockReader(model, torch.device("cuda"), 2).ahead


def test_a_device_is_asked_once_a_block_whether_tensors_are_finite(model, monkeypatch):
    """A device that is not there: tensors stay where they are."""
    monkeypatch.setattr(torch.Tensor, "to", to := Moved(torch.Tensor.to))
    names, read = [name for name, _ in model.module.named_parameters()][:4], model.checkpoint.read
    asked, tolist, truth = [], torch.Tensor.tolist, torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(self.numel()) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: asked.append(1) or truth(self))
    with _Placing(model, torch.device("cuda")) as placing:
        for name in names:
            placing.put(name, torch.Size(), torch.float32)
        assert not asked
    assert to.moved == 4 and asked == [4]

    def damaged(key):
        tensor = read(key)
        return torch.full_like(tensor, torch.inf) if key in map(model.key, names[2:]) else tensor

    with (
        pytest.raises(InputError, match=rf"{names[2]} holds NaN or infinite values; the checkpoint is damaged"),
        _Placing(model, torch.device("cuda"), damaged) as placing,
    ):
        for name in names:
            placing.put(name, torch.Size(), torch.float32)


class Moved:
    """`Tensor.to` that stays where it is for a device that is not there, and does not let the host wait."""

    def __init__(self, real):
        self.real, self.moved = real, 0

    def __get__(self, tensor, kind=None):
        def to(target, **options):
            if isinstance(target, torch.dtype):
                return self.real(tensor, target)
            assert options == {"non_blocking": True}
            self.moved += 1
            return tensor

        return to
