"""Setting, merging and unmerging the default adapter of new jobs."""

from __future__ import annotations

import pytest

from deployments.errors import APIError
from deployments.interfaces import LoRARequest
from tests.deployments.state.default_lora.replicas import Server, merged, nicknames


async def test_set_lora_returns_when_every_replica_has_merged(server: Server) -> None:
    status = await server.set("style", "a", 0.7)
    assert [nicknames(replica.weights) for replica in server.replicas] == [["style"], ["style"]]
    assert merged(status) == ["transformer", "transformer_2"]
    assert {name: nicknames(specs) for name, specs in status.replicas.items()} == {
        "replica-0": ["style"],
        "replica-1": ["style"],
    }
    assert status.num_bytes_held == {"replica-0": 7, "replica-1": 7}
    assert server.job() == [("style", "a@1", 0.7)]


async def test_a_composition_is_one_default(server: Server) -> None:
    await server.default.set_lora([LoRARequest("style", "a", 0.6), LoRARequest("face", "b", 0.35)])
    assert server.job() == [("style", "a@1", 0.6), ("face", "b@1", 0.35)]
    assert server.replicas[0].merges == [(), server.replicas[0].weights]


async def test_setting_what_is_merged_again_changes_nothing(server: Server) -> None:
    await server.set("style", "a")
    await server.set("style", "a")
    await server.set("style")
    assert len(server.replicas[0].merges) == 2
    assert server.files.loads == ["a"]


async def test_the_strength_of_what_is_merged_can_be_set_anew(server: Server) -> None:
    await server.set("style", "a")
    await server.set("style", strength=0.5)
    assert server.job() == [("style", "a@1", 0.5)]


async def test_another_adapter_is_refused_while_one_is_merged(server: Server) -> None:
    await server.set("style", "a")
    with pytest.raises(APIError, match=r"LoRA 'style' is merged\. Call POST /v1/unmerge_lora_weights first") as refused:
        await server.set("face", "b")
    assert refused.value.status == 409
    assert nicknames(server.default.status().default) == ["style"]
    assert server.files.loads == ["a"]


async def test_switching_is_automatic_when_so_configured() -> None:
    server = Server(switch="auto")
    await server.start(1)
    await server.set("style", "a")
    await server.set("face", "b")
    assert nicknames(server.replicas[0].weights) == ["face"]
    await server.set("face", "c")
    assert server.job() == [("face", "c@1", 1.0)]
    await server.replicas[0].die()


async def test_unmerge_then_merge_brings_back_the_strengths_that_were_set(server: Server) -> None:
    await server.default.set_lora([LoRARequest("style", "a", 0.6), LoRARequest("face", "b", 0.35)])
    status = await server.default.unmerge_lora()
    assert (merged(status), server.replicas[1].weights, server.job()) == ([], (), [])
    assert nicknames(status.active["transformer"].adapters) == ["style", "face"]
    await server.default.merge_lora()
    assert server.job() == [("style", "a@1", 0.6), ("face", "b@1", 0.35)]
    await server.default.merge_lora(strength=1.0)
    assert server.job() == [("style", "a@1", 1.0), ("face", "b@1", 1.0)]
    await server.default.unmerge_lora()
    await server.default.merge_lora()
    assert server.job() == [("style", "a@1", 0.6), ("face", "b@1", 0.35)]


async def test_unmerging_nothing_and_merging_what_is_merged_change_nothing(server: Server) -> None:
    assert merged(await server.default.unmerge_lora()) == []
    await server.set("style", "a")
    await server.default.merge_lora()
    assert len(server.replicas[0].merges) == 2


async def test_one_expert_alone_can_be_unmerged(server: Server) -> None:
    await server.set("style", "a")
    await server.default.unmerge_lora(target=("critic",))
    assert server.replicas[0].weights[0].target == ("all",)
    status = await server.default.unmerge_lora(target=("transformer",))
    assert server.replicas[0].weights[0].target == ("transformer_2",)
    assert merged(status) == ["transformer_2"]
    assert merged(await server.default.unmerge_lora(target=("transformer_2",))) == []


async def test_what_is_active_is_told_by_transformer(server: Server) -> None:
    status = await server.default.set_lora(
        [LoRARequest("style", "a"), LoRARequest("face", "b", target=("transformer",))]
    )
    assert {transformer: nicknames(active.adapters) for transformer, active in status.active.items()} == {
        "transformer": ["style", "face"],
        "transformer_2": ["style"],
    }


async def test_what_is_merged_is_told_with_the_strength_and_the_target_it_was_merged_with(server: Server) -> None:
    await server.set("style", "a", 0.6)
    status = await server.default.merge_lora(strength=0.2, target=("transformer",))
    assert [spec.strength for spec in status.default] == [0.2]
    told = {name: (active.merged, active.adapters[0].strength) for name, active in status.active.items()}
    assert told == {"transformer": (True, 0.2), "transformer_2": (False, 0.6)}


async def test_an_adapter_for_one_expert_alone_is_active_there_alone(server: Server) -> None:
    server.files.transformers = ("transformer_2",)
    assert list((await server.set("low noise", "a")).active) == ["transformer_2"]


async def test_merging_before_anything_was_set_is_refused(server: Server) -> None:
    with pytest.raises(APIError, match="Call POST /v1/set_lora first"):
        await server.default.merge_lora()


async def test_targets_that_the_model_lacks_are_ignored_and_named(server: Server) -> None:
    status = await server.default.set_lora([LoRARequest("style", "a", target=("transformer", "critic"))])
    assert status.notes == ("target 'critic' is ignored: there is only transformer, transformer_2",)
