"""What the documents name exists."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

from psbn_mmdet.commands import VERBS
from tests.helpers.paths import ROOT

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "configs/*.md", "studies/**/*.md")
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


def anchors_of(path):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?:", target):
            continue
        place, _, anchor = target.partition("#")
        file = path.parent / place if place else path
        assert file.exists(), f"{document}: {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{document}: {target}"


def commands_in(text):
    """(script, options) of each command of this project; those of mmdet name no file here."""
    joined = re.sub(r"\\\n\s*", " ", text)
    pattern = r"(?:python )?(?:(tools/\w+\.\w+)|-m (studies[\w.]+)|\bpsbn ([a-z-]+))([^\n`|#]*)"
    for tool, module, verb, rest in re.findall(pattern, joined):
        if verb:
            assert verb in VERBS, verb
            script = f"psbn_mmdet/commands/{VERBS[verb][0].lstrip('.')}.py"
            yield script, re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest)
            continue
        script = tool or f"{module.replace('.', '/')}/__main__.py"
        if module and not (ROOT / script).exists():
            script = f"{module.replace('.', '/')}.py"
        yield script, re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_names_a_script_and_options_that_exist(document):
    for script, options in commands_in((ROOT / document).read_text()):
        source = ROOT / script
        assert source.exists(), f"{document}: {script}"
        for option in options:
            # Either the script or what it hands its arguments on to.
            known = [
                source,
                *(ROOT / "psbn_mmdet/launch").glob("*.py"),
                *source.parent.glob("*.py"),
            ]
            known += (ROOT / "tools").glob("*.sh") if source.suffix == ".sh" else []
            texts = (file.read_text() for file in known if file.is_file())
            assert any(option in text for text in texts), f"{document}: {option}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_names_what_is_public(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = re.search(r"^docs: .*\n\t.*-m (sphinx .*)$", (ROOT / "Makefile").read_text(), re.M)
    arguments = command[1].replace("build/docs", str(tmp_path)).split()
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    pages = [*(tmp_path / "docs" / "api").glob("*.html")]
    listed = set(re.findall(r'id="psbn_mmdet\.([\w.]+)"', "".join(p.read_text() for p in pages)))
    for room in ("norm", "checkpoint", "collapse", "decay", "theory"):
        public = set(importlib.import_module(f"psbn_mmdet.{room}").__all__)
        at = {name.removeprefix(f"{room}.") for name in listed}
        assert public <= at, f"{room}: {sorted(public - at)} stand in no page of docs/api"
