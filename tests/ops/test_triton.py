"""The kernels against the formula: on a CPU interpreted, on a GPU compiled."""

import itertools
import pickle
import subprocess
import sys

import numpy
import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tokenconv as tc
from tokenconv.ops.depthwise_conv import triton as ours
from tokenconv.ops.depthwise_conv.reference import depthwise_conv_reference

from .conftest import ACTIVATIONS, PREFIX_TOKENS, assert_gradients_agree, formula, inputs, wide

pytest.importorskip("triton", reason="PyTorch's builds for CPUs come without Triton")
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")]
if not torch.cuda.is_available() and Version(numpy.__version__) >= Version("2.4"):
    why = "interprets by what NumPy 2.4 has taken out"
    pytestmark.append(pytest.mark.needs("triton", "3.7", why))
OP = torch.ops.tokenconv.depthwise_conv.default
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of outputs and gradients, as a share of the largest value."""
GRID = tc.TokenGrid((3, 5))
EPILOGUES = list(itertools.product(ACTIVATIONS, (False, True), (False, True)))


@pytest.fixture(autouse=True)
def _small_tiles_and_poisoned_buffers(monkeypatch, device):
    """Several tiles in every direction; what is not written, or read too early, is NaN."""
    if device.type == "cpu":
        for table, rows in ((ours._FORWARD, 2), (ours._BACKWARD, 1)):
            for key in table:
                monkeypatch.setitem(table, key, ours.Tiling(rows, 4, 8, 1))
        monkeypatch.setattr(ours, "_processors", lambda device: 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(tensors, grid, *, seed=1, cotangent=None, **options):
    """Output and all gradients, in the dtype of the tensors, against the formula in float64."""
    x = tensors[0]
    leaves = [t if t is None or t.grad_fn is not None else t.requires_grad_() for t in tensors]
    exact = wide(tensors)
    told = {"residual": False, "activation": None, "prefix_tokens": "act", **options}
    out = tc.depthwise_conv(
        leaves[0], leaves[1], leaves[2], grid, gate=leaves[3], impl="triton", **told
    )
    expected = formula(*exact, grid, **told)
    tolerance = TOLERANCE[x.dtype]
    scale = expected.abs().max().clamp(min=1)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double() / scale, expected / scale, rtol=0, atol=tolerance)
    if cotangent is None:
        drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        cotangent = drawn.to(out)
    assert_gradients_agree(out, leaves, expected, exact, cotangent, tolerance)


@pytest.mark.parametrize(
    ("activation", "gated", "residual"),
    EPILOGUES,
    ids=lambda value: str(value),
)
def test_every_epilogue(device, activation, gated, residual):
    grid = tc.TokenGrid((3, 5), 2)
    options = {"activation": activation, "residual": residual}
    check(inputs(grid, 11, gate=gated, device=device), grid, **options)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("prefix_tokens", PREFIX_TOKENS)
def test_prefix_tokens(device, prefix_tokens, activation, gated):
    grid = tc.TokenGrid((2, 5), 3)
    tensors = inputs(grid, 6, gate=gated, device=device)
    check(tensors, grid, activation=activation, prefix_tokens=prefix_tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_with_sums_in_float32(device, dtype, activation):
    grid = tc.TokenGrid((3, 5), 1)
    tensors = inputs(grid, 9, gate=True, dtype=dtype, device=device)
    check(tensors, grid, activation=activation, residual=True)


def test_gelu_of_halves_is_right_to_the_last_bit_or_the_one_before(device):
    """Also far out, where a wrong tail shows as large relative errors."""
    x = torch.cat([torch.linspace(-5.2, 8, 256), torch.tensor([-1e4, 1e4])])
    x = x.to(device, torch.float16)[None, :, None]
    weight = torch.zeros(1, 1, 3, 3, dtype=x.dtype, device=device)
    call = {"residual": True, "activation": "gelu", "impl": "triton"}
    out = tc.depthwise_conv(x, weight, None, (1, x.shape[1]), **call)
    expected = ACTIVATIONS["gelu"](x.double())
    torch.testing.assert_close(out.double(), expected, rtol=1.5e-3, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_larger_kernels(device, kernel_size, bias):
    grid = tc.TokenGrid((3, 6), 1)
    x, weight, offset, _ = inputs(grid, 5, kernel_size, batch=1, device=device)
    check([x, weight, offset if bias else None, None], grid, activation="gelu")


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 9), (9, 1), (2, 3), (4, 8), (5, 13), (2, 3, 5)], ids=str
)
def test_borders_and_tails(device, size):
    """Tiles that are full, cut, at every border at once, and frames of a video."""
    grid = tc.TokenGrid(size)
    check(inputs(grid, 10, device=device), grid, activation="silu")


def test_halves_of_a_projection_and_tokens_behind_others_are_read_where_they_lie(device):
    grid = tc.TokenGrid((3, 5), 1)
    _, weight, bias, _ = inputs(grid, 6, device=device)
    packed = torch.full((2, grid.num_tokens + 2, 12), torch.nan, device=device)
    packed[:, 1:-1] = torch.randn(2, grid.num_tokens, 12)
    x, gate = packed[:, 1:-1].chunk(2, dim=-1)
    assert not x.is_contiguous()
    check([x.detach(), weight, bias, gate.detach()], grid, activation="gelu")
    check([x.detach(), weight, bias, gate.contiguous().detach()], grid, activation="gelu")


@pytest.mark.parametrize("way", ["expanded", "transposed", "strided"])
def test_gradients_of_any_layout(device, way):
    grid = tc.TokenGrid((3, 4), 1)
    tensors = inputs(grid, 6, device=device)
    shape = tensors[0].shape
    cotangent = {
        "expanded": torch.tensor(0.7).expand(shape),
        "transposed": torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2),
        "strided": torch.randn(shape[0], shape[1], 2 * shape[2])[..., ::2],
    }[way].to(device)
    check(tensors, grid, activation="gelu", cotangent=cotangent)
    check(inputs(grid, 6, device=device), grid, cotangent=cotangent)


def test_a_gate_of_another_layout(device):
    grid = tc.TokenGrid((3, 4), 1)
    x, weight, bias, gate = inputs(grid, 6, gate=True, device=device)
    check([x, weight, bias, gate.mT.contiguous().mT], grid, activation="gelu")


@pytest.mark.parametrize("way", ["strided", "expanded"])
def test_a_bias_of_another_layout(device, way):
    grid = tc.TokenGrid((3, 4), 1)
    x, weight, bias, _ = inputs(grid, 6, device=device)
    other = torch.stack([bias, -bias], 1)[:, 0] if way == "strided" else bias[:1].expand(6)
    check([x, weight, other, None], grid, activation="gelu")


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=4)), ids=str)
def test_only_gradients_that_are_needed(device, needed):
    grid = tc.TokenGrid((2, 5), 1)
    tensors = inputs(grid, 5, gate=True, device=device)
    exact = wide(tensors)
    for one, other, need in zip(tensors, exact, needed, strict=True):
        one.requires_grad_(need)
        other.requires_grad_(need)
    x, weight, bias, gate = tensors
    call = {"activation": "gelu", "gate": gate, "impl": "triton"}
    out = tc.depthwise_conv(x, weight, bias, grid, **call)
    assert out.requires_grad == any(needed)
    if any(needed):
        told = {"residual": False, "activation": "gelu", "prefix_tokens": "act"}
        expected = formula(*exact, grid, **told)
        assert_gradients_agree(out, tensors, expected, exact, torch.ones_like(out), 2e-5)


def test_an_empty_batch(device):
    grid = tc.TokenGrid((3, 5), 1)
    x, weight, bias, _ = inputs(grid, 6, batch=0, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = tc.depthwise_conv(*leaves, grid, activation="gelu", impl="triton")
    of_x, of_weight, of_bias = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == of_x.shape == x.shape
    assert not of_weight.any()
    assert not of_bias.any()


def test_a_value_that_is_no_number_stays_where_it_is(device):
    """Nothing outside the grid is multiplied, and no neighbour further than the kernel sees it."""
    grid = tc.TokenGrid((5, 6), 1)
    x, weight, bias, _ = inputs(grid, 4, device=device)
    x[0, 1] = torch.inf  # the first token of the grid
    out = tc.depthwise_conv(x, weight, bias, grid, activation="relu", impl="triton")
    wrong = ~out[0, 1:].reshape(5, 6, 4).isfinite().all(-1)
    wrong |= out[0, 1:].reshape(5, 6, 4).isinf().any(-1)
    assert not wrong[2:].any()
    assert not wrong[:, 2:].any()
    assert out[1].isfinite().all()
    assert torch.isnan(
        tc.depthwise_conv(x * torch.nan, weight, bias, grid, activation="relu", impl="triton")
    ).all()


def test_infinity_under_one_tap_is_infinity_in_one_gradient(device):
    """And no number nowhere: what lies outside the grid is not multiplied with it."""
    x, weight, bias, _ = inputs(GRID, 4, batch=1, device=device)
    x[0, 4] = torch.inf  # the last of the first row
    weight.requires_grad_()
    out = tc.depthwise_conv(x, weight, bias, GRID, impl="triton")
    (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    seen = torch.zeros(3, 3, dtype=torch.bool, device=device)
    seen[:2, 1:] = True  # taps that look up and to the right, of tokens below it and on its left
    assert torch.equal(grad.isinf(), seen.expand_as(grad))
    assert not grad.isnan().any()


def test_a_gradient_of_weights_is_the_same_every_time(device, monkeypatch):
    """Several programs sum parts, which are added in one order."""
    monkeypatch.setattr(ours, "_PROGRAMS_PER_PROCESSOR", 3)
    grid = tc.TokenGrid((5, 6))
    x, weight, bias, _ = inputs(grid, 8, device=device)
    found = []
    for _ in range(2):
        leaf = weight.clone().requires_grad_()
        out = tc.depthwise_conv(x, leaf, bias, grid, activation="gelu", impl="triton")
        found += torch.autograd.grad(out.square().sum(), leaf)
    assert torch.equal(*found)
    exact = wide([x, weight, bias, None])
    told = {"residual": False, "activation": "gelu", "prefix_tokens": "act"}
    expected = torch.autograd.grad(formula(*exact, grid, **told).square().sum(), exact[1])[0]
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-4)


# --- as an operator ---


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_it_is_a_well_made_operator(device, gated):
    grid = tc.TokenGrid((2, 4), 1)
    tensors = inputs(grid, 3, batch=1, gate=gated, device=device)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(OP, (*leaves, [2, 4], 1, True, "gelu", "act"))
    grad = torch.randn_like(leaves[0]).detach()
    still = [t if t is None else t.detach() for t in leaves]
    needed = [True, True, True, gated]
    torch.library.opcheck(
        torch.ops.tokenconv.depthwise_conv_backward.default,
        (grad, *still, [2, 4], 1, True, "gelu", "act", needed),
    )


@pytest.mark.compile
def test_it_compiles_into_one_graph_for_all_sizes(device):
    layer = tc.DWConv(6, activation="gelu", impl="triton").to(device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows, cols in ((3, 5), (4, 7), (6, 2)):
        x = torch.randn(2, rows * cols, 6, device=device, requires_grad=True)
        out, expected = compiled(x, rows, cols), layer(x, rows, cols)
        torch.testing.assert_close(out, expected)
        for one, other in zip(
            torch.autograd.grad(out.sum(), [x, layer.weight]),
            torch.autograd.grad(expected.sum(), [x, layer.weight]),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_autocast_as_for_torch(device):
    grid = tc.TokenGrid((3, 4), 1)
    x, weight, bias, _ = inputs(grid, 6, device=device)
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        out = tc.depthwise_conv(x, weight, bias, grid, activation="gelu", impl="triton")
        half = x.bfloat16()  # as a linear layer in front returns it
        same = tc.depthwise_conv(half, weight, bias, grid, activation="gelu", impl="triton")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, same)
    (grad,) = torch.autograd.grad(out.float().sum(), weight)
    assert grad.dtype == torch.float32
    expected = tc.depthwise_conv(x, weight, bias, grid, activation="gelu", impl="reference")
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpoints_and_double_use(device, reentrant):
    """Twice in one graph, with the same weights, one of them repeated in the backward pass."""
    layer = tc.DWConv(6, activation="gelu", impl="triton").to(device)
    x = torch.randn(2, 15, 6, device=device, requires_grad=True)

    def twice(first):
        return layer(first(x), 3, 5).square().sum()

    plain = twice(lambda x: layer(x, 3, 5))
    again = twice(lambda x: checkpoint(layer, x, 3, 5, use_reentrant=reentrant))
    assert torch.equal(plain, again)
    leaves = [x, *layer.parameters()]
    plain.backward()
    wanted = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    again.backward()
    for leaf, expected in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_derivatives_that_it_does_not_have_are_errors(device):
    layer = tc.DWConv(6, activation="gelu", impl="triton").to(device)
    x = torch.randn(1, 15, 6, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, 3, 5).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; take impl='conv2d'"):
        grad.sum().backward()
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match="refused: it has no derivative in forward mode"):
        torch.func.jvp(lambda x: layer(x, 3, 5), (x.detach(),), (x.detach(),))


def test_only_inputs_are_kept_for_the_backward_pass(device):
    grid = tc.TokenGrid((3, 5), 1)
    x, weight, bias, _ = inputs(grid, 6, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        tc.depthwise_conv(*leaves, grid, activation="gelu", impl="triton")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves}


def test_an_exported_program_needs_none_of_it(device):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = tc.DWConv(6, residual=True, activation="silu", impl="triton")

        def forward(self, x):
            return self.conv(x, tc.TokenGrid((3, 5), 1))

    net = Net().to(device).eval()
    x = torch.randn(2, 16, 6, device=device)
    program = torch.export.export(net, (x,))
    assert "tokenconv.depthwise_conv" in str(program.graph)
    plain = program.run_decompositions(ours.decompositions())
    assert "tokenconv" not in str(plain.graph)
    torch.testing.assert_close(plain.module()(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_forced_choice_is_the_one_that_runs(device, profiled):
    layer = tc.DWConv(6, impl="triton").to(device)
    x = torch.randn(1, 15, 6, device=device)
    names = profiled(lambda: layer(x, 3, 5))
    assert "tokenconv::depthwise_conv" in names
    assert not {name for name in names if "conv" in name and "tokenconv" not in name}
    again = pickle.loads(pickle.dumps(layer))
    assert "tokenconv::depthwise_conv" in profiled(lambda: again(x, 3, 5))


def test_a_residual_with_a_zero_kernel_changes_no_bit(device):
    """So that hybrids on GPUs stay equal at insertion."""
    for dtype in TOLERANCE:
        layer = tc.DWConv(6, residual=True, impl="triton", device=device, dtype=dtype)
        layer.init_neutral_()
        x = torch.randn(2, 15, 6, device=device, dtype=dtype)
        assert torch.equal(layer(x, 3, 5), x)


# --- what it refuses, before anything is launched ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 9}, "refused: the kernels have sides of 3, 5 and 7, not 9; or leave impl"),
        ({"dilation": 2}, "refused: the kernels have no dilation, here 2"),
        (
            {"dtype": torch.float64},
            "refused: the kernels take float32, float16 and bfloat16, not f",
        ),
        ({"x": lambda x: x.mT.contiguous().mT}, r"next to each other; call x.contiguous\(\)"),
        ({"x": lambda x: x.half()}, r"expected weight in the dtype of the tokens, torch.float16"),
        ({"bias": lambda b: b.double()}, "expected bias in the dtype of the tokens"),
        ({"gate": lambda x: x[:, 1:]}, r"expected a gate of the shape of the tokens, \(2, 15, 6\)"),
        ({"gate": lambda x: x.half()}, "expected gate in the dtype of the tokens"),
        ({"gate": lambda x: x.to("meta")}, "expected gate on the device of the tokens, .*got meta"),
        ({"weight": lambda w: w.to("meta")}, "expected weight on the device of the tokens"),
        ({"weight": lambda w: w[:, :, :, :1]}, r"expected a depthwise weight \(6, 1, K, K\)"),
        ({"x": lambda x: x[:, 1:]}, "expected 15 tokens"),
        ({"activation": "gulu"}, "unknown activation 'gulu': did you mean .*gelu"),
        (
            {"prefix_tokens": "skip"},
            "unknown prefix_tokens 'skip': expected one of act, pass, zero",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(device, monkeypatch, change, message):
    def launched(*args):
        pytest.fail("launched")

    monkeypatch.setattr(ours, "depthwise_conv_triton", launched)
    options = dict(change)
    made = inputs(
        GRID, 6, options.pop("kernel_size", 3), dtype=options.pop("dtype", torch.float32),
        device=device,
    )  # fmt: skip
    named = dict(zip(("x", "weight", "bias"), made[:3], strict=True))
    for name in ("x", "weight", "bias"):
        if name in options:
            named[name] = options.pop(name)(named[name])
    if "gate" in options:
        options["gate"] = options["gate"](made[0])
    with pytest.raises((ValueError, tc.GridError), match=message):
        tc.depthwise_conv(*named.values(), GRID, impl="triton", **options)


def test_without_triton_or_an_interpreter_it_says_so(monkeypatch):
    layer = tc.DWConv(6, impl="triton")
    x = torch.randn(1, 15, 6)
    monkeypatch.setattr(ours, "_IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="Triton makes no code for CPUs"):
        layer(x, 3, 5)
    monkeypatch.setattr(ours, "_IS_THERE", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        layer(x, 3, 5)


# --- what the compiler makes, which needs no GPU ---

_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenconv.ops.depthwise_conv import triton as ours, triton_kernels as kernels

def make(kernel, tiling, dtype, capability, **constants):
    constants |= {"TW": tiling.cols, "BC": tiling.channels, "HAS_BIAS": True, "RESIDUAL": False}
    constants |= {"HAS_GATE": True, "PREFIX": "act", "EXACT": dtype == "fp32", "ACT": "gelu"}
    names = kernel.arg_names
    pointers = {"x", "weight", "bias", "gate", "y", "dy", "dz", "dgate"}
    signature = {
        name: "constexpr" if name in constants else "*" + dtype if name in pointers
        else "*fp32" if name == "partial" else "i32" for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride") or name == "C"
    }
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32), options={"num_warps": tiling.warps},
    )
    assert ".local" not in made.asm["ptx"], "spilled"
    return made

size = 4 if DTYPE == "fp32" else 2
forward, backward = ours._FORWARD[SIDE, size], ours._BACKWARD[SIDE, size]
for flip in (False, True):
    make(kernels.convolve, forward, DTYPE, CAPABILITY, K=SIDE, TH=forward.rows, FLIP=flip)
needs = {"NEEDS_Z": True, "NEEDS_GATE": True, "NEEDS_WEIGHT": True}
made = make(kernels.gradients, backward, DTYPE, CAPABILITY, K=SIDE, **needs)
assert "cubin" in made.asm
"""


