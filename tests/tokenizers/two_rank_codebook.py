"""One rank of two that share a codebook. Arguments: rank, rendezvous file, file for the resulting buffers."""

import sys

import torch
import torch.distributed as dist

from omniform.tokenizers.codecs.vq import VQEMA, VQEMAConfig

CONFIG = VQEMAConfig(codebook_size=4, dim=2)


def codebook_in_use() -> VQEMA:
    """Four codes that are not dead."""
    quantizer = VQEMA(CONFIG)
    quantizer.codebook.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
    quantizer.average_use.fill_(2.0)
    quantizer.average_sum.copy_(quantizer.codebook * 2)
    return quantizer


def main(rank: int, store: str, out: str) -> None:
    latents = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    alone = codebook_in_use()
    alone(latents)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shared, fresh = codebook_in_use(), VQEMA(CONFIG)
    shared(latents[rank : rank + 1])
    fresh(latents[rank : rank + 1])
    result = {"alone": dict(alone.named_buffers()), "ranks": dict(shared.named_buffers()), "restarted": fresh.codebook}
    torch.save(result, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
