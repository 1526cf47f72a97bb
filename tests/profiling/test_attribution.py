"""Whose time it is: categories, phases and sites, forward and backward."""

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import tokenconv as tc
from tokenconv.profiling import traces
from tokenconv.profiling.attribution import Attribution, Category, _labels, annotated
from tokenconv.profiling.measurement import Mode, Step
from tokenconv.profiling.traces import Profiled, profile_step

CPU = torch.device("cpu")
TRANSFORMER = (Category.ATTENTION, Category.MLP_MATMUL, Category.NORM, Category.ACTIVATION)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def profiled(model: nn.Module, batch: Tensor, mode: Mode) -> Profiled:
    step = Step(model, batch, mode)
    step()
    return profile_step(step, CPU)


def shares(model: nn.Module, batch: Tensor, mode: Mode) -> Counter[str]:
    """Share of the time by category."""
    found = profiled(model, batch, mode).time
    total = sum(spent.ms for spent in found)
    return Counter(dict.fromkeys(Category, 0.0)) + sum_by(found, "category", total)


def sum_by(time: Any, key: str, total: float = 1.0) -> Counter[str]:
    sums: Counter[str] = Counter()
    for spent in time:
        sums[getattr(spent, key)] += spent.ms / total
    return sums


# --- time, of models with one heavy part ---


@pytest.mark.parametrize(("mode", "batch_size"), [("infer", 16), ("train", 1)])
def test_a_depthwise_convolution_is_found(mode: Mode, batch_size: int):
    model = nn.Sequential(nn.Conv2d(64, 64, 5, padding=2, groups=64))
    share = shares(model, images(batch_size, 64, 64, 64), mode)
    assert share[Category.DEPTHWISE] > 0.5
    assert share[Category.MLP_MATMUL] == share[Category.ATTENTION] == 0


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(
    ("dim", "groups"), [(8, 1), (8, 2), (1, 1)], ids=["dense", "grouped", "one channel"]
)
def test_another_convolution_is_not_depthwise(dim: int, groups: int, mode: Mode):
    model = nn.Sequential(nn.Conv2d(dim, 8, 3, padding=1, groups=groups))
    share = shares(model, images(8, dim, 16, 16), mode)
    assert share[Category.DEPTHWISE] == 0


class Transposes(nn.Module):
    """Moves its input about and does nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x.transpose(1, -1).contiguous()
        return x


def test_layout_copies_are_found():
    share = shares(Transposes(), images(1, 64, 192, 192), "infer")
    assert share[Category.LAYOUT] > 0.5


class Planted(nn.Module):
    """One linear, under a name that says what it is for."""

    def __init__(self, name: str, linear: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize(
    ("name", "category"),
    [("mlp", Category.MLP_MATMUL), ("attn", Category.ATTENTION), ("head", Category.OTHER)],
)
def test_matmuls_belong_to_the_module_they_run_in(name: str, category: Category):
    model = Planted(name, nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
    share = shares(model, images(1024, 512), "infer")
    assert share[category] > 0.5
    for other in {Category.MLP_MATMUL, Category.ATTENTION} - {category}:
        assert share[other] == 0


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(
    ("layer", "category"),
    [
        (nn.LayerNorm(256), Category.NORM),
        (nn.BatchNorm1d(4096), Category.NORM),
        (nn.GELU(), Category.ACTIVATION),
    ],
    ids=["layer_norm", "batch_norm", "gelu"],
)
def test_norms_and_activations_are_found(layer: nn.Module, category: Category, mode: Mode):
    """Also inside an MLP, whose matmuls alone count as the MLP's."""
    model = Planted("mlp", nn.Sequential(nn.Linear(256, 256, bias=False), layer))
    share = shares(model, images(1, 4096, 256), mode)
    assert share[category] > 0  # how much depends on what else the machine does
    assert share[Category.MLP_MATMUL] > 0


# --- classification, operator by operator ---


