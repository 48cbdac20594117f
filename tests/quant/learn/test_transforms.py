"""Transforms change the numbers inside a block and nothing else: every kind, every seam, every family, in float64."""

from dataclasses import replace

import pytest
import torch

from models.load import load_model
from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.learn.affine import Affine, apply_seam
from quant.learn.affinequant import dominance, floored_factors, gradual_mask, pair_matrix
from quant.learn.config import TransformSpec
from quant.learn.parametrization import InputRange
from quant.learn.transforms import check_seams, transforms_for
from tests.conftest import CONFIGS, IN_FLOAT32, VOCABULARY

CPU = torch.device("cpu")
KINDS = ("norm", "vo", "qk", "mul")
FORMS = {
    "scale": TransformSpec(True, KINDS),
    "scale and shift": TransformSpec(True, KINDS, shift=True),
    "head matrices": TransformSpec(True, KINDS, matrix=True, shift=True),
    "norm matrices": TransformSpec(True, KINDS, norm_matrix=True, shift=True, precise=True),
}


class Bench:
    """Block 1 of a model, its inputs, and what it answers."""

    def __init__(self, path, tmp_path, dtype=torch.float64, **load):
        self.model = load_model(str(path), dtype=dtype, cache_dir=tmp_path, **load)
        ids = torch.randint(1, VOCABULARY, (2, 16))
        self.stream = BlockStream(self.model, ids, device=CPU, batch=2).capture(self.model.outside_weights(CPU))
        self.weights = BlockWeights.read(self.model, 1, CPU)
        self.ranges: dict[str, InputRange] = {}
        for group in self.model.groups:
            span = InputRange()
            self.stream.run(1, self.weights, observe={group[0]: span.update})
            self.ranges |= dict.fromkeys(group, span)
        self.expected = self(self.weights)

    def __call__(self, weights):
        with instrument(self.model.blocks[1], weights) as own, torch.no_grad():
            return self.stream.call(1, own, slice(0, 2), self.stream.arguments[0])

    def difference(self, weights):
        return float((self(weights) - self.expected).norm() / self.expected.norm())

    def transforms(self, spec):
        return transforms_for(self.model.family, self.model.config, self.weights, spec, rate=0.005)

    def parameters(self, transform, seed=0):
        """Random, far from the identity, matrices diagonally dominant."""
        generator = torch.Generator().manual_seed(seed)
        by_name = {}
        for name, start in transform.initial(self.weights, self.ranges).items():
            noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("matrix", "imaginary")):
                by_name[name] = start.double() * 1.3 + 0.3 * noise / start.shape[-1] * float(start.abs().mean() + 0.2)
            elif name.endswith("shift"):
                by_name[name] = start.double() + noise
            else:
                by_name[name] = start.double() * torch.exp(0.5 * noise)
        return by_name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_block_computes_the_same(name, form, model_dir, tmp_path):
    errors = {}
    for dtype in (torch.float64, torch.float32):
        bench = Bench(model_dir(name), tmp_path, dtype)
        whole = bench.weights
        for transform in bench.transforms(FORMS[form]):
            parameters = {k: p.to(dtype) for k, p in bench.parameters(transform).items()}
            new = transform.apply(bench.weights, parameters)
            others = new.since(bench.weights)
            old = bench.weights.parameters
            changed = [k for k, t in others.parameters.items() if not torch.equal(t, old[k])]
            assert changed or others.online, "a transform that changes no weight tests nothing"
            errors[transform.name, dtype] = bench.difference(new)
            whole = transform.apply(whole, parameters)
        errors["all", dtype] = bench.difference(whole)
        again = bench.weights
        for transform in reversed(bench.transforms(FORMS[form])):
            again = transform.apply(again, {k: p.to(dtype) for k, p in bench.parameters(transform).items()})
        assert again.named().keys() == whole.named().keys()
        for key, tensor in whole.named().items():
            # Matrices of values and shifts of norms meet in the same biases, in another order: equal but for rounding.
            # Measured 7e-16 in float64, 4e-7 in float32
            size, last = float(tensor.abs().max()), 1e-10 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(
                again.named()[key], tensor, rtol=0, atol=last * size, msg=lambda m, k=key: f"{k}: {m}"
            )
        errors["all, in reverse", dtype] = bench.difference(again)
    limit = IN_FLOAT32.get(name, 1e-12)
    for (which, dtype), error in errors.items():
        if dtype == torch.float64:
            assert error < limit, (which, error)
            assert error < 1e-2 * errors[which, torch.float32] or name in IN_FLOAT32, which
        else:
            assert error < 1e-5, (which, error)  # measured 6e-8 to 5e-7


