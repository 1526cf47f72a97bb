"""What models and blocks cost: by closed formula, from shapes alone."""

from tokenconv.costs import formulas
from tokenconv.costs.prices import Category, Cost, Price, SiteCost
from tokenconv.costs.pricing import cost, price
from tokenconv.costs.weightless import (
    depthwise_modules,
    meta_copy,
    num_params,
    own_modules,
    run_meta,
)

__all__ = [
    "Category",
    "Cost",
    "Price",
    "SiteCost",
    "cost",
    "depthwise_modules",
    "formulas",
    "meta_copy",
    "num_params",
    "own_modules",
    "price",
    "run_meta",
]
