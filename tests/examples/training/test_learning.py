"""What the guide says about training."""

import json
import re
import shlex
from pathlib import Path

import pytest
import quantize
import train_classification
import train_domains
import train_segmentation
from training.digits import DigitScenes
from training.settings import Settings

GUIDES = Path(__file__).parents[3] / "docs" / "guides"
PAGES = [path.read_text().replace("\\\n", " ") for path in sorted(GUIDES.glob("*.md"))]
COMMANDS = [
    shlex.split(line.split("  #")[0])
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if "examples/" in line
]
SCRIPTS = {
    "examples/train_classification.py": train_classification,
    "examples/train_segmentation.py": train_segmentation,
}
OTHERS = {"examples/train_domains.py": train_domains, "examples/quantize.py": quantize}
WHOLE = {words[1]: words[2:] for words in COMMANDS if "--scenes" in words}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_understood(words):
    script = next((word for word in words if word in SCRIPTS), None)
    if words[1] in OTHERS:
        OTHERS[words[1]].parse(words[2:])
        return
    if script is None:
        assert words[:2] == ["python", "examples/predict.py"]
        return
    options = [word for word in words[words.index(script) + 1 :] if word != "..."]
    Settings.of(SCRIPTS[script].parse(options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "metric", "chance", "promised", "eight_bits"),
    [
        ("examples/train_classification.py", "top1", 0.1, 0.85, 0.01),
        # All background: 1 of 11 classes.
        ("examples/train_segmentation.py", "miou", 0.09, 0.45, 0.02),
    ],
)
def test_scripts_learn_digits(start, tmp_path, script, metric, chance, promised, eight_bits):
    words = WHOLE[script]
    process = start(script.partition("/")[2], *words, out="run", threads=2)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    values = [
        epoch[metric] for epoch in json.loads((tmp_path / "run" / "history.json").read_text())
    ]
    assert values[-1] > promised > 2 * chance
    assert values[-1] > values[0] + 0.2

    predicted = start(
        "predict.py", str(tmp_path / "run"), str(make_scene(tmp_path)), out="overlays"
    )
    printed, told = predicted.communicate(timeout=120)
    assert predicted.returncode == 0, told
    assert "scene.png" in printed

    found = quantize.run(quantize.parse([str(tmp_path / "run")]))
    assert found["torch float32"] == pytest.approx(max(values), abs=1e-3)
    assert len(found) == 5
    for way, value in found.items():
        assert value == pytest.approx(found["torch float32"], abs=eight_bits), way


@pytest.mark.slow
def test_a_control_learns_less(start, tmp_path):
    """The guide's sentence about it."""
    words = [*WHOLE["examples/train_classification.py"], "--control"]
    process = start("train_classification.py", *words, out="run", threads=2)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert json.loads((tmp_path / "run" / "history.json").read_text())[-1]["top1"] < 0.4


def make_scene(folder):
    path = folder / "scene.png"
    DigitScenes("test", size=(40, 56), length=1)[0].image.save(path)
    return path
