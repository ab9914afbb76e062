"""Parts of a model besides its sizes: what its layers consist of, and rotary scaling."""

from megatron_prefix.config.parts.architecture import Activation, Architecture
from megatron_prefix.config.parts.latent import LatentAttention
from megatron_prefix.config.parts.rope import RopeScaling
from megatron_prefix.config.parts.routing import Routing

__all__ = ["Activation", "Architecture", "LatentAttention", "RopeScaling", "Routing"]
