"""Puts blocks into live timm models and takes them out again."""

from tokenconv.surgery.lifecycle import insert_, remove_
from tokenconv.surgery.plans import Edit, Plan, plan

__all__ = ["Edit", "Plan", "insert_", "plan", "remove_"]
