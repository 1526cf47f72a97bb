import pickle
import pkgutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tokenconv as tc

PUBLIC = [
    "BLOCKS", "AnalysisError", "BlockInfo", "CheckpointError", "Comparison", "Cost", "DWConv",
    "ExportError", "GridError", "Impl", "MeasurementError", "MixFFN", "MultiGrid", "Plan",
    "SeparableConv", "SparseGrid", "SurgeryError", "TokenConvError", "TokenGrid",
    "UnknownNameError", "accelerate_", "analysis", "compare", "cost", "create_block",
    "decelerate_", "decompose_", "depthwise_conv", "export", "fold_", "freeze_grid_", "insert_",
    "keep_tokens", "list_blocks", "load_", "load_official", "map_to_tokens", "param_groups",
    "plan", "quantize_", "remove_", "save", "tokens_to_map", "trainable_",
]  # fmt: skip


def test_public_names_are_these():
    assert tc.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(tc))


def test_no_module_shadows_a_public_name():
    for module in pkgutil.walk_packages(tc.__path__, "tokenconv."):
        if module.name != "tokenconv.__main__":
            import_module(module.name)
    for name in PUBLIC:
        value = getattr(tc, name)
        assert callable(value) or name in ("BLOCKS", "analysis"), f"{name} is {value!r}"


def test_every_public_name_has_a_docstring():
    for name in PUBLIC:
        value = getattr(tc, name)
        assert name == "BLOCKS" or (value.__doc__ and value.__doc__[0].isupper()), name


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tc.nothing


def loaded_by(statement):
    """The modules that a statement loads where torch is there already."""
    code = f"import sys, torch; old = set(sys.modules); {statement}; print(*set(sys.modules) - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def packages(modules):
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names


def test_import_adds_einops_alone_to_torch():
    loaded = loaded_by("import tokenconv")
    assert packages(loaded) == {"tokenconv", "einops"}
    rooms = {name.split(".")[1] for name in loaded if name.startswith("tokenconv.")}
    assert rooms == {"choice", "errors", "grid", "layers", "ops"}


def test_a_name_loads_what_it_needs():
    blocks = packages(loaded_by("import tokenconv; tokenconv.create_block('mix_ffn', 8)"))
    assert blocks == {"tokenconv", "einops"}
    reports = packages(
        loaded_by("import tokenconv; tokenconv.cost, tokenconv.export, tokenconv.compare")
    )
    assert "matplotlib" in reports
    assert "timm" not in reports
    assert "timm" in packages(loaded_by("import tokenconv; tokenconv.plan"))


def test_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert tc.__version__ == project["version"]


def test_errors_survive_processes_and_have_one_root():
    errors = [
        tc.GridError("a"),
        tc.SurgeryError("b"),
        tc.MeasurementError("c"),
        tc.UnknownNameError("block", "mixffn", ["mix_ffn", "peg"]),
    ]
    for error in errors:
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), str(twin)) == (type(error), str(error))
        assert isinstance(error, tc.TokenConvError)
    assert errors[-1].choices == ["mix_ffn", "peg"]


def test_unknown_names_list_all_choices_when_nothing_is_near():
    assert str(tc.UnknownNameError("block", "zzz", ["b", "a"])) == (
        "unknown block 'zzz': expected one of a, b"
    )
