"""Wire models of the adapter routes' requests, with the lists that SGLang takes."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field

from deployments.api.protocol.requests import Number, WireRequest, listed
from deployments.errors import APIError
from deployments.interfaces import LoRARequest

Value = TypeVar("Value")

Names = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(listed), Field(min_length=1)]


def _refuse_alpha(value: object) -> None:
    raise ValueError("it is not supported: alpha is read from the adapter's file")


class LoRATargets(WireRequest):
    """Body of `POST /v1/unmerge_lora_weights`; may be absent."""

    target: Names | None = Field(None, description="Transformers: `all`, or names such as `transformer_2`.")


class MergeLoRA(LoRATargets):
    """Body of `POST /v1/merge_lora_weights`; may be absent."""

    strength: Number | None = Field(None, description="Left out: the strengths they were set with.")


class SetLoRA(WireRequest):
    """Body of `POST /v1/set_lora`. Lists form one composition, merged as a unit."""

    lora_nickname: Names = Field(description="Name of the adapter, or a list of names.")
    lora_path: Annotated[list[str | None], BeforeValidator(listed)] | None = Field(
        None,
        description="A .safetensors file, a folder or a Hugging Face repo id. May be left out for a nickname that was "
        "loaded before.",
    )
    strength: Annotated[list[Number], BeforeValidator(listed)] = Field(default=[1.0], min_length=1)
    target: Names = Field(
        default=["all"],
        description="Transformers: `all`, or names such as `transformer_2`. A list has one per adapter.",
    )
    merge_mode: Literal["auto", "merge"] | None = Field(None, description="Adapters are always merged.")
    lora_alpha: Annotated[None, BeforeValidator(_refuse_alpha)] = Field(
        None, description="Not supported: alpha is read from the adapter's file."
    )

    def adapters(self) -> list[LoRARequest]:
        """One per nickname. A single strength or target applies to all; a single adapter may have several targets.

        Raises:
            APIError: 400 for a list that does not have one entry per nickname.
        """
        count = len(self.lora_nickname)
        unnamed: list[str | None] = [None] * count
        paths = self._per_adapter("lora_path", self.lora_path or unnamed)
        strengths = self._per_adapter("strength", self.strength * count if len(self.strength) == 1 else self.strength)
        if count == 1:
            targets = [tuple(self.target)]
        else:
            names = self._per_adapter("target", self.target * count if len(self.target) == 1 else self.target)
            targets = [(name,) for name in names]
        return [LoRARequest(*adapter) for adapter in zip(self.lora_nickname, paths, strengths, targets, strict=True)]

    def _per_adapter(self, name: str, values: list[Value]) -> list[Value]:
        count = len(self.lora_nickname)
        if len(values) != count:
            message = f"Invalid '{name}': it has {len(values)} entries for {count} adapter(s)"
            raise APIError(400, message, param=name, code="invalid_value")
        return values
