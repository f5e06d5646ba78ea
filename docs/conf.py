"""The documentation as a site: `make docs` writes it to build/docs.

Its source is the repository's own Markdown, from the root, so links between README, docs, configs
and studies are the same here and where the repository is browsed.
"""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psbn_mmdet  # noqa: E402

project = "psbn_mmdet"
author = "psbn_mmdet developers"
release = psbn_mmdet.__version__
project_copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "configs/*.md", "studies/**.md"]
exclude_patterns = ["build", "work_dirs", ".venv"]

html_theme = "furo"
html_title = f"psbn_mmdet {release}"
html_show_sourcelink = False
html_show_copyright = False

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
# Lines of a shell beside their output, TOML beside a comment: not worth a warning.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # THRESHOLD rather than 0.001
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
default_role = "code"  # a single backtick, in docstrings that are written as Markdown
napoleon_use_rtype = False
napoleon_use_ivar = True

# A reference in a text must lead somewhere. Types in signatures may stand for other libraries'.
nitpicky = True
nitpick_ignore_regex = [("py:(class|obj|exc|data)", ".*")]

SOURCES = [*(ROOT / "psbn_mmdet").rglob("*.py")]
DEFINED = {part for path in SOURCES for part in (path.stem, path.parent.name)}.union(
    *(re.findall(r"^ *(?:def|class) (\w+)", path.read_text(), re.M) for path in SOURCES)
)

TOC = """

```{toctree}
:hidden:
:caption: Guide

docs/install
docs/when-to-use
docs/own-data
docs/train
docs/collapse
docs/compare-ap
docs/theory
```

```{toctree}
:hidden:
:caption: Reference

docs/api/index
docs/guarantees
configs/README
docs/measured
CHANGELOG
CONTRIBUTING
```

```{toctree}
:hidden:
:caption: Studies

studies/cifar/README
studies/detection/README
studies/published/README
studies/mmdet_configs/results
```
"""
RESULTS = """

```{toctree}
:hidden:
:glob:

results/*
```
"""


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Tables of contents, which README files do not need where they are browsed as files."""
    if name == root_doc:
        source[0] += TOC
    elif (ROOT / name).parent.joinpath("results").is_dir():
        source[0] += RESULTS


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Docstrings name things by their place in the package, ``.criteria.count``.

    What the reference has under another name, as ``psbn_mmdet.collapse.count``, is linked; what is
    internal stays plain text; what does not exist is warned of.
    """
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rpartition(".")[2]
    for full, entry in env.domains.python_domain.objects.items():
        if full.rpartition(".")[2] == name:
            target, page = entry.node_id, entry.docname
            return make_refnode(app.builder, node["refdoc"], page, target, content, full)
    return content if name in DEFINED else None


def shorten(
    app: Sphinx, what: str, name: str, thing: object, options: object, given: str, returned: str
) -> tuple[str, str]:
    """``NDArray`` where autodoc writes out what numpy defines it as."""
    long = re.compile(r"(?:~?numpy\.)?ndarray\[tuple\[.*?\], (?:~?numpy\.)?dtype\[(?:~?[\w.]+)\]\]")
    return tuple(part and long.sub("NDArray", part) for part in (given, returned))


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-signature", shorten)
    app.connect("source-read", add_contents)
    app.connect("missing-reference", resolve)
