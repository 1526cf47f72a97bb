"""How Sphinx makes the documentation: ``make docs``. Nothing is fetched."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tokenconv

project = "tokenconv"
author = "the tokenconv authors"
release = version = tokenconv.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "generate",
]
smartquotes = False  # file names have two hyphens in a row
exclude_patterns = ["_build"]
nitpick_ignore_regex = [
    # Their inventories would have to be fetched.
    ("py:.*", r"(torch|numpy|np|timm|einops|PIL|collections|pathlib|typing|abc|enum|os)\..*"),
    ("py:.*", r"[a-z]+|[A-Z]\w+(Error|Exception)|Exception|Any|Callable|Iterable|Mapping|Path"),
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = f"tokenconv {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
