"""Parts of a model besides its sizes: what its layers consist of, and rotary scaling."""

from megatron_prefix.config.parts.architecture import Activation, Architecture
from megatron_prefix.config.parts.latent import LatentAttention
from megatron_prefix.config.parts.rope import RopeScaling
from megatron_prefix.config.parts.routing import Routing
from megatron_prefix.config.parts.tower import PictureWork, VisionTower

__all__ = [
    "Activation",
    "Architecture",
    "LatentAttention",
    "PictureWork",
    "RopeScaling",
    "Routing",
    "VisionTower",
]