@pytest.mark.parametrize(
    ("capability", "side", "dtype"),
    [
        pytest.param(*case, marks=() if case == (90, 3, "bf16") else pytest.mark.slow)
        for case in itertools.product((80, 90), (3, 5, 7), ("bf16", "fp16", "fp32"))
    ],
)
def test_the_compiler_takes_the_kernels(monkeypatch, tmp_path, capability, side, dtype):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", f"CAPABILITY, SIDE, DTYPE = {capability, side, dtype}\n{_COMPILE}"],
        capture_output=True,
        text=True,
    )
    if "ptxas" in done.stderr and "not found" in done.stderr:
        pytest.skip("this Triton comes without ptxas")
    assert done.returncode == 0, done.stderr[-2000:]


# --- on GPUs alone ---


@pytest.mark.gpu
def test_more_elements_than_an_integer_of_32_bits_counts():
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a CUDA device with 24 GiB free")
    x = torch.randn(64, 12544, 3072, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(3072, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    out = tc.depthwise_conv(x, weight, None, (112, 112), impl="triton")
    for image in (0, 40, 63):
        part = x[image : image + 1].float()
        expected = depthwise_conv_reference(
            part, weight.float(), None, tc.TokenGrid((112, 112)), 1, False
        )
        torch.testing.assert_close(out[image : image + 1].float(), expected, rtol=2e-2, atol=6e-2)


@pytest.mark.gpu
def test_other_streams():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    x, weight, bias, _ = inputs(GRID, 64, batch=64, device="cuda")
    expected = tc.depthwise_conv(x, weight, bias, GRID, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = tc.depthwise_conv(x, weight, bias, GRID, impl="triton")
    stream.synchronize()
    assert torch.equal(out, expected)


# --- sharded ---

_SHARDED = """
import sys
import torch
import torch.distributed as dist
import tokenconv as tc
from tokenconv.ops.depthwise_conv import triton as ours
from torch.distributed.fsdp import fully_shard

for key in ours._FORWARD:
    ours._FORWARD[key] = ours._BACKWARD[key] = ours.Tiling(2, 4, 8, 1)
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{file}")

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = tc.DWConv(6, activation="gelu", impl="triton")

    def forward(self, x):
        return self.conv(x, 2, 3)

torch.manual_seed(0)
plain, sharded, x = Net(), Net(), torch.randn(2, 6, 6)
sharded.load_state_dict(plain.state_dict())
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
fully_shard(sharded, mesh=mesh)
plain(x).square().mean().backward()
sharded(x[rank : rank + 1]).square().mean().backward()
for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-5, atol=1e-6)
dist.destroy_process_group()
"""


def test_sharded_parameters_of_two_processes(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("interpreted kernels are for machines without a GPU")
    words = [sys.executable, "-W", "ignore", "-c", _SHARDED]
    processes = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
