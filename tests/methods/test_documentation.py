"""What is known about methods comes from their classes, needs no torch once it is in the catalog, and is complete."""

import json
import re
import subprocess
import sys

import pytest

from potstill import methods
from potstill.errors import UsageError
from potstill.methods import (
    METHOD_KINDS,
    Paper,
    StepCost,
    create_method,
    list_own_methods,
    measured_costs,
    method_info,
    methods_by_kind,
    step_costs,
    takes_methods,
)
from potstill.methods import documentation as told
from potstill.methods.documentation import catalog_files, tex_to_text
from potstill.methods.requirements import Requirements

NO_PAPER = {"supervised", "combined"}


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"\frac{1}{B C} \sum_{b,c} (F_s - F_t)^2", "1/(B C) Σ_(b,c) (F_s - F_t)²"),
        (r"\frac{a + b}{2} \cdot x_{ij}^{-1}", "(a + b)/2 · x_ij⁻¹"),
        (r"\frac{\lVert u \rVert_2}{K}, \quad k \ne y", "‖u‖_2/K,  k ≠ y"),
        (r"\mathrm{KL}\big(p \,\|\, q\big), \; \bar a, \hat G, \overline{x + y}", "KL(p ‖ q), mean(a), Ĝ, mean(x + y)"),
        (r"\begin{cases} 0 & s \le t \\ s^2 & \text{else} \end{cases}", "{ 0 if s ≤ t; s² else }"),
        (r"\sqrt{v + \epsilon} F F^\top z_{\setminus y}", "√(v + ε) F Fᵀ z_∖y"),
        (r"T^{10} e^{-2\gamma} \sum_{i=1}^n \log_2 x", "T^10 e^(-2γ) Σ_(i=1)^n log_2 x"),
    ],
)
def test_formulas_as_text(tex, text):
    assert tex_to_text(tex) == text


def test_the_files_that_are_written_from_the_classes_are_up_to_date():
    stale = [path.name for path, text in catalog_files().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python -m potstill.methods.documentation"


def test_needs_are_those_of_the_class():
    for name in list_own_methods():
        found = method_info(name)
        method = create_method(name, **found.examples)
        around = any(takes_methods(option) for option in found.options.values())
        assert found.requirements == (None if around else method.needs), name
        assert "Args:" not in found.loss, name


def test_nothing_is_left_out():
    for name in list_own_methods():
        found = method_info(name)
        assert (found.paper is None) == (name in NO_PAPER), name
        if found.paper is not None:
            assert re.fullmatch(r"[A-Z].*[\w.]", found.paper.authors), found.paper.authors
            assert re.search(r"(19|20)\d\d$", found.paper.venue), found.paper.venue
            assert found.paper.url.startswith("https://"), name
            assert len(found.paper.title) > 10, name
        assert found.loss, name
        assert found.terms or found.kind in ("around other methods", "no teacher"), name
        for text in (*found.terms.values(), found.loss, found.notes, *found.traps):
            assert "\\" not in text, name
        assert all(key.count("/") == 1 for key in found.published), name


def test_no_option_hides_a_word_that_every_method_understands():
    reserved = {"name", "preset", "schedule", "factor"}
    assert {name: set(method_info(name).options) & reserved for name in list_own_methods()} == {
        name: set() for name in list_own_methods()
    }


def test_kinds_follow_from_needs():
    kinds = methods_by_kind()
    assert tuple(kinds) == METHOD_KINDS
    assert sorted(name for names in kinds.values() for name in names) == list_own_methods()
    wanted = {
        "kd": "logits", "fitnet": "feature maps", "rkd": "embeddings", "wkd_l": "logits", "crd": "embeddings",
        "camkd": "several teachers",
        "supervised": "no teacher", "ls": "around other methods", "combined": "around other methods",
    }  # fmt: skip
    assert {name: method_info(name).kind for name in wanted} == wanted
    assert told._method_kind(Requirements(teacher=False, peers=True)) == "peers"


def test_the_parts_of_a_docstring():
    found = method_info("kd")
    assert found.paper == Paper(
        "Hinton, Vinyals and Dean",
        "Distilling the Knowledge in a Neural Network",
        "NIPS workshop 2014",
        "https://arxiv.org/abs/1503.02531",
    )
    assert found.loss == "Labels and soft targets: ``alpha * CE + (1 - alpha) * KD``."
    assert found.terms == {"kd_loss": "T² KL(softmax(z_t / T) ‖ softmax(z_s / T))"}
    assert found.options["alpha"].doc == "weight of the label term; 1 ignores the teacher, 0 ignores the labels"
    assert found.needs == ["teacher"]
    assert any("KLDivLoss" in trap for trap in found.traps)
    assert "Traps" not in found.notes
    assert {"Two classes are refused: the non-target part is then 0."} < set(method_info("dkd").traps)
    assert any("mixup" in trap for trap in method_info("crd").traps)
    assert list(method_info("srd").terms) == ["srd_loss", "kd_loss"]  # a function of another method's file
    order = ["mlld_batch_loss", "mlld_class_loss", "standardise", "kd_loss"]  # of the source, on every Python
    assert list(method_info("mlld").terms) == order


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'dkd'"):
        method_info("dkdd")


def test_nothing_of_it_imports_torch():
    code = (
        "import sys; from potstill.cli import main; main(['methods']); main(['methods', 'reviewkd']); "
        "from potstill.methods import list_own_methods, method_info; "
        "[method_info(name) for name in list_own_methods()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_prices_are_read_where_they_are_measured(tmp_path, monkeypatch):
    values = {"time": 2.5, "low": 2.4, "high": 2.6, "teacher": 1.25, "memory": 1.5, "adapters": 3}
    monkeypatch.setattr(methods, "COSTS_FILE", tmp_path / "price.json")
    measured_costs.cache_clear()
    assert step_costs() == {}
    measured_costs.cache_clear()
    (tmp_path / "price.json").write_text(json.dumps({"methods": {"kd": values}}))
    assert step_costs() == {"kd": StepCost(2.5, 2.4, 2.6, 1.25, 1.5, 3)}
    measured_costs.cache_clear()
