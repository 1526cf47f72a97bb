"""A report as one HTML file that opens anywhere, without a network."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokenconv.reports.chart import Chart
from tokenconv.reports.figure import inline_svg


def html_page(
    package: str, template: str, *, charts: Mapping[str, Sequence[Chart]], **content: Any
) -> str:
    """Fill a template that extends ``base.html.jinja``.

    Args:
        package: Has the template in its folder ``page``.
        template: Name of its file.
        charts: By heading; the template gets pairs of a chart and its picture.
        **content: All else that the template and the base show.
    """
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader(package, "page"), PackageLoader("tokenconv.reports", "page")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {
        heading: [
            (chart, Markup(inline_svg(chart, f"chart-{i}{j}-"))) for j, chart in enumerate(group)
        ]
        for i, (heading, group) in enumerate(charts.items())
    }
    return environment.get_template(template).render(charts=pictures, **content)
