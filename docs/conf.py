"""Settings of the documentation site; ``make docs`` builds it.

All pages are Markdown (MyST) that can also be read as it is. Notebooks are Markdown, too, with code cells that are
executed when the site is built. Nothing here asks the network for anything.
"""

from importlib.metadata import version as version_of
from pathlib import Path

project = "skymask-gpu"
author = "skymask-gpu developers"
copyright = f"{author}, Apache-2.0"
version = release = version_of("skymask-gpu")
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "pictures"]

html_theme = "furo"
html_title = f"skymask-gpu {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Headings of three levels can be linked to, as on a page that shows Markdown files.
myst_heading_anchors = 3
# A README that is included has links from the folder above.
myst_enable_extensions = ["colon_fence"]

# Executed once, and again after a change of a notebook; an error in a cell fails the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent.parent / "build" / "docs-notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
# A notebook does not say what its language is before it was executed.
suppress_warnings = ["myst-nb.lexer"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
# `=` of long defaults such as MaskTraining() stay as they are written.
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes are one list, as in the docstring, without a heading for each.
napoleon_use_ivar = True
