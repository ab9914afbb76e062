"""What a model is, whatever layout or checkpoint it came from: a hash of its weights by name."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from megatron_prefix.model.gpt import unwrap
from megatron_prefix.model.init import canonical_parameters


@torch.no_grad()
def model_fingerprint(chunks: list[torch.nn.Module]) -> str:
    """SHA-256 over the SHA-256 of every parameter, in the order of canonical names.

    A parameter counts with its precision, its shape and its bytes, without the rows that pad
    the vocabulary. Every rank has the whole model here, so the first one's answer is everybody's.
    """
    answer = [""]
    if dist.get_rank() == 0:
        digests = {}
        for chunk in chunks:
            model = unwrap(chunk)
            for name, parameter in canonical_parameters(model):
                if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                    parameter = parameter[: model.config.vocab_size]
                data = parameter.detach().cpu().contiguous().view(torch.uint8)
                head = f"{name} {parameter.dtype} {tuple(parameter.shape)}\n"
                digest = hashlib.sha256(head.encode())
                digest.update(memoryview(data.numpy()).cast("B"))
                digests[name] = digest.digest()
        answer = [hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]
