"""The prediction in front of the loss; of two sizes the larger map is averaged down."""

from potstill.features import pool_to_common_size
from potstill.methods.vid import Prediction, vid_loss


def check(case):
    student, teacher = case["fs"], case["ft"]
    prediction = Prediction(student.shape[1], teacher.shape[1], variance=case.hyper["init_pred_var"])
    case.load(prediction, {"conv": "reg", "scale": "log_scale"})
    student, teacher = pool_to_common_size(student, teacher)
    return {"loss": vid_loss(prediction(student), prediction.variance, teacher)}
