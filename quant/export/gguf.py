"""What GGUF, the one file of llama.cpp, can hold of a run: grids that one of its types of blocks holds exactly."""

from __future__ import annotations

from dataclasses import replace

from models.gguf_architectures import MODEL_TYPES, NO_ARCHITECTURE
from quant.core.names import GGUF
from quant.export.formats import Content, misfit_linear, refuses_codes, refuses_grid
from quant.export.gguf_types import nearest, type_for


class Gguf:
    """What a file can hold."""

    name = GGUF

    def refuses(self, content: Content) -> str | None:
        """Models that llama.cpp does not have, grids that no type of blocks holds, and all but codes in order."""
        if against := refuses_codes(replace(content, mixed=False), self.name):
            return against
        assert content.spec is not None
        if content.spec.level_kind is not None and (against := refuses_grid(content, self.name, "iq4_nl")):
            return against
        if content.act.active:
            return f"{self.name} is weight-only and cannot hold activation quantization: use format bitplane"
        if content.reordered:
            return f"{self.name} cannot hold groups in act-order: use format gptq, or --group-aware or --static-groups"
        if content.model_type and content.model_type not in MODEL_TYPES:
            return NO_ARCHITECTURE.format(content.model_type, ", ".join(sorted(MODEL_TYPES)))
        return self._no_blocks(content) or misfit_linear(content, self.name)

    def _no_blocks(self, content: Content) -> str | None:
        for linear, n_in, spec in content.grids:
            if type_for(spec, n_in) is None:
                near = nearest(spec, [inputs for _, inputs in content.shapes.values()])
                hint = f" (the nearest that it holds: {near})" if near else ""
                return (
                    f"{self.name} has no blocks for {spec.described()} on {n_in} inputs of {linear}{hint}: "
                    "use format bitplane"
                )
        return None

    def bits(self, content: Content) -> float:
        """Bits of a weight, with scales and minima, in the largest of the types that linears have."""
        types = (type_for(spec, n_in) for _, n_in, spec in content.grids)
        return max((one.bits_per_weight for one in types if one is not None), default=0.0)