def test_every_seam_of_every_family_is_there(model_dir, tmp_path):
    expected = {
        "opt": {"norm": 2, "vo": 1, "qk": 1, "mul": 1},
        "opt post-norm, projected": {"vo": 1, "qk": 1, "mul": 1},
        "bloom": {"norm": 2, "vo": 1, "qk": 1},
        "falcon 7b": {"norm": 1, "vo": 1, "qk": 1},
        "falcon 40b": {"norm": 2, "vo": 1, "qk": 1},
        "falcon 11b": {"norm": 1, "vo": 1, "qk": 1},
        "falcon rw": {"norm": 2, "vo": 1, "qk": 1},
        "qwen3": {"norm": 2, "vo": 1, "mul": 1},
        "gemma3": {"norm": 2, "vo": 1, "mul": 1},
        "olmo2": {"vo": 1, "mul": 1},
        **dict.fromkeys(("starcoder2", "gpt neox", "gpt neox sequential", "gpt2"), {"norm": 2, "vo": 1, "qk": 1}),
        "stablelm parallel": {"norm": 1, "vo": 1, "mul": 1},
        "cohere2": {"norm": 1, "vo": 1, "qk": 1, "mul": 1},
    }
    for name in CONFIGS:
        bench = Bench(model_dir(name), tmp_path)
        kinds = [t.seam.kind for t in bench.transforms(FORMS["scale"])]
        counted = {kind: kinds.count(kind) for kind in set(kinds)}
        assert counted == expected.get(name, {"norm": 2, "vo": 1, "qk": 1, "mul": 1}), name


@pytest.mark.parametrize(
    "name", ["llama", "llama gqa, tied", "falcon 40b", "falcon 7b", "phi3", "glm4", "cohere2", "gpt neox"]
)
@pytest.mark.parametrize("matrix", [False, True])
def test_untied_scales_are_no_equivalence_with_rope(name, matrix, model_dir, tmp_path):
    """Negative control: the released codes' q/k transform changes the function."""
    bench = Bench(model_dir(name), tmp_path)
    for tied in (True, False):
        (transform,) = bench.transforms(TransformSpec(True, ("qk",), matrix=matrix, tied=tied))
        error = bench.difference(transform.apply(bench.weights, bench.parameters(transform)))
        assert (error < IN_FLOAT32.get(name, 1e-12)) == tied, error  # measured 1e-16 tied, 2e-3 and more otherwise
    free = Bench(model_dir("opt"), tmp_path)
    (transform,) = free.transforms(TransformSpec(True, ("qk",), matrix=matrix, tied=False))
    assert free.difference(transform.apply(free.weights, free.parameters(transform))) < 1e-12  # measured 3e-16


def test_wrong_algebra_is_seen(model_dir, tmp_path, monkeypatch):
    """Negative controls: readers without the shift, the shift after the scale, A where M belongs."""
    bench = Bench(model_dir("opt"), tmp_path)
    norm = next(t for t in bench.transforms(FORMS["scale and shift"]) if t.seam.kind == "norm")
    parameters = bench.parameters(norm)
    affine = norm.affine(parameters)
    new = apply_seam(bench.weights, norm.seam, norm.layout, affine)
    assert bench.difference(new) < 1e-12  # measured 4e-16
    reader = norm.seam.consumers[0]
    old, behind = bench.weights.parameters, f"{norm.seam.producer}.bias"
    without = {f"{reader}.bias": old[f"{reader}.bias"]}
    assert bench.difference(new.with_parameters(without)) > 1e-2  # measured 0.07
    late = {behind: old[behind] / affine.inverse[0] - affine.shift[0]}
    assert bench.difference(new.with_parameters(late)) > 1e-1  # measured 1.6
    inverted = replace(affine, inverse=1 / affine.inverse)
    columns = inverted.columns(old[f"{reader}.weight"].view(32, 1, 1, 32)).view(32, 32)
    assert bench.difference(new.with_parameters({f"{reader}.weight": columns})) > 1e-3
    values = next(t for t in bench.transforms(FORMS["head matrices"]) if t.seam.kind == "vo")
    monkeypatch.setattr(Affine, "matrix", lambda self: torch.linalg.inv(self.inverse).transpose(-1, -2))
    assert bench.difference(values.apply(bench.weights, bench.parameters(values))) > 1e-2  # measured 0.05


