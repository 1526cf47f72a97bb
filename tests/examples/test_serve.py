"""``serve.md`` does what it says, and serves where there is no torch."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import tokenconv as tc
from tokenconv.cli.parser import parse

pytest.importorskip("onnxruntime")
PAGE = (Path(__file__).parents[2] / "examples" / "serve.md").read_text()
EXPORTING, SERVING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(COMMAND,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
NOTHING = "import sys; sys.modules |= dict.fromkeys(('torch', 'timm', 'tokenconv', 'onnx'))\n"


def test_from_a_delta_to_a_session_without_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    create_model = timm.create_model

    def seeded(name, *, pretrained, **kwargs):
        assert pretrained  # which random weights stand for here, always the same
        torch.manual_seed(0)
        return create_model(name, **kwargs)

    model = seeded("vit_tiny_patch16_224", pretrained=True, num_classes=10, img_size=96)
    tc.insert_(model, "mix_ffn")
    tc.trainable_(model, "inserted+head")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape))
    tc.save(model, "hybrid")
    monkeypatch.setattr(timm, "create_model", seeded)
    exec(compile(EXPORTING, "serve.md", "exec"), {})
    assert "hybrid.onnx: onnx, float32" in capsys.readouterr().out

    pixels = np.random.default_rng(0).integers(0, 255, (160, 240, 3), np.uint8)
    Image.fromarray(pixels).save("a.png")
    Image.fromarray(pixels[:, :80]).save("b.png")
    run = subprocess.run(
        [sys.executable, "-c", NOTHING + SERVING, "a.png", "b.png"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first.startswith("a.png ")
    assert second.startswith("b.png ")
    with Image.open("a.png") as picture:  # 96 wide, 64 high: six and four patches
        resized = np.asarray(picture.resize((96, 64), Image.BICUBIC), np.float32)
    images = torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    again = create_model("vit_tiny_patch16_224", num_classes=10, img_size=96, dynamic_img_size=True)
    tc.insert_(again, "mix_ffn").load_state_dict(model.state_dict())
    with torch.no_grad():
        shares = again.eval()(images).softmax(1)[0]
    best = int(shares.argmax())
    assert first.split()[1:3] == [f"{best}:", f"{shares[best]:.0%}"]


def test_serving_takes_twenty_lines():
    assert len([line for line in SERVING.splitlines() if line.strip()]) <= 20


def test_the_command_is_one():
    args = parse(shlex.split(COMMAND.replace("\\\n", ""))[1:])
    assert (args.command, args.to, args.dynamic, args.fold) == (
        "export", "onnx", ("hw", "batch"), True,
    )  # fmt: skip
