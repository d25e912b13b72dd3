"""The loss alone, after the projection; its two parts are the loss with either weight at 0."""

from potstill.methods.wkd_f import wkd_f_loss


def check(case):
    student, teacher, hyper = case["fs"], case["ft"], case.hyper
    options = {"grid": hyper["grid"], "eps": hyper["eps"]}
    loss = wkd_f_loss(student, teacher, mean_weight=hyper["ratio"], **options)
    spread = wkd_f_loss(student, teacher, mean_weight=0.0, **options)
    mean = wkd_f_loss(student, teacher, mean_weight=1.0, **options) - spread
    return {"loss": loss, "mean_loss": mean, "cov_loss": spread}
