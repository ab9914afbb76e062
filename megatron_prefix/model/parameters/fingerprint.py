"""Model fingerprint: a hash of the weights by name, the same in every layout and checkpoint."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from megatron_prefix.model.gpt import unwrap
from megatron_prefix.model.names import REWARD_HEAD, is_added
from megatron_prefix.model.parameters.canonical import whole_parameters


@torch.no_grad()
def model_fingerprint(chunks: list[torch.nn.Module], *, with_adapters: bool = False) -> str:
    """SHA-256 over the SHA-256 of every parameter, in the order of canonical names.

    A parameter is hashed unsharded, with its precision, shape and bytes, without the padding of the
    vocabulary. Of a model with adapters only the frozen base is hashed, which has the fingerprint
    of the same model without any; `with_adapters` adds them and their scale. Collective; one
    parameter at a time.
    """
    own: dict[str, str] = {}
    for chunk in chunks:
        lora = unwrap(chunk).config.lora
        for name, whole in whole_parameters(chunk):
            is_trained = lora is not None and (is_added(name) or name == REWARD_HEAD)
            if is_trained and not with_adapters:
                continue
            scale = f" {lora.scale!r}" if lora is not None and is_trained else ""
            head = f"{name} {whole.dtype} {tuple(whole.shape)}{scale}\n"
            digest = hashlib.sha256(head.encode())
            digest.update(whole.cpu().view(torch.uint8).numpy().data.cast("B"))
            own[name] = digest.hexdigest()
    # Several ranks have the same parameter, with the same digest. Sorted by name, the digests are
    # in an order that no layout changes.
    parts: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    digests = {name: digest for part in parts for name, digest in part.items()}
    return hashlib.sha256("".join(digests[n] for n in sorted(digests)).encode()).hexdigest()