@pytest.mark.parametrize("alpha", [0.5, 0.75, 0.3])
def test_scales_start_from_absolute_maxima(alpha, model_dir, tmp_path):
    """The released codes take the signed maximum of the weights; a channel of large negative ones is then lost."""
    bench = Bench(model_dir("llama"), tmp_path)
    bench.weights.weight("mlp.gate_proj")[:, 3] = -50.0
    spec = replace(FORMS["scale"], alpha=alpha)
    transform = next(t for t in bench.transforms(spec) if t.seam.producer == "post_attention_layernorm")
    scale = transform.initial(bench.weights, bench.ranges)["scale"]
    x = bench.ranges["mlp.gate_proj"].absmax
    both = torch.cat([bench.weights.weight(f"mlp.{n}_proj") for n in ("gate", "up")])
    torch.testing.assert_close(scale[0], x**alpha / both.abs().amax(0).float() ** (1 - alpha))
    assert float(scale[0, 3]) < 0.6 * float(scale[0].median())  # measured 0.02 to 0.19 of it


def test_ranges_are_those_of_the_inputs():
    x = torch.randn(3, 7, 5)
    x[:, :, 2] = -x[:, :, 2].abs() - 4
    whole, parts = InputRange(), InputRange()
    whole.update(x)
    for window in x:
        parts.update(window)
    middle = (x.amax(1) + x.amin(1)) / 2
    expected = middle[0]
    for row in middle[1:]:
        expected = 0.99 * expected + 0.01 * row
    for span in (whole, parts):
        torch.testing.assert_close(span.absmax, x.abs().amax((0, 1)))
        torch.testing.assert_close(span.shift, expected)


def test_gradual_mask_opens_from_the_diagonal():
    like = torch.zeros(1, dtype=torch.float64)
    steps = [gradual_mask(6, p, 0.1, like) for p in (0.0, 0.5, 1.0)]
    for mask, band in zip(steps, (1, 3, 6), strict=True):
        for i in range(6):
            for j in range(6):
                expected = 1.0 if i == j else 0.1 if abs(i - j) <= band else 0.0
                assert float(mask[i, j]) == expected


def test_dominance_is_the_margin_of_the_row():
    matrix = torch.tensor([[[2.0, -1.0, 0.5], [0.0, 1.0, -1.0], [3.0, 0.0, 1.0]]])
    torch.testing.assert_close(dominance(matrix), torch.tensor([[0.25, 0.0, -2.0]]))


def test_complex_factors_keep_away_from_zero():
    """|a + bi| below the floor is lengthened to it in its own direction; the gradient passes."""
    real = torch.tensor([[0.003, 0.0, 0.3, -1e-30]], requires_grad=True)
    imaginary = torch.tensor([[-0.004, 0.0, -0.4, 0.0]], requires_grad=True)
    factors = floored_factors(real, imaginary)
    expected = torch.tensor([[[0.006, 0.01, 0.3, -0.01]], [[-0.008, 0.0, -0.4, 0.0]]])
    torch.testing.assert_close(factors.detach(), expected)
    (factors * torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[5.0, 6.0, 7.0, 8.0]]])).sum().backward()
    assert real.grad.tolist() == [[1, 2, 3, 4]] and imaginary.grad.tolist() == [[5, 6, 7, 8]]


