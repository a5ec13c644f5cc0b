"""Tiny text and vision encoders, tokenizers and processors, as each family's pipeline expects them."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaddleOCRVLProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

DIM = 32
"""Width of every encoder."""
PAD, END = 0, 1
"""Ids that `byte_tokenizer` gives `<pad>` and `</s>`."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
USER_ONLY = (
    "{% for message in messages if message.role == 'user' %}{% for part in message.content %}"
    "{{ part.text }}{% endfor %}{% endfor %}"
)


def byte_tokenizer(special_tokens: tuple[str, ...] = (), **kwargs: Any) -> PreTrainedTokenizerFast:
    """One token per byte, so that every UTF-8 prompt has its own tokens; then `</s>`.

    Its vocabulary is `<pad>`, `</s>`, `<unk>`, the 256 bytes, and `special_tokens`; `kwargs` go to the tokenizer.
    """
    basic = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*basic, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*basic, *special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **{"model_max_length": 512, **kwargs},
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(
        CHATML_TOKENS, model_max_length=2048, model_specific_special_tokens={"image_token": "<|image_pad|>"}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(byte_tokenizer()), d_model=DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def umt5_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(byte_tokenizer()), d_model=DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def clip_config(width: int = DIM) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=PAD,
        bos_token_id=PAD,
        eos_token_id=END,
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(model_max_length=77)


def clip_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(clip_config())


def clip_text_encoder_with_projection(width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(width))


def clip_vision() -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """16 patches and a class token, where the real one has 257."""
    size = 32
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=DIM,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=size,
            patch_size=8,
        )
    )
    return encoder, CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def qwen3_config(num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(chat_tokenizer()),
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=None,
        eos_token_id=END,
    )


def qwen3_model() -> Qwen3Model:
    return Qwen3Model(qwen3_config(num_layers=2))


def qwen3_language_model() -> Qwen3ForCausalLM:
    """FLUX.2 klein reads the hidden states of layers 9, 18 and 27, so it needs 27."""
    return Qwen3ForCausalLM(qwen3_config(num_layers=27))


def qwen25_vl() -> Qwen2_5_VLForConditionalGeneration:
    token_id = chat_tokenizer().convert_tokens_to_ids
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(chat_tokenizer()),
                "hidden_size": DIM,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                # Time, height and width share the 8 frequencies of a 16-wide head.
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
                "bos_token_id": None,
                "eos_token_id": END,
            },
            vision_config={
                "depth": 2,
                "hidden_size": DIM,
                "out_hidden_size": DIM,
                "intermediate_size": 64,
                "num_heads": 2,
                "fullatt_block_indexes": [1],
            },
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
        )
    )


def qwen_processor() -> PaddleOCRVLProcessor:
    """Qwen's image processor and tokenizer in a processor that does without video, and so without torchvision."""
    return PaddleOCRVLProcessor(image_processor=Qwen2VLImageProcessorPil(), tokenizer=chat_tokenizer())


def mistral3() -> Mistral3ForConditionalGeneration:
    """FLUX.2 reads the hidden states of layers 10, 20 and 30, so it needs 30."""
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=MistralConfig(
                vocab_size=len(byte_tokenizer(("[IMG]",))),
                hidden_size=DIM,
                intermediate_size=64,
                num_hidden_layers=30,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                bos_token_id=None,
                eos_token_id=END,
            ),
            vision_config=PixtralVisionConfig(
                hidden_size=DIM, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64
            ),
            image_token_index=byte_tokenizer(("[IMG]",)).convert_tokens_to_ids("[IMG]"),
        )
    )


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Replaces FLUX.2's `PixtralProcessor`, which needs torchvision and here would only ever see text."""
    tokenizer = byte_tokenizer(("[IMG]",), model_max_length=2048)
    tokenizer.chat_template = USER_ONLY
    return tokenizer
