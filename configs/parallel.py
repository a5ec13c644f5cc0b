"""How the GPUs are divided: data-parallel replicas, CFG branches, Ulysses and ring sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelDims:
    """The sizes of the parallel axes. Their product is the number of GPUs.

    Within one replica the ranks form a row-major mesh `(cfg, ring, ulysses)`: Ulysses neighbours, which exchange
    most, are adjacent.
    """

    dp_size: int = 1
    """Engine replicas, each a gang of its own."""
    cfg_degree: int = 1
    """2 when the conditional and the unconditional branch of classifier-free guidance run on different ranks."""
    ring_degree: int = 1
    """Ranks among which keys and values travel around a ring."""
    ulysses_degree: int = 1
    """Ranks that exchange attention heads for parts of the sequence by all-to-all."""

    @property
    def sp_degree(self) -> int:
        """Ranks over which one token sequence is sharded."""
        return self.ring_degree * self.ulysses_degree

    @property
    def gang_size(self) -> int:
        """Ranks of one replica."""
        return self.cfg_degree * self.sp_degree

    @property
    def num_gpus(self) -> int:
        return self.dp_size * self.gang_size

    @classmethod
    def resolve(
        cls,
        num_gpus: int,
        *,
        dp_size: int = 1,
        enable_cfg_parallel: bool = False,
        sp_degree: int | None = None,
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
    ) -> ParallelDims:
        """Fill in what was left out, then check that the whole equation holds.

        Without `sp_degree`, all ranks left over by CFG parallelism shard the sequence. Without `ulysses_degree` and
        `ring_degree` they do so by Ulysses, which exchanges less than a ring wherever the heads divide evenly.

        Raises:
            ValueError: the degrees do not multiply to `num_gpus`; the message is the equation.
        """
        cfg_degree = 2 if enable_cfg_parallel else 1
        ranks = sp_degree or max(1, num_gpus // (dp_size * cfg_degree))
        if ulysses_degree is None:
            ulysses_degree = max(1, ranks // (ring_degree or 1))
        if ring_degree is None:
            ring_degree = max(1, ranks // ulysses_degree)
        # The message names `sp_degree` only if it was given; otherwise the whole equation below is reported.
        if sp_degree is not None and sp_degree != ulysses_degree * ring_degree:
            raise ValueError(
                f"sp_degree ({sp_degree}) must equal ulysses_degree * ring_degree "
                f"({ulysses_degree} * {ring_degree} = {ulysses_degree * ring_degree})"
            )
        dims = cls(dp_size=dp_size, cfg_degree=cfg_degree, ring_degree=ring_degree, ulysses_degree=ulysses_degree)
        if dims.num_gpus != num_gpus:
            raise ValueError(
                f"num_gpus ({num_gpus}) must equal dp_size * cfg_degree * ulysses_degree * ring_degree "
                f"({dp_size} * {cfg_degree} * {ulysses_degree} * {ring_degree} = {dims.num_gpus})"
            )
        return dims
