"""Frozen weights in 4 or 8 bits, by bitsandbytes.

nf4: 4-bit normal floats in blocks of 64, each with a scale, and the scales quantised too where that is asked
for: 4.13 bits a weight (Dettmers et al. 2023, arXiv:2305.14314). int8: LLM.int8(), 8 bits, and 16 for columns
of the input that lie far out (Dettmers et al. 2022, arXiv:2208.07339). Embeddings and the output head stay as
they are.

Not here: what is trained beside them (bases.py).
"""

from typing import Any, Literal

import torch
from torch import nn


def bitsandbytes_setting(quantisation: Literal["none", "nf4", "int8"], *, double: bool) -> Any:
    """Return the setting (a transformers BitsAndBytesConfig), or None for none.

    Args:
        quantisation: As in BaseRecipe.
        double: Quantise the scales of nf4 too.
    """
    if quantisation == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@torch.no_grad()
def random_quantised(model: Any, quantisation: Any, device: torch.device) -> Any:
    """Return a model of the meta device with random weights, its linear layers quantised, on a device.

    Layers are drawn and quantised one after the other, where they stay: at no time is there more than one
    that is not quantised yet. All else is drawn as the architecture does.

    Args:
        model: Without weights; changed in place.
        quantisation: What bitsandbytes_setting returned.
        device: Where the weights stay.
    """
    from bitsandbytes.nn import Int8Params, Params4bit
    from transformers.quantizers import AutoHfQuantizer

    quantiser = AutoHfQuantizer.from_config(quantisation, pre_quantized=False)
    quantiser.preprocess_model(model=model, dtype=model.dtype, device_map={"": device})
    spread = getattr(model.config, "initializer_range", 0.02)
    drawn = []
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.zeros(parameter.shape, dtype=model.dtype, device=device)
            if isinstance(parameter, Int8Params | Params4bit):
                value.normal_(0, spread)
                # 8-bit weights are quantised on their way from the CPU only
                value = value.cpu() if isinstance(parameter, Int8Params) else value
                settings = {k: v for k, v in vars(parameter).items() if k != "SCB"}
                value = type(parameter)(value, requires_grad=False, **settings).to(device)
                value._is_hf_initialized = True
                drawn.append(value)
                setattr(module, key, value)
            else:
                setattr(module, key, nn.Parameter(value, requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            is_kept = key not in module._non_persistent_buffers_set
            module.register_buffer(key, torch.empty_like(buffer, device=device), persistent=is_kept)
        module._is_hf_initialized = False
    model.initialize_weights()  # leaves what was drawn here
    for value in drawn:
        del value._is_hf_initialized  # bitsandbytes hands on a weight's attributes as arguments
    model.tie_weights()
    quantiser.postprocess_model(model)
    model.hf_quantizer = quantiser  # as from_pretrained leaves it; transformers' Trainer asks for it
    return model
