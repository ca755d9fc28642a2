"""What a quantised base really computed with: its weights after quantising and back, as bitsandbytes does both."""

from __future__ import annotations

from typing import Any

import torch

from components.common.loading import quiet_libraries

BLOCK_SIZE = 64  # weights that share a scale; the default of transformers' BitsAndBytesConfig
SCALES_BLOCK_SIZE = 256  # scales that share a scale of their own
PIECE_WEIGHTS = 1 << 17  # a multiple of the block size


def quantised_layers(model: Any) -> frozenset[str]:
    """The names of the layers that bitsandbytes quantises: every linear layer but the head.

    Args:
        model: the model, its weights may be on the meta device.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return frozenset(
        name for name, module in model.named_modules() if type(module) is torch.nn.Linear and should_convert_module(name, spared)
    )


def round_trip(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """A weight (out, in) quantised and back, fp32; the same numbers that the library's own layers compute with.

    A piece at a time: the library's copies of a whole layer would take ten times its size.

    Args:
        quantization: nf4: 4-bit NormalFloat with double quantisation (arXiv 2305.14314); int8: LLM.int8() (arXiv 2208.07339), whose
            activations are quantised too while it runs, which no weight can show.
    """
    quiet_libraries()
    found = torch.empty(weight.shape, dtype=torch.float32)
    if quantization == "int8":
        _fill_int8(found, weight)
    else:
        _fill_nf4(found.view(-1), weight.reshape(-1))
    return found


def _fill_int8(found: torch.Tensor, weight: torch.Tensor) -> None:
    import bitsandbytes.functional as bnb

    rows = max(1, PIECE_WEIGHTS // weight.shape[1])
    for out, piece in zip(found.split(rows), weight.split(rows), strict=True):
        codes, scales, _ = bnb.int8_vectorwise_quant(piece.to(torch.float16))  # always from fp16, as the library's own layer does
        out.copy_(bnb.int8_vectorwise_dequant(codes, scales))


def _fill_nf4(found: torch.Tensor, weight: torch.Tensor) -> None:
    """Codes piece by piece; their scales are quantised too, all together, because their mean is taken out first."""
    import bitsandbytes.functional as bnb

    pieces = [bnb.quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type="nf4") for piece in weight.split(PIECE_WEIGHTS)]
    scales = torch.cat([state.absmax for _, state in pieces])
    mean = scales.mean()
    scales = bnb.dequantize_blockwise(*bnb.quantize_blockwise(scales - mean, blocksize=SCALES_BLOCK_SIZE)) + mean
    first = 0
    for out, (codes, state) in zip(found.split(PIECE_WEIGHTS), pieces, strict=True):
        blocks = len(state.absmax)
        state.absmax, state.dtype = scales[first : first + blocks], torch.float32
        out.copy_(bnb.dequantize_4bit(codes, state).view(-1))
        first += blocks