def test_tied_matrices_near_zero_change_nothing(model_dir, tmp_path):
    """With the floor q/k factors of zero are still an equivalence; without it nothing would be finite."""
    bench = Bench(model_dir("llama"), tmp_path)
    (transform,) = bench.transforms(TransformSpec(True, ("qk",), matrix=True))
    parameters = bench.parameters(transform)
    for part in ("real", "imaginary"):
        parameters[part][:, 0] = 0.0
    assert bench.difference(transform.apply(bench.weights, parameters)) < 1e-12  # measured 2e-16


def test_a_singular_matrix_is_no_error_but_not_finite():
    """Training sees the loss and takes the step back; an error would need the device to answer."""
    for n in (1, 3, 16):
        singular = torch.eye(n).repeat(2, 1, 1)
        singular[1, -1, -1] = 0
        matrix = Affine(singular).matrix()
        assert torch.equal(matrix[0], torch.eye(n)) and not bool(matrix[1].isfinite().all())


def test_pair_matrices_commute_with_rotary_embeddings():
    real, imaginary, angle = torch.randn(2, 3).double(), torch.randn(2, 3).double(), torch.randn(1, 3).double()
    matrix = pair_matrix(real, imaginary)
    turn = pair_matrix(angle.cos(), angle.sin())
    torch.testing.assert_close(matrix @ turn, turn @ matrix)


def test_precise_inverses_are_closer(model_dir, tmp_path):
    """--inverse-dtype float64: what is left of A M - I, for the same float32 parameters."""
    bench, residual = Bench(model_dir("llama"), tmp_path, torch.float32), {}
    for precise in (False, True):
        transform = bench.transforms(TransformSpec(True, ("norm",), norm_matrix=True, precise=precise))[0]
        parameters = {k: p.float() for k, p in bench.parameters(transform).items()}
        affine = transform.affine(parameters)
        assert affine.matrix().dtype == torch.float32
        left = affine.matrix().double() @ affine.inverse.double() - torch.eye(32, dtype=torch.float64)
        residual[precise] = float(left.abs().max())
    assert 0 < residual[True] < 0.6 * residual[False] < 1e-5, residual


def test_seams_that_are_not_there_are_refused(model_dir, tmp_path):
    """A transform that would change nothing is no transform; without ``let`` there is none."""
    llama, qwen, bloom = (Bench(model_dir(name), tmp_path) for name in ("llama", "qwen3", "bloom"))
    for bench, spec, says in (
        (llama, TransformSpec(True, ("norm", "mul"), matrix=True), "--use_matrix needs seams between heads"),
        (qwen, TransformSpec(True, ("norm", "qk"), matrix=True), "--use_matrix needs seams between heads"),
        (qwen, TransformSpec(True, ("qk",)), "qwen3 blocks have no qk seam; use --let-seams mul,norm,vo"),
        (bloom, TransformSpec(True, ("mul",)), "bloom blocks have no mul seam"),
        (llama, TransformSpec(True, ("vo",), norm_matrix=True), "--use_ln_matrix needs the norm seams"),
    ):
        with pytest.raises(InputError, match=says):
            check_seams(bench.model.family, bench.model.config, spec)
    for spec in (TransformSpec(True, ("vo",), matrix=True), TransformSpec(True, ("qk", "norm"), matrix=True)):
        check_seams(llama.model.family, llama.model.config, spec)
    off = TransformSpec(False, ("norm", "vo"), shift=True)
    check_seams(llama.model.family, llama.model.config, off)
    assert llama.transforms(off) == [] and len(llama.transforms(replace(off, let=True))) == 3


@pytest.mark.parametrize(
    ("name", "shifted"),
    [
        ("opt", ["norm.self_attn_layer_norm", "norm.final_layer_norm", "vo.self_attn.v_proj"]),
        ("bloom", ["norm.input_layernorm", "norm.post_attention_layernorm", "vo.self_attention.query_key_value"]),
        ("falcon 7b", []),  # its norms have biases, its linears have none unless they are added
        ("llama", []),
        ("qwen2", []),
    ],
)
def test_shifts_stand_where_biases_are(name, shifted, model_dir, tmp_path):
    bench = Bench(model_dir(name), tmp_path)
    assert {t.name for t in bench.transforms(FORMS["scale and shift"]) if t.shift} == set(shifted)
    assert not any(t.shift for t in bench.transforms(FORMS["scale"]))
