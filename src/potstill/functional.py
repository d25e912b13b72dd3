"""The losses as plain functions of tensors, for use in any training loop."""

from potstill.methods.ab import ab_loss
from potstill.methods.abkd import abkd_loss
from potstill.methods.afd import afd_loss
from potstill.methods.at import at_loss
from potstill.methods.bkd import bkd_loss
from potstill.methods.camkd import camkd_feature_loss, camkd_logit_loss, camkd_weights
from potstill.methods.cat_kd import cat_kd_loss
from potstill.methods.cc import cc_kernel_loss, cc_loss
from potstill.methods.crd import crd_constants, crd_loss, crd_memory
from potstill.methods.crld import crld_cross_loss, crld_within_loss
from potstill.methods.ctkd import ctkd_loss, ctkd_strength, ctkd_temperature
from potstill.methods.deit import deit_hard_loss, deit_soft_loss
from potstill.methods.dist import dist_inter_loss, dist_intra_loss, dist_loss
from potstill.methods.dkd import dkd_loss, nckd_loss, tckd_loss
from potstill.methods.dml import dml_loss
from potstill.methods.dtkd import dtkd_loss
from potstill.methods.eakd import eakd_loss
from potstill.methods.fitnet import hint_loss
from potstill.methods.fsp import fsp_loss
from potstill.methods.ft import ft_loss
from potstill.methods.gkl import gkl_wmse_loss
from potstill.methods.ickd import ickd_loss
from potstill.methods.ikl import ikl_soft_ce_loss, ikl_wmse_loss
from potstill.methods.itrd import itrd_correlation_loss, itrd_mutual_loss
from potstill.methods.kd import kd_loss
from potstill.methods.logit_mse import logit_mse_loss
from potstill.methods.ls import standardise
from potstill.methods.mgd import mgd_loss
from potstill.methods.mlld import mlld_batch_loss, mlld_class_loss
from potstill.methods.nd import nd_loss
from potstill.methods.nkd import nkd_loss, nkd_others_loss, nkd_target_loss
from potstill.methods.norm import norm_loss
from potstill.methods.nst import nst_loss
from potstill.methods.ofa import ofa_loss
from potstill.methods.ofd import ofd_loss
from potstill.methods.pkt import pkt_loss
from potstill.methods.pskd import pskd_loss, pskd_targets
from potstill.methods.reviewkd import hcl_loss
from potstill.methods.rkd import rkd_angle_loss, rkd_distance_loss
from potstill.methods.rld import mcd_loss, rld_loss, scd_loss
from potstill.methods.sdd import sdd_dkd_loss, sdd_kd_loss
from potstill.methods.semckd import semckd_loss
from potstill.methods.simkd import simkd_loss
from potstill.methods.sp import sp_loss
from potstill.methods.srd import srd_loss
from potstill.methods.srrl import srrl_feature_loss, srrl_regression_loss
from potstill.methods.tfkd import tfkd_reg_loss, tfkd_self_loss
from potstill.methods.ttm import ttm_loss
from potstill.methods.uskd import uskd_others_loss, uskd_target_loss, uskd_weak_loss
from potstill.methods.vid import vid_loss
from potstill.methods.vitkd import vitkd_generation_loss, vitkd_mimic_loss
from potstill.methods.vkd import vkd_loss
from potstill.methods.wkd_f import wkd_f_loss
from potstill.methods.wkd_l import wkd_cost, wkd_distance_loss, wkd_target_loss
from potstill.methods.wsld import wsld_loss
from potstill.methods.wttm import wttm_loss

__all__ = [
    "ab_loss",
    "abkd_loss",
    "afd_loss",
    "at_loss",
    "bkd_loss",
    "camkd_feature_loss",
    "camkd_logit_loss",
    "camkd_weights",
    "cat_kd_loss",
    "cc_kernel_loss",
    "cc_loss",
    "crd_constants",
    "crd_loss",
    "crd_memory",
    "crld_cross_loss",
    "crld_within_loss",
    "ctkd_loss",
    "ctkd_strength",
    "ctkd_temperature",
    "deit_hard_loss",
    "deit_soft_loss",
    "dist_inter_loss",
    "dist_intra_loss",
    "dist_loss",
    "dkd_loss",
    "dml_loss",
    "dtkd_loss",
    "eakd_loss",
    "fsp_loss",
    "ft_loss",
    "gkl_wmse_loss",
    "hcl_loss",
    "hint_loss",
    "ickd_loss",
    "ikl_soft_ce_loss",
    "ikl_wmse_loss",
    "itrd_correlation_loss",
    "itrd_mutual_loss",
    "kd_loss",
    "logit_mse_loss",
    "mcd_loss",
    "mgd_loss",
    "mlld_batch_loss",
    "mlld_class_loss",
    "nckd_loss",
    "nd_loss",
    "nkd_loss",
    "nkd_others_loss",
    "nkd_target_loss",
    "norm_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "pkt_loss",
    "pskd_loss",
    "pskd_targets",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rld_loss",
    "scd_loss",
    "sdd_dkd_loss",
    "sdd_kd_loss",
    "semckd_loss",
    "simkd_loss",
    "sp_loss",
    "srd_loss",
    "srrl_feature_loss",
    "srrl_regression_loss",
    "standardise",
    "tckd_loss",
    "tfkd_reg_loss",
    "tfkd_self_loss",
    "ttm_loss",
    "uskd_others_loss",
    "uskd_target_loss",
    "uskd_weak_loss",
    "vid_loss",
    "vitkd_generation_loss",
    "vitkd_mimic_loss",
    "vkd_loss",
    "wkd_cost",
    "wkd_distance_loss",
    "wkd_f_loss",
    "wkd_target_loss",
    "wsld_loss",
    "wttm_loss",
]
