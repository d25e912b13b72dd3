"""The losses as plain functions of tensors, for use in any training loop."""

from potstill.methods.ab import ab_loss as ab_loss
from potstill.methods.abkd import abkd_loss as abkd_loss
from potstill.methods.afd import afd_loss as afd_loss
from potstill.methods.at import at_loss as at_loss
from potstill.methods.bkd import bkd_loss as bkd_loss
from potstill.methods.camkd import camkd_feature_loss as camkd_feature_loss
from potstill.methods.camkd import camkd_logit_loss as camkd_logit_loss
from potstill.methods.camkd import camkd_weights as camkd_weights
from potstill.methods.cat_kd import cat_kd_loss as cat_kd_loss
from potstill.methods.cc import cc_kernel_loss as cc_kernel_loss
from potstill.methods.cc import cc_loss as cc_loss
from potstill.methods.crd import crd_constants as crd_constants
from potstill.methods.crd import crd_loss as crd_loss
from potstill.methods.crd import crd_memory as crd_memory
from potstill.methods.crld import crld_cross_loss as crld_cross_loss
from potstill.methods.crld import crld_within_loss as crld_within_loss
from potstill.methods.ctkd import ctkd_loss as ctkd_loss
from potstill.methods.ctkd import ctkd_strength as ctkd_strength
from potstill.methods.ctkd import ctkd_temperature as ctkd_temperature
from potstill.methods.deit import deit_hard_loss as deit_hard_loss
from potstill.methods.deit import deit_soft_loss as deit_soft_loss
from potstill.methods.dist import dist_inter_loss as dist_inter_loss
from potstill.methods.dist import dist_intra_loss as dist_intra_loss
from potstill.methods.dist import dist_loss as dist_loss
from potstill.methods.dkd import dkd_loss as dkd_loss
from potstill.methods.dkd import nckd_loss as nckd_loss
from potstill.methods.dkd import tckd_loss as tckd_loss
from potstill.methods.dml import dml_loss as dml_loss
from potstill.methods.dtkd import dtkd_loss as dtkd_loss
from potstill.methods.eakd import eakd_loss as eakd_loss
from potstill.methods.fitnet import hint_loss as hint_loss
from potstill.methods.fsp import fsp_loss as fsp_loss
from potstill.methods.ft import ft_loss as ft_loss
from potstill.methods.gkl import gkl_wmse_loss as gkl_wmse_loss
from potstill.methods.ickd import ickd_loss as ickd_loss
from potstill.methods.ikl import ikl_soft_ce_loss as ikl_soft_ce_loss
from potstill.methods.ikl import ikl_wmse_loss as ikl_wmse_loss
from potstill.methods.itrd import itrd_correlation_loss as itrd_correlation_loss
from potstill.methods.itrd import itrd_mutual_loss as itrd_mutual_loss
from potstill.methods.kd import kd_loss as kd_loss
from potstill.methods.logit_mse import logit_mse_loss as logit_mse_loss
from potstill.methods.ls import standardise as standardise
from potstill.methods.mgd import mgd_loss as mgd_loss
from potstill.methods.mlld import mlld_batch_loss as mlld_batch_loss
from potstill.methods.mlld import mlld_class_loss as mlld_class_loss
from potstill.methods.nd import nd_loss as nd_loss
from potstill.methods.nkd import nkd_loss as nkd_loss
from potstill.methods.nkd import nkd_others_loss as nkd_others_loss
from potstill.methods.nkd import nkd_target_loss as nkd_target_loss
from potstill.methods.norm import norm_loss as norm_loss
from potstill.methods.nst import nst_loss as nst_loss
from potstill.methods.ofa import ofa_loss as ofa_loss
from potstill.methods.ofd import ofd_loss as ofd_loss
from potstill.methods.pkt import pkt_loss as pkt_loss
from potstill.methods.pskd import pskd_loss as pskd_loss
from potstill.methods.pskd import pskd_targets as pskd_targets
from potstill.methods.reviewkd import hcl_loss as hcl_loss
from potstill.methods.rkd import rkd_angle_loss as rkd_angle_loss
from potstill.methods.rkd import rkd_distance_loss as rkd_distance_loss
from potstill.methods.rld import mcd_loss as mcd_loss
from potstill.methods.rld import rld_loss as rld_loss
from potstill.methods.rld import scd_loss as scd_loss
from potstill.methods.sdd import sdd_dkd_loss as sdd_dkd_loss
from potstill.methods.sdd import sdd_kd_loss as sdd_kd_loss
from potstill.methods.semckd import semckd_loss as semckd_loss
from potstill.methods.simkd import simkd_loss as simkd_loss
from potstill.methods.sp import sp_loss as sp_loss
from potstill.methods.srd import srd_loss as srd_loss
from potstill.methods.srrl import srrl_feature_loss as srrl_feature_loss
from potstill.methods.srrl import srrl_regression_loss as srrl_regression_loss
from potstill.methods.tfkd import tfkd_reg_loss as tfkd_reg_loss
from potstill.methods.tfkd import tfkd_self_loss as tfkd_self_loss
from potstill.methods.ttm import ttm_loss as ttm_loss
from potstill.methods.uskd import uskd_others_loss as uskd_others_loss
from potstill.methods.uskd import uskd_target_loss as uskd_target_loss
from potstill.methods.uskd import uskd_weak_loss as uskd_weak_loss
from potstill.methods.vid import vid_loss as vid_loss
from potstill.methods.vitkd import vitkd_generation_loss as vitkd_generation_loss
from potstill.methods.vitkd import vitkd_mimic_loss as vitkd_mimic_loss
from potstill.methods.vkd import vkd_loss as vkd_loss
from potstill.methods.wkd_f import wkd_f_loss as wkd_f_loss
from potstill.methods.wkd_l import wkd_cost as wkd_cost
from potstill.methods.wkd_l import wkd_distance_loss as wkd_distance_loss
from potstill.methods.wkd_l import wkd_target_loss as wkd_target_loss
from potstill.methods.wsld import wsld_loss as wsld_loss
from potstill.methods.wttm import wttm_loss as wttm_loss

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
