"""The weights of a block as one value: names of files and back, replacement part by part, and what is new."""

import torch

from quant.blocks.weights import BlockWeights
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
from quant.kernels.matmul.pack import pack_block
from quant.solvers.rtn import rtn
from tests.helpers import CPU

NAMED = {
    "proj.weight": torch.ones(4, 8),
    "proj.bias": torch.zeros(4),
    "norm.weight": torch.ones(8),
    "norm.online_affine": torch.eye(8),
    "proj.input_range": torch.tensor([-1.0, 2.0]),
}


def test_names_of_files_are_read_and_made():
    block = BlockWeights.from_named(NAMED)
    assert block.parameters.keys() == {"proj.weight", "proj.bias", "norm.weight"}
    assert block.online == {"norm": NAMED["norm.online_affine"]}
    assert block.input_ranges == {"proj": NAMED["proj.input_range"]}
    assert block.named() == NAMED and not block.packed
    assert block.weight("proj") is NAMED["proj.weight"] and block.device == CPU
    within = block.within(3)
    assert within.named() == {f"3.{name}": tensor for name, tensor in NAMED.items()}
    assert within.online.keys() == {"3.norm"} and within.input_ranges.keys() == {"3.proj"}


def test_others_take_the_place_part_by_part():
    block = BlockWeights.from_named(NAMED)
    matrix, bias = 2 * torch.eye(8), torch.ones(4)
    changed = BlockWeights({"proj.bias": bias}, online={"norm": matrix})
    both = block | changed
    assert both.named() == NAMED | {"proj.bias": bias, "norm.online_affine": matrix}
    assert both.since(block).named() == changed.named(), "tensors that are new, also where they are equal"
    assert block.named() == NAMED and not block.since(block).named()
    assert (BlockWeights() | block).since(BlockWeights()).named() == NAMED
    half = changed.to(CPU, torch.float16)
    assert half.parameters["proj.bias"].dtype == half.online["norm"].dtype == torch.float16


def test_a_packed_weight_takes_the_place_of_the_dense_one():
    block = BlockWeights.from_named(NAMED)
    answer = rtn(torch.randn(4, 8), GramStats.from_gram(torch.eye(8)), QuantSpec(4))
    packed = block.with_packed(pack_block({"proj": answer}, CPU))
    assert packed.parameters.keys() == {"proj.bias", "norm.weight"} and packed.packed.keys() == {"proj"}
    assert packed.online == block.online and packed.input_ranges == block.input_ranges
    assert packed.within(1).packed.keys() == {"1.proj"} and "proj.weight" in block.parameters
