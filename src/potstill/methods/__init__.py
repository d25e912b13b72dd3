"""One file per paper; one line in METHODS makes a method known to recipes, command line, docs and tests.

The lines are strings so that looking at the list (help, recipe checks) does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any, cast

from potstill.errors import UsageError, nearest

if TYPE_CHECKING:
    from potstill.methods.base import Method

METHODS: dict[str, str] = {
    "ab": "potstill.methods.ab:AB",
    "abkd": "potstill.methods.abkd:ABKD",
    "afd": "potstill.methods.afd:AFD",
    "at": "potstill.methods.at:AT",
    "bkd": "potstill.methods.bkd:BKD",
    "camkd": "potstill.methods.camkd:CAMKD",
    "cat_kd": "potstill.methods.cat_kd:CATKD",
    "cc": "potstill.methods.cc:CC",
    "combined": "potstill.methods.combined:Combined",
    "crd": "potstill.methods.crd:CRD",
    "crld": "potstill.methods.crld:CRLD",
    "cskd": "potstill.methods.cskd:CSKD",
    "ctkd": "potstill.methods.ctkd:CTKD",
    "deit_hard": "potstill.methods.deit:DeiTHard",
    "deit_soft": "potstill.methods.deit:DeiTSoft",
    "dist": "potstill.methods.dist:DIST",
    "dkd": "potstill.methods.dkd:DKD",
    "dml": "potstill.methods.dml:DML",
    "dtkd": "potstill.methods.dtkd:DTKD",
    "eakd": "potstill.methods.eakd:EAKD",
    "eskd": "potstill.methods.eskd:ESKD",
    "fitnet": "potstill.methods.fitnet:FitNet",
    "fsp": "potstill.methods.fsp:FSP",
    "ft": "potstill.methods.ft:FT",
    "gkl": "potstill.methods.gkl:GKL",
    "ickd": "potstill.methods.ickd:ICKD",
    "ikl": "potstill.methods.ikl:IKL",
    "itrd": "potstill.methods.itrd:ITRD",
    "kd": "potstill.methods.kd:KD",
    "logit_mse": "potstill.methods.logit_mse:LogitMSE",
    "ls": "potstill.methods.ls:LS",
    "mgd": "potstill.methods.mgd:MGD",
    "mlld": "potstill.methods.mlld:MLLD",
    "nd": "potstill.methods.nd:ND",
    "nkd": "potstill.methods.nkd:NKD",
    "norm": "potstill.methods.norm:NORM",
    "nst": "potstill.methods.nst:NST",
    "ofa": "potstill.methods.ofa:OFA",
    "ofd": "potstill.methods.ofd:OFD",
    "pkt": "potstill.methods.pkt:PKT",
    "pskd": "potstill.methods.pskd:PSKD",
    "reviewkd": "potstill.methods.reviewkd:ReviewKD",
    "rkd": "potstill.methods.rkd:RKD",
    "rld": "potstill.methods.rld:RLD",
    "sdd": "potstill.methods.sdd:SDD",
    "semckd": "potstill.methods.semckd:SemCKD",
    "simkd": "potstill.methods.simkd:SimKD",
    "sp": "potstill.methods.sp:SP",
    "srd": "potstill.methods.srd:SRD",
    "srrl": "potstill.methods.srrl:SRRL",
    "supervised": "potstill.methods.supervised:Supervised",
    "tfkd_reg": "potstill.methods.tfkd:TfKDReg",
    "tfkd_self": "potstill.methods.tfkd:TfKDSelf",
    "ttm": "potstill.methods.ttm:TTM",
    "uskd": "potstill.methods.uskd:USKD",
    "vid": "potstill.methods.vid:VID",
    "vitkd": "potstill.methods.vitkd:ViTKD",
    "vkd": "potstill.methods.vkd:VkD",
    "wkd_f": "potstill.methods.wkd_f:WKDF",
    "wkd_l": "potstill.methods.wkd_l:WKDL",
    "wsld": "potstill.methods.wsld:WSLD",
    "wttm": "potstill.methods.wttm:WTTM",
}


def list_methods() -> list[str]:
    """Names that recipes accept under ``method.name``, sorted."""
    return sorted(METHODS)


def method_class(name: str) -> "type[Method]":
    """The class behind a name.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    if name not in METHODS:
        raise UsageError(f"no method {name!r}{nearest(name, METHODS) or '.'} Known: {', '.join(list_methods())}")
    module, _, attribute = METHODS[name].partition(":")
    return cast("type[Method]", getattr(importlib.import_module(module), attribute))


def create_method(
    name: str, *, preset: str | None = None, schedule: dict[str, Any] | None = None, **options: Any
) -> "Method":
    """Build a method by name.

    Args:
        name: a key of METHODS.
        preset: the authors' options for one pair of networks, by name; ``options`` overrule them.
        schedule: weights and options that change with the epochs; see ``potstill.methods.wrapping.scheduled``.
        options: keywords of the method's ``__init__``.

    Raises:
        UsageError: unknown name, preset or option, missing option, value out of range.
    """
    from potstill.methods.catalog import check_method, entry

    problems = check_method(name, {**options, **_given(preset=preset, schedule=schedule)})
    if problems:
        raise UsageError("\n".join(problem.text(name) for problem in problems))
    method = method_class(name)(**{**(entry(name).presets[preset] if preset else {}), **options})
    if schedule is None:
        return method
    from potstill.methods.wrapping.scheduled import Scheduled

    return Scheduled(method, schedule, [key for key in schedule if key in entry(name).options])


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
