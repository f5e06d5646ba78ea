"""The training of psBN on plain BN layers: their biases decay toward alpha.

- :mod:`.anchor`: ``anchor_bias_decay`` for a plain training loop
- :mod:`.hook`: ``AnchoredBiasDecay`` for mmengine
"""

from .anchor import AnchoredBiases, anchor_bias_decay

__all__ = ["AnchoredBiases", "anchor_bias_decay"]