class Mixed(nn.Module):
    """The width of a linear says whose matmul it is: 24 the stem's, 48 the MLP's, else 12."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.stem = nn.Linear(24, 12)
        self.attn = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)  # (B, 24, H, W) -> (B, H*W, 24)
        return self.mlp(self.norm(self.attn(self.stem(tokens.contiguous()))))


@pytest.fixture(scope="module")
def operators() -> list[tuple[str, set[int], Category, bool]]:
    """Name, sizes, category and whether backward, of every operator of a training step."""
    torch.manual_seed(0)
    model, batch = Mixed(), images(2, 24, 5, 5)
    model(batch).square().mean().backward()
    with (
        annotated(model),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run,
    ):
        model(batch).square().mean().backward()
    events: list[Any] = [e for e in run.events() or () if e.device_type == DeviceType.CPU]
    classifier = Attribution(events)
    return [
        (
            event.name,
            {size for shape in event.input_shapes or () for size in shape},
            classifier.category(event),
            _in_backward(event),
        )
        for event in events
    ]


def _in_backward(event: Any) -> bool:
    while event is not None and not event.name.startswith("autograd::engine"):
        event = event.cpu_parent
    return event is not None


def _expected_by_width(sizes: set[int]) -> Category:
    if 48 in sizes:
        return Category.MLP_MATMUL
    return Category.OTHER if 24 in sizes else Category.ATTENTION


@pytest.mark.parametrize(
    ("name", "backward", "counts"),
    [
        ("aten::addmm", False, {"MLP matmul": 2, "attention": 1, "other": 1}),
        ("aten::mm", True, {"MLP matmul": 4, "attention": 2, "other": 2}),
    ],
    ids=["forward", "backward"],
)
def test_every_matmul_is_classified(
    operators: list[tuple[str, set[int], Category, bool]],
    name: str,
    backward: bool,
    counts: dict[str, int],
):
    found: dict[str, int] = {}
    for operator, sizes, category, is_backward in operators:
        if operator == name and is_backward == backward:
            assert category == _expected_by_width(sizes), sizes
            found[category.value] = found.get(category.value, 0) + 1
    assert found == counts


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::conv2d", Category.DEPTHWISE),
        ("aten::convolution_backward", Category.DEPTHWISE),
        ("aten::native_layer_norm", Category.NORM),
        ("aten::native_layer_norm_backward", Category.NORM),
        ("aten::gelu", Category.ACTIVATION),
        ("aten::gelu_backward", Category.ACTIVATION),
        ("aten::clone", Category.LAYOUT),
        ("aten::mean", Category.OTHER),
        ("tokenconv: attention: attn", Category.ATTENTION),
        ("tokenconv: MLP matmul: mlp", Category.OTHER),  # no matmul itself
    ],
)
def test_operators_are_known_by_name(
    operators: list[tuple[str, set[int], Category, bool]], name: str, category: Category
):
    found = {by for operator, _, by, _ in operators if operator == name}
    assert found == {category}


def test_the_bias_that_a_matmul_copies_is_no_layout_copy():
    model, batch = Planted("mlp", nn.Linear(8, 8)), images(4, 8)
    with annotated(model), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        model(batch)
    classifier = Attribution([e for e in run.events() or () if e.device_type == DeviceType.CPU])
    copies = [event for event in classifier.events if event.name == "aten::copy_"]
    assert {classifier.category(event) for event in copies} == {Category.MLP_MATMUL}


def test_autograd_nodes_belong_to_what_they_undo(
    operators: list[tuple[str, set[int], Category, bool]],
):
    engine = "autograd::engine::evaluate_function: "
    nodes = [(n.removeprefix(engine), by) for n, _, by, _ in operators if n.startswith(engine)]
    assert ("ConvolutionBackward0", Category.DEPTHWISE) in nodes
    assert ("GeluBackward0", Category.ACTIVATION) in nodes
    assert ("NativeLayerNormBackward0", Category.NORM) in nodes
    linears = [category for name, category in nodes if name == "AddmmBackward0"]
    assert sorted(linears) == ["MLP matmul", "MLP matmul", "attention", "other"]


def test_hooks_are_gone_afterwards():
    model = timm.create_model("test_vit", img_size=32, depth=1)
    with annotated(model):
        assert any(module._forward_hooks for module in model.modules())
    profiled(model, images(1, 3, 32, 32), "infer")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- whole models: phases, sites and sums ---


def vit(block: str | None = "mix_ffn", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=96, depth=2)
    return model if block is None else tc.insert_(model, block, **options)


def pvt() -> nn.Module:
    torch.manual_seed(0)
    return tc.insert_(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), "mix_ffn")


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("model", [vit, pvt])
def test_own_times_add_up_to_the_whole(model: Any, mode: Mode):
    step = Step(model(), images(2, 3, 96, 96), mode)
    step()
    run = traces._run(step, CPU)
    events = list(run.events() or ())
    whole = sum(e.cpu_time_total for e in events if e.name.startswith("ProfilerStep")) / 2e3
    found = Attribution(events).time(2)
    assert sum(spent.ms for spent in found) == pytest.approx(whole, rel=0.02)
    phases = sum_by(found, "phase")
    expected = {"forward", "backward", "optimizer"} if mode == "train" else {"forward"}
    assert {phase for phase, ms in phases.items() if ms > 0} == {*expected, "between"}
    assert phases["between"] < 0.2 * whole


def test_what_the_optimizer_does_is_the_optimizers():
    """Also its copies of scalars, which are no layout copies."""
    found = profiled(vit(), images(2, 3, 96, 96), "train").time
    assert {s.category for s in found if s.phase == "optimizer"} == {Category.OPTIMIZER}
    assert {s.phase for s in found if s.category == Category.OPTIMIZER and s.ms} == {"optimizer"}


def test_attention_is_found_where_its_name_tells_nothing():
    with torch.device("meta"):
        model = timm.create_model("caformer_s18")
    names = [name for name, _ in model.named_modules() if name.endswith("token_mixer")]
    assert {name for name, labels in _labels(model).items() if "attention" in labels[0]} == {
        name for name in names if "stages.2" in name or "stages.3" in name
    }


def test_time_of_convolutions_is_that_of_one_step():
    """The time of the profiler's range, by the number of profiled steps."""
    step = Step(vit(), images(2, 3, 96, 96), "infer")
    step()
    events = list(traces._run(step, CPU).events() or ())
    name = "blocks.0.mlp.act.before"
    whole = sum(
        e.cpu_time_total for e in events if e.name.endswith(f"depthwise convolution: {name}")
    )
    assert Attribution(events).depthwise_ms(2)[name] == pytest.approx(whole / 2 / 1e3)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_every_inserted_module_has_its_own_time(mode: Mode):
    found = profiled(vit(), images(2, 3, 96, 96), mode)
    sites = {f"blocks.{i}.mlp.act.before" for i in range(2)}
    assert {spent.site for spent in found.time} == {"", *sites}
    phases = {"forward", "backward"} if mode == "train" else {"forward"}
    for site in sites:
        own = [spent for spent in found.time if spent.site == site]
        assert {s.phase for s in own} == phases
        assert {s.category for s in own} <= {
            Category.DEPTHWISE, Category.LAYOUT, Category.OTHER
        }  # fmt: skip
        for phase in phases:
            assert sum_by([s for s in own if s.phase == phase], "category")[Category.DEPTHWISE] > 0
    outside = [spent for spent in found.time if not spent.site]
    assert sum_by(outside, "category")[Category.DEPTHWISE] == 0
    assert set(found.depthwise_ms) == sites
    assert all(ms > 0 for ms in found.depthwise_ms.values())


