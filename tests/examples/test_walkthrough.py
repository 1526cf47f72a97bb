"""The page that walks through training and prediction."""

import re
import sys

import pytest
import walkthrough
from PIL import Image
from training.errors import TrainingError

KEPT = walkthrough.HERE / "walkthrough"


class Untried(walkthrough.Walkthrough):
    """Runs and draws nothing."""

    def run(self, language, *, caller, shows=True):
        return f"```{language}\n{caller()}\n```"

    def score(self, name, metric):
        return "0%"

    def curves(self, *names):
        return "curves.png"

    def overlays(self, *names):
        return "overlays.png"


def test_the_kept_page_is_what_its_template_says_and_has_its_pictures():
    kept = (KEPT / "README.md").read_text()
    said = re.sub(r"\n```text\n.*?\n```", "", kept, flags=re.DOTALL)
    said = re.sub(r"\d+%", "0%", said)
    args = walkthrough.parse([])
    assert said == walkthrough.render(Untried(args.runs, args.out), args)
    pictures = re.findall(r"!\[.*\]\((.*)\)", kept)
    assert len(pictures) == 3
    for picture in pictures:
        Image.open(KEPT / picture).verify()


def test_code_of_the_page_is_run_and_its_output_shown(tmp_path):
    page = walkthrough.Walkthrough(tmp_path, tmp_path)
    assert page.run("python", caller=lambda: "print(2 + 3)") == (
        "```python\nprint(2 + 3)\n```\n```text\n5\n```"
    )
    assert page.run("sh", caller=lambda: "echo five", shows=False) == "```sh\necho five\n```"
    found = page.run("sh", caller=lambda: "python -c 'import sys; print(sys.executable)'")
    assert sys.executable in found
    with pytest.raises(TrainingError, match="this ended with 3: false"):
        page.run("sh", caller=lambda: "false || exit 3")


@pytest.mark.slow
def test_the_page_is_made_by_doing_what_it_shows(tmp_path):
    out, runs = tmp_path / "page", tmp_path / "runs"
    few = ["--scenes", "64", "--epochs", "1", "--out", str(out), "--runs", str(runs)]
    walkthrough.run(walkthrough.parse(few))
    page = (out / "README.md").read_text()
    assert "logits changed by 0.0" in page
    assert f"{runs}/masks/predictions/3.png" in page
    assert {path.name for path in out.iterdir()} == {
        "README.md", "scenes.png", "curves.png", "overlays.png",
    }  # fmt: skip
