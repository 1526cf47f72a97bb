"""Which timm architectures take what: a table made by trying all of them, never typed.

``python -m tokenconv.surgery.support`` tries every architecture of the installed timm on the meta
device and rewrites ``support.json``, which ``tokenconv list --families`` prints.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenconv.costs import meta_copy, run_meta
from tokenconv.errors import MeasurementError, SurgeryError
from tokenconv.surgery.plans import plan_blocks
from tokenconv.surgery.sites import SITES, Survey, survey

_FILE = "support.json"


@dataclass
class Row:
    """What the architectures of one timm model class take."""

    family: str
    """Name of the file in ``timm.models``."""
    model_class: str
    architectures: int = 0
    planned: int = 0
    """Of how many ``mix_ffn`` was planned and rehearsed."""
    sites: dict[str, int] = field(default_factory=dict)
    """How many offer the site in at least one block, by site."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a site, or with key ``""`` the whole model, cannot be had; the first one met."""


def support_matrix() -> tuple[str, list[Row]]:
    """The stored table: the version of timm that it was made with, and its rows."""
    stored = json.loads((resources.files("tokenconv.surgery") / _FILE).read_text())
    return stored["timm"], [Row(**row) for row in stored["rows"]]


def format_matrix(pattern: str = "*") -> str:
    """The support matrix as a Markdown table, with the reasons below it."""
    version, rows = support_matrix()
    rows = [row for row in rows if fnmatchcase(row.family, pattern)]
    head = ["family", "class", "architectures", *SITES]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    notes: list[str] = []
    for row in rows:
        cells = [row.family, row.model_class, str(row.architectures)]
        cells += [_cell(row.sites.get(site, 0), row.architectures) for site in SITES]
        lines.append(" | ".join(cells))
        whys = {why for site, why in row.reasons.items() if SITES.get(site) != "conv"}
        notes += [f"- {row.family}, {row.model_class}: {why}" for why in sorted(whys)]
    table = "\n".join(f"| {line} |" for line in lines)
    about = (
        f"timm {version}: in how many architectures some block takes the site. merge_conv and "
        f"remove_conv are for MLPs that have a convolution."
    )
    return "\n".join([about, "", table, "", "What is left out, first case met:", *notes])


def _cell(count: int, of: int) -> str:
    return "all" if count == of else str(count or "-")


def sweep(architectures: Iterable[str]) -> list[Row]:
    """Try architectures on the meta device; those that hold no tokens are left out.

    Args:
        architectures: Names of timm models.

    Returns:
        A row per model class, sorted.
    """
    rows: dict[tuple[str, str], Row] = {}
    for name in architectures:
        with torch.device("meta"):
            model = timm.create_model(name)
        key = (type(model).__module__.rpartition(".")[2], type(model).__name__)
        try:
            offered = survey(model)
        except SurgeryError as error:
            if "is not a model that" in str(error) and not _sees_tokens(model):
                continue
            row = rows.setdefault(key, Row(*key))
            row.reasons.setdefault("", _short(str(error)))
            row.architectures += 1
            continue
        row = rows.setdefault(key, Row(*key))
        row.architectures += 1
        for site in SITES:
            blocks = offered.embeds if SITES[site] == "embed" else offered.blocks
            if any(site in block.places for block in blocks):
                row.sites[site] = row.sites.get(site, 0) + 1
            else:
                why = blocks[0].refusals[site] if blocks else "no patch embedding is known"
                row.reasons.setdefault(site, _short(why))
        row.planned += _plans(offered, row)
    return [rows[key] for key in sorted(rows)]


def _plans(offered: Survey, row: Row) -> bool:
    try:
        return bool(plan_blocks(offered, offered.blocks, "mix_ffn", None, {}, skip=True).edits)
    except SurgeryError as error:
        row.reasons.setdefault("mix_ffn", _short(str(error)))
        return False


def _sees_tokens(model: nn.Module) -> bool:
    """Whether an activation beside linear layers sees ``(B, N, C)`` or ``(B, H, W, C)``."""
    meta = meta_copy(model)
    seen: list[bool] = []
    for name, module in meta.named_modules():
        linear = {c.out_features for c in module.children() if isinstance(c, nn.Linear)}
        act = getattr(module, "act", None)
        if linear and isinstance(act, nn.Module) and "head" not in name:
            act.register_forward_pre_hook(_watch(linear, seen))
    config: dict[str, Any] = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    try:
        run_meta(meta, 2, config["input_size"])
    except MeasurementError:
        return True  # not known to be none
    return any(seen)


def _watch(widths: set[int], seen: list[bool]) -> Any:
    def hook(module: nn.Module, args: Sequence[Tensor]) -> None:
        shape = args[0].shape
        seen.append(len(shape) in (3, 4) and bool({shape[-1], 2 * shape[-1]} & widths))

    return hook


def _short(reason: str) -> str:
    """A reason without the names and sizes of one architecture."""
    return re.sub(r", here \(.*?\)", "", reason).removesuffix(", so mix_ffn cannot go there")


def write(path: Path, rows: Sequence[Row]) -> None:
    """Keep a table as JSON."""
    content = {"timm": timm.__version__, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(__file__).with_name(_FILE), sweep(tqdm(timm.list_models())))
