"""A character-level tokenizer and a randomly initialised Qwen3 of about a million parameters."""

import re
from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cppo_verl.quickstart.specs import ModelShape

PAD_TOKEN = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
UNKNOWN_TOKEN = "<unk>"
ROLES = ("system", "user", "assistant")
CHARACTERS = "0123456789+-=?\\{} \n.,:abcdefghijklmnopqrstuvwxyz"
# Calls of tools and their results as Qwen3's template has them; the tools' descriptions are left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson + '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(shape: ModelShape, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per character, role name, special token or word; decoding joins them verbatim."""
    tokens = [PAD_TOKEN, TURN_START, TURN_END, UNKNOWN_TOKEN, *ROLES, *CHARACTERS, *words]
    tokens += [f"<unused {number}>" for number in range(len(tokens), shape.vocabulary)]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, UNKNOWN_TOKEN))
    wholes = "|".join(map(re.escape, (*words, *ROLES)))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{wholes}|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        additional_special_tokens=[TURN_START],
        model_max_length=shape.max_positions,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A float32 Qwen3 with random weights, its token ids set from ``tokenizer``."""
    token_ids = {
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        dtype=torch.float32,
        **token_ids,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**token_ids)
    return model
