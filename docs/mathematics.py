r"""Formulas of the pages as MathML, made when the site is built: a browser draws them without a script or a font.

A Python-Markdown extension for `mkdocs.yml`. Arithmatex finds `$...$`, `$$...$$`, `\(...\)` and `\[...\]`, and leaves
code and amounts of money alone; latex2mathml translates what it found.
"""

from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.treeprocessors import Treeprocessor
from pymdownx.arithmatex import ArithmatexExtension


class FormulaTreeprocessor(Treeprocessor):
    """Replace each formula that Arithmatex marked by its MathML."""

    def run(self, root: Element) -> None:
        for element in root.iter():
            if element.get("class") == "arithmatex" and element.text:
                # The text is \(...\) or \[...\].
                display = "block" if element.text.startswith("\\[") else "inline"
                formula = convert_to_element(element.text[2:-2].strip(), display=display)
                element.text = None
                element.append(formula)


class MathematicsExtension(ArithmatexExtension):
    """Arithmatex, with MathML for its output."""

    def extendMarkdown(self, md: Markdown) -> None:
        super().extendMarkdown(md)
        # After inline patterns (20), before the tree becomes text.
        md.treeprocessors.register(FormulaTreeprocessor(md), "mathematics", 15)


def makeExtension(**options: Any) -> MathematicsExtension:
    """Return the extension; Python-Markdown asks for it by this name."""
    return MathematicsExtension(generic=True, **options)
