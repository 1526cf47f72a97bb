"""Nothing that is loaded can run code: what ``SECURITY.md`` promises, looked up in the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p for room in ("tokenconv", "examples", "benchmarks") for p in ROOT.glob(f"{room}/**/*.py")
)
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "pickle.Unpickler", "marshal.loads", "shelve.open", "yaml.load", "torch.hub.load",
    "joblib.load", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
METHODS = {"extractall", "extract", "register_for_checkpointing"}
"""Of archives; and of Accelerate, which unpickles what was registered."""
WEIGHTS = {"torch.load", "load_checkpoint", "load_state_dict", "timm.models.load_checkpoint"}
"""Functions that read pickles, unless they are told not to."""
SHELLS = {"examples/walkthrough.py": "runs the commands that its page shows"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(path: Path) -> Iterator[str]:
    for name, call in calls(path):
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        where = f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        if (
            name in FORBIDDEN
            or (name.rpartition(".")[2] in METHODS and words.get("filter") != "'data'")
            or (name in WEIGHTS and words.get("weights_only") != "True")
            or words.get("weights_only", "True") != "True"
            or words.get("allow_pickle", "False") != "False"
            or words.get("trust_remote_code", "False") != "False"
            or words.get("shell", "False") != "False"
            or (runs_a_shell(name, call) and str(path.relative_to(ROOT)) not in SHELLS)
        ):
            yield where


def runs_a_shell(name: str, call: ast.Call) -> bool:
    words = {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)}
    return name.startswith("subprocess.") and not words.isdisjoint({"sh", "bash", "cmd"})


@pytest.mark.parametrize("room", ["tokenconv", "examples", "benchmarks"])
def test_nothing_that_is_read_can_run_code(room):
    assert not [
        found for path in SOURCES if path.is_relative_to(ROOT / room) for found in unsafe(path)
    ]


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)", "pickle.load(file)", "torch.load(path)", "load_checkpoint(model, path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)", "subprocess.run(['sh', text])",
        "archive.extractall(folder)",
    ],
)  # fmt: skip
def test_it_would_be_found(tmp_path, monkeypatch, code):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "source.py").write_text(code)
    assert [*unsafe(tmp_path / "source.py")] == [f"source.py:1: {code}"]
