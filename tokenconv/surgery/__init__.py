"""Puts blocks into live timm models and takes them out again."""

from tokenconv.surgery.accelerate import Acceleration, accelerate_, decelerate_
from tokenconv.surgery.checkpoint import load_, save
from tokenconv.surgery.domains import (
    add_domain,
    domain_parameters,
    list_domains,
    load_domain,
    save_domain,
    set_domain,
)
from tokenconv.surgery.edits import Edit, inserted_modules
from tokenconv.surgery.folding import FoldReport, fold_
from tokenconv.surgery.lifecycle import insert_, keep_tokens, remove_
from tokenconv.surgery.plans import Plan, plan
from tokenconv.surgery.scripting import freeze_grid_
from tokenconv.surgery.training import param_groups, trainable_

__all__ = [
    "Acceleration",
    "Edit",
    "FoldReport",
    "Plan",
    "accelerate_",
    "add_domain",
    "decelerate_",
    "domain_parameters",
    "fold_",
    "freeze_grid_",
    "insert_",
    "inserted_modules",
    "keep_tokens",
    "list_domains",
    "load_",
    "load_domain",
    "param_groups",
    "plan",
    "remove_",
    "save",
    "save_domain",
    "set_domain",
    "trainable_",
]
