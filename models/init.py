"""Weight initialisations that more than one network uses."""

from torch import nn

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def he_uniform(network: nn.Module) -> None:
    """Fill every weight from U(-√(6/fan_in), √(6/fan_in)) and every bias with 0 (He et al. 2015)."""
    for layer in network.modules():
        if isinstance(layer, WEIGHTED):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def glorot_uniform(network: nn.Module) -> None:
    """Fill every weight from U(-√(6/(fan_in+fan_out)), …) and every bias with 0 (Glorot & Bengio 2010)."""
    for layer in network.modules():
        if isinstance(layer, WEIGHTED):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
