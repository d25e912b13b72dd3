"""The formulas of docstrings, which are TeX, as plain text for terminals and pages without a typesetter."""

import re
import unicodedata
from collections.abc import Iterator

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}^_&]|\s+|[^\\{}^_&\s]", re.DOTALL)
_GAP = "\u2003"  # between formulas of one line
_SILENT = {r"\big", r"\Big", r"\bigg", r"\Bigg", r"\bigl", r"\bigr", r"\left", r"\right", r"\!", r"\displaystyle"}
_PLAIN = {r"\mathrm", r"\text", r"\mathbf", r"\mathcal", r"\operatorname", r"\mathbb"}
_NAMED = {r"\bar": "mean", r"\overline": "mean", r"\sqrt": "√"}
_ACCENTS = {r"\hat": "\u0302", r"\tilde": "\u0303"}
_SIGNS = {
    r"\sum": "Σ", r"\prod": "Π", r"\alpha": "α", r"\beta": "β", r"\gamma": "γ", r"\delta": "δ", r"\epsilon": "ε",
    r"\lambda": "λ", r"\mu": "μ", r"\phi": "φ", r"\Phi": "Φ", r"\pi": "π", r"\rho": "ρ", r"\sigma": "σ", r"\tau": "τ",
    r"\theta": "θ", r"\eta": "η", r"\omega": "ω", r"\Delta": "Δ", r"\Sigma": "Σ", r"\Lambda": "Λ", r"\ell": "ℓ",
    r"\cdot": "·", r"\times": "×", r"\circ": "∘", r"\odot": "⊙", r"\le": "≤", r"\ge": "≥", r"\ne": "≠", r"\neq": "≠",
    r"\in": "∈", r"\to": "→", r"\sim": "~", r"\approx": "≈", r"\infty": "∞", r"\angle": "∠", r"\setminus": "∖",
    r"\top": "ᵀ", r"\ldots": "…", r"\dots": "…", r"\mid": "|", r"\pm": "±", r"\langle": "⟨", r"\rangle": "⟩",
    r"\lVert": "⟦", r"\rVert": "⟧", r"\lvert": "⟨|", r"\rvert": "|⟩", r"\|": "‖", r"\{": "{", r"\}": "}",
    r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ", r"\quad": _GAP, r"\qquad": _GAP, "\\\\": "; ", "&": " if ",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_OPEN, _CLOSE = "([{⟨⟦", ")]}⟩⟧"


def plain(tex: str) -> str:
    r"""One formula as one line of text.

    Fractions become quotients, bars means, norms double strokes; indices of several signs stand in parentheses.

    Example:
        >>> plain(r"T^2 \, \mathrm{KL}(p_t \,\|\, p_s)")
        'T² KL(p_t ‖ p_s)'
        >>> plain(r"\frac{1}{B C} \sum_{b,c} \lVert a - \bar a \rVert_2^2")
        '1/(B C) Σ_(b,c) ‖a - mean(a)‖_2²'
    """
    text = "".join(_Reader(_TOKEN.findall(tex.strip())).until(None))
    text = re.sub(r"⟦ *", "‖", re.sub(r" *⟧", "‖", text))
    text = re.sub(r"⟨\| *", "|", re.sub(r" *\|⟩", "|", text))
    text = re.sub(r"([([⟨]) +", r"\1", re.sub(r" +([)\],;⟩])", r"\1", text))
    text = re.sub(rf" *{_GAP}[ {_GAP}]*", _GAP, re.sub(r" +", " ", text))
    text = text.replace(" if else", " else").replace("∖ ", "∖").replace(_GAP, "  ").strip()
    return unicodedata.normalize("NFC", text)


class _Reader:
    """Reads a row of tokens from left to right."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def until(self, end: str | None) -> Iterator[str]:
        """The text of each element, up to a token or to the end of all."""
        while self.position < len(self.tokens):
            if self.tokens[self.position] == end:
                self.position += 1
                return
            yield self.element()

    def element(self) -> str:
        """The next token with its arguments, as text."""
        token = self.tokens[self.position]
        self.position += 1
        if token == "{":  # nosec B105 # of TeX
            return "".join(self.until("}"))
        if token in "^_":  # nosec B105 # of TeX
            return self.script(token)
        if token in _SILENT:
            return ""
        if token in (r"\begin", r"\end"):
            self.argument()
            return "{ " if token == r"\begin" else " }"  # nosec B105 # of TeX
        if token == r"\frac":  # nosec B105 # of TeX
            above, below = self.argument(), self.argument()
            return f"{_bracketed(above)}/{_bracketed(below)}"
        if token in _PLAIN:
            return self.argument()
        if token in _NAMED:
            return f"{_NAMED[token]}({self.argument()})"
        if token in _ACCENTS:
            argument = self.argument()
            return argument[:1] + _ACCENTS[token] + argument[1:]
        if token.isspace():
            return " "
        return _SIGNS.get(token, token.removeprefix("\\"))

    def argument(self) -> str:
        """The next group, or the next token where there are no braces."""
        while self.position < len(self.tokens) and self.tokens[self.position].isspace():
            self.position += 1
        return self.element().strip() if self.position < len(self.tokens) else ""

    def script(self, token: str) -> str:
        """An exponent or an index."""
        argument = self.argument().replace("∖ ", "∖")
        if token == "^" and re.fullmatch(r"-?\d", argument):  # nosec B105 # of TeX
            return argument.translate(_SUPERSCRIPT)
        if argument == "ᵀ":
            return argument
        alone = re.fullmatch(r"\w+|∖\w", argument)
        return f"{token}{argument}" if alone else f"{token}({argument})"


def _bracketed(text: str) -> str:
    """In parentheses where an operator or a product is not inside some already."""
    depth = 0
    for sign in text:
        depth += (sign in _OPEN) - (sign in _CLOSE)
        if depth == 0 and sign in " +-−/·=":
            return f"({text})"
    return text
