"""A run of the demo model and its checkpoints, made once for all tests of formats and conversions."""

import pytest

from quant.core.names import FORMATS
from quant.run.convert import convert
from tests.helpers import demo_config, in_float32, perform


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The demo model in float32: what is measured is then no matter of how written-out weights are rounded."""
    return in_float32("llama", tmp_path_factory.mktemp("whole") / "llama")


@pytest.fixture(scope="session")
def exported(tmp_path_factory, whole):
    """A run of the demo model, saved as gptq_v2."""
    base = tmp_path_factory.mktemp("exported")
    config = demo_config(base, whole, save=base / "saved", format="gptq_v2")
    results = perform(config)
    for kind in FORMATS:
        convert(base / "run", kind, base / f"as-{kind}")
    return base, results
