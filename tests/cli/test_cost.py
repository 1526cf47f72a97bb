"""``tokenconv cost``: the price of models and blocks, as a table and as JSON."""

import json
import re

import pytest
import timm
import torch

import tokenconv as tc
from tokenconv.cli import main


def printed(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert main(["cost", *words.split()]) == 0
    return capsys.readouterr().out


def params(capsys: pytest.CaptureFixture[str], words: list[str]) -> int:
    return json.loads(printed(capsys, " ".join([*words, "--json"])))["params"]


def hybrid() -> torch.nn.Module:
    model = timm.create_model("test_vit", img_size=(64, 96))
    return tc.insert_(model, "mix_ffn", blocks=slice(3, None), kernel_size=5)


HYBRID = "test_vit --block mix_ffn --blocks 3: --kernel-size 5 --img-size 64 96"


def test_json_is_what_cost_finds(capsys: pytest.CaptureFixture[str]):
    content = json.loads(printed(capsys, f"{HYBRID} --json"))
    cost = tc.cost(hybrid(), (3, 64, 96))
    assert content["what"] == "test_vit with mix_ffn, one input of 3x64x96"
    assert content["categories"].keys() == {str(kind) for kind in cost.categories}
    assert list(content["sites"]) == [f"blocks.{i}.mlp.act.before" for i in (3, 4, 5)]
    pairs = [(content, cost)]
    pairs += [(content["categories"][kind], own) for kind, own in cost.categories.items()]
    pairs += [(content["sites"][name], own) for name, own in cost.sites.items()]
    for found, own in pairs:
        for figure in ("params", "macs", "backward_macs", "bytes", "intensity"):
            assert found[figure] == getattr(own, figure)
    assert all(site["calls"] == 1 for site in content["sites"].values())


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]):
    what, header, *rows = printed(capsys, HYBRID).splitlines()
    cost = tc.cost(hybrid(), (3, 64, 96))
    assert what == "test_vit with mix_ffn, one input of 3x64x96"
    assert re.split(r"\s{2,}", header.strip()) == [
        "params", "MACs", "backward MACs", "bytes", "MACs/byte",
    ]  # fmt: skip
    expected = {"total": cost, **cost.categories, **cost.sites}
    assert [re.split(r"\s{2,}", row.strip())[0] for row in rows] == list(expected)
    for row, own in zip(rows, expected.values(), strict=True):
        figures = re.split(r"\s{2,}", row.strip())[1:]
        counts = (own.params, own.macs, own.backward_macs, own.bytes)
        assert figures == [*(f"{count:,d}" for count in counts), f"{own.intensity:.2f}"]
    assert len({len(line) for line in (header, *rows)}) == 1, "not aligned"


@pytest.mark.parametrize(
    ("words", "size", "kernel"),
    [
        ("mix_ffn --dim 24", (24, 14, 14), {}),
        ("mbconv --dim 24 --img-size 8 6 --kernel-size 5", (24, 8, 6), {"kernel_size": 5}),
    ],
)
def test_a_block_is_priced_by_its_width(
    capsys: pytest.CaptureFixture[str], words: str, size: tuple[int, ...], kernel: dict[str, int]
):
    content = json.loads(printed(capsys, f"{words} --json"))
    name = words.split()[0]
    cost = tc.cost(tc.create_block(name, dim=24, **kernel), size)
    assert content["what"] == f"{name}, one input of {'x'.join(map(str, size))}"
    assert (content["params"], content["macs"]) == (cost.params, cost.macs)


def test_modules_are_priced_by_name(capsys: pytest.CaptureFixture[str]):
    content = json.loads(printed(capsys, r"resnet18 --sites ^layer\d$ --img-size 64 --json"))
    assert list(content["sites"]) == ["layer1", "layer2", "layer3", "layer4"]
    cost = tc.cost(timm.create_model("resnet18"), (3, 64, 64), sites=["layer2"])
    assert content["sites"]["layer2"]["macs"] == cost.sites["layer2"].macs


def test_a_model_is_priced_at_its_own_size_and_never_has_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    built = []
    create = timm.create_model
    monkeypatch.setattr(
        "timm.create_model", lambda *a, **k: built.append(create(*a, **k)) or built[-1]
    )
    content = json.loads(printed(capsys, "legacy_xception --json"))
    assert content["what"] == "legacy_xception, one input of 3x299x299"
    assert (content["params"], round(content["macs"] / 1e9, 3)) == (22_855_952, 8.357)
    assert {p.device.type for p in built[0].parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vit_tiny_patch16_22", "unknown model 'vit_tiny_patch16_22': did you mean vit_tiny"),
        ("mix_ffn", "mix_ffn is a block: say how wide it is, with --dim"),
        ("mixffn --dim 8", "unknown block 'mixffn': did you mean mix_ffn"),
        ("test_vit --block mixffn", "unknown block 'mixffn': did you mean mix_ffn"),
        ("resnet18 --block mix_ffn", "ResNet is not a model that tokenconv can change"),
        ("test_vit --img-size 100", "refuses an image of 3x100x100: Input height"),
        ("test_vit --img-size 1 2 3", "--img-size takes H or H W, got 3 numbers"),
        ("test_vit --sites layer5", "no module of test_vit has a name like layer5"),
        ("mix_ffn --dim 8 --kernel-size 4", "expected an odd kernel_size, got 4"),
    ],
)
def test_what_cannot_be_priced_is_one_line(
    capsys: pytest.CaptureFixture[str], words: str, expected: str
):
    assert main(["cost", *words.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tokenconv: error: ")
    assert expected in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "the following arguments are required: MODEL"),
        ("mix_ffn --dim 8 --block peg", "--dim says that MODEL is a block, and --block puts one"),
        ("mix_ffn --dim 8 --blocks 3", "--dim says that MODEL is a block"),
        ("test_vit --site beside_mlp", "--site and --blocks are of a block: name it with --block"),
        ("test_vit --kernel-size 5", "--site and --blocks are of a block: name it with --block"),
        ("mix_ffn --dim 0", "expected a positive integer, got 0"),
        ("test_vit --sites (", "'(' is no regular expression: missing )"),
    ],
)
def test_wrong_usage_exits_with_two(capsys: pytest.CaptureFixture[str], words: str, expected: str):
    with pytest.raises(SystemExit) as stopped:
        main(["cost", *words.split()])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tokenconv")
    assert expected in last


@pytest.mark.parametrize(
    ("words", "grows"),
    [("test_vit --block cvt_attn --blocks 0", True), ("pvt_v2_b0 --block none", False)],
)
def test_who_names_what_goes_nowhere_else_has_asked_for_it(capsys, words, grows):
    name, *more = words.split()
    plain, changed = (params(capsys, [name, *own]) for own in ([], more))
    assert (changed > plain, changed < plain) == (grows, not grows)


def test_hybrids_have_names(capsys):
    name, block = "vit_tiny_patch16_224", "mix_ffn"
    assert params(capsys, [f"{name}_{block}"]) == params(capsys, [name, "--block", block])
