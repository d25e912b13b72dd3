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
    class token, the deepest stage with gradients is used.  Return float32 [B, h, w] of the stage's resolution in [0,
    1]: the maximum of each image is 1, or 0 without evidence.  UsageError: the logits depend on no map.
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
    """Return left, top, width and height of what a network sees of an image, as shares of its sides; below 0 where
    padded.

    Example:
        >>> visible_region(100, 200, InputSpec(32))  # the largest centred square
        [0.25, 0.0, 0.5, 1.0]
    """
    share = spec.size / decoded_side(spec)
    side = {"crop": min(height, width), "pad": max(height, width)}.get(spec.resize_mode)
    across, down = (side / width, side / height) if side else (1.0, 1.0)
    across, down = across * share, down * share
    return [round(value, 5) for value in ((1 - across) / 2, (1 - down) / 2, across, down)]
