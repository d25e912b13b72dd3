"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.data.preprocessing import decoded_side
from potstill.errors import UsageError
from potstill.features.hooks import FeatureRequest, capture_features
from potstill.features.stages import find_stages
from potstill.input_spec import InputSpec


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
    """Return maps of the evidence for a class: ReLU(sum_k A_k mean(d logit / d A_k)) over the last stage's maps A_k.

    Tokens are laid out as a grid.  If the tokens of the last stage have no gradient, because the head reads only the
    class token, the deepest stage with gradients is used.

    Args:
        model: maps images to logits [B, K]; its mode and its parameters' gradients stay unchanged.
        images: [B, 3, H, W], prepared for the model, on its device.
        classes: [B], a class for each image, 0 to K - 1.

    Returns:
        float32 [B, h, w] of the stage's resolution, in [0, 1]: the maximum of each image is 1, or 0 without evidence.

    Raises:
        UsageError: not one class for each image; a network without a map that its logits depend on.
    """
    class_indices = torch.as_tensor(classes, device=images.device)
    if class_indices.shape != images.shape[:1]:
        raise UsageError(f"grad_cam takes one class for each of {len(images)} images, got {list(class_indices.shape)}")
    training = model.training
    model.eval()
    try:
        chosen = find_stages(model, images.detach()).stages
        # Gradients start at a copy of the images, so that frozen networks have them; + 0, as in-place layers refuse
        # leaves.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            capture_features(model, FeatureRequest(chosen)) as reading,
        ):
            logits = model(images.detach().clone().requires_grad_() + 0)
            found = [each for each in reading.found if each is not None and each.requires_grad]
            score = logits.gather(1, class_indices[:, None]).sum()
            gradients = torch.autograd.grad(score, found, allow_unused=True) if found else ()
    finally:
        model.train(training)
    known = {id(each): gradient for each, gradient in zip(found, gradients, strict=True)}
    for stage, each in reversed(list(zip(chosen, reading.found, strict=True))):
        gradient = known.get(id(each))
        if each is not None and gradient is not None:
            gradient = stage.grid.to_map(gradient).float()
            if gradient.any():
                maps = stage.grid.to_map(each.detach()).float()  # [B, C, h, w]
                cams = (maps * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1).relu()
                return cams / cams.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cams.dtype).tiny)
    raise UsageError(f"{type(model).__name__} has no feature map that its logits depend on: Grad-CAM needs one")


def visible_region(height: int, width: int, spec: InputSpec) -> list[float]:
    """Return the region of an image that a network sees, and that its Grad-CAM map covers.

    Args:
        height: of the decoded image, in pixels.
        width: of the decoded image, in pixels.
        spec: the network's input spec.

    Returns:
        Left, top, width and height as shares of the image's sides; padding makes the region larger than the image, with
        left or top below 0.

    Example:
        >>> visible_region(100, 200, InputSpec(32))  # the largest centred square
        [0.25, 0.0, 0.5, 1.0]
    """
    share = spec.size / decoded_side(spec)
    side = {"crop": min(height, width), "pad": max(height, width)}.get(spec.resize_mode)
    across, down = (side / width, side / height) if side else (1.0, 1.0)
    across, down = across * share, down * share
    return [round(value, 5) for value in ((1 - across) / 2, (1 - down) / 2, across, down)]
