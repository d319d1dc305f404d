"""Formulas as MathML, written into the pages when they are built: browsers show them without a script or a network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

# Between them a displayed formula may break, on a phone for example.
PARTS = re.compile(r"(?<=\\qquad)\s|\s(?=\\allowbreak)")
# The converter writes names such as "mean" as relations, with the wide spaces of an equals sign.
NAME = re.compile(r"<mo>([a-z]{2,})</mo>")
# A minus after a parenthesis or a comma is a sign, and what a part after a break begins with is not.
SIGN = re.compile(r"(<mo[^>]*>(?:\(|&#x00028;|&#x0002C;)</mo>)<mo>(&#x02212;)</mo>")
FIRST = re.compile(r"(?<=\n)(<math[^>]*><mrow>)<mo>(&#x0002B;|&#x0003D;)</mo>")
# Bars of a norm or of an absolute value, which would stretch to different heights, left and right.
BAR = re.compile(r"<mo>(&#x02016;|&#x0007C;|\|)</mo>")


def part_of_formula(text: str, display: str) -> str:
    rest = text.removeprefix("\\allowbreak")
    markup: str = convert(rest, display=display)
    return markup if rest == text else markup.replace("<math ", '<math class="continued" ', 1)


def mathml(node: nodes.Element, display: str) -> str:
    parts = PARTS.split(node.astext()) if display == "block" else [node.astext()]
    markup = "\n".join(part_of_formula(part, display) for part in parts)
    markup = NAME.sub(r'<mo form="prefix" lspace="0" rspace="0.17em">\1</mo>', markup)
    markup = BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', markup)
    markup = SIGN.sub(r'\1<mo form="prefix">\2</mo>', markup)
    markup = FIRST.sub(r'\1<mo form="infix">\2</mo>', markup)
    if "\\" in markup:  # the converter copies the commands that it does not know
        logger.warning("no MathML for %s", node.astext(), location=node)
    return markup


def inline(writer: HTML5Translator, node: nodes.Element) -> None:
    writer.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block(writer: HTML5Translator, node: nodes.Element) -> None:
    writer.body.append(f'<div class="math">{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
