"""Pairs of what can be asked for together: they work, or are refused in one line before any work."""

import pytest

import main
import model_quantizer
from tests.helpers import called

QUANTIZER = ("--dataset", "--wbits", 4, "--quantization-method", "rtn", "--no-report")
LEARNER = ("--calib_dataset", "--wbits", 4, "--epochs", 1, "--let", "--let-seams", "mul", "--no-report")
TURNED = {"column scales": (model_quantizer, QUANTIZER, "--column-scales"), "learned scales": (main, LEARNER, "--let")}


@pytest.mark.parametrize("case", TURNED)
def test_no_scales_go_into_columns_that_a_rotation_turns(case, small, text, tmp_path, monkeypatch, capsys):
    module, (dataset, *words), flag = TURNED[case]
    extra = ("--column-scales",) if flag == "--column-scales" else ()
    code, _, error = called(module, monkeypatch, capsys, *small, dataset, text, *words, *extra, "--rotate", "all")
    assert code == 2 and error.count("\n") == 1, error
    assert f"{flag} scales the columns of mlp.down_proj, whose inputs --rotate down turns" in error
    assert not (tmp_path / "run").exists()
