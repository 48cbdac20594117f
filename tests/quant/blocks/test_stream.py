"""The block stream equals the model: same numbers, for every family and every way to keep activations."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from models.load import LazyModel, load_model
from quant.blocks.stream import Activations, BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.gram import GramStats
from tests.conftest import CONFIGS, VOCABULARY

CPU = torch.device("cpu")


def opened(path: Path, tmp_path: Path, dtype: torch.dtype | None = torch.float32) -> LazyModel:
    return load_model(str(path), dtype=dtype, cache_dir=tmp_path)


def streamed(model: LazyModel, ids: torch.Tensor, **options) -> torch.Tensor:
    outside = model.outside_weights(CPU)
    stream = BlockStream(model, ids, device=CPU, **({"batch": 2} | options)).capture(outside)
    for index in range(len(model.blocks)):
        stream.run(index, BlockWeights.read(model, index, CPU), advance=True)
    return torch.cat([stream.logits(rows, outside) for rows in stream.rows])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_model_exactly(name, model_dir, tmp_path):
    ids = torch.randint(1, VOCABULARY, (5, 24))
    reference = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([reference(ids[i : i + 2]).logits for i in (0, 2, 4)])
    model = opened(model_dir(name), tmp_path)
    logits = streamed(model, ids)
    assert expected.std() > 0.1  # measured 0.33 to 0.72
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))  # measured 0
    assert all(p.is_meta for p in model.module.parameters()), "nothing stays loaded"


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_shrinks_the_difference(name, model_dir, tmp_path):
    ids = torch.randint(1, VOCABULARY, (3, 16))
    reference = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float64).eval()
    with torch.no_grad():
        expected = reference(ids).logits
    logits = streamed(opened(model_dir(name), tmp_path, torch.float64), ids, batch=3)
    # logits are handed out in float32
    torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=1e-6)  # measured 0


def test_a_wrong_block_order_is_seen(model_dir, tmp_path):
    """Negative control: the comparison above can fail."""
    ids = torch.randint(1, VOCABULARY, (2, 16))
    model = opened(model_dir("llama"), tmp_path)
    outside = model.outside_weights(CPU)
    stream = BlockStream(model, ids, device=CPU, batch=2).capture(outside)
    for index in (1, 0, 2):
        stream.run(index, BlockWeights.read(model, index, CPU), advance=True)
    wrong = torch.cat([stream.logits(rows, outside) for rows in stream.rows])
    assert float((wrong - streamed(model, ids)).abs().max()) > 0.1  # measured 3.1


@pytest.mark.parametrize("store", ["device", "cpu", "disk"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_store_and_batch_do_not_change_the_result(store, batch, model_dir, tmp_path):
    ids = torch.randint(1, VOCABULARY, (5, 16))
    model = opened(model_dir("falcon 40b"), tmp_path)
    logits = streamed(model, ids, store=store, batch=batch, directory=tmp_path / "store")
    torch.testing.assert_close(logits, streamed(model, ids), rtol=1e-5, atol=1e-6)  # measured 0
    assert not list(tmp_path.glob("store/*")), "the file is gone once it is mapped"


class Copies(TorchDispatchMode):
    """Whether the host waited for each copy."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.waited.append(not (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pinned", [True, False])
def test_the_host_waits_for_pinned_copies_when_it_reads_them_itself(pinned, tmp_path, monkeypatch):
    """The memory of a CPU in the place of pinned memory: what is asked of the device, and when."""
    waits, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    store = Activations("cpu", (4, 3, 2), torch.float32, CPU, tmp_path)
    store._pinned, store.device = pinned, device
    with Copies() as copies:
        for i in range(4):
            store[i : i + 1] = torch.full((1, 3, 2), float(i))
    assert copies.waited == [not pinned] * 4 and not waits
    assert torch.equal(store.data[:, 0, 0], torch.arange(4.0)) and waits == [device] * pinned


def test_only_what_a_cuda_device_takes_from_the_host_is_pinned(tmp_path, monkeypatch):
    asked = []

    def empty(shape, dtype, device, pin_memory):
        asked.append((str(device), pin_memory))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    for kind, device in (("cpu", "cuda"), ("device", "cuda"), ("cpu", "cpu"), ("device", "cpu")):
        store = Activations(kind, (1, 2, 3), torch.float32, torch.device(device), tmp_path)
        assert store._pinned == asked[-1][1]
    assert asked == [("cpu", True), ("cuda", False), ("cpu", False), ("cpu", False)]


