"""What depthwise separable convolution can express: the experiments, and what was kept of them."""

import json
import math
from importlib import import_module

import pytest
import torch
from PIL import Image

import tokenconv as tc
from tokenconv.layers import GridConv

main = import_module("representation.__main__")
digits, esp, experiment, groups, layers, mixing, padding, phase, samples = (
    import_module(f"representation.{name}")
    for name in (
        *("digits", "esp", "experiment", "groups", "layers"),
        *("mixing", "padding", "phase", "samples"),
    )
)
KEPT = main.Path(main.__file__).parent


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder in which all were run."""
    folder = tmp_path_factory.mktemp("representation")
    main.main(["--quick", "--out", str(folder)])
    return folder


@pytest.mark.parametrize("name", main.NAMES)
def test_an_experiment_leaves_numbers_a_figure_and_a_section(quick, name):
    result = json.loads((quick / f"{name}.json").read_text())
    assert result["seeds"] == [0]
    assert result["command"] == f"{main.COMMAND} {name} --seeds 1 --quick"
    assert {"python", "torch", "tokenconv"} <= set(result["versions"])
    Image.open(quick / f"{name}.png").verify()
    assert main.section(result) in (quick / "README.md").read_text()


def test_seeds_decide_what_is_found(quick):
    kept = json.loads((quick / "samples.json").read_text())["runs"][0]
    assert samples.run(0, quick=True) == kept
    assert samples.run(1, quick=True) != kept


def test_a_run_of_some_keeps_what_is_known_of_the_others(quick, capsys):
    before = (quick / "phase.json").read_bytes()
    main.main(["esp", "--seeds", "2", "--quick", "--out", str(quick)])
    assert (quick / "phase.json").read_bytes() == before
    page = (quick / "README.md").read_text()
    assert "## phase" in page
    assert "esp --seeds 2 --quick" in page
    main.main(["esp", "--quick", "--out", str(quick)])
    assert "esp: In one block fusion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["phases"], "no experiment phases: there are phase, "),
        (["--seeds", "0"], "at least 1, got"),
    ],
)
def test_what_cannot_be_run_is_told(words, told, capsys):
    with pytest.raises(SystemExit):
        main.parse(words)
    assert told in capsys.readouterr().err


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "page").mkdir()
    with pytest.raises(OSError):  # noqa: PT011  # it is the system's
        main.write_whole(tmp_path / "page", b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


# --- what was kept ---


def kept(name):
    return json.loads((KEPT / f"{name}.json").read_text())


def test_the_kept_page_says_what_the_kept_numbers_say():
    results = [kept(name) for name in main.NAMES]
    assert (KEPT / "README.md").read_text() == main.page(results)


@pytest.mark.parametrize("name", main.NAMES)
def test_a_kept_claim_is_shown_by_its_numbers(name):
    result = kept(name)
    assert result["seeds"] == [*range(5)] == [*range(len(result["runs"]))]
    assert "--quick" not in result["command"]
    claim = import_module(f"representation.{name}").claim(result["runs"])
    assert claim == (result["claim"], result["holds"]) == (result["claim"], True)


def test_kept_figures_are_small():
    sizes = [(KEPT / f"{name}.png").stat().st_size for name in main.NAMES]
    assert max(sizes) < 100_000
    assert sum(sizes) < 700_000


# --- what is exact ---


@pytest.mark.parametrize("name", mixing.STACKS)
def test_only_pointwise_layers_and_layer_norm_mix_channels(name):
    between = mixing.jacobian(name, seed=7)[~torch.eye(mixing.DIM, dtype=torch.bool)]
    assert not between.any() if name in mixing.NEVER else between.all()


@pytest.mark.parametrize(("fuse", "touched"), [(True, (9, 9, 17, 25, 33)), (False, (9,) * 5)])
def test_holes_of_a_pyramid_are_counted(fuse, touched):
    found = esp.response(esp.blocks(7, fuse, 1)) != 0
    assert tuple(found.sum((1, 2)).tolist()) == touched
    assert not found[1:, 1::2].any()  # the narrowest is not added: odd rows stay out
    shares = esp.holes(found, 1).values()
    for share, count, dilation in zip(shares, touched, esp.DILATIONS, strict=True):
        assert share == 1 - count / (2 * dilation + 1) ** 2


def test_fusion_is_a_running_sum():
    fused, plain = (
        esp.response(esp.blocks(7, fuse, 1)[0].get_submodule("body")) for fuse in (True, False)
    )
    torch.testing.assert_close(fused[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(fused[1:], plain[1:].cumsum(0))


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_only_zeros_around_a_constant_picture_tell_position(depth):
    picture = torch.ones(1, 3, padding.SIDE, padding.SIDE, dtype=torch.double)
    for mode in padding.MODES:
        found = padding.features(padding.network(depth, mode, seed=7), picture)
        told = padding.explained(padding.best_decoder(found))
        if mode == "zeros":
            assert told == pytest.approx(padding.bound(depth))
        else:
            torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-12)
            assert told == 0


def test_the_bound_on_position_is_that_of_equal_rows():
    rows = torch.arange(16.0)
    merged = rows.clone()
    merged[3:13] = rows[3:13].mean()
    assert padding.bound(3) == pytest.approx(float(merged.var() / rows.var()))


# --- layers and their kernels ---


def test_the_kernel_of_a_layer_is_its_weight():
    layer = GridConv(3, 5)
    wanted = layer.weight.detach().flatten(2).permute(1, 2, 0)
    torch.testing.assert_close(layers.kernel_of(layer, 3), wanted)


def test_a_kernel_has_the_rank_of_its_sum_or_groups():
    assert layers.ranks(layers.kernel_of(tc.SeparableConv(8), 8)).tolist() == [1] * 8
    for terms in (2, 3):
        layer = layers.sum_of_separable(8, 8, terms)
        assert layers.ranks(layers.kernel_of(layer, 8)).tolist() == [terms] * 8
    for count in (2, 4, 8):
        kernel = groups.teacher(count, torch.Generator().manual_seed(0))
        assert layers.ranks(kernel).tolist() == [min(9, groups.DIM // count)] * groups.DIM


def test_a_layer_that_can_express_a_rule_finds_it():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    for kind in samples.STUDENTS:
        wanted = samples.teacher(kind, generator)
        floor = samples.best_separable(wanted)
        without_noise = layers.noisy_samples(wanted, 2000, 0.0, generator)
        found = layers.fitted(samples.STUDENTS["separable"], samples.DIM, *without_noise, steps=200)
        assert layers.relative_error(found, wanted) == pytest.approx(floor, rel=0.05, abs=1e-4)
        assert (floor < 1e-9) == (kind == "separable")


def test_a_rectified_response_keeps_as_much_as_said():
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    share = torch.corrcoef(torch.stack([z, z.relu()]))[0, 1] ** 2
    assert float(share) == pytest.approx(0.25 / (0.5 - 1 / (2 * math.pi)), abs=2e-3)


# --- phase ---


def test_one_kernel_a_channel_cannot_tell_a_phase_from_its_mirror_image():
    """Whatever the kernels: the same pairs of values, in another order, for two phases."""
    torch.manual_seed(0)
    layer = tc.SeparableConv(2, out_dim=3, bias=False).double()
    angle = 2 * math.pi / 5
    kernel = layer.depthwise.weight.detach().sum(2)[:, 0]  # on gratings that do not change by row
    turns = torch.polar(torch.ones(3).double(), angle * torch.arange(-1, 2).double())
    gains = (kernel * turns).sum(1)
    shift = float((gains[1] / gains[0]).angle())

    def seen(place, phase):
        t = angle * torch.arange(40).double() + place
        lines = torch.stack([t.cos(), (t + phase).cos()], -1).expand(5, -1, -1)
        out = layer(lines.reshape(1, 200, 2), 5, 40).view(5, 40, 3)[2, 1:36]
        return out[out[:, 0].argsort()]

    mirrored = -2 * float(gains[0].angle()) - 0.3 - 36 * angle  # of the row of 35 inner positions
    torch.testing.assert_close(seen(0.3, 0.9), seen(mirrored, -0.9 - 2 * shift))
    assert (seen(0.3, 0.9) - seen(0.3, -0.9)).abs().max() > 0.01


def test_phase_is_learned_with_two_kernels_a_channel_and_not_with_one():
    _, dense = phase.train("dense", 0, steps=120)
    _, two = phase.train("sum of T=2", 0, steps=160)
    _, one = phase.train("separable, 4x outputs", 0, steps=160)
    assert min(dense, two) > phase.CEILING + 0.1
    assert one < phase.CEILING + 0.02


def test_the_ceiling_is_that_of_the_best_mirror():
    phases = 2 * math.pi * torch.arange(0.5, 4000) / 4000
    quadrant = (phases // (math.pi / 2)).long()
    shares = [
        ((((-phases - turn) % (2 * math.pi)) // (math.pi / 2)).long() == quadrant).float().mean()
        for turn in 2 * math.pi * torch.arange(400) / 400
    ]
    assert 0.5 + 0.5 * float(max(shares)) == pytest.approx(phase.CEILING, abs=1e-3)


# --- spreads ---


def test_a_difference_is_paired_by_seed():
    runs = [{"a": {"x": seed + 0.5}, "b": {"x": float(seed)}} for seed in range(4)]
    assert experiment.gain(runs, "a", "b", "x") == (0.5, 0.0)
    assert experiment.Spread.of([1.0, 2.0, 3.0]).half == pytest.approx(2.484, abs=1e-3)
    assert not experiment.Spread.of([1.0]).is_positive
    assert str(experiment.Spread(0.51234, 0.0123)) == "0.512 ± 0.012"
    assert str(experiment.Spread(1.23e-15, 4.1e-16)) == "1.2e-15 ± 4e-16"


def test_digits_to_train_on_are_not_those_to_be_judged_by():
    tokens, labels, others, _ = digits.split(0)
    assert tokens.shape == (500, 64, 1)
    assert len(others) == 1297
    assert set(labels.tolist()) == set(range(10))
    model = digits.Classifier([tc.SeparableConv(4)], 4)
    assert model(tokens[:2]).shape == (2, 10)