def test_a_model_without_insertions_has_no_sites():
    found = profiled(vit(None), images(2, 3, 96, 96), "train")
    assert {spent.site for spent in found.time} == {""}
    assert found.depthwise_ms == {}


def test_the_site_of_a_heavy_branch_has_the_time():
    class Heavy(nn.Module):
        def __init__(self):
            super().__init__()
            self.light, self.heavy = tc.DWConv(4), tc.DWConv(60, 7)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            light, heavy = tokens.split([4, 60], dim=-1)
            return torch.cat([self.light(light, 48, 48), self.heavy(heavy, 48, 48)], dim=-1)

    found = profiled(Heavy(), images(4, 64, 48, 48), "train").time
    for phase in ("forward", "backward"):
        by_site = sum_by([spent for spent in found if spent.phase == phase], "site")
        assert by_site["heavy"] > 2 * by_site["light"] > 0


def test_matmuls_of_what_was_inserted_are_not_those_of_attention():
    """A separable convolution beside attention runs in the hooks of attention."""
    found = profiled(vit("separable_ffn", site="beside_attn"), images(2, 3, 96, 96), "train")
    inserted = [s for s in found.time if s.site == "blocks.0.attn.beside"]
    by_category = sum_by(inserted, "category")
    assert by_category[Category.INSERTED_MATMUL] > 0
    assert by_category[Category.ATTENTION] == by_category[Category.MLP_MATMUL] == 0
    assert sum_by(found.time, "category")[Category.ATTENTION] > 0


def test_convolutions_of_the_model_itself_are_known():
    step = Step(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), images(2, 3, 64, 64), "infer")
    step()
    found = profile_step(step, CPU)
    assert set(found.depthwise_ms) == {f"stages.{i}.blocks.0.mlp.dwconv" for i in range(4)}
    by_category = sum_by(found.time, "category")
    assert by_category[Category.CONVOLUTION] > 0, "patch embeddings and reductions"
    assert by_category[Category.DEPTHWISE] > 0
