"""Bias correction (``--bias-correction``): the mean error that rounding leaves goes into the biases, in closed form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.load import LazyModel
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.gram import GramStats


def corrected_biases(
    model: LazyModel,
    index: int,
    originals: Mapping[str, Tensor],
    deployed: BlockWeights,
    stats: Mapping[str, GramStats],
) -> BlockWeights:
    """The biases of some linears of block ``index`` that leave no error in the mean over calibration, as a checkpoint holds
    them; linears without one are left out.

        b' = b + E[W x] - E[Ŵ x̂]

    with x the original model's inputs where the statistics have them, else x̂ in both places (Nagel et al. 2019, Data-Free
    Quantization Through Weight Equalization and Bias Correction, section 4.2, with means that are measured). originals: W by
    linear; deployed: the block with Ŵ, and with b, in place.
    """
    new = {}
    for name, weight in originals.items():
        bias, own = deployed.parameters.get(f"{name}.bias"), stats[name]
        if bias is None:
            continue
        inputs = own.total / own.n_tokens
        full = inputs if own.full_total is None else own.full_total / own.n_tokens
        moved = bias.float() + (weight.float() @ full - deployed.weight(name).float() @ inputs)
        new[f"{name}.bias"] = moved.to(model.storage_of(f"{name}.bias", index))
    return BlockWeights(new)


def check_biases(model: LazyModel) -> None:
    """Raise InputError where no linear of the model has a bias."""
    if not any(
        getattr(model.blocks[0].get_submodule(name), "bias", None) is not None for name in model.linear_shapes()
    ):
        raise InputError(
            f"--bias-correction: no linear of this {model.config.model_type} model has a bias to correct; leave it out"
        )
