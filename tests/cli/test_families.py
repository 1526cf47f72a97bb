"""The support matrix: what it says, and that it is what a sweep finds."""

import json

import pytest
import timm

from tokenconv.cli import main
from tokenconv.models import HYBRIDS
from tokenconv.surgery.families import FAMILIES
from tokenconv.surgery.sites import SITES
from tokenconv.surgery.support import support_matrix, sweep


def test_every_family_is_in_the_matrix_and_works_or_says_why_not(capsys):
    assert main(["list", "--families"]) == 0
    printed = capsys.readouterr().out
    _, rows = support_matrix()
    assert {family.name for family in FAMILIES} <= {row.family for row in rows}
    for row in rows:
        assert f"| {row.family} | {row.model_class} | {row.architectures} |" in printed
        assert row.planned == row.architectures or row.reasons, row.model_class
        for site in SITES:
            assert row.sites.get(site) or site in row.reasons or "" in row.reasons, row.model_class
        for site, reason in row.reasons.items():
            assert len(reason) > 10
            assert reason in printed or SITES.get(site) == "conv"


def test_a_pattern_narrows_the_matrix(capsys):
    assert main(["list", "swin*", "--families"]) == 0
    printed = capsys.readouterr().out
    assert "| swin_transformer_v2_cr | SwinTransformerV2Cr |" in printed
    assert "sees windows, and not the whole grid" in printed
    assert "pvt_v2" not in printed


def test_a_sweep_finds_what_the_matrix_says():
    """On one small architecture per row; the whole sweep is marked slow."""
    rows = {row.model_class: row for row in sweep(["test_vit", "test_convnext", "resnet18"])}
    assert set(rows) == {"VisionTransformer", "ConvNeXt"}
    assert rows["VisionTransformer"].planned == 1
    assert rows["VisionTransformer"].sites.keys() == set(SITES) - {"merge_conv", "remove_conv"}
    assert (
        rows["ConvNeXt"].reasons["before_block"].endswith("sees maps (B, C, H, W), and no tokens")
    )


@pytest.mark.slow
def test_the_stored_matrix_is_that_of_a_whole_sweep():
    version, rows = support_matrix()
    if version != timm.__version__:
        pytest.skip(f"the stored matrix is of timm {version}, installed is {timm.__version__}")
    ours = {*HYBRIDS, "tokenconv"}
    assert sweep([name for name in timm.list_models() if name not in ours]) == rows


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        (["--block", "peg", "--blocks", "0"], ["blocks.0"]),
        (["--block", "mix_ffn", "--blocks", "4:"], ["blocks.4.mlp.act", "blocks.5.mlp.act"]),
        (["--block", "mix_ffn", "--blocks", "-1"], ["blocks.5.mlp.act"]),
        (["--block", "peg", "--blocks", r"\.[23]$"], ["blocks.2", "blocks.3"]),
        (
            ["--block", "separable_ffn", "--blocks", "1", "--site", "beside_attn"],
            ["blocks.1.attn"],
        ),
    ],
    ids=str,
)
def test_a_plan_from_the_command_line(options, hosts, capsys):
    assert main(["plan", "test_vit", *options, "--json", "--kernel-size", "5"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [edit["place"]["host"] for edit in plan["edits"]] == hosts
    assert all(edit["kwargs"] == {"kernel_size": 5} for edit in plan["edits"])


def test_a_site_that_no_block_has_is_named(capsys):
    assert main(["plan", "test_vit", "--block", "peg", "--site", "beside_mpl"]) == 1
    assert "unknown site 'beside_mpl': did you mean beside_mlp" in capsys.readouterr().err
