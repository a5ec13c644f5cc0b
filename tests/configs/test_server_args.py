"""The one model behind the flags, the YAML and Python: what it accepts and what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from configs.parallel import ParallelDims
from configs.server_args import ServerArgs


def test_everything_has_a_default() -> None:
    args = ServerArgs()
    assert (args.host, args.port, args.num_gpus, args.model_path) == ("127.0.0.1", 30000, 1, None)
    assert args.parallel == ParallelDims()


def test_the_command_of_the_readme_gives_two_by_two() -> None:
    args = ServerArgs(
        text_encoder_cpu_offload=True, pin_cpu_memory=True, num_gpus=4, ulysses_degree=2, ring_degree=2, port=30010
    )
    assert args.parallel == ParallelDims(ring_degree=2, ulysses_degree=2)


def test_an_unknown_key_is_an_error_that_names_it() -> None:
    with pytest.raises(ValidationError, match="ulyses_degree"):
        ServerArgs(ulyses_degree=2)


def test_null_means_left_out() -> None:
    """YAML reads `port:` with nothing after it as null."""
    assert ServerArgs(port=None, lora_nickname=None, num_gpus=None) == ServerArgs()


@pytest.mark.parametrize(
    "field",
    [
        {"port": 0},
        {"port": 65536},
        {"num_gpus": 0},
        {"dp_size": 0},
        {"ulysses_degree": 0},
        {"dtype": "fp8"},
        {"device": "tpu"},
        {"lora_switch": "maybe"},
        {"lora_nickname": ""},
        {"lora_cache_bytes": -1},
        {"num_cpus_per_rank": 0},
        {"log_level": "loud"},
        {"video_ttl": 0},
        {"storage_bytes": -1},
    ],
    ids=lambda field: "=".join(map(str, *field.items())),
)
def test_a_value_out_of_range_is_an_error_that_names_its_field(field) -> None:
    with pytest.raises(ValidationError) as refusal:
        ServerArgs(**field)
    assert [error["loc"] for error in refusal.value.errors()] == [tuple(field)]


def test_the_two_ways_to_offload_the_transformer_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="dit_cpu_offload and dit_layerwise_offload exclude each other"):
        ServerArgs(dit_cpu_offload=True, dit_layerwise_offload=True)


def test_degrees_that_do_not_multiply_are_refused_with_the_equation() -> None:
    equation = r"num_gpus \(4\) must equal .* \(1 \* 1 \* 3 \* 1 = 3\)"
    with pytest.raises(ValidationError, match=equation):
        ServerArgs(num_gpus=4, ulysses_degree=3)


def test_a_single_key_need_not_be_a_list() -> None:
    assert ServerArgs(api_key="one").api_key == ServerArgs(api_key=["one"]).api_key == ("one",)


def test_it_survives_the_way_through_yaml_and_json() -> None:
    args = ServerArgs(num_gpus=4, ring_degree=2, lora_path="adapters/ink.safetensors", api_key=["one", "two"])
    assert ServerArgs.model_validate(args.model_dump()) == args
    assert ServerArgs.model_validate_json(args.model_dump_json()) == args


def test_every_field_says_what_it_does() -> None:
    assert [name for name, field in ServerArgs.model_fields.items() if not field.description] == []