def test_a_pass_asks_once_whether_its_outputs_are_finite(model_dir, tmp_path, monkeypatch):
    """A question for every batch would make the host wait for every batch."""
    model = opened(model_dir("llama"), tmp_path)
    stream = BlockStream(model, torch.randint(1, VOCABULARY, (6, 8)), device=CPU, batch=2)
    stream.capture(model.outside_weights(CPU))
    weights, asked, check = BlockWeights.read(model, 0, CPU), [], BlockStream._check

    def counted(self, index, finite):
        asked.append(len(finite))
        check(self, index, finite)

    monkeypatch.setattr(BlockStream, "_check", counted)
    stream.run(0, weights, advance=True)
    stream.hidden[slice(2, 4)] = torch.full_like(stream.hidden[slice(2, 4)], torch.nan)
    with pytest.raises(InputError, match="block 1 gives NaN or infinite activations"):
        stream.run(1, BlockWeights.read(model, 1, CPU), advance=True)
    assert asked == [3, 3]


def test_observed_inputs_are_those_of_the_model(model_dir, tmp_path):
    ids = torch.randint(1, VOCABULARY, (4, 16))
    reference = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    reference.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        reference(ids)
    model = opened(model_dir("llama"), tmp_path)
    stream = BlockStream(model, ids, device=CPU, batch=2).capture(model.outside_weights(CPU))
    stats, before = GramStats(64), stream.hidden.data.clone()
    stream.run(0, BlockWeights.read(model, 0, CPU), observe={"mlp.down_proj": stats.update})
    x = seen[0].reshape(-1, 64)
    torch.testing.assert_close(stats.gram, x.T @ x, rtol=1e-4, atol=1e-5)  # measured 2e-6
    assert stats.n_tokens == 64 and torch.equal(stream.hidden.data, before)
    assert not model.blocks[0].mlp.down_proj._forward_pre_hooks


def test_observing_stops_at_the_last_linear_asked_for(model_dir, tmp_path):
    model = opened(model_dir("llama"), tmp_path)
    stream = BlockStream(model, torch.ones(2, 8, dtype=torch.long), device=CPU, batch=2)
    stream.capture(model.outside_weights(CPU))
    weights = BlockWeights.read(model, 0, CPU)
    weights.parameters["mlp.down_proj.weight"] = torch.full((32, 64), torch.nan)
    seen = []
    stream.run(0, weights, observe={"self_attn.q_proj": seen.append})
    assert len(seen) == 1
    with pytest.raises(InputError, match="block 0 gives NaN or infinite activations"):
        stream.run(0, weights, advance=True)
    assert not model.blocks[0].self_attn.q_proj._forward_pre_hooks


def test_an_error_inside_a_block_is_not_swallowed(model_dir, tmp_path):
    model = opened(model_dir("opt"), tmp_path)
    stream = BlockStream(model, torch.ones(2, 8, dtype=torch.long), device=CPU, batch=2)
    stream.capture(model.outside_weights(CPU))
    weights = BlockWeights.read(model, 0, CPU)
    weights.parameters["fc1.weight"] = weights.weight("fc1")[:, :-1]
    with pytest.raises(InputError, match="block 0 does not run: .*config.json describes it otherwise .*shapes"):
        stream.run(0, weights, advance=True)


def test_fork_is_independent(model_dir, tmp_path):
    model = opened(model_dir("opt"), tmp_path)
    stream = BlockStream(model, torch.ones(2, 8, dtype=torch.long), device=CPU, batch=2)
    stream.capture(model.outside_weights(CPU))
    other = stream.fork()
    other.run(0, BlockWeights.read(model, 0, CPU), advance=True)
    assert not torch.equal(other.hidden.data, stream.hidden.data)


def test_arguments_are_kept_once_for_equal_batches(model_dir, tmp_path):
    model = opened(model_dir("falcon rw"), tmp_path)
    stream = BlockStream(model, torch.ones(7, 8, dtype=torch.long), device=CPU, batch=2)
    stream.capture(model.outside_weights(CPU))
    assert len({id(arguments) for arguments in stream.arguments}) == 2  # the last batch is smaller
