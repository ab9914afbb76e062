"""Model fingerprint: a hash of the weights by name, the same in every layout and checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_prefix.model.gpt import unwrap
from megatron_prefix.model.names import REWARD_HEAD, is_added
from megatron_prefix.model.parameters.canonical import whole_parameters


@dataclass
class Fingerprint:
    """The fingerprint of a model whose parameters are added one after another, in any order."""

    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each parameter, by canonical name."""

    def add(self, name: str, whole: torch.Tensor, scale: str = "") -> None:
        """A whole canonical parameter; `scale` is that of an adapter."""
        digest = hashlib.sha256(f"{name} {whole.dtype} {tuple(whole.shape)}{scale}\n".encode())
        digest.update(whole.cpu().view(torch.uint8).numpy().data.cast("B"))
        self.digests[name] = digest.hexdigest()

    @property
    def value(self) -> str:
        """Of all that were added, by name, so that it is the same in every layout."""
        joined = "".join(self.digests[name] for name in sorted(self.digests))
        return hashlib.sha256(joined.encode()).hexdigest()


@torch.no_grad()
def model_fingerprint(chunks: list[torch.nn.Module], *, with_adapters: bool = False) -> str:
    """SHA-256 over the SHA-256 of every parameter, in the order of canonical names.

    A parameter is hashed unsharded, with its precision, shape and bytes, without the padding of the
    vocabulary. Of a model with adapters only the frozen base is hashed, which has the fingerprint
    of the same model without any; `with_adapters` adds them and their scale. Collective; one
    parameter at a time.
    """
    own = Fingerprint()
    for chunk in chunks:
        lora = unwrap(chunk).config.lora
        for name, whole in whole_parameters(chunk):
            is_trained = lora is not None and (is_added(name) or name == REWARD_HEAD)
            if is_trained and not with_adapters:
                continue
            scale = f" {lora.scale!r}" if lora is not None and is_trained else ""
            own.add(name, whole, scale)
    # several ranks have the same parameter, with the same digest
    parts: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own.digests)
    return Fingerprint({name: digest for part in parts for name, digest in part.items()}).value
