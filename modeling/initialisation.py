"""What the weights of a model are before it has learnt anything."""

import math
import re

from torch import nn

from omniform.modeling.config import DecoderConfig

STD = 0.02
_IN_BLOCK = re.compile(r"decoder\.blocks\.(\d+)\.")
_TO_RESIDUAL = ("attention.out.weight", "down.weight")
_GAINED = ("attention.value.weight", "attention.out.weight", "up.weight", "down.weight")
_OFF_AT_FIRST = "modulation.project.weight"
_PLAIN = ("attention.query.weight", "attention.key.weight", "gate.weight")


def initialise(model: nn.Module, config: DecoderConfig) -> None:
    """Draw every matrix of `model` from a normal distribution of deviation 0.02, or as `config.initialisation` says.

    gpt2        layers that write to the residual stream are 1 / sqrt(2 n_layers) smaller (Radford et al., 2019, section
                2.3)
    normal      all are alike
    ds          matrices of the l-th block, l from 1, are 1 / sqrt(l) smaller (DS-Init, arXiv:1908.11365; deviation:
                normal, of deviation 0.02, where theirs is uniform with Glorot's bound)
    magneto     Xavier's sqrt(2 / (inputs + outputs)), times sqrt(ln(2 n_layers)) for values, attention's output and the
                feed-forward layers' `up` and `down` (Magneto, arXiv:2210.06423, for decoders; deviation:
                the gate, which Magneto's layers have not got, has no gain, or the product of both would have it twice)

    What modulates blocks by time is 0 to begin with. Embeddings, heads and routers are never other than 0.02, but
    routers under ds. Vectors stay as they are made.

    Args:
        model: whose blocks are `decoder.blocks`.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    for parameter in matrices.values():
        nn.init.normal_(parameter, std=STD)
    for name, parameter in matrices.items():
        if name.endswith(_OFF_AT_FIRST):
            nn.init.zeros_(parameter)
            continue
        inside = _IN_BLOCK.match(name)
        n_outputs, n_inputs = parameter.shape
        match config.initialisation:
            case "gpt2" if name.endswith(_TO_RESIDUAL):
                nn.init.normal_(parameter, std=STD / math.sqrt(2 * config.n_layers))
            case "ds" if inside:
                nn.init.normal_(parameter, std=STD / math.sqrt(1 + int(inside[1])))
            case "magneto" if name.endswith(_GAINED + _PLAIN):
                gain = math.sqrt(math.log(2 * config.n_layers)) if name.endswith(_GAINED) else 1.0
                nn.init.normal_(parameter, std=gain * math.sqrt(2 / (n_inputs + n_outputs)))
