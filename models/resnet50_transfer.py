"""ResNet-50 transfer learning: torchvision's network, frozen and in eval mode, under a small trained head."""

from collections.abc import Mapping

import torch
from torch import nn


class ResNet50Transfer(nn.Module):
    """Images [B, 3, 224, 224], normalised as for ImageNet → logits [B, classes].

    23,508,032 frozen parameters and, for 5 classes, 2,103,301 trained ones. `weights` is torchvision's ImageNet
    state dict. Without it the features are random; in eval mode nothing then renormalises the activations, which
    would double their variance in each of 16 residual blocks, so the residual branches start at 0.2 of their scale.
    """

    def __init__(self, classes: int = 5, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        from torchvision.models import resnet50  # here: it takes seconds, and whoever lists the workloads needs it not
        from torchvision.models.resnet import Bottleneck

        backbone = resnet50()
        if weights is None:
            for layer in backbone.modules():
                if isinstance(layer, Bottleneck):
                    nn.init.constant_(layer.bn3.weight, 0.2)
        else:
            backbone.load_state_dict(dict(weights))
        backbone.fc = nn.Identity()
        self.features = backbone.requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, classes))

    def train(self, mode: bool = True) -> "ResNet50Transfer":
        """Only the head changes mode: the frozen features keep their running statistics."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.features(images)
        return self.head(features)
