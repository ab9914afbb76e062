"""Model fingerprint: a hash of the weights by name, the same in every layout and checkpoint."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from megatron_prefix.model import whole_parameters


@torch.no_grad()
def model_fingerprint(chunks: list[torch.nn.Module]) -> str:
    """SHA-256 over the SHA-256 of every parameter, in the order of canonical names.

    A parameter is hashed unsharded, with its precision, shape and bytes, without the padding of the
    vocabulary. Collective; one parameter at a time.
    """
    own: dict[str, str] = {}
    for chunk in chunks:
        for name, whole in whole_parameters(chunk):
            head = f"{name} {whole.dtype} {tuple(whole.shape)}\n"
            digest = hashlib.sha256(head.encode())
            digest.update(whole.cpu().view(torch.uint8).numpy().data.cast("B"))
            own[name] = digest.hexdigest()
    # Several ranks have the same parameter, with the same digest. Sorted by name, the digests are
    # in an order that no layout changes.
    parts: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    digests = {name: digest for part in parts for name, digest in part.items()}
    return hashlib.sha256("".join(digests[n] for n in sorted(digests)).encode()).hexdigest()
