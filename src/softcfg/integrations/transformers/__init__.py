"""CFG and SoftCFG for image-token models of Hugging Face transformers, without changing their code.

Importing this package registers the attention implementation "softcfg": the model's usual `sdpa`, and weighted
attention wherever a forward call passes `value_weights`, `key_weights` or `attention_weights`. Three ways to draw with
it:

    model.set_attn_implementation("softcfg")
    tokens = decode(model, input_ids, SoftCFG(), num_tokens=..., unconditional_ids=...)
    sequences = model.generate(input_ids, custom_generate=generate, guidance=SoftCFG(), unconditional_ids=..., ...)
    images = Pipeline(ImageGenerator(model, ImageTokens(...), encode), tokenizer, name=...)(prompts=[...]).images
"""

from softcfg.errors import UserError, how_to_install

try:
    from softcfg.integrations.transformers.attention_function import attention, sdpa_mask_noting_slots
    from softcfg.integrations.transformers.custom_generate import generate
    from softcfg.integrations.transformers.decoding import decode
    from softcfg.integrations.transformers.generator import TransformersGenerator
    from softcfg.integrations.transformers.image_generator import ImageGenerator, ImageTokens, TextPrompts
    from softcfg.integrations.transformers.image_head import ImageHead
    from softcfg.integrations.transformers.prompts import PromptCondition, Prompts
except ImportError as error:  # there is no transformers, or one without the names that these modules import
    raise UserError(f"this needs transformers 5.6 or later: {how_to_install('transformers')}") from error

__all__ = [
    "ImageGenerator",
    "ImageHead",
    "ImageTokens",
    "PromptCondition",
    "Prompts",
    "TextPrompts",
    "TransformersGenerator",
    "attention",
    "decode",
    "generate",
    "sdpa_mask_noting_slots",
]
