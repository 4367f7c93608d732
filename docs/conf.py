"""How the documentation site is built: ``sphinx-build -W docs SITE``."""

from __future__ import annotations

import os
from importlib.metadata import version as version_of
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "flwr_fusion"
author = "The flwr_fusion developers"
project_copyright = author
release = version = version_of("flwr-fusion")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery/**/*.py", "gallery/**/*.ipynb", "sg_execution_times.rst"]
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"flwr_fusion {release}"
html_static_path: list[str] = []

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# A name in single backticks is code, as in the docstrings of NumPy.
default_role = "code"
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": str(Path(__file__).parents[1] / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": r"__init__|ties|digits",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "capture_repr": (),
    "abort_on_example_error": True,
    "remove_config_comments": True,
}
