"""What the documents name exists."""

import ast
import re

import pytest

from tests.helpers.paths import ROOT

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "configs/*.md", "studies/**/*.md")
    for path in ROOT.glob(pattern)
)
GUARANTEES = "docs/guarantees.md"


def named_tests(text):
    return re.findall(r"(tests/[\w/]+\.py)::([\w:]+)", text)


def defined_in(path):
    """Functions of a module, and methods as ``Class::method``."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        names.add(getattr(node, "name", None))
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{part.name}" for part in node.body if hasattr(part, "name")}
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_exists(document):
    text = (ROOT / document).read_text()
    for path, name in named_tests(text):
        assert (ROOT / path).is_file(), f"{document}: {path}"
        assert name in defined_in(ROOT / path), f"{document}: {path}::{name}"


def test_every_guarantee_names_its_test():
    items = re.split(r"^- ", (ROOT / GUARANTEES).read_text(), flags=re.M)[1:]
    assert len(items) > 30
    for item in items:
        assert named_tests(item.split("\n\n")[0]), item
