"""The page of results says what the kept files say, and the documentation has no other numbers."""

import json
import re
from datetime import datetime
from xml.etree import ElementTree

import pytest

UNKNOWN = {
    "compare-pvt_v2_b0--2-core-avx512--cpu": ["commit"],
    "compare-vit_tiny_patch16_224--2-core-avx512--cpu": ["commit"],
}
"""What files do not say that were kept before there was a page; nothing is to be added here."""
KERNELS, MODELS = "kernels--2-core-avx512--cpu", "models--2-core-avx512--cpu"


@pytest.fixture
def results(load_benchmark):
    return load_benchmark("results")


@pytest.fixture
def findings(load_benchmark):
    return load_benchmark("findings")


@pytest.fixture
def kept(results, tmp_path):
    """Gives the kept files, with one of them changed."""

    def change(name="", by=lambda content: content):
        for path in results.KEPT.glob("*/*.json"):
            content = json.loads(path.read_text())
            copy = tmp_path / "0.1.0" / path.name
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(json.dumps(by(content) if path.stem == name else content))
        return results.kept(tmp_path)

    return change


def test_pages_are_what_the_files_say(results, capsys):
    assert results.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_was_edited_is_found(results, monkeypatch, tmp_path, capsys):
    page = tmp_path / "results.md"
    page.write_text(results.PAGE.read_text().replace("1.14", "9.14"))
    monkeypatch.setattr(results, "PAGE", page)
    assert results.main(["--check"]) == 1
    assert f"{page} is not what `make results` writes" in capsys.readouterr().err


def test_every_file_says_how_it_was_made(results):
    files = results.kept()
    assert {name: file.missing for name, file in files.items() if file.missing} == UNKNOWN
    for file in files.values():
        made = file.made
        assert re.fullmatch(r"[0-9a-f]{40}", made.get("commit", "0" * 40))
        assert datetime.fromisoformat(made["date"]).tzinfo
        assert re.match(r"(python benchmarks/\w+\.py|tokenconv \w+) ", made["command"])
        assert {"python", "torch", "timm", "tokenconv"} <= set(made["versions"])


def test_every_file_has_its_figures(results):
    for file in results.kept().values():
        for ending in ("png", "svg"):
            assert file.path.with_suffix(f".{ending}").exists() == (file.kind in results.FIGURES)
        if file.kind in results.FIGURES:
            ElementTree.parse(file.path.with_suffix(".svg"))


def test_figures_are_drawn_in_the_same_bytes(results, tmp_path):
    (path,) = results.KEPT.glob("*/classics--*.json")
    drawn = []
    for _ in range(2):
        copy = tmp_path / path.name
        copy.write_text(path.read_text())
        results.FIGURES["classics"](copy)
        drawn.append([copy.with_suffix(f".{kind}").read_bytes() for kind in ("png", "svg")])
    assert drawn[0] == drawn[1]


# --- files that say something else ---


def test_a_number_of_a_file_is_the_number_of_the_page(results, kept):
    def slower(content):
        content["rows"][0]["ratio"]["naive/ours"]["median"] = 7.654
        return content

    pages = results.written(kept(KERNELS, slower))
    assert "| 7.65x (" in pages[results.PAGE]
    assert "| 7.65x (" not in results.PAGE.read_text()


def test_a_sentence_that_no_longer_holds_is_an_error(results, kept):
    def even(content):
        for row in content["rows"]:
            if row["batch_size"] == 1 and row["mode"] == "inference":
                row["ratio"]["eager/accelerated"]["median"] = 1.0
        return content

    files = kept(MODELS, even)
    with pytest.raises(results.ResultsError, match="says what the files do not: PVTv2 and SegFor"):
        results.written(files)


def test_a_file_of_no_kind_or_on_no_page_is_an_error(results, kept, tmp_path):
    files = kept()
    (tmp_path / "0.1.0" / "kernels--h100--cuda.json").write_text(files[KERNELS].path.read_text())
    with pytest.raises(results.ResultsError, match=r"no page shows kernels--h100--cuda: add it"):
        results.written(results.kept(tmp_path))
    (tmp_path / "0.1.0" / "coffee--h100--cuda.json").write_text("{}")
    with pytest.raises(
        results.ResultsError, match=r"of no known kind \(accuracy, .*add a function"
    ):
        results.kept(tmp_path)


def test_a_file_that_a_page_needs_is_missed(results, kept, monkeypatch, tmp_path, capsys):
    kept()[KERNELS].path.unlink()
    left = results.kept(tmp_path)
    monkeypatch.setattr(results, "kept", lambda: left)
    assert results.main(["--check"]) == 1
    assert f"error: no {KERNELS}.json is kept: there are accuracy--" in capsys.readouterr().err


