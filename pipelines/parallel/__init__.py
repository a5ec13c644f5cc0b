"""How one diffusers pipeline runs on a gang of ranks: on gloo (CPU) and NCCL (CUDA) with the same calls.

`mesh` places the ranks, `sequence` (with `plans` and `attention`) shards a transformer's tokens over them, `guidance`
divides the two branches of classifier-free guidance, `encode` lets rank 0 alone hold the encoders. Each is applied
from outside to an ordinary pipeline; a gang of one applies none.
"""
