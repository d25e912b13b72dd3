"""Where a network looks: Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.data.preprocessing import decoded_side
from potstill.errors import UsageError
from potstill.features.hooks import FeatureRequest, capture_features
from potstill.features.stages import find_stages
from potstill.input_spec import InputSpec


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
    """How much each place of the image speaks for a class.

    The maps A_k of the last stage are weighted with the mean of their gradient, and what speaks against is cut off:
    ReLU(sum_k A_k mean(d logit / d A_k)).  Tokens count as a grid; where only the class token is read behind the last
    stage, so that its other tokens have no gradient, the deepest stage that has one is taken.

    Args:
        model: images -> logits [B, K]; its mode and its parameters' gradients stay as they were.
        images: [B, 3, H, W], prepared as the model wants them, on its device.
        classes: [B], one class each, 0 to K - 1.

    Returns:
        float32 [B, h, w] of the stage's resolution, 0 to 1: each image's largest value is 1, or all are 0 where
        nothing speaks for the class.

    Raises:
        UsageError: not one class for each image; a network without a map that its logits depend on.
    """
    wanted = torch.as_tensor(classes, device=images.device)
    if wanted.shape != images.shape[:1]:
        raise UsageError(f"grad_cam takes one class for each of {len(images)} images, got {list(wanted.shape)}")
    training = model.training
    model.eval()
    try:
        chosen = find_stages(model, images.detach()).stages
        # Not the images themselves: frozen networks have gradients too, and layers that work in place refuse leaves.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            capture_features(model, FeatureRequest(chosen)) as reading,
        ):
            logits = model(images.detach().clone().requires_grad_() + 0)
            found = [each for each in reading.found if each is not None and each.requires_grad]
            score = logits.gather(1, wanted[:, None]).sum()
            slopes = torch.autograd.grad(score, found, allow_unused=True) if found else ()
    finally:
        model.train(training)
    known = {id(each): slope for each, slope in zip(found, slopes, strict=True)}
    for stage, each in reversed(list(zip(chosen, reading.found, strict=True))):
        slope = known.get(id(each))
        if each is not None and slope is not None:
            slope = stage.grid.to_map(slope).float()
            if slope.any():
                return _weighted_maps(stage.grid.to_map(each.detach()).float(), slope)
    raise UsageError(f"{type(model).__name__} has no feature map that its logits depend on: Grad-CAM needs one")


def _weighted_maps(maps: Tensor, slopes: Tensor) -> Tensor:
    """[B, C, h, w] twice -> [B, h, w]."""
    cams = (maps * slopes.mean(dim=(2, 3), keepdim=True)).sum(dim=1).relu()
    return cams / cams.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cams.dtype).tiny)


def visible_region(height: int, width: int, spec: InputSpec) -> list[float]:
    """Which part of an image a network sees, and so what its map covers.

    Args:
        height: of the image as it was decoded, in pixels.
        width: likewise.
        spec: how the network wants its images.

    Returns:
        left, top, width and height as shares of the image's sides; with black borders more than the image, so that
        left or top is below 0.

    Example:
        >>> visible_region(100, 200, InputSpec(32))  # the largest centred square
        [0.25, 0.0, 0.5, 1.0]
    """
    share = spec.size / decoded_side(spec)
    side = {"crop": min(height, width), "pad": max(height, width)}.get(spec.resize_mode)
    across, down = (side / width, side / height) if side else (1.0, 1.0)
    across, down = across * share, down * share
    return [round(value, 5) for value in ((1 - across) / 2, (1 - down) / 2, across, down)]