def test_the_newest_version_is_shown(results, kept, tmp_path):
    kept()
    name = f"{KERNELS}.json"
    for version in ("0.10.0", "0.9.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / name).write_text((tmp_path / "0.1.0" / name).read_text())
    assert results.kept(tmp_path)[KERNELS].path == tmp_path / "0.10.0" / name


def test_the_readme_keeps_what_stands_around_its_table(results):
    first, last = results.MARKERS
    assert results.put("| new |\n", f"a\n{first}\nold\n{last}\nb\n") == (
        f"a\n{first}\n\n| new |\n\n{last}\nb\n"
    )
    with pytest.raises(results.ResultsError, match="has no '<!-- results: made by"):
        results.put("| new |", f"a\n{first}\nb")


# --- what is found in a file ---


def spread(median, iqr=0.1):
    return {"median": median, "iqr": iqr}


def test_kernels_are_divided_by_ours(findings):
    def row(case, batch_size, ours, timm, prefix=0, left=None):
        return {
            "case": case, "mode": "forward", "batch_size": batch_size, "left": left,
            "num_prefix_tokens": prefix,
            "latency_ms": {"ours": spread(ours), "timm": spread(ours * timm)},
            "ratio": {"timm/ours": spread(timm)},
        }  # fmt: skip

    found = findings.kernels({
        "rows": [
            row("1x2x2x8", 1, 2.0, 4.0), row("1x2x2x8+1", 1, 3.0, 1.0, prefix=1),
            row("4x2x2x8", 4, 8.0, 1.0), row("4x2x2x8/2", 4, 1.0, 0.5, left=2),
        ]
    })  # fmt: skip
    assert found["over"]("timm", "forward").values == [4.0, 1.0]
    assert found["over"]("timm", "forward").geomean == 2.0
    assert str(found["over"]("timm", "forward", one_image=True)) == "4.00x"
    assert found["over"]("timm", "forward", prefix=True).values == [1.0]
    assert found["over"]("timm", "forward", missing=True).values == [0.5]
    assert found["with_prefix"]("forward").values == [1.5]
    assert "| 1x2x2x8 | forward |  | 8.00 | 2.00 |  | 4.00x (0.10) |  |" in found["table"]


def test_models_are_chosen_by_family_images_and_mode(findings):
    def row(model, mode, batch_size, ratio, iqr=0.1):
        return {
            "model": model, "mode": mode, "batch_size": batch_size,
            "latency_ms": {"eager": spread(20.0)},
            "ratio": {"eager/accelerated": spread(ratio, iqr)},
        }  # fmt: skip

    rows = [
        row("pvt_v2_b0", "inference", 1, 1.3), row("pvt_v2_b0", "inference", 4, 0.9, 0.05),
        row("vit", "inference", 4, 1.05), row("vit", "training", 4, 2.0),
    ]  # fmt: skip
    found = findings.models({"img_size": 224, "rows": rows})
    ratio, shown = found["ratio"], found["shown"]
    assert str(ratio("eager/accelerated", "inference")) == "0.90x to 1.30x"
    assert ratio("eager/accelerated", "inference", one_image=True).values == [1.3]
    assert ratio("eager/accelerated", one_image=False, family="vit").values == [1.05, 2.0]
    assert shown("eager/accelerated", "inference", one_image=False) == [True, False]
    assert "| `pvt_v2_b0` | inference | 1 | 20.0 | 1.30x (0.10) |" in found["table"]


def test_accuracies_are_those_of_all_runs(results, findings):
    (path,) = results.KEPT.glob("*/accuracy--*.json")
    found = findings.accuracy(json.loads(path.read_text()))
    assert found["runs"] == 480
    assert found["comparisons"] == 78
    (row,) = [
        r for r in found["differences"]("scratch", "segmentation", "peg") if r["scenes"] == 512
    ]
    assert row["points"] == pytest.approx(100 * row["difference"]["mean"])
    assert found["last"]("scratch", "segmentation", "peg")["scenes"] == 8192


# --- numbers in the documentation ---

NUMBER = re.compile(
    r"(?<![\w.,])[+-]?\d[\d,]*(?:\.\d+)?(?:x\b|\s?(?:%|ms\b|s\b|seconds?\b|microseconds?\b"
    r"|points\b|images/s|[KMG]i?B\b))"
)
TOLD = {
    "6 GB": "what installation takes",
    "85%": "tests/examples/training/test_learning.py",
    "40%": "tests/examples/training/test_learning.py",
    "2%": "default of --precision",
    "20 seconds": "default of --budget",
    "99%": "intervals of `compare`",
    "5%": "what --fail-if asks for",
}
"""Numbers with a unit that no benchmark measures, and where they come from."""


def numbers(text):
    """Those with a unit, outside of code and of what `make results` writes."""
    text = re.sub(r"```.*?```|<!-- results:.*?<!-- end of results -->", "", text, flags=re.DOTALL)
    return {" ".join(number.split()) for number in NUMBER.findall(text)}


def test_numbers_are_found():
    text = "1.14x and -2 points, 3\nms; `64x64`, v1.2; 8x14x14, 2 x 3 ```\n9 ms\n``` 0.5%"
    assert numbers(text) == {"1.14x", "-2 points", "3 ms", "0.5%"}


def test_numbers_in_the_documentation_are_on_the_page_of_results(results):
    measured = numbers(results.PAGE.read_text())
    pages = {results.README, *results.PAGE.parent.glob("**/*.md")}
    pages.remove(results.PAGE.with_name("tested.md"))  # whose figures `make coverage` has measured
    for path in pages:
        assert not numbers(path.read_text()) - measured - {*TOLD}, path
