"""Sphinx: `sphinx-build -W --keep-going -b html docs site`."""

import contextlib
import io
import os
import re
from typing import ClassVar

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import aioelastic
from aioelastic.cli import main

project = "aioelastic"
author = "The aioelastic authors"
version = release = aioelastic.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
copybutton_prompt_text = "$ "
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"aioelastic {release}"
default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # as they are written, not as they are shown
maximum_signature_line_length = 70  # a longer one has one parameter a line
napoleon_use_ivar = True  # "Attributes:" is text, not a second definition of each field
myst_heading_anchors = 3


class CommandHelp(SphinxDirective):
    """`{command-help} run`: what `aioelastic run --help` prints, said by its parser."""

    optional_arguments = 1
    option_spec: ClassVar[dict] = {}

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "100"
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*self.arguments, "--help"])
        return [nodes.literal_block(text.getvalue(), text.getvalue(), language="text")]


def short_types(app: Sphinx, doctree: nodes.document) -> None:
    """Types in a signature, or of an attribute, without the names of their modules.

    Sphinx shows these where one has the arguments of another function (`P.args`).
    """
    for signature in doctree.findall(addnodes.desc_signature):
        for text in list(signature.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(re.sub(r"~(?:[\w.]+\.)?~?", "", text)))
    for reference in doctree.findall(addnodes.pending_xref):
        if reference["reftype"] == "class":
            for text in list(reference.findall(nodes.Text)):
                text.parent.replace(text, nodes.Text(text.rpartition(".")[2] or text))


def linked(app: Sphinx, doctree: nodes.document) -> None:
    """Public names in prose lead to the reference: `Group`, `Stop(grace=3)`."""
    for literal in list(doctree.findall(nodes.literal)):
        around = literal
        while around is not None and not isinstance(
            around, nodes.title | nodes.reference
        ):
            around = around.parent
        name = re.match(r"(?:aioelastic\.)?(\w+)(?:\(.*)?$", literal.astext())
        if around is None and name and name[1] in aioelastic._HOMES:
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"aioelastic.{name[1]}",
                refexplicit=True,
                refwarn=False,
            )
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", linked)
    app.connect("doctree-read", short_types)
    app.add_directive("command-help", CommandHelp)
