"""Colours: Okabe and Ito's palette (told apart by colour-blind readers), one meaning each.

Figures are drawn with the light values; in the page the same values become CSS variables, so that one drawing serves
light and dark.  The values must differ from each other for that reason.
"""

INK = "#1b1f24"
FAINT = "#5b6570"
GRID = "#d9dee4"
PAPER = "#ffffff"

TRAIN, VAL, TEST = "#0072b2", "#d55e00", "#009e73"
TEACHER, BASELINE, DISTILLED = "#cc79a7", "#e69f00", "#0173b3"
ASSISTANT, GENERATION = "#8a5a9e", "#56b4e8"
RIGHT, WRONG = "#0074b4", "#d45d00"
# Text on a coloured field, light page / dark page (``figures.legible`` chooses): black / white, black / black, ...
ON_WEAK, ON_MIDDLE, ON_STRONG, ON_DEEP = "#000001", "#000002", "#fefefe", "#fefeff"
BRIGHTER = 1.3  # pictures made of pixels, in the dark page

SPLIT_COLOURS = {"train": TRAIN, "val": VAL, "test": TEST}
ROLE_COLOURS = {
    "teacher": TEACHER,
    "baseline": BASELINE,
    "assistant": ASSISTANT,
    "generation": GENERATION,
    "distilled": DISTILLED,
}

# CSS variable -> (light, dark)
CSS = {
    "ink": (INK, "#e8ebef"),
    "faint": (FAINT, "#a3adb8"),
    "grid": (GRID, "#343b44"),
    "paper": (PAPER, "#14181d"),
    "train": (TRAIN, "#56b4e9"),
    "val": (VAL, "#f08a3c"),
    "test": (TEST, "#2fc796"),
    "teacher": (TEACHER, "#d996bd"),
    "baseline": (BASELINE, "#e8ac28"),
    "distilled": (DISTILLED, "#57b5ea"),
    "assistant": (ASSISTANT, "#b48cc6"),
    "generation": (GENERATION, "#9fd3f2"),
    "right": (RIGHT, "#56b3e8"),
    "wrong": (WRONG, "#f18b3d"),
    "on-weak": (ON_WEAK, "#ffffff"),
    "on-middle": (ON_MIDDLE, "#000000"),
    "on-strong": (ON_STRONG, "#000000"),
    "on-deep": (ON_DEEP, "#ffffff"),
}


def css_variables() -> tuple[str, str]:
    """Declarations for the light and for the dark page."""
    light = " ".join(f"--{name}: {pair[0]};" for name, pair in CSS.items())
    dark = " ".join(f"--{name}: {pair[1]};" for name, pair in CSS.items())
    return light, dark
