"""The generator fed with the reference's random draw; the reference's loss has its weight in it."""

from potstill.methods.mgd import Generator, mgd_loss


def check(case):
    student, teacher, hyper = case["fs"], case["ft"], case.hyper
    generator = case.load(Generator(student.shape[1], teacher.shape[1]), {"conv": "gen", "align": "align"})
    kept = (case["mask_uniform"] >= hyper["lambda_mgd"]).to(student.dtype)
    return {"loss": hyper["alpha_mgd"] * mgd_loss(generator(student, kept), teacher)}
