"""What is told about methods comes from their source, without torch, and is complete."""

import json
import re
import subprocess
import sys

import pytest

from potstill.errors import UsageError
from potstill.methods import METHODS, REQUIRED, create_method, list_methods, method_class
from potstill.methods import documentation as told
from potstill.methods.documentation import (
    METHOD_KINDS,
    StepCost,
    declared_requirements,
    declared_student_layers,
    is_wrapper,
    method_documentation,
    methods_by_kind,
    tex_to_text,
)
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


def ready(name):
    """A method with its defaults, and examples where it has none."""
    inner = {"MethodSettings": {"name": "kd"}, "list[MethodSettings]": [{"name": "kd"}, {"name": "at"}]}
    found = method_documentation(name).entry.options
    return create_method(name, **{key: inner[o.annotation] for key, o in found.items() if o.default is REQUIRED})


@pytest.mark.parametrize("name", list_methods())
def test_needs_read_from_source_are_those_of_the_class(name):
    method = ready(name)
    if is_wrapper(name):
        assert declared_requirements(name) is None
    else:
        assert declared_requirements(name) == method.needs
    assert declared_student_layers(name) == method_class(name).student_taps


@pytest.mark.parametrize("name", list_methods())
def test_nothing_is_left_out(name):
    found = method_documentation(name)
    assert (found.paper is None) == (name in NO_PAPER)
    if found.paper is not None:
        assert re.fullmatch(r"[A-Z].*[\w.]", found.paper.authors), found.paper.authors
        assert re.search(r"(19|20)\d\d$", found.paper.venue), found.paper.venue
        assert found.paper.url.startswith("https://")
        assert len(found.paper.title) > 10
    assert found.loss
    assert found.terms or found.kind in ("around other methods", "no teacher")
    for text in (*found.terms.values(), found.loss, found.notes, *found.traps):
        assert "\\" not in text
    missing = [key for key, (_, meaning) in found.options.items() if not meaning]
    assert missing == [], f"{name}: the class's docstring says nothing about {missing}"
    assert set(found.entry.published) <= {key for key in found.entry.published if key.count("/") == 1}


def test_no_option_hides_a_word_that_every_method_understands():
    reserved = {"name", "preset", "schedule"}
    assert {name: set(method_documentation(name).options) & reserved for name in METHODS} == {
        name: set() for name in METHODS
    }


def test_kinds_follow_from_needs():
    kinds = methods_by_kind()
    assert tuple(kinds) == METHOD_KINDS
    assert sorted(name for names in kinds.values() for name in names) == sorted(METHODS)
    wanted = {
        "kd": "logits", "fitnet": "feature maps", "rkd": "embeddings", "wkd_l": "logits", "crd": "embeddings",
        "camkd": "several teachers",
        "supervised": "no teacher", "ls": "around other methods", "combined": "around other methods",
    }  # fmt: skip
    assert {name: method_documentation(name).kind for name in wanted} == wanted
    assert told._method_kind("kd", Requirements(teacher=False, peers=True)) == "peers"


def test_the_parts_of_a_docstring():
    found = method_documentation("kd")
    assert found.paper == told.Paper(
        "Hinton, Vinyals and Dean",
        "Distilling the Knowledge in a Neural Network",
        "NIPS workshop 2014",
        "https://arxiv.org/abs/1503.02531",
    )
    assert found.loss == "Labels and soft targets: ``alpha * CE + (1 - alpha) * KD``."
    assert found.terms == {"kd_loss": "T² KL(softmax(z_t / T) ‖ softmax(z_s / T))"}
    assert found.options["alpha"][1] == "weight of the label term; 1 ignores the teacher, 0 ignores the labels."
    assert found.needs == ["teacher"]
    assert any("KLDivLoss" in trap for trap in found.traps)
    assert "Traps" not in found.notes
    assert {"Two classes are refused: the non-target part is then 0."} < set(method_documentation("dkd").traps)
    assert any("mixup" in trap for trap in method_documentation("crd").traps)
    assert list(method_documentation("srd").terms) == ["srd_loss", "kd_loss"]  # a function of another method's file


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'dkd'"):
        method_documentation("dkdd")


def test_nothing_of_it_imports_torch():
    code = (
        "import sys; from potstill.cli import main; main(['methods']); main(['methods', 'reviewkd']); "
        "from potstill.methods import METHODS; from potstill.methods.documentation import method_documentation; "
        "[method_documentation(name) for name in METHODS]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_prices_are_read_where_they_are_measured(tmp_path, monkeypatch):
    values = {"time": 2.5, "low": 2.4, "high": 2.6, "teacher": 1.25, "memory": 1.5, "adapters": 3}
    monkeypatch.setattr(told, "COSTS_FILE", tmp_path / "price.json")
    told.measured_costs.cache_clear()
    assert told.step_costs() == {}
    told.measured_costs.cache_clear()
    (tmp_path / "price.json").write_text(json.dumps({"methods": {"kd": values}}))
    assert told.step_costs() == {"kd": StepCost(2.5, 2.4, 2.6, 1.25, 1.5, 3)}
    told.measured_costs.cache_clear()
