"""Attacks with gradients: small changes of images that make a classifier err.

- `fgsm`: Explaining and Harnessing Adversarial Examples (arXiv 1412.6572).
- `bim`: Adversarial examples in the physical world (arXiv 1607.02533).
- `deepfool`: DeepFool: a simple and accurate method to fool deep neural networks (arXiv 1511.04599).
- `carlini_wagner_l2`: Towards Evaluating the Robustness of Neural Networks (arXiv 1608.04644).

All take pixels in [0, 1] and return such pixels. A network that wants normalised pixels carries the normalisation as
its first layer (`postern.nets.Normalize`). Networks are attacked in evaluation mode and left in their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.nets.evaluation import evaluating

Images = Float[Tensor, "batch channels height width"]
Objective = Callable[[Tensor], Float[Tensor, " batch"]]


def fgsm(model: nn.Module, images: Images, labels: Int[Tensor, " batch"], eps: float) -> Images:
    """Fast gradient sign method: ``clip(x + eps sign(grad_x CE(z(x), y)))``.

    Args:
        model: returns logits.
        images: pixels in [0, 1].
        labels: the true classes.
        eps: size of the step, in pixels.

    Raises:
        ValueError: pixels outside [0, 1], labels that do not fit, or a step that is not positive.
    """
    return bim(model, images, labels, step=eps, num_steps=1)


def bim(
    model: nn.Module,
    images: Images,
    labels: Int[Tensor, " batch"],
    step: float = 0.01,
    num_steps: int = 6,
    radius: float | None = None,
) -> Images:
    """Basic iterative method: ``x <- clip(x + step sign(grad_x CE(z(x), y)))``, also known as PGD without random start.

    Args:
        model: returns logits.
        images: pixels in [0, 1].
        labels: the true classes.
        step: size of one step, in pixels.
        num_steps: how many.
        radius: largest change of a pixel; None for ``step * num_steps``.

    Raises:
        ValueError: pixels outside [0, 1], labels that do not fit, or sizes that are not positive.
    """
    _check(images, labels)

    def cross_entropy(pixels: Tensor) -> Tensor:
        return F.cross_entropy(model(pixels), labels, reduction="none")

    with evaluating(model):
        return ascend(cross_entropy, images, step, num_steps, radius)


def ascend(objective: Objective, images: Images, step: float, num_steps: int, radius: float | None = None) -> Images:
    """Raise any objective by steps of the gradient's sign, within a box around the images and within [0, 1].

    With an objective that includes the detector's score, this is the attack of an adversary who knows the detector.

    Args:
        objective: one number an image, which depends on that image alone.
        images: pixels in [0, 1].
        step: size of one step, in pixels.
        num_steps: how many.
        radius: largest change of a pixel; None for ``step * num_steps``.

    Raises:
        ValueError: pixels outside [0, 1], or sizes that are not positive.
    """
    _check(images)
    radius = step * num_steps if radius is None else radius
    if not (step > 0 and num_steps >= 1 and radius > 0):
        raise ValueError(f"steps are positive, got step={step}, num_steps={num_steps}, radius={radius}")
    low, high = (images - radius).clamp_min(0), (images + radius).clamp_max(1)
    changed = images.detach()
    for _ in range(num_steps):
        with torch.enable_grad():
            changed.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(changed).sum(), changed)
        changed = (changed.detach() + step * gradient.sign()).clamp(low, high)
    return changed


def deepfool(
    model: nn.Module, images: Images, labels: Int[Tensor, " batch"], num_steps: int = 50, overshoot: float = 0.02
) -> Images:
    r"""Repeated projection on the nearest boundary of the linearised classifier; small in the l2 norm.

    ::

        w_k = grad z_k - grad z_y,   f_k = z_k - z_y,   l = argmin_{k != y} |f_k| / |w_k|
        r  <- r + |f_l| / |w_l|^2 w_l,   x^ = x + (1 + overshoot) r       until argmax z(x^) != y

    Images that are misclassified from the start are returned as they are. Pixels at 0 or 1 that a step would push
    further are left out of it: the paper has no bounds, and a step that is clipped would stop short of the boundary.

    Args:
        model: returns logits of two classes or more.
        images: pixels in [0, 1].
        labels: the true classes.
        num_steps: most projections.
        overshoot: how far beyond the boundary, as a share of the way to it.

    Raises:
        ValueError: pixels outside [0, 1], labels that do not fit, no steps, or a negative overshoot.
    """
    _check(images, labels)
    if num_steps < 1 or overshoot < 0:
        raise ValueError(f"num_steps >= 1 and overshoot >= 0, got {num_steps} and {overshoot}")
    shift = torch.zeros_like(images)
    changed = images.detach().clone()
    with evaluating(model):
        active = torch.arange(len(images), device=images.device)
        for _ in range(num_steps):
            logits, jacobian = _logits_and_jacobian(model, changed[active])
            is_right = logits.argmax(dim=1) == labels[active]
            active, logits, jacobian = active[is_right], logits[is_right], jacobian[is_right]
            if not len(active):
                break
            step = _projection(logits, jacobian, labels[active], changed[active].flatten(1))
            shift[active] += step.view(-1, *images.shape[1:])
            changed[active] = (images[active] + (1 + overshoot) * shift[active]).clamp(0, 1)
    return changed


def _logits_and_jacobian(model: nn.Module, images: Images) -> tuple[Tensor, Float[Tensor, "batch classes pixels"]]:
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        rows = [
            torch.autograd.grad(column.sum(), images, retain_graph=True)[0].flatten(1)
            for column in logits.unbind(dim=1)
        ]
    return logits.detach(), torch.stack(rows, dim=1)


def _projection(logits: Tensor, jacobian: Tensor, labels: Tensor, pixels: Float[Tensor, "batch pixels"]) -> Tensor:
    """Shortest step, flat, of the pixels that can move, to the boundary with the nearest other class; linear logits."""
    batch = torch.arange(len(labels), device=labels.device)
    margin = (logits - logits[batch, labels, None]).abs()
    normal = jacobian - jacobian[batch, labels].unsqueeze(1)
    pixels = pixels.unsqueeze(1)
    normal = normal * ~((pixels <= 0) & (normal < 0) | (pixels >= 1) & (normal > 0))
    norm = torch.linalg.vector_norm(normal, dim=2).clamp_min(torch.finfo(normal.dtype).tiny ** 0.5)
    distance = (margin / norm).scatter(1, labels[:, None], math.inf)
    nearest = distance.argmin(dim=1)
    scale: Tensor = distance[batch, nearest] / norm[batch, nearest]
    return scale[:, None] * normal[batch, nearest]


def carlini_wagner_l2(
    model: nn.Module,
    images: Images,
    labels: Int[Tensor, " batch"],
    confidence: float = 0.0,
    learning_rate: float = 0.01,
    num_steps: int = 100,
    num_searches: int = 5,
    initial_weight: float = 1.0,
) -> Images:
    r"""Smallest change in the l2 norm that a penalty method finds.

    ``min_x^ |x^ - x|^2 + c max(z_y(x^) - max_{k != y} z_k(x^), -confidence)`` by Adam, clipped to [0, 1] after each
    step, with a binary search for each image's ``c``: halved between bounds after a success, else raised (tenfold until
    the first success). Images for which no change is found are returned as they are.

    The paper's change of variables, ``x^ = (tanh(w) + 1) / 2``, takes a thousand steps to move a pixel that is black or
    white, as most of a digit's are; clipping, its other way to stay within bounds, has no such pixels.

    Args:
        model: returns logits of two classes or more.
        images: pixels in [0, 1].
        labels: the true classes.
        confidence: by how much another logit is to exceed the true one.
        learning_rate: Adam's.
        num_steps: Adam's steps in each search.
        num_searches: values of ``c`` that are tried.
        initial_weight: the first ``c``.

    Raises:
        ValueError: pixels outside [0, 1], labels that do not fit, or sizes that are not positive.
    """
    _check(images, labels)
    if min(learning_rate, num_steps, num_searches, initial_weight) <= 0 or confidence < 0:
        raise ValueError(
            "rate, steps, searches and weight are positive and the confidence not negative, got "
            f"learning_rate={learning_rate}, num_steps={num_steps}, num_searches={num_searches}, "
            f"initial_weight={initial_weight}, confidence={confidence}"
        )
    images = images.detach()
    weight = images.new_full((len(images),), initial_weight)
    lower, upper = torch.zeros_like(weight), torch.full_like(weight, math.inf)
    best, best_norm = images.clone(), torch.full_like(weight, math.inf)
    with evaluating(model), torch.enable_grad():
        for _ in range(num_searches):
            is_found = torch.zeros_like(weight, dtype=torch.bool)
            changed = images.clone().requires_grad_()
            optimizer = torch.optim.Adam([changed], lr=learning_rate)
            for _ in range(num_steps):
                norm = (changed - images).square().flatten(1).sum(dim=1)
                margin = _margin(model(changed), labels)
                with torch.no_grad():
                    # the classifier must err on the image returned, also where a tie would satisfy the penalty
                    is_success = (margin < 0) & (margin <= -confidence)
                    is_better = is_success & (norm < best_norm)
                    best[is_better], best_norm[is_better] = changed[is_better], norm[is_better]
                    is_found |= is_success
                loss = (norm + weight * margin.clamp_min(-confidence)).sum()
                (changed.grad,) = torch.autograd.grad(loss, changed)
                optimizer.step()
                with torch.no_grad():
                    changed.clamp_(0, 1)
            upper = torch.where(is_found, torch.minimum(upper, weight), upper)
            lower = torch.where(is_found, lower, torch.maximum(lower, weight))
            weight = torch.where(upper.isinf(), weight * 10, (lower + upper) / 2)
    return best


def _margin(logits: Tensor, labels: Tensor) -> Float[Tensor, " batch"]:
    """Logit of the label less the largest other one; negative where the classifier errs."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    return right - logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)


def _check(images: Tensor, labels: Tensor | None = None) -> None:
    if images.dim() < 2 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images are a batch of floating-point pixels, at least one, got {images.dtype} {list(images.shape)}"
        )
    low, high = images.detach().aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"pixels lie in [0, 1], got {low.item():g}..{high.item():g}; put normalisation in the network")
    if labels is not None and (labels.shape != images.shape[:1] or labels.is_floating_point()):
        raise ValueError(f"{len(images)} images need as many class indices, got {labels.dtype} {list(labels.shape)}")
