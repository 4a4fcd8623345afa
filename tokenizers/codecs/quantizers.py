"""Every quantizer that a config can name."""

from typing import Annotated

from pydantic import Field

from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.lfq import LFQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.codecs.vq import VQEMAConfig

QuantizerConfig = Annotated[FSQConfig | LFQConfig | VQEMAConfig | ResidualConfig, Field(discriminator="kind")]
