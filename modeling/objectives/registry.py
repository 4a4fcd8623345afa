"""All objectives by the name that configurations use: a new one is its file and one line here."""

from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.coarse_to_fine import CoarseToFine
from omniform.modeling.objectives.ddpm import Ddpm
from omniform.modeling.objectives.flow import Flow
from omniform.modeling.objectives.gmm import Gmm
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.masked_gmm import MaskedGmm
from omniform.modeling.objectives.next_token import NextToken

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "masked": Masked,
    "coarse_to_fine": CoarseToFine,
    "flow": Flow,
    "ddpm": Ddpm,
    "gmm": Gmm,
    "masked_gmm": MaskedGmm,
}
